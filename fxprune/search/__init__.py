"""Black-box search over a box of numbers: ask for points, evaluate them anywhere, tell the result.

>>> search = NegativelyCorrelatedSearch([0, 0], [1, 1], population=4, generations=50, seed=1)
>>> while not search.done:
...     search.tell([float(((x - 0.3) ** 2).sum()) for x in search.ask()])
>>> search.best.fitness < 0.01
True
"""

from fxprune.search.base import Best, Search
from fxprune.search.bisection import BisectionSearch
from fxprune.search.cma_es import CmaSearch
from fxprune.search.negatively_correlated import NegativelyCorrelatedSearch
from fxprune.search.spreading import Spread
from fxprune.search.uniform import RandomSearch

__all__ = [
    "Best",
    "BisectionSearch",
    "CmaSearch",
    "NegativelyCorrelatedSearch",
    "RandomSearch",
    "Search",
    "Spread",
]
