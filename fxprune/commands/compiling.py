"""``fxprune compile``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fxprune
from fxprune.commands.loading import load_subject
from fxprune.errors import ConfigError
from fxprune.files import target_of, write_whole
from fxprune.passes import table
from fxprune.policy import as_policy

__all__ = ["run"]


def run(
    model: str,
    policy: str,
    *,
    onnx: Path | None,
    save: Path | None,
    report: Path | None,
    opset: int | None,
    say: Callable[[str], None],
) -> None:
    """Compiles a model and writes what was asked for.

    Args:
        model: see :func:`fxprune.commands.loading.load_subject`.
        policy: its text form, or the path of a TOML file.
        onnx: where the ONNX file goes.
        save: where the compact archive goes.
        report: where the report goes, as JSON.
        opset: version of the ONNX operator set.
        say: shows text to the user.

    Raises:
        FxpruneError: something stands in the way; a file that is not complete is not written.
    """
    for target in filter(None, (onnx, save, report)):
        target_of(target)
    _check_opset(opset, onnx)
    prepared = as_policy(policy, table())  # a wrong policy is told before the model is traced
    subject = load_subject(model)
    compact = fxprune.compile(
        subject.model, prepared, example_inputs=subject.example_inputs, task=subject.task
    )
    say(str(compact.report))
    if onnx is not None:  # first, since it is what may be refused: then nothing else is written
        say(f"\n{compact.save_onnx(onnx, opset=opset)}")
    if save is not None:
        compact.save(save)
        say(f"\nsaved {save} ({save.stat().st_size:,} bytes)")
    if report is not None:
        write_whole(report, f"{compact.report.to_json()}\n".encode())
    if onnx is save is report is None:
        say("\nnothing was written: name an ONNX file with -o, or an archive with --save")


def _check_opset(opset: int | None, onnx: Path | None) -> None:
    if opset is None:
        return
    if onnx is None:
        raise ConfigError("--opset is for an ONNX file, and none is named: name it with -o.")
    from fxprune.lowering.opsets import chosen_opset  # onnx takes long to import

    chosen_opset(opset)
