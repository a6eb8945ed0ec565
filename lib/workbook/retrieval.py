"""Retrievers through their libraries: a function that scores every document of a corpus for a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

Scores = Callable[[str], NDArray]  # query -> (documents,)


def bm25(texts: Sequence[str]) -> Scores:
    """BM25 in Lucene's form, k1 = 1.5, b = 0.75, English stop words left out; 0 for a query of unknown words."""
    import bm25s

    tokenize = partial(bm25s.tokenize, stopwords="en", return_ids=False, show_progress=False)
    index = bm25s.BM25()
    index.index(tokenize(list(texts)), show_progress=False)

    @cache
    def scores(query: str) -> NDArray:
        words = [word for word in tokenize([query])[0] if word in index.vocab_dict]
        found = index.get_scores(words) if words else np.zeros(len(texts))
        found.setflags(write=False)
        return found

    return scores


def tfidf(texts: Sequence[str]) -> Scores:
    """Cosine of TF-IDF vectors, English stop words left out."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(stop_words="english")
    table = vectors.fit_transform(texts)
    return lambda query: (table @ vectors.transform([query]).T).toarray()[:, 0]


RETRIEVERS = {"bm25": bm25, "tfidf": tfidf}
