"""The Python of a page, run as a reader would: one block after the other, in one module and the current folder."""

from __future__ import annotations

import doctest
import linecache
import sys
from pathlib import Path
from types import ModuleType

from build_support.docs.blocks import Block

MODULE = "__page__"


class Session:
    """A page whose Python runs. As a context, its module can be imported, as by pickle.

    Args:
        page: the file.
    """

    def __init__(self, page: Path) -> None:
        self.page = page
        self.module = ModuleType(MODULE)
        self._lines: list[str] = []  # the Python that ran, on the lines of the page

    def __enter__(self) -> Session:
        sys.modules[MODULE] = self.module
        return self

    def __exit__(self, *_: object) -> None:
        del sys.modules[MODULE]

    def python(self, block: Block) -> None:
        """Run a block of Python or hidden setup; one that is a file is written and compiled.

        Raises:
            AssertionError: a session with prompts answers something else.
        """
        if block.file:
            self.write(block)
            compile(block.text, block.file, "exec")
        elif block.text.startswith(">>>"):
            self._doctest(block)
        else:
            # Tracebacks, and what reads the source of a function, find its lines where they are in the page.
            self._lines += ["\n"] * (block.line - 1 - len(self._lines)) + block.text.splitlines(keepends=True)
            linecache.cache[str(self.page)] = (sum(map(len, self._lines)), None, self._lines, str(self.page))
            code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec", dont_inherit=True)
            exec(code, vars(self.module))

    @staticmethod
    def write(block: Block) -> None:
        """Make the file that a block is."""
        path = Path(str(block.file))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _doctest(self, block: Block) -> None:
        name = str(self.page)
        test = doctest.DocTestParser().get_doctest(block.text, vars(self.module), name, name, block.line - 1)
        said: list[str] = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append, clear_globs=False)
        if result.failed:
            raise AssertionError("".join(said))
        vars(self.module).update(test.globs)
