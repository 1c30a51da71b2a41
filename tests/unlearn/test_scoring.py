"""How items without classes are scored: among all, each with what is equally right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.audit import audit
from ccu_fast.unlearn.config import Budget, HeldOut
from ccu_fast.unlearn.loop import answers, chances, right_shares, run
from tests.support import toy_unlearn
from tests.support.toy_unlearn import accuracies


class AsGiven(nn.Module):
    """Its embeddings are its inputs."""

    def embed_visual(self, visual: Tensor) -> Tensor:
        return visual

    def embed_other(self, other: Tensor) -> Tensor:
        return other


def unit(*places: int) -> Tensor:
    return torch.eye(6)[list(places)]


def test_one_forgotten_pair_is_scored_among_all() -> None:
    """Alone it would always be right: here its picture is nearest to a retained caption."""
    forget = PairedData(0.9 * unit(1), unit(0))
    retain = PairedData(unit(2, 3, 1), unit(2, 3, 1), ids=torch.arange(3) + 1)
    model = AsGiven()
    assert accuracies(model, forget) == {"visual": 1.0, "other": 1.0}
    gone, kept = right_shares(answers(model, forget), answers(model, retain))
    assert gone == {"visual": 0.0, "other": 0.0} and kept == {"visual": 1.0, "other": 1.0}
    assert chances(forget, retain) == [0.25, 0.25]


def test_equal_captions_and_captions_of_one_picture_are_equally_right() -> None:
    pictures, captions = unit(0, 0, 1, 2), unit(0, 3, 1, 1)
    data = PairedData(pictures, captions)
    assert accuracies(AsGiven(), data)["visual"] == 0.75  # the last picture is nearest to nothing
    assert chances(data) == [0.5]
    for dtype in (torch.bfloat16, torch.bool, torch.int64):
        assert chances(PairedData(torch.zeros(3, dtype=dtype), torch.rand(6, 3).T)) == [1.0]


def test_one_point_for_everything_finds_nothing() -> None:
    data = toy_unlearn.toy()

    class Collapsed(AsGiven):
        def embed_visual(self, visual: Tensor) -> Tensor:
            return torch.ones(len(visual), 3)

        embed_other = embed_visual

    assert accuracies(Collapsed(), PairedData(data.visual, data.other)) == {"visual": 0.0, "other": 0.0}


def test_the_audit_and_early_stop_score_among_both_sets() -> None:
    torch.manual_seed(0)
    data = toy_unlearn.toy()
    pairs = PairedData(data.visual, data.other)
    one, rest = pairs[torch.arange(1)], pairs[torch.arange(1, 60)]
    model = toy_unlearn.TwoTowers()
    among = right_shares(answers(model, one), answers(model, rest))
    found = audit(model, forget=one, retain=rest, retain_test=rest)
    assert found["visual"]["forget_train"] == among[0]["visual"] < 1  # type: ignore[index]
    assert found["other"]["retain_train"] == among[1]["other"]  # type: ignore[index]
    stopped = run(
        model, one, rest, lambda *_: lambda model, batch: model.embed_visual(batch.forget.visual).sum() * 0,
        Budget(steps=20), held_out=HeldOut(rest, level=0.5, slack=1.0),
    )  # fmt: skip
    assert stopped.steps == 5  # among itself the pair would be right for ever
