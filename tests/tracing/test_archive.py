"""Archives: good ones load, others say what is wrong, and writing is whole or not at all."""

import errno
import io
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import ArchiveError, ConfigError
from fxprune.tracing.archive import read_archive, write_archive
from tests.tracing.archive_files import (
    edited,
    export,
    export_tagger,
    refuse,
    rewrite,
    saved,
    tagger_archive,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger_archive(tmp_path_factory.mktemp("archive"))


@pytest.mark.filterwarnings("ignore:No complete tensor:UserWarning")
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_computes_the_same_after_a_round_trip(tmp_path: Path, decomposed: bool) -> None:
    program = export_tagger()
    program = program.run_decompositions() if decomposed else program
    write_archive(program, tmp_path / "a.pt2")
    loaded = read_archive(tmp_path / "a.pt2")
    assert decomposed or "aten.lstm.input" in loaded.graph_module.code
    for batch in (3, 2, 7):
        x, add = torch.randn(batch, 5, 3), torch.randn(4)
        torch.testing.assert_close(
            loaded.module()(x, add=add), program.module()(x, add=add), rtol=0, atol=0
        )
    assert os.listdir(tmp_path) == ["a.pt2"]


def test_what_is_read_is_what_torch_reads(good: Path) -> None:
    ours, theirs = read_archive(good), torch.export.load(good)
    assert ours.graph_module.code == theirs.graph_module.code
    assert str(ours.graph_signature) == str(theirs.graph_signature)
    assert str(ours.range_constraints) == str(theirs.range_constraints)
    assert str(ours.call_spec) == str(theirs.call_spec)
    assert len(ours._guards_code) == len(theirs._guards_code) > 0
    assert ours.state_dict.keys() == theirs.state_dict.keys()
    for name, tensor in theirs.state_dict.items():
        assert type(ours.state_dict[name]) is type(tensor)
        assert ours.state_dict[name].stride() == tensor.stride()
        torch.testing.assert_close(ours.state_dict[name], tensor, rtol=0, atol=0)
    weights = ours.state_dict
    assert weights["tied.weight"].data_ptr() == weights["head.weight"].data_ptr()
    torch.testing.assert_close(ours.example_inputs, theirs.example_inputs, rtol=0, atol=0)
    traces = [node.meta.get("stack_trace", "") for node in ours.graph.nodes]
    assert any("archive_files.py" in trace for trace in traces)


def test_loaded_guards_still_hold(good: Path) -> None:
    module = read_archive(good).module()
    with pytest.raises((AssertionError, RuntimeError), match="Guard failed"):
        module(torch.randn(3, 6, 3), add=torch.randn(4))


def test_an_archive_without_sample_inputs_is_read(good: Path, tmp_path: Path) -> None:
    path = rewrite(good, tmp_path / "a.pt2", {"data/sample_inputs/model.pt": b""})
    loaded = read_archive(path)
    assert loaded.example_inputs is None
    x, add = torch.randn(2, 5, 3), torch.randn(4)
    torch.testing.assert_close(
        loaded.module()(x, add=add), read_archive(good).module()(x, add=add), rtol=0, atol=0
    )


def test_an_empty_weight_is_read(tmp_path: Path) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.empty(0, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w.T

    write_archive(export(Empty(), torch.randn(2, 3)), tmp_path / "a.pt2")
    assert read_archive(tmp_path / "a.pt2").module()(torch.randn(2, 3)).shape == (2, 0)


def test_operators_of_fxprune_are_read_where_they_are_registered(
    tmp_path: Path,
) -> None:
    @torch.library.custom_op("fxprune::archive_test_twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(twice(x), 1)

    path = tmp_path / "a.pt2"
    write_archive(export(Twice(), torch.randn(3)), path)
    x = torch.randn(3)
    torch.testing.assert_close(read_archive(path).module()(x), x * 2 + 1, rtol=0, atol=0)

    def rename(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.fxprune.absent.default"

    error = refuse(edited(path, tmp_path / "b.pt2", rename), "not registered")
    assert error.member == "models/model.json"


def test_extra_files_are_left_alone(good: Path, tmp_path: Path) -> None:
    path = rewrite(good, tmp_path / "a.pt2", {"extra/notes.txt": b"\xff\x00"})
    assert len(read_archive(path).state_dict) == len(read_archive(good).state_dict)


def test_absent_and_foreign_files(good: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "absent.pt2", "no such file")
    refuse(tmp_path, "not a file")
    (tmp_path / "empty.pt2").touch()
    refuse(tmp_path / "empty.pt2", "the file is empty")
    (tmp_path / "text.pt2").write_text("hello " * 100)
    refuse(tmp_path / "text.pt2", "truncated, or no .pt2 archive")
    (tmp_path / "short.pt2").write_bytes(good.read_bytes()[:-200])
    refuse(tmp_path / "short.pt2", "truncated, or no .pt2 archive")
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    refuse(tmp_path / "foreign.pt2", "truncated, or no .pt2 archive")
    zipfile.ZipFile(tmp_path / "nothing.pt2", "w").close()
    refuse(tmp_path / "nothing.pt2", "no .pt2 archive")
    (tmp_path / "checkpoint.pt2").write_bytes(saved({"w": torch.zeros(2)}))
    refuse(tmp_path / "checkpoint.pt2", "no .pt2 archive")


def test_a_flipped_byte_of_any_member_is_noticed(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        infos = archive.infolist()
    assert len(infos) > 10
    for info in infos:
        lengths = struct.unpack_from("<HH", data, info.header_offset + 26)
        broken = bytearray(data)
        broken[info.header_offset + 30 + sum(lengths) + info.file_size // 2] ^= 0xFF
        (tmp_path / "broken.pt2").write_bytes(broken)
        if not info.filename.endswith((".data/version", "serialization_id")):  # never read
            refuse(tmp_path / "broken.pt2", "Bad CRC-32 for file")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"models/model.json": None}, "models/model.json is missing"),
        ({"models/model.json": b"{"}, "not a JSON text"),
        ({"models/model.json": b"[]"}, "does not describe a program"),
        ({"models/model.json": b'{"a":' * 100_000}, "not a JSON text"),
        ({"archive_version": b"1"}, "archive_version should be 0"),
        ({"byteorder": b"middle"}, "endian"),
        ({"data/weights/weight_0": None}, "weight_0 is missing"),
        ({"data/weights/weight_0": b"\0" * 8}, "exceed the 2 stored values"),
        ({"data/weights/weight_0": b"\0" * 7}, "not a whole number"),
        ({"data/weights/model_weights_config.json": None}, "config.json is missing"),
        ({"data/weights/model_weights_config.json": b'{"config": {}}'}, "values of '.*' are miss"),
        ({"data/sample_inputs/model.pt": saved(torch.zeros(2))}, "sample inputs are not"),
        ({"data/sample_inputs/model.pt": saved(((), {"a b": 1}))}, "sample inputs are not"),
        ({"data/sample_inputs/model.pt": b"x"}, "not a zip file"),
    ],
)
def test_damaged_members(
    good: Path, tmp_path: Path, changes: dict[str, bytes | None], match: str
) -> None:
    refuse(rewrite(good, tmp_path / "a.pt2", changes), match)


def test_another_schema_names_the_torch_that_wrote_it(good: Path, tmp_path: Path) -> None:
    def edit(program: dict[str, Any]) -> None:
        program["schema_version"]["major"] += 1
        program["torch_version"] = "9.1"

    refuse(edited(good, tmp_path / "a.pt2", edit), "by torch '9.1'")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "data/weights/../../../evil",
        "extra/../../evil",
        "data/aotinductor/model/model.so",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/executorch/model.pte",
        "models/other.json",
        "data/weights/weight_0.py",
        "anything",
    ],
)
def test_members_of_other_kinds(good: Path, tmp_path: Path, name: str) -> None:
    error = refuse(rewrite(good, tmp_path / "a.pt2", {name: b"x"}), "no member of this name")
    assert error.member == f"archive/{name}"


