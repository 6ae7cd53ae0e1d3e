"""Masked normalizations equal the plain ones over what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fxprune.masking.normalization import masked_group_norm, masked_layer_norm, masked_rms_norm

KEEP = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
KEPT = KEEP.bool()
GAIN, BIAS = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize(("gain", "bias"), [(None, None), (GAIN, None), (GAIN, BIAS)])
def test_layer_norm(gain: Any, bias: Any, eps: float) -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    small_gain, small_bias = (None if t is None else t[KEPT] for t in (gain, bias))
    expected = functional.layer_norm(x[..., KEPT], (4,), small_gain, small_bias, eps)
    close(masked_layer_norm(x, KEEP, gain, bias, eps)[..., KEPT], expected)
    whole = functional.layer_norm(x, (6,), gain, bias, eps)
    close(masked_layer_norm(x, torch.ones_like(KEEP), gain, bias, eps), whole)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("gain", [None, GAIN])
def test_rms_norm(gain: Any, eps: float | None) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = functional.rms_norm(x[..., KEPT], (4,), None if gain is None else gain[KEPT], eps)
    close(masked_rms_norm(x, KEEP, gain, eps)[..., KEPT], expected)


@pytest.mark.parametrize("tail", [(), (5,), (2, 3)])
@pytest.mark.parametrize(("gain", "bias"), [(None, None), (GAIN, BIAS)])
def test_group_norm(gain: Any, bias: Any, tail: tuple[int, ...]) -> None:
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)  # 2 groups of 3
    x = torch.randn(2, 6, *tail, dtype=torch.float64)
    small_gain, small_bias = (None if t is None else t[KEPT] for t in (gain, bias))
    expected = functional.group_norm(x[:, KEPT], 2, small_gain, small_bias)
    close(masked_group_norm(x, 2, keep, gain, bias)[:, KEPT], expected)


WIDE = 512
FIRST = torch.arange(WIDE) < 300
PLAIN: dict[str, tuple[Any, Any]] = {
    "layer": (lambda x: functional.layer_norm(x, x.shape[1:]), masked_layer_norm),
    "rms": (lambda x: functional.rms_norm(x, x.shape[1:]), masked_rms_norm),
    "group": (
        lambda x: functional.group_norm(x, 1),
        lambda x, keep: masked_group_norm(x, 1, keep),
    ),
}


@pytest.mark.parametrize("scale", [3e-4, 60.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PLAIN)
def test_narrow_values_are_normalized_in_float32(
    kind: str, dtype: torch.dtype, scale: float
) -> None:
    plain, masked = PLAIN[kind]
    x = (scale * torch.randn(3, WIDE)).to(dtype)  # the squares of the larger ones overflow
    result = masked(x, FIRST.float())
    assert result.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(result[:, FIRST], plain(x[:, FIRST]), rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("function", [masked_layer_norm, masked_rms_norm])
def test_with_nothing_kept_the_result_is_finite(function: Any) -> None:
    assert function(torch.randn(2, 6, dtype=torch.float64), torch.zeros_like(KEEP)).isfinite().all()
    grouped = masked_group_norm(torch.randn(2, 6, dtype=torch.float64), 2, torch.zeros_like(KEEP))
    assert grouped.isfinite().all()
