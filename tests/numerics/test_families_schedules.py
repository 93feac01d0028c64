"""Depth by position, over all families: training graph = cached decoding = brute force, batch = rows alone."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from families_support import ALL, STEPS, Sequences, backbone, close, sequences

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import Harvester
from eetrain.decoding import parse_policy, start
from eetrain.schedules import BlockSchedule, parse_schedule
from eetrain.testing.tiny import tiny_model

SCHEDULES = (
    "skipdecode:max=4,min=2,length=6",
    "skipdecode:max=3,min=2,length=4,prompt=full",
    "skipdecode:max=4,min=2,length=13,prompt=decay",
    "skipdecode:speed=1.6,length=7,warmup=0",
    "static:3",
    "unified:2",
    "d3:0.8",
    "hsd:1,length=6",
)
DECAY = "skipdecode:max=4,min=2,length=13,prompt=decay"
SOME = (SCHEDULES[1], DECAY, "static:3", "d3:0.8")


@cache
def plain(family: str) -> MultiExitModel:
    return MultiExitModel(backbone(family), ExitConfig(layers=[])).eval()


def built(text: str) -> BlockSchedule:
    return parse_schedule(text).build(4)


def index_of(length: int, prompt: int, schedule: BlockSchedule) -> list[int]:
    """The schedule's index of each position of one text, by its definition."""
    if schedule.from_start:
        return list(range(length))
    return [max(place - prompt, -1) for place in range(length)]


def activity(schedule: BlockSchedule, index: list[int]) -> torch.Tensor:
    """``[L, T]`` by the schedule's sets, not by its reaches."""
    return torch.tensor([[block in schedule.active(place) for place in index] for block in range(1, 5)])


@torch.no_grad()
def drive(model, policy: str, data: Sequences, rows_leave: dict[int, int] | None = None, after=lambda runner: None):
    """Force the tokens; ``rows_leave`` maps a step to the row that ends after it. Per step: rows, logits, depths."""
    runner = start(model, policy, *data.until(data.prompt))
    rows = list(range(len(data.ids_BT)))
    emitted = [(list(rows), *runner.prefill())]
    after(runner)
    for slot in range(data.prompt, data.ids_BT.shape[1]):
        gone = (rows_leave or {}).get(slot - data.prompt)
        if gone is not None:
            runner.keep([place for place, row in enumerate(rows) if row != gone])
            rows.remove(gone)
        emitted.append((list(rows), *runner.step(data.ids_BT[rows, slot])))
        after(runner)
    return runner, emitted


def stacked(emitted) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([logits for _, logits, _ in emitted], 1), torch.stack([depth for _, _, depth in emitted], 1)


@torch.no_grad()
def trained_graph(model, ids, active_LBT, mask=None, positions=None) -> torch.Tensor:
    return model.logits(model(ids, mask, positions, active_LBT=active_LBT))


@contextmanager
def counted_blocks(model):
    """Positions times calls that really pass through each block, by hooks on the backbone's own blocks."""
    counts: Counter[int] = Counter()

    def hook(number):
        def count(_module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            counts[number] += hidden.shape[0] * hidden.shape[1]

        return count

    blocks = Harvester(model.backbone, model.anatomy).blocks
    handles = [b.register_forward_pre_hook(hook(n), with_kwargs=True) for n, b in enumerate(blocks, start=1)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ALL)
def test_all_blocks_throughout_is_transformers_generate(family):
    model, data = plain(family), sequences()
    ids, mask, _ = data.until(data.prompt)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    truth = model.causal_lm.generate(ids, **options)
    policies = ("static:4", "unified:1", "d3:1", "skipdecode:speed=1", "skipdecode:max=4,min=4,prompt=decay")
    for policy in policies if family == "llama" else policies[-1:]:
        assert torch.equal(model.generate(ids, exit_policy=policy, **options), truth), policy


@pytest.mark.parametrize("family", ALL)
def test_training_graph_is_cached_decoding(family):
    """One text after another; sets, logits at every decoded position and depths by the schedule's own sets."""
    model, data = plain(family), sequences(lengths=(9,))
    length = data.ids_BT.shape[1]
    for text in SCHEDULES:
        schedule = built(text)
        index = index_of(length, data.prompt, schedule)
        active_LBT = activity(schedule, index)[:, None]
        assert not active_LBT.all()
        got, depth = stacked(drive(model, text, data)[1])
        want = trained_graph(model, data.ids_BT, active_LBT)
        torch.testing.assert_close(got, want[:, data.prompt - 1 :], **close(family), msg=lambda m, t=text: f"{t}: {m}")
        assert depth[0].tolist() == [len(schedule.active(place)) for place in index[data.prompt - 1 :]]


@pytest.mark.parametrize("family", ALL)
def test_training_graph_of_packed_and_padded_rows_is_that_of_each_text_alone(family):
    """Every text has a schedule of its own, as random depths draw them; one of them never runs block 2."""
    model = plain(family)
    generator = torch.Generator().manual_seed(1)
    lengths, prompts = (10, 7, 5), (4, 5, 1)
    schedules = [built(text) for text in ("static:3", "skipdecode:max=4,min=2,length=6", DECAY)]
    texts = [torch.randint(3, 61, (1, length), generator=generator) for length in lengths]
    parts = [
        activity(schedule, index_of(length, prompt, schedule))[:, None]
        for length, prompt, schedule in zip(lengths, prompts, schedules, strict=True)
    ]
    assert not parts[0][1].any(), "or no row would lack a block that others run"
    alone = [trained_graph(model, ids, active) for ids, active in zip(texts, parts, strict=True)]
    order = [(0, 1, 2), (2, 0, 1)]
    packed = trained_graph(
        model,
        torch.stack([torch.cat([texts[place][0] for place in row]) for row in order]),
        torch.stack([torch.cat([parts[place][:, 0] for place in row], -1) for row in order], 1),
        positions=torch.stack([torch.cat([torch.arange(lengths[place]) for place in row]) for row in order]),
    )
    want = torch.stack([torch.cat([alone[place][0] for place in row]) for row in order])
    torch.testing.assert_close(packed, want, **close(family))

    def padded(tensor, length):
        return torch.nn.functional.pad(tensor, (0, max(lengths) - length))

    ids = torch.cat([padded(text, length) for text, length in zip(texts, lengths, strict=True)])
    mask = torch.cat([padded(torch.ones_like(text), length) for text, length in zip(texts, lengths, strict=True)])
    active = torch.cat([padded(part, length) for part, length in zip(parts, lengths, strict=True)], 1)
    active[:, 2, lengths[2] :] = True  # what padding is said to run makes no difference
    got = trained_graph(model, ids, active, mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, :length], alone[row][0], **close(family))


