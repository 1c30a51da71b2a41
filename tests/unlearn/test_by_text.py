"""Membership by text alone as a part of ccu-fast unlearn: of a run, of a comparison, killed, refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ccu_fast.cli.app import app
from ccu_fast.cli.report import figures
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.provenance import save_model
from ccu_fast.unlearn.audit import gibberish_of, text_membership, text_questions, told_apart
from ccu_fast.unlearn.audit.text_questions import (
    FIGURES,
    TextAudit,
    TextQuestions,
    before_and_after,
    compared,
)
from ccu_fast.unlearn.job import load, opened, questions_of, run_job, split
from ccu_fast.unlearn.settings import Job, read_job
from ccu_fast.unlearn.study import own
from ccu_fast.unlearn.study.own import compare_own
from tests.support import toy_unlearn
from tests.support.forked import fork
from tests.support.small_demo import quick_map
from tests.support.toy_unlearn import make_model, toy

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = np.array(["ant", "bee", "cat", "dog"])
PLAIN = f"""{toy_unlearn.SETTINGS}unseen = "unseen.npz"
[forget]
kind = "instances"
ids = [3, 9, 12, 25, 31]
[budget]
steps = 6
batch = 20
[compare]
methods = ["ssd", "ccu"]
relearn = false
probe = false
"""
ASKED = PLAIN + "[audit]\ntext_membership = {gibberish = 40, restarts = 2, steps = 3}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy_unlearn.saved(tmp_path, NAMES, pairs=toy(), unseen=toy(24, seed=5), test=toy(40, seed=6))
    monkeypatch.setattr(figures, "embedding_map", quick_map)
    return tmp_path


def job(folder: Path, text: str = ASKED, **overrides: dict[str, Any]) -> Job:
    (folder / "settings.toml").write_text(text)
    return read_job(folder / "settings.toml", overrides)


def with_test(text: str = ASKED) -> str:
    return text.replace("[forget]", 'test = "test.npz"\n[forget]')


def said(*words: str) -> str:
    done = CliRunner().invoke(app, ["unlearn", *words], env={"COLUMNS": "80"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return f"{done.exit_code} {done.output} {done.stderr}"


def stored(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "results.json").read_text())
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are searched from now on."""
    asked: list[Any] = []
    plain = text_questions.text_membership
    monkeypatch.setattr(
        text_questions,
        "text_membership",
        lambda model, *rest, **more: (asked.append(model), plain(model, *rest, **more))[1],
    )
    return asked


def killed_at(stage: str, work: Callable[..., Any]) -> None:
    """Run ``work(progress=…)`` in a child that is killed at the end of a stage."""

    def kill(told: str, done: int, total: int, note: str) -> None:
        if told == stage and done == total:
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork(partial(work, progress=kill))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


