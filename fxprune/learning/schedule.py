"""When during a training something happens, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """A ramp from 0 to 1 that begins and ends at fractions of a training.

    Attributes:
        steps: optimizer steps of the whole training, at least 1.
        start: fraction of the steps after which the ramp begins.
        end: fraction of the steps after which it stands at 1.

    Example:
        >>> Schedule(100, 0.0, 0.5).progress(25)
        0.5
    """

    steps: int
    start: float
    end: float

    @property
    def first(self) -> int:
        """The step that the ramp begins at."""
        return round(self.start * self.steps)

    @property
    def last(self) -> int:
        """The step that it ends at, at least 1: something is to be learned first."""
        return max(1, round(self.end * self.steps))

    def progress(self, step: int) -> float:
        """Where the ramp stands after so many steps, from 0 to 1."""
        if step >= self.last:
            return 1.0
        return max(0.0, (step - self.first) / max(1, self.last - self.first))

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps of the ramp happens after this one."""
        if step == self.last:
            return True
        return self.first <= step < self.last and (step - self.first) % every == 0
