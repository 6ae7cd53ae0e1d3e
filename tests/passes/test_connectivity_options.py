"""Options of sparse connectivity learning: what is refused, and the text form."""

from __future__ import annotations

import math
from typing import Any

import pytest

import fxprune
from fxprune.errors import ConfigError
from fxprune.passes import SparseConnectivity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs either option 'penalty', the price of a connection, or"),
        ({"penalty": 0.1, "target": 0.1}, "got penalty=0.1 and target=0.1"),
        ({"penalty": -0.1}, "'penalty' of pass 'sparse-connectivity' must be a number at least 0"),
        ({"penalty": math.nan}, "'penalty' of pass 'sparse-connectivity' must be a number"),
        ({"target": 0}, r"'target' .* must be a number in \(0, 1\), not 0"),
        ({"target": 1.0}, "'target' of pass 'sparse-connectivity' must be a number"),
        ({"target": 0.1, "estimator": "relu"}, "must be one of identity, softplus, leaky_relu"),
        ({"target": 0.1, "structure": "row"}, "must be one of connection, filter"),
        ({"target": 0.1, "feature": "gate"}, "must be one of row, unit"),
        ({"target": 0.1, "normalize": 1}, "must be one of True, False"),
        ({"target": 0.1, "rate": 0}, "'rate' of pass 'sparse-connectivity' must be more than 0"),
        (
            {"target": 0.1, "initial": 2.0},
            "must be more than 0 and at most 1, not 2",
        ),
        ({"target": 0.1, "initial": 0}, "'initial' of pass 'sparse-connectivity' must be more"),
        ({"target": 0.1, "bound": math.inf}, "'bound' of pass 'sparse-connectivity' must be a nu"),
        (
            {"target": 0.1, "end": 1.5},
            "must be more than 0 and at most 1, not 1.5",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseConnectivity(**options)


def test_the_text_form_names_what_was_given() -> None:
    chosen = SparseConnectivity(target=0.03, estimator="softplus", normalize=False, end=1.0)
    text = "sparse-connectivity{target=0.03,estimator=softplus,normalize=false,end=1.0}"
    assert str(chosen) == text
    assert fxprune.Policy([chosen]) == fxprune.Policy([SparseConnectivity(**vars(chosen))])
