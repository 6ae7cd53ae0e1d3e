"""Structures: what their candidates are, what these weigh, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxprune.analysis import Neurons, analyze
from fxprune.masking.branches import find_branches
from fxprune.masking.masks import Masks
from fxprune.masking.prunable import find_prunable
from fxprune.masking.structure import Structure
from fxprune.masking.structures import STRUCTURES, make_structure
from fxprune.policy import protected
from fxprune.program import Program, Refusal
from fxprune.tracing.tracer import trace


class Convs(nn.Module):
    """Two convolutions with kernels of two rows and three columns, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (2, 3))
        self.second = nn.Conv2d(4, 3, (2, 3))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.sigmoid(self.first(x)))
        return self.head(torch.tanh(y).mean((2, 3)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A GRU of four units between linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.rnn = nn.GRU(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.stem(x))[0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def convs() -> Program:
    torch.manual_seed(0)
    return trace(Convs(), torch.randn(1, 2, 6, 8))


@pytest.fixture(scope="module")
def recurrent() -> Program:
    torch.manual_seed(0)
    return trace(Recurrent(), torch.randn(5, 1, 2))


def made(
    program: Program, name: str, protect: tuple[str, ...] = (), scope: str = "group"
) -> tuple[Structure, Neurons]:
    neurons = analyze(program)
    protection = protected(program, neurons, protect)
    found = find_prunable(program, neurons, protection)
    return make_structure(name, program, found, protection, scope), neurons


POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "connection": lambda v: v.abs(),
    "kernel-row": lambda v: v.abs().mean(3, keepdim=True),
    "kernel-column": lambda v: v.abs().mean(2, keepdim=True),
    "kernel": lambda v: v.abs().mean((2, 3), keepdim=True),
    "row": lambda v: v.abs().mean((1, 2, 3), keepdim=True),
    "column": lambda v: v.abs().mean(0, keepdim=True),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_of_a_convolution(convs: Program, name: str) -> None:
    structure, _ = made(convs, name)
    tensors = dict(convs.tensors)
    expected = [POSITIONS[name](tensors[f"{w}.weight"].double()) for w in ("first", "second")]
    scores = structure.scores(tensors)
    first = sum(e.numel() for e in expected)
    assert torch.allclose(scores[:first].double(), torch.cat([e.flatten() for e in expected]))
    masks = structure.masks(torch.arange(structure.size))
    assert masks["first.weight"].shape == expected[0].shape
    assert masks["first.weight"].flatten().tolist() == list(range(expected[0].numel()))


@pytest.mark.parametrize("name", ["kernel-row", "kernel-column", "kernel"])
def test_a_linear_map_has_kernels_of_one_entry(convs: Program, name: str) -> None:
    structure, _ = made(convs, name)
    assert structure.masks(torch.ones(structure.size))["head.weight"].shape == (5, 3)


def test_a_kernel_of_one_dimension_is_one_row() -> None:
    program = trace(nn.Sequential(nn.Conv1d(2, 3, 5), nn.ReLU()), torch.randn(1, 2, 9))
    shapes = {
        name: tuple(s.masks(torch.ones(s.size))["0.weight"].shape)
        for name in ("kernel", "kernel-row", "kernel-column")
        for s in [made(program, name)[0]]
    }
    assert shapes == {"kernel": (3, 2, 1), "kernel-row": (3, 2, 1), "kernel-column": (3, 2, 5)}


def test_a_row_of_a_recurrent_weight_is_that_of_one_gate(recurrent: Program) -> None:
    structure, _ = made(recurrent, "row")
    masks = structure.masks(torch.ones(structure.size))
    assert masks["rnn.weight_hh_l0"].shape == (12, 1)


def test_filters_are_judged_by_what_enters_them(recurrent: Program) -> None:
    """All gates of both weights are one filter of a GRU."""
    structure, neurons = made(recurrent, "filter")
    w_ih, w_hh = (recurrent.tensors[f"rnn.weight_{k}_l0"] for k in ("ih", "hh"))
    entering = torch.cat([w_ih.view(3, 4, 3), w_hh.view(3, 4, 4)], 2).abs().mean((0, 2))
    units = neurons.group("rnn.l0").neurons
    assert torch.allclose(structure.scores(recurrent.tensors)[units], entering.double())


def test_channels_are_judged_by_what_leaves_them(recurrent: Program) -> None:
    structure, neurons = made(recurrent, "channel")
    w_hh, head = recurrent.tensors["rnn.weight_hh_l0"], recurrent.tensors["head.weight"]
    leaving = torch.cat([w_hh, head]).abs().mean(0)
    units = neurons.group("rnn.l0").neurons
    assert torch.allclose(structure.scores(recurrent.tensors)[units], leaving.double())


def test_neurons_are_judged_by_both_with_nothing_counted_twice(recurrent: Program) -> None:
    structure, neurons = made(recurrent, "neuron")
    w_ih, w_hh, head = (
        recurrent.tensors[n].detach().double()
        for n in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight")
    )
    unit = 1
    rows = [unit, 4 + unit, 8 + unit]
    others = [r for r in range(12) if r not in rows]
    owned = torch.cat(
        [w_ih[rows].flatten(), w_hh[rows].flatten(), w_hh[others, unit], head[:, unit]]
    )
    score = structure.scores(recurrent.tensors)[neurons.group("rnn.l0").neurons[unit]]
    assert float(score) == pytest.approx(owned.abs().mean().item(), abs=1e-12)


def test_filters_of_a_convolution(convs: Program) -> None:
    structure, _ = made(convs, "filter")
    scores = structure.scores(convs.tensors)
    goes, _ = structure.lowest(scores, 0.5)
    expected = []
    for name in ("first.weight", "second.weight"):
        mean = convs.tensors[name].abs().mean((1, 2, 3))
        expected += mean.sort().values[: len(mean) // 2].tolist()
    assert sorted(scores[goes].tolist()) == pytest.approx(sorted(expected))


@pytest.mark.parametrize("name", STRUCTURES)
def test_never_all_go(convs: Program, name: str) -> None:
    structure, neurons = made(convs, name)
    goes, _ = structure.lowest(structure.scores(convs.tensors), 0.999)
    for weight, keep in structure.masks(~goes).items():
        assert bool(keep.any()), weight
    left = torch.ones(neurons.count, dtype=torch.bool)
    left[structure.cut(~goes)] = False
    assert all(bool(left[g.neurons].any()) for g in neurons.groups)


def test_the_best_that_stays_is_reported(convs: Program) -> None:
    for name in ("filter", "row"):
        structure, _ = made(convs, name, scope="global")
        scores = structure.scores(convs.tensors)
        _, kept = structure.lowest(scores, 0.9)
        assert [r.node for r in kept if "kept its best one" in r.reason]
        _, none = structure.lowest(scores, 0.0)
        assert not [r for r in none if "kept its best one" in r.reason]


@pytest.mark.parametrize("name", [s for s in STRUCTURES if s != "depth"])
@pytest.mark.parametrize("scope", ["group", "class", "global"])
def test_exactly_as_many_go_as_asked_for(recurrent: Program, name: str, scope: str) -> None:
    structure, _ = made(recurrent, name, scope=scope)
    goes, _ = structure.lowest(structure.scores(recurrent.tensors), 0.25)
    if name in ("filter", "channel", "neuron"):
        sizes = [3, 4]  # the stem and the units, which are of two classes
    else:
        sizes = [m.numel() for m in structure.masks(torch.ones(structure.size)).values()]
        if name == "row":
            sizes[3] = 0  # those of the outputs stay
        if scope == "class":
            sizes = [sizes[0] + sizes[3], *sizes[1:3]]  # stem and head; input; recurrent
    expected = sum(sizes) // 4 if scope == "global" else sum(n // 4 for n in sizes)
    assert int(goes.sum()) == expected


def test_what_is_protected_or_masked_does_not_compete(convs: Program) -> None:
    structure, _ = made(convs, "connection", protect=("first.*",))
    assert "first.weight" not in structure.masks(torch.ones(structure.size))
    second = torch.zeros(3, 4, 2, 3, dtype=torch.bool)
    second[0] = True
    given = Program(**(vars(convs) | {"masks": Masks(connections={"second.weight": second})}))
    structure, _ = made(given, "row")
    goes, _ = structure.lowest(torch.zeros(structure.size), 0.9)
    assert not bool(structure.masks(goes)["second.weight"].any())  # one row is left, and stays


def test_rows_of_the_outputs_stay(convs: Program) -> None:
    structure, _ = made(convs, "row", scope="global")
    goes, kept = structure.lowest(torch.zeros(structure.size), 0.9)
    assert {n: int(m.sum()) for n, m in structure.masks(goes).items()} == {
        "first.weight": 3,
        "second.weight": 2,
        "head.weight": 0,
    }
    assert Refusal("head.weight", "5 rows stay, as their neurons must") in kept


def test_filters_with_protected_outputs_stay(convs: Program) -> None:
    structure, neurons = made(convs, "filter", protect=("first.*",))
    goes, kept = structure.lowest(structure.scores(convs.tensors), 0.9)
    assert not bool(goes[neurons.group("first").neurons].any())
    assert Refusal("first", "4 of 4 neurons stay: protected") in kept


# Branches -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A value plus what a module makes of it, between linear maps."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(3, 4), branch, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.branch(y)
        return self.head(y + (z[0] if isinstance(z, tuple) else z))  # type: ignore[no-any-return]


def branches(
    module: nn.Module, *shape: int, protect: tuple[str, ...] = ()
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    program = trace(module, torch.randn(*shape))
    neurons = analyze(program)
    found, refusals = find_branches(program, neurons, protected(program, neurons, protect))
    return [(b.name, sorted(b.outputs)) for b in found], [r.reason for r in refusals]


def test_a_branch_ends_in_its_last_product() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), nn.Dropout())
    found, refusals = branches(Residual(inner), 2, 3)
    assert found == [("branch.0.weight", ["branch.2.bias", "branch.2.weight"])]
    assert refusals == []


def test_batch_norm_and_recurrent_layers_end_a_branch() -> None:
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    assert branches(Residual(inner), 2, 3)[0] == [
        ("branch.0.weight", ["branch.0.weight", "branch.1.bias", "branch.1.weight"])
    ]
    ends = [f"branch.{kind}_{part}_l0" for kind in ("bias", "weight") for part in ("hh", "ih")]
    assert branches(Residual(nn.GRU(4, 4)), 5, 2, 3)[0] == [("branch.weight_ih_l0", ends)]


def test_a_branch_is_judged_by_all_its_weights() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    program = trace(Residual(inner), torch.randn(2, 3))
    structure, _ = made(program, "depth")
    weights = torch.cat([program.tensors[f"branch.{i}.weight"].flatten() for i in (0, 2)])
    expected = weights.detach().double().abs().mean().item()
    assert structure.scores(program.tensors).tolist() == pytest.approx([expected], abs=1e-12)
    assert {n: tuple(m.shape) for n, m in structure.masks(torch.tensor([False])).items()} == {
        "branch.2.weight": (1, 1),
        "branch.2.bias": (1,),
    }


def test_a_fraction_of_less_than_one_branch_is_reported() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    structure, _ = made(trace(Residual(inner), torch.randn(2, 3)), "depth")
    goes, kept = structure.lowest(torch.tensor([1.0]), 0.9)
    assert not bool(goes.any())
    assert kept == (Refusal("residual branches", "all 1 stay: 0.9 of them is less than one"),)
    assert structure.lowest(torch.tensor([1.0]), 0.0)[1] == ()


class Shared(nn.Module):
    """Two branches with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.layer(x))
        return x + torch.relu(self.layer(x))


def test_branches_that_cannot_be_dropped_are_reported() -> None:
    end = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    bare = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    cases = [
        branches(Residual(end), 2, 3),
        branches(Residual(bare), 2, 3),
        branches(Residual(nn.Linear(4, 4)), 2, 3, protect=("branch.bias",)),
        branches(Shared(), 2, 4),
    ]
    assert [found for found, _ in cases] == [[]] * 4
    assert [refusals[0] for _, refusals in cases] == [
        "its residual branch stays: it ends in sigmoid, which may be other than 0 where all "
        "weights are",
        "its residual branch stays: its batch norm has no gain and offset",
        "its residual branch stays: branch.bias is protected",
        "its residual branch stays: layer.weight is used outside of it as well",
    ]


def test_a_branch_that_is_read_elsewhere_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, state = self.rnn(x)
            return x + y, state

    found, refusals = branches(Read(), 5, 2, 4)
    assert found == []
    assert refusals == ["its residual branch stays: what it adds is read elsewhere as well"]


def test_a_sum_of_two_layers_is_no_shortcut() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)  # type: ignore[no-any-return]

    assert branches(Two(), 2, 3) == ([], [])
