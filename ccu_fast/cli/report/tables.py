"""The figures of a run as rows, for the terminal and the page alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from ccu_fast.unlearn.audit import gaps, mean_figures, verdict, verdict_without_gold
from ccu_fast.unlearn.audit.text_questions import TITLES, heading, meaning
from ccu_fast.unlearn.study.methods import METHODS

if TYPE_CHECKING:
    from ccu_fast.unlearn.audit import Verdict

PROTECT_LABELS = {
    "clean": "clean data",
    "random-3": "random noise, words",
    "em": "EM (noise)",
    "mem": "MEM (noise + trigger)",
}

# Of every table's columns: the title, and the path of the value. U: the forget set's, R: the retain set's.
MOVED_COLUMNS = {"visual U train": ("visual", "forget_train"), "MIA AUC": ("mia_auc",)}
STAYED_COLUMNS = {
    "visual U test": ("visual", "forget_test"),
    "other U train": ("other", "forget_train"),
    "other U test": ("other", "forget_test"),
    "visual R train": ("visual", "retain_train"),
    "visual R test": ("visual", "retain_test"),
    "other R test": ("other", "retain_test"),
    "fused R test": ("fused", "retain_test"),
}
LAST_COLUMNS = {"average gap": ("average_gap",), "time / retraining": ("ratio",)}
SECONDS = {"s": ("cpu_seconds",)}
GOLD = "gold_mask"
GOLDS = (GOLD, "gold")  # of an embedded task, and of a user's own data
FIRST = ("original", *GOLDS, "gold_drop", "gold_again")  # the rows that the others are read against
DEEP_COLUMNS = {
    "probe U": ("probe", "forget"),
    "probe U against R": ("probe", "forget_vs_rest"),
    "probe R": ("probe", "retain"),
    "relearning, steps": ("relearn_steps",),
}
RETRIEVAL_COLUMNS = {
    f"{arrow} {title}": (f"{side}_{title.replace('@', '').lower()}",)
    for side, arrow in (("i2t", "i→t"), ("t2i", "t→i"))
    for title in ("R@1", "R@5", "R@10", "medR")
}
RECALLED = {"U": "forget", "R": "retain", "U test": "forget_test", "R test": "retain_test"}  # sets of pairs
RECALL_COLUMNS = {
    f"{arrow} {name} R@{k}": ("retrieval", part, f"{direction}@{k}")
    for direction, arrow in (("i2t", "i→t"), ("t2i", "t→i"))
    for name, part in RECALLED.items()
    for k in (1, 10)
}
TEXT_COLUMNS = {title: ("text_membership", name) for name, title in TITLES.items()}
BRIEF = {"false alarms": "false", "AUC of score": "score", "AUC of similarity": "sim.", "flagged texts": "flagged"}
DIGITS = dict.fromkeys(("seconds", "cpu_seconds", "i2t_medr", "t2i_medr"), 1)
DIGITS |= {"average_gap": 2, "relearn_steps": 0, "flagged": 0}


@dataclass(frozen=True)
class Table:
    """A caption, column titles and rows of text, the first column being the row's name.

    Attributes:
        caption, columns, rows: text.
        words: the columns that hold words, not numbers alone.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    words: tuple[str, ...] = ()


def unlearn_tables(scenario: str, by_seed: dict[str, Any], *, brief: bool = False) -> list[Table]:
    """What moved, what mostly stayed and, of pairs that choose their partner, retrieval.

    Args:
        scenario: "class", "instances" or "pairs".
        by_seed: what :func:`ccu_fast.unlearn.study.run.run_task` or, of own data,
            :func:`ccu_fast.unlearn.study.own.compare_own` gives, by seed.
        brief: for 80 columns: means without spread and difference from retraining, of the verdict its kind.

    Returns:
        Two tables, or up to four: also membership from text alone, where that was asked for.
    """
    more = [recall_table(by_seed, brief=brief), by_text_table(by_seed, brief=brief)]
    tables = [moved_table(scenario, by_seed, brief=brief), stayed_table(by_seed, brief=brief)]
    return tables + [table for table in more if table is not None]


