"""``fxprune.compile`` and ``fxprune.prepare``: from a model and a policy to a compact program."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.analysis import Neurons
from fxprune.archives import save_archive
from fxprune.contract import Context, Facts, NeuronAnalysis
from fxprune.errors import ConfigError, FxpruneError
from fxprune.learning.contract import LearnedPass, Learning, require_agreement, training_steps
from fxprune.masking.counting import Count, count
from fxprune.masking.insertion import insert_masks
from fxprune.naming import dimension_names, symbol_names
from fxprune.pipeline import Outcome, run_passes
from fxprune.policy import Policy, as_policy
from fxprune.program import InputSpec, Kind, Program, Refusal
from fxprune.progress import track
from fxprune.rebuilding import rebuild
from fxprune.report import Report
from fxprune.shrinking.compact import compact_program
from fxprune.shrinking.fold import fold_constants
from fxprune.shrinking.liveness import alive_neurons
from fxprune.tracing.exporting import export_program
from fxprune.tracing.sizes import at_sizes, candidate_sizes, example_sizes, size_label
from fxprune.tracing.states import plain_states
from fxprune.tracing.tracer import own_call, trace
from fxprune.verify import verify_programs
from fxprune.weights import owned, with_weights_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from fxprune.contract import Pass
    from fxprune.lowering import OnnxCase, OnnxReport
    from fxprune.program import Call
    from fxprune.shrinking.shrink import Shrunk
    from fxprune.training.task import Task

__all__ = ["Compact", "Prepared", "as_program", "compile", "prepare"]


@dataclass(frozen=True)
class Compact:
    """The result of a compilation.

    Attributes:
        module: the smaller model, trainable, its parameters under the user's names.
        masked: the reference it was compared with: the model under masks, original shapes, a
            read-only view of the traced values.
        report: what was removed, and how the result was verified.
        program: the smaller program.
    """

    module: fx.GraphModule
    masked: fx.GraphModule
    report: Report
    program: Program

    def save(self, path: str | os.PathLike[str], *, portable: bool = False) -> tuple[str, ...]:
        """Writes a ``.pt2`` archive, which :func:`fxprune.load` reads back.

        Args:
            path: where to; the file appears whole or not at all.
            portable: write torch's own recurrent operations instead of fxprune's, for other
                tools. Those freeze the time, and cannot take packed sequences.

        Returns:
            The sizes that this froze, as ``"input[dim]=size"``; none unless portable.

        Raises:
            ConfigError: the path cannot be written.
            LoweringError: portable, and the program uses packed sequences.
        """
        return save_archive(self._current(), path, portable=portable)

    def save_onnx(self, path: str | os.PathLike[str], *, opset: int | None = None) -> OnnxReport:
        """Writes a compact ONNX file, after running it in onnxruntime at several sizes.

        Args:
            path: where to; the file appears whole and verified, or not at all.
            opset: ONNX operator set; the exporter's recommended one if None.

        Raises:
            ConfigError: the path cannot be written.
            LoweringError: an operation cannot be written as ONNX.
            VerificationError: the file computes something else.
        """
        program = self._current()
        reference = program.module()  # in eval mode, whatever mode the user's is in
        with plain_states():
            exported = export_program(program)
        from fxprune.lowering import save_onnx  # onnx takes long to import, and memory

        return save_onnx(
            exported,
            reference,
            _onnx_cases(program, reference),
            path,
            input_names=[spec.name for spec in program.inputs if spec.shape is not None],
            dimension_names=dimension_names(program),
            opset=opset,
        )

    def rebuild(self, model: nn.Module) -> nn.Module:
        """A copy of the user's module with the compact sizes and weights.

        For code that needs plain ``nn.LSTM``, ``nn.GRU`` and the like; see
        :mod:`fxprune.rebuilding` for where that is possible.

        Args:
            model: the module that was compiled; it stays as it is.

        Raises:
            PreconditionError: a layer cannot have the sizes that were left.
            VerificationError: the module's code depends on sizes that went.
        """
        return rebuild(self._current(), model)

    def _current(self) -> Program:
        """The program with the weights the module has now, trained further or not."""
        return with_weights_of(self.program, self.module)

    def __repr__(self) -> str:
        before, after = self.report.parameters_before, self.report.parameters_after
        return f"Compact({before:,} -> {after:,} parameters; print its report)"


def compile(
    model_or_program: nn.Module | Program,
    policy: Policy | Pass | Sequence[Pass] | str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    task: Task | None = None,
    verify_inputs: Sequence[Any] | None = None,
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
        verify_inputs: calls to compare at, instead of those made from the example.
        progress: show progress on a terminal.

    Returns:
        The compact module with its masked twin and a report.

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
    chosen = _policy(policy)
    if verify_inputs is not None and not len(verify_inputs):
        raise ConfigError("verify_inputs is empty; give at least one call, or leave it out.")
    with track("compile", 4, enabled=progress) as steps:
        program = as_program(model_or_program, example_inputs, dynamic_shapes)
        program = replace(program, states=chosen.states)
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
        compact = _finish(outcome, neurons, chosen, verify_inputs, lambda: steps.advance())
    return compact


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

    def convert(self) -> Compact:
        """The compact program with masks and weights as they are now.

        Passes that follow the learned one in the policy are applied to what it left.

        Raises:
            TrainingError: processes that trained together disagree about the masks.
            VerificationError: compact and masked program differ: a defect.
        """
        outcome, neurons = self._outcome, self._facts[NeuronAnalysis]
        if self._learning is None:
            trained = with_weights_of(outcome.program, self.module)
            return _finish(outcome._replace(program=trained), neurons, self._policy, None)
        hardened = self._learning.harden()
        require_agreement(hardened)
        facts = Facts(hardened, self._facts.context, {NeuronAnalysis: neurons})
        later = run_passes(hardened, self._later, facts=facts)
        learned = (*outcome.refusals, *self._learning.refusals, *later.refusals)
        whole = Outcome(later.program, learned, (*outcome.log, *later.log))
        return _finish(whole, neurons, self._policy, None)


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
    chosen = _policy(policy)
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


def _checked_steps(learned: LearnedPass | None, steps: int | None, task: Task | None) -> int:
    if learned is None:
        return 0
    if steps is None and task is not None:
        return training_steps(task, learned.name)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"pass {learned.name!r} follows a schedule over the training: give steps=, the number "
            f"of optimizer steps that your loop takes, at least 1, not {steps!r}"
        )
    return steps


def as_program(
    model_or_program: nn.Module | Program, example_inputs: Any = None, dynamic_shapes: Any = None
) -> Program:
    """Traces a module; hands a program through, traced anew if it has been shrunk.

    Raises:
        ConfigError: neither of them, or a module without example inputs.
    """
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


def _policy(policy: Any) -> Policy:
    from fxprune import passes  # the only place where the core looks passes up

    return as_policy(policy, passes.table())


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


def _finish(
    outcome: Outcome,
    neurons: Neurons,
    policy: Policy,
    verify_inputs: Sequence[Any] | None,
    advance: Callable[[], object] = lambda: None,
) -> Compact:
    """Shrinks, verifies and reports."""
    program = outcome.program
    detached = {n: t.detach() for n, t in program.tensors.items()}
    for name, kind in program.kinds.items():
        if kind is Kind.BUFFER:  # a batch norm that is run in train mode writes its statistics
            detached[name] = detached[name].clone()
    masked = insert_masks(replace(program, tensors=detached), neurons).module()
    small = compact_program(program, neurons)
    module = small.program.module()
    advance()
    calls = None if verify_inputs is None else [own_call(c) for c in verify_inputs]
    verification = verify_programs(program, masked, small, module, calls)
    advance()
    report = _report(outcome, neurons, small, policy, verification)
    return Compact(module, masked, report, small.program)


def _report(
    outcome: Outcome, neurons: Neurons, small: Shrunk, policy: Policy, verification: Any
) -> Report:
    program = outcome.program
    masks = fold_constants(program, neurons).masks  # what is folded is gone as well
    alive = alive_neurons(neurons, masks)
    sizes = {
        n: tuple(t.shape)
        for n, t in small.program.tensors.items()
        if small.program.kinds[n] is Kind.PARAMETER
    }
    return Report(
        counts=count(program, neurons, masks, alive, sizes),
        macs=_macs(program, small),
        kept=_kept(program, small),
        verification=verification,
        refusals=(*outcome.refusals, *neurons.refusals),
        notes=_notes(program, small.program),
        policy=str(policy),
    )


def _macs(program: Program, small: Shrunk) -> Count:
    from fxprune.masking.macs import macs

    return Count(macs(program), macs(small.program))


def _kept(program: Program, small: Shrunk) -> dict[str, tuple[tuple[int, ...], ...]]:
    kept = {}
    for name, kind in program.kinds.items():
        if kind is Kind.PARAMETER and name in small.kept:
            tensor = program.tensors[name]
            kept[name] = tuple(
                tuple(range(size)) if positions is None else tuple(positions.tolist())
                for size, positions in zip(tensor.shape, small.kept[name], strict=True)
            )
    return kept


def _notes(program: Program, small: Program) -> tuple[str, ...]:
    notes = [f"{r.node} is fixed: {r.reason}" for r in program.refusals if _worth_telling(r)]
    if program.mode_difference is not None:
        notes.append(f"eval mode only: {program.mode_difference}")
    for spec, smaller in zip(program.inputs, small.inputs, strict=True):
        if spec.shape != smaller.shape:
            notes.append(
                f"state {spec.name} is [{_sizes(smaller)}] instead of [{_sizes(spec)}]; layers "
                "that share a state lose the same units"
            )
    return tuple(notes)


def _sizes(spec: InputSpec) -> str:
    return ", ".join("any" if isinstance(s, str) else str(s) for s in spec.shape or ())


def _worth_telling(refusal: Refusal) -> bool:
    # That the number of features is fixed is what everybody expects.
    return "code fixes it" not in refusal.reason


def _onnx_cases(program: Program, module: nn.Module) -> list[OnnxCase]:
    """The example and three other sizes that the program takes, batch 1 and one step among them."""
    names = symbol_names(program)
    example = example_sizes(program)
    from fxprune.lowering import OnnxCase

    cases: list[OnnxCase] = []
    usual: list[int] | None = None
    for sizes in [example, *candidate_sizes(example)]:
        call = at_sizes(program, sizes)
        ranks = _output_ranks(module, call) if len(cases) < 5 else None
        if ranks is None:
            continue
        usual = usual or ranks
        squeezed = "" if ranks == usual else " (sizes of 1 squeezed away)"
        cases.append(OnnxCase((size_label(sizes, names) or "example") + squeezed, *call))
    return cases


def _output_ranks(module: nn.Module, call: Call) -> list[int] | None:
    """How many dimensions each output has; None at sizes that the module does not take."""
    try:
        with torch.no_grad():
            outputs = module(*call[0], **call[1])
    except (FxpruneError, RuntimeError, ValueError, IndexError):
        return None
    return [t.dim() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
