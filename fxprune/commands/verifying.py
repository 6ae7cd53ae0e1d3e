"""``fxprune verify``: does an ONNX file compute what an archive does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import ConfigError, VerificationError
from fxprune.onnx_session import open_session
from fxprune.tables import render_table
from fxprune.trials import Trial, trials
from fxprune.verify import Difference, compare_outputs, rounding_effect, run_call, tolerance_of

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["run", "verify"]

_CALLS = 10
_MOST_ROUNDING = 1e-3  # beyond it a comparison would say nothing


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
    rows = [(label, f"{d.max_abs:.2g}", d.where) for label, d in found.items()]
    say(render_table(("inputs", "largest error", "where"), rows))
    say(f"\n{onnx.name} computes what {archive.name} does.")


def verify(program: Program, onnx: Path) -> dict[str, Difference]:
    """Compares a program with an ONNX file on the example, and at other sizes and values.

    Args:
        program: the reference.
        onnx: the file.

    Returns:
        The difference of each call, by label. Sizes that the program itself rejects are left out.

    Raises:
        ConfigError: the file cannot be run, or its inputs or outputs do not match the program's.
        VerificationError: they differ by more than rounding explains.
    """
    session = open_session(onnx)
    names = _input_names(program, session)
    module = program.module()
    return {
        trial.label: _compare(module, trial, session, names)
        for trial in trials(program, partial(run_call, module), _CALLS)
    }


def _compare(module: nn.Module, trial: Trial, session: Any, names: Mapping[int, str]) -> Difference:
    label, expected = trial.label, trial.expected
    leaves = pytree.tree_leaves(trial.call)
    feed = {name: _array(leaves[i], session, name) for i, name in names.items()}
    try:
        results = [torch.from_numpy(r) for r in session.run(None, feed)]
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
    difference = compare_outputs(wanted, pairs)
    tolerance = tolerance_of(wanted, "onnx")
    if not difference.within(tolerance):
        effect = rounding_effect(module, trial.call, expected)
        tolerance = max(tolerance, min(10 * effect, _MOST_ROUNDING))
    if not difference.within(tolerance):
        share = f"{difference.max_rel:.2g} of the scale, allowed {tolerance:.2g}"
        problem = f"{difference.max_abs:.3g} apart, {share}"
        raise _failure(label, problem, difference)
    return difference


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


def _array(value: Tensor, session: Any, name: str) -> Any:
    declared = next(i.type for i in session.get_inputs() if i.name == name)
    value = value.detach().cpu()
    if declared == "tensor(float)" and value.is_floating_point():
        value = value.float()
    return value.contiguous().numpy()
