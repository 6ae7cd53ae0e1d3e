"""Archives come back as the programs they were, torch's own recurrent layers included."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import fxprune
from fxprune.archives import load, save_archive
from fxprune.errors import ArchiveError, InputError, TraceError
from fxprune.tracing import recurrent
from fxprune.tracing.modes import switchable
from tests.small import HALF, PackedTagger, Tagger, TiedModel, frames
from tests.tracing.archive_files import rewrite

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]


def close(a: Any, b: Any) -> None:
    left, right = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Tagger(), (frames(),)),
        (Tagger(nn.LSTM), (frames(), (torch.ones(1, 2, 6), torch.ones(1, 2, 6)))),
        (PackedTagger(padding_value=-1.0), (frames(), torch.tensor([3, 5]))),
        (TiedModel(), (torch.tensor([[1, 2, 3]]),)),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(5)), (frames(),)),
    ],
    ids=["plain", "states", "packed", "tied", "modes"],
)
def test_a_program_is_the_same_after_a_round_trip(
    model: nn.Module, call: tuple[Any, ...], tmp_path: Path
) -> None:
    program = fxprune.trace(model.eval(), call)
    assert save_archive(program, tmp_path / "m.pt2") == ()
    loaded = load(tmp_path / "m.pt2")
    assert [spec.name for spec in loaded.inputs] == [spec.name for spec in program.inputs]
    assert set(loaded.tensors) == set(program.tensors)
    assert dict(loaded.aliases) == dict(program.aliases)
    assert len(loaded.switches) == len(program.switches)
    close(loaded.module()(*call), program.module()(*call))
    dynamic = [[isinstance(s, str) for s in spec.shape or ()] for spec in program.inputs]
    assert [[isinstance(s, str) for s in spec.shape or ()] for spec in loaded.inputs] == dynamic


def test_modes_are_switched_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.BatchNorm1d(5))
    save_archive(fxprune.trace(model, frames()), tmp_path / "m.pt2")
    module = load(tmp_path / "m.pt2").module()
    assert torch.equal(module(frames()), module(frames()))
    mean = module.get_buffer("2.running_mean").clone()
    module.train()
    assert not torch.equal(module(frames()), module(frames()))
    assert not torch.equal(mean, module.get_buffer("2.running_mean"))


class Modes(nn.Module):
    """Parts that follow the mode, and the same parts that never do."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(5)
        self.register_buffer("running_mean", torch.randn(5))
        self.register_buffer("var", torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Drops, normalizes and attends."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("var")
        y = functional.batch_norm(functional.dropout(x, training=False), mean, var)
        y = self.norm(self.drop(y))
        p = 0.25 if self.training else 0.0
        return functional.scaled_dot_product_attention(y, y, y, dropout_p=p)


def test_an_archive_knows_what_follows_the_mode(tmp_path: Path) -> None:
    program = fxprune.trace(Modes(), frames())
    save_archive(program, tmp_path / "m.pt2")
    loaded = load(tmp_path / "m.pt2")
    nodes = switchable(loaded.graph)
    assert [loaded.switches.get(n.name) for n in nodes] == [None, None, 1.0, 1.0, 0.25]
    assert [program.switches.get(n.name) for n in switchable(program.graph)] == [
        loaded.switches.get(n.name) for n in nodes
    ]
    with zipfile.ZipFile(tmp_path / "m.pt2", "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("extra/fxprune_modes.json"))
        described = json.loads(archive.read(name))
    rewrite(
        tmp_path / "m.pt2",
        tmp_path / "bad.pt2",
        {name.partition("/")[2]: json.dumps({**described, "follows": [1.0]}).encode()},
    )
    with pytest.raises(ArchiveError, match=r"says of 1 operations .* holds 5 that may"):
        load(tmp_path / "bad.pt2")


def test_an_archive_of_others_follows_the_mode_where_that_is_likely(tmp_path: Path) -> None:
    exported = torch.export.export(Modes().eval(), (frames(),))
    torch.export.save(exported, tmp_path / "m.pt2")
    loaded = load(tmp_path / "m.pt2")
    follows = [n.name in loaded.switches for n in switchable(loaded.graph)]
    assert follows == [True, False, True, True, False]
    module = loaded.module().train()
    before = module.get_buffer("running_mean").clone()
    module(frames())
    assert torch.equal(module.get_buffer("running_mean"), before)


class Scales(nn.Module):
    """Computes something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Adds, or multiplies."""
        y: Tensor = self.rnn(x)[0]
        return y * 2 if self.training else y + 3


@pytest.mark.parametrize("portable", [False, True])
def test_an_archive_refuses_train_mode_as_the_program_did(portable: bool, tmp_path: Path) -> None:
    program = fxprune.trace(Scales(), frames())
    save_archive(program, tmp_path / "m.pt2", portable=portable)
    loaded = load(tmp_path / "m.pt2")
    assert loaded.mode_difference == program.mode_difference
    with pytest.raises(InputError, match=r"aten.add.Tensor becomes aten.mul.Tensor"):
        loaded.module().train()


LAYERS: dict[str, nn.RNNBase] = {
    "lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "gru": nn.GRU(3, 4, batch_first=True),
    "rnn-tanh": nn.RNN(3, 4, num_layers=2),
    "rnn-relu": nn.RNN(3, 4, nonlinearity="relu", bias=False),
    "projected": nn.LSTM(3, 4, proj_size=2, batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("portable", [False, True], ids=["torch.export.save", "portable"])
def test_stock_recurrent_layers_become_ours(name: str, portable: bool, tmp_path: Path) -> None:
    layer = LAYERS[name].eval()
    if portable:
        frozen = save_archive(fxprune.trace(layer, frames()), tmp_path / "m.pt2", portable=True)
        time = 1 if layer.batch_first else 0
        assert frozen == (f"input[{time}]={frames().shape[time]}",)
    else:
        shapes = {"input": {0: Dim.AUTO, 1: Dim.AUTO}}
        exported = torch.export.export(layer, (frames(),), dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / "m.pt2")
    program = load(tmp_path / "m.pt2")
    ours = {recurrent.lstm, recurrent.gru, recurrent.rnn}
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    assert len([n for n in program.graph.nodes if n.target in ours]) == count
    close(program.module()(frames()), layer(frames()))
    assert any("traced anew" in refusal.reason for refusal in program.refusals)


def test_dropout_between_stock_layers_follows_the_mode(tmp_path: Path) -> None:
    model = nn.GRU(3, 4, num_layers=2, dropout=0.5).eval()
    torch.export.save(torch.export.export(model, (frames(),)), tmp_path / "m.pt2")
    module = load(tmp_path / "m.pt2").module()
    assert torch.equal(module(frames())[0], module(frames())[0])
    module.train()
    assert not torch.equal(module(frames())[0], module(frames())[0])


def test_stock_archives_are_pruned(tmp_path: Path) -> None:
    model = Tagger(nn.LSTM, num_layers=2).eval()
    torch.export.save(torch.export.export(model, (frames(),)), tmp_path / "m.pt2")
    compact = fxprune.compile(load(tmp_path / "m.pt2"), HALF, progress=False)
    assert compact.module.get_parameter("rnn.weight_hh_l1").shape == (12, 3)
    close(compact.masked(frames()), compact.module(frames()))


def test_batch_1_of_a_portable_archive(tmp_path: Path) -> None:
    program = fxprune.trace(Tagger(), frames())
    save_archive(program, tmp_path / "m.pt2", portable=True)
    module = torch.export.load(tmp_path / "m.pt2").module()
    close(module(frames(1)), program.module()(frames(1)))
    close(module(frames(4)), program.module()(frames(4)))


def test_an_archive_without_example_inputs_is_refused(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(3, 2), (frames(),))
    exported.example_inputs = None
    torch.export.save(exported, tmp_path / "m.pt2")
    with pytest.raises(ArchiveError, match="holds no example inputs; export the model again"):
        load(tmp_path / "m.pt2")


def test_an_archive_that_keeps_state_is_refused(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("seen").add_(1)
            return x + self.get_buffer("seen")

    torch.export.save(torch.export.export(Counts(), (frames(),)), tmp_path / "m.pt2")
    with pytest.raises(TraceError, match="updates the buffer 'seen'"):
        load(tmp_path / "m.pt2")
