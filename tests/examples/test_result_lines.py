"""Results kept as lines."""

from collections.abc import Sequence
from pathlib import Path

from examples.result_lines import Run, add_result, by_setting, markdown, read_results, spread


def test_a_line_cut_short_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_results(path) == []
    add_result(path, {"seed": 0})
    path.write_text(path.read_text() + '{"seed": 1, "err')
    assert read_results(path) == [{"seed": 0}]
    add_result(path, {"seed": 2})
    assert path.read_text() == '{"seed": 0}\n{"seed": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["runs.jsonl"]


def test_spread_is_the_sample_deviation() -> None:
    assert spread([0.25], ".1%") == "25.0%"
    assert spread([1.0, 3.0], "+.3f") == "+2.000 ± 1.414"


def test_table() -> None:
    assert markdown("a|b", [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_settings_have_tables_of_their_own() -> None:
    runs = [{"setting": {"width": 2, "text": "words"}, "seed": seed} for seed in (0, 1)]
    other = {"setting": {"width": 2, "text": "words", "rounds": 5}, "seed": 0}

    def count(runs: Sequence[Run]) -> str:
        return f"{len(runs)} runs"

    assert by_setting(runs, count) == "2 runs"
    assert by_setting([*runs, other], count) == "2 runs\n\nrounds 5:\n\n1 runs"
