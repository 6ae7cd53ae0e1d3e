"""Stored tensors and pickles: plain ones are read, hostile ones run and reach nothing."""

import contextlib
import json
import os
import pickle
import typing
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.tracing.archive import read_archive
from tests.tracing.archive_files import (
    Edit,
    edited,
    refuse,
    rewrite,
    saved,
    tagger_archive,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger_archive(tmp_path_factory.mktemp("archive"))


class Touch:
    """Unpickling one creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickles_of_plain_tensors_are_read(good: Path, tmp_path: Path) -> None:
    """One pickle with all weights, as earlier versions of torch wrote them."""
    weights = OrderedDict(torch.export.load(good).state_dict)
    path = rewrite(good, tmp_path / "a.pt2", {"data/weights/model.pt": saved(weights)})
    loaded = read_archive(path)
    torch.testing.assert_close(loaded.state_dict, dict(weights), rtol=0, atol=0)
    assert isinstance(loaded.state_dict["head.weight"], nn.Parameter)


@pytest.mark.parametrize("kind", ["weights", "constants", "sample_inputs"])
def test_a_hostile_pickle_is_not_run(good: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    hostile: object = ((Touch(marker),), {}) if kind == "sample_inputs" else {"rnn": Touch(marker)}
    changes: dict[str, bytes | None] = {f"data/{kind}/model.pt": saved(hostile)}
    path = rewrite(good, tmp_path / "a.pt2", changes)
    error = refuse(path, "UnpicklingError")
    assert error.member == f"data/{kind}/model.pt"
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists()  # torch's own loader runs it


@pytest.mark.parametrize("kind", ["weight", "tensor"])
def test_a_hostile_pickle_of_one_tensor_is_not_run(good: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    folder = "weights" if kind == "weight" else "constants"

    def edit(config: dict[str, Any]) -> None:
        for entry in config["config"].values():
            entry["use_pickle"] |= entry["path_name"] == f"{kind}_0"

    path = edited(good, tmp_path / "a.pt2", edit, f"data/{folder}/model_{folder}_config.json")
    content = {f"data/{folder}/{kind}_0": saved(Touch(marker))}
    path = rewrite(path, tmp_path / "b.pt2", {**content})
    refuse(path, "UnpicklingError")
    raw = {f"data/{folder}/{kind}_0": pickle.dumps(Touch(marker))}
    refuse(rewrite(path, tmp_path / "c.pt2", {**raw}), "not a zip file")
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists()  # torch's own loader runs it


def test_a_pickle_of_one_plain_tensor_is_read(good: Path, tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        for name, entry in config["config"].items():
            entry["use_pickle"] |= name == "rnn.weight_ih_l0"

    name, config = "rnn.weight_ih_l0", "data/weights/model_weights_config.json"
    path = edited(good, tmp_path / "a.pt2", edit, config)
    with zipfile.ZipFile(path) as archive:
        entry = json.loads(archive.read(f"archive/{config}"))["config"][name]
    weight = nn.Parameter(torch.randn(16, 3))
    path = rewrite(path, tmp_path / "b.pt2", {f"data/weights/{entry['path_name']}": saved(weight)})
    torch.testing.assert_close(read_archive(path).state_dict[name], weight, rtol=0, atol=0)


def first_weight(config: dict[str, Any]) -> dict[str, Any]:
    return typing.cast(dict[str, Any], config["config"]["rnn.weight_hh_l0"])


WEIGHT_EDITS: list[tuple[str, Edit]] = [
    ("exceed", lambda c: first_weight(c)["tensor_meta"].update(storage_offset={"as_int": 1})),
    ("exceed", lambda c: first_weight(c)["tensor_meta"].update(
        strides=[{"as_int": 400}, {"as_int": 1}])),
    ("do not fit", lambda c: first_weight(c)["tensor_meta"].update(
        storage_offset={"as_int": -4})),
    ("do not fit", lambda c: first_weight(c)["tensor_meta"].update(strides=[{"as_int": 1}])),
    ("exceed", lambda c: first_weight(c)["tensor_meta"].update(
        sizes=[{"as_int": 2**40}, {"as_int": 1}], strides=[{"as_int": 0}, {"as_int": 0}])),
    ("symbolic size", lambda c: first_weight(c)["tensor_meta"].update(
        sizes=[{"as_expr": {"expr_str": "s0"}}, {"as_int": 1}])),
    ("SparseCoo", lambda c: first_weight(c)["tensor_meta"].update(layout=1)),
    ("the shape of", lambda c: first_weight(c).update(tensor_meta=None)),
    ("not the name of a stored tensor", lambda c: first_weight(c).update(
        path_name="../../models/model.json")),
    ("not the name of a stored tensor", lambda c: first_weight(c).update(
        path_name="custom_obj_0")),
    ("the graph says", lambda c: first_weight(c)["tensor_meta"].update(
        sizes=[{"as_int": 3}, {"as_int": 1}])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("match", "edit"), WEIGHT_EDITS, ids=[f"{i}-{m}" for i, (m, _) in enumerate(WEIGHT_EDITS)]
)
def test_other_shapes_of_weights(good: Path, tmp_path: Path, match: str, edit: Edit) -> None:
    config = "data/weights/model_weights_config.json"
    refuse(edited(good, tmp_path / "a.pt2", edit, config), match)
