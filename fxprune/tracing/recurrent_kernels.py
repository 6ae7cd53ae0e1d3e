"""How one recurrent layer runs in one direction on torch's kernels, and what they are not given.

Shapes and names are those of :mod:`fxprune.tracing.recurrent`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_inputs", "run_layer"]


def check_inputs(
    name: str,
    x: Tensor,
    w_ih: Tensor,
    lengths: Tensor | None,
    states: dict[str, tuple[Tensor | None, int]],
) -> None:
    """Refuses what torch's kernels would read out of bounds or silently misread."""
    if torch.compiler.is_exporting():
        return
    if x.dim() != 3 or x.shape[2] != w_ih.shape[1]:
        raise InputError(
            f"{name}: the sequence has shape {tuple(x.shape)}; expected [time, batch, "
            f"{w_ih.shape[1]}]. Give it {w_ih.shape[1]} features per step."
        )
    if 0 in x.shape[:2]:
        raise InputError(f"{name}: the sequence is empty, {tuple(x.shape)}; give it a step.")
    for label, (state, size) in states.items():
        if state is not None and tuple(state.shape) != (x.shape[1], size):
            raise InputError(
                f"{name}: {label} has shape {tuple(state.shape)}; expected "
                f"[{x.shape[1]}, {size}], a row for each sequence of the batch."
            )
    if lengths is not None:
        _check_lengths(name, x, lengths)


def _check_lengths(name: str, x: Tensor, lengths: Tensor) -> None:
    time, batch = x.shape[:2]
    if tuple(lengths.shape) != (batch,):
        raise InputError(
            f"{name}: lengths has shape {tuple(lengths.shape)}; expected [{batch}], one length "
            "for each sequence of the batch."
        )
    if int(lengths.min()) < 1 or int(lengths.max()) > time:
        raise InputError(
            f"{name}: lengths {lengths.tolist()} must lie between 1 and the {time} steps given; "
            "drop empty sequences and clip the others."
        )


def run_layer(
    kernel: Callable[..., Any],
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    biases: bool,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs a kernel of torch over a time-major sequence; returns the outputs and final states.

    Args:
        kernel: torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu.
        x: the sequence, [time, batch, inputs].
        states: initial ones, [batch, size] each.
        weights: in the kernel's order, with biases if ``biases``.
        biases: whether the layer has some.
        lengths: valid steps of each sequence, [batch]; all if None.
        reverse: run from the last valid step to the first.
    """
    # cuDNN saves what backward needs only in training mode; without dropout nothing else differs.
    train = torch.is_grad_enabled()
    if lengths is not None:
        return _run_padded(kernel, x, states, weights, biases, lengths, reverse, train)
    hx = [s.unsqueeze(0) for s in states]
    sequence = x.flip(0) if reverse else x
    y, *finals = kernel(
        sequence, hx if len(hx) > 1 else hx[0], weights, biases, 1, 0.0, train, False, False
    )
    return (y.flip(0) if reverse else y), tuple(f.squeeze(0) for f in finals)


def _run_padded(
    kernel: Callable[..., Any],
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    biases: bool,
    lengths: Tensor,
    reverse: bool,
    train: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if reverse:
        x = _reversed(x, lengths)
    # The packed kernels want the longest sequence first and the lengths on the CPU.
    order = torch.argsort(lengths, descending=True, stable=True).to(x.device)
    back = torch.argsort(order)
    ordered = lengths.to(device="cpu", dtype=torch.int64)[order.cpu()]
    data, sizes = torch._VF._pack_padded_sequence(x[:, order], ordered, False)
    hx = [s[order].unsqueeze(0) for s in states]
    packed, *finals = kernel(
        data, sizes, hx if len(hx) > 1 else hx[0], weights, biases, 1, 0.0, train, False
    )
    y, _ = torch._VF._pad_packed_sequence(packed, sizes, False, 0.0, x.shape[0])
    y = y[:, back]
    if reverse:
        y = _reversed(y, lengths)
    return y, tuple(f.squeeze(0)[back] for f in finals)


def _reversed(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverses the valid steps of each sequence, [time, batch, features]; the rest stays."""
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    valid = lengths.to(x.device).unsqueeze(0)
    index = torch.where(steps < valid, valid - 1 - steps, steps)  # [time, batch]
    return x.gather(0, index.unsqueeze(2).expand_as(x))
