"""Policies: which passes run, with which options, and what they must leave alone.

A policy is written in Python, as text or as a TOML file; :func:`as_policy` reads all three::

    Policy((Magnitude(sparsity=0.5),), protect=("decoder.*",))

    protect=[decoder.*];magnitude{sparsity=0.5}

    protect = ["decoder.*"]
    [[pass]]
    name = "magnitude"
    sparsity = 0.5

Which passes there are is not known here: callers give the table of their names.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from fxprune.analysis import ConnectionClass
from fxprune.contract import Pass
from fxprune.errors import ConfigError
from fxprune.policy_text import Item, Place, format_value, nearest, parse_items
from fxprune.program import Kind

if TYPE_CHECKING:
    from fxprune.analysis import Neurons
    from fxprune.program import Program

__all__ = ["Policy", "Protection", "as_policy", "protected"]

_SETTINGS = ("protect", "states")


@dataclass(frozen=True)
class Policy:
    """Passes in the order they are applied, and what holds for all of them.

    ``str(policy)`` is its text form; :func:`as_policy` reads it back.

    Attributes:
        passes: a list of them, or one; an empty list prunes nothing.
        protect: globs over parameter names, such as ``encoder.*``; see :func:`protected`.
        states: whether recurrent states that are inputs or outputs of the model keep their shape
            ("keep") or get smaller with their layer ("shrink").

    Raises:
        ConfigError: an attribute is of the wrong kind.
    """

    passes: Sequence[Pass]
    protect: Sequence[str] = ()
    states: Literal["keep", "shrink"] = "keep"

    def __post_init__(self) -> None:
        protect = _listed(self.protect)
        if protect is None or not all(isinstance(p, str) for p in protect):
            raise ConfigError(
                f"protect must be a list of patterns such as ['encoder.*'], not {self.protect!r}"
            )
        if self.states not in ("keep", "shrink"):
            raise ConfigError(f"states must be 'keep' or 'shrink', not {self.states!r}")
        passes = (self.passes,) if isinstance(self.passes, Pass) else _listed(self.passes)
        for given in (self.passes,) if passes is None else passes:
            if not isinstance(given, Pass):
                raise ConfigError(f"a policy holds passes, not {_describe(given)}")
        object.__setattr__(self, "passes", passes)
        object.__setattr__(self, "protect", protect)

    def __str__(self) -> str:
        settings = [
            f"{f.name}={format_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if f.name in _SETTINGS and getattr(self, f.name) != f.default
        ]
        return ";".join([*settings, *map(str, self.passes)])


def _listed(given: Any) -> tuple[Any, ...] | None:
    """The entries of a list, or of anything like one; None if it is none."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else None


def as_policy(
    policy: Policy | Pass | Sequence[Pass] | str | Path, table: Mapping[str, type[Pass]]
) -> Policy:
    """Reads a policy in any of its forms.

    Args:
        policy: a policy, a pass, several, the text form, or the path of a TOML file (a path
            object, or a text that ends in ``.toml``).
        table: the passes there are, by name.

    Raises:
        ConfigError: the policy is wrong; the message names the pass or option, the place, and
            what is allowed.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Pass):
        return Policy((policy,))
    if isinstance(policy, str):
        in_file = policy.strip().endswith(".toml")
        return _from_items(_read_toml(Path(policy)) if in_file else parse_items(policy), table)
    if isinstance(policy, Path):
        return _from_items(_read_toml(policy), table)
    if isinstance(policy, list | tuple):
        return Policy(policy)
    raise ConfigError(
        "a policy is a pass, a list of passes, a Policy, a text such as "
        f"'magnitude{{sparsity=0.5}}' or the path of a TOML file, not {_describe(policy)}"
    )


def _describe(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, Pass):
        return f"the class {value.__name__}: make one, such as {value.__name__}(...)"
    return f"{value!r} ({type(value).__name__})"


# From items to passes --------------------------------------------------------------------------


def _from_items(items: list[Item], table: Mapping[str, type[Pass]]) -> Policy:
    settings: dict[str, Any] = {}
    for item in items:
        if not item.setting:
            continue
        if item.name not in _SETTINGS:
            raise ConfigError(
                f"unknown setting {item.name!r}, {item.place}. Settings are "
                f"{', '.join(_SETTINGS)}.{nearest(item.name, _SETTINGS)}"
            )
        if item.name in settings:
            raise ConfigError(f"setting {item.name!r} is given twice, {item.place}")
        settings[item.name] = item.options[""][0]
    passes = [_make_pass(item, table) for item in items if not item.setting]
    return Policy(tuple(passes), **settings)


def _make_pass(item: Item, table: Mapping[str, type[Pass]]) -> Pass:
    if item.name not in table:
        raise ConfigError(
            f"unknown pass {item.name!r}, {item.place}. There are {', '.join(sorted(table))}."
            f"{nearest(item.name, table)}"
        )
    made = table[item.name]
    allowed = {f.name: f for f in dataclasses.fields(made) if f.init}  # type: ignore[arg-type]
    for option, (_, place) in item.options.items():
        if option not in allowed:
            raise ConfigError(
                f"pass {item.name!r} has no option {option!r}, {place}. Its options are "
                f"{', '.join(allowed)}.{nearest(option, allowed)}"
            )
    for option, field in allowed.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and option not in item.options:
            raise ConfigError(f"pass {item.name!r} needs the option {option!r}, {item.place}")
    try:
        return made(**{option: value for option, (value, _) in item.options.items()})
    except ConfigError as error:
        raise ConfigError(f"{error}, {item.place}") from error


def _read_toml(path: Path) -> list[Item]:
    """Reads a policy file into the items that its text form would have."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the policy file {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    source = str(path)
    tables = content.pop("pass", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"'pass' must be written [[pass]], once for each pass, in {source}")
    items = []
    for name, value in content.items():
        place = Place(source, "at the top")
        items.append(Item(name, place, {"": (_frozen(value), place)}, setting=True))
    for number, options in enumerate(tables, 1):
        place = Place(source, f"in [[pass]] number {number}")
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f'the pass needs a name, such as name = "magnitude", {place}')
        items.append(Item(name, place, {o: (_frozen(v), place) for o, v in options.items()}))
    return items


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


