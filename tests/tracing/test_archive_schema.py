"""The JSON of an archive: hostile values do not reach an evaluator, and name their place."""

import contextlib
import json
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._export.serde import schema, serialize

from fxprune.tracing import archive_rules, archive_schema
from tests.tracing.archive_files import (
    Edit,
    edited,
    refuse,
    tagger_archive,
    touching,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger_archive(tmp_path_factory.mktemp("archive"))


@pytest.mark.parametrize("field", ["sizes", "strides", "storage_offset", "sym_int_values"])
def test_a_hostile_size_expression_is_not_evaluated(good: Path, tmp_path: Path, field: str) -> None:
    marker = tmp_path / "marker"
    size = {"as_expr": {"expr_str": touching(marker), "hint": {"as_int": 3}}}

    def edit(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        if field == "sym_int_values":
            name = next(iter(graph[field]))
            graph[field][name] = size
        elif field == "storage_offset":
            graph["tensor_values"]["x"][field] = size
        else:
            graph["tensor_values"]["x"][field][0] = size

    path = edited(good, tmp_path / "a.pt2", edit)
    error = refuse(path, "has no place in a size expression")
    assert error.member == "models/model.json"
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists() == (field != "storage_offset")  # torch's own loader evaluates it


def test_a_hostile_guard_is_not_evaluated(good: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = edited(
        good, tmp_path / "a.pt2", lambda program: program["guards_code"].append(touching(marker))
    )
    refuse(path, "guards_code.* has no place")
    assert not marker.exists()
    with contextlib.suppress(AssertionError):
        torch.export.load(path).module()(torch.randn(3, 5, 3), add=torch.randn(4))
    assert marker.exists()  # torch's own loader makes a function of it


def test_a_hostile_name_does_not_become_code(good: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    argument = {"as_tensor": {"name": f"z={touching(marker)}"}}

    def edit(program: dict[str, Any]) -> None:
        module = program["graph_module"]
        module["graph"]["inputs"].append(argument)
        values = module["graph"]["tensor_values"]
        values[argument["as_tensor"]["name"]] = values["add"]
        module["signature"]["input_specs"].append({"user_input": {"arg": argument}})

    path = edited(good, tmp_path / "a.pt2", edit)
    refuse(path, "is not a name")
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists()  # torch's own loader writes it into the code of the graph


def set_target(target: str) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][-1]["target"] = target

    return edit


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.mine.op.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten._sparse_coo_tensor_unsafe.default",
        "torch.ops.aten.absent.default",
        "torch.ops.aten.__class__.mro",
        "torch.ops.higher_order.cond",
        "torch.ops.load_library",
        "torch.load",
        "torch.hub.load",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "math.pow",
        "#triton:kernel",
        "os.system",
        "",
    ],
)
def test_operators_of_other_kinds(good: Path, tmp_path: Path, target: str) -> None:
    refuse(edited(good, tmp_path / "a.pt2", set_target(target)), "operator '")


def set_tree(tree: dict[str, Any]) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        call = program["graph_module"]["module_call_graph"][0]["signature"]
        call["out_spec"] = json.dumps([1, tree])

    return edit


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "collections.defaultdict", "context": "{}", "children_spec": []},
        {"type": "collections.namedtuple", "context": '"x"', "children_spec": []},
        {"type": "torch.Size", "context": "null", "children_spec": []},
        {"type": "mine.Custom", "context": "null", "children_spec": []},
        {
            "type": "builtins.dict",
            "context": '[{"__enum__": true, "fqn": "antigravity:x", "name": "y"}]',
            "children_spec": [{"type": None, "context": None, "children_spec": []}],
        },
        {"type": "builtins.dict", "context": '["a"]', "children_spec": []},
        {"type": "builtins.tuple", "context": None, "children_spec": []},
        {"type": None, "context": None},
        [],
    ],
)
def test_trees_of_other_kinds(good: Path, tmp_path: Path, tree: Any) -> None:
    refuse(edited(good, tmp_path / "a.pt2", set_tree(tree)), "out_spec")


def graph(program: dict[str, Any]) -> dict[str, Any]:
    return typing.cast(dict[str, Any], program["graph_module"]["graph"])


