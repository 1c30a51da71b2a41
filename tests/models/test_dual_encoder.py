"""The small dual encoder: its protocol and the two shortcuts in its text tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ccu_fast.models.dual_encoder import SmallDualEncoder

EOT = 2


def make(**options: Any) -> SmallDualEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallDualEncoder(20, EOT, **{"width": 32, "dim": 16, **options})


TOKENS = torch.tensor([[1, 5, 6, 7, 2, 0], [1, 9, 2, 0, 0, 0], [1, 4, 4, 8, 9, 2]])


@pytest.mark.parametrize("options", [{}, {"image_tower": "patches"}, {"text_depth": 1}, {"width": 64, "text_depth": 3}])
def test_both_towers_give_unit_vectors(options: dict[str, Any]) -> None:
    model = make(**options)
    for features in (model.encode_image(torch.rand(3, 1, 16, 64)), model.encode_text(TOKENS)):
        assert features.shape == (3, 16)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert model.scale.item() == pytest.approx(1 / 0.07)


def test_padding_and_batch_mates_do_not_matter() -> None:
    model = make()
    whole = model.encode_text(TOKENS)
    alone = torch.cat([model.encode_text(TOKENS[0:1, :5]), model.encode_text(TOKENS[1:2, :3])])
    torch.testing.assert_close(whole[:2], alone)
    other_padding = TOKENS.masked_fill(TOKENS == 0, 11)
    torch.testing.assert_close(model.encode_text(other_padding), whole)


def test_last_block_at_one_position_is_the_whole_block_there() -> None:
    model = make().double()
    x = torch.randn(3, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    position = torch.tensor([4, 2, 5])
    block, rotation = model.blocks[-1], model.rotation[:, :6]
    whole = block(x, rotation)[torch.arange(3), position]
    torch.testing.assert_close(block.at(x, position, rotation), whole, rtol=1e-12, atol=1e-12)


def test_positions_are_relative_but_order_counts() -> None:
    model = make().double()
    block = model.blocks[0]
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    here, there = (block(x, model.rotation[:, i : i + 5]) for i in (0, 9))
    # The rotation table is fp32.
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    swapped = model.encode_text(torch.tensor([[1, 6, 5, 7, 2]]))
    assert not torch.allclose(swapped, model.encode_text(TOKENS[:1]), atol=1e-4)


def test_embeddings_replace_the_look_up_and_get_the_gradient() -> None:
    model = make()
    embeddings = model.embedding_matrix[TOKENS].detach().requires_grad_()
    features = model.encode_text(TOKENS, embeddings)
    assert torch.equal(features, model.encode_text(TOKENS))
    (grad,) = torch.autograd.grad(features[:, 0].sum(), embeddings)
    assert (grad[1, :3].abs().sum(1) > 0).all()
    assert (grad[1, 3:] == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode_image(torch.rand(2, 3, 16, 64)), ValueError, "images: expected shape"),
        (lambda m: m.encode_image([0.0]), TypeError, "images"),
        (lambda m: m.encode_text(TOKENS.float()), TypeError, "tokens"),
        (lambda m: m.encode_text(torch.ones(1, 99, dtype=torch.int64)), ValueError, "at most 32 positions"),
        (lambda m: m.encode_text(TOKENS, torch.rand(3, 6, 8)), ValueError, "embeddings"),
        (lambda m: make(width=40), ValueError, "width"),
        (lambda m: make(text_depth=0), ValueError, "text_depth"),
        (lambda m: make(image_size=(4, 64)), ValueError, "image_size"),
        (lambda m: SmallDualEncoder(20, 20), ValueError, "eot"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make())