def moved_table(scenario: str, by_seed: dict[str, Any], *, brief: bool = False) -> Table:
    """What tells the methods apart: forgetting, time and verdict and, with gold, the worst and the average gap."""
    setting = next(iter(by_seed.values()))["setting"]
    what = setting.get("forgotten")
    if what is None:
        what = f"class {setting['forget_class']}" if scenario == "class" else "random instances"
    caption = (
        f"{setting['task']}, {what} forgotten (U, {setting['forget_items']} of "
        f"{setting['forget_items'] + setting['retain_items']} training items; the rest is R), "
        f"{seeds_told(by_seed)}: what moved"
    )
    first = next(iter(by_seed.values()))["metrics"]
    gold = next((name for name in GOLDS if name in first), None)
    if gold is not None:
        caption += (". Gaps: " if brief else ". In brackets and as gaps: ") + "points more or less than retraining"
        if setting.get("hidden") == "both" and not setting["ranked"]:
            caption += ", which of the other modality of U, unseen in retraining, is the original"
    last = LAST_COLUMNS if gold is not None else {"s": ("seconds",)}
    rows = []
    for method in _methods(by_seed):
        runs = runs_of(by_seed, method)
        found, ruling = _judged(by_seed, runs, gold)
        cells = []
        for (modality, *part), text in zip(MOVED_COLUMNS.values(), _cells(MOVED_COLUMNS, runs, brief), strict=True):
            difference = found.get(" ".join([modality, *part]))
            plain = brief or method == gold or difference is None
            cells.append(text if plain or difference is None else f"{text} ({signed(difference)})")
        if found:
            figure = max(found, key=lambda name: abs(found[name]))
            title = figure_title(figure)
            if brief:
                title = title.replace("visual", "vis.").removesuffix(" train")
            cells.append("–" if method == gold else f"{signed(found[figure])} {title}")
        words = "–" if method == gold else ruling.kind if brief else ruling.brief
        rows.append([label(method, runs[0]), *cells, *_cells(last, runs, brief), words])
    titles = ["visual U", "MIA"] if brief else [*MOVED_COLUMNS]
    more = [*last] if gold is None else ["gap", "time"] if brief else [*last]
    columns = ["method", *titles, *(["worst gap"] if gold is not None else []), *more, "verdict"]
    return Table(caption, columns, rows, words=("worst gap", "verdict"))


def judged(by_seed: Mapping[str, Any], method: str, gold: str | None) -> Verdict:
    """The verdict on a method's figures, of several seeds on their means."""
    return _judged(by_seed, runs_of(by_seed, method), gold)[1]


def _judged(
    by_seed: Mapping[str, Any], runs: list[dict[str, Any]], gold: str | None
) -> tuple[dict[str, float], Verdict]:
    """The gaps of the means over the seeds, none without gold, and the verdict on them."""
    means, values = mean_figures(runs), [*by_seed.values()]
    sizes = independent(by_seed)
    if gold is not None:
        wanted = mean_figures([value.get("reference") or value["metrics"][gold] for value in values])
        return gaps(means, wanted), verdict(means, wanted, sizes=sizes)
    before = mean_figures([value["metrics"]["original"] for value in values])
    setting = values[0]["setting"]
    kind = "pairs" if setting["ranked"] else setting["scenario"]
    return {}, verdict_without_gold(means, before, forget=kind, sizes=sizes)


def stayed_table(by_seed: dict[str, Any], *, brief: bool = False) -> Table:
    """The other accuracies; most methods leave most of them alone."""
    columns = _there(STAYED_COLUMNS, by_seed) | ({} if brief else SECONDS)
    ranked = next(iter(by_seed.values()))["setting"].get("ranked")
    what = "share of partners found first, by what is asked with" if ranked else "accuracy of each modality's head"
    caption = f"What mostly stayed: {what}" + ("" if brief else "; CPU seconds")
    return _methods_table(caption, columns, by_seed, _methods(by_seed), brief)


def recall_table(by_seed: dict[str, Any], *, brief: bool = False) -> Table | None:
    """R@1 and R@10 of pairs; None where the heads are asked. Brief without what is retained and seen."""
    columns = _there(RECALL_COLUMNS, by_seed)
    if brief:
        columns = {title: path for title, path in columns.items() if path[1] != "retain"}
    if not columns:
        return None
    caption = "Retrieval: U and R among all training pairs, U test and R test among all test pairs"
    return _methods_table(caption, columns, by_seed, _methods(by_seed), brief)


