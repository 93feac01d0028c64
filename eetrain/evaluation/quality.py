"""How good generated texts are, against one or more references each.

Every quality is given as sums over prompts, so that :mod:`eetrain.evaluation.bootstrap` can resample it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from sacrebleu.metrics import BLEU

from eetrain.evaluation.bootstrap import Floats, Sums, mean

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_ORDERS = 4
"""Longest n-grams of BLEU."""


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, with sacrebleu's default settings (Post 2018, arXiv 1804.08771).

    Args:
        texts: one generated text a prompt.
        references: for each prompt one or more; their number may differ between prompts.
    """
    return bleu_sums(texts, references).value


def bleu_sums(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """Corpus BLEU as sums: matches and counts of n-grams, length of the texts and of the closest references."""
    _check(texts, references)
    # sacrebleu warns of single texts scored without it; the counts, which is all that is taken, are the same.
    scorer = BLEU(effective_order=True)
    scores = [scorer.sentence_score(text, list(row)) for text, row in zip(texts, references, strict=True)]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return Sums(np.array(rows, dtype=np.float64), _corpus_bleu)


def _corpus_bleu(sums_RK: Floats) -> Floats:
    return np.array([_one_bleu([int(number) for number in row]) for row in sums_RK.tolist()])


def _one_bleu(row: list[int]) -> float:
    matches, counts, (own_length, reference_length) = row[:_ORDERS], row[_ORDERS:-2], row[-2:]
    return float(BLEU.compute_bleu(matches, counts, own_length, reference_length, smooth_method="exp").score)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L, 0 to 100: the mean over texts of the best F1 with any reference (Lin 2004, ACL workshop W04-1013).

    F1 weighs precision and recall of the longest common subsequence of words equally. By the library ``rouge-score``
    without stemming: text is put into lower case, and words are runs of ``a-z`` and ``0-9``. All other characters
    only separate words, letters with accents and of other scripts included, so for other languages than English it
    says little, and a text without any such word scores 0.

    Args:
        texts: one generated text a prompt.
        references: for each prompt one or more.
    """
    return rouge_l_sums(texts, references).value


def rouge_l_sums(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """ROUGE-L as a mean over prompts."""
    _check(texts, references)
    pairs = zip(texts, references, strict=True)
    return mean([100.0 * _scorer().score_multi(list(row), text)["rougeL"].fmeasure for text, row in pairs])


@cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes half a second

    scorer: Any = RougeScorer(["rougeL"], use_stemmer=False)
    return scorer


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts equal to one of their references, white space at both ends aside."""
    return exact_match_sums(texts, references).value


def exact_match_sums(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """Exact match as a mean over prompts."""
    _check(texts, references)
    pairs = zip(texts, references, strict=True)
    return mean([float(text.strip() in {reference.strip() for reference in row}) for text, row in pairs])


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    assert texts, "no texts to score"
    assert len(texts) == len(references), f"{len(texts)} texts, {len(references)} rows of references"
    assert all(references), "a text has no reference"
