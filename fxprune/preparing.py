"""``fxprune.prepare``: a model under masks or gates, for a training loop of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor, fx, nn

from fxprune.compact import Compact, finish
from fxprune.compiler import as_program, check_task, chosen_policy
from fxprune.contract import Context, Facts, NeuronAnalysis
from fxprune.errors import ConfigError, TrainingError
from fxprune.learning.contract import LearnedPass, Learning, require_agreement, training_steps
from fxprune.masking.insertion import insert_masks
from fxprune.pipeline import Outcome, run_passes
from fxprune.policy import Policy
from fxprune.program import Program
from fxprune.weights import are_numbers, owned, with_weights_of

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from fxprune.contract import Pass
    from fxprune.training.task import Task

__all__ = ["Prepared", "prepare"]


@dataclass
class Prepared:
    """A model under masks, for a training loop of the user's own.

    Attributes:
        module: train it as any module; masks and gates are part of its forward, and what is
            learned about them is part of its ``state_dict``.
    """

    module: fx.GraphModule
    _outcome: Outcome
    _learning: Learning | None
    _later: tuple[Pass, ...]
    _facts: Facts
    _policy: Policy

    def __repr__(self) -> str:
        return f"Prepared({self._policy}; train its module, then convert)"

    def penalty(self) -> Tensor:
        """What to add to the loss of each batch; zero unless a pass learns its masks by one."""
        if self._learning is not None:
            return self._learning.penalty()
        first = next(self.module.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)

    def step(self) -> None:
        """To be called after each ``optimizer.step()``; fixed masks need nothing."""
        if self._learning is not None:
            with torch.no_grad():
                self._learning.step()

    @torch.inference_mode(False)
    def convert(self) -> Compact:
        """The compact program with masks and weights as they are now.

        Passes that follow the learned one in the policy are applied to what it left. It can be
        called at any time; the report says if masks were not final yet.

        Raises:
            TrainingError: a weight is not finite, or processes that trained together disagree
                about the masks.
            VerificationError: compact and masked program differ: a defect.
        """
        _require_finite(self.module)
        outcome, neurons = self._outcome, self._facts[NeuronAnalysis]
        if self._learning is None:
            trained = with_weights_of(outcome.program, self.module)
            # Training may go on, and the masked twin is a view of what it is made of.
            whole = outcome._replace(program=owned(trained))
            return finish(whole, neurons, self._policy, None)
        hardened = self._learning.harden()
        require_agreement(hardened)
        facts = Facts(hardened, self._facts.context, {NeuronAnalysis: neurons})
        later = run_passes(hardened, self._later, facts=facts)
        learned = (*outcome.refusals, *self._learning.refusals, *later.refusals)
        whole = Outcome(later.program, learned, (*outcome.log, *later.log))
        compact = finish(whole, neurons, self._policy, None)
        if self._learning.finished:
            return compact
        note = "masks were not final: step() was called less often than prepare was told"
        report = replace(compact.report, notes=(*compact.report.notes, note))
        return replace(compact, report=report)

    def __reduce__(self) -> Never:
        """Refuses to be pickled or copied: graphs cannot."""
        raise ConfigError(
            "what fxprune.prepare returns can be neither copied nor pickled: prepare once more, "
            "and load prepared.module.state_dict(), which holds all that was learned"
        )


@torch.inference_mode(False)  # or masks and weights made here could not be trained
def prepare(
    model_or_program: nn.Module | Program,
    policy: Policy | Pass | Sequence[Pass] | str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    task: Task | None = None,
    steps: int | None = None,
) -> Prepared:
    """Puts masks or gates into a model for a training loop of the user's own.

    Add ``prepared.penalty()`` to the loss, call ``prepared.step()`` after ``optimizer.step()``,
    and ``prepared.convert()`` in the end.

    Args:
        model_or_program: as for :func:`compile`; so are the next three.
        policy: one pass at most may learn while the model trains; those before it are applied
            now, those after it by ``convert``.
        example_inputs: one call's inputs.
        dynamic_shapes: as for :func:`fxprune.trace`.
        task: for passes that look at gradients; nothing is trained here.
        steps: how many optimizer steps the loop will take, for passes with a schedule; by default
            as many as the task takes.

    Raises:
        ConfigError: a pass trains by itself, two passes learn, or the steps are not known.

    Example:
        >>> from fxprune.passes import Magnitude
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> half = Magnitude(sparsity=0.5, structure="neuron")
        >>> prepared = prepare(model, half, example_inputs=torch.zeros(1, 3))
        >>> prepared.module(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
        >>> prepared.convert().report.parameters_after
        26
    """
    chosen = chosen_policy(policy)
    check_task(task)
    before, learned, later = _split(chosen.passes)
    steps = _checked_steps(learned, steps, task)
    program = as_program(model_or_program, example_inputs, dynamic_shapes)
    program = replace(program, states=chosen.states)
    facts = Facts(program, Context(task, tuple(chosen.protect)))
    outcome = run_passes(program, before, facts=facts)
    neurons = facts[NeuronAnalysis]
    if learned is None:
        outcome = outcome._replace(program=owned(outcome.program))
        module = insert_masks(outcome.program, neurons).module()
        return Prepared(module, outcome, None, later, facts, chosen)
    here = Facts(outcome.program, facts.context, {NeuronAnalysis: neurons})
    learned.requires(outcome.program, here)
    learning = learned.attach(outcome.program, here, steps)
    return Prepared(learning.module, outcome, learning, later, here, chosen)


def _split(passes: Sequence[Pass]) -> tuple[Sequence[Pass], LearnedPass | None, tuple[Pass, ...]]:
    """The passes before the one that learns, that one, and those after it."""
    for pass_ in passes:
        if pass_.needs_task and not isinstance(pass_, LearnedPass):
            raise ConfigError(
                f"pass {pass_.name!r} trains the model itself, so there is nothing to prepare for "
                "a loop of your own: use fxprune.compile with a task"
            )
    at = [i for i, p in enumerate(passes) if isinstance(p, LearnedPass)]
    if len(at) > 1:
        first, second = passes[at[0]], passes[at[1]]
        raise ConfigError(
            f"passes {first.name!r} and {second.name!r} both learn while the model trains: "
            "prepare, train and convert for the first, then for the second"
        )
    if not at:
        return passes, None, ()
    learned = passes[at[0]]
    assert isinstance(learned, LearnedPass)
    return passes[: at[0]], learned, tuple(passes[at[0] + 1 :])


def _require_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not are_numbers(parameter, finite=True):
            raise TrainingError(
                f"{name} holds NaN or infinity: the training broke down. Load a state_dict of "
                "before into prepared.module, and lower the learning rate or clip gradients"
            )


def _checked_steps(learned: LearnedPass | None, steps: int | None, task: Task | None) -> int:
    if steps is None and learned is None:
        return 0
    if steps is None and learned is not None and task is not None:
        return training_steps(task, learned.name)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        why = f"pass {learned.name!r} follows a schedule over the training: " if learned else ""
        raise ConfigError(
            f"{why}give steps=, the number of optimizer steps that your loop takes, at least 1, "
            f"not {steps!r}"
        )
    return steps
