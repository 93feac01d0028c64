from collections import Counter
from itertools import product
from math import exp, log

import pytest

from eetrain.evaluation import bleu, exact_match, summarise_depths

TEXTS = ["the cat sat on the mat today", "a dog barks very loud at night"]
REFERENCES = [
    ["the cat sat on a mat today", "today the cat sat on the mat", "cat"],
    ["a dog barks very loud at the moon"],
]


def grams(words: list[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def bleu_by_definition(texts: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002: clipped precisions up to 4-grams, brevity against the closest reference length."""
    logs, length, closest = 0.0, 0, 0
    for size in range(1, 5):
        hits = total = 0
        for text, row in zip(texts, references, strict=True):
            own = grams(text.split(), size)
            most: Counter[tuple[str, ...]] = Counter()
            for reference in row:
                most |= grams(reference.split(), size)
            hits += sum(min(count, most[gram]) for gram, count in own.items())
            total += sum(own.values())
        logs += log(hits / total) / 4
    for text, row in zip(texts, references, strict=True):
        words = len(text.split())
        length += words
        closest += min((abs(len(other.split()) - words), len(other.split())) for other in row)[1]
    return 100 * min(1.0, exp(1 - closest / length)) * exp(logs)


def test_bleu_with_unequal_numbers_of_references() -> None:
    assert bleu(TEXTS, REFERENCES) == pytest.approx(bleu_by_definition(TEXTS, REFERENCES))
    one_each = [row[:1] for row in REFERENCES]
    assert bleu(TEXTS, one_each) == pytest.approx(bleu_by_definition(TEXTS, one_each))
    assert bleu(TEXTS, one_each) < bleu(TEXTS, REFERENCES)


def test_exact_match_with_any_reference() -> None:
    assert exact_match([" cat\n", "a dog", "x"], [["the cat", "cat"], ["dog"], ["X", "x"]]) == 2 / 3


def test_a_prompt_without_reference_is_refused() -> None:
    with pytest.raises(AssertionError, match="a text has no reference"):
        bleu(["a", "b"], [["a"], []])


def test_depth_summary_by_definition_on_all_small_traces() -> None:
    for length in range(1, 6):
        for trace in product(range(5), repeat=length):
            ran = [depth for depth in trace if depth]
            if not ran:
                continue
            summary = summarise_depths(trace)
            for share, found in ((10, summary.p10), (50, summary.p50), (90, summary.p90)):
                within = [d for d in range(1, 5) if 100 * sum(r <= d for r in ran) >= share * len(ran)]
                assert found == min(within), (trace, share)
            assert summary.mean == pytest.approx(sum(ran) / len(ran))
            assert summary.shares == {d: ran.count(d) / len(ran) for d in sorted(set(ran))}
            assert summary.tokens == len(ran)


def test_only_zeros_is_no_trace() -> None:
    with pytest.raises(AssertionError, match="no token ran"):
        summarise_depths([0, 0])
