"""The methods of a comparison by name: the baselines, CCU, and CCU without each of its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.lora import linear_weights
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.parameters import buffers_of_other, matches, parameters_of_other, parameters_of_visual
from ccu_fast.unlearn.study.tasks import Scenario
from ccu_fast.unlearn.unseen import comparable

STATISTICS = ("running_mean", "running_var")  # of a normalisation layer, which follow the batches
TOLD = ", told"  # how the name of a baseline ends that is told to keep the other modality
# Not those that train nothing, or are told already.
TELLABLE = (
    "random_label",
    "salun",
    "neg_grad_plus",
    "scrub",
    "bad_teacher",
    "boundary_shrink",
    "contrastive_unlearning",
    "clip_erase",
    "sfr_on",
    "mm_unlearner",
    "null_space",
)
METHODS = {
    "original": "before unlearning",
    "gold_mask": "retrained, visual hidden",
    "gold_drop": "retrained, both hidden",
    "gold_again": "retrained, another seed",
    **{name: baseline.label for name, baseline in BASELINES.items()},
    **{name + TOLD: BASELINES[name].label + TOLD for name in TELLABLE},
    "ccu": "CCU",
    "ccu_without_a": "CCU without (a)",
    "ccu_without_b": "CCU without (b)",
    "ccu_without_c": "CCU without (c)",
    "ccu_without_neighbours": "CCU without neighbours",
    "ccu_without_damage": "CCU without dampening",
    "ccu_without_unseen": "CCU without unseen items",
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "ccu_without_a": {"forgetting": 0.0},
    # The other modality is trained, and nothing holds it.
    "ccu_without_b": {"keep": "trained", "retention": 0.0, "anchor": 0.0},
    "ccu_without_c": {"separation": 0.0},
    "ccu_without_neighbours": {"neighbours": 0.0},
    "ccu_without_damage": {"dampen": 0.0},
    "ccu_without_unseen": {},
}
# What a short comparison runs: each method once, and one retraining of each kind.
ONCE = tuple(name for name in METHODS if not name.endswith(TOLD) and name != "gold_again")
# Those that start from a trained model.
STARTED = tuple(name for name in METHODS if name != "original" and not name.startswith("gold"))


def unlearned(name: str, original: TwoModalityModel, split: Scenario, config: UnlearnConfig, **options: Any) -> Run:
    """A copy of the original that a method has made forget.

    Args:
        name: of :data:`STARTED`.
        original: the trained model; not changed.
        split: what to forget and what to keep.
        config: CCU's; its budget and seed are every method's.
        options: those of :func:`ccu_fast.unlearn.loop.run`, such as progress and checkpoint.
    """
    sets = original, split.forget, split.retain
    baseline = BASELINES.get(name.removesuffix(TOLD))
    if baseline is not None:
        told = float(name.endswith(TOLD))
        return baseline.run(*sets, split.name, config.budget, keep_other=told, seed=config.seed, stage=name, **options)
    own = replace(config, **ABLATIONS.get(name, {}))
    unseen = None if name == "ccu_without_unseen" or own.forget == "class" else split.held_out
    return run_ccu(*sets, own, unseen=unseen, stage=name, **options)


def differs(name: str, config: UnlearnConfig) -> bool:
    """Whether a method is no ablation, or one of something that these settings use."""
    if name == "ccu_without_unseen":
        return config.forget != "class" and config.forgetting > 0
    changed = ABLATIONS.get(name)
    return changed is None or any(config.used(key) != value for key, value in changed.items())


def why_not(name: str, original: TwoModalityModel, split: Scenario, config: UnlearnConfig) -> str | None:
    """Why a method does not apply to a model and its data, in words; None where it does."""
    baseline = BASELINES.get(name.removesuffix(TOLD))
    if baseline is not None:
        return baseline.lacks(original, split.forget, told=name.endswith(TOLD))
    if not differs(name, config) or (name == "ccu_without_unseen" and split.held_out is None):
        return "is CCU itself here: the settings do not use what it leaves out"
    if name == "ccu_without_neighbours" and not comparable(split.forget.visual):
        return "is CCU itself here: the inputs have no nearness"
    if name == "ccu_without_b" and not config.anchor and not _other_may_change(original, split.forget, config):
        return "is CCU itself here: the other modality depends on nothing that may change"
    return None


def _other_may_change(model: TwoModalityModel, forget: PairedData, config: UnlearnConfig) -> bool:
    """Whether, with keep="trained", a parameter is trained that the other modality depends on, or statistics follow."""
    of_other = parameters_of_other(model, forget)
    free = {name for name, p in model.named_parameters() if p.requires_grad and matches(name, config.trainable)}
    if config.lora is not None:  # of the other modality, only what both share is adapted
        free &= linear_weights(cast(nn.Module, model)) & parameters_of_visual(model, forget)
    followed = any(name.endswith(STATISTICS) for name in buffers_of_other(model, forget))
    return followed or not free.isdisjoint(of_other)
