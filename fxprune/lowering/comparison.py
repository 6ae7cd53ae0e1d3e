"""Running an ONNX file in onnxruntime and comparing it with the program it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Never

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.calls import Call, run_call
from fxprune.comparing import (
    Difference,
    Verdict,
    compare_outputs,
    judge,
    tolerance_of,
)
from fxprune.errors import ConfigError, LoweringError, VerificationError
from fxprune.onnx_session import run_session, start_session

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from fxprune.lowering.onnx_model import Lowered

__all__ = ["OnnxCase", "compare"]


_STAGE = "save_onnx"
_REDUCED = (torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OnnxCase:
    """One set of inputs to compare on.

    Attributes:
        label: what is special about it, such as ``"batch=3, time=7"``.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        short: gives the call cut to a few steps, and its outputs, for chaotic models; None if it
            cannot be cut.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    short: Callable[[], tuple[Call, Any] | None] = lambda: None


def compare(
    path: Path,
    lowered: Lowered,
    exported: ExportedProgram,
    reference: Callable[..., Any],
    cases: Sequence[OnnxCase],
) -> list[Verdict]:
    """Runs every case.

    Args:
        path: the file to run.
        lowered: what the file was written from.
        exported: the program, for the structure of its inputs and outputs.
        reference: computes the expected outputs.
        cases: the inputs.

    Returns:
        What came of each case.

    Raises:
        LoweringError: onnxruntime does not load the file.
        VerificationError: a value, shape, type or structure differs.
    """
    session = _session(path)
    return [
        _Comparison(case, session, lowered, exported, partial(run_call, reference)).verdict()
        for case in cases
    ]


def _session(path: Path) -> Any:
    try:
        return start_session(path)
    except Exception as error:
        raise LoweringError(
            f"onnxruntime does not load the model: {error}. Try another opset; if none helps, "
            "replace the operation it names."
        ) from error


@dataclass(frozen=True)
class _Comparison:
    """The comparisons of one case."""

    case: OnnxCase
    session: Any
    lowered: Lowered
    exported: ExportedProgram
    reference: Callable[[Call], Any]

    def verdict(self) -> Verdict:
        """Compares, and refuses what is another program."""
        call = (self.case.args, self.case.kwargs)
        self._inputs(call)  # built by the caller: what is wrong with them is told first
        expected = self.reference(call)
        stated = tolerance_of([expected, *self.exported.state_dict.values()], "onnx")
        verdict = judge(
            self._difference, self.reference, call, expected, stated=stated, short=self.case.short
        )
        if not verdict.passed:
            gap = verdict.difference
            share = f"{gap.max_rel:.2g} of the scale, allowed {verdict.tolerance:.2g}"
            self._fail(gap.where, f"differs by {gap.max_abs:.2g}, {share}", gap)
        return verdict

    def _difference(self, call: Call, expected: Any) -> Difference:
        """Runs the file on a call, and compares types, shapes and values."""
        wanted, inputs = self._outputs(expected), self._inputs(call)
        try:
            results = run_session(self.session, inputs)
        except Exception as error:
            self._fail("the run", f"onnxruntime fails: {error}", cause=error)
        self._check_declared([*map(torch.as_tensor, inputs.values()), *results])
        return compare_outputs(wanted, results)

    def _inputs(self, call: Call) -> dict[str, Any]:
        """What the file takes of a call, by name, in its order."""
        in_spec = self.exported.call_spec.in_spec
        assert in_spec is not None
        args, given = call
        order = in_spec.child(1).context or []
        missing = [name for name in order if name not in given]
        kwargs = {name: given[name] for name in order if name in given}
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        if missing or len(kwargs) != len(given) or spec != in_spec:
            raise ConfigError(
                f"the inputs of case {self.case.label!r} are not built as the program's example "
                "inputs; use the same arguments and keywords."
            )
        names = [value.name for value in self.session.get_inputs()]
        positions = self.lowered.signature.inputs
        return {name: leaves[at] for name, at in zip(names, positions, strict=True)}

    def _outputs(self, expected: Any) -> list[Tensor]:
        """What the file should return where the program returns this."""
        leaves, spec = pytree.tree_flatten(expected)
        if spec != self.exported.call_spec.out_spec:
            wanted = self.exported.call_spec.out_spec
            self._fail("the structure of the outputs", f"{spec} is not {wanted}")
        for position, constant in self.lowered.signature.constants.items():
            if leaves[position] != constant:
                text = f"{leaves[position]!r} is not always {constant!r}"
                self._fail(f"output {position}", text)
        return [self._as_written(leaves[at]) for at in self.lowered.signature.outputs]

    def _as_written(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.as_tensor(np.asarray(value))
        reduced = self.lowered.precision is not None and value.dtype in _REDUCED
        return value.detach().cpu().float() if reduced else value.detach().cpu()

    def _check_declared(self, tensors: Sequence[Tensor]) -> None:
        """Every declared size is right, and a named size is the same everywhere.

        An output of another rank declares nothing about these sizes: the model squeezes them away,
        and the comparison sees to it that the file does the same.
        """
        sizes: dict[str, int] = {}
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        for value, tensor in zip(values, tensors, strict=True):
            if len(value.shape) != tensor.dim():
                continue
            for declared, size in zip(value.shape, tensor.shape, strict=True):
                if isinstance(declared, str):
                    declared = sizes.setdefault(declared, size)
                if declared != size:
                    text = f"declared {value.shape}, but is {list(tensor.shape)}"
                    self._fail(value.name, text)

    def _fail(
        self,
        what: str,
        problem: str,
        gap: Difference | None = None,
        cause: Exception | None = None,
    ) -> Never:
        where = f"{what} at {self.case.label}"
        raise VerificationError(
            f"the ONNX model is not the program: {where}: {problem}. No file was written. If the "
            "model draws random numbers, make it deterministic; otherwise this is a defect of "
            "fxprune's lowering: please report it.",
            pass_name=_STAGE,
            where=where,
            max_abs=math.inf if gap is None else gap.max_abs,
            max_rel=math.inf if gap is None else gap.max_rel,
        ) from cause
