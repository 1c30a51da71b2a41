"""The pages that people read, taken apart: blocks of code, hidden setup, links, anchors.

Conventions, in HTML comments that no reader sees:

- ``<!-- setup``, lines of code, ``-->``: what a reader already has, such as a model and a batch; runs where it stands.
- ``<!-- needs: NAME -->``: what follows, up to the next block, needs a library, by its name in ``ccu_fast.patch``.
- ``<!-- run by: tests/a/test_b.py::test_c -->``: the commands of the next block take long, and that test runs them;
  several tests are separated by blanks.

A block whose first line is a comment with the name of a file, such as ``# settings.toml``, is that file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_NEEDS = re.compile(r"^\s*<!-- needs: (\S+) -->\s*$")
_RUN_BY = re.compile(r"^\s*<!-- run by: (.+?) -->\s*$")
_SETUP = re.compile(r"^\s*<!-- setup\s*$")
_FILE = re.compile(r"\A# ([\w./-]+\.(?:py|toml|json))\n")
_LINK = re.compile(r"""\]\(<?([^()\s>]+)>?(?:\s+"[^"]*")?\)|(?:src|href|srcset)="([^"]+)\"""")


@dataclass(frozen=True)
class Block:
    """A fenced block, or hidden setup.

    Attributes:
        language: the first word after the fence; ``"setup"`` of hidden code.
        text: the lines in it.
        line: the number of its first line in the page.
        needs: the library without which it cannot run.
        run_by: the tests that run its commands.
    """

    language: str
    text: str
    line: int
    needs: str | None = None
    run_by: tuple[str, ...] = ()

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        found = _FILE.match(self.text)
        return found[1] if found else None


def pages() -> list[Path]:
    """README, CONTRIBUTING and all below docs."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: str) -> list[Block]:
    """What of a page is code, in its order.

    Raises:
        ValueError: a fence or a comment that does not end, or a remark to a block that does not follow.
    """
    return _taken_apart(page)[0]


def prose(page: str) -> str:
    """A page without its blocks, hidden setup and code in a line."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "`code`", _taken_apart(page)[1])


def _taken_apart(page: str) -> tuple[list[Block], str]:
    found: list[Block] = []
    rest: list[str] = []
    needs, run_by = None, ()
    lines = iter(enumerate(page.splitlines(), 1))
    for number, line in lines:
        if told := _NEEDS.match(line):
            needs = told[1]
        elif told := _RUN_BY.match(line):
            run_by = tuple(told[1].split())
        elif _SETUP.match(line):
            text = _until(lines, r"-->", number, "")
            found.append(Block("setup", text, number + 1, needs))
        elif fence := _FENCE.match(line):
            indent, ticks, info = fence.groups()
            text = _until(lines, rf"{ticks[0]}{{{len(ticks)},}}", number, indent)
            found.append(Block((info.split() or [""])[0], text, number + 1, needs, run_by))
            needs, run_by = None, ()
        else:
            rest.append(line)
    if needs or run_by:
        raise ValueError(f"a remark to a block that does not follow: {needs or run_by}")
    return found, "\n".join(rest)


def _until(lines: Iterator[tuple[int, str]], end: str, start: int, indent: str) -> str:
    """The lines before the one that is ``end``, without their common indent."""
    taken: list[str] = []
    for _, line in lines:
        if re.fullmatch(end, line.strip()):
            return "".join(f"{one}\n" for one in taken)
        taken.append(line.removeprefix(indent))
    raise ValueError(f"line {start}: what begins here does not end")


def links(page: str) -> list[str]:
    """Where the links and pictures of a page point, apart from other sites."""
    found = [plain or attribute for plain, attribute in _LINK.findall(prose(page))]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: str) -> set[str]:
    """What can be linked to in a page, where GitHub and the site agree on the name."""
    found: set[str] = set()
    text = re.sub(r"<!--.*?-->", "", _taken_apart(page)[1], flags=re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        github = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        ascii_ = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_).strip().lower())
        if github == site:
            found.add(github)
    return found | set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
