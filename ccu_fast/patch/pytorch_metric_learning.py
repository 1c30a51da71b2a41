"""pytorch-metric-learning: NTXentLoss and SupConLoss over labels, without their lists of pairs.

Both work on every pair of rows with equal labels against the pairs with different ones, also inside SelfSupervisedLoss,
CrossBatchMemory and DistributedLossWrapper. The latter two list all pairs but those of a row with itself, which lies
among the columns too: the list is replaced by the places of these columns.

Lists that a miner or the user made go to the library: which pairs they hold follows no rule that a reduction could be
given, and to compare them with the list of all pairs would take that list. Other distances than cosine and dot
product, reducers that want the loss of every pair, and methods other than the library's own go there too. So does a
batch without anything to compare.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses.functional import sup_con
from ccu_fast.ops.backend import without_autocast
from ccu_fast.ops.operator import never
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME
from ccu_fast.patch.site import Site, are_plain, arguments, home, is_hooked, is_one_number, is_own, is_stock

PARAMETERS = ("self", "embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels")
# Integers without a sign are read as those with one: their names are others, and differ where they did.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
LABELS = (torch.bool, *check.INTEGERS, *SIGNED, *check.FLOATS)
FARTHEST = 1e4  # the largest difference of two logits that fp32 holds to three places

# What the library calls on the way from embeddings to pairs and from pairs to a loss.
NT_XENT_METHODS = ("compute_loss", "_compute_loss", "add_embedding_regularization_to_loss_dict")
SUP_CON_METHODS = ("_compute_loss", "_assert_either_pos_or_neg")
DISTANCE_METHODS = ("forward", "check_shapes", "maybe_normalize", "normalize", "set_default_stats", "compute_mat")
REDUCER_METHODS = (
    *("forward", "unpack_loss_info", "reduce_the_loss", "set_losses_size_stat", "input_is_zero_loss", "assert_sizes"),
    *("assert_sizes_pos_pair", "assert_sizes_pair", "get_reduction_func", "pos_pair_reduction", "element_reduction"),
)
COMMON_FUNCTIONS = ("neg_inf", "small_val", "to_dtype")
PAIRS_FUNCTIONS = ("convert_to_pairs", "get_all_pairs_indices", "get_matches_and_diffs", "logsumexp")
# And on the way to a list of all pairs but a row's with itself.
OWN_FUNCTIONS = ("remove_self_comparisons", "not_self_comparisons")
MEMORY_METHODS = ("forward", "add_to_memory", "create_indices_tuple")
WRAPPER_METHODS = ("forward", "forward_regular_loss")
GATHER_FUNCTIONS = ("get_indices_tuple", "gather_emb_and_ref", "gather", "select_ref_or_regular")

# The memory in whose forward this thread is, which hands the list of pairs to its loss and to nobody else.
_filling: ContextVar[Any] = ContextVar("filling", default=None)


@dataclass(frozen=True)
class Listed:
    """Stands for the list of all pairs, less those of a row with itself.

    Attributes:
        places: int64 ``[N]``, the column that holds each row itself, if its label is the row's too; None: none does.
        make: the library's list, from the labels of rows and columns.
    """

    places: Tensor | None
    make: Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Problem:
    """Two banks of embeddings and which of their pairs are positive.

    Attributes:
        x: ``[N, D]``, as the library multiplies them, in the dtype of its similarities.
        y: ``[M, D]``, likewise.
        scale: 1 / temperature.
        names: ``row_labels``, ``col_labels``, and ``paired`` or ids, as reduce_similarity takes them.
        alike: int64 ``[N]``: how many columns have the label of a row.
        own: how many rows have themselves among these columns; a tensor or a number.
        farthest: no two logits of a row differ by more, nor does the log-sum-exp of some of them from one.
    """

    x: Tensor
    y: Tensor
    scale: float | Tensor
    names: dict[str, Any]
    alike: Tensor
    own: Tensor | int
    farthest: float


def sites(*, exact: bool = False) -> list[Site]:
    """What is replaced.

    Args:
        exact: losses in fp32 for half precision, NTXentLoss of fp16 too, and without the number that the library adds
            inside its logarithm.
    """
    losses = importlib.import_module("pytorch_metric_learning.losses")
    distances = importlib.import_module("pytorch_metric_learning.distances")
    reducers = importlib.import_module("pytorch_metric_learning.reducers")
    common = importlib.import_module("pytorch_metric_learning.utils.common_functions")
    pairs = importlib.import_module("pytorch_metric_learning.utils.loss_and_miner_utils")
    distributed = importlib.import_module("pytorch_metric_learning.utils.distributed")
    memories = losses.CrossBatchMemory
    base = importlib.import_module("pytorch_metric_learning.losses.base_metric_loss_function").BaseMetricLossFunction
    generic = importlib.import_module("pytorch_metric_learning.losses.generic_pair_loss").GenericPairLoss

    def is_usual(loss: Any, kind: type, method: str, *methods: str) -> bool:
        """Whether the loss, its distance and the way to its pairs are the library's own."""
        distance = loss.distance
        return (
            is_own(loss, kind, *methods)
            and is_stock(loss.loss_method, home(generic, method))
            and loss.loss_method.__self__ is loss
            and type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity)
            and (distance.p, distance.power, distance.is_inverted, distance.collect_stats) == (2, 1, True, False)
            and is_own(distance, type(distance), *DISTANCE_METHODS)
            and not is_hooked(distance)
            and all(is_stock(getattr(pairs, name), f"{pairs.__name__}.{name}") for name in PAIRS_FUNCTIONS)
            and all(is_stock(getattr(common, name), f"{common.__name__}.{name}") for name in COMMON_FUNCTIONS)
        )

    def averages(loss: Any) -> bool:
        """Whether what is made of the losses of all pairs is their mean."""
        reducer = loss.reducer
        return (
            loss.embedding_regularizer is None
            and type(reducer) is reducers.MeanReducer
            and not reducer.collect_stats
            and is_own(reducer, reducers.MeanReducer, *REDUCER_METHODS)
            and not is_hooked(reducer)
        )

    def nt_xent(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_stock(original, home(base, "forward")):
            return NotImplemented
        call = arguments(original, args, kwargs)
        loss, x, labels, indices, y, others = (call[name] for name in PARAMETERS)
        if (
            len(call) > len(PARAMETERS)
            or not is_usual(loss, losses.NTXentLoss, "pair_based_loss", *NT_XENT_METHODS)
            or not averages(loss)
            or not (indices is None or isinstance(indices, Listed))
            or not (isinstance(x, Tensor) and isinstance(labels, Tensor))
        ):
            return NotImplemented
        # As the library's forward begins.
        loss.reset_stats()
        common.check_shapes(x, labels)
        labels = common.to_device(labels, x)
        y, others = common.set_ref_emb(x, labels, y, others)
        p = _problem(loss, x, labels, y, others, indices)
        # In fp16 the library's number is made by its roundings, which no other order of sums repeats.
        if p is None or (p.x.dtype == torch.float16 and not exact):
            return NotImplemented
        floor = None if exact else math.log(common.small_val(p.x.dtype))
        if floor is not None and p.farthest + floor < math.log(torch.finfo(p.x.dtype).eps):
            floor = None  # it would be lost to rounding
        with without_autocast(x.device):
            value = nt_xent_loss(p.x, p.y, scale=p.scale, alike=p.alike, own=p.own, floor=floor, **p.names)
        return value if exact else value.to(torch.log(torch.exp(p.x.detach()[:0])).dtype)

    def supervised(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_stock(original, home(generic, "compute_loss")):
            return NotImplemented
        call = arguments(original, args, kwargs)
        loss, x, labels, indices, y, others = (call[name] for name in PARAMETERS)
        if (
            len(call) > len(PARAMETERS)
            or not is_usual(loss, losses.SupConLoss, "mat_based_loss", *SUP_CON_METHODS)
            or not (indices is None or isinstance(indices, Listed))
        ):
            return NotImplemented
        p = _problem(loss, x, labels, y, others, indices)
        if p is None:
            return NotImplemented
        with without_autocast(x.device):
            rows = sup_con(p.x, p.y, scale=p.scale, reduction="none", **p.names)
        if not exact:
            rows = rows.to(torch.sum(p.x.detach()[:0], dim=1).dtype)
        indices = torch.arange(len(rows), device=rows.device)
        return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}

    def takes_listed(loss: Any) -> bool:
        """Whether what a loss is given as its list of pairs reaches ``nt_xent`` or ``supervised``, and nobody else."""
        if type(loss) not in (losses.NTXentLoss, losses.SupConLoss) or is_hooked(loss):
            return False
        taken = {"forward": base, "compute_loss": generic}
        return all(is_stock(getattr(loss, name), home(owner, name)) for name, owner in taken.items()) and all(
            is_stock(getattr(pairs, name), f"{pairs.__name__}.{name}") for name in (*PAIRS_FUNCTIONS, *OWN_FUNCTIONS)
        )

    @never
    def through_memory(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        memory = call["self"]
        if (
            memory.miner is not None
            or call["indices_tuple"] is not None
            or not is_own(memory, memories, *MEMORY_METHODS)
            or not takes_listed(memory.loss)
        ):
            return NotImplemented
        token = _filling.set(memory)
        try:
            return original(*args, **kwargs)
        finally:
            _filling.reset(token)

    @never
    def in_memory(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        memory, removes = call["self"], call["do_remove_self_comparisons"]
        if (
            _filling.get() is not memory
            or memory.miner is not None
            or call["input_indices_tuple"] is not None
            or not is_own(memory, memories, *MEMORY_METHODS)
            or not takes_listed(memory.loss)
            # A batch of one the library compares with itself.
            or (removes and len(call["embeddings"]) < 2)
        ):
            return NotImplemented
        return Listed(memory.curr_batch_idx if removes else None, lambda *_: original(*args, **kwargs))

    @never
    def on_ranks(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        wrapper, x, labels = call["self"], call["emb"], call["labels"]
        if (
            not wrapper.efficient
            or call["world_size"] < 2
            or call["indices_tuple"] is not None
            or not (isinstance(x, Tensor) and isinstance(labels, Tensor))
            or len(x) < 2
            or not is_own(wrapper, distributed.DistributedLossWrapper, *WRAPPER_METHODS)
            or not all(is_stock(getattr(distributed, n), f"{distributed.__name__}.{n}") for n in GATHER_FUNCTIONS)
            or not takes_listed(wrapper.loss)
        ):
            return NotImplemented
        places = torch.arange(len(x), device=x.device)  # every rank gathers its own rows first
        return original(**{**call, "indices_tuple": Listed(places, distributed.get_indices_tuple)})

    memory_parameters = ("self", "embeddings", "labels", "E_mem", "L_mem", "input_indices_tuple")
    wrapper_parameters = ("self", "emb", "labels", "indices_tuple", "ref_emb", "ref_labels", "world_size")
    return [
        Site(losses.NTXentLoss, "forward", PARAMETERS, _or_from_list(nt_xent)),
        Site(losses.SupConLoss, "compute_loss", PARAMETERS, _or_from_list(supervised)),
        Site(memories, "forward", PARAMETERS[:4], through_memory),
        Site(memories, "create_indices_tuple", memory_parameters, in_memory),
        Site(distributed.DistributedLossWrapper, "forward_regular_loss", wrapper_parameters, on_ranks),
    ]


def _or_from_list(ours: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement whose call, where it is left to the library, has the library's list of pairs again."""

    @never
    def loss(original: Any, *args: Any, **kwargs: Any) -> Any:
        value = ours(original, *args, **kwargs)
        listed = next((given for given in (*args, *kwargs.values()) if isinstance(given, Listed)), None)
        if value is not NotImplemented or listed is None:
            return value
        call = arguments(original, args, kwargs)
        return original(**{**call, "indices_tuple": listed.make(call["labels"], call["ref_labels"])})

    return loss


def nt_xent_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    alike: Tensor,
    own: Tensor | int,
    floor: float | None = None,
    **identity: Any,
) -> Tensor:
    """NT-Xent over every positive pair, each against the negatives of its row alone::

        s = scale * x @ y.T
        mean over pairs (i, p) of SAME:  log(exp(s[i, p]) + sum(exp(s[i, OTHER]))) - s[i, p]
                                      =  softplus(logsumexp(s[i, OTHER]) - s[i, p])
        with a floor:                    -log(exp(-that) + exp(floor))
                                      ≈  that - softplus(logsumexp(s[i, OTHER]) - s[i, p] + floor)

    Two passes: the log-sum-exp of the negatives, then, with it as one more column of x (and 1 in y), the softplus of a
    similarity. The floor takes a third.

    Args:
        x: ``[N, D]``.
        y: ``[M, D]``.
        scale: number or one-element tensor; 1 / temperature.
        row_labels: int64 ``[N]`` ≥ 0.
        col_labels: int64 ``[M]`` ≥ 0.
        alike: int64 ``[N]``, how many columns have the label of a row; there is at least one pair of SAME.
        own: how many pairs of SELF are among these.
        floor: logarithm of the number that every probability is raised by; ≈ is off by that number at most.
        **identity: paired (True: x and y are one bank, the pair (i, i) is left out), or row_ids and col_ids.

    Returns:
        fp32 scalar (fp64 for fp64).

    Source: Sohn 2016 and Chen et al. 2020 (arXiv 2002.05709), eq. 1, as pytorch-metric-learning generalises it.
    """
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    # The pairs of a row without negatives cost nothing.
    row_labels = row_labels.masked_fill(alike == len(y), -1)
    keys: dict[str, Any] = {"row_labels": row_labels, "col_labels": col_labels, **identity}
    (negatives,), _ = reduce_similarity(x, y, scale=scale, rows=[("lse", OTHER)], **keys)
    wider = torch.cat([x * -scale, negatives.masked_fill(row_labels < 0, 0)[:, None]], 1)
    ones = torch.cat([y, y.new_ones(len(y), 1)], 1)
    (losses,), _ = reduce_similarity(wider, ones, rows=[("softplus", SAME)], **keys)
    if floor is not None:
        (beyond,), _ = reduce_similarity(wider, ones, bias=floor, rows=[("softplus", SAME)], **keys)
        losses = losses - beyond
    return losses.sum() / (alike.sum() - own)


def _problem(loss: Any, x: Any, labels: Any, y: Any, others: Any, listed: Listed | None) -> Problem | None:
    """None where our kernels would give other numbers than the library, or none."""
    temperature = loss.temperature
    if (
        not are_plain(x, y, labels, others)
        or not (x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1])
        or x.dtype != y.dtype
        or x.dtype not in check.FLOATS
        or labels.dtype != others.dtype
        or labels.dtype not in LABELS
        or labels.shape != x.shape[:1]
        or others.shape != y.shape[:1]
        or len({x.device, y.device, labels.device, others.device}) > 1
        # Two pairs or less, or one column: the library calls that nothing to learn from.
        or len(y) < 2
        or len(x) * len(y) <= 4
        or not is_one_number(temperature, x)
        or (isinstance(temperature, Tensor) and temperature.ndim > 0)
    ):
        return None
    # Where the pairs are listed for the library, nothing is left out but what the list leaves out.
    paired, places = others is labels and listed is None, None if listed is None else listed.places
    if places is not None and len(places) > len(y):
        return None
    both = torch.cat([labels, others])
    distinct, names = both.view(SIGNED.get(both.dtype, both.dtype)).unique(return_inverse=True)
    rows, cols = names[: len(x)], names[len(x) :]
    alike = torch.bincount(cols, minlength=len(distinct))[rows]
    identity: dict[str, Any] = {"paired": paired}
    own: Tensor | int = len(x) if paired else 0
    if places is not None:
        # Of a column with another label the pair is a negative, which the library leaves in.
        themselves = cols[places] == rows
        identity = {
            "row_ids": torch.where(themselves, places, len(y)),
            "col_ids": torch.arange(len(y), device=x.device),
        }
        own = themselves.sum()
    of_rows, of_cols = (torch.linalg.vector_norm(t.detach(), dim=1).max().float() for t in (x, y))
    facts = (
        alike.sum() > own,
        alike.sum() < len(x) * len(y),
        (both != both).any(),
        of_rows * of_cols,
        torch.as_tensor(temperature, device=x.device).detach(),
    )
    # The host waits once; the library waits for its lists of pairs.
    positives, negatives, nan, largest, heat = torch.stack([fact.float() for fact in facts]).tolist()
    if not (positives and negatives and not nan and heat > 0 and math.isfinite(largest)):
        return None
    if loss.distance.normalize_embeddings:
        largest = 1.0
    farthest = 2 * largest / heat + math.log(len(y))
    if not farthest <= FARTHEST:
        return None
    dtype = torch.matmul(x.detach()[:0], y.detach()[:0].T).dtype  # autocast has a say
    normalize = loss.distance.maybe_normalize
    unit = normalize(x).to(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Problem(
        x=unit,
        y=unit if y is x else normalize(y).to(dtype),
        scale=1 / temperature,
        names={"row_labels": rows, "col_labels": cols, **identity},
        alike=alike,
        own=own,
        farthest=farthest,
    )
