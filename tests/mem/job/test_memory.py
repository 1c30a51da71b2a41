"""What a run holds in memory: one surrogate, no copies for a checkpoint, candidates of triggers in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ccu_fast.mem import Method, Protection, WordTokenizer, triggers
from ccu_fast.mem import round as rounds
from ccu_fast.mem.job.checkpoint import Workplace
from ccu_fast.mem.job.estimate import _peak
from ccu_fast.mem.source import TensorSource
from ccu_fast.models.dual_encoder import SmallDualEncoder
from tests.support.mem_jobs import TINY

pytestmark = pytest.mark.usefixtures("one_thread")


def begun() -> Protection:
    words = WordTokenizer.for_strips()
    images = torch.randint(0, 256, (6, 1, 16, 64), dtype=torch.uint8)
    run = Protection(
        TensorSource(images, ["a photo of the digits one"] * 6),
        words,
        lambda: SmallDualEncoder(len(words), words.eot, width=32, dim=32),
        method=Method.parse("mem"),
        settings=TINY,
    )
    run.advance()
    return run


def storages(state: Any) -> set[int]:
    if isinstance(state, Tensor):
        return {state.untyped_storage().data_ptr()}
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return {found for value in values for found in storages(value)}


def test_a_checkpoint_is_written_from_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun()
    model = cast(nn.Module, run.worker.surrogate)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    written: list[Any] = []
    monkeypatch.setattr("ccu_fast.mem.job.checkpoint.write_state", lambda _, state: written.append(state))
    Workplace(tmp_path, 0, "key").save(1, run)
    assert weights <= storages(written[0]) and not weights & storages(run.state_dict())
    moments = {v.untyped_storage().data_ptr() for s in run.worker.optimizer.state.values() for v in s.values()}
    assert len(moments) >= 2 * len(weights) and moments <= storages(written[0])


def test_gradients_are_gone_after_a_step() -> None:
    assert all(p.grad is None for p in begun().worker.surrogate.parameters())


def test_the_surrogate_before_goes_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun()
    fresh, there = rounds.fresh, []

    def made(*args: Any) -> Any:
        there.append((run.worker.model, hasattr(run.worker, "optimizer"), hasattr(run.worker, "encode_image")))
        return fresh(*args)

    monkeypatch.setattr(rounds, "fresh", made)
    run.worker.renew("surrogate 1")
    assert there == [(None, False, False)] and run.worker.model is not None


class _Elsewhere:
    """Ids that say they are on a GPU."""

    device = torch.device("cuda")

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.shape = ids, ids.shape

    def split(self, size: int) -> tuple[Tensor, ...]:
        return self.ids.split(size)


class _Recorder:
    embedding_matrix = torch.zeros(50, 512)

    def __init__(self) -> None:
        self.rows: list[int] = []

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.rows.append(len(tokens))
        return tokens[:, :4].float()


@pytest.mark.parametrize(("captions", "parts"), [(128 * 8, 1), (256 * 16, 3)])
def test_candidates_on_a_gpu_go_in_parts_of_a_bounded_size(captions: int, parts: int) -> None:
    tokens, model = torch.arange(captions * 77).view(captions, 77), _Recorder()
    found = triggers.encode_many(cast(Any, model), cast(Any, _Elsewhere(tokens)), 2)
    assert torch.equal(found, tokens[:, :4].float())
    assert len(model.rows) == parts and sum(model.rows) == captions
    assert max(model.rows) * 77 * 4 * 512 * 4 <= triggers._PART_BYTES_GPU


def test_the_peak_is_that_of_this_process() -> None:
    before = _peak()
    held = torch.ones(64 << 18)
    assert _peak() >= before and _peak() > held.nbytes
