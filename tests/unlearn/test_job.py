"""Unseen items of a user's run: how they are read, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ccu_fast.runs.provenance import load_model, save_model
from ccu_fast.unlearn.job import _data_hash, load, run_job
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.settings import read_job
from tests.support import toy_unlearn
from tests.support.toy_unlearn import toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = np.array(["ant", "bee", "cat", "dog"])
TOML = """
[model]
make = "tests.support.toy_unlearn:make_model"
weights = "weights.safetensors"
[data]
path = "pairs.npz"
unseen = "unseen.npz"
[forget]
kind = "instances"
ids = [3, 9, 12, 25, 31]
[budget]
steps = 12
batch = 20
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data, fresh = toy(), toy(24, seed=5)
    np.savez(tmp_path / "pairs.npz", visual=data.visual, other=data.other, labels=NAMES[data.labels], ids=data.ids)
    # Without ants: the numbers of the other classes are not those of the data.
    rest = fresh[fresh.labels > 0]
    np.savez(tmp_path / "unseen.npz", visual=rest.visual, other=rest.other, labels=NAMES[rest.labels])
    save_model(toy_unlearn.trained(), tmp_path / "weights.safetensors", {"seed": 0})
    (tmp_path / "settings.toml").write_text(TOML)
    return tmp_path


def test_unseen_items_have_the_labels_of_the_data_and_ids_of_their_own(folder: Path) -> None:
    job = read_job(folder / "settings.toml")
    assert job.unseen == folder / "unseen.npz" and job.options == read_job(folder / "settings.toml").options
    _, data, _, unseen = load(job)
    assert unseen is not None
    expected = toy(24, seed=5)
    assert torch.equal(unseen.labels, expected.labels[expected.labels > 0])
    assert not torch.isin(unseen.ids, data.ids).any() and len(unseen.ids.unique()) == len(unseen)
    (folder / "settings.toml").write_text(TOML.replace('unseen = "unseen.npz"\n', ""))
    assert load(read_job(folder / "settings.toml"))[3] is None


def test_a_run_goes_to_their_level_and_is_judged_by_them(folder: Path) -> None:
    job = read_job(folder / "settings.toml")
    result = run_job(job, folder / "out")
    assert result is not None
    model, data, _, unseen = load(job)
    gone = torch.isin(data.ids, torch.tensor([3, 9, 12, 25, 31]))
    plain = run_ccu(model, data[gone], data[~gone], job.config, unseen=unseen).model
    blind = run_ccu(model, data[gone], data[~gone], job.config).model
    written = toy_unlearn.make_model()
    written.load_state_dict(load_model(folder / "out" / "model.safetensors")[0])
    assert torch.equal(weights(written), weights(plain)) and not torch.equal(weights(written), weights(blind))
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert stored["sizes"]["unseen items"] == len(unseen)
    names = [name for name, *_ in stored["rows"]]
    assert "unseen: visual, accuracy" in names and names[-1] == "membership of forgotten against unseen, AUC"
    assert stored["verdict"]["kind"] != "undecided"
    assert stored["provenance"]["unseen_sha256"] == _data_hash(unseen)


def test_of_a_forgotten_class_unseen_items_are_to_be_forgotten_too(folder: Path) -> None:
    fresh = toy(60, seed=5)
    np.savez(folder / "unseen.npz", visual=fresh.visual, other=fresh.other, labels=NAMES[fresh.labels])
    text = TOML.replace('kind = "instances"\nids = [3, 9, 12, 25, 31]', 'kind = "class"\nclasses = ["bee"]')
    (folder / "settings.toml").write_text(text.replace("steps = 12", "steps = 40"))
    result = run_job(read_job(folder / "settings.toml"), folder / "out")
    assert result is not None
    assert result["sizes"]["unseen, to forget items"] == int((fresh.labels == 1).sum())
    after = {name: value for name, _, value in result["rows"]}
    assert after["unseen, to forget: visual, accuracy"] < 0.1 < 0.9 < after["unseen: visual, accuracy"]
    # Against all unseen items the area would be near 0: other classes are still known.
    assert abs(after["membership of forgotten against unseen, AUC"] - 0.5) < 0.25
    assert result["verdict"]["kind"] == "passed"


def test_unseen_items_are_no_views_of_a_thing_of_the_data(folder: Path) -> None:
    (folder / "settings.toml").write_text(TOML + "[ccu]\ngroup = 7\n")
    _, data, _, unseen = load(read_job(folder / "settings.toml"))
    assert unseen is not None
    assert not torch.isin(unseen.ids // 7, data.ids // 7).any()


def test_a_folder_of_other_files_is_refused_before_a_lock_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text("mine")
    monkeypatch.setattr("ccu_fast.unlearn.job.locked", lambda *_: pytest.fail("a lock was made"))
    with pytest.raises(FileExistsError, match=r"out: expected a folder without results.json"):
        run_job(read_job(folder / "settings.toml"), folder / "out", fresh=True)
    assert [file.name for file in (folder / "out").iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"unseen.npz"', '"pairs.npz"', r"settings: expected other pairs as unseen in \[data\]"),
        ('"unseen.npz"', '"./pairs.npz"', r"settings: expected other pairs as unseen in \[data\]"),
        ('"unseen.npz"', '"nothing.npz"', "path: expected an existing folder, .npz or .csv file, got .*nothing.npz"),
        ('"unseen.npz"', "7", r"settings: expected text as unseen in \[data\] of .*, got 7"),
        ('"unseen.npz"', '""', r"settings: expected text as unseen in \[data\] of .*, got ''"),
        ('"weights.safetensors"', '" "', r"settings: expected text as weights in \[model\] of .*, got ' '"),
        ('path = "pairs.npz"', "", r"settings: expected text as path in \[data\] of .*, got none"),
        # What the data cannot be used for with these settings, and not the data alone.
        ("[budget]", '[ccu]\ntrainable = ["tower.*"]\n[budget]', "trainable: expected patterns of parameter names"),
        ("[budget]", '[ccu]\ntrainable = ["other_*"]\n[budget]', 'keep: expected keep="trained"'),
        ('"unseen.npz"', '"elephants.npz"', "unseen: expected classes of the data, got elephant in .*elephants.npz"),
        ('"unseen.npz"', '"plain.npz"', "unseen: expected labels as in forget, got none"),
    ],
)
def test_unseen_items_that_cannot_be(folder: Path, old: str, new: str, message: str) -> None:
    data = toy(8, seed=6)
    np.savez(folder / "elephants.npz", visual=data.visual, other=data.other, labels=np.array(["elephant"] * 8))
    np.savez(folder / "plain.npz", visual=data.visual, other=data.other)
    (folder / "settings.toml").write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=message):
        run_job(read_job(folder / "settings.toml"), folder / "out")
    assert not (folder / "out").exists()
