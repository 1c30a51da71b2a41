#!/usr/bin/env bash
# Pillow 13 resizes to other pixels than Pillow 12, and a part of a picture to other pixels than the whole.
#
# resize goes along rows and then along columns, with 8 bits in between, where bicubic and Lanczos overshoots are cut off.
# Up to 12.3.0 rows always came first. In 13.0.0 columns may come first where the height shrinks more than the width
# (python-pillow/Pillow#9549); by a thousandth is enough. So preprocessing that keeps the proportions up to rounding, such
# as CLIP's, gives other pixels for some sizes, and resize(..., box=...) no longer gives what resizing the whole and
# cropping gives. Hashes, caches and bit-for-bit tests of resized pictures hold for one of the two versions.
#
# Seen: the largest difference, in levels of 255, of a random picture: the whole to rows first and to columns first, and
# of its box to the same part of the whole. 12.3.0: 0 12, 0. 13.0.0: 12 0, 12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip "numpy==2.3.*"
cat > "$folder/resize.py" <<'PYTHON'
import numpy as np
import PIL
from PIL import Image


def resized(picture, *sizes, **box):
    for size in sizes:
        picture = picture.resize(size, Image.Resampling.BICUBIC, **box)
    return np.asarray(picture).astype(int)


def random(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    return Image.fromarray(pixels)


upright = random(33, 220)  # to 29 wide
whole = resized(upright, (29, 193))
orders = resized(upright, (29, 220), (29, 193)), resized(upright, (33, 193), (29, 193))
print(PIL.__version__, *(abs(whole - order).max() for order in orders))
plain = random(44, 54)  # to 54 wide, and of that nine rows
part = resized(plain, (54, 9), box=(0, 28 * 54 / 66, 44, 37 * 54 / 66))
print(PIL.__version__, abs(part - resized(plain, (54, 66))[28:37]).max())
PYTHON
for version in 12.3.0 13.0.0; do
  pip --no-deps --target "$folder/$version" "pillow==$version"
  PYTHONPATH="$folder/$version" "$folder/venv/bin/python" "$folder/resize.py"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
12.3.0 0 12
12.3.0 0
13.0.0 12 0
13.0.0 12
EXPECTED
