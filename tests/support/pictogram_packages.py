"""A folder of npm packages of the form that ccu_fast.data.pictograms reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ccu_fast.data.pictograms import ARTISTS


def write_packages(folder: Path, things: int = 6) -> Path:
    """Things of which facebook has not drawn the fifth and the sixth has two tones; the first has the selector FE0F.

    The upper half of a drawing is of one colour: its red is of the thing, its blue of the artist.
    """
    for artist in ARTISTS:
        package = folder / f"emoji-datasource-{artist}"
        (package / "img" / artist / "64").mkdir(parents=True)
        table = []
        for i in range(things):
            code = f"1F6{i:02}" + ("-FE0F" if i == 0 else "")
            about: dict[str, Any] = {"unified": code, "image": f"{code.lower()}.png"}
            about |= {f"has_img_{name}": not (i == 4 and name == "facebook") for name in ARTISTS}
            if i == 5:
                about["skin_variations"] = {
                    tone: {**about, "unified": f"{code}-{tone}", "image": f"{code.lower()}-{tone}.png"}
                    for tone in ("1F3FB", "1F3FF")
                }
            for each in (about, *about.get("skin_variations", {}).values()):
                if each[f"has_img_{artist}"]:
                    drawn = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
                    drawn.paste((40 * i % 256, (255 - 40 * i) % 256, 10 * len(artist), 255), (0, 0, 64, 32))
                    drawn.save(package / "img" / artist / "64" / each["image"])
            table.append(about)
        (package / "emoji.json").write_text(json.dumps(table))
    texts = folder / "emojibase-data" / "en"
    texts.mkdir(parents=True)
    data = [
        {
            "hexcode": f"1F6{i:02}",
            "label": f"Thing {i}!",
            "group": i % 10,
            "subgroup": i % 2,
            "tags": [f"tag{i}{k}" for k in range(4)],
        }
        for i in range(things)
    ]
    data[5]["skins"] = [{"hexcode": f"1F605-{tone}", "label": f"Thing 5: {tone}"} for tone in ("1F3FB", "1F3FF")]
    texts.joinpath("data.json").write_text(json.dumps(data))
    groups = [{"order": i, "message": f"group / {i}"} for i in range(2)]
    texts.joinpath("messages.json").write_text(json.dumps({"subgroups": groups}))
    return folder
