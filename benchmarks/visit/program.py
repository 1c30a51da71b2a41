"""What a visit does, most important first."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import bars, results
from benchmarks.ops.peers import NAMES
from benchmarks.registry import Case, label, parse, select
from benchmarks.visit import commands
from benchmarks.visit.steps import ROOT, Done, Step, Visit, add_counts, count_tests

AIMS = "aims.md"
PARTS = ("smoke", "bench", "tests", "commands", "tune")
Group = tuple[tuple[str, ...], tuple[str, ...]]
Command = list[str | Path]
# The cases by importance; an op's other cases come last.
# These answer the aims of a GPU in bars.json, all that have a line there and, but for small shapes, no others.
MAIN: tuple[Group, ...] = (
    (("clip_loss",), ("B=32768,D=512",)),
    (("clip_loss",), ("B=65536",)),
    (("sigmoid_loss",), ("B=65536",)),
    (("clip_loss",), ("B=128", "B=256", "B=1024", "B=10000")),
    (("topk_flips",), ("N=5", "N=2560")),
    (("info_nce_prefixes",), ("B=32768",)),
    (("bounded_inverse", "contrastive_unlearning", "sup_con_keys"), ()),
    (("pgd_step", "noise_add", "noise_update"), ()),
    (("clip_loss_banks",), ()),
    (("clip_loss",), ("B=262144",)),
)
REST: tuple[Group, ...] = (
    (("info_nce_prefixes",), ("B=8192",)),
    (("info_nce_hard", "info_nce_margin", "info_nce_guide"), ()),
    (("topk_flips",), ("N=64", "N=8192", "N=20", "N=512")),
    (("clip_loss_forward",), ()),
    (("clip_loss",), ("B=4096", "B=8192", "B=16384")),
    (("clip_loss",), ("B=32768,D=768", "B=32768,D=1024")),
    (("sigmoid_loss",), ("B=4096", "B=16384")),
)
SANITIZED = (
    "clip_loss",
    "clip_loss_banks",
    "bounded_inverse",
    "info_nce_hard",
    "info_nce_guide",
    "info_nce_prefixes",
    "topk_flips",
    "candidate_losses",
    "pgd_step",
    "noise_add",
    "noise_update",
)
TINY_TESTS = ("tests/ops/pgd_step/test_pgd_step.py", "tests/ops/test_smoke.py")
TINY_OPS = ("pgd_step",)
LATE = 20.0  # seconds at the end in which no case starts
TIMED = "1.5"  # seconds a case
SHARE = 0.35  # of what is left, at most, for one of the steps that come before the first row
HANGS = 0.4  # of what is left: a group of rows that takes longer is given up, so that the others have their turn
AGAIN = 30.0  # seconds for a case of a group that did not come to its end


@dataclass(frozen=True)
class Plan:
    """What was asked for.

    Attributes:
        tiny: small shapes on the CPU, kernels in Triton's interpreter.
        python: runs every step.
        build: whether the module is compiled first.
        ops: measure only these; all if empty.
        only: one of PARTS, or None for all.
    """

    tiny: bool
    python: Path
    build: bool
    ops: tuple[str, ...]
    only: str | None

    def wants(self, part: str) -> bool:
        """Whether a part is asked for."""
        return self.only in (None, part)

    def limit(self, seconds: float) -> float:
        """The time limit of a step; a tiny visit shows that steps work, not how fast a busy machine is."""
        return math.inf if self.tiny else seconds

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def processes(self) -> int:
        """How many processes each of the two kinds gets that compile at the same time."""
        return 1 if self.tiny else max(1, (os.cpu_count() or 2) // 2)


def execute(now: Visit, plan: Plan) -> None:
    """All steps, in order."""
    python = plan.python
    _prepare(now, plan)
    if plan.wants("bench"):
        _measure(now, plan, MAIN, 1)
    if plan.wants("smoke"):
        now.run(_smoke(now, plan, "native"))
    if plan.build:  # what was built, and whether it serves here
        now.run(Step("info built", [[python, "-m", "ccu_fast", "info"]], most=plan.limit(60)))
    if plan.wants("tests"):
        _test(now, plan)
    if plan.wants("bench"):
        _measure(now, plan, [*REST, *others()], len(MAIN) + 1)
    if plan.wants("commands"):
        now.run(*_commands(now, plan))
    if plan.wants("tune"):
        tune: Command = [python, "-m", "benchmarks.visit.tune", "--out", now.work / "tune", *_size(plan)]
        # In a full visit it takes the time that is left, and says what did not fit.
        tune += ["--minutes", f"{max(0.05, (now.left - LATE) / 60):.2f}"]
        now.run(Step("tune", [tune], least=5 if plan.tiny else 60, environment=_interpreted(plan)))
    if plan.wants("bench"):
        finish: Command = ["--out", now.work / "results", "--device", plan.device, "--report", "--check"]
        now.run(Step("report", [[python, "-m", "benchmarks", *finish]], least=1), reserve=0)


def _size(plan: Plan) -> Command:
    return ["--device", plan.device, *(["--tiny"] if plan.tiny else [])]


def _interpreted(plan: Plan) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if plan.tiny else {}


def _prepare(now: Visit, plan: Plan) -> None:
    """Build the C++ module, fill the caches of Triton and torch.compile, and run the first smoke test, side by side."""
    together = [Step("info", [[plan.python, "-m", "ccu_fast", "info"]], most=plan.limit(60))]
    if plan.build:
        together.append(
            Step("build", [[plan.python, "setup.py", "build_ext", "--inplace"]], most=plan.limit(0.45 * now.left))
        )
    else:
        now.note(Done("build", "not run", said=f"{plan.python} has the package built"))
    if plan.wants("smoke"):
        together.append(_smoke(now, plan, "triton"))
    for part in ("bench", "tune"):
        # A full visit may leave no time for tuning, so its kernels are not compiled ahead.
        if plan.only == part or (plan.only is None and part == "bench"):
            together.append(_warm(now, plan, part))
    now.run(*together)


def _smoke(now: Visit, plan: Plan, backend: str) -> Step:
    command = [plan.python, "-m", "tests.support.smoke", "--backend", backend, *_size(plan)]
    environment = {"OMP_NUM_THREADS": "1", **(_interpreted(plan) if backend == "triton" else {})}
    return Step(
        f"smoke {backend}",
        _in_parts(plan, command),
        most=plan.limit(min(150, SHARE * now.left)),
        judge=add_counts,
        environment=environment,
    )


def _warm(now: Visit, plan: Plan, part: str) -> Step:
    command = [plan.python, "-m", "benchmarks.visit.warm", part, *_size(plan)]
    command += ["--ops", *plan.ops] if plan.ops else []
    environment = {"OMP_NUM_THREADS": "1", **(_interpreted(plan) if part == "tune" else {})}
    return Step(
        f"warm {part}", _in_parts(plan, command), most=plan.limit(min(120, SHARE * now.left)), environment=environment
    )


def _in_parts(plan: Plan, command: Command) -> list[Command]:
    return [[*command, "--part", f"{i}/{plan.processes}"] for i in range(1, plan.processes + 1)]


def _test(now: Visit, plan: Plan) -> None:
    spread = ["-n", str(plan.processes), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    tests = ["-v", "-p", "no:cacheprovider", "-m", "gpu", "--continue-on-collection-errors", *spread]
    tests += TINY_TESTS if plan.tiny else gpu_tests()
    now.run(Step("tests", [[plan.python, "-m", "pytest", *tests]], most=plan.limit(150), least=30, judge=count_tests))
    exercise: Command = [plan.python, "-m", "benchmarks.exercise", "--device", plan.device]
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        now.note(Done("sanitizer", "not run", said="compute-sanitizer is not installed"))
    else:
        watched: Command = [tool, "--error-exitcode", "1", "--target-processes", "all", *exercise, "--once"]
        watched += ["--dtypes", "bfloat16", "--ops", *(plan.ops or SANITIZED)]
        now.run(Step("sanitizer", [watched], most=plan.limit(90), least=30))
    ops = plan.ops or (TINY_OPS if plan.tiny else ())
    now.run(Step("exercise", [[*exercise, *(["--ops", *ops] if ops else [])]], most=plan.limit(90)))


def gpu_tests() -> list[str]:
    """The files that have GPU tests: others may need packages that are missing, which would end the collection."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files if "mark.gpu" in file.read_text()]


