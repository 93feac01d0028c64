"""Teacher forcing, timing, samples and the runner on a random 4-block model with a small real tokenizer."""

import csv
import json
from pathlib import Path

import pytest
import torch

from eetrain.data import PromptResponse, Text
from eetrain.data.tokenization import Example, TextEncoder
from eetrain.errors import ConfigError, DataError
from eetrain.evaluation import (
    Bootstrap,
    EvaluationSettings,
    Report,
    agreement,
    bleu,
    evaluate_policies,
    read_samples,
    rouge_l,
    teacher_forced,
    timed_generate,
)
from eetrain.evaluation.quality import rouge_l_sums
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.byte_level import byte_tokenizer
from eetrain.testing.tiny import tiny_model

ROWS = "question,answer\none,first a\ntwo,second\none,first b\nthree,third\n"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer(270, ["one two three first second third"] * 4), 270)


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return MultiExitModel(tiny_model("llama", vocab_size=270), ExitConfig(layers=[1, 2])).eval()


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return str(path)


QUESTION = PromptResponse("{question}:", "{answer}")


def test_teacher_forcing_equals_each_row_alone(model: MultiExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    examples = [
        Example(
            torch.randint(3, 270, (length,), generator=draw).tolist(), [False] * start + [True] * (length - start), ""
        )
        for length, start in ((9, 4), (3, 1), (12, 11))
    ]
    examples[0].scored[6] = False
    monkeypatch.setattr(agreement, "_CHUNK", 3)
    found = teacher_forced(model, examples, batch_size=2)
    assert [score.layer for score in found] == [1, 2, None]
    for score in found:
        agree = correct = tokens = 0
        nll = 0.0
        for example in examples:
            with torch.no_grad():
                output = model(torch.tensor([example.ids]))
                full, own = model.logits(output)[0], model.logits(output, score.layer)[0]
            for place in range(1, len(example.ids)):
                if example.scored[place]:
                    tokens += 1
                    agree += int(own[place - 1].argmax() == full[place - 1].argmax())
                    correct += int(own[place - 1].argmax() == example.ids[place])
                    nll -= float(own[place - 1].log_softmax(-1)[example.ids[place]])
        assert tokens == score.tokens == 7
        assert score.agreement == agree / tokens
        assert score.accuracy == correct / tokens
        assert score.nll == pytest.approx(nll / tokens, rel=1e-9)


def test_timing_parts_and_output(model: MultiExitModel) -> None:
    ids = torch.tensor([[1, 20, 30], [1, 21, 31]])
    mask = torch.ones_like(ids)
    output, timing = timed_generate(model, "always:2", ids, mask, max_new_tokens=4, do_sample=False)
    plain = model.generate(ids, attention_mask=mask, exit_policy="always:2", max_new_tokens=4, do_sample=False)
    assert torch.equal(output.sequences, plain)
    assert timing.prefill > 0
    assert timing.decode > 0
    _, one = timed_generate(model, "always:2", ids, mask, max_new_tokens=1, do_sample=False)
    assert 0 <= one.decode < one.prefill, "the streamer's end comes right after the only token"
    assert (timing + one).prefill == timing.prefill + one.prefill


def test_equal_prompts_become_one_sample_with_several_references(data: str, encoder: TextEncoder) -> None:
    samples = read_samples(data, QUESTION, encoder)
    assert [sample.references for sample in samples] == [("first a", "first b"), ("second",), ("third",)]
    [bos] = encoder.start_ids(None)
    prompt, answer = encoder.encode(["one:", "first a"])
    assert samples[0].prompt_ids == (bos, *prompt)
    first = samples[0].examples[0]
    assert first.ids == [bos, *prompt, *answer, *encoder.eos_ids]
    assert first.scored == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    assert len(read_samples(data, QUESTION, encoder, limit=2)) == 2
    short = read_samples(data, PromptResponse("{question}:", "{answer}", train_on_prompt=True), encoder, max_length=7)
    assert short[0].examples[0].ids == first.ids[:7]
    assert short[0].examples[0].scored == first.scored[:7], "the prompt is not scored, whatever training does"


def test_plain_text_is_continued(tmp_path: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "first second third"}\n{"text": "x"}\n')
    [sample] = read_samples(str(path), Text(), encoder, prompt_tokens=4, continuation=3)
    ids = encoder.start_ids(None) + encoder.encode(["first second third"])[0]
    assert list(sample.prompt_ids) == ids[:4]
    assert sample.references == ()
    assert sample.examples[0].ids == ids[:7]
    assert sample.examples[0].scored == [False] * 4 + [True] * 3
    with pytest.raises(DataError, match=r"has more than 99 tokens\. HINT: Lower --prompt_tokens\."):
        read_samples(str(path), Text(), encoder, prompt_tokens=99)


@pytest.mark.parametrize(
    ("template", "prompt_tokens", "message"),
    [
        (Text(), None, r"The template is plain text, which has no prompts\. HINT: Set --prompt"),
        (QUESTION, 3, r"prompt_tokens=3, but the template PromptResponse has prompts of its own"),
        (Text(), 0, r"prompt_tokens=0, must be at least 1"),
    ],
)
def test_refused_prompts(
    template: Text, prompt_tokens: int | None, message: str, data: str, encoder: TextEncoder
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_samples(data, template, encoder, prompt_tokens=prompt_tokens)


@pytest.fixture(scope="module")
def report(model: MultiExitModel, encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    path.write_text(ROWS)
    samples = read_samples(str(path), QUESTION, encoder)
    settings = EvaluationSettings(
        ("always:2", "threshold:0.01", "threshold:0.020,measure=max"),
        batch_size=2,
        max_new_tokens=6,
        repeats=2,
        likelihood=True,
    )
    return evaluate_policies(model, encoder, samples, settings)


def generated_alone(model: MultiExitModel, encoder: TextEncoder, policy: str) -> list[tuple[list[int], list[int], int]]:
    rows = []
    for question in ("one:", "two:", "three:"):
        ids = torch.tensor([encoder.start_ids(None) + encoder.encode([question])[0]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            exit_policy=policy,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
        )
        rows.append((out.sequences[0, ids.shape[1] :].tolist(), out.exit_trace[0].tolist(), out.block_calls))
    return rows


def test_never_is_the_first_policy_and_the_reference(report: Report) -> None:
    assert [row["policy"] for row in report.policies] == ["never", "always:2", "threshold:0.01", "threshold:0.02"]
    never = report.policies[0]
    assert (never["full_depth_agreement"], never["same_as_never"], never["speedup"]) == (1, 1, 1)
    assert (never["mean_depth"], never["blocks_per_token"], never["share_at_4"]) == (4, 4, 1)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_rows_equal_generation_one_prompt_at_a_time(
    place: int, report: Report, model: MultiExitModel, encoder: TextEncoder
) -> None:
    row = report.policies[place]
    alone = generated_alone(model, encoder, row["policy"])
    never = generated_alone(model, encoder, "never")
    depths = [depth for _, trace, _ in alone for depth in trace]
    assert row["tokens"] == len(depths)
    assert row["mean_depth"] == pytest.approx(sum(depths) / len(depths))
    assert row["blocks_per_token"] == pytest.approx(sum(calls for *_, calls in alone) / (len(depths) - 3))
    assert row["same_as_never"] == sum(own[0] == other[0] for own, other in zip(alone, never, strict=True)) / 3
    texts = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids, *_ in alone]
    assert [entry["texts"][row["policy"]] for entry in report.outputs] == texts


def test_agreement_of_a_policy_is_what_the_full_depth_would_choose(
    report: Report, model: MultiExitModel, encoder: TextEncoder
) -> None:
    hits, total = 0, 0
    for question, (ids, *_) in zip(
        ("one:", "two:", "three:"), generated_alone(model, encoder, "always:2"), strict=True
    ):
        prompt = encoder.start_ids(None) + encoder.encode([question])[0]
        with torch.no_grad():
            choices = model.logits(model(torch.tensor([prompt + ids])))[0].argmax(-1)[len(prompt) - 1 : -1].tolist()
        hits += sum(own == other for own, other in zip(ids, choices, strict=True))
        total += len(ids)
    assert report.policies[1]["full_depth_agreement"] == pytest.approx(hits / total)
    assert hits < total


def test_exit_rows_hold_agreement_on_greedy_output_and_likelihood_of_references(
    report: Report, model: MultiExitModel, encoder: TextEncoder, data: str
) -> None:
    assert [(row["exit"], row["depth"]) for row in report.exits] == [(1, 1), (2, 2), ("full", 4)]
    examples = [example for sample in read_samples(data, QUESTION, encoder) for example in sample.examples]
    for row, score in zip(report.exits, teacher_forced(model, examples), strict=True):
        assert row["reference_nll"] == pytest.approx(score.nll)
        assert row["reference_tokens"] == score.tokens
    assert report.exits[-1]["agreement"] == 1


def test_likelihood_of_first_references(report: Report, model: MultiExitModel, encoder: TextEncoder, data: str) -> None:
    samples = read_samples(data, QUESTION, encoder)
    scores = teacher_forced(model, [sample.examples[0] for sample in samples])
    for place, score in ((0, scores[2]), (1, scores[1])):
        row = report.policies[place]
        assert row["reference_nll"] == pytest.approx(score.nll)
        assert row["reference_tokens"] == score.tokens
    low = report.policies[0]["reference_nll"]
    assert report.policies[1]["reference_nll_delta"] == pytest.approx(scores[1].nll - low)
    assert report.policies[2]["reference_nll"] not in (pytest.approx(low), pytest.approx(scores[1].nll))


def test_entries_hold_what_qualities_are_made_of(report: Report, model: MultiExitModel, encoder: TextEncoder) -> None:
    for row in report.policies:
        name = row["policy"]
        alone = generated_alone(model, encoder, name)
        assert [entry["tokens"][name] for entry in report.outputs] == [len(ids) for ids, *_ in alone]
        assert [entry["depth_sums"][name] for entry in report.outputs] == [sum(trace) for _, trace, _ in alone]
        total = sum(entry["nll_sums"][name] for entry in report.outputs)
        assert row["reference_nll"] * sum(entry["reference_tokens"] for entry in report.outputs) == pytest.approx(total)
        texts = [entry["texts"][name] for entry in report.outputs]
        references = [entry["references"] for entry in report.outputs]
        assert row["rouge_l"] == rouge_l(texts, references)
        assert row["bleu"] == bleu(texts, references)


def test_intervals_and_differences_to_never(report: Report) -> None:
    never, cut = report.policies[:2]
    assert [never[f"rouge_l_{end}"] for end in ("delta", "delta_low", "delta_high")] == [0, 0, 0]
    found = {}
    bootstrap = Bootstrap(3)
    for row in (never, cut):
        texts = [entry["texts"][row["policy"]] for entry in report.outputs]
        found[row["policy"]] = bootstrap(rouge_l_sums(texts, [entry["references"] for entry in report.outputs]))
        assert (row["rouge_l_low"], row["rouge_l_high"]) == found[row["policy"]].interval
    difference = found["always:2"].minus(found["never"])
    assert (cut["rouge_l_delta_low"], cut["rouge_l_delta_high"]) == difference.interval
    assert cut["rouge_l_delta"] == difference.value


def test_speeds_are_medians_over_the_timed_passes(report: Report) -> None:
    for row in report.policies:
        first, second = report.timings[row["policy"]]
        assert row["decode_seconds"] == pytest.approx((first["decode"] + second["decode"]) / 2)
        assert row["prefill_seconds"] == pytest.approx((first["prefill"] + second["prefill"]) / 2)
        assert row["decode_tokens_per_second"] == pytest.approx((row["tokens"] - 3) / row["decode_seconds"])
        both = row["prefill_seconds"] + row["decode_seconds"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / both)


def test_files_hold_the_same_numbers(report: Report, tmp_path: Path) -> None:
    named = report.with_settings({"model": "m"})
    paths = named.write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "results.csv", "outputs.jsonl", "frontier.png"]
    stored = json.loads(paths[0].read_text())
    assert stored["policies"] == report.policies
    assert stored["settings"] == {
        "model": "m",
        "policies": ["never", "always:2", "threshold:0.01", "threshold:0.02"],
        "batch_size": 2,
        "max_new_tokens": 6,
        "repeats": 2,
        "likelihood": True,
    }
    assert stored["format"] == 2
    assert stored["intervals"]["resamples"] == 1000
    assert stored["environment"]["dtype"] == "float64"
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["bleu"]) for row in rows] == [row["bleu"] for row in report.policies]
    assert float(rows[1]["share_at_2"]) == 1
    assert float(rows[1]["share_at_4"]) == 0
    assert len(paths[2].read_text().splitlines()) == 3
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="The results cannot be written to"):
        report.write(blocked)


