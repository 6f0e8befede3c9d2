"""Which tokens of a text's sequences are predicted.

Sequences drawn from a text are independent: all tokens but the first are predicted. Sequences that slide over a text overlap,
and each token is predicted once, by the first sequence that contains it.

Dimensions: S sequences, T tokens.
"""

import numpy as np

from stages.contracts.arrow import Array

NO_TOKEN = -1
"""Padding of a token shard: fills a row where the text, or the document that has the row for itself, has ended."""


def scored(token_ids_ST: Array, first_sequence: int, stride: int | None) -> Array:
    """Whether each token is predicted, bool [S, T].

    first_sequence: index, within the text, of the first row. stride: tokens between the starts of neighbouring sequences; None
    if sequences are independent. A sliding sequence predicts its last `stride` tokens, and the text's first one all but the
    first token: the convention of transformers' page "Perplexity of fixed-length models", with the last tokens counted exactly.
    """
    num_sequences, num_tokens = token_ids_ST.shape
    positions_T = np.arange(num_tokens)
    firsts_S = np.ones(num_sequences, dtype=np.int64)
    if stride is not None:
        firsts_S[:] = max(1, num_tokens - stride)
        firsts_S[: max(0, 1 - first_sequence)] = 1
    is_scored_ST: Array = (positions_T >= firsts_S[:, None]) & (token_ids_ST != NO_TOKEN)
    return is_scored_ST
