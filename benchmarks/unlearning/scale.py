"""``python -m benchmarks.unlearning.scale``: how time and memory of unlearning grow with the data; kills.

Random pictures (3×64×64, uint8) with random captions (12 token ids) lie on the disk as ``visual.npy`` and
``other.npy``, none of which is held (``memory = 0``). A two-tower model of 20 million random weights forgets the first
of them, by the function that ``ccu-fast unlearn`` calls. First the number of pairs grows and the forget set stays, then
the other way round; each run is a process of its own. Then the first run is done again and killed (SIGKILL) once it has
written its first checkpoint; nothing is stored unless the same call then ends with the same bits.

There are few steps: one for 20 items to forget, of which it sees four. What is forgotten, and how well, does not matter
here and is not told: the weights are random. The figures go to scale.json beside this file and to SCALE.md. With
--work a killed benchmark goes on after the last run that ended.
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import environment, results
from build_support.docs.generated import table_lines
from ccu_fast.files import write_whole
from ccu_fast.models.dual_encoder import SmallDualEncoder
from ccu_fast.runs import cache
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.provenance import json_hash, save_model, versions
from ccu_fast.unlearn import figures as run_figures
from ccu_fast.unlearn import job as unlearn_job
from ccu_fast.unlearn import method
from ccu_fast.unlearn.settings import read_job

DEPTH = 2  # a line for a run
FORMAT = 1  # of the kept runs; raise it when the same settings give other figures
RESULTS = Path(__file__).parent / "scale.json"
PAGE = RESULTS.with_name("SCALE.md")
PAIRS = (25_000, 50_000, 100_000)
FORGET = (500, 1_000, 2_000)
JUDGED = 100  # retained pairs that the figures are of
BATCH, A_STEP = 4, 20  # items of each set in a batch; items to forget for each step
LENGTH, WORDS = 12, 8_192  # of a caption, of the vocabulary
STAGES = ("load and hash", "before the steps", "steps", "figures before", "figures after", "rest")
STATUS = Path("/proc/self/status")
_AT_ONCE = 1_000  # pairs that are written at a time
SETTINGS = """
[model]
make = "benchmarks.unlearning.scale:{make}"
weights = "{weights}"
[data]
path = "{data}"
memory = 0
judged = {judged}
[forget]
kind = "pairs"
ids = "{ids}"
[budget]
steps = {steps}
batch = {batch}
"""


class Towers(SmallDualEncoder):
    """Its convolutional and its text tower, for bytes and token ids."""

    def embed_visual(self, visual: Tensor) -> Tensor:
        """uint8 ``[N, 3, 64, 64]`` → unit vectors."""
        return self.encode_image(visual.float() / 255)

    def embed_other(self, other: Tensor) -> Tensor:
        """Token ids ``[N, 12]`` → unit vectors."""
        return self.encode_text(other)


def large() -> Towers:
    """20 million weights."""
    return _towers(width=512, dim=320)


def small() -> Towers:
    """A model that takes no time, for ``--quick``."""
    return _towers(width=32, dim=16)


def _towers(width: int, dim: int) -> Towers:
    return Towers(WORDS, WORDS - 1, image_size=(64, 64), channels=3, width=width, dim=dim, context=LENGTH)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare, store."""
    parser = argparse.ArgumentParser(prog="benchmarks.unlearning.scale", description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=list(PAIRS), help="of the data, in each run")
    parser.add_argument("--forget", type=int, nargs="+", default=list(FORGET), help="pairs to forget, in each run")
    parser.add_argument("--judged", type=int, default=JUDGED, help="retained pairs that the figures are of")
    parser.add_argument("--quick", action="store_true", help="a model that takes no time, to see that all works")
    parser.add_argument("--work", type=Path, help="folder of data and finished runs, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of figures; default: the committed one")
    parser.add_argument("--page", action="store_true", help="write the page of the stored figures again, nothing else")
    parser.add_argument("--run", nargs=3, type=Path, metavar=("SETTINGS", "OUT", "TOLD"), help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.run:
        return measured(*a.run)
    if a.page and not a.out.is_file():
        parser.error(f"--out: expected a file of figures, got {a.out}, which is not there")
    if not a.page:
        if wrong := refused(a):
            parser.error(wrong)
        with ExitStack() as stack:
            work = a.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            work.mkdir(parents=True, exist_ok=True)
            results.store(a.out, measure(a, work), DEPTH)
    stored = json.loads(a.out.read_text())
    if a.out == RESULTS:
        write_whole(PAGE, page(stored))
    print(page(stored))
    return 0


def refused(a: argparse.Namespace) -> str | None:
    """Why the runs that are asked for could not be made; None if they can."""
    if min(a.forget) < A_STEP:
        return f"--forget: expected at least {A_STEP}, which are a step, got {min(a.forget)}"
    if a.forget[0] < (killed := (Checkpoint.every + 1) * A_STEP):
        return f"--forget: expected at least {killed} first, so that a step is left to kill, got {a.forget[0]}"
    if min(a.pairs) < max(a.forget) + BATCH:  # a batch is to be kept
        return f"--pairs: expected at least {max(a.forget) + BATCH}, {BATCH} more than --forget, got {min(a.pairs)}"
    if a.judged < 1:
        return f"--judged: expected at least 1, got {a.judged}"
    if not STATUS.exists():
        return f"expected a system that tells peak memory in {STATUS}, got {sys.platform}"
    return None


def measured(settings: Path, out: Path, told: Path) -> int:
    """The run itself, in this process; CPU seconds by stage and peak memory go to a file."""
    torch.set_num_threads(1)
    spent = dict.fromkeys(STAGES, 0.0)

    def timed(owner: Any, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return inner(*arguments, **options)
            finally:
                spent[stage] += time.process_time() - start

        setattr(owner, name, call)

    for name in ("load", "split", "items_hash", "keep_embeddings"):
        timed(unlearn_job, name, "load and hash")
    timed(method.CcuStep, "__init__", "before the steps")
    timed(unlearn_job, "run_ccu", "steps")
    timed(unlearn_job, "figures_of", "figures after")
    first: list[tuple[Any, float]] = []
    embed = run_figures.embed

    def embedded(model: Any, data: Any) -> Any:
        """The figures of the original model come first."""
        first.append((model, time.process_time()))
        return embed(model, data)

    inner = unlearn_job.figures_of

    def figures(*arguments: Any, **options: Any) -> Any:
        first.append((arguments[0], time.process_time()))
        return inner(*arguments, **options)

    run_figures.embed, unlearn_job.figures_of = embedded, figures
    unlearn_job.run_job(read_job(settings), out)
    change = next(at for model, at in first if model is not first[0][0])
    spent["figures before"] = change - first[0][1]
    spent["figures after"] -= spent["figures before"]
    spent["steps"] -= spent["before the steps"]
    spent["rest"] = time.process_time() - sum(spent.values())
    peak = 1024 * int(STATUS.read_text().partition("VmHWM:")[2].split()[0])
    told.write_text(json.dumps({"cpu_seconds": time.process_time(), "peak_bytes": peak, "stages": spent}))
    return 0


def write(folder: Path, pairs: int) -> None:
    """So many pairs, all of them or nothing; those of a smaller number are the first of a larger."""
    whole, folder = folder, folder.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shape = (pairs, 3, 64, 64)
    visual = np.lib.format.open_memmap(folder / "visual.npy", "w+", np.uint8, shape)
    other = np.full((pairs, LENGTH), WORDS - 1)
    for part, start in enumerate(range(0, pairs, _AT_ONCE)):
        numbers = np.random.default_rng(part)
        stop = min(start + _AT_ONCE, pairs)
        visual[start:stop] = numbers.integers(0, 256, (_AT_ONCE, *shape[1:]), dtype=np.uint8)[: stop - start]
        other[start:stop, :-1] = numbers.integers(0, WORDS - 1, (_AT_ONCE, LENGTH - 1))[: stop - start]
    visual.flush()
    np.save(folder / "other.npy", other)
    folder.rename(whole)


def measure(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, then the first one again with a kill; what has ended is kept in the folder.

    Raises:
        RuntimeError: a run failed, or the killed one ended with other bits; no figure is given then.
    """
    torch.manual_seed(0)
    make = small if a.quick else large
    model = make()
    save_model(model, work / "weights.safetensors", {})
    cases = [(pairs, a.forget[0]) for pairs in a.pairs] + [
        (a.pairs[len(a.pairs) // 2], forget) for forget in a.forget[1:]
    ]

    def settings(pairs: int, forget: int) -> Path:
        data, ids = work / str(pairs), work / f"{forget}.txt"
        if not data.exists():
            write(data, pairs)
        ids.write_text("\n".join(map(str, range(forget))))
        path = work / f"{pairs}-{forget}.toml"
        steps = forget // A_STEP
        text = SETTINGS.format(
            make=make.__name__,
            weights="weights.safetensors",
            data=data.name,
            judged=a.judged,
            ids=ids.name,
            steps=steps,
            batch=BATCH,
        )
        path.write_text(text)
        return path

    def kept(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = json_hash([FORMAT, versions(), make.__name__, a.judged, BATCH, A_STEP, cases[0], name])
        found = cache.part(work / "parts" / f"{name.replace(' ', '-')}.json", key, compute)
        print(name, json.dumps(found), flush=True)
        return found

    def timed(pairs: int, forget: int) -> dict[str, Any]:
        out, told = work / "run", work / "told.json"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed: one that goes on takes less
        process(settings(pairs, forget), out, told)
        run = {"pairs": pairs, "forget": forget, "steps": forget // A_STEP, **json.loads(told.read_text())}
        return run | {"weights_sha256": weights_of(out)}

    def killed() -> dict[str, Any]:
        out, told = work / "run", work / "told.json"
        shutil.rmtree(out, ignore_errors=True)
        path = settings(*cases[0])
        status = process(path, out, told, until=(out / "checkpoint.pt").exists)
        if status != -signal.SIGKILL:
            raise RuntimeError(f"expected a run that is killed after its first checkpoint, got status {status}")
        steps = len(torch.load(out / "checkpoint.pt", weights_only=True)["losses"])
        beside = sorted(file.name for file in out.glob("checkpoint.*.pt"))
        process(path, out, told)
        if weights_of(out) != first["weights_sha256"]:
            raise RuntimeError("the killed run ended with other bits")
        resumed = json.loads(told.read_text())
        return {"after_steps": steps, "of_steps": first["steps"], "kept": beside, "same": True, "resumed": resumed}

    runs: dict[str, Any] = {}
    for case in cases:
        name = "{} pairs, {} forgotten".format(*case)
        runs[name] = kept(name, partial(timed, *case))
    first = next(iter(runs.values()))
    killed_run = kept("killed", killed)
    shutil.rmtree(work / "run", ignore_errors=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_of_a_pair": int(np.prod((3, 64, 64))) + 8 * LENGTH,
        "batch": BATCH,
        "a_step": A_STEP,
        "judged": a.judged,
        "runs": runs,
        "killed": killed_run,
        "environment": environment.describe(torch.device("cpu")),
    }


def process(settings: Path, out: Path, told: Path, until: Callable[[], bool] | None = None) -> int:
    """One run in a process of its own, killed as soon as ``until()`` says so; its status.

    Raises:
        RuntimeError: it failed.
    """
    words = [sys.executable, "-m", "benchmarks.unlearning.scale", "--run", *map(str, (settings, out, told))]
    child = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while until is not None and child.poll() is None:
        if until():
            child.kill()
            break
        time.sleep(0.01)
    status = child.wait()
    if status and until is None:
        raise RuntimeError(f"the run of {settings} ended with status {status}")
    return status


def weights_of(out: Path) -> str:
    """The hash of the weights that a run wrote."""
    return str(json.loads((out / "results.json").read_text())["provenance"]["weights_sha256"])


HEAD = """<!-- generated by `python -m benchmarks.unlearning.scale --page`; do not edit -->
# Unlearning data that stay on the disk

`python -m benchmarks.unlearning.scale`: random pictures (3×64×64, uint8) with captions of 12 token ids, {bytes:,} bytes
a pair, in `visual.npy` and `other.npy`; a two-tower model of {parameters:.1f} million random weights; `memory = 0`,
`judged = {judged}`, a step for {a_step} items to forget, with {batch} of them and {batch} to keep. One
thread of {device}, a process for each run. Other processes shared the machine, so these are CPU seconds.

"""


def page(stored: dict[str, Any]) -> str:
    """SCALE.md."""
    rows = []
    for row in stored["runs"].values():
        cells = [f"{row['pairs']:,}", f"{row['forget']:,}", f"{row['pairs'] * stored['bytes_of_a_pair'] / 1e6:,.0f}"]
        cells += [f"{row['steps']}", f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['cpu_seconds']:.1f}"]
        cells += [f"{row['stages'][stage]:.1f}" for stage in STAGES]
        rows.append(cells)
    head = ("pairs", "of them to forget", "data, MB", "steps", "peak memory, MB", "CPU s", *STAGES)
    lines = table_lines(head, rows)
    killed = stored["killed"]
    again = killed["resumed"]
    lines += [
        "",
        '"Load and hash" reads everything once and grows with the data. "Before the steps" embeds the forget set and '
        'a fixed number of retained pairs; the figures are of the forget set and the judged pairs. "Rest" is the start '
        "of Python, the checks, the hashes of the weights, and writing. The peak does not grow with the data. It grows "
        "with the forget set up to about 1,024 items, the most that are embedded at once.",
        "",
        f"The first of these runs again, killed (SIGKILL) after the checkpoint of step {killed['after_steps']} of "
        f"{killed['of_steps']}: the same command ends with the same bits. It takes {again['cpu_seconds']:.1f} CPU s, "
        f"{again['stages']['before the steps']:.1f} of them before the steps: what the original model said was in "
        f"{', '.join(f'`{name}`' for name in killed['kept'])}.",
    ]
    about = {"bytes": stored["bytes_of_a_pair"], "parameters": stored["parameters"] / 1e6}
    about |= {name: stored[name] for name in ("judged", "batch", "a_step")} | {
        "device": stored["environment"]["device"]
    }
    return HEAD.format(**about) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
