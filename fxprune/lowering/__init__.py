"""Lowering: a compact program becomes a compact ONNX file that was run before it appears."""

from fxprune.lowering.comparison import OnnxCase
from fxprune.lowering.onnx_model import to_onnx
from fxprune.lowering.saving import OnnxReport, save_onnx

__all__ = ["OnnxCase", "OnnxReport", "save_onnx", "to_onnx"]
