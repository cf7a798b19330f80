"""A reward as a plain Python function: how happy does a story sound?

Needs the extra `sentiment` (TextBlob, whose lexicon comes with the package; nothing is downloaded).
"""  # noqa: INP001 (a file to copy, not a package)

from collections.abc import Sequence

from textblob import TextBlob

SCALE = 5.0
"""Polarity is within [-1, 1]; a score of a few units is what the default KL coefficient expects."""


def happiness(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Polarity of each response's words, times SCALE; an empty response scores 0."""
    del queries  # the same opening for every response: it moves no comparison
    return [SCALE * TextBlob(response).sentiment.polarity for response in responses]
