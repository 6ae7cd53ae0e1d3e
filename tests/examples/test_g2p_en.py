"""The grapheme-to-phoneme example: its parts on hand-made cases, its figures on the real data."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples import g2p_en


@pytest.fixture(scope="module")
def model(data_dir: Path) -> g2p_en.Seq2Seq:
    return g2p_en.load_model(data_dir)


@pytest.fixture(scope="module")
def sample(data_dir: Path) -> list[g2p_en.Entry]:
    return g2p_en.split_dictionary(g2p_en.read_dictionary(data_dir))[0]


def small_model() -> g2p_en.Seq2Seq:
    return g2p_en.Seq2Seq(letter_width=5, phone_width=6, hidden=7).eval()


sequences = st.lists(st.integers(0, 3), max_size=7)


@given(sequences, sequences)
def test_edit_distance_is_what_its_definition_says(a: list[int], b: list[int]) -> None:
    @cache
    def defined(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        substituted = defined(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(substituted, defined(i - 1, j) + 1, defined(i, j - 1) + 1)

    assert g2p_en.edit_distance(a, b) == defined(len(a), len(b))


def test_phones_are_the_published_ones_in_order() -> None:
    assert len(g2p_en.PHONES) == 74
    assert g2p_en.PHONES[:7] == ("<pad>", "<unk>", "<s>", "</s>", "AA0", "AA1", "AA2")
    assert g2p_en.PHONES[-9:] == ("UW", "UW0", "UW1", "UW2", "V", "W", "Y", "Z", "ZH")
    assert all(a < b for a, b in pairwise(g2p_en.PHONES[4:]))


def test_spell_ends_and_pads_words() -> None:
    letters, lengths = g2p_en.spell(["ab", "z"])
    assert letters.tolist() == [[3, 4, 2], [28, 2, 0]]
    assert lengths.tolist() == [3, 2]


def test_decode_stops_each_word_at_its_own_end() -> None:
    script = torch.tensor([[9, g2p_en.STOP, 9], [8, 7, g2p_en.STOP]])

    def step(token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        position = int(state[0, 0])
        return torch.nn.functional.one_hot(script[:, position], 74).float(), state + 1

    answers = g2p_en.decode(lambda letters, lengths: torch.zeros(2, 1), step, ["a", "b"])
    assert answers == [(9,), (8, 7)]


def test_decode_gives_up_after_twenty_steps() -> None:
    def step(token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.one_hot(torch.tensor([5]), 74).float(), state

    answers = g2p_en.decode(lambda letters, lengths: torch.zeros(1, 1), step, ["a"])
    assert answers == [(5,) * 20]


def test_steps_compute_what_the_whole_model_computes() -> None:
    model = small_model()
    inputs = g2p_en.teacher_inputs([g2p_en.Entry("ab", (4, 5, 6)), g2p_en.Entry("c", (7,))])
    encode, step = g2p_en.Encoder(model), g2p_en.DecoderStep(model)
    with torch.no_grad():
        whole, stepped = model(*inputs), g2p_en.step_through(encode, step, *inputs)
    assert whole.shape == (2, 4, 74)
    torch.testing.assert_close(stepped, whole, rtol=0, atol=1e-6)


def test_from_state_finds_the_sizes() -> None:
    model = small_model()
    again = g2p_en.from_state(model.state_dict())
    assert (again.enc.input_size, again.dec.input_size, again.enc.hidden_size) == (5, 6, 7)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_missing_data_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        g2p_en.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert "models/g2p_en/weights.pt is missing: --data must name a folder" in " ".join(
        capsys.readouterr().err.split()
    )


def test_dictionary_keeps_first_pronunciations_of_plain_words(data_dir: Path) -> None:
    entries = g2p_en.read_dictionary(data_dir)
    words = [entry.word for entry in entries]
    assert len(set(words)) == len(words) == 117_493
    assert entries[words.index("a")].phones == (g2p_en.PHONES.index("AH0"),)
    said = [g2p_en.PHONES[phone] for phone in entries[words.index("aalto")].phones]
    assert said == ["AA1", "L", "T", "OW2"]  # "# name, finnish" follows in the file


def test_sample_and_other_words_share_none(data_dir: Path) -> None:
    entries = g2p_en.read_dictionary(data_dir)
    sample, others = g2p_en.split_dictionary(entries)
    assert len(sample) == 5_000
    assert len(sample) + len(others) == len(entries)
    assert set(sample) | set(others) == set(entries)


def test_published_error_rates(model: g2p_en.Seq2Seq, sample: list[g2p_en.Entry]) -> None:
    rates = g2p_en.evaluate(g2p_en.Encoder(model), g2p_en.DecoderStep(model), sample)
    assert (f"{rates.phoneme:.2%}", f"{rates.word:.2%}") == ("10.26%", "32.34%")


def test_script_prints_the_figures(
    data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g2p_en, "SAMPLE", 100)
    assert g2p_en.main(["--data", str(data_dir)]) == 0
    printed = capsys.readouterr().out
    assert "g2p_en on 100 words" in printed
    assert "10.26%" in printed and "32.34%" in printed
