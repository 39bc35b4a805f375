"""Memory of a process."""

from pathlib import Path


def peak_memory(pid: int) -> int:
    """Largest resident memory so far of a running process in bytes; 0 once it has ended (Linux only)."""
    # Not getrusage: its figure for a child begins at the size of the parent that forked it.
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else 0
