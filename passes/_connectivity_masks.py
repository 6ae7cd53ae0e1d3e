"""Masks behind a unit step, and the features that their gradients are normalized by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fxprune.learning import MaskVariables

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.masking.prunable import Weight

__all__ = ["ESTIMATORS", "ConnectionMask", "Partition", "open_connections", "partition"]

ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda m: m.new_ones(()),
    "softplus": torch.sigmoid,
    "leaky_relu": lambda m: torch.where(m > 0, 1.0, 0.1).to(m),
}
"""g'(m), which stands for the slope of the unit step. Positive, so that what is off can return."""

EPSILON = 1e-12
"""Added to the norm of a feature's gradient."""

ON = 1e-6
"""Where a variable is put that must be on: just above 0."""


@dataclass(frozen=True)
class Partition:
    """How the connections of a weight share mask variables, and those features.

    A row is a position along the dimensions of the weight that destinations lie along.

    Attributes:
        rows: shape of one number per row, broadcastable to the weight.
        filters: which variable each row belongs to, int64 [rows]; None if each connection has
            a variable of its own.
        features: which feature each row belongs to, or each variable of filters, int64.
        sizes: how many connections that are not masked already each variable masks, shaped like
            the variables; None for one each.
    """

    rows: tuple[int, ...]
    filters: Tensor | None
    features: Tensor
    sizes: Tensor | None


def partition(weight: Weight, neurons: Neurons, structure: str, feature: str) -> Partition:
    """Divides up a weight, by its first use where it is tied.

    Args:
        weight: the weight.
        neurons: the analysis of its program.
        structure: "connection" or "filter".
        feature: "row" for outputs of their own, "unit" for all rows of a destination neuron.
    """
    size = weight.tensor.shape
    rows = tuple(n if d in weight.output_dims else 1 for d, n in enumerate(size))
    units = _units(weight, neurons, rows)
    outputs = units if feature == "unit" else torch.arange(len(units))
    open_ = open_connections(weight)
    if structure == "connection":
        return Partition(rows, None, outputs, None if bool(open_.all()) else open_)
    counts = open_.long().sum_to_size(rows).flatten()
    sizes = torch.zeros(int(outputs.max()) + 1, dtype=torch.int64).index_add_(0, outputs, counts)
    features = torch.zeros_like(sizes) if feature == "unit" else _gates(units)
    return Partition(rows, outputs, features, sizes)


def _units(weight: Weight, neurons: Neurons, rows: tuple[int, ...]) -> Tensor:
    """Which destination neuron each row belongs to, numbered from 0."""
    block = next(b for b in neurons.blocks if weight.name in b.weights)
    each = torch.arange(prod(rows))
    if not block.direct:
        return each
    ends = block.destinations.broadcast_to(weight.tensor.shape)
    for dim, n in enumerate(rows):
        ends = ends.narrow(dim, 0, n)
    ends = ends.flatten()
    numbers: Tensor = torch.where(ends >= 0, ends, -1 - each).unique(return_inverse=True)[1]
    return numbers


def _gates(units: Tensor) -> Tensor:
    """How many rows of the same neuron come before each row: the gate, in a recurrent layer."""
    counts = torch.bincount(units)
    order = units.argsort(stable=True)
    gates = torch.empty_like(units)
    gates[order] = torch.arange(len(units)) - (counts.cumsum(0) - counts)[units[order]]
    return gates


def open_connections(weight: Weight) -> Tensor:
    """Which connections no mask has cut so far."""
    found = torch.ones(weight.tensor.shape, dtype=torch.bool)
    for part in weight.entries():
        if part.open is not None:
            found[part.rows] = part.open
    return found


def _unit_step(values: Tensor) -> Tensor:
    """H(m) in a new tensor; numbers are much faster to multiply by than truth values."""
    return values.sign().clamp_(min=0)


