"""Zoo: published recurrent models, made small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from tests.zoo_model import (
    FEEDFORWARD,
    RECURRENT,
    Inputs,
    Output,
    ZooModel,
    cell,
    features,
    floats,
    integers,
    plain,
    rnn,
    settled,
    weights,
)
from tests.zoo_states import lengths_for


def fourier_basis(samples: int) -> Tensor:
    """Real and imaginary rows of a windowed Fourier transform, [2 * bins, samples]."""
    angles = torch.outer(torch.arange(samples // 2 + 1), torch.arange(samples))
    angles = angles * (2 * torch.pi / samples)
    return torch.cat([angles.cos(), -angles.sin()]) * torch.hann_window(samples)


class SpeechRecognizer(nn.Module):
    """Deep Speech 2: convolution over a spectrogram, then GRUs whose directions are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=(2, 1), padding=1, bias=False)
        self.conv_norm = settled(nn.BatchNorm2d(4))
        self.gru1 = nn.GRU(16, 7, bidirectional=True)
        self.norm = settled(nn.BatchNorm1d(7))
        self.gru2 = nn.GRU(7, 7, bidirectional=True)
        self.head = nn.Linear(7, 6, bias=False)

    def forward(self, x: Tensor) -> Output:
        x = F.hardtanh(self.conv_norm(self.conv(x.transpose(1, 2).unsqueeze(1))), 0.0, 20.0)
        batch, channels, bins, time = x.shape
        x = x.reshape(batch, channels * bins, time).permute(2, 0, 1)
        x = self.gru1(x)[0].view(time, batch, 2, -1).sum(2)
        x = self.norm(x.reshape(time * batch, -1)).view(time, batch, -1)
        x = self.gru2(x)[0]
        return self.head(x[..., :7] + x[..., 7:]).transpose(0, 1)


class TwoStageEnhancer(nn.Module):
    """DTLN: two LSTMs mask magnitudes, two more mask a learned representation of the result."""

    def __init__(self) -> None:
        super().__init__()
        basis = fourier_basis(12)  # 7 bins
        self.basis: Tensor
        self.inverse: Tensor
        self.register_buffer("basis", basis.unsqueeze(1))
        self.register_buffer("inverse", torch.linalg.pinv(basis).unsqueeze(-1))
        self.lstm1 = nn.LSTM(7, 10, batch_first=True)
        self.lstm2 = nn.LSTM(10, 9, batch_first=True)
        self.mask1 = nn.Linear(9, 7)
        self.encoder = nn.Conv1d(12, 16, 1, bias=False)
        self.norm = nn.LayerNorm(16)
        self.lstm3 = nn.LSTM(16, 8, batch_first=True)
        self.lstm4 = nn.LSTM(8, 11, batch_first=True)
        self.mask2 = nn.Linear(11, 16)
        self.decoder = nn.Conv1d(16, 12, 1, bias=False)

    def forward(self, wave: Tensor) -> Output:
        spectrum = F.conv1d(wave.unsqueeze(1), self.basis, stride=6)  # [batch, 14, time]
        real, imaginary = spectrum.chunk(2, dim=1)
        magnitude = torch.sqrt(real.square() + imaginary.square() + 1e-7).transpose(1, 2)
        y, _ = self.lstm2(self.lstm1(magnitude)[0])
        mask = torch.sigmoid(self.mask1(y)).transpose(1, 2)
        estimate = torch.cat([real * mask, imaginary * mask], dim=1)
        frames = F.conv1d(estimate, self.inverse)  # [batch, 12, time]
        code = self.encoder(frames)
        y, _ = self.lstm4(self.lstm3(self.norm(code.transpose(1, 2)))[0])
        return self.decoder(torch.sigmoid(self.mask2(y)).transpose(1, 2) * code)


