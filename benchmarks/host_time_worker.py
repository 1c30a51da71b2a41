"""What benchmarks.host_time runs in a process of its own, with the checkout that is measured first on the path.

Reads one request a line, ``{"what": "time" or "counts" or "profile", "batch": …, "calls": …}``, and answers with one
line of JSON. A call is ``info_nce(x, y, scale=scale)`` and its ``backward()``: D = 512, bf16, gradients of x, y and
scale, what a user's training step runs, with these stand-ins:

- CPU tensors for CUDA tensors. The registry is told that Triton serves them, and the workspace is that of a GPU.
- A driver that launches nothing (:mod:`benchmarks.no_launch`) for that of a GPU of compute capability 9.0.
- One GEMM of a single element for each library GEMM, which the host only enqueues on a GPU.
"""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

DIM = 512
CAPABILITY = 90
HERE = Path(__file__).resolve().parent


def prepare() -> Any:
    """Put the stand-ins in place; the driver."""
    sys.path.remove(str(HERE))  # its registry.py and results.py are not what an import of the checkout means
    import importlib.util

    import torch
    import triton

    spec = importlib.util.spec_from_file_location("no_launch", HERE / "no_launch.py")
    assert spec is not None and spec.loader is not None
    no_launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(no_launch)
    driver = no_launch.TargetOnly(CAPABILITY)
    triton.runtime.driver.set_active(driver)

    from ccu_fast import similarity
    from ccu_fast.backends import registry
    from ccu_fast.backends.triton import gemm

    cannot_serve = registry.cannot_serve
    registry.candidates = lambda *_: ("triton", "reference")
    registry.cannot_serve = lambda name, *rest: None if name == "triton" else cannot_serve(name, *rest)
    similarity.DEFAULT_WORKSPACE["cpu"] = similarity.DEFAULT_WORKSPACE["cuda"]
    a, b, out = (torch.ones(1, 1, 1) for _ in range(3))

    def product(target: Any, left: Any, right: Any, *, add: bool) -> None:
        torch.baddbmm(out, a, b, out=out) if add else torch.bmm(a, b, out=out)

    gemm.product = product
    torch.set_num_threads(1)
    return driver


class Call:
    """One size's tensors and the call."""

    def __init__(self, batch: int) -> None:
        import torch

        from ccu_fast import info_nce

        self.info_nce = info_nce
        self.x, self.y = (torch.zeros(batch, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        self.scale = torch.tensor(20.0, requires_grad=True)

    def forward(self) -> Any:
        self.x.grad = self.y.grad = self.scale.grad = None
        return self.info_nce(self.x, self.y, scale=self.scale)

    def step(self) -> None:
        self.forward().backward()


def times(call: Call, calls: int) -> dict[str, list[int]]:
    """Nanoseconds of processor time of every call, forward and backward."""
    forward, backward = [], []
    gc.collect()
    gc.disable()
    for _ in range(calls):
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

    found: dict[str, Any] = {}
    loss = None
    for name in ("forward", "backward"):
        loss = call.forward() if loss is None else loss
        entered: Counter[str] = Counter()

        def enter(frame: Any, event: str, _: Any, entered: Counter[str] = entered) -> None:
            if event == "call":
                entered[part(frame.f_code.co_filename)] += 1

        driver.launched = []
        sys.setprofile(enter)
        loss = call.forward() if name == "forward" else loss.backward()
        sys.setprofile(None)
        found[name] = {"kernels": driver.launched, "python_functions": dict(entered)}
        driver.launched = None
        loss = call.forward() if name == "forward" else None
    for name in ("forward", "backward"):
        loss = call.forward() if name == "backward" else None
        with Count() as count:
            call.forward() if loss is None else loss.backward()
        found[name]["torch_operators"] = dict(count.seen)
    return found


def part(file: str) -> str:
    """Whose code a file is."""
    if "/ccu_fast/" in file:
        return "ccu_fast"
    if "/triton/" in file or file == "<string>" or file == "<string>:1":
        return "triton"
    return "torch" if "/torch/" in file else "built-in"


def profile(call: Call, calls: int) -> dict[str, Any]:
    """Shares of cProfile's time in our functions, Triton's, torch's and in built-in functions, which are torch's C++."""
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
    driver = prepare()
    made: dict[int, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        batch = request["batch"]
        if batch not in made:
            made[batch] = Call(batch)
            for _ in range(20):
                made[batch].step()
        call = made[batch]
        answer: Any
        if request["what"] == "time":
            answer = times(call, request["calls"])
        elif request["what"] == "counts":
            answer = counts(call, driver)
        else:
            answer = profile(call, request["calls"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
