"""Max pooling along one dimension while tracing: torch 2.13's own freezes the length it pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["TracedPooling"]


class TracedPooling(TorchFunctionMode):
    """While active, ``max_pool1d`` is a ``max_pool2d`` over a plane of height 1."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.max_pool1d, functional.max_pool1d) and not kwargs.get("return_indices"):
            kwargs.pop("return_indices", None)
            return _max_pool(*args, **kwargs)
        return func(*args, **kwargs)


def _max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool1d`` of [..., channels, length]."""
    pooled = functional.max_pool2d(
        x.unsqueeze(-2),
        (1, _only(kernel_size)),
        (1, _only(stride or kernel_size)),
        (0, _only(padding)),
        (1, _only(dilation)),
        ceil_mode,
    )
    return pooled.squeeze(-2)


def _only(size: Any) -> Any:
    return size[0] if isinstance(size, (tuple, list)) else size
