"""Translations that torch's exporter lacks, of operations found in many recurrent models.

Without them the exporter retraces the whole program to decompose the operation, which takes
several times as long as all the rest of lowering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxscript
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

__all__ = ["extra_translations"]

op: Any = onnxscript.opset18  # its annotations speak of tensors; while recording it takes values


def extra_translations() -> dict[Any, Callable[..., Any]]:
    """What the exporter calls for each operation, by operation."""
    aten = torch.ops.aten
    return {
        aten.batch_norm.default: _batch_norm,
        aten.rsub.Scalar: _rsub,
        aten.square.default: _square,
        aten.to.dtype: _to_dtype,
    }


def _batch_norm(
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    mean: ir.Value | None,
    variance: ir.Value | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> Any:
    if training or mean is None or variance is None:
        raise NotImplementedError("batch norm with statistics of the batch; call eval() first")
    if weight is None:  # ones; variance may hold zeros
        weight = op.Exp(op.Sub(variance, variance))
    if bias is None:
        bias = op.Sub(mean, mean)
    return op.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)


def _rsub(x: ir.Value, other: float, alpha: float = 1) -> Any:
    return op.Sub(other, x if alpha == 1 else op.Mul(x, alpha))


def _square(x: ir.Value) -> Any:
    return op.Mul(x, x)


def _to_dtype(x: ir.Value, dtype: int, *_: object, **__: object) -> Any:
    return op.Cast(x, to=dtype)