class TestRun:
    def test_figures_are_those_of_the_search_by_hand(self, folder: Path) -> None:
        of = job(folder)
        result = run_job(of, folder / "out")
        found = result["text_membership"]
        _, data, names, unseen, _ = load(of)
        forget, _ = split(data, of, names)
        texts = torch.cat([forget.other, unseen.other])
        members = torch.arange(len(texts)) < 5
        low, high = (float(end) for end in unseen.visual.aminmax())
        questions = questions_of(opened(of))
        assert questions is not None and torch.equal(questions.texts, texts) and torch.equal(questions.members, members)
        assert (low, high) == questions.bounds and torch.equal(questions.gibberish, gibberish_of(unseen.other, 40))
        assert low <= questions.starts.min() < low + 0.4 * (high - low) < questions.starts.max() <= high
        for name, model in (("before", toy_unlearn.trained()), ("after", written(folder / "out"))):
            asked = text_membership(
                model,
                texts,
                questions.gibberish,
                questions.starts,
                steps=3,
                rate=0.05 * (high - low),
                bounds=(low, high),
            )
            assert found[name] == {**told_apart(asked, members), "flagged": int(asked.flags.sum())}
        assert found["before"] != found["after"]
        assert (found["forgotten"], found["new"], found["settings"]["items"]) == (5, 24, 200)
        assert found["chance"] == {
            "precision": 5 / 29,
            "auc": 0.5,
            "error": pytest.approx(2 * (30 / (12 * 120)) ** 0.5),
        }
        assert stored(folder, "out")["text_membership"] == found

    def test_data_on_a_disk_are_asked_the_same(self, folder: Path) -> None:
        held, read = (
            run_job(job(folder, ASKED.replace("[forget]", f"memory = {memory}\n[forget]")), folder / str(memory))
            for memory in (1024, 0)
        )
        assert opened(read_job(folder / "settings.toml")).unseen.on_disk  # type: ignore[union-attr]
        assert held["text_membership"] == read["text_membership"]

    def test_with_test_items_these_are_the_new_ones_and_of_a_class_its_own(self, folder: Path) -> None:
        questions = questions_of(opened(job(folder, with_test())))
        assert questions is not None and torch.equal(questions.texts[5:], toy(40, seed=6).other)
        text = with_test().replace('kind = "instances"\nids = [3, 9, 12, 25, 31]', 'classes = ["bee"]')
        questions = questions_of(opened(job(folder, text)))
        fresh = toy(40, seed=6)
        assert questions is not None and torch.equal(questions.texts[15:], fresh.other[fresh.labels == 1])

    def test_the_command_says_it_in_the_terminal_the_page_and_the_card(self, folder: Path) -> None:
        job(folder, ASKED.replace("text_membership = {", "text_membership = {items = 4, "))
        told = said(str(folder / "settings.toml"), "--out", str(folder / "out"))
        found = stored(folder, "out")["text_membership"]
        assert (found["forgotten"], found["new"]) == (4, 4)
        page, card = ((folder / "out" / name).read_text() for name in ("report.html", "card.md"))
        for text in (" ".join(told.split()), page, card):
            assert "Membership from text alone, of 4 forgotten and 4 new items" in text and found["text"] in text
        for title in ("precision", "recall", "false alarms", "AUC of score", "AUC of similarity", "flagged texts"):
            assert title in told and f'<th scope="row">{title}</th>' in page and f"| {title} |" in card
        table = told[told.index("Membership from text alone") :].splitlines()
        assert [line for line in table if str(folder) not in line and len(line) > 80] == []

    def test_without_it_nothing_else_changes_and_it_may_be_asked_for_later(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = counted(monkeypatch)
        words = [str(folder / "settings.toml"), "--quiet", "--out"]
        job(folder, PLAIN)
        said(*words, str(folder / "out"))
        assert not asked
        plain, weights = stored(folder, "out"), (folder / "out" / "model.safetensors").read_bytes()
        assert "text alone" not in (folder / "out" / "report.html").read_text()
        trained: list[int] = []
        monkeypatch.setattr(torch.optim.Adam, "step", counting(trained, torch.optim.Adam.step))
        said(*words, str(folder / "out"), "--text-membership")
        later = stored(folder, "out")
        assert len(asked) == 2 and len(trained) == 2 * 2 * 40  # of the searches of both models alone
        assert later.pop("text_membership")["settings"] == asdict(TextAudit())
        for result in (plain, later):
            result["cost"].pop("seconds")
        assert later == plain and (folder / "out" / "model.safetensors").read_bytes() == weights
        said(*words, str(folder / "out"))
        assert "text_membership" not in stored(folder, "out")

    def test_a_killed_one_does_not_ask_again_what_it_knows(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        of = job(folder)
        whole = run_job(of, folder / "whole")
        killed_at("text membership, after", partial(run_job, of, folder / "out"))
        assert (folder / "out" / "checkpoint.text_before.pt").is_file()
        asked = counted(monkeypatch)
        again = run_job(of, folder / "out")
        assert len(asked) == 1 and again["text_membership"] == whole["text_membership"]
        assert again["losses"] == whole["losses"] and not [*(folder / "out").glob("checkpoint.*.pt")]

    def test_nor_one_that_was_killed_at_its_page(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def killed(_: Any) -> None:
            raise KeyboardInterrupt

        of = job(folder)
        with pytest.raises(KeyboardInterrupt):
            run_job(of, folder / "out", report=killed)
        asked = counted(monkeypatch)
        run_job(of, folder / "out", report=lambda _: None)
        assert not asked and not [*(folder / "out").glob("checkpoint.*.pt")]

    def test_what_other_questions_were_answered_is_not_used(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = run_job(job(folder, ASKED.replace("steps = 3", "steps = 4")), folder / "whole")
        killed_at("text membership, after", partial(run_job, job(folder), folder / "out"))
        asked = counted(monkeypatch)
        again = run_job(job(folder, ASKED.replace("steps = 3", "steps = 4")), folder / "out")
        assert len(asked) == 2 and again["text_membership"] == whole["text_membership"]

    def test_a_model_that_embeds_everything_alike_has_no_figures(self, folder: Path) -> None:
        flat = make_model()
        with torch.no_grad():
            for name, parameter in flat.named_parameters():
                if "visual_tower" in name:
                    parameter.zero_()
        save_model(flat, folder / "weights.safetensors", {})
        told = said(str(job_file(folder)), "--out", str(folder / "out"))
        found = stored(folder, "out")["text_membership"]
        assert found["before"] == dict.fromkeys(FIGURES)
        assert "Nothing could be measured before unlearning" in found["text"] and found["text"] in " ".join(
            told.split()
        )
        assert "| precision | – |" in (folder / "out" / "card.md").read_text()


def job_file(folder: Path) -> Path:
    job(folder)
    return folder / "settings.toml"


def written(out: Path) -> Any:
    from ccu_fast.runs.provenance import load_model

    model = make_model()
    model.load_state_dict(load_model(out / "model.safetensors")[0])
    return model


def counting(calls: list[int], plain: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, *rest: Any, **more: Any) -> Any:
        calls.append(1)
        return plain(self, *rest, **more)

    return step


class TestCompared:
    def test_every_model_is_asked_the_same(self, folder: Path) -> None:
        of = job(folder, with_test())
        results = compare_own(replace(of, compare=replace(of.compare, seeds=2)), folder / "out")
        by_seed = results["unlearn"]["pairs.npz"]["instances"]
        questions = questions_of(opened(of))
        assert questions is not None
        for value in by_seed.values():
            found = {name: values["text_membership"] for name, values in value["metrics"].items()}
            assert list(found) == ["original", "ssd", "ccu"]
            assert found["original"] == questions.figures(toy_unlearn.trained(), name="any")
            labels = {values["label"]: values["text_membership"] for values in value["metrics"].values()}
            assert value["text_membership"] == {**questions.asked, "text": compared(questions.chance, labels)}
        assert by_seed["0"]["metrics"]["ccu"]["text_membership"] == questions.figures(ccu(of), name="any")

    def test_the_command_says_it_too(self, folder: Path) -> None:
        job(folder, with_test())
        told = said(str(folder / "settings.toml"), "--compare", "--out", str(folder / "out"))
        assert told.startswith("0 ")
        page = (folder / "out" / "report.html").read_text()
        for text in (" ".join(told.split()), page):
            assert "Membership from text alone, of 5 forgotten and 40 new items (precision by chance 0.11)" in text
            assert "means that text alone tells no forgotten item from one that was never trained on" in text
        assert '<th scope="col">AUC of similarity</th>' in page
        assert max(len(line) for line in told[2:].splitlines() if str(folder) not in line) <= 80
        told = said(str(folder / "settings.toml"), "--compare", "--out", str(folder / "out"), "--seeds", "2")
        assert "An AUC within chance" in " ".join(told.split()) and "Outside it" not in told

    def test_it_may_be_asked_for_later_and_left_out_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = counted(monkeypatch)
        plain = compare_own(job(folder, with_test(PLAIN)), folder / "out")
        parts = {path.name: path.read_bytes() for path in (folder / "out" / "parts").iterdir()}
        assert set(parts) == {"original.json", "ssd-seed0.json", "ccu-seed0.json"} and not asked
        later = compare_own(job(folder, with_test()), folder / "out")
        assert len(asked) == 3
        assert {name: (folder / "out" / "parts" / name).read_bytes() for name in parts} == parts
        whole = compare_own(job(folder, with_test()), folder / "whole")
        one, two = (r["unlearn"]["pairs.npz"]["instances"]["0"] for r in (later, whole))
        assert one["metrics"] == two["metrics"] and one["text_membership"] == two["text_membership"]
        assert compare_own(job(folder, with_test(PLAIN)), folder / "out") == plain and len(asked) == 6

    def test_a_killed_one_neither_unlearns_nor_asks_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        of = job(folder, with_test())
        whole = compare_own(of, folder / "whole")
        killed_at("seed 0: text membership, CCU", partial(compare_own, of, folder / "out"))
        names = {path.name for path in (folder / "out" / "parts").glob("*.json")}
        both = {f"{name}{what}.json" for name in ("original", "ssd-seed0") for what in ("", "-text")}
        assert names == {*both, "ccu-seed0.json"}
        asked, steps = counted(monkeypatch), list[int]()

        def told(stage: str, done: int, total: int, note: str) -> None:
            steps.extend([done] if stage == "seed 0: ccu" else [])

        again = compare_own(of, folder / "out", progress=told)
        assert len(asked) == 1 and steps in ([], [6])
        one, two = (r["unlearn"]["pairs.npz"]["instances"]["0"]["metrics"] for r in (again, whole))
        assert one == two and not [*(folder / "out" / "parts").glob("*.pt")]

    def test_a_method_without_a_model_is_not_asked(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = own.unlearned

        def unlearned(name: str, *rest: Any, **options: Any) -> Any:
            if name == "ssd":
                raise FloatingPointError("ssd: the loss is nan at step 3 of 6")
            return plain(name, *rest, **options)

        monkeypatch.setattr(own, "unlearned", unlearned)
        results = compare_own(job(folder, with_test()), folder / "out")
        assert list(results["unlearn"]["pairs.npz"]["instances"]["0"]["metrics"]) == ["original", "ccu"]
        assert not (folder / "out" / "parts" / "ssd-seed0-text.json").exists()


def ccu(of: Job) -> Any:
    from ccu_fast.unlearn.method import run_ccu

    given = opened(of)
    return run_ccu(given.model, given.forget, given.retain, given.job.config, unseen=given.unseen).model


class TestQuestions:
    def of(self, forget: PairedData, retain: PairedData, new: PairedData, **more: Any) -> TextQuestions:
        return TextQuestions.of(TextAudit(**more.pop("settings", {})), make_model(), forget, retain, new, **more)

    def test_a_text_is_asked_about_once_and_for_one_set(self) -> None:
        data, fresh = toy(30), toy(20, seed=5)
        other = fresh.other.clone()
        other[3], other[4], other[8] = data.other[2], data.other[22], other[7]  # of the forget set, retained, one twice
        kept = data.other.clone()
        kept[25] = kept[6]  # a forgotten text that stays
        forget, retain = (PairedData(data.visual[i], kept[i]) for i in (slice(0, 10), slice(10, 30)))
        found = self.of(forget, retain, PairedData(fresh.visual, other))
        asked = [kept[i] for i in range(10) if i != 6] + [other[i] for i in range(20) if i not in (3, 4, 8)]
        assert torch.equal(found.texts, torch.stack(asked)) and found.members.tolist() == [True] * 9 + [False] * 17

    def test_one_view_of_a_thing_and_no_more_than_wanted(self) -> None:
        data, fresh = toy(30), toy(20, seed=5)
        found = self.of(data[torch.arange(12)], data[torch.arange(12, 30)], fresh, group=4)
        assert torch.equal(found.texts, torch.cat([data.other[:12:4], fresh.other[::4]]))
        few = {seed: self.of(data, fresh, toy(40, seed=7), seed=seed, settings={"items": 7}) for seed in (0, 1)}
        assert all(len(q.texts) == 14 and int(q.members.sum()) == 7 for q in few.values())
        assert not torch.equal(few[0].texts, few[1].texts) and not torch.equal(few[0].starts, few[1].starts)
        same = self.of(data, fresh, toy(40, seed=7), settings={"items": 7})
        assert same.about == few[0].about != few[1].about

    def test_a_few_pictures_are_searched_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[int] = []
        monkeypatch.setattr(text_questions, "text_membership", lambda *_, chunk, **__: given.append(chunk) or 1 / 0)
        found = self.of(toy(10), toy(10, seed=1), toy(10, seed=2))
        for shape in ((4, 3), (4, 3, 224, 224), (2, 2**25)):
            with pytest.raises(ZeroDivisionError):
                replace(found, starts=torch.empty(shape)).figures(make_model(), name="any")
        assert given == [1024, 111, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"new": None}, "text_membership: expected at least 2 new items of what is forgotten .*, got 0"),
            ({"new": toy(1, seed=5)}, "text_membership: expected at least 2 new items .*, got 1"),
            (
                {"retain": toy(10)},
                "text_membership: expected some forgotten items whose text no retained item has, got",
            ),
            (
                {"new": toy(10)},
                "text_membership: expected some new items whose text was not trained on, got none among 10",
            ),
            ({"new": "uint8"}, "text_membership: expected floating-point visual inputs, which .*, got uint8"),
            (
                {"new": "ids"},
                "text_membership: expected floating-point numbers as other, or the name of a CLIP.* got int64",
            ),
            ({"new": "flat"}, r"text_membership: expected visual inputs that differ, got 1.0 everywhere"),
        ],
    )
    def test_what_cannot_be_is_refused(self, change: dict[str, Any], message: str) -> None:
        fresh = toy(10, seed=5)
        odd = {
            "uint8": PairedData(fresh.visual.byte(), fresh.other),
            "ids": PairedData(fresh.visual, fresh.other.long()),
            "flat": PairedData(torch.ones_like(fresh.visual), fresh.other),
        }
        sets = {"forget": toy(10), "retain": toy(20, seed=1), "new": fresh}
        sets |= {name: odd[value] if isinstance(value, str) else value for name, value in change.items()}
        with pytest.raises(ValueError, match=message):
            self.of(**sets)


CHANCE = {"precision": 0.5, "auc": 0.5, "error": 0.1}


def areas(auc: float | None, similarity: float | None = 0.5) -> dict[str, float | None]:
    return {"auc": auc, "similarity_auc": None if auc is None else similarity}


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (areas(0.9), areas(0.55), "After unlearning the AUC is within chance (0.55 and 0.50; chance is 0.50 ± 0.10)"),
        (areas(0.9), areas(0.5, 0.35), "Text alone tells forgotten items from new ones after unlearning too"),
        (areas(0.55), areas(0.61), "the unlearning may have left a trace (by chance one of two AUCs"),
        (areas(0.55), areas(0.45), "so there was nothing to take away"),
        (areas(None), areas(0.5), "Nothing could be measured before unlearning"),
        (areas(0.5), areas(None), "Nothing could be measured after unlearning"),
    ],
)
def test_what_figures_come_to_is_said_in_one_sentence(before: Any, after: Any, text: str) -> None:
    found = before_and_after(CHANCE, before, after)
    assert text in found and found.endswith(".") and ". " not in found


