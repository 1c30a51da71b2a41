"""The figures of a demo as rows, for the terminal and the page alike."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PROTECT_LABELS = {
    "clean": "clean data",
    "random-3": "random noise, words",
    "em": "EM (noise)",
    "mem": "MEM (noise + trigger)",
}

# Title, and the path of the value within one method's metrics. U: the forget set's, R: the retain set's.
UNLEARN_COLUMNS = {
    "class": (
        ("visual U train", ("metrics", "visual", "forget_train")),
        ("visual U test", ("metrics", "visual", "forget_test")),
        ("other U train", ("metrics", "other", "forget_train")),
        ("other U test", ("metrics", "other", "forget_test")),
        ("visual R test", ("metrics", "visual", "retain_test")),
        ("other R test", ("metrics", "other", "retain_test")),
        ("fused R test", ("metrics", "fused", "retain_test")),
        ("MIA AUC", ("metrics", "mia_auc")),
        ("gap", ("metrics", "average_gap")),
        ("s", ("cost", "cpu_seconds")),
    ),
    "instances": (
        ("visual U", ("metrics", "visual", "forget_train")),
        ("other U", ("metrics", "other", "forget_train")),
        ("visual R test", ("metrics", "visual", "retain_test")),
        ("other R test", ("metrics", "other", "retain_test")),
        ("fused R test", ("metrics", "fused", "retain_test")),
        ("MIA AUC", ("metrics", "mia_auc")),
        ("gap", ("metrics", "average_gap")),
        ("s", ("cost", "cpu_seconds")),
    ),
}


DIGITS = {"cpu_seconds": 1, "average_gap": 2, "relearn_steps": 0, "ratio": 3}
DEEP_COLUMNS = (
    ("probe U", ("metrics", "probe", "forget")),
    ("probe U against R", ("metrics", "probe", "forget_vs_rest")),
    ("probe R", ("metrics", "probe", "retain")),
    ("relearning, steps", ("metrics", "relearn_steps")),
    ("time / retraining", ("cost", "ratio")),
)


@dataclass(frozen=True)
class Table:
    """A caption, column titles and rows of text, the first column being the row's name."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def unlearn_table(scenario: str, by_seed: dict[str, Any]) -> Table:
    """Accuracies, membership attack and time of every method, mean ± spread over the seeds."""
    columns = UNLEARN_COLUMNS[scenario]
    first = next(iter(by_seed.values()))
    rows = []
    for method, metrics in first["metrics"].items():
        cells = []
        for _, (kind, *keys) in columns:
            values = [_dig(value[kind][method], keys) for value in by_seed.values()]
            cells.append(spread(values, digits=DIGITS.get(keys[-1], 3)))
        rows.append([metrics["label"], *cells])
    setting = first["setting"]
    task = setting["task"]
    what = f"class {setting['forget_class']}" if scenario == "class" else "random instances"
    caption = (
        f"{task}, {what} forgotten (U, {setting['forget_items']} of "
        f"{setting['forget_items'] + setting['retain_items']} training items; the rest is R): accuracy of each "
        f"modality's head, membership attack, average gap to gold in points, processor seconds; seeds "
        f"{', '.join(by_seed)}"
    )
    return Table(caption, ["method", *(title for title, _ in columns)], rows)


def depth_table(scenario: str, by_seed: dict[str, Any]) -> Table | None:
    """What is left below the heads, of the methods that were looked into; None when none was."""
    first = next(iter(by_seed.values()))
    rows = [
        [metrics["label"]]
        + [
            spread([_dig(value[kind][method], keys) for value in by_seed.values()], digits=DIGITS.get(keys[-1], 3))
            for _, (kind, *keys) in DEEP_COLUMNS
        ]
        for method, metrics in first["metrics"].items()
        if "probe" in metrics
    ]
    if not rows:
        return None
    caption = (
        "Below the heads: accuracy of a linear classifier on frozen visual features (forgotten items; forgotten class "
        "against the rest; retained items), steps of training until the forget set is back at .9, processor "
        "time over that of retraining"
    )
    return Table(caption, ["method", *(title for title, _ in DEEP_COLUMNS)], rows)


