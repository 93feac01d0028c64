import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch

from eetrain.decoding import EarlyExitOutput, Scheduled, Threshold, parse_policy
from eetrain.decoding.confidence import Evidence
from eetrain.errors import ConfigError, DataError
from eetrain.evaluation import Sample, Timing, timing
from eetrain.evaluation.bench import benchmark
from eetrain.evaluation.bench import profile as bench_profile
from eetrain.evaluation.bench.assistant import Drafting, assistant_baseline, assistant_names, drafting_of
from eetrain.evaluation.bench.benchmark import BenchSettings, run_benchmark
from eetrain.evaluation.bench.candidates import (
    Candidate,
    Run,
    cut_backbone,
    cut_baseline,
    dynamic_baseline,
    policy_candidate,
    run_once,
    static_baseline,
)
from eetrain.evaluation.bench.costs import exit_costs
from eetrain.evaluation.bench.profile import profile_policy
from eetrain.evaluation.bench.prompts import Workload, random_prompts, real_prompts
from eetrain.evaluation.bench.rows import Measured, Setting, bench_row
from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model

CPU = torch.device("cpu")
NO_STATIC = ("dynamic", "cut")


def small(family: str = "llama", layers: tuple[int, ...] = (1, 2), **changes: Any) -> MultiExitModel:
    gates = GateConfig(cost_weights=[1.0]) if layers else None
    return MultiExitModel(tiny_model(family, **changes), ExitConfig(list(layers), head="tied", gates=gates)).eval()


def prompts(rows: int = 2, length: int = 5) -> Workload:
    return random_prompts(61, rows, length, CPU)


def test_blocks_depths_and_order() -> None:
    # Everything wants to leave at exit 1 under threshold:-1, where 8 tokens may wait: of 11 steps the 9th goes on with
    # 9 tokens. Block 1 runs 11 times, blocks 2 to 4 nine times each.
    policies = ("never", "always:2", "threshold:-1", "threshold:2")
    steps: list[tuple[str, int, int]] = []
    settings = BenchSettings(policies, new_tokens=12, repeats=2, baselines=NO_STATIC)
    found = run_benchmark(small(), [prompts(3)], settings, lambda *step: steps.append(step))
    (setting,) = found.measured
    rows = {row["candidate"]: row for row in found.rows(setting)}
    names = ["dynamic", *policies, "cut:1", "cut:2"]
    assert list(rows) == names
    assert setting.order == names * 2
    assert steps == [("batch 3, prompt 5", done, 14) for done in range(1, 15)]
    blocks = {name: row["blocks_per_token"] for name, row in rows.items()}
    assert blocks == dict(zip(names, (4, 4, 2, (11 + 3 * 9) / 11, 4, 1, 2), strict=True))
    assert rows["threshold:-1"]["mean_depth"] == pytest.approx((10 * 1 + 4) / 11)
    assert {name: row["cut_to"] for name, row in rows.items()} == dict.fromkeys(names) | {
        "always:2": 2,
        "threshold:-1": 1,
    }
    assert rows["threshold:-1"]["predicted_speedup"] == pytest.approx(4 * 11 / 38)
    assert {name for name, row in rows.items() if row["same_tokens"]} == {"dynamic", "never", "threshold:2"}
    assert all(len(entry.timings) == 2 for entry in setting.measured)
    assert {entry.candidate.name for entry in setting.measured if entry.profile is not None} == set(policies)


def test_a_schedule_on_a_model_without_exits() -> None:
    policy = parse_policy("skipdecode:max=4,min=2,length=6")
    assert isinstance(policy, Scheduled)
    schedule = policy.spec.build(4)
    depths = [len(schedule.active(index)) for index in range(5)]
    assert len(set(depths)) > 1
    found = run_benchmark(small(layers=()), [prompts(2)], BenchSettings((str(policy),), 6, 1, ("cut",)))
    row = found.rows(found.measured[0])[0]
    assert row["mean_depth"] == row["blocks_per_token"] == sum(depths) / 5
    assert row["cut_to"] == int(sum(depths) / 5 + 0.5)


