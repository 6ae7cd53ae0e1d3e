"""``fxprune.trace``: from a user's module to a program that computes the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxprune.calls import Call, run_call
from fxprune.comparing import compare_outputs, tolerance_of
from fxprune.errors import ConfigError, FxpruneError, TraceError, VerificationError, first_line
from fxprune.program import InputSpec, Program, Refusal
from fxprune.randomness import preserved_random_state
from fxprune.switching import EvalOnly
from fxprune.tracing.exporting import automatic_shapes, export
from fxprune.tracing.importing import import_program
from fxprune.tracing.isolation import constant_parameters, isolated
from fxprune.tracing.layers import guarded_layers
from fxprune.tracing.modes import LOST_SWITCH, Step, compare_modes, steps_of, switchable
from fxprune.tracing.sizes import (
    at_sizes,
    candidate_sizes,
    check_example,
    example_sizes,
    squeezed_symbols,
)
from fxprune.trials import first_taken, other_values
from fxprune.weights import are_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

__all__ = ["own_call", "trace"]

Place = tuple[int, int]
"""An input leaf and one of its dimensions."""


def trace(model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None) -> Program:
    """Traces a model into a program that computes the same in eval and in train mode.

    The model, its tensors and its mode are left as they were, and so are the random states.

    Args:
        model: any module of tensors in, tensors out; recurrent layers, cells and packed sequences
            included. Trained or not, in any mode, on any device.
        example_inputs: one call's inputs: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a pair ``(tuple, dict)`` of both. Batch 1 will do.
        dynamic_shapes: which dimensions may vary, as in ``torch.export.export``. By default every
            dimension of every input may, where the model allows it; ``program.refusals`` lists
            those that cannot, with the reason.

    Returns:
        The program. Its parameters are the model's own.

    Raises:
        ConfigError: the arguments do not make a call of the model.
        TraceError: the model cannot be traced; the message names the place and the remedy.
        VerificationError: the traced program does not compute what the model does.

    Example:
        >>> program = trace(torch.nn.LSTM(3, 4), torch.zeros(5, 1, 3))
        >>> program.inputs[0].name
        'input'
    """
    _refuse_unfit(model)
    call = own_call(example_inputs)
    check_example(call)
    with isolated(model) as isolation:
        model.eval()
        with constant_parameters(model):
            _run(model, call)
        isolation.check()
        if dynamic_shapes is None:
            fixed: dict[Place, str] = {}
            program, steps = _trace_where_it_agrees(model, call, fixed)
            return _with_modes(program, model, steps, lambda c: automatic_shapes(model, c, fixed))
        exported = export(model, call, dynamic_shapes)
        steps = steps_of(exported)
        program = import_program(exported, call)
        _compare_calls(program, model, call)
        return _with_modes(program, model, steps, lambda _: dynamic_shapes)


def _refuse_unfit(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    for name, part in model.named_modules():
        label = f"{name or 'the model'} ({type(part).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(f"{label} is scripted by torch.jit; pass the Python module instead.")
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TraceError(f"{label} wraps the model for several devices; pass its .module.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter):
            raise TraceError(f"{name} is not initialised yet; run the model once first.")
        if isinstance(tensor, nn.Parameter) and tensor.is_inference():
            raise TraceError(
                f"{name} was made in inference mode and cannot be trained; build or load the model "
                "outside torch.inference_mode()."
            )
        if tensor.is_meta:
            raise TraceError(f"{name} is on the meta device and has no values; load weights first.")
        # A buffer may hold infinities on purpose: the mask of an attention.
        if tensor.is_floating_point() and not are_numbers(tensor, isinstance(tensor, nn.Parameter)):
            raise ConfigError(
                f"{name} holds NaN or infinity; pruning decisions would mean nothing. Repair or "
                "reload the weights."
            )


def own_call(example_inputs: Any) -> Call:
    """Arguments as (args, kwargs), tensors as contiguous clones: a view would bake its size in."""
    if isinstance(example_inputs, Tensor):
        call: Call = ((example_inputs,), {})
    elif isinstance(example_inputs, dict):
        call = ((), example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        pair = len(example_inputs) == 2 and isinstance(example_inputs[0], tuple)
        if pair and isinstance(example_inputs[1], dict):
            call = (tuple(example_inputs[0]), dict(example_inputs[1]))
        else:
            call = (tuple(example_inputs), {})
    else:
        raise ConfigError(
            f"example_inputs is {type(example_inputs).__name__}; give a tensor, a tuple of "
            "positional arguments, a dict of keyword arguments, or (tuple, dict)."
        )
    if any(map(_is_packed, pytree.tree_leaves(call, is_leaf=_is_packed))):
        raise ConfigError(
            "example_inputs holds a PackedSequence, whose layout depends on the lengths. Give "
            "forward the padded sequences and their lengths, and let it pack them."
        )
    with torch.inference_mode(False):
        owned: Call = pytree.tree_map_only(
            Tensor, lambda t: t.detach().clone(memory_format=torch.contiguous_format), call
        )
    return owned


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _run(model: nn.Module, call: Call) -> Any:
    """The model's outputs; its own errors say that the example inputs do not fit."""
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            guarded_layers(),
            preserved_random_state(0),
        ):
            outputs = model(*_cloned(call)[0], **_cloned(call)[1])
    except FxpruneError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the model does not run on the example inputs: {error}. Pass inputs that "
            f"{type(model).__name__}.forward takes."
        ) from error
    for leaf in pytree.tree_leaves(outputs):
        if leaf is not None and not isinstance(leaf, Tensor):
            shown = " ".join(repr(leaf).split())
            raise TraceError(
                f"the model returns {type(leaf).__name__} ({shown:.60}), which is no tensor. "
                "Return tensors, or tuples, lists and dicts of them, or None."
            )
    return outputs


