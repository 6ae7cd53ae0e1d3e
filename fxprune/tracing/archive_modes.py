"""What a ``.pt2`` archive says about train mode, which the operations in it do not show.

An archive holds a program in eval mode. Whether a dropout or batch norm in it was on in train mode
or off in every mode, and whether train mode computes something else altogether, stands in a file
of its own in the archive, as JSON. It holds numbers and one text to be shown, nothing that is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fxprune.tracing.archive_rules import load_json, readable

__all__ = ["MODES_FILE", "Modes"]

MODES_FILE = "fxprune_modes.json"
"""The file's name among the extra files of an archive."""


@dataclass(frozen=True)
class Modes:
    """What train mode changes in an archived program.

    Attributes:
        follows: for every dropout, batch norm and attention call, in order, its flag or
            probability in train mode; None if it is the same in both modes.
        difference: None if the modes differ in those only, else where they do.
    """

    follows: tuple[float | None, ...]
    difference: str | None = None

    def to_json(self) -> str:
        """As text for an archive."""
        return json.dumps({"follows": self.follows, "difference": self.difference})

    @classmethod
    def from_json(cls, data: bytes) -> Modes:
        """Reads what :meth:`to_json` writes.

        Raises:
            ValueError: it is anything else.
        """
        described = load_json(data)
        if type(described) is not dict or described.keys() != {"follows", "difference"}:
            raise ValueError("this does not describe the modes of a program")
        follows, difference = described["follows"], described["difference"]
        if type(follows) is not list or not all(map(_is_probability, follows)):
            raise ValueError("what follows the mode should be a list of probabilities")
        if difference is not None and type(difference) is not str:
            raise ValueError("the difference between the modes should be a text")
        return cls(tuple(follows), None if difference is None else readable(difference))


def _is_probability(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)  # type: ignore[operator]
