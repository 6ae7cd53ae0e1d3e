"""The rounds of stage-wise pruning: search, mask, retrain, and go on from what recovered.

After every generation of a search and every round the state is written, if the task names a
folder; a run that was killed goes on from there and ends where the unbroken one does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fxprune.errors import TrainingError
from fxprune.masking.insertion import insert_masks
from fxprune.passes._stage_wise_constraint import Constraint
from fxprune.passes._stage_wise_evaluation import Counts, Material
from fxprune.passes._stage_wise_workers import Evaluator
from fxprune.progress import track
from fxprune.randomness import preserved_random_state
from fxprune.training import fit
from fxprune.training.checkpoint import Checkpoint, architecture, digest
from fxprune.training.placement import move
from fxprune.training.step import make_optimizer, make_scheduler, settings_of
from fxprune.weights import owned

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.masking.masks import Masks
    from fxprune.masking.ratios import RatioGroup
    from fxprune.passes.stage_wise import StageWise
    from fxprune.program import Program
    from fxprune.training import Task

__all__ = ["Rounds", "Stage"]

_LOG = logging.getLogger("fxprune")

PATIENCE = 2
"""A stage ends after so many rounds in a row whose search found nothing."""


@dataclass(frozen=True)
class Stage:
    """Groups whose ratios are searched together.

    Attributes:
        name: the class, or "all classes".
        groups: positions among all groups.
    """

    name: str
    groups: tuple[int, ...]


@dataclass
class State:
    """What is known of the rounds done, beside weights and masks.

    Attributes:
        counts: connections that each group has lost.
        dense: metric of the unpruned model.
        metric: metric of the last recovered model.
        stage: stages finished.
        round: rounds finished of the present stage.
        stalls: rounds in a row whose search found nothing.
        setbacks: rounds of the present stage whose model did not recover.
        recovered: rounds, of all stages, whose model recovered.
        ends: why each finished stage ended.
        failure: why the executor was given up.
    """

    counts: list[int]
    dense: float = math.nan
    metric: float = math.nan
    stage: int = 0
    round: int = 0
    stalls: int = 0
    setbacks: int = 0
    recovered: int = 0
    ends: list[str] = field(default_factory=list)
    failure: str | None = None


class Rounds:
    """One run of the pass over one program.

    Args:
        options: the pass.
        program: where it starts; stays as it is.
        neurons: its analysis.
        task: how to train and judge.
        groups: all groups whose ratios are searched.
        stages: which are searched together, in order.
        progress: show progress on a terminal.

    Attributes:
        program: the last recovered model; the one given as long as none is.
        state: how it went.
    """

    def __init__(
        self,
        options: StageWise,
        program: Program,
        neurons: Neurons,
        task: Task,
        groups: Sequence[RatioGroup],
        stages: Sequence[Stage],
        progress: bool = True,
    ) -> None:
        self.options, self.neurons, self.task = options, neurons, task
        self.progress = progress
        self.groups, self.stages = groups, stages
        self.entry = self.program = program
        self.state = State([0] * len(groups))
        self._keep: dict[str, Tensor] = {}
        masks = {"neurons": program.masks.neurons, **program.masks.connections}
        buffer = self._buffer()
        # Made anew for each retraining; here it shows, before the search, that it can be made.
        optimizer = make_optimizer(buffer, task)
        scheduler = make_scheduler(task, optimizer)
        self._run = {
            "pass": str(options),
            "architecture": architecture(buffer),
            "groups": str([(g.name, [w.name for w in g.weights]) for g in groups]),
            "weights": digest(program.tensors),
            "masks": digest(masks),
        } | settings_of(task, optimizer, scheduler)
        own = ("architecture", "groups", "weights", "masks")
        text = " ".join([str(options), *(self._run[key] for key in own)])
        self._name = f"stage-wise-{sha256(text.encode()).hexdigest()[:8]}"

    def __call__(self) -> None:
        """Goes through all stages.

        Raises:
            PreconditionError: the executor has processes that the evaluation cannot be sent to.
            TrainingError: the metric of the unpruned model is infinite; or see
                :func:`fxprune.training.fit`.
        """
        checkpoint = self._checkpoint("rounds")
        self._resume(checkpoint)
        if self.state.stage == len(self.stages):
            self._forget_all_but(None)
            return
        with preserved_random_state():
            evaluator = Evaluator(
                insert_masks(self.entry, self.neurons),
                self._buffer,
                self.task,
                self.options.executor,
                self.options.name,
                self._name,
            )
            try:
                self._go_on(evaluator, checkpoint)
            finally:
                evaluator.close()

    def _go_on(self, evaluator: Evaluator, checkpoint: Checkpoint | None) -> None:
        state = self.state
        while state.stage < len(self.stages):
            material = self._material()
            evaluator.begin(material)
            if math.isnan(state.dense):
                state.dense = state.metric = self._dense_metric(evaluator)
            place = f"stage-{state.stage + 1}-round-{state.round + 1}"
            self._forget_all_but(place)
            self._round(evaluator, material, place)
            state.failure = state.failure or evaluator.failure
            self._save(checkpoint)
        self._forget_all_but(None)

    def _round(self, evaluator: Evaluator, material: Material, place: str) -> None:
        state = self.state
        found = self._search(evaluator, place)
        state.round += 1
        if found is None:
            state.stalls += 1
            trouble: str | None = "no candidate that removes more is within the tolerance"
        else:
            state.stalls = 0
            trouble = self._try(found, material, place)
        _LOG.info("%s: %s, %s", self.options.name, place, trouble or self.summary())
        end = self._end(trouble)
        if end is not None:
            state.ends.append(f"ended after round {state.round}, {self.summary()}: {end}")
            state.stage += 1
            state.round = state.stalls = state.setbacks = 0

    def _try(self, counts: Counts, material: Material, place: str) -> str | None:
        """Retrains a candidate and keeps it if it recovers; else says how far it came."""
        state, recovery = self.state, self._within(self.options.recovery)
        tried = f"with {self._removed(counts):.2%} removed"
        try:
            program, metric = self._retrain(counts, material, place)
        except TrainingError as error:
            if not state.recovered:  # nothing shows that the task can be trained at all
                raise
            state.setbacks += 1
            return f"{tried} retraining failed: {error}"
        if recovery.excess(metric) > 0:
            state.setbacks += 1
            return (
                f"{tried} it did not recover: the metric was {metric:g} where {recovery} was needed"
            )
        self.program, self._keep = program, material.keep(counts)
        state.counts, state.metric = list(counts), metric
        state.recovered += 1
        return None

    def _end(self, trouble: str | None) -> str | None:
        """Why the present stage is over, after a round with some trouble; None if it is not."""
        state, options = self.state, self.options
        if state.stalls == PATIENCE or state.setbacks > options.retries:
            return trouble
        if state.round == options.rounds:
            count = f"{options.rounds} rounds are" if options.rounds > 1 else "one round is"
            return f"{count} done" + (f"; {trouble}" if trouble else "")
        return None

    def summary(self) -> str:
        """What is removed so far, by group, and the metric."""
        shares = ", ".join(
            f"{g.name} {n / g.size:.2%}"
            for g, n in zip(self.groups, self.state.counts, strict=True)
        )
        removed = f"{self._removed(tuple(self.state.counts)):.2%} removed ({shares})"
        return f"{removed}, metric {self.state.metric:g} (unpruned {self.state.dense:g})"

    # the search of a round

    def _search(self, evaluator: Evaluator, place: str) -> Counts | None:
        """The candidate that removes most within the tolerance; None if none removes more."""
        checkpoint = self._checkpoint(f"{place}-search")
        stage, state = self.stages[self.state.stage], self.state
        tolerance = self._within(self._tolerance())
        low = np.array([state.counts[i] / self.groups[i].size for i in stage.groups])
        high = np.maximum(low, self.options.most)
        high = low + (high - low) * 0.1**state.stalls  # closer, where nothing was found
        if not (high > low).any():
            return None
        search = self.options.new_search(low, high, (self.task.seed, state.stage, state.round))
        saved = None if checkpoint is None else checkpoint.load()
        if saved is not None:
            search.load_state_dict(saved["search"])
        size, done = search.population, search.generation * search.population
        total = search.generations * size
        title = f"{self.options.name}: search"
        with track(title, total, enabled=self.progress, done=done) as tracker:
            while not search.done:
                candidates = [self._counts(stage, point) for point in search.ask()]
                metrics = evaluator(candidates, tracker.advance)
                removed = map(self._removed, candidates)
                search.tell(
                    [tolerance.fitness(*pair) for pair in zip(removed, metrics, strict=True)]
                )
                if checkpoint is not None:
                    checkpoint.save({"search": search.state_dict()})
                tracker.advance(0, removed=max(0.0, -search.best.fitness))
        best = self._counts(stage, search.best.point)
        more = sum(best) > sum(state.counts) and search.best.fitness <= 0
        return best if more else None

    def _tolerance(self) -> float:
        """What a candidate may be worse by: half as far beyond the recovery after each setback."""
        least = self.options.recovery
        return least + (self.options.tolerance - least) * 0.5**self.state.setbacks

    def _counts(self, stage: Stage, ratios: Any) -> Counts:
        """Connections that each group loses, never fewer than it has lost."""
        counts = list(self.state.counts)
        for i, ratio in zip(stage.groups, ratios, strict=True):
            counts[i] = max(counts[i], self.groups[i].count(float(ratio)))
        return tuple(counts)

    def _removed(self, counts: Counts) -> float:
        return sum(counts) / sum(group.size for group in self.groups)

    def _dense_metric(self, evaluator: Evaluator) -> float:
        metric = evaluator([tuple(self.state.counts)])[0]
        if not math.isfinite(metric):
            raise TrainingError(
                f"Task.validate returned {metric} for the unpruned model: there is nothing to "
                "compare pruned ones with. Train the model first, or use another metric."
            )
        return metric

    def _within(self, limit: float) -> Constraint:
        return Constraint(self.state.dense, self.task.goal, limit, self.options.relative)

    # models

    def _material(self) -> Material:
        return Material.of(self.program.tensors, self.groups, self._keep)

    def _retrain(self, counts: Counts, material: Material, place: str) -> tuple[Program, float]:
        """Trains the weights under a candidate's masks; the best epoch's are kept."""
        program = replace(owned(self.program), masks=self._masks(material.keep(counts)))
        module = insert_masks(program, self.neurons).module()
        result = fit(
            module, self.task, progress=self.progress, name=f"{self._name}-{place}-retrain"
        )
        # a buffer that travelled to another device and back is another tensor
        tensors = {**program.tensors, **_named(module.named_buffers(), program)}
        return replace(program, tensors=tensors), result.metric

    def _masks(self, keep: dict[str, Tensor]) -> Masks:
        """The masks the program came with, and these."""
        cut = {name: stays for name, stays in keep.items() if not bool(stays.all())}
        return self.entry.masks.cut_connections(cut)

    def _buffer(self) -> nn.Module:
        module: nn.Module = insert_masks(owned(self.entry), self.neurons).module()
        move(module, self.task.device)
        return module

    # checkpoints

    def _checkpoint(self, step: str) -> Checkpoint | None:
        if self.task.checkpoint is None:
            return None
        return Checkpoint.open(self.task.checkpoint, f"{self._name}-{step}", self._run)

    def _save(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        content: dict[str, Any] = {"state": asdict(self.state)}
        if self.state.recovered:
            content["weights"] = {n: t.detach() for n, t in self.program.tensors.items()}
            content["keep"] = self._keep
        checkpoint.save(content)

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        content = None if checkpoint is None else checkpoint.load()
        if content is None:
            return
        self.state = State(**content["state"])
        if "weights" in content:
            self._keep = content["keep"]
            program = owned(self.entry, content["weights"])
            self.program = replace(program, masks=self._masks(self._keep))

    def _forget_all_but(self, place: str | None) -> None:
        """Removes the files of rounds whose results the state holds, also of a killed run."""
        if self.task.checkpoint is None:
            return
        for file in Path(self.task.checkpoint).glob(f"{self._name}-stage-*"):
            if place is None or not file.name.startswith(f"{self._name}-{place}-"):
                file.unlink(missing_ok=True)


def _named(tensors: Iterator[tuple[str, Tensor]], program: Program) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors if name in program.tensors}
