"""What the Triton launchers launch, allocate and wait for: no kernel runs here, so any size can be tested."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccu_fast import ALL, SELF
from ccu_fast.ops.l2_normalize import triton as normalize
from ccu_fast.ops.reduce_similarity import triton as similarity
from ccu_fast.ops.reduce_similarity.api import DEFAULT_WORKSPACE
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.triton import (
    backward_pass,
    configs,
    forward_pass,
    gemm,
    plan,
    prefixes,
    small,
)
from ccu_fast.ops.small_info_nce import triton as small_info_nce

CLIP = (encode("lse", int(ALL)), encode("sum", int(SELF)))
HOMES = (forward_pass, backward_pass, prefixes)
KERNELS = [(home, name) for home in HOMES for name in vars(home) if name.endswith("_kernel")]
# Calls that make the host wait for a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts launches and GEMMs instead of doing them, on an H200."""
    counts: Counter[str] = Counter()

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert len(grid) == 1
            assert 0 < grid[0] < 2**31

            def launch(*args: Any, **constants: Any) -> None:
                assert constants["enable_fp_fusion"] is True
                counts[self.name] += 1

            return launch

    for home, name in KERNELS:
        monkeypatch.setattr(home, name, Recorder(name))
    for name in ("small_forward_kernel", "small_gradient_kernel"):
        monkeypatch.setattr(small, name, Recorder(name))
    monkeypatch.setattr(small_info_nce, "loss_kernel", Recorder("loss_kernel"))
    for name in ("normalize_kernel", "normalize_backward_kernel"):
        monkeypatch.setattr(normalize, name, Recorder(name))

    def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        assert out.shape == (a.shape[0], a.shape[1], b.shape[2])
        assert a.shape[2] == b.shape[1]
        counts["gemm"] += 1

    monkeypatch.setattr(gemm, "product", product)
    monkeypatch.setattr(prefixes, "product", product)
    device = dataclasses.replace(configs.of("sm_90", 132), tma=False)
    monkeypatch.setattr(configs, "device", lambda: device)
    yield counts


