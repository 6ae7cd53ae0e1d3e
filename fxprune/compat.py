"""The torch releases fxprune works with: it uses parts that torch does not promise to keep."""

from __future__ import annotations

import re

__all__ = ["SUPPORTED", "check_torch"]

SUPPORTED = ((2, 13), (2, 14))
"""The first supported release and the first one that is not, as (major, minor)."""


def check_torch(version: str) -> None:
    """Refuses a torch release outside the supported range.

    Args:
        version: as in ``torch.__version__``.

    Raises:
        ImportError: with what to install instead.

    Example:
        >>> check_torch("2.13.0+cpu")
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    low, high = SUPPORTED
    if not low <= release < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise ImportError(
            f"fxprune works with torch {wanted}, and this is {version}. "
            f"Install one of those: pip install 'torch{wanted}'"
        )
