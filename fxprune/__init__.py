"""fxprune: makes recurrent PyTorch models physically smaller and proves that nothing else changed.

>>> import torch, fxprune
>>> from fxprune.passes import Magnitude
>>> model = torch.nn.GRU(4, 16, batch_first=True)
>>> half = Magnitude(sparsity=0.5, structure="connection")
>>> compact = fxprune.compile(model, half, example_inputs=torch.zeros(1, 5, 4))
>>> compact.module(torch.zeros(3, 7, 4))[0].shape
torch.Size([3, 7, 16])
"""

from fxprune.archives import load
from fxprune.compiler import Compact, Prepared, compile, prepare
from fxprune.inspection import View, inspect
from fxprune.policy import Policy
from fxprune.program import Program
from fxprune.report import Report
from fxprune.tracing.tracer import trace
from fxprune.training import Task

__version__ = "0.1.0"

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
