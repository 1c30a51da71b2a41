"""A folder in SALMUBench's layout, with made pictures."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch
from pyarrow import parquet

from ccu_fast.data.pictures import encode_png

SIZES = {"forget": 6, "holdout_identity": 4, "holdout_association": 4, "retain_synth": 6}


def write_salmubench(folder: Path) -> Path:
    """Each split in two shards; of retain_synth every other row shows nobody, the rest persons of forget."""
    (folder / "data").mkdir(parents=True)
    for split, size in SIZES.items():
        rows = []
        for i in range(size):
            colour = (40 * i + 9 * len(split)) % 256
            picture = torch.full((3, 8, 8), colour, dtype=torch.uint8)
            person = f"{split[:9]}{i // 2}" if split != "holdout_association" else f"forget{i // 2}"
            name = f"{person}_{split}_{i}.png"
            caption = f"The phone number is {100 + i} {person}" if "retain" not in split else f"A plain picture {i}"
            identity = person
            if split == "retain_synth":
                identity = None if i % 2 else "forget0"
            image = {"bytes": encode_png(picture), "path": name}
            rows.append({"image": image, "text": caption, "identity_id": identity, "file_name": name, "more": i})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema(
            [
                ("image", kind),
                ("text", pa.string()),
                ("identity_id", pa.string()),
                ("file_name", pa.string()),
                ("more", pa.int64()),
            ]
        )
        for shard, part in enumerate((rows[: size // 2], rows[size // 2 :])):
            path = folder / "data" / f"{split}-{shard:05d}-of-00002.parquet"
            parquet.write_table(pa.Table.from_pylist(part, schema), path)
    return folder
