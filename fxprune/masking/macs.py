"""Multiply-accumulate operations of one call of a program.

The example is run once and what is multiplied is counted where torch dispatches it, so every way
of writing a product (linear, einsum, ``@``, convolution, attention, cells) counts the same, and
no recorded shape is trusted. Recurrent operations hide theirs in one kernel and have a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fxprune.randomness import preserved_random_state
from fxprune.tracing import recurrent

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["macs", "macs_by_node"]

aten = torch.ops.aten

_RECURRENT_WEIGHTS: Mapping[Any, tuple[int, ...]] = {
    recurrent.lstm: (3, 4, 7),  # w_ih, w_hh, w_hr
    recurrent.gru: (2, 3),
    recurrent.rnn: (2, 3),
}
"""Positions of the matrices among the arguments of each recurrent operation."""


def macs(program: Program) -> int:
    """Counts the multiply-accumulate operations of one call at the example's sizes.

    Counted are matrix and vector products, convolutions, attention, and recurrent layers: for
    each step and sequence one per entry of the input, recurrent and projection weight. Padded
    steps count like others. Sums, activations, normalizations and biases do not count.

    Args:
        program: the program; it is run once on its example, without gradients.
    """
    return sum(macs_by_node(program).values())


def macs_by_node(program: Program) -> Mapping[fx.Node, int]:
    """Counts them for each operation of the graph, as :func:`macs` does."""
    module = fx.GraphModule(dict(program.tensors), program.graph)
    # torch counts a multiplication and an addition apart, and knows no matrix-vector product.
    counter = FlopCounterMode(display=False, custom_mapping=_FURTHER)
    runner = _Runner(module, counter)
    with preserved_random_state(), torch.no_grad(), counter:
        runner.run(*_example_leaves(program))
    nodes = {n.name: n for n in program.graph.nodes}
    return {nodes[name]: found for name, found in runner.found.items()}


def _example_leaves(program: Program) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves(program.example)
    return leaves


class _Runner(fx.Interpreter):
    """Runs a graph and notes the products of each operation, those inside recurrent ones too."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.counter, self.recurrent = counter, 0
        self.found: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops() // 2 + self.recurrent
        result = super().run_node(n)
        self.found[n.name] = self.counter.get_total_flops() // 2 + self.recurrent - before
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = _RECURRENT_WEIGHTS.get(target)
        if positions is None:
            return super().call_function(target, args, kwargs)
        time, batch = args[0].shape[:2]
        weights = [args[i] for i in positions if i < len(args) and isinstance(args[i], Tensor)]
        self.recurrent += time * batch * sum(w.numel() for w in weights)
        with _disable_current_modes():  # some kernels would be counted, others not
            return super().call_function(target, args, kwargs)


def _count_vector_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * torch.Size(a).numel())


def _count_added_vector_product(_: Any, a: Any, b: Any, **__: Any) -> int:
    return int(2 * torch.Size(a).numel())


def _count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _count_trilinear(*args: Any, **_: Any) -> int:
    """Three tensors multiplied; for each, the dimensions of the product that it lacks."""
    wide = [_with_ones(shape, new) for shape, new in zip(args[:3], args[3:6], strict=True)]
    return int(2 * math.prod(max(sizes) for sizes in zip(*wide, strict=True)))


def _with_ones(shape: Sequence[int], new: Sequence[int]) -> list[int]:
    sizes = list(shape)
    for dim in sorted(new):
        sizes.insert(dim, 1)
    return sizes


_FURTHER: dict[Any, Callable[..., int]] = {
    aten.mv: _count_vector_product,
    aten.dot: _count_vector_product,
    aten.addmv: _count_added_vector_product,
    aten._trilinear: _count_trilinear,
    aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
}