@pytest.mark.parametrize("family", ALL)
def test_a_batch_is_its_rows_alone_also_when_rows_leave(family):
    """Prompts of 11, 6 and 9 tokens; row 1 ends after two tokens, row 0 after four."""
    model, data = plain(family), sequences()
    for text in (SCHEDULES[0], DECAY):
        alone = [stacked(drive(model, text, data.row(row))[1]) for row in range(3)]
        if text == DECAY:
            together = torch.cat([depth for _, depth in alone])
            assert any(len(column.unique()) > 1 for column in together.T), "no step has rows of unequal depth"
        runner, emitted = drive(model, text, data, rows_leave={2: 1, 4: 0})
        assert [len(rows) for rows, _, _ in emitted] == [3, 3, 3, 2, 2, 1, 1, 1]
        for step, (rows, logits, depth) in enumerate(emitted):
            for place, row in enumerate(rows):
                torch.testing.assert_close(logits[place], alone[row][0][0, step], **close(family))
                assert depth[place] == alone[row][1][0, step]
        assert runner.block_calls == sum(int(depth.sum()) for _, _, depth in emitted[1:])


@pytest.mark.parametrize("family", ALL)
def test_blocks_that_really_run_are_those_of_the_formula(family):
    model, data = plain(family), sequences(lengths=(7, 7))
    for text in SCHEDULES if family == "llama" else SOME:
        schedule = built(text)
        runner = start(model, text, *data.until(data.prompt))
        with torch.no_grad():
            runner.prefill()
            with counted_blocks(model) as counts:
                for slot in range(data.prompt, data.ids_BT.shape[1]):
                    runner.step(data.ids_BT[:, slot])
        places = range(7, 7 + STEPS) if schedule.from_start else range(STEPS)
        want = {b: 2 * sum(b in schedule.active(t) for t in places) for b in range(1, 5)}
        assert {block: counts[block] for block in range(1, 5)} == want, text
        assert runner.block_calls == sum(want.values())


@pytest.mark.parametrize("family", ALL)
def test_training_runs_no_block_where_it_is_not_active(family):
    """Rows of one length run exactly the active positions: what is skipped costs nothing."""
    model, data = plain(family), sequences(lengths=(7, 7))
    for text in SCHEDULES:
        schedule = built(text)
        active_LT = activity(schedule, index_of(data.ids_BT.shape[1], 7, schedule))
        with counted_blocks(model) as counts:
            trained_graph(model, data.ids_BT, active_LT[:, None].expand(-1, 2, -1))
        assert [counts[block] for block in range(1, 5)] == (2 * active_LT.sum(1)).tolist(), text


@pytest.mark.parametrize("family", ALL)
def test_the_cache_holds_the_slots_that_ran_and_no_others(family):
    """Prompt and tau_l generated slots for each block; the rest of every buffer was never written."""
    model, data = plain(family), sequences()
    slots = data.ids_BT.shape[1]
    for text in SCHEDULES if family == "llama" else SOME:
        schedule = built(text)
        runner, _ = drive(model, text, data)
        for block in range(1, 5):
            layer = runner.cache.layers[block - 1]
            for row in range(3):
                pads = int((data.mask_BT[row] == 0).sum())
                index = [-1] * pads + index_of(slots - pads, data.prompt - pads, schedule)
                runs = torch.tensor([block in schedule.active(place) for place in index])
                if not layer.is_initialized:
                    assert not runs.any()
                    continue
                for buffer in (layer.keys, layer.values):
                    written = buffer[row].abs().sum((0, 2)) > 0
                    assert torch.equal(written[:slots], runs), (text, block, row)
                    assert not written[slots:].any()
                tau = sum(block in schedule.active(t) for t in range(STEPS))
                if not schedule.from_start and block in schedule.active(-1):
                    assert int(runs.sum()) == data.prompt + tau, "padding included"


