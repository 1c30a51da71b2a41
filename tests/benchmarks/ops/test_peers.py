"""The benchmark's GPU peers compute the loss they are timed for: their own kernels in Triton's interpreter."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.ops import other_losses, peers
from benchmarks.registry import Unavailable
from tests.support.paths import ROOT
from tests.support.presence import absent, require_interpreter


@functools.cache
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of each installed peer, by output; one process for all, as importing torch takes longest."""
    done = subprocess.run(
        # -O, because inf_cl asserts that its tensors are on a GPU.
        [sys.executable, "-O", "-m", "tests.support.peers_in_interpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return errors


SETTINGS = [
    *(f"{peers.SIGLIP_KERNEL} {name}" for name in other_losses.SIGLIP_KERNEL_SETTINGS),
    f"{peers.MEMEFF} prefixes",
]


@pytest.mark.parametrize("name", [peers.INF_CL, peers.SIGLIP_KERNEL, peers.MEMEFF, *SETTINGS])
def test_a_peer_computes_our_loss_and_its_gradients(name: str) -> None:
    package = name.partition(" ")[0]
    for needed in ("triton", package):
        if peers.version(needed) is None:
            absent(needed, f"not installed (pip install --no-deps {needed})")
    require_interpreter()
    errors = interpreted()[name]
    scalars = {peers.INF_CL: {"dscale"}, peers.SIGLIP_KERNEL: {"dscale", "dbias"}, peers.MEMEFF: set()}
    assert errors.keys() == {"loss", "dx", "dy"} | scalars[package]
    assert max(errors.values()) < 1e-5, errors


def test_a_peer_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = other_losses.make_sigmoid({"B": 8, "D": 16}, torch.float32, torch.device("cpu"))
    builds = {"inf_cl": peers.build_inf_cl, "siglip-kernel": peers.build_siglip_kernel, "memeff": peers.build_memeff}
    for name, build in builds.items():
        monkeypatch.setattr(peers, "version", lambda package: "1.0")
        with pytest.raises(Unavailable, match=f"{name} has kernels for CUDA tensors only"):
            build(inputs, {"B": 8, "D": 16})
        monkeypatch.setattr(peers, "version", lambda package: None)
        with pytest.raises(Unavailable, match=f"{name} is not installed .pip install --no-deps {name}"):
            build(inputs, {"B": 8, "D": 16})


def test_inf_cl_is_given_a_width_that_divides_d() -> None:
    assert [peers._head(d) for d in (48, 512, 768, 1024, 24)] == [16, 256, 256, 256, 8]
    assert not peers.inf_cl_serves({"D": 24}, "cuda")
