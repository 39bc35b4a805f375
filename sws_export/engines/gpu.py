"""NVIDIA GPUs of this machine, queried from the driver."""

import ctypes
import sys


def load_driver() -> ctypes.CDLL:
    """The library of the CUDA driver API. Raises OSError if there is no driver."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def gpu_names() -> list[str]:
    """Name of each CUDA device, followed by the CUDA version of the driver; empty without a driver."""
    count = gpu_count()
    if not count:
        return []
    driver = load_driver()
    names, device, version = [], ctypes.c_int(0), ctypes.c_int(0)
    for index in range(count):
        text = ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(text, len(text), device)
        names.append(text.value.decode())
    driver.cuDriverGetVersion(ctypes.byref(version))
    return [*names, f"driver interface {version.value}"]


def gpu_count() -> int:
    """Number of CUDA devices that the driver reports; 0 without a driver.

    Calls the driver directly, so that neither torch nor TensorRT is imported.
    """
    try:
        driver = load_driver()
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
