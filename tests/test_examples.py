"""docs/examples: each does in small what its head promises, in an empty folder; notebooks have the same code."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from build_support.notebooks import EXAMPLES, NOTEBOOKS, RUN, code_cells
from ccu_fast.cli.main import main
from ccu_fast.cli.report import figures
from ccu_fast.patch import sentence_transformers as patched
from tests.support.drop_in import library
from tests.support.small_demo import quick_map
from tests.support.torchrun import torchrun

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield
    sys.modules.pop("unlearn_people", None)


def example(name: str) -> dict[str, Any]:
    """What an example defines; nothing of it has run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def from_notebook(name: str) -> dict[str, Any]:
    """What the cells of its notebook define, all but the last, which runs it at full length."""
    made = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    space: dict[str, Any] = {"__name__": name}
    for number, code in enumerate(cells[:-1]):
        exec(compile(code, f"{name}.ipynb, cell {number}", "exec"), space)
    return space


def commands(text: str) -> list[list[str]]:
    """The words of each ``ccu-fast`` line, continued ones joined."""
    lines = re.findall(r"^\s*(ccu-fast .*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line.split("  writes ")[0]) for line in lines]


class TestNotebooks:
    @pytest.mark.parametrize("name", NOTEBOOKS)
    def test_the_code_is_the_example_s(self, name: str) -> None:
        made = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
        cells = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert cells == code_cells(source), "run python -m build_support.notebooks"
        assert cells[-1].startswith(RUN)
        code = [
            line for line in source.partition("\nfrom __future__")[2].partition("\nif __name__")[0].split("\n") if line
        ]
        assert [line for line in "\n".join(cells[:-1]).partition("from __future__")[2].split("\n") if line] == code

    @pytest.mark.parametrize("name", NOTEBOOKS)
    def test_the_outputs_are_those_of_one_run_from_top_to_bottom(self, name: str) -> None:
        made = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
        code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert [bool(cell["outputs"]) for cell in code] == [False] * (len(code) - 1) + [True]
        printed = "".join("".join(output["text"]) for output in code[-1]["outputs"])
        assert all(output["name"] == "stdout" for output in code[-1]["outputs"])
        promise = {"train_clip": "digits read zero-shot 96", "unlearn_people": "verdict: passed"}[name]
        assert promise in printed


class TestTrainClip:
    def test_learns_to_read(self, capsys: pytest.CaptureFixture[str]) -> None:
        from_notebook("train_clip")["main"](["--small", "--device", "cpu"])
        told = capsys.readouterr().out
        right = [float(share) for share in re.findall(r"zero-shot ([\d.]+)%", told)]
        losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d{3})", told)]
        assert len(right) == 6 and right[-1] > 70  # guessing is 10
        assert losses[-1] < 0.1 * losses[0]
        assert re.search(r"info_nce +[\d.]+ ms +[\d.]+ MB\n +torch +[\d.]+ ms +[\d.]+ MB\n", told)

    def test_the_line_before_has_the_loss_of_the_line_after(self) -> None:
        space = example("train_clip")
        model, x, y = space["SmallClip"](words=20), torch.randn(12, 64), torch.randn(12, 64)
        lines = (
            (EXAMPLES / "train_clip.py").read_text(encoding="utf-8").split("logits in memory:\n")[1].split("# After")[0]
        )
        code = "\n".join(line.strip().removeprefix("#     ") for line in lines.splitlines())
        names = {"self": model, "image": x, "text": y, "torch": torch, "F": torch.nn.functional}
        exec(code.replace("return ", "before = "), names)
        torch.testing.assert_close(model.loss(x, y), names["before"])

    def test_gradient_caching_gives_the_same_gradients(self) -> None:
        space = example("train_clip")
        torch.manual_seed(0)
        model, images, texts = space["SmallClip"](words=20), torch.rand(24, 1, 16, 64), torch.randint(20, (24, 9))
        model.loss(model.encode_image(images), model.encode_text(texts)).backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        space["cached_step"](model.loss, [(model.encode_image, images), (model.encode_text, texts)], chunk=7)
        torch.testing.assert_close([p.grad for p in model.parameters()], whole, rtol=1e-4, atol=1e-6)