def _cloned(call: Call) -> Call:
    cloned: Call = pytree.tree_map_only(Tensor, torch.Tensor.clone, call)
    return cloned


def _trace_where_it_agrees(
    model: nn.Module, call: Call, fixed: dict[Place, str]
) -> tuple[Program, list[Step]]:
    """Traces with all dimensions free that the model follows; adds the others to ``fixed``."""
    exported = _export_freely(model, call, fixed)
    while True:
        steps = steps_of(exported)
        program = import_program(exported, call)
        wrong = dict.fromkeys(squeezed_symbols(program), _SQUEEZED)
        larger = None
        if not wrong:
            _compare_calls(program, model, call)
            wrong = _unusable_symbols(program, model)
            if not wrong:
                return replace(program, refusals=_fixed_dimensions(program, fixed)), steps
            larger = _larger_call(program, model, wrong)
        if larger is not None:
            call = larger
        else:
            for symbol, reason in wrong.items():
                fixed.update(dict.fromkeys(_places(program.inputs, symbol), reason))
        exported = export(model, call, automatic_shapes(model, call, fixed))


_SQUEEZED = (
    "the model squeezes a size of 1 that comes from it; to let it vary, trace an example in which "
    "that size is larger"
)


def _larger_call(program: Program, model: nn.Module, wrong: Mapping[str, str]) -> Call | None:
    """The call with 2 instead of 1 where a size of 1 may have misled the trace, if the model runs.

    torch takes a size of 1 for broadcasting here and there, whatever it is told.
    """
    grown = {s: 2 for s, size in example_sizes(program).items() if size == 1 and s in wrong}
    call = at_sizes(program, grown)
    return call if grown and _runs(model, call) else None


def _export_freely(model: nn.Module, call: Call, fixed: dict[Place, str]) -> ExportedProgram:
    """Exports with as many free dimensions as torch.export can follow; adds others to ``fixed``."""
    try:
        return export(model, call, automatic_shapes(model, call))
    except TraceError as error:
        failure = error
    leaves = [leaf for leaf in pytree.tree_leaves(call)]
    places = [
        (i, d)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        for d in range(leaf.dim())
    ]
    # Sizes of 1 are the usual culprits (squeeze), then the later dimensions: batch comes first.
    singles = [(i, d) for i, d in places if leaves[i].shape[d] == 1 and d]
    later = [place for place in places if place[1]]
    tries = [[p] for p in (*singles, *reversed(later))]
    tries += [singles, later, [p for p in places if p[1] != 1], places]
    for attempt in (t for t in tries if t):
        try:
            exported = export(model, call, automatic_shapes(model, call, attempt))
        except TraceError:
            continue
        fixed.update(dict.fromkeys(attempt, f"torch.export cannot follow it ({failure})"))
        return exported
    raise failure


