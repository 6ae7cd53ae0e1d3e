"""The neuron selection example: a small run that is stopped and goes on, and its table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples import neuron_selection_lm as lm
from examples.language_model import LanguageModel
from examples.result_lines import read_results
from fxprune.tracing.tracer import trace


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "tinyshakespeare").mkdir(parents=True)
    text = "to be, or not to be: that is the question.\n" * 60
    (folder / "tinyshakespeare/input.txt").write_text(text)
    return folder


def test_script_keeps_each_run_and_goes_on_behind_the_last(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(lm.QUICK, width=8, tokens=0, batch=4, steps=10, epochs=2, target=0.5)
    monkeypatch.setattr(lm, "QUICK", quick)
    out = tmp_path / "runs.jsonl"
    arguments = ["--data", str(data), "--quick", "--seeds", "3", "--out", str(out), "--methods"]
    assert lm.main([*arguments, "l0"]) == 0
    (l0,) = read_results(out)
    assert l0["macs"][1] <= 0.5 * l0["macs"][0]
    with out.open("a") as file:  # killed while writing
        file.write(json.dumps(l0)[:50])
    assert lm.main([*arguments, "l0", "magnitude", "small"]) == 0
    first, magnitude, small = read_results(out)
    assert first == l0
    for run in (magnitude, small):
        assert run["sizes"] == l0["sizes"]
        assert run["parameters"] == l0["parameters"]
        assert run["test_perplexity"] > 1
        assert min(run["milliseconds"]) > 0
    head, _, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert head.startswith("| method | seeds | validation loss")
    assert [row.split(" | ")[0] for row in rows] == ["| l0", "| magnitude", "| small"]


@pytest.mark.parametrize("given", [None, 0.1])
def test_fresh_weights_are_those_of_a_new_model(given: float | None) -> None:
    torch.manual_seed(0)
    model = LanguageModel(50, 30, given)
    states = torch.zeros(2, 1, 30)
    traced = trace(model, (torch.zeros(3, 1, dtype=torch.int64), states, states)).module()
    spread = {n: float(p.detach().std()) for n, p in traced.named_parameters()}
    for p in traced.parameters():
        torch.nn.init.ones_(p)
    lm._initialize(traced, given)
    for name, p in traced.named_parameters():
        assert float(p.detach().std()) == pytest.approx(spread[name], rel=0.2), name


def test_sizes_wanted_need_sizes_found(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lm.main(["--data", str(data), "--methods", "dense", "small"])
    assert "magnitude and small need l0" in capsys.readouterr().err