def _measure(now: Visit, plan: Plan, groups: Sequence[Group], first: int) -> None:
    """A process for each group: after an illegal access nothing more can be measured in its own."""
    bench: Command = [plan.python, "-m", "benchmarks", "--out", now.work / "results", "--device", plan.device]
    if plan.tiny:
        small = ["--quick", "--no-compiled", "--seconds", "0.02", "--ops", *(plan.ops or TINY_OPS)]
        if first == 1:
            now.run(Step("bench 1", [[*bench, *small]], judge=partial(judge_rows, now, plan.ops or TINY_OPS, ())))
        return

    def run(name: str, group: Sequence[str], shapes: Sequence[str], most: float, more: Sequence[str] = ()) -> bool:
        """Whether the process came to its end, or never began."""
        limit = f"{max(0.0, now.left - LATE) / 60:.2f}"
        words = ["--seconds", TIMED, "--minutes", limit, *(["--shapes", *shapes] if shapes else []), *more]
        judge = partial(judge_rows, now, group, shapes)
        now.run(Step(name, [[*bench, *words, "--ops", *group]], most=most, least=15, judge=judge))
        log = now.work / "logs" / f"{name.replace(' ', '_')}.log"
        return not log.exists() or "stored in" in log.read_text(errors="replace")

    for number, (group, shapes) in enumerate(chosen(groups, plan.ops), first):
        if run(f"bench {number}", group, shapes, max(45.0, HANGS * now.left)):
            continue
        # It crashed or hung. What it had begun is measured without the kernels of others, which may have done it.
        for again, (op, shape) in enumerate(without_rows(now, group, shapes, plan.device), 1):
            more = [] if again > 1 else ["--without", *NAMES]
            run(f"bench {number} again {again}", [op], [shape], AGAIN, more)


