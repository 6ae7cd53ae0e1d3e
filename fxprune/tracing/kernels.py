"""Torch's own recurrent operations while tracing: one of fxprune's per layer and direction.

A model that calls ``torch.lstm`` and the like itself has them, and so have archives of others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fxprune.errors import TraceError
from fxprune.tracing.layers import LayerWeights, run_stack
from fxprune.tracing.recurrent import traces_markers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["TracedKernels", "calls_kernel"]

aten = torch.ops.aten

_KERNELS: dict[Any, str] = {
    kernel: kind
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for packet in [getattr(aten, kind)]
    for kernel in (getattr(torch, kind), packet, packet.input, packet.data)
}


def calls_kernel(node: fx.Node) -> bool:
    """Whether a node calls one of torch's recurrent operations."""
    return node.op == "call_function" and node.target in _KERNELS


class TracedKernels(TorchFunctionMode):
    """While active, torch's recurrent operations trace into fxprune's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kind = _KERNELS.get(func)
        if kind is None or not traces_markers():
            return func(*args, **(kwargs or {}))
        if _is_packed(kind, args, kwargs or {}):
            raise TraceError(
                f"torch.{kind} is called on the inside of a packed sequence, whose layout depends "
                f"on the lengths. Give the packed sequence to a module of torch.nn, or the padded "
                "tensor to the operation."
            )
        return _run(kind, *args, **(kwargs or {}))


def _is_packed(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the sizes of the batches come second, which then are a tensor, as ``hx`` may be."""
    if "batch_sizes" in kwargs:
        return True
    if kind == "lstm":
        return len(args) > 1 and isinstance(args[1], Tensor)
    return len(args) > 2 and isinstance(args[2], Tensor)


def _run(
    kind: str,
    input: Tensor,
    hx: Any,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Takes and returns what torch's operation does; the states are stacked, [layers, ...]."""
    states = tuple(hx) if kind == "lstm" else (hx,)
    projected = kind == "lstm" and states[0].shape[2] != states[1].shape[2]
    count = 2 + 2 * has_biases + projected
    y, finals = run_stack(
        kind,
        input.transpose(0, 1) if batch_first else input,
        states,
        [
            _layer(params[i : i + count], has_biases, projected)
            for i in range(0, len(params), count)
        ],
        bidirectional=bidirectional,
        dropout=dropout,
        training=train,
    )
    stacked = (torch.stack(s) for s in zip(*finals, strict=True))
    return (y.transpose(0, 1) if batch_first else y), *stacked


def _layer(tensors: list[Tensor], biases: bool, projected: bool) -> LayerWeights:
    w_ih, w_hh, *rest = tensors
    b_ih, b_hh = rest[:2] if biases else (None, None)
    return LayerWeights(w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None)
