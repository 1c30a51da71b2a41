"""The compiled module, whose sources are in csrc/bindings. Only ccu_fast.ops calls it, after checking the arguments.

An address is that of contiguous memory, 0 for none. Sizes and strides count elements. csrc/ccu_fast.h says what each
argument holds; help() of a name says what it does. A build without CUDA lacks the classes and functions whose names
start with "Cuda" and "cuda_".
"""

from collections.abc import Sequence

# Dtypes, as the arguments named dtype give them.
F32: int
F16: int
BF16: int
U8: int
I8: int
F64: int

# Whether this build has the CUDA kernels.
CUDA: bool
# The most reductions a side that a Tile takes.
MAX_REDUCTIONS: int
# The parts of a sample whose sums pgd_step keeps on a GPU.
PGD_SLICES: int
# The tokens of a packed panel, and the bits of a packed element.
TOKEN_PANEL: int
TOKEN_BITS: int
# How topk_flips settles a row on a GPU: by coarse scores, by exact scores, not at all, or by its penalties alone.
TOPK_SCAN: int
TOPK_EXACT: int
TOPK_INVALID: int
TOPK_ZERO: int
# On a GPU: the largest k of topk_flips, and the most rows that its own scan takes.
CUDA_MOST_FLIPS: int
CUDA_FEW_ROWS: int
# That scan reports on at most so many groups of tokens, whose size is a multiple of the step.
CUDA_TOPK_GROUPS: int
CUDA_GROUP_STEP: int
# The largest batch whose candidate_losses take a single kernel on a GPU.
CUDA_ALONE: int

def cpu_isa() -> str: ...
def largest_team() -> int: ...

class Relations:
    def __init__(
        self,
        row_labels: tuple[int, int],
        col_labels: tuple[int, int],
        row_ids: tuple[int, int],
        col_ids: tuple[int, int],
        diagonal: bool,
    ) -> None: ...

class Limits:
    def __init__(
        self,
        rows: tuple[int, int],
        cols: tuple[int, int],
        guide: tuple[int, int],
        teacher: tuple[float, int] | None = None,
    ) -> None: ...

class Reductions:
    def __init__(self, rows: Sequence[int], cols: Sequence[int]) -> None: ...

class Tile:
    def __init__(
        self,
        *,
        dot: tuple[int, int],
        self_dot: int,
        shape: tuple[int, ...],
        row0: int,
        scale: float,
        bias: float,
        relations: Relations,
        reductions: Reductions,
        threads: int,
        limits: Limits | None = None,
        factors: tuple[int, int] = (0, 0),
    ) -> None: ...

def similarity_forward(tile: Tile, rows: tuple[int, int, int], cols: tuple[int, int, int]) -> None: ...
def similarity_forward_prefixes(
    prefixes: list[tuple[Tile, tuple[int, int, int], tuple[int, int, int]]],
) -> None: ...
def similarity_backward(
    tile: Tile,
    rows: tuple[int, int, int, int],
    cols: tuple[int, int, int],
    grad: tuple[int, int],
    sums: tuple[int, int],
    *,
    add: bool = False,
    col_sums: int = 0,
) -> None: ...
def similarity_softmax(
    *, tile: Tile, e: int, keys: int, dim: int, shift: int, sum: int, mean: int, group_stride: int
) -> None: ...
def small_info_nce(
    x: int,
    y: int,
    items: int,
    dim: int,
    dtype: int,
    rounded: int,
    scale: float,
    weight: float,
    symmetric: bool,
    dot: int,
    loss: int,
    scale_grad: int,
    threads: int,
    /,
) -> None: ...
def small_info_nce_backward(
    grad: int,
    x: int,
    y: int,
    items: int,
    dim: int,
    dtype: int,
    rounded: int,
    factor: float,
    dx: int,
    dy: int,
    scale_grad: int,
    dscale: int,
    threads: int,
    /,
) -> None: ...
def candidate_rest(*, s: int, batch: int, rest: int, fixed: int, threads: int) -> None: ...
def candidate_losses(
    *,
    similarity: int,
    rest: int,
    fixed: int,
    batch: int,
    candidates: int,
    first: int,
    rows: int,
    out: int,
    threads: int,
) -> None: ...

class CudaCandidates:
    def __init__(
        self,
        *,
        s: int,
        similarity: int,
        scale: float,
        factor: int,
        batch: int,
        candidates: int,
        first: int,
        rows: int,
        rest: int,
        columns: int,
        out: int,
        stream: int,
    ) -> None: ...

def cuda_candidate_rest(problem: CudaCandidates) -> None: ...
def cuda_candidate_losses(problem: CudaCandidates) -> None: ...
def l2_normalize(
    *,
    x: int,
    dtype: int,
    rows: int,
    dim: int,
    eps: float,
    grad: int,
    out: int,
    other_dtype: int,
    inverse: int,
    threads: int,
) -> None: ...
def topk_flips(
    *,
    grad: int,
    rows: int,
    dim: int,
    packed: int,
    steps: int,
    tokens: int,
    token_ids: int,
    max_norm: float,
    embedding: int,
    embedding_strides: tuple[int, ...],
    embedding_dtype: int,
    maximize: bool,
    current: int,
    exclude_current: bool,
    allowed: tuple[int, int],
    penalty: tuple[int, int],
    k: int,
    threads: int,
    ids: int,
    delta: int,
    score: int,
    count: int,
    valid: int,
) -> None: ...
def topk_describe(
    *,
    grad: int,
    rows: int,
    dim: int,
    padded: int,
    coarse: int,
    maximize: bool,
    certify: bool,
    half: bool,
    operand: int,
    about: int,
    cuda: bool,
    stream: int,
) -> None: ...
def cuda_topk(
    *,
    table: int,
    operand: int,
    padded: int,
    lowest: int,
    group: int,
    scores: int,
    first: int,
    rows: int,
    tokens: int,
    about: int,
    grad: int,
    dim: int,
    token_ids: int,
    embedding: int,
    embedding_strides: tuple[int, ...],
    vocabulary: int,
    embedding_dtype: int,
    maximize: bool,
    current: int,
    exclude_current: bool,
    allowed: tuple[int, int],
    penalty: tuple[int, int],
    k: int,
    ids: int,
    delta: int,
    score: int,
    count: int,
    valid: int,
    redo: int,
    stream: int,
) -> None: ...
def select_candidates(scores: Sequence[float], k: int, err: float, groups: int) -> list[int]: ...
def pgd_step(
    *,
    delta: int,
    grad: int,
    image: int,
    out: int,
    dtype: int,
    grad_dtype: int,
    samples: int,
    channels: int,
    inner: int,
    step: float,
    eps: float,
    lower: float,
    upper: float,
    channel: int,
    l2: bool,
    check: bool,
    parts: int,
    refused: int,
    told: int,
    threads: int,
    cuda: bool,
    stream: int,
) -> bool: ...
def noise_add(
    *,
    images: int,
    image_dtype: int,
    noise: int,
    noise_dtype: int,
    index: int,
    items: int,
    channels: int,
    inner: int,
    rows: int,
    lower: float,
    upper: float,
    limits: int,
    out: int,
    threads: int,
    cuda: bool,
    stream: int,
) -> None: ...
def noise_update(
    *,
    noise: int,
    noise_dtype: int,
    rows: int,
    order: int,
    count: int,
    total: int,
    size: int,
    delta: int,
    delta_dtype: int,
    eps: float,
    threads: int,
    cuda: bool,
    stream: int,
) -> None: ...
def cuda_noise_check(
    *, values: int, dtype: int, whole: bool, slack: float, count: int, found: int, stream: int
) -> None: ...
