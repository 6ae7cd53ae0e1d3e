"""Tests; a package, so that helpers import as ``tests.zoo`` from everywhere."""
