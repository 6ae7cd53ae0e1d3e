"""Trains in one of two processes: what ``test_processes.py`` starts, for each policy that learns.

    python -m tests.learning.two_processes RANK FOLDER

Both processes begin with the same weights, and have their own data and random numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.errors import TrainingError
from fxprune.learning import MaskVariables
from fxprune.passes import names
from fxprune.preparing import Prepared

STEPS = 8
EXAMPLE = torch.zeros(3, 2, 4, dtype=torch.float64)  # no mask hangs on rounding

POLICIES: Mapping[str, str] = {
    name: text
    for name, text in {
        "gradual-magnitude": "gradual-magnitude{sparsity=0.5,every=1}",
        "sparse-connectivity": "sparse-connectivity{target=0.3}",
        "dynamic-pruning": "dynamic-pruning{sparsity=0.5,every=1}",
        "neuron-selection": "neuron-selection{target=0.5}",
    }.items()
    if name in names()
}


class Tagger(nn.Module):
    """Linear, GRU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.rnn = nn.GRU(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.tanh(self.stem(x)))[0])  # type: ignore[no-any-return]


def prepare(policy: str) -> Prepared:
    torch.manual_seed(0)
    prepared = fxprune.prepare(Tagger().double(), policy, example_inputs=EXAMPLE, steps=STEPS)
    prepared.module.train()
    return prepared


def batches(rank: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(3, 2, 4, generator=numbers, dtype=torch.float64) for _ in range(STEPS)]


def optimizer_of(prepared: Prepared) -> torch.optim.Optimizer:
    return torch.optim.SGD(prepared.module.parameters(), lr=0.1, momentum=0.9)


def train(
    prepared: Prepared,
    model: nn.Module,
    data: list[Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    disturb: Callable[[nn.Module], None] | None = None,
) -> None:
    optimizer = optimizer or optimizer_of(prepared)
    for number, batch in enumerate(data):
        if disturb is not None and number == STEPS // 2:
            disturb(prepared.module)
        loss = (model(batch) - batch[..., :2]).square().mean() + prepared.penalty()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        prepared.step()


def state_of(prepared: Prepared) -> dict[str, Tensor]:
    """Whatever the training changed."""
    return {n: t.detach().clone() for n, t in prepared.module.state_dict().items()}


def together(policy: str, rank: int, *, broadcast: bool) -> dict[str, object]:
    """Trains as one should; with torch's habit of copying buffers before each forward, or not."""
    prepared = prepare(policy)
    model = DistributedDataParallel(prepared.module, broadcast_buffers=broadcast)
    torch.manual_seed(rank)
    train(prepared, model, batches(rank))
    return {"state": state_of(prepared), "sparsity": prepared.convert().report.sparsity}


def apart(policy: str, rank: int) -> str:
    """Trains without averaging; half way, one process has its weights and masks changed."""
    prepared = prepare(policy)
    torch.manual_seed(rank)

    def disturb(module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
            for part in module.modules():
                if isinstance(part, MaskVariables):
                    part.values.copy_(torch.randn_like(part.values))

    train(prepared, prepared.module, batches(rank), disturb=disturb if rank else None)
    try:
        prepared.convert()
    except TrainingError as error:
        return str(error)
    return "converted"


def accelerated(policy: str, rank: int) -> dict[str, object]:
    """Trains in accelerate's hands."""
    from accelerate import Accelerator

    prepared = prepare(policy)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared.module, optimizer_of(prepared))
    assert accelerator.num_processes == 2
    torch.manual_seed(rank)
    train(prepared, model, batches(rank), optimizer=optimizer, backward=accelerator.backward)
    return {"state": state_of(prepared), "sparsity": prepared.convert().report.sparsity}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found: dict[str, dict[str, object]] = {
        name: {
            "broadcast": together(policy, rank, broadcast=True),
            "reduced": together(policy, rank, broadcast=False),
            "apart": apart(policy, rank),
        }
        for name, policy in POLICIES.items()
    }
    if find_spec("accelerate"):
        # What torchrun sets; the processes have met already, so the port stays unused.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        for name, policy in POLICIES.items():
            found[name]["accelerated"] = accelerated(policy, rank)
    torch.save(found, folder / f"rank_{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
