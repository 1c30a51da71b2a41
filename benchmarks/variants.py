"""What the options of info_nce and a teacher cost on a CPU, beside plain torch and beside InfoNCE itself.

    python -m benchmarks.variants                       # B = 4096, D = 512: some minutes
    python -m benchmarks.variants --items 1024 --only "hard negatives" hardness

Loss and the gradients of all features. Torch's loss is the few lines that one would write, on stored logits. InfoNCE is
ours, of the same FLOPs: as many pairs as the variant has (of prefixes: the whole alone). All three take turns; ratios
are medians over the rounds.
Nothing is timed before loss and gradients are right: at 384 items, with an error against float64 of at most twice that
of torch in fp32, or a few units in the last place. Memory is the peak of one call beyond its inputs. Writes
variants.json beside this file and the table in docs/losses.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks import memory, timer
from benchmarks.environment import describe
from benchmarks.results import store
from build_support.docs.generated import splice, table_lines

RESULTS = Path(__file__).resolve().with_suffix(".json")
PAGE = RESULTS.parents[1] / "docs" / "losses.md"
BEGIN, END = "<!-- variants -->", "<!-- end of variants -->"
SCALE, TEACHER_SCALE, COSINE, OWN = 20.0, 50.0, 0.3, 4
GATE_ITEMS = 384
PREFIXES = (64, 128, 256, 512)
GTE = ("x_to_y", "y_to_x", "x_to_x", "y_to_y")

Inputs = dict[str, Tensor]
Loss = Callable[[Inputs], Tensor]


def inputs(items: int, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Unit vectors: pairs at a cosine, other keys for all rows and for each."""
    rng = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)

    x = unit(items, dim)
    y = F.normalize(COSINE * x + (1 - COSINE**2) ** 0.5 * unit(items, dim), dim=-1)
    made = {"x": x, "y": y, "negatives": unit(items, dim), "hard_negatives": unit(items, OWN, dim)}
    u = unit(items, dim)
    taught = {"u": u, "v": F.normalize(COSINE * u + (1 - COSINE**2) ** 0.5 * unit(items, dim), dim=-1)}
    leaves = {name: t.float().to(dtype).requires_grad_() for name, t in made.items()}
    return leaves | {name: t.float().to(dtype) for name, t in taught.items()}


def ours(of: Inputs, *, extra: tuple[str, ...] = (), **options: Any) -> Tensor:
    """The loss by ccu_fast."""
    options |= {name: of[name] for name in extra}
    return ccu_fast.info_nce(of["x"], of["y"], scale=SCALE, symmetric=False, **options)


def _eye(of: Inputs) -> Tensor:
    return torch.eye(len(of["x"]), dtype=torch.bool)


def _entropy(logits: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)), **options)


def _plain(of: Inputs, **options: Any) -> Tensor:
    return _entropy(SCALE * of["x"] @ of["y"].T, **options)


def _with_negatives(of: Inputs) -> Tensor:
    return _entropy(SCALE * of["x"] @ torch.cat([of["y"], of["negatives"]]).T)


def _with_hard_negatives(of: Inputs) -> Tensor:
    own = torch.einsum("nd,nkd->nk", of["x"], of["hard_negatives"])
    return _entropy(SCALE * torch.cat([of["x"] @ of["y"].T, own], 1))


def _jointly(of: Inputs) -> Tensor:
    x, y, mask = of["x"], of["y"], _eye(of)
    s = SCALE * x @ y.T
    within = [(SCALE * t @ t.T).masked_fill(mask, -torch.inf) for t in (x, y)]
    return _entropy(torch.cat([s, s.T.masked_fill(mask, -torch.inf), *within], 1))


def _debiased(of: Inputs, share: float, hardness: float = 0.0) -> Tensor:
    s = SCALE * of["x"] @ of["y"].T
    own, n = s.diagonal(), len(s) - 1
    rest = torch.exp(s).masked_fill(_eye(of), 0)
    if hardness:
        weights = torch.exp(hardness * s).masked_fill(_eye(of), 0)
        rest = rest * weights / (weights.sum(1, keepdim=True) / n)
    total = (rest.sum(1) - share * n * torch.exp(own)) / (1 - share)
    total = total.clamp(min=n * torch.e**-SCALE)
    return (torch.log(total + torch.exp(own)) - own).mean()


def _decoupled(of: Inputs) -> Tensor:
    s = SCALE * of["x"] @ of["y"].T
    return (s.masked_fill(_eye(of), -torch.inf).logsumexp(1) - s.diagonal()).mean()


def _focal(of: Inputs, gamma: float) -> Tensor:
    each = _entropy(SCALE * of["x"] @ of["y"].T, reduction="none")
    return ((1 - torch.exp(-each)) ** gamma * each).mean()


def _without_false_negatives(of: Inputs, margin: float) -> Tensor:
    s = of["x"] @ of["y"].T
    return _entropy((SCALE * s).masked_fill((s > s.diagonal()[:, None] + margin) & ~_eye(of), -torch.inf))


def _matryoshka(of: Inputs, prefixes: tuple[int, ...]) -> Tensor:
    pairs = ([F.normalize(of[name][:, :d], dim=-1) for name in ("x", "y")] for d in prefixes)
    return sum((_entropy(SCALE * x @ y.T) for x, y in pairs), torch.zeros((), dtype=of["x"].dtype))


def _one_by_one(of: Inputs, prefixes: tuple[int, ...]) -> Tensor:
    pairs = ({name: of[name][:, :d] for name in ("x", "y")} for d in prefixes)
    return sum((ours(pair, normalize=True) for pair in pairs), torch.zeros(()))


