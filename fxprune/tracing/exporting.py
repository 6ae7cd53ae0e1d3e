"""Running ``torch.export`` on a user's model, and turning its failures into advice."""

from __future__ import annotations

import inspect
import logging
import traceback
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export import _trace as exporter
from torch.fx import _symbolic_trace as symbolic_tracer
from torch.utils import _pytree as pytree

from fxprune.errors import FxpruneError, TraceError, first_line
from fxprune.tracing.kernels import TracedKernels
from fxprune.tracing.layers import traced_layers
from fxprune.tracing.pooling import TracedPooling
from fxprune.tracing.sizes import at_sizes, example_sizes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from fxprune.calls import Call
    from fxprune.program import Program

__all__ = ["automatic_shapes", "export", "export_program"]


def automatic_shapes(model: nn.Module, call: Call, fixed: Collection[tuple[int, int]] = ()) -> Any:
    """Dynamic shapes that let every dimension of every input tensor vary.

    Args:
        model: the model to be exported.
        call: its example inputs.
        fixed: exceptions, as pairs of input leaf and dimension.
    """
    shapes = ShapesCollection()
    for index, leaf in enumerate(pytree.tree_leaves(call)):
        if isinstance(leaf, Tensor) and leaf.dim():
            shapes[leaf] = tuple(
                Dim.STATIC if (index, d) in fixed else Dim.AUTO for d in range(leaf.dim())
            )
    with _named_keywords(model, call):
        return shapes.dynamic_shapes(model, *call)


@contextmanager
def _named_keywords(model: nn.Module, call: Call) -> Iterator[None]:
    """While active, forward names the arguments that its ``**kwargs`` take.

    ``torch.export`` of torch 2.13 takes them once for a dictionary, and once for arguments.
    """
    signature = inspect.signature(model.forward)
    parameters = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    extra = [name for name in call[1] if name not in parameters]
    if not extra:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    original, before = model.forward, vars(model).get("forward")
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    vars(forward)["__signature__"] = signature.replace(parameters=[*parameters.values(), *named])
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        vars(model)["forward"] = before
        if before is None:
            del vars(model)["forward"]


def _flat_shapes(model: nn.Module, shapes: Any) -> Any:
    """Dynamic shapes of ``**kwargs`` as those of arguments, as :func:`_named_keywords` has them."""
    parameters = inspect.signature(model.forward).parameters.values()
    extra = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if isinstance(shapes, dict) and isinstance(shapes.get(extra), dict):
        return {**{n: s for n, s in shapes.items() if n != extra}, **shapes[extra]}
    return shapes


def export(model: nn.Module, call: Call, dynamic_shapes: Any) -> ExportedProgram:
    """Exports a model in its present mode, recurrent layers as marker operations.

    Raises:
        TraceError: the model cannot be exported; names the user's line and a remedy.
    """
    shapes = _flat_shapes(model, dynamic_shapes)
    try:
        with (
            traced_layers(),  # first: one thread at a time, whatever else is changed here
            # Size 1 in the example must not bake itself in: batch 1 is what most people pass.
            fx_config.patch(  # type: ignore[attr-defined]  # installed by torch at import
                backed_size_oblivious=True
            ),
            TracedKernels(),
            TracedPooling(),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
            _quiet(),
            _unwrapped_names(),
            _named_keywords(model, call),
        ):
            warnings.simplefilter("ignore")
            return torch.export.export(
                model, call[0], call[1] or None, dynamic_shapes=shapes, strict=False
            )
    except FxpruneError:
        raise
    except Exception as error:
        raise TraceError(_explain(model, error)) from error


def export_program(program: Program) -> ExportedProgram:
    """Exports a program, its dynamic dimensions dynamic, at sizes that leave no doubt about that.

    Raises:
        TraceError: torch.export fails on the program.
    """
    module = program.module()
    example = example_sizes(program)
    # Sizes of 1 would be taken for broadcasting; equal sizes for one dimension.
    distinct = {s: n + 2 + i if n < 2 else n for i, (s, n) in enumerate(example.items())}
    call = at_sizes(program, distinct)
    try:
        with torch.no_grad():
            module(*call[0], **call[1])
    except (FxpruneError, RuntimeError, ValueError, IndexError):
        call = program.example
    fixed = {
        (index, dim)
        for index, spec in enumerate(program.inputs)
        for dim, size in enumerate(spec.shape or ())
        if isinstance(size, int)
    }
    return export(module, call, automatic_shapes(module, call, fixed))


@contextmanager
def _unwrapped_names() -> Iterator[None]:
    """Takes back names that would break every later trace of the process.

    The code that torch 2.13 writes for a graph with ``torch.sym_min`` asks the next tracer to wrap
    a global of that name, which no module has.
    """

    def forget() -> None:
        wrapped = symbolic_tracer._wrapped_fns_to_patch
        for key in [key for key in wrapped if "." in key[1]]:
            del wrapped[key]

    forget()
    try:
        yield
    finally:
        forget()


@contextmanager
def _quiet() -> Iterator[None]:
    """While active, torch.export raises its complaints, and does not print them as well."""

    def nothing(*_: object, **__: object) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(nothing)
    # Found before the builtin, with which the exporter prints the graphs of failed exports.
    vars(exporter)["print"] = nothing
    try:
        yield
    finally:
        vars(exporter).pop("print", None)
        for logger in loggers:
            logger.removeFilter(nothing)


_LOGGERS = ("torch.fx.experimental.symbolic_shapes", exporter.__name__)

_REMEDIES = (
    (
        ("data-dependent", "GuardOnDataDependent", "Could not extract specialized integer"),
        "the control flow or a shape depends on tensor values. Replace the branch by torch.where, "
        "or move it out of forward",
    ),
    (
        ("Dynamic shapes", "dynamic_shapes", "constraint", "Constraints violated"),
        "dynamic_shapes does not fit the model or the example inputs; mark the named dimension "
        "static, or leave dynamic_shapes out so that fxprune finds out by itself",
    ),
)


def _explain(model: nn.Module, error: Exception) -> str:
    text = str(error)
    place = _place(error)
    if place:
        otherwise = "rewrite that line with operations torch.export can follow"
    else:
        otherwise = "check example_inputs and dynamic_shapes against the arguments of forward"
    remedy = next(
        (
            advice
            for keys, advice in _REMEDIES
            if any(k in text or k in type(error).__name__ for k in keys)
        ),
        otherwise,
    )
    what = first_line(error)
    return f"{type(model).__name__} cannot be traced{place}: {what}. Remedy: {remedy}."


def _place(error: Exception) -> str:
    """The innermost line of the traceback that is the user's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        library = any(part in frame.filename for part in ("/torch/", "/fxprune/", "/sympy/"))
        if not library and not frame.filename.startswith("<") and frame.name != "wrapper":
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""
