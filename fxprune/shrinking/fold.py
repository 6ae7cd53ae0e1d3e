"""Neurons whose value is the same everywhere, folded into the biases of their readers.

Forms handled:

* a linear map or convolution whose row is masked whole gives its bias everywhere;
* an LSTM unit without bias in a candidate row that is masked whole, started at zero, stays 0:
  ``c' = f * c + i * tanh(0)``; a GRU unit likewise: ``h' = (1 - z) * tanh(0) + z * h``;
* position by position, a function of constants is a constant.

Algebra: a reader ``y = W x + b`` of the constant ``x_k = v`` is ``y = W' x + b'`` with
``b' = b + v W[:, k]`` and ``W'[:, k] = 0``. The neuron is then read by nothing and goes.

A constant is followed only through operations that are the same in train and eval mode and keep it
constant everywhere: not batch norm, not dropout, not zero padding (unless the constant is 0). A
reader without a bias takes zeros only; a weight or bias used twice takes nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxprune.masking.operands import operand_mask
from fxprune.operations import argument, operation_name

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Block, Neurons
    from fxprune.program import Program

__all__ = ["find_constants", "fold_constants"]

_POINTWISE = frozenset(
    "relu relu6 tanh sigmoid add sub mul div neg gelu silu elu leaky_relu hardtanh hardsigmoid "
    "hardswish softplus exp square abs clamp mish".split()
)
_MOVING = frozenset(
    "transpose permute view reshape unsqueeze squeeze contiguous clone select slice "
    "detach alias flatten unflatten _unsafe_view flip expand".split()
)
_BIASED = {"linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2, "lstm": 5, "gru": 4, "rnn": 4}
"""Position of the bias that adds to what a weight block contributes."""

_STATE_WEIGHTS = {"lstm": ((4,), (7,)), "gru": ((3,),), "rnn": ((3,),)}
"""Places of the weights that act on the state, not on the input."""

_UNKNOWN = float("nan")


def fold_constants(program: Program, neurons: Neurons) -> Program:
    """The program with constant neurons folded: other biases, more connections masked.

    What it computes is what the program computes under its masks, up to rounding.
    """
    if not program.masks.connections:  # only a row that is masked whole is constant
        return program
    constants = find_constants(program, neurons)
    uses = Counter(name for b in neurons.blocks for name in b.weights)
    tensors, cut = dict(program.tensors), {}
    for block in neurons.blocks:
        values = next((constants[v] for v in _read_values(block) if v in constants), None)
        if values is None or not block.direct or uses[block.weight] > 1:
            continue
        if values.numel() != block.sources.numel():
            continue
        known = values.reshape(block.sources.shape)
        # What a cut neuron would add is gone already.
        known = torch.where(torch.isin(block.sources, program.masks.neurons), _UNKNOWN, known)
        bias = _bias_of(block)
        keep = _fold_block(program, block, known, bias, tensors)
        if keep is not None:
            cut[block.weight] = keep
    return replace(program, tensors=tensors, masks=program.masks.cut_connections(cut))


def find_constants(program: Program, neurons: Neurons) -> dict[fx.Node, Tensor]:
    """For every value with constant positions: the constants, NaN where it varies.

    Each tensor has the shape of the value's neuron array.
    """
    found: dict[fx.Node, Tensor] = {}
    by_consumer: dict[fx.Node, list[Block]] = {}
    for block in neurons.blocks:
        by_consumer.setdefault(block.consumer, []).append(block)
    for node in program.graph.nodes:
        label: Any = neurons.labels.get(node, ())
        if node.op != "call_function" or not isinstance(label, tuple) or len(label) != 1:
            continue
        values = _constant_value(program, neurons, node, label[0], found, by_consumer)
        if values is not None and not bool(values.isnan().all()):
            found[node] = values
    return found


def _constant_value(
    program: Program,
    neurons: Neurons,
    node: fx.Node,
    ids: Tensor,
    found: dict[fx.Node, Tensor],
    by_consumer: dict[fx.Node, list[Block]],
) -> Tensor | None:
    name = operation_name(node)
    if node in by_consumer:
        return _linear_rows(program, node, by_consumer[node], ids, found)
    if name in _POINTWISE:
        return _pointwise(program, node, ids, found)
    if name in _MOVING:
        source = node.args[0]
        label: Any = neurons.labels.get(source, ())  # type: ignore[arg-type]
        values = found.get(source)  # type: ignore[arg-type]
        same = len(label) == 1 and torch.equal(label[0].reshape(-1), ids.reshape(-1))
        return values.reshape(ids.shape) if values is not None and same else None
    if name == "getitem":
        layer: Any = node.args[0]
        return _silent_units(program, layer, by_consumer.get(layer, []), ids)
    return None


def _linear_rows(
    program: Program, node: fx.Node, blocks: list[Block], ids: Tensor, found: dict[fx.Node, Tensor]
) -> Tensor | None:
    """A row without connections gives its bias."""
    if operation_name(node) not in ("linear", "conv1d", "conv2d", "conv3d") or len(blocks) != 1:
        return None
    mask = operand_mask(blocks[0], program.masks.connections)
    if mask is None:
        return None
    silent = ~mask.reshape(mask.shape[0], -1).any(1)
    bias = argument(node, "bias")
    value = torch.zeros(len(silent)) if bias is None else _tensor(program, bias)
    if value is None or ids.numel() != len(silent):
        return None
    wide = value.detach().to(torch.float64)
    return torch.where(silent, wide.cpu(), _UNKNOWN).reshape(ids.shape)


def _pointwise(
    program: Program, node: fx.Node, ids: Tensor, found: dict[fx.Node, Tensor]
) -> Tensor | None:
    values = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if not any(n in found for n in values):
        return None

    def value(n: fx.Node) -> Any:
        if n.op == "get_attr":
            return program.tensors[str(n.target)].detach().to("cpu", torch.float64)
        return found.get(n, torch.tensor(_UNKNOWN, dtype=torch.float64))

    arguments, options = fx.map_arg((node.args, dict(node.kwargs)), value)
    target: Any = node.target
    result = target(*arguments, **options)
    # A tensor that differs from position to position makes no constant.
    fits = torch.broadcast_shapes(result.shape, ids.shape) == ids.shape
    return result.expand(ids.shape) if fits else None


def _silent_units(
    program: Program, layer: fx.Node, blocks: list[Block], ids: Tensor
) -> Tensor | None:
    """LSTM and GRU units whose candidate is tanh(0), started at zero."""
    name = operation_name(layer)
    if name not in ("lstm", "gru") or len(blocks) != 2:
        return None
    states = layer.args[1:3] if name == "lstm" else layer.args[1:2]
    masks = [operand_mask(b, program.masks.connections) for b in blocks]
    if any(s is not None for s in states) or any(m is None for m in masks):
        return None
    gates, candidate = (4, 2) if name == "lstm" else (3, 2)
    if blocks[0].shape[0] != gates * ids.numel():
        return None
    first = 5 if name == "lstm" else 4
    silent = torch.ones(ids.numel(), dtype=torch.bool)
    for mask in masks:
        assert mask is not None
        silent &= ~mask.reshape(gates, ids.numel(), -1)[candidate].any(1)
    for bias in layer.args[first : first + 2]:
        if bias is not None:
            tensor = _tensor(program, bias)
            if tensor is None:
                return None
            silent &= tensor.detach().cpu().reshape(gates, -1)[candidate] == 0
    zero = torch.where(silent, 0.0, torch.tensor(_UNKNOWN, dtype=torch.float64))
    return zero.reshape(ids.shape)


def _read_values(block: Block) -> list[fx.Node]:
    """The values that a block's consumer contracts with the weight, all of the same neurons."""
    consumer = block.consumer
    if block.place in _STATE_WEIGHTS.get(operation_name(consumer), ()):
        return list(consumer.users)  # the layer's own, which is constant if it is 0
    value: Any = consumer.args[0]
    return [] if block.place == (0,) else [value]  # an embedding reads none


