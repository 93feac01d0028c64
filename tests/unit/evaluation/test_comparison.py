"""Report folders put together: numbers, refusals, files."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from eetrain.errors import ConfigError, DataError
from eetrain.evaluation import Bootstrap, Report, bleu, compare_reports, exact_match, rouge_l
from eetrain.evaluation.bootstrap import mean
from eetrain.evaluation.comparison_files import write_comparison
from eetrain.evaluation.metrics import METRICS, quality_rows

REFERENCES = [
    ["the cat sat on the mat today", "today a cat sat on the mat"],
    ["a dog barks very loud at night"],
    ["it was a dark and stormy night"],
]
FULL = ["the cat sat on the mat today", "a dog barks very loud at the moon", "it was a dark and stormy night"]
CUT = ["the cat sat on a mat", "a dog barks at night", "it was a dark and stormy night"]
OTHER = ["today the cat sat on the mat", "a dog barks very loud at night", "it was dark and stormy"]
TOKENS = [4, 6, 5]
NLL = {"never": [4.0, 9.0, 5.0], "always:2": [8.0, 12.0, 11.0]}


def entries(texts: dict[str, list[str]], **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"prompt {place}",
            "references": REFERENCES[place],
            "texts": {policy: own[place] for policy, own in texts.items()},
            "tokens": dict.fromkeys(texts, 4),
            "depth_sums": {policy: 4 * depth for policy, depth in zip(texts, (4, 2, 3), strict=False)},
            "nll_sums": {policy: NLL[policy][place] for policy in texts},
            "reference_tokens": TOKENS[place],
            **changes,
        }
        for place in range(3)
    ]


def report(folder: Path, outputs: list[dict[str, Any]], speeds: dict[str, float] | None = None, blocks: int = 4) -> str:
    """Written as `eetrain evaluate` writes it."""
    policies = list(outputs[0]["texts"])
    qualities = quality_rows(outputs, policies, "never")
    rows = [
        {
            "policy": policy,
            **qualities[policy],
            "mean_depth": depth,
            "blocks_per_token": depth,
            "decode_tokens_per_second": speeds[policy] if speeds else None,
            "speedup": speeds[policy] / speeds["never"] if speeds else None,
        }
        for policy, depth in zip(policies, (4.0, 2.0, 3.0), strict=False)
    ]
    timings = {policy: [{"prefill": 1.0, "decode": 2.0}] if speeds else [] for policy in policies}
    Report({"max_new_tokens": 8}, {"cores": 2}, blocks, rows, [], timings, outputs).write(folder)
    return str(folder)


@pytest.fixture
def one(tmp_path: Path) -> str:
    return report(tmp_path / "one", entries({"never": FULL, "always:2": CUT}))


@pytest.fixture
def two(tmp_path: Path) -> str:
    return report(tmp_path / "two", entries({"never": OTHER}))


SCORES = {"bleu": bleu, "rouge_l": rouge_l, "exact_match": exact_match}


@pytest.mark.parametrize("metric", SCORES)
def test_qualities_and_differences_of_texts(metric: str, one: str, two: str) -> None:
    score = SCORES[metric]
    found = compare_reports([("a", one), ("b", two)], metric, "b:never")
    assert [(row["model"], row["policy"]) for row in found.rows] == [("a", "never"), ("a", "always:2"), ("b", "never")]
    base = score(OTHER, REFERENCES)
    for row, texts in zip(found.rows, (FULL, CUT, OTHER), strict=True):
        assert row["quality"] == pytest.approx(score(texts, REFERENCES))
        assert row["delta"] == pytest.approx(score(texts, REFERENCES) - base)
        assert row["delta_percent"] == pytest.approx(100 * (score(texts, REFERENCES) / base - 1))
        assert row["low"] <= row["quality"] <= row["high"]
    last = found.rows[-1]
    assert [last[key] for key in ("delta", "delta_low", "delta_high", "share_worse")] == [0, 0, 0, 0]


def test_intervals_are_paired_over_checkpoints(one: str, two: str) -> None:
    row = compare_reports([("a", one), ("b", two)], "exact_match").rows[-1]
    hits = [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]
    bootstrap = Bootstrap(3)
    difference = bootstrap(mean(hits[1])).minus(bootstrap(mean(hits[0])))
    assert (row["delta_low"], row["delta_high"]) == difference.interval
    assert row["share_worse"] == difference.share_worse() > 0.5


def test_nats_per_token_where_less_is_better(one: str) -> None:
    never, always = compare_reports([("a", one)], "nll").rows
    assert (never["quality"], always["quality"]) == (18 / 15, 31 / 15)
    assert always["delta"] == pytest.approx(13 / 15)
    assert always["share_worse"] == 1
    assert always["delta_percent"] == pytest.approx(100 * 13 / 18)


def test_the_evaluation_itself_has_the_same_numbers(one: str) -> None:
    stored = json.loads((Path(one) / "results.json").read_text())["policies"]
    for name, metric in METRICS.items():
        for row, own in zip(compare_reports([("a", one)], name).rows, stored, strict=True):
            for key, column in (("quality", ""), ("low", "_low"), ("high", "_high"), ("delta", "_delta")):
                assert row[key] == own[metric.column + column]
            assert (row["delta_low"], row["delta_high"]) == (
                own[f"{metric.column}_delta_low"],
                own[f"{metric.column}_delta_high"],
            )
    assert stored[1]["reference_tokens"] == 15


def test_prompts_that_something_was_tuned_on_are_left_out(one: str, two: str) -> None:
    found = compare_reports([("a", one), ("b", two)], "bleu", skip=1)
    assert found.prompts == 2
    for row, texts in zip(found.rows, (FULL, CUT, OTHER), strict=True):
        assert row["quality"] == pytest.approx(bleu(texts[1:], REFERENCES[1:]), abs=1e-9)
    for wrong in (-1, 3):
        with pytest.raises(ConfigError, match=f"^skip={wrong} of 3 prompts. HINT: Leave out fewer"):
            compare_reports([("a", one)], skip=wrong)


def test_mean_depth_is_that_of_the_prompts_compared(tmp_path: Path) -> None:
    outputs = entries({"never": FULL, "always:2": CUT})
    outputs[0]["depth_sums"]["always:2"], outputs[0]["tokens"]["always:2"] = 30, 10
    folder = report(tmp_path / "uneven", outputs)
    assert compare_reports([("a", folder)]).rows[1]["mean_depth"] == (30 + 8 + 8) / 18
    assert compare_reports([("a", folder)], skip=1).rows[1]["mean_depth"] == 2.0


def test_times_measured_apart_replace_the_first_ones(tmp_path: Path, two: str) -> None:
    texts = {"never": FULL, "always:2": CUT}
    own = report(tmp_path / "own", entries(texts), {"never": 1.0, "always:2": 3.0})
    fewer = entries(texts)[:2]
    apart = report(
        tmp_path / "apart", [entry | {"prompt": "another"} for entry in fewer], {"never": 10.0, "always:2": 15.0}
    )
    alone = compare_reports([("a", own)])
    assert [(row["decode_tokens_per_second"], row["speedup"]) for row in alone.rows] == [(1, 1), (3, 3)]
    both = compare_reports([("a", own), ("b", two), ("a", apart)])
    assert [row["decode_tokens_per_second"] for row in both.rows] == [10, 15, None]
    assert [row["speedup"] for row in both.rows] == [1, 1.5, None]
    assert [row["quality"] for row in both.rows[:2]] == [row["quality"] for row in alone.rows]
    only_never = report(tmp_path / "never", entries({"never": FULL}), {"never": 20.0})
    found = compare_reports([("a", own), ("a", only_never)])
    assert [row["decode_tokens_per_second"] for row in found.rows] == [20, None], "not from two measurements"
    with pytest.warns(UserWarning, match="b: times of always:2 in .* are left out, as .* does not hold the quality"):
        found = compare_reports([("b", two), ("b", apart)])
    assert [row["speedup"] for row in found.rows] == [1]


def test_second_report_without_times_is_refused(one: str, two: str) -> None:
    with pytest.raises(
        DataError, match=r"a: the second report, in '.*two', holds no times\. HINT: .*--repeats above 0"
    ):
        compare_reports([("a", one), ("a", two)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:2], r"a has 3 prompts, b has 2\. HINT: Evaluate all checkpoints with the same --data"),
        (
            lambda rows: [rows[0], rows[1] | {"prompt": "x"}, rows[2]],
            r"The prompt of prompt 2 differ: 'prompt 1' in a, 'x' in b",
        ),
        (
            lambda rows: [*rows[:2], rows[2] | {"references": ["long " * 50]}],
            r"The references of prompt 3 differ: \['it was a dark and stormy night'\] in a, \['long .*\.\.\. in b",
        ),
    ],
)
def test_other_prompts_are_refused(change: Any, message: str, one: str, tmp_path: Path) -> None:
    other = report(tmp_path / "other", change(entries({"never": OTHER})))
    with pytest.raises(DataError, match=message):
        compare_reports([("a", one), ("b", other)])


def test_other_lengths_of_output_are_refused(one: str, two: str) -> None:
    path = Path(two) / "results.json"
    path.write_text(path.read_text().replace('"max_new_tokens": 8', '"max_new_tokens": 9'))
    with pytest.raises(DataError, match="a has 8 new tokens at most, b has 9"):
        compare_reports([("a", one), ("b", two)])


def test_nats_of_other_tokenizers_are_refused(one: str, tmp_path: Path) -> None:
    other = report(tmp_path / "other", entries({"never": OTHER}, reference_tokens=7))
    assert compare_reports([("a", one), ("b", other)], "bleu").rows
    with pytest.raises(DataError, match="a and b do not cut the references into the same numbers of tokens"):
        compare_reports([("a", one), ("b", other)], "nll")


@pytest.mark.parametrize(
    ("changes", "metric", "message"),
    [
        ({"nll_sums": {}, "reference_tokens": None}, "nll", r"holds no nll\. HINT: .*--likelihood"),
        ({"references": []}, "bleu", r"holds no bleu\. HINT: .*--metric nll"),
    ],
)
def test_a_metric_that_was_not_measured(changes: dict[str, Any], metric: str, message: str, tmp_path: Path) -> None:
    bare = entries({"never": OTHER})
    folder = report(tmp_path / "bare", bare)
    (tmp_path / "bare" / "outputs.jsonl").write_text("".join(json.dumps(entry | changes) + "\n" for entry in bare))
    with pytest.raises(DataError, match=message):
        compare_reports([("a", folder)], metric)


def test_what_is_no_report_is_refused(one: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x: '.*' is no report: it has no results\.json and no outputs\.jsonl\. HINT"):
        compare_reports([("x", str(tmp_path))])
    results = Path(one) / "results.json"
    results.write_text('{"format": 1}')
    with pytest.raises(
        DataError, match=r"has format 1, this version reads 2\. HINT: Run `eetrain evaluate --out` again"
    ):
        compare_reports([("x", one)])
    results.write_text("[]")
    with pytest.raises(DataError, match="has format None"):
        compare_reports([("x", one)])
    results.write_text("{")
    with pytest.raises(DataError, match=r"x: the report in '.*' cannot be read: Expecting"):
        compare_reports([("x", one)])


def test_unknown_metric_and_baseline(one: str) -> None:
    with pytest.raises(
        ConfigError, match=r"metric='f1' is not known\. HINT: One of: bleu, rouge_l, exact_match, nll\."
    ):
        compare_reports([("a", one)], "f1")
    for wrong in ("b:never", "a:always:3", "b"):
        with pytest.raises(
            ConfigError, match=rf"baseline='{wrong}' is not there\. HINT: One of: a:never, a:always:2\."
        ):
            compare_reports([("a", one)], baseline=wrong)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, "a:never"), ("a", "a:never"), ("a:always:2", "a:always:2"), ("a:always:02", "a:always:2")],
)
def test_baselines(given: str | None, wanted: str, one: str) -> None:
    assert compare_reports([("a", one)], baseline=given).to_dict()["baseline"] == wanted


def test_a_quality_of_zero_has_no_percent(tmp_path: Path) -> None:
    folder = report(tmp_path / "zero", entries({"never": ["x"] * 3, "always:2": FULL}))
    row = compare_reports([("a", folder)], "exact_match").rows[1]
    assert (row["delta"], row["delta_percent"]) == (2 / 3, None)


def test_one_prompt_has_no_intervals(tmp_path: Path) -> None:
    folder = report(tmp_path / "single", entries({"never": FULL, "always:2": CUT})[:1])
    found = compare_reports([("a", folder)], "nll")
    assert found.to_dict()["intervals"] is None
    assert found.rows[1]["delta"] == 1
    for key in ("low", "high", "delta_low", "delta_high", "share_worse"):
        assert found.rows[1][key] is None
    assert (write_comparison(found, tmp_path / "out")[2]).stat().st_size > 5000


def test_files(one: str, two: str, tmp_path: Path) -> None:
    found = compare_reports([("a", one), ("b", two)], "nll")
    paths = write_comparison(found, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["comparison.json", "comparison.csv", "frontier.png"]
    stored = json.loads(paths[0].read_text())
    assert stored == found.to_dict()
    assert stored["lower_is_better"] is True
    assert stored["intervals"]["confidence"] == 0.95
    assert [(own["name"], own["num_blocks"], own["environment"]) for own in stored["reports"]] == [
        ("a", 4, {"cores": 2}),
        ("b", 4, {"cores": 2}),
    ]
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["quality"]) for row in rows] == [row["quality"] for row in found.rows]
    assert paths[2].stat().st_size > 5000
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="The comparison cannot be written to"):
        write_comparison(found, blocked)
