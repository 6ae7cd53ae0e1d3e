"""Packed sequences are padded ones with lengths while a model is traced, and only then."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn as torch_rnn
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.rnn import pack_padded_sequence as alias_of_pack
from torch.nn.utils.rnn import pad_packed_sequence as alias_of_unpack

from fxprune.errors import InputError, TraceError
from fxprune.tracing.packing import TracedSequence, pad_packed, traced_packing

X, LENGTHS = torch.randn(4, 3, 2), torch.tensor([2, 4, 1])


@pytest.mark.parametrize("options", [{}, {"padding_value": -1.0}, {"total_length": 6}])
@pytest.mark.parametrize("lengths", [[2, 4, 1], [3, 3, 3], [1, 1, 1]])
def test_pad_packed_equals_torch(options: dict[str, Any], lengths: list[int]) -> None:
    packed = torch_rnn.pack_padded_sequence(X, torch.tensor(lengths), enforce_sorted=False)
    expected, _ = torch_rnn.pad_packed_sequence(packed, **options)
    assert torch.equal(pad_packed(X, torch.tensor(lengths), **options), expected)


def test_total_length_must_hold_the_longest() -> None:
    with pytest.raises(InputError, match="total_length=3 is shorter than the longest sequence, 4"):
        pad_packed(X, LENGTHS, total_length=3)


def test_the_marker_pads_outside_fxprune() -> None:
    found = torch.ops.fxprune.pad_packed(X, LENGTHS, 5, -2.0)
    assert torch.equal(found, pad_packed(X, LENGTHS, 5, -2.0))
    assert found.data_ptr() != X.data_ptr()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, [2, 4, 1]], ids=["tensor", "list"])
def test_aliases_are_replaced_too(batch_first: bool, lengths: Any) -> None:
    x = X.transpose(0, 1) if batch_first else X
    with traced_packing():
        packed = alias_of_pack(x, lengths, batch_first, enforce_sorted=False)
        assert isinstance(packed, TracedSequence)
        assert isinstance(packed, PackedSequence)
        assert torch.equal(packed.content.padded, X)
        y, steps = alias_of_unpack(packed, batch_first=batch_first, padding_value=3.0)
    real = alias_of_pack(x, lengths, batch_first, enforce_sorted=False)
    assert not isinstance(real, TracedSequence)
    expected, _ = alias_of_unpack(real, batch_first=batch_first, padding_value=3.0)
    assert torch.equal(y, expected)
    assert steps.tolist() == LENGTHS.tolist()


def test_functions_are_restored_on_an_error() -> None:
    functions = (torch_rnn.pack_padded_sequence, torch_rnn.pad_packed_sequence)
    codes = [f.__code__ for f in functions]
    with pytest.raises(KeyboardInterrupt), traced_packing():
        assert [f.__code__ for f in functions] != codes
        raise KeyboardInterrupt
    assert [f.__code__ for f in functions] == codes
    assert [f.__name__ for f in functions] == ["pack_padded_sequence", "pad_packed_sequence"]


def test_other_threads_pack_as_ever() -> None:
    results: list[Any] = []

    def pack() -> None:
        results.append(torch_rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False))

    with traced_packing():
        thread = threading.Thread(target=pack)
        thread.start()
        thread.join()
    assert type(results[0]) is PackedSequence


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.data,
        lambda s: s.batch_sizes,
        lambda s: s.sorted_indices,
        lambda s: s[0],
        lambda s: list(s),
    ],
    ids=["data", "batch_sizes", "sorted_indices", "index", "iteration"],
)
def test_the_inside_of_a_packed_sequence_is_no_ones(read: Any) -> None:
    sequence = TracedSequence.of(X, LENGTHS)
    with pytest.raises(TraceError, match=r"reads the inside of a packed sequence.*Unpack it"):
        read(sequence)


def test_conversion_moves_the_padded_tensor() -> None:
    moved = TracedSequence.of(X, LENGTHS).to(torch.float64)
    assert moved.content.padded.dtype == torch.float64
    assert moved.content.lengths is LENGTHS


def test_a_model_that_reads_packed_data_is_refused_by_trace() -> None:
    from fxprune.tracing.tracer import trace

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return alias_of_pack(x, lengths, enforce_sorted=False).data * 2

    with pytest.raises(TraceError, match="reads the inside of a packed sequence"):
        trace(Model(), (X, LENGTHS))
