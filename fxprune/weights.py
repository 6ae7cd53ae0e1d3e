"""The weights of a program and those of a module made of it: copies, reading back, soundness."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxprune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.program import Program

__all__ = ["are_numbers", "owned", "with_weights_of"]


def owned(program: Program, values: Mapping[str, Tensor] | None = None) -> Program:
    """The program over copies of its tensors, which may be trained without touching the model.

    Args:
        program: stays as it is.
        values: other values, by name, for some of the tensors.
    """

    def own(name: str, tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        return like(tensor, copy.copy_(values[name]) if values and name in values else copy)

    with torch.inference_mode(False):
        return replace(program, tensors={n: own(n, t) for n, t in program.tensors.items()})


def with_weights_of(program: Program, module: nn.Module) -> Program:
    """The program with the weights of its module, brought back to where the program was traced.

    Raises:
        ConfigError: the module was converted to another precision.
    """
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    traced = {n.target: n.meta.get("val") for n in program.graph.nodes if n.op == "get_attr"}
    home = next((v.device for v in traced.values() if v is not None), None)
    tensors = {}
    for name, tensor in program.tensors.items():
        was = traced.get(name)
        tensors[name] = tensor = state.get(name, tensor)
        if was is not None and tensor.dtype != was.dtype:
            raise ConfigError(
                f"{name} is {tensor.dtype} now, but the program was traced in {was.dtype}. "
                f"Convert the module back with .to({was.dtype}), or compile the model anew."
            )
        if home is not None and tensor.device != home:
            tensors[name] = like(tensor, tensor.detach().to(home))
    return replace(program, tensors=tensors)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value, as a parameter where the tensor is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def are_numbers(tensor: Tensor, finite: bool) -> bool:
    """Whether no value is NaN and, if asked for, none infinite; takes no memory of its size."""
    if not tensor.numel():
        return True
    extremes = torch.stack(tensor.detach().aminmax())
    return not bool((~extremes.isfinite() if finite else extremes.isnan()).any())
