"""What all commands share at the terminal: how they report errors and show progress."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ccu_fast import extras
from ccu_fast.files import FULL

if TYPE_CHECKING:
    from rich.progress import TaskID

ALARMED = 3  # where a model must not be used as it is (:mod:`ccu_fast.unlearn.alarms`)
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
# The checks of this package name the argument first; an error without a name is a bug.
NAMED = re.compile(r"[\w\[\], ./-]+: ")
SHOWN = 12
LOGGED_EVERY = 10.0  # seconds between two lines of progress where there is no terminal
TERMINATED = 143  # for one that SIGTERM ended
READER_GONE = 141  # what a shell reports for a program that wrote to a closed pipe
# Command → each option's name in Python, and as it is typed; the decorator ``options.with_fields`` knows them.
FLAGS: dict[str, dict[str, str]] = {}


@contextmanager
def one_sentence(command: str, *, goes_on: bool = True) -> Iterator[None]:
    """End with one sentence on stderr for an error that the user can fix; a bug shows its traceback.

    Args:
        command: "unlearn" of ``ccu-fast unlearn``.
        goes_on: whether the same command, given again, goes on where this one was.

    Raises:
        SystemExit: 1; 3 for an error that is an alarm; 130 after Ctrl-C.
    """
    try:
        yield
    except BrokenPipeError:
        nobody_reads()
        raise SystemExit(READER_GONE) from None
    except BaseException as error:
        told = _sentence(error, goes_on)
        if told is None:
            raise
        # Notes are those of files.after_the_work.
        flags, alarm = FLAGS.get(command, {}), getattr(error, "alarm", None)
        said = "; ".join([_as_typed(told, flags), *getattr(error, "__notes__", ())])
        if alarm is not None:
            said = f"{alarm.name}: {said}; {_as_typed(alarm.advice, flags)}"
        _print(command, said)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1 if alarm is None else ALARMED
        raise SystemExit(code) from None


@contextmanager
def tidied() -> Iterator[None]:
    """SIGTERM ends the block as an error does, so that what is temporary in it is removed.

    Raises:
        SystemExit: 143, as a shell reports it.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(command: str, said: str) -> None:
    """One line of a command on stderr, with options named as on the command line."""
    _print(command, _as_typed(said, FLAGS.get(command, {})))


def _print(command: str, said: str) -> None:
    print(f"{f'ccu-fast {command}'.strip()}: {' '.join(said.split())}", file=sys.stderr, flush=True)


def nobody_reads() -> None:
    """What is still to be written goes nowhere, as after ``ccu-fast … | head``; else Python tells of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_typed(told: str, flags: Mapping[str, str]) -> str:
    """With options named as on the command line: the arguments that an error begins with, and names with a ``_``.

    Such a name in a path or a quotation is left alone.
    """
    names, colon, rest = told.partition(": ")
    words = names.split(", ")
    if colon and all(word in flags for word in words):
        names = ", ".join(flags[word] for word in words)
    for name in filter(lambda name: "_" in name, flags):
        rest = re.sub(rf"(?<![\w/.'\"-]){name}(?![\w/.'\"-])", flags[name], rest)
    return names + colon + rest


def _sentence(error: BaseException, goes_on: bool) -> str | None:
    """What is said of an error; None for a bug, and for what is no error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ImportError):
        if "pip install" in str(error):
            return str(error)
        known = extras.extra_of(error.name or "") is not None
        return extras.missing(error.name or "", error) if known else None
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        if error.filename is not None:
            said = f"{error.filename}: {said}"
        if error.errno in FULL:
            said += "; make room and give the same command again" + (": it goes on" if goes_on else "")
        return said
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"{str(error).split('. ')[0] or 'out of memory'}; choose a smaller batch or another device"
    if isinstance(error, FloatingPointError):
        return str(error)
    named = isinstance(error, (ValueError, TypeError)) and NAMED.match(str(error))
    return str(error) if named else None


