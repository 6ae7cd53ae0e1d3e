"""Law 2: a shrunk program computes what the masked one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.calls import Call, run_call
from fxprune.comparing import Difference, compare_outputs, judge, tolerance_of
from fxprune.errors import VerificationError
from fxprune.report import Verification
from fxprune.tracing.modes import without_dropout
from fxprune.trials import Trial, few_steps, trials

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fxprune.program import Program
    from fxprune.shrinking.shrink import Shrunk

__all__ = ["verify_programs"]


def verify_programs(
    program: Program,
    masked: fx.GraphModule,
    small: Shrunk,
    compact: fx.GraphModule,
    calls: Sequence[Call] | None = None,
) -> Verification:
    """Law 2: the compact program computes what the masked one does, at several sizes and values.

    Args:
        program: the program before shrinking, whose dimensions are varied.
        masked: it under masks.
        small: the compact program, and which positions of states it kept.
        compact: its module.
        calls: what to compare at; by default the example, and other sizes and values made from it.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    result = _Comparison(program, without_dropout(masked), small, without_dropout(compact))
    chosen = trials(program, result.reference) if calls is None else result.given(calls)
    for trial in chosen:
        result.compare(trial)
    return Verification(tuple(result.tried), result.max_abs, result.tolerance, result.chaotic)


@dataclass
class _Comparison:
    program: Program
    masked: nn.Module
    small: Shrunk
    compact: nn.Module
    tried: list[str] = field(default_factory=list)
    max_abs: float = 0.0
    tolerance: float = 0.0
    chaotic: bool = False

    def reference(self, call: Call) -> Any:
        """What the masked program makes of a call."""
        return run_call(self.masked, call)

    def given(self, calls: Sequence[Call]) -> Iterator[Trial]:
        """The user's own calls, which the program takes."""
        for index, call in enumerate(calls):
            yield Trial(f"verify_inputs[{index}]", call, self.reference(call))

    def compare(self, trial: Trial) -> None:
        """Compares one call."""
        verdict = judge(
            self._difference,
            self.reference,
            trial.call,
            trial.expected,
            stated=tolerance_of(trial.expected, "equal"),
            short=partial(few_steps, self.program, self.reference, trial.call),
        )
        difference = verdict.difference
        if not verdict.passed:
            raise VerificationError(
                f"compact and masked program differ by {difference.max_abs:.3g} at "
                f"{difference.where}, {trial.label}. This is a defect of fxprune; please report "
                "the model. Nothing was written.",
                pass_name="shrink",
                where=f"{difference.where} at {trial.label}",
                max_abs=difference.max_abs,
                max_rel=difference.max_rel,
            )
        self.tried.append(trial.label)
        self.max_abs = max(self.max_abs, difference.max_abs)
        self.tolerance = max(self.tolerance, verdict.tolerance)
        self.chaotic |= verdict.chaotic

    def _difference(self, call: Call, expected: Any) -> Difference:
        """States that shrank are compared where they still are."""
        call = _sliced_leaves(call, self.small.input_slices)
        expected = _sliced_leaves(expected, self.small.output_slices)
        try:
            result = run_call(self.compact, call)
        except Exception as error:
            raise VerificationError(
                f"the compact program fails where the masked one runs: {error}. This is a defect "
                "of fxprune; please report the model. Nothing was written.",
                pass_name="shrink",
                where="its forward",
                max_abs=float("inf"),
                max_rel=float("inf"),
            ) from error
        return compare_outputs(expected, result)


def _sliced_leaves(tree: Any, slices: Sequence[Sequence[Tensor | None]]) -> Any:
    leaves, structure = pytree.tree_flatten(tree)
    small = []
    for leaf, positions in zip(leaves, slices, strict=True):
        for dim, kept in enumerate(positions):
            if kept is not None:
                leaf = leaf.index_select(dim, kept.to(leaf.device))
        small.append(leaf)
    return pytree.tree_unflatten(small, structure)
