"""What a pass is: its options, what it may ask, what it hands back.

A pass is a frozen dataclass whose fields are its options; ``name`` is its class in kebab case and
``str(pass)`` its text form, so that command line, documents and code agree. It gets an immutable
program and *facts*, and returns a new program; the pipeline (:mod:`fxprune.pipeline`) owns the
call and checks both sides of it::

    @dataclass(frozen=True)
    class Magnitude(Pass):
        effect = Effect.LOSSY
        needs = (NeuronAnalysis,)       # what `facts` may be asked for
        keeps = frozenset({NeuronAnalysis})     # what is still true of the result

        sparsity: float

        def run(self, program: Program, facts: Facts) -> PassResult:
            neurons = facts[NeuronAnalysis]
            ...

Facts belong to one version of a program. After a pass those in ``keeps`` stay if the graph is the
very same object (analyses refer to its nodes); all others are computed anew when asked for.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from fxprune.analysis import Neurons, analyze
from fxprune.errors import ConfigError, PassError
from fxprune.policy_text import format_options
from fxprune.program import Program, Refusal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from fxprune.masking.masks import Masks
    from fxprune.training.task import Task

__all__ = [
    "Analysis",
    "Context",
    "Effect",
    "Facts",
    "NeuronAnalysis",
    "Pass",
    "PassResult",
    "Refusal",
    "check_choice",
    "check_count",
    "check_idle",
    "check_number",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Effect(Enum):
    """What a pass promises about the outputs of its result."""

    EXACT = auto()
    """The same outputs, within tolerance, as the program given."""
    LOSSY = auto()
    """Outputs may differ; input and output shapes may not."""


class Analysis(ABC, Generic[T_co]):
    """Something that can be found out about a program; the key under which facts keep it."""

    @classmethod
    @abstractmethod
    def compute(cls, program: Program) -> T_co:
        """Analyses the program, which is left as it is."""


class NeuronAnalysis(Analysis[Neurons]):
    """The neurons of the graph and the connections between them; masks do not change them."""

    @classmethod
    def compute(cls, program: Program) -> Neurons:
        return analyze(program)


@dataclass(frozen=True)
class Context:
    """What the user gave for all passes of one run.

    Attributes:
        task: how to train and judge the model; None if nothing may train.
        protect: globs over parameter names; see :func:`fxprune.policy.protected`.
        progress: whether to show progress on a terminal.
    """

    task: Task | None = None
    protect: tuple[str, ...] = ()
    progress: bool = True


class Facts:
    """Analyses of one version of a program, each computed when it is first asked for.

    Args:
        program: what they are about.
        context: what the user gave; the same for every pass.
        known: analyses already made of this very program.
    """

    def __init__(
        self,
        program: Program,
        context: Context | None = None,
        known: Mapping[type[Analysis[Any]], Any] | None = None,
    ) -> None:
        self._program = program
        self._known = dict(known or {})
        self._reader: Pass | None = None
        self.context = context or Context()

    def __getitem__(self, analysis: type[Analysis[T]]) -> T:
        """The result of an analysis.

        Raises:
            PassError: the pass that asks did not declare the analysis.
        """
        if self._reader is not None and analysis not in self._reader.needs:
            owner, wanted = type(self._reader).__name__, analysis.__name__
            raise PassError(
                f"class {owner} asks for facts[{wanted}] without declaring it. "
                f"Add {wanted} to {owner}.needs.",
                pass_name=self._reader.name,
            )
        if analysis not in self._known:
            self._known[analysis] = analysis.compute(self._program)
        found: T = self._known[analysis]
        return found

    def for_pass(self, reader: Pass) -> Facts:
        """These facts, limited to what the pass declares in ``needs``."""
        view = Facts(self._program, self.context)
        view._known, view._reader = self._known, reader  # shared: what one finds all may use
        return view

    def after(self, program: Program, keeps: Collection[type[Analysis[Any]]]) -> Facts:
        """The facts of the next version: those in ``keeps`` if it has the same graph, else none."""
        if program is self._program:
            return self
        same_graph = program.graph is self._program.graph
        kept = {a: found for a, found in self._known.items() if same_graph and a in keeps}
        return Facts(program, self.context, kept)


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass hands back.

    Attributes:
        program: the new version; the one given if nothing changed.
        changed: whether it differs from the program given.
        refusals: candidates left alone, each with the reason.
    """

    program: Program
    changed: bool
    refusals: tuple[Refusal, ...] = ()

    @classmethod
    def masking(
        cls, program: Program, masks: Masks, refusals: tuple[Refusal, ...] = ()
    ) -> PassResult:
        """What a pass hands back that only masks."""
        changed = not masks.same_as(program.masks)
        return cls(replace(program, masks=masks) if changed else program, changed, refusals)


