"""Pair sources: what the generator reads."""

from __future__ import annotations

import pytest
import torch

from ccu_fast.mem.source import PairSource, Part, TensorSource, read_ahead


def example() -> TensorSource:
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    return TensorSource(images, list("abcdef"), torch.tensor([0, 1, 1, 2, 3, 0]))


def test_a_part_has_its_images_and_all_their_rows() -> None:
    source: PairSource = Part(example(), torch.tensor([3, 0]))
    assert (source.n_images, source.image_shape) == (2, (3, 2, 2))
    assert list(source.captions) == ["a", "e", "f"]
    assert source.image_of.tolist() == [1, 0, 1]
    assert source.images(torch.tensor([0, 1, 0]))[:, 0, 0, 0].tolist() == [3, 0, 3]


def test_by_default_each_row_has_its_own_image() -> None:
    assert TensorSource(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), ["a", "b"]).image_of.tolist() == [0, 1]


def test_reading_ahead_keeps_the_order_and_is_one_part_ahead() -> None:
    source, asked = example(), []
    inner = source.images

    def images(index: torch.Tensor) -> torch.Tensor:
        asked.append(index.tolist())
        return inner(index)

    source.images = images  # type: ignore[method-assign]
    seen = []
    for part, pixels in read_ahead(source, [torch.tensor([i, 3 - i]) for i in range(4)]):
        seen.append(part.tolist())
        assert torch.equal(pixels, inner(part))
        assert len(asked) <= len(seen) + 1
    assert seen == asked == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert list(read_ahead(source, [])) == []


def test_bad_input() -> None:
    images = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(TypeError, match="images: expected dtype uint8"):
        TensorSource(images.float(), ["a", "b"])
    with pytest.raises(ValueError, match="captions: expected 2 strings"):
        TensorSource(images, ["a"])
    with pytest.raises(ValueError, match=r"image_of: expected numbers in \[0, 1\]"):
        TensorSource(images, ["a", "b"], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="image_of: expected every image at least once, got none for image 1"):
        TensorSource(images, ["a", "b"], torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="distinct"):
        Part(example(), torch.tensor([1, 1]))
