"""The comparison of unlearning methods in parts: what is measured anew, and what of the file of figures stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.unlearning import figure, profile, rates, text_membership
from benchmarks.unlearning.__main__ import PAGE, RESULTS, main
from benchmarks.unlearning.stored import by_seed, in_rows, merged
from benchmarks.unlearning.tasks import pictogram_tasks
from ccu_fast.data import pictogram_pairs, pictograms
from ccu_fast.data.pictogram_pairs import GROUPS
from ccu_fast.data.spectrogram import FRAMES, MELS
from ccu_fast.data.spoken_names import SPEAKERS
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.study import compare as comparing
from ccu_fast.unlearn.study.methods import TELLABLE
from ccu_fast.unlearn.study.run import run_task
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task, TrainConfig
from tests.support.pictogram_packages import write_packages


def quick(task: Task) -> Task:
    ccu = {name: replace(config, budget=Budget(steps=2)) for name, config in task.ccu.items()}
    return replace(task, training=TrainConfig(epochs=1), ccu=ccu)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setitem(TASKS, "digit-features", quick(TASKS["digit-features"]))
    monkeypatch.setattr(comparing, "DEEP", ())

    def call(*arguments: str) -> dict[str, Any]:
        out = tmp_path / "figures" / "out.json"
        main(["--tasks", "digit-features", "--work", str(tmp_path / "work"), "--out", str(out), *arguments])
        stored = json.loads(out.read_text())
        assert in_rows(by_seed(stored)) == stored
        return by_seed(stored)

    return call


def test_a_part_takes_the_place_of_its_own_figures_alone(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    committed = RESULTS.read_text(), PAGE.read_text()
    first = run("--seeds", "0", "--scenarios", "class", "--methods", "ccu", "fine_tune")
    parts = first["unlearn"]["digit-features"]
    assert list(parts) == ["class"] and list(parts["class"]["0"]["metrics"]) == [
        "original",
        "gold_mask",
        "fine_tune",
        "ccu",
    ]
    second = run("--seeds", "1", "--methods", "ccu")
    assert second["seeds"] == [0, 1] and list(second["unlearn"]["digit-features"]) == list(SCENARIOS)
    assert second["unlearn"]["digit-features"]["class"]["0"] == parts["class"]["0"]
    # Another method of the same part joins the others.
    third = run("--seeds", "0", "--scenarios", "class", "--methods", "gold_again", "ssd")
    both = third["unlearn"]["digit-features"]["class"]["0"]
    assert list(both["metrics"]) == ["original", "gold_mask", "gold_again", "fine_tune", "ssd", "ccu"]
    assert both["metrics"]["fine_tune"] == parts["class"]["0"]["metrics"]["fine_tune"]
    assert both["best_baseline"] in ("fine_tune", "ssd") and both["versions"] == third["versions"]
    # A file of parts is put into another one.
    out = tmp_path / "figures" / "out.json"
    copy = out.rename(tmp_path / "part.json")
    assert run("--merge", str(copy)) == third
    assert (RESULTS.read_text(), PAGE.read_text()) == committed


def test_figures_against_another_retraining_do_not_stay() -> None:
    old = by_seed(json.loads(RESULTS.read_text()))
    task, scenario, seed = next((t, s, n) for t, parts in old["unlearn"].items() for s in parts for n in parts[s])
    part = old["unlearn"][task][scenario][seed]

    def only_ccu() -> dict[str, Any]:
        methods = ("original", "gold_mask", "ccu")
        few = {kind: {name: part[kind][name] for name in methods} for kind in ("metrics", "cost")}
        return {"versions": {"torch": "new"}, "unlearn": {task: {scenario: {seed: deepcopy({**part, **few})}}}}

    same = merged(old, only_ccu(), some_methods=True)
    there = same["unlearn"][task][scenario][seed]
    assert there["metrics"] == part["metrics"] and there["best_baseline"] == part["best_baseline"]
    other = only_ccu()
    other["unlearn"][task][scenario][seed]["metrics"]["gold_mask"]["mia_auc"] = 0.123
    for new, some in ((other, True), (only_ccu(), False)):
        found = merged(old, new, some_methods=some)["unlearn"]
        assert set(found[task][scenario][seed]["metrics"]) == {"original", "gold_mask", "ccu"}
        rest = [(t, s, n) for t, parts in old["unlearn"].items() for s in parts for n in parts[s]][1:]
        assert all(found[t][s][n]["metrics"] == old["unlearn"][t][s][n]["metrics"] for t, s, n in rest)


def test_a_task_needs_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tasks", "pictograms"])
    assert "got pictograms; those of pictograms need --packages" in capsys.readouterr().err


@pytest.mark.parametrize("program", [main, text_membership.main])
def test_a_folder_without_the_packages_is_refused_before_the_work(
    program: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = write_packages(tmp_path / "packages", things=20)  # not those of the versions that are named
    for folder, what in ((tmp_path / "nowhere", "the unpacked npm packages, got no"), (packages, "the files of the")):
        with pytest.raises(SystemExit):
            program(["--packages", str(folder), "--work", str(tmp_path / "work")])
        assert f"error: --packages: expected {what}" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_pictograms_are_learned_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictograms, "_check_contents", lambda *_: None)
    kept_in = []

    def said(names: list[str], *, cache: Path, **_: Any) -> torch.Tensor:
        kept_in.append(cache)
        return torch.rand(len(names), len(SPEAKERS), MELS, FRAMES, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(pictogram_pairs, "spoken_names", said)
    tasks = pictogram_tasks(write_packages(tmp_path / "packages", things=70), speech=tmp_path / "speech")
    assert [(name, task.kept_back) for name, task in tasks.items()] == [
        ("pictograms", False),
        ("pictogram-words", True),
        ("pictogram-speech", True),
    ]
    for task in tasks.values():
        for scenario in SCENARIOS:
            found = run_task(quick(task), 0, scenario, methods=["ccu"])
            setting = found["setting"]
            assert setting["ccu"]["group"] == 1000 and setting["task"] == task.name
            assert set(found["embeddings"]["labels"]) <= set(range(len(GROUPS)))
            assert set(found["metrics"]) == {"original", "gold_mask", "ccu"}
    assert kept_in == [tmp_path / "speech"] * len(SCENARIOS)


def test_the_figure_of_the_losses_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RESULTS.with_name("losses.json"), tmp_path / "losses.json"
    monkeypatch.setattr(figure, "RESULTS", paths[1])
    monkeypatch.setattr(figure, "FIGURES", tmp_path / "docs")
    monkeypatch.setitem(TASKS, "digits-halves", quick(TASKS["digits-halves"]))
    assert figure.main([]) == 0
    committed, stored = (json.loads(path.read_text()) for path in paths)

    def names(value: Any) -> Any:
        return {name: names(inner) for name, inner in value.items()} if isinstance(value, dict) else None

    assert names(stored["curves"]) == names(committed["curves"])
    for lines in stored["curves"].values():
        for values in lines.values():
            assert len(values) == figure.POINTS and values == sorted(values)
    # Two steps are enough to tell the modality that is kept from one that is trained.
    assert stored["same to the bit"] == committed["same to the bit"]
    # From the file alone come the same pictures.
    drawn = {path: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert len(drawn) == len(stored["curves"])
    for path in drawn:
        path.unlink()
    assert figure.main(["--page"]) == 0 and {path: path.read_bytes() for path in drawn} == drawn


def test_every_baseline_has_the_rate_that_was_nearest_to_retraining() -> None:
    rows = json.loads(rates.RATES.read_text())["rows"]
    assert {row["method"] for row in rows} == {name for name, one in BASELINES.items() if one.prepare is not None}
    for row in rows:
        assert row["best"] == rates.best(row["gaps"], row["before"])
        assert row["told"] == (row["method"] in TELLABLE)
        assert BASELINES[row["method"]].rates[SCENARIOS.index(row["scenario"])] == row["best"], row["method"]
    assert rates.best({"1.0": 3.0, "0.5": 1.0, "0.1": 2.0}, before=4.0) == 0.5
    assert rates.best({"1.0": 5.0, "0.5": 3.9}, before=4.0) == 1.0  # no better than nothing


def test_shares_of_a_profile_are_of_the_package_and_add_up() -> None:
    def spent(seconds: float) -> tuple[int, int, float, float, dict[Any, Any]]:
        return (1, 1, 0.0, seconds, {})

    here, torch_ = "/a/ccu_fast/unlearn/", "/b/torch/"
    stats = {
        (here + "loop.py", 1, "run"): spent(10.0),
        (here + "method.py", 2, "__call__"): spent(6.0),
        (here + "method.py", 3, "_gone"): spent(2.0),
        (here + "unseen.py", 4, "of"): spent(0.5),
        (here + "method.py", 5, "of"): spent(1.0),
        (torch_ + "_tensor.py", 6, "backward"): spent(3.0),
        ("/c/other/method.py", 7, "__call__"): spent(100.0),
    }
    found = profile.shares(stats)
    assert found["forgetting"] == 0.15 and found["unseen items"] == 0.05 and found["original model"] == 0.1
    assert found["embedding the batch"] == 0.3 and found["backward"] == 0.3 and found["rest"] == 0.1
    for row in json.loads(profile.PROFILE.read_text())["rows"]:
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01) and min(row["shares"].values()) >= 0


def told(task: str, *areas: float, method: str = "original", precision: float | None = 0.6) -> list[dict[str, Any]]:
    """A row a seed, of 126 items each; the area of the similarity is at chance."""
    row: dict[str, Any] = {"task": task, "method": method, "forgotten": 126, "unseen": 126, "flagged": 9}
    row |= {"precision": precision, "recall": 0.1, "false_alarms": 0.1, "similarity_auc": 0.5}
    return [{**row, "seed": seed, "auc": area} for seed, area in enumerate(areas)]


class TestTextMembership:
    def test_the_committed_page_is_what_its_file_makes(self) -> None:
        stored = json.loads(text_membership.RESULTS.read_text())
        assert text_membership.page(stored) == text_membership.PAGE.read_text()
        models = {(row["task"], row["seed"]): [] for row in stored["rows"]}
        for row in stored["rows"]:
            models[row["task"], row["seed"]].append(row["method"])
        assert set(map(tuple, models.values())) == {text_membership.MODELS}
        assert {task for task, _ in models} == set(text_membership.SEEDS)

    def test_the_first_line_says_what_the_figures_do(self) -> None:
        # Of one seed two standard errors are 0.073, of three 0.042.
        nothing = text_membership.said({"a": told("a", 0.57), "b": told("b", 0.53, 0.50, 0.55, precision=None)})
        assert "tells nothing" in nothing
        assert "a: precision 0.60, AUC 0.57 and 0.50, chance 0.50 ± 0.07; b: nothing flagged, AUC 0.53" in nothing
        assert "Of the 4 areas of all models 0 differ from chance by more, 0.2 would by luck. That" in nothing
        trace = text_membership.said({"a": told("a", 0.5) + told("a", 0.4, method="ccu")})
        assert (
            "Of the 4 areas of all models 1 differ from chance by more, 0.2 would by luck: CCU on a (score 0.40)."
            in trace
        )
        some = text_membership.said({"a": told("a", 0.57), "b": told("b", 0.40, 0.47, 0.48)})
        assert some.startswith("**Text alone tells members of b before unlearning, and nothing on a**")
        gone = {"a": told("a", 0.9) + told("a", 0.5, method="ccu")}
        assert text_membership.said(gone).startswith("**Text alone tells members of a before unlearning**")

    def test_a_killed_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        monkeypatch.setitem(TASKS, "digits-halves", quick(TASKS["digits-halves"]))
        for name, value in {"SEEDS": {"digits-halves": (1,)}, "MODELS": ("original", "ccu"), "STEPS": 1}.items():
            monkeypatch.setattr(text_membership, name, value)
        monkeypatch.setattr(text_membership, "RESULTS", tmp_path / "figures.json")
        monkeypatch.setattr(text_membership, "PAGE", tmp_path / "page.md")
        real = text_membership.measure

        def measure(task: Task, seed: int, name: str, *more: Any) -> dict[str, Any]:
            asked.append(name)
            if asked == ["original", "ccu"]:
                raise KeyboardInterrupt
            return real(task, seed, name, *more)

        monkeypatch.setattr(text_membership, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            text_membership.main(["--work", str(tmp_path / "work")])
        assert not text_membership.RESULTS.exists()
        text_membership.main(["--work", str(tmp_path / "work")])
        assert asked == ["original", "ccu", "ccu"]
        rows = json.loads(text_membership.RESULTS.read_text())["rows"]
        assert [row["method"] for row in rows] == ["original", "ccu"]
        # Figures of a task that needs --packages stay where that is not given, unless versions or settings are others.
        stored = json.loads(text_membership.RESULTS.read_text())
        other = {**rows[0], "task": "pictogram-words"}
        text_membership.RESULTS.write_text(json.dumps({**stored, "rows": [*rows, other]}))
        text_membership.main(["--work", str(tmp_path / "work")])
        assert json.loads(text_membership.RESULTS.read_text())["rows"] == [*rows, other]
        text_membership.RESULTS.write_text(json.dumps({**stored, "versions": {}, "rows": [*rows, other]}))
        text_membership.main(["--work", str(tmp_path / "work")])
        assert json.loads(text_membership.RESULTS.read_text())["rows"] == rows
        assert text_membership.page(json.loads(text_membership.RESULTS.read_text())) == text_membership.PAGE.read_text()

    def test_each_thing_is_asked_of_once(self) -> None:
        task = TASKS["digit-views"]
        split = text_membership.make_scenario(task, "instances", 0)
        texts, forgotten = text_membership.questions(task, split, 0)
        things = len(torch.unique(split.forget.ids // task.group))
        assert things < len(split.forget) and int(forgotten.sum()) == things and len(texts) == 2 * things
        for part, own in ((split.forget, texts[forgotten]), (split.retain_test, texts[~forgotten])):
            views = {
                row.numpy().tobytes(): int(number) // task.group
                for row, number in zip(part.other, part.ids, strict=True)
            }
            assert len({views[row.numpy().tobytes()] for row in own}) == things
