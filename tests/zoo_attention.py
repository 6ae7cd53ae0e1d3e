"""Zoo: encoder and decoder, attention, tied embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.zoo_model import (
    FEEDFORWARD,
    INPUT,
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
    tokens,
    weights,
)
from tests.zoo_states import lengths_for


class GruEncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(5, 8, batch_first=True)
        self.embedding = nn.Embedding(11, 6)
        self.decoder = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor, words: Tensor) -> Output:
        _, h_n = self.encoder(x)
        return self.head(self.decoder(self.embedding(words), h_n)[0])


class LstmEncoderDecoder(nn.Module):
    """Two directions become one: a linear layer bridges the states."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 7, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(14, 9)
        self.decoder = nn.LSTM(6, 9, batch_first=True)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        _, (h_n, c_n) = self.encoder(x)
        h_0 = torch.tanh(self.bridge(torch.cat([h_n[0], h_n[1]], dim=-1)))
        c_0 = self.bridge(torch.cat([c_n[0], c_n[1]], dim=-1))
        return self.head(self.decoder(y, (h_0.unsqueeze(0), c_0.unsqueeze(0)))[0])


class PackedEncoderDecoder(nn.Module):
    """Two layers of states are handed over from a packed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(12, 5)
        self.encoder = nn.LSTM(5, 8, num_layers=2, batch_first=True)
        self.target = nn.Embedding(10, 6)
        self.decoder = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, words: Tensor, lengths: Tensor, answer: Tensor) -> Output:
        packed = pack_padded_sequence(
            self.source(words), lengths, batch_first=True, enforce_sorted=False
        )
        _, state = self.encoder(packed)
        return self.head(self.decoder(self.target(answer), state)[0])


class VectorAttention(nn.Module):
    """Windows of three steps, maxout, and additive attention whose scores a vector makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.lstm = nn.LSTM(18, 8, batch_first=True)
        self.hidden = nn.Linear(8, 10)
        self.vector = nn.Parameter(torch.randn(10))
        self.pieces = nn.Linear(8, 12)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        x = F.pad(torch.relu(self.stem(x)), (0, 0, 1, 1)).unfold(1, 3, 1)
        x, _ = self.lstm(x.flatten(2))
        shares = (torch.tanh(self.hidden(x)) @ self.vector).softmax(dim=1)
        mean = (shares.unsqueeze(2) * x).sum(1)
        return self.head(self.pieces(mean).unflatten(1, (2, 6)).max(1).values)


class LuongDecoder(nn.Module):
    """Attention over a packed encoder after the decoder has run (Luong, general score)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(5, 7, batch_first=True)
        self.decoder = nn.GRU(6, 7, batch_first=True)
        self.score = nn.Linear(7, 7, bias=False)
        self.combine = nn.Linear(14, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor, lengths: Tensor, y: Tensor) -> Output:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, h_n = self.encoder(packed)
        memory, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        output, _ = self.decoder(y, h_n)
        scores = torch.bmm(output, self.score(memory).transpose(1, 2))
        beyond = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device).unsqueeze(1)
        scores = scores.masked_fill(beyond.unsqueeze(1), float("-inf"))
        context = torch.bmm(torch.softmax(scores, dim=-1), memory)
        return self.head(torch.tanh(self.combine(torch.cat([output, context], dim=-1))))


class BahdanauDecoder(nn.Module):
    """Additive attention inside the decoder's loop of four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(5, 4, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(8, 9)
        self.embedding = nn.Embedding(11, 6)
        self.key = nn.Linear(8, 7, bias=False)
        self.query = nn.Linear(9, 7)
        self.score = nn.Linear(7, 1, bias=False)
        self.cell = nn.GRUCell(6 + 8, 9)
        self.head = nn.Linear(9, 11)

    def forward(self, x: Tensor, words: Tensor) -> Output:
        memory, h_n = self.encoder(x)
        keys = self.key(memory)
        h = torch.tanh(self.bridge(torch.cat([h_n[0], h_n[1]], dim=-1)))
        inputs = self.embedding(words)
        outputs = []
        for t in range(4):
            scores = self.score(torch.tanh(keys + self.query(h).unsqueeze(1)))  # [batch, time, 1]
            context = (torch.softmax(scores, dim=1) * memory).sum(dim=1)
            h = self.cell(torch.cat([inputs[:, t], context], dim=-1), h)
            outputs.append(self.head(h))
        return torch.stack(outputs, dim=1)


class AttentionPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 5)
        self.lstm = nn.LSTM(5, 7, bidirectional=True, batch_first=True)
        self.score = nn.Linear(14, 1)
        self.head = nn.Linear(14, 3)

    def forward(self, words: Tensor) -> Output:
        y, _ = self.lstm(self.embedding(words))
        weight = F.softmax(self.score(torch.tanh(y)), dim=1)
        return self.head((weight * y).sum(dim=1))


class TiedProjection(nn.Module):
    """The projection of the LSTM has the embedding's size, and the decoder is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 9, proj_size=6, batch_first=True)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Output:
        return self.decoder(self.lstm(self.embedding(words))[0])


def sequence_and_words(batch: int, time: int) -> Inputs:
    return floats(batch, time, 5), integers(11, batch, 4)


def two_sequences(batch: int, time: int) -> Inputs:
    return floats(batch, time, 5), floats(batch, time, 6, seed=1)


def words_lengths_answer(batch: int, time: int) -> Inputs:
    return integers(12, batch, time), lengths_for(batch, time), integers(10, batch, time, seed=1)


def sequence_lengths_target(batch: int, time: int) -> Inputs:
    return floats(batch, time, 5), lengths_for(batch, time, slack=1), floats(batch, 4, 6, seed=1)


SEQUENCE_TO_SEQUENCE = (
    ZooModel(
        "gru-encoder-decoder",
        GruEncoderDecoder,
        sequence_and_words,
        rnn("encoder") | plain("embedding") | rnn("decoder") | plain("head"),
    ),
    ZooModel(
        "lstm-encoder-decoder",
        LstmEncoderDecoder,
        two_sequences,
        rnn("encoder", both=True)
        | weights(INPUT, "bridge", calls=2)
        | rnn("decoder")
        | plain("head"),
        notes="one bridge for both states: they are computed by the same rows",
    ),
    ZooModel(
        "packed-encoder-decoder",
        PackedEncoderDecoder,
        words_lengths_answer,
        plain("source", "target", "head") | rnn("encoder", layers=2) | rnn("decoder", layers=2),
        batch=3,
    ),
    ZooModel(
        "vector-attention",
        VectorAttention,
        features(5),
        plain("stem", "hidden", "pieces", "head") | rnn("lstm") | {"vector": FEEDFORWARD},
    ),
    ZooModel(
        "luong-decoder",
        LuongDecoder,
        sequence_lengths_target,
        rnn("encoder") | rnn("decoder") | plain("score", "combine", "head"),
        batch=3,
        notes="the attention comes after the decoder, outside its recurrence",
    ),
    ZooModel(
        "bahdanau-decoder",
        BahdanauDecoder,
        sequence_and_words,
        rnn("encoder", both=True)
        | weights(INPUT, "bridge", "key")
        | weights(RECURRENT, "query", "score", calls=4)
        | cell("cell", calls=4)
        | plain("embedding")
        | plain("head", calls=4),
        notes="each query depends on the one before, through the context and the cell, so that "
        "query and score are recurrent; the keys are terms of the sum between the two: input. "
        "The embedding fills other columns of the cell than the context: feedforward",
    ),
    ZooModel(
        "bilstm-attention-pooling",
        AttentionPooling,
        tokens(13),
        plain("embedding") | rnn("lstm", both=True) | plain("score", "head"),
    ),
    ZooModel(
        "tied-projected-lm",
        TiedProjection,
        tokens(11),
        {"embedding.weight": FEEDFORWARD * 2} | rnn("lstm", projected=True),
        notes="tied tensors have one block per role: the decoder does not depend on itself",
    ),
)
