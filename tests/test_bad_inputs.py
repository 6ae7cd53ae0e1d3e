"""What cannot be handled is refused, with the place and the remedy, and nothing is changed."""

from __future__ import annotations

import os
import re
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.errors import (
    ArchiveError,
    ConfigError,
    FxpruneError,
    InputError,
    LoweringError,
    PreconditionError,
    TraceError,
    VerificationError,
)
from fxprune.latency import measure
from fxprune.passes import Magnitude
from tests.small import HALF, PackedTagger, Tagger, frames, tensors_of

NOTHING = Magnitude(0.0)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules, by value."""
    return {
        f"{name}.{key}": str(value)
        for name, part in model.named_modules()
        for key, value in vars(part).items()
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if the model or the random state is another one afterwards."""
    before, kept, modes = (
        tensors_of(model),
        attributes(model),
        [m.training for m in model.modules()],
    )
    random = torch.get_rng_state()
    yield
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert attributes(model) == kept
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def refused(
    error: type[FxpruneError],
    text: str,
    model: nn.Module,
    inputs: Any,
    policy: Any = HALF,
    **options: Any,
) -> None:
    with untouched(model), pytest.raises(error, match=text):
        fxprune.compile(model, policy, example_inputs=inputs, progress=False, **options)


# Models ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Base of small models around one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)


class Branches(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if x.sum() > 0:
            y = -y
        return y


class Counts(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y[: int(x[0, 0])]


@pytest.mark.parametrize("model", [Branches(), Counts()], ids=["branch", "size"])
def test_data_dependent_control_flow(model: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    text = r"(?s)cannot be traced at .*test_bad_inputs\.py:\d+ \(.*x.*\).*depends on tensor values"
    refused(TraceError, text, model, torch.ones(2, 3))
    assert capfd.readouterr() == ("", "")


Pair = namedtuple("Pair", ["tags", "count"])


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        (lambda y: (y, 3), "int"),
        (lambda y: {"y": y, "shape": y.shape}, "int"),
        (lambda y: Pair(y, "two"), "str"),
        (lambda y: SimpleNamespace(y=y), "SimpleNamespace"),
        (lambda y: 0.5, "float"),
    ],
)
def test_an_output_that_is_no_tensor(outputs: Callable[[Tensor], Any], named: str) -> None:
    class Model(Layer):
        def forward(self, x: Tensor) -> Any:
            return outputs(self.linear(x))

    text = rf"returns {named} .*which is no tensor. Return tensors"
    refused(TraceError, text, Model(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (torch.ones(5, 2, 7), r"Expected 3, got 7. Pass inputs that GRU\.forward takes"),
        ((torch.ones(5, 2, 3),) * 4, r"GRU\.forward\(\) takes from 2 to 3 positional"),
        ({"frames": torch.ones(5, 2, 3)}, "unexpected keyword argument 'frames'"),
        (torch.ones(5, 2, 3, dtype=torch.int64), "does not match weight dtype"),
        ((torch.ones(5, 2, 3), torch.zeros(1, 3, 4)), r"Expected hidden size \(1, 2, 4\)"),
        ("text", "example_inputs is str; give a tensor, a tuple"),
        (None, "example_inputs is missing"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: Any, text: str) -> None:
    refused(ConfigError, text, nn.GRU(3, 4), inputs)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(nn.GRU(3, 4), (5, 0, 3)), (nn.Linear(3, 4), (0, 3)), (nn.Linear(3, 4), (2, 0, 3))],
)
def test_an_empty_example(model: nn.Module, shape: tuple[int, ...]) -> None:
    text = rf"input of shape {re.escape(str(shape))} is empty.*Give an example in which no size"
    refused(ConfigError, text, model, torch.ones(shape))


def test_a_packed_example() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(5, 3), torch.ones(2, 3)])
    text = "a PackedSequence, whose layout depends on the lengths. Give forward the padded"
    refused(ConfigError, text, nn.GRU(3, 4), (packed,))


class KeepsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        y, self.h = self.rnn(x, self.h)
        return y


class AppendsToList(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.linear(x))
        return self.seen[-1]


class WritesDict(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, list[Tensor]] = {"outputs": []}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.cache["outputs"].append(y)
        return y


class HasBuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.h: Tensor
        self.register_buffer("h", torch.zeros(4))


