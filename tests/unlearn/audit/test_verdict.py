"""The verdict: what is said of a model whose figures are known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from ccu_fast.unlearn.audit import verdict, verdict_without_gold

PARTS = ("forget_train", "forget_test", "retain_train", "retain_test")
SIZES = {"forget_train": 100, "retain_train": 900, "retain_test": 300}


def figures(scenario: str = "instances") -> dict[str, Any]:
    """What a retrained model would have."""
    visual = (0.9, None, 1.0, 0.9) if scenario == "instances" else (0.0, 0.0, 1.0, 0.9)
    other = (1.0, None, 1.0, 0.9) if scenario == "instances" else (1.0, 0.9, 1.0, 0.9)
    values = {"visual": visual, "other": other, "fused": visual}
    return {**{name: dict(zip(PARTS, shares, strict=True)) for name, shares in values.items()}, "mia_auc": 0.5}


def off(figure: str, value: float, scenario: str = "instances") -> tuple[dict[str, Any], dict[str, Any]]:
    """A model of which one figure differs, and gold."""
    gold = figures(scenario)
    model = copy.deepcopy(gold)
    modality, _, part = figure.partition(" ")
    if part:
        model[modality][part] = value
    else:
        model[figure] = value
    return model, gold


def test_a_retrained_model_passes() -> None:
    for scenario in ("class", "instances"):
        found = verdict(figures(scenario), figures(scenario))
        assert (found.kind, found.text, found.brief) == ("passed", "forgets as retraining would", "passed")


@pytest.mark.parametrize(
    ("figure", "value", "scenario", "kind", "text"),
    [
        (
            "visual forget_train",
            0.82,
            "instances",
            "over-generalised",
            "forgets more than retraining would: visual accuracy on the forget set is .82, retrained .90",
        ),
        (
            "visual forget_train",
            0.98,
            "instances",
            "ineffective",
            "still knows what it should forget: visual accuracy on the forget set is .98, retrained .90",
        ),
        (
            "visual forget_test",
            0.5,
            "class",
            "ineffective",
            "still knows what it should forget: visual accuracy on unseen items of the forgotten class is .50, "
            "retrained .00",
        ),
        (
            "other forget_train",
            0.0,
            "class",
            "over-generalised",
            "loses the other modality: the other modality's accuracy on the forget set is .00, retrained 1.00",
        ),
        (
            "fused retain_test",
            0.85,
            "instances",
            "over-generalised",
            "loses the retained data: fused accuracy on unseen items is .85, retrained .90",
        ),
        (
            "visual retain_train",
            0.89,
            "class",
            "catastrophic",
            "loses the retained data: visual accuracy on the retain set is .89, retrained 1.00",
        ),
        (
            "mia_auc",
            0.6,
            "instances",
            "ineffective",
            "easier to tell from unseen items than after retraining: membership AUC is .60, retrained .50",
        ),
        (
            "mia_auc",
            0.4,
            "instances",
            "over-generalised",
            "easier to tell from unseen items than after retraining: membership AUC is .40, retrained .50",
        ),
        ("visual retain_test", 0.95, "instances", "passed", "forgets as retraining would"),  # better than gold
        ("other forget_test", 0.95, "class", "passed", "forgets as retraining would"),
        ("visual forget_train", 0.885, "instances", "passed", "forgets as retraining would"),  # within 2 points
    ],
)
def test_each_failure_has_its_words(figure: str, value: float, scenario: str, kind: str, text: str) -> None:
    found = verdict(*off(figure, value, scenario))
    assert (found.kind, found.text) == (kind, text)


def test_harder_to_tell_is_said_and_is_no_failure() -> None:
    model, gold = off("mia_auc", 0.5)
    gold["mia_auc"] = 0.6
    found = verdict(model, gold)
    assert found.kind == "passed" and found.text.startswith("forgets as retraining would; harder to tell from unseen")
    assert found.brief == "passed; harder to tell from unseen items than after retraining"


def test_a_difference_within_two_standard_errors_is_chance() -> None:
    """With one success and one failure more of each: p = 91/102 and q = (100 x + 1)/102 of 102."""
    for wrong, kind in ((10, "passed"), (11, "over-generalised")):
        share = 0.9 - wrong / 100
        p, q = 91 / 102, (100 * share + 1) / 102
        limit = 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / 102)
        assert (wrong / 100 > limit) == (kind != "passed")  # by hand: the limits lie around .10
        assert verdict(*off("visual forget_train", share), sizes=SIZES).kind == kind
        assert verdict(*off("visual forget_train", share)).kind == "over-generalised"  # nothing said about sizes
    # Many items: the tolerance decides.
    many = {name: 1000 * count for name, count in SIZES.items()}
    assert verdict(*off("visual forget_train", 0.885), sizes=many).kind == "passed"
    assert verdict(*off("visual forget_train", 0.885), sizes=many, tolerance=1).kind == "over-generalised"


def test_no_item_of_none_is_not_certain() -> None:
    """A binomial error at 0 and 1 would be 0, and 97 of 100 a failure."""
    assert verdict(*off("other forget_train", 0.97), sizes=SIZES).kind == "passed"
    assert verdict(*off("other forget_train", 0.90), sizes=SIZES).kind == "over-generalised"


def test_the_area_has_an_error_of_its_own() -> None:
    """Two of sqrt(401 / (6 · 100 · 300)) = .0472."""
    assert verdict(*off("mia_auc", 0.59), sizes=SIZES).kind == "passed"
    assert verdict(*off("mia_auc", 0.60), sizes=SIZES).kind == "ineffective"


def test_of_several_failures_the_worst_comes_first_and_all_are_told() -> None:
    model, gold = off("visual forget_train", 0.04, "class")
    model["other"]["forget_train"], model["other"]["forget_test"] = 0.25, 0.5
    found = verdict(model, gold)
    assert found.kind == "over-generalised"  # 75 points, not 4
    assert [text.partition(":")[0] for text in found.text.split("; ")] == [
        "loses the other modality",
        "still knows what it should forget",
    ]
    assert "forget set is .25" in found.text  # of one kind of failure the largest
    assert found.brief == (
        "over-generalised: loses the other modality: the other modality's accuracy on the forget set is .25, retrained "
        "1.00; still knows what it should forget"
    )
    model["visual"]["retain_test"] = 0.75
    assert verdict(model, gold).kind == "catastrophic"  # first, whatever else is larger


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="a figure that gold has too"):
        verdict({}, figures())
    with pytest.raises(ValueError, match="tolerance"):
        verdict(figures(), figures(), tolerance=-1)
    with pytest.raises(ValueError, match="forget"):
        verdict_without_gold(figures(), figures(), forget="everything")


class TestWithoutGold:
    def test_a_class_is_never_named_and_the_rest_is_as_before(self) -> None:
        before = figures("class")
        before["visual"] |= {"forget_train": 1.0, "forget_test": 0.9}
        after = copy.deepcopy(before)
        found = verdict_without_gold(after, before)
        assert found.kind == "ineffective"
        assert found.text.endswith("visual accuracy on the forget set is 1.00, expected .00")
        after["visual"] |= {"forget_train": 0.0, "forget_test": 0.0}
        assert verdict_without_gold(after, before).text == "forgets what was asked and keeps the rest"
        after["fused"]["forget_train"] = 1.0  # the other half may still tell
        assert verdict_without_gold(after, before).kind == "passed"
        after["other"]["forget_train"] = 0.5
        assert verdict_without_gold(after, before).text.startswith("loses the other modality")
        after["visual"]["retain_train"] = 0.6
        assert verdict_without_gold(after, before).kind == "catastrophic"

    def test_instances_are_as_unseen_items_were(self) -> None:
        before = figures()
        before["visual"]["forget_train"] = 1.0
        for after, kind in ((1.0, "ineffective"), (0.9, "passed"), (0.8, "over-generalised")):
            model = copy.deepcopy(before)
            model["visual"]["forget_train"], model["fused"]["forget_train"] = after, 0.9
            found = verdict_without_gold(model, before, forget="instances")
            assert found.kind == kind
        assert found.text == (
            "forgets more than was asked: visual accuracy on the forget set is .80, expected .90"
        )  # that of unseen items before

    @pytest.mark.parametrize("forget", ["instances", "pairs"])
    def test_without_unseen_items_only_a_loss_can_be_seen(self, forget: str) -> None:
        before = {name: {"forget_train": 1.0, "retain_train": 1.0} for name in ("visual", "other")}
        assert verdict_without_gold(before, before, forget=forget).kind == "undecided"
        lost = {**before, "visual": {"forget_train": 0.5, "retain_train": 0.5}}
        assert verdict_without_gold(lost, before, forget=forget).kind == "catastrophic"

    def test_a_class_that_was_not_known_cannot_be_forgotten(self) -> None:
        before, after = figures("class"), figures("class")
        found = verdict_without_gold(after, before)
        assert found.kind == "undecided" and found.text.startswith("there was nothing to forget")
        before["visual"]["forget_train"] = 0.05
        assert verdict_without_gold(after, before).kind == "passed"
        assert verdict_without_gold(after, before, sizes={"forget_train": 20}).kind == "undecided"  # may be chance

    @pytest.mark.parametrize("forget", ["class", "instances"])
    def test_a_model_that_knew_nothing_was_not_measured_as_it_is_used(self, forget: str) -> None:
        """Heads that take something else, or the labels of another dataset: any verdict would be of noise."""
        before, after = figures(forget), figures(forget)
        before["visual"] |= {"forget_train": 0.2, "retain_train": 0.06, "retain_test": 0.06}
        after["visual"] |= {"forget_train": 0.0 if forget == "class" else 0.06, "retain_test": 0.06}
        found = verdict_without_gold(after, before, forget=forget)
        assert found.kind == "undecided" and "given what they take" in found.text
        before["visual"]["retain_train"] = 0.6
        assert "given what they take" not in verdict_without_gold(after, before, forget=forget).text
