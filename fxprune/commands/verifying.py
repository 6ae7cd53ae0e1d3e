"""``fxprune verify``: does an ONNX file compute what an archive does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

import fxprune
from fxprune.calls import Call, run_call
from fxprune.comparing import (
    CHAOTIC,
    Difference,
    Verdict,
    compare_outputs,
    judge,
    tolerance_of,
)
from fxprune.errors import ConfigError, VerificationError
from fxprune.onnx_session import open_session, run_session
from fxprune.tables import render_table
from fxprune.trials import Trial, few_steps, trials

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["run", "verify"]

_CALLS = 10


def run(archive: Path, onnx: Path, *, say: Callable[[str], None]) -> None:
    """Compares the two files and shows how far they are apart on each call.

    Args:
        archive: the ``.pt2`` file.
        onnx: the ONNX file.
        say: shows text to the user.

    Raises:
        ConfigError: a file cannot be run, or their inputs or outputs do not match.
        VerificationError: they differ.
    """
    found = verify(fxprune.load(archive), onnx)
    gaps = {label: verdict.difference for label, verdict in found.items()}
    rows = [(label, f"{gap.max_abs:.2g}", gap.where) for label, gap in gaps.items()]
    say(render_table(("inputs", "largest error", "where"), rows))
    if any(verdict.chaotic for verdict in found.values()):
        say(f"\nnote: {CHAOTIC}")
    say(f"\n{onnx.name} computes what {archive.name} does.")


def verify(program: Program, onnx: Path) -> dict[str, Verdict]:
    """Compares a program with an ONNX file on the example, and at other sizes and values.

    Args:
        program: the reference.
        onnx: the file.

    Returns:
        What came of each call, by label. Sizes that the program itself rejects are left out.

    Raises:
        ConfigError: the file cannot be run, or its inputs or outputs do not match the program's.
        VerificationError: they differ by more than rounding explains.
    """
    session = open_session(onnx)
    names = _input_names(program, session)
    reference = partial(run_call, program.module())
    return {
        trial.label: _compare(program, reference, trial, session, names)
        for trial in trials(program, reference, _CALLS)
    }


def _compare(
    program: Program,
    reference: Callable[[Call], Any],
    trial: Trial,
    session: Any,
    names: Mapping[int, str],
) -> Verdict:
    verdict = judge(
        partial(_difference, session, names, trial.label),
        reference,
        trial.call,
        trial.expected,
        stated=tolerance_of([trial.expected, *program.tensors.values()], "onnx"),
        short=partial(few_steps, program, reference, trial.call),
    )
    if not verdict.passed:
        gap = verdict.difference
        share = f"{gap.max_rel:.2g} of the scale, allowed {verdict.tolerance:.2g}"
        raise _failure(trial.label, f"{gap.max_abs:.3g} apart, {share}", gap)
    return verdict


def _difference(
    session: Any, names: Mapping[int, str], label: str, call: Call, expected: Any
) -> Difference:
    leaves = pytree.tree_leaves(call)
    try:
        results = run_session(session, {name: leaves[i] for i, name in names.items()})
    except Exception as error:
        nothing = Difference(math.inf, math.inf, "the run")
        raise _failure(label, f"onnxruntime fails: {error}", nothing) from error
    wanted = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    if len(wanted) != len(results):
        raise ConfigError(
            f"the ONNX file has {len(results)} outputs and the archive {len(wanted)}; give the "
            "archive that the file was made from."
        )
    # A file may hold float32 where the program computes in float64 or 16 bits.
    pairs = [
        r.to(w.dtype) if r.is_floating_point() and w.is_floating_point() else r
        for r, w in zip(results, wanted, strict=True)
    ]
    return compare_outputs([w.cpu() for w in wanted], pairs)


def _failure(label: str, problem: str, difference: Difference) -> VerificationError:
    where = f"{difference.where} at {label}"
    return VerificationError(
        f"the ONNX file does not compute what the archive does: {where}: {problem}. Give the "
        "archive that the file was made from; if it is, write the file again.",
        pass_name="verify",
        where=where,
        max_abs=difference.max_abs,
        max_rel=difference.max_rel,
    )


def _input_names(program: Program, session: Any) -> dict[int, str]:
    """For each input leaf of the program that the file takes, the name it has there."""
    leaves = pytree.tree_leaves(program.example)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    given = [i.name for i in session.get_inputs()]
    by_name = {program.inputs[i].name: i for i in tensors}
    if set(given) <= by_name.keys():
        return {by_name[name]: name for name in given}
    if len(given) == len(tensors):
        return dict(zip(tensors, given, strict=True))
    raise ConfigError(
        f"the ONNX file takes {', '.join(given)} and the archive {', '.join(by_name)}; give the "
        "archive that the file was made from."
    )
