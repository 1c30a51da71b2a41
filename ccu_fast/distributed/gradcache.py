"""Gradient caching: the exact gradient of a contrastive loss over a batch whose activations do not fit in memory."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ccu_fast import check
from ccu_fast.distributed.random_state import ATOMS, Restore, generators_in, random_state

_SAME = 1e-3  # relative, and more for half precision: far below another draw of a dropout

Tower = tuple[Callable[[Any], Any], Any]


def cached_step(
    loss_fn: Callable[..., Tensor],
    towers: Sequence[Tower],
    chunk: int,
    *,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    wrapped: Sequence[nn.Module] = (),
) -> Tensor:
    """Run forward and backward in two passes over chunks, so that a large batch fits in memory::

        loss = loss_fn(*(tower(inputs) for tower, inputs in towers))
        loss.backward()

    Same loss, same gradients (added to ``.grad``), and only one chunk's activations at a time. The first pass keeps the
    embeddings alone; the loss gives their gradients; the second pass computes every chunk again, with the random
    numbers it had (dropout drops the same), and sends its part of the gradients back through it. A tower in which
    nothing learns (the frozen one of LiT) has no second pass.

    Args:
        loss_fn: takes what each tower returns, returns a scalar; any loss, those of ``ccu_fast.distributed`` included.
            Parameters that it uses (a scale) get their gradients in between.
        towers: pairs of a callable and its inputs. Inputs are a tensor or array ``[N_t, ...]``, a list of N_t strings
            or other objects (token lists), or a nest of these in tuples, mappings (a tokenizer's BatchEncoding) and
            lists with tensors in them; the callable gets the same nest with ``chunk`` items, copies that it may change.
            Tensors without dimensions, and objects that are in no list (a flag, a tuple of two numbers), are passed to
            every chunk. The callable returns embeddings ``[chunk, D]``, or a nest of tensors ``[chunk, ...]``, which
            ``loss_fn`` gets with N_t items; a tensor without dimensions in it (a scale) must be the same for every
            chunk. Both passes must give the same: random numbers may be those of torch, of numpy's global generator, of
            ``random``, and of generators of all three among the inputs. Where N_t is 0, as on a rank that got no items,
            the callable is called with none.
        chunk: items at a time.
        backward: what to do with the loss instead of ``loss.backward()``: ``lambda loss:
            scaler.scale(loss).backward()``, ``accelerator.backward``.
        wrapped: DistributedDataParallel or fully_shard modules that the callables use. Their gradients are exchanged
            once, with the last chunk. A tower that is one itself need not be named. Of fully_shard modules, whose every
            call is an exchange, all ranks need the same number of chunks.

    Returns:
        The loss, detached.

    Raises:
        TypeError, ValueError: no towers, inputs not to be cut, of unlike lengths or computed from what needs a
            gradient, sparse or nested, chunk below 1; a tower that returns something else than a tensor for each of its
            items, a loss that is no number. No gradient is written before.
        RuntimeError: the second pass of a tower gives other results than the first, because it draws random numbers of
            its own, counts its calls, or changes what it uses. Its gradients would be wrong; some may be written, and
            other ranks wait for those of this one.

    Under autocast call it inside the context; both passes then are. BatchNorm sees every chunk twice, so its running
    statistics move twice, and normalises by chunk. A parameter that only ``loss_fn`` uses must not be inside a
    DistributedDataParallel module, which would wait for it in the second pass: keep it outside and call
    :func:`ccu_fast.distributed.average_gradients`.

    Source: Gao et al. 2021 (arXiv 2101.06983).

    >>> tower, x, y = torch.nn.Linear(3, 2), torch.ones(4, 3), torch.ones(4, 2)
    >>> loss = ccu_fast.distributed.cached_step(lambda a: (a - y).square().mean(), [(tower, x)], chunk=2)
    >>> loss.shape, tower.weight.grad.shape
    (torch.Size([]), torch.Size([2, 3]))
    """
    check.integer("chunk", chunk, low=1)
    if not towers:
        raise ValueError("towers: expected at least one pair of a callable and its inputs, got none")
    cut = [_Chunks(f"towers[{t}]", pair, chunk) for t, pair in enumerate(towers)]
    modules = _exchanging(towers, wrapped)
    embedded = [_Embedded(chunks, list(modules)) for chunks in cut]
    # Autocast keeps the weights it has cast. Before torch 2.11 it also kept those cast without a graph, through which
    # the second pass would reach no parameter.
    torch.clear_autocast_cache()
    loss = loss_fn(*(each.result for each in embedded))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn: expected a callable that returns a tensor without dimensions, got {got} from it")
    backward(loss)
    after = random_state(
        (device for chunks in cut for device in chunks.devices), (each for chunks in cut for each in chunks.generators)
    )
    learning = [t for t, each in enumerate(embedded) if any(each.learns)]
    last = {module: max((t for t in users if t in learning), default=None) for module, users in modules.items()}
    try:
        for t in learning:
            embedded[t].send_back([module for module, at in last.items() if at != t], list(modules))
    finally:
        after()
    return loss.detach()


class _Chunks:
    """A tower and its inputs in parts of at most ``chunk`` items."""

    def __init__(self, name: str, pair: Tower, chunk: int) -> None:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not callable(pair[0]):
            raise TypeError(f"{name}: expected a pair of a callable and its inputs, got {type(pair).__name__}")
        self.name, (self._run, inputs) = name, pair
        lengths: set[int] = set()
        self.devices: set[torch.device] = set()
        self.generators = generators_in(inputs)
        self._nests: dict[int, bool] = {}

        def measure(items: Any) -> Any:
            if isinstance(items, Tensor):
                if items.layout is not torch.strided or items.is_nested:
                    kind = "a nested one" if items.is_nested else items.layout
                    raise TypeError(f"{name}: expected inputs of dense tensors, got {kind}")
                if items.grad_fn is not None:
                    raise ValueError(
                        f"{name}: expected inputs without a graph, through which every chunk would go, got one"
                    )
                self.devices.add(items.device)
                if not items.ndim:
                    return items
            lengths.add(len(items))
            return items

        _cut(inputs, measure, self._nests)
        if not lengths:
            raise TypeError(
                f"{name}: expected inputs with tensors or lists of items in them, got {type(inputs).__name__}"
            )
        if len(lengths) > 1:
            raise ValueError(f"{name}: expected tensors and lists with the same number of items, got {sorted(lengths)}")
        (items,) = lengths
        self._inputs = inputs
        # A rank without items still takes part in what the loss and the towers exchange: a chunk of none.
        self.spans = [slice(start, min(start + chunk, items)) for start in range(0, max(items, 1), chunk)]

    def inputs(self, span: slice) -> Any:
        """Of some items; their own at each call: what a tower writes into them is not seen by the second pass."""
        made: dict[int, Any] = {}

        def part(items: Any) -> Any:
            if id(items) not in made:  # what stands in two places of the nest still does
                whole = isinstance(items, Tensor) and not items.ndim
                made[id(items)] = _copied(items if whole else items[span])
            return made[id(items)]

        return _cut(self._inputs, part, self._nests)

    def random_state(self) -> Restore:
        """What makes the next random numbers of the tower those that it would draw now."""
        return random_state(self.devices, self.generators)

    def run(self, span: slice) -> tuple[list[Any], TreeSpec]:
        """What the tower makes of them, flat."""
        return tree_flatten(self._run(self.inputs(span)))


def _cut(inputs: Any, cut: Callable[[Any], Any], nests: dict[int, bool]) -> Any:
    """The nest with ``cut`` of every tensor, and of what else has one entry for each item of the batch.

    ``nests`` remembers of which lists an answer of :func:`_holds_tensor` is known: to look takes as long as they are.
    """
    if isinstance(inputs, Tensor) or (isinstance(inputs, np.ndarray) and inputs.ndim):
        return cut(inputs)
    if isinstance(inputs, Mapping):
        return _with_values(inputs, {key: _cut(value, cut, nests) for key, value in inputs.items()})
    if isinstance(inputs, PackedSequence):
        raise TypeError("towers: expected inputs that can be cut into items, got a PackedSequence")
    if isinstance(inputs, (list, tuple)):
        if id(inputs) not in nests:
            texts = bool(inputs) and all(isinstance(item, str) for item in inputs)
            nests[id(inputs)] = not texts and (isinstance(inputs, tuple) or _holds_tensor(inputs))
        if not nests[id(inputs)]:
            return cut(inputs)
        changed_items = [_cut(item, cut, nests) for item in inputs]
        if hasattr(inputs, "_fields"):
            return type(inputs)(*changed_items)
        return changed_items if isinstance(inputs, list) else tuple(changed_items)
    return inputs


def _with_values(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """The mapping with other values: of its class, with what else it carries, if a copy of it is one; else a dict."""
    if not isinstance(mapping, (dict, UserDict)):
        return values
    same = copy.copy(mapping)
    for key, value in values.items():
        same[key] = value
    return same


def _copied(items: Any) -> Any:
    """Tensors, arrays, lists and mappings anew, down to the objects in them."""
    if isinstance(items, Tensor):
        return items.clone()
    if isinstance(items, (np.ndarray, bytearray)):
        return items.copy()
    if isinstance(items, Mapping):
        return _with_values(items, {key: _copied(value) for key, value in items.items()})
    if isinstance(items, list):
        return [item if type(item) in ATOMS else _copied(item) for item in items]
    if isinstance(items, tuple):
        copies = [_copied(item) for item in items]
        return type(items)(*copies) if hasattr(items, "_fields") else tuple(copies)
    return items


def _holds_tensor(nest: Any) -> bool:
    """Whether a list is a nest, with a tensor to cut in it, and not itself a list of items."""
    if isinstance(nest, Mapping):
        return any(map(_holds_tensor, nest.values()))
    if isinstance(nest, (list, tuple)):
        return any(_holds_tensor(item) for item in nest if type(item) not in ATOMS)
    return isinstance(nest, Tensor)


class _Embedded:
    """The first pass of a tower: ``result`` is what it returns for all items, as leaves of the loss."""

    def __init__(self, chunks: _Chunks, modules: Sequence[nn.Module]) -> None:
        self._chunks = chunks
        self._states: list[Restore] = []
        found: list[list[Any]] = []
        spec: TreeSpec | None = None
        self.learns: list[bool] = []
        for span in chunks.spans:
            self._states.append(chunks.random_state())
            # With its graph, which goes at once: what does not learn is known before any gradient is written, and both
            # passes go through the same kernels.
            with _no_exchange(modules):
                leaves, spec_here = chunks.run(span)
            if spec is not None and spec_here != spec:
                raise ValueError(
                    f"{chunks.name}: expected the same nest of tensors from every chunk, got {spec} and {spec_here}"
                )
            spec = spec_here
            self._check(leaves, span.stop - span.start, found)
            learns = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
            self.learns = [a or b for a, b in zip(self.learns or learns, learns, strict=True)]
            # Copies: a tower may return a buffer that it writes into again.
            found.append([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
            del leaves
        assert spec is not None
        self._leaves = [
            torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim else parts[0]
            for parts in zip(*found, strict=True)
        ]
        for leaf, learned in zip(self._leaves, self.learns, strict=True):
            if learned:
                leaf.requires_grad_()
        self.result = tree_unflatten(self._leaves, spec)

    def _check(self, leaves: list[Any], size: int, found: list[list[Any]]) -> None:
        name = self._chunks.name
        if found and len(leaves) != len(found[0]):
            raise ValueError(
                f"{name}: expected as many tensors from every chunk, got {len(found[0])}, then {len(leaves)}"
            )
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(f"{name}: expected a callable that returns tensors, got none from it")
        for leaf, before in zip(leaves, found[0] if found else leaves, strict=True):
            if (leaf is None) != (before is None):
                raise ValueError(f"{name}: expected None from every chunk or from none, got both")
            if leaf is None:
                continue
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name}: expected a callable that returns tensors, got {type(leaf).__name__} from it")
            if leaf.ndim and len(leaf) != size:
                raise ValueError(
                    f"{name}: expected a callable that returns one entry for each of {size} items, got a tensor "
                    f"{list(leaf.shape)} from it"
                )
            if leaf.ndim != before.ndim or leaf.shape[1:] != before.shape[1:]:
                raise ValueError(
                    f"{name}: expected the same shape from every chunk but for the number of items, got "
                    f"{list(before.shape)} and {list(leaf.shape)}"
                )
            if not leaf.ndim and not (torch.equal(leaf, before) or (leaf.isnan() and before.isnan())):
                raise ValueError(
                    f"{name}: expected a tensor without dimensions to be the same for every chunk, got "
                    f"{before.item()} and {leaf.item()}"
                )

    def send_back(self, silent: Sequence[nn.Module], modules: Sequence[nn.Module]) -> None:
        """The second pass; gradients are exchanged with its last chunk, of the ``silent`` modules not at all."""
        # Zeros where the loss does not use the tower: DistributedDataParallel waits for every parameter.
        grads = [
            (leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)) if learns else None
            for leaf, learns in zip(self._leaves, self.learns, strict=True)
        ]
        others: list[Tensor] = []
        for restore, span in zip(self._states, self._chunks.spans, strict=True):
            final = span is self._chunks.spans[-1]
            restore()
            with _no_exchange(silent if final else modules):
                outputs, given = [], []
                for output, grad, leaf in zip(self._chunks.run(span)[0], grads, self._leaves, strict=True):
                    if grad is None:
                        continue
                    if leaf.grad is not None:  # the loss uses it
                        others.append(_differ(output.detach(), (leaf[span] if leaf.ndim else leaf).detach()))
                    if output.requires_grad and (grad.ndim or final):
                        outputs.append(output)
                        given.append(grad[span] if grad.ndim else grad)
                if final or span is self._chunks.spans[0]:  # a GPU is waited for twice, once before its first gradient
                    self._refuse(others)
                if outputs:
                    torch.autograd.backward(outputs, given)

    def _refuse(self, others: list[Tensor]) -> None:
        if any(map(bool, others)):
            raise RuntimeError(
                f"{self._chunks.name}: expected the same results from both passes, got others from the second. A tower "
                "must not count its calls or change what it uses, and draw random numbers from torch's, numpy's or "
                "Python's own generators, or from those among its inputs"
            )


def _differ(now: Tensor, before: Tensor) -> Tensor:
    """Whether an item has another result, but for the rounding of sums whose order a GPU leaves open."""
    if not now.numel():
        return torch.zeros((), dtype=torch.bool, device=now.device)
    kind = now.device.type
    narrow = [now.dtype] if not torch.is_autocast_enabled(kind) else [now.dtype, torch.get_autocast_dtype(kind)]
    share = max(_SAME, *(4 * torch.finfo(dtype).eps for dtype in narrow))
    wide = torch.promote_types(now.dtype, torch.float64)
    now, before = (t.to(wide).reshape(len(t) if t.ndim else 1, -1) for t in (now, before))
    same = (now == before) | (now.isnan() & before.isnan())
    change = torch.linalg.vector_norm(torch.where(same, 0, now - before), dim=1)
    size = torch.linalg.vector_norm(torch.where(before.isfinite(), before, 0), dim=1)
    # An item near zero beside the others is rounded as they are.
    return ~(change <= share * torch.maximum(size, 0.01 * size.amax())).all()


def _exchanging(towers: Sequence[Tower], wrapped: Sequence[nn.Module]) -> dict[nn.Module, list[int]]:
    """The modules that exchange gradients, and the towers that may use each."""
    users = {module: list(range(len(towers))) for module in wrapped}
    for t, (tower, _) in enumerate(towers):
        exchanges = hasattr(tower, "no_sync") or hasattr(tower, "set_requires_gradient_sync")
        if isinstance(tower, nn.Module) and tower not in wrapped and exchanges:
            users.setdefault(tower, []).append(t)
    return users


@contextmanager
def _no_exchange(modules: Sequence[Any]) -> Iterator[None]:
    """DistributedDataParallel's own context, or FSDP2's switch as one, for each module."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())
            else:
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield
