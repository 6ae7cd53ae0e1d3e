"""torch.export is run in silence, and its failures become advice."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export import _trace as exporter

import fxprune
from fxprune.errors import TraceError
from fxprune.tracing.exporting import automatic_shapes, export, export_program
from tests.small import HALF, PackedTagger, Tagger, frames

CALL: Any = ((frames(),), {})


class Branch(nn.Module):
    """Decides by value."""

    def forward(self, x: Tensor) -> Tensor:
        """Negates or not."""
        return -x if bool((x > 0).all()) else x


def test_failures_name_the_users_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError) as caught:
        export(Branch(), CALL, None)
    text = str(caught.value)
    assert text.startswith("Branch cannot be traced at ")
    assert "test_exporting.py:" in text
    assert "(return -x if bool((x > 0).all()) else x)" in text
    assert "Replace the branch by torch.where" in text
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


def test_silence_ends_with_the_export() -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    filters = list(logger.filters)
    with pytest.raises(TraceError):
        export(Branch(), CALL, None)
    assert logger.filters == filters
    assert "print" not in vars(exporter)


def test_automatic_shapes_leave_all_dimensions_free_but_the_fixed() -> None:
    shapes = automatic_shapes(nn.Linear(3, 4), CALL, fixed={(0, 1)})
    assert shapes["input"] == (Dim.AUTO, Dim.STATIC, Dim.AUTO)
    scalar = automatic_shapes(nn.Linear(3, 4), ((torch.tensor(1.0),), {}))
    assert scalar["input"] is None


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_is_exported_with_its_dynamic_dimensions(batch: int) -> None:
    program = fxprune.trace(Tagger(), frames(batch, 1))
    exported = export_program(program)
    spec = next(n for n in exported.graph.nodes if n.name == "x").meta["val"].shape
    assert [isinstance(s, torch.SymInt) for s in spec] == [True, True, False]
    assert exported.example_inputs is not None


def test_lengths_are_exported_too() -> None:
    program = fxprune.trace(PackedTagger(), (frames(), torch.tensor([3, 5])))
    names = {str(n.target) for n in export_program(program).graph.nodes}
    assert {"fxprune.lstm.default", "fxprune.pad_packed.default"} <= names


def test_a_compact_program_is_exported_in_its_own_sizes() -> None:
    compact = fxprune.compile(Tagger(), HALF, example_inputs=frames(), progress=False)
    exported = export_program(compact.program)
    assert exported.state_dict["rnn.weight_hh_l0"].shape == (9, 3)


class Keywords(nn.Module):
    """Takes its inputs by any names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, *rest: Tensor, gain: Tensor | None = None, **frames: Tensor) -> Tensor:
        """Adds all up."""
        total = sum(rest, start=sum(frames.values(), start=torch.zeros(3)))
        y: Tensor = self.linear(total)
        return y if gain is None else y * gain


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({"left": frames(), "right": frames()}, ["left", "right"]),
        (((frames(),), {"left": frames(), "gain": torch.ones(2)}), ["rest_0", "left", "gain"]),
    ],
)
def test_keywords_of_any_name(call: Any, names: list[str]) -> None:
    model = Keywords()
    program = fxprune.trace(model, call)
    assert [spec.name for spec in program.inputs] == names
    assert program.inputs[0].shape is not None
    assert [type(s) for s in program.inputs[0].shape] == [str, str, int]
    x = frames(3, 4)
    args, kwargs = call if isinstance(call, tuple) else ((), call)
    args, kwargs = (x,) * len(args), {k: torch.ones(2) if k == "gain" else x for k in kwargs}
    torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("nested", [True, False])
def test_dynamic_shapes_of_keywords_of_any_name(nested: bool) -> None:
    shapes: Any = {"left": {0: Dim.AUTO}}
    shapes = {"frames": shapes} if nested else shapes
    program = fxprune.trace(Keywords(), {"left": frames()}, dynamic_shapes=shapes)
    shape = program.inputs[0].shape
    assert shape is not None
    assert [type(s) for s in shape] == [str, int, int]
