"""Whether stored rows are of today's kernels."""

from __future__ import annotations

import fnmatch
import subprocess
from dataclasses import replace

import pytest

from benchmarks import measured_code, performance, results
from benchmarks.environment import REPOSITORY
from benchmarks.ops import OPS
from tests.support.paths import ROOT

COMMITS = measured_code.commits(measured_code.rows())


def test_every_commit_with_rows_is_known() -> None:
    assert sorted(measured_code.load()) == COMMITS, "run python -m benchmarks.measured_code"
    assert all(found.keys() == measured_code.KERNELS.keys() for found in measured_code.load().values())


@pytest.mark.parametrize("commit", COMMITS)
def test_the_hashes_are_those_of_the_history(commit: str) -> None:
    known = subprocess.run(["git", "-C", str(REPOSITORY), "cat-file", "-e", commit], capture_output=True, check=False)
    if known.returncode:
        pytest.skip("git or the history is not here: a source distribution or a shallow clone")
    assert measured_code.at(commit) == measured_code.load()[commit]


def test_every_pattern_names_files_and_every_kernel_s_file_belongs_to_one() -> None:
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").iterdir()]
    files += [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "common").iterdir()]
    patterns = [pattern for of_kind in measured_code.KERNELS.values() for pattern in of_kind]
    assert [pattern for pattern in patterns if not fnmatch.filter(files, pattern)] == []
    shared = {"csrc/cpu/simd.h", "csrc/cpu/parallel.h", "csrc/cpu/dispatch.cpp", "csrc/common/half.h"}
    not_timed = {"csrc/cpu/l2_normalize.cpp", "csrc/common/topk_row.h"}
    left = {name for name in files if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    assert left == shared | not_timed


def test_operations_run_the_kernels_of_their_name() -> None:
    kinds = {op: measured_code.kernels_of(op) for op in OPS}
    assert {kinds[op] for op in ("clip_loss", "sup_con_keys", "ccu_objective", "sigmoid_loss")} == {"losses"}
    assert kinds["topk_flips_minilm"] == kinds["topk_flips"] == "topk_flips"
    assert kinds["noise_update"] == "noise_update"
    assert set(kinds.values()) == set(measured_code.KERNELS)


def test_a_comment_changes_nothing_and_code_does() -> None:
    code = {"csrc/cpu/pgd_step.cpp": "int a = 1;  // one\n", "csrc/cpu/candidates.cpp": "/* of\nb */ int b;"}
    same = {"csrc/cpu/pgd_step.cpp": "// first\nint a =\n    1;", "csrc/cpu/candidates.cpp": "int b; // b\n"}
    other = {**code, "csrc/cpu/pgd_step.cpp": "int a = 2;"}
    before = measured_code.hashes(code, code.__getitem__)
    assert measured_code.hashes(same, same.__getitem__) == before
    after = measured_code.hashes(other, other.__getitem__)
    assert [kind for kind in before if before[kind] != after[kind]] == ["pgd_step"]


def test_the_page_tells_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = measured_code.here()
    monkeypatch.setattr(measured_code, "load", lambda: dict.fromkeys(COMMITS, now))
    assert performance._code(performance.Stored()).count("| – |") == len(COMMITS)
    monkeypatch.setattr(measured_code, "here", lambda: {**now, "losses": "other"})
    rows = [line for line in performance._code(performance.Stored()).splitlines() if "0.1.0" in line]
    assert len(rows) == len(COMMITS) and all(line.endswith("| losses |") for line in rows)


def test_commits_that_alternate_in_a_folder_have_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {folder: results.read(folder) for folder in results.FOLDER.glob("cpu-*")}
    for rows in folders.values():
        for i, row in enumerate(rows):
            rows[i] = replace(row, environment={**row.environment, "git_sha": COMMITS[i % 2]})
    stored = performance.Stored()
    monkeypatch.setattr(results, "read", folders.__getitem__)
    lines = [line for line in performance._code(stored).splitlines() if "0.1.0" in line]
    assert len(lines) == sum(min(2, len(rows)) for rows in folders.values())
