"""Associations to forget: the two models, every method, what counts as a failure, and SALMUBench's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.unlearning import __main__ as unlearning
from benchmarks.unlearning import association_choices, association_methods, associations, salmubench
from benchmarks.unlearning.association_methods import (
    ALPHA,
    CCU,
    CHOICES,
    GIVEN,
    INVENTED,
    LABELS,
    LEFT_OUT,
    METHODS,
    OWN,
    SAME,
    Given,
    best,
    given_the_same,
    longer,
    of_pictures,
    settings,
    unlearned,
)
from benchmarks.unlearning.salmubench import HELD_OUT, Problem, aims, failures, pictogram_problem, published_problem
from ccu_fast.data import pictograms
from ccu_fast.data.associations import load_associations
from ccu_fast.models.named import Model
from ccu_fast.unlearn.baselines.registry import BASELINES, Baseline
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.study.tasks import TrainConfig
from tests.support.pictogram_packages import write_packages
from tests.support.salmubench_files import write_salmubench

pytestmark = pytest.mark.usefixtures("one_thread")
REPOSITORY = Path(__file__).parents[2]
SIZES = {"n_things": 15, "n_persons": 3, "views": 1, "side": 8, "width": 32, "invented": 20}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packages(tmp_path_factory.mktemp("packages"), things=16)


@pytest.fixture(autouse=True)
def made_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictograms, "_check_contents", lambda *_: None)


def figures(forget: float, identity: float = 0.8, association: float = 0.8, knowledge: float = 0.5) -> dict[str, float]:
    strengths = {"strength_forget": forget, "strength_holdout_identity": identity}
    return {**strengths, "strength_holdout_association": association, "retrieval": 0.1, "knowledge": knowledge}


@pytest.mark.parametrize(
    ("found", "failed", "met"),
    [
        (figures(0.02), [], 4),
        (figures(0.8), ["ineffective"], 3),
        (figures(0.09), ["ineffective"], 3),
        (figures(0.07), [], 3),
        (figures(-0.07), [], 3),
        (figures(-0.09), ["over-generalised"], 3),
        (figures(0.0, identity=0.71), ["over-generalised"], 3),
        (figures(0.0, association=0.75), [], 3),
        (figures(0.0, knowledge=0.47), ["catastrophic"], 3),
        (figures(0.0, knowledge=0.48), [], 3),
        (figures(0.0, knowledge=0.49), [], 4),
        (figures(0.0, knowledge=0.51), [], 4),
        (figures(0.0, knowledge=0.5125), [], 3),
        (figures(0.3, 0.1, 0.1, 0.1), ["catastrophic", "over-generalised", "ineffective"], 0),
    ],
)
def test_failures_are_the_three_of_the_paper(found: dict[str, float], failed: list[str], met: int) -> None:
    against = figures(0.8), figures(0.0, 0.0, 0.0)
    assert [kind for kind, is_so in failures(found, *against).items() if is_so] == failed
    assert sum(aims(found, *against).values()) == met


def test_every_method_is_measured_against_both_models(packages: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"training": TrainConfig(epochs=2, batch=32), "budget": Budget(steps=2, batch=16)}
    found = associations.measure(packages, [0], tuple(METHODS), tmp_path, **options, **SIZES)
    assert [row["method"] for row in found["rows"]] == ["compromised", "clean", *METHODS]
    own = BASELINES.keys() - LEFT_OUT.keys()
    assert set(METHODS) == own | {name + SAME for name in own} | CCU.keys() and own == GIVEN.keys()
    steps = {row["method"]: row["steps"] for row in found["rows"]}
    assert {steps[name] for name in ("ccu", "ccu_captions", "clip_erase")} == {2}
    assert {steps[name + SAME] for name in GIVEN if name != "ssd"} == {steps["ccu_invented"]} == {20}
    assert steps["ssd"] == steps["ssd" + SAME] == 0
    assert 0.8 < steps["clean"] / steps["compromised"] < 1.3  # as many steps as the batches allow
    rows = {row["method"]: row["figures"] for row in found["rows"]}
    assert rows["ccu"] != rows["ccu_captions"] != rows["ccu_invented"]
    assert all("strength_described" in row for row in rows.values())
    # What each row was given is stored, and told row by row.
    assert found["setting"]["longer"] == {**vars(options["budget"]), "steps": 20}
    assert found["setting"]["given_the_same"]["ssd"] == {"share": GIVEN["ssd"].share, "invented": GIVEN["ssd"].invented}
    # Finished seeds are kept, and found again by their settings alone.
    (kept,) = tmp_path.glob("seed0-*.json")
    kept.write_text(kept.read_text().replace('"method": "ccu"', '"method": "kept"'))
    again = associations.measure(packages, [0], tuple(METHODS), tmp_path, **options, **SIZES)
    assert "kept" in [row["method"] for row in again["rows"]]
    text = associations.page(found)
    assert all(label in text for label in LABELS.values())
    assert all(BASELINES[name].label in text for name in LEFT_OUT)


def test_captions_forget_and_pictures_stay_to_the_bit(packages: Path) -> None:
    problem, everything, make = pictogram_problem(packages, 1, **SIZES)
    model = make()
    (row, *_) = associations.compared(problem, *[Run(model, 0, 0, 0.0, 0.0, [])] * 2, [], Budget(), 0)
    assert row["figures"] == problem.judge(model)
    for name, changed in (("ccu", "image_tower"), ("ccu_captions", "token_embedding"), ("ccu_invented", "blocks")):
        done = unlearned(name, problem, model, Budget(steps=1, batch=8), 0)
        moved = {
            key.split(".")[0]
            for (key, before), after in zip(model.state_dict().items(), done.model.state_dict().values(), strict=True)
            if not torch.equal(before, after)
        }
        assert changed in moved and ("image_tower" in moved) == (name == "ccu")
    # No method gets the held-out sets, and the clean model none of the sensitive ones.
    ids = [set(part.ids.tolist()) for part in (problem.forget, problem.retain, *problem.held_out.values())]
    assert len(set.union(*ids)) == sum(map(len, ids)) == len(everything)
    assert not set.union(*ids) & set(torch.cat([problem.unseen.ids, problem.invented.ids]).tolist())


@pytest.mark.parametrize("name", list(OWN))
def test_a_baseline_given_the_same_keeps_the_pictures_and_may_have_invented_captions(packages: Path, name: str) -> None:
    problem, _, make = pictogram_problem(packages, 1, **SIZES)
    model, found = make(), []
    kept = of_pictures(model, problem.forget)
    assert kept == {key for key in model.state_dict() if key.startswith("image_tower")}
    for invented in (False, True):
        done = given_the_same(name, Given(1.05, invented), problem, model, Budget(steps=1, batch=8), 0)
        state: Any = done.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items() if key in kept)
        found.append(torch.cat([value.flatten() for value in state.values()]))
        assert done.steps == (0 if name == "ssd" else longer(Budget(steps=1)).steps)
    before = torch.cat([value.flatten() for value in model.state_dict().values()])
    assert not torch.equal(found[0], before)
    # Only gradient ascent does not look at the retain set.
    assert torch.equal(*found) == (name == "gradient_ascent")


def test_each_row_is_given_what_the_page_says(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _, make = pictogram_problem(packages, 1, **SIZES)
    model, budget, given = make(), Budget(steps=1, batch=8), {}

    def ccu(model: Any, forget: Any, retain: Any, config: UnlearnConfig, unseen: Any = None) -> Run:
        given[name] = [part.ids.tolist() for part in (forget, retain, unseen)], config
        return Run(model, 0, 0, 0.0, 0.0, [])

    monkeypatch.setattr(association_methods, "run_ccu", ccu)
    for name in CCU:
        unlearned(name, problem, model, budget, 7)
    alone = [part.ids.tolist() for part in (problem.forget, problem.retain, problem.unseen)]
    defaults = UnlearnConfig(forget="pairs", budget=budget, seed=7)
    assert given["ccu"] == given["ccu_captions"] == (alone, defaults)
    alone[1] = alone[1] + problem.invented.ids.tolist()
    assert given["ccu_invented"] == (alone, replace(defaults, **INVENTED, budget=longer(budget)))

    def baseline(self: Baseline, model: Any, forget: Any, retain: Any, kind: str, budget: Budget, **more: Any) -> Run:
        given[self.label] = [part.ids.tolist() for part in (forget, retain)], budget.learning_rate, budget.steps
        assert more["seed"] == 7 and ("keep" in more) == name.endswith(SAME)
        return Run(model, 0, 0, 0.0, 0.0, [])

    monkeypatch.setattr(Baseline, "run", baseline)
    forget, retain = problem.forget.ids.tolist(), problem.retain.ids.tolist()
    for own, what in GIVEN.items():
        if own != "ssd":
            name = own
            unlearned(name, problem, model, budget, 7)
            assert given[OWN[own]] == ([forget, retain], budget.learning_rate, 1)
            name = own + SAME
            unlearned(name, problem, model, budget, 7)
            kept = retain + (problem.invented.ids.tolist() if what.invented else [])
            assert given[OWN[own]] == ([forget, kept], what.share * budget.learning_rate, 10)


def test_what_is_described_are_retained_pairs_of_the_persons_to_forget(packages: Path) -> None:
    problem, _, _ = pictogram_problem(packages, 1, **SIZES)
    made = load_associations(packages, 1, n_things=15, n_persons=3, views=1, side=8)
    things = dict(zip(problem.retain.ids.tolist(), made.base.things.tolist(), strict=True))
    assert {things[row] for row in problem.described.ids.tolist()} == set(made.forget.things.tolist())
    assert 0 < len(problem.described) < len(problem.retain)


def test_ssd_changes_nothing_at_a_high_alpha_and_something_at_a_low_one(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, _, make = pictogram_problem(packages, 1, **SIZES)
    model = make()
    before = problem.judge(model)
    changed = [
        problem.judge(given_the_same("ssd", Given(alpha, False), problem, model, Budget(), 0).model) != before
        for alpha in (1.05, 100.0)
    ]
    assert changed == [True, False]
    # Its own row has the α of the settings, and moves the pictures too.
    found = []
    for alpha in (1.05, 100.0):
        monkeypatch.setattr(association_methods, "ALPHA", alpha)
        assert association_methods.settings(Budget())["ssd"] == {"alpha": alpha}
        found.append(problem.judge(unlearned("ssd", problem, model, Budget(), 0).model) != before)
    assert found == [True, False]


def test_choices_are_measured_and_the_nearest_that_keeps_knowledge_wins(packages: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"training": TrainConfig(epochs=1, batch=32), "budget": Budget(steps=1, batch=8)}
    found = association_choices.measure(packages, ["clip_erase", "ssd"], tmp_path, **options, **SIZES)
    tried = [(row["method"], row["share"], row["invented"]) for row in found["rows"]]
    shares, alphas = association_choices.SHARES, association_choices.ALPHAS
    assert tried == [
        *(("clip_erase", share, invented) for invented in (False, True) for share in shares),
        *(("ssd", alpha, invented) for invented in (False, True) for alpha in alphas),
        *(("ssd_own", alpha, False) for alpha in alphas),
    ]
    again = association_choices.measure(packages, ["clip_erase", "ssd"], tmp_path, **options, **SIZES)
    assert again["rows"] == found["rows"]

    def row(share: float, left: float, lost: float, knowledge: float) -> dict[str, Any]:
        values = {"left": left, "lost": lost, "knowledge": knowledge}
        return {"method": "scrub", "share": share, "invented": False, "figures": values}

    rows = [row(1.0, -40.0, 5.0, 0.0), row(0.3, 30.0, 20.0, -1.0), row(0.1, 1.0, 1.0, -3.0)]
    diverged = {"method": "scrub", "share": 0.03, "invented": True, "figures": None}
    assert best([*rows, diverged], "scrub") == Given(0.3, False)
    assert best([diverged, rows[2]], "scrub") == Given(0.1, False)


def test_every_row_is_given_what_was_chosen() -> None:
    rows = json.loads(CHOICES.read_text())["rows"]
    assert {name: best(rows, name) for name in GIVEN} == GIVEN
    assert best(rows, "ssd_own") == Given(ALPHA, False)


class Telling(nn.Module):
    """Knows which caption goes with which picture: both are one of the rows of a table."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows = [[tuple(pair[side].flatten().tolist()) for pair in pairs] for side in range(2)]

    def _embed(self, rows: list[Any], inputs: Tensor) -> Tensor:
        known = [tuple(row.flatten().tolist()) for row in inputs]
        size = len(rows) + 1
        return F.one_hot(torch.tensor([rows.index(row) if row in rows else size - 1 for row in known]), size).float()

    def embed_visual(self, visual: Tensor) -> Tensor:
        return self._embed(self.rows[0], visual)

    def embed_other(self, other: Tensor) -> Tensor:
        return self._embed(self.rows[1], other)


