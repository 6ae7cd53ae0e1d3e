"""Timing ONNX files on inputs made from what the files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxprune.errors import ConfigError
from fxprune.latency import Comparison, Latency, compare, measure
from fxprune.latency_inputs import dynamic_sizes, make_inputs


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    **weights: np.ndarray,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path


def product(path: Path, width: int) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time", width])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return save(path, [node], [x], w=np.ones((width, width)))


def recurrent(path: Path) -> Path:
    """A table of 9 rows, read by tokens, and a GRU over it with lengths."""
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["time", "batch"]),
        helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, [1]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"]),
        helper.make_node("Cast", ["lengths"], ["short"], to=TensorProto.INT32),
        helper.make_node("GRU", ["x", "w", "r", "", "short"], ["y"], hidden_size=2),
    ]
    weights = {"table": (9, 3), "w": (1, 6, 3), "r": (1, 6, 2)}
    return save(path, nodes, inputs, **{n: np.ones(s) for n, s in weights.items()})


def test_measure(tmp_path: Path) -> None:
    path = product(tmp_path / "a.onnx", 8)
    latency = measure(path, sizes={"time": 3}, runs=30)
    assert latency.sizes == {"batch": 1, "time": 3}
    assert (latency.runs, latency.threads, latency.bytes) == (30, 1, path.stat().st_size)
    assert 0 < latency.p10 <= latency.median <= latency.p90
    assert "| a.onnx |" in str(latency)


def test_the_larger_product_is_slower(tmp_path: Path) -> None:
    large, small = product(tmp_path / "large.onnx", 512), product(tmp_path / "small.onnx", 8)
    comparison = compare(large, small, runs=20)
    assert comparison.speedup > 3
    assert comparison.first.runs == comparison.second.runs == 20


def test_comparison_in_words() -> None:
    def latency(name: str, median: float, size: int) -> Latency:
        return Latency(Path(name), median, median, median, 5, 1, {"batch": 1}, size)

    comparison = Comparison(latency("a.onnx", 3.0, 1000), latency("b.onnx", 1.5, 250))
    assert comparison.speedup == 2.0
    assert str(comparison) == (
        "| file   | bytes | median ms | p10 ms | p90 ms | runs | threads | sizes   |\n"
        "|--------|-------|-----------|--------|--------|------|---------|---------|\n"
        "| a.onnx | 1,000 |         3 |      3 |      3 |    5 |       1 | batch=1 |\n"
        "| b.onnx |   250 |       1.5 |    1.5 |    1.5 |    5 |       1 | batch=1 |\n\n"
        "b.onnx is 2.00 times faster and 4.00 times smaller than a.onnx."
    )
    back = str(Comparison(comparison.second, comparison.first)).splitlines()[-1]
    assert back == "a.onnx is 2.00 times slower and 4.00 times larger than b.onnx."


def test_integers_fit_their_use(tmp_path: Path) -> None:
    path = recurrent(tmp_path / "a.onnx")
    inputs = onnxruntime.InferenceSession(str(path)).get_inputs()
    sizes = dynamic_sizes(inputs, {"batch": 40, "time": 7})
    feed = make_inputs(path, inputs, sizes)
    assert feed["tokens"].shape == (7, 40)
    assert (feed["tokens"].min(), feed["tokens"].max()) == (0, 8)
    assert feed["lengths"].tolist() == [7] * 40
    assert feed["flag"].tolist() == [False]
    assert measure(path, runs=3).sizes == {"time": 35, "batch": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {"tme": 3}}, "no dimension is called 'tme': there are batch, time."),
        ({"sizes": {"time": 0}}, "time is 0; it must be an integer, at least 1."),
        ({"sizes": {"time": 1.5}}, "time is 1.5; it must be an integer, at least 1."),
        ({"sizes": 5}, "sizes is 5; give numbers by name, such as {'time': 35}."),
        ({"threads": 0}, "threads is 0; it must be an integer, at least 1."),
        ({"threads": "2"}, "threads is '2'; it must be an integer, at least 1."),
        ({"runs": 0}, "runs is 0; it must be an integer, at least 1."),
        ({"runs": 2.5}, "runs is 2.5; it must be an integer, at least 1."),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = product(tmp_path / "a.onnx", 2)
    with pytest.raises(ConfigError) as raised:
        measure(path, **options)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_files_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        measure(tmp_path / "missing.onnx")
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(ConfigError, match="onnxruntime cannot load"):
        measure(bad)
    x = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [n]) for n in ("a", "b")]
    path = save(tmp_path / "sum.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], x)
    with pytest.raises(ConfigError, match=r"does not run on made-up inputs at \{'a': 2, 'b': 3\}"):
        measure(path, sizes={"a": 2, "b": 3})
