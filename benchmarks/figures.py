"""The figures of docs/performance.md and of the README, from committed results: one claim each.

``python -m benchmarks --report`` writes them to docs/figures, with the page that shows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.charts import FIGURES, Bar, Group, Line, Scale, bars, lines
from benchmarks.compat import __main__ as compat
from benchmarks.environment import REPOSITORY
from benchmarks.exactness import __main__ as exactness
from benchmarks.registry import label
from benchmarks.results import Row

DEVICE = "cpu-intel-r-xeon-r-processor-amx-bf16-2-threads"  # the one machine where every batch size was measured
SMALL = REPOSITORY / "benchmarks" / "small_batches.json"
OURS = "ccu_fast"
NAMES = {"pytorch_metric_learning": "pytorch-metric-learning", "sentence_transformers": "sentence-transformers"}
NAMES |= {"flag_embedding": "FlagEmbedding", "info_nce": "info-nce-pytorch", "mem_reference": "MEM authors' code"}
RATIOS = (0.25, 1, 8, 64, 512)
RATIO_NAMES = ("¼", "1×", "8", "64", "512")


class Stored:
    """The committed figures, looked up by what was measured."""

    def __init__(self, folder: Path = results.FOLDER / DEVICE) -> None:
        self.rows = results.read(folder)
        self.small: dict[str, Any] = json.loads(SMALL.read_text())
        self.exact: dict[str, dict[str, list[float]]] = json.loads(exactness.RESULTS.read_text())
        self.patches: dict[str, dict[str, Any]] = json.loads(compat.RESULTS.read_text())

    def row(self, op: str, provider: str, **shape: int) -> Row:
        """The one timed row of a provider whose shape has these sizes.

        Raises:
            ValueError: none was measured, or several.
        """
        found = [
            row
            for row in self.rows
            if (row.op, row.provider) == (op, provider) and row.p50_ms and shape.items() <= row.shape.items()
        ]
        if len(found) != 1:
            raise ValueError(f"{op}: expected one row of {provider} at {label(shape)}, got {len(found)}")
        return found[0]

    def speed(self, op: str, other: str, ours: str = OURS, **shape: int) -> float:
        """How many times as fast ours is."""
        return self.row(op, ours, **shape).speedup_over[other]

    def memory(self, op: str, other: str, ours: str = OURS, **shape: int) -> float:
        """How many times as many bytes the other needs beyond its inputs."""
        theirs, own = (self.row(op, name, **shape).peak_extra_bytes for name in (other, ours))
        if not theirs or not own:
            raise ValueError(f"{op}: expected bytes of {other} and {ours} at {label(shape)}, got {theirs} and {own}")
        return theirs / own

    def curve(self, op: str, provider: str, over: str | None = None) -> list[tuple[float, float]]:
        """MB by batch size, or how many times as fast as ``over``."""
        points = []
        for row in self.rows:
            if (row.op, row.provider) == (op, provider) and row.p50_ms is not None:
                value = (row.peak_extra_bytes or 0) / 1e6 if over is None else row.speedup_over.get(over, 0.0)
                points += [(float(row.shape["B"]), value)] if value else []
        return sorted(points)

    def gains(self, library: str) -> list[dict[str, Any]]:
        """Everything measured of the newest version of a library, the smallest gain first."""
        newest = [one for one in self.patches.values() if one["target"] == library][-1]  # in the file versions ascend
        return sorted(newest["speed"], key=lambda gain: gain["ratio"])

    def gain(self, library: str, what: str) -> tuple[float, float]:
        """Speed and memory of one of them, by the start of its name; the smallest where it was measured twice."""
        return both(next(gain for gain in self.gains(library) if gain["what"].startswith(what)))

    @property
    def libraries(self) -> list[str]:
        """All libraries, by name."""
        return sorted({one["target"] for one in self.patches.values()}, key=str.lower)


def both(gain: dict[str, Any]) -> tuple[float, float]:
    """How many times as fast a patched library is, and how many times less memory it takes beyond its inputs."""
    return gain["ratio"], gain["megabytes"]["library"] / gain["megabytes"]["patched"]


def write(folder: Path = FIGURES) -> list[Path]:
    """Write all of them; returns their paths."""
    written = []
    for name, text in drawn(Stored()).items():
        results.replace(folder / f"{name}.svg", text)
        written.append(folder / f"{name}.svg")
    return written


def drawn(stored: Stored) -> dict[str, str]:
    """Every figure by its name."""
    return {
        "speed": speed(stored),
        "speed-light": speed(stored, "light"),
        "speed-dark": speed(stored, "dark"),
        "batch-fp32": batch_fp32(stored),
        "batch-bf16": batch_bf16(stored),
        "batch-memory": batch_memory(stored),
        "small-batches": small_batches(stored),
        "key-banks": key_banks(stored),
        "token-scoring": token_scoring(stored),
        "libraries": libraries(stored),
        "exactness": exactness_figure(stored),
    }


def against(stored: Stored) -> list[tuple[str, float, float]]:
    """What the README compares with: a label, the speed, and how many times less memory."""
    chosen = [
        ("open_clip, ClipLoss, 8192 pairs", *_both(stored, "clip_loss", "open_clip", B=8192)),
        (
            # Like with like: who allows bf16 runs open_clip under autocast.
            "the same, both in bf16",
            stored.speed("clip_loss", "open_clip_autocast", "ccu_fast_bf16", B=8192),
            stored.memory("clip_loss", "open_clip_autocast", "ccu_fast_bf16", B=8192),
        ),
    ]
    for name, library, what in (
        ("sentence-transformers, ranking loss, 4096 pairs", "sentence_transformers", "MultipleNegatives"),
        (
            "sentence-transformers, cached, 2048 pairs",
            "sentence_transformers",
            "loss part of CachedMultipleNegativesRankingLoss (usual)",
        ),
        ("pytorch-metric-learning, SupConLoss, 2048 rows", "pytorch_metric_learning", "SupConLoss"),
        ("pytorch-metric-learning, NTXentLoss, 384 rows", "pytorch_metric_learning", "NTXentLoss"),
    ):
        chosen.append((name, *stored.gain(library, what)))
    chosen.append(("nanogcg, token scores, 64 rows × 49,408", *_both(stored, "topk_flips", "nanogcg", N=64)))
    chosen.append(("MEM authors' code, HotFlip, 384 rows × 49,408", *stored.gain("mem_reference", "hotflip_attack")))
    return chosen


def _both(stored: Stored, op: str, other: str, **shape: int) -> tuple[float, float]:
    return stored.speed(op, other, OURS, **shape), stored.memory(op, other, OURS, **shape)


def times(value: float) -> str:
    """2.4× or 188×."""
    return f"{value:.1f}×" if value < 10 else f"{value:.0f}×"


def speed(stored: Stored, scheme: str | None = None) -> str:
    """Speed and memory against what people use."""
    rows = against(stored)
    panels = [Scale(what, RATIOS, RATIO_NAMES) for what in ("times as fast", "times less extra memory")]
    groups = [Group(name, [[Bar(fast, times(fast))], [Bar(less, times(less), 2)]]) for name, fast, less in rows]
    note = "1× is the other code. Two CPU threads; nothing ran on a GPU yet."
    return bars(speed_told(stored), panels, groups, note=note, scheme=scheme)


def speed_told(stored: Stored) -> str:
    """The alternative text of :func:`speed`."""
    said = []
    for name, fast, less in against(stored):
        memory = f"{times(less)} less" if less >= 1 else f"{times(1 / less)} more"
        said.append(f"{name}: {times(fast)} as fast, {memory} memory")
    return f"ccu_fast on two CPU threads, compared with other code. {'; '.join(said)}."


_BATCH = (128, 512, 2048, 8192)


def batch_fp32(stored: Stored) -> str:
    """Speed over batch size in fp32."""
    return lines(
        "In fp32 ccu_fast is faster than open_clip and than one product, compiled or not, at every batch size.",
        Scale("pairs in the batch", _BATCH),
        Scale("fp32: times as fast as open_clip", (0, 0.5, 1, 1.5, 2, 2.5), log=False),
        [
            Line("ccu_fast", stored.curve("clip_loss", OURS, "open_clip"), 0),
            Line("one product, compiled", stored.curve("clip_loss", "one_gemm_compiled", "open_clip"), 1),
            Line("one product", stored.curve("clip_loss", "one_gemm", "open_clip"), 2),
            Line("open_clip", [(_BATCH[0], 1), (_BATCH[-1], 1)], 4, dashed=True),
        ],
    )


def batch_bf16(stored: Stored) -> str:
    """Speed over batch size where products may be rounded to bf16."""
    return lines(
        "With bf16 products ccu_fast is the fastest from 1024 pairs on; at 128 it is slower than open_clip in fp32.",
        Scale("pairs in the batch", _BATCH),
        Scale("bf16: times as fast as open_clip in fp32", (0, 1, 2, 3, 4, 5), log=False),
        [
            Line("ccu_fast, bf16", stored.curve("clip_loss", "ccu_fast_bf16", "open_clip"), 0),
            Line("open_clip, autocast", stored.curve("clip_loss", "open_clip_autocast", "open_clip"), 1),
            Line("open_clip, medium", stored.curve("clip_loss", "open_clip_medium", "open_clip"), 2),
            Line("open_clip, fp32", [(_BATCH[0], 1), (_BATCH[-1], 1)], 4, dashed=True),
        ],
    )


def batch_memory(stored: Stored) -> str:
    """Memory over batch size."""

    def curve(provider: str) -> list[tuple[float, float]]:
        theirs = dict(stored.curve("clip_loss", "open_clip"))
        return [(size, theirs[size] / own) for size, own in stored.curve("clip_loss", provider)]

    return lines(
        "ccu_fast takes a third of the memory of open_clip at 8192 pairs, with a workspace of 64 MiB a tenth; at 16384 "
        "pairs a thirtieth. The compiled product takes half throughout.",
        Scale("pairs in the batch", (128, 512, 2048, 8192, 16384), ("128", "512", "2048", "8192", "")),
        Scale(
            "times less extra memory than open_clip", (0.5, 1, 2, 4, 8, 16, 32), ("½", "1", "2", "4", "8", "16", "32")
        ),
        [
            Line("ccu_fast", curve(OURS), 0),
            Line("ccu_fast, bf16", curve("ccu_fast_bf16"), 3),
            Line("ccu_fast, 64 MiB", curve("ccu_fast_64mib"), 2),
            Line("one product, compiled", curve("one_gemm_compiled"), 1),
            Line("open_clip", [(_BATCH[0], 1), (16384, 1)], 4, dashed=True),
        ],
    )


def small_batches(stored: Stored) -> str:
    """Few pairs on a CPU without bf16, in the processor time of one thread."""

    def curve(arithmetic: str, other: str) -> list[tuple[float, float]]:
        return [(row["B"], row[f"ClipLoss over {other}"]) for row in small_rows(stored, arithmetic, threads=1)]

    return lines(
        "With few pairs ClipLoss is twice as fast as open_clip in fp32 and as fast as one product, half its work; "
        "in bf16, which this CPU lacks, it is up to 42 times as fast as open_clip.",
        Scale("pairs in the batch", (8, 32, 128, 512)),
        Scale(
            "ClipLoss: times as fast as …", (0.5, 1, 2, 4, 8, 16, 32, 64), ("½", "1", "2", "4", "8", "16", "32", "64")
        ),
        [
            Line("open_clip, bf16", curve("bf16", "open_clip"), 0),
            Line("open_clip, autocast", curve("autocast bf16", "open_clip"), 3),
            Line("one product, bf16", curve("bf16", "one product"), 1),
            Line("open_clip, fp32", curve("fp32", "open_clip"), 2),
            Line("one product, fp32", curve("fp32", "one product"), 4),
        ],
    )


def small_rows(stored: Stored, arithmetic: str, threads: int) -> list[dict[str, Any]]:
    """The rows of one arithmetic, by batch size."""
    return [row for row in stored.small["rows"] if (row["arithmetic"], row["threads"]) == (arithmetic, threads)]


KEY_BANKS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("inverse_info_nce, 1024 × 8192 keys", "bounded_inverse", {}),
    ("CCU's contrastive term, 1024 × 8192", "contrastive_unlearning", {}),
    ("sup_con with keys, 1024 × 8192", "sup_con_keys", {}),
    ("CCU's whole objective, 65,536 keys, D = 64", "ccu_objective", {"D": 64}),
    ("CCU's whole objective, 65,536 keys, D = 512", "ccu_objective", {"D": 512}),
)


def key_banks(stored: Stored) -> str:
    """Losses against a bank of keys: eager torch is 1, torch.compile has bars of its own."""
    groups = []
    for name, op, shape in KEY_BANKS:
        ours, compiled = (stored.row(op, provider, **shape) for provider in (OURS, "eager_compiled"))
        eager = stored.row(op, "eager", **shape)
        fast = [row.speedup_over["eager"] for row in (ours, compiled)]
        less = [(eager.peak_extra_bytes or 0) / (row.peak_extra_bytes or 1) for row in (ours, compiled)]
        groups.append(Group(name, [[Bar(v, times(v), i) for i, v in enumerate(of)] for of in (fast, less)]))
    return bars(
        "Losses against a bank of keys: about as fast as torch.compile, 1.5 to 4 times as fast as eager torch; with "
        "65,536 keys they need a fortieth of the memory, with 8192 keys more than torch.compile.",
        [
            Scale("times as fast as eager", (0.5, 1, 2, 4, 8), ("½", "1×", "2", "4", "8")),
            Scale("times less extra memory", (0.5, 1, 4, 16, 64), ("½", "1×", "4", "16", "64")),
        ],
        groups,
        ["ccu_fast", "torch.compile"],
    )


def token_scoring(stored: Stored) -> str:
    """topk_flips against other ways to score a vocabulary."""
    others = {
        "nanogcg": "nanogcg",
        "naive": "matmul + topk",
        "mem_reference": "MEM authors' code",
        "faiss": "faiss",
    }
    groups = []
    for rows in (5, 64, 2560):
        found = [stored.speed("topk_flips", other, N=rows) for other in others]
        groups.append(Group(f"{rows} rows × 49,408 tokens", [[Bar(v, times(v), i) for i, v in enumerate(found)]]))
    return bars(
        "topk_flips is 2.6 to 3.4 times as fast as other code in torch, and 8 to 15 times as fast as faiss.",
        [Scale("topk_flips: times as fast as …", (0, 4, 8, 12, 16), log=False, origin=0)],
        groups,
        list(others.values()),
    )


def libraries(stored: Stored) -> str:
    """The smallest gain of each patched library, in its newest version."""
    groups = []
    for library in stored.libraries:
        gain = stored.gains(library)[0]
        fast, less = both(gain)
        name = f"{NAMES.get(library, library)}: {_short(gain['what'])}"
        groups.append(Group(name, [[Bar(fast, times(fast))], [Bar(less, times(less), 2)]]))
    return bars(
        "The smallest speedup of each library with the patch, and what it does to memory beyond the inputs.",
        [
            Scale("times as fast", (0.25, 1, 2, 4, 8, 16), ("¼", "1×", "2", "4", "8", "16")),
            Scale("times less extra memory", (0.25, 1, 2, 4, 8, 16), ("¼", "1×", "2", "4", "8", "16")),
        ],
        groups,
    )


def _short(what: str) -> str:
    """A call in few words; the page of the patches has all."""
    what = re.sub(r",? forward \+ backward|^forward \+ backward of |CLIPModel with | of \d+ classes", "", what)
    what = what.replace("MultipleNegativesRankingLoss", "MNRL")
    return re.sub(r", (D = \d+.*|negatives of the batch|\[.*|topk .*|\d+ tokens.*|other positives.*)$", "", what)


def exactness_figure(stored: Stored) -> str:
    """Relative errors over the scale, for torch's cross-entropy and for the worst of our backends."""
    ours = [errors for name, errors in stored.exact.items() if name != exactness.EAGER]
    scales = [str(scale) for scale in exactness.SCALES]

    def curve(found: Sequence[dict[str, list[float]]], places: slice) -> list[tuple[float, float]]:
        return [(float(scale), max(max(errors[scale][places]) for errors in found)) for scale in scales]

    torchs = [stored.exact[exactness.EAGER]]
    powers = range(-8, 3, 2)
    return lines(
        "Where pairs are sure the cross-entropy of torch loses every digit at a scale of 100; info_nce loses few.",
        Scale("scale (1 / temperature)", [float(scale) for scale in scales]),
        Scale(
            "largest relative error in fp32",
            [10.0**power for power in powers],
            [
                "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if power else "1"
                for power in powers
            ],
        ),
        [
            Line("torch, gradients", curve(torchs, slice(1, None)), 1),
            Line("torch, loss", curve(torchs, slice(0, 1)), 4),
            Line("info_nce, gradients", curve(ours, slice(1, None)), 0),
            Line("info_nce, loss", curve(ours, slice(0, 1)), 2),
        ],
    )
