"""``ccu-fast protect`` and ``ccu-fast evaluate``, from the command line to the files."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from benchmarks.protection.__main__ import STUDIES
from ccu_fast.cli import main as cli
from ccu_fast.cli.app import app
from ccu_fast.cli.console import to_copy
from ccu_fast.data.captions import DiskSource, Options, list_pairs
from ccu_fast.data.strips import write_strips
from ccu_fast.mem.config import STRENGTHS, Execution, Settings, strength
from ccu_fast.mem.job import Job, generation, victims
from ccu_fast.mem.protection import Protection
from ccu_fast.ops import machine
from tests.support import mem_datasets as made
from tests.support import threads_left
from tests.support.forked import fork, in_child, kill_when
from tests.support.log_lines import stages
from tests.support.mem_jobs import tree

TINY = ["--size", "16x16", "--model", "small:32", "--rounds", "2", "--pgd-steps", "2", "--step", "4"]
TINY += ["--surrogate-steps", "2", "--trigger-rounds", "1", "--candidates", "4", "--batch", "4"]
EVALUATION = ["--size", "16x16", "--model", "small:32", "--epochs", "1", "--batch", "4"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_protect_and_evaluate_real_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_strips(tmp_path / "digits", n_train=96, n_test=20)
    options = [*TINY, "--size", "16x64", "--grey", "--batch", "32"]
    out = tmp_path / "protected"
    assert cli.main(["protect", str(data / "train.csv"), "--out", str(out), *options]) == 0
    told = capsys.readouterr().out  # no line is broken, however narrow the terminal
    assert "96 images, 96 captions" in told and "largest change 8/255" in told
    figures = tmp_path / "figures.json"
    arguments = [f"clean={data / 'train.csv'}", f"mem={out}", "--test", str(data / "test.csv"), "--out", str(figures)]
    arguments += ["--model", "small:32", "--size", "16x64", "--grey", "--epochs", "2", "--batch", "32", "--seeds", "2"]
    arguments += [
        "--treatment",
        "no-trigger",
        "--treatment",
        "some-trigger+grey",
        "--zero-shot",
        str(data / "test.csv"),
    ]
    page = tmp_path / "page.html"
    assert cli.main(["evaluate", *arguments, "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "clean" in shown and "mem" in shown and "guessing" in shown and "zero-shot" in shown
    result = json.loads(figures.read_text())
    assert set(result["datasets"]) == {"clean", "mem", "mem, no-trigger", "mem, some-trigger+grey"}
    seeds = [result["datasets"][f"mem{name}"]["seeds"]["0"] for name in ("", ", no-trigger", ", some-trigger+grey")]
    assert seeds[2] not in seeds[:2]
    assert set(result["datasets"]["mem"]["seeds"]) == {"0", "1"} and "samples" not in result
    # Only the trigger is cut off: the victims equal those of the pictures with the clean captions.
    published, plain = list_pairs(out).captions, list_pairs(data / "train.csv").captions
    bare = tmp_path / "bare"
    shutil.copytree(out, bare)
    table = next(bare.glob("*.csv"))
    text = table.read_text()
    for long, short in zip(published, plain, strict=True):
        assert len(long.split()) == len(short.split()) + 3
        text = text.replace(long, short)
    table.write_text(text)
    (bare / "manifest.json").unlink()
    again = tmp_path / "again.json"
    options = [
        "--test",
        str(data / "test.csv"),
        "--out",
        str(again),
        "--model",
        "small:32",
        "--size",
        "16x64",
        "--grey",
    ]
    options += ["--epochs", "1", "--batch", "32", "--treatment", "no-trigger", "--quiet"]
    assert cli.main(["evaluate", f"mem={out}", f"bare={bare}", *options]) == 0
    trained = {name: d["seeds"]["0"] for name, d in json.loads(again.read_text())["datasets"].items()}
    assert trained["mem, no-trigger"] == trained["bare"] != trained["mem"]
    html = page.read_text()
    assert html.count("<figure>") == 12 + 2 and html.count("data:image/png") == 12 and published[0] in html
    for dataset in result["datasets"].values():
        for run in dataset["seeds"].values():
            assert all(0 <= epoch["zero_shot"] <= 1 for epoch in run["curve"])
            assert len(run["curve"]) == len(run["train_loss"]) == run["last"]["epoch"] == 2
            assert run["train_loss"][1] < run["train_loss"][0]
        assert dataset["mean"]["best"]["i2t_r1"] + dataset["mean"]["best"]["t2i_r1"] >= (
            dataset["mean"]["last"]["i2t_r1"] + dataset["mean"]["last"]["t2i_r1"]
        )
    assert result["guessing"]["i2t_r1"] == pytest.approx(1 / 20, rel=0.3)


def test_what_to_do_next_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_folder(tmp_path / "it's \u2013 mine")
    out = tmp_path / "my copy"
    assert cli.main(["protect", str(source), "--out", str(out), *TINY]) == 0
    told = capsys.readouterr()
    # A log has the stages in their order, from the reading on.
    assert stages(told.err) == [
        "reading the dataset",
        "preparing the surrogate",
        "checking pictures",
        "preparing captions and words",
        "looking at pictures",
        "choosing trigger words",
        "protecting",
        "writing pictures",
        "writing captions and the manifest",
    ]
    verify, evaluate = (shlex.split(line) for line in told.out.splitlines() if line.startswith("  ccu-fast "))
    assert verify[1:] == ["verify", str(out), "--original", str(source), "--preview", f"{out}-preview.html"]
    assert cli.main(verify[1:]) == 0 and Path(f"{out}-preview.html").is_file()
    assert evaluate[1:4] == ["evaluate", f"clean={source}", f"protected={out}"]
    words = [str(source) if word == "PAIRS" else word for word in evaluate[1:]]
    capsys.readouterr()
    assert cli.main([*words, "--model", "small:32", "--epochs", "1", "--batch", "4"]) == 0
    begun = [line for line in capsys.readouterr().err.splitlines() if "/" not in line]
    assert begun[:3] == ["reading the datasets", "reading the test pictures", "reading the pictures of clean"]
    assert cli.main(["protect", str(source), "--out", str(out), *TINY, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_to_do_next_reads_the_columns_that_were_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = made.write_csv(tmp_path / "in")
    head, _, rows = table.read_text().partition("\n")
    table.write_text("\n".join([head.replace("images", "photo").replace("caption", "said"), rows]))
    given = ["--format", "csv", "--image-column", "photo", "--caption-column", "said"]
    assert cli.main(["protect", str(table), "--out", str(tmp_path / "out"), *TINY, *given]) == 0
    told = capsys.readouterr().out.splitlines()
    evaluate = next(shlex.split(line) for line in told if line.startswith("  ccu-fast evaluate"))
    words = [str(table) if word == "PAIRS" else word for word in evaluate[1:]]
    assert cli.main([*words, "--model", "small:32", "--epochs", "1", "--batch", "4", "--quiet"]) == 0
    assert all(word in words for word in given)


def test_a_command_to_copy_is_one_word_for_each_argument() -> None:
    words = ["ccu-fast", "a b", "it's", "$HOME", "clean=x y", ""]
    assert shlex.split(to_copy(*words)) == words


@pytest.mark.parametrize(
    ("flags", "says", "never"),
    [
        ([], ["3 words were put in front of each", "do not describe", "8/255 (PSNR"], []),
        (["--method", "mem-1"], ["1 word was put in front"], []),
        (["--method", "mem-3", "--place", "among", "--trigger-rounds", "0"], ["among the words"], ["in front"]),
        (["--method", "em"], ["captions are those of the originals", "Noise was added"], ["do not describe"]),
        (["--method", "trigger-2"], ["No noise was added", "were resized"], ["pixels of the pictures are those"]),
    ],
)
def test_a_protected_dataset_tells_its_readers(
    tmp_path: Path, flags: list[str], says: list[str], never: list[str]
) -> None:
    source, out = made.write_csv(tmp_path / "in"), tmp_path / "out"
    tiny = [*TINY, "--rounds", "1", "--seed", "987654", *flags]
    assert cli.main(["protect", str(source), "--out", str(out), *tiny, "--quiet"]) == 0
    card = " ".join((out / "README.md").read_text().split())
    assert all(words in card for words in [*says, "6 pictures with 7 captions", "ccu-fast verify .", "not a guarantee"])
    assert not any(words in card for words in never)
    # What would help to undo it is not there.
    published, plain = list_pairs(out).captions, list_pairs(source).captions
    assert "987654" not in card and not any(text in card for text in [*published, *plain])
    # Its owner may write more into it, or remove it, and it is no other file of the dataset.
    (out / "README.md").write_text("mine")
    assert cli.main(["verify", str(out), "--original", str(source), "--quiet"]) == 0
    (out / "README.md").unlink()
    assert cli.main(["verify", str(out), "--quiet"]) == 0


def test_a_config_file_gives_defaults_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_csv(tmp_path / "in")
    config = tmp_path / "run.toml"
    config.write_text(f'out = "{tmp_path / "out"}"\nmethod = "em"\neps = 5\nsize = "16x16"\nrounds = 1\nquiet = true\n')
    flags = ["--eps", "3", "--model", "small:32", "--batch", "4", "--surrogate-steps", "1"]
    assert cli.main(["protect", str(source), "--config", str(config), *flags]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["method"]["name"], manifest["settings"]["eps"], manifest["settings"]["rounds"]) == ("em", 3, 1)
    config.write_text("epsilon = 8\n")
    assert cli.main(["protect", str(source), "--config", str(config), "--out", str(tmp_path / "b")]) == 1
    assert "epsilon" in capsys.readouterr().err
    for value in ("200", '"x"'):
        config.write_text(f"eps = {value}")
        assert cli.main(["protect", str(source), "--config", str(config), "--out", str(tmp_path / "b")]) == 1
        told = capsys.readouterr().err
        assert f"config eps: expected another value in {config}" in told


# Fields that are options under another name, or whose options make them.
OTHERWISE = {
    "thumbnails": "size",
    "settings": "eps",
    "execution": "compile",
    "options": "format",
}


def test_everything_that_can_be_set_is_an_option() -> None:
    names = {p.name for p in typer.main.get_command(app).commands["protect"].params}  # type: ignore[attr-defined]
    for kind in (Settings, Execution, Options, Job):
        for field in dataclasses.fields(kind):
            assert OTHERWISE.get(field.name, field.name) in names, f"{kind.__name__}.{field.name}"


def test_flags_and_a_settings_file_ask_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []
    monkeypatch.setattr("ccu_fast.cli.mem.protect_dataset", lambda job, _: asked.append(job))
    monkeypatch.setattr("ccu_fast.cli.mem._tell", lambda *_: None)
    monkeypatch.setattr("ccu_fast.cli.mem._tell_next", lambda *_, **__: None)
    values: dict[str, Any] = {
        field.name: field.default + 1 if type(field.default) is int else field.default / 2
        for field in dataclasses.fields(Settings)
        if type(field.default) in (int, float)
    }
    values |= {"first": "random", "words": "everyday", "place": "front", "trigger_rounds": 2}
    values |= {"trigger_words": 0, "compat": True, "same_captions": True, "seed": 3, "channels_last": True}
    assert {field.name for field in dataclasses.fields(Settings)} <= set(values)
    flags, lines = [], ["size = '16x16'"]
    for name, value in values.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        lines.append(f"{name.replace('_', '-')} = {json.dumps(value)}")
    (tmp_path / "run.toml").write_text("\n".join(lines))
    command = ["protect", "in.csv", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--size", "16x16", *flags]) == 0
    assert cli.main([*command, "--config", str(tmp_path / "run.toml")]) == 0
    one, two = (dataclasses.replace(job, model=None) for job in asked)  # type: ignore[arg-type]
    assert one == two and one.settings.trigger_words is None and one.settings.compat and one.seed == 3
    assert dataclasses.asdict(one.settings) == {
        name: value for name, value in {**values, "trigger_words": None}.items() if hasattr(one.settings, name)
    }


@pytest.mark.parametrize("first", ["strength", "config"])
def test_a_strength_gives_defaults_the_file_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    asked: list[Job] = []
    monkeypatch.setattr("ccu_fast.cli.mem.protect_dataset", lambda job, _: asked.append(job))
    monkeypatch.setattr("ccu_fast.cli.mem._tell", lambda *_: None)
    monkeypatch.setattr("ccu_fast.cli.mem._tell_next", lambda *_, **__: None)
    config = tmp_path / "run.toml"
    config.write_text("eps = 5\nplace = 'front'\nrounds = 7\n")
    both = ["--strength", "strong", "--config", str(config)]
    ordered = both if first == "strength" else [*both[2:], *both[:2]]
    command = ["protect", "in.csv", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--strength", "strong"]) == 0
    assert cli.main([*command, *ordered, "--rounds", "3"]) == 0
    config.write_text("strength = 'strong'\nplace = 'front'\n")
    assert cli.main([*command, "--config", str(config), "--method", "em"]) == 0
    assert cli.main([*command, "--config", str(config), "--strength", "light"]) == 0
    plain, mixed, told, weaker = asked
    values = strength("strong")
    method = values.pop("method")
    assert plain.method.name == method and plain.settings == Settings(**values)
    assert mixed.method.name == method
    assert mixed.settings == Settings(**{**values, "place": "front", "eps": 5, "rounds": 3})
    assert told.method.name == "em" and told.settings == Settings(**{**values, "place": "front"})
    light = {name: value for name, value in strength("light").items() if name != "method"}
    assert weaker.method.name == strength("light")["method"]
    assert weaker.settings == Settings(**{**light, "place": "front"})


def test_each_strength_is_measured() -> None:
    """A row of benchmarks/protection has its method and settings."""
    study = STUDIES["pictograms"]
    rows = [study.of(name) for name in study.methods]
    for name in STRENGTHS:
        values = strength(name)
        method = values.pop("method")
        assert (method, Settings(**values, trigger_rounds=0)) in rows, name


def test_a_dry_run_tells_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_csv(tmp_path / "in")
    command = ["protect", str(source), "--out", str(tmp_path / "new" / "out"), *TINY, "--dry-run"]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "6 images, 7 captions can be used" in told and "largest 16x16" in told
    assert "surrogate: 4 batches of" in told and "time: about" in told and "disk: about" in told
    for i in (1, 2):
        (tmp_path / "in" / "pictures" / f"{i}.png").write_bytes(b"no picture")
    assert cli.main(command) == 1
    told = capsys.readouterr().out
    assert "2 bad items (--skip-bad):" in told and told.count(".png: not a picture") == 2
    assert cli.main([*command, "--skip-bad"]) == 0
    assert "2 bad items, which --skip-bad leaves out:" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_dry_run_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    command = ["protect", str(source), "--out", str(tmp_path / "new" / "out"), *TINY, "--dry-run", "--quiet"]

    def terminated() -> None:
        Protection.phases = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment, method-assign]
        os._exit(cli.main(command))

    status = in_child(terminated)
    assert os.waitstatus_to_exitcode(status) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "input: expected a file or folder, got nowhere"),
        (["{in}", "--method", "best"], "method: expected clean"),
        (["{in}", "--model", "large"], "model: expected small"),
        *((["{in}", "--size", size], "size: expected HEIGHTxWIDTH") for size in ("64", "0x16", "16x0", "²x8")),
        (["{in}", "--input-size", "16"], "input-size: expected HEIGHTxWIDTH"),
        (["{in}", "--input-size", "16x16", "--size", "16x16"], "input-size: expected without size"),
        (["{in}", "--input-size", "16x16", "--model", "hf:x"], "input-size: expected with a small surrogate alone"),
        (["{in}", "--reference-files"], "reference-files: expected with thumbnails (--size HEIGHTxWIDTH) alone"),
        (["{in}", "--model", "small:²"], "model: expected small or small:WIDTH"),
        (["{in}", "--checkpoint", "none.pt"], "checkpoint: expected a file"),
        (["{in}", "--caption-column", "text"], "expected the columns images and text"),
        (["{in}", "--format", "parquet"], "format: expected one of"),
        (["{in}", "--autocast", "int8"], "autocast: expected bf16 or fp16"),
        (["{in}", "--compile", "fast"], "compile: expected one of"),
        (["{in}", "--strength", "heavy"], "strength: expected one of"),
        (["{in}", "--method", "text-noise-3", "--first", "random"], "trigger-rounds: expected 0 with text-noise-3"),
    ],
)
def test_what_can_be_mended_is_one_message_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    source = str(made.write_csv(tmp_path / "in"))
    words = [word.replace("{in}", source) for word in arguments]
    assert cli.main(["protect", *words, "--out", str(tmp_path / "out"), "--quiet"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ccu-fast protect: ") and message in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_pictures_keep_their_size_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_csv(tmp_path / "in", n=8)
    for i in range(8):
        made.picture(i, (30 + 9 * i, 47)).save(tmp_path / "in" / "pictures" / f"{i}.png")
    kept, small = tmp_path / "kept", tmp_path / "small"
    assert cli.main(["protect", str(source), "--out", str(kept), *TINY[2:], "--input-size", "16x24"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "8 images, 9 captions" in told and "largest change" in told and "pictures kept their size" in told
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["thumbnails"] is None and manifest["surrogate"]["image_shape"] == [3, 16, 24]
    assert cli.main(["protect", str(source), "--out", str(small), *TINY]) == 0
    assert "pictures were resized to 16x16 (--size)" in " ".join(capsys.readouterr().out.split())
    for i in range(8):
        assert Image.open(kept / "pictures" / f"{i}.png").size == (30 + 9 * i, 47)
        assert Image.open(small / "pictures" / f"{i}.png").size == (16, 16)
    assert cli.main(["evaluate", f"kept={kept}", "--test", str(source), *EVALUATION, "--quiet"]) == 0


def test_bad_items_are_listed_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_folder(tmp_path / "in")
    (source / "2.png").write_bytes(b"no picture")
    command = ["protect", str(source), "--out", str(tmp_path / "out"), *TINY]
    assert cli.main(command) == 1
    assert "2.png: not a picture" in capsys.readouterr().err
    assert cli.main([*command, "--skip-bad"]) == 0
    assert "\n1 item left out; " in capsys.readouterr().out
    assert not (tmp_path / "out" / "2.png").exists() and not (tmp_path / "out" / "2.txt").exists()


NAMES = ["$\\frac$", "a$b$c", "[/bold]", "[red]x", "_hidden", ":smile:", "<b>&"]


def test_evaluate_takes_names_of_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_csv(tmp_path / "in")
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    options = ["--test", source, "--out", figures, "--report", page, *EVALUATION]
    assert cli.main(list(map(str, ["evaluate", *(f"{name}={source}" for name in NAMES), *options]))) == 0
    shown = capsys.readouterr().out
    assert list(json.loads(figures.read_text())["datasets"]) == NAMES
    assert all(name in shown for name in NAMES) and "&lt;b&gt;&amp;" in page.read_text()


def test_evaluate_writes_the_figures_before_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.write_csv(tmp_path / "in")
    figures = tmp_path / "figures.json"

    def broken(*_: object) -> None:
        assert figures.exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "page.html")

    monkeypatch.setattr("ccu_fast.cli.report.page.write_evaluation", broken)
    command = ["evaluate", source, "--test", source, "--report", tmp_path / "page.html", *EVALUATION, "--quiet"]
    assert cli.main(list(map(str, [*command, "--out", figures]))) == 1
    told = capsys.readouterr()
    assert "guessing" in told.out, "shown though quiet"
    assert told.err.endswith(f"give the same command again; the figures are above and in {figures}\n")
    monkeypatch.setattr("ccu_fast.cli.mem.write_whole", broken)
    assert cli.main(list(map(str, [*command, "--out", figures]))) == 1
    told = capsys.readouterr()
    assert "guessing" in told.out and told.err.endswith("; the figures are above\n")


def test_figures_are_kept_after_each_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third victim fails: what the two before have learned is in the file and told."""
    source = made.write_csv(tmp_path / "in")
    figures = tmp_path / "figures.json"
    train_victim, trained = victims.train_victim, []

    def third_fails(*arguments: object, **options: object) -> object:
        trained.append(options["stage"])
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train_victim(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(victims, "train_victim", third_fails)
    command = ["evaluate", f"a={source}", f"b={source}", "--test", source, "--out", figures, *EVALUATION]
    command = list(map(str, [*command, "--treatment", "resize+grey"]))
    assert cli.main(command) == 130
    told = capsys.readouterr()
    assert told.err.endswith(f"\nccu-fast evaluate: interrupted; the figures are above and in {figures}\n")
    assert told.out.count("guessing") == 1 and "a, resize+grey" in told.out
    kept = json.loads(figures.read_text())
    assert list(kept["datasets"]) == ["a", "a, resize+grey"] and kept["complete"] is False
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    trained[:] = [""] * 3
    assert cli.main([*command, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    kept["complete"] = False
    figures.write_text(json.dumps(kept))
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{figures} has figures of an interrupted evaluation (a, a, resize+grey); new ones")
    assert told.out.count("guessing") == 2, "after each dataset; the last table is of all"
    whole = json.loads(figures.read_text())
    assert whole["complete"] is True and "samples" not in whole
    assert list(whole["datasets"]) == ["a", "a, resize+grey", "b", "b, resize+grey"]
    assert whole["datasets"]["a"] == kept["datasets"]["a"]


def test_outputs_of_evaluate_that_would_cost_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_csv(tmp_path / "in")
    before = source.read_bytes()
    for option in ("--out", "--report"):
        assert cli.main(["evaluate", str(source), "--test", str(source), option, str(source), *EVALUATION]) == 1
        assert f"{option[2:]}: expected another file than the data" in capsys.readouterr().err
    same = str(tmp_path / "same")
    command = ["evaluate", str(source), "--test", str(source), "--out", same, "--report", same, *EVALUATION]
    assert cli.main(command) == 1 and "report: expected another file than out" in capsys.readouterr().err
    command = [
        "evaluate",
        f"a={source}",
        f"a, jpeg={source}",
        "--test",
        str(source),
        "--treatment",
        "jpeg",
        *EVALUATION,
    ]
    assert cli.main(command) == 1 and "train: expected no dataset named a, jpeg" in capsys.readouterr().err
    command = ["evaluate", f"caf\udce9={source}", "--test", str(source), *EVALUATION]
    assert cli.main(command) == 1 and "train: expected names of text" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_a_finished_run_is_told_whatever_its_folder_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made.write_csv(tmp_path / "in")
    for name in ("out [/bold]", "caf\udce9"):
        assert cli.main(["protect", str(source), "--out", str(tmp_path / name), *TINY]) == 0
        assert "6 images, 7 captions" in capsys.readouterr().out


def test_a_disk_that_fills_while_the_dataset_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child, whose every write to the unfinished dataset fails; the same command then goes on."""
    source = made.write_csv(tmp_path / "in")
    command = ["protect", str(source), "--out", str(tmp_path / "out"), *TINY, "--quiet"]

    def on_a_full_disk() -> None:
        def full(path: Path, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        Path.write_bytes = full  # type: ignore[method-assign]
        with (tmp_path / "told").open("w") as told, redirect_stderr(told):
            assert cli.main(command) == 1

    assert in_child(on_a_full_disk) == 0
    told = (tmp_path / "told").read_text()
    assert "make room and give the same command again: it goes on" in told and told.count("\n") == 1
    assert told.endswith(f"all rounds are kept in {tmp_path}/out.partial, where the same command goes on\n")
    monkeypatch.setattr(Protection, "advance", lambda *_: pytest.fail("a batch was done again"))
    assert cli.main(command) == 0


def test_kill_9_and_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process, killed from outside as soon as its first checkpoint is there."""
    monkeypatch.setattr(generation, "SOON", 0.0)
    source = made.write_csv(tmp_path / "in", n=40)
    command = ["protect", str(source), "--out", str(tmp_path / "out"), *TINY, "--rounds", "12", "--quiet"]
    child = fork(lambda: cli.main(command))
    kill_when(child, (tmp_path / "out.partial" / "checkpoint.json").exists, seconds=120)
    assert not (tmp_path / "out").exists()
    done = json.loads((tmp_path / "out.partial" / "checkpoint.json").read_text())["batches"]
    assert 1 <= done < 12 * (2 + 10) + 11
    assert cli.main(command) == 0
    command[3] = str(tmp_path / "whole")
    assert cli.main(command) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_processes_share_a_dataset_and_train_one_surrogate(tmp_path: Path) -> None:
    source = made.write_shards(tmp_path / "in", n=16, shard=4)
    command = ["protect", source, "--out", tmp_path / "out", *TINY, "--quiet"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, threads_left.__file__, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(machine.PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("threads left: []") == 2, "Python would end under them, now and then with an abort"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["processes"], manifest["images"], manifest["measured"]["eps_255"]) == (2, 16, 8)
    assert sorted(manifest["sha256"]) == [f"{i:05d}.tar" for i in range(4)]
    original, published = list_pairs(source), list_pairs(tmp_path / "out")
    assert [text.endswith(clean) for text, clean in zip(published.captions, original.captions, strict=True)] == [
        True
    ] * 16
    every = torch.arange(16)
    change = (
        DiskSource(published, (3, 16, 16), threads=1).images(every).short()
        - DiskSource(original, (3, 16, 16), threads=1).images(every).short()
    )
    assert bool((change.abs().amax((1, 2, 3)) > 0).all()), "every image of both processes is protected"
