"""What plain word counts reach on the same rows: the honest comparison for classification."""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from fedmoe_core.data.federated import FederatedData, load_corpus


def naive_bayes_accuracy(data: FederatedData) -> float:
    """Return the test accuracy of multinomial naive Bayes (sklearn, add-one smoothing) on word counts.

    It is trained centrally on exactly the labels that the federation sees in all: every private row of every client
    and the labelled public rows; it is tested on the global test split.

    Raises:
        ValueError: the data have no labels, or the file changed since ``data`` was loaded.
    """
    corpus = load_corpus(data.source)
    if corpus.labels_P is None:
        raise ValueError(f"{data.source} has no labels; naive Bayes is a yardstick for classification only")
    if corpus.sha256 != data.corpus_sha256:
        raise ValueError(f"{data.source} changed since it was loaded; load it again")
    train_P = np.concatenate([data.splits.labeled_P, *data.splits.private])
    test_P = data.splits.test_P
    words = CountVectorizer()
    counts = words.fit_transform([corpus.texts[row] for row in train_P])
    model = MultinomialNB().fit(counts, corpus.labels_P[train_P])
    guessed = model.predict(words.transform([corpus.texts[row] for row in test_P]))
    return float(np.mean(guessed == corpus.labels_P[test_P]))
