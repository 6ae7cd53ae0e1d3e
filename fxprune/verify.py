"""Comparing what two programs compute, with tolerances that follow from rounding.

A tolerance is the stated one (:data:`EQUAL` between programs, :data:`ONNX` between runtimes) times
the scale of the output. Chaotic recurrences amplify rounding beyond that though nothing is wrong,
so the comparison of shrunk programs also allows ten times the change that moving the inputs by
one unit in the last place makes in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import VerificationError
from fxprune.randomness import preserved_random_state
from fxprune.report import Verification
from fxprune.tracing.modes import without_dropout
from fxprune.tracing.sizes import at_sizes, example_sizes
from fxprune.trials import Trial, trials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxprune.program import Call, Program
    from fxprune.shrinking.shrink import Shrunk

__all__ = [
    "Difference",
    "compare_outputs",
    "rounding_effect",
    "run_call",
    "tolerance_of",
    "verify_programs",
]

EQUAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative tolerance between two programs that must agree, by the precision they compute in."""

ONNX = 1e-4
"""Relative tolerance between a program and its ONNX file in onnxruntime."""


@dataclass(frozen=True)
class Difference:
    """How far two results are apart.

    Attributes:
        max_abs: largest absolute difference; infinite if structure, shape or type differ.
        max_rel: largest difference over the largest absolute reference value of its output.
        where: the output where ``max_rel`` was found, and what differs if it is not a value.
    """

    max_abs: float
    max_rel: float
    where: str

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most ``tolerance`` times the output's scale."""
        return self.max_rel <= tolerance


def compare_outputs(expected: Any, actual: Any) -> Difference:
    """Compares two results leaf by leaf.

    Args:
        expected: the reference; tensors in tuples, lists, dicts, or None.
        actual: what must equal it.

    Returns:
        The largest differences. The scale of an output is its largest absolute reference value,
        at least 1, so that outputs near zero are compared absolutely.

    Example:
        >>> compare_outputs(torch.tensor([2.0]), torch.tensor([2.5])).max_rel
        0.25
    """
    references, structure = pytree.tree_flatten(expected)
    results, other = pytree.tree_flatten(actual)
    if structure != other:
        return Difference(float("inf"), float("inf"), f"structure {other} instead of {structure}")
    worst = Difference(0.0, 0.0, "output_0")
    for index, (reference, result) in enumerate(zip(references, results, strict=True)):
        found = _compare_leaf(f"output_{index}", reference, result)
        if not found.max_rel <= worst.max_rel:
            worst = found
    return worst


def _compare_leaf(name: str, expected: Any, actual: Any) -> Difference:
    infinite = float("inf")
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = expected is None and actual is None
        return Difference(0.0, 0.0, name) if same else Difference(infinite, infinite, name)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        text = f"{name}: {list(actual.shape)} {actual.dtype} instead of "
        return Difference(infinite, infinite, text + f"{list(expected.shape)} {expected.dtype}")
    if expected.numel() == 0:
        return Difference(0.0, 0.0, name)
    parts = zip(*(t.detach().reshape(-1).split(_CHUNK) for t in (expected, actual)), strict=True)
    gaps, scales = zip(*(_largest(left, right) for left, right in parts), strict=True)
    return Difference(max(gaps), max(gaps) / max(1.0, *scales), name)


_CHUNK = 1 << 18  # entries compared at a time, in double precision


def _largest(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """The largest absolute difference and the largest finite reference value."""
    wide = torch.float64 if not expected.is_complex() else torch.complex128
    left, right = expected.to(wide), actual.to(wide)
    # NaN and infinity agree where both have the same.
    agree = torch.eq(left, right).logical_or(left.isnan() & right.isnan())
    gap = torch.where(agree, 0.0, (left - right).abs())
    gap = gap.nan_to_num(nan=float("inf"), posinf=float("inf"))
    finite = torch.where(left.isfinite(), left.abs(), 0.0)
    return float(gap.max()), float(finite.max())


def tolerance_of(expected: Any, kind: Literal["equal", "onnx"]) -> float:
    """The stated tolerance for a result, by the least precise floating type in it."""
    dtypes = {t.dtype for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)}
    equal = max((EQUAL.get(d, 0.0) for d in dtypes), default=0.0) or EQUAL[torch.float32]
    return equal if kind == "equal" else max(ONNX, equal)


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


_CHAOS = 1e-3


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
        difference = self._difference(trial.call, trial.expected)
        allowed = tolerance_of(trial.expected, "equal")
        if not difference.within(allowed):
            rounding = 10 * rounding_effect(self.masked, trial.call, trial.expected)
            allowed = max(allowed, min(rounding, _CHAOS))
            if rounding > _CHAOS:
                self.chaotic = True
                difference = self._few_steps(trial.call)
        if not difference.within(allowed):
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
        self.tolerance = max(self.tolerance, allowed)

    def _few_steps(self, call: Call) -> Difference:
        """Rounding alone changes the outputs of a chaotic recurrence: at most 8 steps compare."""
        sizes = {s: min(n, 8) for s, n in example_sizes(self.program).items()}
        call = at_sizes(self.program, sizes)
        return self._difference(call, self.reference(call))

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


def run_call(module: nn.Module, call: Call) -> Any:
    """Runs a module on clones of a call, without gradients, always with the same random numbers."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, call)
    with preserved_random_state(0), torch.no_grad():
        return module(*args, **kwargs)


def rounding_effect(run: Callable[..., Any], call: Any, expected: Any) -> float:
    """Relative change of a result when the floating inputs move by one unit in the last place."""

    def moved(x: Tensor) -> Tensor:
        return torch.nextafter(x, torch.full_like(x, float("inf"))) if x.is_floating_point() else x

    args, kwargs = pytree.tree_map_only(Tensor, moved, call)
    with torch.no_grad():
        return compare_outputs(expected, run(*args, **kwargs)).max_rel
