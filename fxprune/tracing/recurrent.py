"""The recurrent operations of a program: one per layer and direction.

Each of :func:`lstm`, :func:`gru` and :func:`rnn` runs one layer in one direction over a time-major
sequence. They are ordinary differentiable functions over torch's own kernels, so that a program
trains at native speed on CPU and CUDA. While ``torch.export`` traces them they stay one opaque
node each, the *marker* operations ``fxprune::lstm``, ``fxprune::gru`` and ``fxprune::rnn``:
unlike torch's operations, a marker keeps batch and time dynamic, takes the lengths of padded
sequences, and gives every layer and direction a size of its own.

Shapes: ``x`` [time, batch, inputs]; ``h_0`` [batch, outputs]; ``c_0`` [batch, hidden];
``w_ih`` [gates * hidden, inputs]; ``w_hh`` [gates * hidden, outputs]; ``w_hr`` [outputs, hidden];
biases [gates * hidden]; ``lengths`` [batch]. ``outputs`` is ``hidden`` unless an LSTM projects.
Gates stand in PyTorch's order: i, f, g, o and r, z, n. An absent initial state means zeros.
Steps at or beyond a sequence's length yield zeros and leave its state as it was; a reverse layer
starts at the last valid step.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.tracing.recurrent_kernels import check_inputs, run_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["GATES", "gru", "lstm", "rnn", "stock_operations", "traces_markers"]

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
"""Number of gate blocks stacked in the weights of each recurrent operation."""

_STOCK: ContextVar[bool] = ContextVar("fxprune_stock_operations", default=False)


@contextmanager
def stock_operations() -> Iterator[None]:
    """While active, ``torch.export`` sees torch's own recurrent operations, not the markers."""
    token = _STOCK.set(True)
    try:
        yield
    finally:
        _STOCK.reset(token)


