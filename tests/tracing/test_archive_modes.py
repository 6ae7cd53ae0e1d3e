"""What an archive says about train mode is read strictly."""

from __future__ import annotations

import pytest

from fxprune.tracing.archive_modes import Modes


@pytest.mark.parametrize("modes", [Modes(()), Modes((1.0, None, 0.25)), Modes((), "at m.py:3")])
def test_modes_come_back(modes: Modes) -> None:
    assert Modes.from_json(modes.to_json().encode()) == modes


def test_texts_cannot_drive_a_terminal() -> None:
    assert Modes.from_json(Modes((), "\x1b[2Jx").to_json().encode()).difference == "?[2Jx"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not a JSON text"),
        ("[]", "does not describe the modes"),
        ('{"follows": []}', "does not describe the modes"),
        ('{"follows": {}, "difference": null}', "a list of probabilities"),
        ('{"follows": [true], "difference": null}', "a list of probabilities"),
        ('{"follows": [1.5], "difference": null}', "a list of probabilities"),
        ('{"follows": [NaN], "difference": null}', "a list of probabilities"),
        ('{"follows": ["1"], "difference": null}', "a list of probabilities"),
        ('{"follows": [], "difference": 3}', "should be a text"),
    ],
)
def test_anything_else_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Modes.from_json(text.encode())
