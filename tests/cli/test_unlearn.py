"""ccu-fast unlearn: settings, users' data, what is written; the comparison in parts."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ccu_fast.cli.app import app
from ccu_fast.cli.main import main
from ccu_fast.cli.report import figures
from ccu_fast.data.halves import Halves
from ccu_fast.data.load import load_pairs
from ccu_fast.data.paired import PairedData
from ccu_fast.data.views import STRIDE, load_views
from ccu_fast.models.weights import from_checkpoint
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.provenance import items_hash, load_model, save_model
from ccu_fast.unlearn import unlearn
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.job import load, load_user_model, run_job, split
from ccu_fast.unlearn.settings import read_job
from ccu_fast.unlearn.study import compare as comparing
from ccu_fast.unlearn.study.methods import METHODS
from ccu_fast.unlearn.study.tasks import TASKS, TrainConfig, make_scenario
from tests.support import toy_unlearn
from tests.support.forked import fork
from tests.support.html_page import faults
from tests.support.log_lines import stages
from tests.support.small_demo import quick_map
from tests.support.toy_unlearn import accuracies, toy, weights

TOML = f"""{toy_unlearn.SETTINGS}[forget]
classes = [1]
[budget]
steps = 30
learning_rate = 5e-3
batch = 20
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = toy()
    np.savez(tmp_path / "pairs.npz", visual=data.visual, other=data.other, labels=data.labels, ids=data.ids + 7)
    save_model(toy_unlearn.trained(), tmp_path / "weights.safetensors", {"seed": 0})
    (tmp_path / "settings.toml").write_text(TOML)
    return tmp_path


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["unlearn", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return f"{done.exit_code} {done.output} {done.stderr}"


class TestCommand:
    def test_writes_a_model_with_its_provenance_and_a_report(self, folder: Path) -> None:
        out = folder / "out"
        assert run(str(folder / "settings.toml"), "--out", str(out), "--seed", "3", "--quiet").startswith("0 ")
        assert sorted(p.name for p in out.iterdir()) == [
            "card.md",
            "checkpoint.pt",
            "model.safetensors",
            "report.html",
            "results.json",
        ]
        state, provenance = load_model(out / "model.safetensors")
        assert provenance["seed"] == 3 and provenance["config"]["budget"]["steps"] == 30
        assert provenance["versions"]["torch"] == torch.__version__
        clean = toy_unlearn.make_model()
        clean.load_state_dict(state)
        data = toy()
        assert accuracies(clean, data[data.labels == 1])["visual"] <= 0.1
        assert min(accuracies(clean, data[data.labels != 1]).values()) >= 0.9
        page = (out / "report.html").read_text()
        assert faults(page) == [] and page.count("<svg") == 3 and provenance["weights_sha256"] in page
        stored = json.loads((out / "results.json").read_text())
        assert dict((name, after) for name, _, after in stored["rows"])["forget: other, accuracy"] >= 0.9
        assert stored["verdict"] == {"kind": "passed", "text": "forgets what was asked and keeps the rest"}
        # A second call finds the run finished; other settings are not mixed in.
        assert run(str(folder / "settings.toml"), "--out", str(out), "--seed", "3", "--quiet").startswith("0 ")
        assert "other settings" in run(str(folder / "settings.toml"), "--out", str(out), "--quiet")

    def test_what_to_do_next_can_be_copied(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = folder / "the clean one"
        words = ["unlearn", str(folder / "settings.toml"), "--out", str(out), "--classes", "1", "--classes", "2"]
        assert main([*words, "--steps", "40"]) == 0
        told = capsys.readouterr()
        assert stages(told.err) == [
            "ccu-fast unlearn: loading its libraries",
            "reading the model and the data",
            "checking the settings on the model",
            "unlearn",
            "writing the model",
            "measuring before and after",
            "writing the report",
        ]
        python, _, rest = told.out.partition("next, load it:\n")[2].partition("audit it")
        known: dict[str, Any] = {}
        exec(inspect.cleandoc(python), known)
        state, _ = load_model(out / "model.safetensors")
        assert all(torch.equal(value, state[name]) for name, value in known["model"].state_dict().items())
        assert "it needs test pairs: test in [data] of the settings" in rest
        command = next(line for line in rest.splitlines() if line.startswith("  ccu-fast "))
        audit = ["unlearn", str(folder / "settings.toml"), "--compare", "--out", f"{out}-audit"]
        assert shlex.split(command)[1 : 1 + len(audit)] == audit
        flags = shlex.split(command)[1 + len(audit) :]
        pairs = sorted(zip(flags[::2], flags[1::2], strict=True))
        assert pairs == [("--classes", "1"), ("--classes", "2"), ("--steps", "40")]
        assert main(shlex.split(command)[1:]) == 1  # a command that is understood, and wants test pairs
        assert "test: expected pairs in [data]" in capsys.readouterr().err

    def test_fresh_removes_what_an_earlier_run_wrote_and_no_more(self, folder: Path) -> None:
        (folder / "settings.toml").write_text(TOML.replace("steps = 30", "steps = 1"))
        out, words = folder / "out", [str(folder / "settings.toml"), "--out", str(folder / "out"), "--quiet"]
        assert run(*words).startswith("3 ")  # one step forgets nothing
        (out / "notes.txt").write_text("mine")
        assert "remove the file to start anew (--fresh does)" in run(*words, "--seed", "2")
        assert run(*words, "--seed", "2", "--fresh").startswith("3 ")
        assert load_model(out / "model.safetensors")[1]["seed"] == 2
        assert sorted(p.name for p in out.iterdir()) == [
            "card.md",
            "checkpoint.pt",
            "model.safetensors",
            "notes.txt",
            "report.html",
            "results.json",
        ]
        # Its own result as the next run's weights.
        before = (out / "model.safetensors").read_bytes()
        (folder / "settings.toml").write_text(TOML.replace('"weights.safetensors"', '"out/model.safetensors"'))
        assert "out: expected another folder than that of the weights" in run(*words, "--fresh")
        assert (out / "model.safetensors").read_bytes() == before

    def test_flags_win_and_reach_the_method(self, folder: Path) -> None:
        job = read_job(folder / "settings.toml", {"budget": {"steps": 4}, "ccu": {"trainable": ["visual_tower.*"]}})
        assert job.config.budget == Budget(steps=4, learning_rate=5e-3, batch=20)
        assert run_job(job, folder / "out") is not None
        state, _ = load_model(folder / "out" / "model.safetensors")
        before = toy_unlearn.trained().state_dict()
        assert {k for k in state if not torch.equal(state[k], before[k])} == {k for k in state if "visual_tower" in k}

    def test_model_and_data_go_to_the_device(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that holds no values stands for a GPU: the work is given all that it computes with there."""
        seen = []

        def work(model: Any, forget: PairedData, retain: PairedData, *_: Any, **__: Any) -> None:
            tensors = [*model.state_dict().values()]
            tensors += [t for part in (forget, retain) for t in (part.visual, part.other, part.labels, part.ids)]
            seen.extend(t.device.type for t in tensors)
            raise ValueError("work: expected no more")

        monkeypatch.setattr("ccu_fast.unlearn.job.check_problem", work)
        monkeypatch.setattr("ccu_fast.check.device", lambda name, value: torch.device(value))
        assert "expected no more" in run(
            str(folder / "settings.toml"), "--out", str(folder / "out"), "--device", "meta"
        )
        assert set(seen) == {"meta"}

    @pytest.mark.gpu
    def test_on_a_gpu(self, folder: Path) -> None:
        (folder / "settings.toml").write_text(TOML.replace("steps = 30", "steps = 12"))
        for device in ("cpu", "cuda"):
            words = [str(folder / "settings.toml"), "--out", str(folder / device), "--device", device, "--quiet"]
            assert run(*words).startswith("0 ")
        one, two = (load_model(folder / device / "model.safetensors")[0] for device in ("cpu", "cuda"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)

    def test_two_processes_share_a_run(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Each with the environment that torchrun gives it; tests/cli/test_mem.py starts torchrun itself."""
        text = TOML.replace("[budget]", "[ccu]\nneighbours = 2.0\n[budget]").replace("steps = 30", "steps = 12")
        (folder / "settings.toml").write_text(text)
        command = ["unlearn", str(folder / "settings.toml"), "--quiet", "--out"]
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

        def one_of_two(rank: int) -> None:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            assert main([*command, str(folder / "two")]) == 3  # 12 steps do not forget: both say so

        children = [fork(partial(one_of_two, rank)) for rank in range(2)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert capfd.readouterr().out.count("model.safetensors") == 1  # one of them writes
        assert run(*command[1:], str(folder / "one")).startswith("3 ")
        files = [sorted(p.name for p in (folder / name).iterdir()) for name in ("one", "two")]
        assert files[0] == files[1] == ["card.md", "checkpoint.pt", "model.safetensors", "report.html", "results.json"]
        (one, alone), (two, shared) = (load_model(folder / name / "model.safetensors") for name in ("one", "two"))
        assert (alone["processes"], shared["processes"]) == (1, 2)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)

    def test_a_comparison_is_not_shared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        said = run("--compare")
        assert said.startswith("2 ") and "one process for --compare" in said

    def test_instances_by_a_file_of_ids(self, folder: Path) -> None:
        (folder / "gone.txt").write_text("7\n8\n11\n")
        text = TOML.replace("classes = [1]", 'kind = "instances"\nids = "gone.txt"').replace("steps = 30", "steps = 2")
        (folder / "settings.toml").write_text(text)
        result = run_job(read_job(folder / "settings.toml"), folder / "out")
        assert result is not None and result["sizes"] == {"forget items": 3, "retain items": 57}
        (folder / "gone.txt").write_text("7\n9999\n")
        assert "'9999', which none has" in run(str(folder / "settings.toml"), "--out", str(folder / "two"))

    def test_a_few_items_have_a_report_too(self, folder: Path) -> None:
        data = toy()[torch.arange(8)]
        np.savez(folder / "pairs.npz", visual=data.visual, other=data.other, labels=data.labels)
        (folder / "settings.toml").write_text(TOML.replace("steps = 30", "steps = 1"))
        assert run(str(folder / "settings.toml"), "--out", str(folder / "out"), "--quiet").startswith("3 ")
        assert (folder / "out" / "report.html").is_file()

    def test_tied_weights_are_written_under_all_their_names(self, folder: Path) -> None:
        model = toy_unlearn.TiedTowers()
        save_model(model, folder / "weights.safetensors", {})
        pairs = TOML.replace("classes = [1]", 'kind = "pairs"\nids = [7, 8]').replace("steps = 30", "steps = 2")
        (folder / "settings.toml").write_text(pairs.replace(":make_model", ":TiedTowers"))
        assert run(str(folder / "settings.toml"), "--out", str(folder / "out"), "--quiet").startswith("0 ")
        clean = from_checkpoint(toy_unlearn.TiedTowers, folder / "out" / "model.safetensors")()
        assert clean.visual.weight is clean.other.weight and not torch.equal(weights(clean), weights(model))
        state, _ = load_model(folder / "out" / "model.safetensors")
        assert torch.equal(state["visual.weight"], state["other.weight"])

    def test_a_state_that_cannot_be_written_is_refused_before_the_work(self, folder: Path) -> None:
        torch.save({**toy_unlearn.TwoTowers().state_dict(), "_extra_state": torch.zeros(1)}, folder / "w.pt")
        text = TOML.replace(":make_model", ":Counting").replace("weights.safetensors", "w.pt")
        (folder / "settings.toml").write_text(text.replace("classes = [1]", 'kind = "pairs"\nids = [7]'))
        with patch.object(toy_unlearn.Counting, "set_extra_state"):
            said = run(str(folder / "settings.toml"), "--out", str(folder / "out"), "--quiet")
        assert "model: expected a state_dict of tensors, which can be written, got dict as '_extra_state'" in said
        assert not (folder / "out").exists()
        forget, retain = toy_unlearn.split("pairs")
        options = {"checkpoint": Checkpoint(folder / "c.pt")}
        with pytest.raises(ValueError, match="model: expected a state_dict of tensors"):
            unlearn(toy_unlearn.Counting(), forget, retain, UnlearnConfig(forget="pairs"), **options)

    @pytest.mark.parametrize("given", ["settings", "flags"])
    def test_a_class_by_its_name(self, folder: Path, given: str) -> None:
        """Labels that pandas wrote: a name, and numbers with a gap, are the classes they say."""
        data = toy()
        for name, label in (
            ("names", np.array(["ant", "bee", "cat", "dog"])[data.labels]),
            ("floats", data.labels / 1),
        ):
            np.savez(folder / "pairs.npz", visual=data.visual, other=data.other, labels=label)
            chosen = "bee" if name == "names" else "1"
            listed, flags = (f'["{chosen}"]', []) if given == "settings" else ("[0]", ["--classes", chosen])
            (folder / "settings.toml").write_text(TOML.replace("[1]", listed).replace("steps = 30", "steps = 1"))
            out = folder / name
            assert run(str(folder / "settings.toml"), "--out", str(out), "--quiet", *flags).startswith("3 ")
            provenance = json.loads((out / "results.json").read_text())["provenance"]
            assert provenance["forgotten_classes"] == [chosen]
            gone = data[data.labels == 1]
            assert provenance["forget_sha256"] == items_hash(gone)

    def test_an_error_says_a_class_by_its_name(self, folder: Path) -> None:
        data = toy()
        called = np.array(["ant", "bee", "cat", "dog"])[data.labels]
        np.savez(folder / "pairs.npz", visual=data.visual, other=data.other, labels=called, ids=data.ids)
        gone = [int(i) for i in data.ids[data.labels == 2]]
        text = TOML.replace("classes = [1]", f'kind = "instances"\nids = {gone}')
        (folder / "settings.toml").write_text(text)
        said = run(str(folder / "settings.toml"), "--out", str(folder / "out"))
        assert "retain: expected items of every class in the forget set, got none of class cat; to forget" in said

    def test_items_by_names_of_their_own(self, folder: Path) -> None:
        """Text, and numbers too large for int64, which must not wrap; from a file with a BOM and from a list."""
        data = toy()
        whole = np.arange(60, dtype=np.uint64) + np.uint64(2**63)
        for ids, chosen in ((np.array([f"img {i}" for i in range(60)]), "img 7"), (whole, str(whole[7]))):
            np.savez(folder / "pairs.npz", visual=data.visual, other=data.other, labels=data.labels, ids=ids)
            (folder / "gone.txt").write_text(f"\ufeff{chosen}\n", encoding="utf-8")
            for listed in ('"gone.txt"', f"['{chosen}']"):
                text = TOML.replace("classes = [1]", f'kind = "instances"\nids = {listed}')
                (folder / "settings.toml").write_text(text)
                job = read_job(folder / "settings.toml")
                _, pairs, names, *_ = load(job)
                forget, retain = split(pairs, job, names)
                assert torch.equal(forget.visual, data.visual[7:8]) and len(retain) == 59

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("[1]", '["bee"]', "classes: expected some of [0, 1, 2, 3], got bee"),
            ("[1]", "[true]", "expected a list of numbers or names as classes in [forget]"),
            ("[1]", "1", "expected a list of numbers or names as classes in [forget]"),
            ("[1]", '"1"', "expected a list of numbers or names as classes in [forget]"),
            ("[1]", "[1.5]", "classes: expected some of [0, 1, 2, 3], got 1.5"),
            ("[budget]", "[budgets]", "settings: expected one of"),
            ("steps = 30", "step = 30", r"settings [budget]: expected one of"),
            ("steps = 30", "steps = 0", "settings [budget] steps: expected an int at least 1, got 0 (in"),
            ("[budget]", "[ccu]\nneighbours = -1\n[budget]", "settings [ccu] neighbours: expected a finite number"),
            ("[model]", "ccu = 3\n[model]", "settings: expected a table [ccu]"),
            ("classes = [1]", "classes = [9]", "classes: expected some of [0, 1, 2, 3], got 9"),
            ("classes = [1]", "", "expected classes and no ids"),
            ("classes = [1]", "classes = [0, 1, 2, 3]", "retain: expected at least one item"),
            ("toy_unlearn:make_model", "toy_unlearn:nothing", "expected a function nothing"),
            ("toy_unlearn:make_model", "toy_unlearn", "expected 'module:function'"),
            ("toy_unlearn:make_model", "toy_unlearn:toy", "expected a torch.nn.Module"),
            ("weights.safetensors", "none.safetensors", "weights: expected a file"),
            ("pairs.npz", "none.npz", "path: expected an existing folder"),
            ("[model]", "[model", "settings: expected TOML"),
        ],
    )
    def test_bad_settings_are_named(self, folder: Path, old: str, new: str, message: str) -> None:
        (folder / "settings.toml").write_text(TOML.replace(old, new, 1))
        said = run(str(folder / "settings.toml"), "--out", str(folder / "out"))
        assert said.startswith("1 ") and message in said.replace("\n", " ")
        assert not (folder / "out").exists()

    def test_settings_or_comparison(self) -> None:
        assert run().startswith("2 ")
        assert "task" in run("--compare", "--task", "mnist")

    def test_weights_that_do_not_fit_and_changed_files(self, folder: Path) -> None:
        torch.save({"x": torch.zeros(2)}, folder / "w.pt")
        with pytest.raises(ValueError, match="weights: expected weights of"):
            load_user_model("tests.support.toy_unlearn:make_model", folder / "w.pt")
        whole = (folder / "weights.safetensors").read_bytes()
        (folder / "weights.safetensors").write_bytes(whole[:-4] + bytes(4 * [7]))
        with pytest.raises(ValueError, match="changed ones"):
            load_model(folder / "weights.safetensors")
        with pytest.raises(ValueError, match="expected an undamaged file"):
            load_model(folder / "settings.toml")


class TestLoad:
    def test_arrays_table_and_folder_say_the_same(self, tmp_path: Path) -> None:
        from PIL import Image

        visual = np.random.default_rng(0).integers(0, 255, (4, 5, 6), dtype=np.uint8)
        other = np.random.default_rng(1).normal(size=(4, 3))
        names, classes = ["b", "a", "d", "c"], ["dog", "cat", "dog", "cat"]
        for i, name in enumerate(names):
            for part in (tmp_path / "tree" / "visual" / classes[i], tmp_path / "tree" / "other"):
                part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(visual[i]).save(tmp_path / "tree" / "visual" / classes[i] / f"{name}.png")
            np.save(tmp_path / "tree" / "other" / f"{name}.npy", other[i])
        rows = [
            f"tree/visual/{c}/{n}.png,tree/other/{n}.npy,{c},{i + 5}"
            for i, (n, c) in enumerate(zip(names, classes, strict=True))
        ]
        (tmp_path / "pairs.csv").write_text("\n".join(["visual,other,label,id", *rows]))
        np.savez(tmp_path / "pairs.npz", visual=visual[:, None].astype(np.float32) / 255, other=other)
        table, arrays, tree = (load_pairs(tmp_path / name)[0] for name in ("pairs.csv", "pairs.npz", "tree"))
        assert torch.equal(table.visual, arrays.visual) and torch.equal(table.other, arrays.other)
        assert table.labels.tolist() == [1, 0, 1, 0] and table.ids.tolist() == [5, 6, 7, 8]
        assert not arrays.labelled and arrays.other.dtype == torch.float32
        order = [names.index(n) for n in sorted(names)]
        assert torch.equal(tree.visual, table.visual[order]) and tree.labels.tolist() == [0, 1, 0, 1]

    def test_what_is_wrong_is_named(self, tmp_path: Path) -> None:
        def said(path: Path) -> str:
            with pytest.raises(ValueError) as caught:
                load_pairs(path)
            return str(caught.value)

        assert "expected an existing folder" in said(tmp_path / "pairs.json")
        np.savez(tmp_path / "a.npz", visual=np.zeros((2, 3)))
        assert "got no other" in said(tmp_path / "a.npz")
        np.savez(tmp_path / "b.npz", visual=np.zeros((2, 3)), other=np.zeros((3, 3)))
        assert "visual" in said(tmp_path / "b.npz")
        (tmp_path / "t.csv").write_text("visual,text\nx,y")
        assert "got no other" in said(tmp_path / "t.csv")
        (tmp_path / "t.csv").write_text("visual,other\nx.npy,y.npy")
        assert "x.npy, got none" in said(tmp_path / "t.csv")
        for part, name, size in (("visual", "a", 2), ("visual", "b", 3), ("other", "a", 2), ("other", "b", 2)):
            (tmp_path / "f" / part).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "f" / part / f"{name}.npy", np.zeros(size))
        assert "expected shape [2] (that of a.npy)" in said(tmp_path / "f")
        (tmp_path / "f" / "other" / "b.npy").unlink()
        assert "only one of 'b'" in said(tmp_path / "f")


