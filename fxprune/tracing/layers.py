"""The forward of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` while tracing.

It computes what torch's forward computes, written with one operation of
:mod:`fxprune.tracing.recurrent` per layer and direction, on padded instead of packed sequences.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from fxprune.errors import TraceError
from fxprune.tracing import recurrent
from fxprune.tracing.packing import TracedSequence, traced_packing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["guarded_layers", "run_stack", "traced_layers"]

_State = tuple[Tensor, ...]

_ONE_AT_A_TIME = threading.RLock()
"""Held while torch's classes are other than they were, lest two threads put back each other's."""


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer and direction; absent ones are None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


@contextmanager
def traced_layers() -> Iterator[None]:
    """While active, this thread's recurrent modules and packing trace into fxprune's operations."""
    thread = threading.get_ident()

    def traced(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def chosen(module: nn.RNNBase, input: Any, hx: Any = None) -> Any:
            # Sequences that were packed before hold tensors of their own, and other threads'.
            real = isinstance(input, PackedSequence) and not isinstance(input, TracedSequence)
            ours = threading.get_ident() == thread and not real
            return (_traced_forward if ours else forward)(module, input, hx)

        return chosen

    with _ONE_AT_A_TIME, traced_packing(), _forwards(traced), _parameters_as_weights():
        yield


@contextmanager
def guarded_layers() -> Iterator[None]:
    """While active, packed layers check their initial states, which torch 2.13 reads unchecked.

    Trying a user's own model at other sizes must not end the process.
    """
    with _ONE_AT_A_TIME, _forwards(_guarded):
        yield


@contextmanager
def _forwards(wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in (nn.LSTM, nn.GRU, nn.RNN):
            stack.callback(setattr, layer, "forward", layer.forward)
            layer.forward = wrapped(layer.forward)  # type: ignore[method-assign]
        yield


@contextmanager
def _parameters_as_weights() -> Iterator[None]:
    """While active, a recurrent module's list of weights holds its present parameters.

    ``torch.export`` puts others in their places and would take those of the list for constants.
    """

    def read(module: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(module, name, None) for name in module._flat_weights_names]

    def write(module: nn.RNNBase, weights: list[Tensor | None]) -> None:
        module.__dict__["_flat_weights"] = weights

    base: Any = nn.RNNBase
    base._flat_weights = property(read, write)
    try:
        yield
    finally:
        del base._flat_weights


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def checked(module: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence) and hx is not None:
            _check_states(module, int(input.batch_sizes[0]), hx if _is_lstm(module) else (hx,))
        return forward(module, input, hx)

    return checked


def run_stack(
    kind: str,
    x: Tensor,
    states: tuple[Tensor | None, ...],
    weights: list[LayerWeights],
    *,
    bidirectional: bool,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, list[_State]]:
    """Runs all layers and directions of a recurrent module.

    Args:
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x: [time, batch, features].
        states: initial states, each [layers * directions, batch, size] or None.
        weights: one entry per layer and direction, directions innermost.
        bidirectional: whether every second entry runs in reverse.
        dropout: probability between layers.
        training: whether dropout is active.
        lengths: valid steps, [batch], or None.

    Returns:
        The outputs of the last layer and the final states of every layer and direction.
    """
    directions = 2 if bidirectional else 1
    finals: list[_State] = []
    for first in range(0, len(weights), directions):
        if first and dropout:
            x = functional.dropout(x, dropout, training)
        outputs = []
        for index in range(first, first + directions):
            initial = tuple(None if s is None else s[index] for s in states)
            y, *final = _run_layer(kind, x, initial, weights[index], lengths, index > first)
            outputs.append(y)
            finals.append(tuple(final))
        x = torch.cat(outputs, 2) if bidirectional else outputs[0]
    return x, finals


def _run_layer(
    kind: str,
    x: Tensor,
    initial: tuple[Tensor | None, ...],
    w: LayerWeights,
    lengths: Tensor | None,
    reverse: bool,
) -> _State:
    if kind == "lstm":
        h_0, c_0 = initial
        return recurrent.lstm(x, h_0, c_0, w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr, lengths, reverse)
    (h_0,) = initial
    if kind == "gru":
        return recurrent.gru(x, h_0, w.w_ih, w.w_hh, w.b_ih, w.b_hh, lengths, reverse)
    nonlinearity = kind.removeprefix("rnn_")
    return recurrent.rnn(x, h_0, w.w_ih, w.w_hh, w.b_ih, w.b_hh, lengths, reverse, nonlinearity)


def _traced_forward(module: nn.RNNBase, input: Any, hx: Any = None) -> Any:
    """Replaces ``forward`` of the recurrent modules; ``self`` is theirs."""
    packed = isinstance(input, TracedSequence)
    lengths = input.content.lengths if packed else None
    x = cast("Tensor", input.content.padded if packed else input)
    if x.dim() not in (2, 3):
        raise TraceError(
            f"{type(module).__name__} got an input of {x.dim()} dimensions; it takes "
            "[time, features] or [time, batch, features] (batch first if batch_first=True)."
        )
    unbatched = x.dim() == 2
    if unbatched:
        x = x.unsqueeze(1)
    elif module.batch_first and not packed:
        x = x.transpose(0, 1)
    y, finals = run_stack(
        _kind(module),
        x,
        _initial_states(module, x, hx, unbatched),
        _weights(module),
        bidirectional=module.bidirectional,
        dropout=float(module.dropout),
        training=module.training,
        lengths=lengths,
    )
    stacked = tuple(torch.stack(states) for states in zip(*finals, strict=True))
    if unbatched:
        y, stacked = y.squeeze(1), tuple(s.squeeze(1) for s in stacked)
    elif module.batch_first and not packed:
        y = y.transpose(0, 1)
    result = TracedSequence.of(y, cast("Tensor", lengths)) if packed else y
    return result, (stacked if len(stacked) > 1 else stacked[0])


def _kind(module: nn.RNNBase) -> str:
    return {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}.get(module.mode, module.mode.lower())


def _initial_states(
    module: nn.RNNBase, x: Tensor, hx: Any, unbatched: bool
) -> tuple[Tensor | None, ...]:
    if hx is None:
        return (None, None) if _is_lstm(module) else (None,)
    states = tuple(hx) if _is_lstm(module) else (hx,)
    if unbatched and states[0].dim() == 2:
        states = tuple(s.unsqueeze(1) for s in states)
    _check_states(module, x.shape[1], states)
    return states


def _check_states(module: nn.RNNBase, batch: int, states: tuple[Tensor, ...]) -> None:
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    for name, state, size in zip(("h_0", "c_0"), states, sizes, strict=False):
        shape = tuple(state.shape)
        if len(shape) != 3 or shape[0] != count or shape[2] != size or shape[1] != batch:
            raise TraceError(
                f"{type(module).__name__}: {name} has shape {shape}; expected "
                f"[{count}, batch, {size}] with the batch of the input."
            )


def _is_lstm(module: nn.RNNBase) -> bool:
    return module.mode == "LSTM"


def _weights(module: nn.RNNBase) -> list[LayerWeights]:
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

    def tensors(layer: int, suffix: str) -> tuple[Any, ...]:
        return tuple(getattr(module, f"{name}_l{layer}{suffix}", None) for name in names)

    return [
        LayerWeights(*tensors(layer, suffix))
        for layer in range(module.num_layers)
        for suffix in suffixes
    ]
