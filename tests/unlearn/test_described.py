"""The model card from Python: the text that the command writes for the same run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from ccu_fast import unlearn
from ccu_fast.cli.main import main
from ccu_fast.unlearn import Budget, UnlearnConfig, model_card
from ccu_fast.unlearn.job import load, split
from ccu_fast.unlearn.settings import read_job
from tests.support import toy_unlearn

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "tests.support.toy_unlearn:make_model"


@pytest.mark.parametrize("forget", ["classes = [1]", 'kind = "instances"\nids = [3, 9]'])
def test_python_and_the_command_write_the_same_card(tmp_path: Path, forget: str) -> None:
    toy_unlearn.saved(tmp_path, pairs=toy_unlearn.toy())
    settings = tmp_path / "settings.toml"
    settings.write_text(f"{toy_unlearn.SETTINGS}[forget]\n{forget}\n[budget]\nsteps = 3\n")
    main(["unlearn", str(settings), "--out", str(tmp_path / "out"), "--quiet"])
    job = read_job(settings)
    model, data, names, *_ = load(job)
    sets = split(data, job, names)
    clean = unlearn(model, *sets, job.config)
    card = model_card(clean, model, *sets, name=NAME)
    assert card == (tmp_path / "out" / "card.md").read_text()
    assert "in 3 of 3 steps" in card


def test_a_card_of_test_items_is_judged_by_them() -> None:
    model, (forget, retain) = toy_unlearn.trained(), toy_unlearn.split("instances")
    config = UnlearnConfig(forget="instances", budget=Budget(steps=2))
    test = toy_unlearn.toy(seed=1)
    test = type(test)(test.visual, test.other, test.labels, test.ids + 1000)
    card = model_card(unlearn(model, forget, retain, config), model, forget, retain, name=NAME, test=test)
    assert f"| test | {len(test)} |" in card and "| test: visual, accuracy |" in card and "| unseen | – | – |" in card


def test_what_cannot_be_described_is_named() -> None:
    model, sets = toy_unlearn.trained(), toy_unlearn.split("instances")
    clean = unlearn(model, *sets, UnlearnConfig(forget="instances", budget=Budget(steps=1)))
    with pytest.raises(ValueError, match=r"clean: expected a model that ccu_fast.unlearn returned in this process"):
        model_card(copy.deepcopy(clean), model, *sets, name=NAME)
    with pytest.raises(ValueError, match="name: expected open_clip:NAME, hf:FOLDER or module:function, got 'toy'"):
        model_card(clean, model, *sets, name="toy")