def test_baselines_are_those_asked_for() -> None:
    found = run_benchmark(small(), [prompts()], BenchSettings(("always:1",), 3, 1, baselines=()))
    assert found.measured[0].order == ["always:1"]
    (row,) = found.rows(found.measured[0])
    assert (row["over_dynamic"], row["over_static"], row["over_cut"]) == (None, None, None)
    assert not row["same_tokens"], "compared with the whole backbone although that is not timed"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "qwen2"])
def test_the_cut_backbone_is_always_with_tied_heads(family: str) -> None:
    model = small(family)
    blocks = model.causal_lm.config.num_hidden_layers
    for layer in (1, 2):
        ours = run_once(policy_candidate(model, parse_policy(f"always:{layer}")), prompts(), 6)
        candidate = cut_baseline(model, layer)
        theirs = run_once(candidate, prompts(), 6)
        assert torch.equal(ours.tokens[0], theirs.tokens[0])
        assert candidate.depth == layer
    cut = cut_backbone(model, 2)
    assert cut.config.num_hidden_layers == 2
    assert cut.get_input_embeddings() is model.causal_lm.get_input_embeddings(), "parameters are shared"
    assert model.causal_lm.config.num_hidden_layers == blocks == 4


def test_every_row_decodes_as_many_tokens_as_asked_for() -> None:
    model = small()
    model.causal_lm.generation_config.eos_token_id = list(range(60))
    for candidate in (dynamic_baseline(model), policy_candidate(model, parse_policy("never"))):
        run = run_once(candidate, prompts(), 7)
        assert run.tokens[0].tolist() == [[60] * 7] * 2
        assert len(run.depths) == (12 if candidate.kind == "policy" else 0), "without each row's first token"


def handmade(name: str, decode: list[float], **fields: Any) -> Measured:
    kind = name.partition(":")[0] if name.startswith(("dynamic", "static", "cut")) else "policy"
    run = Run([], Timing(), fields.get("seconds", 0.0), fields.get("depths", []), fields.get("calls"))
    candidate = Candidate(name, kind, lambda: None, fields.get("depth"))
    return Measured(candidate, run, [Timing(0.5, seconds) for seconds in decode], True, None)


def handmade_setting() -> Setting:
    entries = [
        handmade("dynamic", [4.0, 8.0, 6.0], depth=12),
        handmade("static", [2.0, 2.0, 3.0], depth=12, seconds=33.5),
        handmade("never", [4.0, 4.0, 12.0], depths=[12] * 30, calls=360),
        handmade("always:3", [1.0, 2.0, 6.0], depths=[3] * 15 + [4] * 15, calls=120),
        handmade("cut:4", [0.5, 2.0, 9.0], depth=4),
    ]
    two_batches = Workload(3, 8, ((torch.zeros(3, 8), torch.ones(3, 8)),) * 2)
    return Setting(two_batches, 6, [], {}, entries)


def test_a_row_from_its_numbers() -> None:
    setting = handmade_setting()  # two batches of three rows, five steps each
    row = bench_row(setting.measured[3], setting, 12)
    assert (row["mean_depth"], row["cut_to"]) == (3.5, 4)
    assert row["blocks_per_token"] == 120 / 30
    assert row["predicted_speedup"] == 3
    assert row["over_dynamic"] == median([4 / 1, 8 / 2, 6 / 6])
    assert row["over_static"] == median([2 / 1, 2 / 2, 3 / 6])
    assert row["over_cut"] == median([0.5 / 1, 2 / 2, 9 / 6])
    assert row["step_ms"] == 1000 * 2 / 10
    assert [row[f"step_ms_{name}"] for name in ("min", "q1", "q3", "max")] == [100, 150, 400, 600]
    assert row["prefill_ms"] == 1000 * 0.5 / 2
    assert row["tokens_per_second"] == 3 * 10 / 2
    assert row["compile_seconds"] is None
    static = bench_row(setting.measured[1], setting, 12)
    assert static["compile_seconds"] == 33.5 - 2.5
    assert static["over_static"] is None
    assert static["over_dynamic"] == 2


@dataclass(frozen=True)
class Counts:
    """As decoding counts drafts."""

    rounds: int
    row_rounds: int
    drafted: int
    judged: int
    accepted: int

    @property
    def acceptance(self) -> float:
        return self.accepted / self.judged if self.judged else float("nan")

    @property
    def tokens_per_round(self) -> float:
        return 1 + self.accepted / self.row_rounds


