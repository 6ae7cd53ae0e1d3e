"""The language model of the examples: its texts, and how they are read and judged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples import language_model as lm


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "tinyshakespeare").mkdir()
    text = "to be, or not to be: that is the question.\n" * 60
    (tmp_path / "tinyshakespeare/input.txt").write_text(text)
    (tmp_path / "ptb").mkdir()
    for part, lines in (("train", "a b\nb c\n"), ("valid", "c\n"), ("test", "a\n")):
        (tmp_path / f"ptb/ptb.{part}.txt").write_text(lines)
    return tmp_path


def test_characters_are_split_in_order(data: Path) -> None:
    corpus = lm.read_corpus(data, "characters")
    whole = torch.cat([corpus.train, corpus.validation, corpus.test])
    assert [len(corpus.train), len(corpus.validation), len(corpus.test)] == [2193, 129, 258]
    assert corpus.vocabulary == len(set(whole.tolist())) == 17
    assert torch.equal(whole[:43], whole[43:86])


def test_words_end_their_lines(data: Path) -> None:
    corpus = lm.read_corpus(data, "words")  # <eos>, a, b, c
    assert corpus.train.tolist() == [1, 2, 0, 2, 3, 0]
    assert (corpus.validation.tolist(), corpus.test.tolist()) == ([3, 0], [1, 0])


def test_batches_are_read_side_by_side() -> None:
    cut = lm.batches(torch.arange(15), 2, 3)
    assert [first for _, _, first in cut] == [True, False, False]
    assert [tokens[:, 0].tolist() for tokens, _, _ in cut] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [tokens[:, 1].tolist() for tokens, _, _ in cut] == [[7, 8, 9], [10, 11, 12], [13]]
    assert all(torch.equal(targets, tokens + 1) for tokens, targets, _ in cut)


def test_a_text_in_pieces_is_judged_like_the_whole() -> None:
    model = lm.LanguageModel(7, 5).eval()
    text = torch.randint(7, (61,))
    pieces, whole = (lm.judge(model, lm.batches(text, 2, n), 5) for n in (4, 30))
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_chance() -> None:
    class Chance(nn.Module):
        def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.zeros(*tokens.shape, 9), h, c

    text = torch.arange(1, 41) % 9
    perplexity, accuracy = lm.judge(Chance(), lm.batches(text, 1, 10), 4)
    assert perplexity == pytest.approx(9, rel=1e-6)
    assert accuracy == pytest.approx(float((text[1:] == 0).float().mean()))


def test_loss_is_the_logarithm_of_the_perplexity_but_for_rounding() -> None:
    model = lm.LanguageModel(7, 5)
    (batch,) = lm.batches(torch.randint(7, (61,)), 2, 30)
    loss = lm.Reader(5).loss(model, batch)
    assert loss.dtype == torch.float32
    perplexity, _ = lm.judge(model, [batch], 5)
    rounding = {"bfloat16": 2e-2, "float32": 1e-5}[lm.products("cpu")]
    assert float(loss.detach().exp()) == pytest.approx(perplexity, rel=rounding)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_given_spread_bounds_embedding_and_decoder() -> None:
    torch.manual_seed(0)
    model = lm.LanguageModel(50, 20, spread=0.1)
    for weight in (model.embedding.weight, model.decoder.weight):
        assert 0.09 < float(weight.detach().abs().max()) <= 0.1
    assert not model.decoder.bias.any()
    assert float(lm.LanguageModel(50, 20).embedding.weight.detach().std()) == pytest.approx(
        1, abs=0.1
    )


def test_rate_is_constant_then_falls_to_the_given_fraction() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=20)
    scheduler = lm.falling(0.05, 8, optimizer)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [20.0] * 5
    assert rates[6] == pytest.approx(20 * 0.05**0.5) and rates[8] == pytest.approx(1.0)