class Live:
    """A bar for each of the last stages, with the time that is left and a note; gone when the work ends.

    Where stderr is no terminal, such as in a log, lines of the same: one when a stage begins, the first at once, and
    one at least every few seconds. A stage of one step has no counts.

    Args:
        quiet: show nothing.
        clock: seconds.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(
        self, quiet: bool, clock: Callable[[], float] = time.monotonic, *, every: float = LOGGED_EVERY
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        # A stage may have the name of a dataset, whose brackets are no markup.
        stage, note = (TextColumn(text, markup=False) for text in ("{task.description:<24}", "{task.fields[note]}"))
        columns = [stage, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        columns += [TextColumn("left"), TimeRemainingColumn(), note]
        console = Console(stderr=True)
        console.quiet = quiet or not console.is_interactive  # a log is not full of bars
        self.bars = Bars(*columns, console=console, transient=True, get_time=clock)
        self._stages: dict[str, TaskID] = {}
        self._clock, self._logs, self._told = clock, not quiet and not console.is_interactive, -math.inf
        self._every, self._newest, self._heard = every, "", clock()
        self._telling = threading.Lock()  # the work tells, and so does the watch
        self._began: dict[str, tuple[float, int]] = {}  # by stage: when it was first heard of, and what was done then

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """A :data:`ccu_fast.runs.progress.Progress`."""
        bars, stages = self.bars, self._stages
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=total, note=note)
            for old in bars.task_ids[1 : 1 - SHOWN]:  # the first may be of the whole
                bars.update(old, visible=False)
        elif done < bars.tasks[stages[stage]].completed:
            bars.reset(stages[stage])  # the next part has a stage of the same name
            self._began.pop(stage, None)
        bars.update(stages[stage], completed=done, total=total, note=note)
        if self._logs:
            self._log(stage, done, total, note)

    def _log(self, stage: str, done: int, total: int, note: str) -> None:
        now, begins = self._clock(), stage not in self._began
        start, before = self._began.setdefault(stage, (now, done))
        parts = [stage if total <= 1 else f"{stage} {done}/{total}"]
        if before < done < total:  # what was done before this process began says nothing about its pace
            left = timedelta(seconds=round((now - start) / (done - before) * (total - done)))
            parts.append(f"{left} left")
        self._newest, self._heard = ", ".join(filter(None, [*parts, note])), now
        self._tell(now, 0.0 if begins else self._every)

    def _tell(self, now: float, after: float) -> None:
        with self._telling:
            if now - self._told >= after and self._newest:
                self._told = now
                silent = f", at it for {now - self._heard:.0f} s" if now >= self._heard + 1 else ""
                print(f"{self._newest}{silent}", file=sys.stderr, flush=True)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """A log has its lines also while a block says nothing for long: what it last said, and how long ago."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(max(0.1, self._told + self._every - self._clock())):
                self._tell(self._clock(), self._every)

        watching = threading.Thread(target=watch, daemon=True)
        if self._logs:
            watching.start()
        try:
            yield
        finally:
            over.set()
            if self._logs:
                watching.join()  # a line of it would stand below what follows the block

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a block that prints: the bars are gone, and there again afterwards."""
        self.bars.stop()
        yield
        self.bars.start()


@contextmanager
def live(quiet: bool, *, every: float = LOGGED_EVERY) -> Iterator[Live]:
    """Show the progress of a block; see :class:`Live`."""
    shown = Live(quiet, every=every)
    with shown.bars, shown.logged():
        yield shown


@contextmanager
def loading(command: str, quiet: bool, *, every: float = LOGGED_EVERY) -> Iterator[None]:
    """Say that a command has begun, for a block that imports its libraries, which may take a while."""
    extras.require("rich")
    with live(quiet, every=every) as shown:
        shown(f"ccu-fast {command}: loading its libraries", 0, 1, "")
        yield


def to_copy(*words: object) -> str:
    """A command line that a shell reads as these words, whatever is in them."""
    return " ".join(shlex.quote(str(word)) for word in words)


def printable(text: str) -> str:
    """A text in what the terminal can show: names of files and fields may be anything."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
