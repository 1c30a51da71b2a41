"""``python tests/support/threads_left.py …``: the command ``ccu-fast …``, and which threads of torch it leaves."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from ccu_fast.cli.main import main


def of_gloo() -> list[str]:
    """Names of this process's threads that belong to a process group."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    status = main(sys.argv[1:])
    print(f"threads left: {of_gloo()}")
    raise SystemExit(status)
