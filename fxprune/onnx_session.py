"""Opening ONNX files in onnxruntime: on the CPU, and quietly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxprune.errors import ConfigError

__all__ = ["first_line", "open_session", "start_session"]


def open_session(path: Path, threads: int = 1) -> Any:
    """A session of a file that a user names.

    Args:
        path: the file.
        threads: within an operation; operations run one after another.

    Raises:
        ConfigError: there is no such file, or onnxruntime does not load it.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; name an ONNX file.")
    try:
        return start_session(path, threads)
    except Exception as error:
        raise ConfigError(
            f"onnxruntime cannot load {path}: {first_line(error)}. Name an ONNX file."
        ) from error


def first_line(error: Exception) -> str:
    """What onnxruntime says, without what follows; the kind of error if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def start_session(path: Path, threads: int = 1) -> Any:
    """A session of a file; raises what onnxruntime raises."""
    import onnxruntime  # takes a while, and not everybody who measures opens a file

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # everything that matters raises
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
