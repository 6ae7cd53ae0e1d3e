"""Runs passes one after another and checks each on the spot.

For every pass: a task if it needs one; ``requires``; ``run``; the program given is still as it
was; the result has the right type; ``changed`` is true; the masks fit, and spare what is
protected; where the graph changed it lints, compiles and gives outputs of the same shapes; if the
pass is EXACT the outputs are the same on the example inputs; ``ensures``. A failure leaves the
program given whole and names the pass and those before it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.comparing import compare_outputs, tolerance_of
from fxprune.contract import Effect, Facts, NeuronAnalysis, Pass, PassResult
from fxprune.errors import (
    FxpruneError,
    PassError,
    PostconditionError,
    PreconditionError,
    VerificationError,
)
from fxprune.masking.insertion import insert_masks
from fxprune.policy import protected
from fxprune.program import Program, Refusal
from fxprune.randomness import preserved_random_state

__all__ = ["Outcome", "PassRecord", "fingerprint", "run_passes"]

_LOG = logging.getLogger("fxprune")

FineTune = Callable[[Program], Program]
Measure = Callable[[Program, Facts], Mapping[str, int]]
Hook = Callable[[Pass, Program, PassResult], None]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        text: the pass in text form.
        changed: whether it changed the program.
        before: sizes of the program given, as measured.
        after: sizes of its result.
        milliseconds: how long it ran, checks and fine-tuning included.
    """

    text: str
    changed: bool
    before: Mapping[str, int]
    after: Mapping[str, int]
    milliseconds: float

    def __str__(self) -> str:
        sizes = (f"{n} {self.before[n]:,} -> {v:,}" for n, v in self.after.items())
        change = "changed" if self.changed else "unchanged"
        return ", ".join([f"{self.text}: {change}", *sizes, f"{self.milliseconds:.0f} ms"])


class Outcome(NamedTuple):
    """What a pipeline hands back: the last program, all refusals in order, one record per pass."""

    program: Program
    refusals: tuple[Refusal, ...]
    log: tuple[PassRecord, ...]


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    facts: Facts | None = None,
    fine_tune: FineTune | None = None,
    measure: Measure | None = None,
    hook: Hook | None = None,
) -> Outcome:
    """Applies passes in order.

    Args:
        program: where to start; it stays as it is.
        passes: may be empty.
        facts: facts about ``program``, with what the user gave (task, protection); by default
            fresh ones without either.
        fine_tune: trains the weights under fixed masks; called after each pass that changed
            masks, unless the pass trains itself.
        measure: sizes for the log, such as parameters and MACs; by default what the masks cut.
        hook: called with each pass, the program it was given, and its result.

    Raises:
        ConfigError: a protect pattern matches no parameter.
        PassError: a pass failed or broke its promise; any error names the pass and those before.
    """
    facts = facts or Facts(program)
    measure = measure or _count_cut
    if facts.context.protect:  # a wrong pattern is told even where no pass would ask
        protected(program, facts[NeuronAnalysis], facts.context.protect)
    records: list[PassRecord] = []
    refusals: list[Refusal] = []
    for number, pass_ in enumerate(passes):
        with _naming(pass_, passes[:number]):
            start, sizes = time.perf_counter(), measure(program, facts)
            result = _run_checked(program, pass_, facts)
            if fine_tune is not None and not pass_.needs_task:
                result = _fine_tuned(program, result, pass_, fine_tune)
            facts = facts.after(result.program, pass_.keeps)
            milliseconds = 1e3 * (time.perf_counter() - start)
            after = measure(result.program, facts)
            records.append(PassRecord(str(pass_), result.changed, sizes, after, milliseconds))
            _LOG.info("%s", records[-1])
            if hook is not None:
                hook(pass_, program, result)
        program = result.program
        refusals.extend(result.refusals)
    return Outcome(program, tuple(refusals), tuple(records))


