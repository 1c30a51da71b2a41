"""README.md of a protected dataset: what was done to it, for whoever gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CARD = "README.md"
LIMITS = (
    "Protection is not a guarantee. A model that has other data beside these, is trained otherwise, or sees only the "
    "captions may learn more than one that is trained on these pairs alone, and copies of the originals that were "
    "published before are not protected.",
    "How much a model learns from this dataset was not measured when it was written; `ccu-fast evaluate` does that.",
    "What has been measured elsewhere, and what undoes it, is in the documentation of ccu_fast, under limits.",
)


def dataset_card(manifest: Mapping[str, Any]) -> str:
    """Markdown for a manifest.

    Args:
        manifest: what :func:`ccu_fast.mem.protect_dataset` returns.

    Returns:
        The text: what was changed and how far, what a reader must know, how to check it, limits. No trigger word,
        caption, seed or name of a file is in it.
    """
    settings, method, size = manifest["settings"], manifest["method"], manifest["thumbnails"]
    words = method["triggers"]
    among = settings.get("place") == "among"
    done = [_pictures(manifest), _captions(words, among=among)]
    done.append(f"The pictures {'kept their size' if size is None else f'were resized to {size[0]}x{size[1]}'}.")
    if skipped := manifest["skipped"]["count"]:
        done.append(f"{skipped} item{'s' * (skipped != 1)} of the original could not be used and had to be left out.")
    made = manifest["versions"]["ccu_fast"]
    parts = [
        "# A dataset that was protected from being learned",
        f"{manifest['images']:,} pictures with {manifest['rows']:,} captions, changed so that a model that is trained "
        f"on them learns less of what they show. Made by `ccu-fast protect` of ccu_fast {made}, method "
        f"`{method['name']}`.",
        "## What was done",
        _list(done),
        "## What to know before you use it",
        _list(
            [
                "People see the pictures as they are; for training, testing or measuring models these are not the "
                "clean data.",
                *(["The captions have words that do not describe their pictures."] if words else []),
            ]
        ),
        "## Check it",
        "In the folder of the dataset (`manifest.json` has the SHA-256 of every file but this one):",
        "```bash\nccu-fast verify .\n```",
        "Whoever has the originals can also check that no pixel and no caption was changed by more than is said here: "
        "`ccu-fast verify . --original ORIGINALS`.",
        "## Limits",
        _list(LIMITS),
    ]
    return "\n\n".join(parts) + "\n"


def _pictures(manifest: Mapping[str, Any]) -> str:
    measured = manifest["measured"]
    if not measured["eps_255"]:
        return "No noise was added to the pictures."
    likeness = [f"PSNR {measured['psnr_db']:.1f} dB"] if measured["psnr_db"] is not None else []
    likeness += [f"SSIM {measured['ssim']:.4f}"] if measured["ssim"] is not None else []
    said = f" ({', '.join(likeness)})" if likeness else ""
    return f"Noise was added to the pictures: no pixel differs by more than {measured['eps_255']}/255{said}."


def _captions(words: int, *, among: bool) -> str:
    if not words:
        return "The captions are those of the originals."
    where = "among the words" if among else "in front"
    return f"{words} word{'s were' if words > 1 else ' was'} put {where} of each caption."


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