class AssignsBuffer(HasBuffer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.h
        self.h = y.mean(0)
        return y


class AddsToBuffer(HasBuffer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.h
        self.h += y.mean(0).detach()
        return y


class CopiesIntoBuffer(HasBuffer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.h
        self.h.copy_(y.mean(0).detach())
        return y


class WritesTensor(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.h = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.h.add_(1)
        y: Tensor = self.linear(x) + self.h
        return y


class AddsParameter(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.gain = nn.Parameter(torch.ones(4))
        return y * self.gain


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (KeepsState(), "h"),
        (AppendsToList(), "seen"),
        (WritesDict(), "cache"),
        (AssignsBuffer(), "h"),
        (AddsToBuffer(), "h"),
        (CopiesIntoBuffer(), "h"),
        (WritesTensor(), "h"),
        (AddsParameter(), "gain"),
        (nn.Sequential(AssignsBuffer()), r"0\.h"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_that_keeps_tensors_on_itself(model: nn.Module, name: str) -> None:
    text = rf"forward keeps tensors on the module: {name}\. .*pass the state in as an input"
    inputs = torch.ones(5, 2, 3) if isinstance(model, KeepsState) else torch.ones(2, 3)
    refused(TraceError, text, model, inputs)


class ChangesParameter(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data = self.linear.weight.data.clamp(-0.1, 0.1)
        with torch.no_grad():
            self.linear.bias.add_(1)
        y: Tensor = self.linear(x)
        return y


def test_a_module_that_changes_its_parameters() -> None:
    text = r"forward changes its parameters: linear\.weight, linear\.bias\."
    refused(TraceError, text, ChangesParameter(), torch.ones(2, 3))


class CountsCalls(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x) * self.calls
        return y


def test_a_module_that_depends_on_how_often_it_was_called() -> None:
    refused(
        VerificationError, r"\(call 2\). If forward keeps state", CountsCalls(), torch.ones(2, 3)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_modules() -> None:
    inside = nn.Sequential(torch.jit.script(nn.Linear(3, 4)))
    with pytest.raises(TraceError, match=r"0 \(RecursiveScriptModule\) is scripted by torch\.jit"):
        fxprune.trace(inside, torch.ones(2, 3))
    traced = torch.jit.trace(nn.Linear(3, 4), torch.ones(2, 3))
    with pytest.raises(TraceError, match=r"^the model .* is scripted by torch\.jit"):
        fxprune.trace(traced, torch.ones(2, 3))


def test_modules_that_only_wrap_another() -> None:
    refused(
        TraceError,
        r"\(DataParallel\) wraps .* pass its \.module",
        nn.DataParallel(Tagger()),
        frames(),
    )


def test_parameters_without_values() -> None:
    text = "^weight is on the meta device and has no values; load weights first"
    with pytest.raises(TraceError, match=text):
        fxprune.trace(nn.Linear(3, 4, device="meta"), torch.ones(2, 3))
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(TraceError, match=r"^0\.weight is not initialised yet; run the model once"):
        fxprune.trace(lazy, torch.ones(2, 3))


def test_parameters_of_inference_mode() -> None:
    with torch.inference_mode():
        model = Tagger()
    with pytest.raises(TraceError, match=r"^stem\.weight was made in inference mode"):
        fxprune.trace(model, frames())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_that_are_not_finite(value: float) -> None:
    model = Tagger()
    with torch.no_grad():
        model.rnn.get_parameter("weight_hh_l0")[3, 2] = value
    text = r"rnn\.weight_hh_l0 holds NaN or infinity; .*Repair or reload the weights"
    with pytest.raises(ConfigError, match=text):
        fxprune.compile(model, HALF, example_inputs=frames(), progress=False)


def test_a_buffer_of_nan() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].get_buffer("running_mean").fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"^1\.running_mean holds NaN"):
        fxprune.trace(model, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"frames": {0: Dim("batch")}}, "'x'"),
        ({"x": {7: Dim("batch")}}, "check example_inputs and dynamic_shapes"),
        ({"x": {2: Dim("features")}}, "mark the named dimension static"),
        (7, "check example_inputs and dynamic_shapes"),
    ],
)
def test_dynamic_shapes_that_do_not_fit(shapes: Any, text: str) -> None:
    class Model(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y

    refused(TraceError, text, Model(), frames(), dynamic_shapes=shapes)


# Policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("magnitud{sparsity=0.5}", "unknown pass 'magnitud', at character 1"),
        ("magnitude{sparsty=0.5}", "no option 'sparsty'.* Its options are sparsity"),
        ("magnitude{sparsity=1}", r"must be a number in \[0, 1\), not 1"),
        ("magnitude{sparsity=-0.1}", r"must be a number in \[0, 1\), not -0.1"),
        (
            "magnitude{sparsity=0.5,structure=unit}",
            "must be one of connection, row, column, neuron",
        ),
        ("magnitude{sparsity=0.5,norm=3}", "must be one of 1, 2, not 3"),
        ("magnitude", "needs the option 'sparsity'"),
        ("magnitude{sparsity=0.5", "at the end of policy"),
        ("absent.toml", "cannot read the policy file 'absent.toml'"),
        (3, "a policy is a pass, a list of passes"),
        ([HALF, "magnitude"], "a policy holds passes, not 'magnitude'"),
    ],
)
def test_policies_that_are_wrong(policy: Any, text: str) -> None:
    refused(ConfigError, text, Tagger(), frames(), policy)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"protect": ("encoder.*",)}, "protect pattern 'encoder.*' matches no parameter"),
        ({"protect": "stem.*"}, "protect must be a list of patterns"),
        ({"states": "drop"}, "states must be 'keep' or 'shrink', not 'drop'"),
    ],
)
def test_policies_with_wrong_settings(options: dict[str, Any], text: str) -> None:
    model = Tagger()
    with untouched(model), pytest.raises(ConfigError, match=text):
        policy = fxprune.Policy([HALF], **options)
        fxprune.compile(model, policy, example_inputs=frames(), progress=False)


