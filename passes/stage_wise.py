"""Stage-wise magnitude pruning: one ratio for each class of connections, found by search.

Connections are grouped by how they meet recurrent neurons: recurrent ones, those that feed
recurrent neurons, and feedforward ones, the last layer by layer. With ``x`` the ratios removed of
the groups, ``S(x)`` the share removed of all, ``m0`` the unpruned model's metric::

    maximize S(x)  subject to  m(x) no worse than m0 by more than the tolerance

A round searches on the present model, masks what weighs least, and retrains under fixed masks;
the next one starts there and only adds to it. A round whose best epoch is worse than ``m0`` by
more than ``recovery``, or whose training breaks down where that of an earlier one did not, is
undone, and later searches go half as far beyond the recovery; after ``retries`` of them the next
one ends the stage. The last recovered model is the result:

    1. ``joint``: all groups are one stage.
    2. ``sequential``: each class is a stage, in the order of ``classes``; the ratios of the others
       stay as they are. ``rounds`` counts for each stage. ``m0`` stays the first model's.

The metric is the task's, on its validation data, and nothing else is looked at. A search starts
from the present model, which is within the tolerance, and spreads from there, so that its answer
is too. Ratios are of what was there when the pass started; how a group loses its lowest, exactly,
is told in :mod:`fxprune.masking.ratios`, and so is which group a tied tensor belongs to. Biases
are not pruned.

Left alone, each with its reason: what is protected; what no operation contracts with; and what
every stage left, with the reason for its end. If nothing recovers, the program is unchanged.

Source: Li, Yang, Qian, Hong, Tang, TNNLS 2022, https://doi.org/10.1109/tnnls.2022.3184730.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fxprune.contract import (
    Effect,
    Facts,
    NeuronAnalysis,
    Pass,
    PassResult,
    Refusal,
    check_choice,
    check_count,
    check_idle,
    check_number,
)
from fxprune.errors import ConfigError
from fxprune.masking.prunable import find_prunable
from fxprune.masking.ratios import RatioGroup, ratio_groups
from fxprune.passes._stage_wise_rounds import Rounds, Stage
from fxprune.policy import protected
from fxprune.search import (
    BisectionSearch,
    CmaSearch,
    NegativelyCorrelatedSearch,
    RandomSearch,
    Search,
)

if TYPE_CHECKING:
    from fxprune.program import Program
    from fxprune.search.base import Array

__all__ = ["StageWise"]

CLASSES = ("feedforward", "input", "recurrent")


@dataclass(frozen=True)
class StageWise(Pass):
    """Removes as many connections as a metric allows, and retrains, in rounds.

    Attributes:
        tolerance: how much worse than the unpruned model a candidate of the search may be, in the
            metric's unit.
        classes: the connection classes to prune; with order "sequential" in this order.
        order: search all classes together ("joint", default) or one after another ("sequential").
        rounds: at most so many rounds of search and retraining for each stage.
        population: candidates per generation of a search; 1 for plain bisection.
        generations: generations of a search.
        relative: tolerance and recovery are fractions of the unpruned model's metric, as suits
            losses and perplexity.
        search: "ncs" (default), negatively correlated search; "random"; "bisection", one ratio for
            all groups; "cma", CMA-ES, which needs the package cma; a single ratio it leaves to
            bisection.
        recovery: how much worse than the unpruned model a retrained one may be, in the unit of
            the tolerance and no more than it; 0 (default) as published.
        retries: how many rounds of a stage may fail to recover before the next ends it; 0 as
            published.
        grouping: which weights share a ratio: those of a class ("class", default; feedforward ones
            by layer), of a layer ("layer"), or all ("one").
        step: first standard deviation of the search "ncs", as a fraction of the range of ratios
            that is left; 0.1 (default) suits 20 generations, 0.05 was published for 100.
        most: the largest ratio removed of a group.
        executor: evaluates candidates: any concurrent.futures.Executor, None (default) for this
            process. Threads share the global random state, so with them a metric that draws
            random numbers varies. It has no text form, and passes that differ in it are equal.

    Raises:
        ConfigError: an option is out of range, or has no effect with the others.

    Example:
        >>> str(StageWise(0.01, order="sequential", classes=("input", "recurrent")))
        'stage-wise{tolerance=0.01,classes=[input,recurrent],order=sequential}'
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})
    needs_task = True

    tolerance: float
    classes: Sequence[str] = CLASSES
    order: Literal["joint", "sequential"] = "joint"
    rounds: int = 5
    population: int = 8
    generations: int = 20
    relative: bool = False
    search: Literal["ncs", "random", "bisection", "cma"] = "ncs"
    recovery: float = 0.0
    retries: int = 2
    grouping: Literal["class", "layer", "one"] = "class"
    step: float = 0.1
    most: float = 0.999
    executor: Executor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_number(self, "tolerance", 0, np.inf)
        check_number(self, "recovery", 0, np.inf)
        check_number(self, "step", 1e-6, 1)
        check_number(self, "most", 0, 1)
        check_choice(self, "order", ("joint", "sequential"))
        check_choice(self, "relative", (False, True))
        check_choice(self, "search", ("ncs", "random", "bisection", "cma"))
        check_choice(self, "grouping", ("class", "layer", "one"))
        for option in ("rounds", "population", "generations"):
            check_count(self, option, 4 if (self.search, option) == ("cma", "population") else 1)
        check_count(self, "retries", 0)
        if self.search != "ncs":
            check_idle(self, ("step",), f"search={self.search}")
        self._check_classes()
        if self.recovery > self.tolerance:
            raise ConfigError(
                f"option 'recovery' of pass {self.name!r} must be at most the tolerance "
                f"{self.tolerance!r}, not {self.recovery!r}: searches start from recovered models"
            )
        if self.order == "sequential" and self.grouping != "class":
            raise ConfigError(
                f"option 'grouping' of pass {self.name!r} must be class where order is "
                f"sequential, not {self.grouping!r}: its stages are classes"
            )
        if self.executor is not None and not isinstance(self.executor, Executor):
            raise ConfigError(
                f"option 'executor' of pass {self.name!r} must be a concurrent.futures.Executor, "
                f"given in Python, not {self.executor!r}"
            )

    def __str__(self) -> str:
        """The text form, without the executor."""
        return Pass.__str__(self if self.executor is None else replace(self, executor=None))

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Adds to the masks of the program and trains its weights, in tensors of its own.

        Raises:
            PreconditionError: the executor runs other processes, and the model or the task's
                validate cannot be sent there.
            TrainingError: the task cannot be trained or evaluated.
        """
        neurons, task = facts[NeuronAnalysis], facts.context.task
        assert task is not None  # the pipeline starts no pass that needs a task without one
        found = find_prunable(program, neurons, protected(program, neurons, facts.context.protect))
        groups = ratio_groups(found, self.classes, self.grouping)
        if not groups:
            reason = f"no connections of the classes {', '.join(self.classes)} may be removed"
            return PassResult(program, False, (*found.kept_weights, Refusal(self.name, reason)))
        stages = self._stages(groups)
        rounds = Rounds(self, program, neurons, task, groups, stages, facts.context.progress)
        rounds()
        refusals = (*found.kept_weights, *self._refusals(rounds, stages))
        return PassResult(rounds.program, rounds.state.recovered > 0, refusals)

    def new_search(self, low: Array, high: Array, seed: Sequence[int]) -> Search:
        """A search over ratios between two bounds, [groups], the lower ones allowed."""
        size, generations = self.population, self.generations
        alone = self.search == "cma" and len(low) == 1  # CMA-ES has no covariance to adapt there
        if self.search == "bisection" or alone:
            return BisectionSearch(low, high, population=size, generations=generations)
        if self.search == "random":
            return RandomSearch(low, high, population=size, generations=generations, seed=seed)
        if self.search == "cma":
            return CmaSearch(low, high, population=size, generations=generations, seed=seed)
        along = np.arange(1, size + 1)[:, None] / (size + 1)
        return NegativelyCorrelatedSearch(
            low,
            high,
            population=size,
            generations=generations,
            seed=seed,
            start=low + along * (high - low),
            step=self.step,
            limit=0.0,
        )

    def _stages(self, groups: Sequence[RatioGroup]) -> tuple[Stage, ...]:
        if self.order == "joint":
            return (Stage("all classes", tuple(range(len(groups)))),)
        members = {
            kind: tuple(i for i, g in enumerate(groups) if g.connection_class == kind)
            for kind in self.classes
        }
        return tuple(Stage(kind, numbers) for kind, numbers in members.items() if numbers)

    def _refusals(self, rounds: Rounds, stages: Sequence[Stage]) -> list[Refusal]:
        state = rounds.state
        told = [
            Refusal(f"{self.name}, {stage.name}", end)
            for stage, end in zip(stages, state.ends, strict=True)
        ]
        if not state.recovered:
            told.append(Refusal(self.name, "nothing was pruned: no round recovered"))
        if state.failure is not None:
            reason = f"failed, the search went on in process: {state.failure}"
            told.append(Refusal(f"{self.name}, executor", reason))
        return told

    def _check_classes(self) -> None:
        given = self.classes
        known = isinstance(given, list | tuple) and all(c in CLASSES for c in given)
        if not known or not given or len(set(given)) != len(given):
            raise ConfigError(
                f"option 'classes' of pass {self.name!r} must list some of {', '.join(CLASSES)}, "
                f"each once, not {given!r}"
            )
        object.__setattr__(self, "classes", tuple(given))