class GroupedGru(nn.Module):
    """One GRU for each half of the channels."""

    def __init__(self, channels: int, hidden: int, *, both: bool) -> None:
        super().__init__()
        options = {"batch_first": True, "bidirectional": both}
        self.low = nn.GRU(channels // 2, hidden, **options)
        self.high = nn.GRU(channels // 2, hidden, **options)

    def forward(self, x: Tensor) -> Output:
        low, high = torch.chunk(x, 2, dim=-1)
        return torch.cat([self.low(low)[0], self.high(high)[0]], dim=-1)


class DualPath(nn.Module):
    """GTCRN: grouped GRUs along frequency, then along time, with residuals and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.intra = GroupedGru(8, 3, both=True)
        self.intra_fc = nn.Linear(12, 8)
        self.intra_norm = nn.LayerNorm((6, 8))
        self.inter = GroupedGru(8, 5, both=False)
        self.inter_fc = nn.Linear(10, 8)
        self.inter_norm = nn.LayerNorm((6, 8))

    def forward(self, x: Tensor) -> Output:
        batch, channels, time, bands = x.shape
        x = x.permute(0, 2, 3, 1)  # [batch, time, bands, channels]
        y = self.intra_fc(self.intra(x.reshape(batch * time, bands, channels)))
        x = x + self.intra_norm(y.view(batch, time, bands, channels))
        x = x.permute(0, 2, 1, 3)  # [batch, bands, time, channels]
        y = self.inter_fc(self.inter(x.reshape(batch * bands, time, channels)))
        y = y.view(batch, bands, time, channels).permute(0, 2, 1, 3)
        x = x.permute(0, 2, 1, 3) + self.inter_norm(y)
        return x.permute(0, 3, 1, 2)


class DualPathEnhancer(nn.Module):
    """A complex spectrum [batch, 2, time, 12] and its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 8, (1, 4), stride=(1, 2), padding=(0, 1))
        self.norm = settled(nn.BatchNorm2d(8))
        self.act = nn.PReLU()
        self.path = DualPath()
        self.up = nn.ConvTranspose2d(8, 2, (1, 4), stride=(1, 2), padding=(0, 1))

    def forward(self, spectrum: Tensor) -> Output:
        x = self.act(self.norm(self.down(spectrum)))
        return torch.tanh(self.up(self.path(x) + x)) * spectrum


class VoiceActivity(nn.Module):
    """Silero: for every chunk of 16 samples a convolution front end and one step of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.basis: Tensor
        self.register_buffer("basis", fourier_basis(8).unsqueeze(1))  # 5 bins
        self.conv1 = nn.Conv1d(5, 9, 3, padding=1)
        self.conv2 = nn.Conv1d(9, 7, 3, stride=2, padding=1)
        self.cell = nn.LSTMCell(7, 8)
        self.head = nn.Conv1d(8, 1, 1)

    def forward(self, chunks: Tensor, state: Tensor) -> Output:
        h, c = state[0], state[1]
        speech = []
        for t in range(chunks.shape[1]):
            x = F.pad(chunks[:, t], (0, 4), mode="reflect").unsqueeze(1)
            real, imaginary = F.conv1d(x, self.basis, stride=4).chunk(2, dim=1)
            x = torch.sqrt(real.square() + imaginary.square() + 1e-7)  # [batch, 5, 4]
            x = torch.relu(self.conv2(torch.relu(self.conv1(x))))  # [batch, 7, 2]
            h, c = self.cell(x.mean(dim=2), (h, c))
            speech.append(torch.sigmoid(self.head(torch.relu(h).unsqueeze(-1))).squeeze(-1))
        return torch.cat(speech, dim=1), torch.stack([h, c])


class Pronouncer(nn.Module):
    """g2p: a packed GRU reads letters, a GRU cell writes four phones, the best one fed back."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(12, 6)
        self.encoder = nn.GRU(6, 9, batch_first=True)
        self.phones = nn.Embedding(10, 5)
        self.decoder = nn.GRUCell(5, 9)
        self.head = nn.Linear(9, 10)

    def forward(self, word: Tensor, lengths: Tensor) -> Output:
        packed = pack_padded_sequence(
            self.letters(word), lengths, batch_first=True, enforce_sorted=False
        )
        h = self.encoder(packed)[1].squeeze(0)
        phone = torch.full((word.shape[0],), 2, dtype=torch.long, device=word.device)
        outputs = []
        for _ in range(4):
            h = self.decoder(self.phones(phone), h)
            logits = self.head(h)
            outputs.append(logits)
            phone = logits.argmax(dim=-1)
        return torch.stack(outputs, dim=1)


class Diarizer(nn.Module):
    """PyanNet: sinc filters, convolutions with instance norms, two BiLSTM layers, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.linspace(0.02, 0.3, 6).unsqueeze(1))
        self.band = nn.Parameter(torch.full((6, 1), 0.08))
        self.steps: Tensor
        self.register_buffer("steps", torch.arange(-4, 5).unsqueeze(0))
        self.norms = nn.ModuleList(nn.InstanceNorm1d(n, affine=True) for n in (1, 6, 7))
        self.conv = nn.Conv1d(6, 7, 3)
        self.lstm = nn.LSTM(7, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(16, 9)
        self.head = nn.Linear(9, 3)

    def filters(self) -> Tensor:
        """Band-pass filters [6, 1, 9] from their lower edges and widths, in cycles a sample."""
        high = self.low.abs() + self.band.abs()
        low_pass = [2 * edge * torch.sinc(2 * edge * self.steps) for edge in (self.low, high)]
        return (low_pass[1] - low_pass[0]).unsqueeze(1)

    def forward(self, wave: Tensor) -> Output:
        x = self.norms[0](wave.unsqueeze(1))
        x = F.max_pool1d(F.conv1d(x, self.filters(), stride=2).abs(), 2)
        x = F.leaky_relu(self.norms[1](x))
        x = F.leaky_relu(self.norms[2](F.max_pool1d(self.conv(x), 2)))
        x, _ = self.lstm(x.transpose(1, 2))
        return torch.sigmoid(self.head(F.leaky_relu(self.linear(x))))


class CharacterModel(nn.Module):
    """Character model with tied weights; the states of two layers enter and leave."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.drop = nn.Dropout(0.2)
        self.lstm = nn.LSTM(6, 9, num_layers=2, dropout=0.2)
        self.project = nn.Linear(9, 6)
        self.decoder = nn.Linear(6, 13)
        self.decoder.weight = self.embedding.weight

    def forward(self, text: Tensor, h_0: Tensor, c_0: Tensor) -> Output:
        y, (h_n, c_n) = self.lstm(self.drop(self.embedding(text)), (h_0, c_0))
        return self.decoder(self.project(self.drop(y))), h_n, c_n


class NoiseSuppressor(nn.Module):
    """RNNoise: three GRUs that read each other and the input, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(7, 6)
        self.vad_gru = nn.GRU(6, 5, batch_first=True)
        self.vad = nn.Linear(5, 1)
        self.noise_gru = nn.GRU(6 + 5 + 7, 9, batch_first=True)
        self.gain_gru = nn.GRU(5 + 9 + 7, 8, batch_first=True)
        self.gain = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Output:
        dense = torch.tanh(self.dense(x))
        vad, _ = self.vad_gru(dense)
        noise = torch.relu(self.noise_gru(torch.cat([dense, vad, x], dim=-1))[0])
        gain, _ = self.gain_gru(torch.cat([vad, noise, x], dim=-1))
        return torch.sigmoid(self.gain(gain)), torch.sigmoid(self.vad(vad))


class RowClassifier(nn.Module):
    """A GRU over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(28, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, image: Tensor) -> Output:
        return self.head(self.gru(image.squeeze(1))[1].squeeze(0))


def chunks_and_state(batch: int, time: int) -> Inputs:
    return floats(batch, time, 16), floats(2, batch, 8, seed=1)


def word_and_lengths(batch: int, time: int) -> Inputs:
    return integers(12, batch, time), lengths_for(batch, time)


def text_and_states(batch: int, time: int) -> Inputs:
    states = (floats(2, batch, 9, seed=1), floats(2, batch, 9, seed=2))
    return integers(13, time, batch), *states


PUBLISHED = (
    ZooModel(
        "speech-recognizer",
        SpeechRecognizer,
        features(8),
        plain("conv", "head") | rnn("gru1", both=True) | rnn("gru2", both=True),
    ),
    ZooModel(
        "two-stage-enhancer",
        TwoStageEnhancer,
        lambda batch, time: (floats(batch, 6 * (time + 1)),),
        {"basis": FEEDFORWARD, "inverse": FEEDFORWARD}
        | plain("mask1", "encoder", "mask2", "decoder")
        | rnn("lstm1")
        | rnn("lstm2")
        | rnn("lstm3")
        | rnn("lstm4"),
    ),
    ZooModel(
        "dual-path-enhancer",
        DualPathEnhancer,
        lambda batch, time: (floats(batch, 2, time, 12),),
        plain("down", "up", "path.intra_fc", "path.inter_fc")
        | rnn("path.intra.low", both=True)
        | rnn("path.intra.high", both=True)
        | rnn("path.inter.low")
        | rnn("path.inter.high"),
    ),
    ZooModel(
        "voice-activity",
        VoiceActivity,
        chunks_and_state,
        {"basis": FEEDFORWARD * 3}
        | plain("conv1", "conv2", "head", calls=3)
        | cell("cell", calls=3),
        time=3,
        time_varies=False,
        notes="both states enter and leave as one stacked tensor",
    ),
    ZooModel(
        "pronouncer",
        Pronouncer,
        word_and_lengths,
        plain("letters")
        | rnn("encoder")
        | weights(RECURRENT, "phones", "head", calls=4)
        | cell("decoder", calls=4),
        batch=3,
        notes="each phone depends on the one before, through head and embedding",
    ),
    ZooModel(
        "diarizer",
        Diarizer,
        lambda batch, time: (floats(batch, 8 * time + 24),),
        plain("conv", "linear", "head") | rnn("lstm", layers=2, both=True),
        notes="the first filters are computed from their edges: no tensor weighs connections",
    ),
    ZooModel(
        "tied-character-model",
        CharacterModel,
        text_and_states,
        {"embedding.weight": FEEDFORWARD * 2} | rnn("lstm", layers=2) | plain("project"),
        notes="tied tensors have one block per role: the decoder does not depend on itself",
    ),
    ZooModel(
        "noise-suppressor",
        NoiseSuppressor,
        features(7),
        plain("dense", "vad", "gain") | rnn("vad_gru") | rnn("noise_gru") | rnn("gain_gru"),
    ),
    ZooModel(
        "row-classifier",
        RowClassifier,
        lambda batch, time: (floats(batch, 1, time, 28),),
        rnn("gru") | plain("head"),
        time=8,
    ),
)
