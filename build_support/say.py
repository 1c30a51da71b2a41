"""Run a command of the Makefile and say what it is doing: at its start, every few seconds of silence, at its end.

    python build_support/say.py [--only REGEX] WHAT -- COMMAND...

Needs the standard library alone: it also makes the environment. What the command writes is passed on line by line,
after Ctrl-C too, which reaches it as well; of a command with ``--only`` just the lines that match, and everything if it
fails. SIGTERM is handed on to it.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SECONDS = 8.0  # with what a busy machine adds, something is written every ten
WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status, as a shell tells it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="say", usage="%(prog)s [--only REGEX] WHAT -- COMMAND...")
    parser.add_argument("what")
    parser.add_argument("--only", metavar="REGEX", type=re.compile, help="the lines of the command that are passed on")
    if "--" not in words:
        parser.error("expected -- and a command")
    at = words.index("--")
    options, command = parser.parse_args(words[:at]), words[at + 1 :]
    return run(options.what, command, options.only, write)


def write(line: str) -> None:
    """A line that is there at once, also where it goes into a pipe, with what the terminal cannot show replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{line}\n".encode(encoding, "replace").decode(encoding))  # in one piece: two threads write
    sys.stdout.flush()


def run(what: str, command: Sequence[str], only: re.Pattern[str] | None, say: Callable[[str], None]) -> int:
    """Run one command.

    Args:
        what: what it does, for people.
        command: its words.
        only: of the command's lines the ones that are passed on; None passes on all.
        say: takes each line of what is told.

    Returns:
        The command's exit status; 128 and the number of the signal that ended it.
    """
    say(f"-- {what}")
    started = last = time.monotonic()
    lines: list[str] = []
    over = threading.Event()

    def told(line: str) -> None:
        nonlocal last
        last = time.monotonic()
        say(line)

    def watch() -> None:
        while not over.wait(max(0.1, last + SECONDS - time.monotonic())):
            if time.monotonic() >= last + SECONDS:
                newest = next((line.strip() for line in reversed(lines) if line.strip()), "")
                told(f"   … {time.monotonic() - started:.0f} s{': ' if newest else ''}{newest}"[:WIDTH])

    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as child,
        _signals(child) as caught,
    ):
        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if only is None:
                told(lines[-1])
            elif only.search(line):
                told(f"   {line.strip()}"[:WIDTH])
        status = child.wait()
    over.set()
    watching.join()  # a line of it would stand below the last one
    if caught and status != 0:  # what a command makes of Ctrl-C differs
        status = -caught[0]
    if status != 0 and not caught and only is not None:
        say("\n".join(lines))
    say(f"   {'done in' if status == 0 else 'failed after'} {time.monotonic() - started:.0f} s")
    return status if status >= 0 else 128 - status


@contextmanager
def _signals(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """The signals that came in a block, which goes on until the child has ended."""
    caught: list[int] = []

    def take(number: int, _: object) -> None:
        caught.append(number)
        if number == signal.SIGTERM:
            child.send_signal(number)

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
