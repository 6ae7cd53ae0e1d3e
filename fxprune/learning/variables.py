"""Mask variables: trained numbers that are no parameters of the model.

They lie in buffers. So the user's optimizer, its weight decay and gradient clipping leave them
alone, ``state_dict`` saves them with the state of their own update rule, and gradients are
reduced over processes here, before anything (a normalization, say) is done to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, distributed, nn
from torch.optim.adam import adam

__all__ = ["MaskVariables", "reduced"]


class MaskVariables(nn.Module):
    """A vector of trained numbers with an update rule of its own.

    Args:
        values: where they start, any shape; kept in float32 or wider.
        rate: learning rate.
        rule: "adam" (betas 0.9 and 0.999) or "sgd", with ``momentum``.
        momentum: of "sgd".
        bound: values are clamped to [-bound, bound] after each update.

    Example:
        >>> variables = MaskVariables(torch.zeros(2), rate=0.1, rule="sgd")
        >>> variables.values.sum().backward()
        >>> variables.update(variables.gradient())
        >>> variables.values
        tensor([-0.1000, -0.1000], requires_grad=True)
    """

    values: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor

    def __init__(
        self,
        values: Tensor,
        *,
        rate: float,
        rule: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.0,
        bound: float = float("inf"),
    ) -> None:
        super().__init__()
        wide = values.detach().to(torch.promote_types(values.dtype, torch.float32)).clone()
        self.rate, self.rule, self.momentum, self.bound = rate, rule, momentum, bound
        self.register_buffer("values", wide.requires_grad_())
        # What the rule does not need takes no memory: variables may be as many as weights.
        none, zeros = wide.new_empty(0), torch.zeros_like(wide, requires_grad=False)
        self.register_buffer("first", zeros if rule == "adam" or momentum else none)
        self.register_buffer("second", zeros.clone() if rule == "adam" else none.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.float32))

    def gradient(self, *, absent: Literal["none", "zero"] = "none") -> Tensor | None:
        """What ``backward`` left, the mean over all processes, which then is taken away.

        None if it is not finite (a step that a loss scaler skips).

        Args:
            absent: what it is where the values took no part.
        """
        gradient, self.values.grad = self.values.grad, None
        gradient = reduced(gradient, self.values)
        if gradient is None and absent == "zero":
            return torch.zeros_like(self.values, requires_grad=False)
        if gradient is None or not bool(gradient.sum().isfinite()):  # fastest of all such tests
            return None
        return gradient

    @torch.no_grad()
    def update(self, gradient: Tensor | None) -> None:
        """One step down the gradient; none without one."""
        if gradient is None:
            return
        if self.rule == "adam":
            adam(
                [self.values],
                [gradient.to(self.values)],
                [self.first],
                [self.second],
                [],
                [self.updates],
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=self.rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
        else:
            if self.momentum:
                gradient = self.first.mul_(self.momentum).add_(gradient)
            self.values.sub_(gradient, alpha=self.rate)
        self.values.clamp_(-self.bound, self.bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the values, which stay leaves that gradients arrive at, and in wide precision."""
        gradient, dtype = self.values.grad, self.values.dtype
        with torch.no_grad():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("values", "first", "second", "updates"):
            tensor = getattr(self, name).detach()
            if tensor.dtype.itemsize < 4:
                tensor = tensor.to(dtype)
            setattr(self, name, tensor)
        self.values.requires_grad_()
        if gradient is not None:
            self.values.grad = gradient.to(self.values)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Keeps the values leaves, also where tensors are assigned instead of copied."""
        super()._load_from_state_dict(*args)
        if not self.values.requires_grad:
            self.values = self.values.detach().requires_grad_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(
            self.values,
            rate=self.rate,
            rule=self.rule,
            momentum=self.momentum,
            bound=self.bound,
        )
        copied.load_state_dict(self.state_dict())
        copied.training = self.training
        memo[id(self)] = copied
        return copied


def reduced(value: Tensor | None, like: Tensor) -> Tensor | None:
    """The mean of a value over all processes; as it is where there is one process only.

    A process without a value counts as 0 there, unless none has one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    processes = distributed.get_world_size()
    if processes == 1:
        return value
    sent = torch.zeros_like(like) if value is None else value.detach().to(like)
    total = torch.cat([sent.flatten(), sent.new_tensor([0.0 if value is None else 1.0])])
    distributed.all_reduce(total)
    return (total[:-1] / processes).reshape(like.shape) if total[-1] > 0 else None