def test_a_group_is_never_emptied() -> None:
    most = Magnitude(0.999, scope="global")
    compact = fxprune.compile(Tagger(), most, example_inputs=frames(), progress=False)
    assert [g.neurons.after for g in compact.report.groups] == [3, 1, 1, 2]
    assert [r.node for r in compact.report.refusals if "none may go empty" in r.reason] == [
        "rnn.l0"
    ]


def test_a_model_whose_every_neuron_is_frozen() -> None:
    text = r"no neuron of this model may be removed \(.*input of the model; .*output of the model"
    refused(PreconditionError, text, nn.Linear(3, 4), torch.ones(2, 3))
    nothing = fxprune.compile(
        nn.Linear(3, 4), NOTHING, example_inputs=torch.ones(2, 3), progress=False
    )
    assert nothing.report.parameters_after == 16


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ([], "verify_inputs is empty"),
        ([torch.ones(3, 2, 9)], r"does not run on verify_inputs\[0\].*traced for \[any, any, 3\]"),
        ([frames(), (frames(), None, None)], r"does not run on verify_inputs\[1\]"),
        (3, "verify_inputs is int; give a list of calls"),
        ([frames(), 3], r"verify_inputs\[1\] is int; build each call as example_inputs is"),
        (frames(), "verify_inputs is Tensor; give a list of calls"),
        ({"x": frames()}, "verify_inputs is dict; give a list of calls"),
    ],
)
def test_verify_inputs_that_do_not_fit(
    calls: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.compiler.run_passes", interrupt)  # before anything is trained
    refused(ConfigError, text, Tagger(), frames(), verify_inputs=calls)


@pytest.mark.parametrize("given", [5, "m.pt2", None, Tagger, torch.zeros(1)])
def test_what_is_no_model(given: Any) -> None:
    for use in (fxprune.inspect, lambda m: fxprune.compile(m, HALF, progress=False)):
        with pytest.raises(ConfigError, match=r"a model is a torch\.nn\.Module, or a program of"):
            use(given)


def test_what_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.compiler.trace", interrupt)  # before anything is traced
    refused(ConfigError, "task is object; give a fxprune.Task", Tagger(), frames(), task=object())
    with pytest.raises(ConfigError, match="task is dict"):
        fxprune.prepare(Tagger(), HALF, example_inputs=frames(), task={})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [None, 3, b"m.pt2"])
def test_what_is_no_path(compact: fxprune.Compact, path: Any, tmp_path: Path) -> None:
    view = fxprune.inspect(Tagger(), frames())
    uses: list[Callable[[Any], object]] = [
        fxprune.load,
        compact.save,
        compact.save_onnx,
        view.draw,
        view.write_graphml,
        measure,
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="a file is named by a text or a path object"):
            use(path)


