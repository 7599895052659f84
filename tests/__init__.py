"""Without a GPU, Triton's kernels are tested in its interpreter: it is chosen before Triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
