"""``.pt2`` archives: saving compact programs, and loading programs to prune."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.comparing import compare_outputs, tolerance_of
from fxprune.errors import ArchiveError, LoweringError
from fxprune.operations import argument
from fxprune.paths import as_path
from fxprune.program import Program, Refusal
from fxprune.switching import batch_counter
from fxprune.tracing import packing, recurrent
from fxprune.tracing.archive import read_archive, read_modes, write_archive
from fxprune.tracing.archive_modes import Modes
from fxprune.tracing.exporting import export_program
from fxprune.tracing.importing import import_program
from fxprune.tracing.kernels import calls_kernel
from fxprune.tracing.modes import LOST_SWITCH, switchable
from fxprune.tracing.recurrent import stock_operations
from fxprune.tracing.sizes import at_sizes, check_example, example_sizes
from fxprune.tracing.tracer import trace

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch.export import ExportedProgram

    from fxprune.program import InputSpec

__all__ = ["load", "save_archive"]

aten = torch.ops.aten


def load(path: str | os.PathLike[str]) -> Program:
    """Loads a ``.pt2`` archive as a program; example inputs come from the archive.

    Archives of :meth:`fxprune.Compact.save` and of ``torch.export.save`` are read, the latter with
    torch's own recurrent operations. The archive is checked before torch sees it: nothing in it
    is executed. Dropout, batch norm and attention follow ``train()`` and ``eval()`` as they did; in
    an archive that fxprune did not write, every dropout does, and every batch norm that counts its
    batches.

    Raises:
        ArchiveError: the file is absent, corrupt, foreign or unsafe, or has no example inputs.
        ConfigError: an example input is empty.
        TraceError: what it holds cannot be a program.
    """
    exported = read_archive(as_path(path))
    if exported.example_inputs is None:
        raise ArchiveError(
            f"{path} holds no example inputs; export the model again, torch.export keeps them.",
            path=str(path),
        )
    _tie(exported)
    args, kwargs = exported.example_inputs
    check_example((args, kwargs))
    program = import_program(exported, (tuple(args), dict(kwargs or {})))
    modes = read_modes(path)
    program = _with_modes(program, modes, str(path))
    stock = any(calls_kernel(node) for node in program.graph.nodes)
    return _with_own_layers(program, modes) if stock else program


def _tie(exported: Any) -> None:
    """Makes tensors over the same values one tensor again, as tied parameters were."""
    seen: dict[Any, Tensor] = {}
    for name, tensor in exported.state_dict.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            exported.state_dict[name] = seen.setdefault(place, tensor)


def save_archive(
    program: Program, path: str | os.PathLike[str], *, portable: bool = False
) -> tuple[str, ...]:
    """Writes a program as an archive; see :meth:`fxprune.Compact.save`."""
    path = as_path(path)
    if not portable:
        exported = export_program(program)
        write_archive(exported, path, _modes(program, exported))
        return ()
    if any(_takes_lengths(n) for n in program.graph.nodes):
        raise LoweringError(
            "the program takes packed sequences, which torch's own operations cannot carry in an "
            "archive. Save without portable=True, or write ONNX."
        )
    with stock_operations():
        exported = export_program(program)
    now = import_program(exported, program.example).inputs
    _drop_needless_guards(program, exported, now)
    write_archive(exported, path, _modes(program, exported))
    return tuple(
        f"{spec.name}[{dim}]={size}"
        for spec, dim, was, size in _dimensions(program, now)
        if isinstance(was, str) and isinstance(size, int)
    )


def _modes(program: Program, exported: ExportedProgram) -> Modes:
    """What an archive says about the modes; by position, as exporting gives nodes new names."""
    follows = tuple(program.switches.get(n.name) for n in switchable(program.graph))
    if len(switchable(exported.graph)) != len(follows):
        return Modes((), program.mode_difference or LOST_SWITCH)
    return Modes(follows, program.mode_difference)


def _with_modes(program: Program, modes: Modes | None, path: str) -> Program:
    nodes = switchable(program.graph)
    if modes is None:
        return replace(program, switches=_likely_switches(program))
    if modes.difference is None and len(modes.follows) != len(nodes):
        raise ArchiveError(
            f"{path}: it says of {len(modes.follows)} operations whether they follow the mode, and "
            f"holds {len(nodes)} that may. Save the program again.",
            path=path,
        )
    pairs = zip(nodes, modes.follows, strict=False)
    switches = {n.name: value for n, value in pairs if value is not None}
    return replace(program, switches=switches, mode_difference=modes.difference)


def _likely_switches(program: Program) -> dict[str, float]:
    return {n.name: 1.0 for n in switchable(program.graph) if _may_follow(n, program)}


def _may_follow(node: fx.Node, program: Program) -> bool:
    """Whether an operation that is off in eval mode most likely is on in train mode."""
    if node.target is aten.batch_norm.default:
        return not node.args[5] and batch_counter(node) in program.tensors
    return node.target is not aten.scaled_dot_product_attention.default and not node.args[2]


def _takes_lengths(node: fx.Node) -> bool:
    layer = node.target in (recurrent.lstm, recurrent.gru, recurrent.rnn)
    return node.target is packing.pad_packed or (layer and argument(node, "lengths") is not None)


def _dimensions(
    program: Program, now: tuple[InputSpec, ...]
) -> Iterator[tuple[InputSpec, int, int | str, int | str]]:
    """Every dimension of every input: its size in the program, and in the archive."""
    for spec, new in zip(program.inputs, now, strict=True):
        for dim, (was, size) in enumerate(zip(spec.shape or (), new.shape or (), strict=True)):
            yield spec, dim, was, size


def _drop_needless_guards(program: Program, exported: Any, now: tuple[InputSpec, ...]) -> None:
    """Lifts guards that refuse a size of 1, which torch sets for strides, if it computes the same.

    Batch 1 is what most people run.
    """
    guards = [g for g in exported._guards_code if "!=" not in g]
    frozen = {was for _, _, was, size in _dimensions(program, now) if isinstance(size, int)}
    sizes = {s: 1 for s in example_sizes(program) if s not in frozen}
    if len(guards) == len(exported._guards_code) or not sizes:
        return
    args, kwargs = at_sizes(program, sizes)
    with torch.no_grad():
        expected = program.module()(*args, **kwargs)
        result = exported.module(check_guards=False)(*args, **kwargs)
    if compare_outputs(expected, result).within(tolerance_of(expected, "equal")):
        exported._guards_code = guards


def _with_own_layers(program: Program, modes: Modes | None) -> Program:
    """Traces a program anew with one operation per recurrent layer and direction."""
    traced = trace(program.module(), program.example)
    if modes is None:  # dropout between the layers has come out of them
        traced = replace(traced, switches={**_likely_switches(traced), **traced.switches})
    note = Refusal("archive", "recurrent layers came as torch's own operations, traced anew")
    return replace(traced, refusals=(*traced.refusals, note))
