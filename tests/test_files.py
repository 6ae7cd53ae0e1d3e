"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fxprune.errors import ConfigError
from fxprune.files import appearing, target_of, write_whole


def test_a_new_and_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, b"one")
    write_whole(str(path), memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"text"


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with appearing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), appearing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    (tmp_path / ".a.txt.part").write_text("a long text that was left")
    with appearing(path, shared=False) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", r"cannot write .*: it is a folder\. Name a file"),
        ("missing/a.txt", r"a\.txt: there is no folder .*missing\. Create it"),
        ("file/a.txt", r"a\.txt: there is no folder .*file\. Create it"),
    ],
)
def test_targets_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    for refuse in (target_of, lambda path: write_whole(path, b"")):
        with pytest.raises(ConfigError, match=message):
            refuse(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_protected_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(ConfigError, match=r"it is protected\. Choose another"):
        target_of(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ConfigError, match=r"a\.txt: No space left on device\. Choose"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
