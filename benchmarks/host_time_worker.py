"""The process that benchmarks.host_time starts, with the measured checkout first on the path.

Reads one request a line, ``{"what": "time", "floor", "counts" or "profile", "batch": …, "calls": …}``, and answers with
one line of JSON. A call is ``info_nce(x, y, scale=scale)`` and its ``backward()``: D = 512, bf16, gradients of x, y and
scale. This is what a user's training step runs, with these stand-ins:

- CPU tensors for CUDA tensors. The registry is told that Triton serves them, and the workspace is that of a GPU.
- A driver that launches nothing (:mod:`benchmarks.no_launch`) for that of a GPU of compute capability 9.0.
- One GEMM of a single element for each library GEMM, which the host only enqueues on a GPU.
"""

from __future__ import annotations

import cProfile
import gc
import importlib
import json
import pstats
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

DIM = 512
CAPABILITY = 90
HERE = Path(__file__).resolve().parent


def found(*names: str) -> Any:
    """The first of the package's modules that this checkout has."""
    for name in names[:-1]:
        try:
            return importlib.import_module(f"ccu_fast.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("ccu_fast"):
                raise
    return importlib.import_module(f"ccu_fast.{names[-1]}")


def prepare() -> Any:
    """Put the stand-ins in place; the driver."""
    sys.path.remove(str(HERE))  # its registry.py and results.py are not what an import of the checkout means
    from importlib.util import module_from_spec, spec_from_file_location

    import torch
    import triton

    spec = spec_from_file_location("no_launch", HERE / "no_launch.py")
    assert spec is not None and spec.loader is not None
    no_launch = module_from_spec(spec)
    spec.loader.exec_module(no_launch)
    driver = no_launch.TargetOnly(CAPABILITY)
    triton.runtime.driver.set_active(driver)

    # Each by its current path, and by that from before the operations had folders.
    registry = found("ops.backend", "backends.registry")
    similarity = found("ops.reduce_similarity.api", "similarity")
    gemm = found("ops.reduce_similarity.triton.gemm", "backends.triton.gemm")

    cannot_serve = registry.cannot_serve
    registry.candidates = lambda *_: ("triton", "reference")
    registry.cannot_serve = lambda name, *rest: None if name == "triton" else cannot_serve(name, *rest)
    similarity.DEFAULT_WORKSPACE["cpu"] = similarity.DEFAULT_WORKSPACE["cuda"]
    one, other, result = (torch.ones(1, 1, 1) for _ in range(3))

    def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool) -> None:
        torch.baddbmm(result, one, other, out=result) if add else torch.bmm(one, other, out=result)

    gemm.product = product
    torch.set_num_threads(1)
    return driver


class Call:
    """One size's tensors and the call."""

    def __init__(self, batch: int) -> None:
        import torch

        from ccu_fast import info_nce

        self.info_nce: Any = info_nce
        self.x, self.y = (torch.zeros(batch, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        self.scale = torch.tensor(20.0, requires_grad=True)

    def forward(self) -> Any:
        return self.info_nce(self.x, self.y, scale=self.scale)

    def zero_grad(self) -> None:
        self.x.grad = self.y.grad = self.scale.grad = None

    def step(self) -> None:
        self.zero_grad()
        self.forward().backward()


class Nothing(Call):
    """An autograd function of the same tensors that computes nothing: torch's own share of the call."""

    def __init__(self, batch: int) -> None:
        import torch

        super().__init__(batch)
        gradients = [torch.zeros_like(t) for t in (self.x, self.y, self.scale)]

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *tensors: Any) -> Any:
                ctx.save_for_backward(*tensors)
                return torch.empty(())

            @staticmethod
            def backward(ctx: Any, _: Any) -> Any:
                assert len(ctx.saved_tensors) == 3
                return tuple(map(torch.empty_like, gradients))

        self.info_nce = lambda x, y, *, scale: Function.apply(x, y, scale)


def times(call: Call, calls: int) -> dict[str, list[int]]:
    """Nanoseconds of processor time of every call, forward and backward."""
    forward, backward = [], []
    gc.collect()
    gc.disable()
    for _ in range(calls):
        call.zero_grad()
        before = time.thread_time_ns()
        loss = call.forward()
        between = time.thread_time_ns()
        loss.backward()
        after = time.thread_time_ns()
        forward.append(between - before)
        backward.append(after - between)
    gc.enable()
    return {"forward": forward, "backward": backward}


def counts(call: Call, driver: Any) -> dict[str, Any]:
    """Torch operators that reach a backend, kernels launched and Python functions entered, by forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen[str(function)] += 1
            return function(*args, **(kwargs or {}))

    def enter(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            entered[part(frame.f_code.co_filename)] += 1

    check = importlib.import_module("ccu_fast.check")
    found: dict[str, Any] = {}
    for name in ("forward", "backward"):
        kernels: list[str] = []
        entered: Counter[str] = Counter()
        operators = Count()
        for watch in ("functions", "operators"):
            call.zero_grad()
            loss = None if name == "forward" else call.forward()
            step = call.forward if loss is None else loss.backward
            if watch == "functions":
                driver.launched = kernels
                sys.setprofile(enter)
                step()
                sys.setprofile(None)
                driver.launched = None
            else:
                # Under a mode the package's operator would be all that is seen. Older checkouts do not ask.
                with operators, mock.patch.object(check, "_traced", lambda: False, create=True):
                    step()
        found[name] = {"kernels": kernels, "python_functions": dict(entered), "torch_operators": dict(operators.seen)}
    return found


def part(file: str) -> str:
    """Whose code a file is."""
    if "/ccu_fast/" in file:
        return "ccu_fast"
    if "/triton/" in file or file == "<string>" or file == "<string>:1":
        return "triton"
    return "torch" if "/torch/" in file else "built-in"


def profile(call: Call, calls: int) -> dict[str, Any]:
    """Shares of cProfile's time in our functions, Triton's, torch's, and built-in ones, which are C and torch's C++."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call.step()
    profiler.disable()
    shares: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for (file, _, name), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        where = part(file)
        shares[where] += own
        place = file.rsplit("/ccu_fast/", 1)[-1] if where == "ccu_fast" else where
        functions[f"{place}: {name}"] += own
    total = sum(shares.values())
    return {
        "shares": {name: round(own / total, 3) for name, own in shares.most_common()},
        "functions": {name: round(own / total, 3) for name, own in functions.most_common(25)},
    }


def main() -> None:
    """Answer requests until there are no more."""
    driver = prepare()
    made: dict[tuple[int, bool], Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        batch = request["batch"]
        key = (batch, request["what"] == "floor")
        if key not in made:
            made[key] = Nothing(batch) if key[1] else Call(batch)
            for _ in range(20):
                made[key].step()
        call = made[key]
        answer: Any
        if request["what"] in ("time", "floor"):
            answer = times(call, request["calls"])
        elif request["what"] == "counts":
            answer = counts(call, driver)
        else:
            answer = profile(call, request["calls"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
