"""Running an ONNX file in onnxruntime and comparing it with the program it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import ConfigError, LoweringError, VerificationError
from fxprune.onnx_session import start_session

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch.export import ExportedProgram

    from fxprune.lowering.onnx_model import Lowered

__all__ = ["OnnxCase", "compare"]

_STAGE = "save_onnx"
_HALF_TOLERANCE = 1e-2  # of float16 and bfloat16 programs, which were written as float32
_REDUCED = (torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OnnxCase:
    """One set of inputs to compare on.

    Attributes:
        label: what is special about it, such as ``"batch=3, time=7"``.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def compare(
    path: Path,
    lowered: Lowered,
    exported: ExportedProgram,
    reference: Callable[..., Any],
    cases: Sequence[OnnxCase],
    tolerance: float,
) -> float:
    """Runs every case and returns the largest absolute difference.

    Args:
        path: the file to run.
        lowered: what the file was written from.
        exported: the program, for the structure of its inputs and outputs.
        reference: computes the expected outputs.
        cases: the inputs.
        tolerance: allowed difference, as a share of max(1, largest absolute expected value).

    Raises:
        LoweringError: onnxruntime does not load the file.
        VerificationError: a value, shape, type or structure differs.
    """
    session = _session(path)
    half = lowered.precision is not None and lowered.precision.itemsize == 2
    tolerance = max(tolerance, _HALF_TOLERANCE) if half else tolerance
    largest = 0.0
    for case in cases:
        check = _Check(case.label, lowered.precision is not None, tolerance)
        feed = _feed(case, session, lowered, exported)
        with torch.no_grad():
            expected = check.leaves(reference(*case.args, **case.kwargs), lowered, exported)
        try:
            actual = session.run(None, feed)
        except Exception as error:
            raise check.failure("the run", f"onnxruntime fails: {error}") from error
        check.shapes(session, feed, actual)
        names = [output.name for output in session.get_outputs()]
        for name, a, b in zip(names, expected, actual, strict=True):
            largest = max(largest, check.values(name, a, b))
    return largest


def _session(path: Path) -> Any:
    try:
        return start_session(path)
    except Exception as error:
        raise LoweringError(
            f"onnxruntime does not load the model: {error}. Try another opset; if none helps, "
            "replace the operation it names."
        ) from error


def _feed(
    case: OnnxCase, session: Any, lowered: Lowered, exported: ExportedProgram
) -> dict[str, NDArray[Any]]:
    in_spec = exported.call_spec.in_spec
    assert in_spec is not None
    order = in_spec.child(1).context or []
    missing = [name for name in order if name not in case.kwargs]
    kwargs = {name: case.kwargs[name] for name in order if name in case.kwargs}
    leaves, spec = pytree.tree_flatten((tuple(case.args), kwargs))
    if missing or len(kwargs) != len(case.kwargs) or spec != in_spec:
        raise ConfigError(
            f"the inputs of case {case.label!r} are not built as the program's example inputs; "
            "use the same arguments and keywords."
        )
    names = [given.name for given in session.get_inputs()]
    positions = lowered.signature.inputs
    reduced = lowered.precision is not None
    return {n: _array(leaves[p], reduced) for n, p in zip(names, positions, strict=True)}


def _array(value: Any, reduced: bool) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    if reduced and value.dtype in _REDUCED:
        value = value.float()
    return np.asarray(value.numpy(), order="C")


@dataclass(frozen=True)
class _Check:
    """The comparisons of one case."""

    label: str
    reduced: bool
    tolerance: float

    def failure(
        self, what: str, problem: str, max_abs: float = float("inf"), max_rel: float = float("inf")
    ) -> VerificationError:
        where = f"{what} at {self.label}"
        return VerificationError(
            f"the ONNX model is not the program: {where}: {problem}. No file was written. If the "
            "model is random or chaotic, make it deterministic or raise the tolerance; otherwise "
            "this is a defect of fxprune's lowering: please report it.",
            pass_name=_STAGE,
            where=where,
            max_abs=max_abs,
            max_rel=max_rel,
        )

    def leaves(self, outputs: Any, lowered: Lowered, exported: ExportedProgram) -> list[Any]:
        """The expected values of the ONNX outputs."""
        leaves, spec = pytree.tree_flatten(outputs)
        if spec != exported.call_spec.out_spec:
            raise self.failure(
                "the structure of the outputs", f"{spec} is not {exported.call_spec.out_spec}"
            )
        for position, constant in lowered.signature.constants.items():
            if leaves[position] != constant:
                raise self.failure(
                    f"output {position}", f"{leaves[position]!r} is not always {constant!r}"
                )
        return [_array(leaves[p], self.reduced) for p in lowered.signature.outputs]

    def shapes(
        self, session: Any, feed: Mapping[str, NDArray[Any]], outputs: Sequence[NDArray[Any]]
    ) -> None:
        """Every declared size is right, and a named size is the same everywhere.

        An output of another rank declares nothing about these sizes: the model squeezes them away,
        and :meth:`values` sees to it that the file does the same.
        """
        sizes: dict[str, int] = {}
        values = [*session.get_inputs(), *session.get_outputs()]
        for value, array in zip(values, [*feed.values(), *outputs], strict=True):
            if len(value.shape) != array.ndim:
                continue
            for declared, size in zip(value.shape, array.shape, strict=True):
                if isinstance(declared, str):
                    declared = sizes.setdefault(declared, size)
                if declared != size:
                    raise self.failure(value.name, f"declared {value.shape}, but is {array.shape}")

    def values(self, name: str, expected: NDArray[Any], actual: NDArray[Any]) -> float:
        """Returns the largest absolute difference of one output."""
        if expected.dtype != actual.dtype or expected.shape != actual.shape:
            raise self.failure(
                name,
                f"{actual.dtype} {list(actual.shape)} is not {expected.dtype} "
                f"{list(expected.shape)}",
            )
        difference, scale = _difference(expected, actual)
        if difference > self.tolerance * max(1.0, scale):
            raise self.failure(
                name,
                f"differs by {difference:.2g}, allowed are {self.tolerance:.2g} of the scale "
                f"{max(1.0, scale):.2g}",
                difference,
                difference / scale if scale else float("inf"),
            )
        return difference


def _difference(expected: NDArray[Any], actual: NDArray[Any]) -> tuple[float, float]:
    """Largest absolute difference, and largest absolute expected value."""
    if not expected.size:
        return 0.0, 0.0
    a, b = (np.ravel(v).astype(np.float64) for v in (expected, actual))
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    difference[np.isnan(difference)] = np.inf  # a number where the other has none
    finite = np.abs(a[np.isfinite(a)])
    return float(difference.max()), float(finite.max()) if finite.size else 0.0
