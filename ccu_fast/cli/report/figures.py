"""The report's pictures, as PNG in base64."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ccu_fast.cli.report.tables import GOLDS
from ccu_fast.unlearn.audit import embedding_map

NOISE_GAIN = 8
# The part of the forget set whose accuracy is drawn, and the right value of the visual one.
FORGOTTEN = {
    "class": ("forget_test", "0 is right"),
    "instances": ("forget_train", "gold is right"),
    "pairs": ("forget_train", "gold is right"),
}


def unlearn_bars(scenario: str, by_seed: dict[str, Any]) -> str:
    """Accuracies of every method, gold retraining, where there is any, as dashed lines."""
    seeds = [value["metrics"] for value in by_seed.values()]
    methods = [name for name in seeds[0] if all(name in metrics for metrics in seeds)]
    gold = next((name for name in GOLDS if name in methods), None)
    part, right = FORGOTTEN[scenario]
    series = {
        label: (color, np.array([[metrics[method][modality][items] for method in methods] for metrics in seeds]))
        for label, modality, items, color in (
            (f"visual, forgotten ({right})", "visual", part, "#c44e52"),
            ("other modality, forgotten", "other", part, "#55a868"),
            ("visual, retained", "visual", "retain_test", "#4c72b0"),
            ("fused, retained", "fused", "retain_test", "#8172b3"),
        )
        if modality in seeds[0]["original"]
    }
    figure, axes = _bars((11, 0.62 * len(methods) + 1.2), [seeds[0][method]["label"] for method in methods], series)
    label = "accuracy"
    if gold is not None:
        for color, values in series.values():
            axes.axvline(values.mean(0)[methods.index(gold)], color=color, linestyle="--", linewidth=0.8)
        label += "; dashed: gold retraining with the visual half masked" if gold == GOLDS[0] else "; dashed: retrained"
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=4, frameon=False)
    return _png(figure)


def ablation_bars(by_seed: dict[str, Any]) -> str | None:
    """Average gap to gold of CCU and of CCU without each component; None without ablations or gold."""
    seeds = [value["metrics"] for value in by_seed.values()]
    methods = [name for name in seeds[0] if name.startswith("ccu") and all(name in metrics for metrics in seeds)]
    if len(methods) < 2 or not seeds[0].keys() & set(GOLDS):
        return None
    gaps = np.array([[metrics[method]["average_gap"] for method in methods] for metrics in seeds])
    labels = [seeds[0][method]["label"] for method in methods]
    figure, axes = _bars((7, 0.4 * len(methods) + 1), labels, {"gap": ("#dd8452", gaps)})
    axes.set_xlabel("average gap to gold, points (0 is right)")
    return _png(figure)


def _bars(size: tuple[float, float], names: list[str], series: dict[str, tuple[str, np.ndarray]]) -> tuple[Figure, Any]:
    """Horizontal bars from ``[seeds, names]`` values of each series: mean and, of several seeds, spread."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(series)
    for i, (label, (color, values)) in enumerate(series.items()):
        where = np.arange(len(names)) + (i - (len(series) - 1) / 2) * height
        errors = values.std(0, ddof=1) if len(values) > 1 else None
        axes.barh(where, values.mean(0), height, xerr=errors, color=color, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return figure, axes


def unlearn_map(embeddings: dict[str, Any] | None) -> str | None:
    """Visual embeddings before and after CCU in one plane; crosses are what was to be forgotten."""
    if embeddings is None or "after" not in embeddings:
        return None
    before, after = (np.asarray(embeddings[k], dtype=np.float32) for k in ("before", "after"))
    labels, forgotten = np.asarray(embeddings["labels"]), np.asarray(embeddings["forgotten"])
    classes = np.unique(labels)
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, points, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        embedding_map(before, after, kind="tsne"),
        ("before", "after CCU"),
        strict=True,
    ):
        kept = ~forgotten
        # Ten colours: of more classes some share one.
        colors = np.searchsorted(classes, labels[kept]) % 10
        shown = axes.scatter(*points[kept].T, c=colors, cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
        axes.scatter(*points[forgotten].T, c="black", marker="x", s=14, linewidths=0.8, label="to be forgotten")
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
    axes.legend(loc="lower right")
    if len(classes) <= 10:
        bar = figure.colorbar(shown, ax=figure.axes, ticks=range(len(classes)), label="class", shrink=0.8)
        bar.set_ticklabels([str(label) for label in classes])
    return _png(figure)


def loss_curve(losses: list[float]) -> str:
    """The loss of every step."""
    figure = Figure(figsize=(7, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#dd8452")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    return _png(figure)


def examples(method: dict[str, Any]) -> str:
    """Clean strip, protected strip, noise (amplified), with both captions."""
    shown = method["examples"][:4]
    figure = Figure(figsize=(11, 1.25 * len(shown)), layout="constrained")
    for row, example in zip(figure.subplots(len(shown), 3, squeeze=False), shown, strict=True):
        noise = np.asarray(example["noise"])
        pictures = (
            (example["clean"], example["caption"]),
            (example["protected"], example["published"]),
            (np.clip(128 + NOISE_GAIN * noise, 0, 255), f"noise × {NOISE_GAIN}"),
        )
        for axes, (pixels, title) in zip(row, pictures, strict=True):
            axes.imshow(np.asarray(pixels), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(title, fontsize=7)
            axes.set_axis_off()
    return _png(figure)


def victim_curves(victims: dict[str, list[dict[str, Any]]]) -> str:
    """R@1 among clean test pairs and the training loss of every dataset's victims, epoch by epoch."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, runs in enumerate(victims.values()):
        for j, run in enumerate(runs):
            epochs = range(1, len(run["curve"]) + 1)
            recall = [100 * (e["i2t_r1"] + e["t2i_r1"]) / 2 for e in run["curve"]]
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": None if j else f"{i}"}
            left.plot(epochs, recall, marker="." if len(recall) == 1 else None, **style)
            right.plot(epochs, run["train_loss"], marker="." if len(recall) == 1 else None, **style)
    left.set_title("retrieval R@1 on clean test pairs (%)")
    left.set_ylim(0, 100)
    right.set_title("victim's training loss")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("epoch of the victim")
        axes.grid(alpha=0.3)
    # A name is no formula, and no label to hide where it begins with an underscore.
    for text, name in zip(left.legend(frameon=False).get_texts(), victims, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return _png(figure)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
