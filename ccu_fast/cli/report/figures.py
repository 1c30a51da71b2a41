"""The report's drawings as SVG, in the page's own colours, and its pictures as PNG in base64."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ccu_fast.data.pictures import encode_png
from ccu_fast.unlearn.audit import embedding_map

NOISE_GAIN = 8
NEAR = 10  # points in a map whose kind is counted
# What draws text and axes; on the page it is the colour of the text, whether that is dark or light.
INK = "#010203"
# Each stands out by 3 to 1 from a white page and from a dark one.
COLORS = ("#2f80d0", "#d9720b", "#2e9a55", "#9a63d0", "#d9534f", "#808a94")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH = 3.6  # inches: a phone shows it whole, with its text at 12 pixels or more
STYLE: Any = {
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "ccu_fast",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "axes.titlesize"), 9.5),
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Drawing:
    """A drawing and what it shows, in words; of lines also their names, with colour and dashes."""

    svg: str
    says: str
    lines: tuple[tuple[str, str, str], ...] = ()


def unlearn_map(embeddings: dict[str, Any] | None) -> list[Drawing]:
    """Visual embeddings before and after CCU in one plane; crosses are what was to be forgotten."""
    if embeddings is None or "after" not in embeddings:
        return []
    before, after = (np.asarray(embeddings[k], dtype=np.float32) for k in ("before", "after"))
    labels, forgotten = np.asarray(embeddings["labels"]), np.asarray(embeddings["forgotten"])
    maps = embedding_map(before, after, kind="tsne")
    every = np.concatenate(maps)
    low, high = every.min(0), every.max(0)
    return [
        _map(points, labels, forgotten, (low, high), when)
        for points, when in zip(maps, ("before unlearning", "after CCU"), strict=True)
    ]


def _map(
    points: np.ndarray, labels: np.ndarray, forgotten: np.ndarray, ends: tuple[np.ndarray, np.ndarray], when: str
) -> Drawing:
    classes, kept = np.unique(labels), ~forgotten
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        axes = figure.subplots()
        # Ten colours: of more classes some share one. The points are a picture, which is smaller than their outlines.
        colors = np.searchsorted(classes, labels[kept]) % 10
        x, y = points[kept].T
        axes.scatter(x, y, c=colors, cmap="tab10", vmin=-0.5, vmax=9.5, s=8, rasterized=True)
        x, y = points[forgotten].T
        axes.scatter(x, y, color=INK, marker="x", s=14, linewidths=0.8)
        for name in classes[:10] if len(classes) <= 10 else ():
            if (kept & (labels == name)).any():
                x, y = np.median(points[kept & (labels == name)], axis=0)
                axes.text(x, y, str(name), weight="bold", size=12, ha="center", va="center", parse_math=False)
        margin = 0.03 * (ends[1] - ends[0])
        axes.set_xlim(ends[0][0] - margin[0], ends[1][0] + margin[0])
        axes.set_ylim(ends[0][1] - margin[1], ends[1][1] + margin[1])
        axes.set_xticks([])
        axes.set_yticks([])
        drawn = _svg(figure, f"map-{when.split()[0]}")
    of_ten = f"{100 * _among_their_own(points, forgotten):.0f} % of the {NEAR} points nearest to one"
    says = f"Visual embeddings {when} (t-SNE). Crosses are what was to be forgotten; {of_ten} are crosses too."
    return Drawing(drawn, says)


def _among_their_own(points: np.ndarray, forgotten: np.ndarray) -> float:
    """Of the points nearest to a forgotten one, the share that is forgotten too."""
    of, every = torch.as_tensor(points[forgotten], dtype=torch.float32), torch.as_tensor(points, dtype=torch.float32)
    near = torch.cdist(of, every).topk(min(NEAR + 1, len(points)), largest=False).indices[:, 1:]
    return float(torch.as_tensor(forgotten)[near].float().mean()) if near.numel() else 0.0


def loss_curve(losses: Sequence[float]) -> Drawing:
    """The loss of every step."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(losses) + 1), losses, color=COLORS[1], marker="." if len(losses) == 1 else None)
        _axes(axes, "step", "loss")
        drawn = _svg(figure, "loss")
    says = f"The loss goes from {losses[0]:.3g} at the first to {losses[-1]:.3g} at the last of {len(losses)} steps."
    return Drawing(drawn, says)


def victim_curves(victims: dict[str, list[dict[str, Any]]]) -> list[Drawing]:
    """R@1 among clean test pairs and the training loss of every dataset's victims, epoch by epoch."""
    recalls = {
        name: [[50 * (e["i2t_r1"] + e["t2i_r1"]) for e in run["curve"]] for run in runs]
        for name, runs in victims.items()
    }
    losses = {name: [run["train_loss"] for run in runs] for name, runs in victims.items()}
    ends = ", ".join(f"{name} {np.mean([r[-1] for r in runs]):.1f} %" for name, runs in recalls.items())
    fits = ", ".join(f"{name} {np.mean([r[-1] for r in runs]):.3g}" for name, runs in losses.items())
    return [
        _curves(recalls, "R@1 on clean test pairs, %", f"Retrieval by epoch; after the last one {ends}.", (0, 100)),
        _curves(losses, "training loss", f"Training loss by epoch; after the last one {fits}.", None),
    ]


def _curves(
    values: dict[str, list[list[float]]], quantity: str, says: str, ends: tuple[float, float] | None
) -> Drawing:
    lines = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        for i, (name, runs) in enumerate(values.items()):
            color, dashes = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
            lines.append((name, color, dashes))
            for run in runs:
                style = (0, [float(d) for d in dashes.split()]) if dashes else "-"
                axes.plot(
                    range(1, len(run) + 1), run, color=color, linestyle=style, marker="." if len(run) == 1 else None
                )
        _axes(axes, "epoch", quantity)
        if ends is not None:
            axes.set_ylim(*ends)
        else:
            axes.set_ylim(bottom=0)
        drawn = _svg(figure, quantity.split()[0].lower())
    return Drawing(drawn, says, tuple(lines))


def _axes(axes: Any, across: str, up: str) -> None:
    """Few ticks at round numbers: whole ones along the steps."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25, color=INK)


def examples(method: dict[str, Any]) -> list[dict[str, str]]:
    """Clean strip, protected strip and noise (amplified) as PNG, with both captions."""
    return [
        {
            "clean": _png(np.asarray(example["clean"])),
            "protected": _png(np.asarray(example["protected"])),
            "noise": _png(np.clip(128 + NOISE_GAIN * np.asarray(example["noise"]), 0, 255)),
            "caption": example["caption"],
            "published": example["published"],
        }
        for example in method["examples"][:4]
    ]


def _png(grey: np.ndarray) -> str:
    return base64.b64encode(encode_png(torch.as_tensor(grey.astype(np.uint8))[None])).decode()


def _svg(figure: Figure, name: str) -> str:
    """The element alone, without a size or a background; its ids begin with a name, as a page has several."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, dpi=192, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    name += f"-{hashlib.sha256(svg.encode()).hexdigest()[:6]}"
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in referred else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor").strip()
