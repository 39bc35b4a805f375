"""Whether this machine has an NVIDIA GPU with a working driver."""

import ctypes


def gpu_count() -> int:
    """Number of CUDA devices that the driver reports; 0 without a driver.

    It asks the driver itself, so that neither torch nor TensorRT is loaded for it.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
