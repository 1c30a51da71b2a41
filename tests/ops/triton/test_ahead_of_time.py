"""Every Triton kernel compiled ahead of time for sm_80, sm_89, sm_90, sm_100, sm_120, and the resources that it takes.

No GPU is needed: a driver that only names a target replaces the real one, and the backend's own launch code runs on CPU
tensors. So the arguments, specialisations and tiles compiled here are those that a GPU of that kind would run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.no_launch import PROCESSORS, SHARED_LIMIT, TargetOnly
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SAME, SELF
from tests.support.presence import absent

MATRIX_INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
MAX_REGISTERS = 255
PRODUCTS = ("forward_kernel", "gradient_kernel", "online_kernel")
SMALL = ("small_forward_kernel", "small_gradient_kernel")
LOSS = ("loss_kernel",)
NORMALIZE = ("normalize_kernel", "normalize_backward_kernel")
PREFIXES = tuple(f"prefix_{name}_kernel" for name in ("forward", "gradient", "online", "norms", "finish"))
OTHERS = ("bound_kernel", "merge_kernel", "own_kernel", "norm_kernel", "scale_kernel", "finish_kernel")

# Users must not see a release's warnings about options that were left out, either. What Python 3.13 says of the syntax
# trees that Triton's own compiler makes is of no kernel, and nobody sees it: such warnings are not shown.
pytestmark = pytest.mark.filterwarnings("error", "ignore:AnnAssign.__init__ missing:DeprecationWarning")

# Rows, columns, keys, "ragged" if the shape fits no tile, bias.
Variant = tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...], str]
CLIP = (("lse", ALL), ("sum", SELF))
OTHERS_ALONE = (("lse", OTHER), ("sum", SELF))
DISTILL = (("lse", SAME | OTHER), ("sum", SELF), ("expected", SAME | OTHER), ("mass", SAME | OTHER))
VARIANTS: dict[str, Variant] = {
    "clip": (CLIP, CLIP, ""),
    "clip ragged": (CLIP, CLIP, "ragged"),
    "rows": ((("lse", ALL),), (), ""),
    "clip labels ids ragged": (CLIP, CLIP, "labels ids ragged"),
    "clip of columns": ((), CLIP, ""),
    "siglip": ((("softplus", ALL), ("sum", SELF)), (), "bias"),
    "siglip ragged": ((("softplus", ALL), ("sum", SELF)), (), "bias ragged"),
    "siglip ids": ((("softplus", SAME | OTHER), ("logsigmoid", SELF)), (), "bias ids"),
    "bounded labels": ((("lse", ALL), ("lse", OTHER)), (), "labels"),
    "supcon labels": ((("lse", SAME | OTHER), ("sum", SAME)), (), "labels"),
    "clip limits": (OTHERS_ALONE, OTHERS_ALONE, "limits"),
    "clip limits guide": (OTHERS_ALONE, OTHERS_ALONE, "limits guide"),
    "counts labels ids limits guide ragged": (
        (*CLIP, ("count", OTHER)),
        OTHERS_ALONE,
        "labels ids limits guide ragged",
    ),
    "siglip limits ragged": ((("softplus", ALL), ("sum", SELF)), (), "bias limits ragged"),
    "distill": (DISTILL, DISTILL, "limits guide teacher"),
    "distill labels ragged": (DISTILL, DISTILL, "labels limits guide teacher ragged"),
}
# Compiling a case takes seconds. Where one has all that another has, in the same tile, it stands for both.
EVERYWHERE = [
    ("bf16", "clip"),
    ("bf16", "clip labels ids ragged"),
    ("bf16", "clip limits guide"),
    ("tf32", "clip labels ids ragged"),
]
ON_SM_90 = [
    ("bf16", "clip ragged"),
    ("bf16", "siglip ragged"),
    ("bf16", "siglip ids"),
    ("bf16", "clip of columns"),
    ("bf16", "bounded labels"),
    ("fp16", "supcon labels"),
    ("fp16", "clip"),
    ("fp16", "siglip limits ragged"),
    ("bf16", "clip limits"),
    ("bf16", "distill"),
    ("tf32", "clip"),
    ("tf32", "clip ragged"),
    ("tf32", "counts labels ids limits guide ragged"),
    ("tf32", "distill labels ragged"),
    # One tile serves it on every GPU.
    ("ieee", "clip labels ids ragged"),
    ("ieee", "clip limits guide"),
]
ON_SM_100 = [("bf16", "clip ragged"), ("bf16", "siglip"), ("bf16", "distill"), ("tf32", "clip ragged")]
ON_SM_80 = [("bf16", "clip ragged"), ("tf32", "clip")]
ON_SM_89 = [
    ("bf16", "clip"),
    ("bf16", "clip limits guide"),
    ("tf32", "clip ragged"),
    ("tf32", "clip labels ids ragged"),
]
# The tiles of sm_89, by another compiler.
ON_SM_120 = [("bf16", "clip"), ("tf32", "clip labels ids ragged")]
CASES = [
    *((capability, *case) for capability in (80, 90, 100) for case in EVERYWHERE),
    *((80, *case) for case in ON_SM_80),
    *((89, *case) for case in ON_SM_89),
    *((90, *case) for case in ON_SM_90),
    *((100, *case) for case in ON_SM_100),
    *((120, *case) for case in ON_SM_120),
]


def spills(variant: str, *, small: bool = False, precision: str = "") -> int:
    """Stack bytes per thread that this release of Triton may use: none with 3.7, for which the tiles were chosen.

    But for 8 in fp16 gradients of the few tiles that hold pairs of the diagonal.
    Other releases allot registers otherwise. 3.6, and those from 3.8 on, spill up to 120 B in tiles with labels, ids
    and edges; half a tile would spare them, and load x and y twice as often. 3.6 spills 16 B in the online kernel of a
    teacher for sm_100. 3.4 and 3.5 spill up to 96 B in any large tile, and up to 328 B in the gradient of a small batch
    with rows longer than 512.
    """
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < (3, 6):
        return 352 if small else 128
    if release != (3, 7) and not small and "ids" in variant:
        return 128
    if release == (3, 6) and "distill" in variant:
        return 16
    return 8 if precision == "fp16" and not small else 0


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Callable[[], dict[str, Any]]]]:
    """Starts compiling for a capability; what it returns gives the compiled kernels by name."""
    if importlib.util.find_spec("triton") is None:
        absent("ahead-of-time compilation", "the package triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        absent("ahead-of-time compilation", "TRITON_INTERPRET=1 is set")
    import triton
    from triton.compiler.code_generator import CodeGenerator

    from ccu_fast.ops.l2_normalize import triton as normalize
    from ccu_fast.ops.reduce_similarity.triton import backward_pass, configs, forward_pass, prefixes
    from ccu_fast.ops.reduce_similarity.triton import small as small_batch
    from ccu_fast.ops.small_info_nce import triton as small_info_nce

    # Whatever this release allows: up to Triton 3.6 a function of a kernel cannot return None in a tuple.
    inlined = CodeGenerator.call_JitFunction

    def none_in(found: Any) -> bool:
        if isinstance(found, triton.language.tuple):
            return any(map(none_in, found.values))
        return found is None or (isinstance(found, triton.language.constexpr) and found.value is None)

    def without_none(self: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
        found = inlined(self, fn, *args, **kwargs)
        assert not isinstance(found, triton.language.tuple) or not none_in(found), f"{fn.__name__} returns None"
        return found

    monkeypatch.setattr(CodeGenerator, "call_JitFunction", without_none)
    # So that a launch that leaves the choice to Triton is detected, whatever this release would choose.
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    # Nobody reads the lines of what is compiled here, and they take a sixth of the compiler's time.
    monkeypatch.setattr(triton.knobs.compilation, "disable_line_info", True)
    homes = [vars(home) for home in (forward_pass, backward_pass, prefixes, small_batch, small_info_nce, normalize)]
    names = (*PRODUCTS, *OTHERS, *PREFIXES, *SMALL, *LOSS, *NORMALIZE)
    kernels = [next(home[name] for home in homes if name in home) for name in names]

    def forget() -> None:
        for kernel in kernels:
            for capability in MATRIX_INSTRUCTION:
                kernel.device_caches.pop(capability, None)
        configs._device.cache_clear()

    def start(capability: int) -> Callable[[], dict[str, Any]]:
        forget()
        drivers = triton.runtime.driver
        # reset_active would look for a GPU. Triton 3.4 keeps the driver in a public attribute, later ones behind it.
        monkeypatch.setattr(drivers, "_active" if hasattr(drivers, "_active") else "active", TargetOnly(capability))

        def compiled() -> dict[str, Any]:
            found = {}
            for kernel in kernels:
                for number, binary in enumerate(kernel.device_caches[capability][0].values()):
                    assert binary.metadata.enable_fp_fusion, kernel.__name__
                    found[f"{kernel.__name__} {number}"] = binary
            return found

        return compiled

    yield start
    forget()


@functools.cache
def reads_by_tma(capability: int) -> bool:
    """Whether the tiles of this class of GPU read x and y through tensor descriptors."""
    from ccu_fast.ops.reduce_similarity.triton import configs

    return configs.of(configs.architecture(capability), PROCESSORS).tma


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, … as cuobjdump reports them; a spill is a stack frame. Cases share their small kernels."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", dump.stdout.splitlines()[-1])}


def nothing_spills(kernels: dict[str, Any]) -> None:
    for name, kernel in kernels.items():
        used = usage(kernel.asm["cubin"])
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills: {used}"


def problem(variant: Variant, dtype: torch.dtype, d: int | None = None) -> SimilarityProblem:
    rows, cols, traits = variant
    n, m = (250, 2061) if "ragged" in traits else (256, 256)
    d = d or (130 if "ragged" in traits else 512)

    def keys(what: str, items: int) -> Tensor | None:
        return torch.zeros(1, items, dtype=torch.int64) if what in traits else None

    return SimilarityProblem(
        torch.zeros(1, n, d, dtype=dtype),
        torch.zeros(1, m, d, dtype=dtype),
        torch.ones(()),
        torch.zeros(()) if "bias" in traits else None,
        keys("labels", n),
        keys("labels", m),
        keys("ids", n),
        keys("ids", m),
        "ids" not in traits,
        tuple(encode(k, int(r)) for k, r in rows),
        tuple(encode(k, int(r)) for k, r in cols),
        torch.zeros(1, n) if "limits" in traits and rows else None,
        torch.zeros(1, m) if "limits" in traits and cols else None,
        *([torch.zeros(1, items, 384, dtype=dtype) for items in (n, m)] if "guide" in traits else [None, None]),
        torch.ones(()) if "teacher" in traits else None,
    )


@pytest.mark.parametrize(("capability", "precision", "variant"), CASES, ids=lambda value: str(value))
def test_resources(
    capability: int,
    precision: str,
    variant: str,
    compiled_for: Callable[[int], Callable[[], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ccu_fast.ops.reduce_similarity import triton as similarity

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest" if precision == "ieee" else "high")
    compiled = compiled_for(capability)
    p = problem(VARIANTS[variant], {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
    row_out, col_out, stash = similarity.forward(p, 1 << 24, True)
    incoming = torch.zeros_like(row_out), torch.zeros_like(col_out)
    similarity.backward(p, (*incoming, row_out, col_out), stash, [True, True, True, False], 1 << 30)

    # And G from x and y for all of its tiles, as for rows whose similarities were not kept.
    similarity.backward(p, (*incoming, row_out, col_out), stash[:16], [True, True, True, p.bias is not None], 1 << 30)

    kernels = compiled()
    own = ("sum", SELF) in (*VARIANTS[variant][0], *VARIANTS[variant][1]) and p.diagonal
    expected = {*PRODUCTS, *OTHERS} - ({"norm_kernel"} if precision != "fp16" else set())
    if all(kind != "lse" for kind, _ in (*VARIANTS[variant][0], *VARIANTS[variant][1])):
        expected.remove("online_kernel")
    if not own:
        expected.remove("own_kernel")
    if p.bias is not None or p.limited or p.teacher_scale is not None:  # it needs fp32 sums of G; they need products
        expected.remove("scale_kernel")
    assert {name.split()[0] for name in kernels} == expected
    for name, kernel in kernels.items():
        used = usage(kernel.asm["cubin"])
        print(f"{name}: {used['REG']} registers, {kernel.metadata.shared} B shared, {used['STACK']} B stack")
        assert used["STACK"] <= spills(variant, precision=precision), f"{name} spills: {used}"
        assert used["LOCAL"] == 0, f"{name}: {used}"
        assert used["REG"] <= MAX_REGISTERS, f"{name}: {used}"
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], f"{name}: {kernel.metadata.shared} B shared"
        multiplies = name.split()[0] in PRODUCTS and precision != "ieee"
        # Small tiles are not worth wgmma's or tcgen05's wait: the online kernel rarely runs.
        if not name.startswith("online"):
            assert (MATRIX_INSTRUCTION[capability] in kernel.asm["ptx"]) == multiplies, name
        if precision in ("bf16", "fp16") and name.split()[0] in ("forward_kernel", "gradient_kernel", "scale_kernel"):
            # E and G move in packs, whatever the shape: no access is of one element.
            assert not re.search(r"(ld|st)\.global[.\w:]*\.b16", kernel.asm["ptx"]), name
        if precision in ("bf16", "fp16") and "ids" not in variant and name.startswith("scale"):
            # 24 warps or more share a processor: some read while others write.
            warps = kernel.metadata.num_warps
            assert 65536 // (32 * warps * used["REG"]) * warps >= 24, f"{name}: {used}"
        if name.split()[0] in PRODUCTS[:2]:
            assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == reads_by_tma(capability), name


@pytest.mark.parametrize(
    ("capability", "precision", "variant", "prefixes"),
    [
        (80, "tf32", "clip labels ids ragged", (16, 128)),
        (90, "bf16", "clip", (64, 128, 256, 512)),
        (90, "bf16", "rows", tuple(range(64, 513, 64))),
        (100, "bf16", "clip", (64, 512)),
    ],
    ids=lambda value: str(value),
)
def test_resources_of_prefixes(
    capability: int,
    precision: str,
    variant: str,
    prefixes: tuple[int, ...],
    compiled_for: Callable[[int], Callable[[], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few addresses spill, of as many prefixes as there may be; shared memory does not grow with them."""
    from ccu_fast.ops.reduce_similarity.triton import prefixes as fused

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    compiled = compiled_for(capability)
    p = problem(VARIANTS[variant], torch.bfloat16 if precision == "bf16" else torch.float32)
    p = replace(p, prefixes=prefixes, unit=True)
    row_out, col_out, stash = fused.forward(p, 1 << 24, True)
    incoming = torch.zeros_like(row_out), torch.zeros_like(col_out), row_out, col_out
    fused.backward(p, incoming, stash, [True, True, True, False], 1 << 30)
    kernels = compiled()
    assert {name.split()[0] for name in kernels} == {*PREFIXES, "merge_kernel"}
    for name, kernel in kernels.items():
        used = usage(kernel.asm["cubin"])
        print(f"{name}: {used['REG']} registers, {kernel.metadata.shared} B shared, {used['STACK']} B stack")
        assert used["STACK"] <= max(128, spills(variant)), f"{name} spills: {used}"
        assert used["LOCAL"] == 0, f"{name}: {used}"
        assert kernel.metadata.shared <= 96 << 10, f"{name}: {kernel.metadata.shared} B shared"
        if name.split()[0] in PREFIXES[:2]:
            assert MATRIX_INSTRUCTION[capability] in kernel.asm["ptx"], name
            assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == reads_by_tma(capability), name


