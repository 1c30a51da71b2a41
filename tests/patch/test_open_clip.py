"""open_clip's own classes, patched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ccu_fast
from tests.support import torchvision_stub
from tests.support.drop_in import library, same_numbers, same_training, speed, train_towers, unit

SCALE, BIAS = 30.0, -6.0


@pytest.fixture(scope="module")
def loss_py():  # type: ignore[no-untyped-def]
    torchvision_stub.install()
    library("open_clip")
    return __import__("open_clip.loss").loss


def towers(dtype: torch.dtype, n: int = 37, d: int = 24) -> list[Tensor]:
    x, y = unit(n, d, seed=1, dtype=dtype), unit(n, d, seed=2, dtype=dtype)
    scale = torch.tensor(SCALE, dtype=dtype)
    return [t.requires_grad_() for t in (x, y, scale)]


def test_clip_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        leaves = towers(dtype)
        return lambda: loss_py.ClipLoss()(*leaves, output_dict=True)["contrastive_loss"], leaves

    same_numbers("open_clip", problem)


def test_siglip_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        leaves = [*towers(dtype), torch.tensor(BIAS, dtype=dtype).requires_grad_()]
        return lambda: loss_py.SigLipLoss()(*leaves), leaves

    same_numbers("open_clip", problem)


def test_coca_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        x, y, scale = towers(dtype)
        logits = unit(37, 5, 11, seed=3, dtype=dtype).requires_grad_()
        labels = torch.randint(0, 11, (37, 5), generator=torch.Generator().manual_seed(0))
        coca = loss_py.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5)
        return lambda: sum(coca(x, y, logits, labels, scale)), [x, y, scale, logits]

    same_numbers("open_clip", problem)


def test_training_is_the_same(loss_py) -> None:  # type: ignore[no-untyped-def]
    same_training("open_clip", lambda steps: train_towers(loss_py.ClipLoss(), steps))


def test_objects_that_exist_are_served_and_given_back(loss_py) -> None:  # type: ignore[no-untyped-def]
    existing, own = loss_py.ClipLoss(), loss_py.ClipLoss.forward
    x, y, scale = towers(torch.bfloat16)
    assert existing(x, y, scale).dtype == torch.bfloat16
    with ccu_fast.patch.applied("open_clip") as replaced:
        assert replaced == ["open_clip.loss.ClipLoss.forward", "open_clip.loss.SigLipLoss.forward"]
        assert existing(x, y, scale).dtype == torch.float32
    assert loss_py.ClipLoss.forward is own
    assert existing(x, y, scale).dtype == torch.bfloat16


def test_a_subclass_with_logits_of_its_own_keeps_them(loss_py) -> None:  # type: ignore[no-untyped-def]
    class Doubled(loss_py.ClipLoss):  # type: ignore[misc, name-defined]
        def get_logits(self, *args: object, **kwargs: object) -> object:
            return [2 * logits for logits in super().get_logits(*args, **kwargs)]

    leaves = towers(torch.float32)
    before = Doubled()(*leaves)
    with ccu_fast.patch.applied("open_clip"):
        assert torch.equal(Doubled()(*leaves), before)


def test_speed(loss_py) -> None:  # type: ignore[no-untyped-def]
    for n in (1024, 4096):
        leaves = towers(torch.float32, n, 512)

        def step() -> None:
            loss_py.ClipLoss()(*leaves).backward()  # noqa: B023

        speed("open_clip", f"ClipLoss forward + backward, B = {n}, D = 512", step)