def _compare_calls(program: Program, model: nn.Module, call: Call) -> None:
    """Law 1: the program computes what the model does, on two calls in a row.

    The second has other values, where the model takes them.
    """
    runnable = program.module()
    for index, attempts in enumerate(([call], [other_values(call), call])):
        taken = first_taken(attempts, partial(_run, model))
        assert taken is not None  # the model ran on this call before
        call, expected = taken
        result = run_call(runnable, call)
        difference = compare_outputs(expected, result)
        if not difference.within(tolerance_of(expected, "equal")):
            raise VerificationError(
                f"the traced program differs from the model by {difference.max_abs:.3g} at "
                f"{difference.where} (call {index + 1}). If forward keeps state, "
                "pass it in as an input; else please report the model.",
                pass_name="trace",
                where=difference.where,
                max_abs=difference.max_abs,
                max_rel=difference.max_rel,
            )


def _unusable_symbols(program: Program, model: nn.Module) -> dict[str, str]:
    """Dynamic dimensions that cannot vary, with the reason: none if all can."""
    example = example_sizes(program)
    runnable = program.module()
    rigid = {
        symbol: "the model runs at this size only"
        for symbol, size in example.items()
        if not any(
            _runs(model, at_sizes(program, {**example, symbol: other}))
            for other in _other_sizes(size)
        )
    }
    if rigid:
        return rigid
    for sizes in candidate_sizes(example):
        if _agrees(program, runnable, model, sizes) is not None:
            for symbol in sizes:
                reason = _agrees(program, runnable, model, {**example, symbol: sizes[symbol]})
                if reason is not None:
                    return {symbol: reason}
            return {next(iter(sizes)): "the trace differs from the model at other sizes"}
    return {}


def _other_sizes(size: int) -> list[int]:
    tries = (size + 1, 2 * size, size + 2, size - 1, 3 * size, size // 2, size + 4, size + 16)
    return [n for n in dict.fromkeys(tries) if n > 0 and n != size]


def _runs(model: nn.Module, call: Call) -> bool:
    try:
        _run(model, call)
    except FxpruneError:
        return False
    return True


def _agrees(
    program: Program, runnable: fx.GraphModule, model: nn.Module, sizes: Mapping[str, int]
) -> str | None:
    """None if program and model agree or the model itself rejects the sizes; else why not."""
    plain = at_sizes(program, sizes)
    taken = first_taken([other_values(plain), plain], partial(_run, model))
    if taken is None:
        return None
    call, expected = taken
    try:
        result = run_call(runnable, call)
    except Exception as error:
        return f"the traced program fails at another size: {first_line(error)}"
    difference = compare_outputs(expected, result)
    if difference.within(tolerance_of(expected, "equal")):
        return None
    return "the model computes something else at another size than its trace does"


def _places(inputs: tuple[InputSpec, ...], symbol: str) -> list[Place]:
    return [
        (index, dim)
        for index, spec in enumerate(inputs)
        for dim, size in enumerate(spec.shape or ())
        if size == symbol
    ]


def _fixed_dimensions(program: Program, fixed: Mapping[Place, str]) -> tuple[Refusal, ...]:
    found = []
    for index, spec in enumerate(program.inputs):
        for dim, size in enumerate(spec.shape or ()):
            if isinstance(size, int):
                reason = fixed.get((index, dim), f"the model's code fixes it at {size}")
                found.append(Refusal(f"{spec.name}[{dim}]", reason))
    return tuple(found)


def _with_modes(
    program: Program,
    model: nn.Module,
    evaluating: list[Step],
    shapes: Callable[[Call], Any],
) -> Program:
    """Adds what train mode changes, from a second trace."""
    for part in model.modules():
        if isinstance(part, EvalOnly):  # a program's module, which refuses train mode
            return replace(program, mode_difference=part.difference)
    model.train()
    call = program.example
    grown = at_sizes(program, {s: n + 1 for s, n in example_sizes(program).items()})
    for attempt in (call, grown):
        try:
            training = export(model, attempt, shapes(attempt))
            break
        except FxpruneError as error:
            failure = error
    else:
        return replace(program, mode_difference=f"train mode cannot be traced ({failure})")
    follows, difference = compare_modes(evaluating, steps_of(training))
    nodes = switchable(program.graph)
    if len(nodes) != len(follows):
        return replace(program, mode_difference=difference or LOST_SWITCH)
    switches = {n.name: value for n, value in zip(nodes, follows, strict=True) if value is not None}
    return replace(program, switches=switches, mode_difference=difference)
