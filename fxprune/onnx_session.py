"""ONNX files in onnxruntime: opened on the CPU, quietly, and run on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import ConfigError, first_line

__all__ = ["open_session", "run_session", "start_session"]


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


def start_session(path: Path, threads: int = 1) -> Any:
    """A session of a file; raises what onnxruntime raises."""
    import onnxruntime  # takes a while, and not everybody who measures opens a file

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # everything that matters raises
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Runs a session on tensors, or whole numbers; raises what onnxruntime raises.

    Args:
        session: of :func:`open_session` or :func:`start_session`.
        inputs: by name. Floating ones are converted where the file takes float32: it may hold
            that where its program computes in float64 or 16 bits.
    """
    types = {given.name: given.type for given in session.get_inputs()}
    feed = {name: _array(value, types[name]) for name, value in inputs.items()}
    return [torch.as_tensor(np.asarray(result)) for result in session.run(None, feed)]


def _array(value: Any, declared: str) -> Any:
    tensor = torch.as_tensor(value).detach().cpu()
    if declared == "tensor(float)" and tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.contiguous().numpy()
