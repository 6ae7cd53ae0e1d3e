"""The supported range of torch."""

from __future__ import annotations

import pytest
import torch

from fxprune.compat import check_torch


def _refused(version: str) -> bool:
    try:
        check_torch(version)
    except ImportError:
        return True
    return False


@pytest.mark.parametrize("version", ["2.13.0", "2.13.1+cu130", "2.13.0a0+git", torch.__version__])
def test_supported_releases_pass(version: str) -> None:
    assert not _refused(version)


@pytest.mark.parametrize("version", ["2.2.0", "2.9.1", "2.14.0", "3.0.0", "unknown"])
def test_other_releases_are_refused_with_the_remedy(version: str) -> None:
    with pytest.raises(ImportError, match=r"torch >=2\.13,<2\.14, and this is .*pip install"):
        check_torch(version)
