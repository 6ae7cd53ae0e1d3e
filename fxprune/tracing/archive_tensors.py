"""Reads the tensors of a ``.pt2`` archive: raw bytes with a shape, and pickles of plain values.

A shape is checked against the bytes before a tensor is made of them, so that no view reaches beyond
what was stored. Pickles are read by ``weights_only=True`` alone, and what they give is rebuilt from
builtin containers, plain values and dense tensors.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import deserialize_device, deserialize_scalar_type

from fxprune.tracing.archive_rules import is_inert

__all__ = ["check_signature", "flat_tensor", "stored_members", "tensor_dict", "unpickle", "view"]

Tensors = dict[str, torch.Tensor]

_LARGEST_EXPANSION = 2**28
"""Elements that a tensor with a stride of 0 may have beyond what is stored."""


def stored_members(file: zipfile.ZipFile, size: int) -> list[str]:
    """Names of a zip file's members, all plain bytes that fit the file: nothing can inflate.

    Raises:
        ValueError: members are compressed, encrypted, of one name, or claim too many bytes.
    """
    names = file.namelist()
    if len(set(names)) != len(names):
        raise ValueError("the archive has two members of one name")
    for info in file.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"member {info.filename!r:.80} is compressed or encrypted")
    if sum(info.file_size for info in file.infolist()) > size:
        raise ValueError("the members claim more bytes than the file has")
    return names


def flat_tensor(data: bytes, meta: schema.TensorMeta) -> torch.Tensor:
    """All the bytes of a member as a one-dimensional tensor.

    Raises:
        ValueError: the bytes are not a whole number of elements.
    """
    dtype = deserialize_scalar_type(meta.dtype)
    if len(data) % dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are not a whole number of {dtype} values")
    device = deserialize_device(meta.device)
    if not data:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)


def view(stored: torch.Tensor, meta: schema.TensorMeta, *, parameter: bool) -> torch.Tensor:
    """A stored tensor in its shape; views of one member share memory.

    Raises:
        ValueError: the shape exceeds what is stored.
    """
    if meta.layout != schema.Layout.Strided:
        raise ValueError(f"layout {meta.layout.name} is not accepted, only dense tensors are")
    sizes = [_concrete(size) for size in meta.sizes]
    strides = [_concrete(stride) for stride in meta.strides]
    offset = _concrete(meta.storage_offset)
    if len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
        raise ValueError(f"sizes {sizes}, strides {strides} and offset {offset} do not fit")
    numel = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if (numel and last >= stored.numel()) or numel > stored.numel() + _LARGEST_EXPANSION:
        raise ValueError(
            f"sizes {sizes} with strides {strides} from {offset} exceed "
            f"the {stored.numel()} stored values"
        )
    tensor = stored.as_strided(sizes, strides, offset if numel else 0)
    if parameter:
        return torch.nn.Parameter(tensor, requires_grad=meta.requires_grad)
    return tensor.requires_grad_(meta.requires_grad)


def _concrete(size: schema.SymInt) -> int:
    if size.type != "as_int":
        raise ValueError("a stored tensor has a symbolic size")
    return size.as_int


def unpickle(data: bytes) -> Any:
    """Reads a file of ``torch.save``: builtin containers of tensors and plain values.

    Raises:
        ValueError: something else is in it.
        pickle.UnpicklingError: it would call a function to be read.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        stored_members(file, len(data))
    return _plain(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _plain(value: Any) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return _plain_tensor(value)
    if type(value) in (tuple, list):
        return type(value)(_plain(item) for item in value)
    if type(value) in (dict, OrderedDict):
        if not all(type(key) is int or (type(key) is str and is_inert(key)) for key in value):
            raise ValueError("a dictionary has keys that are neither integers nor plain texts")
        return type(value)((key, _plain(item)) for key, item in value.items())
    if value is None or type(value) in (bool, int, float, complex, torch.dtype, torch.device):
        return value
    if type(value) is str and is_inert(value):
        return value
    raise ValueError(f"a value of type {type(value).__name__} is not accepted")


def _plain_tensor(value: torch.Tensor) -> torch.Tensor:
    """The tensor without hooks and attributes."""
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        raise ValueError("a tensor is not dense")
    if value.numel() > value.untyped_storage().nbytes() + _LARGEST_EXPANSION:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} is larger than what it stores")
    tensor = value.detach()
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, requires_grad=value.requires_grad)
    return tensor.requires_grad_(value.requires_grad)


def tensor_dict(value: Any) -> Tensors:
    """Returns a dictionary of tensors by name, or raises ValueError."""
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        raise ValueError("this should hold tensors by name")
    return dict(value)


def check_signature(
    module: schema.GraphModule, weights: Mapping[str, Any], constants: Mapping[str, Any]
) -> None:
    """Checks that every parameter, buffer and constant is stored as the graph describes it.

    Raises:
        ValueError: one is missing, or of another shape or type.
    """
    for spec in module.signature.input_specs:
        if spec.type == "parameter":
            name, source = spec.parameter.parameter_name, weights
        elif spec.type == "buffer":
            name = spec.buffer.buffer_name
            source = weights if spec.buffer.persistent else constants
        elif spec.type == "tensor_constant":
            name, source = spec.tensor_constant.tensor_constant_name, constants
        else:
            continue
        if name not in source:
            raise ValueError(f"the values of {name!r} are missing")
        tensor, meta = source[name], module.graph.tensor_values[spec.value.arg.name]
        sizes, dtype = [size.value for size in meta.sizes], deserialize_scalar_type(meta.dtype)
        if sizes != list(tensor.shape) or dtype != tensor.dtype:
            raise ValueError(
                f"{name!r} is stored as {tuple(tensor.shape)} {tensor.dtype}, "
                f"the graph says {sizes} {dtype}"
            )