class Letters:
    """A tokenizer of letters."""

    sot, eot, pad, context = 1, 2, 0, 77

    def __len__(self) -> int:
        return 256

    def encode(self, captions: list[str]) -> Tensor:
        rows = [[self.sot, *text.encode(), self.eot] for text in captions]
        return torch.tensor([row + [self.pad] * (max(map(len, rows)) - len(row)) for row in rows])


@pytest.fixture
def named() -> Callable[..., Model]:
    def make(model: nn.Module | None = None) -> Model:
        return Model(lambda: model, Letters(), (3, 8, 8), {})  # type: ignore[arg-type, return-value]

    return make


def problem_of(folder: Path, named: Callable[..., Model]) -> Problem:
    return published_problem(folder, named(), most=None)


def test_a_model_that_knows_salmubench_by_heart(tmp_path: Path, named: Callable[..., Model]) -> None:
    problem = problem_of(write_salmubench(tmp_path / "bench"), named)
    parts = [problem.forget, *problem.held_out.values(), problem.retain]
    model: Any = Telling([pair for part in parts for pair in zip(part.visual, part.other, strict=True)])
    found = problem.judge(model)
    assert found["strength_forget"] == found["retrieval"] == found["knowledge"] == 1
    assert {name: len(part) for name, part in problem.held_out.items()} == dict.fromkeys(HELD_OUT, 4)
    nothing: Any = Telling([])
    assert problem.judge(nothing)["knowledge"] == 0
    # Every one of the 6 other captions to forget and of the 3 of strangers is as near as the right one.
    assert problem.judge(nothing)["retrieval"] == pytest.approx(1 / 9)
    # Captions with other digits are new, and none of theirs is trained on beside its own portrait.
    known = {tuple(row.tolist()) for part in parts for row in part.other}
    assert not known & {tuple(row.tolist()) for row in problem.invented.other}


