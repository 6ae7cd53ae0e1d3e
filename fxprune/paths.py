"""Paths that users give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fxprune.errors import ConfigError

__all__ = ["as_path"]


def as_path(given: Any) -> Path:
    """The path of a file that a user names.

    Raises:
        ConfigError: it is neither a text nor a path object.
    """
    if isinstance(given, str) or (
        isinstance(given, os.PathLike) and isinstance(os.fspath(given), str)
    ):
        return Path(given)
    raise ConfigError(
        f"a file is named by a text or a path object, such as 'model.onnx', not {given!r}."
    )
