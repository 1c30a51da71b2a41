"""The kernels where pairs are sure, by the same tests as those of a CPU."""

from __future__ import annotations

import pytest

from tests.losses.test_saturated import (  # noqa: F401 - the same
    test_info_nce,
    test_one_positive_beside_rows_of_several,
    test_sup_con,
    test_the_parts_of_unlearning,
    test_what_is_forgotten,
)


@pytest.fixture
def backend() -> str:
    return "triton"
