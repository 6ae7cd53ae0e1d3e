"""Three published forecasting series, as windows to learn from, and the simplest forecasts of them.

`lan`: the network traffic on which SCGRU was published (imLingo/SCGRU). As there, the logarithm is
scaled to 0..1 over the whole series, so the split leaks two numbers; 100 lags, one step ahead.
`los_loop`: the speed at 207 sensors on roads of Los Angeles (lehaifeng/T-GCN), 12 steps in, 3 out.
`etth1`: 7 hourly readings of a transformer (zhouhaoyi/ETDataset), 96 in, 24 out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH = 32
AR_LAGS = 10
Floats = NDArray[np.float64]
Windows = tuple[Tensor, Tensor]  # inputs [n, lags, channels], targets [n, horizon * channels]


@dataclass(frozen=True)
class Series:
    """A series cut into windows.

    Attributes:
        train: to learn from.
        validation: to choose by; what follows the training windows.
        test: to judge by.
        unit: what an error of 1 is in the unit of the data.
    """

    train: Windows
    validation: Windows
    test: Windows
    unit: float = 1.0


def _read_lan(data: Path) -> Series:
    raw = np.load(_existing(data, "scgru_lan/traffic-1-2.npy")).reshape(-1)
    logs = np.where(raw > 0, np.log10(np.where(raw > 0, raw, 1.0)), 0.001)
    values = logs[(logs > 2.5) & (logs < 6)][:, None]
    values = (values - values.min()) / (values.max() - values.min())
    known = 100 + int(0.9 * (len(values) - 100))  # the first 90% of the windows
    return _split(values, 100, 1, known - (known - 100) // 10, known)


def _read_los_loop(data: Path) -> Series:
    speeds = np.loadtxt(_existing(data, "los_loop/los_speed.csv"), delimiter=",", skiprows=1)
    known = int(0.8 * len(speeds))
    return _split(speeds / speeds.max(), 12, 3, known - known // 10, known, float(speeds.max()))


def _read_etth1(data: Path) -> Series:
    path = _existing(data, "etth1/ETTh1.csv")
    values = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8))[:14_400]
    seen = values[:8_640]
    return _split((values - seen.mean(axis=0)) / seen.std(axis=0), 96, 24, 8_640, 11_520)


READERS: Mapping[str, Callable[[Path], Series]] = {
    "lan": _read_lan,
    "los_loop": _read_los_loop,
    "etth1": _read_etth1,
}


def _existing(data: Path, name: str) -> Path:
    if not (data / name).is_file():
        raise FileNotFoundError(
            f"{data / name} is missing: --data must name a folder that holds {name}"
        )
    return data / name


def _split(
    values: Floats, lags: int, horizon: int, validation: int, test: int, unit: float = 1.0
) -> Series:
    """Cuts where the targets of validation and test begin; inputs reach back over the cut."""

    def windows(first: int, last: int) -> Windows:
        starts = range(first, last - horizon + 1)
        x = np.stack([values[t - lags : t] for t in starts])
        y = np.stack([values[t : t + horizon].reshape(-1) for t in starts])
        return torch.from_numpy(x).float(), torch.from_numpy(y).float()

    return Series(
        windows(lags, validation), windows(validation, test), windows(test, len(values)), unit
    )


def errors(predicted: Tensor, windows: Windows) -> tuple[float, float]:
    """The root mean square error over all windows, and the mean of those over batches of 32.

    The second is what the authors of SCGRU report.
    """
    squares = (predicted - windows[1]).double().square().mean(dim=1)
    by_batch = torch.stack([part.mean().sqrt() for part in squares.split(BATCH)])
    return float(squares.mean().sqrt()), float(by_batch.mean())


def training_mean(series: Series) -> Tensor:
    """Forecasts the mean of each target over the training windows: knows nothing of the input."""
    return series.train[1].mean(dim=0).expand_as(series.test[1])


def persistence(series: Series) -> Tensor:
    """Forecasts that all stays as it is."""
    x, y = series.test
    return x[:, -1].repeat(1, y.shape[1] // x.shape[2])


def linear_forecast(series: Series) -> Tensor:
    """Forecasts by least squares on the last 10 values of each channel, and a constant.

    Learns from training and validation windows, since it has nothing to choose.
    """
    x, y = (torch.cat(parts) for parts in zip(series.train, series.validation, strict=True))
    unseen = series.test[0]
    channels = x.shape[2]
    forecast = torch.empty_like(series.test[1])
    for channel in range(channels):
        own = slice(channel, None, channels)  # of this channel, one target per step ahead
        solution = torch.linalg.lstsq(_lags(x, channel), y[:, own].double()).solution
        forecast[:, own] = (_lags(unseen, channel) @ solution).float()
    return forecast


def _lags(x: Tensor, channel: int) -> Tensor:
    last = x[:, -AR_LAGS:, channel].double()
    return torch.cat([last, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