class _Masked(Function):
    """w H(m), whose gradient by m is that of w m, times g'(m)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, variables: Tensor, slope: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(weight, variables)
        ctx.slope = slope
        return _times(_unit_step(variables), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, variables = ctx.saved_tensors
        by_weight = _times(_unit_step(variables), gradient) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_weight, None, None
        product = (gradient * weight).to(variables.dtype).sum_to_size(variables.shape)
        return by_weight, product.mul_(ctx.slope(variables)), None


def _times(on: Tensor, value: Tensor) -> Tensor:
    """Their product, in the memory of the first where it fits."""
    on = on.to(value.dtype)
    return on.mul_(value) if on.shape == value.shape else on * value


class ConnectionMask(nn.Module):
    """Masks one weight, and learns how.

    While it learns, each forward takes a copy of the weight, for the step that follows: connections
    that are off keep their weights, whatever momentum and decay do to them.

    Args:
        variables: one per connection, shaped like the weight; or one per filter, [filters].
        parts: which connections and which features they belong to.
        estimator: one of ``ESTIMATORS``.

    Attributes:
        frozen: bool, whether the variables are final.
    """

    filters: Tensor | None
    features: Tensor
    sizes: Tensor | None
    frozen: Tensor

    def __init__(self, variables: MaskVariables, parts: Partition, estimator: str) -> None:
        super().__init__()
        self.variables, self.rows, self.estimator = variables, parts.rows, estimator
        self.feature_count = int(parts.features.max()) + 1
        self.register_buffer("filters", parts.filters, persistent=False)
        self.register_buffer("features", parts.features, persistent=False)
        self.register_buffer("sizes", parts.sizes, persistent=False)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self._before: Tensor | None = None
        self._held = False

    @property
    def values(self) -> Tensor:
        """The mask variables."""
        return self.variables.values

    @property
    def all_sizes(self) -> Tensor:
        """How many connections each variable masks, shaped like the variables."""
        return torch.ones_like(self.values, dtype=torch.int64) if self.sizes is None else self.sizes

    def forward(self, weight: Tensor) -> Tensor:
        """The weight where it is on, else 0."""
        values = self.values.detach()
        if torch.is_grad_enabled() and not self.frozen:
            values = self.values
            self._hold(weight)
        spread, slope = self._spread(values), ESTIMATORS[self.estimator]
        masked: Tensor = _Masked.apply(weight, spread, slope)  # type: ignore[no-untyped-call]
        return masked

    def kept(self, above: float = 0.0) -> int:
        """How many connections are on, or would be if the step were elsewhere."""
        on = _unit_step(self.values.detach() - above)
        if self.sizes is None:  # counting numbers row by row is exact, and faster than truth values
            return int(on.sum(-1).long().sum())
        return int((on.bool() * self.sizes).sum())

    def keep(self) -> Tensor:
        """Which connections are on, or masked anyway; bool, shaped like the weight."""
        on = self.values > 0
        return self._spread(on if self.sizes is None else on | (self.sizes == 0))

    def restore(self, weight: Tensor) -> None:
        """Gives connections that are off the weights back that the optimizer found."""
        if self._held and self._before is not None:
            on = _unit_step(self._spread(self.values)).to(weight.dtype)
            torch.lerp(self._before, weight, on, out=weight)  # exactly one or the other
        self._held = False

    def freeze(self) -> None:
        """Makes the variables final."""
        self.frozen.fill_(True)
        self._before = None

    def update(self, price: float, *, normalize: bool) -> None:
        """One step of the variables, at a price for each connection that is on."""
        # Connections that the loss does not reach cost as much, and gain nothing.
        gradient = self.variables.gradient(absent="zero")
        if gradient is None:
            return
        if normalize:
            gradient.mul_(self._scale(gradient))
        slope = ESTIMATORS[self.estimator](self.values)
        gradient.add_(slope if self.sizes is None else slope * self.sizes, alpha=price)
        self.variables.update(gradient)

    def keep_above(self, low: float, high: float, left: int) -> int:
        """Turns variables on that are above ``high``, and no others.

        Of those between ``low`` and ``high`` the first are on as well, while their connections
        number at most ``left``.

        Returns:
            How many connections those first ones hold.
        """
        values = self.values
        on, between = values > high, (values > low) & (values <= high)
        sizes = between if self.sizes is None else between * self.sizes
        first = between & (sizes.flatten().cumsum(0).reshape(sizes.shape) <= left)
        on |= first
        on_values = values.clamp(ON, self.variables.bound)
        values.copy_(torch.where(on, on_values, values.clamp(max=0)))
        return int((first * sizes).sum())

    def raise_highest(self, value: float) -> None:
        """Puts the highest variable to a value above 0, so that its connections are on."""
        values = self.values
        if self.sizes is not None:
            values = values.masked_fill(self.sizes == 0, -torch.inf)
        self.values.view(-1)[values.argmax()] = value

    def _scale(self, gradient: Tensor) -> Tensor:
        """One over the norm of each feature's gradient.

        That of a feature that is off as a whole counts as 1 if it is less, or noise would be made
        large. If it is more, that may be noise too: a batch norm behind a constant makes such.
        """
        along = [d for d, n in enumerate(self.rows) if n == 1] if self.filters is None else []
        norms, highest = gradient, self.values
        if along:
            norms = torch.linalg.vector_norm(gradient, dim=along)
            highest = highest.amax(along)
        on = highest.flatten() > 0
        sums = gradient.new_zeros(2, self.feature_count)
        sums[0].index_add_(0, self.features, norms.flatten().square())
        sums[1].index_add_(0, self.features, on.to(sums.dtype))
        norm = sums[0].sqrt()
        scale = 1 / torch.where(sums[1] > 0, norm + EPSILON, norm.clamp(min=1.0))[self.features]
        return scale.reshape(self.rows) if self.filters is None else scale

    @torch.no_grad()
    def _hold(self, weight: Tensor) -> None:
        """Notes the weight of the first run in a step: a later one may be on other weights.

        It goes into the same memory each time, which saves finding some.
        """
        held = self._before
        if held is None or (held.device, held.dtype) != (weight.device, weight.dtype):
            held = self._before = torch.empty_like(weight)
        elif self._held:
            return
        held.copy_(weight)
        self._held = True

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """What was noted before other weights came does not count."""
        self._held = False
        super()._load_from_state_dict(*arguments)

    def _spread(self, of_variables: Tensor) -> Tensor:
        """What is said of each variable, broadcastable to the weight."""
        if self.filters is None:
            return of_variables
        return of_variables.index_select(0, self.filters).reshape(self.rows)
