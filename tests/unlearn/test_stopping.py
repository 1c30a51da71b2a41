"""early_stop of the settings: unseen items of the user's tell when to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccu_fast.cli.main import main
from ccu_fast.runs.provenance import load_model, save_model
from ccu_fast.unlearn import HeldOut
from ccu_fast.unlearn.job import load, run_job
from ccu_fast.unlearn.settings import Stop, read_job
from ccu_fast.unlearn.stopping import held_out_of
from tests.support import toy_unlearn
from tests.support.toy_unlearn import GONE, accuracies, pairs, toy

pytestmark = pytest.mark.usefixtures("one_thread")


def write(folder: Path, *, forget: str = "classes = [1]", unseen: bool = True, **budget: Any) -> Path:
    budget = {"steps": 60, "learning_rate": "5e-3", "batch": 20} | budget
    lines = "\n".join(f"{key} = {value}" for key, value in budget.items())
    also = 'unseen = "unseen.npz"' if unseen else ""
    path = folder / "settings.toml"
    path.write_text(
        '[model]\nmake = "tests.support.toy_unlearn:make_model"\nweights = "weights.safetensors"\n[data]\n'
        f'path = "pairs.npz"\n{also}\n[forget]\n{forget}\n[budget]\n{lines}\n'
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in (("pairs", toy()), ("unseen", toy(40, seed=3))):
        np.savez(tmp_path / f"{name}.npz", visual=data.visual, other=data.other, labels=data.labels, ids=data.ids)
    save_model(toy_unlearn.trained(), tmp_path / "weights.safetensors", {"seed": 0})
    return tmp_path


def steps_and_accuracies(folder: Path, out: str, **budget: Any) -> tuple[int, float, dict[str, float]]:
    result = run_job(read_job(write(folder, **budget)), folder / out)
    model = toy_unlearn.make_model()
    model.load_state_dict(load_model(folder / out / "model.safetensors")[0])
    fresh = toy(40, seed=3)
    gone = toy()
    kept = accuracies(model, fresh[fresh.labels != GONE])
    return result["cost"]["steps"], accuracies(model, gone[gone.labels == GONE])["visual"], kept


def test_a_class_stops_at_the_first_check_where_it_is_gone(folder: Path) -> None:
    fresh = toy(40, seed=3)
    before = accuracies(toy_unlearn.trained(), fresh[fresh.labels != GONE])
    steps, gone, kept = steps_and_accuracies(folder, "one", early_stop="{every = 1}")
    assert 1 < steps < 60 and gone == 0
    assert all(kept[name] >= before[name] - 0.01 for name in kept)
    assert f"in {steps} of 60 steps" in (folder / "one" / "card.md").read_text()
    # A step earlier it was not so, and a run that is looked at less often goes on to its next check.
    fewer, still, intact = steps_and_accuracies(folder, "less", steps=steps - 1)
    assert fewer == steps - 1
    assert still > 0 or any(intact[name] < before[name] - 0.01 for name in intact)
    later, _, _ = steps_and_accuracies(folder, "later", early_stop="{every = 16, slack = 0.5}")
    assert later % 16 == 0 and steps <= later < 60
    assert steps_and_accuracies(folder, "never", early_stop="false")[0] == 60


def test_instances_stop_at_the_level_of_unseen_items(folder: Path) -> None:
    fresh = toy(40, seed=3)
    # Labels that are wrong for half of the unseen items: their level is below what the forget set starts from.
    labels = torch.where(torch.arange(40) < 20, (fresh.labels + 1) % 4, fresh.labels)
    np.savez(folder / "unseen.npz", visual=fresh.visual, other=fresh.other, labels=labels)
    forget = 'kind = "instances"\nids = [3, 9, 12, 25]'
    job = read_job(write(folder, forget=forget, early_stop="{every = 2, slack = 1.0}", learning_rate="2e-2"))
    model, _, _, unseen, _ = load(job)
    level = accuracies(model, unseen)["visual"]
    assert 0.4 < level < 0.6
    result = run_job(job, folder / "out")
    shares = {name: (old, new) for name, old, new in result["rows"]}["forget: visual, accuracy"]
    assert shares[0] == 1 and (shares[1] <= level or result["cost"]["steps"] == 60)
    assert result["cost"]["steps"] % 2 == 0 and result["cost"]["steps"] < 60


def test_pairs_stop_at_the_level_of_unseen_ones_among_both() -> None:
    """Partners of unseen pairs are sought among those to forget too, as they are while the run goes on."""
    torch.manual_seed(1)
    model: Any = toy_unlearn.TwoTowers()
    both = pairs(60)
    forget, unseen = both[both.ids < 40], both[both.ids >= 40]
    similarity = model.embed_visual(unseen.visual) @ model.embed_other(torch.cat([unseen.other, forget.other])).T
    own = torch.arange(20)
    first = (similarity.argmax(1) == own).double().mean().item()
    alone = (similarity[:, :20].argmax(1) == own).double().mean().item()
    found = held_out_of(model, forget, unseen, "pairs", Stop(slack=0.2, every=3))
    assert found.level == first < alone
    assert found.retain is unseen and (found.slack, found.every) == (0.2, 3)


def test_the_flag(folder: Path) -> None:
    words = ["unlearn", str(write(folder)), "--out", str(folder / "out"), "--quiet", "--early-stop"]
    assert main(words) == 0
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert stored["cost"]["steps"] < 60 and stored["provenance"]["config"]["early_stop"] is True


def test_another_rule_is_another_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(read_job(write(folder, early_stop="{every = 2}")), folder / "out")
    with pytest.raises(ValueError, match="checkpoint: expected the state of this run"):
        run_job(read_job(write(folder, early_stop="{every = 3}")), folder / "out")
    fresh = toy(36, seed=4)
    np.savez(folder / "unseen.npz", visual=fresh.visual, other=fresh.other, labels=fresh.labels)
    with pytest.raises(ValueError, match="checkpoint: expected the state of this run"):
        run_job(read_job(write(folder, early_stop="{every = 2}")), folder / "out")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"early_stop": "true", "unseen": False}, r"early_stop: expected unseen in \[data\] of"),
        ({"early_stop": "3"}, r"settings \[budget\]: expected true, false or a table as early_stop"),
        ({"early_stop": "{often = 3}"}, r"settings \[budget\] early_stop: expected one of \('slack', 'every'\)"),
        ({"early_stop": "{every = 0}"}, r"settings \[budget\] early_stop every: expected an int at least 1, got 0"),
        ({"early_stop": "{slack = -1}"}, r"settings \[budget\] early_stop slack: expected a finite number"),
    ],
)
def test_rules_that_cannot_be(given: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_job(write(folder, **given))


def test_unseen_items_of_the_forgotten_class_alone_tell_nothing(folder: Path) -> None:
    fresh = toy(40, seed=3)
    own = fresh[fresh.labels == GONE]
    np.savez(folder / "unseen.npz", visual=own.visual, other=own.other, labels=own.labels)
    with pytest.raises(ValueError, match="early_stop: expected unseen items of classes that stay, got none"):
        run_job(read_job(write(folder, early_stop="true")), folder / "out")
    assert not (folder / "out").exists()


def test_the_defaults_are_those_of_the_function() -> None:
    data = toy(8)
    held_out, stop = HeldOut(data, level=0.0), Stop()
    assert (held_out.slack, held_out.every) == (stop.slack, stop.every) == (0.01, 5)
    with pytest.raises(ValueError, match="every: expected an int at least 1"):
        HeldOut(data, level=0.0, every=0)
