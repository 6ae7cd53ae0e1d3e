"""What a user takes for granted: ways to call, wrapped weights, modes, precision, copies, files."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree

import fxprune
from fxprune.contract import Pass
from fxprune.errors import ConfigError, VerificationError
from fxprune.passes import DynamicPruning, GradualMagnitude, Magnitude, StageWise
from tests.small import HALF, PackedTagger, Tagger, TiedModel, frames, tensors_of

NOTHING = Magnitude(0.0)
CONNECTIONS = Magnitude(0.8, structure="connection")


def compiled(model: Any, inputs: Any, policy: Any = HALF, **options: Any) -> fxprune.Compact:
    return fxprune.compile(model, policy, example_inputs=inputs, progress=False, **options)


def gap(expected: Any, actual: Any) -> float:
    """Largest difference; infinite where structure, shape or type differ."""
    left, structure = pytree.tree_flatten(expected)
    right, other = pytree.tree_flatten(actual)
    if structure != other:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None:
            if a.shape != b.shape or a.dtype != b.dtype:
                return float("inf")
            worst = max(worst, float((a - b).detach().abs().max()))
    return worst


def check_laws(model: nn.Module, *call: Any, **named: Any) -> fxprune.Compact:
    """Masking nothing changes nothing; compact equals masked for neurons and for connections."""
    model.eval()
    inputs = (call, named)
    with torch.no_grad():
        assert (
            gap(model(*call, **named), compiled(model, inputs, NOTHING).module(*call, **named))
            < 1e-6
        )
        for policy in (CONNECTIONS, HALF):
            compact = compiled(model, inputs, policy)
            assert gap(compact.masked(*call, **named), compact.module(*call, **named)) < 1e-6
    assert compact.report.parameters_after < compact.report.parameters_before
    return compact


# Calls -----------------------------------------------------------------------------------------


class Named(Tagger):
    """Takes its scale by keyword only."""

    def forward(self, x: Tensor, state: Any = None, *, scale: Tensor | float = 1.0) -> Any:
        """Scales the tags."""
        return super().forward(x) * scale


X, SCALE = frames(), torch.tensor(2.0)


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X,), (X,), {}),
        ([X, None], (X, None), {}),
        ({"x": X}, (), {"x": X}),
        ({"scale": SCALE, "x": X}, (), {"x": X, "scale": SCALE}),
        (((X,), {"scale": SCALE}), (X,), {"scale": SCALE}),
        (((), {"x": X}), (), {"x": X}),
    ],
)
def test_ways_to_give_example_inputs(inputs: Any, args: Any, kwargs: dict[str, Any]) -> None:
    model = Named().eval()
    compact = compiled(model, inputs, NOTHING)
    assert gap(model(*args, **kwargs), compact.module(*args, **kwargs)) < 1e-6


def test_states_are_optional() -> None:
    without = compiled(Tagger(), (X, None))
    assert without.module(X, None).shape == (2, 5, 2)
    assert compiled(Tagger(), X).module(X).shape == (2, 5, 2)
    tags, state = compiled(Tagger(), {"x": X, "state": torch.ones(1, 2, 6)}).module(
        x=X, state=torch.ones(1, 2, 6)
    )
    assert (tags.shape, state.shape) == ((2, 5, 2), (1, 2, 6))


def test_the_users_inputs_may_be_views_and_require_gradients() -> None:
    x = torch.randn(5, 2, 3).transpose(0, 1).requires_grad_()
    compact = check_laws(Tagger(), x)
    assert x.grad is None
    assert compact.module(frames(3, 7)).shape == (3, 7, 2)


class Unbatched(nn.Module):
    """A stack over one sequence, [time, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 6, num_layers=2, bidirectional=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns tags and final states."""
        y, (h, c) = self.rnn(x)
        return self.head(y), h, c


def test_unbatched_sequences() -> None:
    compact = check_laws(Unbatched(), torch.randn(5, 3))
    assert [t.shape for t in compact.module(torch.randn(9, 3))] == [(9, 2), (4, 6), (4, 6)]


class LearnedState(nn.Module):
    """Starts from a state that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.h_0 = nn.Parameter(torch.randn(1, 1, 6))
        self.rnn = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns tags."""
        y: Tensor = self.head(self.rnn(x, self.h_0.expand(1, x.shape[0], 6).contiguous())[0])
        return y


def test_learned_initial_states_shrink_with_the_units() -> None:
    compact = check_laws(LearnedState(), X)
    assert compact.module.get_parameter("h_0").shape == (1, 1, 3)


Result = namedtuple("Result", ["tags", "rest"])


class Outputs(Tagger):
    """Returns a named tuple of a dict, None, a state, and a tensor twice."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """Returns tags and more."""
        y, h = self.rnn(torch.relu(self.stem(x)))
        tags = self.head(y)
        return Result({"tags": tags}, [None, (h, tags.mean()), tags])


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    compact = check_laws(Outputs(), X)
    result = compact.module(X)
    assert type(result) is Result
    assert result.rest[0] is None
    compact.save_onnx(tmp_path / "m.onnx")
    outputs = onnx.load(tmp_path / "m.onnx").graph.output
    assert [o.name for o in outputs] == ["output_0", "output_1", "output_2", "output_3"]


class IgnoresInput(nn.Module):
    """Reads the second of three inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = Tagger()

    def forward(self, noise: Tensor, x: Tensor, more: Any = None) -> Any:
        """Returns tags."""
        return self.tagger(x)


def test_an_input_that_nothing_reads(tmp_path: Path) -> None:
    noise = torch.randn(7)
    compact = check_laws(IgnoresInput(), noise, X, {"a": noise})
    compact.save_onnx(tmp_path / "m.onnx")
    names = [i.name for i in onnx.load(tmp_path / "m.onnx").graph.input]
    assert names[:2] == ["noise", "x"]
    assert len(names) == 3
    compact.save(tmp_path / "m.pt2")
    assert [spec.name for spec in fxprune.load(tmp_path / "m.pt2").inputs] == names


@pytest.mark.parametrize("sorted_", [False, True], ids=["any-order", "sorted"])
@pytest.mark.parametrize(
    "unpacking",
    [{}, {"padding_value": -7.0}, {"total_length": 7}, {"total_length": 9, "padding_value": 3.0}],
    ids=str,
)
def test_packed_sequences(sorted_: bool, unpacking: dict[str, Any]) -> None:
    def lengths(*values: int) -> Tensor:
        return torch.tensor(sorted(values, reverse=True) if sorted_ else values)

    model = PackedTagger(sorted_, **unpacking).eval()
    compact = check_laws(model, frames(), lengths(3, 5))
    same = compiled(model, (frames(), lengths(3, 5)), NOTHING).module
    for x, steps in [
        (frames(3), lengths(1, 4, 2)),
        (frames(1, 4), lengths(4)),
        (frames(2, 6), lengths(6, 1)),
    ]:
        assert gap(model(x, steps), same(x, steps)) < 1e-6
        assert gap(compact.masked(x, steps), compact.module(x, steps)) < 1e-6


# Weights that are computed ---------------------------------------------------------------------


class Squashed(nn.LSTM):
    """Calls the forward of its base."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Squashes the outputs."""
        y, states = super().forward(input, hx)
        return torch.tanh(y), states


class Renamed(nn.GRU):
    """Changes nothing."""


@pytest.mark.parametrize("layer", [Squashed, Renamed])
def test_subclasses_of_recurrent_modules(layer: type[nn.RNNBase]) -> None:
    compact = check_laws(Tagger(layer), X)
    gates = {Squashed: 4, Renamed: 3}[layer]
    assert compact.module.get_parameter("rnn.weight_hh_l0").shape == (gates * 3, 3)


class Tanh(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        """Bounds a weight."""
        return weight.tanh()


def old_weight_norm(module: nn.Module, name: str) -> None:
    nn.utils.weight_norm(module, name)


def old_spectral_norm(module: nn.Module, name: str) -> None:
    nn.utils.spectral_norm(module, name)


def tanh(module: nn.Module, name: str) -> None:
    nn.utils.parametrize.register_parametrization(module, name, Tanh())


def pruned(module: nn.Module, name: str) -> None:
    prune.random_unstructured(module, name, 0.4)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("part", ["stem.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0"])
@pytest.mark.parametrize(
    "wrap",
    [
        old_weight_norm,
        parametrizations.weight_norm,
        old_spectral_norm,
        parametrizations.spectral_norm,
        tanh,
        pruned,
    ],
)
def test_wrapped_weights(wrap: Callable[[nn.Module, str], object], part: str) -> None:
    torch.manual_seed(0)
    model = Tagger(nn.LSTM)
    name, weight = part.split(".")
    wrap(model.get_submodule(name), weight)
    before = tensors_of(model)
    model.eval()
    same = compiled(model, X, NOTHING)
    for x in (X, frames(3, 7)):
        assert gap(model(x), same.module(x)) < 1e-6
    assert set(same.module.state_dict()) == set(before)
    masked = compiled(model, X, CONNECTIONS)
    assert gap(masked.masked(X), masked.module(X)) < 1e-6
    assert masked.report.sparsity > 0
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# Modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiling_where_nothing_is_recorded(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    with mode():
        compact = compiled(Tagger(), X) if mode is torch.no_grad else None
    model = Tagger()
    with mode():
        compact = compact or compiled(model, X)
    compact.module.train()(X).sum().backward()
    assert all(p.grad is not None for p in compact.module.parameters())


@pytest.mark.parametrize(
    "pass_",
    [
        Magnitude(0.5),
        GradualMagnitude(0.5, every=1),
        DynamicPruning(0.5),
        StageWise(0.5, population=2, generations=2),
    ],
)
def test_training_inside_inference_mode(pass_: Pass) -> None:
    model = Tagger()
    task = fxprune.Task(
        lambda m, b: m(b).square().mean(),
        [X],
        lambda m: float(m(X).square().mean()),
        goal="min",
        epochs=2,
    )
    with torch.inference_mode():
        compact = fxprune.compile(model, pass_, example_inputs=(X,), task=task, progress=False)
        prepared = fxprune.prepare(model, Magnitude(0.5), example_inputs=(X,))
        converted = prepared.convert()
    assert compact.report.sparsity > 0
    for module in (prepared.module, converted.module):
        module(X).sum().backward()


def test_modes_stay_what_they_were() -> None:
    model = Tagger().train()
    model.stem.eval()
    compact = compiled(model, X)
    assert [model.training, model.stem.training, model.rnn.training] == [True, False, True]
    assert not compact.module.training


def test_compiling_twice_gives_the_same() -> None:
    model = Tagger(nn.LSTM, bidirectional=True)
    first, second = compiled(model, X), compiled(model, X)
    assert first.report.to_dict() == second.report.to_dict()
    assert gap(dict(first.module.state_dict()), dict(second.module.state_dict())) == 0.0


class Trained(nn.Module):
    """Dropout before and between layers, and batch norm."""

    def __init__(self, always: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.rnn = nn.GRU(16, 8, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 2)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        """Returns tags."""
        y = self.norm(self.stem(x).transpose(1, 2)).transpose(1, 2)
        y = self.dropout(y)
        if self.always:
            y = nn.functional.dropout(y, self.always, training=True)
        tags: Tensor = self.head(self.rnn(y)[0])
        return tags


def test_dropout_follows_the_mode_with_the_same_masks_for_the_same_seed() -> None:
    model = Trained().train()
    module = compiled(model, X, NOTHING).module
    assert torch.equal(module(X), module(X))
    module.train()
    assert not torch.equal(module(X), module(X))
    torch.manual_seed(3)
    expected = model(X)
    torch.manual_seed(3)
    assert gap(expected, module(X)) < 1e-6
    module.eval()
    assert torch.equal(module(X), module(X))


def test_dropout_of_a_smaller_module_keeps_its_distribution() -> None:
    model = nn.Sequential(nn.Linear(3, 400), nn.Dropout(0.25), nn.Linear(400, 2))
    module = compiled(model, torch.randn(2, 3)).module.train()
    (node,) = [m for n, m in module.named_modules() if isinstance(m, nn.Dropout)]
    dropped = node(torch.ones(200, 200))
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.max()) == pytest.approx(1 / 0.75)


def test_dropout_that_is_always_on_stays_on(tmp_path: Path) -> None:
    compact = compiled(Trained(always=0.5).eval(), X)
    assert not torch.equal(compact.module(X), compact.module(X))
    assert compact.report.parameters_after < compact.report.parameters_before
    with pytest.raises(VerificationError, match="random"):
        compact.save_onnx(tmp_path / "m.onnx")


def test_batch_norm_counts_in_train_mode_only() -> None:
    model = Trained().eval()
    module = compiled(model, X, NOTHING).module
    start = dict(tensors_of(module))
    module(X)
    assert gap(start, tensors_of(module)) == 0.0
    module.train()(X)
    model.train()(X)
    names = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    for name in names:
        assert not torch.equal(start[name], module.get_buffer(name))
        assert gap(model.get_buffer(name), module.get_buffer(name)) < 1e-6


# Precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_other_precisions(
    dtype: torch.dtype, tolerance: float, layer: type[nn.RNNBase], tmp_path: Path
) -> None:
    model = Tagger(layer, bidirectional=True).to(dtype).eval()
    x = X.to(dtype)
    assert gap(model(x), compiled(model, x, NOTHING).module(x)) <= tolerance
    compact = compiled(model, x)
    assert gap(compact.masked(x), compact.module(x)) <= tolerance
    assert {p.dtype for p in compact.module.parameters()} == {dtype}
    report = compact.save_onnx(tmp_path / "m.onnx")
    assert report.notes == (f"{str(dtype).removeprefix('torch.')} written as float32",)
    compact.save(tmp_path / "m.pt2")
    assert gap(compact.module(x), fxprune.load(tmp_path / "m.pt2").module()(x)) == 0.0


# Names, copies, sharing ------------------------------------------------------------------------


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    tokens = torch.randint(0, 11, (2, 5))
    compact = compiled(TiedModel(), tokens)
    module: Any = compact.module
    assert module.decoder.weight is module.embedding.weight
    assert module.embedding.weight.shape == (11, 3)
    assert set(module.state_dict()) == set(TiedModel().state_dict())
    again: Any = copy.deepcopy(module)
    assert again.decoder.weight is again.embedding.weight
    compact.save_onnx(tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert sum(1 for w in graph.initializer if 33 == torch.Size(w.dims).numel()) == 1
    compact.save(tmp_path / "m.pt2")
    loaded: Any = compiled(fxprune.load(tmp_path / "m.pt2"), None).module
    assert loaded.decoder.weight is loaded.embedding.weight


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Tagger(nn.LSTM, num_layers=2, bidirectional=True), X),
        (Trained(), X),
        (LearnedState(), X),
        (nn.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3)),
    ],
    ids=["stack", "norm", "learned", "projected"],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_names_are_the_users(model: nn.Module, inputs: Tensor) -> None:
    compact = compiled(model, inputs, NOTHING)
    assert set(compact.module.state_dict()) == set(model.state_dict())
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(compact.module.state_dict())
    assert gap(tensors_of(model), tensors_of(fresh)) == 0.0
    assert set(dict(compact.module.named_parameters())) == set(dict(model.named_parameters()))


