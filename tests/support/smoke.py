"""Every operation once against float64: the first thing to run on a new GPU.

    python -m tests.support.smoke --device cuda --backend triton --part 2/8    every eighth check, from the second
    python -m tests.support.smoke --device cpu --backend native                the same on a CPU, as test_smoke.py

Each wrong operation gets a line that says how far it is off; the last line counts them.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

import torch

from tests.support.smoke_cases import checks


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; exit code 1 if one is wrong, 2 if the device was lost on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", choices=("triton", "native"), required=True)
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--tiny", action="store_true", help="a few of each")
    arguments = parser.parse_args(argv)
    first, step = map(int, arguments.part.split("/"))
    device = torch.device(arguments.device)
    chosen = checks(device.type, arguments.backend, tiny=arguments.tiny)[first - 1 :: step]
    right, wrong = 0, []
    for check in chosen:
        try:
            check.run(device, arguments.backend)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except AssertionError as error:
            wrong.append(check.name)
            print(f"WRONG {error}", flush=True)
        except Exception as error:
            wrong.append(check.name)
            print(f"ERROR {check.name}: {type(error).__name__}: {error}\n{traceback.format_exc()}", flush=True)
            if device.type == "cuda" and isinstance(error, RuntimeError) and _lost():
                break
        else:
            right += 1
    left = len(chosen) - right - len(wrong)
    print(f"{right} right, {len(wrong)} wrong, {left} not run" + (f": {'; '.join(wrong[:3])}" if wrong else ""))
    return 2 if left else int(bool(wrong) or not right)


def _lost() -> bool:
    """Whether the CUDA context is lost: no result after an illegal address can be trusted."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
