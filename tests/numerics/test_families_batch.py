"""A batch gives each row what it gets alone: unequal prompts, unequal depths, rows that end at different steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from families_support import (
    ALL,
    Sequences,
    close,
    confidences,
    drive,
    mixed,
    mixing_threshold,
    multi_exit,
    sequences,
)

from eetrain.decoding import Threshold
from eetrain.decoding.exit_runner import ExitRunner

NEW = 9


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("repair", ["recompute", "propagate"])
@pytest.mark.parametrize("head", ["norm", "block"])
def test_forced_tokens_with_rows_that_leave(family, repair, head):
    """Row 1 ends after the third token, row 0 after the fifth; logits are compared to 1e-10."""
    model, data = multi_exit(family, head), sequences()
    policy = Threshold(mixing_threshold(confidences(model, data), 4, cap=3), repair=repair, cap=3)
    alone = [drive(model, policy, data.row(row)) for row in range(3)]
    ends, rows = {3: 1, 5: 0}, [0, 1, 2]
    seen: list[tuple[int, list[int]]] = []

    def leave(runner):
        step = runner.ids.shape[1] - data.prompt
        seen.append((step, list(rows)))
        if step in ends:
            place = rows.index(ends[step])
            rows.pop(place)
            runner.keep([other for other in range(len(rows) + 1) if other != place])

    logits, depths = _drive_shrinking(model, policy, data, leave, rows)
    assert [len(running) for _, running in seen] == [3, 3, 3, 3, 2, 2, 1, 1]
    shown = torch.zeros(3, data.steps + 1, dtype=torch.long)
    for step, running in seen:
        for place, row in enumerate(running):
            torch.testing.assert_close(logits[step][place], alone[row].logits_BSV[0, step], **close(family))
            assert depths[step][place] == alone[row].depth_BS[0, step]
            shown[row, step] = depths[step][place]
    assert mixed(shown[:, 1:4]) or mixed(shown[[0, 2], 4:6]), "no step has rows of unequal depth"


@torch.no_grad()
def _drive_shrinking(model, policy, data, after_step, rows):
    runner = ExitRunner(model, policy, *data.until(data.prompt))
    emitted = [runner.prefill()]
    after_step(runner)
    for slot in range(data.prompt, data.ids_BT.shape[1]):
        emitted.append(runner.step(data.ids_BT[rows, slot]))
        after_step(runner)
    return [logits for logits, _ in emitted], [depth for _, depth in emitted]


def generated(model, ids, mask, policy, eos):
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        repetition_penalty=2.0,  # random models repeat themselves, and then all rows end together
        suppress_tokens=[0],  # else the penalty, which counts padding, would tell rows with padding from rows alone
        eos_token_id=eos,
        exit_policy=policy,
        return_dict_in_generate=True,
        output_logits=True,
    )


def ends_of(sequences_BT: torch.Tensor, eos: list[int]) -> list[int]:
    """Tokens of each row up to and with its end."""
    return [
        next((step + 1 for step, token in enumerate(row) if token in eos), len(row)) for row in sequences_BT.tolist()
    ]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("repair", ["recompute", "propagate"])
def test_generate_with_ends_of_sequences(family, repair):
    """Tokens, depths and logits of `generate`; the end token is one that a row emits, so rows end at unequal steps."""
    model = multi_exit(family)
    data, policy, eos = _settings(model, repair)
    ids, mask, _ = data.until(data.prompt)
    batch = generated(model, ids, mask, policy, eos)
    lengths = ends_of(batch.sequences[:, data.prompt :], eos)
    assert len(set(lengths)) > 1, "all rows end together"
    for row in range(3):
        one = data.row(row)
        alone = generated(model, one.ids_BT[:, : one.prompt], None, policy, eos)
        steps = lengths[row]
        got = batch.sequences[row, data.prompt :]
        assert got[:steps].tolist() == alone.sequences[0, one.prompt :].tolist()
        assert got[steps:].eq(0).all(), "what follows a row's end is padding"
        assert batch.exit_trace[row, :steps].tolist() == alone.exit_trace[0].tolist()
        assert batch.exit_trace[row, steps:].eq(0).all()
        for step in range(steps):
            torch.testing.assert_close(batch.logits[step][row], alone.logits[step][0], rtol=0, atol=1e-5)


def mixed_while_running(depth_BS: torch.Tensor, lengths: list[int]) -> bool:
    """Whether rows that have not ended run to unequal depths in some step."""
    running = [
        {int(depth) for depth, length in zip(column, lengths, strict=True) if step < length}
        for step, column in enumerate(depth_BS.T)
    ]
    return any(len(depths) > 1 for depths in running)


def _settings(model, repair):
    """Prompts, a policy under which depths mix, and an end token that some row, not all, emits early."""
    for seed, start in itertools.product((3, 4, 5, 6), (0.6, 0.4, 0.8, 0.2)):
        data = sequences(seed=seed)
        threshold = mixing_threshold(confidences(model, data), 4, start=start)
        policy = Threshold(threshold, repair=repair, cap=4)
        free = generated(model, *data.until(data.prompt)[:2], policy, None)
        new = free.sequences[:, data.prompt :]
        for token in new[:, 1:].flatten().tolist():
            lengths = ends_of(new, [token])
            if len(set(lengths)) > 1 and mixed_while_running(free.exit_trace, lengths):
                return data, policy, [token]
    raise AssertionError("found no end token: choose other seeds")


def test_a_streamer_under_exits_sees_the_rows_in_step():
    model, data = multi_exit("llama"), sequences()
    ids, mask, _ = data.until(data.prompt)

    class Streamer:
        def __init__(self):
            self.put_values, self.ended = [], 0

        def put(self, value):
            self.put_values.append(value.clone())

        def end(self):
            self.ended += 1

    streamer = Streamer()
    threshold = mixing_threshold(confidences(model, data), 4)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, exit_policy=Threshold(threshold), streamer=streamer
    )
    assert streamer.ended == 1
    assert torch.equal(streamer.put_values[0], ids)
    assert [value.shape for value in streamer.put_values[1:]] == [(3,)] * 5
    assert torch.equal(torch.stack(streamer.put_values[1:], 1), out[:, data.prompt :])


def test_deeper_copies_of_a_row_change_nothing():
    """The same prompt three times beside another one: equal rows stay equal bit for bit."""
    model, data = multi_exit("qwen3"), sequences(lengths=(9, 6))
    threshold = mixing_threshold(confidences(model, data), 4)
    rows = [0, 0, 1, 0]
    tripled = Sequences(data.ids_BT[rows], data.mask_BT[rows], data.positions_BT[rows], data.prompt)
    run = drive(model, Threshold(threshold), tripled)
    assert torch.equal(run.logits_BSV[0], run.logits_BSV[1])
    torch.testing.assert_close(run.logits_BSV[0], run.logits_BSV[3], rtol=0, atol=1e-12)