def _bias_of(block: Block) -> fx.Node | None:
    position = _BIASED.get(operation_name(block.consumer))
    if position is None or len(block.consumer.args) <= position:
        return None
    bias = block.consumer.args[position]
    return bias if isinstance(bias, fx.Node) else None


def _fold_block(
    program: Program,
    block: Block,
    known: Tensor,
    bias: fx.Node | None,
    tensors: dict[str, Tensor],
) -> Tensor | None:
    """Moves what constants contribute into the bias; returns the connections left."""
    if operation_name(block.consumer) not in _BIASED or block.sources.dim() < 2:
        return None
    foldable = ~known.isnan()
    single = bias is not None and bias.op == "get_attr" and len(bias.users) == 1
    if not single or not _unpadded(block.consumer):
        foldable &= known == 0
    if not bool(foldable.any()) or block.sources.shape[0] != 1:
        return None
    weight = program.tensors[block.weight].detach()
    mask = program.masks.connections.get(block.weight)
    kept = weight if mask is None else weight * mask.to(weight)
    moved = torch.where(foldable, known, 0.0).to(weight.device)
    if bias is not None and bool((moved != 0).any()):
        added = (kept.to(torch.float64) * moved).flatten(1).sum(1)
        name = str(bias.target)
        tensors[name] = _like(tensors[name], tensors[name].detach() + added.to(weight.dtype))
    return (~foldable).expand(weight.shape).clone()


def _unpadded(node: fx.Node) -> bool:
    """Whether a constant input is the same constant at the borders."""
    if not operation_name(node).startswith("conv"):
        return True
    padding = argument(node, "padding")
    return padding in (0, "valid") or (
        isinstance(padding, (list, tuple)) and all(p == 0 for p in padding)
    )


def _tensor(program: Program, node: Any) -> Tensor | None:
    return program.tensors[str(node.target)] if node.op == "get_attr" else None


def _like(old: Tensor, value: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value
