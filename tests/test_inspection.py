"""A view shows what there is, as a table, a graph and a picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from fxprune.drawing import draw, layers_of
from fxprune.errors import ConfigError
from fxprune.inspection import View, connection_graph, inspect
from fxprune.program import Program
from fxprune.tracing.tracer import trace

TEXT = """\
neurons      11 in 3 groups; 9 may be removed
connections  161: 53 feedforward, 60 input, 48 recurrent

| group  | neurons | removable | recurrent | the rest stays because |
|--------|---------|-----------|-----------|------------------------|
| table  |       5 |         5 |           |                        |
| rnn.l0 |       4 |         4 | yes       |                        |
| out    |       2 |         0 |           | output of the model    |

| connections      | from   | to     | class       | shape  |
|------------------|--------|--------|-------------|--------|
| table.weight     |        | table  | feedforward | 9 x 5  |
| rnn.weight_ih_l0 | table  | rnn.l0 | input       | 12 x 5 |
| rnn.weight_hh_l0 | rnn.l0 | rnn.l0 | recurrent   | 12 x 4 |
| out.weight       | rnn.l0 | out    | feedforward | 2 x 4  |"""


class Tagger(nn.Module):
    """Embedding, GRU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)
        self.rnn = nn.GRU(5, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [time, batch] to [time, batch, 2]."""
        return self.out(self.rnn(self.table(tokens))[0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(Tagger(), torch.zeros(3, 2, dtype=torch.int64))


@pytest.fixture(scope="module")
def view(program: Program) -> View:
    return inspect(program)


def test_text_lists_groups_and_blocks(view: View) -> None:
    assert str(view) == TEXT


def test_representations_are_short(view: View) -> None:
    assert repr(view) == "View(3 groups, 9 neurons that may go; print it)"
    assert repr(trace(nn.Linear(3, 2), torch.zeros(4, 3))) == (
        "Program(input [any, 3]; operations: 1, parameters: 8)"
    )


def test_graph_goes_through_graphml(view: View, tmp_path: Path) -> None:
    view.write_graphml(tmp_path / "graph.graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert dict(read.nodes(data=True)) == dict(view.graph.nodes(data=True))
    assert {(a, b, k) for a, b, k in read.edges(keys=True)} == set(view.graph.edges(keys=True))
    for _, _, name, values in view.graph.edges(keys=True, data=True):
        block = next(b for b in view.blocks if b.name == name)
        assert values["connections"] == math.prod(block.shape)
        assert values["connection_class"] == block.connection_class.value


def test_blocks_from_no_neuron_have_a_source_of_their_own(view: View) -> None:
    (source,) = (name for name, kind in view.graph.nodes(data="kind") if kind == "inputs")
    assert source == "inputs of table.weight"
    assert view.graph.nodes[source]["size"] == 9
    assert [k for _, _, k in view.graph.out_edges(source, keys=True)] == ["table.weight"]


def test_blocks_to_no_neuron_have_a_destination_of_their_own(view: View, tmp_path: Path) -> None:
    *_, block = view.blocks
    nowhere = replace(block, destination="", destinations=torch.full((1, 1), -1))
    graph = connection_graph(view.groups, (nowhere,))
    assert graph.nodes["outputs of out.weight"]["kind"] == "outputs"
    assert graph.nodes["outputs of out.weight"]["size"] == 2
    assert list(graph.edges(keys=True)) == [("rnn.l0", "outputs of out.weight", "out.weight")]
    draw(graph, tmp_path / "view.svg")
    assert b"outputs of out.weight" in (tmp_path / "view.svg").read_bytes()


def test_layers_follow_execution_and_ignore_loops() -> None:
    graph = nx.MultiDiGraph()
    for order, name in enumerate("abcd"):
        graph.add_node(name, order=order)
    graph.add_edges_from([("a", "b"), ("b", "b"), ("b", "c"), ("c", "b"), ("a", "d")])
    assert layers_of(graph) == {"a": 0, "b": 1, "c": 2, "d": 1}


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_picture(view: View, tmp_path: Path, suffix: str, start: bytes) -> None:
    view.draw(tmp_path / f"view{suffix}")
    data = (tmp_path / f"view{suffix}").read_bytes()
    assert data.startswith(start)
    if suffix == ".svg":
        assert b"table" in data


def test_picture_of_an_unknown_format(view: View, tmp_path: Path) -> None:
    for suffix in (".bmpx", ".pgf"):  # matplotlib has LaTeX draw the latter
        with pytest.raises(
            ConfigError, match=rf"the suffix '\{suffix}' is no picture format\. Use"
        ):
            view.draw(tmp_path / f"view{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [View.draw, View.write_graphml])
def test_no_such_folder(view: View, tmp_path: Path, write: object) -> None:
    assert callable(write)
    with pytest.raises(ConfigError, match=r"there is no folder .*\. Create it"):
        write(view, tmp_path / "missing" / "view.png")


def test_a_module_is_traced(view: View) -> None:
    assert str(inspect(Tagger(), torch.zeros(3, 2, dtype=torch.int64))) == str(view)


def test_a_module_needs_inputs() -> None:
    with pytest.raises(ConfigError, match="example_inputs is missing"):
        inspect(Tagger())


def test_a_program_takes_none(program: Program) -> None:
    with pytest.raises(ConfigError, match="a program has its example inputs"):
        inspect(program, torch.zeros(3, 2, dtype=torch.int64))


def test_what_tracing_fixed_is_among_the_refusals() -> None:
    view = inspect(nn.GRU(3, 4), torch.zeros(5, 1, 3))
    assert ("input[2]", "the model's code fixes it at 3") in [
        (refusal.node, refusal.reason) for refusal in view.refusals
    ]
