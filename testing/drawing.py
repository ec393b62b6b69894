"""How many cases hypothesis draws: few in the fast tests, many in the slow ones; the few are the many's first."""

import pytest

FEW_AND_MANY = pytest.mark.parametrize(
    "many", [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.slow)]
)
