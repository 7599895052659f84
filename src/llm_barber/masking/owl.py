"""OWL (arXiv 2310.05175): sparsities of the decoder layers from their shares of outliers.

A weight is an outlier if its Wanda score is far above its layer's mean. A layer with many outliers is pruned less. The
mean sparsity over all weights is the requested one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 5.0  # M: an outlier's score is above this multiple of the mean score
SPREAD = 0.08  # λ: the layers' sparsities differ by at most 2λ
LARGEST_SPARSITY = 0.99  # of a layer


def outlier_share(scores: Sequence[Tensor], multiple: float = MULTIPLE) -> float:
    """Share of a layer's weights that are outliers (OWL, equation 1).

    Args:
        scores: a tensor per linear, any shapes; see `saliency.wanda`.
        multiple: a score above this multiple of the layer's mean is an outlier.
    """
    count = sum(linear.numel() for linear in scores)
    mean = sum(linear.sum(dtype=torch.float64).item() for linear in scores) / count
    return sum(int((linear > multiple * mean).count_nonzero()) for linear in scores) / count


def layer_sparsities(
    shares: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = SPREAD
) -> list[float]:
    """Sparsity of each layer.

    Args:
        shares: each layer's share of outliers.
        sizes: each layer's number of prunable weights, which weights the mean of the sparsities.
        sparsity: the sparsity of all layers together.
        spread: λ; the layer with the most outliers is pruned 2λ less than the layer with the fewest.

    Raises:
        ValueError: a layer's sparsity would leave (0, 0.99].
    """
    low, high = min(shares), max(shares)
    width = high - low or 1.0
    relative = [2 * spread * (share - low) / width for share in shares]
    mean = sum(offset * size for offset, size in zip(relative, sizes, strict=True)) / sum(sizes)
    sparsities = [sparsity - offset + mean for offset in relative]
    low, high = min(sparsities), max(sparsities)
    if low <= 0 or high > LARGEST_SPARSITY:
        raise ValueError(f"sparsities of layers from {low:.3f} to {high:.3f} are not within 0 and {LARGEST_SPARSITY}")
    return sparsities
