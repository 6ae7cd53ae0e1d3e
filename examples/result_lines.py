"""Results of experiments as lines of JSON, a run each, and as tables in Markdown.

A run is written whole or not at all, so a script that was killed goes on behind the last line.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fxprune.files import write_whole

Run = Mapping[str, Any]


def read_results(path: Path) -> list[Run]:
    """Read the runs that were finished; a line cut short by a kill is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def add_result(path: Path, run: Run) -> None:
    """Add a run to the file, which holds either all of it or nothing."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    write_whole(path, f"{whole}{json.dumps(run)}\n".encode())


def results_parser(name: str, description: str | None, data_help: str) -> ArgumentParser:
    """Options that all scripts of results have: ``--data`` or ``--table``, and ``--out``.

    Args:
        name: the script's, which its results file has by default.
        description: its help, laid out already.
        data_help: what ``--data`` wants.
    """
    parser = ArgumentParser(
        formatter_class=RawDescriptionHelpFormatter,
        description=description,
        epilog=f"a first look: python -m examples.{name} --data data --quick",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help=data_help)
    source.add_argument("--table", type=Path, help="only show the results in this file")
    out_help = "results file [%(default)s]; checkpoints, if any, go to a folder beside it"
    parser.add_argument("--out", type=Path, default=Path(f"{name}.jsonl"), help=out_help)
    return parser


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the sample standard deviation where there are several; ``form`` formats both."""
    text = format(mean(values), form)
    if len(values) == 1:
        return text
    return f"{text} ± {format(stdev(values), form.removeprefix('+'))}"


def markdown(heads: str, rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table; ``heads`` are separated by bars, all columns but the first flush right."""
    names = heads.split("|")
    rule = ["---", *["---:"] * (len(names) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, rule, *rows))


def by_setting(runs: Sequence[Run], table: Callable[[Sequence[Run]], str]) -> str:
    """Lay out a table for each setting, under the values in which the settings differ."""
    settings: list[Mapping[str, Any]] = []
    for run in runs:
        if run["setting"] not in settings:
            settings.append(run["setting"])
    names = dict.fromkeys(name for setting in settings for name in setting)
    differing = [n for n in names if any(s.get(n) != settings[0].get(n) for s in settings)]
    parts = []
    for setting in settings:
        values = ", ".join(f"{name} {setting[name]}" for name in differing if name in setting)
        heading = f"{values}:\n\n" if values else ""
        parts.append(heading + table([r for r in runs if r["setting"] == setting]))
    return "\n\n".join(parts)
