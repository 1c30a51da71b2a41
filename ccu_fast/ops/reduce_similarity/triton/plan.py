"""What the launchers decide from shapes alone: specs of the kernels, rectangles, chunks, and what is kept of E."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, decode
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SAME, SELF
from ccu_fast.ops.reduce_similarity.triton.configs import Device, Tile, row_stride

Spec = tuple[tuple[int, int, int], ...]

RECTANGLES_PER_PROCESSOR = 8
# fp32 words that open the stash; what follows is aligned for any load.
HEADER = 16
# A smaller part of E saves less time than the smaller chunks beside it cost.
SMALLEST_KEPT_PART = 16
# What part of the workspace is left for fp32 sums of the gradients where a part of E is kept: E is given up for them,
# since fewer rows in a chunk of G would leave processors without a tile.
SUMS_PART = 16
# Of the sum of dX: the most parts, the fewest columns of a part, and the tile of the library's GEMM.
MOST_PARTS, SHORTEST_PART, GEMM_TILE = 8, 4096, (128, 256)
_SELF, _SAME, _OTHER, _ALL = int(SELF), int(SAME), int(OTHER), int(ALL)


def _available(p: SimilarityProblem) -> int:
    """The relations that can occur at all."""
    own = _SELF if p.diagonal or p.row_ids is not None else 0
    return _OTHER | own | (_SAME if p.row_labels is not None else 0)


def _simplest(relations: int, available: int) -> int:
    relations &= available
    return _ALL if relations == available else relations


def spec(p: SimilarityProblem, codes: tuple[int, ...]) -> Spec:
    """(kind, relations, place among the results) for each reduction, relations that cannot occur left out.

    All that can occur is ALL, so that the kernels test nothing where nothing needs a test.
    """
    available = _available(p)
    return tuple((code // 8, _simplest(code % 8, available), place) for place, code in enumerate(codes))


def without_own(p: SimilarityProblem, spec: Spec) -> tuple[Spec, tuple[int, ...]]:
    """The spec of what needs tiles, and the places of the sums over pairs (i, i)."""
    if not p.diagonal:
        return spec, ()
    own = tuple(place for kind, relations, place in spec if kind == 1 and relations == _SELF)
    return tuple(entry for entry in spec if entry[2] not in own), own


def by_distance(p: SimilarityProblem, spec: Spec, *, limited: bool = False) -> tuple[Spec, Spec, Spec]:
    """A spec in three: what holds for every tile, what is added near the diagonal, what is added far from it.

    Only relations by position differ: far from the diagonal nothing is SELF. Near it a limit has to tell SELF from
    OTHER even where a reduction is over everything.
    """
    if not p.diagonal:
        return spec, (), ()
    far = _available(p) & ~_SELF
    everywhere = 0 if limited else _ALL
    return (
        tuple((kind, relations if relations == everywhere else 0, at) for kind, relations, at in spec),
        tuple((kind, 0 if relations == everywhere else relations, at) for kind, relations, at in spec),
        tuple((kind, 0 if relations == everywhere else _simplest(relations, far), at) for kind, relations, at in spec),
    )


def far_from_diagonal(p: SimilarityProblem, spec: Spec) -> Spec:
    """What holds for a tile without SELF by position, in one spec."""
    if not p.diagonal:
        return spec
    far = _available(p) & ~_SELF
    return tuple((kind, _simplest(relations, far), at) for kind, relations, at in spec)


def rectangles(
    p: SimilarityProblem, rows: Spec, cols: Spec, tile: Tile, device: Device, workspace: int
) -> tuple[int, int, int, int]:
    """Cut the tiles of one bank into groups × strips: the groups, tiles of a group, strips, tiles of a strip.

    There are enough programs for the device, and partial sums are bounded: they may take an eighth of the workspace for
    each side, or as much as x or y itself in fp32.
    """
    row_tiles, col_tiles = triton.cdiv(p.n, tile.block_m), triton.cdiv(p.m, tile.block_n)

    def most(items: int, reductions: int) -> int:
        budget = max(workspace // (8 * p.banks * items), 4 * p.x.shape[2])
        return max(4, budget // (4 * reductions)) if reductions else max(row_tiles, col_tiles)

    groups = min(row_tiles, most(p.m, len(cols)), device.max_groups if cols else row_tiles)
    group_tiles = triton.cdiv(row_tiles, groups)
    groups = triton.cdiv(row_tiles, group_tiles)
    wanted = triton.cdiv(RECTANGLES_PER_PROCESSOR * device.processors, groups * p.banks)
    strips = min(col_tiles, wanted, most(p.n, len(rows)))
    strip_tiles = triton.cdiv(col_tiles, strips)
    return groups, group_tiles, triton.cdiv(col_tiles, strip_tiles), strip_tiles


def kept_dtype(p: SimilarityProblem) -> torch.dtype:
    """E of half inputs in bf16, which has fp32's range; of fp32 inputs in fp32.

    fp32 costs twice the memory, and at TF32's rate writing and reading 8 bytes a pair still takes 0.7 of the time of
    another product at D = 512; without tensor cores it is a tenth.
    """
    return torch.float32 if p.x.dtype == torch.float32 else torch.bfloat16


def kept(p: SimilarityProblem, stash: Tensor) -> Tensor:
    """E, after the stash's header."""
    return stash[HEADER:].view(kept_dtype(p))


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """fp32 words of what forward keeps: the header, and E of as many rows as eleven sixteenths of the workspace hold.

    Nothing of E if that is less than a sixteenth of it; if there is a bias, whose gradient is the sum of G, in which
    terms cancel that bf16 does not hold; if there is a softplus or logsigmoid, whose derivative e / (e + 1) needs e
    where E has long been clamped; or if there are limits or a teacher, which look at products. The sizes may be symbols
    of a compiled graph, so there is no branch on them.
    """
    from_logits = any(decode(code)[0] in ("softplus", "logsigmoid") for code in (*p.rows, *p.cols))
    if not keep or p.bias is not None or from_logits or p.limited or p.teacher_scale is not None:
        return (HEADER,)
    words = (p.banks * p.n * row_stride(p.m) * kept_dtype(p).itemsize + 3) // 4
    room = (workspace - workspace // 4 - workspace // SUMS_PART) // 4
    worth = torch.sym_min(1, SMALLEST_KEPT_PART * room // torch.sym_max(words, 1))
    return (HEADER + torch.sym_min(words, room) * worth,)


@dataclass(frozen=True)
class Chunk:
    """Rows [first, first + rows) of banks [start, stop), and whether their E is kept.

    Attributes:
        before: rows of all earlier chunks.
    """

    start: int
    stop: int
    first: int
    rows: int
    before: int
    kept: bool

    @property
    def banks(self) -> int:
        return self.stop - self.start


def chunks(p: SimilarityProblem, block_m: int, workspace: int, stash_words: int) -> list[Chunk]:
    """The pieces that G is made in: several whole banks, or some rows of one bank; the kept ones first.

    One chunk of G may take all that the stash leaves of the workspace; several leave room for sums where E did.
    """
    stride = row_stride(p.m)
    left = max(workspace - (stash_words - HEADER) * 4, workspace // 4)
    kept_rows = (stash_words - HEADER) * 4 // (stride * kept_dtype(p).itemsize)
    row = stride * p.x.element_size()
    fit = left // row
    if fit < p.banks * p.n and stash_words > HEADER:
        fit = max(left - workspace // SUMS_PART, workspace // 4) // row
    if fit >= p.n:
        whole = fit // p.n
        pieces = [(bank, min(bank + whole, p.banks), 0, p.n) for bank in range(0, p.banks, whole)]
    else:
        most = max(fit // block_m, 1) * block_m
        even = triton.cdiv(triton.cdiv(p.n, triton.cdiv(p.n, most)), block_m) * block_m
        starts = range(0, p.n, even)
        pieces = [(bank, bank + 1, first, min(even, p.n - first)) for bank in range(p.banks) for first in starts]
    made: list[Chunk] = []
    before = 0
    for start, stop, first, rows in pieces:
        end = before + (stop - start) * rows
        made.append(Chunk(start, stop, first, rows, before, end <= kept_rows))
        before = end
    return made


def parts_of_tile(tile: Tile, warps: int) -> int:
    """In how many parts a tile of the gradient is read and written where it is only scaled.

    As many as leave a thread at most 32 elements: with their registers three or four blocks of 256 threads share a
    processor, and one reads while another writes.
    """
    return max(1, tile.block_m * tile.block_n // (32 * 32 * warps))


def parts_of_sum(p: SimilarityProblem, chunk: Chunk, processors: int) -> int:
    """In how many parts dX = G Y of a chunk is summed: a power of two, or 1.

    A few rows of G are a GEMM of few tiles with a long sum, on which most of the device would wait. Parts are slices of
    G's columns, each of whole packs; finish_kernel adds them.
    """
    if p.x.shape[0] < p.banks or p.y.shape[0] > 1 or chunk.banks > 1:
        return 1
    tiles = triton.cdiv(chunk.rows, GEMM_TILE[0]) * triton.cdiv(p.x.shape[2], GEMM_TILE[1])
    parts = 1
    while (
        parts < MOST_PARTS
        and 2 * parts * tiles <= processors
        and p.m % (32 * parts) == 0
        and p.m // (2 * parts) >= SHORTEST_PART
    ):
        parts *= 2
    return parts
