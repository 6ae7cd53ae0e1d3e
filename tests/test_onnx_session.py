"""Sessions of ONNX files: what is refused, and with what words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ConfigError
from fxprune.onnx_session import open_session


def test_a_file_that_fxprune_wrote_opens(tmp_path: Path) -> None:
    x = torch.zeros(3, 2, 4)
    fxprune.compile(nn.GRU(4, 5), [], example_inputs=x).save_onnx(tmp_path / "gru.onnx")
    session = open_session(tmp_path / "gru.onnx", threads=2)
    assert len(session.get_inputs()) == 1
    assert session.get_session_options().intra_op_num_threads == 2


def test_no_file_and_no_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.onnx; name an ONNX file"):
        open_session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ConfigError, match=r"onnxruntime cannot load .*text\.onnx: ") as refused:
        open_session(tmp_path / "text.onnx")
    assert "\n" not in str(refused.value)
