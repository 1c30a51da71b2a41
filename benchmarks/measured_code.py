"""Which kernels the stored rows of a CPU have measured, and whether they are those of this checkout.

    python -m benchmarks.measured_code        # after new rows were committed; needs git's history

A row names its commit. This file keeps what the kernels were at each of these commits, as hashes of their C++ without
comments and white space, so that docs/performance.md can say what has changed since without git. What all kernels
share (vectors of an instruction set, teams of threads) and the Python code that calls them are not compared.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.environment import REPOSITORY
from benchmarks.results import Row

FILE = Path(__file__).resolve().parent / "measured_code.json"
DEPTH = 1
CPU, COMMON = "csrc/cpu/", "csrc/common/"
LOSSES = "losses"
# What runs for an operation on a CPU; every operation that is not named runs the kernels of the losses.
KERNELS = {
    LOSSES: (f"{CPU}similarity_*.cpp", f"{CPU}relations.h", f"{CPU}small_*"),
    "topk_flips": (f"{CPU}topk_*", f"{COMMON}select.h"),
    "candidate_losses": (f"{CPU}candidates.cpp",),
    "pgd_step": (f"{CPU}pgd_step.cpp", f"{COMMON}pgd.h"),
    "noise_add": (f"{CPU}noise_add.cpp", f"{COMMON}noise.h"),
    "noise_update": (f"{CPU}noise_update.cpp", f"{COMMON}noise.h"),
}
_OF = {"topk_flips_minilm": "topk_flips"}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def kernels_of(op: str) -> str:
    """The kernels that an operation of the benchmarks runs."""
    name = _OF.get(op, op)
    return name if name in KERNELS else LOSSES


def hashes(paths: Iterable[str], read: Callable[[str], str]) -> dict[str, str]:
    """A hash of the C++ of each kind of kernels, of files that ``read`` gives."""
    names = sorted(paths)
    found = {}
    for kind, patterns in KERNELS.items():
        own = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        code = "\n".join(name + "".join(_COMMENT.sub("", read(name)).split()) for name in own)
        found[kind] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return found


def here() -> dict[str, str]:
    """The hashes of this checkout."""
    files = (path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "csrc").rglob("*") if path.is_file())
    return hashes(files, lambda name: (REPOSITORY / name).read_text(encoding="utf-8"))


def at(sha: str) -> dict[str, str]:
    """The hashes of a commit.

    Raises:
        subprocess.CalledProcessError: git does not have it.
    """
    files = _git("ls-tree", "-r", "--name-only", sha, "--", CPU, COMMON).splitlines()
    return hashes(files, lambda name: _git("show", f"{sha}:{name}"))


def rows() -> list[Row]:
    """All stored rows of CPUs."""
    return [row for folder in sorted(results.FOLDER.glob("cpu-*")) for row in results.read(folder)]


def commit(row: Row) -> str:
    """The commit that a row names."""
    sha: str = row.environment["git_sha"]
    return sha


def commits(stored: Sequence[Row]) -> list[str]:
    """The commits that rows name."""
    return sorted(set(map(commit, stored)))


def load() -> dict[str, dict[str, str]]:
    """The hashes of each commit."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text())
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    """Write the file anew."""
    results.store(FILE, {sha: at(sha) for sha in commits(rows())}, DEPTH)


if __name__ == "__main__":
    main()