def test_what_tiles_read() -> None:
    """Elements of x and y that a pair takes from L2, and which tile a shape gets on an H100."""
    configs = pytest.importorskip("ccu_fast.ops.reduce_similarity.triton.configs")
    import triton

    device = configs.of("sm_90", 132)

    def columns(variant: str, n: int, m: int) -> tuple[int, int]:
        p = problem(VARIANTS[variant], torch.bfloat16)
        p = replace(p, x=p.x.new_empty(1, n, 64), y=p.y.new_empty(1, m, 64))
        tiles = [device.tile(kernel, "half", p) for kernel in ("forward", "gradient")]
        assert all(tile.block_m == 128 for tile in tiles)
        return tiles[0].block_n, tiles[1].block_n

    def read(columns: int) -> float:
        return 1 / 128 + 1 / columns

    # Before: 64 and 32 columns wherever there were labels or an edge.
    assert columns("bounded labels", 4096, 32768) == (128, 64)
    assert read(128) <= 0.67 * read(64) and read(64) <= 0.67 * read(32)
    assert columns("supcon labels", 4096, 32768) == (64, 64)
    full = triton.__version__.startswith("3.7.")  # other releases would spill, and take half a tile
    assert columns("clip", 32768, 32768) == (256, 128)
    assert columns("clip", 10000, 10000) == columns("clip", 10000, 2049) == (256 if full else 128, 128)
    assert columns("clip", 300, 300) == (64, 64)  # short rows end where they end
    for kind in ("sm_80", "sm_90", "sm_100", "small"):
        for tiles in (configs.of(kind, 100).forward, configs.of(kind, 100).gradient):
            assert all(configs.WIDEST % tile.block_n == 0 for tile in tiles.values())


