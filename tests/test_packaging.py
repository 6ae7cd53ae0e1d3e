"""What is shipped is what is on disk, under one name, with its types.

The file runs twice: in a checkout, and from a copy of ``tests/`` against the installed wheel,
where the tests of the source tree skip.
"""

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fxprune

ROOT = Path(__file__).resolve().parents[1]
IN_CHECKOUT = (ROOT / "fxprune").is_dir()
needs_checkout = pytest.mark.skipif(not IN_CHECKOUT, reason="tests the source tree")


def read_pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def list_packages() -> list[str]:
    packages: list[str] = read_pyproject()["tool"]["setuptools"]["packages"]
    return packages


def find_packages(folder: Path, name: str) -> set[str]:
    """Name every folder below ``folder`` that holds Python files, without following links."""
    return {
        ".".join([name, *Path(parent).relative_to(folder).parts])
        for parent, _, files in os.walk(folder)
        if any(file.endswith(".py") for file in files)
    }


def list_modules() -> list[str]:
    """Name every module without importing any, so that a broken one fails only its own test."""
    root = Path(fxprune.__file__).parent
    modules = set(list_packages())
    for package in list_packages():
        folder = root.joinpath(*package.split(".")[1:])
        modules |= {f"{package}.{found.name}" for found in pkgutil.iter_modules([str(folder)])}
    return sorted(name for name in modules if not name.endswith(".__main__"))


def test_fxprune_comes_from_the_checkout_or_the_wheel() -> None:
    package = Path(fxprune.__file__).resolve().parent
    if IN_CHECKOUT:
        assert package == ROOT / "fxprune"
    else:
        assert package.parent.name == "site-packages"


@needs_checkout
def test_listed_packages_are_the_packages_on_disk() -> None:
    on_disk = find_packages(ROOT / "fxprune", "fxprune")
    on_disk |= find_packages(ROOT / "passes", "fxprune.passes")
    assert on_disk == set(list_packages())


@needs_checkout
def test_passes_link_points_to_passes_folder() -> None:
    link = ROOT / "fxprune" / "passes"
    if not link.is_symlink():
        pytest.skip("this checkout was made without links")
    assert link.resolve() == ROOT / "passes"


@needs_checkout
def test_passes_is_refused_under_its_folder_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError: import this package as 'fxprune.passes', not as 'passes'" in done.stderr


@pytest.mark.skipif(IN_CHECKOUT, reason="tests the wheel")
def test_wheel_installs_no_other_top_level_name() -> None:
    assert importlib.util.find_spec("passes") is None


@pytest.mark.parametrize("package", list_packages())
def test_package_is_regular(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None, f"{package} has no __init__.py"
    assert Path(spec.origin).name == "__init__.py"


def test_types_are_shipped() -> None:
    assert (Path(fxprune.__file__).parent / "py.typed").is_file()


def test_version_is_the_project_version() -> None:
    assert fxprune.__version__ == read_pyproject()["project"]["version"]


@pytest.mark.parametrize("name", list_modules())
def test_all_lists_names_that_exist_once(name: str) -> None:
    module = importlib.import_module(name)
    names = list(getattr(module, "__all__", ()))  # ruff (RUF022) keeps them sorted
    assert len(names) == len(set(names))
    assert [missing for missing in names if not hasattr(module, missing)] == []
