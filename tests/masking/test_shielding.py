"""Shielded products: values as ever, weights learn from all outputs, inputs from those kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxprune.masking.shielding import shielded

KEEP = torch.tensor([1.0, 0.0, 1.0, 1.0])
CASES: dict[
    str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
] = {
    "linear": (functional.linear, (5, 3), (4, 3), (-1,)),
    "conv1d": (functional.conv1d, (2, 3, 7), (4, 3, 2), (-1, 1)),
    "conv2d": (functional.conv2d, (2, 3, 5, 6), (4, 3, 2, 3), (-1, 1, 1)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_two_products(case: str, bias: bool) -> None:
    operation, shape, size, along = CASES[case]
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, size, (4,))][: 2 + bias]
    keep = KEEP.double().reshape(along)
    x, *learned = [t.clone().requires_grad_() for t in tensors]
    result = shielded(operation, keep, x, *learned)
    slope = torch.randn(result.shape, dtype=torch.float64)
    found = torch.autograd.grad(result, [x, *learned], slope)

    x, *learned = [t.clone().requires_grad_() for t in tensors]
    plain = operation(x, *learned)
    assert torch.equal(plain, result)
    expected = torch.autograd.grad(plain, learned, slope, retain_graph=True)
    behind = torch.autograd.grad(plain, [x], slope * keep)
    for a, b in zip(found, (*behind, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    product = shielded(functional.linear, KEEP, x, weight).square().sum()
    (slope,) = torch.autograd.grad(product, [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    shielded(functional.linear, KEEP, x, weight).sum().backward()
    assert weight.grad is not None and bool((weight.grad[1] != 0).all())
    weight = weight.detach()
    x.requires_grad_()
    shielded(functional.linear, KEEP, x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (KEEP @ weight).expand(5, 3))
    with torch.no_grad():
        assert not shielded(functional.linear, KEEP, x, weight).requires_grad
