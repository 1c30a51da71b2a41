"""Folders of pictures with captions beside them: ``x.jpg`` and ``x.txt``, one caption a line."""

from __future__ import annotations

import os
from pathlib import Path

from ccu_fast.data.captions.listing import Listing, Rows, visible_files
from ccu_fast.data.pictures import is_picture


def list_folder(root: Path) -> Listing:
    """The pictures below ``root`` in the order of their paths. Other files are no part of the dataset.

    A picture without captions and a caption file without a picture are bad.
    """
    rows = Rows()
    pictures, texts = [], []
    for file in visible_files(root):
        if is_picture(file):
            pictures.append(file)
        elif file.lower().endswith(".txt"):
            texts.append(file)
    text_of = {os.path.splitext(text)[0]: text for text in texts}  # x.TXT, too, is the text of x.jpg
    used = set()
    for number, picture in enumerate(pictures):
        stem = os.path.splitext(picture)[0]
        text = text_of.get(stem)
        if text is None:
            rows.refuse(picture, f"no caption file {stem}.txt")
            continue
        used.add(text)
        try:
            lines = (root / text).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            rows.refuse(text, f"expected UTF-8 text, got {error}")
            continue
        captions = [line for line in lines if line.strip()]
        if not captions:
            rows.refuse(text, "empty caption")
        for caption in captions:
            rows.add(number, text, os.path.normpath(root / picture), caption)
    for text in texts:
        if text not in used:
            rows.refuse(text, "no picture beside this caption file")
    return rows.listing("folder", root)
