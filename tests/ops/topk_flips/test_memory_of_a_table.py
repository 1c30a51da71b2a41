"""What making a TokenTable takes."""

from __future__ import annotations

import pytest
import torch

import ccu_fast
from benchmarks import memory


def _growth() -> int:
    embedding = torch.randn(60_000, 256)
    return memory.peak_of(lambda: ccu_fast.TokenTable(embedding))


@pytest.mark.usefixtures("native")
def test_there_is_no_wider_copy_of_the_embedding() -> None:
    """What is kept takes half of the embedding's bytes; to look for its longest row torch would copy it to fp64."""
    assert memory.in_fresh_process(_growth) < 60_000 * 256 * 6
