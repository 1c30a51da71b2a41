"""Put the kernels into existing libraries by one line, and take them out again::

    import ccu_fast

    with ccu_fast.patch.applied("open_clip"):       # or apply("open_clip") … revert("open_clip")
        train()

Importing this module changes nothing. What a patch cannot do with the same numbers (a subclass or object with logits of
its own, a loss that somebody replaced, an unusual option or tensor) goes to the library's own code, call by call.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ccu_fast import check
from ccu_fast.patch.site import Installed, Site

Same = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A library that can be patched.

    Attributes:
        distribution: what ``pip`` calls it; None for code that is not installed but imported by the user.
        package: what Python calls it; None for that code.
        since, before: the known versions: since ≤ version < before.
        replaces: what is replaced, for people.
    """

    distribution: str | None
    package: str | None
    since: str
    before: str
    replaces: str


TARGETS = {
    "open_clip": Target(
        "open_clip_torch",
        "open_clip",
        "2.24",
        "5",
        "ClipLoss (CoCaLoss inherits it), SigLipLoss and DistillClipLoss, on one process or several",
    ),
    "transformers": Target(
        "transformers",
        "transformers",
        "4.40",
        "6",
        "the loss in the forward of CLIP, SigLIP (2), ALIGN, CLAP, AltCLIP, BLIP, ChineseCLIP, CLIPSeg, GroupViT, "
        "MetaCLIP 2 and VisionTextDualEncoder models (return_loss=True)",
    ),
    "sentence_transformers": Target(
        "sentence-transformers",
        "sentence_transformers",
        "5",
        "7",
        "MultipleNegativesRankingLoss with cos_sim or dot_score, in all directions, with hard negatives and penalties "
        "for them, and the loss part of its cached versions, also inside MatryoshkaLoss and over gathered devices",
    ),
    "pytorch_metric_learning": Target(
        "pytorch-metric-learning",
        "pytorch_metric_learning",
        "2.3",
        "3",
        "NTXentLoss and SupConLoss over labels, with their default reducers, also inside SelfSupervisedLoss, "
        "CrossBatchMemory and DistributedLossWrapper",
    ),
    "lightly": Target("lightly", "lightly", "1.5.20", "2", "NTXentLoss, with and without a memory bank"),
    "info_nce": Target(
        "info-nce-pytorch",
        "info_nce",
        "0.1.4",
        "1",
        "info_nce and InfoNCE, with the other positives or shared (unpaired) keys as negatives",
    ),
    "colpali_engine": Target(
        "colpali-engine",
        "colpali_engine",
        "0.3.18",
        "0.4",
        "BiEncoderLoss and BiPairedEncoderLoss, without pos_aware_negative_filtering",
    ),
    "flag_embedding": Target(
        "FlagEmbedding",
        "FlagEmbedding",
        "1.3.2",
        "1.5",
        "the loss of the dense embedders, with negatives of the batch and of all devices, without a teacher",
    ),
    "laion_clap": Target(
        "laion-clap", "laion_clap", "1.1.4", "2", "ClipLoss without weight_loss_kappa, on one process or several"
    ),
    "nanogcg": Target("nanogcg", "nanogcg", "0.2", "0.4", "the token gradient (no one-hot) and sample_ids_from_grad"),
    "textattack": Target(
        "textattack", "textattack", "0.3.8", "0.4", "WordSwapGradientBased: no sort of words × vocabulary"
    ),
    "mem_reference": Target(
        None,
        None,
        "",
        "",
        "get_loss, hotflip_attack, get_best_candidates and min_min_attack of the MEM authors' code, in every module "
        "imported so far",
    ),
}

# Which patch takes which option of apply.
OPTIONS = {"exact": ("pytorch_metric_learning",), "same": ("open_clip",)}

_installed: dict[str, list[Installed]] = {}
_options: dict[str, dict[str, Any]] = {}  # those of _installed
# Held while functions change hands, so that no thread takes another's wrapper for the library's function. Reentrant:
# what an import runs may patch too.
_lock = threading.RLock()


def targets() -> dict[str, str]:
    """List the libraries that :func:`apply` knows.

    Returns:
        By name what is replaced, for people.

    >>> ccu_fast.patch.targets()["lightly"]
    'NTXentLoss, with and without a memory bank'
    """
    return {name: target.replaces for name, target in TARGETS.items()}


def active() -> dict[str, list[str]]:
    """List what is replaced now.

    Returns:
        By target the dotted names of the functions.

    >>> ccu_fast.patch.active()
    {}
    """
    with _lock:
        return {name: [item.site.name for item in items] for name, items in _installed.items()}


class Calls(NamedTuple):
    """Count the calls of a function that a patch replaced.

    Attributes:
        ours: those that ccu_fast answered.
        theirs: those that it left to the library's own code.

    >>> ccu_fast.patch.Calls(ours=3, theirs=0).ours
    3
    """

    ours: int
    theirs: int


def calls() -> dict[str, dict[str, Calls]]:
    """Count who answered the calls of what is replaced now: the way to see that a patch is used.

    Calls inside a graph of ``torch.compile`` are not counted: there the choice is made once, when the graph is made.

    Returns:
        By target and dotted name of the function how often ccu_fast answered it since it was replaced, and how often
        the library.

    >>> with ccu_fast.patch.applied("pytorch_metric_learning"):
    ...     list(ccu_fast.patch.calls()["pytorch_metric_learning"].values())[0]
    Calls(ours=0, theirs=0)
    """
    with _lock:
        return {
            name: {item.site.name: Calls(item.ours, item.theirs) for item in items}
            for name, items in _installed.items()
        }


