"""Tests run on the CPU, with Triton's interpreter, also where there is a GPU; `pytest -m gpu` has those of a GPU.

The choice is made before PyTorch and Triton are first imported. Workers of pytest-xdist inherit it.
"""

import os
import sys

if "PYTEST_XDIST_WORKER" not in os.environ and not {"gpu", "-mgpu"} & set(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