def assistant(name: str, layer: int, whole: list[float]) -> Measured:
    run = Run([], Timing(), 0.0, [], None)
    candidate = Candidate(name, "assistant", lambda: None, 12, (layer,))
    return Measured(candidate, run, [Timing(seconds - 1, 1, ahead=2) for seconds in whole], True, None)


def test_a_speculative_row_beside_assistants() -> None:
    setting = handmade_setting()  # whole rounds of never: 4.5, 4.5, 12.5 seconds
    run = Run([], Timing(), 0.0, [3] * 20 + [12] * 10, 900, Counts(4, 9, 30, 24, 18))
    policy = Candidate("speculative:exit=3,draft=2", "policy", lambda: None, drafts_at=(3,))
    setting.measured.append(Measured(policy, run, [Timing(0.5, seconds) for seconds in (1, 2, 3)], True, None))
    setting.measured.append(assistant("assistant:3", 3, [6.0, 6.0, 9.0]))
    setting.measured.append(assistant("assistant:3,draft=2", 3, [3.0, 5.0, 4.0]))
    setting.measured.append(assistant("assistant:6", 6, [2.0, 2.0, 2.0]))
    rows = {entry.candidate.name: bench_row(entry, setting, 12) for entry in setting.measured}
    row = rows["speculative:exit=3,draft=2"]
    assert (row["acceptance"], row["tokens_per_round"], row["rounds"]) == (18 / 24, 3, 4)
    assert row["predicted_speedup"] is None, "rejected drafts count as blocks"
    assert row["blocks_per_token"] == 900 / 30
    assert (row["over_cut"], row["cut_to"]) == (None, None)
    assert row["assistant"] == "assistant:3,draft=2", "the faster schedule at its own exit"
    assert row["over_assistant"] == median([3 / 1.5, 5 / 2.5, 4 / 3.5])
    assert rows["never"]["assistant"] == "assistant:6"
    assert rows["never"]["over_assistant"] == median([2 / 4.5, 2 / 4.5, 2 / 12.5])
    beaten = rows["assistant:3"]
    assert beaten["over_dynamic"] == median([4.5 / 6, 8.5 / 6, 6.5 / 9])
    assert (beaten["mean_depth"], beaten["blocks_per_token"], beaten["acceptance"]) == (12, None, None)
    assert beaten["step_ms"] == 1000 * 1 / (10 - 2), "tokens that came with the first are no steps"
    assert (rows["assistant:6"]["assistant"], rows["assistant:6"]["over_assistant"]) == (None, None)


def test_an_acceptance_of_nothing_is_unknown() -> None:
    setting = handmade_setting()
    run = replace(setting.measured[2].first, speculation=Counts(1, 2, 0, 0, 0))
    row = bench_row(replace(setting.measured[2], first=run), setting, 12)
    assert (row["acceptance"], row["tokens_per_round"], row["rounds"]) == (None, 1, 1)


def test_all_tokens_in_the_first_round_leave_no_step() -> None:
    setting = handmade_setting()
    entry = assistant("assistant:3", 3, [2.0, 2.0, 2.0])
    setting.measured.append(replace(entry, timings=[Timing(2.0, 0.0, ahead=10)] * 3))
    row = bench_row(setting.measured[-1], setting, 12)
    assert (row["step_ms"], row["step_ms_q3"], row["tokens_per_second"]) == (None, None, None)
    assert row["over_dynamic"] == 6.5 / 2


class Speculates(Threshold):
    """Full depth under the name of a speculative policy."""

    exit: Any = (1,)
    draft: Any = (2,)

    def __str__(self) -> str:
        return "speculative:exit=1,draft=2"


@pytest.mark.parametrize(
    ("exits", "draft", "wanted"),
    [
        ((2,), (4,), Drafting((2,), (4,))),
        ((1, 3), (4,), Drafting((1, 3), (4, 4))),
        ((1, 3), (2, 5), Drafting((1, 3), (2, 5))),
        ("auto", (8,), Drafting((1, 3), (None, None))),
    ],
)
def test_what_a_speculative_policy_drafts_with(exits: Any, draft: Any, wanted: Drafting) -> None:
    policy = Speculates(2.0)
    object.__setattr__(policy, "exit", exits)
    object.__setattr__(policy, "draft", draft)
    assert drafting_of(policy, (1, 3, 4), 4) == wanted
    assert drafting_of(Threshold(2.0), (1, 3, 4), 4) is None


