"""Unseen items of a user's run: how they are read, and what is made of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ccu_fast.cli.main import main
from ccu_fast.models.clip import ClipEncoder
from ccu_fast.models.fusion import FusionModel
from ccu_fast.runs.provenance import items_hash, load_model, save_model, tensors_hash
from ccu_fast.unlearn.job import in_own_names, load, run_job
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.precision import under_autocast
from ccu_fast.unlearn.settings import read_job
from tests.support import toy_unlearn
from tests.support.toy_unlearn import toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = np.array(["ant", "bee", "cat", "dog"])
TOML = f"""{toy_unlearn.SETTINGS}unseen = "unseen.npz"
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
    _, data, _, unseen, _ = load(job)
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
    model, data, _, unseen, _ = load(job)
    gone = torch.isin(data.ids, torch.tensor([3, 9, 12, 25, 31]))
    plain = run_ccu(model, data[gone], data[~gone], job.config, unseen=unseen).model
    blind = run_ccu(model, data[gone], data[~gone], job.config).model
    written = toy_unlearn.make_model()
    written.load_state_dict(load_model(folder / "out" / "model.safetensors")[0])
    assert torch.equal(weights(written), weights(plain)) and not torch.equal(weights(written), weights(blind))
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert stored["sizes"]["unseen items"] == len(unseen)
    names = [name for name, *_ in stored["rows"]]
    assert "unseen: visual, accuracy" in names and "membership of forgotten against unseen, AUC" in names
    assert stored["verdict"]["kind"] != "undecided"
    assert stored["provenance"]["unseen_sha256"] == items_hash(unseen)


def test_a_function_may_return_the_same_model_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = toy_unlearn.make_model()
    before = one.state_dict()["visual_tower.0.weight"].clone()
    monkeypatch.setattr(toy_unlearn, "make_model", lambda: one)
    job = read_job(folder / "settings.toml")
    plain = run_job(job, folder / "a")["losses"]
    assert run_job(replace(job, dtype="bf16"), folder / "b")["losses"] != plain
    assert run_job(job, folder / "c")["losses"] == plain
    assert torch.equal(one.state_dict()["visual_tower.0.weight"], before)


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
    _, data, _, unseen, _ = load(read_job(folder / "settings.toml"))
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


