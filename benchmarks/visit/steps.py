"""Runs steps against one deadline: each leaves a line in the summary, whatever its outcome, and updates the archive."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.results import replace, store
from benchmarks.visit import archive

ROOT = Path(__file__).resolve().parent.parent.parent
RESERVE = 10.0  # seconds, for the pages that are made at the end
GRACE = 10.0  # seconds that a killed process has to go
LEAST = 3.0  # seconds; nothing starts with less
# The line of a test, with one process and with several; the list at the end of pytest's output has another form.
_WORD = "(PASSED|FAILED|ERROR|SKIPPED)"
_TEST = re.compile(rf"^\S+::.* {_WORD}(?: \(.*\))? +\[ *\d+%\]$|^\[gw\d+\] \[ *\d+%\] {_WORD} ", re.MULTILINE)
_told_to_end: list[int] = []
_starting: list[bool] = []
Judge = Callable[[Sequence[Path]], tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        name: of its line and its logs.
        commands: run at the same time.
        most: seconds it may take.
        least: it does not start with less.
        judge: has the last word on commands that ended by themselves, from their logs: a status and what to say.
        environment: variables besides the visit's own.
    """

    name: str
    commands: Sequence[Sequence[str | Path]]
    most: float = float("inf")
    least: float = LEAST
    judge: Judge | None = None
    environment: Mapping[str, str] | None = None


@dataclass
class Done:
    """A line of the summary.

    Attributes:
        status: "ok", "failed", "out of time", or "not run" (with the reason in ``said``).
        said: the step's last line, or why it did not run.
    """

    step: str
    status: str
    seconds: float = 0.0
    said: str = ""


class Visit:
    """Runs steps, keeps the summary, and packs everything under ``work`` into ``out``/visit.tgz after each.

    ``out`` gets two files, the archive and summary.md, so that it may be a folder from which little comes back.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out = out
        self.end = time.monotonic() + seconds
        self.done: list[Done] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="ccu_fast_visit_")
        self.work = Path(self._scratch.name) / "work"
        self.site = Path(self._scratch.name) / "site"  # packages for the steps alone
        for folder in (out, self.work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(ROOT), str(self.site), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "CCU_FAST_TEST_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if self.environment.pop("PYTHONDONTWRITEBYTECODE", None):
            # Otherwise every step would compile all of torch's Python again.
            self.environment["PYTHONPYCACHEPREFIX"] = self._scratch.name + "/bytecode"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def run(self, *together: Step, reserve: float = RESERVE) -> bool:
        """Run steps at the same time, each until its limit or the deadline; whether all were ok."""
        started: list[_Started] = []
        try:
            with _undisturbed():
                for step in together:
                    limit = min(step.most, self.left - reserve)
                    if limit < step.least:
                        said = f"needs {step.least:.0f} s, {max(0.0, limit):.0f} s are left"
                        self.note(Done(step.name, "not run", said=said))
                        continue
                    print(f"{step.name} …", flush=True)
                    started.append(_Started(self, step, time.monotonic() + limit))
            while any(running.done is None for running in started):
                time.sleep(0.05)
                for running in started:
                    if running.done is None and running.ended():
                        self.note(running.finish())
        finally:  # also where the visit itself is told to end
            for running in started:
                if running.done is None:
                    running.stop()
        return len(started) == len(together) and all(r.done and r.done.status == "ok" for r in started)

    def note(self, done: Done) -> None:
        """Add a line to the summary, and write it and the archive."""
        self.done.append(done)
        print(f"{done.status:12} {done.step} ({done.seconds:.0f} s) {done.said[:100]}", flush=True)
        store(self.work / "summary.json", [asdict(d) for d in self.done], depth=1)
        replace(self.work / "summary.md", self.table())
        replace(self.out / "summary.md", self.table())
        try:
            archive.pack(self.work, self.out / archive.NAME)
        except OSError as error:  # a full disk, say: the next step may still be told on the terminal
            print(f"{archive.NAME} was not written: {error}", flush=True)

    def table(self) -> str:
        """The summary as a Markdown table."""
        lines = ["| step | status | s | said |", "|---|---|---|---|"]
        lines += [f"| {d.step} | {d.status} | {d.seconds:.0f} | {d.said.replace('|', '/')} |" for d in self.done]
        return "\n".join(lines) + "\n"


def end(number: int, frame: object) -> None:
    """Handle a signal: end what was started, and leave."""
    _told_to_end.append(128 + number)
    if not _starting:
        sys.exit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put a signal off: a process that is just being started is known to nobody yet who could end it."""
    _starting.append(True)
    try:
        yield
    finally:
        _starting.pop()
    if _told_to_end:
        sys.exit(_told_to_end[0])