def by_text_table(by_seed: dict[str, Any], *, brief: bool = False) -> Table | None:
    """What text alone tells of each model of a comparison; None where it was not asked."""
    asked = [value["text_membership"] for value in by_seed.values() if "text_membership" in value]
    if not asked:
        return None
    comes_to = asked[0]["text"] if len(asked) == 1 else meaning(asked[0]["chance"])
    columns = {BRIEF.get(title, title) if brief else title: path for title, path in TEXT_COLUMNS.items()}
    return _methods_table(_by_text(asked[0], comes_to), columns, by_seed, _methods(by_seed), brief)


def text_table(result: Mapping[str, Any], *, brief: bool = False) -> Table | None:
    """What text alone tells of one run's model; None where it was not asked. Brief without what it comes to."""
    found = result.get("text_membership")
    if found is None:
        return None
    rows = [
        [title, *(spread([found[when][name]], digits=DIGITS.get(name, 3)) for when in ("before", "after"))]
        for name, title in TITLES.items()
    ]
    return Table(_by_text(found, "" if brief else found["text"]), ["", "before", "after"], rows)


def _by_text(asked: Mapping[str, Any], comes_to: str) -> str:
    chance = asked["chance"]["precision"]
    return f"{heading(asked)} (precision by chance {chance:.2f}). {comes_to}".rstrip()


def left_out_table(left_out: Sequence[Sequence[str]]) -> Table | None:
    """What a comparison on own data did not run or measure, and why; None where that is nothing."""
    rows = [[*row] for row in left_out]
    return Table("Left out, because it does not apply here", ["what", "why"], rows, words=("why",)) if rows else None


