"""``fxprune.compile``: from a model and a policy to a compact program."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.analysis import Neurons
from fxprune.calls import Call, run_call
from fxprune.compact import Compact, finish
from fxprune.contract import Context, Facts, NeuronAnalysis
from fxprune.errors import ConfigError
from fxprune.masking.insertion import insert_masks
from fxprune.pipeline import run_passes
from fxprune.policy import Policy, as_policy
from fxprune.program import Program
from fxprune.progress import track
from fxprune.tracing.tracer import own_call, trace
from fxprune.trials import REJECTIONS
from fxprune.weights import owned, with_weights_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from fxprune.contract import Pass
    from fxprune.training.task import Task

__all__ = ["as_program", "check_task", "chosen_policy", "compile"]


@torch.inference_mode(False)  # or masks and weights made here could not be trained
def compile(
    model_or_program: nn.Module | Program,
    policy: Policy | Pass | Sequence[Pass] | str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    task: Task | None = None,
    verify_inputs: Iterable[Any] | None = None,
    progress: bool = True,
) -> Compact:
    """Makes a model physically smaller and proves that nothing else changed.

    The model is traced, the policy's passes decide what goes, what nothing reads any more is
    removed, and the compact program is compared with the masked one at the example's sizes and at
    others. The model itself is left as it was.

    Args:
        model_or_program: a module, or the result of :func:`fxprune.trace` or :func:`fxprune.load`.
        policy: what to remove: a pass, a list of passes, a :class:`Policy`, its text form such as
            ``"magnitude{sparsity=0.5,structure=neuron}"``, or the path of a TOML file.
        example_inputs: one call's inputs, as for :func:`fxprune.trace`; needed for a module.
        dynamic_shapes: as for :func:`fxprune.trace`.
        task: data and loss; with it, every one-shot pass fine-tunes after masking.
        verify_inputs: calls to compare at, instead of those made from the example; each is built
            as ``example_inputs``.
        progress: show progress on a terminal.

    Returns:
        The compact module with its masked twin and a report. The twin is a view of the model's own
        tensors, as a copy would double the memory: training the model changes it.

    Raises:
        ConfigError: an argument or option is wrong.
        TraceError: the model cannot be traced.
        PassError: a pass cannot do what was asked.
        VerificationError: compact and masked program differ: a defect, and nothing is returned.

    Example:
        >>> from fxprune.passes import Magnitude
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> half = Magnitude(sparsity=0.5, structure="neuron")
        >>> compact = compile(model, half, example_inputs=torch.zeros(1, 3))
        >>> compact.report.parameters_before, compact.report.parameters_after
        (50, 26)
    """
    chosen = chosen_policy(policy)
    given = None if verify_inputs is None else _calls(verify_inputs)
    check_task(task)
    with track("compile", 4, enabled=progress) as steps:
        program = as_program(model_or_program, example_inputs, dynamic_shapes)
        program = replace(program, states=chosen.states)
        if given is not None:
            _require_runs(program, given)  # now, not after the training
        steps.advance()
        facts = Facts(program, Context(task, tuple(chosen.protect), progress))
        neurons = facts[NeuronAnalysis]
        outcome = run_passes(
            program,
            chosen.passes,
            facts=facts,
            fine_tune=_fine_tuning(neurons, task, progress) if task is not None else None,
        )
        steps.advance()
        compact = finish(outcome, neurons, chosen, given, lambda: steps.advance())
    return compact


def _calls(given: Any) -> list[Call]:
    """The calls to compare at.

    Raises:
        ConfigError: they are none, or one call instead of several.
    """
    if isinstance(given, Tensor | Mapping | str) or not isinstance(given, Iterable):
        raise ConfigError(
            f"verify_inputs is {type(given).__name__}; give a list of calls, each built as "
            "example_inputs is."
        )
    calls = []
    for index, call in enumerate(given):
        try:
            calls.append(own_call(call))
        except ConfigError as error:
            raise ConfigError(
                f"verify_inputs[{index}] is {type(call).__name__}; build each call as "
                "example_inputs is."
            ) from error
    if not calls:
        raise ConfigError("verify_inputs is empty; give at least one call, or leave it out.")
    return calls


def _require_runs(program: Program, calls: Sequence[Call]) -> None:
    """Raises ConfigError if the program does not take one of the calls."""
    module = program.module()
    for index, call in enumerate(calls):
        try:
            run_call(module, call)
        except REJECTIONS as error:
            raise ConfigError(
                f"the model does not run on verify_inputs[{index}]: {error}"
            ) from error


def as_program(
    model_or_program: nn.Module | Program, example_inputs: Any = None, dynamic_shapes: Any = None
) -> Program:
    """Traces a module; hands a program through, traced anew if it has been shrunk.

    Raises:
        ConfigError: it is neither of them, or a module without example inputs.
    """
    if not isinstance(model_or_program, Program | nn.Module):
        raise ConfigError(
            "a model is a torch.nn.Module, or a program of fxprune.trace or fxprune.load, not "
            f"{model_or_program!r} ({type(model_or_program).__name__})."
        )
    if isinstance(model_or_program, Program):
        if example_inputs is not None or dynamic_shapes is not None:
            raise ConfigError(
                "a program has its example inputs and dynamic shapes already; give them to "
                "fxprune.trace instead"
            )
        if _shrunk(model_or_program):
            return trace(model_or_program.module(), model_or_program.example)
        return model_or_program
    if example_inputs is None:
        raise ConfigError(
            "example_inputs is missing: a module is traced with one call's inputs, such as "
            "example_inputs=(torch.zeros(1, 10, 40),)"
        )
    return trace(model_or_program, example_inputs, dynamic_shapes=dynamic_shapes)


def _shrunk(program: Program) -> bool:
    """Whether tensors are no longer what the graph was traced with."""
    return any(
        "val" not in n.meta or n.meta["val"].shape != program.tensors[str(n.target)].shape
        for n in program.graph.nodes
        if n.op == "get_attr"
    )


def chosen_policy(policy: Any) -> Policy:
    from fxprune import passes  # the only place where the core looks passes up

    return as_policy(policy, passes.table())


def check_task(task: Any) -> None:
    """Refuses what is no task before anything is traced.

    Raises:
        ConfigError: it is neither a task nor None.
    """
    if task is None:
        return
    from fxprune.training.task import Task

    if not isinstance(task, Task):
        raise ConfigError(
            f"task is {type(task).__name__}; give a fxprune.Task(loss, train, validate, goal=...)."
        )


def _fine_tuning(neurons: Neurons, task: Task, progress: bool) -> Callable[[Program], Program]:
    """Trains the weights of a program under its masks, in tensors of its own."""
    from fxprune.training import fit

    numbers = itertools.count(1)  # fits that share a checkpoint folder need names of their own

    def fine_tune(program: Program) -> Program:
        own = owned(program)
        module = insert_masks(own, neurons).module()
        fit(module, task, progress=progress, name=f"fine-tune-{next(numbers)}")
        return with_weights_of(own, module)

    return fine_tune
