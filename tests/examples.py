"""How many examples property tests try: few and always the same ones, or in a long run many, at random."""

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

LONG = 100
"""How many times as many a long run tries. `test_properties.py` then trains thousands of times, for about an hour."""


def examples(few: int, **changes: Any) -> settings:
    """Settings of a property: `few` examples, or `LONG` times as many where HYPOTHESIS_PROFILE is long."""
    is_long = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    return settings(
        **{
            "deadline": None,  # the machine may be busy
            "derandomize": not is_long,
            "max_examples": few * LONG if is_long else few,
            "suppress_health_check": [HealthCheck.too_slow],
            "print_blob": is_long,
            # runs are small enough to read, and to shrink them takes minutes
            **({} if is_long else {"phases": [Phase.explicit, Phase.generate]}),
            **changes,
        }
    )