def test_names_of_assistants() -> None:
    drafts = [Drafting((3,), (4,)), Drafting((1,), (None,)), Drafting((3,), (2,)), Drafting((3,), (4,))]
    assert assistant_names(drafts) == {
        "assistant:1": (1, None),
        "assistant:3": (3, None),
        "assistant:3,draft=2": (3, 2),
        "assistant:3,draft=4": (3, 4),
    }


def settings_of(model: MultiExitModel) -> tuple[dict[str, Any], dict[str, Any]]:
    return model.causal_lm.config.to_dict(), model.causal_lm.generation_config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("draft", [None, 3])
def test_the_assistant_gives_the_full_depths_tokens_and_leaves_nothing(family: str, draft: int | None) -> None:
    model = small(family)
    # The schedule that transformers writes back to the generation config it was given.
    model.causal_lm.generation_config.num_assistant_tokens_schedule = "heuristic"
    model.causal_lm.generation_config.num_assistant_tokens = 1
    before = settings_of(model)
    candidate = assistant_baseline(model, 2, draft)
    run = run_once(candidate, prompts(1), 9)
    assert torch.equal(run.tokens[0], run_once(dynamic_baseline(model), prompts(1), 9).tokens[0])
    assert settings_of(model) == before
    own = candidate.drafts_at, candidate.kind, candidate.depth
    assert own == ((2,), "assistant", 4)


