"""visit.tgz: the results of a visit in one file of bounded size; and which of them go into the repository."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row

NAME = "visit.tgz"
LIMIT = 15 << 20  # bytes of the archive
HEAD, TAIL = 40 << 10, 160 << 10  # bytes of a log that are kept
LEFT_OUT = "left_out.txt"

_ROWS = re.compile(r"results/([A-Za-z0-9-]+)/([a-z0-9_]+)\.json")
_NOTES = re.compile(r"(?:tune/)?((?:summary|tune|memory)\.(?:json|md)|aims\.md)|logs/(info|tests|commands\.\d+)\.log")


def pack(work: Path, target: Path, limit: int = LIMIT) -> None:
    """Write ``target`` in one step from all files below ``work``, results first, logs trimmed.

    What does not fit, the largest logs first, is named in left_out.txt.
    """
    names = sorted(
        (p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file()), key=lambda n: _rank(work, n)
    )
    kept: dict[str, bytes] = {}
    left_out: list[str] = []
    room = limit - (64 << 10)  # headers, and the list of what is left out
    for name in names:
        data = _content(work / name)
        packed = len(zlib.compress(data, 6)) + 1024
        if packed <= room:
            kept[name] = data
            room -= packed
        else:
            left_out.append(f"{name}: {packed} bytes packed")
    if left_out:
        kept[LEFT_OUT] = ("\n".join(left_out) + "\n").encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for name, data in kept.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = int((work / name).stat().st_mtime) if (work / name).exists() else 0
            tar.addfile(member, io.BytesIO(data))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, target)


def _rank(work: Path, name: str) -> tuple[int, int, str]:
    of_log = name.endswith(".log")
    return (0 if "/" not in name else 2 if of_log else 1, (work / name).stat().st_size if of_log else 0, name)


def _content(path: Path) -> bytes:
    if path.suffix != ".log" or path.stat().st_size <= HEAD + TAIL:
        return path.read_bytes()
    with path.open("rb") as file:
        head = file.read(HEAD)
        file.seek(-TAIL, os.SEEK_END)
        tail = file.read()
    return head + f"\n… {path.stat().st_size - HEAD - TAIL} bytes left out …\n".encode() + tail


def unpack(archive: Path, benchmarks: Path) -> list[Path]:
    """Put an archive's rows under ``benchmarks``/results and its tables under ``benchmarks``/visits.

    New rows of a shape replace its old ones, as if they had been measured here. Nothing else from the archive is
    written, whatever it holds.

    Returns:
        The files that were written.

    Raises:
        ValueError: there are no rows in it.
    """
    with tarfile.open(archive, "r:gz") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]
    folders: dict[str, list[Row]] = {}
    for name, data in members.items():
        found = _ROWS.fullmatch(name)
        if found:
            folders.setdefault(found[1], []).extend(Row(**row) for row in json.loads(data))
    if not folders:
        raise ValueError(f"archive: expected results/<device>/<operation>.json in {archive}, got none")
    written: list[Path] = []
    for device, rows in folders.items():
        results.write(benchmarks / "results" / device, rows)
        written += [benchmarks / "results" / device / f"{op}.json" for op in dict.fromkeys(row.op for row in rows)]
    # A visit is to one device.
    notes = benchmarks / "visits" / next(iter(folders))
    for name, data in members.items():
        found = _NOTES.fullmatch(name)
        if found:
            path = notes / (found[1] or f"{found[2]}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written.append(path)
    return written
