"""Other precisions than float32 are written as float32, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.lowering.models import lower

FLOAT = onnx.TensorProto.FLOAT


class Scaled(nn.Module):
    """A layer, a constant, a cast and fresh zeros, all in one precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, batch_first=True).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, _ = self.gru(x)
        ids = (y > 0).to(self.dtype)
        return y * 1.5 + torch.zeros(5, dtype=self.dtype), ids.sum(-1), y.argmax(-1)


def inputs(dtype: torch.dtype) -> Any:
    return lambda batch, time: (torch.randn(batch, time, 4).to(dtype),)


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)],
)
def test_written_as_float32(dtype: torch.dtype, error: float, tmp_path: Path) -> None:
    class First(Scaled):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x)[:1]

    report, model = lower(First(dtype), inputs(dtype), tmp_path)
    assert report.notes == (f"{str(dtype).removeprefix('torch.')} written as float32",)
    assert report.max_abs_error < error
    boundary = [*model.graph.input, *model.graph.output]
    assert {v.type.tensor_type.elem_type for v in boundary} == {FLOAT}


def test_float64_casts_and_constants(tmp_path: Path) -> None:
    report, model = lower(Scaled(torch.float64), inputs(torch.float64), tmp_path)
    assert report.max_abs_error < 1e-6
    types = [v.type.tensor_type.elem_type for v in model.graph.output]
    assert types == [FLOAT, FLOAT, onnx.TensorProto.INT64]
    assert onnx.TensorProto.DOUBLE not in {t.data_type for t in model.graph.initializer}


def test_float32_is_no_remark(tmp_path: Path) -> None:
    report, _ = lower(Scaled(torch.float32), inputs(torch.float32), tmp_path)
    assert report.notes == ()


def test_float64_without_recurrent_layers_stays(tmp_path: Path) -> None:
    report, model = lower(nn.Linear(4, 3).double(), inputs(torch.float64), tmp_path)
    assert report.notes == ()
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    assert report.max_abs_error < 1e-12
