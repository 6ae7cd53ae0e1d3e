"""``analyze``: from a program to its neurons, groups and connections."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fxprune.analysis import (
    rules_contraction,
    rules_convolution,
    rules_einsum,
    rules_moving,
    rules_pointwise,
    rules_recurrent,
    rules_reducing,
)
from fxprune.analysis.boundary import Boundary, find_boundary
from fxprune.analysis.classes import classify
from fxprune.analysis.labels import Axis, collapse, varying
from fxprune.analysis.neurons import Block, Entry, Group, Neurons, Reader
from fxprune.analysis.walker import Walker

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fxprune.program import Program

__all__ = ["analyze"]

_RULES = {
    **rules_moving.RULES,
    **rules_pointwise.RULES,
    **rules_contraction.RULES,
    **rules_convolution.RULES,
    **rules_einsum.RULES,
    **rules_reducing.RULES,
    **rules_recurrent.RULES,
}


def analyze(program: Program) -> Neurons:
    """Finds the neurons of a program and the connections between them.

    The cost is linear in the size of the graph: one walk, one connected-components search.

    Args:
        program: a traced program, never rewritten since.

    Example:
        >>> from fxprune.tracing.tracer import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> [(g.name, g.size, g.frozen) for g in analyze(trace(model, torch.zeros(1, 3))).groups]
        [('input', 3, True), ('0', 4, False), ('1', 2, True)]
    """
    boundary = find_boundary(program)
    keep = program.states == "keep"
    walker = Walker(
        program,
        _RULES,
        boundary=boundary if keep else None,
        shrunk=frozenset() if keep else _shrunk_states(boundary),
    )
    walker.walk()
    _make_rectangular(walker)
    return _result(walker)


def _shrunk_states(boundary: Boundary) -> frozenset[fx.Node]:
    placeholders = {n for n in boundary.inputs if n.op == "placeholder"}
    return frozenset(placeholders | set(boundary.outputs))


def _all_axes(walker: Walker) -> Iterator[tuple[Any, Axis]]:
    def flat(label: Any) -> Iterator[Axis]:
        if isinstance(label, Axis):
            yield label
        else:
            for part in label:
                yield from flat(part)

    for node, label in walker.labels.items():
        for axis in flat(label):
            yield node, axis


def _make_rectangular(walker: Walker) -> None:
    """Whatever is removed must leave every tensor a rectangle.

    An axis whose neurons change along several dimensions would become ragged, so one position
    of all slices along the first of them is made one neuron. Later axes over the same neurons
    see that first: a split and its transpose must not couple both ways.
    """
    axes = [a for _, a in _all_axes(walker) if len(a.dims) > 1]
    while axes:
        root = walker.ledger.resolve()
        touched = torch.zeros(walker.ledger.count, dtype=torch.bool)
        ragged = []
        for axis in axes:
            ids = torch.where(axis.ids < 0, axis.ids, root[axis.ids.clamp(min=0)])
            ids = collapse(ids)
            dims = varying(ids)
            if len(dims) < 2:
                continue
            ragged.append(axis)
            known = ids[ids >= 0]
            if not bool(touched[known].any()):
                walker.ledger.unify(ids, ids.narrow(dims[0], 0, 1))
            touched[known] = True
        axes = ragged


class _Numbering:
    """Final numbers for those handed out in the walk; arrays that were one object stay one."""

    def __init__(self, final: NDArray[np.int64]) -> None:
        self._final = np.append(final, -1)  # so that -1 stays -1
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """The array with final numbers."""
        return torch.from_numpy(self._final[ids.numpy()])

    def collapsed(self, ids: Tensor) -> Tensor:
        """The array with final numbers, repetition dropped."""
        if id(ids) not in self._known:
            self._known[id(ids)] = ids, collapse(self(ids))
        return self._known[id(ids)][1]

    def label(self, label: Any) -> Any:
        """A label with final numbers."""
        if isinstance(label, Axis):
            return self.collapsed(label.ids)
        if isinstance(label, list):
            return [self.label(part) for part in label]
        return tuple(self.label(part) for part in label)


def _result(walker: Walker) -> Neurons:
    names, final = np.unique(walker.ledger.resolve().numpy(), return_inverse=True)
    count = len(names)
    number = _Numbering(final)
    reason_of = torch.full((count,), -1)
    for index, (ids, _) in reversed(list(enumerate(walker.ledger.frozen))):
        reason_of[number(ids)] = index
    blocks = _blocks(walker, number)
    groups = _groups(walker, number, blocks, reason_of)
    produced = torch.zeros(count, dtype=torch.bool)
    for group in groups:
        produced[group.neurons] = True
    labels = {n: number.label(label) for n, label in walker.labels.items()}
    neurons = Neurons(
        count=count,
        groups=groups,
        blocks=blocks,
        readers=tuple(
            Reader(
                r.node,
                r.operand,
                number(r.neurons) if r.kind == "state" else number.collapsed(r.neurons),
                r.kind,
            )
            for r in walker.reads
        ),
        labels=labels,
        owned={str(n.target): label for n, label in labels.items() if n.op == "get_attr"},
        entries=tuple(Entry(c, state, number(ids)) for c, state, ids in walker.entries),
        free=(reason_of < 0) & produced,
        refusals=tuple(walker.refusals),
    )
    return classify(neurons, walker.program)


def _blocks(walker: Walker, number: _Numbering) -> tuple[Block, ...]:
    seen: Counter[str] = Counter()
    blocks = []
    for use in walker.uses:
        weights = tuple(dict.fromkeys(str(root.target) for root in walker.roots(use.operand)))
        name = "+".join(weights)
        seen[name] += 1
        blocks.append(
            Block(
                name=name if seen[name] == 1 else f"{name}#{seen[name]}",
                weights=weights,
                operand=use.operand,
                consumer=use.consumer,
                place=use.place,
                sources=number(use.sources),
                destinations=number(use.destinations),
                shape=walker.shape(use.operand),
            )
        )
    return tuple(blocks)


def _groups(
    walker: Walker, number: _Numbering, blocks: tuple[Block, ...], reason_of: Tensor
) -> tuple[Group, ...]:
    """Producers that share a neuron are one group, named after the first."""
    producers = _producers(walker, number, blocks)
    groups = []
    taken: Counter[str] = Counter()
    for members, neurons in _connected([ids for _, ids, _ in producers], len(reason_of)):
        name = producers[members[0]][0]
        taken[name] += 1
        reasons = reason_of[neurons]
        frozen = reasons >= 0
        first = int(reasons[frozen][0]) if bool(frozen.any()) else None
        groups.append(
            Group(
                name=name if taken[name] == 1 else f"{name}#{taken[name]}",
                neurons=neurons,
                free=~frozen,
                recurrent=any(producers[i][2] for i in members),
                reason="" if first is None else walker.ledger.frozen[first][1],
            )
        )
    return tuple(groups)


def _producers(
    walker: Walker, number: _Numbering, blocks: tuple[Block, ...]
) -> list[tuple[str, Tensor, bool]]:
    """What produces neurons: its name, the neurons, and whether they are recurrent units."""
    recurrent = {n for n, _ in walker.units}
    inputs = [n for n in walker.labels if n.op == "placeholder"]

    def entering(nodes: Iterable[fx.Node]) -> list[tuple[str, Tensor, bool]]:
        return [(n.name, number(a.ids), False) for n in nodes for a in walker.labels[n]]

    producers = entering(n for n in inputs if n not in walker.shrunk)
    for block in blocks:
        projected = block.weight.rpartition(".")[2].startswith("weight_hr")
        unit = block.consumer.name in recurrent and not projected
        producers.append((_producer_name(block.weight), block.destinations, unit))
    # A state that shrinks with the layer it starts comes last: the layer gives the name.
    return producers + entering(n for n in inputs if n in walker.shrunk)


def _connected(produced: list[Tensor], count: int) -> list[tuple[list[int], Tensor]]:
    """Producers that share neurons, and the neurons of all of them, ascending.

    Args:
        produced: the neurons of each producer.
        count: number of neurons.
    """
    if not produced:
        return []
    flat = torch.cat([ids.reshape(-1) for ids in produced]).numpy()
    owner = np.repeat(np.arange(len(produced)), [ids.numel() for ids in produced])
    owner, flat = owner[flat >= 0], flat[flat >= 0]
    size = len(produced) + count
    edges = coo_matrix((np.ones(len(flat), bool), (owner, len(produced) + flat)), (size, size))
    _, component = connected_components(edges, directed=False)
    members: dict[int, list[int]] = {}
    for index, part in enumerate(component[: len(produced)].tolist()):
        members.setdefault(part, []).append(index)
    neurons = np.unique(flat)
    part_of = component[len(produced) + neurons]
    order = np.argsort(part_of, kind="stable")
    parts = np.split(neurons[order], np.flatnonzero(np.diff(part_of[order])) + 1)
    found = {int(component[len(produced) + p[0]]): torch.from_numpy(p) for p in parts if len(p)}
    return [(indices, found[part]) for part, indices in members.items() if part in found]


def _producer_name(weight: str) -> str:
    """``encoder.weight_ih_l0_reverse`` -> ``encoder.l0_reverse``; ``fc.weight`` -> ``fc``."""
    module, _, leaf = weight.rpartition(".")
    for prefix in ("weight_ih", "weight_hh", "weight_hr"):
        if leaf.startswith(prefix):
            suffix = leaf.removeprefix(prefix).removeprefix("_")
            outputs = "outputs" if prefix == "weight_hr" else ""
            return ".".join(filter(None, (module, suffix, outputs))) or weight
    return module if leaf == "weight" and module else weight