@pytest.mark.parametrize(("draft", "passes"), [(1, 6), (3, 3), (None, 1)])
def test_the_assistant_drafts_as_many_as_told(draft: int | None, passes: int) -> None:
    model = small()
    # The blocks after the exit add nothing, so that every draft is right.
    for block in model.causal_lm.model.layers[1:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    if draft is None:
        model.causal_lm.lm_head.weight.data.mul_(50.0)  # sure enough for transformers' own schedule to go on
    calls: list[int] = []
    model.causal_lm.model.layers[3].register_forward_hook(lambda module, args, out: calls.append(1))
    run = run_once(assistant_baseline(model, 1, draft), prompts(1), 12)
    assert run.tokens[0].shape == (1, 12)
    assert len(calls) == passes
    assert run.timing.ahead == (11 if draft is None else draft)


@pytest.mark.parametrize(
    ("make", "rows", "reason"),
    [
        (lambda: small(), 2, "transformers' assisted generation decodes one row at a time"),
        (lambda: small("gpt2"), 1, "list index out of range"),
        (
            lambda: MultiExitModel(tiny_model("llama"), ExitConfig([1, 2], head="norm")).eval(),
            1,
            "exit 1 has a head of its own, and transformers drafts with the final norm and matrix",
        ),
    ],
)
def test_where_there_is_no_assistant_the_reason_is_told(
    make: Callable[[], MultiExitModel], rows: int, reason: str
) -> None:
    model = make()
    before = settings_of(model)
    settings = BenchSettings(("never",), 4, 1, ("dynamic", "assistant"))
    (setting,) = run_benchmark(model, [prompts(rows)], settings).measured
    assert setting.order == ["dynamic", "never"]
    assert setting.unavailable.keys() == {"assistant:1", "assistant:2"}
    assert setting.unavailable["assistant:1"] == reason
    assert settings_of(model) == before


def test_without_exits_there_is_nothing_to_assist_with() -> None:
    settings = BenchSettings(("never",), 4, 1, ("assistant",))
    (setting,) = run_benchmark(small(layers=()), [prompts(1)], settings).measured
    assert setting.unavailable == {"assistant": "the model has no exits to draft at"}


def test_a_speculative_policy_meets_its_assistants(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Speculates(2.0)
    monkeypatch.setattr(benchmark, "parse_policy", lambda text: policy if text == str(policy) else parse_policy(text))
    settings = BenchSettings(("never", str(policy)), 6, 2, None)
    monkeypatch.setattr(benchmark, "static_baseline", lambda model: 1 / 0)
    found = run_benchmark(small(), [prompts(1)], settings)
    assert found.settings["baselines"] == ["dynamic", "static", "cut", "assistant"]
    (setting,) = found.measured
    assert setting.order[:5] == ["dynamic", "assistant:1", "assistant:1,draft=2", "never", str(policy)]
    assert setting.unavailable == {"static": "division by zero"}
    rows = {row["candidate"]: row for row in found.rows(setting)}
    assert rows[str(policy)]["assistant"] in ("assistant:1", "assistant:1,draft=2")
    assert rows["assistant:1,draft=2"]["same_tokens"]
    plain = run_benchmark(small(), [prompts(1)], BenchSettings(("never",), 3, 1, None))
    assert plain.settings["baselines"] == ["dynamic", "static", "cut"]


def test_counts_of_all_batches_are_summed() -> None:
    counts = iter([Counts(1, 2, 3, 4, 2), Counts(10, 20, 30, 40, 10)])

    def generate(ids: torch.Tensor, streamer: Any, **options: Any) -> EarlyExitOutput:
        assert options["min_new_tokens"] is None
        for value in (ids, ids[:, -1], ids[:, -1]):
            streamer.put(value)
        trace = torch.ones(2, 2, dtype=torch.long)
        output = EarlyExitOutput(sequences=torch.cat([ids, ids[:, :2]], 1), exit_trace=trace, block_calls=3)
        output.speculation = next(counts)
        return output

    batches = Workload(2, 5, prompts().batches * 2)
    run = run_once(Candidate("x", "policy", generate), batches, 2, to_the_end=False)
    assert run.speculation == Counts(11, 22, 33, 44, 12)
    assert run.speculation.acceptance == 12 / 44
    assert run.block_calls == 6


def test_costs_are_medians_of_ratios_to_the_full_depth() -> None:
    assert exit_costs(handmade_setting(), [3]) == {3: median([1 / 4, 2 / 4, 6 / 12])}


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second whenever somebody looks at it."""
    clock = map(float, itertools.count())
    for module in (timing, bench_profile):
        monkeypatch.setattr(module, "perf_counter", lambda: next(clock))


# Regions a step: a region looks twice at the clock and lasts one tick; the streamer looks once.
@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize(
    ("policy", "blocks", "heads"),
    [
        ("never", 4, 2),  # norm, matrix
        ("always:2", 2, 2),  # head, matrix
        ("threshold:2", 4, 6),  # head and policy at two exits, norm, matrix
        ("threshold:2,measure=saturation", 4, 6),
        ("gate:1", 4, 10),  # head, matrix, gate, policy at two exits, norm, matrix
        ("static:3", 3, 2),
    ],
)
def test_where_a_step_goes(policy: str, blocks: int, heads: int) -> None:
    model = small()
    step = profile_policy(model, parse_policy(policy), prompts(), new_tokens=5)
    assert (step.blocks, step.heads, step.harvest) == (1000 * blocks, 1000 * heads, 1000)
    assert step.total == 1000 * (2 * (blocks + heads + 1) + 1)
    assert step.rest == 1000 * (blocks + heads + 1 + 1)
    assert step.total == step.blocks + step.heads + step.harvest + step.rest
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


class TwoThenAll(Threshold):
    """At exit 1 two steps leave, the third goes through all blocks, and so on."""

    tested = 0

    def leave(self, evidence: Evidence) -> torch.Tensor:
        type(self).tested += evidence.exit == 1
        rows = torch.ones(len(evidence.state_RD), dtype=torch.bool)
        return rows & (evidence.exit == 1 and self.tested % 3 != 0)


@pytest.mark.usefixtures("ticks")
def test_blocks_left_by_an_exception_are_closed_regions() -> None:
    step = profile_policy(small(), TwoThenAll(0.5, repair="propagate"), prompts(), new_tokens=9)
    # 8 steps, 6 of them shallow. A deep one also stores the keys and values of two tokens in blocks 2, 3 and 4, each
    # of which stops by an exception, and harvests for that before blocks 2 and 3.
    assert step.blocks * 8 / 1000 == 6 * 1 + 2 * (4 + 3)
    assert step.harvest * 8 / 1000 == 6 * 1 + 2 * (1 + 2)
    assert step.heads * 8 / 1000 == 6 * 3 + 2 * 6  # head, policy, matrix; head, policy, head, policy, norm, matrix
    assert step.total == step.blocks + step.heads + step.harvest + step.rest


def test_random_prompts_are_the_same_each_time() -> None:
    (one, mask), (two, _) = prompts(4, 7).batches[0], prompts(4, 7).batches[0]
    assert torch.equal(one, two)
    assert (one.shape, mask.sum().item()) == ((4, 7), 28)
    assert one.unique().numel() > 10


def test_real_prompts_fill_whole_batches() -> None:
    samples = [Sample((5,) * length, (), ()) for length in (2, 3, 1, 4, 2)]
    workload = real_prompts(samples, 2, pad_id=9, device=CPU)
    assert (workload.batch_size, workload.prompt_length, workload.rows) == (2, 4, 4)
    assert [ids.tolist() for ids, _ in workload.batches] == [
        [[9, 5, 5], [5, 5, 5]],
        [[9, 9, 9, 5], [5, 5, 5, 5]],
    ]
    assert [mask.tolist() for _, mask in workload.batches] == [
        [[0, 1, 1], [1, 1, 1]],
        [[0, 0, 0, 1], [1, 1, 1, 1]],
    ]
    with pytest.raises(DataError, match=r"have 5 prompts, too few for a batch of 6\. HINT: Lower --batch_sizes"):
        real_prompts(samples, 6, pad_id=9, device=CPU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BenchSettings(()), r"There is no policy to measure"),
        (lambda: BenchSettings(("never",), baselines=("fast",)), r"'fast', which is not known\. HINT: Any of dynamic"),
        (lambda: BenchSettings(("never",), new_tokens=1), r"new_tokens=1, must be at least 2"),
        (lambda: BenchSettings(("never",), repeats=0), r"repeats=0, must be at least 1"),
        (lambda: random_prompts(61, 0, 4, CPU), r"batch_sizes holds 0, must be at least 1"),
        (lambda: random_prompts(61, 1, 0, CPU), r"prompt_lengths holds 0, must be at least 1"),
    ],
)
def test_refused_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "length", "message"),
    [
        ("nope", 5, r"'nope' is none of never, always"),
        ("always:3", 5, r"no exit after block 3"),
        ("never", 61, r"Prompts of 61 and 4 new tokens make 65, but the model has 64 positions\. HINT: Lower"),
    ],
)
def test_refused_with_this_model(policy: str, length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmark(small(), [prompts(1, length)], BenchSettings((policy,), 4, 1, ()))


def test_without_a_compiler_the_others_are_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch.compiler.config.force_disable_caches", True)
    settings = BenchSettings(("never",), 3, 1, ("dynamic", "static"))
    (setting,) = run_benchmark(small(), [prompts(1)], settings).measured
    assert setting.order == ["dynamic", "never"]
    assert setting.unavailable.keys() == {"static"}
    assert "no-such-compiler" in setting.unavailable["static"]


def test_a_model_that_transformers_does_not_compile_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setattr(type(model.causal_lm), "get_compiled_call", lambda self, config: self.__call__)
    (setting,) = run_benchmark(model, [prompts(1)], BenchSettings(("never",), 3, 1, ("static",))).measured
    assert setting.unavailable == {"static": "transformers does not compile LlamaForCausalLM"}


@pytest.mark.slow
def test_the_static_cache_compiles_and_gives_the_same_tokens() -> None:
    model = small(dtype=torch.float32)
    for workload in (prompts(1), prompts(2)):
        run = run_once(static_baseline(model), workload, 6)
        assert torch.equal(run.tokens[0], run_once(dynamic_baseline(model), workload, 6).tokens[0])
    assert "_compiled_call" not in vars(model.causal_lm)
    found = run_benchmark(model, [prompts(1)], BenchSettings(("never",), 4, 2, ("static",)))
    row = found.rows(found.measured[0])[0]
    assert (row["candidate"], row["same_tokens"]) == ("static", True)
    assert row["compile_seconds"] > 0
