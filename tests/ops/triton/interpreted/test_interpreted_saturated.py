"""The kernels where pairs are sure, by the same tests as those of a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.losses.test_saturated import (  # noqa: F401 - the same
    PLAIN,
    test_one_positive_beside_rows_of_several,
    test_sup_con,
    test_the_parts_of_unlearning,
    test_what_is_forgotten,
)
from tests.losses.test_saturated import test_info_nce as info_nce_of_sure_pairs


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize(("cosine", "scale"), [(-0.5, 30.0), (0.2, 1.0), (0.5, 100.0)])
def test_info_nce(cosine: float, scale: float, options: dict[str, Any], backend: str) -> None:
    """Pairs that are wrong, unsure and sure; the tests of a CPU have more between them."""
    info_nce_of_sure_pairs(cosine, scale, options, backend)
