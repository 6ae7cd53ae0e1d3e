"""Which versions of the ONNX operator set a file can be written for."""

from __future__ import annotations

from fxprune.errors import ConfigError

__all__ = ["DEFAULT_OPSET", "chosen_opset"]

DEFAULT_OPSET = 20
_OPSETS = range(18, 24)  # what torch's translations and onnxruntime both know


def chosen_opset(opset: int | None) -> int:
    """The version that is asked for, or the default.

    Raises:
        ConfigError: it is no version that can be written.
    """
    if opset is None:
        return DEFAULT_OPSET
    if type(opset) is not int or opset not in _OPSETS:
        raise ConfigError(
            f"opset={opset!r} is out of range; choose {_OPSETS.start} to {_OPSETS.stop - 1}."
        )
    return opset
