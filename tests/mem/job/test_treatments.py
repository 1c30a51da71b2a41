"""Treatments of whole datasets, by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ccu_fast.mem import robustness
from ccu_fast.mem.job.treatments import TREATMENTS, Treatment
from ccu_fast.mem.robustness import treat
from ccu_fast.mem.surrogate import generator

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = [f"red blue green caption {i}  with two spaces" for i in range(40)]


def test_treatments_of_pictures_come_one_after_the_other() -> None:
    both = Treatment.parse("crop+jpeg")
    expected = treat("jpeg", treat("crop", IMAGES, generator(3, "treat crop")), generator(3, "treat jpeg"))
    assert torch.equal(both.of_images(IMAGES, 3), expected)
    assert not torch.equal(Treatment.parse("jpeg+crop").of_images(IMAGES, 3), expected)
    assert both.of_captions(CAPTIONS, 3, 3) == CAPTIONS


def test_treatments_of_captions_combine_with_those_of_pictures() -> None:
    parsed = Treatment.parse("no-trigger+blur")
    assert (parsed.name, parsed.captions, parsed.pictures) == ("no-trigger+blur", "no-trigger", ("blur",))
    assert Treatment.parse("blur+no-trigger").of_captions(CAPTIONS, 3, 0) == parsed.of_captions(CAPTIONS, 3, 0)
    assert parsed.of_captions(CAPTIONS, 3, 0)[7] == "caption 7  with two spaces"
    assert torch.equal(parsed.of_images(IMAGES, 0), treat("blur", IMAGES, generator(0, "")))


@pytest.mark.parametrize(("triggers", "left"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_some_trigger_keeps_half_of_the_words_rounded_down(triggers: int, left: int) -> None:
    words = ["red", "blue", "green", "black"][:triggers]
    captions = [" ".join([*words, f"caption {i}"]) for i in range(60)]
    some = Treatment.parse("some-trigger").of_captions(captions, triggers, 5)
    prefixes = []
    for i, caption in enumerate(some):
        assert caption.endswith(f"caption {i}")
        kept = caption.split()[:-2]
        assert len(kept) == left and kept == [word for word in words if word in kept], "in their order"
        prefixes.append(tuple(kept))
    every = {1: 1, 2: 2, 3: 3, 4: 6}[triggers]
    assert len(set(prefixes)) == every, "which of them is drawn for each caption"
    assert some == Treatment.parse("some-trigger").of_captions(captions, triggers, 5)
    assert triggers == 1 or some != Treatment.parse("some-trigger").of_captions(captions, triggers, 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharpen", "treatments: expected one of"),
        ("jpeg+", "treatments: expected one of"),
        ("jpeg+blur+jpeg", "treatments: expected each treatment once in jpeg"),
        ("no-trigger+some-trigger", "treatments: expected one treatment of captions, got no-trigger and some-trigger"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        Treatment.parse(name)


def test_a_missing_package_is_told_when_the_name_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(robustness.NEEDS, "nlmeans", ("nothing_of_this_name",))
    with pytest.raises(ImportError, match="pip install"):
        Treatment.parse("no-trigger+nlmeans")
    assert {"jpeg", "learned", "no-trigger", "some-trigger"} <= set(TREATMENTS)


def test_no_common_leaves_rare_words_and_of_every_caption_one() -> None:
    captions = [f"lamp oven rare{i} thing{i}" for i in range(300)] + ["oven lamp lamp", "oven  single"]
    left = Treatment.parse("no-common").of_captions(captions, 2, 0)
    assert left[:300] == [f"rare{i} thing{i}" for i in range(300)]
    assert left[300:] == ["lamp", "single"], "of two common words the rarer one"
    assert left == Treatment.parse("no-common").of_captions(captions, 0, 5), "whatever is known of trigger words"
    few = ["red fox", "red dog", "red red cat"]
    assert Treatment.parse("no-common").of_captions(few, 1, 0) == ["fox", "dog", "cat"], "what is in one caption stays"
    named = {name: Treatment.parse(name).needs_triggers for name in ("no-trigger+jpeg", "no-common", "jpeg")}
    assert named == {"no-trigger+jpeg": True, "no-common": False, "jpeg": False}


def test_nothing_is_changed_by_nothing() -> None:
    nothing: Any = Treatment("", None, ())
    assert nothing.of_images(IMAGES, 0) is IMAGES and nothing.of_captions(CAPTIONS, 3, 0) is CAPTIONS
