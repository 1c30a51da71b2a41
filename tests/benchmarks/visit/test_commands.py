"""The package's commands beside themselves on a CPU: what a visit says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.visit import commands


def log(folder: Path, command: str, device: str, dtype: str, text: str | None = None, **more: Any) -> Path:
    told = {"command": command, "device": device, "dtype": dtype, "seconds": 1.0, "status": 0, "figures": {}, **more}
    path = folder / f"{command}-{device}-{dtype}.log"
    path.write_text(f"python -m benchmarks.visit.commands {command}\n{json.dumps(told) if text is None else text}\n")
    return path


def test_each_run_is_compared_with_the_same_on_a_cpu(tmp_path: Path) -> None:
    figures = {"accuracy": 1.0, "psnr_db": 31.7}
    right = log(tmp_path, "unlearn", "cpu", "fp32", figures=figures)
    near = log(tmp_path, "unlearn", "cuda", "bf16", figures={"accuracy": 0.95, "psnr_db": 33.0})
    assert commands.compare([right, near]) == ("ok", "unlearn cpu fp32 1.0 s; unlearn cuda bf16 1.0 s")
    far = log(tmp_path, "unlearn", "cuda", "fp16", figures={"accuracy": 0.5})
    status, said = commands.compare([right, near, far])
    assert status == "failed" and said.startswith(
        "unlearn cuda fp16: exit status 0 accuracy 0.5 instead of 1, psnr_db None instead of 31.7; unlearn cpu"
    )
    refused = log(tmp_path, "protect", "cuda", "fp32", status=2)
    died = log(tmp_path, "protect", "cuda", "fp16", "CUDA error: device-side assert triggered")
    status, said = commands.compare([right, refused, died])
    assert status == "failed"
    assert (
        said
        == "protect: CUDA error: device-side assert triggered; protect cuda fp32: exit status 2; unlearn cpu fp32 1.0 s"
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["unlearn", "protect"])
def test_a_command_in_half_precision(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = []
    for dtype in ("fp32", "bf16"):
        assert commands.main([name, "--device", "cpu", "--dtype", dtype]) == 0
        *_, line = capsys.readouterr().out.splitlines()
        logs.append(log(tmp_path, name, "cpu", dtype, line))
        assert len(json.loads(line)["figures"]) > 5 and json.loads(line)["dtype"] == dtype
    assert commands.compare(logs)[0] == "ok"
