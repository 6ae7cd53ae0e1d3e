"""The pruning methods, one per file; shipped and imported as ``fxprune.passes``."""

if __name__ != "fxprune.passes":  # pragma: no cover - reached only by a wrong import
    raise ImportError("import this package as 'fxprune.passes', not as 'passes'")

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxprune.contract import Pass

if TYPE_CHECKING:
    from fxprune.passes.connectivity import SparseConnectivity
    from fxprune.passes.dynamic import DynamicPruning
    from fxprune.passes.gradual import GradualMagnitude
    from fxprune.passes.magnitude import Magnitude
    from fxprune.passes.neuron_selection import NeuronSelection
    from fxprune.passes.random_pruning import RandomPruning
    from fxprune.passes.sensitivity import Sensitivity
    from fxprune.passes.stage_wise import StageWise

__all__ = [
    "PASSES",
    "DynamicPruning",
    "GradualMagnitude",
    "Magnitude",
    "NeuronSelection",
    "RandomPruning",
    "Sensitivity",
    "SparseConnectivity",
    "StageWise",
    "load",
    "names",
    "table",
]

PASSES: Mapping[str, str] = {
    "magnitude": "fxprune.passes.magnitude:Magnitude",
    "dynamic-pruning": "fxprune.passes.dynamic:DynamicPruning",
    "gradual-magnitude": "fxprune.passes.gradual:GradualMagnitude",
    "neuron-selection": "fxprune.passes.neuron_selection:NeuronSelection",
    "random-pruning": "fxprune.passes.random_pruning:RandomPruning",
    "sensitivity": "fxprune.passes.sensitivity:Sensitivity",
    "sparse-connectivity": "fxprune.passes.connectivity:SparseConnectivity",
    "stage-wise": "fxprune.passes.stage_wise:StageWise",
}
"""Where each pass is, by its text name; imported when it is asked for."""


def names() -> tuple[str, ...]:
    """The text names of all passes."""
    return tuple(PASSES)


def load(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        KeyError: there is none of that name.
    """
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    return found


def table() -> Mapping[str, type[Pass]]:
    """All passes by name, each imported when it is looked up."""
    return _Table()


class _Table(Mapping[str, type[Pass]]):
    def __getitem__(self, name: str) -> type[Pass]:
        return load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(PASSES)

    def __len__(self) -> int:
        return len(PASSES)

    def __contains__(self, name: object) -> bool:
        return name in PASSES  # Mapping would load the pass to find out


def __getattr__(attribute: str) -> Any:
    """Imports a pass by its class name: ``from fxprune.passes import Magnitude``."""
    for name, place in PASSES.items():
        if place.endswith(f":{attribute}"):
            return load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
