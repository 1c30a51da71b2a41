"""ccu-fast unlearn where it fails: exit status 3, the alarm in the first line of everything, what to try next."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccu_fast.cli.main import main
from ccu_fast.runs.provenance import load_model, save_model
from ccu_fast.unlearn.alarms import BY_VERDICT, COLLAPSED, KEPT, NOT_FORGOTTEN, kept_places
from ccu_fast.unlearn.audit.verdict import KINDS
from tests.support import toy_unlearn
from tests.support.forked import fork
from tests.support.toy_unlearn import toy

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = np.array(["aardvark", "bandicoot", "capybara", "dingo"])
FILES = {"card.md", "checkpoint.pt", "model.safetensors", "report.html", "results.json"}


def settings(folder: Path, *, model: str = "", forget: str = 'classes = ["bandicoot"]', **budget: Any) -> list[str]:
    budget = {"steps": 30, "learning_rate": 5e-3, "batch": 20} | budget
    lines = "\n".join(f"{key} = {value}" for key, value in budget.items())
    (folder / "settings.toml").write_text(
        f'[model]\nmake = "tests.support.toy_unlearn:make_model"\nweights = "weights.safetensors"\n{model}\n'
        f'[data]\npath = "secret_pairs.npz"\n[forget]\n{forget}\n[budget]\n{lines}\n'
    )
    return ["unlearn", str(folder / "settings.toml"), "--out", str(folder / "out"), "--quiet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = toy()
    ids = np.array([f"img_{i:04}x" for i in range(len(data))])
    np.savez(tmp_path / "secret_pairs.npz", visual=data.visual, other=data.other, labels=NAMES[data.labels], ids=ids)
    save_model(toy_unlearn.trained(), tmp_path / "weights.safetensors", {"seed": 0})
    return tmp_path


def first_paragraph(page: Path) -> str:
    found = re.search("<p>(.*)</p>", page.read_text())
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("name", "budget", "why", "advice"),
    [
        (
            "retain collapsed",
            {"learning_rate": 1e6},
            "its visual embeddings correlate",
            "give it a lower --learning-rate or fewer steps",
        ),
        (
            "not forgotten",
            {"learning_rate": 1e-9},
            "visual accuracy on the forget set is 1.00, expected .00",
            "give it more steps or a higher --learning-rate",
        ),
    ],
)
def test_a_model_that_is_not_to_be_used(
    name: str, budget: Any, why: str, advice: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(settings(folder, **budget)) == 3
    out = folder / "out"
    assert {file.name for file in out.iterdir()} == FILES  # nothing is lost
    load_model(out / "model.safetensors")
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"ccu-fast unlearn: {name}: ") and why in first
    assert "not to be used as it is" in first and advice in first
    stored = json.loads((out / "results.json").read_text())
    assert next(iter(stored)) == "alarm" and stored["alarm"]["name"] == name and why in stored["alarm"]["why"]
    assert first_paragraph(out / "report.html").startswith(f"{name}: ")
    assert (out / "card.md").read_text().splitlines()[2].startswith(f"**{name}: ")
    # The finished run, asked for again, says the same.
    assert main(settings(folder, **budget)) == 3
    assert capsys.readouterr().err.splitlines()[0] == first


def test_no_alarm_where_all_is_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(settings(folder)) == 0
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert stored["alarm"] is None and stored["verdict"]["kind"] == "passed"
    assert first_paragraph(folder / "out" / "report.html").startswith("Verdict")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["settings", "flag"])
def test_nothing_trainable_is_said_before_the_work(
    given: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccu_fast.unlearn.job.run_ccu", None)
    if given == "flag":
        words = [*settings(folder), "--trainable", "audio_*"]
    else:
        words = settings(folder, model='trainable = ["audio_*"]')
    assert main(words) == 3
    said = capsys.readouterr().err
    assert said.startswith(
        "ccu-fast unlearn: nothing trainable matches: --trainable: expected patterns of parameter names ("
    )
    assert "got 'audio_*'" in said and said.endswith("choose trainable among the model's own names of parameters\n")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (["--trainable", "other_*"], 'got "exact", which leaves visual_tower.0.weight, '),
        (["--trainable", "*bias", "--lora", "2"], "such as visual_tower.0.weight, "),
        (["--trainable", "audio_*"], "(visual_tower.0.weight, "),
    ],
)
def test_names_that_may_be_trained_are_listed(
    words: list[str], listed: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*settings(folder), *words]) == 3
    said = capsys.readouterr().err
    assert listed in said and said.count("\n") == 1


def test_steps_to_infinity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(settings(folder, learning_rate=1e30)) == 3
    said = capsys.readouterr().err
    assert said.startswith(
        "ccu-fast unlearn: retain collapsed: unlearn: the loss is nan at step 2 of 30; give it a lower"
    )
    assert {file.name for file in (folder / "out").iterdir()} == {"report.html", "results.json"}
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert list(stored) == ["alarm"] and stored["alarm"]["name"] == "retain collapsed"
    assert first_paragraph(folder / "out" / "report.html").startswith("retain collapsed: unlearn: the loss is nan")
    # What it left is no reason to refuse a better run.
    assert main(settings(folder)) == 0
    assert {file.name for file in (folder / "out").iterdir()} == FILES
    assert json.loads((folder / "out" / "results.json").read_text())["alarm"] is None


def test_what_a_failed_run_left_does_not_give_other_files_away(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(settings(folder, learning_rate=1e30)) == 3
    (folder / "out" / "model.safetensors").write_text("mine")
    assert main(settings(folder)) == 1
    assert "out: expected a folder without model.safetensors" in capsys.readouterr().err
    assert (folder / "out" / "model.safetensors").read_text() == "mine"


def test_the_steps_are_not_blamed_for_the_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = toy()
    visual = torch.where(data.labels[:, None] == 2, math.nan, data.visual)
    np.savez(folder / "secret_pairs.npz", visual=visual, other=data.other, labels=NAMES[data.labels])
    assert main(settings(folder)) == 1
    said = capsys.readouterr().err
    assert said.startswith("ccu-fast unlearn: unlearn: the loss is nan at step 1 of 30") and "collapsed" not in said


def test_every_process_ends_alike(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = settings(folder, learning_rate=1e30)
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def one_of_two(rank: int) -> None:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        assert main(words) == 3

    children = [fork(partial(one_of_two, rank)) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert capfd.readouterr().err.count("retain collapsed: unlearn: the loss is nan") == 2
    assert list(json.loads((folder / "out" / "results.json").read_text())) == ["alarm"]


def test_the_card_names_nobody(folder: Path) -> None:
    ids = [f"img_{i:04}x" for i in (3, 9, 12)]
    for forget in ('classes = ["bandicoot"]', f'kind = "instances"\nids = {ids}'):
        main([*settings(folder, forget=forget, steps=2), "--fresh"])
        card = (folder / "out" / "card.md").read_text()
        for name in (*NAMES, *ids, "secret_pairs", str(folder)):
            assert name not in card
        stored = json.loads((folder / "out" / "results.json").read_text())
        made = stored["provenance"]
        for said in (made["forget_sha256"], made["retain_sha256"], made["weights_sha256"], made["original_sha256"]):
            assert len(said) == 64 and said in card
        assert f"| forget | {stored['sizes']['forget items']} |" in card and stored["verdict"]["text"] in card
        assert "| learning_rate | 0.005 |" in card and "| steps | 2 |" in card and "| dampen | None |" in card
        for name, version in made["versions"].items():
            assert f"| {name} | {version} |" in card
        for name, old, new in stored["rows"]:
            assert f"| {name} | {old:.4g} | {new:.4g} |" in card
        # What it says of loading works.
        code = re.search("```python\n(.*?)```", card, re.DOTALL)
        assert code is not None
        known: dict[str, Any] = {}
        exec(code[1].replace("model.safetensors", str(folder / "out" / "model.safetensors")), known)
        state, _ = load_model(folder / "out" / "model.safetensors")
        assert all(torch.equal(value, state[name]) for name, value in known["model"].state_dict().items())


def test_verdicts_and_places() -> None:
    assert BY_VERDICT.keys() <= set(KINDS) and set(BY_VERDICT.values()) == {COLLAPSED, NOT_FORGOTTEN}
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4000, 8, generator=generator)
    assert kept_places(x, 3 * x + 7) == pytest.approx(1)
    assert kept_places(x, -x) == pytest.approx(-1)
    # Noise of the same size leaves half of the variance.
    assert kept_places(x, x + noise) == pytest.approx(math.sqrt(0.5), abs=0.02) and pytest.approx(0.7) == KEPT
    assert kept_places(x, torch.full_like(x, math.nan)) == 0 and kept_places(x, torch.ones_like(x)) == 0
    assert kept_places(torch.ones(3, 2), x[:3, :2]) is None