def test_members_that_inflate_or_repeat(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "deflated.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)
    refuse(tmp_path / "deflated.pt2", "compressed or encrypted")

    repeated = tmp_path / "repeated.pt2"
    repeated.write_bytes(good.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(repeated, "a") as new:
        new.writestr(next(iter(members)), b"x")
    refuse(repeated, "two members of one name")

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", b"\0" * 1_000_000)
    changes: dict[str, bytes | None] = {"data/sample_inputs/model.pt": inner.getvalue()}
    refuse(rewrite(good, tmp_path / "bomb.pt2", changes), "compressed or encrypted")


@pytest.fixture(scope="module")
def linear() -> torch.export.ExportedProgram:
    return export(nn.Linear(2, 2), torch.randn(1, 2))


def fail(error: BaseException) -> Callable[..., None]:
    def raising(*args: object, **kwargs: object) -> None:
        raise error

    return raising


def test_a_written_archive_replaces_the_old_one(
    linear: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    target = tmp_path / "a.pt2"
    target.write_text("old")
    (tmp_path / "link.pt2").symlink_to(target)
    write_archive(linear, tmp_path / "link.pt2")
    assert (tmp_path / "link.pt2").is_symlink()
    torch.testing.assert_close(read_archive(target).state_dict, linear.state_dict, rtol=0, atol=0)
    assert sorted(os.listdir(tmp_path)) == ["a.pt2", "link.pt2"]


def test_targets_that_cannot_be_written(
    linear: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    missing = tmp_path / "missing" / "a.pt2"
    with pytest.raises(ConfigError, match=r"missing/a\.pt2: there is no folder"):
        write_archive(linear, missing)
    with pytest.raises(ConfigError, match="it is a folder"):
        write_archive(linear, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "function", "error", "raised"),
    [
        (os, "replace", PermissionError(errno.EACCES, "Permission denied"), ConfigError),
        (os, "fsync", OSError(errno.ENOSPC, "No space left on device"), ConfigError),
        (os, "fsync", KeyboardInterrupt(), KeyboardInterrupt),
        (os, "replace", KeyboardInterrupt(), KeyboardInterrupt),
        (torch.export, "save", KeyboardInterrupt(), KeyboardInterrupt),
        (torch.export, "save", RuntimeError("no serializer\nfor this"), ArchiveError),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    linear: torch.export.ExportedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    target = tmp_path / "a.pt2"
    target.write_text("old")
    monkeypatch.setattr(module, function, fail(error))
    with pytest.raises(raised) as caught:
        write_archive(linear, target)
    monkeypatch.undo()
    if not isinstance(caught.value, KeyboardInterrupt):
        assert re.search(rf"cannot write {re.escape(str(target))}: .*\. \w", str(caught.value))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.pt2"]
