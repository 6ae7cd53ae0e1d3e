"""Packed sequences while tracing: padded tensors that carry their lengths.

A packed sequence has a data-dependent layout that neither ``torch.export`` nor ONNX can follow.
While a model is traced, packing therefore keeps the padded tensor and notes the lengths,
recurrent layers hand the lengths to their markers, and unpacking cuts and fills. The replacement
lives in the code objects of torch's own functions, so that it is found through every alias a user
may hold (``from torch.nn.utils.rnn import pack_padded_sequence as pack``).
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import rnn as torch_packing

from fxprune.errors import InputError, TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TracedSequence", "pad_packed", "traced_packing"]


@dataclass(frozen=True)
class TracedContent:
    """What a packed sequence stands for while tracing."""

    padded: Tensor  # [time, batch, features]
    lengths: Tensor  # [batch], int64


class TracedSequence(torch_packing.PackedSequence):
    """A packed sequence during tracing; recurrent layers and unpacking know it, nothing else."""

    content: TracedContent

    @classmethod
    def of(cls, padded: Tensor, lengths: Tensor) -> TracedSequence:
        """Wraps a time-major padded tensor and its lengths."""
        # The tuple fields exist only because the base is a named tuple; the properties hide them.
        self = tuple.__new__(cls, (None, None, None, None))
        self.content = TracedContent(padded, lengths)
        return self

    def _refuse(self) -> NoReturn:
        raise TraceError(
            "the model reads the inside of a packed sequence (.data, .batch_sizes, or an index), "
            "whose layout depends on the lengths. Unpack it with pad_packed_sequence, work on the "
            "padded tensor, and pack it again."
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    def __iter__(self) -> NoReturn:
        self._refuse()

    def to(self, *args: Any, **kwargs: Any) -> TracedSequence:
        """Moves the padded tensor; lengths stay where they are."""
        return TracedSequence.of(self.content.padded.to(*args, **kwargs), self.content.lengths)

    data = property(_refuse)
    batch_sizes = property(_refuse)
    sorted_indices = property(_refuse)
    unsorted_indices = property(_refuse)


def pad_packed(
    x: Tensor, lengths: Tensor, total_length: int | None = None, padding_value: float = 0.0
) -> Tensor:
    """Cuts a padded sequence to its longest and fills what lies beyond each length.

    Args:
        x: [time, batch, features].
        lengths: valid steps of each sequence, [batch].
        total_length: steps to return; the longest length if None.
        padding_value: value beyond each length.

    Returns:
        [total_length or max(lengths), batch, features].

    Raises:
        InputError: ``total_length`` is shorter than the longest sequence.

    Example:
        >>> pad_packed(torch.ones(3, 2, 1), torch.tensor([1, 2]))[:, 0, 0]
        tensor([1., 0.])
    """
    if torch.compiler.is_exporting():
        result: Tensor = torch.ops.fxprune.pad_packed(x, lengths, total_length, padding_value)
        return result
    longest = int(lengths.max())
    if total_length is not None and total_length < longest:
        raise InputError(
            f"total_length={total_length} is shorter than the longest sequence, {longest} steps; "
            "raise total_length or clip the lengths."
        )
    steps = longest if total_length is None else total_length
    x = x[:steps]
    if steps > x.shape[0]:
        x = torch.cat([x, x.new_zeros(steps - x.shape[0], *x.shape[1:])])
    beyond = torch.arange(steps, device=x.device).unsqueeze(1) >= lengths.to(x.device)
    return x.masked_fill(beyond.unsqueeze(2), padding_value)


@torch.library.custom_op("fxprune::pad_packed", mutates_args=())
def _pad_packed_marker(
    x: Tensor, lengths: Tensor, total_length: int | None, padding_value: float
) -> Tensor:
    return pad_packed(x, lengths, total_length, padding_value).clone()


@_pad_packed_marker.register_fake
def _(x: Tensor, lengths: Tensor, total_length: int | None, padding_value: float) -> Tensor:
    steps = total_length
    if steps is None:
        steps = torch.library.get_ctx().new_dynamic_size(min=1)  # type: ignore[assignment]
    return x.new_empty(steps, *x.shape[1:])  # type: ignore[arg-type]


def _traced_pack(
    input: Any, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> TracedSequence:
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
    padded = input.transpose(0, 1) if batch_first else input
    return TracedSequence.of(padded, lengths.to(dtype=torch.int64))


def _traced_unpack(
    sequence: Any,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    content = sequence.content
    padded = pad_packed(content.padded, content.lengths, total_length, float(padding_value))
    return (padded.transpose(0, 1) if batch_first else padded), content.lengths


@contextmanager
def traced_packing() -> Iterator[None]:
    """While active, this thread's packing and unpacking work on traced sequences."""
    with (
        _replaced(torch_packing.pack_padded_sequence, "_traced_pack"),
        _replaced(torch_packing.pad_packed_sequence, "_traced_unpack"),
    ):
        yield


@contextmanager
def _replaced(function: Any, replacement: str) -> Iterator[None]:
    """Lets a function forward to one of this module, in this thread, until the block ends."""
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    code = function.__code__
    function.__code__ = _forwarding_code(_Forward(threading.get_ident(), original, replacement))
    try:
        yield
    finally:
        function.__code__ = code


@dataclass(frozen=True)
class _Forward:
    thread: int
    original: FunctionType
    replacement: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ours = threading.get_ident() == self.thread
        target = globals()[self.replacement] if ours else self.original
        return target(*args, **kwargs)


def _forwarding_code(forward: _Forward) -> CodeType:
    """Code without free variables (assignable to any function) that calls ``forward``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        target: Any = "forward"  # a constant to be replaced
        return target(*args, **kwargs)

    constants = tuple(forward if c == "forward" else c for c in call.__code__.co_consts)
    return call.__code__.replace(co_consts=constants)
