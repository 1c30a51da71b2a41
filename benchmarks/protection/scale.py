"""``python -m benchmarks.protection.scale --packages DIR``: sets of any size take their share, and survive kills.

Sets of pictograms, each the beginning of the next, are protected by the command with the same settings: CPU time by
stage, peak memory and disk. Then the largest run is done again and killed (SIGKILL) at random moments, one in each
tenth of its work (with 10 kills); the same command follows each kill. Nothing is stored unless every file is that of
the uninterrupted run. The figures go to scale.json beside this file, plots of them to docs/figures, tables to SCALE.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import environment, results
from benchmarks.charts import FIGURES
from benchmarks.protection import scale_page

DEPTH = 2  # a line for a size, and one for a kill
RESULTS = Path(__file__).parent / "scale.json"
PAGE = RESULTS.with_name("SCALE.md")
SIZES = (2_500, 5_000, 10_000, 20_000)
THINGS = 3_642  # that all four artists have drawn, skin tones counted
ARTISTS = ("google", "twitter", "facebook", "apple")
LANGUAGES = ("en", "de")  # all drawings with English captions, then as many of them again as are lacking with German
OPTIONS = (
    *("--method", "mem-3", "--model", "small:32", "--input-size", "32x32", "--first", "random", "--rounds", "2"),
    *("--trigger-rounds", "1", "--surrogate-steps", "32", "--restart", "0", "--batch", "64", "--candidates", "4"),
    *("--pgd-steps", "2", "--trigger-words", "256", "--threads", "1"),
)
TICK = 0.01  # seconds between two looks at a process
_DISK = 5.0  # between two looks at its files


@dataclass
class Seen:
    """One process of the command.

    Attributes:
        cpu, wall: seconds.
        status: of its end, as ``os.wait4`` gives it.
        peak: bytes of memory.
        disk: bytes of the unfinished run, at most, as the file system counts them.
        marks: CPU seconds, stage, done and total of every call of its progress callback.
    """

    cpu: float = 0.0
    wall: float = 0.0
    status: int = 0
    peak: int = 0
    disk: int = 0
    marks: list[tuple[float, str, int, int]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare, store, draw."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--marks"]:
        return marked(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(prog="benchmarks.protection.scale", description=__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the npm packages")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the order of the pictures and of the moments")
    parser.add_argument("--work", type=Path, help="folder for the sets; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="draw the stored figures again, nothing else")
    a = parser.parse_args(arguments)
    if not a.plot:
        if a.packages is None:
            raise SystemExit("--packages: expected the folder of the npm packages, which pictograms are read from")
        with tempfile.TemporaryDirectory(dir=a.work) as work:
            found = measure(a, Path(work))
        results.store(a.out, found, DEPTH)
    stored = json.loads(a.out.read_text())
    if a.out == RESULTS:
        for name, drawn in scale_page.pictures(stored).items():
            results.replace(FIGURES / name, drawn)
        PAGE.write_text(scale_page.page(stored))
    print(scale_page.text(stored))
    return 0


def marked(marks: Path, words: list[str]) -> int:
    """The command itself, in this process; what its progress callback is told is also written to a file."""
    from ccu_fast.cli import main as cli
    from ccu_fast.cli import mem
    from ccu_fast.mem.job import generation
    from ccu_fast.runs.progress import silent

    generation.TOLD = 0.0  # each batch names its phase
    inner = mem.protect_dataset
    with marks.open("a", buffering=1) as file:

        def noted(job: Any, progress: Callable[..., None] = silent) -> dict[str, Any]:
            def both(stage: str, done: int, total: int, note: str) -> None:
                file.write(f"{time.process_time():.3f}\t{stage}\t{done}\t{total}\t{note.partition(', loss')[0]}\n")
                progress(stage, done, total, note)

            return inner(job, both)

        mem.protect_dataset = noted
        code = cli.main(words)
        status = Path("/proc/self/status").read_text()
        file.write(f"peak {next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM'))}\n")
    return code


def write_set(folder: Path, packages: Path, sizes: Sequence[int], seed: int) -> None:
    """``N.csv`` for each size: the first N of one order of the same pictures."""
    import torch

    from ccu_fast.data.captions.tables import write_pairs
    from ccu_fast.data.pictograms import load_pictograms

    images, captions = [], []
    for language in LANGUAGES:
        parts = load_pictograms(
            packages,
            n_things=THINGS,
            n_test=THINGS,
            artists=ARTISTS[:-1],
            test_artist=ARTISTS[-1],
            side=64,
            tones=True,
            language=language,
            seed=seed,
        )
        for part in parts:
            images.append(part.images)
            captions += part.captions
    n = max(sizes)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    write_pairs(folder, {"all": (torch.cat(images)[:n][order], [captions[i] for i in order.tolist()])})
    with (folder / "all.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    for size in sizes:
        with (folder / f"{size}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows[:size]])


def run(source: Path, out: Path, when: Callable[[Seen, float], bool] = lambda seen, cpu: False) -> Seen:
    """One process of the command, killed as soon as ``when`` says so of what was seen and its CPU seconds."""
    marks = out.with_name("marks")
    marks.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.protection.scale", "--marks", str(marks)]
    command += ["protect", str(source), "--out", str(out), *OPTIONS, "--quiet"]
    seen, start, place = Seen(), time.perf_counter(), 0
    child = subprocess.Popen(command)
    over = threading.Event()
    partial = out.with_name(out.name + ".partial")

    def watch() -> None:
        while not over.wait(_DISK):
            seen.disk = max(seen.disk, on_disk(partial))

    watching = threading.Thread(target=watch)
    watching.start()
    killed = False
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if marks.exists():
            with marks.open() as file:
                file.seek(place)
                while (line := file.readline()).endswith("\n"):
                    place = file.tell()
                    read(line, seen)
        if pid:
            break
        if not killed and when(seen, cpu_of(child.pid)):
            child.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(TICK)
    over.set()
    watching.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    seen.wall, seen.cpu, seen.status = time.perf_counter() - start, usage.ru_utime + usage.ru_stime, status
    seen.disk = max(seen.disk, on_disk(out), on_disk(partial))
    return seen


def read(line: str, seen: Seen) -> None:
    """A line of what a process writes about itself."""
    if line.startswith("peak "):
        seen.peak = 1024 * int(line.split()[1])
        return
    cpu, stage, done, total, note = line.rstrip("\n").split("\t")
    phase = note.rpartition(", ")[2] if stage.startswith("protecting") else ""
    if phase.startswith("surrogate loss"):
        phase = "end"
    seen.marks.append((float(cpu), phase or stage, int(done), int(total)))


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def on_disk(folder: Path) -> int:
    """Bytes that a folder takes; files may vanish meanwhile."""
    taken = 0
    for inside, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                taken += 512 * os.lstat(os.path.join(inside, name)).st_blocks
    return taken


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stages(seen: Seen) -> dict[str, float]:
    """CPU seconds of each stage: until its next one was first told of; "start" before all, "end" after all."""
    found: dict[str, float] = {}
    name, since = "start", 0.0
    for cpu, stage, _, _ in seen.marks:
        if stage != name:
            found[name] = found.get(name, 0.0) + cpu - since
            name, since = stage, cpu
    found[name] = found.get(name, 0.0) + seen.cpu - since
    return found


def fit(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The line of least squares: its value at 0, its slope, and the largest distance of a point from it, as a share."""
    n = len(points)
    x, y = (sum(values) / n for values in zip(*points, strict=True))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    start = y - slope * x
    return {"start": start, "each": slope, "off": max(abs(b - start - slope * a) / b for a, b in points)}


