"""What make would run, whatever the make that runs the tests was told."""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.support.paths import ROOT
from tests.support.presence import absent


def planned(*words: str) -> str:
    """The command lines of ``make -n``; variables of an outer make, which its recipes inherit, do not count."""
    if shutil.which("make") is None:
        absent("make", "it is not on PATH")
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.check_output(["make", "-n", *words], cwd=ROOT, text=True, env=environment)
