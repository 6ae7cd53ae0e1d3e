"""Inputs, outputs and varying sizes keep the names and shapes that were promised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import ConfigError
from fxprune.lowering import OnnxCase, save_onnx, to_onnx
from tests.lowering.models import SIZES, export, lower, shape

NAMES = {"x": {0: "batch", 1: "time"}}


class Tagger(nn.Module):
    """Reads only its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor, unused: Tensor) -> dict[str, Any]:
        y, h = self.gru(x)
        longer = torch.nn.functional.pad(y, (0, 0, 1, 0))
        return {"tags": self.head(y), "nothing": None, "same": x, "state": (h, longer), "five": 5}


def tagger_inputs(batch: int, time: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, time, 4), torch.randn(batch, 2)


def test_names_and_declared_shapes(tmp_path: Path) -> None:
    report, model = lower(
        Tagger(), tagger_inputs, tmp_path, names=("x", "spare"), dimension_names=NAMES
    )
    assert {v.name: shape(v) for v in model.graph.input} == {
        "x": ["batch", "time", 4],
        "spare": ["spare_0", "spare_1"],
    }
    declared = {v.name: shape(v) for v in model.graph.output}
    assert declared["output_0"] == ["batch", "time", 3]
    assert declared["output_1"] == ["batch", "time", 4]
    assert declared["output_2"] == [2, "batch", 5]
    assert declared["output_3"] == ["batch", "time + 1", 10]
    assert list(declared) == [f"output_{i}" for i in range(4)]
    assert report.notes == (
        "output 1 is always None and left out",
        "output 5 is always 5 and left out",
    )


@pytest.mark.parametrize("example", SIZES)
def test_any_example_size_will_do(example: tuple[int, int], tmp_path: Path) -> None:
    """A batch or time of 1 in the example leaves both free."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y, (h, _) = self.lstm(x)
            return self.head(h[-1]), self.head(y).flatten(0, 1)

    _, model = lower(
        Flat(),
        lambda b, t: (torch.randn(b, t, 4),),
        tmp_path,
        sizes=(example, *SIZES),
        names=("x",),
        dimension_names=NAMES,
    )
    first, second = (shape(v) for v in model.graph.output)
    assert first == ["batch", 3]
    assert isinstance(second[0], str) and second[1] == 3


def test_runs_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No chatter of the exporter, and no warnings of onnxruntime about shapes."""
    import onnxruntime

    report, _ = lower(Tagger(), tagger_inputs, tmp_path, names=("x", "spare"))
    session = onnxruntime.InferenceSession(report.path)
    for batch, time in SIZES:
        x, spare = tagger_inputs(batch, time)
        session.run(None, {"x": x.numpy(), "spare": spare.numpy()})
    assert capfd.readouterr() == ("", "")


def test_names_may_clash_with_inner_ones(tmp_path: Path) -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.output_0 = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

        def forward(self, input: Tensor, linear: Tensor) -> tuple[Tensor, ...]:
            y = self.input(input)
            return y, y * self.output_0 + linear, y

    _, model = lower(
        Clash(), lambda b, t: (torch.randn(b, 4),) * 2, tmp_path, names=("linear", "input.weight")
    )
    assert [v.name for v in model.graph.input] == ["linear", "input.weight"]
    assert [v.name for v in model.graph.output] == ["output_0", "output_1", "output_2"]


def test_keywords_and_constants(tmp_path: Path) -> None:
    class Options(nn.Module):
        def forward(self, x: Tensor, scale: float, *, shift: Tensor, flip: bool = False) -> Tensor:
            return (x.flip(0) if flip else x) * scale + shift

    def keywords(batch: int) -> dict[str, Any]:
        return {"shift": torch.randn(batch, 1), "flip": True}

    model, args = Options(), (torch.randn(2, 3), 2.0)
    exported = torch.export.export(
        model,
        args,
        keywords(2),
        dynamic_shapes={
            "x": {0: torch.export.Dim.AUTO},
            "scale": None,
            "shift": {0: torch.export.Dim.AUTO},
            "flip": None,
        },
    )
    path = tmp_path / "model.onnx"
    # Keywords may come in another order than they were exported in.
    case = OnnxCase("batch=3", (torch.randn(3, 3), 2.0), dict(reversed(keywords(3).items())))
    report = save_onnx(
        exported, model, [case], path, input_names=["x", "shift"], dimension_names={}
    )
    assert report.max_abs_error < 1e-6
    with pytest.raises(ConfigError, match="not built as the program's example inputs"):
        save_onnx(
            exported,
            model,
            [OnnxCase("wrong", args, {})],
            path,
            input_names=["x", "shift"],
            dimension_names={},
        )


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    """Weights, sizes, numbers without dimensions, truth values and whole numbers."""

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return self.weight, self.weight.T, x.shape[0], x.sum(), x > 0, torch.arange(x.shape[1])

    report, model = lower(Kinds(), lambda b, t: (torch.randn(b, t),), tmp_path, names=("x",))
    assert len(model.graph.output) == 6
    assert report.max_abs_error < 1e-5


@pytest.mark.parametrize(
    ("names", "dimensions", "message"),
    [
        (["x"], {}, "1 names, but the program has 2"),
        (["x", "x"], {}, "repeats a name"),
        (["x", "y"], {"z": {0: "batch"}}, r"\['z'\], which are no inputs"),
    ],
)
def test_names_that_do_not_fit(
    names: list[str], dimensions: Mapping[str, Mapping[int, str]], message: str
) -> None:
    exported = export(Tagger(), tagger_inputs(2, 5))
    with pytest.raises(ConfigError, match=message):
        to_onnx(exported, input_names=names, dimension_names=dimensions)


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_opset(opset: int) -> None:
    exported = export(Tagger(), tagger_inputs(2, 5))
    model = to_onnx(exported, input_names=["x", "y"], dimension_names={}, opset=opset)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset}
    onnx.checker.check_model(model, full_check=True)


def test_opset_out_of_range() -> None:
    exported = export(nn.Linear(4, 3), (torch.randn(2, 4),))
    with pytest.raises(ConfigError, match="opset=9 is out of range; choose 18 to"):
        to_onnx(exported, input_names=["x"], dimension_names={}, opset=9)


def test_fixed_sizes_stay_numbers() -> None:
    exported = export(nn.Linear(4, 3), (torch.randn(2, 4),), fixed=True)
    model = to_onnx(exported, input_names=["x"], dimension_names={"x": {0: "batch"}})
    assert [shape(v) for v in (*model.graph.input, *model.graph.output)] == [[2, 4], [2, 3]]
