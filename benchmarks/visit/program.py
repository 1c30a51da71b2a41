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

from benchmarks import results
from benchmarks.registry import Case, label, parse, select
from benchmarks.visit.steps import ROOT, Done, Step, Visit, add_counts, count_tests

PARTS = ("smoke", "bench", "tests", "tune")
Group = tuple[tuple[str, ...], tuple[str, ...]]
Command = list[str | Path]
# The cases by importance; an op's other cases come last.
MAIN: tuple[Group, ...] = (
    (("clip_loss",), ("B=32768,D=512",)),
    (("clip_loss",), ("B=128", "B=256", "B=1024")),
    (("clip_loss_banks",), ()),
)
LABELS: tuple[Group, ...] = ((("bounded_inverse", "contrastive_unlearning", "sup_con_keys"), ()),)
REST: tuple[Group, ...] = (
    (("info_nce_prefixes", "info_nce_hard", "info_nce_margin", "info_nce_guide"), ()),
    (("topk_flips",), ()),
    (("clip_loss_forward",), ()),
    (("clip_loss",), ("B=4096", "B=8192", "B=16384")),
    (("clip_loss",), ("B=32768,D=768", "B=32768,D=1024", "B=262144")),
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
)
TINY_TESTS = ("tests/ops/pgd_step/test_pgd_step.py", "tests/ops/test_smoke.py")
TINY_OPS = ("pgd_step",)
LATE = 30.0  # seconds at the end in which no case starts
TIMED = "1.5"  # seconds a case


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
    now.run(Step("info", [[python, "-m", "ccu_fast", "info"]], most=plan.limit(60)))
    _prepare(now, plan)
    if plan.wants("smoke"):
        now.run(_smoke(plan, "native"))
    if plan.wants("bench"):
        _measure(now, plan, [*MAIN, *LABELS], 1)
    if plan.build:  # what was built, and whether it serves here
        now.run(Step("info built", [[python, "-m", "ccu_fast", "info"]], most=plan.limit(60)))
    if plan.wants("tests"):
        _test(now, plan)
    if plan.wants("bench"):
        _measure(now, plan, [*REST, *others()], len(MAIN) + len(LABELS) + 1)
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
    together = []
    if plan.build:
        together.append(
            Step("build", [[plan.python, "setup.py", "build_ext", "--inplace"]], most=plan.limit(0.45 * now.left))
        )
    else:
        now.note(Done("build", "not run", said=f"{plan.python} has the package built"))
    if plan.wants("smoke"):
        together.append(_smoke(plan, "triton"))
    for part in ("bench", "tune"):
        # A full visit may leave no time for tuning, so its kernels are not compiled ahead.
        if plan.only == part or (plan.only is None and part == "bench"):
            together.append(_warm(plan, part))
    now.run(*together)


def _smoke(plan: Plan, backend: str) -> Step:
    command = [plan.python, "-m", "tests.support.smoke", "--backend", backend, *_size(plan)]
    environment = {"OMP_NUM_THREADS": "1", **(_interpreted(plan) if backend == "triton" else {})}
    return Step(
        f"smoke {backend}", _in_parts(plan, command), most=plan.limit(150), judge=add_counts, environment=environment
    )


def _warm(plan: Plan, part: str) -> Step:
    command = [plan.python, "-m", "benchmarks.visit.warm", part, *_size(plan)]
    command += ["--ops", *plan.ops] if plan.ops else []
    environment = {"OMP_NUM_THREADS": "1", **(_interpreted(plan) if part == "tune" else {})}
    return Step(f"warm {part}", _in_parts(plan, command), most=plan.limit(120), environment=environment)


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
    for number, (group, shapes) in enumerate(chosen(groups, plan.ops), first):
        minutes = f"{max(0.0, now.left - LATE) / 60:.2f}"
        more = ["--seconds", TIMED, "--minutes", minutes, *(["--shapes", *shapes] if shapes else []), "--ops", *group]
        now.run(Step(f"bench {number}", [[*bench, *more]], least=15, judge=partial(judge_rows, now, group, shapes)))


def judge_rows(now: Visit, ops: Sequence[str], shapes: Sequence[str], logs: Sequence[Path]) -> tuple[str, str]:
    """Our own line of each shape; not ok if one of ours is wrong, and if there is none."""
    said, bad = [], False
    for folder in sorted((now.work / "results").glob("*/")):
        for row in results.read(folder):
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


def _named(pattern: str, row: results.Row) -> bool:
    return all(row.shape.get(size) == value for size, value in parse(pattern).items()) if pattern else True


def chosen(groups: Sequence[Group], ops: Sequence[str]) -> list[Group]:
    """The groups, restricted to ``ops`` if any are given."""
    found = [(tuple(op for op in group if op in ops or not ops), shapes) for group, shapes in groups]
    return [(group, shapes) for group, shapes in found if group]


def others() -> list[Group]:
    """One group of all ops that no group names."""
    from benchmarks.ops import OPS

    named = {op for group, _ in (*MAIN, *LABELS, *REST) for op in group}
    return [(tuple(op for op in OPS if op not in named), ())]


def cases(device: str, ops: Sequence[str], *, quick: bool) -> Iterator[Case]:
    """Every case of a visit, in its order."""
    import torch

    from benchmarks.ops import OPS

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for group, shapes in chosen([*MAIN, *LABELS, *REST, *others()], ops):
        for op in group:
            for shape in select(OPS[op], () if quick else shapes, device, quick):
                yield Case(OPS[op], shape, dtype, torch.device(device))


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
