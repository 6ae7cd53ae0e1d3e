"""What the tests of the laws share: sizes, comparisons, and watching a module for changes.

Nothing here uses the compiler's own comparing, so that a mistake in it cannot hide itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo_model import Inputs, ZooModel

__all__ = [
    "EQUAL",
    "ONNX",
    "assert_same",
    "at_precision",
    "call",
    "gap",
    "other_sizes",
    "run_onnx",
    "settle_modes",
    "tensors",
    "watched",
]

EQUAL = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Tolerance between programs, relative to the scale of the output."""

ONNX = 1e-4
"""Tolerance between a program and its ONNX file."""

_CHAOS = 1e-3  # beyond that, a comparison of rounding says nothing


def at_precision(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs whose floating tensors have that type."""
    moved: Inputs = pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs
    )
    return moved


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]


def other_sizes(model: ZooModel, example: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes (batch, time) unlike the example's: 1 and 1 first, then odd, short and long ones."""
    valid = [t for t in range(1, 30) if model.valid_time is None or model.valid_time(t)]

    def fit(batch: int, time: int) -> tuple[int, int]:
        nearest = min(valid, key=lambda t: abs(t - time))
        return (
            batch if model.batch_varies else model.batch,
            nearest if model.time_varies else model.time,
        )

    wanted = ((1, 1), (3, 7), (1, 6), (4, 2), (2, 9))
    return [s for s in dict.fromkeys(fit(*w) for w in wanted) if s != example]


def call(module: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Runs a module on clones of the inputs, always with the same random numbers."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        return module(*pytree.tree_map_only(Tensor, torch.clone, tuple(inputs)))


def gap(expected: Any, actual: Any) -> float:
    """The largest difference, relative to the scale of its output (at least 1).

    Structure, shapes, types and what is not finite must agree exactly.
    """
    left, structure = pytree.tree_flatten(expected)
    right, other = pytree.tree_flatten(actual)
    assert structure == other
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a is None and b is None:
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel():
            assert torch.equal(a.isfinite(), b.isfinite())
            a, b = (t.detach().double().nan_to_num(posinf=0.0, neginf=0.0) for t in (a, b))
            worst = max(worst, float((a - b).abs().max()) / max(1.0, float(a.abs().max())))
    return worst


def assert_same(
    expected: Callable[..., Any], actual: Callable[..., Any], inputs: Sequence[Any], stated: float
) -> None:
    """Both compute the same within the stated tolerance.

    Or within ten times what moving the inputs by one unit in the last place changes: a chaotic
    recurrence amplifies rounding though nothing is wrong. But no test model may be chaotic.
    """
    reference = call(expected, inputs)
    found = gap(reference, call(actual, inputs))
    if found > stated:
        moved = pytree.tree_map_only(
            Tensor,
            lambda x: x.nextafter(torch.full_like(x, torch.inf)) if x.is_floating_point() else x,
            tuple(inputs),
        )
        rounding = 10 * gap(reference, call(expected, moved))
        assert rounding < _CHAOS
        assert found <= max(stated, rounding), [tuple(x.shape) for x in tensors(inputs)]


def run_onnx(session: Any, inputs: Sequence[Any], like: Any) -> Any:
    """Runs an onnxruntime session on the leaves of a call; the result has the structure of like."""
    leaves = tensors(inputs)
    names = [i.name for i in session.get_inputs()]
    arrays = {name: x.numpy() for name, x in zip(names, leaves, strict=True)}
    results = iter(torch.from_numpy(y) for y in session.run(None, arrays))
    flat, structure = pytree.tree_flatten(like)
    return pytree.tree_unflatten([None if x is None else next(results) for x in flat], structure)


def settle_modes(module: nn.Module) -> nn.Module:
    """Sets every dropout probability to 0, so that train mode is deterministic."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, (nn.RNNBase, nn.MultiheadAttention)):
            part.dropout = 0.0
    return module


@contextmanager
def watched(module: nn.Module) -> Iterator[list[str]]:
    """Collects in a list what has changed of a module, or of the global state, by the end."""
    before, changes = _snapshot(module), list[str]()
    yield changes
    after = _snapshot(module)
    changes.extend(sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)))


def _snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that must stay, in values that compare by ``==``."""
    seen: dict[str, Any] = {
        "random": random.getstate(),
        "numpy random": repr(np.random.get_state()),
        "torch random": _bits(torch.get_rng_state()),
        "gradients enabled": torch.is_grad_enabled(),
        "default type": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }
    for name, part in module.named_modules():
        seen[f"{name}: class"] = (type(part), part.forward.__qualname__)
        for key, value in vars(part).items():
            seen[f"{name}: {key}"] = _value(value)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        seen[f"{name}: tensor"] = (
            id(tensor),
            type(tensor),
            tensor.requires_grad,
            tensor.data_ptr(),
        )
        seen[f"{name}: gradient"] = None if tensor.grad is None else _bits(tensor.grad)
        seen[f"{name}: bits"] = (tensor.dtype, tuple(tensor.shape), _bits(tensor))
    return seen


def _value(value: Any) -> Any:
    """Containers by what they hold, tensors and modules by identity, the rest by itself."""
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_value(item) for item in value]
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return value if plain else (type(value), id(value))


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
