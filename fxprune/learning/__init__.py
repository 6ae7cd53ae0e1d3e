"""Sparsity that is learned while the model trains: what all such passes share.

A pass attaches gates or masks to a program (:class:`Learning`), the model trains with them, and
in the end they are hardened into masks and weights. :func:`fxprune.compile` runs the fit loop
over them, :func:`fxprune.prepare` hands them to a loop of the user's own.
"""

from fxprune.learning.contract import LearnedPass, Learning
from fxprune.learning.schedule import Schedule
from fxprune.learning.variables import MaskVariables

__all__ = ["LearnedPass", "Learning", "MaskVariables", "Schedule"]
