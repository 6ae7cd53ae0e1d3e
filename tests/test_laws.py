"""The laws, for every model of the zoo under four policies.

Each model is traced twice: in float32 from an example of batch 1, in float64 from the zoo's own
example. Every policy reuses those programs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PreconditionError
from fxprune.passes import Magnitude
from tests.laws import (
    EQUAL,
    ONNX,
    assert_same,
    at_precision,
    call,
    gap,
    other_sizes,
    run_onnx,
    settle_modes,
    watched,
)
from tests.zoo import ZOO, Inputs, ZooModel, by_name

# oneDNN says once a process that it leaves projections to the default kernel.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

NEURON = (Magnitude(0.5),)
CONNECTION = (Magnitude(0.9, structure="connection"),)
ROW = (Magnitude(0.5, structure="row"),)
COLUMN = (Magnitude(0.5, structure="column"),)

POLICIES = {
    "neuron": NEURON,
    "connection": CONNECTION,
    "line": ROW,  # or columns: see Traced.policy
    "neuron-after-connection": CONNECTION + NEURON,
}


@dataclass
class Traced:
    """One model of the zoo in one precision: the user's module and its program.

    Attributes:
        model: from the zoo.
        dtype: precision.
        example: batch and time of the example.
        settled: without dropout.
        changes: what tracing and compiling changed of the module; law 4 wants nothing.
    """

    model: ZooModel
    dtype: torch.dtype
    example: tuple[int, int]
    settled: bool = False
    changes: list[str] = field(default_factory=list)
    compacts: dict[str, fxprune.Compact] = field(default_factory=dict)

    @cached_property
    def module(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.model.build().to(self.dtype).eval()
        return settle_modes(module) if self.settled else module

    @cached_property
    def program(self) -> fxprune.Program:
        with watched(self.module) as changes:
            program = fxprune.trace(self.module, self.inputs(*self.example))
        self.changes += [f"trace: {change}" for change in changes]
        return program

    def inputs(self, batch: int, time: int) -> Inputs:
        return at_precision(self.model.inputs(batch, time), self.dtype)

    def sizes(self) -> list[tuple[int, int]]:
        return [self.example, *other_sizes(self.model, self.example)]

    def policy(self, name: str) -> tuple[Magnitude, ...]:
        """Rows or columns, in turns over the zoo, and the other way round in float64."""
        if name == "line":
            odd = (ZOO.index(self.model) + (self.dtype is torch.float64)) % 2
            return COLUMN if odd else ROW
        return POLICIES[name]

    def compact(self, policy: str) -> fxprune.Compact:
        if policy not in self.compacts:
            program = self.program
            with watched(self.module) as changes:
                compact = fxprune.compile(program, self.policy(policy), progress=False)
            self.changes += [f"{policy}: {change}" for change in changes]
            self.compacts[policy] = compact
        return self.compacts[policy]


def traced(model: ZooModel, dtype: torch.dtype, *, settled: bool = False) -> Traced:
    single = dtype is torch.float32 and model.batch_varies
    return Traced(model, dtype, (1 if single else model.batch, model.time), settled)


@pytest.fixture(scope="module", params=ZOO, ids=lambda model: model.name)
def forms(request: pytest.FixtureRequest) -> dict[str, Traced]:
    """One model, traced when first used; pytest runs all tests of a model after one another."""
    model: ZooModel = request.param
    return {
        "float32": traced(model, torch.float32),
        "float64": traced(model, torch.float64),
        "settled": traced(model, torch.float64, settled=True),
    }


@pytest.fixture
def single(forms: dict[str, Traced]) -> Traced:
    return forms["float32"]


@pytest.fixture(params=["float32", "float64"])
def case(request: pytest.FixtureRequest, forms: dict[str, Traced]) -> Traced:
    return forms[request.param]


@pytest.fixture
def trainable(forms: dict[str, Traced]) -> Traced:
    """Without dropout; the program of the float64 case where the model has none anyway."""
    same = dropouts(forms["float64"].module) == dropouts(forms["settled"].module)
    return forms["float64" if same else "settled"]


every_policy = pytest.mark.parametrize("policy", POLICIES)


def dropouts(module: nn.Module) -> list[float]:
    """The dropout probabilities of a module."""
    given = (getattr(m, "p", getattr(m, "dropout", 0.0)) for m in module.modules())
    return [p for p in given if isinstance(p, float)]


def refuses(case: Traced, policy: str) -> bool:
    """Whether neurons are to go where none may; says so instead of doing nothing."""
    if case.model.prunable or not any(p.structure == "neuron" for p in case.policy(policy)):
        return False
    with pytest.raises(PreconditionError, match="no neuron of this model may be removed"):
        case.compact(policy)
    return True


def assert_equal_everywhere(
    case: Traced, expected: Callable[..., object], actual: Callable[..., object]
) -> None:
    sizes = case.sizes()
    assert len(sizes) >= 4
    for size in sizes:
        assert_same(expected, actual, case.inputs(*size), EQUAL[case.dtype])


def test_law_1_masking_nothing_changes_nothing(case: Traced) -> None:
    program = case.program.module()
    assert_equal_everywhere(case, case.module, program)
    assert_equal_everywhere(case, case.module, program)  # nothing is carried over


@every_policy
def test_law_2_compact_equals_masked(case: Traced, policy: str) -> None:
    if not refuses(case, policy):
        compact = case.compact(policy)
        assert_equal_everywhere(case, compact.masked, compact.module)


@every_policy
def test_law_2_in_train_mode(trainable: Traced, policy: str) -> None:
    """Batch norms update their statistics alike, too."""
    if refuses(trainable, policy):
        return
    compact = trainable.compact(policy)
    masked, module = (copy.deepcopy(m).train() for m in (compact.masked, compact.module))
    for batch, time in trainable.sizes():
        if batch > 1 or not trainable.model.batch_varies:  # a batch norm needs several values
            inputs = trainable.inputs(batch, time)
            assert_same(copy.deepcopy(masked), module, inputs, EQUAL[torch.float64])
            call(masked, inputs)
    expected = dict(masked.named_buffers())
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            channels = compact.report.kept[name.rpartition(".")[0] + ".weight"][0]
            torch.testing.assert_close(buffer, expected[name][list(channels)], rtol=0, atol=1e-12)
        elif name.endswith("num_batches_tracked"):
            assert buffer == expected[name] > 0


@pytest.mark.parametrize(
    "policy",
    [
        "neuron",
        pytest.param("connection", marks=pytest.mark.slow),
        pytest.param("line", marks=pytest.mark.slow),
        "neuron-after-connection",
    ],
)
def test_law_3_onnx_equals_compact(single: Traced, policy: str, tmp_path: Path) -> None:
    if refuses(single, policy):
        return
    compact = single.compact(policy)
    path = tmp_path / "model.onnx"
    compact.save_onnx(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in single.sizes():
        inputs = single.inputs(*size)
        expected = call(compact.module, inputs)
        assert gap(expected, run_onnx(session, inputs, expected)) <= ONNX, size


def test_law_4_the_users_module_stays(case: Traced) -> None:
    """Tracing and all compilations so far, and running what they returned in train mode."""
    compact = case.compact("connection")
    with watched(case.module) as changes:
        inputs = case.inputs(case.model.batch, case.model.time)
        for module in (compact.masked, compact.module):
            call(module.train(), inputs)
            module.eval()
    assert changes == []
    assert case.changes == []


def test_connection_classes_are_those_of_the_table(single: Traced) -> None:
    view = fxprune.inspect(single.program)
    classes: dict[str, tuple[str, ...]] = {}
    for block in view.blocks:
        kind = block.connection_class.value
        for name in block.weights:
            classes[name] = (*classes.get(name, ()), kind)
    assert classes == dict(single.model.classes)


def test_neuron_pruning_shrinks(single: Traced) -> None:
    """What stays is the user's weights at the positions kept; every other position is gone."""
    if refuses(single, "neuron"):
        return
    compact = single.compact("neuron")
    before = dict(single.module.named_parameters())
    after = dict(compact.module.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        indices = [torch.tensor(kept) for kept in compact.report.kept[name]]
        assert torch.equal(parameter, before[name][torch.meshgrid(*indices, indexing="ij")]), name
    assert compact.report.parameters_before == parameters(single.module)
    assert compact.report.parameters_after == parameters(compact.module)
    assert parameters(compact.module) < parameters(single.module)


def test_nothing_shrinks_where_nothing_is_cut(single: Traced) -> None:
    compact = fxprune.compile(
        single.program, Magnitude(0.0, structure="connection"), progress=False
    )
    assert compact.report.parameters_after == parameters(single.module)
    assert_equal_everywhere(single, single.module, compact.module)


def parameters(module: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


# Sizes of what is left when half of the units go; of an odd number the larger half stays.


def linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return outputs * (inputs + bias)


def recurrent(gates: int, inputs: int, units: int, *, biases: int = 2) -> int:
    """One layer and direction: input weight, recurrent weight, biases, for each gate."""
    return gates * units * (inputs + units + biases)


def lstm(inputs: int, units: int, *, biases: int = 2) -> int:
    return recurrent(4, inputs, units, biases=biases)


def gru(inputs: int, units: int, *, biases: int = 2) -> int:
    return recurrent(3, inputs, units, biases=biases)


def rnn(inputs: int, units: int, *, biases: int = 2) -> int:
    return recurrent(1, inputs, units, biases=biases)


def projected(inputs: int, units: int, outputs: int) -> int:
    return 4 * units * (inputs + outputs + 2) + outputs * units


def conv(inputs: int, outputs: int, *kernel: int, bias: bool = True) -> int:
    return outputs * (inputs * math.prod(kernel) + bias)


LEFT = {
    "lstm": lstm(5, 4) + linear(4, 3),
    "gru": gru(4, 5) + linear(5, 3),
    "rnn-tanh": rnn(6, 4) + linear(4, 3),
    "rnn-relu": rnn(5, 5) + linear(5, 3),
    "lstm-two-layer": lstm(5, 4) + lstm(4, 4) + linear(4, 3),
    "bilstm": 2 * lstm(5, 3) + linear(6, 3),
    "bigru-two-layer": 2 * gru(4, 4) + 2 * gru(8, 4) + linear(8, 3),
    "birnn-time-major": 2 * rnn(5, 3) + linear(6, 3),
    "lstm-projected": projected(5, 5, 2) + linear(2, 3),
    "lstm-projected-two-layer": projected(6, 5, 3) + projected(3, 5, 3) + linear(3, 3),
    "gru-no-bias": gru(4, 4, biases=0) + gru(4, 4, biases=0) + linear(4, 3),
    "lstm-dropout": lstm(5, 4) + 2 * lstm(4, 4) + linear(4, 3),
    "gru-unbatched": gru(5, 4) + linear(4, 3),
    "lstm-final-cell": lstm(5, 4, biases=0) + linear(4, 3),
    "bilstm-final-states": 2 * lstm(5, 3) + 2 * lstm(6, 3) + linear(6, 3),
    "gru-summed-states": gru(5, 4) + gru(4, 4) + linear(4, 3),
    "bare-gru-two-layer": gru(5, 4) + gru(4, 7),
    "lstm-states-in-out": lstm(5, 5) + lstm(5, 5) + linear(5, 3),
    "lstm-learned-states": 2 * 4 + lstm(5, 4) + linear(4, 3),
    "gru-learned-state": 2 * 4 + gru(4, 4) + gru(4, 4) + linear(4, 3),
    "packed-bilstm-two-layer": 2 * lstm(5, 3) + 2 * lstm(6, 3) + linear(6, 3),
    "lstm-cell-step": lstm(5, 4) + linear(4, 3),
    "rnn-cell-step": rnn(5, 4, biases=0) + linear(4, 3),
    "stacked-lstm-cells": lstm(5, 4) + 2 * 4 + lstm(4, 3) + linear(3, 3),
    "manual-lstm": linear(5, 16) + linear(4, 16, bias=False) + linear(4, 3),
    "residual-lstms": linear(5, 4) + 2 * lstm(4, 4) + linear(4, 3),
    "dense-grus": gru(5, 3) + gru(8, 4) + linear(12, 3),
    "gated-grus": 2 * gru(5, 4) + linear(5, 4) + linear(4, 3),
    "normalized-lstms": lstm(5, 4) + 2 * 4 + lstm(4, 4) + linear(4, 3),
    "conv-lstm": conv(6, 4, 3) + 2 * 4 + conv(2, 6, 3) + conv(1, 6, 3, bias=False)
    + lstm(6, 4) + 2 * 4 + linear(4, 3),
    "gru-encoder-decoder": gru(5, 4) + 11 * 3 + gru(3, 4) + linear(4, 11),
    "bilstm-attention-pooling": 13 * 3 + 2 * lstm(3, 4) + linear(8, 1) + linear(8, 3),
    "tied-character-model": 13 * 3 + lstm(3, 5) + lstm(5, 5) + linear(5, 3) + 13,
    "mlp": linear(5, 5) + linear(5, 4) + linear(4, 3),
    "lenet": conv(1, 2, 5, 5) + conv(2, 3, 5, 5) + linear(75, 6) + linear(6, 6) + linear(6, 10),
    "residual-cnn": conv(3, 3, 3, 3) + 2 * conv(3, 3, 3, 3, bias=False) + 4 * 3
    + conv(3, 5, 3, 3, bias=False) + conv(5, 5, 3, 3, bias=False) + 4 * 5 + conv(3, 5, 1, 1)
    + linear(5, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_half_of_the_neurons_leave_so_many_parameters(name: str) -> None:
    case = traced(by_name(name), torch.float32)
    assert parameters(case.compact("neuron").module) == LEFT[name]