def measure(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All sizes, then the largest one again with kills.

    Raises:
        RuntimeError: a run failed, or the killed one ended with other bits; no figure is given then.
    """
    data, out = work / "data", work / "out"
    # In a process of its own: the peak memory of a child counts that of its parent when it was started.
    subprocess.run(
        [sys.executable, "-c", _WRITE, str(data), str(a.packages), json.dumps(a.sizes), str(a.seed)], check=True
    )
    sizes: dict[str, Any] = {}
    last = Seen()
    for size in sorted(a.sizes):
        shutil.rmtree(out, ignore_errors=True)
        last = run(data / f"{size}.csv", out)
        if last.status:
            raise RuntimeError(f"the run of {size} pictures ended with status {last.status}")
        sizes[str(size)] = {
            "cpu_seconds": last.cpu,
            "wall_seconds": last.wall,
            "peak_bytes": last.peak,
            "disk_bytes": last.disk,
            "output_bytes": on_disk(out),
            "stages": stages(last),
        }
        print(size, json.dumps(sizes[str(size)]), flush=True)
    whole = tree(out)
    shutil.rmtree(out)
    kills = killed(data / f"{max(a.sizes)}.csv", out, last, a.kills, a.seed)
    again = tree(out)
    if again != whole:
        odd = sorted(name for name in whole.keys() | again.keys() if whole.get(name) != again.get(name))
        raise RuntimeError(f"the killed run ended with other bits in {len(odd)} files: {odd[:3]}")
    names = ("cpu_seconds", "peak_bytes", "disk_bytes")
    return {
        "options": list(OPTIONS),
        "seed": a.seed,
        "gate": {"files": len(whole), "same": True, "tree": results_hash(whole)},
        "fit": {name: fit([(int(n), row[name]) for n, row in sizes.items()]) for name in names},
        "sizes": sizes,
        "killed": kills,
        "environment": environment.describe(_cpu()),
    }


_WRITE = (
    "import json, sys; from pathlib import Path; from benchmarks.protection.scale import write_set; "
    "write_set(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))"
)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def results_hash(files: dict[str, str]) -> str:
    """One hash of many."""
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in files.items()).encode()).hexdigest()


def killed(source: Path, out: Path, whole: Seen, kills: int, seed: int) -> dict[str, Any]:
    """The run again, killed so often; each kill as soon as the work has come to a moment of the uninterrupted one.

    The moments are drawn from that run's CPU time, one from each of ``kills`` equal parts. How far the work has come
    tells the progress callback, and since its last call the CPU time.
    """
    rng = random.Random(seed)
    moments = [whole.cpu * (i + rng.random()) / kills for i in range(kills)]
    at = {(stage, done): cpu for cpu, stage, done, _ in whole.marks}

    def position(seen: Seen, cpu: float) -> float:
        if seen.marks:
            then, stage, done, _ = seen.marks[-1]
            return at[stage, done] + cpu - then
        return cpu if first else 0.0

    rows: list[dict[str, Any]] = []
    attempts: list[Seen] = []
    reached: list[float] = []
    for moment in [*moments, float("inf")]:
        first = not attempts
        seen = run(source, out, lambda seen, cpu, moment=moment: position(seen, cpu) >= moment)  # type: ignore[misc]
        attempts.append(seen)
        reached.append(position(seen, seen.cpu))
        print(f"{moment:.1f} of {whole.cpu:.1f} s: status {seen.status} after {seen.cpu:.1f} s", flush=True)
        if bool(seen.status) != (moment != float("inf")):
            raise RuntimeError(f"expected a kill at {moment} of {whole.cpu} s, got status {seen.status}")
    for moment, before, then, here in zip(moments, attempts, attempts[1:], reached, strict=False):
        # What the next process did before it told of the first batch, picture or chunk that is not done, and what of
        # the work before the kill it did again.
        same = [mark for mark in then.marks if before.marks and mark[1:3] == before.marks[-1][1:3]]
        mark = same[0] if same and same[0][1] == "writing pictures" else then.marks[0]
        rows.append(
            {
                "at_share": moment / whole.cpu,
                "stage": before.marks[-1][1] if before.marks else "start",
                "cpu_seconds": before.cpu,
                "start_again_seconds": mark[0],  # of CPU, as all
                "done_again_seconds": max(0.0, here - at[mark[1], mark[2]]),
            }
        )
    total = sum(seen.cpu for seen in attempts)
    return {
        "cpu_seconds": total,
        "repeated_seconds": total - whole.cpu,
        "repeated_share_of_run_each_kill": (total - whole.cpu) / whole.cpu / kills,
        "peak_bytes_of_the_last": attempts[-1].peak,
        "kills": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
