"""The fusion model."""

from __future__ import annotations

import pytest
import torch

from ccu_fast.models.fusion import FusionModel


def test_embeddings_are_unit_vectors_of_one_shared_projector() -> None:
    model = FusionModel(6, 5, 4, hidden=8, embedding=7)
    visual, other = torch.randn(3, 6), torch.randn(3, 5)
    z_visual, z_other = model.embed_visual(visual), model.embed_other(other)
    for z in (z_visual, z_other):
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    logits = model(visual, other)
    assert [list(t.shape) for t in logits] == [[3, 4]] * 3
    torch.testing.assert_close(logits[0], model.classify_visual(z_visual))
    torch.testing.assert_close(logits[2], model.classify_fused(z_visual, z_other))
    z_visual.sum().backward(retain_graph=True)
    shared = model.projector.weight.grad.clone()
    z_other.sum().backward()
    assert not torch.equal(model.projector.weight.grad, shared)


@pytest.mark.parametrize("argument", ["visual_dim", "other_dim", "classes", "hidden", "embedding"])
def test_sizes_are_checked(argument: str) -> None:
    sizes = {"visual_dim": 3, "other_dim": 3, "classes": 3, "hidden": 3, "embedding": 3, argument: 0}
    with pytest.raises(ValueError, match=argument):
        FusionModel(**sizes)
