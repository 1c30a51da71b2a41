"""Running the blocks of a page in this process, as a reader would one after the other."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

from benchmarks.compat.environments import ENVIRONMENTS
from build_support.docs.blocks import Block
from build_support.docs.session import Session
from ccu_fast import patch
from ccu_fast.cli.main import main
from tests.support import torchvision_stub
from tests.support.paths import ROOT
from tests.support.presence import absent

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHOWN = ("text", "console", "mermaid")
# Programs of which a page may tell; what they are given is checked as far as it is ours.
TOLD = ("cd", "docker", "git", "make", "npm", "pip", "pre-commit", "source", "torchrun")


class Run(Session):
    """A page being run, with its commands and settings; what of it is yet to be run.

    Args:
        page: the file.
    """

    def __init__(self, page: Path) -> None:
        super().__init__(page)
        self.scripts: dict[str, bool] = {}  # Python files of the page, and whether something runs them

    def block(self, block: Block) -> None:
        """Run, parse or check a block.

        Raises:
            AssertionError: it is of no kind that can be checked, or tells of something that is not there.
        """
        if block.needs is not None and not self.has(block.needs):
            return
        for test in block.run_by:
            assert exists(test), f"no test {test}"
        if block.file:
            assert block.language in ("python", "toml", "json"), f"{block.file} is {block.language}"
            self.write(block)
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "bash":
            for command in commands(block.text):
                self.command(command, block)
        elif block.language in ("python", "setup"):
            self.python(block)
            if block.file:
                self.scripts[block.file] = bool(block.run_by)
        else:
            assert block.language in SHOWN, f"a block of an unknown language: {block.language!r}"

    def has(self, target: str) -> bool:
        """Whether a library is installed; where it is not, ``make compat`` runs the library's own page."""
        assert target in patch.TARGETS, f"needs: expected one of {sorted(patch.TARGETS)}, got {target!r}"
        torchvision_stub.install()
        found = importlib.util.find_spec(patch.TARGETS[target].package or "src") is not None
        of_compat = self.page.name == f"{target}.md" and target in {e.target for e in ENVIRONMENTS}
        if not found and not of_compat:
            absent(target, "not installed")
        return found

    def command(self, words: list[str], block: Block) -> None:
        """Run a command line, or check what it tells of where another test runs it."""
        settings = [word for word in words if re.match(r"\w+=", word)]
        program, *words = words[len(settings) if words[0] in settings else 0 :]
        if block.run_by:
            files = [(ROOT / test.partition("::")[0]).read_text(encoding="utf-8") for test in block.run_by]
            subject = of_command(program, words)
            assert any(subject in text for text in files), f"{subject} is in none of {block.run_by}"
            self.scripts.update({word: True for word in words if word in self.scripts})
            if program == "torchrun":
                check_told(program, words, self.page.parent)
        elif program == "ccu-fast":
            assert main(words) == 0, shlex.join(words)
        elif program == "python":
            self.interpreter(words)
        else:
            check_told(program, words, self.page.parent)

    def interpreter(self, words: list[str]) -> None:
        if words[0] == "-c":
            exec(compile(words[1], "<-c>", "exec"), {"__name__": "__main__"})
            return
        if words[:2] == ["-m", "ccu_fast"]:
            assert main(words[2:]) == 0, shlex.join(words)
            return
        assert words[0] != "-m", f"python {shlex.join(words)}: name the test that runs it (<!-- run by: … -->)"
        path = next((p for p in (Path(words[0]), self.page.parent / words[0], ROOT / words[0]) if p.is_file()), None)
        assert path is not None, f"{words[0]} is not there"
        self.scripts[words[0]] = True
        before, sys.argv = sys.argv, words
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            sys.argv = before

    def done(self) -> None:
        """Raises where a file of the page was written and not run."""
        assert all(self.scripts.values()), f"nothing runs {[name for name, ran in self.scripts.items() if not ran]}"


def commands(text: str) -> list[list[str]]:
    """The command lines of a block in words, without comments; those joined by ``&&`` apart."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def of_command(program: str, words: list[str]) -> str:
    """What a command line is about: the command of ``ccu-fast``; the module, the file or the function that runs."""
    if "-m" in words:
        at = words.index("-m")
        return of_command("ccu-fast", words[at + 2 :]) if words[at + 1] == "ccu_fast" else words[at + 1]
    if words[0] == "-c":
        return re.findall(r"import (\w+)", words[1])[0]
    if program in ("python", "torchrun"):
        return next(Path(word).stem for word in words if word.endswith(".py"))
    return words[0]


def exists(test: str) -> bool:
    """Whether there is a test of this name, written as pytest does."""
    path, *names = test.split("::")
    if not names or not (ROOT / path).is_file():
        return False
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


def optional_dependencies() -> dict[str, list[str]]:
    """Requirements by the extra that brings them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


def of_the_tests(module: str) -> bool:
    """Whether the environment that ``make test`` makes has a package of this name."""
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in optional_dependencies()["test"]}
    names.update(re.findall(r"'([\w-]+)==", (ROOT / "Makefile").read_text(encoding="utf-8")))
    return module.split(".")[0].replace("_", "-") in names


def check_told(program: str, words: list[str], folder: Path) -> None:
    """A command that is told and not run: the targets, extras and files of ours that it names are there."""
    assert program in TOLD, f"{program}: expected ccu-fast, python or one of {TOLD}"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        named = [word for word in words if "=" not in word and not word.startswith("-")]
        assert named and set(named) <= set(targets), f"make {shlex.join(named)}: no such target"
    if program == "pip":
        extras = set(optional_dependencies())
        for word in words:
            # There is no release: what pip would find by this name is not this package.
            assert not re.match(r"ccu[-_]fast\b(?!-\d)", word), f"pip {shlex.join(words)}: nothing is on PyPI"
            if found := re.match(r"(?:\.|.*\.whl)\[([\w,-]+)\]$", word):
                assert set(found[1].split(",")) <= extras, f"{word}: no such extra"
    if program == "torchrun":
        for word in words:
            if word.endswith((".py", ".toml")):
                places = (Path(word), folder / word, ROOT / word)
                assert any(place.is_file() for place in places), f"{word} is not there"
