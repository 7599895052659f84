"""Read the tensors of the next decoder layer while the present one is computed."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from llm_barber.checkpoint.source import CheckpointSource

Tensors = dict[str, Tensor]


def read_ahead(source: CheckpointSource, groups: Sequence[list[str]]) -> Generator[Tensors, None, None]:
    """Read groups of tensors in turn, each a group ahead of its user; close the iterator to stop before the end.

    Args:
        source: the checkpoint.
        groups: names of the tensors that are read together.

    Yields:
        The tensors of a group by the checkpoint's names.

    Raises:
        ModelError: as `CheckpointSource.read`.
    """
    with ThreadPoolExecutor(1, "read ahead") as pool:
        coming = pool.submit(source.read, groups[0]) if groups else None
        for following in [*groups[1:], None]:
            if coming is None:
                return
            tensors = coming.result()
            coming = None if following is None else pool.submit(source.read, following)
            yield tensors