def test_without_repeats_there_is_no_time(model: MultiExitModel, encoder: TextEncoder, data: str) -> None:
    steps: list[tuple[str, int, int]] = []
    found = evaluate_policies(
        model,
        encoder,
        read_samples(data, QUESTION, encoder),
        EvaluationSettings(("never",), max_new_tokens=1, repeats=0),
        lambda *step: steps.append(step),
    )
    [row] = found.policies
    assert row["decode_seconds"] is None
    assert row["speedup"] is None
    assert (row["reference_nll"], row["reference_tokens"], row["reference_nll_delta"]) == (None, None, None)
    assert found.settings["likelihood"] is False
    assert row["blocks_per_token"] is None, "the only token of each text comes from the prompt's pass"
    assert steps[:3] == [("decoding", 1, 3), ("decoding", 2, 3), ("decoding", 3, 3)]


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"max_new_tokens": 0}, {"repeats": -1}])
def test_refused_settings(change: dict[str, int]) -> None:
    [(name, value)] = change.items()
    with pytest.raises(ConfigError, match=f"{name}={value}, must be at least {value + 1}"):
        EvaluationSettings((), **change)


def test_policies_are_checked_before_anything_runs(model: MultiExitModel, encoder: TextEncoder, data: str) -> None:
    samples = read_samples(data, QUESTION, encoder)
    with pytest.raises(ConfigError, match="the model has no exit after block 3"):
        evaluate_policies(model, encoder, samples, EvaluationSettings(("always:3",)), lambda *_: pytest.fail("ran"))
