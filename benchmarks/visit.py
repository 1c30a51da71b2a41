"""A whole visit to a GPU: build, tests, sanitizer, benchmarks; everything it finds in one folder.

    python -m benchmarks.visit --out visit                      ten minutes at most, no network
    python -m benchmarks.visit --out visit --wheels wheels      peers from: pip download --no-deps -d wheels inf_cl …
    python -m benchmarks.visit --out visit --tiny --python .venv/bin/python     the same steps anywhere, small shapes

A step that fails or runs out of time is a line of the summary, and the next one starts: summary.md and summary.json
are written after every step, a log for each lies beside them, figures under results/. What matters most is measured
first. Nothing outside the folder is written but the build's own files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("open_clip_torch", "inf_cl", "siglip-kernel")
SANITIZED = ("clip_loss", "clip_loss_banks", "bounded_inverse")
TINY_TESTS = "tests/test_noise.py"
RESERVE = 10.0  # seconds, for the pages that are made at the end

# The cases in the order of what they decide; what an op has besides comes last.
ORDER: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("clip_loss",), ("B=32768,D=512",)),
    (("clip_loss",), ("B=128", "B=256", "B=1024")),
    (("clip_loss_banks",), ()),
    (("bounded_inverse", "contrastive_unlearning", "sup_con_keys"), ()),
    (("clip_loss_forward",), ()),
    (("clip_loss",), ("B=4096", "B=8192", "B=16384")),
    (("clip_loss",), ("B=32768,D=768", "B=32768,D=1024", "B=262144")),
)


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
    """Runs steps against one deadline and keeps the summary."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out = out
        self.end = time.monotonic() + seconds
        self.done: list[Done] = []
        self.environment = {**os.environ, "CCU_FAST_TEST_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.bytecode = tempfile.TemporaryDirectory(prefix="ccu_fast_visit_")
        if self.environment.pop("PYTHONDONTWRITEBYTECODE", None):
            # Or every step would compile all of torch's Python again.
            self.environment["PYTHONPYCACHEPREFIX"] = self.bytecode.name
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def run(
        self, step: str, command: Sequence[str | Path], *, most: float = float("inf"), reserve: float = RESERVE,
        judge: Callable[[], tuple[str, str]] | None = None,
    ) -> bool:  # fmt: skip
        """Run a command with its output in <step>.log, for ``most`` seconds or what is left; whether it was ok.

        ``judge`` has the last word on a command that exits with 0: a status and what to say.
        """
        limit = min(most, self.left - reserve)
        if limit <= 0:
            return self.note(Done(step, "not run", said="out of time"))
        print(f"{step} …", flush=True)
        start = time.monotonic()
        log = self.out / f"{step}.log"
        with log.open("w") as file:
            file.write(" ".join(map(str, command)) + "\n")
            file.flush()
            code = self._execute([str(word) for word in command], file.fileno(), limit)
        status, said = {0: "ok", None: "out of time"}.get(code, "failed"), _last_line(log)
        if code == 0 and judge is not None:
            status, said = judge()
        return self.note(Done(step, status, round(time.monotonic() - start, 1), said))

    def _execute(self, command: list[str], output: int, limit: float) -> int | None:
        """The exit code; None if it had to be stopped, together with all that it started."""
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            os.write(output, f"{error}\n".encode())
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def note(self, done: Done) -> bool:
        """Add a line to the summary and write it; whether the line is a good one."""
        self.done.append(done)
        print(f"{done.status:12} {done.step} ({done.seconds:.0f} s) {done.said}", flush=True)
        lines = ["| step | status | s | said |", "|---|---|---|---|"]
        lines += [f"| {d.step} | {d.status} | {d.seconds:.0f} | {d.said.replace('|', '/')} |" for d in self.done]
        for name, text in (
            ("summary.json", json.dumps([asdict(d) for d in self.done], indent=1) + "\n"),
            ("summary.md", "\n".join(lines) + "\n"),
        ):
            part = self.out / f"{name}.part"
            part.write_text(text)
            os.replace(part, self.out / name)
        return done.status == "ok"


def visit(
    out: Path, *, minutes: float, tiny: bool = False, python: Path | None = None, wheels: Path | None = None,
    ops: Sequence[str] = (),
) -> list[Done]:  # fmt: skip
    """All steps in order; see the module's docstring."""
    now = Visit(out.resolve(), 60 * minutes)
    interpreter = python or Path(sys.executable)
    if python is None:
        built = now.run("build", ["make", "SYSTEM_SITE=1", f"PYTHON={sys.executable}", ".venv/.test"], most=180)
        if built:
            interpreter = ROOT / ".venv" / "bin" / "python"
    else:
        now.note(Done("build", "not run", said=f"--python {python} was given"))
    if wheels is None:
        now.note(Done("peers", "not run", said="no --wheels; what is installed already is measured"))
    else:
        pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--find-links", str(wheels.resolve()), *PEERS]
        now.run("peers", [interpreter, *pip], most=60)
    now.run("info", [interpreter, "-m", "ccu_fast", "info"], most=60)
    _exercise(now, interpreter, tiny, ops)
    report = now.out / "tests.xml"
    tests = ["-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={report}", TINY_TESTS if tiny else "tests"]
    now.run("tests", [interpreter, "-m", "pytest", *tests], most=150, judge=lambda: count_tests(report))
    _measure(now, interpreter, tiny, ops)
    finish = ["--out", str(now.out / "results"), "--device", "cpu" if tiny else "cuda", "--report", "--check"]
    now.run("report", [interpreter, "-m", "benchmarks", *finish], reserve=0)
    return now.done


def _exercise(now: Visit, interpreter: Path, tiny: bool, ops: Sequence[str]) -> None:
    command = [str(interpreter), "-m", "benchmarks.exercise", "--device", "cpu" if tiny else "cuda"]
    now.run("exercise", [*command, *(["--ops", *ops] if ops else [])], most=120)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        now.note(Done("sanitizer", "not run", said="compute-sanitizer is not installed"))
        return
    watched = [tool, "--error-exitcode", "1", "--target-processes", "all", *command, "--once", "--dtypes", "bfloat16"]
    now.run("sanitizer", [*watched, "--ops", *(ops or SANITIZED)], most=90)


def _measure(now: Visit, interpreter: Path, tiny: bool, ops: Sequence[str]) -> None:
    bench = [str(interpreter), "-m", "benchmarks", "--out", str(now.out / "results")]
    if tiny:
        small = ["--device", "cpu", "--quick", "--no-compiled", "--seconds", "0.02"]
        now.run("bench-1", [*bench, *small, *(["--ops", *ops] if ops else [])])
        return
    for number, (group, shapes) in enumerate(groups(ops), 1):
        # A process for each group: after an illegal access nothing more can be measured in its own.
        minutes = f"{max(0.0, now.left - 3 * RESERVE) / 60:.2f}"
        more = ["--seconds", "1.5", "--minutes", minutes, *(["--shapes", *shapes] if shapes else [])]
        now.run(f"bench-{number}", [*bench, "--device", "cuda", "--ops", *group, *more])


def groups(ops: Sequence[str] = ()) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """ORDER, then the ops that it does not name; of these only ``ops``, if any are given."""
    from benchmarks.ops import OPS

    named = {op for group, _ in ORDER for op in group}
    everything = [*ORDER, (tuple(op for op in OPS if op not in named), ())]
    chosen = [(tuple(op for op in group if op in ops or not ops), shapes) for group, shapes in everything]
    return [(group, shapes) for group, shapes in chosen if group]


def count_tests(report: Path) -> tuple[str, str]:
    """Status and counts of a pytest run that did not fail; tests that were all skipped show nothing."""
    try:
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {k: int(suite.attrib[k]) for k in ("tests", "skipped", "failures", "errors")} if suite else {}
    except (OSError, ElementTree.ParseError) as error:
        return "failed", f"no report: {error}"
    said = ", ".join(f"{v} {k}" for k, v in counts.items())
    return ("ok", said) if counts.get("tests", 0) > counts.get("skipped", 0) else ("not run", said or "no tests")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the visit; exit code 1 if any step failed or ran out of time."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.visit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (9.5)")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: do the steps work?")
    parser.add_argument("--python", type=Path, help="an interpreter that has the package built; nothing is built")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help=f"wheels of {', '.join(PEERS)}")
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="measure and exercise only these")
    arguments = parser.parse_args(argv)
    done = visit(**vars(arguments))
    print(f"summary in {arguments.out / 'summary.md'}")
    return int(any(d.status in ("failed", "out of time") for d in done))


if __name__ == "__main__":
    sys.exit(main())
