"""Opening ONNX files in onnxruntime: on the CPU, and quietly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxprune.errors import ConfigError

__all__ = ["open_session", "start_session"]


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
        first = str(error).partition("\n")[0]
        raise ConfigError(f"onnxruntime cannot load {path}: {first}. Name an ONNX file.") from error


def start_session(path: Path, threads: int = 1) -> Any:
    """A session of a file; raises what onnxruntime raises."""
    import onnxruntime  # takes a while, and not everybody who measures opens a file

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # everything that matters raises
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
