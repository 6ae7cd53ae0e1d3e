"""Every error fxprune raises on purpose.

The tree, one branch per stage of the pipeline::

    FxpruneError
    ├── ConfigError (also ValueError)        an option, a policy or an argument is wrong
    ├── InputError (also ValueError)         a tensor given at run time does not fit the program
    ├── TraceError                           the model cannot be traced
    │   ├── UnsupportedOpError               an operation that fxprune does not know how to handle
    │   └── ArchiveError                     a .pt2 file is corrupt, foreign or unsafe
    ├── DependencyError                      neurons depend on each other in a contradictory way
    ├── PassError                            a pass failed
    │   ├── PreconditionError                ... before it ran
    │   ├── PostconditionError               ... its result breaks its promise
    │   └── VerificationError                ... outputs differ where they must not
    ├── TrainingError                        a task cannot be trained or evaluated
    └── LoweringError                        the program cannot be written as ONNX

Every message says what went wrong, where, and what to do about it. Catch :class:`FxpruneError`
to catch them all.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArchiveError",
    "ConfigError",
    "DependencyError",
    "FxpruneError",
    "InputError",
    "LoweringError",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "TraceError",
    "TrainingError",
    "UnsupportedOpError",
    "VerificationError",
    "first_line",
]


class FxpruneError(Exception):
    """Base of all errors that fxprune raises on purpose."""


class ConfigError(FxpruneError, ValueError):
    """An option, a policy or an argument is wrong; nothing was changed or written."""


class InputError(FxpruneError, ValueError):
    """A tensor given at run time does not fit the program."""


class TraceError(FxpruneError):
    """The model cannot be traced into a program."""


class UnsupportedOpError(TraceError):
    """An operation stands in the way and has no handling.

    Attributes:
        node: name of the graph node.
        target: the operation, such as ``aten.fft_rfft.default``.
    """

    def __init__(self, message: str, *, node: str, target: str) -> None:
        super().__init__(message)
        self.node = node
        self.target = target


class ArchiveError(TraceError):
    """A ``.pt2`` archive is corrupt, foreign or unsafe.

    Attributes:
        path: the file.
        member: the entry inside the archive, where one is to blame.
    """

    def __init__(self, message: str, *, path: str, member: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.member = member


class DependencyError(FxpruneError):
    """Neurons depend on each other in a way that cannot be satisfied.

    Attributes:
        nodes: names of the graph nodes involved.
        dims: the dimensions involved, one per node.
    """

    def __init__(
        self, message: str, *, nodes: Sequence[str] = (), dims: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.nodes = tuple(nodes)
        self.dims = tuple(dims)


class PassError(FxpruneError):
    """A pass failed.

    Attributes:
        pass_name: the pass, by its text name.
    """

    def __init__(self, message: str, *, pass_name: str) -> None:
        super().__init__(message)
        self.pass_name = pass_name


class PreconditionError(PassError):
    """A pass was asked for something that this program does not allow."""


class PostconditionError(PassError):
    """The result of a pass breaks what the pass promises: a defect of the pass."""


class VerificationError(PassError):
    """Two programs that must agree do not.

    Attributes:
        pass_name: the pass or stage after which they differ.
        where: what was compared, such as ``"output_0 at batch=3, time=7"``.
        max_abs: largest absolute difference.
        max_rel: largest difference over the largest absolute reference value.
    """

    def __init__(
        self, message: str, *, pass_name: str, where: str, max_abs: float, max_rel: float
    ) -> None:
        super().__init__(message, pass_name=pass_name)
        self.where = where
        self.max_abs = max_abs
        self.max_rel = max_rel


class TrainingError(FxpruneError):
    """A task cannot be trained or evaluated."""


class LoweringError(FxpruneError):
    """The program cannot be written as ONNX.

    Attributes:
        node: name of the graph node, where one is to blame.
    """

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


def first_line(error: BaseException) -> str:
    """What another library says, without what follows; the kind of error if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
