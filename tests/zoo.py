"""The model zoo: small models for every form that the compiler must handle.

The models are plain PyTorch and know nothing of the compiler. Sizes are small and differ
everywhere they can, so that dimensions mixed up show. ``tests/zoo_model.py`` explains the tables.
"""

from __future__ import annotations

from tests.zoo_around import AROUND
from tests.zoo_attention import SEQUENCE_TO_SEQUENCE
from tests.zoo_cells import CELL_MODELS
from tests.zoo_forms import FORMS
from tests.zoo_graphs import GRAPHS
from tests.zoo_loops import LOOPS
from tests.zoo_model import Inputs, ZooModel
from tests.zoo_published import PUBLISHED
from tests.zoo_stateless import STATELESS
from tests.zoo_states import STATES_AND_PACKED

__all__ = ["ZOO", "Inputs", "ZooModel", "by_name"]

ZOO: tuple[ZooModel, ...] = (
    *FORMS,
    *STATES_AND_PACKED,
    *CELL_MODELS,
    *LOOPS,
    *GRAPHS,
    *SEQUENCE_TO_SEQUENCE,
    *AROUND,
    *PUBLISHED,
    *STATELESS,
)


def by_name(name: str) -> ZooModel:
    """The model of that name.

    Raises:
        KeyError: The zoo has no such model.
    """
    for model in ZOO:
        if model.name == name:
            return model
    raise KeyError(f"no model {name!r} in the zoo; there are {[model.name for model in ZOO]}")
