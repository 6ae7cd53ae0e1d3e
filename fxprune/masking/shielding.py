"""Products whose dropped outputs learn, without a gradient that goes further back.

Where gradients go straight through the gate of a neuron that is out, they arrive at the product
that makes it. Its weights are to learn from them; what the product reads is not: nothing of it was
used. With y = op(x, w) and k of 1 and 0 over the outputs,

    dL/dw = (dy/dw)^T dL/dy,    dL/dx = (dy/dx)^T (k * dL/dy)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["SHIELDED", "shielded"]

aten = torch.ops.aten


def shielded(
    operation: Callable[..., Tensor], keep: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> Tensor:
    """A product, whose gradient by ``x`` is that of the outputs in ``keep``.

    Args:
        operation: the product, called with the arguments from ``x`` on.
        keep: 1 or 0 for each output, broadcastable to the result.
        x: what is multiplied.
        weight: by what.
        rest: a bias, if any, and options.

    Example:
        >>> x, weight = torch.ones(1, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
        >>> linear = torch.nn.functional.linear
        >>> shielded(linear, torch.tensor([1.0, 0.0]), x, weight).sum().backward()
        >>> x.grad, weight.grad
        (tensor([[1., 1., 1.]]), tensor([[1., 1., 1.],
                [1., 1., 1.]]))
    """
    bias = rest[0] if rest and isinstance(rest[0], Tensor) else None
    product: Tensor = _Shielded.apply(operation, keep, x, weight, bias, rest)  # type: ignore[no-untyped-call]
    return product


class _Shielded(torch.autograd.Function):
    """Keeps the graph of the product, and goes back through it once for each kind of input."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Callable[..., Tensor],
        keep: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        inputs = [x, weight] if bias is None else [x, weight, bias]
        own = [t.detach().requires_grad_(n) for t, n in zip(inputs, _needed(ctx), strict=False)]
        given = (*own, *rest) if bias is None else (*own, *rest[1:])
        with torch.enable_grad():
            result = operation(*given)
        ctx.own, ctx.result = own, result
        ctx.save_for_backward(keep)
        return result.detach()

    @staticmethod
    @once_differentiable  # what goes back is of no graph: a second derivative would lack it
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (keep,) = gradients, ctx.saved_tensors
        x, *learned = ctx.own
        found: list[Tensor | None] = [None, None, None]
        wanted = [i for i, t in enumerate(learned) if t.requires_grad]
        if wanted:
            inputs = [learned[i] for i in wanted]
            parts = torch.autograd.grad(ctx.result, inputs, gradient, retain_graph=True)
            for i, part in zip(wanted, parts, strict=True):
                found[1 + i] = part
        if x.requires_grad:
            masked = gradient * keep
            (found[0],) = torch.autograd.grad(ctx.result, [x], masked, retain_graph=True)
        return None, None, *found, None


def _needed(ctx: Any) -> tuple[bool, ...]:
    needed: tuple[bool, ...] = ctx.needs_input_grad[2:5]
    return needed


def _linear(whole: Tensor, numbers: Tensor, *arguments: Any) -> Tensor:
    return shielded(aten.linear.default, whole[numbers], *arguments)


def _conv1d(whole: Tensor, numbers: Tensor, *arguments: Any) -> Tensor:
    return shielded(aten.conv1d.default, whole[numbers].reshape(-1, 1), *arguments)


def _conv2d(whole: Tensor, numbers: Tensor, *arguments: Any) -> Tensor:
    return shielded(aten.conv2d.default, whole[numbers].reshape(-1, 1, 1), *arguments)


SHIELDED: Mapping[Any, Callable[..., Tensor]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _conv1d,
    aten.conv2d.default: _conv2d,
}
"""Operations in this form: ``(whole, numbers of the outputs, *arguments)``."""
