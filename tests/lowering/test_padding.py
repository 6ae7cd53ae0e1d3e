"""Packed sequences: lengths reach the recurrent nodes, and unpacking cuts, pads and fills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.lowering.models import lengths, lower


class Packed(nn.Module):
    def __init__(self, time_factor: int | None = None, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)
        self.time_factor, self.options = time_factor, options

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, (h, c) = self.lstm(packed)
        options = dict(self.options)
        if self.time_factor is not None:
            options["total_length"] = self.time_factor * x.shape[1]
        y, _ = pad_packed_sequence(packed, batch_first=True, **options)
        return y, h, c


def inputs(batch: int, time: int) -> tuple[Tensor, ...]:
    # One step of padding that no sequence reaches, unless there is one step only.
    return torch.randn(batch, time + 1, 4), lengths(batch, time)


def test_time_is_the_longest(tmp_path: Path) -> None:
    report, _ = lower(Packed(), inputs, tmp_path)
    assert report.max_abs_error < 1e-6
    assert report.operators["LSTM"] == 2
    assert "Where" not in report.operators  # onnxruntime has put zeros there


def test_padding_value(tmp_path: Path) -> None:
    report, _ = lower(Packed(padding_value=-2.5), inputs, tmp_path)
    assert report.max_abs_error < 1e-6
    assert report.operators["Where"] == 1


@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("factor", [1, 2])
def test_total_length_of_the_input(value: float, factor: int, tmp_path: Path) -> None:
    report, _ = lower(Packed(factor, padding_value=value), inputs, tmp_path)
    assert report.max_abs_error < 1e-6
    assert ("Where" in report.operators) == bool(value)


@pytest.mark.parametrize("total", [7, 12])
def test_total_length_fixed(total: int, tmp_path: Path) -> None:
    report, _ = lower(Packed(total_length=total, padding_value=3.0), inputs, tmp_path, sizes=(
        (2, 5), (1, 1), (3, 7), (2, 6),
    ))  # fmt: skip
    assert report.max_abs_error < 1e-6


def test_fill_after_other_work(tmp_path: Path) -> None:
    """What is not straight from a recurrent layer is not zero beyond the lengths."""

    class Direct(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return pad_packed_sequence(packed)[0]

    def make(batch: int, time: int) -> tuple[Tensor, ...]:
        return torch.randn(time + 1, batch, 4), lengths(batch, time)

    report, _ = lower(Direct(), make, tmp_path)
    assert report.max_abs_error == 0
    assert report.operators["Where"] == 1
