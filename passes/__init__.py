"""The pruning methods, one per file; shipped and imported as ``fxprune.passes``."""

if __name__ != "fxprune.passes":  # pragma: no cover - reached only by a wrong import
    raise ImportError("import this package as 'fxprune.passes', not as 'passes'")