# Protection ------------------------------------------------------------------------------------


class Protection(NamedTuple):
    """What passes must leave alone.

    Attributes:
        tensors: names of tensors of which no entry may be masked.
        neurons: bool [count], True for neurons that must stay.
    """

    tensors: frozenset[str]
    neurons: Tensor


def protected(program: Program, neurons: Neurons, patterns: Sequence[str]) -> Protection:
    """Finds what ``protect`` patterns protect.

    No entry of a matching parameter is masked, and the neurons it produces stay: the outputs of
    a weight, the channels of an embedding, the units of a recurrent operation for any tensor that
    the operation reads, the neurons of a bias or gain. Columns of a protected weight still go
    with the neurons that feed them.

    Args:
        program: the program.
        neurons: its analysis.
        patterns: globs (``*``, ``?``, ``[...]``) over parameter names; every name of a tied
            parameter counts.

    Raises:
        ConfigError: a pattern matches no parameter; the message lists those that come close.
    """
    tensors = _matching(program, patterns)
    kept = torch.zeros(neurons.count, dtype=torch.bool)
    if tensors:
        weights = {name for b in neurons.blocks if len(b.weights) == 1 for name in b.weights}
        units = _protected_operations(neurons, tensors)
        for block in neurons.blocks:
            whole = len(block.weights) == 1 and block.weight in tensors
            if whole or block.consumer in units:
                _mark(kept, block.destinations)
        for name in tensors - weights:
            for axis in neurons.owned.get(name, ()):
                _mark(kept, axis)
    return Protection(tensors, kept)


def _matching(program: Program, patterns: Sequence[str]) -> frozenset[str]:
    parameters = {n: n for n, kind in program.kinds.items() if kind is Kind.PARAMETER}
    names = parameters | {a: n for a, n in program.aliases.items() if n in parameters}
    found: set[str] = set()
    for pattern in patterns:
        matches = {tensor for name, tensor in names.items() if fnmatchcase(name, pattern)}
        if not matches:
            hint = nearest(pattern, names)
            if any(name.startswith(f"{pattern}.") for name in names):
                hint = f" Did you mean {pattern + '.*'!r}?"
            elif names and not hint:
                hint = f" Names look like {next(iter(names))!r}."
            raise ConfigError(f"protect pattern {pattern!r} matches no parameter.{hint}")
        found |= matches
    return frozenset(found)


def _protected_operations(neurons: Neurons, tensors: frozenset[str]) -> set[fx.Node]:
    """Recurrent operations that read a protected tensor: all their units stay."""
    recurrent = {
        b.consumer for b in neurons.blocks if b.connection_class is ConnectionClass.RECURRENT
    }
    reads = {(b.consumer, n) for b in neurons.blocks if b.consumer in recurrent for n in b.weights}
    reads |= {
        (op, str(n.target)) for op in recurrent for n in op.all_input_nodes if n.op == "get_attr"
    }
    return {op for op, tensor in reads if tensor in tensors}


def _mark(flags: Tensor, numbers: Tensor) -> None:
    flags[numbers[numbers >= 0]] = True
