"""The comparison of methods on a user's own model and data."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ccu_fast.cli.app import app
from ccu_fast.cli.report import figures
from ccu_fast.cli.report.tables import left_out_table, unlearn_tables
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.provenance import items_hash, load_model, save_model
from ccu_fast.unlearn.audit import audit, recall, verdict, verdict_without_gold, worst_gap
from ccu_fast.unlearn.baselines.registry import BASELINES, NEEDS
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.job import load, run_job, split
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.settings import Job, read_job
from ccu_fast.unlearn.study import own
from ccu_fast.unlearn.study.methods import STARTED, unlearned, why_not
from ccu_fast.unlearn.study.own import compare_own
from ccu_fast.unlearn.study.tasks import Scenario
from tests.support import toy_unlearn
from tests.support.forked import fork
from tests.support.small_demo import quick_map
from tests.support.toy_unlearn import TwoTowers, make_model, toy

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = np.array(["ant", "bee", "cat", "dog"])
TOML = f"""{toy_unlearn.SETTINGS}test = "test.npz"
[forget]
classes = ["bee"]
[budget]
steps = 25
batch = 20
learning_rate = 5e-3
[compare]
methods = ["ssd", "ccu"]
"""
QUICK = TOML + "relearn = false\n"
RETRAIN = QUICK + 'retrain = "tests.support.toy_unlearn:retrain"\n'
PAIRS = TOML.replace('classes = ["bee"]', 'kind = "pairs"\nids = [3, 9, 12, 25, 31]').replace("make_model", "TwoTowers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data, test = toy(), toy(40, seed=5)
    np.savez(tmp_path / "pairs.npz", visual=data.visual, other=data.other, labels=NAMES[data.labels], ids=data.ids)
    np.savez(tmp_path / "test.npz", visual=test.visual, other=test.other, labels=NAMES[test.labels])
    save_model(toy_unlearn.trained(), tmp_path / "weights.safetensors", {})
    (tmp_path / "settings.toml").write_text(TOML)
    monkeypatch.setattr(figures, "embedding_map", quick_map)
    return tmp_path


def job(folder: Path, text: str = TOML) -> Job:
    (folder / "settings.toml").write_text(text)
    return read_job(folder / "settings.toml")


def bare(folder: Path) -> TwoTowers:
    """The same data without labels, and a model of two towers for it."""
    for name, data in (("pairs", toy()), ("test", toy(40, seed=5))):
        np.savez(folder / f"{name}.npz", visual=data.visual, other=data.other)
    torch.manual_seed(0)
    model = TwoTowers()
    save_model(model, folder / "weights.safetensors", {})
    return model


def only(results: dict[str, Any]) -> dict[str, Any]:
    ((by_kind,),) = [results["unlearn"].values()]
    ((by_seed,),) = [by_kind.values()]
    return dict(by_seed)


def sets(of: Job) -> dict[str, PairedData]:
    _, data, names, _, test = load(of)
    forget, retain = split(data, of, names)
    gone = torch.isin(test.labels, forget.labels)
    return {"forget": forget, "retain": retain, "retain_test": test[~gone], "forget_test": test[gone]}


def said(*words: str) -> str:
    done = CliRunner().invoke(app, ["unlearn", *words], env={"COLUMNS": "80"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return f"{done.exit_code} {done.output} {done.stderr}"


class TestWithoutGold:
    def test_every_figure_is_that_of_the_method_run_and_audited_by_hand(self, folder: Path) -> None:
        of = job(folder)
        results = compare_own(of, folder / "out")
        value, judged = only(results)["0"], sets(of)
        assert list(value["metrics"]) == ["original", "ssd", "ccu"] and results["left_out"] == []
        before = json.loads(json.dumps(audit(toy_unlearn.trained(), **judged, deep=True)))
        clean = run_ccu(toy_unlearn.trained(), judged["forget"], judged["retain"], of.config).model
        after = json.loads(json.dumps(audit(clean, **judged, deep=True)))
        for name, expected in (("original", before), ("ccu", after)):
            found = value["metrics"][name]
            assert {key: found[key] for key in expected} == expected
        sizes = value["setting"]["sizes"]
        assert sizes == {"forget_train": 15, "forget_test": 10, "retain_train": 45, "retain_test": 30}
        assert value["metrics"]["ccu"]["verdict"] == asdict(verdict_without_gold(after, before, sizes=sizes))
        assert value["metrics"]["ccu"]["verdict"]["kind"] == "passed"
        assert value["reference"] is None and value["best_baseline"] is None
        assert not any("gap" in key for values in value["metrics"].values() for key in values)
        assert "probe" not in value["metrics"]["ssd"]
        stored = json.loads((folder / "out" / "results.json").read_text())
        assert stored == json.loads(json.dumps(own.cache.without(results, "embeddings")))

    def test_settings_of_a_single_run_are_left_aside_and_told(self, folder: Path) -> None:
        unseen = toy(20, seed=6)
        np.savez(folder / "unseen.npz", visual=unseen.visual, other=unseen.other, labels=NAMES[unseen.labels])
        own = 'test = "test.npz"\nunseen = "unseen.npz"\nmemory = 0\njudged = 7'
        text = QUICK.replace('test = "test.npz"', own).replace("steps = 25", "steps = 25\nearly_stop = {slack = 1.0}")
        results = compare_own(job(folder, text), folder / "out")
        value = only(results)["0"]
        assert [name for name, _ in results["left_out"]] == ["early_stop", "judged"]
        assert value["cost"]["ccu"]["steps"] == 25 and value["setting"]["retain_items"] == 45
        assert run_job(job(folder, text), folder / "run")["cost"]["steps"] < 25

    def test_what_is_switched_off_is_not_measured(self, folder: Path) -> None:
        off = "".join(f"{name} = false\n" for name in ("probe", "relearn", "membership", "retrieval"))
        metrics = only(compare_own(job(folder, TOML + off), folder / "out"))["0"]["metrics"]
        for values in metrics.values():
            assert not values.keys() & {"probe", "relearn_steps"}
            assert values["mia_auc"] is None is values["mia_entropy_auc"]
        bare(folder)
        metrics = only(compare_own(job(folder, PAIRS + off), folder / "two"))["0"]["metrics"]
        assert not any("retrieval" in values for values in metrics.values())
        metrics = only(compare_own(job(folder, PAIRS), folder / "two"))["0"]["metrics"]
        assert all("retrieval" in values for values in metrics.values())

    def test_the_command_writes_a_page_and_tables_of_80_columns(self, folder: Path) -> None:
        told = said(str(folder / "settings.toml"), "--compare", "--out", str(folder / "out"), "--seeds", "2")
        assert told.startswith("0 ") and "worst gap" not in told and "seeds 0, 1" in told
        assert max(map(len, told.splitlines())) <= 80 or str(folder) in max(told.splitlines(), key=len)
        page = (folder / "out" / "report.html").read_text()
        assert "class bee forgotten (U, 15 of 60 training items" in page and "No retrained model" in page
        assert "Below the heads" in page and "Each digit image" not in page
        assert page.count("data:image/png;base64,") == 2
        parts = {path.name for path in (folder / "out" / "parts").iterdir()}
        assert parts == {"original.json", *(f"{name}-seed{n}.json" for name in ("ssd", "ccu") for n in (0, 1))}

    def test_the_held_out_pairs_are_the_methods_own(self, folder: Path) -> None:
        fresh = toy(24, seed=8)
        np.savez(folder / "unseen.npz", visual=fresh.visual, other=fresh.other, labels=NAMES[fresh.labels])
        text = TOML.replace('classes = ["bee"]', 'kind = "instances"\nids = [3, 9, 12, 25, 31]')
        text = text.replace("[forget]", 'unseen = "unseen.npz"\n[forget]')
        names = '["ccu", "ccu_without_unseen", "ccu_without_damage", "scrub, told"]'
        of = job(folder, text.replace('["ssd", "ccu"]', names))
        results = compare_own(of, folder / "out")
        metrics, judged = only(results)["0"]["metrics"], sets(of)
        *_, unseen, judged["retain_test"] = load(of)
        judged.pop("forget_test")
        for name, given in (("ccu", unseen), ("ccu_without_unseen", None)):
            clean = run_ccu(toy_unlearn.trained(), judged["forget"], judged["retain"], of.config, unseen=given).model
            assert metrics[name]["mia_auc"] == audit(clean, **judged)["mia_auc"]
        assert metrics["ccu"]["mia_auc"] != metrics["ccu_without_unseen"]["mia_auc"]
        assert list(metrics) == ["original", "scrub, told", "ccu", "ccu_without_unseen"]
        assert [name for name, _ in results["left_out"]] == ["CCU without dampening"]


class TestGold:
    def test_gaps_are_to_the_retrained_model(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        of = job(folder, RETRAIN + "seeds = 2\n")
        given: list[list[PairedData]] = []
        train = toy_unlearn.retrain

        def retrain(model: Any, *pairs: PairedData) -> Any:
            given.append(list(pairs))
            return train(model, *pairs)

        monkeypatch.setattr(toy_unlearn, "retrain", retrain)
        results = compare_own(of, folder / "out")
        judged = sets(of)
        assert [len(pairs) for pairs in given] == [1, 1]
        assert torch.equal(given[0][0].visual, judged["retain"].visual)
        by_seed = only(results)
        states = [load_model(folder / "out" / "models" / f"retrained-seed{n}.safetensors")[0] for n in (0, 1)]
        assert not all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        gold = make_model()
        gold.load_state_dict(states[0])
        found = json.loads(json.dumps(audit(gold, **judged)))
        value = by_seed["0"]
        metrics, reference = value["metrics"], value["reference"]
        assert {key: metrics["gold"][key] for key in found} == found
        # It never met the class: of the other modality the original is what is wanted.
        assert found["other"]["forget_train"] == 0.0 and reference["other"]["forget_train"] == 1.0
        assert reference["fused"]["forget_test"] is None
        assert {k: v for k, v in reference.items() if k not in ("other", "fused", "probe", "relearn_steps")} == {
            k: v for k, v in found.items() if k not in ("other", "fused")
        }
        ccu = metrics["ccu"]
        assert (ccu["worst_gap"]["points"], ccu["worst_gap"]["figure"]) == worst_gap(ccu, reference)
        assert ccu["verdict"] == asdict(verdict(ccu, reference, sizes=value["setting"]["sizes"]))
        assert metrics["gold"]["average_gap"] == 0 and value["best_baseline"] == "ssd"
        cost = value["cost"]
        assert cost["ccu"]["ratio"] == cost["ccu"]["seconds"] / cost["gold"]["seconds"]
        # The retrained models are found again where their parts are gone.
        for path in (folder / "out" / "parts").glob("gold-*.json"):
            path.unlink()
        assert only(compare_own(of, folder / "out")) == by_seed and len(given) == 2
        moved = unlearn_tables("class", by_seed)[0]
        assert "worst gap" in moved.columns and [row[0] for row in moved.rows] == [
            "before unlearning",
            "retrained",
            "SSD",
            "CCU",
        ]

    @pytest.mark.parametrize("hidden", ["both", "visual"])
    def test_a_kept_model_is_not_found_for_other_pairs(
        self, folder: Path, hidden: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train, calls = toy_unlearn.retrain, []
        monkeypatch.setattr(toy_unlearn, "retrain", lambda *given: calls.append(0) or train(*given))
        text = RETRAIN.replace('["ssd", "ccu"]', '["ssd"]') + f'hidden = "{hidden}"\n'
        data = toy()
        gone = data.labels == 1
        # The labels of what stays; the other halves of what goes, which matter where they are learned from.
        swapped = torch.where(data.labels == 2, 3, torch.where(data.labels == 3, 2, data.labels))
        moved = torch.where(gone[:, None], data.other + 1, data.other)
        for labels, other in ((data.labels, data.other), (swapped, data.other), (swapped, moved)):
            np.savez(folder / "pairs.npz", visual=data.visual, other=other, labels=NAMES[labels], ids=data.ids)
            compare_own(job(folder, text), folder / "out")
        assert len(calls) == (2 if hidden == "both" else 3)

    def test_the_other_halves_may_be_seen(self, folder: Path) -> None:
        value = only(compare_own(job(folder, RETRAIN + 'hidden = "visual"\n'), folder / "out"))["0"]
        gold = value["metrics"]["gold"]
        assert gold["other"]["forget_train"] > 0.9 > 0.1 > gold["visual"]["forget_test"]
        assert value["reference"]["other"] == gold["other"]

    def test_weights_that_are_there(self, folder: Path) -> None:
        judged = sets(job(folder))
        gold = toy_unlearn.retrain(make_model(), judged["retain"])
        torch.save(gold.state_dict(), folder / "gold.pt")
        of = job(folder, QUICK + 'gold = "gold.pt"\nseeds = 2\n')
        by_seed = only(compare_own(of, folder / "out"))
        assert by_seed["0"]["metrics"]["gold"]["mia_auc"] == by_seed["1"]["metrics"]["gold"]["mia_auc"]
        assert by_seed["0"]["metrics"]["gold"]["mia_auc"] == audit(gold, **judged)["mia_auc"]
        assert by_seed["0"]["cost"]["ccu"]["ratio"] is None and not (folder / "out" / "models").exists()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                'gold = "weights.safetensors"',
                "gold: expected weights of a retrained model, got those of the original in",
            ),
            ('gold = "none.pt"', "gold: expected a file, got none at"),
            ('gold = "other.pt"', "gold: expected weights of FusionModel, got others"),
            ('retrain = "tests.support.toy_unlearn:nothing"', "retrain: expected a function nothing"),
            ('retrain = "tests.support.toy_unlearn:DIM"', "retrain: expected a function DIM"),
        ],
    )
    def test_what_cannot_be_is_refused_before_the_work(self, folder: Path, line: str, message: str) -> None:
        torch.save(TwoTowers().state_dict(), folder / "other.pt")
        with pytest.raises((ValueError, OSError), match=message):
            compare_own(job(folder, TOML + line), folder / "out")
        assert not (folder / "out").exists()

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (lambda model, pairs: None, "retrain: expected a torch.nn.Module from .*:retrain, got NoneType"),
            (lambda model, pairs: torch.nn.Linear(1, 1), "retrain: model: expected the methods embed_visual"),
        ],
    )
    def test_what_a_function_returns_is_checked(
        self, folder: Path, made: Any, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(toy_unlearn, "retrain", made)
        with pytest.raises(TypeError, match=message):
            compare_own(job(folder, RETRAIN), folder / "out")


class TestPairs:
    def test_what_does_not_apply_is_told_with_the_reason(self, folder: Path) -> None:
        model = bare(folder)
        of = job(folder, PAIRS.replace('methods = ["ssd", "ccu"]', "").replace("steps = 25", "steps = 2"))
        results = compare_own(of, folder / "out")
        value = only(results)["0"]
        absent = dict(results["left_out"])
        need = {name: BASELINES[name].needs for name in BASELINES}
        assert absent == {
            "linear probe": "needs items with labels",
            "relearning": "needs items with labels and a visual head",
            **{BASELINES[name].label: NEEDS[what] for name, what in need.items() if what is not None},
        }
        assert set(value["metrics"]) == {"original", "ccu", *(name for name in need if need[name] is None)}
        _, data, names, *_ = load(of)
        forget, _ = split(data, of, names)
        assert value["metrics"]["original"]["retrieval"]["forget"] == recall(model, forget, among=data)
        assert set(value["metrics"]["ccu"]["retrieval"]) == {"forget", "retain", "retain_test"}
        told = said(str(folder / "settings.toml"), "--compare", "--out", str(folder / "out"))
        assert "Left out" in told and "needs items with labels" in told and "Retrieval" in told
        assert max(len(line) for line in told.splitlines() if str(folder) not in line) <= 80
        page = (folder / "out" / "report.html").read_text()
        assert "Forget pairs" in page and "Left out" in page and "i→t U R@10" in page

    def test_an_ablation_without_a_layer_to_adapt_is_told_too(self, folder: Path) -> None:
        text = QUICK.replace("[data]", 'lora = 2\ntrainable = ["*bias"]\n[data]').replace('"ccu"]', '"ccu_without_c"]')
        left_out = dict(compare_own(job(folder, text), folder / "out")["left_out"])
        assert left_out["CCU without (c)"].startswith("lora: expected trainable to match the weight of a linear layer")

    @pytest.mark.parametrize(
        ("name", "given", "why"),
        [
            ("ccu_without_b", {"lora": 2}, "depends on nothing that may change"),
            ("ccu_without_b", {"trainable": ("visual*",)}, "depends on nothing that may change"),
            ("ccu_without_b", {"lora": 2, "keep": "trained"}, "depends on nothing that may change"),
            ("ccu_without_b", {"keep": "trained", "retention": 0.0}, "do not use"),
            ("ccu_without_damage", {"lora": 2}, "do not use"),
            ("ccu_without_neighbours", {}, "do not use"),
            ("ccu_without_unseen", {"forgetting": 0.0}, "do not use"),
            ("ccu_without_b", {}, None),
            ("ccu_without_b", {"lora": 2, "anchor": 0.5}, None),
            ("ccu_without_neighbours", {"neighbours": 0.2}, None),
            ("ccu_without_unseen", {}, None),
        ],
    )
    def test_an_ablation_that_would_be_the_same_run_is_left_out(
        self, name: str, given: dict[str, Any], why: str | None
    ) -> None:
        # Two towers that share no layer: an adapter of the visual one never touches the other.
        model, data = TwoTowers().eval(), toy_unlearn.pairs()
        gone = torch.arange(len(data)) % 5 == 0
        sets = Scenario("pairs", data, data[gone], data[~gone], data[~gone], None, toy_unlearn.pairs(20, 1, first=200))
        config = UnlearnConfig(forget="pairs", budget=Budget(steps=3, batch=10), **given)
        found = why_not(name, model, sets, config)
        assert (found is None) == (why is None) and (why or "") in (found or "")
        runs = [unlearned(each, model, sets, config) for each in ("ccu", name)]
        one, two = (toy_unlearn.weights(cast(nn.Module, run.model)) for run in runs)
        same = torch.allclose(one, two, rtol=0, atol=1e-6)  # but for the rounding of products of other sizes
        assert same == (found is not None)

    def test_shared_layers_and_statistics_are_of_the_other_modality_too(self) -> None:
        forget, retain = toy_unlearn.split()
        sets = Scenario("class", toy(), forget, retain, retain, None, None)
        tokens = replace(sets, forget=PairedData(forget.visual.long(), forget.other, forget.labels, forget.ids))
        shared = make_model()  # its projector
        assert why_not("ccu_without_b", shared, sets, UnlearnConfig(lora=2)) is None
        assert "nothing that may change" in str(
            why_not("ccu_without_b", shared, sets, UnlearnConfig(lora=2, trainable=("visual*",)))
        )
        followed = TwoTowers()
        followed.other = nn.Sequential(followed.other, nn.BatchNorm1d(toy_unlearn.DIM, affine=False))
        assert why_not("ccu_without_b", followed, sets, UnlearnConfig(trainable=("visual*",))) is None
        assert "no nearness" in str(why_not("ccu_without_neighbours", shared, tokens, UnlearnConfig()))

    def test_a_method_that_ends_in_numbers_that_are_none_is_told_too(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = own.unlearned

        def unlearned(name: str, *rest: Any, **options: Any) -> Any:
            if name == "ssd":
                raise FloatingPointError("ssd: the loss is nan at step 7 of 25; the state after step 5 is in x.pt")
            return plain(name, *rest, **options)

        monkeypatch.setattr(own, "unlearned", unlearned)
        results = compare_own(job(folder, QUICK + "seeds = 2\n"), folder / "out")
        assert results["left_out"] == [("SSD", "the loss is nan at step 7 of 25 (seed 0)")]
        assert list(only(results)["1"]["metrics"]) == ["original", "ccu"]
        table = left_out_table(results["left_out"])
        assert table is not None and table.rows == [["SSD", "the loss is nan at step 7 of 25 (seed 0)"]]

    @pytest.mark.parametrize(
        "error", [ValueError("checkpoint: expected a whole file"), ValueError("unpack"), KeyError("x")]
    )
    def test_what_is_no_fault_of_the_method_is_raised(
        self, folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unlearned(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(own, "unlearned", unlearned)
        with pytest.raises(type(error)):
            compare_own(job(folder), folder / "out")

    @pytest.mark.parametrize("name", BASELINES)
    @pytest.mark.parametrize("labelled", [True, False])
    def test_a_method_lacks_something_where_it_cannot_run(self, name: str, labelled: bool) -> None:
        parts = toy_unlearn.split("instances")
        forget, retain = (p if labelled else PairedData(p.visual, p.other, ids=p.ids) for p in parts)
        assert BASELINES[name].lacks(toy_unlearn.trained(), *parts[:1]) is None
        lacks = BASELINES[name].lacks(TwoTowers(), forget)
        of_labels = BASELINES[name].needs == "labels"
        assert (lacks is None) == (BASELINES[name].needs is None or (of_labels and labelled))
        if lacks is not None and not labelled:
            with pytest.raises(ValueError, match=r"^(retain|forget|model): expected"):
                BASELINES[name].run(TwoTowers(), forget, retain, "pairs", Budget(steps=2, batch=8))
        assert BASELINES[name].lacks(TwoTowers(), forget, told=True) in (lacks, NEEDS["other"])


class TestResumed:
    def test_a_killed_comparison_goes_on_within_a_method(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        of = job(folder, QUICK)
        expected = only(compare_own(of, folder / "whole"))["0"]

        def killed(stage: str, done: int, total: int, note: str) -> None:
            if stage == "seed 0: CCU" and done == 25:
                os.kill(os.getpid(), signal.SIGKILL)

        child = fork(partial(compare_own, of, folder / "out", progress=killed))
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        parts = folder / "out" / "parts"
        assert {path.name for path in parts.glob("*.json")} == {"original.json", "ssd-seed0.json"}
        (state,) = (path for path in parts.glob("ccu-seed0-*.pt") if path.suffixes == [".pt"])
        kept = sorted(parts.glob(f"{state.stem}.*.pt"))
        assert state.with_suffix(".forget.pt") in kept
        cached, there = own.cache.part, list[bool]()

        def part(path: Path, *rest: Any) -> Any:
            if path.name == "ccu-seed0.json":
                there.append(all(file.exists() for file in kept))
            return cached(path, *rest)

        monkeypatch.setattr(own.cache, "part", part)
        (parts / "ccu-seed0-0123456789ab.pt").write_bytes(b"of other settings")
        ran: list[str] = []
        plain = own.unlearned
        monkeypatch.setattr(own, "unlearned", lambda name, *r, **o: (ran.append(name), plain(name, *r, **o))[1])
        steps: list[int] = []
        results = compare_own(
            of, folder / "out", progress=lambda stage, done, *_: steps.append(done) if stage == "seed 0: CCU" else None
        )
        assert ran == ["ccu"] and steps == [25] and not state.exists() and not [*parts.glob("*.pt")]
        assert there == [True]
        assert only(results)["0"]["metrics"] == expected["metrics"]
        # What other settings made is made anew, and no more.
        ran.clear()
        compare_own(job(folder, QUICK.replace("steps = 25", "steps = 5")), folder / "out")
        assert ran == ["ssd", "ccu"]
        compare_own(job(folder, QUICK.replace("steps = 25", "steps = 5").replace('"ssd", ', "")), folder / "out")
        assert ran == ["ssd", "ccu"]

    @pytest.mark.parametrize("name", ["model.safetensors", "results.json"])
    def test_files_of_something_else_are_left_alone(self, folder: Path, name: str) -> None:
        (folder / "out").mkdir()
        (folder / "out" / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"out: expected a folder without {name}, or an earlier comparison's"):
            compare_own(job(folder), folder / "out")
        assert [path.name for path in (folder / "out").iterdir()] == [name]


class TestSettings:
    def test_defaults_and_what_is_read(self, folder: Path) -> None:
        assert job(folder, TOML.replace('methods = ["ssd", "ccu"]', "")).compare.chosen == ("ccu", *BASELINES)
        of = job(folder, TOML + 'gold = "gold.pt"\nhidden = "visual"\nseeds = 3\nprobe = false\n')
        compare = of.compare
        assert (compare.gold, compare.hidden, compare.seeds) == (folder / "gold.pt", "visual", 3)
        assert (compare.probe, compare.relearn, compare.membership, compare.retrieval) == (False, True, True, True)
        assert of.test == folder / "test.npz" and "ccu" in STARTED and "original" not in STARTED

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('["ssd", "ccu"]', '"ccu"', r"settings \[compare\] methods: expected a list of methods, got 'ccu' \(in"),
            ('["ssd", "ccu"]', "[]", r"settings \[compare\] methods: expected a list of methods, got \[\]"),
            ('["ssd", "ccu"]', '["gold_mask"]', r"settings \[compare\] methods: expected one of .* got 'gold_mask'"),
            ('["ssd", "ccu"]', "[3]", r"settings \[compare\] methods: expected one of"),
            ('["ssd", "ccu"]', '["ssd", "ssd"]', r"settings \[compare\] methods: expected every method once"),
            ("[compare]", "[compare]\nseeds = 0", r"settings \[compare\] seeds: expected an int at least 1, got 0"),
            ("[compare]", '[compare]\nprobe = "yes"', r"settings \[compare\] probe: expected"),
            ("[compare]", '[compare]\nretrain = "train"', r"retrain: expected 'module:function', got 'train'"),
            ("[compare]", "[compare]\nretrain = 3", r"settings \[compare\] retrain: expected text, got 3"),
            ("[compare]", '[compare]\ngold = ""', r"settings \[compare\] gold: expected text, got ''"),
            ("[compare]", '[compare]\ngold = "a"\nretrain = "a:b"', "gold: expected no weights .* beside retrain"),
            ("[compare]", '[compare]\nhidden = "visual"', r"settings \[compare\] hidden: expected retrain or gold"),
            (
                "[compare]",
                '[compare]\nhidden = "all"\nretrain = "a:b"',
                r"settings \[compare\] hidden: expected one of",
            ),
            ("[compare]", "[compare]\nrelearning = true", r"settings \[compare\]: expected one of"),
            ('"test.npz"', '"pairs.npz"', r"settings: expected other pairs as test in \[data\] of .*, got the same"),
            ('"test.npz"', '""', r"settings: expected text as test in \[data\]"),
            ("[forget]", 'unseen = "test.npz"\n[forget]', "expected other pairs as test in .*, got those of unseen"),
        ],
    )
    def test_bad_settings_are_named(self, folder: Path, old: str, new: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            job(folder, TOML.replace(old, new, 1))

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            ({"labels": NAMES[[0, 2, 3] * 4]}, "test: expected items of the classes to forget, got none in"),
            ({"labels": NAMES[[1] * 12]}, "test: expected items of a class that stays, got none in"),
            ({"labels": np.array(["elephant"] * 12)}, "test: expected classes of the data, got elephant in"),
            ({}, "test: expected labels as in forget, got none"),
            ({"gap": True}, "test: expected finite numbers as visual, got NaN or infinity in 1 items"),
        ],
    )
    def test_test_pairs_that_cannot_be(self, folder: Path, made: dict[str, Any], message: str) -> None:
        fresh = toy(12, seed=9)
        visual = fresh.visual.numpy().copy()
        if made.pop("gap", False):
            visual[3, 0], made["labels"] = np.nan, NAMES[fresh.labels]
        np.savez(folder / "test.npz", visual=visual, other=fresh.other, **made)
        with pytest.raises(ValueError, match=message):
            compare_own(job(folder), folder / "out")
        assert not (folder / "out").exists()

    def test_without_test_pairs_nothing_can_be_judged(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"test: expected pairs in \[data\] of the settings"):
            compare_own(job(folder, TOML.replace('test = "test.npz"', "")), folder / "out")

    def test_a_single_run_is_judged_by_them(self, folder: Path) -> None:
        result = run_job(job(folder), folder / "out")
        assert result["sizes"]["test items"] == 30 and result["sizes"]["test, to forget items"] == 10
        assert not [name for name, _, _ in result["rows"] if "unseen" in name]

    def test_a_card_has_each_set_with_its_own_number_and_hash(self, folder: Path) -> None:
        unseen = toy(20, seed=6)
        np.savez(folder / "unseen.npz", visual=unseen.visual, other=unseen.other, labels=NAMES[unseen.labels])
        of = job(folder, TOML.replace('test = "test.npz"', 'test = "test.npz"\nunseen = "unseen.npz"'))
        result = run_job(replace(of, judged=7), folder / "out")
        card = (folder / "out" / "card.md").read_text()
        _, data, names, new, test = load(of)
        made = result["provenance"]
        parts = {**dict(zip(("forget", "retain"), split(data, of, names), strict=True)), "unseen": new, "test": test}
        assert [len(part) for part in parts.values()] == [15, 45, 20, 40] and result["sizes"]["retain items"] == 7
        for name, part in parts.items():
            assert f"| {name} | {len(part)} | {items_hash(part)} |" in card
            assert (made[f"{name}_items"], made[f"{name}_sha256"]) == (len(part), items_hash(part))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--compare", "--task", "digits-halves"], "expected --task only with --compare and without a settings"),
            (["--compare", "--scenario", "class"], "expected --scenario only with --compare and without a settings"),
            (["--compare", "--fresh"], "expected --fresh only without --compare"),
            (["--seeds", "2"], "expected --seeds only with --compare"),
        ],
    )
    def test_words_that_do_not_go_together(self, folder: Path, words: list[str], message: str) -> None:
        told = said(str(folder / "settings.toml"), *words, "--out", str(folder / "out"))
        assert told.startswith("2 ") and message in told and not (folder / "out").exists()

    def test_flags_reach_every_method(self, folder: Path) -> None:
        words = [
            "--compare",
            "--out",
            str(folder / "out"),
            "--steps",
            "3",
            "--classes",
            "cat",
            "--seeds",
            "1",
            "--quiet",
        ]
        assert said(str(folder / "settings.toml"), *words).startswith("0 ")
        stored = json.loads((folder / "out" / "results.json").read_text())
        value = only(stored)["0"]
        assert value["cost"]["ccu"]["steps"] == 3 and value["setting"]["forgotten"] == "class cat"
