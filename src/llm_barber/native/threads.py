"""PyTorch's OpenMP threads, on which C multiplies and unpacks."""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

VALUES_A_THREAD = 1 << 16  # fewest values, times tiles of inputs, that are worth a thread of their own

logger = logging.getLogger(__name__)


class _OpenMP(ctypes.Structure):
    """`openmp_t` of `packed.h`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("parallel", "thread_number", "thread_count"))


def threads_for(rows: int, values: int) -> int:
    """Number of threads that share the rows: few values are computed sooner than a second thread would begin."""
    return max(1, min(torch.get_num_threads(), rows, values // VALUES_A_THREAD))


def openmp_address() -> int | None:
    """Address of `openmp_functions`, for the length of a call of C; None where there are none."""
    functions = openmp_functions()
    return None if functions is None else ctypes.addressof(functions)


@cache
def openmp_functions() -> _OpenMP | None:
    """Functions of PyTorch's OpenMP library, found as PyTorch's own library finds them: a process may have others, too.

    None where there are none, such as on macOS: products then run on the caller's thread alone.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError) as error:
        logger.info("packed products run on one thread: PyTorch's OpenMP library was not found (%s)", error)
        return None
    return _OpenMP(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
