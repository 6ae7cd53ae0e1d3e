"""The report reads well, holds everything, and survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fxprune.analysis.neurons import ConnectionClass
from fxprune.masking.counting import BlockCount, Count, Counts, GroupCount
from fxprune.program import Refusal
from fxprune.report import Report, Verification

EXPECTED = """\
policy         magnitude{sparsity=0.5,structure=neuron}
parameters     1,116 -> 778 (-30.3%)
MACs per call  12,000 -> 8,000 (-33.3%)
connections    92 -> 60 (-34.8%)
verified at    batch=1, time=5; batch=3, time=7
largest error  1.2e-07 (allowed: 1e-05 of scale)
note           time is fixed at 5

| group | neurons | left | removed | recurrent | kept because      |
|-------|---------|------|---------|-----------|-------------------|
| x     |       3 |    3 |    0.0% |           | the model's input |
| rnn   |       4 |    3 |   25.0% | yes       |                   |

| connections | before | left | removed |
|-------------|--------|------|---------|
| recurrent   |     48 |   27 |   43.8% |
| input       |     36 |   27 |   25.0% |
| feedforward |      8 |    6 |   25.0% |

| left as it was | reason                |
|----------------|-----------------------|
| softmax_1      | sums over its neurons |"""


@pytest.fixture
def report() -> Report:
    kinds = ConnectionClass
    connections = {
        kinds.RECURRENT: Count(48, 27),
        kinds.INPUT: Count(36, 27),
        kinds.FEEDFORWARD: Count(8, 6),
    }
    return Report(
        counts=Counts(
            groups=(
                GroupCount("x", Count(3, 3), False, True, "the model's input"),
                GroupCount("rnn", Count(4, 3), True, False, ""),
            ),
            blocks=tuple(BlockCount(f"w_{k.value}", k, n) for k, n in connections.items()),
            by_class=connections,
            parameters=Count(1116, 778),
        ),
        macs=Count(12000, 8000),
        kept={"rnn.bias": ((0, 2, 3),), "out.weight": ((0, 1), (0, 2, 3)), "scale": ()},
        verification=Verification(("batch=1, time=5", "batch=3, time=7"), 1.2e-7, 1e-5),
        refusals=(Refusal("softmax_1", "sums over its neurons"),),
        notes=("time is fixed at 5",),
        policy="magnitude{sparsity=0.5,structure=neuron}",
    )


def test_text_is_a_table_without_colour(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    assert str(report).splitlines() == EXPECTED.splitlines()


def test_chaos_is_told(report: Report) -> None:
    chaotic = replace(report, verification=replace(report.verification, chaotic=True))
    assert "note           the model is chaotic" in str(chaotic)


def test_many_groups_are_cut_off_in_the_text_only(report: Report) -> None:
    groups = tuple(GroupCount(f"g{i}", Count(2, 1), False, False, "") for i in range(1042))
    many = replace(report, counts=replace(report.counts, groups=groups))
    text = str(many)
    assert "| g39 " in text
    assert "| g40 " not in text
    assert "... and 1,002 more" in text
    assert len(many.to_dict()["groups"]) == 1042


def test_totals(report: Report) -> None:
    assert (report.parameters_before, report.parameters_after) == (1116, 778)
    assert (report.macs_before, report.macs_after) == (12000, 8000)
    assert report.sparsity == 1 - 60 / 92
    assert report.by_class[ConnectionClass.INPUT] == Count(36, 27)
    assert report.max_abs_error == 1.2e-7


def test_json_round_trips(report: Report) -> None:
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert Report.from_dict(values) == report
    assert values["kept"] == {
        "rnn.bias": [[0, 2, 3]],
        "out.weight": [[0, 1], [0, 2, 3]],
        "scale": [],
    }
    assert values["by_class"]["recurrent"] == {"before": 48, "after": 27}


def test_nothing_to_count() -> None:
    empty = Report(Counts((), (), {}, Count(0, 0)), Count(0, 0), {}, Verification((), 0.0, 1e-5))
    assert empty.sparsity == 0.0
    assert "connections    0 -> 0 (unchanged)" in str(empty)
