"""The smoke test of a GPU: on a GPU if there is one, otherwise on what this machine has, so that it keeps working."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support import smoke
from tests.support.paths import ROOT
from tests.support.presence import require_backend, require_interpreter
from tests.support.smoke_cases import LOSSES, Cast, Check, Tensors, checks

CPU = torch.device("cpu")
SHAPES_OF_TMA = {f"{banks}x{n}x{d}" for banks in (1, 3) for d in (1, 8, 40, 130, 512) for n in (17, 128, 300)}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_on_a_gpu(backend: str) -> None:
    for check in checks("cuda", require_backend(backend)):
        check.run(torch.device("cuda"), backend)


def test_on_a_cpu(native: str, one_thread: None) -> None:
    for check in checks("cpu", native, tiny=True):
        check.run(CPU, native)


def test_in_the_interpreter() -> None:
    require_interpreter()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.smoke", "--device", "cpu", "--backend", "triton", "--tiny"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    expected = len(checks("cpu", "triton", tiny=True))
    assert done.stdout.splitlines()[-1] == f"{expected} right, 0 wrong, 0 not run"
    assert expected >= 20


def test_everything_is_checked_on_a_gpu() -> None:
    by_backend = {backend: checks("cuda", backend) for backend in ("triton", "native")}
    names = [check.name for found in by_backend.values() for check in found]
    assert len(names) == len(set(names))
    assert {check.kernel for check in by_backend["triton"]} == {"reduce_similarity", "l2_normalize"}
    others = {check.kernel for check in by_backend["native"]}
    assert others == {"topk_flips", "candidate_losses", "pgd_step_", "noise_store"}
    for loss in LOSSES:
        found = [check for check in by_backend["triton"] if check.name.startswith(f"{loss} ")]
        assert {check.arithmetic for check in found} == {"fp32", "tf32", "fp16", "bf16"}, loss
        assert {check.large for check in found} == {True, False}, loss
    large = {c.name.split()[1] for c in by_backend["triton"] if c.name.startswith("info_nce") and c.large}
    assert large >= SHAPES_OF_TMA


@pytest.mark.parametrize("wrong", ["value", "nan", "raises"])
def test_what_is_wrong_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compute(cast: Cast, backend: str) -> Tensors:
        out = cast(torch.linspace(0, 1, 9, dtype=torch.float64))
        if backend == "native":
            if wrong == "raises":
                raise RuntimeError("misaligned address")
            out[3] = torch.nan if wrong == "nan" else out[3] + 1e-3
        return {"out": out}

    right = Check("right", "noise_store", "fp32", lambda cast, backend: {"out": cast(torch.ones(3))})
    monkeypatch.setattr(smoke, "checks", lambda *_, **__: [right, Check("spoiled", "noise_store", "fp32", compute)])
    assert smoke.main(["--device", "cpu", "--backend", "native"]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "1 right, 1 wrong, 0 not run: spoiled"
    assert ("misaligned address" in printed) == (wrong == "raises")
    assert smoke.main(["--device", "cpu", "--backend", "native", "--part", "1/2"]) == 0


def test_nothing_is_believed_after_a_lost_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faults(cast: Cast, backend: str) -> Tensors:
        raise RuntimeError("an illegal memory access was encountered")

    found = [Check(name, "noise_store", "fp32", faults) for name in ("first", "second")]
    monkeypatch.setattr(smoke, "checks", lambda *_, **__: found)
    monkeypatch.setattr(smoke, "_lost", lambda: True)
    assert smoke.main(["--device", "cuda", "--backend", "native"]) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "0 right, 1 wrong, 1 not run: first"
