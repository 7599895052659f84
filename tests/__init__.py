"""Tests run on the CPU, with Triton's interpreter, also where there is a GPU; `pytest -m gpu` has those of a GPU.

The choice is made before PyTorch and Triton are first imported. Workers of pytest-xdist inherit it.
"""

import os
import re
import sys

arguments = " ".join([*sys.argv, os.environ.get("PYTEST_ADDOPTS", "")])
if "PYTEST_XDIST_WORKER" not in os.environ and not re.search(r"(^| )-m ?'?gpu", arguments):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
