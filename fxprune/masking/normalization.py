"""Normalizations that leave cut neurons out of their statistics.

The compact program has no such neurons, so its plain normalization computes the same. Outputs at
cut positions are finite and read by nothing.

As in torch, values narrower than float32 are normalized in float32 and rounded once in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["masked_group_norm", "masked_layer_norm", "masked_rms_norm"]


def masked_layer_norm(
    x: Tensor,
    keep: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the kept positions of the last dimension.

    Args:
        x: [..., features].
        keep: 1 where a neuron stays, [features], or [1] for all of them.
        weight: gain, [features].
        bias: offset, [features].
        eps: added to the variance.

    Example:
        >>> masked_layer_norm(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([1.0, 1.0, 0.0]))[0, :2]
        tensor([-1.0000,  1.0000])
    """
    wide = _wide(x)
    keep = keep.to(wide.dtype).expand(x.shape[-1])
    count = keep.sum().clamp(min=1)
    mean = (wide * keep).sum(-1, keepdim=True) / count
    centred = (wide - mean) * keep
    variance = (centred * centred).sum(-1, keepdim=True) / count
    return _scaled(centred * torch.rsqrt(variance + eps), weight, bias).to(x.dtype)


def masked_rms_norm(
    x: Tensor, keep: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square norm over the kept positions; arguments as :func:`masked_layer_norm`."""
    wide = _wide(x)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    keep = keep.to(wide.dtype).expand(x.shape[-1])
    kept = wide * keep
    mean = (kept * kept).sum(-1, keepdim=True) / keep.sum().clamp(min=1)
    return _scaled(kept * torch.rsqrt(mean + eps), weight, None).to(x.dtype)


def masked_group_norm(
    x: Tensor,
    groups: int,
    keep: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm over the kept channels.

    Args:
        x: [batch, channels, ...].
        groups: number of groups; each loses the same positions.
        keep: 1 where a channel stays, [channels], or [1] for all of them.
        weight: gain, [channels].
        bias: offset, [channels].
        eps: added to the variance.
    """
    tail = (1,) * (x.dim() - 2)
    split = _wide(x).reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    kept = keep.to(split.dtype).expand(x.shape[1]).reshape(1, groups, -1, 1)
    count = (kept.sum(2, keepdim=True) * split.shape[-1]).clamp(min=1)
    mean = (split * kept).sum((2, 3), keepdim=True) / count
    centred = (split - mean) * kept
    variance = (centred * centred).sum((2, 3), keepdim=True) / count
    normal = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    per_channel = [None if t is None else t.reshape(1, -1, *tail) for t in (weight, bias)]
    return _scaled(normal, *per_channel).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
