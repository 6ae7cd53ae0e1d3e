"""Makes good archives, and bad ones from them."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import ArchiveError
from fxprune.tracing.archive import read_archive, write_archive

AUTO = torch.export.Dim.AUTO
Edit = Callable[[dict[str, Any]], object]


class Tagger(nn.Module):
    """A stock LSTM with what archives hold besides: buffer, constant, shared weight, tree."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor, *, add: torch.Tensor) -> dict[str, Any]:
        y, (h, _) = self.rnn(x)
        y = self.tied(self.head(y)) * self.scale + self.shift + torch.tensor([1.0, 2, 3, 4])
        return {"y": y + add, "rest": [h.reshape(-1), None, y[: x.shape[0] // 2 + 1]]}


def export(model: nn.Module, *args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), args, **kwargs)


def export_tagger() -> torch.export.ExportedProgram:
    shapes = {"x": {0: AUTO}, "add": None}
    kwargs = {"add": torch.randn(4)}
    return export(Tagger(), torch.randn(3, 5, 3), kwargs=kwargs, dynamic_shapes=shapes)


def tagger_archive(folder: Path) -> Path:
    """Writes an archive of the tagger."""
    path = folder / "tagger.pt2"
    with pytest.warns(UserWarning, match="No complete tensor"):  # torch, of the expanded buffer
        write_archive(export_tagger(), path)
    return path


def rewrite(source: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """Copies an archive with members replaced, added, or (None) left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, content in (members | changes).items():
            if content is not None:
                new.writestr(f"archive/{name}", content)
    return target


def edited(source: Path, target: Path, edit: Edit, member: str = "models/model.json") -> Path:
    """Copies an archive with one JSON member changed."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].partition("/")[0]
        described = json.loads(archive.read(f"{root}/{member}"))
    edit(described)
    return rewrite(source, target, {member: json.dumps(described).encode()})


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def touching(path: Path) -> str:
    """An expression that creates a file when evaluated."""
    return f"__import__('pathlib').Path('{path}').touch()"


def refuse(path: Path, match: str) -> ArchiveError:
    with pytest.raises(ArchiveError, match=match) as caught:
        read_archive(path)
    assert str(path) in str(caught.value)
    assert caught.value.path == str(path)
    return caught.value
