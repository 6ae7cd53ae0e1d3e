"""The stage-wise language model example: its parts, and a small run that is stopped and goes on."""

import json
from pathlib import Path

import pytest

from examples import stage_wise_lm as lm
from examples.result_lines import read_results
from examples.stage_wise_table import table


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "tinyshakespeare").mkdir(parents=True)
    text = "to be, or not to be: that is the question.\n" * 60
    (folder / "tinyshakespeare/input.txt").write_text(text)
    return folder


def test_methods_have_the_same_budget() -> None:
    passes = {name: lm.policy(name, lm.Setting()) for name in lm.SEARCHES}
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
    quick = lm.Setting("characters", 6, 0, 80, 4, 10, 1, 1, 3, 4, 2, 0.5, 0.5)
    monkeypatch.setattr(lm, "QUICK", quick)
    out = tmp_path / "runs.jsonl"
    arguments = ["--data", str(data), "--quick", "--seeds", "3", "--out", str(out), "--methods"]
    assert lm.main([*arguments, "joint"]) == 0
    dense, joint, trained_on = read_results(out)
    assert [r["method"] for r in (dense, joint, trained_on)] == ["dense", "joint", "dense, on"]
    assert joint["sparsity"] > 0 and joint["nonzeros"] < dense["nonzeros"]
    assert set(joint["by_class"]) == {"feedforward", "input", "recurrent"}
    assert joint["test_perplexity"] > 1 and 0 <= joint["test_accuracy"] <= 1
    assert joint["spent"]["epochs"] <= 3
    searches, epochs = 3 * 4 * 2, 3 * 2  # an epoch is judged before and after
    assert joint["spent"]["evaluations"] <= 1 + searches + epochs

    # Killed while writing: what was finished stays, and the rest is done.
    with out.open("a") as file:
        file.write(json.dumps(joint)[:50])
    assert lm.main([*arguments, "joint", "gradual", "--gradual", "0.25"]) == 0
    *known, gradual, quarter = read_results(out)
    assert known == [dense, joint, trained_on]
    assert gradual["sparsity"] == pytest.approx(joint["sparsity"], abs=0.02)
    assert (quarter["method"], quarter["spent"]["epochs"]) == ("gradual 25.0%", 3)
    shown = capsys.readouterr().out

    picture = tmp_path / "picture.png"
    assert lm.main(["--table", str(out), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_searches_alone_are_not_trained_after(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = lm.Setting("characters", 6, 0, 80, 4, 10, 1, 1, 3, 4, 2, 0.5, 0.01)
    monkeypatch.setattr(lm, "QUICK", quick)
    out = tmp_path / "runs.jsonl"
    arguments = ["--data", str(data), "--quick", "--search-only", "--seeds", "3", "--out", str(out)]
    assert lm.main([*arguments, "--methods", "random"]) == 0
    random = next(r for r in read_results(out) if r["method"] == "random")
    assert random["spent"]["epochs"] == 0 and random["sparsity"] > 0
    for useless in (["--methods", "sequential"], ["--recovery", "0.2"]):
        with pytest.raises(SystemExit):
            lm.main([*arguments, *useless])


def test_options_change_what_runs_have_in_common(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    arguments = ["--data", str(data), "--quick", "--seeds", "3", "--out", str(out), "--methods"]
    given = ["--rounds", "2", "--retrain", "0", "--recovery", "0.25"]
    assert lm.main([*arguments, *given]) == 0
    assert {r["method"] for r in read_results(out)} == {"dense", "dense, on"}
    for run in read_results(out):
        setting = run["setting"]
        assert (setting["rounds"], setting["retrain"], setting["recovery"]) == (2, 0, 0.25)


def test_gradual_needs_a_sparsity_to_be_given(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lm.main(["--data", str(data), "--out", str(tmp_path / "x"), "--methods", "gradual"])
    assert "gradual needs joint" in capsys.readouterr().err


def test_table_compares_with_the_dense_model_of_the_same_seed() -> None:
    runs = [
        {
            "method": method,
            "seed": seed,
            "sparsity": 0.5,
            "by_class": {"input": 0.25},
            "nonzeros": 1000,
            "test_perplexity": perplexity,
            "test_accuracy": 0.5,
            "spent": {"epochs": 2.0, "evaluations": 7},
        }
        for method, seed, perplexity in (
            ("dense", 0, 2.0),
            ("mp", 0, 3.0),
            ("dense", 1, 4.0),
            ("mp", 1, 6.0),
        )
    ]
    assert table(runs).splitlines()[3] == (
        "| mp | 2 | 4.500 ± 2.121 | 1.500 ± 0.000 | 50.00% ± 0.00% | 50.00% ± 0.00% "
        "| 0.0% ± 0.0% | 25.0% ± 0.0% | 0.0% ± 0.0% | 1,000 ± 0 | 2.0 | 7 |"
    )
