"""``analyze``: from a program to its neurons, groups and connections."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.analysis import (
    rules_contraction,
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
    from collections.abc import Iterator

    from fxprune.program import Program

__all__ = ["analyze"]

_RULES = {
    **rules_moving.RULES,
    **rules_pointwise.RULES,
    **rules_contraction.RULES,
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


def _result(walker: Walker) -> Neurons:
    root = walker.ledger.resolve()
    names, compact = torch.unique(root, return_inverse=True)
    count = len(names)

    def number(ids: Tensor) -> Tensor:
        return torch.where(ids < 0, ids, compact[ids.clamp(min=0)])

    reasons: dict[int, str] = {}
    free = torch.ones(count, dtype=torch.bool)
    for ids, reason in walker.ledger.frozen:
        found = number(ids).unique()
        free[found] = False
        if len(found):
            reasons.setdefault(int(found[0]), reason)
    blocks = _blocks(walker, number)
    groups = _groups(walker, number, blocks, free)
    produced = torch.zeros(count, dtype=torch.bool)
    for group in groups:
        produced[group.neurons] = True
    neurons = Neurons(
        count=count,
        groups=groups,
        blocks=blocks,
        readers=tuple(
            Reader(
                r.node,
                r.operand,
                number(r.neurons) if r.kind == "state" else collapse(number(r.neurons)),
                r.kind,
            )
            for r in walker.reads
        ),
        labels={n: _numbered(label, number) for n, label in walker.labels.items()},
        owned={
            name: _numbered(walker.labels[n], number)
            for n, name in ((n, str(n.target)) for n in walker.labels if n.op == "get_attr")
        },
        entries=tuple(Entry(c, state, number(ids)) for c, state, ids in walker.entries),
        free=free & produced,
        refusals=tuple(walker.refusals),
    )
    return classify(neurons, walker.program)


def _numbered(label: Any, number: Any) -> Any:
    if isinstance(label, Axis):
        return collapse(number(label.ids))
    if isinstance(label, list):
        return [_numbered(part, number) for part in label]
    return tuple(_numbered(part, number) for part in label)


def _blocks(walker: Walker, number: Any) -> tuple[Block, ...]:
    seen: Counter[str] = Counter()
    blocks = []
    for use in walker.uses:
        seen[use.weight] += 1
        suffix = f"#{seen[use.weight]}" if seen[use.weight] > 1 else ""
        blocks.append(
            Block(
                name=use.weight + suffix,
                weight=use.weight,
                operand=use.operand,
                consumer=use.consumer,
                sources=number(use.sources),
                destinations=number(use.destinations),
                shape=walker.shape(use.operand),
            )
        )
    return tuple(blocks)


def _groups(
    walker: Walker, number: Any, blocks: tuple[Block, ...], free: Tensor
) -> tuple[Group, ...]:
    """Producers that share a neuron are one group, named after the first."""
    recurrent = {n for n, _ in walker.units}
    producers: list[tuple[str, Tensor, bool]] = []
    for node, label in walker.labels.items():
        if node.op == "placeholder":
            producers.extend((node.name, number(a.ids), False) for a in label)
    for block in blocks:
        unit = block.consumer.name in recurrent and not block.weight.rpartition(".")[2].startswith(
            "weight_hr"
        )
        producers.append((_producer_name(block.weight), block.destinations, unit))
    owner = torch.full((len(free),), -1, dtype=torch.int64)
    parent: list[int] = []

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for index, (_, ids, _unit) in enumerate(producers):
        parent.append(index)
        own = ids[ids >= 0].unique()
        for other in owner[own].unique().tolist():
            if other >= 0:
                a, b = sorted((find(other), find(index)))
                parent[b] = a
        owner[own] = torch.where(owner[own] < 0, index, owner[own])
    members: dict[int, list[int]] = {}
    owned = owner.tolist()
    for neuron, producer in enumerate(owned):
        if producer >= 0:
            members.setdefault(find(producer), []).append(neuron)
    kinds: dict[int, bool] = {}
    for index, (_, _ids, unit) in enumerate(producers):
        kinds[find(index)] = kinds.get(find(index), False) or unit
    reasons = _reasons(walker, number, len(free))
    groups = []
    taken: Counter[str] = Counter()
    for index in sorted(members):
        neurons = torch.tensor(members[index], dtype=torch.int64)
        name = producers[index][0]
        taken[name] += 1
        reason = next((reasons[n] for n in members[index] if n in reasons), "")
        groups.append(
            Group(
                name=name if taken[name] == 1 else f"{name}#{taken[name]}",
                neurons=neurons,
                free=free[neurons],
                recurrent=kinds[index],
                reason=reason,
            )
        )
    return tuple(groups)


def _reasons(walker: Walker, number: Any, count: int) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for ids, reason in reversed(walker.ledger.frozen):
        reasons.update(dict.fromkeys(number(ids).unique().tolist(), reason))
    return reasons


def _producer_name(weight: str) -> str:
    """``encoder.weight_ih_l0_reverse`` -> ``encoder.l0_reverse``; ``fc.weight`` -> ``fc``."""
    module, _, leaf = weight.rpartition(".")
    for prefix in ("weight_ih", "weight_hh", "weight_hr"):
        if leaf.startswith(prefix):
            suffix = leaf.removeprefix(prefix).removeprefix("_")
            outputs = "outputs" if prefix == "weight_hr" else ""
            return ".".join(filter(None, (module, suffix, outputs))) or weight
    return module if leaf == "weight" and module else weight