def _there(columns: Mapping[str, tuple[str, ...]], by_seed: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The columns that the original has a figure for."""
    first = [value["metrics"]["original"] for value in by_seed.values()]
    return {title: path for title, path in columns.items() if any(_at(path, audit) is not None for audit in first)}


def _at(path: tuple[str, ...], values: Any) -> Any:
    """What lies at a path; None where nothing does."""
    for key in path:
        values = None if values is None else values.get(key)
    return values


def independent(by_seed: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that :func:`ccu_fast.unlearn.audit.verdict` takes for the means over these seeds.

    Results of older versions tell items alone; views of one thing then count as if they were independent.
    """
    total: Counter[str] = Counter()
    for setting in (value["setting"] for value in by_seed.values()):
        sizes = setting.get("sizes")
        if sizes is None:
            gone, kept, unseen = (setting[f"{part}_items"] for part in ("forget", "retain", "test"))
            of_class = round(unseen * gone / (gone + kept)) if setting["scenario"] == "class" else 0
            sizes = {"forget_train": gone, "retain_train": kept, "retain_test": unseen - of_class}
            sizes |= {"forget_test": of_class} if of_class else {}
        total.update(sizes)
    return dict(total)


def figure_title(figure: str) -> str:
    """A figure of :func:`ccu_fast.unlearn.audit.gaps` as the tables' columns call it."""
    if figure == "mia_auc":
        return "MIA AUC"
    return figure.replace("forget_", "U ").replace("retain_", "R ")


def seeds_told(by_seed: Mapping[str, Any]) -> str:
    """The seeds of a table; a single one is marked, since it says nothing of its spread."""
    first, *more = by_seed
    return f"seeds {', '.join(by_seed)}" if more else f"seed {first} alone (noisy)"


def signed(points: float) -> str:
    """Points with their sign; none where they round to 0."""
    text = f"{points:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "−")


def depth_table(by_seed: dict[str, Any], *, brief: bool = False) -> Table | None:
    """What is left below the heads, of the methods that were looked into; None when none was."""
    first = next(iter(by_seed.values()))
    methods = [
        name
        for name in first["metrics"]
        if all(value["metrics"].get(name, {}).keys() & {"probe", "relearn_steps"} for value in by_seed.values())
    ]
    caption = (
        "Below the heads: accuracy of a linear classifier on frozen visual features (forgotten items; forgotten class "
        "against the rest; retained items), steps of training until the forget set is back at .9"
    )
    return _methods_table(caption, DEEP_COLUMNS, by_seed, methods, brief) if methods else None


def _methods(by_seed: dict[str, Any]) -> list[str]:
    """What the others are read against comes first."""
    first, *more = (value["metrics"] for value in by_seed.values())
    methods = [name for name in first if all(name in metrics for metrics in more)]
    return [name for name in FIRST if name in methods] + [name for name in methods if name not in FIRST]


def runs_of(by_seed: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """The figures and the cost of a method, by seed."""
    return [{**value["metrics"][method], **value["cost"][method]} for value in by_seed.values()]


def label(method: str, found: Mapping[str, Any]) -> str:
    """What people read for a method: today's word, also where older results hold another one."""
    said: str = METHODS.get(method) or found.get("label", method)
    return said


def _methods_table(
    caption: str,
    columns: Mapping[str, tuple[str, ...]],
    by_seed: dict[str, Any],
    methods: list[str],
    brief: bool = False,
) -> Table:
    rows = []
    for method in methods:
        runs = runs_of(by_seed, method)
        rows.append([label(method, runs[0]), *_cells(columns, runs, brief)])
    return Table(caption, ["method", *columns], rows)


def told(verdict: Mapping[str, str]) -> str:
    """The verdict on one run's model as a sentence."""
    return f"Verdict, without a retrained model to compare with: {verdict['kind']} – {verdict['text']}."


def before_after_table(rows: list[tuple[str, float, float]]) -> Table:
    """The audit of one run's model."""
    return Table(
        "Before and after",
        ["", "before", "after"],
        [[name, f"{before:.3f}", f"{after:.3f}"] for name, before, after in rows],
    )


def protect_table(results: dict[str, Any]) -> Table:
    """Retrieval on clean test strips of a victim trained on each data set, last and best epoch."""
    rows = []
    for method, by_seed in results.items():
        measured = [value["methods"][method] for value in by_seed.values()]
        for when in ("last", "best"):
            reading = spread([m["reading"]["digit"] for m in measured]) if when == "last" else ""
            cells = _cells(RETRIEVAL_COLUMNS, [m[when] for m in measured])
            rows.append([PROTECT_LABELS[method], when, *cells, reading])
    seeds = next(iter(results.values()))
    first = next(iter(seeds.values()))
    caption = (
        "digit-strips, retrieval on clean test strips (image to text, text to image) and zero-shot reading: "
        f"{first['train']} training, {first['test']} test strips, ε = {first['settings']['eps']}/255, "
        f"{seeds_told(seeds)}; guessing gives R@1 {first['guessing']['r1']:.3f}, R@10 {first['guessing']['r10']:.3f}, "
        "digit .100"
    )
    return Table(caption, ["victim trained on", "epoch", *RETRIEVAL_COLUMNS, "digits read"], rows)


def evaluation_table(result: dict[str, Any]) -> Table:
    """What :func:`ccu_fast.mem.job.victims.evaluate_datasets` found: last and best epoch of every dataset."""
    guessing = result["guessing"]
    columns = RETRIEVAL_COLUMNS | ({"zero-shot": ("zero_shot",)} if "zero_shot" in guessing else {})
    rows = []
    for name, dataset in result["datasets"].items():
        for when in ("last", "best"):
            runs = [run[when] for run in dataset["seeds"].values()]
            rows.append([name, f"{when} ({mean(run['epoch'] for run in runs):g})", *_cells(columns, runs)])
    rows.append(["guessing", "", *(f"{guessing[key]:.3f}" if key in guessing else "" for (key,) in columns.values())])
    epochs = result["recipe"]["epochs"]
    caption = (
        f"Image to text, then text to image, on {result['test']['images']} clean test pictures with "
        f"{result['test']['captions']} captions; victims of {epochs} epoch{'s' * (epochs > 1)}"
    )
    return Table(caption, ["trained on", "epoch", *columns], rows)


def _cells(columns: Mapping[str, tuple[str, ...]], runs: list[dict[str, Any]], brief: bool = False) -> Iterable[str]:
    for path in columns.values():
        values: list[Any] = [_at(path, run) for run in runs]
        text = spread(values, digits=DIGITS.get(path[-1], 3))
        yield re.sub(r"^0(?=\.)| ±.*", "", text) if brief else text


def spread(values: list[float | None], *, digits: int = 3) -> str:
    """The mean, with ± the sample standard deviation when there are several; "–" for what does not exist."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


def all_tables(results: dict[str, Any], *, brief: bool = False) -> list[Table]:
    """Every table of a demo; brief for 80 columns."""
    tables = [
        table
        for scenario, by_seed in results["unlearn"].items()
        for table in unlearn_tables(scenario, by_seed, brief=brief)
    ]
    return tables + ([protect_table(results["protect"])] if results["protect"] else [])
