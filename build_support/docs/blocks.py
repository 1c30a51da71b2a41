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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_NEEDS = re.compile(r"^\s*<!-- needs: (\S+) -->\s*$")
_RUN_BY = re.compile(r"^\s*<!-- run by: (.+?) -->\s*$")
_SETUP = re.compile(r"^\s*<!-- setup\s*$")
_FILE = re.compile(r"\A# ([\w./-]+\.(?:py|toml|json))\n")
# Code in a line may go on in the next one of its paragraph.
_CODE = r"(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n)[\s\S])+?(?<!`)(?P=ticks)(?!`)"
_LINK = r"""(?P<before>\]\(<?|\b(?:src|srcset|href)=")(?P<link>[^()\s<>"]+)(?=>?(?:\s+"[^"]*")?\)|")"""
_CODE_OR_LINK = re.compile(f"{_CODE}|{_LINK}")


@dataclass(frozen=True)
class Block:
    """A fenced block, or hidden setup.

    Attributes:
        language: the first word after the fence; ``"setup"`` of hidden code.
        text: the lines in it.
        line: the number of its first line in the page.
        source: its lines as they stand in the page, with the fence or the marks of the comment.
        needs: the library without which it cannot run.
        run_by: the tests that run its commands.
    """

    language: str
    text: str
    line: int
    source: str
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
    return [part for part in taken_apart(page) if isinstance(part, Block)]


def prose(page: str) -> str:
    """A page without its blocks, hidden setup and code in a line."""
    return re.sub(_CODE, "`code`", _text(page))


def taken_apart(page: str) -> Iterator[Block | str]:
    """A page in its order: blocks, and the text between them without remarks to blocks.

    Raises:
        ValueError: as :func:`blocks`.
    """
    text = ""
    needs, run_by = None, ()
    lines = iter(enumerate(page.splitlines(keepends=True), 1))
    for number, line in lines:
        if told := _NEEDS.match(line):
            needs = told[1]
        elif told := _RUN_BY.match(line):
            run_by = tuple(told[1].split())
        elif _SETUP.match(line):
            yield text
            text = ""
            taken = _until(lines, r"-->", number)
            yield Block("setup", "".join(taken[:-1]), number + 1, line + "".join(taken), needs)
        elif fence := _FENCE.match(line.rstrip("\n")):
            yield text
            text = ""
            indent, ticks, info = fence.groups()
            taken = _until(lines, rf"{ticks[0]}{{{len(ticks)},}}", number)
            code = "".join(inside.removeprefix(indent) for inside in taken[:-1])
            yield Block((info.split() or [""])[0], code, number + 1, line + "".join(taken), needs, run_by)
            needs, run_by = None, ()
        else:
            text += line
    if needs or run_by:
        raise ValueError(f"a remark to a block that does not follow: {needs or run_by}")
    yield text


def _text(page: str) -> str:
    return "".join(part for part in taken_apart(page) if isinstance(part, str))


def _until(lines: Iterator[tuple[int, str]], end: str, start: int) -> list[str]:
    """The lines up to the one that is ``end``, with it."""
    taken: list[str] = []
    for _, line in lines:
        taken.append(line)
        if re.fullmatch(end, line.strip()):
            return taken
    raise ValueError(f"line {start}: what begins here does not end")


def links(page: str) -> list[str]:
    """Where the links and pictures of a page point, apart from other sites."""
    found = [mark["link"] for mark in _CODE_OR_LINK.finditer(_text(page)) if mark["link"]]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def with_links(text: str, moved: Callable[[str], str]) -> str:
    """A text without blocks, each of its links and pictures pointing where ``moved`` says."""
    return _CODE_OR_LINK.sub(lambda m: m["before"] + moved(m["link"]) if m["link"] else m[0], text)


def anchors(page: str) -> set[str]:
    """What can be linked to in a page, where GitHub and the site agree on the name."""
    found: set[str] = set()
    text = re.sub(r"<!--.*?-->", "", _text(page), flags=re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        github = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        ascii_ = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_).strip().lower())
        if github == site:
            found.add(github)
    return found | set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
