"""The report's pictures, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ccu_fast.cli.report.tables import PROTECT_LABELS
from ccu_fast.unlearn.audit import embedding_map

COLORS = {"clean": "#4c72b0", "random-3": "#55a868", "em": "#dd8452", "mem": "#c44e52"}
NOISE_GAIN = 8

BARS = {
    "class": (
        ("visual, forgotten (0 is right)", "visual", "forget_test", "#c44e52"),
        ("other modality, forgotten", "other", "forget_test", "#55a868"),
        ("visual, retained", "visual", "retain_test", "#4c72b0"),
        ("fused, retained", "fused", "retain_test", "#8172b3"),
    ),
    "instances": (
        ("visual, forgotten (gold is right)", "visual", "forget_train", "#c44e52"),
        ("other modality, forgotten", "other", "forget_train", "#55a868"),
        ("visual, retained", "visual", "retain_test", "#4c72b0"),
        ("fused, retained", "fused", "retain_test", "#8172b3"),
    ),
}


def unlearn_bars(scenario: str, by_seed: dict[str, Any]) -> bytes:
    """Accuracies of every method, gold retraining as dashed lines."""
    values = list(by_seed.values())
    methods = list(values[0]["metrics"])
    bars = BARS[scenario]
    figure = Figure(figsize=(11, 0.62 * len(methods) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(bars)
    for b, (label, modality, part, color) in enumerate(bars):
        means, errors = [], []
        for method in methods:
            seen = [v["metrics"][method][modality][part] for v in values]
            means.append(np.mean(seen))
            errors.append(np.std(seen, ddof=1) if len(seen) > 1 else 0.0)
        where = np.arange(len(methods)) + (b - (len(bars) - 1) / 2) * height
        axes.barh(where, means, height, xerr=errors if len(values) > 1 else None, color=color, label=label)
        axes.axvline(means[methods.index("gold_mask")], color=color, linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(methods)), [values[0]["metrics"][m]["label"] for m in methods])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("accuracy; dashed: gold retraining with the visual half masked")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=4, frameon=False)
    return _png(figure)


def ablation_bars(by_seed: dict[str, Any]) -> bytes | None:
    """Average gap to gold of CCU and of CCU without each component; None without ablations."""
    values = list(by_seed.values())
    methods = [name for name in values[0]["metrics"] if name.startswith("ccu")]
    if len(methods) < 2:
        return None
    gaps = np.array([[v["metrics"][m]["average_gap"] for m in methods] for v in values])
    figure = Figure(figsize=(7, 0.4 * len(methods) + 1), layout="constrained")
    axes = figure.subplots()
    errors = gaps.std(0, ddof=1) if len(values) > 1 else None
    axes.barh(range(len(methods)), gaps.mean(0), 0.6, xerr=errors, color="#dd8452")
    axes.set_yticks(range(len(methods)), [values[0]["metrics"][m]["label"] for m in methods])
    axes.invert_yaxis()
    axes.set_xlabel("average gap to gold, points (0 is right)")
    return _png(figure)


def unlearn_map(value: dict[str, Any]) -> bytes | None:
    """Visual embeddings before and after CCU in one plane; crosses are what was to be forgotten."""
    embeddings = value["embeddings"]
    if "after" not in embeddings:
        return None
    before, after = (np.asarray(embeddings[k], dtype=np.float32) for k in ("before", "after"))
    labels, forgotten = np.asarray(embeddings["labels"]), np.asarray(embeddings["forgotten"])
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, points, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        embedding_map(before, after, kind="tsne"),
        ("before", "after CCU"),
        strict=True,
    ):
        kept = ~forgotten
        shown = axes.scatter(*points[kept].T, c=labels[kept], cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
        axes.scatter(*points[forgotten].T, c="black", marker="x", s=14, linewidths=0.8, label="to be forgotten")
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
    axes.legend(loc="lower right")
    figure.colorbar(shown, ax=figure.axes, ticks=range(10), label="digit", shrink=0.8)
    return _png(figure)


def loss_curve(losses: list[float]) -> bytes:
    """The loss of every step."""
    figure = Figure(figsize=(7, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#dd8452")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    return _png(figure)


def examples(method: dict[str, Any]) -> bytes:
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


def victim_curves(results: dict[str, Any]) -> bytes:
    """R@1 on clean test strips and the training loss, epoch by epoch."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, by_seed in results.items():
        for i, value in enumerate(by_seed.values()):
            measured = value["methods"][method]
            epochs = range(1, len(measured["curve"]) + 1)
            label = PROTECT_LABELS[method] if i == 0 else None
            recall = [100 * (e["i2t_r1"] + e["t2i_r1"]) / 2 for e in measured["curve"]]
            left.plot(epochs, recall, color=COLORS[method], label=label)
            right.plot(epochs, measured["train_loss"], color=COLORS[method], label=label)
    left.set_title("retrieval R@1 on clean test strips (%)")
    left.set_ylim(0, 100)
    right.set_title("victim's training loss")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("epoch of the victim")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    return _png(figure)


def evaluation_curves(result: dict[str, Any]) -> bytes:
    """R@1 among clean test pairs and the training loss of every dataset's victims, epoch by epoch."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, dataset) in enumerate(result["datasets"].items()):
        for j, run in enumerate(dataset["seeds"].values()):
            epochs = range(1, len(run["curve"]) + 1)
            recall = [100 * (e["i2t_r1"] + e["t2i_r1"]) / 2 for e in run["curve"]]
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": None if j else name}
            left.plot(epochs, recall, marker="." if len(recall) == 1 else None, **style)
            right.plot(epochs, run["train_loss"], marker="." if len(recall) == 1 else None, **style)
    left.set_title("retrieval R@1 on clean test pairs (%)")
    left.set_ylim(0, 100)
    right.set_title("victim's training loss")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("epoch of the victim")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