def test_shapes_are_given_once() -> None:
    program = fxprune.trace(Tagger(), frames())
    with pytest.raises(ConfigError, match="has its example inputs and dynamic shapes already"):
        fxprune.compile(program, HALF, example_inputs=frames(), progress=False)


def test_something_else_than_a_module() -> None:
    with pytest.raises(ConfigError, match="model is function; expected a torch"):
        fxprune.trace(lambda x: x, frames())  # type: ignore[arg-type]


# Running the result ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stateful() -> fxprune.Compact:
    """Of a GRU with its state as an input and an output."""
    inputs = (frames(), torch.zeros(1, 2, 6))
    return fxprune.compile(Tagger(), HALF, example_inputs=inputs, progress=False)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (torch.zeros(1, 3, 6), "h_0 has shape .* a row for each sequence of the batch"),
        (torch.zeros(1, 2, 5), r"input 'state' has shape \(1, 2, 5\).*traced for \[1, any, 6\]"),
        (torch.zeros(2, 2, 6), r"input 'state' has shape \(2, 2, 6\)"),
        (torch.zeros(2, 6), r"input 'state' has shape \(2, 6\)"),
        (None, "input 'state' is NoneType, but the program was traced with a tensor"),
    ],
)
def test_initial_states_of_the_wrong_shape(
    stateful: fxprune.Compact, state: Tensor | None, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        stateful.module(frames(), state)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (frames(2, 5, 4), r"input 'x' has shape \(2, 5, 4\).*\[any, any, 3\]"),
        (torch.zeros(5, 3), r"input 'x' has shape \(5, 3\)"),
        (torch.zeros(2, 0, 3), "the sequence is empty"),
        (torch.zeros(0, 5, 3), "the sequence is empty"),
        ([[1.0]], "input 'x' is list, but the program was traced with a tensor"),
    ],
)
def test_sequences_of_the_wrong_shape(stateful: fxprune.Compact, x: Any, text: str) -> None:
    batch = x.shape[0] if isinstance(x, Tensor) else 1
    with pytest.raises(InputError, match=text):
        stateful.module(x, torch.zeros(1, batch, 6))


def test_cell_states_of_the_wrong_shape() -> None:
    states = (torch.zeros(1, 2, 6), torch.zeros(1, 2, 6))
    compact = fxprune.compile(
        Tagger(nn.LSTM), HALF, example_inputs=(frames(), states), progress=False
    )
    with pytest.raises(InputError, match="c_0 has shape"):
        compact.module(frames(), (states[0], torch.zeros(1, 3, 6)))
    with pytest.raises(InputError, match=r"input 'state_1' has shape \(1, 2, 7\)"):
        compact.module(frames(), (states[0], torch.zeros(1, 2, 7)))