PROGRAM_EDITS: list[tuple[str, Edit]] = [
    ("as_operator", lambda p: graph(p)["nodes"][0]["inputs"].append(
        {"name": "f", "arg": {"as_operator": "torch.load"}, "kind": 1})),
    ("as_graph", lambda p: graph(p)["nodes"][0]["inputs"].append(
        {"name": "f", "arg": {"as_graph": {"name": "g", "graph": {}}}, "kind": 1})),
    ("custom_obj_values", lambda p: graph(p).update(
        custom_obj_values={"a": {"name": "a", "class_fqn": "b"}})),
    ("not one of the forms", lambda p: graph(p)["inputs"].append({"as_unknown": 1})),
    ("not one of the forms", lambda p: graph(p)["inputs"].append({})),
    ("nn_module_stack", lambda p: graph(p)["nodes"][0]["metadata"].update(
        nn_module_stack='a,b"),c')),
    ("quotes", lambda p: graph(p)["inputs"].append({"as_string": "' or f() or '"})),
    ("range_constraints", lambda p: p["range_constraints"].update(
        {"__import__('os')": {"min_val": 0, "max_val": 1}})),
    ("range_constraints", lambda p: p["range_constraints"].update(
        {"u99999999999": {"min_val": 0, "max_val": 1}})),
    ("should be int", lambda p: p["range_constraints"].update(
        {"s1": {"min_val": "0", "max_val": 1}})),
    ("should be int", lambda p: p["schema_version"].update(minor=2**70)),
    ("should be bool", lambda p: graph(p).update(is_single_tensor_return=1)),
    ("not a valid ScalarType", lambda p: graph(p)["tensor_values"]["x"].update(dtype=99)),
    ("not one of", lambda p: graph(p)["tensor_values"]["x"]["device"].update(type="disk")),
    ("verifiers", lambda p: p["verifiers"].append("MINE")),
    ("not a dotted name", lambda p: p["graph_module"]["module_call_graph"].append(
        {"fqn": 'a");f("', "signature": None})),
    ("not a dotted name", lambda p: p["graph_module"]["module_call_graph"].append(
        {"fqn": "a.__class__", "signature": None})),
    ("namedtuple_fields", lambda p: p["graph_module"].update(
        treespec_namedtuple_fields={"a": {"field_names": ["b"]}})),
    ("forward_arg_names", lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
        forward_arg_names=["x=f()", "add"])),
    ("in_spec", lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
        in_spec=p["graph_module"]["module_call_graph"][0]["signature"]["in_spec"].replace(
            "add", "add:f()"))),
    ("is missing", lambda p: p.pop("graph_module")),
    ("KeyError", lambda p: graph(p)["outputs"].append({"as_tensor": {"name": "absent"}})),
    ("the graph says", lambda p: graph(p)["tensor_values"]["p_head_bias"]["sizes"].append(
        {"as_int": 1})),
]  # fmt: skip


@pytest.mark.parametrize(
    ("match", "edit"), PROGRAM_EDITS, ids=[f"{i}-{m}" for i, (m, _) in enumerate(PROGRAM_EDITS)]
)
def test_other_parts_of_the_program(good: Path, tmp_path: Path, match: str, edit: Edit) -> None:
    error = refuse(edited(good, tmp_path / "a.pt2", edit), match)
    assert error.member == "models/model.json"


def test_the_accepted_arithmetic_is_what_torch_writes() -> None:
    names = {f"{function.__module__}.{function.__name__}" for function in serialize._SYM_OPS}
    assert names == archive_rules._ARITHMETIC


def test_every_string_of_the_schema_is_judged() -> None:
    """Each field of torch's schema that holds a string has a rule, or is refused on purpose."""
    found: set[str] = set()
    seen: set[Any] = set()

    def visit(kind: Any, place: str) -> None:
        if kind is str:
            found.add(place)
        elif is_dataclass(kind) and kind not in seen:
            seen.add(kind)
            hints = typing.get_type_hints(kind, globalns=vars(schema))
            for field in fields(kind):
                visit(hints[field.name], f"{kind.__name__}.{field.name}")  # type: ignore[union-attr]
        for inner in typing.get_args(kind):
            visit(inner, place)

    visit(schema.ExportedProgram, "")
    visit(schema.PayloadConfig, "")
    refused = {
        "Argument.as_operator",
        "Argument.as_string_to_argument",
        "CustomObjArgument.class_fqn",
        "CustomObjArgument.name",
        "Graph.custom_obj_values",
        "GraphArgument.name",
        "GraphModule.treespec_namedtuple_fields",
        "InputToCustomObjSpec.custom_obj_name",
        "NamedTupleDef.field_names",
        "TokenArgument.name",
    }
    filtered = {"GraphModule.metadata", "Node.metadata"}
    assert found == archive_schema._RULES.keys() | refused | filtered
    assert not refused & archive_schema._RULES.keys()
