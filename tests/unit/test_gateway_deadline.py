"""How much of the caller's deadline the services behind get."""

from __future__ import annotations

import pytest

from gateway.service import legs_timeout_s


@pytest.mark.parametrize(
    ("remaining_s", "timeout_s"),
    [
        (None, 60.0),  # no deadline: the longest request
        (100.0, 60.0),
        (20.0, 19.9),  # so that the caller still hears why
        (1.0, 0.95),  # of a short deadline, a twentieth
        (0.0, 0.0),
    ],
)
def test_the_services_get_the_callers_deadline_less_a_margin(
    remaining_s: float | None, timeout_s: float
) -> None:
    assert legs_timeout_s(remaining_s, 60.0) == pytest.approx(timeout_s)
