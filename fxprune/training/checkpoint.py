"""Checkpoints: written whole or not at all, read without running code, refused when foreign."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ConfigError, TrainingError
from fxprune.files import appearing

__all__ = ["Checkpoint", "architecture", "digest", "tensors_of"]

_FORMAT = 1

_LONGEST = 200
"""Characters of a name; file systems allow 255 bytes, and the file is written beside its place."""


@dataclass(frozen=True)
class Checkpoint:
    """The file in which one run keeps its state.

    Attributes:
        path: the file.
        run: what makes this run what it is, one text per aspect. A file whose run differs in any
            of them is refused.
    """

    path: Path
    run: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], name: str, run: Mapping[str, str]) -> Checkpoint:
        """Make the folder if it is absent, and name the file in it.

        Raises:
            ConfigError: the folder cannot be made.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the checkpoint folder {os.fspath(folder)!r} cannot be made ({error}): "
                "name one that can be written"
            ) from error
        return cls(Path(folder) / f"{_file_name(name)}.pt", run)

    def load(self) -> dict[str, Any] | None:
        """Read the state; None where nothing has been saved yet.

        Raises:
            ConfigError: the file is damaged, no checkpoint, or of another run.
        """
        remedy = "delete it to start afresh, or name another folder"
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # what the unpickler stumbles upon in a foreign file is open
            raise ConfigError(
                f"the checkpoint {str(self.path)!r} cannot be read ({type(error).__name__}): "
                f"{remedy}"
            ) from error
        whole = isinstance(content, dict) and {"format", "run", "state"} <= content.keys()
        if not whole or content["format"] != _FORMAT:
            raise ConfigError(f"{str(self.path)!r} is not a checkpoint of fxprune: {remedy}")
        if content["run"] != dict(self.run):
            raise ConfigError(
                f"the checkpoint {str(self.path)!r} belongs to another run "
                f"({_difference(content['run'], self.run)}): {remedy}"
            )
        state: dict[str, Any] = content["state"]
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state; whatever happens, the file holds the old state or the new one.

        Raises:
            TrainingError: the file cannot be written; the old one is as it was.
        """
        content = {"format": _FORMAT, "run": dict(self.run), "state": dict(state)}
        try:
            with appearing(self.path, shared=False) as partial, partial.open("wb") as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TrainingError(
                f"the checkpoint {str(self.path)!r} cannot be written ({error}): make room or "
                "name another folder, and run again to go on from the last one"
            ) from error


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, tied ones once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def architecture(module: nn.Module) -> str:
    """A short text that differs where what modules compute with their tensors does.

    It tells traced modules apart by their graph, others by what they print.
    """
    # An address, of a function for instance, would be another one in the next process.
    text = re.sub(r" at 0x[0-9a-f]+", "", str(module))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short text that differs where any value, shape or type of the tensors does."""
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        result.update(flat.view(torch.uint8).numpy().data)
    return result.hexdigest()[:16]


def _file_name(name: str) -> str:
    """A name that a file can have; a long one ends in a digest of what is left out."""
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if len(short) <= _LONGEST:
        return short
    end = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{short[: _LONGEST - 9]}-{end}"


def _difference(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    differing = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    return "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differing)
