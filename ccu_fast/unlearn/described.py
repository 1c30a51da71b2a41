"""What made a model, and its card, for a run of the command and one in Python alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from ccu_fast.data.paired import PairedData
from ccu_fast.models.clip import ClipEncoder
from ccu_fast.runs.kept import Kept
from ccu_fast.runs.provenance import Hashes, tensors_hash, versions
from ccu_fast.unlearn.card import card
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.figures import figures_of
from ccu_fast.unlearn.model import Model, TwoModalityModel, check_problem


@dataclass(frozen=True)
class Made:
    """How :func:`ccu_fast.unlearn.unlearn` made a model.

    Attributes:
        config: its settings.
        steps: that were taken.
        processes: that shared the run.
    """

    config: UnlearnConfig
    steps: int
    processes: int


# For as long as the models live; a model that is written holds nothing of it.
MADE: WeakKeyDictionary[Any, Made] = WeakKeyDictionary()


def provenance(
    config: UnlearnConfig,
    original: Any,
    sets: Mapping[str, PairedData | None],
    hashes: Hashes,
    name: str,
    classes: Sequence[str],
    dtype: str,
    processes: int,
) -> dict[str, Any]:
    """What made a model, but for versions and the hash of its weights.

    Args:
        config: of the run.
        original: the model before.
        sets: "forget", "retain", "unseen" and "test"; None for those that there were not.
        hashes: those that are known.
        name: of the model, as the settings have it.
        classes: that were forgotten.
        dtype: of the forward passes.
        processes: that shared the run.
    """
    return {
        "method": "CCU as defined in ccu_fast.unlearn.method",
        "seed": config.seed,
        "config": asdict(config),
        "forgotten_classes": list(classes),
        "processes": processes,
        "model": name,
        "dtype": dtype,
        "original_sha256": hashes.of(library_model(original)),
        **{f"{name}_items": None if part is None else len(part) for name, part in sets.items()},
        **{f"{name}_sha256": None if part is None else hashes.of(part) for name, part in sets.items()},
    }


def library_model(model: Any) -> Any:
    """What is written: of a named model the library's own, so that the library reads it."""
    return model.model if isinstance(model, ClipEncoder) else model


def model_card(
    clean: Model,
    original: Model,
    forget: PairedData,
    retain: PairedData,
    *,
    name: str,
    unseen: PairedData | None = None,
    test: PairedData | None = None,
    dtype: str = "fp32",
) -> str:
    """The model card of what :func:`ccu_fast.unlearn.unlearn` returned, as ``ccu-fast unlearn`` writes it.

    Both models are asked about all items for the figures before and after, and for the verdict.

    Args:
        clean: the model that :func:`ccu_fast.unlearn.unlearn` returned in this process.
        original: the model that it was given.
        forget, retain: the sets that it was given.
        name: how others make the model that the weights are for: "open_clip:NAME", "hf:FOLDER", or
            "module:function" for a function without arguments.
        unseen: items that the model was never trained on.
        test: others, which the run did not see; they judge in place of the unseen ones.
        dtype: "fp32", "bf16" or "fp16": what the forward passes computed in.

    Returns:
        Markdown: counts and hashes of the sets, settings, alarm and verdict, figures before and after, versions, how
        to load the weights. Neither the names of forgotten classes nor ids or files are in it.

    Raises:
        ValueError: clean is of another process, or no such model; name is not of that form; see
            :func:`ccu_fast.unlearn.unlearn` for the sets.

    Source: the kinds of verdict are SALMUBench's (arXiv 2603.26316).

    >>> from ccu_fast.models.fusion import FusionModel
    >>> data = ccu_fast.unlearn.PairedData(torch.rand(8, 3), torch.rand(8, 3), torch.arange(8) % 4)
    >>> parts = data[data.labels == 0], data[data.labels > 0]
    >>> model = FusionModel(3, 3, classes=4)
    >>> config = ccu_fast.unlearn.UnlearnConfig(budget=ccu_fast.unlearn.Budget(steps=2))
    >>> clean = ccu_fast.unlearn(model, *parts, config)
    >>> ccu_fast.unlearn.model_card(clean, model, *parts, name="my_models:make").splitlines()[0]
    '# A model that was made to forget'
    """
    made = MADE.get(clean)
    if made is None:
        raise ValueError(
            "clean: expected a model that ccu_fast.unlearn returned in this process, got another "
            f"{type(clean).__name__}"
        )
    kind, colon, rest = name.partition(":")
    if not (kind and colon and rest):
        raise ValueError(f"name: expected open_clip:NAME, hf:FOLDER or module:function, got {name!r}")
    config = made.config
    check_problem(original, forget, retain, config.forget, unseen=unseen, test=test, group=config.group)
    before, after = cast("TwoModalityModel", original), cast("TwoModalityModel", clean)
    new = ("unseen", unseen) if test is None else ("test", test)
    figures = figures_of(before, after, forget, retain, new[1], config.forget, Kept(), len(retain), new[0])
    sets = {"forget": forget, "retain": retain, "unseen": unseen, "test": test}
    classes = [str(label) for label in forget.labels.unique().tolist()] if config.forget == "class" else []
    about = provenance(config, original, sets, Hashes(), name, classes, dtype, made.processes)
    state = {key: value.detach().cpu().contiguous() for key, value in library_model(clean).state_dict().items()}
    about |= {"versions": versions(), "weights_sha256": tensors_hash(state)}
    return card({**figures, "provenance": about, "cost": {"steps": made.steps}})
