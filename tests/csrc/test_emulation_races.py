"""The CUDA C++ kernels under the thread sanitizer: no race as they are, and one wherever a barrier is left out."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.csrc.emulation import build
from tests.support.presence import absent

THREAD = ("-O1", "-fsanitize=thread")
PLACES = [
    f"{path.name}:{number}"
    for path in sorted((build.CSRC / "cuda").glob("*.cu*"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads()" in line
]

Programs = tuple[Path, Path]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The driver of all kernels, and the faulty kernels."""
    reason = build.impossible()
    if reason is not None:
        absent("the emulation of CUDA kernels", reason)
    built = build.Build(tmp_path_factory.mktemp("races"), THREAD)
    emulated = build.emulated(built)
    fibers = [path for path in emulated if path.name == "emulation-fibers.o"]
    return (
        built.program([*emulated, *built.objects([build.HERE / "drive.cpp"])], "drive"),
        built.program([*fibers, *built.objects([build.HERE / "faulty.cu"])], "faulty"),
    )


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"TSAN_OPTIONS": "halt_on_error=1"} | environment
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, env=os.environ | settings)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("divergent_barrier", "a thread of the block has ended before the barrier at "),
        ("different_barriers", "threads of a block wait at different barriers"),
        ("missing_lane", "a lane of the mask has ended before the collective at "),
        ("race", "ThreadSanitizer: data race"),
        ("traps", "unspecified launch failure"),
        ("too_many_threads", "invalid configuration argument"),
        ("too_large_grid", "invalid configuration argument"),
    ],
)
def test_what_is_wrong_is_noticed(kernel: str, said: str, programs: Programs) -> None:
    done = run(programs[1], kernel)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


def test_what_is_right_is_not(programs: Programs) -> None:
    assert run(programs[1], "nothing").returncode == 0


def test_no_race_in_any_kernel_and_one_without_any_barrier(programs: Programs) -> None:
    """Every __syncthreads() of csrc/cuda left out in turn: a race, another result, or threads that never meet."""
    right = {part: run(programs[0], part) for part in ("topk", "rest")}
    for part, done in right.items():
        assert done.returncode == 0, done.stderr[-8000:]
        assert done.stdout.endswith("done\n")
        assert run(programs[0], part, EMULATION_SEED="7").stdout == done.stdout
    assert len(PLACES) > 10

    def unnoticed(place: str) -> str | None:
        # What launch.cuh shares is called in topk_flips' kernels, too, and there twice in a row.
        part = "topk" if place.startswith(("topk", "launch")) else "rest"
        try:
            done = run(programs[0], part, EMULATION_SKIP=place)
        except subprocess.TimeoutExpired:
            return None
        return place if done.returncode == 0 and done.stdout == right[part].stdout else None

    with ThreadPoolExecutor(2) as pool:
        assert [place for place in pool.map(unnoticed, PLACES) if place] == []