def test_too_few_items_tell_nothing_and_are_not_said_to() -> None:
    few = {"precision": 0.02, "auc": 0.5, "error": 0.59}
    text = "There are too few items to tell anything by: chance is 0.50 ± 0.59, and no AUC can be outside it"
    assert before_and_after(few, areas(1.0, 0.1), areas(0.8)) == f"{text} (before 1.00 and 0.10, after 0.80 and 0.50)."
    assert compared(few, {"first": areas(1.0)}) == f"{text}."


def test_a_comparison_names_who_is_beyond_chance() -> None:
    found = compared(
        CHANCE, {"first": areas(0.9), "second": areas(0.58), "third": areas(None), "last": areas(0.5, 0.3)}
    )
    assert found.startswith("An AUC within chance, 0.50 ± 0.10, means")
    assert found.endswith("Outside it: first (0.90 and 0.50), last (0.50 and 0.30).")
    assert compared(CHANCE, {"first": areas(0.5)}).endswith("No model is outside it, not even before unlearning.")


class TestRefused:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('unseen = "unseen.npz"\n', "", r"text_membership: expected unseen or test in \[data\] of .*, got none"),
            ("{gib", "{items = 0, gib", r"settings \[audit\] text_membership items: expected an int at least 1, got 0"),
            ("= 40", "= 39", r"settings \[audit\] text_membership gibberish: expected an int at least 40, got 39"),
            ("restarts = 2", "restarts = 1", r"text_membership restarts: expected an int at least 2, got 1"),
            ("steps = 3}", 'steps = "3"}', r"settings \[audit\] text_membership steps: expected an int, got str"),
            ("{gib", "{rate = 1, gib", r"settings \[audit\] text_membership: expected one of .*, got 'rate'"),
            ("[audit]\n", "[audit]\nimages = true\n", r"settings \[audit\]: expected one of .*, got 'images'"),
            (
                "text_membership = {",
                "text_membership = 3 # {",
                r"settings \[audit\]: expected true, false or a table as",
            ),
        ],
    )
    def test_settings_that_cannot_be(self, folder: Path, old: str, new: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            job(folder, ASKED.replace(old, new, 1))

    def test_true_and_flags(self, folder: Path) -> None:
        off = PLAIN + "[audit]\ntext_membership = false\n"
        assert job(folder, PLAIN).text is None is job(folder, off).text
        assert job(folder, off.replace("false", "true")).text == TextAudit() == TextAudit(200, 128, 4, 40)
        flag = {"audit": {"text_membership": True}}
        assert job(folder, PLAIN, **flag).text == job(folder, off, **flag).text == TextAudit()
        assert job(folder, ASKED, **flag).text == TextAudit(gibberish=40, restarts=2, steps=3)

    @pytest.mark.parametrize("words", [[], ["--compare"]])
    def test_the_command_says_it_before_the_work(
        self, folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("job.run_ccu", "study.own.unlearned"):
            monkeypatch.setattr(f"ccu_fast.unlearn.{name}", lambda *_, **__: pytest.fail("it worked"))
        words = [str(folder / "settings.toml"), *words, "--out", str(folder / "out"), "--text-membership"]
        job(folder, PLAIN.replace('unseen = "unseen.npz"\n', ""))
        told = said(*words)
        assert told.startswith("1 ") and "--text-membership: expected unseen or test in [data]" in " ".join(
            told.split()
        )
        data = toy()
        np.savez(folder / "new.npz", visual=data.visual, other=data.other, labels=NAMES[data.labels])
        job(folder, PLAIN.replace("[forget]", 'test = "new.npz"\n[forget]'))
        told = said(*words)
        assert told.startswith("1 ") and "new items whose text was not trained on, got none" in " ".join(told.split())
        assert not (folder / "out").exists()

    def test_it_is_of_own_data(self, tmp_path: Path) -> None:
        told = said("--compare", "--text-membership", "--out", str(tmp_path / "out"))
        assert told.startswith("2 ") and "expected --text-membership only with a settings file" in told


def test_a_class_none_of_whose_texts_is_new_is_refused(folder: Path) -> None:
    text = ASKED.replace('kind = "instances"\nids = [3, 9, 12, 25, 31]', 'classes = ["bee"]')
    fresh = toy(24, seed=5)
    rest = fresh[fresh.labels != 1]
    np.savez(folder / "unseen.npz", visual=rest.visual, other=rest.other, labels=NAMES[rest.labels])
    with pytest.raises(ValueError, match=r"text_membership: expected at least 2 new items .* of that class.*, got 0"):
        run_job(job(folder, text), folder / "out")
    assert not (folder / "out").exists()
