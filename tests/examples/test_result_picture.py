"""Pictures of what pruning costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples import dynamic_mnist, sparse_connectivity
from examples.result_lines import add_result
from examples.result_picture import Curve, curves, draw_changes


def run(method: str, asked: float, accuracy: float, seed: int = 0, epochs: int = 4) -> Any:
    setting = {"model": "gru", "epochs": epochs, "every": 1}
    found = {"accuracy": accuracy, "removed": asked, "parameters": 1200}
    return {"setting": setting, "seed": seed, "method": method, "asked": asked, **found}


RUNS = [
    run("dense", 0.0, 98.0),
    run("learned", 0.9, 97.5),
    run("learned", 0.5, 98.25),
    run("dense", 0.0, 97.0, seed=1),
    run("learned", 0.9, 96.0, seed=1),
    run("learned", 0.5, 50.0, seed=2),  # there is no dense model to compare with
    run("dense", 0.0, 99.0, epochs=30),
    run("learned", 0.5, 98.0, epochs=30),  # one sparsity makes no curve
]


def test_curves_compare_with_dense_of_the_same_seed() -> None:
    found = curves(RUNS, lambda r: (r["method"], r["asked"]))
    assert found.keys() == {"gru, 4 epochs"}
    curve = found["gru, 4 epochs"]["learned"]
    assert found["gru, 4 epochs"].keys() == {"learned"}
    assert [left for left, _ in curve[0.9]] == pytest.approx([0.1, 0.1])
    assert [change for _, change in curve[0.9]] == [-0.5, -1.0]
    assert curve[0.5] == [(0.5, 0.25)]


def test_what_has_no_key_is_left_out() -> None:
    found = curves(RUNS, lambda r: None if r["asked"] == 0.9 else (r["method"], r["asked"]))
    assert found == {}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    points: Curve = {0.5: [(0.5, 0.1)], 0.9: [(0.1, -0.5), (0.1, -30.0)]}
    path = tmp_path / "picture.svg"
    draw_changes(path, {"one": {"a": points, "a, late": points}, "two": {"b": points}})
    text = path.read_text()
    assert all(f"<!-- {word} -->" in text for word in ("one", "two", "a", "a, late", "b", "50%"))


def test_scripts_draw_their_results(tmp_path: Path) -> None:
    out, picture = tmp_path / "runs.jsonl", tmp_path / "picture.png"
    for line in RUNS:
        add_result(out, line)
    assert sparse_connectivity.main(["--table", str(out), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_only_planned_sparsities_are_curves_of_dynamic_pruning(tmp_path: Path) -> None:
    out, picture = tmp_path / "runs.jsonl", tmp_path / "picture.svg"
    setting = {"model": "lstm", "every": 1, "dense": 1, "epochs": 2}
    cases: list[tuple[str, Any, bool]] = [
        ("dense", 0.0, True),
        ("filter", 0.3, True),
        ("filter", 0.5, False),
        ("filter", 0.7, False),
        ("connection+filter", [0.8, 0.3], True),
        ("row", 0.5, True),
    ]
    for structure, sparsity, regrow in cases:
        line = {"structure": structure, "sparsity": sparsity, "regrow": regrow, "accuracy": 9.0}
        sizes = {"removed": 0.5, "parameters": 1, "macs": 1, "regrown": {}}
        add_result(out, {"setting": setting, "seed": 0, **line, **sizes})
    assert dynamic_mnist.main(["--table", str(out), "--picture", str(picture)]) == 0
    text = picture.read_text()
    assert "<!-- filter, no regrowth -->" in text
    assert "<!-- connection+filter -->" in text
    assert "<!-- row -->" not in text
