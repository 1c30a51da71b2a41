"""Examples as notebooks: the code of the ``.py``, a cell for each of its parts, with the output of a real run.

    pip install nbclient ipykernel
    python -m build_support.notebooks                # writes docs/examples/*.ipynb anew; takes a minute or two

A test compares the cells with the examples, so a changed example needs its notebook made again.
"""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
NOTEBOOKS = ("train_clip", "unlearn_people")
RUN = "main([])"  # a notebook has no command line


def code_cells(source: str) -> list[str]:
    """The imports and constants, each class and function, and a call of ``main`` in place of the last lines."""
    body = ast.parse(source).body[1:]  # without the docstring
    lines = source.splitlines()
    parts: list[list[int]] = []  # first and last line of each
    alone = (ast.FunctionDef, ast.ClassDef)
    for before, node in zip([None, *body], body, strict=False):
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if parts and not isinstance(node, alone) and not isinstance(before, alone):
            parts[-1][1] = node.end_lineno or start
        else:
            parts.append([start, node.end_lineno or start])
    cells = ["\n".join(lines[first - 1 : last]) for first, last in parts]
    if not cells[-1].startswith('if __name__ == "__main__":'):
        raise ValueError("source: expected an example that ends with a call of main, got another end")
    return [*cells[:-1], RUN + ";"]  # the semicolon keeps the returned value out of the output


def notebook(name: str) -> dict[str, Any]:
    """The notebook of an example, not run yet, in Jupyter's format 4.5."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    title, _, head = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    text = f"# {title}\n\nThe code of [{name}.py]({name}.py), run with its defaults.\n\n```text\n{head}\n```"
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": text}]
    for code in code_cells(source):
        cells.append(
            {"cell_type": "code", "metadata": {}, "source": code, "execution_count": None, "outputs": []},
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [{"id": f"{name.replace('_', '-')}-{n}", **cell} for n, cell in enumerate(cells)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    """Run each notebook in an empty folder and write it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    for name in NOTEBOOKS:
        made = nbformat.from_dict(notebook(name))
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(
                made, timeout=1800, resources={"metadata": {"path": folder}}, record_timing=False, coalesce_streams=True
            ).execute()
        made.metadata["language_info"] = {"name": "python"}  # not the version of who ran it
        nbformat.write(made, EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    main()
