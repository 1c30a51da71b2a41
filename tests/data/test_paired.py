"""Paired data and digits-halves."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from ccu_fast.data.halves import load_halves
from ccu_fast.data.paired import PairedData


def test_halves_are_the_real_digits_split_once() -> None:
    halves = load_halves(0)
    parts = (halves.train, halves.held_out, halves.test)
    assert [len(p) for p in parts] == [1257, 180, 360]
    ids = torch.cat([p.ids for p in parts])
    assert torch.equal(ids.sort().values, torch.arange(1797))
    digits = load_digits()
    for part in parts:
        image = torch.cat([part.visual.view(-1, 8, 4), part.other.view(-1, 8, 4)], dim=2)
        assert torch.equal(image * 16, torch.tensor(digits.images, dtype=torch.float32)[part.ids])
        assert torch.equal(part.labels, torch.tensor(digits.target)[part.ids])
        share = part.labels.bincount() / len(part) - torch.tensor(digits.target).bincount() / 1797
        assert share.abs().max() < 0.01


def test_the_split_depends_on_the_seed_alone() -> None:
    one, again, other = load_halves(1), load_halves(1), load_halves(2)
    assert torch.equal(one.test.ids, again.test.ids)
    assert not torch.equal(one.test.ids, other.test.ids)


def test_paired_data_selects_and_checks() -> None:
    x, labels = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 0, 2])
    data = PairedData(x, -x, labels)
    part = data[labels == 0]
    assert part.ids.tolist() == [0, 2] and torch.equal(part.visual, x[[0, 2]]) and torch.equal(part.other, -x[[0, 2]])
    assert torch.equal(data.batch(torch.tensor([3, 1])).labels, torch.tensor([2, 1]))
    for error, message, arguments in [
        (ValueError, "labels: expected 4 items", (x, x, labels[:2])),
        (ValueError, "visual: expected 4 items", (x[:3], x, labels)),
        (ValueError, "labels: expected class indices", (x, x, labels - 1)),
        (ValueError, "ids: expected every id once", (x, x, labels, torch.tensor([0, 1, 1, 2]))),
        (TypeError, "labels: expected dtype", (x, x, labels.float())),
        (TypeError, r"visual: expected a torch.Tensor", ([1], x, labels)),
    ]:
        with pytest.raises(error, match=message):
            PairedData(*arguments)
