"""Rebuilding: the user's own module with the compact program's sizes and weights.

The module is copied, every layer gets the smaller tensors of its own names and the sizes that go
with them (``hidden_size``, ``in_features`` ...), and the copy is compared with the compact
program. That works where the user's code does not depend on the sizes that went, and where a
layer can have the sizes it would need: all layers and directions of an ``nn.LSTM`` or ``nn.GRU``
alike. Everything else is refused; the compact program itself has no such limits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fxprune.calls import run_call
from fxprune.comparing import compare_outputs, tolerance_of
from fxprune.errors import ConfigError, PreconditionError, VerificationError
from fxprune.program import Kind
from fxprune.trials import Trial, trials
from fxprune.weights import like

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["rebuild"]

_NAME = "rebuild"


def rebuild(program: Program, model: nn.Module) -> nn.Module:
    """Copies a module and gives it a compact program's sizes and weights.

    Args:
        program: the compact program.
        model: the module that it was traced from, or one of the same architecture; it stays as
            it is.

    Returns:
        A module of the same class, in eval mode, that computes what the program does.

    Raises:
        ConfigError: ``model`` is no module.
        PreconditionError: a layer cannot have the sizes that were left, which the message names,
            or the module cannot be copied.
        VerificationError: the module with these sizes computes something else, or does not run.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"a module is rebuilt, not {model!r}; give the torch.nn.Module that was compiled."
        )
    tensors = _tensors_of(program)
    _require_all_known(tensors, model)
    rebuilt = _copied(model)
    for path, layer in rebuilt.named_modules():
        own = {n: t for n, t in tensors.items() if n.rpartition(".")[0] == path}
        _replace(layer, {n.rpartition(".")[2]: t for n, t in own.items()})
        _resize(layer, path)
    _tie(program, rebuilt)
    rebuilt.eval()
    _verify(program, rebuilt)
    return rebuilt


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise PreconditionError(
            f"copy.deepcopy cannot copy the module: {error}. If that is a weight of "
            "torch.nn.utils.weight_norm or torch.nn.utils.prune, call remove_weight_norm or "
            "prune.remove before you compile; or use the compact program itself (compact.module).",
            pass_name=_NAME,
        ) from error


def _tensors_of(program: Program) -> dict[str, Tensor]:
    """Copies of what the program holds of the user's tensors, by every name they have."""
    held = {n: t for n, t in program.tensors.items() if program.kinds[n] is not Kind.CONSTANT}
    own = {n: like(t, t.detach().clone()) for n, t in held.items()}
    return own | {alias: own[name] for alias, name in program.aliases.items() if name in own}


def _require_all_known(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    known = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        if name not in known:
            raise PreconditionError(
                f"the compact program has {name!r} {list(tensor.shape)}, and the module has no "
                "such tensor. Use the compact program itself (compact.module), or give the module "
                "that was compiled.",
                pass_name=_NAME,
            )


def _replace(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                layer.register_parameter(name, tensor)
            else:
                layer.register_buffer(name, tensor, name not in layer._non_persistent_buffers_set)
    if isinstance(layer, nn.RNNBase):
        for name, tensor in tensors.items():
            setattr(layer, name, tensor)  # which keeps its list of weights up to date
        layer.flatten_parameters()


def _tie(program: Program, model: nn.Module) -> None:
    """Tensors that the user's module shares are one object again."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for alias, name in program.aliases.items():
        if name in parameters and alias in parameters:
            owner, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[name])


# Sizes that layers keep beside their tensors -----------------------------------------------------


def _resize(layer: nn.Module, path: str) -> None:
    """Sets the attributes of one of torch's layers to the sizes of its tensors."""
    if isinstance(layer, nn.RNNBase):
        _resize_recurrent(layer, path)
    elif isinstance(layer, nn.RNNCellBase):
        layer.input_size, layer.hidden_size = layer.weight_ih.shape[1], layer.weight_hh.shape[1]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        _resize_convolution(layer, path)
    elif isinstance(layer, _NormBase):
        sized = layer.weight if layer.affine else layer.running_mean
        layer.num_features = layer.num_features if sized is None else len(sized)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm) and layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        layer.num_channels = len(layer.weight)


def _resize_recurrent(layer: nn.RNNBase, path: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    suffixes = [f"l{i}{d}" for i in range(layer.num_layers) for d in directions]
    units = {s: _shape(layer, f"weight_hh_{s}")[0] // gates for s in suffixes}
    if len(set(units.values())) > 1:
        sizes = ", ".join(f"{s}: {n}" for s, n in units.items())
        raise PreconditionError(
            f"layer {path!r} would have {sizes} units, and {type(layer).__name__} has one size "
            "for all its layers and directions. Use the compact program itself "
            "(compact.module), one module per layer, or round_to to even the sizes out.",
            pass_name=_NAME,
        )
    layer.hidden_size = next(iter(units.values()))
    layer.input_size = _shape(layer, "weight_ih_l0")[1]
    if layer.proj_size:
        layer.proj_size = _shape(layer, "weight_hr_l0")[0]


def _shape(layer: nn.Module, name: str) -> torch.Size:
    tensor: Tensor = getattr(layer, name)  # no parameter where it is parametrized
    return tensor.shape


def _resize_convolution(layer: _ConvNd, path: str) -> None:
    first, second = layer.weight.shape[:2]
    if layer.groups > 1 and layer.groups == layer.in_channels:  # a channel goes with its filters
        filters = layer.out_channels // layer.groups
        layer.groups = layer.in_channels = first if layer.transposed else first // filters
        layer.out_channels = layer.groups * filters
        return
    inner, outer = (first, second) if layer.transposed else (second, first)
    if layer.transposed:
        layer.in_channels, layer.out_channels = inner, outer * layer.groups
    else:
        layer.in_channels, layer.out_channels = inner * layer.groups, outer
    if first % layer.groups:
        raise PreconditionError(
            f"convolution {path!r} would have {first} channels in {layer.groups} groups. Use the "
            "compact program itself (compact.module).",
            pass_name=_NAME,
        )


# The proof ----------------------------------------------------------------------------------------


def _verify(program: Program, rebuilt: nn.Module) -> None:
    reference = program.module()
    for trial in trials(program, partial(run_call, reference)):
        _compare(trial, rebuilt)


def _compare(trial: Trial, rebuilt: nn.Module) -> None:
    try:
        difference = compare_outputs(trial.expected, run_call(rebuilt, trial.call))
    except Exception as error:
        raise VerificationError(
            f"the module's own code does not run with the sizes that were left ({trial.label}): "
            f"{error}. Use the compact program itself (compact.module).",
            pass_name=_NAME,
            where=trial.label,
            max_abs=float("inf"),
            max_rel=float("inf"),
        ) from error
    if not difference.within(tolerance_of(trial.expected, "equal")):
        raise VerificationError(
            f"the rebuilt module differs from the compact program by {difference.max_abs:.3g} at "
            f"{difference.where}, {trial.label}: its code depends on sizes that went. Use the "
            "compact program itself (compact.module).",
            pass_name=_NAME,
            where=f"{difference.where} at {trial.label}",
            max_abs=difference.max_abs,
            max_rel=difference.max_rel,
        )
