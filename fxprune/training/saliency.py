"""How much the loss feels each connection: |w dL/dw|, summed over mini-batches.

That is the first-order change of the loss when the connection goes: with a mask m on the weight,
|dL/dm| at m = 1. The sum is of absolute values, since over many batches the gradients of a
trained model cancel.

Source: Lee, Ajanthan, Torr, "SNIP", https://arxiv.org/abs/1810.02340.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxprune.errors import TrainingError
from fxprune.masking.insertion import insert_masks
from fxprune.randomness import preserved_random_state
from fxprune.training.placement import loader_generators, moved, placed

if TYPE_CHECKING:
    from fxprune.analysis import Neurons
    from fxprune.program import Program
    from fxprune.training.task import Task

__all__ = ["gradient_scores"]


def gradient_scores(
    program: Program, neurons: Neurons, names: Sequence[str], task: Task, batches: int
) -> dict[str, Tensor]:
    """Sums |w dL/dw| over mini-batches, under the masks that the program has, in eval mode.

    Neither the program nor the global random state is changed.

    Args:
        program: what the gradients are of.
        neurons: its analysis.
        names: the weights to give scores for.
        task: gives loss, batches, seed and device.
        batches: how many mini-batches to use; all where there are fewer.

    Returns:
        For each weight the scores of its connections, on the CPU, float32 (float64 for a float64
        weight). All scores together sum to 1. What is masked already scores 0.

    Raises:
        TrainingError: there is no batch, a loss is no finite scalar or does not depend on the
            weights, a gradient is not finite, or all are 0.
    """
    with torch.inference_mode(False), torch.enable_grad():
        module = insert_masks(_copied(program, names), neurons).module()
        weights = {name: module.get_parameter(name) for name in names}
        generators = loader_generators(task.train)
        with placed(module, task.device) as device, preserved_random_state(task.seed, *generators):
            sums = {n: torch.zeros_like(_wide(w.detach())) for n, w in weights.items()}
            used = 0
            for batch in islice(task.train, batches):
                used += 1
                batch = batch if device is None else moved(batch, device)
                loss = _checked(task.loss(module, batch), f"sensitivity, batch {used}")
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is not None:
                        _check_gradient(name, gradient, used)
                        sums[name] += (_wide(weight.detach()) * _wide(gradient)).abs()
    return _normalized(sums, used)


def _normalized(sums: dict[str, Tensor], batches: int) -> dict[str, Tensor]:
    """Scaled to sum to 1, which keeps small scores away from underflow; the order stays."""
    if not batches:
        raise TrainingError("sensitivity: Task.train gave no batches: it must give at least one")
    total = math.fsum(float(s.sum(dtype=torch.float64)) for s in sums.values())
    if not 0 < total < math.inf:
        raise TrainingError(
            f"sensitivity: |w dL/dw| sums to {total} over {batches} batches, so no connection can "
            "be told from another: check the loss, or judge by the weights alone"
        )
    return {name: (s / total).cpu() for name, s in sums.items()}


def _copied(program: Program, names: Sequence[str]) -> Program:
    """The program over tensors of its own, of which the named ones have gradients."""
    tensors: dict[str, Tensor] = {n: t.detach().clone() for n, t in program.tensors.items()}
    for name, tensor in program.tensors.items():
        if isinstance(tensor, nn.Parameter):
            tensors[name] = nn.Parameter(tensors[name], requires_grad=False)
    for name in names:
        tensors[name] = nn.Parameter(tensors[name])
    return replace(program, tensors=tensors)


def _wide(tensor: Tensor) -> Tensor:
    """At least in float32, where products and sums of half precision would over- or underflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _checked(loss: object, where: str) -> Tensor:
    where = f"{where}: Task.loss"
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        raise TrainingError(f"{where} must return one real number as a tensor, such as a mean")
    if not bool(loss.isfinite()):
        raise TrainingError(f"{where} is {loss.item()}: look for bad values in this batch")
    if not loss.requires_grad:
        raise TrainingError(
            f"{where} does not depend on the weights: compute it from the model's outputs, without "
            "detach, item or no_grad"
        )
    return loss


def _check_gradient(name: str, gradient: Tensor, batch: int) -> None:
    if not bool(gradient.isfinite().all()):
        raise TrainingError(
            f"sensitivity, batch {batch}: the gradient of {name!r} is not finite: look for bad "
            "values in this batch, or for a division or root at 0 in the model or the loss"
        )
