"""Our kernels on small shapes, each called several times on the same inputs: the same bits, and the right ones.

    python -m benchmarks.exercise --device cuda
    compute-sanitizer --error-exitcode 1 python -m benchmarks.exercise --once

Small enough for compute-sanitizer, which slows kernels down a hundredfold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from unittest.mock import patch

import torch

from benchmarks.environment import choose_device
from benchmarks.gate import Gate
from benchmarks.ops import OPS
from benchmarks.registry import Case, Provider, Tensors, Unavailable, label
from ccu_fast.ops.reduce_similarity import operator

CALLS = 3
# Ops without a matrix of pairs, and thus without separate kernels for small batches.
NO_PAIRS = ("topk_flips", "topk_flips_minilm", "candidate_losses", "pgd_step", "noise_add", "noise_update")


def exercise(case: Case, provider: Provider, gate: Gate, calls: int) -> str | None:
    """What is wrong with the provider's answers, or None.

    Raises:
        Unavailable: it cannot run here.
    """
    # Fresh inputs for every call: an in-place operation must start from the same values.
    outputs = [_call(provider, case) for _ in range(calls)]
    for later in outputs[1:]:
        for name, first in outputs[0].items():
            if not _same_bits(first, later[name]):
                return f"{name} differs from call to call"
    verdict = gate.judge(provider, outputs[0])
    return None if verdict.passed else verdict.failure()


def _call(provider: Provider, case: Case) -> Tensors:
    return {k: t.detach().clone() for k, t in provider.build(case.inputs(), case.shape)().items()}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exercise every op; exit code 1 if anything is wrong, 0 if what could run is right."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.exercise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        metavar="DTYPE",
        help="float32, bfloat16, float16; default: all on a GPU, float32 on a CPU",
    )
    parser.add_argument("--once", action="store_true", help="one call each, for compute-sanitizer")
    arguments = parser.parse_args(argv)
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    everything = ("float32", "bfloat16", "float16") if device.type == "cuda" else ("float32",)
    ran = wrong = 0
    for name in arguments.ops:
        for shape in OPS[name].quick:
            for dtype in arguments.dtypes or everything:
                case = Case(OPS[name], shape, getattr(torch, dtype), device)
                gate = Gate(case, case.inputs())
                # The baseline's error sets the limit for ours.
                for provider in gate.order([p for p in case.providers() if p.name == case.op.baseline]):
                    gate.judge(provider, _call(provider, case))
                for provider in case.providers():
                    if provider.role != "ours":
                        continue
                    # With the kernels of small batches, and with those that a batch of this size never meets.
                    for pairs in (operator.SMALL_PAIRS, 0)[: 1 if name in NO_PAIRS else 2]:
                        what = f"{name} {label(shape)} {dtype} {provider.name}" + ("" if pairs else ", large kernels")
                        try:
                            with patch.object(operator, "SMALL_PAIRS", pairs):
                                problem = exercise(case, provider, gate, 1 if arguments.once else CALLS)
                        except Unavailable as reason:
                            print(f"unavailable  {what}: {reason}")
                            continue
                        ran, wrong = ran + 1, wrong + (problem is not None)
                        print(f"{'WRONG' if problem else 'right':12} {what}" + (f": {problem}" if problem else ""))
    print(f"{ran} exercised on {device}, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
