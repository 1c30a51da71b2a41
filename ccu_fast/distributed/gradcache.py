"""Gradient caching: the exact gradient of a contrastive loss over a batch whose activations do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ccu_fast import check

Tower = tuple[Callable[[Any], Tensor], Any]


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
    numbers it had (dropout drops the same), and sends its part of the gradients back through it.

    Args:
        loss_fn: takes one embedding ``[N_t, D]`` for each tower, returns a scalar; any loss, those of
            ``ccu_fast.distributed`` included. Parameters that it uses (a scale) get their gradients in between.
        towers: pairs of a callable and its inputs: a tensor or a nest of lists, tuples and dicts of tensors, all with
            N_t as first dimension. The callable gets the same nest with ``chunk`` items and returns ``[chunk, ...]``.
        chunk: items at a time.
        backward: what to do with the loss instead of ``loss.backward()``: ``lambda loss:
            scaler.scale(loss).backward()``, ``accelerator.backward``.
        wrapped: DistributedDataParallel or fully_shard modules that the callables use. Their gradients are exchanged
            once, with the last chunk. A tower that is one itself need not be named.

    Returns:
        The loss, detached.

    Raises:
        TypeError, ValueError: no towers, inputs without items or of unlike lengths, chunk below 1.

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
    pieces = [list(_chunks(f"towers[{i}]", inputs, chunk)) for i, (_, inputs) in enumerate(towers)]
    states: list[list[_Random]] = []
    embeddings = []
    for (tower, _), parts in zip(towers, pieces, strict=True):
        states.append([])
        outputs = []
        for part in parts:
            states[-1].append(_Random(part))
            with torch.no_grad():
                outputs.append(tower(part))
        embeddings.append(torch.cat(outputs).requires_grad_())
    loss = loss_fn(*embeddings)
    backward(loss)
    after = _Random([inputs for _, inputs in towers])
    last = _last_use(towers, wrapped)
    for t, ((tower, _), parts) in enumerate(zip(towers, pieces, strict=True)):
        grad = embeddings[t].grad
        if grad is None:  # the loss does not depend on this tower
            grad = torch.zeros_like(embeddings[t])
        start = 0
        for i, part in enumerate(parts):
            final = i == len(parts) - 1
            states[t][i].restore()
            with ExitStack() as stack:
                for module, use in last.items():
                    if use != t or not final:
                        stack.enter_context(_no_exchange(module))
                output = tower(part)
                output.backward(grad[start : start + len(output)])
            start += len(output)
    after.restore()
    return loss.detach()


def _chunks(name: str, inputs: Any, chunk: int) -> Iterator[Any]:
    leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if not leaves:
        raise TypeError(f"{name}: expected inputs with tensors in them, got {type(inputs).__name__}")
    lengths = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in leaves})
    if len(lengths) > 1 or lengths[0] == 0:
        raise ValueError(f"{name}: expected tensors with the same number of items, at least 1, got {lengths}")
    for start in range(0, lengths[0], chunk):
        yield tree_map(lambda leaf, at=start: leaf[at : at + chunk] if isinstance(leaf, Tensor) else leaf, inputs)


class _Random:
    """The random state of the CPU and of every device that the inputs are on."""

    def __init__(self, inputs: Any) -> None:
        devices = {leaf.device for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)}
        self._cpu = torch.get_rng_state()
        self._others = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)


def _last_use(towers: Sequence[Tower], wrapped: Sequence[nn.Module]) -> dict[nn.Module, int]:
    """For every module that exchanges gradients the last tower that may use it."""
    last = dict.fromkeys(wrapped, len(towers) - 1)
    for t, (tower, _) in enumerate(towers):
        exchanges = hasattr(tower, "no_sync") or hasattr(tower, "set_requires_gradient_sync")
        if isinstance(tower, nn.Module) and tower not in wrapped and exchanges:
            last[tower] = t
    return last


@contextmanager
def _no_exchange(module: Any) -> Iterator[None]:
    """DistributedDataParallel's own context, or FSDP2's switch as one."""
    if hasattr(module, "no_sync"):
        with module.no_sync():
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
