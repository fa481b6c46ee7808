"""How much memory a step takes at its peak."""

import gc
from pathlib import Path

from hfslim.pruning.surgery.reversible_slices import return_memory

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class Peak:
    """The peak of this process's memory from now on, where the system tells it (Linux).

    What earlier steps have freed goes back to the system first: used again, it would not count.
    """

    def __init__(self) -> None:
        self.known = RESET.exists()
        if self.known:
            gc.collect()
            return_memory()
            RESET.write_text("5", encoding="ascii")
            self.before = _read("VmRSS")

    def growth(self) -> int | None:
        """Bytes by which the peak exceeds what there was at first; None where it is not told."""
        return max(_read("VmHWM") - self.before, 0) if self.known else None

    def now(self) -> int | None:
        """Bytes by which there is more than at first; None where it is not told."""
        return _read("VmRSS") - self.before if self.known else None


def _read(name: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
