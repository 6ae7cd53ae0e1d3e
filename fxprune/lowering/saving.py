"""Writing an ONNX file that has been checked, run and compared before it appears."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from fxprune.comparing import CHAOTIC
from fxprune.errors import ConfigError, LoweringError
from fxprune.files import appearing, target_of, unwritable
from fxprune.lowering.comparison import OnnxCase, compare
from fxprune.lowering.onnx_model import lower
from fxprune.paths import as_path

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["OnnxReport", "save_onnx"]


@dataclass(frozen=True)
class OnnxReport:
    """What was written; ``str()`` is a table.

    Attributes:
        path: the file.
        bytes: its size.
        nodes: number of nodes.
        operators: number of nodes by operator.
        sizes: labels of the cases it was compared on.
        max_abs_error: largest absolute difference from the program over all cases.
        opset: version of the ONNX operator set.
        notes: what else is worth knowing, such as ``"float64 written as float32"``.
    """

    path: Path
    bytes: int
    nodes: int
    operators: Mapping[str, int]
    sizes: tuple[str, ...]
    max_abs_error: float
    opset: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        rows = [
            ("file", f"{self.path} ({self.bytes:,} bytes, opset {self.opset})"),
            ("nodes", f"{self.nodes}: {operators}"),
            ("compared at", "; ".join(self.sizes)),
            ("largest error", f"{self.max_abs_error:.2g}"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<14} {text}" for name, text in rows)


def save_onnx(
    exported: ExportedProgram,
    reference: Callable[..., Any],
    cases: Sequence[OnnxCase],
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str],
    dimension_names: Mapping[str, Mapping[int, str]],
    opset: int | None = None,
) -> OnnxReport:
    """Writes a program as ONNX, after comparing it with a reference in onnxruntime.

    The file appears at ``path`` whole and verified, or not at all; an older file stays until then.

    Args:
        exported: a program whose recurrent layers are fxprune's operations or ATen cells.
        reference: computes the expected outputs, called as the program.
        cases: inputs to compare on; they should differ in every size that varies.
        path: where to write.
        input_names: names of the tensor inputs, in order.
        dimension_names: names of sizes that vary, by input and dimension.
        opset: version of the ONNX operator set; 20 if None.

    Returns:
        What was written.

    Raises:
        ConfigError: the path cannot be written, or names or ``opset`` do not fit.
        LoweringError: the program has no ONNX counterpart.
        VerificationError: the ONNX model computes something else.
    """
    shown = as_path(path)
    target = target_of(shown)
    if not cases:
        raise ConfigError("save_onnx got no cases; a file must be compared before it is written.")
    try:
        with appearing(target) as partial:
            lowered = lower(exported, input_names, dimension_names, opset)
            data = lowered.model.SerializeToString()
            _check(data)
            partial.write_bytes(data)
            verdicts = compare(partial, lowered, exported, reference, cases)
    except OSError as error:
        raise unwritable(shown, error) from error
    chaotic = any(verdict.chaotic for verdict in verdicts)
    operators = Counter(node.op_type for node in lowered.model.graph.node)
    return OnnxReport(
        path=shown,
        bytes=len(data),
        nodes=operators.total(),
        operators=dict(sorted(operators.items())),
        sizes=tuple(case.label for case in cases),
        max_abs_error=max(verdict.difference.max_abs for verdict in verdicts),
        opset=next(o.version for o in lowered.model.opset_import if not o.domain),
        notes=(*lowered.notes, CHAOTIC) if chaotic else lowered.notes,
    )


def _check(data: bytes) -> None:
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(
            f"the ONNX checker refuses the model: {error}. Please report this as a defect."
        ) from error