@pytest.mark.parametrize("capability", MATRIX_INSTRUCTION)
def test_resources_of_normalize(capability: int, compiled_for: Callable[[int], Callable[[], dict[str, Any]]]) -> None:
    from ccu_fast.ops.l2_normalize import triton as normalize

    compiled = compiled_for(capability)
    x = torch.zeros(8, 512, dtype=torch.bfloat16)
    out, inverse = normalize.forward(x, x.dtype, 1e-12)
    normalize.backward(out, x, inverse, 1e-12)
    kernels = compiled()
    assert {name.split()[0] for name in kernels} == set(NORMALIZE)
    nothing_spills(kernels)


@pytest.mark.parametrize(
    ("capability", "precision", "variant", "d"),
    [
        (80, "bf16", "clip of columns", 64),
        (80, "fp16", "siglip ragged", 640),
        (89, "bf16", "clip labels ids ragged", 512),
        (90, "bf16", "clip", 512),
        (90, "bf16", "clip", 1024),
        (90, "fp16", "clip ragged", 64),
        (100, "bf16", "clip", 768),
        (100, "fp16", "supcon labels", 1024),
        (80, "bf16", "clip limits", 512),
        (90, "fp16", "siglip limits ragged", 640),
        (100, "bf16", "clip limits", 1024),
    ],
)
def test_resources_of_small_batches(
    capability: int,
    precision: str,
    variant: str,
    d: int,
    compiled_for: Callable[[int], Callable[[], dict[str, Any]]],
) -> None:
    from ccu_fast.ops.reduce_similarity.triton import small as small_batch

    compiled = compiled_for(capability)
    p = problem(VARIANTS[variant], {"bf16": torch.bfloat16, "fp16": torch.float16}[precision], d)
    row_out, col_out, stash = small_batch.forward(p, 0, True)
    needs = [True, True, True, p.bias is not None]
    small_batch.backward(p, (torch.zeros_like(row_out), torch.zeros_like(col_out), row_out, col_out), stash, needs, 0)
    kernels = compiled()
    assert {name.split()[0] for name in kernels} == set(SMALL)
    for name, kernel in kernels.items():
        used = usage(kernel.asm["cubin"])
        print(f"{name}: {used['REG']} registers, {kernel.metadata.shared} B shared, {used['STACK']} B stack")
        assert used["STACK"] <= spills(variant, small=True), f"{name} spills: {used}"
        assert used["LOCAL"] == 0, f"{name}: {used}"
        # A tile of 16 rows is too small for wgmma and tcgen05.
        assert "mma.sync" in kernel.asm["ptx"], name
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], f"{name}: {kernel.metadata.shared} B shared"


@pytest.mark.parametrize("capability", [80, 100])
def test_resources_of_the_small_loss(
    capability: int, compiled_for: Callable[[int], Callable[[], dict[str, Any]]]
) -> None:
    from ccu_fast.ops.small_info_nce import triton as small_info_nce

    compiled = compiled_for(capability)
    x = torch.zeros(1024, 64, dtype=torch.bfloat16)
    loss, *saved = small_info_nce.forward(x, x, torch.ones(()), True, 1 / 2048, True)
    small_info_nce.backward((x, x, torch.ones(())), saved, loss, (True, True, True), True, 1 / 2048)
    kernels = compiled()
    assert {name.split()[0] for name in kernels} == {*SMALL, *LOSS}
    nothing_spills({"loss_kernel": kernels["loss_kernel 0"]})
