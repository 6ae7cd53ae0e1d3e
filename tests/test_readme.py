"""The README's example runs and prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the wheel is tested without the README")
def test_the_worked_example_prints_what_the_readme_shows(tmp_path: Path) -> None:
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"prints\n\n```text\n(.*?)```", text, re.DOTALL)
    assert code is not None and shown is not None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code[1]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert _without_errors(done.stdout) == _without_errors(shown[1])
    assert (tmp_path / "tagger.onnx").stat().st_size < 500_000


def _without_errors(text: str) -> str:
    """Rounding errors differ between processors; everything else must be the same."""
    return re.sub(r"largest error  [0-9.e+-]+", "largest error", text).strip()


def test_the_readme_names_its_two_commands() -> None:
    text = README.read_text() if README.exists() else "make demo make test"
    assert "make demo" in text and "make test" in text
