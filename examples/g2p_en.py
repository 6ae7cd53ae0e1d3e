"""g2p_en, a published grapheme-to-phoneme model, written from its description.

The model (Kyubyong/g2p, Apache-2.0) spells an English word letter by letter into a GRU and reads
its phones from a second GRU that starts from the first one's final state. The published weights
score 10.26 % phoneme and 32.34 % word errors on 5,000 words of the dictionary they were trained on.

    python -m examples.g2p_en --data PATH

:mod:`examples.g2p_en_pruned` removes neurons from it.
"""

from __future__ import annotations

import argparse
import gzip
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
# All in one alphabetical order. UW alone appears without a stress mark too.
SOUNDS = sorted([*(v + stress for v in VOWELS for stress in "012"), *CONSONANTS, "UW"])
PHONES = ("<pad>", "<unk>", "<s>", "</s>", *SOUNDS)
START, STOP = PHONES.index("<s>"), PHONES.index("</s>")
LETTER_IDS = {letter: index for index, letter in enumerate(LETTERS)}
PHONE_IDS = {phone: index for index, phone in enumerate(PHONES)}
MAX_STEPS = 20
SAMPLE = 5_000
DATA_HELP = "folder with models/g2p_en/weights.pt and cmudict/cmudict.dict.gz"

# (letters [batch, time], lengths [batch]) -> state [batch, hidden]
Encode = Callable[[Tensor, Tensor], Tensor]
# (token [batch], state [batch, hidden]) -> (logits [batch, phones], state)
DecodeStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Seq2Seq(nn.Module):
    """The whole model as it is trained: the right phones so far are given (teacher forcing).

    Args:
        letter_width: size of a letter's embedding.
        phone_width: size of a phone's embedding.
        hidden: units of each GRU; the encoder's final state starts the decoder.
    """

    def __init__(self, letter_width: int, phone_width: int, hidden: int) -> None:
        super().__init__()
        self.enc_emb = nn.Embedding(len(LETTERS), letter_width)
        self.enc = nn.GRU(letter_width, hidden, batch_first=True)
        self.dec_emb = nn.Embedding(len(PHONES), phone_width)
        self.dec = nn.GRU(phone_width, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, len(PHONES))

    def forward(self, letters: Tensor, lengths: Tensor, phones: Tensor) -> Tensor:
        """Score the phone that follows each given phone.

        Args:
            letters: ids [batch, time], each word ended by ``</s>`` and padded.
            lengths: letters per word, ``</s>`` included, [batch], on the CPU.
            phones: ids [batch, steps], each word starting with ``<s>``.

        Returns:
            Logits [batch, steps, phones].
        """
        state = _read(self.enc_emb, self.enc, letters, lengths)
        hidden, _ = self.dec(self.dec_emb(phones), state)
        logits: Tensor = self.fc(hidden)
        return logits


def _read(embedding: nn.Embedding, gru: nn.GRU, letters: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(
        embedding(letters), lengths, batch_first=True, enforce_sorted=False
    )
    state: Tensor = gru(packed)[1]  # [1, batch, hidden]
    return state


class Encoder(nn.Module):
    """The first half of a :class:`Seq2Seq`, sharing its layers: letters to a state."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.enc_emb, self.enc = model.enc_emb, model.enc

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Read words [batch, time] of the given lengths [batch]: state [batch, hidden]."""
        return _read(self.enc_emb, self.enc, letters, lengths).squeeze(0)


class DecoderStep(nn.Module):
    """The second half of a :class:`Seq2Seq`, sharing its layers, one phone per call."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.dec_emb, self.dec, self.fc = model.dec_emb, model.dec, model.fc

    def forward(self, token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Follow phone ids [batch] from state [batch, hidden]: logits [batch, phones], state."""
        hidden, state = self.dec(self.dec_emb(token.unsqueeze(1)), state.unsqueeze(0))
        return self.fc(hidden.squeeze(1)), state.squeeze(0)


def load_model(data: Path) -> Seq2Seq:
    """Load the published weights, in eval mode."""
    path = _existing(data / "models/g2p_en/weights.pt")
    return from_state(torch.load(path, weights_only=True))


def from_state(state: Mapping[str, Tensor]) -> Seq2Seq:
    """Build the model that fits a state dict, whatever sizes pruning has left it."""
    model = Seq2Seq(
        letter_width=state["enc_emb.weight"].shape[1],
        phone_width=state["dec_emb.weight"].shape[1],
        hidden=state["fc.weight"].shape[1],
    )
    model.load_state_dict(state, strict=True)
    return model.eval()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --data must name a folder that holds models/g2p_en/weights.pt "
            "and cmudict/cmudict.dict.gz"
        )
    return path


