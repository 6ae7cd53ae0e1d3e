"""The command line: what it prints, writes and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import networkx as nx
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxprune
from fxprune import cli
from fxprune.archives import save_archive
from fxprune.commands.listing import describe, describe_all
from fxprune.commands.verifying import verify
from fxprune.contract import Effect, Facts, Pass, PassResult
from fxprune.errors import ConfigError, LoweringError, VerificationError
from fxprune.policy import Policy
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from fxprune.training import Task

COMMANDS = ("inspect", "compile", "verify", "bench", "passes", "demo")

MODELS = """
import torch
from torch import nn
from fxprune.training import Task

def gru():
    return nn.GRU(3, 4), torch.zeros(5, 1, 3)

def trained():
    task = Task(lambda m, b: m(b)[0].sum(), [torch.zeros(5, 1, 3)], lambda m: 0.0, goal="min")
    return nn.GRU(3, 4), torch.zeros(5, 1, 3), task

def broken():
    return 1 / 0

def alone():
    return nn.GRU(3, 4)

def swapped():
    return torch.zeros(5, 1, 3), nn.GRU(3, 4)

number = 3
"""


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str


Fxprune = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Fxprune:
    """Runs a command in this process."""

    def run(*words: str | Path) -> Result:
        code = cli.main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder that builds models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    (tmp_path / "some_models.py").write_text(MODELS)
    return "some_models"


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(nn.Linear(3, 2, bias=False), torch.randn(2, 3))


@pytest.fixture
def archive(tmp_path: Path, program: Program) -> Path:
    path = tmp_path / "m.pt2"
    save_archive(program, path)
    return path


def write_onnx(path: Path, weight: Any, inputs: Sequence[str] = ("input",)) -> Path:
    """A file that multiplies its first input with a matrix."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", [inputs[0], "w"], ["output_0"])],
        "product",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in inputs],
        [helper.make_tensor_value_info("output_0", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.ascontiguousarray(weight, dtype=np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path


@pytest.fixture
def right(tmp_path: Path, program: Program) -> Path:
    return write_onnx(tmp_path / "right.onnx", program.tensors["weight"].detach().T)


# Help and errors -------------------------------------------------------------------------------


def test_help_waits_for_nothing_but_torch() -> None:
    code = (
        "import sys; from fxprune.cli import main; code = main(['--help']);"
        "print(code, [m for m in ('onnx', 'onnxruntime', 'onnxscript', 'networkx', 'matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert all(f"  {command}  " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_an_example(run: Fxprune, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert f"  fxprune {command}" in result.out.partition("Example")[2]


def test_version(run: Fxprune) -> None:
    assert run("--version") == Result(0, f"fxprune {fxprune.__version__}\n", "")


@pytest.mark.parametrize(
    "words", [("inspekt",), ("bench",), ("compile", "m.pt2"), ("bench", "a", "--threads", "x")]
)
def test_wrong_usage(run: Fxprune, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    assert "Usage: fxprune" in result.err


def test_an_error_is_one_line(run: Fxprune, tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "absent.pt2")
    assert result == Result(
        2,
        "",
        f"fxprune: error: there is no file {tmp_path}/absent.pt2; name a .pt2 archive, or a "
        "function that builds the model as package.module:function.\n",
    )


@pytest.mark.parametrize("first", [True, False])
def test_traceback_goes_anywhere(run: Fxprune, tmp_path: Path, first: bool) -> None:
    words = ["inspect", str(tmp_path / "absent.pt2")]
    result = run(*(["--traceback", *words] if first else [*words, "--traceback"]))
    assert result.code == 2
    assert result.err.startswith("Traceback (most recent call last):")
    assert result.err.splitlines()[-1].startswith("fxprune: error: there is no file")


def test_our_own_failures_say_so(run: Fxprune, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a\n  b")

    monkeypatch.setattr("fxprune.commands.listing.describe_all", fail)
    assert run("passes") == Result(
        1,
        "",
        "fxprune: internal error: RuntimeError: a b. Please report it, with what --traceback "
        "shows.\n",
    )


def test_errors_of_archives(run: Fxprune, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("no archive")
    result = run("inspect", path)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("fxprune: error: ")
    assert "m.pt2" in result.err


# inspect ---------------------------------------------------------------------------------------


def test_inspect_an_archive(run: Fxprune, archive: Path, tmp_path: Path) -> None:
    graphml, picture = tmp_path / "g.graphml", tmp_path / "p.svg"
    result = run("inspect", archive, "--graphml", graphml, "--picture", picture)
    assert (result.code, result.err) == (0, "")
    assert "| weight " in result.out
    assert nx.read_graphml(graphml).number_of_edges() == 1
    assert picture.read_bytes().startswith(b"<?xml")


def test_inspect_a_function(run: Fxprune, models: str) -> None:
    result = run("inspect", f"{models}:gru")
    assert (result.code, result.err) == (0, "")
    assert "weight_hh_l0" in result.out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_models:gru", "there is no module 'absent_models' here or among"),
        ("some_models:absent", "the module 'some_models' has no function 'absent'."),
        ("some_models:number", "the module 'some_models' has no function 'number'."),
        ("some_models:broken", "some_models:broken fails: ZeroDivisionError: division by zero."),
        ("some_models:alone", "fxprune.Task; it returns 1 value(s)."),
        ("some_models:swapped", "fxprune.Task; its first value is Tensor."),
    ],
)
def test_functions_that_build_no_model(run: Fxprune, models: str, name: str, message: str) -> None:
    result = run("inspect", name)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err


# compile ---------------------------------------------------------------------------------------


class Compact:
    """Stands for the result of a compilation."""

    class Report:
        """Stands for its report."""

        def __str__(self) -> str:
            return "the report"

        def to_json(self) -> str:
            """A number."""
            return "1"

    report = Report()

    def save(self, path: Path) -> None:
        """Writes seven bytes."""
        path.write_bytes(b"archive")

    def save_onnx(self, path: Path, *, opset: int | None) -> str:
        """Writes the opset."""
        path.write_text(str(opset))
        return "written"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The calls of ``fxprune.compile``, which does nothing."""
    calls: list[SimpleNamespace] = []

    def compile_(model: object, policy: object, **options: object) -> Compact:
        calls.append(SimpleNamespace(model=model, policy=policy, **options))
        return Compact()

    monkeypatch.setattr(fxprune, "compile", compile_)
    return calls


def test_compile_an_archive(
    run: Fxprune, archive: Path, tmp_path: Path, compiled: list[SimpleNamespace]
) -> None:
    paths = [tmp_path / name for name in ("m.onnx", "small.pt2", "report.json")]
    policy = "states=shrink;magnitude{sparsity=0.5}"
    options = ("-o", paths[0], "--save", paths[1], "--report", paths[2], "--opset", "19")
    result = run("compile", archive, "--policy", policy, *options)
    assert result == Result(0, f"the report\n\nwritten\n\nsaved {paths[1]} (7 bytes)\n", "")
    assert [path.read_text() for path in paths] == ["19", "archive", "1\n"]
    (call,) = compiled
    assert isinstance(call.model, Program)
    assert isinstance(call.policy, Policy)
    assert str(call.policy) == policy
    assert (call.example_inputs, call.task) == (None, None)


def test_compile_a_function_with_a_task(
    run: Fxprune, models: str, tmp_path: Path, compiled: list[SimpleNamespace]
) -> None:
    (tmp_path / "policy.toml").write_text('[[pass]]\nname = "magnitude"\nsparsity = 0.25\n')
    result = run("compile", f"{models}:trained", "--policy", "policy.toml")
    assert result.code == 0
    assert "nothing was written: name an ONNX file with -o" in result.out
    (call,) = compiled
    assert isinstance(call.model, nn.GRU)
    assert isinstance(call.task, Task)
    assert torch.equal(call.example_inputs, torch.zeros(5, 1, 3))
    assert str(call.policy) == "magnitude{sparsity=0.25}"


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("magnitud{sparsity=0.5}", ("-o", "m.onnx"), "unknown pass 'magnitud'"),
        ("magnitude{sparsity=0.5}", ("-o", "absent/m.onnx"), "there is no folder"),
        ("magnitude{sparsity=0.5}", ("-o", "."), "it is a folder"),
        ("magnitude{sparsity=0.5}", ("-o", "m.onnx", "--opset", "99"), "opset=99 is out of range"),
        ("magnitude{sparsity=0.5}", ("--save", "m.pt2", "--opset", "20"), "none is named"),
    ],
)
def test_compile_refuses_before_any_work(
    run: Fxprune,
    models: str,
    compiled: list[SimpleNamespace],
    policy: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    result = run("compile", f"{models}:gru", "--policy", policy, *options)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert compiled == []
    assert models not in sys.modules


def test_compile_writes_nothing_where_onnx_cannot_be_written(
    run: Fxprune,
    archive: Path,
    tmp_path: Path,
    compiled: list[SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LoweringError("special_i0e has no ONNX counterpart")

    monkeypatch.setattr(Compact, "save_onnx", refuse)
    paths = [tmp_path / name for name in ("m.onnx", "small.pt2", "report.json")]
    options = ("-o", paths[0], "--save", paths[1], "--report", paths[2])
    result = run("compile", archive, "--policy", "magnitude{sparsity=0.5}", *options)
    assert (result.code, "special_i0e" in result.err) == (2, True)
    assert not any(path.exists() for path in paths)


def test_compile_then_verify(run: Fxprune, models: str, tmp_path: Path) -> None:
    names = ("m.onnx", "small.pt2", "report.json")
    policy = "magnitude{sparsity=0.5,structure=connection}"
    options = ("-o", names[0], "--save", names[1], "--report", names[2])
    result = run("compile", f"{models}:gru", "--policy", policy, *options)
    assert (result.code, result.err) == (0, "")
    report = json.loads((tmp_path / names[2]).read_text())
    assert report["policy"] == policy
    assert report["connections"] == {"before": 84, "after": 42}
    checked = run("verify", names[1], names[0])
    assert checked.code == 0
    assert "m.onnx computes what small.pt2 does." in checked.out


# verify ----------------------------------------------------------------------------------------


def test_verify(run: Fxprune, archive: Path, right: Path) -> None:
    result = run("verify", archive, right)
    assert (result.code, result.err) == (0, "")
    assert "| example " in result.out
    assert "| other values |" in result.out
    assert result.out.splitlines()[-1] == "right.onnx computes what m.pt2 does."


def test_verify_finds_a_small_difference(
    run: Fxprune, archive: Path, program: Program, tmp_path: Path
) -> None:
    weight = program.tensors["weight"].detach().T.clone()
    weight[0, 0] += 1e-3
    wrong = write_onnx(tmp_path / "wrong.onnx", weight)
    result = run("verify", archive, wrong)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "the ONNX file does not compute what the archive does: output_0 at example" in result.err
    with pytest.raises(VerificationError) as raised:
        verify(program, wrong)
    difference = float((program.example[0][0][:, 0] * 1e-3).abs().max())
    assert raised.value.max_abs == pytest.approx(difference, rel=1e-3)


def test_verify_in_double_precision(tmp_path: Path) -> None:
    double = trace(nn.Linear(3, 2, bias=False).double(), torch.randn(2, 3, dtype=torch.float64))
    path = write_onnx(tmp_path / "m.onnx", double.tensors["weight"].detach().T)
    found = verify(double, path)
    assert len(found) >= 3
    assert 0 < max(v.difference.max_abs for v in found.values()) < 1e-6


def test_verify_with_other_inputs(program: Program, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", np.ones((3, 2)), inputs=("a", "b"))
    with pytest.raises(ConfigError, match="the ONNX file takes a, b and the archive input; give"):
        verify(program, path)


def test_verify_without_a_file(run: Fxprune, archive: Path, tmp_path: Path) -> None:
    result = run("verify", archive, tmp_path / "absent.onnx")
    assert result.code == 2
    assert "there is no file" in result.err


# bench -----------------------------------------------------------------------------------------


def test_bench(run: Fxprune, right: Path) -> None:
    result = run("bench", right, right, "--size", "batch=4", "--runs", "3")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("| right.onnx |") == 2
    assert result.out.count("batch=4") == 2
    assert "1.00 times smaller than right.onnx." in result.out.splitlines()[-1]


def test_bench_one_file(run: Fxprune, right: Path) -> None:
    result = run("bench", right, "--runs", "3")
    assert result.code == 0
    assert result.out.count("right.onnx") == 1


@pytest.mark.parametrize("size", ["batch", "batch=", "=3", "batch=-1", "batch=1.5"])
def test_bench_with_a_wrong_size(run: Fxprune, right: Path, size: str) -> None:
    result = run("bench", right, "--size", size)
    assert result == Result(
        2, "", f"fxprune: error: --size '{size}' is not NAME=N; write it as in --size time=35.\n"
    )


# passes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SomePass(Pass):
    """Does nothing at all.

    More about it.

    Attributes:
        amount: how much,
            over two lines.
        mode: in which way.

    Raises:
        ConfigError: never.
    """

    effect = Effect.EXACT
    needs_task: ClassVar[bool] = True

    amount: float | tuple[float, ...]
    mode: Literal["fast", "slow"] = "fast"
    rounds: int | None = None

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Does nothing."""
        return PassResult(program, False)


def test_a_pass_describes_itself() -> None:
    assert describe(SomePass) == (
        "some-pass: Does nothing at all. Needs a task to train on.\n\n"
        "| option | kind                    | default  | meaning                   |\n"
        "|--------|-------------------------|----------|---------------------------|\n"
        "| amount | number, list of numbers | required | how much, over two lines. |\n"
        "| mode   | fast, slow              | fast     | in which way.             |\n"
        "| rounds | integer, none           | none     |                           |"
    )


def test_passes_lists_all_with_their_options(run: Fxprune) -> None:
    result = run("passes")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("magnitude: Removes what has the smallest magnitude, once.\n")
    assert "| sparsity  | number" in result.out


def test_passes_by_name(run: Fxprune) -> None:
    assert run("passes", "magnitude").out.startswith("magnitude: ")
    with pytest.raises(ConfigError, match=r"there is no pass 'some-pas'; there are some-pass\."):
        describe_all({"some-pass": SomePass}, ["some-pas"])
    assert run("passes", "magnitud").code == 2
