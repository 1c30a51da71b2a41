"""These tests run kernels on CPU tensors: tests/ops/triton/test_interpreter.py starts them where that is possible."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