def protect_table(results: dict[str, Any]) -> Table:
    """Retrieval on clean test strips of a victim trained on each data set, last and best epoch."""
    columns = ["victim trained on", "epoch"]
    keys = [f"{side}_{m}" for side in ("i2t", "t2i") for m in ("r1", "r5", "r10", "medr")]
    titles = [f"{side} {m}" for side in ("i→t", "t→i") for m in ("R@1", "R@5", "R@10", "medR")]
    rows = []
    for method, by_seed in results.items():
        measured = [value["methods"][method] for value in by_seed.values()]
        for when in ("last", "best"):
            cells = [spread([m[when][key] for m in measured], digits=1 if key.endswith("medr") else 3) for key in keys]
            reading = spread([m["reading"]["digit"] for m in measured]) if when == "last" else ""
            rows.append([PROTECT_LABELS[method], when, *cells, reading])
    any_value = next(iter(next(iter(results.values())).values()))
    seeds = next(iter(results.values()))
    caption = (
        "digit-strips, retrieval on clean test strips (image to text, text to image) and zero-shot reading: "
        f"{any_value['train']} training, {any_value['test']} test strips, "
        f"ε = {any_value['settings']['eps']}/255, seeds {', '.join(seeds)}; guessing gives R@1 "
        f"{any_value['guessing']['r1']:.3f}, R@10 {any_value['guessing']['r10']:.3f}, digit .100"
    )
    return Table(caption, [*columns, *titles, "digits read"], rows)


def evaluation_table(result: dict[str, Any]) -> Table:
    """What :func:`ccu_fast.mem.job.victims.evaluate_datasets` found: last and best epoch of every dataset."""
    keys = [f"{side}_{m}" for side in ("i2t", "t2i") for m in ("r1", "r5", "r10", "medr")]
    titles = [f"{side} {m}" for side in ("i→t", "t→i") for m in ("R@1", "R@5", "R@10", "medR")]
    if "zero_shot" in result["guessing"]:
        keys, titles = [*keys, "zero_shot"], [*titles, "zero-shot"]
    rows = []
    for name, dataset in result["datasets"].items():
        for when in ("last", "best"):
            runs = [run[when] for run in dataset["seeds"].values()]
            cells = [spread([run[key] for run in runs], digits=1 if key.endswith("medr") else 3) for key in keys]
            rows.append([name, f"{when} ({mean(run['epoch'] for run in runs):g})", *cells])
    rows.append(["guessing", "", *(f"{result['guessing'][k]:.3f}" if k in result["guessing"] else "" for k in keys)])
    caption = (
        f"Image to text, then text to image, on {result['test']['images']} clean test pictures with "
        f"{result['test']['captions']} captions; victims of {result['recipe']['epochs']} epochs"
    )
    return Table(caption, ["trained on", "epoch", *titles], rows)


def spread(values: list[float | None], *, digits: int = 3) -> str:
    """The mean, with ± the sample standard deviation when there are several; "–" for what does not exist."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


def all_tables(results: dict[str, Any]) -> list[Table]:
    """Every table there is something for."""
    tables = [unlearn_table(scenario, by_seed) for scenario, by_seed in results["unlearn"].items()]
    return tables + ([protect_table(results["protect"])] if results["protect"] else [])


def print_summary(results: dict[str, Any], console: Console) -> None:
    """The tables in the terminal."""
    for table in all_tables(results):
        show(table, console)


def show(table: Table, console: Console) -> None:
    """One table in the terminal."""
    from rich import box
    from rich.table import Table as RichTable

    shown = RichTable(
        title=table.caption, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, min_width=5 if i else None)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def _dig(value: Any, keys: list[str]) -> Any:
    for key in keys:
        value = value[key]
    return value