@pytest.fixture(scope="module")
def packed() -> fxprune.Compact:
    inputs = (frames(), torch.tensor([3, 5]))
    return fxprune.compile(PackedTagger(), HALF, example_inputs=inputs, progress=False)


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([0, 5], r"lengths \[0, 5\] must lie between 1 and the 5 steps given; drop empty"),
        ([-1, 5], "must lie between 1 and the 5 steps"),
        ([6, 5], "must lie between 1 and the 5 steps"),
        ([5], r"lengths has shape \(1,\); expected \[2\]"),
        ([5, 4, 3], r"lengths has shape \(3,\); expected \[2\]"),
        ([[5, 3]], r"input 'lengths' has shape \(1, 2\)"),
    ],
)
def test_lengths_that_do_not_fit(packed: fxprune.Compact, lengths: list[Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        packed.module(frames(), torch.tensor(lengths))


def test_a_total_length_that_is_too_short() -> None:
    inputs = (frames(), torch.tensor([3, 5]))
    compact = fxprune.compile(
        PackedTagger(total_length=5), HALF, example_inputs=inputs, progress=False
    )
    with pytest.raises(InputError, match="total_length=5 is shorter than the longest sequence, 6"):
        compact.module(frames(2, 6), torch.tensor([6, 1]))


def test_constants_of_the_trace_cannot_be_changed() -> None:
    class Scaled(Tagger):
        def forward(self, x: Tensor, times: int = 2) -> Tensor:
            y: Tensor = super().forward(x) * times
            return y

    compact = fxprune.compile(Scaled(), HALF, example_inputs=(frames(), 3), progress=False)
    assert compact.module(frames(), 3).shape == (2, 5, 2)
    with pytest.raises(InputError, match="input 'times' is 4, but the program was traced with 3"):
        compact.module(frames(), 4)
    without = fxprune.compile(Tagger(), HALF, example_inputs=(frames(), None), progress=False)
    with pytest.raises(InputError, match=r"input 'state' is a tensor.*traced with None"):
        without.module(frames(), torch.zeros(1, 2, 6))


def test_a_converted_module_is_not_saved(tmp_path: Path) -> None:
    compact = fxprune.compile(Tagger(), HALF, example_inputs=frames(), progress=False)
    compact.module.double()
    with pytest.raises(
        ConfigError, match=r"^stem\.weight is torch\.float64 now, but .*torch\.float32"
    ):
        compact.save_onnx(tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


# Files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compact() -> fxprune.Compact:
    return fxprune.compile(Tagger(), HALF, example_inputs=frames(), progress=False)


Save = Callable[[fxprune.Compact, Path], object]
SAVES: list[Save] = [
    lambda compact, path: compact.save(path),
    lambda compact, path: compact.save(path, portable=True),
    lambda compact, path: compact.save_onnx(path),
]
each_save = pytest.mark.parametrize("save", SAVES, ids=["save", "save-portable", "save_onnx"])


@each_save
def test_targets_that_cannot_be_written(
    compact: fxprune.Compact, save: Save, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="absent"):
        save(compact, tmp_path / "absent" / "m")
    with pytest.raises(ConfigError, match=r"director|folder"):
        save(compact, tmp_path)
    assert os.listdir(tmp_path) == []


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@each_save
@pytest.mark.parametrize(
    ("fail", "error"), [(full_disk, ConfigError), (interrupt, KeyboardInterrupt)]
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    compact: fxprune.Compact,
    save: Save,
    fail: Callable[..., None],
    error: type[BaseException],
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "model"
    target.write_text("old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(error):
        save(compact, target)
    assert os.listdir(tmp_path) == ["model"]
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    "place",
    [
        "fxprune.compiler.run_passes",
        "fxprune.compact.compact_program",
        "fxprune.compact.verify_programs",
        "fxprune.tracing.tracer.import_program",
        "torch.export.export",
    ],
)
def test_an_interrupted_compile_changes_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tagger().train()
    forwards = [layer.forward for layer in (nn.LSTM, nn.GRU, nn.RNN)]
    packing = nn.utils.rnn.pack_padded_sequence.__code__
    with untouched(model):
        monkeypatch.setattr(place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fxprune.compile(model, HALF, example_inputs=frames(), progress=False)
        monkeypatch.undo()
    assert [layer.forward for layer in (nn.LSTM, nn.GRU, nn.RNN)] == forwards
    assert nn.utils.rnn.pack_padded_sequence.__code__ is packing


def test_an_interrupted_comparison_leaves_no_file(
    compact: fxprune.Compact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.lowering.saving.compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compact.save_onnx(tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_archives_that_are_none(compact: fxprune.Compact, tmp_path: Path) -> None:
    def bad(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = tmp_path / "good.pt2"
    compact.save(good)
    whole = good.read_bytes()
    torch.save(Tagger().state_dict(), tmp_path / "state.pt2")
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    paths = {
        bad("garbage.pt2", b"garbage"): "truncated, or no .pt2 archive",
        bad("empty.pt2", b""): "the file is empty",
        bad("half.pt2", whole[: len(whole) // 2]): "truncated, or no .pt2 archive",
        tmp_path / "state.pt2": "truncated, or no .pt2 archive",
        tmp_path / "foreign.pt2": "truncated, or no .pt2 archive",
        tmp_path / "absent.pt2": "there is no such file",
        tmp_path: "this is not a file",
    }
    for path, text in paths.items():
        with pytest.raises(ArchiveError, match=text) as caught:
            fxprune.load(path)
        assert caught.value.path == str(path)
        assert "Export and save the program again" in str(caught.value)


@pytest.mark.parametrize("opset", [3, 20.0, "20", True])
def test_an_opset_that_is_none(compact: fxprune.Compact, opset: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"opset={opset!r} is out of range; choose"):
        compact.save_onnx(tmp_path / "m.onnx", opset=opset)
    assert os.listdir(tmp_path) == []


def test_packed_sequences_have_no_portable_archive(packed: fxprune.Compact, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="Save without portable=True, or write ONNX"):
        packed.save(tmp_path / "m.pt2", portable=True)
    assert os.listdir(tmp_path) == []