def judge_rows(now: Visit, ops: Sequence[str], shapes: Sequence[str], logs: Sequence[Path]) -> tuple[str, str]:
    """Our own line of each shape; not ok if one of ours is wrong, and if there is none. Also writes aims.md."""
    said, bad = [], False
    write_aims(now)
    for row in _rows(now):
        if row.op not in ops or row.role != "ours" or not any(_named(pattern, row) for pattern in shapes or ("",)):
            continue
        if row.status in ("wrong", "error"):
            bad = True
            said.append(f"{row.provider} {label(row.shape)} {row.status}: {row.reason}")
        elif row.provider == "ccu_fast" and row.p50_ms is not None:
            others = {name: x for name, x in row.speedup_over.items() if x}
            closest = min(others, key=lambda name: others[name], default=None)
            than = f", {others[closest]:.2f} × {closest}" if closest else ""
            said.append(f"{row.op} {label(row.shape)} {row.p50_ms:.4g} ms{than}")
    said.sort(key=lambda text: "ms" in text)
    return ("failed" if bad or not said else "ok"), "; ".join(said) or "nothing of ours was measured"


def without_rows(now: Visit, ops: Sequence[str], shapes: Sequence[str], device: str) -> list[tuple[str, str]]:
    """The cases of a group that left no row, in their order."""
    from benchmarks.ops import OPS

    there = {(row.op, label(row.shape)) for row in _rows(now)}
    planned = [(op, label(shape)) for op in ops for shape in select(OPS[op], shapes, device, quick=False)]
    return [case for case in planned if case not in there]


def _rows(now: Visit) -> list[results.Row]:
    """What has been measured so far."""
    return [row for folder in sorted((now.work / "results").glob("*/")) for row in results.read(folder)]


def _named(pattern: str, row: results.Row) -> bool:
    return all(row.shape.get(size) == value for size, value in parse(pattern).items()) if pattern else True


def chosen(groups: Sequence[Group], ops: Sequence[str]) -> list[Group]:
    """The groups, restricted to ``ops`` if any are given."""
    found = [(tuple(op for op in group if op in ops or not ops), shapes) for group, shapes in groups]
    return [(group, shapes) for group, shapes in found if group]


def others() -> list[Group]:
    """One group of all ops that no group names."""
    from benchmarks.ops import OPS

    named = {op for group, _ in (*MAIN, *REST) for op in group}
    return [(tuple(op for op in OPS if op not in named), ())]


def cases(device: str, ops: Sequence[str], *, quick: bool) -> Iterator[Case]:
    """Every case of a visit, in its order."""
    import torch

    from benchmarks.ops import OPS

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for group, shapes in chosen([*MAIN, *REST, *others()], ops):
        for op in group:
            for shape in select(OPS[op], () if quick else shapes, device, quick):
                yield Case(OPS[op], shape, dtype, torch.device(device))


def write_aims(now: Visit) -> None:
    """The aims of a GPU beside what has been measured so far."""
    rows = _rows(now)
    if any(row.device == "cuda" for row in rows):
        results.replace(now.work / AIMS, bars.page(rows))


def _commands(now: Visit, plan: Plan) -> list[Step]:
    """The commands of the package on the device, and what surrogates take of its memory."""
    alone: Command = [plan.python, "-m", "benchmarks.visit.commands"]
    dtypes = ("bf16",) if plan.tiny else ("fp32", "bf16", "fp16")
    ways = [("cpu", "fp32"), *((plan.device, dtype) for dtype in dtypes)]
    asked: list[Command] = []
    for name in commands.COMMANDS:
        asked += [[*alone, name, "--device", device, "--dtype", dtype] for device, dtype in ways]
    most, threads = plan.limit(55), {"OMP_NUM_THREADS": "1"}
    steps = [Step("commands", asked, most=most, least=25, judge=commands.compare, environment=threads)]
    if not plan.tiny:  # a CPU's are stored already, and take minutes
        out = now.work / "memory.json"
        memory: Command = [plan.python, "-m", "benchmarks.protection.memory", "--device", plan.device, "--out", out]
        # open_clip last, which needs packages that a GPU's machine may lack.
        memory += ["--models", "ViT-B/32", "ViT-B/16", "ViT-L/14", "RN50"]
        steps.append(Step("memory of surrogates", [memory], most=most, least=25))
    return steps


def unpack_wheels(wheels: Path, site: Path) -> Done:
    """Peers from wheels of pure Python, which need no pip: a wheel is a zip file."""
    names, refused = [], []
    for wheel in sorted(wheels.glob("*.whl")):
        if not wheel.stem.endswith("-none-any"):
            refused.append(f"{wheel.name} holds compiled code")
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        names.append("-".join(wheel.stem.split("-")[:2]))
    said = "; ".join(filter(None, (", ".join(names), *refused))) or f"no wheels in {wheels}"
    return Done("peers", "failed" if refused or not names else "ok", said=said)
