"""The command ``ccu-fast``: ``info`` needs torch alone, the other commands (:mod:`.app`) the extra ``apps``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ccu_fast import extras, info
from ccu_fast._version import __version__
from ccu_fast.cli.console import one_sentence

COMMANDS = ("info", "unlearn", "demo", "protect", "evaluate", "verify", "bench")

USAGE = """usage: ccu-fast COMMAND [OPTIONS]

  info      what this installation can do on this machine and, for what it cannot, why
  unlearn   take what a forget set taught out of a trained model, or compare all methods
  demo      unlearn and protect real digits, and write a report
  protect   write a copy of an image-caption dataset that teaches a model less
  evaluate  train models on datasets and say what they have learned
  verify    check a protected dataset before it is published
  bench     measure the operations against their peers, in a checkout

All but info need more packages: """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own.

    Returns:
        The exit status: 0, 1 for what cannot be done here, 2 for a wrong command line, 3 for an unlearned model that
        is not to be used, 130 after Ctrl-C.
    """
    # What Pillow remarks on single pictures; what is wrong with one that cannot be used is an error of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words and words[0] in COMMANDS else ""
    try:
        with one_sentence(command), _flushed():
            if command == "info":
                return info.main(words[1:], prog="ccu-fast info")
            try:
                extras.require("typer")
            except ImportError:
                if command:
                    raise
                return _without_typer(words)
            from ccu_fast.cli.app import app

            app(args=words, prog_name="ccu-fast")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextmanager
def _flushed() -> Iterator[None]:
    """Nothing of stdout is left for the end of Python, where a reader that has gone would cost a traceback."""
    try:
        yield
    finally:
        sys.stdout.flush()


def _without_typer(words: list[str]) -> int:
    if words == ["--version"]:
        print(__version__)
    elif not words or words[0] == "--help":
        print(USAGE + extras.command("apps"))
    else:
        print(f"ccu-fast: no command {words[0]!r}\n\n{USAGE}{extras.command('apps')}", file=sys.stderr)
        return 2
    return 0
