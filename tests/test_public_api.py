"""Public names and their signatures are fixed; layers import only what lies below them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxprune
import fxprune.passes
from fxprune import errors
from fxprune.contract import Pass

PACKAGE = Path(fxprune.__file__).parent

SIGNATURES = {
    "trace": "(model, example_inputs, *, dynamic_shapes=None)",
    "load": "(path)",
    "inspect": "(model_or_program, example_inputs=None, *, dynamic_shapes=None)",
    "compile": (
        "(model_or_program, policy, *, example_inputs=None, dynamic_shapes=None, task=None, "
        "verify_inputs=None, progress=True)"
    ),
    "prepare": (
        "(model_or_program, policy, *, example_inputs=None, dynamic_shapes=None, task=None, "
        "steps=None)"
    ),
    "Compact.rebuild": "(self, model)",
    "Compact.save": "(self, path, *, portable=False)",
    "Compact.save_onnx": "(self, path, *, opset=None)",
    "Prepared.penalty": "(self)",
    "Prepared.step": "(self)",
    "Prepared.convert": "(self)",
    "Report.to_dict": "(self)",
    "Report.to_json": "(self, *, indent=2)",
}

MEMBERS = {
    "Compact": {"module", "masked", "report", "program", "rebuild", "save", "save_onnx"},
    "Prepared": {"module", "penalty", "step", "convert"},
    "View": {"groups", "blocks", "graph", "refusals"},
    "Report": {
        "parameters_before",
        "parameters_after",
        "macs_before",
        "macs_after",
        "sparsity",
        "by_class",
        "groups",
        "refusals",
        "kept",
        "max_abs_error",
        "to_dict",
        "to_json",
    },
}


def plain_signature(function: object) -> str:
    """Names, kinds and defaults, without types."""
    assert callable(function)
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


def test_names() -> None:
    assert fxprune.__all__ == [
        "Compact",
        "Policy",
        "Prepared",
        "Program",
        "Report",
        "Task",
        "View",
        "compile",
        "inspect",
        "load",
        "prepare",
        "trace",
    ]
    assert all(getattr(fxprune, name) is not None for name in fxprune.__all__)
    assert set(fxprune.__all__) <= set(dir(fxprune))
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        fxprune.prune  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    owner, _, method = name.rpartition(".")
    function = getattr(getattr(fxprune, owner) if owner else fxprune, method)
    assert plain_signature(function) == SIGNATURES[name]


@pytest.mark.parametrize("name", MEMBERS)
def test_members(name: str) -> None:
    cls = getattr(fxprune, name)
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    public = {n for n in (*dir(cls), *fields) if not n.startswith("_")}
    assert MEMBERS[name] <= public


def test_options_of_magnitude() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(fxprune.passes.Magnitude)}
    assert list(fields)[:4] == ["sparsity", "structure", "scope", "norm"]
    assert fields["sparsity"] is dataclasses.MISSING
    assert (fields["structure"], fields["scope"], fields["norm"]) == ("neuron", "group", 1)


def test_fields_of_a_task() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(fxprune.Task)}
    required = [name for name, default in fields.items() if default is dataclasses.MISSING]
    assert required[:3] == list(fields)[:3] == ["loss", "train", "validate"]
    assert {"goal", "optimizer", "epochs", "clip", "checkpoint", "seed"} <= set(fields)
    assert fields["seed"] == 0


@pytest.mark.parametrize("name", fxprune.passes.names())
def test_passes_are_frozen_dataclasses_of_their_name(name: str) -> None:
    cls = fxprune.passes.load(name)
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert getattr(fxprune.passes, cls.__name__) is cls


def test_every_error_is_one_of_ours_and_documented() -> None:
    classes = {n: e for n in errors.__all__ if isinstance(e := getattr(errors, n), type)}
    assert errors.__all__ == [*sorted(classes), "first_line"]
    for name, error in classes.items():
        assert issubclass(error, errors.FxpruneError)
        assert error.__doc__
        assert name in str(errors.__doc__)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.InputError, ValueError)


# Layers ----------------------------------------------------------------------------------------


def sources(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    """Module name below the package and syntax tree of every file."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Modules that are imported anywhere in the file, types included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


CORE = {name: imports(tree) for name, tree in sources(PACKAGE) if not name.startswith("passes")}
PASSES = {name: imports(tree) for name, tree in sources(PACKAGE / "passes") if name != "passes"}


def within(module: str, *packages: str) -> bool:
    """Whether a module is one of these packages or lies in one."""
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def test_only_compile_and_the_command_line_look_passes_up() -> None:
    readers = {name for name, found in CORE.items() if any(map(names_passes, found))}
    assert readers == {"cli", "commands.compiling", "compiler"}


def names_passes(module: str) -> bool:
    return within(module, "fxprune.passes")


def test_passes_do_not_know_each_other() -> None:
    methods = {place.partition(":")[0] for place in fxprune.passes.PASSES.values()}
    assert {f"fxprune.{name}" for name in PASSES if "._" not in name} == methods
    for name, found in PASSES.items():
        # A private module is a part of the method that it is named after.
        own = next(m for m in methods if f"fxprune.{name}".replace("._", ".").startswith(m))
        parts = own.replace("passes.", "passes._")
        others = [m for m in filter(names_passes, found) if not m.startswith((own, parts))]
        assert others == [], name


def test_passes_know_nothing_of_the_compiler() -> None:
    for name, found in PASSES.items():
        assert [m for m in found if within(m, *ABOVE_ALL, "fxprune.lowering")] == [], name


ABOVE_ALL = tuple(
    f"fxprune.{name}"
    for name in ("cli", "commands", "compiler", "demo", "drawing", "inspection", "pipeline")
)

ABOVE = {
    "search": ("analysis", "lowering", "masking", "program", "shrinking", "tracing", "training"),
    "tracing": ("analysis", "learning", "lowering", "masking", "search", "shrinking", "training"),
    "lowering": ("analysis", "learning", "masking", "program", "search", "shrinking", "training"),
    "analysis": ("learning", "lowering", "masking", "search", "shrinking", "training"),
    "masking": ("learning", "lowering", "search", "training"),
    "shrinking": ("learning", "lowering", "search", "training"),
    "training": ("learning", "lowering", "search", "shrinking"),
    "learning": ("lowering", "search"),
}


@pytest.mark.parametrize("layer", ABOVE)
def test_layers_import_only_what_lies_below(layer: str) -> None:
    own = {name: found for name, found in CORE.items() if within(name, layer)}
    above = (*ABOVE_ALL, *(f"fxprune.{name}" for name in ABOVE[layer]))
    assert own
    for name, found in own.items():
        assert [m for m in found if within(m, *above)] == [], name


def test_importing_fxprune_is_light() -> None:
    code = (
        "import sys, fxprune\n"
        "heavy = {'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'sklearn', 'typer'}\n"
        "assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
