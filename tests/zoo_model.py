"""What a model of the zoo is, and the words its tables are written in.

The classes of connections are written by hand, next to each model, after the terms of the
project's design:

* A recurrent operation has fixed roles: ``weight_hh`` (and the projection ``weight_hr``) is
  recurrent, ``weight_ih`` is input, however often the module is called.
* In other code a tensor is recurrent if one of its uses depends on another use *in the same role*.
  A tensor used in the same role several times is one block, so all those uses share a class.
* A block is input if what it computes flows into a recurrent *neuron* with no block between: into
  units of a recurrent operation (its initial states included), or into values on the way from one
  use of a recurrent weight to the next. Two halves of a concatenation are different neurons.
  What is added to a layer's output afterwards (a residual, a gate) does not flow into its units.
* All else is feedforward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...]  # positional example inputs of forward
Output = Any  # what forward returns: tensors and None in any nesting of tuples, lists and dicts
Classes = dict[str, tuple[str, ...]]

RECURRENT = ("recurrent",)
INPUT = ("input",)
FEEDFORWARD = ("feedforward",)

BatchNorm = TypeVar("BatchNorm", nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class ZooModel:
    """A small model with what is known about it.

    Attributes:
        name: Unique, kebab case.
        build: Makes the module in train mode; deterministic after ``torch.manual_seed``.
        inputs: From (batch, time) to the inputs of forward, float32 and int64, deterministic.
        classes: Name of each tensor that weighs connections (tied ones under the first name in
            ``named_parameters``) to the class of each of its uses, in order of execution, at the
            example's time.
        batch: Batch of the example.
        time: Time of the example.
        batch_varies: Whether the model takes other batches than the example's.
        time_varies: Whether a trace of the model may take other times: no where a Python loop
            counts the steps or a size is fixed, or where there is no time.
        valid_time: The times that the model takes, None for all from 1.
        prunable: Whether any neuron may be removed.
        notes: The reasoning where the table is not obvious.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    classes: Mapping[str, tuple[str, ...]]
    batch: int = 2
    time: int = 5
    batch_varies: bool = True
    time_varies: bool = True
    valid_time: Callable[[int], bool] | None = None
    prunable: bool = True
    notes: str = ""


def rnn(
    name: str, *, layers: int = 1, both: bool = False, projected: bool = False, calls: int = 1
) -> Classes:
    """Rows of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` (``name`` "" for the model itself)."""
    prefix = f"{name}." if name else ""
    rows: Classes = {}
    for suffix in (f"l{k}{end}" for k in range(layers) for end in ["", "_reverse"][: 1 + both]):
        rows[f"{prefix}weight_ih_{suffix}"] = INPUT * calls
        rows[f"{prefix}weight_hh_{suffix}"] = RECURRENT * calls
        if projected:
            rows[f"{prefix}weight_hr_{suffix}"] = RECURRENT * calls
    return rows


def cell(name: str, *, calls: int) -> Classes:
    """Rows of an ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell`` module."""
    return {f"{name}.weight_ih": INPUT * calls, f"{name}.weight_hh": RECURRENT * calls}


def weights(kind: tuple[str, ...], *names: str, calls: int = 1) -> Classes:
    """Rows of ``<name>.weight`` for modules of one class, each called ``calls`` times."""
    return {f"{name}.weight": kind * calls for name in names}


def plain(*names: str, calls: int = 1) -> Classes:
    """Rows of the ``<name>.weight`` of feedforward modules."""
    return weights(FEEDFORWARD, *names, calls=calls)


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Integers from 0 to ``high - 1``, the same at every call."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def features(size: int) -> Callable[[int, int], Inputs]:
    """Inputs of one float sequence [batch, time, size]."""
    return lambda batch, time: (floats(batch, time, size),)


def tokens(vocabulary: int) -> Callable[[int, int], Inputs]:
    """Inputs of one integer sequence [batch, time]."""
    return lambda batch, time: (integers(vocabulary, batch, time),)


def vectors(size: int) -> Callable[[int, int], Inputs]:
    """Inputs of one float vector [batch, size]; there is no time."""
    return lambda batch, time: (floats(batch, size),)


def settled(norm: BatchNorm) -> BatchNorm:
    """Gives a batch norm the statistics and gains of a trained one; the defaults hide mistakes."""
    for tensor, low, high in (
        (norm.running_mean, -0.5, 0.5),
        (norm.running_var, 0.5, 2.0),
        (norm.weight, 0.5, 1.5),
        (norm.bias, -0.5, 0.5),
    ):
        assert tensor is not None
        nn.init.uniform_(tensor, low, high)
    return norm
