"""Recognition of out-of-memory errors of TensorRT."""

OUT_OF_MEMORY_ADVICE = "close other programs, add swap, or build on a machine with more memory"
_SIGNS = ("bad_alloc", "out of memory", "OutOfMemory", "Cannot allocate memory")


def is_out_of_memory(text: str) -> bool:
    """Whether a message of the library reports that memory ran out."""
    return any(sign in text for sign in _SIGNS)