@pytest.mark.parametrize("where", ["[model]", "[ccu]"])
def test_only_what_matches_trainable_changes(folder: Path, where: str) -> None:
    patterns = 'trainable = ["visual_tower.*.weight", "fused_head.*"]\n'
    text = TOML.replace("[model]\n", f"[model]\n{patterns}") if where == "[model]" else TOML + f"[ccu]\n{patterns}"
    (folder / "settings.toml").write_text(text)
    job = read_job(folder / "settings.toml")
    assert job.config.trainable == ("visual_tower.*.weight", "fused_head.*")
    run_job(job, folder / "out")
    before, after = toy_unlearn.trained().state_dict(), load_model(folder / "out" / "model.safetensors")[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matching = {n for n in before if fnmatchcase(n, "visual_tower.*.weight") or fnmatchcase(n, "fused_head.*")}
    assert changed == matching and 2 < len(matching) < len(before)


def test_trainable_stands_in_one_table(folder: Path) -> None:
    (folder / "settings.toml").write_text(
        TOML.replace("[model]\n", '[model]\ntrainable = ["*"]\n') + '[ccu]\ntrainable = ["*"]\n'
    )
    with pytest.raises(ValueError, match=r"settings: expected trainable in \[model\] or \[ccu\] of .*, got both"):
        read_job(folder / "settings.toml")
    (folder / "settings.toml").write_text(TOML.replace("[model]\n", '[model]\ntrainable = "*"\n'))
    with pytest.raises(ValueError, match=r"settings \[model\] trainable: expected a sequence of patterns"):
        read_job(folder / "settings.toml")


def test_patterns_of_a_clip_are_in_its_library_s_names() -> None:
    inner = nn.ModuleDict({"visual": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    model = ClipEncoder(inner, [0.0] * 3, [1.0] * 3)
    asked = ("visual.*", "model.text.*", "*bias", "audio_*")
    assert in_own_names(model, asked) == ("model.visual.*", "model.text.*", "*bias", "model.audio_*")
    assert in_own_names(inner, asked) == asked


def other_model() -> FusionModel:
    """Of another make than the settings name."""
    return FusionModel(toy_unlearn.INPUTS, toy_unlearn.INPUTS, toy_unlearn.CLASSES, hidden=8, embedding=4)


def test_the_command_line_chooses_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    chosen = other_model()
    save_model(chosen, folder / "other.safetensors", {})
    monkeypatch.chdir(folder)
    (folder / "settings.toml").write_text(TOML.replace("[model]", '[model]\ntrainable = ["visual_tower.*"]'))
    make = f"{__name__}:other_model"
    words = ["unlearn", "settings.toml", "--model", make, "--weights", "other.safetensors", "--out", "out", "--quiet"]
    assert main(words) in (0, 3)  # a model that knows nothing is judged, whatever the verdict
    provenance = load_model(folder / "out" / "model.safetensors")[1]
    assert provenance["model"] == make and provenance["original_sha256"] == tensors_hash(chosen.state_dict())
    assert provenance["config"]["trainable"] == ["visual_tower.*"]  # the rest of [model] stays
    job = read_job(folder / "settings.toml", {"model": {"model": "hf:clip"}})
    assert (job.model, job.named, job.weights) == (f"hf:{folder / 'clip'}", True, None)
    job = read_job(folder / "settings.toml", {"model": {"weights": Path("other.safetensors")}})
    assert (job.model, job.weights) == ("tests.support.toy_unlearn:make_model", folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"^weights: expected those of the given model"):
        read_job(folder / "settings.toml", {"model": {"model": make}})
    with pytest.raises(ValueError, match="dtype: expected one of"):
        read_job(folder / "settings.toml", {"model": {"dtype": "int8"}})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_forward_passes_in_half_precision(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TOML.replace('kind = "instances"\nids = [3, 9, 12, 25, 31]', 'kind = "class"\nclasses = ["bee"]')
    (folder / "settings.toml").write_text(text.replace("steps = 12", "steps = 25\nlearning_rate = 5e-3"))
    seen: set[torch.dtype] = set()
    linear = F.linear

    def watched(*inputs: torch.Tensor) -> torch.Tensor:
        found = linear(*inputs)
        seen.add(found.dtype)
        return found

    whole = run_job(read_job(folder / "settings.toml"), folder / "fp32")
    job = read_job(folder / "settings.toml", {"model": {"dtype": dtype}})
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", watched)
        half = run_job(job, folder / dtype)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    state, provenance = load_model(folder / dtype / "model.safetensors")
    assert provenance["dtype"] == dtype and {value.dtype for value in state.values()} == {torch.float32}
    assert half["losses"] != whole["losses"]
    torch.testing.assert_close(torch.tensor(half["losses"]), torch.tensor(whole["losses"]), rtol=0.05, atol=0.02)
    assert half["verdict"]["kind"] == whole["verdict"]["kind"] == "passed"
    for name, value in toy_unlearn.trained().state_dict().items():
        if name.startswith(("other_tower", "other_head")):
            assert torch.equal(value, state[name])
    # Another precision is another run.
    with pytest.raises(ValueError, match="checkpoint: expected the state of this run"):
        run_job(read_job(folder / "settings.toml"), folder / dtype)


def test_copies_and_modes_of_a_model_under_autocast() -> None:
    model = copy.deepcopy(toy_unlearn.trained())
    before = model.state_dict()
    half = under_autocast(model, "bf16")
    assert half is model and isinstance(half, FusionModel) and half.state_dict().keys() == before.keys()
    again = copy.deepcopy(half)
    data = toy(8)
    exact = toy_unlearn.trained().embed_visual(data.visual)
    for one in (half, again):
        z = one.embed_visual(data.visual)
        assert z.dtype == torch.float32 and not torch.equal(z, exact)
        torch.testing.assert_close(z, exact, rtol=0, atol=0.05)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)
        assert one.classify_visual(z).dtype == torch.float32
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert not torch.equal(half.embed_visual(data.visual), again.embed_visual(data.visual))
    assert type(under_autocast(copy.deepcopy(toy_unlearn.trained()), "fp32")) is FusionModel


def test_a_step_that_overflows_in_fp16_is_left_out(folder: Path) -> None:
    """The first scale, 65536, is too large for these gradients; it is halved, and no weight becomes infinite."""
    scales: list[float] = []
    update = torch.amp.GradScaler.update

    def watched(self: torch.amp.GradScaler) -> None:
        update(self)
        scales.append(self.get_scale())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "update", watched)
        job = read_job(folder / "settings.toml", {"model": {"dtype": "fp16"}, "ccu": {"task": 100.0}})
        run_job(job, folder / "out")
    state, _ = load_model(folder / "out" / "model.safetensors")
    assert min(scales) < 65536 and all(bool(torch.isfinite(value).all()) for value in state.values())
