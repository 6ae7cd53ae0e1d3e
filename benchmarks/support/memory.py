"""The peak of this process's resident memory while something runs."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

__all__ = ["PeakMemory"]


class PeakMemory(threading.Thread):
    """Watches this process's resident memory from its start until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = _resident_bytes()
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Looks every millisecond."""
        while not self._done.wait(1e-3):
            self.peak_bytes = max(self.peak_bytes, _resident_bytes())

    def stop(self) -> int:
        """By how many bytes the memory rose above what it was at the start."""
        self._done.set()
        self.join()
        return self.peak_bytes - self.start_bytes


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