class _Started:
    """A step that is running."""

    def __init__(self, now: Visit, step: Step, end: float) -> None:
        self.step, self.end, self.start = step, end, time.monotonic()
        self.done: Done | None = None
        many = len(step.commands) > 1
        names = [f"{step.name}.{i}" if many else step.name for i in range(1, len(step.commands) + 1)]
        self.logs = [now.work / "logs" / f"{name.replace(' ', '_')}.log" for name in names]
        environment = {**now.environment, **(step.environment or {})}
        self.processes = [_start(c, log, environment) for c, log in zip(step.commands, self.logs, strict=True)]

    def ended(self) -> bool:
        """Whether nothing is left to wait for."""
        return time.monotonic() > self.end or all(p is None or p.poll() is not None for p in self.processes)

    def finish(self) -> Done:
        """Stop what is still running and judge."""
        codes = [127 if process is None else process.poll() for process in self.processes]
        self.stop()
        seconds = round(time.monotonic() - self.start, 1)
        status = "out of time" if None in codes else "failed" if any(codes) else "ok"
        worst = next((log for code, log in zip(codes, self.logs, strict=True) if code), self.logs[0])
        said = last_line(worst)
        if self.step.judge is not None:
            judged, said = self.step.judge(self.logs)
            status = judged if status == "ok" else status
        self.done = Done(self.step.name, status, seconds, said)
        return self.done

    def stop(self) -> None:
        """End what is still running, together with all that it started."""
        for process in self.processes:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # One that hangs in the driver may never go, and the next step must not wait for that.
                    process.wait(GRACE)


def _start(command: Sequence[str | Path], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes] | None:
    words = [str(word) for word in command]
    with log.open("w") as file:
        file.write(" ".join(words) + "\n")
        file.flush()
        try:
            # A process group, which can be killed as one, in the session of the visit, so that none of it survives it.
            return subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
        except OSError as error:
            file.write(f"{error}\n")
            return None


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def add_counts(logs: Sequence[Path]) -> tuple[str, str]:
    """What several "3 right, 1 wrong, 0 not run: name" say together."""
    total: dict[str, int] = {}
    names: list[str] = []
    for log in logs:
        counts, _, wrong = last_line(log).partition(": ")
        found = re.findall(r"(\d+) (right|wrong|not run)", counts)
        if not found:
            names.append(f"{log.name}: {last_line(log)[:60]}")
        for number, word in found:
            total[word] = total.get(word, 0) + int(number)
        names += [wrong] * bool(found and wrong)
    said = ", ".join(f"{number} {word}" for word, number in total.items())
    good = total.get("right", 0) and not names
    return "ok" if good else "failed", (said + (f": {'; '.join(names)}" if names else ""))[:400]


def count_tests(logs: Sequence[Path]) -> tuple[str, str]:
    """Status and counts of ``pytest -v``, also of one that was stopped; tests that were all skipped show nothing."""
    text = "\n".join(log.read_text(errors="replace") for log in logs)
    words = [alone or shared for alone, shared in _TEST.findall(text)]
    counts = {word: words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    said = ", ".join(f"{number} {word.lower()}" for word, number in counts.items() if number)
    if counts["FAILED"] + counts["ERROR"]:
        return "failed", said
    return ("ok", said) if counts["PASSED"] else ("not run", said or "no tests")