def fingerprint(program: Program) -> str:
    """A digest of what passes may change: masks, graph, and the identity of every tensor.

    A mask that keeps everything counts as none. Tensors count by name, shape, type, object and
    version, so a weight that was replaced or written to shows; digests of different processes
    cannot be compared.
    """
    digest = hashlib.sha256()
    for node in program.graph.nodes:
        digest.update(f"{node.name} {node.target} {node.args} {node.kwargs}\n".encode())
    for name, tensor in sorted(program.tensors.items()):
        version = 0 if tensor.is_inference() else tensor._version
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {id(tensor)} {version}".encode()
        )
    digest.update(program.masks.neurons.contiguous().numpy().data)
    for name, mask in sorted(program.masks.connections.items()):
        if not bool(mask.all()):
            digest.update(f"{name} {tuple(mask.shape)}".encode())
            digest.update(mask.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# One pass ---------------------------------------------------------------------------------------


@contextmanager
def _naming(pass_: Pass, earlier: Sequence[Pass]) -> Iterator[None]:
    """Has every error name the pass and its predecessors."""
    after = f" (after {', '.join(p.name for p in earlier)})" if earlier else ""
    where = f"pass {pass_.name!r}{after}"
    try:
        yield
    except FxpruneError as error:
        error.args = (f"{where}: {error}", *error.args[1:])  # the type and its fields stay
        raise
    except Exception as error:
        message = f"{where} stopped with {type(error).__name__}: {error}"
        raise PassError(message, pass_name=pass_.name) from error


def _run_checked(program: Program, pass_: Pass, facts: Facts) -> PassResult:
    if pass_.needs_task and facts.context.task is None:
        raise PreconditionError(
            "it has to train, and there is no task. Give one: task=fxprune.Task(...), or on the "
            "command line a package.module:function that returns it after model and inputs.",
            pass_name=pass_.name,
        )
    if pass_.needs_task:
        program.module().train()  # refused where train mode differs: before any search, not after
    own = facts.for_pass(pass_)
    before = fingerprint(program)
    pass_.requires(program, own)
    result = pass_.run(program, own)
    if not isinstance(result, PassResult) or not isinstance(result.program, Program):
        raise _broken(pass_, f"run must return a PassResult of a Program, not {result!r}")
    if fingerprint(program) != before:
        raise _broken(pass_, "it changed the program it was given instead of making a new one")
    if result.changed != (fingerprint(result.program) != before):
        claim = "changed the program" if result.changed else "left the program as it was"
        raise _broken(pass_, f"it says that it {claim}, and that is not so")
    if result.changed:
        _check_masks(pass_, result.program)
        _check_protection(pass_, facts, program, result.program)
        _check_outputs(pass_, facts, program, result.program)
    pass_.ensures(program, result)
    return result


def _broken(pass_: Pass, what: str) -> PostconditionError:
    return PostconditionError(f"{what}. This is a defect of the pass.", pass_name=pass_.name)


def _check_masks(pass_: Pass, program: Program) -> None:
    for name, mask in program.masks.connections.items():
        tensor = program.tensors.get(name)
        if tensor is None or mask.shape != tensor.shape or mask.dtype != torch.bool:
            raise _broken(pass_, f"the mask of {name!r} does not fit a tensor of that name")


def _check_protection(pass_: Pass, facts: Facts, before: Program, after: Program) -> None:
    """What a pass adds to the masks must spare what the user protects."""
    if not facts.context.protect or after.graph is not before.graph:
        return
    spared = protected(before, facts[NeuronAnalysis], facts.context.protect)
    added = after.masks.neurons[~torch.isin(after.masks.neurons, before.masks.neurons)]
    if bool(spared.neurons[added].any()):
        raise _broken(pass_, "it cut neurons that are protected")
    for name in sorted(spared.tensors & after.masks.connections.keys()):
        earlier = before.masks.connections.get(name)
        keep = after.masks.connections[name]
        if not bool((keep if earlier is None else keep | ~earlier).all()):
            raise _broken(pass_, f"it masked connections of {name!r}, which is protected")


def _check_outputs(pass_: Pass, facts: Facts, before: Program, after: Program) -> None:
    """A new graph must run and keep its shapes; an EXACT pass must keep the values."""
    exact = pass_.effect is Effect.EXACT
    if after.graph is before.graph and not exact:
        return  # masks and weights do not change shapes
    after.graph.lint()
    expected, actual = _run(before, facts), _run(after, facts.after(after, pass_.keeps))
    if _shapes(expected) != _shapes(actual):
        raise _broken(
            pass_, f"the outputs have shapes {_shapes(actual)} instead of {_shapes(expected)}"
        )
    if exact:
        difference = compare_outputs(expected, actual)
        if not difference.within(tolerance_of(expected, "equal")):
            raise VerificationError(
                f"the outputs differ by {difference.max_abs:.2e} at {difference.where}, though the "
                "pass promises the same. This is a defect of the pass.",
                pass_name=pass_.name,
                where=difference.where,
                max_abs=difference.max_abs,
                max_rel=difference.max_rel,
            )


def _run(program: Program, facts: Facts) -> Any:
    """The outputs under the program's masks, at its example."""
    if not program.masks.empty:
        program = insert_masks(program, facts[NeuronAnalysis])
    args, kwargs = program.example
    with preserved_random_state(0), torch.no_grad():
        return program.module()(*args, **kwargs)


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _fine_tuned(
    before: Program, result: PassResult, pass_: Pass, fine_tune: FineTune
) -> PassResult:
    masked = result.program
    if masked.masks.same_as(before.masks):
        return result
    tuned = fine_tune(masked)
    if tuned.graph is not masked.graph or not tuned.masks.same_as(masked.masks):
        raise PostconditionError(
            "fine-tuning after it changed the graph or the masks, where only weights may change",
            pass_name=pass_.name,
        )
    return PassResult(tuned, True, result.refusals)


def _count_cut(program: Program, _: Facts) -> Mapping[str, int]:
    masks = program.masks
    return {
        "neurons cut": len(masks.neurons),
        "connections masked": sum(
            m.numel() - int(m.count_nonzero()) for m in masks.connections.values()
        ),
    }