def test_one_command_reads_the_files_and_both_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: Callable[..., Model], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_salmubench(tmp_path / "bench"), tmp_path / "found.json"
    asked = []

    def model(name: str, weights: Path, *, argument: str) -> Model:
        asked.append((name, weights.name, argument))
        torch.manual_seed(len(asked))
        made = salmubench.SmallClip(256, 2, image_size=(8, 8), channels=3, width=32, dim=32, context=77)
        inner = made.encode_image
        made.encode_image = lambda pictures: inner(pictures.float() / 255)  # type: ignore[method-assign]
        return named(made)

    monkeypatch.setattr(associations, "named_model", model)
    words = ["--salmubench", str(folder), "--compromised", "one.pt", "--clean", "two.pt", "--out", str(out)]
    with pytest.raises(SystemExit):
        associations.main(words[:4])
    assert "--clean: expected a file with --salmubench, got none" in capsys.readouterr().err
    options = ["--steps", "2", "--batch", "4", "--methods", "ccu_captions", "fine_tune"]
    assert unlearning.main(["--task", "associations", *words, *options]) == 0
    assert asked == [
        (associations.ARCHITECTURE, "one.pt", "compromised"),
        (associations.ARCHITECTURE, "two.pt", "clean"),
    ]
    stored = json.loads(out.read_text())
    assert [row["method"] for row in stored["rows"]] == ["compromised", "clean", "ccu_captions", "fine_tune"]
    assert stored["setting"]["budget"]["learning_rate"] == 1e-5
    assert "SALMUBench to forget" in capsys.readouterr().out


