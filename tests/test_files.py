"""Files and folders that appear whole, and the places that are tried for them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from ccu_fast import files
from ccu_fast.cli.console import one_sentence
from ccu_fast.ops.noise_store.file import scratch
from tests.support.forked import in_child


def test_a_new_folder_may_be_absent_empty_or_a_link_to_either(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("later")
    real = {"new": "new", "a/b": "a/b", "empty": "empty", "link": "empty", "dangling": "later"}
    for given, place in real.items():
        assert files.new_folder(tmp_path / given) == tmp_path / place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "dangling", "empty", "link"], "nothing is left"
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o750


def test_a_new_folder_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "link").symlink_to("full")
    for given in ("full", "link", "full/mine"):
        with pytest.raises(FileExistsError, match=f"report: expected a new or empty folder, got {tmp_path / given}"):
            files.new_folder(tmp_path / given, "report")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OSError, match=r"out: expected another folder than the current one.*got \."):
        files.new_folder(Path())


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_nothing_can_be_renamed_to(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount point is."""
    (tmp_path / "mounted").mkdir()

    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match=r"out: expected a folder that another can replace, got .*mounted.*choose one in"):
        files.new_folder(tmp_path / "mounted")
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_a_lock_keeps_another_process_out_and_is_gone_after(tmp_path: Path) -> None:
    def other() -> None:
        with files.locked(tmp_path / "lock"):
            pass

    with files.locked(tmp_path / "lock"):
        assert in_child(other) != 0
        with pytest.raises(BlockingIOError, match=f"out: expected no other process at work in {tmp_path}, got one"):
            other()
    assert in_child(other) == 0 and not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    inner = files.fcntl.flock

    def late(*arguments: int) -> None:
        lock.unlink()
        inner(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(BlockingIOError), files.locked(lock):
        pass


def test_an_error_after_the_work_says_where_that_lies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_sentence("evaluate"), files.after_the_work("the figures are in a.json"):
        raise OSError(errno.EIO, "Input/output error", "page.html")
    assert capsys.readouterr().err == ("ccu-fast evaluate: page.html: Input/output error; the figures are in a.json\n")
    with pytest.raises(KeyError) as caught, files.after_the_work("a"), files.after_the_work("b"):
        raise KeyError
    assert caught.value.__notes__ == ["b", "a"]


def test_space_that_is_reserved_is_taken(tmp_path: Path) -> None:
    """A sparse file would crash the process (SIGBUS) when its mapped memory meets a full disk."""
    with (tmp_path / "mapped").open("wb") as file:
        files.reserve(file, 0)
        files.reserve(file, 1 << 20)
    assert (tmp_path / "mapped").stat().st_blocks * 512 >= 1 << 20


def test_noise_on_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        scratch(tmp_path, (3, 4), torch.int8)


def test_json_is_readable_and_can_always_be_written() -> None:
    assert files.json_text({"ü": "ß"}, indent=1) == '{\n "ü": "ß"\n}'
    for value in ("\ud83d", {"\udcff": 1}):
        assert json.loads(files.json_text(value).encode()) == value


def test_output_files(tmp_path: Path) -> None:
    assert files.output_file(tmp_path / "new" / "a.json").parent.is_dir()
    with pytest.raises(IsADirectoryError, match="report: expected a file, got the folder"):
        files.output_file(tmp_path / "new", "report")
