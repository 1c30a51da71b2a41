"""Fill the caches of Triton and torch.compile: each process calls its part of the cases once, all of them at once.

python -m benchmarks.visit.warm bench --device cuda --part 1/8
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.ops.peers import NAMES
from benchmarks.registry import Case, Provider, label
from benchmarks.visit import program, questions

ALONE = 1e12  # FLOPs; what stores a matrix of this size does not fit beside others of its kind
_LOCK = Path(tempfile.gettempdir()) / "ccu_fast_visit_warm.lock"


def compiles(provider: Provider) -> bool:
    """Whether its first call at a shape compiles something that a later process will find on the disk."""
    return provider.compiled or provider.role in ("ours", "yardstick")


def of_others(provider: Provider) -> bool:
    """Whether its kernels are another project's: called last, because one that dies takes its process along."""
    return provider.name.startswith(NAMES)


def call_once(case: Case, chosen: Callable[[Provider], bool]) -> list[str]:
    """Build and call the chosen providers; what went wrong is left for the measurement to say."""
    said = []
    inputs = case.inputs()
    for provider in filter(chosen, case.providers()):
        try:
            provider.build(inputs, case.shape)()
        except Exception as error:
            said.append(f"{provider.name}: {type(error).__name__}: {str(error)[:200]}")
        torch.compiler.reset()
    return said


@contextmanager
def _turn(case: Case) -> Iterator[None]:
    if case.op.work(case.shape, case.dtype)[0] < ALONE:
        yield
        return
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Call one part; always exit code 0, as nothing is measured here."""
    parser = argparse.ArgumentParser(prog="benchmarks.visit.warm", description=__doc__)
    parser.add_argument("what", choices=("bench", "tune"))
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--ops", nargs="+", default=[])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    os.nice(5)  # the smoke test beside it goes first
    first, step = map(int, arguments.part.split("/"))
    ops = arguments.ops or (program.TINY_OPS if arguments.tiny else ())
    if arguments.what == "bench":
        cases = list(program.cases(arguments.device, ops, quick=arguments.tiny))
    else:
        cases = [question.case for question in questions.questions(arguments.device, tiny=arguments.tiny)]
        # The tiles of one question are split over several processes, because they take longest.
        cases = [alone for case in cases for alone in questions.one_by_one(case)]
    chosen = cases[first - 1 :: step]
    for whose in (compiles, of_others):
        for case in chosen:
            if not any(map(whose, case.providers())):
                continue
            with _turn(case):
                said = call_once(case, whose)
                gc.collect()
                if case.device.type == "cuda":
                    torch.cuda.empty_cache()
            print(f"{case.op.name} {label(case.shape)} {'; '.join(said)}", flush=True)
    print(f"{len(chosen)} of {len(cases)} cases called")
    return 0


if __name__ == "__main__":
    sys.exit(main())
