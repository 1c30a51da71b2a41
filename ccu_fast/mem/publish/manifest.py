"""manifest.json: what was done to a dataset, with what, and the hash of every file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ccu_fast.data.captions.listing import MANIFEST, Bad, Listing
from ccu_fast.files import json_text, write_whole
from ccu_fast.mem.fidelity import Fidelity
from ccu_fast.mem.publish.card import CARD, dataset_card
from ccu_fast.mem.publish.elsewhere import Elsewhere
from ccu_fast.runs.provenance import versions


def write_manifest(
    folder: Path,
    listing: Listing,
    *,
    run: Mapping[str, Any],
    fidelity: Fidelity,
    losses: Mapping[str, Any],
    hashes: Mapping[str, str],
    dropped: Mapping[str, int],
    elsewhere: Elsewhere,
    skipped: Sequence[Bad],
    notes: Mapping[str, int],
) -> None:
    """Write ``manifest.json``, and :data:`.CARD` which is not in it: its owner may write more into it.

    Args:
        folder: of the dataset.
        listing: what was protected.
        run: method, settings, seed, model, … as the run was described.
        fidelity: of all pictures.
        losses: of the generator.
        hashes: SHA-256 of every file by its path in ``folder``.
        dropped: shards: members that were not taken over, by extension.
        elsewhere: fields in which clean captions stood besides those that they were read from.
        skipped: what is not in the output.
        notes: what the output does not show of pictures of the input, and of how many.
    """
    manifest = {
        "format": listing.format,
        "metadata": [os.path.relpath(table, listing.root) for table in listing.tables],
        "columns": listing.columns,
        **run,
        "versions": versions("ccu_fast", "torch", "pillow", "python"),
        "images": listing.n_images,
        "rows": len(listing.captions),
        "skipped": {"count": len(skipped), "items": [asdict(bad) for bad in skipped]},
        "pictures": dict(notes),
        "members_left_out": dict(dropped),
        "captions_elsewhere": elsewhere.counts(),
        "measured": fidelity.report(),
        "losses": dict(losses),
        "sha256": dict(sorted(hashes.items())),
    }
    write_whole(folder / CARD, dataset_card(manifest))
    write_whole(folder / MANIFEST, json_text(manifest, indent=1) + "\n")