def _distilled(of: Inputs) -> Tensor:
    teacher = of["u"], of["v"]
    return ccu_fast.distill(
        of["x"], of["y"], scale=SCALE, teacher=teacher, teacher_scale=TEACHER_SCALE, symmetric=False
    )


def _cross_entropy_with_teacher(of: Inputs) -> Tensor:
    with torch.no_grad():
        target = (TEACHER_SCALE * of["u"] @ of["v"].T).softmax(1)
    return -(target * (SCALE * of["x"] @ of["y"].T).log_softmax(1)).sum(1).mean()


# Ours, torch's, and InfoNCE with as many pairs.
_ONE, _TWO = partial(ours), partial(ours, extra=("negatives",))
CASES: dict[str, tuple[Loss, Loss, Loss]] = {
    "one way": (_ONE, _plain, _ONE),
    "negatives": (_TWO, _with_negatives, _TWO),
    "hard negatives": (partial(ours, extra=("hard_negatives",)), _with_hard_negatives, _ONE),
    "joint": (partial(ours, joint=GTE), _jointly, partial(ours, joint=("x_to_y", "x_to_x", "y_to_y"))),
    "smoothing": (partial(ours, smoothing=0.1), partial(_plain, label_smoothing=0.1), _ONE),
    "decoupled": (partial(ours, decoupled=True), _decoupled, _ONE),
    "debias": (partial(ours, debias=0.01), partial(_debiased, share=0.01), _ONE),
    "hardness": (partial(ours, hardness=0.5), partial(_debiased, share=0.0, hardness=0.5), _TWO),
    "focal": (partial(ours, focal=2.0), partial(_focal, gamma=2.0), _ONE),
    "margin": (partial(ours, margin=-0.1), partial(_without_false_negatives, margin=-0.1), _ONE),
    "prefixes": (
        partial(ours, prefixes=PREFIXES, normalize=True),
        partial(_matryoshka, prefixes=PREFIXES),
        partial(ours, normalize=True),
    ),
    "prefixes one by one": (
        partial(_one_by_one, prefixes=PREFIXES),
        partial(_matryoshka, prefixes=PREFIXES),
        partial(ours, normalize=True),
    ),
    "distill": (_distilled, _cross_entropy_with_teacher, _TWO),
}


def step(loss: Loss, of: Inputs) -> list[Tensor]:
    """The loss and the gradients of what it depends on."""
    value = loss(of)
    leaves = [t for t in of.values() if t.requires_grad]
    return [value.detach(), *(g for g in torch.autograd.grad(value, leaves, allow_unused=True) if g is not None)]


def errors(name: str, dim: int) -> dict[str, float]:
    """The worst error of ours and of torch's against float64, as a share of the largest value.

    Raises:
        SystemExit: ours is wrong.
    """
    mine, theirs, _ = CASES[name]
    of = inputs(GATE_ITEMS, dim)
    exact = step(theirs, inputs(GATE_ITEMS, dim, torch.float64))
    worst = []
    for loss in (mine, theirs):
        pairs = zip(step(loss, of), exact, strict=True)
        worst.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    if not worst[0] <= 2 * worst[1] + 16 * torch.finfo(torch.float32).eps:
        raise SystemExit(f"{name}: off by {worst[0]:.2g}, torch's own by {worst[1]:.2g}")
    return {"error": float(f"{worst[0]:.1e}"), "torch's error": float(f"{worst[1]:.1e}")}


def measure(name: str, items: int, dim: int, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"loss": name, "B": items, "D": dim, **errors(name, dim)}
    mine, theirs, base = CASES[name]
    of = inputs(items, dim)
    calls: dict[str, Any] = {"ours": partial(step, mine, of), "torch": partial(step, theirs, of)}
    if base is not mine:
        calls["info_nce"] = partial(step, base, of)
    for call in calls.values():
        call()
    samples = timer.interleave(calls, torch.device("cpu"), seconds=seconds)
    row |= {f"{who} ms": round(sample.quantile(0.5), 1) for who, sample in samples.items()}
    row["times torch"] = round(timer.ratio(samples["torch"], samples["ours"]), 2)
    if base is not mine:
        row["over info_nce"] = round(timer.ratio(samples["ours"], samples["info_nce"]), 2)
    row["MB"], row["torch's MB"] = (round(memory.peak_of(calls[who]) / 1e6) for who in ("ours", "torch"))
    return row


def table() -> str:
    """The stored rows for people."""
    *rows, last = json.loads(RESULTS.read_text())
    facts = last["environment"]
    lines = []
    for row in rows:
        cells = [row["loss"], f"{row['ours ms']:.0f}", f"{row['torch ms']:.0f}", f"{row['times torch']:.2f}"]
        lines.append([*cells, row.get("over info_nce", ""), row["MB"], row["torch's MB"]])
    head = ("", "ms", "torch, ms", "times torch", "over `info_nce`", "MB", "torch, MB")
    return "\n".join(
        [*table_lines(head, lines), "", f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}."]
    )


def write_table() -> None:
    """Put the table between its two marks in docs/losses.md."""
    PAGE.write_text(splice(PAGE.read_text(), table(), BEGIN, END))


def main() -> None:
    """Measure, keep the results and print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=str(__doc__).splitlines()[0])
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each row")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), help="these, and nothing is stored")
    asked = parser.parse_args()
    rows = []
    for name in asked.only or CASES:
        rows.append(measure(name, asked.items, asked.dim, asked.seconds))
        print(rows[-1], flush=True)
    if not asked.only:
        store(RESULTS, [*rows, {"environment": describe(torch.device("cpu"))}], depth=1)
        write_table()


if __name__ == "__main__":
    main()
