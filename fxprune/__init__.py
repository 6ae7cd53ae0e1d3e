"""fxprune: a compiler that makes recurrent PyTorch models physically smaller, exactly."""

__version__ = "0.1.0"
