"""digits-halves: real handwritten digits cut in two, so that each half is one modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ccu_fast import extras
from ccu_fast.data.paired import PairedData

CLASSES = 10
PIXELS = 32


@dataclass(frozen=True)
class Halves:
    """The three disjoint parts of digits-halves.

    Attributes:
        train: 70 % of the items.
        test: two thirds of the rest; no choice may look at it.
        held_out: one third of the rest, for stopping and tuning.
    """

    train: PairedData
    test: PairedData
    held_out: PairedData


def load_halves(seed: int = 0) -> Halves:
    """The 1,797 8×8 digits of scikit-learn; the left 8×4 pixels are ``visual``, the right ones ``other``.

    Both halves are real images and each tells the digit with some 90 % accuracy. The parts are stratified by class
    and depend on the seed alone. Pixels are fp32 in [0, 1], ``[N, 32]``; ids are positions in the original data set.

    Args:
        seed: of the split, at least 0.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (test part), as bundled with
    scikit-learn.
    """
    extras.require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    data = PairedData(images[:, :, :4].flatten(1), images[:, :, 4:].flatten(1), labels)

    train, rest = train_test_split(range(len(data)), test_size=0.3, stratify=labels, random_state=seed)
    test, held_out = train_test_split(rest, test_size=1 / 3, stratify=labels[rest], random_state=seed)
    return Halves(*(data[torch.tensor(sorted(part))] for part in (train, test, held_out)))
