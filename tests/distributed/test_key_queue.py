"""The queue of keys: what it holds, what a checkpoint has, and the losses that read it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ccu_fast
from ccu_fast import KeyQueue
from tests.support.oracle import unit


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 5, 1, 4), (7,), (9, 1), (0, 4, 0), (7, 7)])
def test_it_holds_the_latest_keys(sizes: tuple[int, ...]) -> None:
    queue, seen = KeyQueue(7, 2, labelled=True), torch.zeros(0, 2)
    for n in sizes:
        keys = torch.randn(n, 2)
        assert queue.enqueue(keys, torch.arange(len(seen), len(seen) + n)) == len(queue)
        seen = torch.cat([seen, keys])
        kept = min(7, len(seen))
        assert len(queue) == kept
        order = queue.labels.argsort()
        assert torch.equal(queue.labels[order], torch.arange(len(seen) - kept, len(seen)))
        assert torch.equal(queue.keys[order], seen[len(seen) - kept :])


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Any) -> None:
    queue = KeyQueue(5, 3)
    queue.enqueue(torch.randn(4, 3))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = KeyQueue(5, 3)
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    third = copy.deepcopy(queue)
    keys = torch.randn(3, 3)
    for each in (queue, other, third):
        assert len(each) == 4
        each.enqueue(keys)
    assert torch.equal(queue.keys, other.keys)
    assert torch.equal(queue.keys, third.keys)
    assert len(other) == 5
    with pytest.raises(ValueError, match="capacity: expected 6 in the checkpoint, got 5"):
        KeyQueue(6, 3).load_state_dict(queue.state_dict(), strict=False)
    # Inside a model, with others, and in another dtype and device.
    model = torch.nn.ModuleDict({"queue": queue, "tower": torch.nn.Linear(3, 3)})
    fresh = torch.nn.ModuleDict({"queue": KeyQueue(5, 3), "tower": torch.nn.Linear(3, 3)})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh["queue"].keys, queue.keys)
    assert fresh.bfloat16()["queue"].keys.dtype == torch.bfloat16


def test_keys_get_no_gradient_and_their_change_is_noticed() -> None:
    queue = KeyQueue(6, 4)
    tower = torch.nn.Linear(4, 4)
    queue.enqueue(tower(torch.randn(6, 4)))
    assert not queue.keys.requires_grad
    x = torch.randn(3, 4, requires_grad=True)
    loss = ccu_fast.info_nce(x, x.detach(), scale=2.0, negatives=queue.keys, in_batch=False)
    queue.enqueue(torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_step_is_compiled_once_when_it_is_full() -> None:
    queue, graphs = KeyQueue(4, 8), 0
    queue.enqueue(torch.randn(4, 8))

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(backend=count)
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = ccu_fast.info_nce(x, x, scale=2.0, negatives=queue.keys)
        queue.enqueue(x)
        return loss

    torch._dynamo.reset()
    losses = [step(torch.randn(2, 8)) for _ in range(6)]
    assert graphs <= 2
    assert len(set(map(float, losses))) == 6


def test_moco(backend: str) -> None:
    """He et al., algorithm 1: the positive first, then the queue."""
    x, y = unit(5, 8).float().requires_grad_(), unit(5, 8).float()
    queue = KeyQueue(64, 8)
    queue.enqueue(unit(40, 8).float())
    loss = ccu_fast.info_nce(x, y, scale=1 / 0.07, negatives=queue.keys, in_batch=False, backend=backend)
    wide = x.detach().double().requires_grad_()
    logits = torch.cat([(wide * y.double()).sum(1, keepdim=True), wide @ queue.keys.double().T], 1) / 0.07
    want = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    got, expected = torch.autograd.grad(loss, x)[0], torch.autograd.grad(want, wide)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_cross_batch_memory() -> None:
    """Positives and negatives by label among the keys of past batches and its own, an item and itself left out."""
    z, labels = unit(6, 8).float(), torch.tensor([0, 1, 0, 2, 1, 5])
    queue = KeyQueue(32, 8, labelled=True)
    queue.enqueue(unit(10, 8).float(), torch.arange(10) % 4)
    keys, of_keys = torch.cat([z, queue.keys]), torch.cat([labels, queue.labels])
    ids = torch.arange(len(keys))
    loss = ccu_fast.sup_con(
        z, keys, scale=10.0, row_labels=labels, col_labels=of_keys, row_ids=ids[:6], col_ids=ids, paired=False
    )
    s = 10.0 * z.double() @ keys.double().T
    other = ids[:6, None] != ids
    rows = []
    for i in range(6):
        own = other[i] & (of_keys == labels[i])
        if own.any():
            rows.append(s[i, other[i]].logsumexp(0) - s[i, own].mean())
    torch.testing.assert_close(loss.double(), torch.stack(rows).mean(), rtol=1e-5, atol=0)


WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "capacity": (ValueError, "capacity: expected an int at least 1", lambda: KeyQueue(0, 2)),
    "dim": (TypeError, "dim: expected an int", lambda: KeyQueue(4, 2.0)),  # type: ignore[arg-type]
    "dtype": (TypeError, "dtype: expected float16", lambda: KeyQueue(4, 2, dtype=torch.int8)),
    "keys": (ValueError, "keys: expected shape", lambda: KeyQueue(4, 2).enqueue(torch.zeros(3, 5))),
    "one key": (ValueError, "keys: expected 2 dimensions", lambda: KeyQueue(4, 2).enqueue(torch.zeros(2))),
    "labels": (ValueError, "labels: expected a tensor", lambda: KeyQueue(4, 2, labelled=True).enqueue(torch.eye(2))),
    "no labels": (ValueError, "labels: expected None", lambda: KeyQueue(4, 2).enqueue(torch.eye(2), torch.arange(2))),
    "labels shape": (
        ValueError,
        "labels: expected shape",
        lambda: KeyQueue(4, 2, labelled=True).enqueue(torch.eye(2), torch.arange(3)),
    ),
    "labels dtype": (
        TypeError,
        "labels: expected dtype",
        lambda: KeyQueue(4, 2, labelled=True).enqueue(torch.eye(2), torch.zeros(2)),
    ),
    "no such labels": (ValueError, "labelled: expected True", lambda: KeyQueue(4, 2).labels),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_by_name(name: str) -> None:
    kind, said, call = WRONG[name]
    with pytest.raises(kind, match=said):
        call()


def test_what_it_says_of_itself() -> None:
    assert repr(KeyQueue(4, 2)) == "KeyQueue(4, 2, labelled=False, gather=False, filled=0)"