def test_frozen_parameters_stay_frozen() -> None:
    model = Tagger()
    model.stem.requires_grad_(False)
    module = compiled(model, X).module
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "stem.bias"}


@pytest.mark.parametrize("policy", [NOTHING, HALF, CONNECTIONS], ids=str)
def test_nothing_trainable_is_shared(policy: Magnitude) -> None:
    model = Tagger(nn.LSTM)
    first, second = compiled(model, X, policy), compiled(model, X, policy)
    users, others = tensors_of(model), tensors_of(second.module)
    optimizer = torch.optim.Adam(first.module.parameters(), lr=0.1)
    before = tensors_of(first.module)
    first.module.train()(X).square().sum().backward()
    optimizer.step()
    assert gap(before, tensors_of(first.module)) > 1e-3
    assert gap(users, tensors_of(model)) == 0.0
    assert gap(others, tensors_of(second.module)) == 0.0
    trained = tensors_of(first.module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert gap(trained, tensors_of(first.module)) == 0.0


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Tagger(), (X, torch.ones(1, 2, 6))),
        (Trained(), (X,)),
        (PackedTagger(), (X, torch.tensor([3, 5]))),
        (TiedModel(), (torch.randint(0, 11, (2, 5)),)),
        (Outputs(), (X,)),
    ],
    ids=["states", "modes", "packed", "tied", "outputs"],
)
def test_copies_compute_the_same(model: nn.Module, call: tuple[Any, ...], tmp_path: Path) -> None:
    module = compiled(model, call).module
    torch.save(module, tmp_path / "module.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    expected = module(*call)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ]
    copies.append(pickle.loads(pickle.dumps(copies[-1])))
    for other in copies:
        assert gap(expected, other(*call)) == 0.0
        assert list(other.state_dict()) == list(module.state_dict())
        before = tensors_of(module)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert gap(before, tensors_of(module)) == 0.0
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert gap(expected, other(*call)) == 0.0
        assert other.train().training


# Again, and elsewhere --------------------------------------------------------------------------


def again_from_module(compact: fxprune.Compact, call: Any, folder: Path) -> fxprune.Compact:
    return compiled(compact.module, call)


def again_from_program(compact: fxprune.Compact, call: Any, folder: Path) -> fxprune.Compact:
    return compiled(compact.program, None)


def again_from_archive(compact: fxprune.Compact, call: Any, folder: Path) -> fxprune.Compact:
    compact.save(folder / "m.pt2")
    return compiled(fxprune.load(folder / "m.pt2"), None)


@pytest.mark.parametrize("again", [again_from_module, again_from_program, again_from_archive])
@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Tagger(nn.LSTM), (X, (torch.ones(1, 2, 6), torch.ones(1, 2, 6)))),
        (Tagger(), (X,)),
        (PackedTagger(), (X, torch.tensor([3, 5]))),
    ],
    ids=["states", "plain", "packed"],
)
def test_a_compact_model_is_pruned_again(
    again: Callable[..., fxprune.Compact],
    model: nn.Module,
    call: tuple[Any, ...],
    tmp_path: Path,
) -> None:
    first = compiled(model, call)
    second = again(first, call, tmp_path)
    assert second.report.parameters_before == first.report.parameters_after
    rows = {"rnn.weight_hh_l0": 2}  # of 6, 3 and then 2 are left
    gates = 4 if "LSTM" in str(model) else 3
    for name, left in rows.items():
        assert second.module.get_parameter(name).shape == (gates * left, left)
    assert gap(second.masked(*call), second.module(*call)) < 1e-6
    expected = pytree.tree_map(lambda t: t.shape, model(*call))
    assert pytree.tree_map(lambda t: t.shape, second.module(*call)) == expected


