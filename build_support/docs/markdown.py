"""From other text to the Markdown of the site: docstrings, notebooks, pages as GitHub shows them. No mkdocs here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from build_support.docs.blocks import taken_apart, with_links

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
LITERAL = re.compile(r"^(?P<indent> *)(?P<said>.*)::\n\n(?P<code>(?:(?P=indent) +.*\n|\n)+)", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*\n(?:.+\n)*", re.MULTILINE)
SECTION = re.compile(r"^((?:Args|Attributes|Raises):\n)((?: +.*\n|\n(?= ))+)", re.MULTILINE)
ITEM = re.compile(r"^( {4}[\w*]+(?:, [\w*]+)*): (>?)", re.MULTILINE)


def from_docstring(text: str, link: Callable[[str], str], returns: str = "") -> str:
    """A docstring of ours in the Markdown with sections that griffe reads.

    Args:
        text: the docstring.
        link: the Markdown for the name in a role.
        returns: what the function is annotated to return.
    """
    text = LITERAL.sub(_fenced, text + "\n")
    text = DOCTEST.sub(lambda found: f"```pycon\n{re.sub(' *# doctest: .*', '', found[0])}```\n", text)
    text = SECTION.sub(lambda found: found[1] + ITEM.sub(_item, found[2]), text)
    if returns:  # else what stands before a colon in the first line would be taken for it
        text = re.sub(r"^(Returns:\n +)(?=\S)", lambda found: f"{found[1]}{returns}: ", text, flags=re.MULTILINE)
    text = re.sub(r"^Source:|^(?:Args|Returns|Raises):(?= )", _heading, text, flags=re.MULTILINE)
    return ROLE.sub(lambda found: link(found[1]), text).rstrip()


def from_notebook(notebook: dict[str, Any]) -> str:
    """The cells of a notebook, code with what it printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                printed = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def from_page(markdown: str, link: Callable[[str], str]) -> str:
    """A page without what only tests read; ``link`` moves its links, and code with prompts is a session."""
    parts = []
    for part in taken_apart(markdown):
        if isinstance(part, str):
            parts.append(with_links(part, link))
        elif part.language != "setup":
            parts.append(part.source.replace("```python\n>>>", "```pycon\n>>>", 1))
    return "".join(parts)


def _item(found: re.Match[str]) -> str:
    """As griffe reads it: a space would end the name, of which there may be several, and > begins no quotation."""
    return found[1].replace(", ", ",\N{EN SPACE}") + ": " + ("\\>" if found[2] else "")


def _heading(found: re.Match[str]) -> str:
    """What stands on the line of its heading is no section to griffe; it gets the heading that a section has."""
    return f"**{found[0].replace('Args', 'Parameters')}**"


def _fenced(found: re.Match[str]) -> str:
    indent, lines = found["indent"], found["code"].rstrip().split("\n")
    inner = min(len(line) - len(line.lstrip()) for line in lines if line)
    code = "\n".join((indent + line[inner:]).rstrip() for line in lines)
    return f"{indent}{found['said']}:\n\n{indent}```python\n{code}\n{indent}```\n\n"
