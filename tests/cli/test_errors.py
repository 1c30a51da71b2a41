"""How every command ends on an error that the user can fix: one sentence that names it, status 1, nothing lost."""

from __future__ import annotations

import errno
import importlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import torch

from ccu_fast import check, files, info
from ccu_fast.cli import console, demo
from ccu_fast.cli import main as cli
from ccu_fast.runs.provenance import save_model
from tests.support import mem_datasets as made
from tests.support import toy_unlearn
from tests.support.paths import ROOT

SETTINGS = f"""{toy_unlearn.SETTINGS}[forget]
classes = [1]
[budget]
steps = 2
batch = 4
"""
WORK = {
    "unlearn": ["unlearn", "settings.toml", "--out", "{out}", "--quiet"],
    "compare": ["unlearn", "--compare", "--task", "digits-halves", "--seeds", "1", "--out", "{out}", "--quiet"],
    "own": ["unlearn", "own.toml", "--compare", "--out", "{out}", "--quiet"],
    "demo": ["demo", "--out", "{out}", "--quiet"],
    "protect": [
        "protect", "in/train.csv", "--out", "{out}", "--size", "16x16", "--model", "small:32", "--batch", "4",
        "--rounds", "2", "--pgd-steps", "1", "--surrogate-steps", "1", "--method", "em", "--quiet",
    ],
    "evaluate": [
        "evaluate", "in/train.csv", "--test", "in/train.csv", "--out", "{out}/figures.json", "--size", "16x16",
        "--model", "small:32", "--batch", "4", "--epochs", "1", "--quiet",
    ],
    "bench": ["bench", "--ops", "clip_loss", "--shapes", "B=8,D=8", "--device", "cpu", "--out", "{out}"],
}  # fmt: skip
# The function that does the work of each command; it must not start if an error could have been seen before.
WORKERS = {
    "unlearn": "ccu_fast.unlearn.job.run_ccu",
    "compare": "ccu_fast.unlearn.study.compare.run_task",
    "own": "ccu_fast.unlearn.study.own._audited",
    "demo": "ccu_fast.cli.demo._compute",
    "protect": "ccu_fast.mem.job.protect.Protection",
    "evaluate": "ccu_fast.mem.job.victims.train_victim",
    "bench": "benchmarks.__main__.run",
}
BOGUS = ("cuda:77", "cuda:-1", "nonsense", "", "meta", "mps")  # devices
WRITERS = [name for name in WORK if name != "bench"]
Ends = Callable[..., str]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small inputs of every command."""
    folder = tmp_path_factory.mktemp("inputs")
    data = toy_unlearn.toy()
    np.savez(folder / "pairs.npz", visual=data.visual, other=data.other, labels=data.labels, ids=data.ids)
    save_model(toy_unlearn.make_model(), folder / "weights.safetensors", {})
    (folder / "settings.toml").write_text(SETTINGS)
    test = toy_unlearn.toy(20, seed=5)
    np.savez(folder / "test.npz", visual=test.visual, other=test.other, labels=test.labels)
    own = SETTINGS.replace('path = "pairs.npz"', 'path = "pairs.npz"\ntest = "test.npz"')
    (folder / "own.toml").write_text(own + "[compare]\nmethods = ['ccu']\nprobe = false\nrelearn = false\n")
    made.write_csv(folder / "in")
    (folder / "in" / "one.csv").write_text("images,caption\npictures/0.png,a picture\n")
    (folder / "in" / "gap.csv").write_text("images,caption\npictures/0.png,a picture\npictures/1.png,\n")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save(torch.nn.Linear(1, 1), folder / "code.pt")
    (folder / "uncaptioned").mkdir()
    for number in range(3):
        (folder / "uncaptioned" / f"{number}.png").write_bytes(made.encoded(number))
    return folder


@pytest.fixture
def ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Ends]:
    """Runs a command line and returns its one sentence, which ends what it says; stages of progress may come before."""
    monkeypatch.syspath_prepend(str(ROOT))  # the benchmarks of this checkout
    monkeypatch.chdir(place)

    def run(words: list[str], out: Path | None = None, status: int = 1) -> str:
        assert cli.main([word.replace("{out}", str(out or tmp_path / "out")) for word in words]) == status
        told = capsys.readouterr().err
        assert told.endswith("\n") and "Traceback" not in told, told
        *before, said = told.splitlines()
        begins = f"ccu-fast {words[0]}: "
        assert said.startswith(begins), told
        assert all(f"{begins}loading its libraries" == line or ": " not in line for line in before), told
        return said

    yield run


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException | None], None]:
    """Replaces the work of a command by an error; by default by a failure of the test, since it must not start."""

    def replace(name: str, error: BaseException | None = None) -> None:
        def worker(*_: Any, **__: Any) -> None:
            raise error or AssertionError(f"the work of {name} began")

        monkeypatch.setattr(
            importlib.import_module(WORKERS[name].rpartition(".")[0]), WORKERS[name].split(".")[-1], worker
        )

    return replace


@pytest.mark.parametrize("name", WORK)
def test_an_output_under_a_file(name: str, ends: Ends, idle: Any, tmp_path: Path) -> None:
    idle(name)
    (tmp_path / "afile").write_text("mine")
    assert "out: expected" in ends(WORK[name], tmp_path / "afile" / "x")
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.parametrize("name", WORK)
def test_an_output_that_is_of_the_other_kind(name: str, ends: Ends, idle: Any, tmp_path: Path) -> None:
    idle(name)
    if name == "evaluate":
        (tmp_path / "out" / "figures.json").mkdir(parents=True)
    else:
        (tmp_path / "out").write_text("mine")
    assert "out: expected" in ends(WORK[name])


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", WORK)
def test_an_output_that_cannot_be_written(
    name: str, code: int, ends: Ends, idle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    idle(name)
    mkdir = os.mkdir

    def refused(path: Any, *rest: Any, **more: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            raise OSError(code, os.strerror(code), str(path))
        mkdir(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    told = ends(WORK[name])
    assert "out: expected a folder that can be written" in told and os.strerror(code) in told
    assert ("make room" in told) == (code in console.FULL)


@pytest.mark.parametrize("name", WORK)
def test_a_full_disk_and_memory_and_ctrl_c_while_it_works(name: str, ends: Ends, idle: Any) -> None:
    idle(name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there"))
    told = ends(WORK[name])
    assert "there: No space left on device; make room and give the same command again" in told
    assert told.endswith("goes on") == (name not in ("evaluate", "bench"))
    idle(name, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nGPU 0 has 2 GiB"))
    assert "CUDA out of memory; choose a smaller batch" in ends(WORK[name])
    idle(name, FloatingPointError("loss: expected finite values, got nan"))
    assert "loss: expected" in ends(WORK[name])
    idle(name, KeyboardInterrupt())
    assert ends(WORK[name], status=130).endswith(": interrupted")


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize(
    "bug", [KeyError("x"), AssertionError("x"), RuntimeError("shapes"), ValueError("not enough values to unpack")]
)
def test_a_bug_shows_its_traceback(name: str, bug: Exception, idle: Any, ends: Ends, tmp_path: Path) -> None:
    idle(name, bug)
    with pytest.raises(type(bug)):
        cli.main([word.replace("{out}", str(tmp_path / "out")) for word in WORK[name]])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        *(("unlearn", m, p) for m, p in (("sklearn", "scikit-learn"), ("safetensors", "safetensors"))),
        *(("unlearn", m, p) for m, p in (("matplotlib", "matplotlib"), ("rich", "rich"))),
        ("compare", "sklearn", "scikit-learn"),
        ("compare", "safetensors", "safetensors"),
        ("demo", "sklearn", "scikit-learn"),
        ("demo", "PIL", "pillow"),
        ("demo", "matplotlib", "matplotlib"),
        ("protect", "PIL", "pillow"),
        ("protect", "rich", "rich"),
        ("evaluate", "PIL", "pillow"),
        ("evaluate", "rich", "rich"),
    ],
)
def test_a_missing_package_is_named_before_the_work(
    name: str, module: str, package: str, ends: Ends, idle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    idle(name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    told = ends(WORK[name])
    assert f"{package} is needed" in told and f": pip install {package}" in told
    assert not (tmp_path / "out").exists()


def test_packages_that_only_some_inputs_need(
    ends: Ends, idle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = made.write_shards(tmp_path / "shards")
    idle("protect")
    idle("evaluate")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert "webdataset is needed" in ends(["protect", str(shards), *WORK["protect"][2:]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is needed" in ends([*WORK["evaluate"], "--report", str(tmp_path / "page.html")])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "safetensors is needed" in ends([*WORK["protect"], "--checkpoint", "weights.safetensors"])
    monkeypatch.setitem(sys.modules, "typer", None)
    assert "typer is needed" in ends(WORK["protect"])


@pytest.mark.parametrize("name", WORK)
def test_a_package_that_is_there_but_broken(name: str, ends: Ends, idle: Any) -> None:
    idle(name, ImportError("libjpeg.so.8: cannot open shared object file", name="PIL._imaging"))
    assert "pillow is needed and cannot be imported (libjpeg.so.8" in ends(WORK[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unlearn", "none.toml"], "settings: expected a TOML file, got none.toml"),
        (["unlearn", "pairs.npz"], "settings: expected TOML in pairs.npz"),
        (["unlearn", "--compare", "--task", "mnist", "--out", "{out}"], "tasks: expected one of"),
        (["protect", "nowhere", "--out", "{out}"], "input: expected a file or folder"),
        (["protect", "in/train.csv", "--out", "{out}", "--config", "none.toml"], "config: expected a TOML file"),
        (["protect", "in/train.csv", "--out", "{out}", "--config", "pairs.npz"], "config: expected TOML in pairs.npz"),
        (["protect", "in/train.csv", "--out", "{out}", "--checkpoint", "none.pt"], "checkpoint: expected a file"),
        (["evaluate", "nowhere", "--test", "in/train.csv"], "train: expected a file or folder"),
        (["evaluate", "in/train.csv", "--test", "nowhere"], "test: expected a file or folder"),
        (["evaluate", "in/train.csv", "in/train.csv", "--test", "in/train.csv"], "train: expected datasets with diff"),
        (
            ["evaluate", "=in/train.csv", "--test", "in/train.csv"],
            "train: expected PATH or NAME=PATH, got '=in/train.csv'",
        ),
        (["evaluate", "in/a=b.csv", "--test", "in/train.csv"], "train: expected a file or folder, got in/a=b.csv"),
        (["evaluate", "x=in/a=b.csv", "--test", "in/train.csv"], "train: expected a file or folder, got in/a=b.csv"),
        *(
            ([command, *words, "--size", "16x16", "--model", "small:32"], message)
            for command, words, message in (
                ("protect", ["in/one.csv", "--out", "{out}"], "input: expected at least two images, got 1 in in"),
                ("evaluate", ["in/one.csv", "--test", "in/train.csv"], "train: expected at least two images, got 1"),
                ("evaluate", ["in/train.csv", "--test", "in/one.csv"], "test: expected at least two images, got 1"),
                ("protect", ["uncaptioned", "--out", "{out}"], "0.png: no caption file 0.txt"),
                ("protect", ["uncaptioned", "--out", "{out}", "--skip-bad"], "at least two images, got none"),
                ("evaluate", ["in/gap.csv", "--test", "in/train.csv"], "gap.csv, record 2: empty caption"),
                ("evaluate", ["in/train.csv", "--test", "uncaptioned"], "test: expected usable pairs, got 3 bad items"),
            )
        ),
        *(
            ([*WORK[name], "--device", device], "device: expected cpu or a GPU that is here")
            for name in ("protect", "evaluate", "unlearn")
            for device in (
                "cuda:77",
                "cuda:-1",
                "nonsense",
                "",
                "meta",
                "mps",
                *(() if torch.cuda.is_available() else ("cuda",)),
            )
        ),
    ],
)
def test_bad_input_is_named(words: list[str], message: str, ends: Ends, idle: Any) -> None:
    for name in ("unlearn", "protect", "evaluate"):
        idle(name)
    assert message in ends(words)


def test_options_are_named_as_they_are_typed(ends: Ends, idle: Any, place: Path) -> None:
    idle("protect")
    words = ["protect", "uncaptioned", "--out", "{out}", "--size", "16x16", "--model", "small:32"]
    assert "input: expected usable pairs, got 3 bad items (--skip-bad leaves them out)" in ends(words)
    assert ": --device: expected cpu or a GPU" in ends([*WORK["protect"], "--device", "abacus"])
    assert ": --grey: expected colours for 'hf:x'" in ends(
        ["protect", "in/train.csv", "--out", "{out}", "--model", "hf:x", "--grey"]
    )
    assert ": --image-column: expected with csv" in ends(
        ["protect", "uncaptioned", "--out", "{out}", "--format", "folder", "--image-column", "x"]
    )
    # Not where it is part of a path or of what somebody wrote.
    assert "got skip_bad/x, which does not exist" in ends(["protect", "skip_bad/x", "--out", "{out}"])
    assert "got 'skip_bad'" in ends([*WORK["protect"], "--size", "skip_bad"])


def test_a_reader_that_goes_is_no_error(place: Path) -> None:
    """As in ``ccu-fast info | head -1``."""
    for words in (["info"], ["--help"], ["protect", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "ccu_fast", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
        os.close(writing)
        assert (done.stderr, done.returncode in (1, console.READER_GONE)) == (b"", True), words


def test_help_shows_every_word_of_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markup would take words in brackets for its own."""
    import typer.main

    from ccu_fast.cli.app import app

    monkeypatch.setenv("COLUMNS", "400")
    seen = 0
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if name == "info":  # has the help of ``python -m ccu_fast.info``
            continue
        assert cli.main([name, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for parameter in command.params:
            if getattr(parameter, "help", None):
                assert " ".join(parameter.help.split()) in shown, (name, parameter.name)
                seen += 1
                default = parameter.default
                if default not in (None, False) and not callable(default) and parameter.name != "help":
                    value = getattr(default, "value", default)
                    assert f"[default: {value}]" in shown, (name, parameter.name)
    assert seen > 60


def test_an_equals_sign_in_a_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    named: list[Any] = []
    monkeypatch.setattr(
        "ccu_fast.mem.job.victims.evaluate_datasets", lambda train, *_, **__: named.append(train) or {"samples": {}}
    )
    for item in ("in/lr=3/train.csv", "x=in/lr=3/train.csv", "lr=3.csv"):
        Path(item.removeprefix("x=")).parent.mkdir(exist_ok=True)
        shutil.copy("in/train.csv", item.removeprefix("x="))
        assert cli.main(["evaluate", item, "--test", "in/train.csv", "--quiet"]) == 0
    assert named == [{"train": Path("in/lr=3/train.csv")}, {"x": Path("in/lr=3/train.csv")}, {"lr=3": Path("lr=3.csv")}]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[budget]", 'device = "cuda"\n[budget]', "settings [forget]: expected one of"),
        ("[budget]", '[device]\nname = "cuda"\n[budget]', "settings: expected one of"),
        ('"weights.safetensors"', "3", "settings: expected text as weights in [model]"),
        ("[1]", "1", "settings: expected a list of numbers or names as classes in [forget]"),
        ("classes = [1]", 'kind = "instances"\nids = 1', "expected a list of numbers or names, or a file, as ids"),
        ("classes = [1]", 'kind = "instances"\nids = "pairs.npz"', "ids: expected an undamaged file"),
        ("[budget]", "[ccu]\ntrainable = 3\n[budget]", "trainable: expected a sequence of patterns"),
        ("weights.safetensors", "pairs.npz", "weights: expected an undamaged file"),
        ("weights.safetensors", "damaged.safetensors", "weights: expected an undamaged file"),
        ("pairs.npz", "damaged.npz", "path: expected an undamaged file"),
        ("weights.safetensors", "pointer.pt", "weights: expected weights, got a Git LFS pointer in"),
        (
            "weights.safetensors",
            "code.pt",
            "weights: expected tensors as torch.save(model.state_dict(), …) writes them",
        ),
        ("weights.safetensors", ".", "weights: expected a file, got the folder"),
    ],
)
def test_bad_settings_are_named(old: str, new: str, message: str, ends: Ends, place: Path, idle: Any) -> None:
    idle("unlearn")
    for name in ("damaged.safetensors", "damaged.npz"):
        (place / name).write_bytes(b"PK nothing of the kind")
    (place / "other.toml").write_text(SETTINGS.replace(old, new, 1))
    assert message in ends(["unlearn", "other.toml", *WORK["unlearn"][2:]])


