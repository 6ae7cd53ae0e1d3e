"""Masks follow their weights through what is done to them before they are used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.analysis import Block, analyze
from fxprune.masking.operands import operand_mask
from tests.zoo import by_name


class Merged(nn.Module):
    """Two weights put together, and one read transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 3))
        self.head = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps 3 to 2."""
        y = functional.linear(x, torch.cat([self.one, self.two])).tanh()
        return functional.linear(y, self.head.t())


@pytest.fixture(scope="module")
def blocks() -> tuple[Block, ...]:
    return analyze(fxprune.trace(Merged(), torch.randn(2, 3))).blocks


def test_a_mask_of_one_part_leaves_the_others(blocks: tuple[Block, ...]) -> None:
    merged, head = blocks
    assert merged.weights == ("one", "two")
    keep = torch.rand(4, 3) > 0.5
    found = operand_mask(merged, {"two": keep})
    assert found is not None
    assert torch.equal(found, torch.cat([torch.ones(2, 3, dtype=torch.bool), keep]))
    assert operand_mask(head, {"two": keep}) is None


def test_a_transposed_weight_has_a_transposed_mask(blocks: tuple[Block, ...]) -> None:
    keep = torch.rand(6, 2) > 0.5
    found = operand_mask(blocks[1], {"head": keep})
    assert found is not None and torch.equal(found, keep.t())


@pytest.mark.parametrize("structure", ["connection", "row"])
def test_every_part_of_a_weight_is_pruned_alike(structure: str) -> None:
    model = by_name("manual-lstm-parts")
    policy = f"magnitude{{sparsity=0.5,structure={structure}}}"
    compact = fxprune.compile(model.build(), policy, example_inputs=model.inputs(2, 5))
    assert not any(r.node.startswith(("w.", "u.")) for r in compact.report.refusals)
    left = {n: float(p.ne(0).float().mean()) for n, p in compact.module.named_parameters()}
    assert {left[f"{kind}.{i}"] for kind in "wu" for i in range(4)} == {0.5}


def test_a_loop_counts_each_connection_once() -> None:
    model = by_name("manual-lstm-parts")
    program = fxprune.trace(model.build(), model.inputs(2, 5))
    report = fxprune.compile(program, []).report
    counts = {kind.value: n.before for kind, n in report.by_class.items()}
    assert counts == {"input": 4 * 6 * 5, "recurrent": 4 * 6 * 6, "feedforward": 6 * 3}
    assert "feedforward" in str(fxprune.inspect(program))