def test_a_plain_training_loop_between_prepare_and_convert() -> None:
    model = Tagger(nn.LSTM)
    users = tensors_of(model)
    prepared = fxprune.prepare(model, HALF, example_inputs=X)
    module = prepared.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    wanted = torch.ones(2, 5, 2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (module(X) - wanted).square().mean() + prepared.penalty()
        loss.backward()
        optimizer.step()
        prepared.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    compact = prepared.convert()
    assert compact.report.parameters_after == 116
    assert gap(module.eval()(X), compact.module(X)) < 1e-6
    assert gap(users, tensors_of(model)) == 0.0
    small = tensors_of(compact.module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert gap(small, tensors_of(compact.module)) == 0.0


def test_weight_decay_does_not_bring_connections_back() -> None:
    prepared = fxprune.prepare(Tagger(), CONNECTIONS, example_inputs=X)
    optimizer = torch.optim.SGD(
        prepared.module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1
    )
    for _ in range(3):
        optimizer.zero_grad()
        prepared.module(X).square().sum().backward()
        optimizer.step()
    compact = prepared.convert()
    left = sum(int(p.count_nonzero()) for p in compact.module.parameters() if p.dim() > 1)
    # Some connections that the masks keep go with neurons that are not read any more.
    assert left == compact.report.counts.connections.after
    assert 0 < left <= 225 - int(0.8 * 15) - int(0.8 * 90) - int(0.8 * 108) - int(0.8 * 12)


def test_what_was_trained_further_is_what_is_saved(tmp_path: Path) -> None:
    compact = compiled(Trained(), X)
    with torch.no_grad():
        for parameter in compact.module.parameters():
            parameter.mul_(1.5)
    compact.module.train()  # as a training loop leaves it
    assert compact.save_onnx(tmp_path / "m.onnx").max_abs_error < 1e-5
    compact.save(tmp_path / "m.pt2")
    assert compact.module.training
    loaded = fxprune.load(tmp_path / "m.pt2").module()
    assert gap(compact.module.eval()(X), loaded(X)) < 1e-6


def test_a_portable_archive_needs_no_fxprune(tmp_path: Path) -> None:
    call = (X, torch.ones(1, 2, 6))
    compact = compiled(Tagger(), call)
    assert compact.save(tmp_path / "m.pt2", portable=True) == ("x[1]=5",)
    torch.save((call, compact.module(*call)), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        f"call, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"module = torch.export.load({str(tmp_path / 'm.pt2')!r}).module()\n"
        "for a, b in zip(module(*call), expected, strict=True):\n"
        "    torch.testing.assert_close(a, b)\n"
        "assert module(call[0][:1], call[1][:, :1])[0].shape == (1, 5, 2)\n"
        "assert not any(name.startswith('fxprune') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again = compiled(fxprune.load(tmp_path / "m.pt2"), None)
    assert gap(again.masked(*call), again.module(*call)) < 1e-6


def test_an_error_in_the_users_forward_is_told() -> None:
    class Fails(Tagger):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            raise KeyError("vocabulary")

    with pytest.raises(ConfigError, match="does not run on the example inputs: 'vocabulary'"):
        fxprune.trace(Fails(), X)


@pytest.mark.parametrize("batch", [1, 2])
def test_squeezing_everything_can_be_written(batch: int, tmp_path: Path) -> None:
    """Where the model squeezes sizes of 1 away at run time, the ONNX file does so too."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 8, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0]).squeeze()  # type: ignore[no-any-return]

    model = Scores()
    example = torch.randn(batch, 5, 4)
    compact = fxprune.compile(model, Magnitude(0.5), example_inputs=example, progress=False)
    written = compact.save_onnx(tmp_path / "scores.onnx")
    assert any("squeezed away" in size for size in written.sizes)
    session = onnxruntime.InferenceSession(
        tmp_path / "scores.onnx", providers=["CPUExecutionProvider"]
    )
    for time in (1, 3):
        x = torch.randn(batch, time, 4)
        expected = compact.module(x).detach().numpy()
        found = session.run(None, {"x": x.numpy()})[0]
        assert found.shape == expected.shape
        assert abs(found - expected).max() < 1e-5
