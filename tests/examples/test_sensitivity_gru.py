"""The forecasting example: its data, its bookkeeping, and a run in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from examples import sensitivity_gru, time_series
from fxprune.passes import Sensitivity


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short LAN series: a sine, and values that are to be dropped."""
    folder = tmp_path_factory.mktemp("data")
    values = 10 ** (4 + np.sin(np.arange(400) / 5))
    values[[10, 20]] = 0, 10**6.5
    (folder / "scgru_lan").mkdir()
    np.save(folder / "scgru_lan" / "traffic-1-2.npy", values)
    return folder


def test_windows_follow_each_other(data: Path) -> None:
    series = time_series.READERS["lan"](data)
    sizes = [len(x) for x, _ in (series.train, series.validation, series.test)]
    assert sizes == [242, 26, 30]  # 398 values left, 298 windows, 90% known, a tenth of these
    for x, y in (series.train, series.validation, series.test):
        assert torch.equal(x[1:, -1], y[:-1])
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert torch.equal(series.validation[0][0, -1], series.train[1][-1])
    assert torch.equal(series.test[0][0, -1], series.validation[1][-1])


def test_a_sine_is_forecast_by_its_last_values(data: Path) -> None:
    series = time_series.READERS["lan"](data)
    whole, batches = time_series.errors(time_series.linear_forecast(series), series.test)
    still, _ = time_series.errors(time_series.persistence(series), series.test)
    unknowing, _ = time_series.errors(time_series.training_mean(series), series.test)
    assert whole < 0.1 * still < 0.1 * unknowing
    assert batches <= whole


def test_published_figures_of_the_simple_forecasts(data_dir: Path) -> None:
    series = time_series.READERS["lan"](data_dir)
    assert [len(y) for _, y in (series.train, series.validation, series.test)] == [8633, 959, 1066]
    figures = [
        *time_series.errors(time_series.persistence(series), series.test),
        *time_series.errors(time_series.linear_forecast(series), series.test),
    ]
    assert [round(f, 4) for f in figures] == [0.0716, 0.0684, 0.0645, 0.0617]


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("los_loop", ((1437, 12, 207), (1437, 621)), ((402, 12, 207), (402, 621))),
        ("etth1", ((8521, 96, 7), (8521, 168)), ((2857, 96, 7), (2857, 168))),
    ],
)
def test_other_series(name: str, train: Any, test: Any, data_dir: Path) -> None:
    series = time_series.READERS[name](data_dir)
    assert tuple(tuple(part.shape) for part in series.train) == train
    assert tuple(tuple(part.shape) for part in series.test) == test
    x, y = series.test
    assert torch.equal(x[1:, -1], y[:-1, : x.shape[2]])


def run(data: Path, out: Path, *more: str) -> int:
    small = ["--hidden", "8", "--every", "20", "--epochs", "1", "--fine-tune", "1", "--seeds", "1"]
    return sensitivity_gru.main(["--data", str(data), "--out", str(out), *small, *more])


def test_runs_are_kept_and_continued(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    chosen = ("--sparsity", "0.5", "--methods", "gradient")
    assert run(data, out, *chosen) == 0
    lines = out.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    methods = [(r["method"], r["sparsity"]) for r in found]
    floors = [("mean", 0.0), ("persistence", 0.0), ("linear", 0.0)]
    assert methods == [*floors, ("dense", 0.0), ("gradient", 0.5)]
    assert 0.5 <= found[4]["removed"] <= 0.75  # connections of units that died count too
    assert all(len(r["before"]) == len(r["after"]) == 2 for r in found[3:])
    shown = capsys.readouterr().out
    assert sensitivity_gru.main(["--table", str(out)]) == 0
    assert capsys.readouterr().out == shown
    rows = [row.split(" | ") for row in shown.splitlines()]
    names = ["| method", "| ---", "| mean", "| persistence", "| linear", "| dense", "| gradient"]
    assert [row[0] for row in rows] == names
    change = found[4]["after"][0] - found[3]["after"][0]
    assert rows[6][7] == f"{change:+.4f}"

    # Killed while the last run was being written: it alone is done again, with the same result.
    out.write_text("\n".join(lines[:4]) + "\n" + lines[4][:40])
    assert run(data, out, *chosen) == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in found]
    assert out.read_text().splitlines()[:4] == lines[:4]


def test_every_method_becomes_a_pass() -> None:
    x, y = torch.rand(6, 5, 1), torch.rand(6, 1)
    experiment = object.__new__(sensitivity_gru.Experiment)  # nothing to train for this
    experiment.series = time_series.Series((x, y), (x, y), (x, y))
    experiment.dense = sensitivity_gru.Forecaster(1, 20, 1)
    experiment.seed = 3
    methods = (*sensitivity_gru.METHODS[1:], sensitivity_gru.UNFLOORED)
    assert [str(experiment.choose(m, 0.9)) for m in methods] == [
        "sensitivity{criterion=gradient,sparsity=0.9,scope=global,batches=32}",
        "magnitude{sparsity=0.9,structure=connection}",
        "magnitude{sparsity=0.9,structure=connection,scope=global}",
        "random-pruning{sparsity=0.9,structure=connection,seed=3}",
        "sensitivity{criterion=gradient,sparsity=0.9,scope=global,batches=32,row_floor=false}",
    ]
    for parameter in experiment.dense.parameters():
        nn.init.normal_(parameter)
    threshold = experiment.choose("std", 0.9)
    assert isinstance(threshold, Sensitivity)
    gone = sum(
        int((p.abs() < threshold.threshold * p.abs().std(correction=0)).sum())
        for p in experiment.dense.parameters()
        if p.dim() > 1
    )
    total = 60 * 20 + 60 + 20
    assert 0 <= gone - 0.9 * total <= 30  # the floors of the small matrices


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out.jsonl")
    assert "must name a folder that holds scgru_lan/traffic-1-2.npy" in capsys.readouterr().err
