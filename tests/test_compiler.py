"""compile and prepare: what goes in, what comes out, what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.compiler import as_program
from fxprune.errors import ConfigError
from fxprune.passes import Magnitude
from tests.small import HALF, PackedTagger, Tagger, frames


@pytest.fixture(scope="module")
def compact() -> fxprune.Compact:
    torch.manual_seed(0)
    return fxprune.compile(Tagger(), HALF, example_inputs=frames(), progress=False)


def test_the_report_counts_what_there_is(compact: fxprune.Compact) -> None:
    report = compact.report
    parameters = sum(p.numel() for p in compact.module.parameters())
    assert report.parameters_after == parameters == 92
    assert report.parameters_before == sum(p.numel() for p in Tagger().parameters()) == 268
    # [batch * time] x (stem + rnn + head), 3 gates
    assert report.macs_before == 10 * (3 * 5 + 3 * 6 * (5 + 6) + 6 * 2)
    assert report.macs_after == 10 * (3 * 3 + 3 * 3 * (3 + 3) + 3 * 2)
    assert [(g.name, g.neurons.before, g.neurons.after) for g in report.groups] == [
        ("x", 3, 3),
        ("stem", 5, 3),
        ("rnn.l0", 6, 3),
        ("head", 2, 2),
    ]
    assert {kind.value: (n.before, n.after) for kind, n in report.by_class.items()} == {
        "recurrent": (108, 27),
        "input": (90, 27),
        "feedforward": (27, 15),
    }
    assert report.policy == "magnitude{sparsity=0.5}"
    assert report.max_abs_error <= 1e-6


def test_kept_indices_are_those_of_the_weights(compact: fxprune.Compact) -> None:
    kept = compact.report.kept
    assert set(kept) == set(dict(Tagger().named_parameters()))
    for name, parameter in compact.module.named_parameters():
        assert tuple(len(indices) for indices in kept[name]) == tuple(parameter.shape)
        rows = torch.tensor(kept[name][0])
        whole = compact.masked.state_dict()[name]
        part = whole.index_select(0, rows)
        if parameter.dim() == 2:
            part = part.index_select(1, torch.tensor(kept[name][1]))
        assert torch.equal(part, parameter.detach())
    (units,) = {kept["rnn.weight_hh_l0"][1]}
    rows_of_gates = tuple(gate * 6 + unit for gate in range(3) for unit in units)
    assert kept["rnn.weight_hh_l0"][0] == rows_of_gates


def test_masked_has_the_original_shapes(compact: fxprune.Compact) -> None:
    shapes = {n: tuple(p.shape) for n, p in Tagger().named_parameters()}
    masked = {n: tuple(t.shape) for n, t in compact.masked.state_dict().items()}
    assert {name: masked[name] for name in shapes} == shapes
    torch.testing.assert_close(compact.masked(frames()), compact.module(frames()))


def test_a_result_has_a_short_name(compact: fxprune.Compact) -> None:
    assert repr(compact) == "Compact(268 -> 92 parameters; print its report)"


POLICIES: dict[str, Any] = {
    "pass": HALF,
    "list": [HALF],
    "policy": fxprune.Policy([HALF]),
    "text": "magnitude{sparsity=0.5}",
}


@pytest.mark.parametrize("name", POLICIES)
def test_forms_of_a_policy(name: str) -> None:
    torch.manual_seed(0)
    found = fxprune.compile(Tagger(), POLICIES[name], example_inputs=frames(), progress=False)
    assert found.report.parameters_after == 92


def test_a_policy_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        'protect = ["stem.*"]\n[[pass]]\nname = "magnitude"\nsparsity = 0.5\n', encoding="utf-8"
    )
    found = fxprune.compile(Tagger(), path, example_inputs=frames(), progress=False)
    assert found.module.get_parameter("stem.weight").shape == (5, 3)
    assert found.module.get_parameter("rnn.weight_hh_l0").shape == (9, 3)


def test_passes_are_applied_in_order() -> None:
    quarter = fxprune.compile(
        Tagger(), [HALF, HALF], example_inputs=frames(), progress=False
    ).report
    assert [g.neurons.after for g in quarter.groups] == [3, 2, 2, 2]
    assert quarter.policy == "magnitude{sparsity=0.5};magnitude{sparsity=0.5}"


def test_modules_and_programs_give_the_same() -> None:
    model = Tagger()
    first = fxprune.compile(model, HALF, example_inputs=frames(), progress=False)
    second = fxprune.compile(fxprune.trace(model, frames()), HALF, progress=False)
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_programs_pass_through_and_shrunk_ones_are_traced_anew(compact: fxprune.Compact) -> None:
    program = fxprune.trace(Tagger(), frames())
    assert as_program(program) is program
    again = as_program(compact.program)
    assert again is not compact.program
    assert again.tensors["rnn.weight_hh_l0"].shape == (9, 3)
    with pytest.raises(ConfigError, match="example_inputs is missing"):
        as_program(Tagger())


def test_verify_inputs_are_what_is_compared() -> None:
    calls = [frames(3, 2), {"x": frames(1, 9)}, ((frames(),), {})]
    found = fxprune.compile(
        Tagger(), HALF, example_inputs=frames(), verify_inputs=iter(calls), progress=False
    )
    assert found.report.verification.sizes == tuple(f"verify_inputs[{i}]" for i in range(3))
    with pytest.raises(ConfigError, match="verify_inputs is empty"):
        fxprune.compile(Tagger(), HALF, example_inputs=frames(), verify_inputs=[], progress=False)


_SIZES = ("example", "batch=4", "batch=1", "batch=3", "other values")


def test_dimensions_that_the_user_fixes_are_not_varied() -> None:
    found = fxprune.compile(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        HALF,
        example_inputs=frames(),
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
        progress=False,
    )
    assert found.report.verification.sizes == _SIZES
    assert found.report.notes == ()


class Squeezing(nn.Module):
    """Drops the time of its example, which is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, 1, 3] to [batch, 2]."""
        y: torch.Tensor = self.head(self.stem(x).squeeze(1))
        return y


def test_dimensions_that_are_fixed_are_told(tmp_path: Path) -> None:
    found = fxprune.compile(Squeezing(), HALF, example_inputs=frames(2, 1), progress=False)
    (note,) = found.report.notes
    assert note.startswith("x[1] is fixed: the model squeezes a size of 1")
    assert found.report.verification.sizes == _SIZES
    assert found.save_onnx(tmp_path / "m.onnx").max_abs_error < 1e-5


def test_saving_onnx_reports_what_was_written(compact: fxprune.Compact, tmp_path: Path) -> None:
    report = compact.save_onnx(tmp_path / "m.onnx")
    assert report.path == tmp_path / "m.onnx"
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.sizes[0] == "example"
    assert "batch=1, time=1" in report.sizes
    assert report.operators["GRU"] == 1
    assert report.max_abs_error < 1e-5


def test_prepared_modules_have_no_penalty_by_default() -> None:
    prepared = fxprune.prepare(Tagger(), HALF, example_inputs=frames())
    assert float(prepared.penalty()) == 0.0
    assert repr(prepared) == "Prepared(magnitude{sparsity=0.5}; train its module, then convert)"
    prepared.step()
    nothing = fxprune.prepare(nn.ReLU(), Magnitude(0.0), example_inputs=frames())
    assert float(nothing.penalty()) == 0.0


def test_converting_twice_gives_the_same() -> None:
    prepared = fxprune.prepare(
        PackedTagger(), HALF, example_inputs=(frames(), torch.tensor([3, 5]))
    )
    first, second = prepared.convert(), prepared.convert()
    assert first.report.to_dict() == second.report.to_dict()
    pairs = zip(first.module.parameters(), second.module.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_a_task_fine_tunes_under_the_masks() -> None:
    wanted = torch.ones(2, 5, 2)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (model(x) - wanted).square().mean()
        return result

    def validate(model: nn.Module) -> float:
        return float(loss(model, frames()).detach())

    model = Tagger()
    task = fxprune.Task(loss, [frames()] * 5, validate, goal="min", epochs=3)
    plain = fxprune.compile(model, HALF, example_inputs=frames(), progress=False)
    tuned = fxprune.compile(model, HALF, example_inputs=frames(), task=task, progress=False)
    assert validate(tuned.module) < validate(plain.module)
    assert tuned.report.parameters_after == plain.report.parameters_after
    torch.testing.assert_close(tuned.masked(frames()), tuned.module(frames()))