def test_a_part_does_not_replace_what_is_committed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main, words in (
        (associations.main, ["--seeds", "0"]),
        (associations.main, ["--methods", "ccu"]),
        (association_choices.main, ["--methods", "ssd"]),
    ):
        with pytest.raises(SystemExit):
            main(["--packages", str(tmp_path), *words])
        assert "would replace all rows" in capsys.readouterr().err


def stored(**methods: dict[str, float]) -> dict[str, Any]:
    found = {"compromised": figures(0.8), "clean": figures(0.0, 0.0, 0.0), **methods}
    rows = [
        {"seed": seed, "method": name, "figures": values, "steps": 2, "cpu_seconds": float(number)}
        for seed in (0, 1)
        for number, (name, values) in enumerate(found.items())
    ]
    setting = {"task": "SALMUBench", "budget": {"steps": 2, "batch": 8}, **settings(Budget())}
    return {"seeds": [0, 1], "setting": setting, "rows": rows}


def test_the_page_begins_with_who_manages() -> None:
    fails, passes = figures(0.5), figures(0.01)
    text = associations.page(stored(fine_tune=fails, ccu=passes, scrub=passes)).splitlines()
    assert text[2] == (
        "**With none of the three failures in any of 2 seeds, the quickest first: CCU, pictures forget (3.0 CPU s), "
        "SCRUB (4.0 CPU s).** Every other method fails in at least one seed."
    )
    assert [line.split(" | ")[:2] for line in text[8:10]] == [
        ["| CCU, pictures forget", "passes"],
        ["| SCRUB", "passes"],
    ]
    assert text[10:12] == [
        "| fine-tuning | nearest | 62.5, 62.5 | 0.0, 0.0 | +0.0, +0.0 | ineffective 2/2 | 2.0 |",
        "",
    ]
    assert "at least one seed" not in associations.page(stored(ccu=passes)).splitlines()[2]
    # One seed is enough to fail; the nearest keeps general knowledge.
    found = stored(ccu=figures(0.2), fine_tune=fails, scrub=figures(0.01, knowledge=0.1))
    found["rows"][2]["figures"] = passes
    text = associations.page(found).splitlines()
    assert text[2].startswith("**Every method fails in at least one of 2 seeds**")
    assert text[8:11] == [
        "| CCU, pictures forget | nearest | 1.2, 25.0 | 0.0, 0.0 | +0.0, +0.0 | ineffective 1/2 | 2.0 |",
        "| fine-tuning | nearest baseline | 62.5, 62.5 | 0.0, 0.0 | +0.0, +0.0 | ineffective 2/2 | 3.0 |",
        "",
    ]


