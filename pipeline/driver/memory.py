"""Peak memory of this process since the last reset."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

_STATUS_FILE = Path("/proc/self/status")
_RESET_FILE = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


def reset_peaks() -> None:
    """Reset the peaks. Where the system does not permit a reset, the memory peak counts from the start of the process."""
    with contextlib.suppress(OSError):
        _RESET_FILE.write_text(_RESET_PEAK)
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Peak resident memory in bytes, including pages of mapped files."""
    with contextlib.suppress(OSError):
        for line in _STATUS_FILE.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_bytes() -> int:
    """Peak GPU memory that PyTorch tensors took, in bytes; 0 if no GPU was used."""
    cuda = _cuda()
    return 0 if cuda is None else int(cuda.max_memory_allocated())


def _cuda() -> Any:
    """`torch.cuda` if a stage has imported torch and used a GPU, else None. This module itself must not import torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
