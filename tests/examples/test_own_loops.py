"""The example of loops of one's own: each learns masks, and ends in a smaller model that works."""

from __future__ import annotations

import pytest

from examples import own_loops

PACKAGES = {"plain": "torch", "lightning": "lightning", "trainer": "transformers"}


@pytest.mark.filterwarnings("ignore")  # of the other packages
@pytest.mark.parametrize("loop", own_loops.LOOPS)
def test_each_loop_learns_masks(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PACKAGES[loop])
    monkeypatch.setattr(own_loops, "EPOCHS", 6)
    monkeypatch.setattr(own_loops, "EXAMPLES", 512)
    compact, accuracy = own_loops.run(loop, "sparse-connectivity{target=0.2}")
    assert 0.78 <= compact.report.sparsity <= 0.81
    assert accuracy > 0.6  # a guess is right once in four


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*args: object) -> None:
        raise ModuleNotFoundError("No module named 'lightning'")

    monkeypatch.setattr(own_loops, "LOOPS", {"lightning": missing})
    with pytest.raises(SystemExit, match="2"):
        own_loops.main(["--loop", "lightning"])
    assert "needs a package: No module named 'lightning'" in capsys.readouterr().err
