"""What the command line works on: a ``.pt2`` archive, or a function that builds a model."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import fxprune
from fxprune.errors import ConfigError, FxpruneError

if TYPE_CHECKING:
    from fxprune.program import Program
    from fxprune.training import Task

__all__ = ["Subject", "load_subject"]


@dataclass(frozen=True)
class Subject:
    """What is to be inspected or compiled.

    Attributes:
        model: a program from an archive, or a module from a function.
        example_inputs: of a module; an archive holds its own.
        task: how to train it, if it can be.
    """

    model: nn.Module | Program
    example_inputs: Any = None
    task: Task | None = None


def load_subject(text: str) -> Subject:
    """Reads an archive, or calls a function.

    Args:
        text: the path of a ``.pt2`` archive, of which no code is run, or
            ``package.module:function``, which is imported from the current folder or the installed
            packages and called without arguments. It returns the model, its example inputs and,
            optionally, a task.

    Raises:
        ConfigError: there is no such file or function, or it does not return that.
        ArchiveError: the archive is corrupt, foreign or unsafe.
    """
    if Path(text).exists() or ":" not in text:
        if not Path(text).is_file():
            raise ConfigError(
                f"there is no file {text}; name a .pt2 archive, or a function that builds the "
                "model as package.module:function."
            )
        return Subject(fxprune.load(text))
    return _checked(_call(text), text)


def _call(text: str) -> Any:
    module_name, _, function_name = text.rpartition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise ConfigError(f"{text}: importing {module_name} fails: {error}.") from error
        raise ConfigError(
            f"there is no module {module_name!r} here or among the installed packages; run the "
            "command in the folder that holds it."
        ) from error
    except Exception as error:
        raise ConfigError(f"{text}: importing {module_name} fails: {error}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"the module {module_name!r} has no function {function_name!r}.")
    try:
        return function()
    except FxpruneError:
        raise
    except Exception as error:
        raise ConfigError(f"{text} fails: {type(error).__name__}: {error}.") from error


def _checked(result: Any, text: str) -> Subject:
    from fxprune.training import Task

    parts = result if isinstance(result, tuple) else (result,)
    expected = f"{text} must return the model, its example inputs and, optionally, a fxprune.Task"
    if len(parts) not in (2, 3):
        raise ConfigError(f"{expected}; it returns {len(parts)} value(s).")
    model, example_inputs, task = (*parts, None)[:3]
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{expected}; its first value is {type(model).__name__}.")
    if task is not None and not isinstance(task, Task):
        raise ConfigError(f"{expected}; its third value is {type(task).__name__}.")
    return Subject(model, example_inputs, task)