def test_damaged_files(ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, said in (("pointer.pt", "weights, got a Git LFS pointer"), ("code.pt", "tensors as torch.save(")):
        assert f"checkpoint: expected {said}" in ends([*WORK["protect"], "--checkpoint", file])
    told = ends([*WORK["protect"], "--checkpoint", "settings.toml"])
    assert "checkpoint: expected an undamaged file, got settings.toml" in told
    assert not list(tmp_path.iterdir()), "nothing that a right checkpoint would be kept from"
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes(b"half")
    assert "checkpoint: expected an undamaged file" in ends(WORK["unlearn"])
    monkeypatch.setattr("ccu_fast.mem.job.protect.Publisher", _interrupted)
    ends(WORK["protect"], tmp_path / "copy", 130)
    (state,) = (tmp_path / "copy.partial").glob("batch-*/0.pt")
    for name in (f"{state.parent.name}/0.pt", "checkpoint.json", "scan-0.pt", "run.json"):
        (tmp_path / "copy.partial" / name).write_bytes(b"half")
        told = ends(WORK["protect"], tmp_path / "copy")
        assert "out: expected an undamaged file" in told and name in told


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_what_was_finished_stays(ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after the first part of the demo, and after the training of unlearn."""
    written: list[str] = []

    def part(part: demo.Part, out: Path, progress: Any) -> dict[str, Any]:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(part.name)
        return {}

    monkeypatch.setattr(demo, "_compute", part)
    assert ends(WORK["demo"]).endswith("goes on")
    assert [p.stem for p in (tmp_path / "out" / "parts").iterdir()] == written
    checkpoint, model, figures, card = (
        tmp_path / "model" / n for n in ("checkpoint.pt", "model.safetensors", "results.json", "card.md")
    )
    for name, finished, where in (
        ("ccu_fast.unlearn.job.save_model", {checkpoint}, f"the finished run is in {checkpoint}"),
        ("ccu_fast.unlearn.figures.answers", {checkpoint, model}, f"the unlearned model is in {model}"),
        ("ccu_fast.unlearn.job.write_whole", {checkpoint, model}, f"the unlearned model is in {model}"),
        (
            "ccu_fast.cli.report.page.write_run",
            {checkpoint, model, figures, card},
            f"the unlearned model and results.json are in {model.parent}",
        ),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, _full)
            told = ends(WORK["unlearn"], tmp_path / "model")
        left = {path for path in model.parent.iterdir() if not path.match("checkpoint.*.pt")}  # kept for the next try
        assert told.endswith(f"goes on; {where}") and left == finished


@pytest.mark.parametrize("name", ["unlearn", "compare"])
def test_two_runs_into_one_output(name: str, ends: Ends, idle: Any, tmp_path: Path) -> None:
    idle(name)
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out" / {"unlearn": "lock-0", "compare": "lock"}[name]):
        told = ends([*WORK[name], *(["--fresh"] if name == "unlearn" else [])])
    assert f"out: expected no other process at work in {tmp_path / 'out'}, got one" in told


@pytest.mark.parametrize("file", ["model.safetensors", "results.json", "report.html"])
@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_what_is_not_of_an_earlier_run_is_not_replaced(
    file: str, fresh: list[str], ends: Ends, idle: Any, tmp_path: Path
) -> None:
    idle("unlearn")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("mine")
    assert f"out: expected a folder without {file}, or an earlier run's" in ends([*WORK["unlearn"], *fresh])
    assert (tmp_path / "out" / file).read_text() == "mine"
    torch.save({"mine": 1}, tmp_path / "out" / "checkpoint.pt")
    assert "out: expected a folder without checkpoint.pt" in ends([*WORK["unlearn"], *fresh])
    (tmp_path / "out" / file).unlink()
    (tmp_path / "out" / file).mkdir()
    assert f"out: expected a file {file} or none" in ends([*WORK["unlearn"], *fresh])


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_torch_on_a_full_disk_tells_of_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: open("/dev/full", mode))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"), files.new_file(tmp_path / "x") as file:
        torch.save({"x": torch.zeros(100_000)}, file)
    assert list(tmp_path.iterdir()) == []


def test_info_ends_as_the_others_do(monkeypatch: pytest.MonkeyPatch, ends: Ends) -> None:
    for error, said in ((KeyboardInterrupt(), "interrupted"), (OSError(errno.EIO, "no"), "no")):
        monkeypatch.setattr(info, "collect", lambda error=error: (_ for _ in ()).throw(error))
        assert ends(["info"], status=130 if said == "interrupted" else 1).endswith(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unlearn"], "expected a settings file or --compare"),
        (["unlearn", "--compare", "--steps", "3", "--device", "cpu:0"], "expected --steps, --device only with a"),
        (["unlearn", "--compare", "--fresh"], "expected --fresh only without --compare"),
        (["unlearn", "--compare", "--classes", "3"], "expected --classes only with a settings file"),
        (["unlearn", "--compare", "--device", "cuda"], "expected --device only with a settings file"),
        (["unlearn", "x.toml", "--task", "digits-halves"], "expected --task only with --compare"),
    ],
)
def test_a_wrong_command_line_is_2(words: list[str], message: str, ends: Ends) -> None:
    assert message in ends(words, status=2)


def test_the_device_that_is_there() -> None:
    assert check.device("device", "cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected cpu or a GPU that is here"):
        check.device("device", None)  # type: ignore[arg-type]


def test_the_display_takes_stages_that_come_again_and_many_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with console.live(quiet=False) as progress:
        for stage in range(2 * console.SHOWN):
            for done in (0, 2, 1, 2):
                progress(f"stage {stage}", done, 2, "note")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"stage {stage} {done}/2, note" for stage in range(2 * console.SHOWN) for done in (0, 1)]


class TestTimeLeft:
    def test_in_a_log_a_line_for_each_stage_and_one_every_ten_seconds(self, capsys: pytest.CaptureFixture[str]) -> None:
        now = 100.0
        live = console.Live(False, clock=lambda: now)
        for done in range(20, 50, 2):  # resumed at step 20 of 80, two steps in three seconds
            live("unlearn", done, 80, f"loss {done}")
            now += 3
        assert capsys.readouterr().err.splitlines() == [
            "unlearn 20/80, loss 20",
            "unlearn 28/80, 0:01:18 left, loss 28",
            "unlearn 36/80, 0:01:06 left, loss 36",
            "unlearn 44/80, 0:00:54 left, loss 44",
        ]
        # The next part has a stage of the same name and another pace.
        for done, seconds in ((0, 30), (1, 60), (2, 60)):
            live("unlearn", done, 10, "")
            now += seconds
        assert capsys.readouterr().err.splitlines() == [
            "unlearn 0/10",
            "unlearn 1/10, 0:04:30 left",
            "unlearn 2/10, 0:06:00 left",
        ]
        live("another", 5, 6, "")  # nothing is known of its pace yet
        live("reading", 0, 1, "")  # at once, though a line has just come
        assert capsys.readouterr().err == "another 5/6\nreading\n"

    def test_loading_libraries_is_not_silent_either(self, capsys: pytest.CaptureFixture[str]) -> None:
        with console.loading("demo", False, every=0.05):
            time.sleep(1.3)
        first, *rest = capsys.readouterr().err.splitlines()
        assert first == "ccu-fast demo: loading its libraries"
        assert rest and rest[-1] == f"{first}, at it for 1 s", rest
        with console.loading("demo", True):
            pass
        assert capsys.readouterr().err == ""

    def test_a_log_is_not_silent_where_the_work_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        lines: list[str] = []
        with console.live(False, every=0.05) as progress:
            progress("digits", 3, 15, "loss 1")
            while len(lines) < 3:  # said by nobody but the watch
                time.sleep(0.05)
                lines += capsys.readouterr().err.splitlines()
        assert all(line.startswith("digits 3/15, loss 1") for line in lines)
        assert not [thread for thread in threading.enumerate() if "watch" in thread.name]  # it ends with the work

    def test_quiet_is_quiet(self, capsys: pytest.CaptureFixture[str]) -> None:
        now = 0.0
        live = console.Live(True, clock=lambda: now)
        for done in range(5):
            live("unlearn", done, 5, "")
            now += 1000
        assert capsys.readouterr().err == ""

    def test_on_a_terminal_beside_the_bar(self) -> None:
        now = 0.0
        live = console.Live(False, clock=lambda: now)
        for done in range(10, 20, 2):  # five seconds a step
            live("unlearn", done, 30, "loss 1")
            now += 10
        screen = rich.console.Console(file=io.StringIO(), width=120)
        screen.print(live.bars.make_tasks_table(live.bars.tasks))
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
        assert "18/30" in shown and "left 0:01:00" in shown and "loss 1" in shown
