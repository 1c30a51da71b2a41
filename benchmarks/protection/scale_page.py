"""What scale.json shows: tables of a page, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def text(stored: dict[str, Any]) -> str:
    """The tables of a page, in Markdown."""
    lines = ["| pictures | CPU s | wall s | CPU ms a picture | peak memory, MB | disk of the run, MB | output, MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for size, row in stored["sizes"].items():
        each = 1000 * row["cpu_seconds"] / int(size)
        megabytes = [f"{row[name] / 1e6:.0f}" for name in ("peak_bytes", "disk_bytes", "output_bytes")]
        cells = [f"{int(size):,}", f"{row['cpu_seconds']:.0f}", f"{row['wall_seconds']:.0f}", f"{each:.1f}", *megabytes]
        lines.append(f"| {' | '.join(cells)} |")
    line, memory, disk = (stored["fit"][name] for name in ("cpu_seconds", "peak_bytes", "disk_bytes"))
    lines += [
        "",
        f"Lines of least squares: {line['start']:.0f} s + {1000 * line['each']:.1f} ms a picture (no size is farther "
        f"from it than {line['off']:.1%}); {memory['start'] / 1e6:.0f} MB + {memory['each'] / 1e3:.1f} kB of memory "
        f"({memory['off']:.1%}); {disk['each'] / 1e3:.1f} kB of disk ({disk['off']:.1%}).",
        "",
        "| killed at | in | the next process starts, CPU s | does again, CPU s |",
        "|---|---|---|---|",
    ]
    for kill in stored["killed"]["kills"]:
        again = [f"{kill[name]:.1f}" for name in ("start_again_seconds", "done_again_seconds")]
        lines.append(f"| {kill['at_share']:.1%} | {kill['stage']} | {' | '.join(again)} |")
    killed, gate = stored["killed"], stored["gate"]
    lines += [
        "",
        f"{len(killed['kills'])} kills cost {killed['repeated_seconds']:.0f} s of CPU together, "
        f"{killed['repeated_share_of_run_each_kill']:.1%} of the run each; all {gate['files']:,} files are those of "
        "the uninterrupted run, the manifest included.",
    ]
    return "\n".join(lines)


def draw(stored: dict[str, Any], path: Path) -> None:
    """CPU time by stage and peak memory over the number of pictures, with their lines; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name}: matplotlib is not installed")
        return
    # The text stays text, the ids do not depend on the process; transparent, and in greys that are read on white and
    # on black.
    grey = "#808080"
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey)
    options = {"svg.fonttype": "none", "svg.hashsalt": "ccu_fast", "font.size": 9, **colours}
    with matplotlib.rc_context(options):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        sizes = {int(size): row for size, row in stored["sizes"].items()}
        names = list(next(iter(sizes.values()))["stages"])
        left.stackplot(list(sizes), [[row["stages"][n] for row in sizes.values()] for n in names], labels=names)
        shown = (0, max(sizes))
        for axes, name, unit in ((left, "cpu_seconds", 1.0), (right, "peak_bytes", 1e-6)):
            line = stored["fit"][name]
            axes.plot(shown, [unit * (line["start"] + line["each"] * n) for n in shown], "--", color=grey, linewidth=1)
            axes.plot(list(sizes), [unit * row[name] for row in sizes.values()], "o", color=grey, markersize=4)
            axes.set(xlabel="pictures", xlim=(0, None), ylim=(0, None))
            axes.grid(alpha=0.3)
        left.set_ylabel("CPU seconds, by stage")
        left.legend(loc="upper left", fontsize=7, frameon=False, reverse=True)
        right.set_ylabel("peak memory, MB")
        figure.savefig(path, metadata={"Date": None}, transparent=True)