class Watch(TorchDispatchMode):
    """Counts operators, refuses those that wait, and follows the bytes that live."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {t.untyped_storage()._cdata for t in inputs}
        self.operators: Counter[str] = Counter()
        self.live: dict[int, tuple[int, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the GPU"
        if name == "_to_copy":
            assert (kwargs or {}).get("device") is None, f"{name} to {kwargs['device']} waits for the GPU"
        self.operators[name] += 1
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self._add(t)
        return out

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.inputs:
            return
        size, users = self.live.get(key, (size, 0))
        if not users:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.live[key] = size, users + 1
        weakref.finalize(t, self._drop, key)

    def _drop(self, key: int) -> None:
        size, users = self.live.pop(key)
        if users > 1:
            self.live[key] = size, users - 1
        else:
            self.now -= size


def problem(
    n: int, d: int, *, banks: int = 1, shared: bool = False, dtype: torch.dtype = torch.bfloat16, **traits: Any
):
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels = empty(1, n, dtype=torch.int64) if traits.get("labels") else None
    x, y, scale = empty(banks, n, d), empty(1 if shared else banks, n, d), empty(dtype=torch.float32)
    columns = CLIP if traits.get("symmetric", True) else ()
    return SimilarityProblem(x, y, scale, None, labels, labels, None, None, True, CLIP, columns)


def run(p: SimilarityProblem, workspace: int, needs: tuple[bool, ...] = (True, True, True, False)) -> Watch:
    with Watch(p.x, p.y) as watch:
        row_out, col_out, stash = similarity.forward(p, workspace, True)
        incoming = torch.empty_like(row_out), torch.empty_like(col_out)
        grads = similarity.backward(p, (*incoming, row_out, col_out), stash, list(needs), workspace)
        assert len(grads) == 4
        del grads, incoming
    return watch


GIB = 1 << 30


@pytest.mark.parametrize(
    ("n", "d", "workspace", "megabytes"),
    # Gradients and results included. What is not workspace: dx and dy, one fp32 sum of dY, partial sums, vectors.
    [(262144, 512, GIB, 2000), (32768, 512, GIB, 1300), (32768, 1024, 64 << 20, 400), (4096, 512, GIB, 90)],
)
def test_memory_does_not_grow_with_the_matrix(
    launches: Counter[str], n: int, d: int, workspace: int, megabytes: int
) -> None:
    watch = run(problem(n, d), workspace)
    print(f"B = {n}, D = {d}, workspace {workspace >> 20} MiB: peak {watch.peak / 1e6:.0f} MB")
    assert watch.peak <= megabytes * 1e6
    rest = watch.peak - workspace
    assert rest <= 2 * n * d * 2 + n * d * 4 + 600 * n * 4 + (8 << 20), f"{rest / 1e6:.0f} MB beside the workspace"


def test_the_default_workspace_of_a_gpu_is_nearly_all_that_is_taken(launches: Counter[str]) -> None:
    """The fp32 sums of the gradients have their place in it, so that a batch of 65536 takes 4 GiB beside them."""
    n, d = 65536, 512
    watch = run(problem(n, d), DEFAULT_WORKSPACE["cuda"])
    assert watch.peak - 2 * n * d * 2 <= 4 * GIB


def test_more_workspace_means_less_recomputation(launches: Counter[str]) -> None:
    kept = []
    for workspace in (0, 512 << 20, GIB, 3 * GIB):
        p = problem(32768, 512)
        words = plan.stash_shape(p, workspace, True)[0]
        pieces = plan.chunks(p, 128, workspace, words)
        assert sum(c.rows for c in pieces) == p.n
        assert [c.kept for c in pieces] == sorted((c.kept for c in pieces), reverse=True)
        kept.append(sum(c.rows for c in pieces if c.kept) / p.n)
    assert kept[0] == 0
    assert kept[-1] == 1
    assert kept == sorted(kept)
    assert kept[2] >= 0.25
    assert plan.stash_shape(problem(262144, 512), GIB, True) == (16,)  # 0.6 % of it is not worth its memory


def test_launches_of_a_call(launches: Counter[str]) -> None:
    watch = run(problem(4096, 512), GIB)
    assert launches == {
        "own_kernel": 1,
        "bound_kernel": 1,
        "forward_kernel": 1,
        "merge_kernel": 1,
        "online_kernel": 1,
        "gradient_kernel": 2,
        "scale_kernel": 1,
        "gemm": 2,
        "finish_kernel": 2,
    }
    arithmetic = {name: count for name, count in watch.operators.items() if not name.startswith("empty")}
    print(dict(watch.operators))
    assert sum(watch.operators.values()) <= 60, arithmetic


@pytest.mark.parametrize(("n", "chunks"), [(4096, 1), (32768, 8)])
def test_launches_of_all_prefixes(launches: Counter[str], n: int, chunks: int) -> None:
    """As many as of one problem but for the GEMMs, whose FLOPs are those of the longest prefix."""
    p = dataclasses.replace(problem(n, 512), prefixes=(64, 128, 256, 512), unit=True)
    with Watch(p.x, p.y) as watch:
        row_out, col_out, stash = prefixes.forward(p, GIB, True)
        incoming = torch.empty_like(row_out), torch.empty_like(col_out)
        grads = prefixes.backward(p, (*incoming, row_out, col_out), stash, [True, True, True, False], GIB)
        del grads, incoming
    assert launches == {
        "prefix_norms_kernel": 1,
        "prefix_forward_kernel": 1,
        "merge_kernel": 1,
        "prefix_online_kernel": 1,
        "prefix_gradient_kernel": 2 * chunks,
        "prefix_finish_kernel": chunks + 1,
        "gemm": 8 * chunks,
    }
    rest = watch.peak - min(GIB, 4 * n * n * 2)
    assert rest <= 2 * n * 512 * 2 + 2 * n * 512 * 4 + 4 * 600 * n * 4 + (64 << 20), f"{rest / 1e6:.0f} MB beside A"


def test_a_frozen_side_has_no_gemm(launches: Counter[str]) -> None:
    run(problem(4096, 512), GIB, (True, False, True, False))
    assert launches["gemm"] == 1
    run(problem(4096, 512), GIB, (False, False, True, False))
    assert launches["gemm"] == 1


@pytest.mark.parametrize("traits", [{"labels": True}, {"dtype": torch.float16}, {"banks": 17, "shared": True}], ids=str)
def test_nothing_waits_for_the_gpu(launches: Counter[str], traits: dict[str, Any]) -> None:
    """Watch refuses every operator that would wait: the rest can be captured into a CUDA graph."""
    for workspace in (0, GIB):
        run(problem(256, 64, **traits), workspace, (True, True, True, True))
    assert launches["forward_kernel"] == 2


def test_a_small_batch_takes_five_launches(launches: Counter[str]) -> None:
    """Two forward, three backward; all other calls create a tensor or a view."""
    x, y = (torch.empty(128, 512, dtype=torch.bfloat16, device="meta") for _ in range(2))
    scale = torch.empty((), device="meta")
    with Watch(x, y) as watch:
        _, *saved = small_info_nce.forward(x, y, scale, True, 0.5, True)
        small_info_nce.backward((x, y, scale), saved, torch.empty((), device="meta"), (True, True, True), True, 0.5)
    work = {name: count for name, count in watch.operators.items() if "empty" not in name}
    for name in ("view", "unsqueeze", "slice", "select", "alias", "detach"):
        work.pop(name, None)
    assert launches == {"small_forward_kernel": 1, "loss_kernel": 1, "small_gradient_kernel": 1}
    assert work == {"mul": 1, "sum": 1}


@pytest.mark.parametrize("traits", [{"labels": True}, {"dtype": torch.float16}, {"banks": 17, "shared": True}], ids=str)
def test_small_problems_of_any_kind_take_one_launch_each_way(launches: Counter[str], traits: dict[str, Any]) -> None:
    p = problem(128, 512, **traits)
    with Watch(p.x, p.y) as watch:
        row_out, col_out, stash = small.forward(p, 0, True)
        incoming = torch.empty_like(row_out), torch.empty_like(col_out)
        small.backward(p, (*incoming, row_out, col_out), stash, [True, True, True, False], 0)
    assert launches == {"small_forward_kernel": 1, "small_gradient_kernel": 1}
    # No matrix of pairs anywhere: results, their gradients, dx, dy and a sum for each program.
    assert watch.peak <= 2 * p.x.numel() * p.x.element_size() * 2 + 8 * row_out.nbytes + (64 << 10)
