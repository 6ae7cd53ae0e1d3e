"""The result of a compilation: a masked program shrunk, verified and reported; and its files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.analysis import Neurons
from fxprune.archives import save_archive
from fxprune.calls import run_call
from fxprune.lost_inputs import lost_inputs
from fxprune.masking.counting import Count, count
from fxprune.masking.insertion import insert_masks
from fxprune.naming import dimension_names
from fxprune.pipeline import Outcome
from fxprune.policy import Policy
from fxprune.program import Kind, Program, Refusal
from fxprune.rebuilding import rebuild
from fxprune.report import Report
from fxprune.shrinking.compact import compact_program
from fxprune.shrinking.fold import fold_constants
from fxprune.shrinking.liveness import alive_neurons, kept_neurons
from fxprune.tracing.exporting import export_program
from fxprune.tracing.states import plain_states
from fxprune.tracing.tracer import own_call
from fxprune.trials import few_steps, trials
from fxprune.verify import verify_programs
from fxprune.weights import with_weights_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from fxprune.lowering import OnnxCase, OnnxReport
    from fxprune.shrinking.shrink import Shrunk

__all__ = ["Compact", "finish"]


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


def finish(
    outcome: Outcome,
    neurons: Neurons,
    policy: Policy,
    verify_inputs: Sequence[Any] | None,
    advance: Callable[[], object] = lambda: None,
) -> Compact:
    """Shrinks, verifies and reports."""
    program = _without_dead(outcome.program, neurons)
    outcome = outcome._replace(program=program)
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
    notes = _notes(program, masked, small)
    report = _report(outcome, neurons, small, policy, verification, notes)
    return Compact(module, masked, report, small.program)


def _without_dead(program: Program, neurons: Neurons) -> Program:
    """Cuts what nothing reads where states may shrink and all units of a layer are dead.

    One of them stays, lest a dimension be empty, and its state is seen. It then reads no dead
    ones in the reference either.
    """
    if program.states == "keep":
        return program
    alive = alive_neurons(neurons, fold_constants(program, neurons).masks)
    kept = kept_neurons(neurons, alive, program.masks)
    if torch.equal(kept, alive):
        return program
    return replace(program, masks=program.masks.cut_neurons((~kept).nonzero().flatten()))


def _report(
    outcome: Outcome,
    neurons: Neurons,
    small: Shrunk,
    policy: Policy,
    verification: Any,
    notes: tuple[str, ...],
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
        notes=notes,
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


def _notes(program: Program, masked: nn.Module, small: Shrunk) -> tuple[str, ...]:
    notes = [f"{r.node} is fixed: {r.reason}" for r in program.refusals if _worth_telling(r)]
    if program.mode_difference is not None:
        notes.append(f"eval mode only: {program.mode_difference}")
    results: Any = program.graph.output_node().args[0]
    shapes: list[tuple[str, Sequence[Any]]] = [(s.name, s.shape or ()) for s in program.inputs]
    for i, result in enumerate(results):
        shapes.append((f"output_{i}", result.meta["val"].shape if _is_tensor(result) else ()))
    slices = (*small.input_slices, *small.output_slices)
    for (name, shape), kept in zip(shapes, slices, strict=True):
        if any(k is not None for k in kept):
            left = [s if k is None else len(k) for s, k in zip(shape, kept, strict=True)]
            notes.append(
                f"state {name} is [{_sizes(left)}] instead of [{_sizes(shape)}]; layers that "
                "share a state lose the same units"
            )
    for name in lost_inputs(program, masked):
        notes.append(f"the outputs no longer change with {name}: too much was removed between them")
    return tuple(notes)


def _sizes(shape: Sequence[Any]) -> str:
    return ", ".join(str(s) if isinstance(s, int) else "any" for s in shape)


def _is_tensor(result: Any) -> bool:
    return isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor)


def _worth_telling(refusal: Refusal) -> bool:
    # That the number of features is fixed is what everybody expects.
    return "code fixes it" not in refusal.reason


def _onnx_cases(program: Program, module: nn.Module) -> list[OnnxCase]:
    """The example and other sizes that the program takes, batch 1 and one step among them."""
    from fxprune.lowering import OnnxCase

    cases: list[OnnxCase] = []
    usual: list[int] | None = None
    reference = partial(run_call, module)
    for trial in trials(program, reference):
        ranks = [t.dim() for t in pytree.tree_leaves(trial.expected) if isinstance(t, Tensor)]
        usual = usual or ranks
        squeezed = "" if ranks == usual else " (sizes of 1 squeezed away)"
        short = partial(few_steps, program, reference, trial.call)
        cases.append(OnnxCase(trial.label + squeezed, *trial.call, short))
    return cases
