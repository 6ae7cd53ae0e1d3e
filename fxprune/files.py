"""Files are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxprune.errors import ConfigError

__all__ = ["appearing", "target_of", "unwritable", "write_whole"]


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that writing to ``path`` replaces or makes: a link stays a link.

    Raises:
        ConfigError: no file can be written there.
    """
    shown, target = os.fspath(path), Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigError(f"cannot write {shown}: it is a folder. Name a file in it.")
    if not target.parent.is_dir():
        raise ConfigError(
            f"cannot write {shown}: there is no folder {target.parent}. Create it, or choose "
            "another."
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise ConfigError(f"cannot write {shown}: it is protected. Choose another file.")
    return target


def unwritable(path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """What to raise where writing ``path`` failed."""
    return ConfigError(
        f"cannot write {os.fspath(path)}: {error.strerror or error}. Choose a folder that has room "
        "and that you may write to."
    )


@contextmanager
def appearing(target: Path, *, shared: bool = True) -> Iterator[Path]:
    """Gives an empty file beside the target that takes its place only if the block succeeds.

    Args:
        target: the file, no link; see :func:`target_of`.
        shared: whether several processes may write the target at once. If not, the name beside it
            is always the same, so that what a killed process left is overwritten by the next.

    Raises:
        OSError: the file cannot be made, stored or moved; the target is as it was.
    """
    own = f".{secrets.token_hex(6)}" if shared else ""
    partial = target.with_name(f".{target.name}{own}.part")
    try:
        partial.open("xb" if shared else "wb").close()
        yield partial
        _store(partial)
        os.replace(partial, target)
        if os.name == "posix":  # so that the new name survives a power cut, too
            _store(target.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes a file; whatever happens, it holds the old content or the new one.

    Raises:
        ConfigError: it cannot be written.

    Example:
        >>> write_whole(".", b"text")
        Traceback (most recent call last):
        fxprune.errors.ConfigError: cannot write .: it is a folder. Name a file in it.
    """
    target = target_of(path)
    try:
        with appearing(target) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise unwritable(path, error) from error


def _store(path: Path) -> None:
    """Has the system bring what is written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
