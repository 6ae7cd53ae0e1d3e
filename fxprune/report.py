"""What a compilation did: counts, what was left alone and why, and how it was verified."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fxprune.analysis.neurons import ConnectionClass
from fxprune.masking.counting import BlockCount, Count, Counts, GroupCount
from fxprune.program import Refusal
from fxprune.tables import render_pairs, render_table

__all__ = ["Report", "Verification"]

_SHOWN = 40  # rows of a table; the rest is in to_dict()


@dataclass(frozen=True)
class Verification:
    """How the compact program was compared with the masked one.

    Attributes:
        sizes: what was tried, such as ``"batch=3, time=7"``, the example's first.
        max_abs_error: largest absolute difference over all of them.
        tolerance: the difference that was allowed, as a share of the output's scale.
        chaotic: rounding alone changes the outputs noticeably, so fewer steps were compared.
    """

    sizes: tuple[str, ...]
    max_abs_error: float
    tolerance: float
    chaotic: bool = False


@dataclass(frozen=True)
class Report:
    """What a compilation did; ``str()`` is a table.

    Attributes:
        counts: neurons, connections and parameters before and after.
        macs: multiply-accumulate operations of one call at the example's sizes.
        kept: for every parameter the kept indices along each of its dimensions.
        verification: how the compact program was compared with the masked one.
        refusals: what was left as it was, and why.
        notes: what else is worth knowing: dimensions that are fixed, states that shrank, inputs
            that the outputs no longer follow.
        policy: the policy as text.
    """

    counts: Counts
    macs: Count
    kept: Mapping[str, tuple[tuple[int, ...], ...]]
    verification: Verification
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    policy: str = ""

    @property
    def parameters_before(self) -> int:
        """Entries of all parameters of the model."""
        return self.counts.parameters.before

    @property
    def parameters_after(self) -> int:
        """Entries of all parameters of the compact module."""
        return self.counts.parameters.after

    @property
    def macs_before(self) -> int:
        """Multiply-accumulate operations of one call of the model."""
        return self.macs.before

    @property
    def macs_after(self) -> int:
        """Multiply-accumulate operations of one call of the compact module."""
        return self.macs.after

    @property
    def sparsity(self) -> float:
        """The fraction of all connections that is gone, by masks or with a neuron."""
        return self.counts.connections.removed

    @property
    def by_class(self) -> Mapping[ConnectionClass, Count]:
        """Connections before and after, by class."""
        return self.counts.by_class

    @property
    def groups(self) -> tuple[GroupCount, ...]:
        """Neurons before and after, by group."""
        return self.counts.groups

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference between the compact and the masked program."""
        return self.verification.max_abs_error

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: what :meth:`to_json` writes and :meth:`from_dict` reads."""
        return {
            "policy": self.policy,
            "parameters": asdict(self.counts.parameters),
            "macs": asdict(self.macs),
            "connections": asdict(self.counts.connections),
            "sparsity": self.sparsity,
            "by_class": {kind.value: asdict(n) for kind, n in self.by_class.items()},
            "groups": [asdict(group) for group in self.groups],
            "blocks": [
                {**asdict(block), "connection_class": block.connection_class.value}
                for block in self.counts.blocks
            ],
            "verification": {**asdict(self.verification), "sizes": list(self.verification.sizes)},
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "notes": list(self.notes),
            "kept": {name: [list(i) for i in indices] for name, indices in self.kept.items()},
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_dict` took apart, also after a trip through JSON."""
        check = values["verification"]
        return cls(
            counts=_counts(values),
            macs=Count(**values["macs"]),
            kept={n: tuple(tuple(i) for i in dims) for n, dims in values["kept"].items()},
            verification=Verification(**{**check, "sizes": tuple(check["sizes"])}),
            refusals=tuple(Refusal(**refusal) for refusal in values["refusals"]),
            notes=tuple(values["notes"]),
            policy=values["policy"],
        )

    def __str__(self) -> str:
        sections = [_summary(self), _table_of_groups(self.groups), _table_of_classes(self)]
        if self.refusals:
            rows = [(refusal.node, refusal.reason) for refusal in self.refusals]
            sections.append(render_table(("left as it was", "reason"), rows, limit=_SHOWN))
        return "\n\n".join(section for section in sections if section)


def _summary(report: Report) -> str:
    checked = report.verification
    pairs: list[tuple[str, object]] = [("policy", report.policy)] if report.policy else []
    pairs += [
        ("parameters", _change(report.counts.parameters)),
        ("MACs per call", _change(report.macs)),
        ("connections", _change(report.counts.connections)),
        ("verified at", "; ".join(checked.sizes)),
        (
            "largest error",
            f"{checked.max_abs_error:.2g} (allowed: {checked.tolerance:.2g} of scale)",
        ),
    ]
    if checked.chaotic:
        pairs.append(("note", "the model is chaotic: rounding grows, so few steps were compared"))
    pairs += [("note", note) for note in report.notes]
    return render_pairs(pairs)


def _change(count: Count) -> str:
    change = "unchanged" if count.before == count.after else f"{-count.removed:+.1%}"
    return f"{count.before:,} -> {count.after:,} ({change})"


def _table_of_groups(groups: Sequence[GroupCount]) -> str:
    columns = ("group", "neurons", "left", "removed", "recurrent", "kept because")
    rows = [
        (
            g.name,
            g.neurons.before,
            g.neurons.after,
            f"{g.neurons.removed:.1%}",
            g.recurrent,
            g.reason,
        )
        for g in groups
    ]
    return render_table(columns, rows, limit=_SHOWN) if rows else ""


def _table_of_classes(report: Report) -> str:
    columns = ("connections", "before", "left", "removed")
    rows = [
        (kind.value, n.before, n.after, f"{n.removed:.1%}") for kind, n in report.by_class.items()
    ]
    return render_table(columns, rows) if rows else ""


def _counts(values: Mapping[str, Any]) -> Counts:
    return Counts(
        groups=tuple(
            GroupCount(**{**group, "neurons": Count(**group["neurons"])})
            for group in values["groups"]
        ),
        blocks=tuple(
            BlockCount(
                block["name"],
                ConnectionClass(block["connection_class"]),
                Count(**block["connections"]),
            )
            for block in values["blocks"]
        ),
        by_class={ConnectionClass(k): Count(**n) for k, n in values["by_class"].items()},
        parameters=Count(**values["parameters"]),
    )