class TestTasks:
    def test_views_are_of_one_part_and_repeat_themselves(self) -> None:
        one, two = load_views(5, views=2, unseen_views=1), load_views(5, views=2, unseen_views=1)
        parts = [one.train, one.test, one.held_out]
        digits = [set((part.ids // STRIDE).tolist()) for part in parts]
        assert sum(map(len, digits)) == len(set.union(*digits)) == 1797
        assert len(one.train) == 2 * len(digits[0]) and list(one.train.visual.shape[1:]) == [1, 16, 8]
        assert torch.equal(one.train.visual, two.train.visual) and torch.equal(one.test.other, two.test.other)
        assert not torch.equal(one.train.visual[0], one.train.visual[1])
        assert not torch.equal(load_views(6, views=2, unseen_views=1).test.visual, one.test.visual)
        split = make_scenario(replace(TASKS["digit-views"], load=lambda seed: one), "instances", 0)
        gone, kept = (set((part.ids // STRIDE).tolist()) for part in (split.forget, split.retain))
        assert not gone & kept and len(gone) == round(0.1 * len(digits[0])) and len(split.forget) == 2 * len(gone)
        with pytest.raises(ValueError, match="views"):
            load_views(0, views=0)

    def test_parts_of_a_comparison_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        task = TASKS["digits-halves"]
        config = UnlearnConfig(budget=Budget(steps=2))
        quick = replace(
            task,
            load=lambda seed: Halves(*(part[torch.arange(0, len(part), 5)] for part in vars(task.load(seed)).values())),
            training=TrainConfig(epochs=1),
            ccu={s: replace(config, forget=s) for s in ("class", "instances")},
            left_out=tuple(METHODS.keys() - {"ccu", "fine_tune"}),
        )
        monkeypatch.setattr(comparing, "DEEP", ("ccu",))
        monkeypatch.setitem(TASKS, "digits-halves", quick)
        monkeypatch.setattr(figures, "embedding_map", quick_map)
        heard: list[str] = []
        call = partial(
            comparing.compare,
            tmp_path,
            tasks=["digits-halves"],
            progress=lambda stage, *_: heard.append(stage),
        )
        first = call(scenarios=["class"], seeds=[0])
        assert len(list((tmp_path / "models").iterdir())) == 2
        heard.clear()
        both = call(seeds=[0])
        assert not any(", class," in stage for stage in heard) and any(", instances," in stage for stage in heard)
        assert not any(stage.endswith(": original") for stage in heard)  # trained once for both scenarios
        part = both["unlearn"]["digits-halves"]["class"]["0"]
        assert part == first["unlearn"]["digits-halves"]["class"]["0"]
        assert part["best_baseline"] == "fine_tune" and part["metrics"]["ccu"]["relearn_steps"] >= 0
        from ccu_fast.cli.report.page import write_comparison

        write_comparison(both, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert faults(page) == [] and page.index("from retraining") < page.index("<h2>")
        assert page.count("<h4>") == 2 and "Below the heads" in page and "fine-tuning" in page
        stored = json.loads((tmp_path / "results.json").read_text())
        assert "embeddings" not in stored["unlearn"]["digits-halves"]["class"]["0"]
        monkeypatch.setattr(comparing, "FORMAT", comparing.FORMAT + 1)
        heard.clear()
        call(scenarios=["class"], seeds=[0])
        assert heard

    def test_tasks_of_ones_own_are_compared(self, tmp_path: Path) -> None:
        features = TASKS["digit-features"]
        halves = features.load(0)
        own = replace(
            features,
            name="own",
            load=lambda seed: Halves(*(part[torch.arange(0, len(part), 5)] for part in vars(halves).values())),
            training=TrainConfig(epochs=1),
            ccu={s: replace(config, budget=Budget(steps=2)) for s, config in features.ccu.items()},
        )
        call = partial(comparing.compare, tmp_path, scenarios=["class"], seeds=[0], methods=["gold_again", "ccu"])
        found = call(tasks=[own])
        assert found == call(tasks={"any": own})
        part = found["unlearn"]["own"]["class"]["0"]
        assert list(part["metrics"]) == ["original", "gold_mask", "gold_again", "ccu"]
        assert part["metrics"]["gold_again"] != part["metrics"]["gold_mask"] and part["best_baseline"] is None
        # With other methods it is a part of its own.
        assert list(call(tasks=[own], methods=["fine_tune"])["unlearn"]["own"]["class"]["0"]["metrics"])[2:] == [
            "fine_tune"
        ]
        assert len(list((tmp_path / "parts").iterdir())) == 2
        with pytest.raises(ValueError, match=r"tasks: expected every name once, got \['own', 'own'\]"):
            call(tasks=[own, own])
        with pytest.raises(ValueError, match="tasks: expected one of"):
            call(tasks=["own"])
        with pytest.raises(ValueError, match="methods: expected one of"):
            call(tasks=[own], methods=["magic"])

    def test_a_task_that_is_kept_back_has_the_defaults(self) -> None:
        assert [name for name, task in TASKS.items() if task.kept_back] == ["digit-features"]
        for name, config in TASKS["digit-features"].ccu.items():
            assert config == UnlearnConfig(forget=name, trainable=config.trainable)

    @pytest.mark.parametrize("name", ["class", "instances"])
    def test_what_is_held_out_is_unseen_and_of_the_classes_that_stay(self, name: str) -> None:
        split = make_scenario(TASKS["digits-halves"], name, 0)
        parts = [split.train, split.retain_test, split.held_out, *([split.forget_test] if split.forget_test else [])]
        ids = torch.cat([part.ids for part in parts])
        assert len(ids.unique()) == len(ids) and len(split.held_out) == (162 if name == "class" else 180)
        assert set(split.held_out.labels.tolist()) == set(split.retain.labels.tolist())


def test_saved_weights_are_those_of_the_model(tmp_path: Path) -> None:
    model = toy_unlearn.trained()
    written = save_model(model, tmp_path / "m.safetensors", {"seed": 1})
    state, provenance = load_model(tmp_path / "m.safetensors")
    assert provenance == written and provenance["seed"] == 1
    copy = toy_unlearn.make_model()
    copy.load_state_dict(state)
    assert torch.equal(weights(copy), weights(model))