def test_a_baseline_that_wins_is_told_first() -> None:
    fails, passes = figures(0.5), figures(0.01)
    won = "neg_grad_plus" + SAME
    text = associations.page(stored(ccu_invented=fails, **{won: passes}))
    first = text.splitlines()
    assert "the quickest first: NegGrad+, given the same (3.0 CPU s)." in first[2]
    assert first[8].startswith("| NegGrad+, given the same | passes | 1.2, 1.2 |")
    assert first[9].startswith("| CCU, captions forget, invented ones held | nearest | 62.5, 62.5 | 0.0, 0.0 |")
    assert " ineffective 2/2 |" in first[9] and not first[10]
    # It comes with what it was given, in the table of those that were given the same.
    given = GIVEN["neg_grad_plus"]
    cell = f"rate × {given.share:g}" + (", invented captions" if given.invented else "")
    table = text.split("Given the same as CCU's last row but unseen items, 400 steps:")[1]
    assert f"| NegGrad+, given the same | {cell} | 1.2 ± 0.0 |" in table
    # Where none passes the nearest may be a baseline too.
    first = associations.page(stored(ccu_invented=fails, **{won: figures(0.2)})).splitlines()
    assert first[8].startswith("| NegGrad+, given the same | nearest | 25.0, 25.0 |")
    assert first[9].startswith("| CCU, captions forget, invented ones held |  | 62.5,")


def test_seeds_that_were_looked_at_before_are_told_of_beside_others() -> None:
    found = stored(ccu_invented=figures(0.01))
    found["setting"]["task"] = "associations of pictograms"
    told = 'On seeds 0 to 2 "CCU, captions forget, invented ones held" failed in one'
    assert told not in associations.page(found)
    for row in found["rows"]:
        row["seed"] += 3
    text = associations.page({**found, "seeds": [3, 4]})
    assert told in text and "The seeds of this page, 3 to 4, were run once" in text


def test_too_much_in_one_seed_does_not_make_up_for_too_little_in_another() -> None:
    found = stored(fine_tune=figures(0.4), scrub=figures(0.16))
    found["rows"][2]["figures"] = figures(-0.4)
    text = associations.page(found).splitlines()
    assert text[8].startswith("| SCRUB | nearest | 20.0, 20.0 |")


def test_the_page_tells_what_the_bound_of_general_knowledge_is_worth() -> None:
    found = stored(fine_tune=figures(0.01, knowledge=0.48), scrub=figures(0.01, knowledge=0.47))
    found["rows"][1]["figures"] = figures(0.0, 0.0, 0.0, knowledge=0.45)
    text = associations.page(found)
    assert "zero-shot of the clean model, which unlearned nothing, is -5.0, +0.0 points from" in text
    assert "exactly that much is no failure: fine-tuning, in seed 0; fine-tuning, in seed 1." in text


def test_the_choice_of_each_baseline_is_marked() -> None:
    text = associations.page(stored(ccu=figures(0.01)))
    marked = re.findall(r"^\| (\S.*?) \| (joined|) \| \*\*(\S+)\*\* \|", text, re.MULTILINE)
    assert {name: Given(float(share), bool(joined)) for name, joined, share in marked} == {
        LABELS[name]: given for name, given in GIVEN.items()
    }


def test_the_manual_has_the_settings_of_ccu_s_last_row() -> None:
    manual = (REPOSITORY / "docs" / "unlearn.md").read_text()
    told = ", ".join(f"{name}={value:g}" for name, value in INVENTED.items())
    assert f'forget="pairs", {told}, budget=Budget(steps={longer(Budget()).steps})' in manual


def test_the_committed_page_is_what_its_file_makes() -> None:
    assert associations.page(json.loads(associations.RESULTS.read_text())) == associations.PAGE.read_text()