def apply(name: str, *, exact: bool = False, same: Same | None = None) -> list[str]:
    """Replace a library's losses or token scoring by ccu_fast's until :func:`revert`.

    Applying what is applied changes nothing. Functions are replaced in the classes and modules that own them, so
    objects that exist already are served too.

    Args:
        name: a key of :func:`targets`.
        exact: for "pytorch_metric_learning": losses in fp32 for half precision, and NTXentLoss without the library's
            ``small_val``, which is added to every probability and keeps a pair's loss below 87.3 (9.7 in fp16). By
            default dtype and numbers are the library's, which computes NTXentLoss of fp16 itself.
        same: for "open_clip": which pairs of a batch are no negatives of each other, where the library contrasts each
            with all others: ClipLoss leaves them out, and for SigLipLoss they are positives. "texts": those whose text
            features are equal in every bit, as those of equal captions are; or a function that is called with
            image_features and text_features and returns ids, int64 ``[N]``, equal on all ranks for the same item. It
            concerns ClipLoss and SigLipLoss alone. A call of DistillClipLoss then raises a RuntimeError, and so does
            one that the patch would leave to the library, for the library's loss is another.

    Returns:
        The dotted names of what is replaced; empty, with a ``UserWarning``, when the version is not known, or when a
        module, class or function is missing or not the library's own: then nothing at all was changed.

    Raises:
        TypeError, ValueError: unknown name; an option of another library, or other than that of the patch that is
            applied.
        ModuleNotFoundError: the library is not installed; for "mem_reference": its modules are not imported yet.

    >>> ccu_fast.patch.apply("pytorch_metric_learning")[0]
    'pytorch_metric_learning.losses.ntxent_loss.NTXentLoss.forward'
    >>> ccu_fast.patch.revert("pytorch_metric_learning")
    """
    check.one_of("name", name, tuple(TARGETS))
    if same is not None and not callable(same):
        check.one_of("same", same, ("texts",))
    options: dict[str, Any] = {"exact": True} if check.boolean("exact", exact) else {}
    options |= {} if same is None else {"same": same}
    for option, value in options.items():
        if name not in OPTIONS[option]:
            default = False if option == "exact" else None
            only = ", ".join(OPTIONS[option])
            raise ValueError(f"{option}: expected {default} for {name} (only {only} takes it), got {value!r}")
    with _lock:
        if name in _installed and options != _options[name]:
            option = next(iter({**_options[name], **options}))
            before, now = (of.get(option, False if option == "exact" else None) for of in (_options[name], options))
            raise ValueError(
                f"{option}: expected {before!r}, with which {name} is applied, got {now!r}; revert it first"
            )
        if name not in _installed:
            sites, reason = _sites(name, options)
            if reason is not None:
                warnings.warn(f"ccu_fast.patch: {name} is left alone: {reason}", stacklevel=2)
                return []
            _installed[name] = [Installed(site) for site in sites]
            _options[name] = options
        return active()[name]


def revert(name: str) -> None:
    """Give the library its own functions back, in any order with other patches; without a patch it does nothing.

    Args:
        name: a key of :func:`targets`.

    Raises:
        ValueError: unknown name.

    >>> ccu_fast.patch.revert("open_clip")
    """
    check.one_of("name", name, tuple(TARGETS))
    with _lock:
        _options.pop(name, None)
        for item in reversed(_installed.pop(name, [])):
            item.remove()


@contextmanager
def applied(*names: str, exact: bool = False, same: Same | None = None) -> Iterator[list[str]]:
    """Keep libraries patched for the length of a block; what was applied before stays applied after it.

    Args:
        names: keys of :func:`targets`.
        exact, same: as of :func:`apply`.

    Returns:
        A context manager that gives the dotted names of what is replaced.

    Raises:
        ValueError, ModuleNotFoundError: as :func:`apply`.

    >>> with ccu_fast.patch.applied("pytorch_metric_learning") as replaced:
    ...     len(replaced) > 0
    True
    """
    ours: list[str] = []
    replaced: list[str] = []
    try:
        for name in names:
            with _lock:
                before = name in _installed
                replaced += apply(name, exact=exact, same=same)
            if not before:
                ours.append(name)
        yield replaced
    finally:
        for name in reversed(ours):
            revert(name)


def _sites(name: str, options: dict[str, Any]) -> tuple[list[Site], str | None]:
    """What a patch replaces, and why it replaces nothing if it does not."""
    target = TARGETS[name]
    reason = _unknown_version(name)
    if reason is not None:
        return [], reason
    try:
        module = importlib.import_module(f"ccu_fast.patch.{name}")
        sites: list[Site] = module.sites(**options)
    except (ImportError, AttributeError) as error:  # a module or a class is not where it was
        if target.package is None:
            raise
        return [], str(error)
    return sites, next(filter(None, (site.mismatch(target.package) for site in sites)), None)


def _unknown_version(name: str) -> str | None:
    target = TARGETS[name]
    if target.distribution is None:
        return None
    try:
        version = importlib.metadata.version(target.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"{name}: {target.distribution} is not installed", name=name) from None
    if _numbers(target.since) <= _numbers(version) < _numbers(target.before):
        return None
    return (
        f"version {version} of {target.distribution} is not known (known: {target.since} ≤ version < {target.before})"
    )


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
