"""Documents joined by EOS and cut into blocks of one size: no token is padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from suasion.core.errors import DataError


def pack(documents: Iterable[Sequence[int]], block: int) -> NDArray[np.int32]:
    """Concatenate token lists and cut them into blocks; the incomplete last block is dropped.

    Documents must already end with their EOS token. A block may hold the end of one document and
    the beginning of the next, as in StackLLaMA (huggingface/trl@v0.11.4,
    trl/trainer/utils.py ConstantLengthDataset).

    Args:
        documents: Token ids.
        block: Tokens per block.

    Returns:
        Blocks, shape [count, block].

    Raises:
        DataError: the documents together do not fill one block.
    """
    stream = np.fromiter((token for document in documents for token in document), np.int32)
    count = len(stream) // block
    if not count:
        raise DataError(
            f"{len(stream)} tokens do not fill one block of {block}",
            "give more text or a smaller block",
        )
    return stream[: count * block].reshape(count, block)
