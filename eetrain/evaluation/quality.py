"""How good generated texts are, against one or more references each."""

from __future__ import annotations

from collections.abc import Sequence

import sacrebleu


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, with sacrebleu's default settings (Post 2018, arXiv 1804.08771).

    Args:
        texts: one generated text a prompt.
        references: for each prompt one or more; their number may differ between prompts.
    """
    _check(texts, references)
    most = max(map(len, references))
    # sacrebleu wants one list a reference number, with None where a prompt has fewer.
    streams = [[row[place] if place < len(row) else None for row in references] for place in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), streams).score)


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts equal to one of their references, white space at both ends aside."""
    _check(texts, references)
    hits = [
        text.strip() in {reference.strip() for reference in row} for text, row in zip(texts, references, strict=True)
    ]
    return sum(hits) / len(hits)


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    assert texts, "no texts to score"
    assert len(texts) == len(references), f"{len(texts)} texts, {len(references)} rows of references"
    assert all(references), "a text has no reference"
