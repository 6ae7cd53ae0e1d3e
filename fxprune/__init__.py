"""fxprune: makes recurrent PyTorch models physically smaller and proves that nothing else changed.

>>> import torch, fxprune
>>> from fxprune.passes import Magnitude
>>> model = torch.nn.GRU(4, 16, batch_first=True)
>>> half = Magnitude(sparsity=0.5, structure="connection")
>>> compact = fxprune.compile(model, half, example_inputs=torch.zeros(1, 5, 4))
>>> compact.module(torch.zeros(3, 7, 4))[0].shape
torch.Size([3, 7, 16])
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from fxprune.compat import check_torch

check_torch(torch.__version__)

from fxprune.tracing import packing, recurrent, states  # noqa: E402 - only on a torch that fits

if TYPE_CHECKING:
    from fxprune.archives import load
    from fxprune.compact import Compact
    from fxprune.compiler import compile
    from fxprune.inspection import View, inspect
    from fxprune.policy import Policy
    from fxprune.preparing import Prepared, prepare
    from fxprune.program import Program
    from fxprune.report import Report
    from fxprune.tracing.tracer import trace
    from fxprune.training import Task

__version__ = "0.1.0"

# Importing these registered the operations that archives are made of, for torch's own loader too.
_MARKERS = (packing, recurrent, states)

__all__ = [
    "Compact",
    "Policy",
    "Prepared",
    "Program",
    "Report",
    "Task",
    "View",
    "compile",
    "inspect",
    "load",
    "prepare",
    "trace",
]

_PLACES = {
    "Compact": "compact",
    "Policy": "policy",
    "Prepared": "preparing",
    "Program": "program",
    "Report": "report",
    "Task": "training",
    "View": "inspection",
    "compile": "compiler",
    "inspect": "inspection",
    "load": "archives",
    "prepare": "preparing",
    "trace": "tracing.tracer",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: ``fxprune --help`` need not wait for ONNX."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
    state = random.getstate()  # rich draws a number when it is imported
    value = getattr(import_module(f"fxprune.{_PLACES[name]}"), name)
    random.setstate(state)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
