"""A line on the terminal when nothing else has been written for some seconds: which tests are running.

Given to pytest with ``-p``, it also speaks while conftest.py imports torch, before there is a terminal reporter.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

SECONDS = 8.0  # with what a busy machine adds, something is written every ten
_started = threading.Event()


def pytest_load_initial_conftests() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        threading.Thread(target=_say_that_it_starts, daemon=True).start()


def _say_that_it_starts() -> None:
    out = os.dup(2) if sys.__stderr__ is not None else None  # pytest takes the other one for itself
    while out is not None and not _started.wait(SECONDS):
        os.write(out, " … loading torch\n".encode())


def pytest_configure() -> None:
    _started.set()


class SignsOfLife:
    """A plugin of the process that writes to the terminal, whether it runs the tests or others do."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal
        self.running: dict[str, float] = {}
        self.last = time.monotonic()
        self.over = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.over.wait(max(0.1, self.last + SECONDS - time.monotonic())):
            now = time.monotonic()
            if now < self.last + SECONDS:
                continue
            self.last = now
            longest = [f"{name} ({now - start:.0f} s)" for name, start in [*self.running.items()][:3]]
            self.terminal.write_line(f" … {', '.join(longest) or 'collecting'}", flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.last = time.monotonic()  # its dot

    def pytest_sessionfinish(self) -> None:
        self.over.set()
