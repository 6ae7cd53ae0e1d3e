"""Reads ``.pt2`` archives from anywhere, and writes them whole or not at all.

``torch.export.load`` trusts its file: it unpickles with ``weights_only=False``, evaluates size
expressions and guards as Python, pastes names into generated code, looks operators up in all of
torch and loads shared libraries. So the file is not given to it. :func:`read_archive` reads the
archive itself: every member is of a known kind and stored as it is, JSON goes through
:mod:`fxprune.tracing.archive_schema`, stored tensors are checked against their bytes, and pickles
are read by ``weights_only=True`` alone. torch then builds the program from the checked values: no
byte of the file reaches an unpickler or an evaluator.

This keeps a file from running code and from reading or writing other files. It does not promise
that the program in it is sensible: its operators run with torch's own checks.
"""

from __future__ import annotations

import io
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, deserialize_scalar_type

from fxprune.errors import ArchiveError
from fxprune.files import target_of, write_whole
from fxprune.tracing.archive_modes import MODES_FILE, Modes
from fxprune.tracing.archive_rules import load_json
from fxprune.tracing.archive_schema import decode
from fxprune.tracing.archive_tensors import (
    check_signature,
    flat_tensor,
    stored_members,
    tensor_dict,
    unpickle,
    view,
)

__all__ = ["read_archive", "read_modes", "write_archive"]

_PROGRAM = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_MODES = f"extra/{MODES_FILE}"
_KNOWN_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|version"
    r"|\.data/(?:version|serialization_id)|\.format_version|\.storage_alignment"
    rf"|{re.escape(_PROGRAM)}|{re.escape(_SAMPLE_INPUTS)}"
    r"|data/weights/(?:model_weights_config\.json|model\.pt|weight_\d{1,9})"
    r"|data/constants/(?:model_constants_config\.json|model\.pt|tensor_\d{1,9})"
    # Files that the user added, never read; and what is known of the modes.
    r"|extra/\w[\w. -]*(?:/\w[\w. -]*)*"
)
_REMEDY = "Export and save the program again, or get it from a source that you trust"


