"""Memory of a process, and the lack of it."""

from pathlib import Path

WHAT_TO_DO = "close other programs, add swap, or build on a machine with more memory"
_SIGNS = ("bad_alloc", "out of memory", "OutOfMemory", "Cannot allocate memory")


def tells_of_lack(text: str) -> bool:
    """Whether a message of the library means that memory ran out."""
    return any(sign in text for sign in _SIGNS)


def peak_memory(pid: int) -> int:
    """Largest resident memory so far of a running process in bytes; 0 once it has ended (Linux only)."""
    # Not getrusage: its figure for a child begins at the size of the parent that forked it.
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else 0