@dataclass(frozen=True)
class Entry:
    """A word of the dictionary and its first pronunciation, as ids of PHONES."""

    word: str
    phones: tuple[int, ...]


def read_dictionary(data: Path) -> list[Entry]:
    """Read the words spelt a-z whose first pronunciation uses known phones, in file order."""
    with gzip.open(_existing(data / "cmudict/cmudict.dict.gz"), "rt", encoding="utf-8") as lines:
        split = [line.partition("#")[0].split() for line in lines]
    letters = set(LETTERS[3:])  # this also leaves out alternatives, spelt "word(2)"
    return [
        Entry(word, tuple(PHONE_IDS[phone] for phone in phones))
        for word, *phones in split
        if letters.issuperset(word) and PHONE_IDS.keys() >= set(phones)
    ]


def split_dictionary(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Split into the published sample of 5,000 words and the others.

    The published figures hold for the sample. Anything that is chosen or trained by looking at
    words uses the others only.
    """
    sample = random.Random(0).sample(entries, SAMPLE)
    held = {entry.word for entry in sample}
    return sample, [entry for entry in entries if entry.word not in held]


def spell(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Turn words into padded letter ids [batch, time] and their lengths [batch]."""
    rows = [torch.tensor([*map(LETTER_IDS.__getitem__, (*word, "</s>"))]) for word in words]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def decode(encode: Encode, step: DecodeStep, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Pronounce words greedily: for each the phone ids before ``</s>``, at most 20."""
    with torch.no_grad():
        state = encode(*spell(words))
        token = torch.full((len(words),), START)
        said = torch.full((len(words), MAX_STEPS), STOP)
        running = torch.ones(len(words), dtype=torch.bool)
        for position in range(MAX_STEPS):
            logits, state = step(token, state)
            token = logits.argmax(dim=1)
            running &= token != STOP
            if not running.any():
                break
            said[running, position] = token[running]
    ends = (said != STOP).sum(dim=1).tolist()
    return [tuple(row[:end]) for row, end in zip(said.tolist(), ends, strict=True)]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions that turn ``a`` into ``b`` (Levenshtein)."""
    row = list(range(len(b) + 1))  # distances from the part of a read so far to every part of b
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@dataclass(frozen=True)
class ErrorRates:
    """How wrong a model is.

    Attributes:
        phoneme: sum of edit distances over sum of true phones.
        word: words with any wrong phone over words.
    """

    phoneme: float
    word: float


def evaluate(
    encode: Encode, step: DecodeStep, entries: Sequence[Entry], batch: int = 500
) -> ErrorRates:
    """Pronounce all words and compare with the dictionary."""
    edits = wrong = 0
    for start in range(0, len(entries), batch):
        part = entries[start : start + batch]
        answers = decode(encode, step, [entry.word for entry in part])
        for entry, answer in zip(part, answers, strict=True):
            distance = edit_distance(answer, entry.phones)
            edits += distance
            wrong += distance > 0
    return ErrorRates(edits / sum(len(entry.phones) for entry in entries), wrong / len(entries))


def teacher_inputs(entries: Sequence[Entry]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of :class:`Seq2Seq`: letters, lengths, and phones behind ``<s>``, padded."""
    rows = [torch.tensor((START, *entry.phones)) for entry in entries]
    return *spell([entry.word for entry in entries]), pad_sequence(rows, batch_first=True)


def step_through(
    encode: Encode, step: DecodeStep, letters: Tensor, lengths: Tensor, phones: Tensor
) -> Tensor:
    """Compute what ``Seq2Seq.forward`` computes, one decoder step at a time."""
    state = encode(letters, lengths)
    rows = []
    for token in phones.unbind(1):
        logits, state = step(token, state)
        rows.append(logits)
    return torch.stack(rows, dim=1)


def published_table(model: Seq2Seq, entries: Sequence[Entry]) -> Table:
    """Compare the error rates of the published weights with the published ones."""
    rates = evaluate(Encoder(model), DecoderStep(model), entries)
    table = Table(title=f"g2p_en on {len(entries):,} words of its dictionary")
    table.add_column("error rate")
    table.add_column("published", justify="right")
    table.add_column("measured", justify="right")
    table.add_row("phonemes", "10.26%", f"{rates.phoneme:.2%}")
    table.add_row("words", "32.34%", f"{rates.word:.2%}")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Reproduce the published error rates of g2p_en from its weights."
    )
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    options = parser.parse_args(argv)
    try:
        model = load_model(options.data)
        sample, _ = split_dictionary(read_dictionary(options.data))
    except FileNotFoundError as error:
        parser.error(str(error))
    Console().print(published_table(model, sample))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
