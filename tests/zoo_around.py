"""Zoo: what stands around recurrent layers: convolutions, norms, pools, attention, framing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo_model import (
    FEEDFORWARD,
    Output,
    ZooModel,
    features,
    floats,
    plain,
    rnn,
    settled,
)

# ----------------------------------------------------------------------------------- convolutions


class ConvLstm(nn.Module):
    """A full, a grouped and a depthwise convolution with batch norm, then an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = settled(nn.BatchNorm1d(8))
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(12, 12, 3, padding=1, groups=12, bias=False)
        self.lstm = nn.LSTM(12, 7, batch_first=True)
        self.last_norm = settled(nn.BatchNorm1d(7))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        x = torch.relu(self.norm(self.full(x.transpose(1, 2))))
        x = torch.relu(self.depthwise(self.grouped(x)))
        x, _ = self.lstm(x.transpose(1, 2))
        x = self.last_norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


class ConvTransposeGru(nn.Module):
    """A convolution halves the rate, a transposed one restores it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(5, 8, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.up = nn.ConvTranspose1d(6, 9, 4, stride=2, padding=1)
        self.head = nn.Conv1d(9, 3, 1)

    def forward(self, x: Tensor) -> Output:
        x = torch.relu(self.norm(self.down(x.transpose(1, 2))))
        x, _ = self.gru(x.transpose(1, 2))
        return self.head(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Conv2dGru(nn.Module):
    """Spectrogram [batch, 1, time, 8] -> channels and frequencies as one vector per step."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = settled(nn.BatchNorm2d(4))
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.gru = nn.GRU(6 * 4, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        x = F.max_pool2d(torch.relu(self.norm(self.full(x))), (1, 2))  # [batch, 4, time, 4]
        x = torch.relu(self.pointwise(self.depthwise(x)))
        x = x.permute(0, 2, 1, 3).flatten(2)  # [batch, time, 6 * 4]
        return self.head(self.gru(x)[0])


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.hidden = nn.Linear(24, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Output:
        x = F.max_pool1d(torch.relu(self.conv(x.transpose(1, 2))), 2)
        x = self.lstm(x.transpose(1, 2))[0].transpose(1, 2)
        x = F.avg_pool1d(x, 3, stride=1, padding=1)
        mean, top = F.adaptive_avg_pool1d(x, 1).squeeze(2), x.amax(dim=2)
        return self.head(torch.relu(self.hidden(torch.cat([mean, top], dim=1))))


class CausalConvs(nn.Module):
    """Padding on the left only, by zeros, by a constant and by repetition; then a delay."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(5, 8, 3)
        self.second = nn.Conv1d(8, 8, 3, dilation=2)
        self.third = nn.Conv1d(8, 6, 2)
        self.gru = nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        x = torch.tanh(self.first(F.pad(x.transpose(1, 2), (2, 0))))
        x = x + torch.tanh(self.second(F.pad(x, (4, 0), value=0.5)))
        x = self.third(F.pad(x, (1, 0), mode="replicate")).transpose(1, 2)
        delayed = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.head(self.gru(x - delayed)[0])


# -------------------------------------------------------------------------- activations, attention


class Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 18)
        self.prelu = nn.PReLU(9, init=0.1)
        self.conv = nn.Conv1d(9, 16, 1)
        self.lstm = nn.LSTM(8, 7, batch_first=True)
        self.first, self.second, self.third = (nn.Linear(7, 7) for _ in range(3))
        self.slope = nn.PReLU()
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        x = self.prelu(F.glu(self.stem(x), dim=-1).transpose(1, 2))
        x, _ = self.lstm(F.glu(self.conv(x), dim=1).transpose(1, 2))
        x = F.gelu(self.first(x)) + F.silu(x)
        x = F.elu(self.second(x)) * F.hardsigmoid(x)
        x = self.slope(self.third(F.leaky_relu(x, 0.2))) - F.softplus(x)
        return F.log_softmax(self.head(x.clamp(-4, 4)), dim=-1)


class HeadsAttention(nn.Module):
    """Scaled dot products over heads that are split by hand from one matrix for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.qkv = nn.Linear(8, 3 * 12)
        self.out = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        x, _ = self.lstm(x)
        batch, time, _ = x.shape
        qkv = self.qkv(x).view(batch, time, 3, 2, 6).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        y = y.transpose(1, 2).reshape(batch, time, 12)
        return self.head(self.norm(x + self.out(y)))


class EinsumAttention(nn.Module):
    """Weights [in, heads, size] and every product as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(5, 2, 6) / 4)
        self.key = nn.Parameter(torch.randn(5, 2, 6) / 4)
        self.value = nn.Parameter(torch.randn(5, 2, 7) / 4)
        self.out = nn.Parameter(torch.randn(2, 7, 9) / 4)
        self.gru = nn.GRU(9, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        q = torch.einsum("bti,ihd->bthd", x, self.query)
        k = torch.einsum("bti,ihd->bthd", x, self.key)
        v = torch.einsum("bti,ihd->bthd", x, self.value)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 6**0.5
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v)
        return self.head(self.gru(torch.einsum("bthd,hdo->bto", y, self.out))[0])


# ------------------------------------------------------------------------------- ----- framing


class Framed(nn.Module):
    """Frames of 8 samples every 4, windowed; the waveform has 4 * (time + 1) samples."""

    def __init__(self) -> None:
        super().__init__()
        self.window: Tensor
        self.register_buffer("window", torch.hann_window(8))
        self.stem = nn.Linear(8, 9)
        self.gru = nn.GRU(9, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, wave: Tensor) -> Output:
        frames = wave.unfold(-1, 8, 4) * self.window  # [batch, time, 8]
        return self.head(self.gru(torch.relu(self.stem(frames)))[0])


class Spectrogram(nn.Module):
    """A Fourier transform as a convolution with a fixed basis, and a mask for its powers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(5), torch.arange(8)) * (torch.pi / 4)
        basis = torch.cat([angles.cos(), angles.sin()]).unsqueeze(1)  # [2 * 5 bins, 1, 8]
        self.basis: Tensor
        self.register_buffer("basis", basis)
        self.lstm = nn.LSTM(5, 9, batch_first=True)
        self.mask = nn.Linear(9, 5)

    def forward(self, wave: Tensor) -> Output:
        spectrum = F.conv1d(F.pad(wave.unsqueeze(1), (2, 2), mode="reflect"), self.basis, stride=4)
        real, imaginary = spectrum.chunk(2, dim=1)
        power = (real.square() + imaginary.square()).transpose(1, 2)
        return torch.sigmoid(self.mask(self.lstm(torch.log(power + 1e-2))[0])) * power


AROUND = (
    ZooModel(
        "conv-lstm",
        ConvLstm,
        features(6),
        plain("full", "grouped", "depthwise") | rnn("lstm") | plain("head"),
    ),
    ZooModel(
        "conv-transpose-gru",
        ConvTransposeGru,
        features(5),
        plain("down", "up", "head") | rnn("gru"),
        time=6,
        valid_time=lambda time: time % 2 == 0,
    ),
    ZooModel(
        "conv2d-gru",
        Conv2dGru,
        lambda batch, time: (floats(batch, 1, time, 8),),
        plain("full", "depthwise", "pointwise") | rnn("gru") | plain("head"),
    ),
    ZooModel(
        "pooled-bilstm",
        Pooled,
        features(5),
        plain("conv") | rnn("lstm", both=True) | plain("hidden", "head"),
        valid_time=lambda time: time >= 2,
    ),
    ZooModel(
        "causal-convs",
        CausalConvs,
        features(5),
        plain("first", "second", "third") | rnn("gru") | plain("head"),
    ),
    ZooModel(
        "activations",
        Activations,
        features(5),
        plain("stem", "conv", "first", "second", "third", "head") | rnn("lstm"),
    ),
    ZooModel(
        "heads-attention",
        HeadsAttention,
        features(5),
        rnn("lstm") | plain("qkv", "out", "head"),
    ),
    ZooModel(
        "einsum-attention",
        EinsumAttention,
        features(5),
        dict.fromkeys(("query", "key", "value", "out"), FEEDFORWARD) | rnn("gru") | plain("head"),
    ),
    ZooModel(
        "framed-gru",
        Framed,
        lambda batch, time: (floats(batch, 4 * (time + 1)),),
        plain("stem") | rnn("gru") | plain("head"),
    ),
    ZooModel(
        "spectrogram-lstm",
        Spectrogram,
        lambda batch, time: (floats(batch, 4 * time + 4),),
        {"basis": FEEDFORWARD} | rnn("lstm") | plain("mask"),
        notes="the basis is a buffer: it weighs connections but is not trained",
    ),
)
