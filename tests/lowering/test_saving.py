"""A file appears whole and verified, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.calls import Call
from fxprune.errors import ConfigError, LoweringError, VerificationError
from fxprune.lowering import OnnxCase, OnnxReport, save_onnx
from tests.lowering.models import cases, export, no_files


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(x)[0])
        return y


def inputs(batch: int, time: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, time, 4),)


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


def save(net: nn.Module, path: Path, reference: Any = None, **options: Any) -> OnnxReport:
    options = {"input_names": ["x"], "dimension_names": {}} | options
    checked = options.pop("cases", cases(inputs))
    return save_onnx(export(net, inputs(2, 5)), reference or net, checked, path, **options)


def test_report(net: nn.Module, tmp_path: Path) -> None:
    report = save(net, tmp_path / "model.onnx")
    assert report.bytes == report.path.stat().st_size
    assert report.nodes == sum(report.operators.values()) == 6
    assert report.sizes[0] == "batch=2, time=5" and len(report.sizes) == 5
    assert report.opset == 20
    text = str(report)
    assert "model.onnx" in text and "6: 1 Add, 1 GRU" in text and "batch=3, time=1" in text
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_old_file_is_replaced_and_links_stay(net: nn.Module, tmp_path: Path) -> None:
    target, link = tmp_path / "target.onnx", tmp_path / "link.onnx"
    target.write_text("old")
    link.symlink_to(target)
    report = save(net, link)
    assert link.is_symlink() and target.stat().st_size == report.bytes


def test_permissions_follow_the_mask(net: nn.Module, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        report = save(net, tmp_path / "model.onnx")
    finally:
        os.umask(mask)
    assert report.path.stat().st_mode & 0o777 == 0o640


def off_by_a_thousandth(net: nn.Module) -> Any:
    return lambda x: net(x) + 1e-3


def wrong_at_time_one(net: nn.Module) -> Any:
    return lambda x: net(x) * (2 if x.shape[1] == 1 else 1)


def wrong_structure(net: nn.Module) -> Any:
    return lambda x: (net(x),)


def wrong_shape(net: nn.Module) -> Any:
    return lambda x: net(x)[:, :, :2]


def wrong_type(net: nn.Module) -> Any:
    return lambda x: net(x).double()


def not_a_number(net: nn.Module) -> Any:
    return lambda x: net(x) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (off_by_a_thousandth, "output_0 at batch=2, time=5: differs by 0.001"),
        (wrong_at_time_one, "output_0 at batch=1, time=1: differs by"),
        (wrong_structure, "the structure of the outputs at batch=2, time=5"),
        (wrong_shape, r"output_0: \[2, 5, 3\] torch.float32 instead of \[2, 5, 2\]"),
        (wrong_type, "float32 instead of .* torch.float64 at batch=2, time=5"),
        (not_a_number, "output_0 at batch=2, time=5: differs by inf"),
    ],
)
def test_a_wrong_model_is_caught(net: nn.Module, wrong: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with no_files(tmp_path), pytest.raises(VerificationError, match=message) as caught:
        save(net, path, wrong(net))
    assert caught.value.pass_name == "save_onnx"


def test_a_difference_within_the_tolerance_is_reported(net: nn.Module, tmp_path: Path) -> None:
    report = save(net, tmp_path / "model.onnx", lambda x: net(x) + 5e-5)
    assert report.max_abs_error == pytest.approx(5e-5, rel=1e-2)
    assert report.notes == ()


class Chaotic(nn.Module):
    """After many steps only rounding is left in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 30, batch_first=True)
        rotation, _ = torch.linalg.qr(torch.randn(30, 30))
        self.rnn.weight_hh_l0.data = 2 * rotation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


def test_a_chaotic_model_is_compared_over_few_steps(tmp_path: Path) -> None:
    chaotic = Chaotic().eval()
    few: Call = (inputs(2, 8), {})
    x = inputs(2, 200)
    path = tmp_path / "model.onnx"

    def write(reference: Any, short: Any) -> OnnxReport:
        return save(chaotic, path, reference, cases=[OnnxCase("long", x, {}, short)])

    def cut() -> Any:
        return few, chaotic(*few[0])

    report = write(chaotic, cut)
    assert report.max_abs_error < 1e-5
    assert "chaotic" in str(report) and "few steps" in report.notes[0]
    with pytest.raises(VerificationError, match="output_0 at long: differs by"):
        write(chaotic, lambda: None)  # what cannot be compared is not written
    with pytest.raises(VerificationError, match=r"differs by 0\.001"):
        write(lambda x: chaotic(x) + 1e-3, lambda: (few, chaotic(*few[0]) + 1e-3))


@pytest.mark.parametrize("name", ["missing/model.onnx", ".", "file/model.onnx"])
def test_unwritable_path(net: nn.Module, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    calls: list[None] = []
    with no_files(tmp_path), pytest.raises(ConfigError, match="cannot write"):
        save(net, tmp_path / name, lambda x: calls.append(None))
    assert not calls  # before any work


def test_full_disk(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with no_files(tmp_path), pytest.raises(ConfigError, match="No space left on device"):
        save(net, tmp_path / "model.onnx")


def test_interrupt(net: nn.Module, tmp_path: Path) -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    (tmp_path / "model.onnx").write_text("old")
    with no_files(tmp_path), pytest.raises(KeyboardInterrupt):
        save(net, tmp_path / "model.onnx", interrupted)


def test_no_cases(net: nn.Module, tmp_path: Path) -> None:
    with no_files(tmp_path), pytest.raises(ConfigError, match="no cases"):
        save(net, tmp_path / "model.onnx", cases=[])


def test_a_size_the_program_fixed(net: nn.Module, tmp_path: Path) -> None:
    exported = export(net, inputs(2, 5), fixed=True)
    case = OnnxCase("batch=3", inputs(3, 5), {})
    with no_files(tmp_path), pytest.raises(VerificationError, match="the run at batch=3"):
        save_onnx(exported, net, [case], tmp_path / "m.onnx", input_names=["x"], dimension_names={})


def test_untranslatable_operation(tmp_path: Path) -> None:
    class Special(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.special.bessel_j0(x)
            return y

    with no_files(tmp_path), pytest.raises(LoweringError, match="special_bessel_j0") as caught:
        save(Special(), tmp_path / "model.onnx")
    assert caught.value.node is not None
    assert "torch.special.bessel_j0(x)" in str(caught.value)


def test_buffers_that_change(tmp_path: Path) -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * self.count

    with no_files(tmp_path), pytest.raises(LoweringError, match="changes its buffer 'count'"):
        exported = export(Counter(), inputs(2, 5)).run_decompositions()
        save_onnx(
            exported,
            Counter(),
            cases(inputs),
            tmp_path / "m.onnx",
            input_names=["x"],
            dimension_names={},
        )
