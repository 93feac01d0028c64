from collections import Counter
from itertools import product
from math import exp, log

import pytest
import sacrebleu

from eetrain.evaluation import bleu, exact_match, rouge_l, summarise_depths
from eetrain.evaluation.quality import bleu_sums

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


def test_sums_over_prompts_give_corpus_bleu_exactly() -> None:
    texts = [*TEXTS, "", "cat", "It's 3.5 per-cent, they said; the cat ..."]
    references = [*REFERENCES, ["something"], ["dog", "cats"], ["It's 3.5 per-cent, said the cat.", "no"]]
    streams = [[row[place] if place < len(row) else None for row in references] for place in range(3)]
    assert bleu_sums(texts, references).value == sacrebleu.corpus_bleu(texts, streams).score
    assert bleu_sums(texts, references).value > 0
    alone = bleu_sums(texts[3:4], references[3:4]).value
    assert alone == sacrebleu.corpus_bleu(texts[3:4], [["dog"], ["cats"]]).score == 0


def longest_common(one: list[str], other: list[str]) -> int:
    """By trying all subsequences."""
    found = 0
    for chosen in product((False, True), repeat=len(one)):
        words = [word for word, keep in zip(one, chosen, strict=True) if keep]
        rest = iter(other)
        if all(word in rest for word in words):
            found = max(found, len(words))
    return found


def test_rouge_l_by_definition_with_the_best_reference() -> None:
    best = []
    for text, row in zip(TEXTS, REFERENCES, strict=True):
        scores = []
        for reference in row:
            own, other = text.split(), reference.split()
            common = longest_common(own, other)
            precision, recall = common / len(own), common / len(other)
            scores.append(2 * precision * recall / (precision + recall))
        best.append(max(scores))
    assert rouge_l(TEXTS, REFERENCES) == pytest.approx(100 * sum(best) / 2)
    assert rouge_l(TEXTS, [row[-1:] for row in REFERENCES]) < rouge_l(TEXTS, REFERENCES)


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("The CAT, sat!", "the cat sat", 100),
        ("running", "run", 0),
        ("caf\u00e9", "caf", 100),
        ("\u732b", "\u732b", 0),
        ("", "cat", 0),
    ],
)
def test_what_rouge_takes_for_words(text: str, reference: str, score: float) -> None:
    assert rouge_l([text], [[reference]]) == score


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
