"""Small recurrent models, their exported programs, and the cases to compare them on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.lowering import OnnxCase, OnnxReport, save_onnx
from fxprune.tracing import recurrent
from fxprune.tracing.layers import traced_layers

SIZES = ((2, 5), (1, 1), (3, 1), (1, 6), (4, 7))  # (batch, time), the example first
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Layer(nn.Module):
    """One recurrent operation of one layer and direction, in any form; time-major."""

    def __init__(
        self,
        kind: str,
        inputs: int = 4,
        hidden: int = 5,
        *,
        bias: bool = True,
        reverse: bool = False,
        outputs: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        gates, size = GATES[kind] * hidden, outputs or hidden
        self.kind, self.reverse = kind, reverse
        self.w_ih = nn.Parameter(torch.randn(gates, inputs) / 2)
        self.w_hh = nn.Parameter(torch.randn(gates, size) / 3)
        self.b_ih = nn.Parameter(torch.randn(gates) / 2) if bias else None
        self.b_hh = nn.Parameter(torch.randn(gates) / 2) if bias else None
        self.w_hr = None
        if outputs:
            factors = torch.randn(outputs, rank or outputs), torch.randn(rank or outputs, hidden)
            # An identity of one factor leaves full rank as it is.
            product = factors[0] @ factors[1] / 2 if rank else factors[1]
            self.w_hr = nn.Parameter(product)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        h_0: Tensor | None = None,
        c_0: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        weights = (self.w_ih, self.w_hh, self.b_ih, self.b_hh)
        if self.kind == "lstm":
            return recurrent.lstm(
                x, h_0, c_0, *weights, self.w_hr, lengths=lengths, reverse=self.reverse
            )
        if self.kind == "gru":
            return recurrent.gru(x, h_0, *weights, lengths=lengths, reverse=self.reverse)
        nonlinearity = self.kind.removeprefix("rnn_")
        return recurrent.rnn(
            x, h_0, *weights, lengths=lengths, reverse=self.reverse, nonlinearity=nonlinearity
        )


def export(model: nn.Module, args: tuple[Any, ...], *, fixed: bool = False) -> ExportedProgram:
    """Exports a model with markers; every dimension may vary unless ``fixed``."""
    dim = Dim.STATIC if fixed else Dim.AUTO
    shapes = pytree.tree_map(
        lambda a: dict.fromkeys(range(a.dim()), dim) if isinstance(a, Tensor) else None, args
    )
    with fx_config.patch(backed_size_oblivious=True), traced_layers():  # type: ignore[attr-defined]
        return torch.export.export(model.eval(), args, dynamic_shapes=shapes)


def cases(
    make: Callable[[int, int], tuple[Any, ...]], sizes: tuple[tuple[int, int], ...] = SIZES
) -> list[OnnxCase]:
    return [OnnxCase(f"batch={b}, time={t}", make(b, t), {}) for b, t in sizes]


def lower(
    model: nn.Module,
    make: Callable[[int, int], tuple[Any, ...]],
    folder: Path,
    *,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    names: tuple[str, ...] | None = None,
    **options: Any,
) -> tuple[OnnxReport, onnx.ModelProto]:
    """Saves a model, compared at all sizes, and reads the file back."""
    example = make(*sizes[0])
    exported = export(model, example)
    tensors = [a for a in pytree.tree_leaves(example) if isinstance(a, Tensor)]
    options.setdefault("dimension_names", {})
    report = save_onnx(
        exported,
        model,
        cases(make, sizes),
        folder / "model.onnx",
        input_names=names or [f"input_{i}" for i in range(len(tensors))],
        **options,
    )
    return report, onnx.load(report.path)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in model.graph.initializer}


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all floating-point initializers."""
    floats = (t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in floats)


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == op_type]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def lengths(batch: int, time: int) -> Tensor:
    """Lengths from 1 to ``time``, the longest neither first nor last where there are three."""
    values = torch.linspace(1, time, batch).round().long() if batch > 1 else torch.tensor([time])
    return values.roll(1)


@contextlib.contextmanager
def no_files(folder: Path) -> Any:
    """Asserts that a block leaves a folder as it was."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    yield
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
