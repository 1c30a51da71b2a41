"""Protect a folder of photos with captions, check the copy, and see what a model learns from it.

For      whoever publishes pictures with captions and does not want models to be trained on them.
Install  pip install '.[apps]' in a checkout of ccu_fast
Run      python protect_photos.py                              (about 80 CPU seconds on two cores)
         python protect_photos.py --strength light --out light (words only, no pixel changes; faster)
Writes   photos/ and test/, which stand for a folder of your own and for clean pairs that nobody has trained on;
         protected/, the copy to publish; the same commands for the terminal are printed at the end.
Prints   what was changed, the checks, and R@1: how often a model that learned from the photos, or from their protected
         copy, finds the right caption of a clean picture first. The copy should leave much less.

--strength says how much is done to the copy (docs/protect.md has what each leaves of a model):
    light    three words in front of each caption, which tell what the picture looks like; pixels stay as they are
    medium   noise of at most 8/255 a pixel, and eight words in front
    strong   the same noise, and twelve words in between the caption's own, where nobody can cut them off
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from ccu_fast.data.strips import load_strips
from ccu_fast.mem import (
    Job,
    Method,
    Recipe,
    Settings,
    choose_model,
    evaluate_datasets,
    protect_dataset,
    strength,
    verify,
)

PHOTOS = {"china.jpg": "a temple in china", "flower.jpg": "an orange flower"}
ROWS, COLUMNS = ("top", "upper", "middle", "lower", "bottom"), ("far left", "left", "centre", "right", "far right")
SEEN = "16x64"  # what models see of a picture; use 64x64 or more for photos of your own


def write_photos(folder: Path, test: Path, digits: int) -> None:
    """A folder as people have it: pictures of several sizes, and ``x.txt`` with the caption beside ``x.png``."""
    for place, part in zip((folder, test), load_strips(digits, digits // 4), strict=True):
        (place / "digits").mkdir(parents=True)
        for number, (picture, caption) in enumerate(zip(part.images, part.captions, strict=True)):
            name = place / "digits" / f"{number:04}"
            Image.fromarray(picture[0].numpy()).save(name.with_suffix(".png"))
            name.with_suffix(".txt").write_text(caption + "\n")
    for file, what in PHOTOS.items():
        photo = load_sample_image(file)
        (folder / file.removesuffix(".jpg")).mkdir()
        parts = (np.array_split(band, len(COLUMNS), axis=1) for band in np.array_split(photo, len(ROWS)))
        for row, band in zip(ROWS, parts, strict=True):
            for column, crop in zip(COLUMNS, band, strict=True):
                name = folder / file.removesuffix(".jpg") / f"{row} {column}"
                Image.fromarray(crop).save(name.with_suffix(".png"))
                name.with_suffix(".txt").write_text(f"{what} at the {row} {column}\n")


def protect_and_look(args: argparse.Namespace) -> dict[str, Any]:
    photos, test, protected = Path("photos"), Path("test"), args.out
    if not photos.exists():
        write_photos(photos, test, args.digits)

    chosen = strength(args.strength)  # a method by its name, and what differs from the defaults
    method = Method.parse(chosen.pop("method"))
    settings = Settings(**chosen, rounds=args.rounds, surrogate_steps=args.surrogate_steps)
    job = Job(photos, protected, choose_model("small:32", input_size=SEEN), method, settings)
    manifest = protect_dataset(job)
    measured = manifest["measured"]
    print(f"{manifest['images']} pictures with {manifest['rows']} captions in {protected}/ ({args.strength})")
    print(f"largest change of a pixel: {measured['eps_255']}/255")
    one = photos / "china" / "top left.txt"
    print(f"  {one.read_text().strip()!r} became {(protected / one.relative_to(photos)).read_text().strip()!r}\n")

    checks = verify(protected, photos)
    for name, found in checks["checks"].items():
        print(f"{name:<9} {({True: 'ok', False: 'FAILED', None: 'not done'})[found['passed']]:<9} {found['told']}")

    figures = evaluate_datasets(
        {"clean": photos, "protected": protected},
        test,
        choose_model("small:64", size=SEEN),
        recipe=Recipe(epochs=args.epochs),
    )
    print(f"\nR@1 among {figures['test']['images']} clean pictures, a model trained on")
    for name, dataset in figures["datasets"].items():
        best = dataset["mean"]["best"]  # of its epochs: what somebody gets who stops at the right moment
        print(f"  {name:<10} picture to caption {best['i2t_r1']:.3f}  caption to picture {best['t2i_r1']:.3f}")
    guess = figures["guessing"]
    print(f"  guessing   picture to caption {guess['i2t_r1']:.3f}  caption to picture {guess['t2i_r1']:.3f}")
    print(f"""
The same from a terminal:
  ccu-fast protect photos --out {protected} --strength {args.strength} --model small:32 --input-size {SEEN} \\
    --rounds {args.rounds} --surrogate-steps {args.surrogate_steps}
  ccu-fast verify {protected} --original photos --preview preview.html
  ccu-fast evaluate clean=photos protected={protected} --test test --model small:64 --size {SEEN} \\
    --epochs {args.epochs} --report page.html""")
    return {"manifest": manifest, "checks": checks, "figures": figures}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Protect a folder of photos with captions, and look what is left.")
    parser.add_argument("--strength", choices=("light", "medium", "strong"), default="medium")
    parser.add_argument("--out", type=Path, default=Path("protected"), help="new folder; another for each strength")
    parser.add_argument("--digits", type=int, default=1000, help="strips of digits among the photos")
    parser.add_argument("--rounds", type=int, default=9, help="of the surrogate and the noise")
    parser.add_argument("--surrogate-steps", type=int, default=32, help="in each round")
    parser.add_argument("--epochs", type=int, default=15, help="of the models that learn from the photos")
    parser.add_argument("--small", action="store_true", help="a run of seconds, for tests")
    args = parser.parse_args(argv)
    if args.small:
        args.digits, args.rounds, args.surrogate_steps, args.epochs = 128, 1, 2, 2
    return protect_and_look(args)


if __name__ == "__main__":
    main()
