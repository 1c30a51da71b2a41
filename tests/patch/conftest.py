"""Drop-in patches against the real libraries.

``make test`` runs those of light libraries; ``make compat`` runs all of them, one environment per library and version,
with CCU_FAST_COMPAT_RECORD naming the file for the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ccu_fast


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    assert ccu_fast.patch.active() == {}, "a test left a patch behind"