class TestFineTune:
    """The trainer itself runs in tests/patch/test_sentence_transformers_example.py, under make compat."""

    def test_the_loss_is_the_library_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library("sentence_transformers")
        space = example("finetune_sentence_transformers")
        pairs = space["documented_functions"]()
        assert len(pairs) > 1000 and len({text for _, text in pairs}) == len(pairs)
        model = space["word_model"]([" ".join(pair) for pair in pairs])
        calls, fused = [], patched.info_nce
        monkeypatch.setattr(patched, "info_nce", lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs))
        theirs, ours = space["loss_both_ways"](model, pairs[:64])
        assert len(calls) == 1
        assert ours == pytest.approx(theirs, rel=1e-5) and theirs > 0.1
        assert 0.1 < space["recall"](model, pairs[::5]) < 1


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    said = torchrun(2, str(EXAMPLES / "train_on_two_processes.py"), "--small", "--device", "cpu", cwd=tmp_path)
    both = re.findall(r"loss ([\d.]+)  of one process ([\d.]+)", said)
    assert len(both) == 2
    for ours, expected in both:
        assert float(ours) == pytest.approx(float(expected), abs=1e-5)
    assert float(re.findall(r"largest difference of a weight after any of 10 steps: (\S+)", said)[0]) < 1e-5


class TestProtectPhotos:
    def test_writes_a_protected_folder_and_reads_what_is_left(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        found = example("protect_photos")["main"](["--small", "--strength", "strong"])
        told = capsys.readouterr().out
        assert found["checks"]["passed"] and 0 < found["manifest"]["measured"]["eps_255"] <= 8
        names = {path.relative_to("photos").with_suffix("") for path in Path("photos").rglob("*.txt")}
        assert len(names) == 128 + 50
        assert {path.relative_to("protected").with_suffix("") for path in Path("protected").rglob("*.png")} == names
        assert list(found["figures"]["datasets"]) == ["clean", "protected"]

        # The same by the commands that it prints.
        protect, verify, evaluate = commands(told)
        where = protect.index("--out") + 1
        protect[where] = "again"
        assert main(protect[1:]) == 0
        for file in Path("protected").rglob("*.png"):
            assert file.read_bytes() == ("again" / file.relative_to("protected")).read_bytes()
        assert main(verify[1:]) == 0 and Path("preview.html").is_file()
        assert main(evaluate[1:]) == 0 and Path("page.html").is_file()


class TestUnlearnPeople:
    def test_forgets_pictures_and_keeps_the_rest(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(figures, "embedding_map", quick_map)
        found = from_notebook("unlearn_people")["main"](["--small"])
        told = capsys.readouterr().out
        before, after = found["before"], found["after"]
        assert before["visual"]["forget_test"] > 0.9 > 0.1 > after["visual"]["forget_test"]
        assert after["other"] == before["other"] and after["visual"]["retain_test"] > 0.9
        assert found["verdict"].kind == "passed" and found["alarm"] is None and "no alarm" in told

        # The same by the command, from the files that it wrote and the example beside them.
        Path("unlearn_people.py").write_bytes((EXAMPLES / "unlearn_people.py").read_bytes())
        (command,) = commands(told.replace("next: ", ""))
        assert main(command[1:]) == 0
        weights = load_file("clean/model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in found["model"].state_dict().items())
        assert "passed" in Path("clean/card.md").read_text() and Path("clean/report.html").is_file()
        assert json.loads(Path("clean/results.json").read_text())["alarm"] is None


class TestSearchTokens:
    def test_the_loss_falls_and_the_same_tokens_are_found_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        space = example("search_tokens")
        words, before, after = space["main"](["--small"])
        assert after < before - 0.1 and not set(words) & {"?", *space["SENTENCE"].split()}
        assert (words, before, after) == space["main"](["--small"])
        assert "round  10" in capsys.readouterr().out

    def test_a_word_that_the_model_has_not_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            example("search_tokens")["main"](["--small", "--sentence", "the value of xyzzy"])
        assert (
            "--sentence: expected words that the model has (more with --words), got xyzzy\n" in capsys.readouterr().err
        )