def lstm(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one LSTM layer in one direction.

    Args:
        x: the sequence, [time, batch, inputs].
        h_0: initial output, [batch, outputs]; zeros if None.
        c_0: initial cell state, [batch, hidden]; zeros if None.
        w_ih: input weight, [4 * hidden, inputs].
        w_hh: recurrent weight, [4 * hidden, outputs].
        b_ih: input bias, [4 * hidden].
        b_hh: recurrent bias, [4 * hidden].
        w_hr: projection, [outputs, hidden].
        lengths: valid steps of each sequence, [batch]; all if None.
        reverse: run from the last valid step to the first.

    Returns:
        The outputs [time, batch, outputs], the final output and the final cell state.

    Raises:
        InputError: a tensor does not fit the weights, or a length is not in 1..time.

    Example:
        >>> y, h, c = lstm(torch.zeros(5, 2, 3), None, None, torch.ones(8, 3), torch.ones(8, 2))
        >>> y.shape, c.shape
        (torch.Size([5, 2, 2]), torch.Size([2, 2]))
    """
    if traces_markers():
        return cast(
            "tuple[Tensor, Tensor, Tensor]",
            torch.ops.fxprune.lstm(x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reverse),
        )
    outputs, hidden = w_hh.shape[1], w_hh.shape[0] // 4
    check_inputs("LSTM", x, w_ih, lengths, {"h_0": (h_0, outputs), "c_0": (c_0, hidden)})
    h_0 = _initial(x, h_0, outputs)
    c_0 = _initial(x, c_0, hidden)
    if w_hr is not None and outputs == hidden:
        return _square_projection(x, h_0, c_0, (w_ih, w_hh, b_ih, b_hh), w_hr, lengths, reverse)
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    y, (h_n, c_n) = run_layer(
        torch.lstm, x, (h_0, c_0), weights, b_ih is not None, lengths, reverse
    )
    return y, h_n, c_n


def _square_projection(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    w_hr: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a unit that stays zero: torch takes equal sizes of both states for no projection."""

    def with_unit(w: Tensor | None) -> Tensor | None:
        if w is None:
            return None
        gates = w.reshape(4, -1, *w.shape[1:])  # [4, hidden, ...]
        return torch.cat([gates, gates.new_zeros(4, 1, *w.shape[1:])], 1).flatten(0, 1)

    w_ih, w_hh, b_ih, b_hh = (with_unit(w) for w in weights)
    assert w_ih is not None and w_hh is not None
    wider = functional.pad(w_hr, (0, 1))
    c_0 = functional.pad(c_0, (0, 1))
    y, h_n, c_n = lstm(x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, wider, lengths, reverse)
    return y, h_n, c_n[:, :-1]


def gru(
    x: Tensor,
    h_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs one GRU layer in one direction: outputs and final state; arguments as :func:`lstm`."""
    if traces_markers():
        return cast(
            "tuple[Tensor, Tensor]",
            torch.ops.fxprune.gru(x, h_0, w_ih, w_hh, b_ih, b_hh, lengths, reverse),
        )
    return _single_state(torch.gru, "GRU", x, h_0, (w_ih, w_hh, b_ih, b_hh), lengths, reverse)


def rnn(
    x: Tensor,
    h_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Runs one Elman layer (tanh or relu) in one direction; arguments as :func:`lstm`."""
    if traces_markers():
        return cast(
            "tuple[Tensor, Tensor]",
            torch.ops.fxprune.rnn(x, h_0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, nonlinearity),
        )
    kernel = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[nonlinearity]
    return _single_state(kernel, "RNN", x, h_0, (w_ih, w_hh, b_ih, b_hh), lengths, reverse)


def _single_state(
    kernel: Callable[..., Any],
    name: str,
    x: Tensor,
    h_0: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, _ = weights
    hidden = w_hh.shape[1]
    check_inputs(name, x, w_ih, lengths, {"h_0": (h_0, hidden)})
    h_0 = _initial(x, h_0, hidden)
    given = [w for w in weights if w is not None]
    y, (h_n,) = run_layer(kernel, x, (h_0,), given, b_ih is not None, lengths, reverse)
    return y, h_n


def traces_markers() -> bool:
    """Whether ``torch.export`` is tracing, and wants fxprune's operations kept whole."""
    return torch.compiler.is_exporting() and not _STOCK.get()


def _initial(x: Tensor, state: Tensor | None, size: int) -> Tensor:
    return x.new_zeros(x.shape[1], size) if state is None else state


# The markers. Their kernels serve archives that are run outside fxprune; inside, programs call
# the functions above.


@torch.library.custom_op("fxprune::lstm", mutates_args=())
def _lstm_marker(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h_n, c_n = lstm(x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reverse)
    return y.contiguous(), h_n.clone(), c_n.clone()


@_lstm_marker.register_fake
def _(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, hidden = w_hh.shape[1], w_hh.shape[0] // 4
    time, batch = _fake_sizes(x, w_ih, lengths, {"h_0": (h_0, outputs), "c_0": (c_0, hidden)})
    return (
        x.new_empty(time, batch, outputs),
        x.new_empty(batch, outputs),
        x.new_empty(batch, hidden),
    )


@torch.library.custom_op("fxprune::gru", mutates_args=())
def _gru_marker(
    x: Tensor,
    h_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    y, h_n = gru(x, h_0, w_ih, w_hh, b_ih, b_hh, lengths, reverse)
    return y.contiguous(), h_n.clone()


@torch.library.custom_op("fxprune::rnn", mutates_args=())
def _rnn_marker(
    x: Tensor,
    h_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    y, h_n = rnn(x, h_0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, nonlinearity)
    return y.contiguous(), h_n.clone()


def _fake_single_state(
    x: Tensor,
    h_0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    hidden = w_hh.shape[1]
    time, batch = _fake_sizes(x, w_ih, lengths, {"h_0": (h_0, hidden)})
    return x.new_empty(time, batch, hidden), x.new_empty(batch, hidden)


def _fake_sizes(
    x: Tensor,
    w_ih: Tensor,
    lengths: Tensor | None,
    states: dict[str, tuple[Tensor | None, int]],
) -> tuple[int, int]:
    """Ties symbolic sizes to each other, and features to the weights: only then are they one."""
    time, batch, features = x.shape
    torch._check(features == w_ih.shape[1], lambda: f"expected {w_ih.shape[1]} features a step")
    for state, size in states.values():
        if state is not None:
            torch._check(state.shape[0] == batch, lambda: "a state needs the batch of the input")
            torch._check(state.shape[1] == size, lambda size=size: f"a state needs {size} entries")
    if lengths is not None:
        torch._check(lengths.shape[0] == batch, lambda: "lengths need the batch of the input")
    return time, batch


_gru_marker.register_fake(_fake_single_state)
_rnn_marker.register_fake(_fake_single_state)
