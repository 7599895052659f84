"""Products of rows and experts' weights: expert by expert, or many experts in one operation.

On a GPU the host takes longer to start an operation on a small expert than the GPU takes to compute it. There all
experts are computed by one operation: `torch.nn.functional.grouped_mm`, or `torch.bmm` of padded rows. Both need the
experts' weights stacked, which is a copy. On a CPU that copy costs more than starting operations, and experts are
computed one by one.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from llm_barber.model.routes import Bucket, Layout, Routes

# A GPU computes with an expert's weight of this many elements for longer than the host takes to start an operation:
# reading it takes 10 µs at 3 TB/s. Copying it into a stack would only cost time.
LARGE_WEIGHT = 2**24
GROUPED_ALIGNMENT = 16  # bytes that divide the strides of what `grouped_mm` takes
# Compute capabilities, without the minor number, whose kernel is taken. PyTorch's kernel for 10 is left out: it is not
# tested here. (Before torch 2.13 its gradient by the weight of an expert without tokens is not zero,
# pytorch/pytorch#172439.)
GROUPED_GPUS = (9,)


class Products(Enum):
    """Ways to compute experts' products."""

    LOOP = "one by one"
    PADDED = "padded to buckets, by bmm"
    GROUPED = "sorted, by grouped_mm"


def choose_products(inputs: Tensor, shapes: Iterable[tuple[int, int]]) -> Products:
    """Choose how to compute the products of inputs, (tokens, hidden), and experts' weights of these shapes."""
    sides = list(shapes)
    if inputs.device.type == "cpu" or any(rows * columns > LARGE_WEIGHT for rows, columns in sides):
        return Products.LOOP
    if _has_grouped_kernel(inputs) and all(
        side * inputs.element_size() % GROUPED_ALIGNMENT == 0 for shape in sides for side in shape
    ):
        return Products.GROUPED
    return Products.PADDED


def _has_grouped_kernel(inputs: Tensor) -> bool:
    """Test for a kernel of `grouped_mm` that is taken; without one PyTorch would loop over experts itself."""
    return (
        hasattr(nn.functional, "grouped_mm")  # torch 2.10 and later
        and inputs.device.type == "cuda"
        and inputs.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(inputs.device)[0] in GROUPED_GPUS
    )


def lay_out(routes: Routes, products: Products) -> Layout:
    """Lay out the rows of routes as products need them."""
    return routes.sorted() if products is Products.GROUPED else routes.padded(products is Products.PADDED)


def multiply(bucket: Bucket, inputs: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Outputs of a bucket's linears, (rows, out), one of each expert, on their rows, (rows, in)."""
    if len(linears) == 1:
        output: Tensor = linears[0](inputs)
        return output
    matrices: list[Tensor] = [linear.weight for linear in linears]
    weights = torch.stack(matrices).transpose(1, 2)
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if bucket.ends is None:
        rows = inputs.view(len(linears), -1, inputs.shape[1])
        if biases:
            return torch.baddbmm(torch.stack(biases).unsqueeze(1), rows, weights).flatten(0, 1)
        return torch.bmm(rows, weights).flatten(0, 1)
    output = nn.functional.grouped_mm(inputs, weights, offs=bucket.ends)
    if biases:
        sizes = bucket.ends.diff(prepend=bucket.ends.new_zeros(1))
        output = output + torch.stack(biases).repeat_interleave(sizes, 0, output_size=len(inputs))
    return output