def read_archive(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Loads an exported program after checking the file whole.

    Memory: about the size of the file, and once more while its largest tensor is read.

    Args:
        path: a file written by :func:`write_archive` or ``torch.export.save``, torch 2.13.

    Raises:
        ArchiveError: the file is absent, corrupt, foreign, or holds anything that is not needed
            to describe a program of plain tensor operations; names the file, the member and the
            remedy.
    """
    path = os.fspath(path)
    with _blame(path), _open(path) as archive:
        with _blame(path, _PROGRAM):
            program = _read_program(archive)
        weights = _read_tensors(archive, "weights")
        constants = _read_tensors(archive, "constants")
        with _blame(path, _SAMPLE_INPUTS):
            inputs = _sample_inputs(archive.read(_SAMPLE_INPUTS))
        with _blame(path, _PROGRAM):
            check_signature(program.graph_module, weights, constants)
            return ExportedProgramDeserializer().deserialize(program, weights, constants, inputs)


def read_modes(path: str | os.PathLike[str]) -> Modes | None:
    """What an archive says about train mode; None if it says nothing.

    Raises:
        ArchiveError: as :func:`read_archive`.
    """
    path = os.fspath(path)
    with _blame(path), _open(path) as archive, _blame(path, _MODES):
        return Modes.from_json(archive.read(_MODES)) if _MODES in archive.members else None


def write_archive(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    modes: Modes | None = None,
) -> None:
    """Saves an exported program; the file appears whole or not at all.

    Memory: the whole file is held once.

    Args:
        program: what to save.
        path: where; an existing file is replaced.
        modes: what train mode changes, for :func:`read_modes`.

    Raises:
        ConfigError: the target cannot be written; an existing file is as it was.
        ArchiveError: torch cannot serialize the program; an existing file is as it was.
    """
    target_of(path)
    # Through memory: a write that fails inside torch's own writer aborts the process.
    buffer = io.BytesIO()
    try:
        extra = {} if modes is None else {MODES_FILE: modes.to_json()}
        torch.export.save(program, buffer, extra_files=extra)
    except Exception as error:
        raise ArchiveError(
            f"cannot write {os.fspath(path)}: {_reason(error)}. "
            "Export the program with torch.export and plain tensor operations",
            path=os.fspath(path),
        ) from error
    write_whole(path, buffer.getbuffer())


@contextmanager
def _blame(path: str, member: str | None = None) -> Iterator[None]:
    """Turns whatever goes wrong inside into an ArchiveError that names the place."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:
        place = f"{path}: {member}" if member else path
        raise ArchiveError(
            f"{place}: {_reason(error)}. {_REMEDY}", path=path, member=member
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; torch's own wrapper only adds a traceback."""
    if type(error).__name__ == "SerializeError" and error.__cause__ is not None:
        error = error.__cause__
    text = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    name = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{name}{text[:300]}"


@dataclass(frozen=True)
class _Archive:
    """An open archive whose members are all of known kinds and stored uncompressed."""

    path: str
    file: zipfile.ZipFile
    root: str
    members: frozenset[str]

    def read(self, member: str) -> bytes:
        if member not in self.members:
            raise ValueError(f"member {member} is missing")
        return self.file.read(f"{self.root}/{member}")


@contextmanager
def _open(path: str) -> Iterator[_Archive]:
    if not os.path.exists(path):
        raise ValueError("there is no such file")
    if not os.path.isfile(path):
        raise ValueError("this is not a file")
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            file = zipfile.ZipFile(stream)
        except zipfile.BadZipFile as error:
            raise ValueError(
                "the file is empty" if size == 0 else "the file is truncated, or no .pt2 archive"
            ) from error
        with file:
            yield _checked_archive(path, file, size)


def _checked_archive(path: str, file: zipfile.ZipFile, size: int) -> _Archive:
    names = file.namelist()
    root = names[0].partition("/")[0] if names else ""
    archive = _Archive(path, file, root, frozenset(n.removeprefix(f"{root}/") for n in names))
    if f"{root}/archive_format" not in names:
        raise ValueError("the file is truncated, or no .pt2 archive")
    for name in stored_members(file, size):
        member = name.removeprefix(f"{root}/")
        if not name.startswith(f"{root}/") or not _KNOWN_MEMBER.fullmatch(member):
            raise ArchiveError(
                f"{path}: {name!r:.200}: no member of this name belongs to a program of plain "
                f"tensor operations. {_REMEDY}",
                path=path,
                member=name,
            )
    for member, wanted in (("archive_format", b"pt2"), ("archive_version", b"0")):
        if archive.read(member) != wanted:
            raise ValueError(f"{member} should be {wanted.decode()}")
    if "byteorder" in archive.members and archive.read("byteorder") != sys.byteorder.encode():
        raise ValueError(f"the archive was not written on a {sys.byteorder}-endian machine")
    return archive


def _read_program(archive: _Archive) -> schema.ExportedProgram:
    described = load_json(archive.read(_PROGRAM))
    if not isinstance(described, dict):
        raise ValueError("this does not describe a program")
    version = decode(schema.SchemaVersion, described.get("schema_version"))
    if version.major != schema.SCHEMA_VERSION[0]:
        raise ValueError(
            f"written with schema {version.major} by torch {described.get('torch_version')!r:.40}; "
            f"torch {torch.__version__} reads schema {schema.SCHEMA_VERSION[0]}"
        )
    return decode(schema.ExportedProgram, described)


def _read_tensors(archive: _Archive, kind: str) -> dict[str, torch.Tensor]:
    """The weights or the constants by name; those that share a member share memory."""
    folder = f"data/{kind}"
    legacy = f"{folder}/model.pt"  # one pickle with all of them, as earlier versions wrote
    if legacy in archive.members:
        with _blame(archive.path, legacy):
            return tensor_dict(unpickle(archive.read(legacy)))
    config = f"{folder}/model_{kind}_config.json"
    with _blame(archive.path, config):
        entries = decode(schema.PayloadConfig, load_json(archive.read(config))).config
    tensors: dict[str, torch.Tensor] = {}
    flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}
    for name, entry in entries.items():
        member = f"{folder}/{entry.path_name}"
        with _blame(archive.path, member):
            meta = entry.tensor_meta
            if entry.use_pickle:
                tensors |= tensor_dict({name: unpickle(archive.read(member))})
            elif meta is None:
                raise ValueError(f"the shape of {name} is missing")
            else:
                key = (member, deserialize_scalar_type(meta.dtype))
                if key not in flat:
                    flat[key] = flat_tensor(archive.read(member), meta)
                tensors[name] = view(flat[key], meta, parameter=entry.is_param)
    return tensors


def _sample_inputs(data: bytes) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not data:
        return None
    inputs = unpickle(data)
    if (
        type(inputs) is not tuple
        or [type(part) for part in inputs] != [tuple, dict]
        or not all(str(name).isidentifier() for name in inputs[1])
    ):
        raise ValueError("the sample inputs are not a tuple and a dictionary of arguments")
    return inputs