@pytest.mark.parametrize("text", SCHEDULES)
def test_tokens_never_change_depths(text):
    model = plain("qwen3")
    options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "exit_policy": text}
    one, two = (model.generate(sequences(lengths=(6, 6), seed=seed).ids_BT[:, :6], **options) for seed in (0, 1))
    assert not torch.equal(one.sequences[:, 6:], two.sequences[:, 6:])
    assert torch.equal(one.exit_trace, two.exit_trace)
    schedule = built(text)
    begin = 5 if schedule.from_start else -1
    assert one.exit_trace[0].tolist() == [schedule.depth(place) for place in range(begin, begin + 9)]
    assert one.block_calls == two.block_calls == 2 * sum(one.exit_trace[0].tolist()[1:])


def masked_everywhere(lm, ids, active_LBT, documents_BT, positions_BT):
    """Every block over every position, inactive keys masked out for all queries, results kept where active."""
    inner = lm.model
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, positions_BT)
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & (documents_BT[:, :, None] == documents_BT[:, None])
    for block, active_BT in zip(inner.layers, active_LBT, strict=True):
        seen = (causal & active_BT[:, None]) | torch.eye(length, dtype=torch.bool)
        bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, -torch.inf)[:, None]
        after = block(hidden, attention_mask=bias, position_embeddings=rotary, position_ids=positions_BT)
        hidden = torch.where(active_BT[..., None], after, hidden)
    return lm.lm_head(inner.norm(hidden))


def random_documents(kind: str, seed: int):
    """Ids, positions, documents and a mask of 3 rows; documents draw their schedules from all kinds."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (3, 14), generator=generator)
    cuts = {"rows": [[14], [14], [14]], "padded": [[14], [6, 8], [9, 5]], "packed": [[14], [5, 9], [3, 6, 5]]}[kind]
    positions = torch.tensor([[place for length in row for place in range(length)] for row in cuts])
    documents = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in cuts])
    mask = (documents == 0).long() if kind == "padded" else None
    active = []
    for row in cuts:
        pieces = []
        for length in row:
            schedule = built(SCHEDULES[int(torch.randint(len(SCHEDULES), (), generator=generator))])
            prompt = int(torch.randint(1, length, (), generator=generator))
            pieces.append(activity(schedule, index_of(length, prompt, schedule)))
        active.append(torch.cat(pieces, -1))
    return ids, positions, documents, mask, torch.stack(active, 1)


# Eager attention takes its softmax in float32.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@pytest.mark.parametrize("kind", ["rows", "padded", "packed"])
def test_logits_and_gradients_are_those_of_brute_force(kind, attention, tolerance):
    idle_rows = 0
    for seed in range(4):
        ids, positions, documents, mask, active = random_documents(kind, seed)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        direction = torch.randn(*ids.shape, 61, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction *= real[..., None]
        model = MultiExitModel(tiny_model("llama", attn_implementation=attention), ExitConfig(layers=[]))
        truth = tiny_model("llama")
        output = model(ids, mask, positions if kind == "packed" else None, active_LBT=active)
        got, want = model.logits(output), masked_everywhere(truth, ids, active & real, documents, positions)
        torch.testing.assert_close(got[real], want[real], rtol=0, atol=tolerance)
        (got * direction).sum().backward()
        (want * direction).sum().backward()
        others = dict(truth.named_parameters())
        for name, parameter in model.causal_lm.named_parameters():
            theirs = others[name].grad
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            theirs = torch.zeros_like(mine) if theirs is None else theirs
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * (1 + float(theirs.abs().max())))
        runs = active.any(-1)
        idle_rows += int((runs.any(1) & ~runs.all(1)).sum())
    assert idle_rows, "no row lacks a block that others run"


def test_a_block_that_never_runs_gets_no_gradient():
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[]))
    ids = sequences(lengths=(7, 7)).ids_BT
    active = activity(built("static:2"), [-1] * 7 + list(range(STEPS)))[:, None].expand(-1, 2, -1)
    model.logits(model(ids, active_LBT=active)).sum().backward()
    for number, block in enumerate(model.causal_lm.model.layers, start=1):
        for name, parameter in block.named_parameters():
            assert (parameter.grad is None) == (number in (2, 3)), name


def test_policy_objects_and_strings_are_the_same_run():
    model, data = plain("llama"), sequences()
    one, two = (drive(model, policy, data)[1] for policy in (DECAY, parse_policy(DECAY)))
    assert torch.equal(stacked(one)[0], stacked(two)[0])
