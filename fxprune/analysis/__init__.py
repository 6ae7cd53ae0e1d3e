"""Neurons, the connections between them, and their classes."""

from fxprune.analysis.analyzer import analyze
from fxprune.analysis.neurons import Block, ConnectionClass, Group, Neurons, Reader

__all__ = ["Block", "ConnectionClass", "Group", "Neurons", "Reader", "analyze"]