class Pass(ABC):
    """Base of all passes; concrete ones are frozen dataclasses, their fields the options.

    Values out of range are refused in ``__post_init__`` (see :func:`check_number` and
    :func:`check_choice`), so that a pass that exists can run.

    Attributes:
        name: text name, the class in kebab case.
        effect: what it promises about outputs.
        needs: the analyses it asks for.
        keeps: the analyses that its change leaves true.
        needs_task: whether it has to train; without a task it is not started.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    needs: ClassVar[tuple[type[Analysis[Any]], ...]] = ()
    keeps: ClassVar[frozenset[type[Analysis[Any]]]] = frozenset()
    needs_task: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__)
        cls.name = cls.name.lower()

    @abstractmethod
    def run(self, program: Program, facts: Facts) -> PassResult:
        """Computes the next version of the program; the one given stays as it is."""

    def requires(self, program: Program, facts: Facts) -> None:  # noqa: B027 - optional
        """Raises PreconditionError if the program does not allow the pass."""

    def ensures(self, before: Program, result: PassResult) -> None:  # noqa: B027 - optional
        """Raises PostconditionError if the result breaks what the pass promises."""

    def __str__(self) -> str:
        """The text form, such as ``magnitude{sparsity=0.9}``; options at their default left out."""
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]  # concrete passes are dataclasses
            if f.init and getattr(self, f.name) != f.default
        }
        return self.name + format_options(given)


def check_number(
    pass_: Pass, option: str, low: float, high: float, *, positive: bool = False
) -> None:
    """Refuses an option that is not a number in ``[low, high)``, or 0 where it must be positive.

    Raises:
        ConfigError: with the option's name, value and range.
    """
    value = getattr(pass_, option)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value < high or (positive and value == 0):
        bracket = "(" if positive else "["
        bound = "more than" if positive else "at least"
        limit = f"{bound} {low:g}" if math.isinf(high) else f"in {bracket}{low:g}, {high:g})"
        raise ConfigError(
            f"option {option!r} of pass {pass_.name!r} must be a number {limit}, not {value!r}"
        )


def check_count(pass_: Pass, option: str, least: int = 1) -> None:
    """Refuses an option that is not an integer of at least so much.

    Raises:
        ConfigError: with the option's name, value and range.
    """
    value = getattr(pass_, option)
    if type(value) is not int or value < least:
        raise ConfigError(
            f"option {option!r} of pass {pass_.name!r} must be an integer, at least {least}, "
            f"not {value!r}"
        )


def check_choice(pass_: Pass, option: str, allowed: tuple[Any, ...]) -> None:
    """Refuses an option that is none of the values allowed.

    Raises:
        ConfigError: with the option's name, value, and what is allowed.
    """
    value = getattr(pass_, option)
    if not any(type(value) is type(a) and value == a for a in allowed):
        choices = ", ".join(map(str, allowed))
        raise ConfigError(
            f"option {option!r} of pass {pass_.name!r} must be one of {choices}, not {value!r}"
        )


def check_idle(pass_: Pass, options: Iterable[str], chosen: str) -> None:
    """Refuses options that have no effect with the others, unless they are at their default.

    Args:
        pass_: the pass.
        options: their names.
        chosen: what makes them idle, such as "criterion=std".

    Raises:
        ConfigError: with the option's name and that reason.
    """
    for option in sorted(options):
        if getattr(pass_, option) != getattr(type(pass_), option):
            raise ConfigError(
                f"option {option!r} of pass {pass_.name!r} has no effect with {chosen}: leave it "
                "out"
            )
