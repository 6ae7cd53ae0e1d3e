"""The stage-wise language model example: its parts, and a small run that is stopped and goes on."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples import stage_wise_lm as lm


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "tinyshakespeare").mkdir(parents=True)
    text = "to be, or not to be: that is the question.\n" * 60
    (folder / "tinyshakespeare/input.txt").write_text(text)
    (folder / "ptb").mkdir()
    for part, lines in (("train", "a b\nb c\n"), ("valid", "c\n"), ("test", "a\n")):
        (folder / f"ptb/ptb.{part}.txt").write_text(lines)
    return folder


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


def test_methods_have_the_same_budget() -> None:
    passes = {name: lm.policy(name, lm.Setting()) for name in lm.METHODS}
    budgets = {(p.population, p.generations, p.tolerance, p.recovery) for p in passes.values()}
    assert len(budgets) == 1
    stages = {name: 3 if p.order == "sequential" else 1 for name, p in passes.items()}
    assert {p.rounds * stages[name] for name, p in passes.items()} == {lm.Setting().rounds}


def test_missing_data_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        lm.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--data must name a folder that holds tinyshakespeare/input.txt" in " ".join(
        capsys.readouterr().err.split()
    )


def test_script_keeps_each_run_and_goes_on_behind_the_last(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lm, "QUICK", lm.Setting("characters", 6, 0, 80, 4, 10, 1, 1, 1, 4, 2, 0.5, 0.5)
    )
    out = tmp_path / "runs.jsonl"
    arguments = ["--data", str(data), "--quick", "--seeds", "3", "--out", str(out), "--methods"]
    assert lm.main([*arguments, "mp"]) == 0
    dense, mp = lm.read_results(out)
    assert (dense["method"], mp["method"]) == ("dense", "mp")
    assert mp["sparsity"] > 0 and mp["nonzeros"] < dense["nonzeros"]
    assert set(mp["by_class"]) == {"feedforward", "input", "recurrent"}
    assert mp["test_perplexity"] > 1 and 0 <= mp["test_accuracy"] <= 1
    with out.open("a") as file:
        file.write(json.dumps(mp)[:50])  # killed while writing
    assert lm.main([*arguments, "mp", "lmp"]) == 0
    assert [r["method"] for r in lm.read_results(out)] == ["dense", "mp", "lmp"]
    assert lm.read_results(out)[:2] == [dense, mp]
    assert "lmp" in capsys.readouterr().out
