"""Call the dense kernel and the read loop of `native/dense.c`, which are built when they are first needed."""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llm_barber.native.threads import openmp_functions

SOURCE = Path(__file__).parent / "native" / "dense.c"
ROWS = (1, 4, 16)  # rows of inputs that the dense kernel takes
READ, BFLOAT16, FLOAT32 = range(3)
KINDS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
STEP = {torch.bfloat16: 128, torch.float32: 64}  # the columns are a multiple of it


class _Dense(ctypes.Structure):
    """`dense_t` of `dense.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "inputs", "outputs")),
        *((name, ctypes.c_size_t) for name in ("rows", "columns")),
        *((name, ctypes.c_int) for name in ("tokens", "kind")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Build and load the library; None without gcc, or without AVX-512 with BF16."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "dense.so"
        try:
            subprocess.run(
                ["gcc", "-O3", "-shared", "-fPIC", "-o", str(built), str(SOURCE)], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        loaded = ctypes.CDLL(str(built))
    return loaded if loaded.dense_supported() else None


def can_multiply(weight: Tensor, rows: int) -> bool:
    """Test whether `product` takes this weight and number of rows of inputs."""
    step = STEP.get(weight.dtype)
    return library() is not None and rows in ROWS and step is not None and weight.shape[1] % step == 0


def product(weight: Tensor, inputs: Tensor, outputs: Tensor, threads: int) -> None:
    """Compute outputs = inputs · Wᵀ.

    Args:
        weight: (out, in), contiguous, as `can_multiply` takes it.
        inputs: (rows, in), contiguous, of the weight's dtype.
        outputs: (rows, out), float32, contiguous; it is written.
        threads: of PyTorch's.

    Raises:
        ValueError: arguments do not fit together.
    """
    rows = inputs.shape[0]
    if not can_multiply(weight, rows) or inputs.dtype != weight.dtype or outputs.dtype != torch.float32:
        raise ValueError("the dense kernel does not take this weight and these inputs")
    if inputs.shape[1] != weight.shape[1] or outputs.shape != (rows, weight.shape[0]):
        raise ValueError("arguments of the dense kernel do not fit together")
    _run(weight, inputs, outputs, KINDS[weight.dtype], threads)


def read(weight: Tensor, sums: Tensor, threads: int) -> None:
    """Read a weight and do nothing else.

    Args:
        weight: (out, in), contiguous; a row is a multiple of 256 bytes.
        sums: (out,), float32; it is written.
        threads: of PyTorch's.

    Raises:
        ValueError: arguments do not fit together.
    """
    if weight.shape[1] * weight.element_size() % 256 or sums.shape[0] != weight.shape[0]:
        raise ValueError("the read loop takes rows of a multiple of 256 bytes")
    _run(weight.view(torch.bfloat16), None, sums, READ, threads)


def _run(weight: Tensor, inputs: Tensor | None, outputs: Tensor, kind: int, threads: int) -> None:
    loaded = library()
    if loaded is None or not all(
        part.is_contiguous() for part in (weight, outputs, *([] if inputs is None else [inputs]))
    ):
        raise ValueError("the dense kernel needs gcc, AVX-512 with BF16, and contiguous arguments")
    dense = _Dense(
        weight.data_ptr(), None if inputs is None else inputs.data_ptr(), outputs.data_ptr(), *weight.shape,
        1 if inputs is None else inputs.shape[0], kind,
    )  # fmt: skip
    openmp = openmp_functions()
    loaded.dense_run(ctypes.byref(dense), threads, None if openmp is None else ctypes.byref(openmp))
