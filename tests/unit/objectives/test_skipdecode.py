"""The objective for schedules: where blocks run, what is drawn, and the loss of a real tiny model."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from eetrain import ExitConfig, MultiExitModel
from eetrain.errors import ConfigError
from eetrain.objectives import FULL
from eetrain.objectives.skipdecode import SkipDecode
from eetrain.objectives.text_positions import generated_index
from eetrain.schedules import parse_schedule
from eetrain.testing.tiny import tiny_model

TEXT = "skipdecode:max=8,min=3,length=5"


def bound(schedule: str = TEXT, num_blocks: int = 8, **settings) -> SkipDecode:
    objective = SkipDecode(schedule, **settings)
    objective.bind((), num_blocks)
    return objective


def packed(documents: int = 60, length: int = 8, prompt: int = 3):
    """Labels and positions of two rows of equal documents."""
    labels = torch.arange(2 * documents // 2 * length).view(2, -1) % 7
    positions = torch.arange(length).repeat(documents // 2).expand(2, -1)
    return torch.where(positions < prompt, -100, labels), positions


def graphs(active_LBT: torch.Tensor, length: int) -> list[tuple[tuple[bool, ...], ...]]:
    """``[T][L]`` of each document."""
    blocks = active_LBT.shape[0]
    return [tuple(map(tuple, d.T.tolist())) for d in active_LBT.reshape(blocks, -1, length).unbind(1)]


@pytest.mark.parametrize("prompt", ["max", "full", "decay"])
def test_blocks_run_where_the_schedule_says(prompt):
    text = f"skipdecode:max=6,min=3,length=5,prompt={prompt}"
    labels, positions = packed()
    active = bound(text).active_blocks(labels, positions, step=0)
    assert (active.dtype, active.shape) == (torch.bool, (8, *labels.shape))
    schedule = parse_schedule(text).build(8)
    index = range(8) if prompt == "decay" else [-1, -1, -1, 0, 1, 2, 3, 4]
    wanted = tuple(tuple(block in schedule.active(place) for block in range(1, 9)) for place in index)
    assert set(graphs(active, 8)) == {wanted}


def test_without_positions_a_row_is_one_document():
    labels = torch.tensor([[-100, 3, 3, 3], [-100, -100, -100, 3]])
    objective = bound("skipdecode:max=3,min=2,length=2", 3)
    assert objective.active_blocks(labels, step=0)[1].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    plain = bound("skipdecode:max=3,min=2,length=2", 3, prompt_tokens=2)
    assert plain.active_blocks(labels, step=0)[1].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def candidates(objective: SkipDecode, speeds=(1.5, 4.0), prompt="max") -> list[str]:
    """The grid written out: 16 speeds, evenly spaced in 1 / speed."""
    slow, fast = 1 / speeds[0], 1 / speeds[1]
    inverse = [slow + (fast - slow) * place / 15 for place in range(16)]
    return [f"skipdecode:speed={1 / share!r},length=5,prompt={prompt}" for share in inverse]


@pytest.mark.parametrize("prompt", ["max", "decay"])
def test_every_document_draws_its_own_schedule_from_the_grid(prompt):
    labels, positions = packed(documents=400)
    objective = bound(f"skipdecode:max=8,min=3,length=5,prompt={prompt}", train_depth="random")
    torch.manual_seed(0)
    found = graphs(objective.active_blocks(labels, positions, step=0), 8)
    index = range(8) if prompt == "decay" else generated_index(labels, positions)[0][0, :8].tolist()
    wanted = set()
    for text in candidates(objective, prompt=prompt):
        schedule = parse_schedule(text).build(8)
        wanted.add(tuple(tuple(block in schedule.active(place) for block in range(1, 9)) for place in index))
    assert len(wanted) > 5
    assert set(found) == wanted, "all of the grid and nothing else"
    assert len(set(found[:200])) > 5
    assert len(set(found[200:])) > 5, "rows draw for themselves"


def test_draws_follow_the_global_generator():
    labels, positions = packed()
    objective = bound(train_depth="random")

    def draw(seed):
        torch.manual_seed(seed)
        return objective.active_blocks(labels, positions, step=0)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    objective.active_blocks(labels, positions, step=0)
    assert not torch.equal(draw(1), objective.active_blocks(labels, positions, step=0)), "the next batch draws anew"


def test_validation_runs_the_schedule_given_and_draws_nothing():
    labels, positions = packed()
    state = torch.get_rng_state()
    held_out = bound(train_depth="random").active_blocks(labels, positions, training=False, step=0)
    assert torch.equal(held_out, bound().active_blocks(labels, positions, step=0))
    assert torch.equal(held_out, bound().active_blocks(labels, positions, training=False, step=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_blocks", "speeds"), product((8, 12, 24, 32), ((1.0, 4.0), (1.5, 4.0), (2, 3))))
def test_the_fastest_speed_a_model_allows_can_be_the_end_of_the_range(num_blocks, speeds):
    """With speeds taken as inverses of shares it would be refused for a rounding error."""
    objective = bound(num_blocks=num_blocks, train_depth="random", speeds=speeds)
    limit = bound(num_blocks=num_blocks, train_depth="random", speeds=(1.5, num_blocks / 2))
    labels, positions = packed()
    for each in (objective, limit):
        assert each.active_blocks(labels, positions, step=0)[-1].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "spiral:3"}, "Schedule 'spiral:3' does not parse: 'spiral' is none of skipdecode, static, "),
        ({"train_depth": "luck"}, "train_depth='luck' is not known. HINT: One of: schedule, random."),
        ({"prompt_tokens": 0}, "prompt_tokens=0. HINT: Set it to 1 or more, or leave it out."),
        ({"speeds": (4.0, 1.5)}, "speeds=[4.0, 1.5]. HINT: Give two rising numbers from 1 on: [1.5, 4]."),
        ({"speeds": (0.5, 2)}, "speeds=[0.5, 2]. HINT: Give two rising numbers from 1 on: [1.5, 4]."),
        (
            {"schedule": "hsd:3", "train_depth": "random"},
            "train_depth=random draws SkipDecode schedules, but schedule='hsd:3'. "
            "HINT: Give a skipdecode schedule, whose warmup, length and prompt all of them take.",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError) as caught:
        SkipDecode(**{"schedule": TEXT, **settings})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("schedule", "layers", "settings", "message"),
    [
        (
            TEXT,
            (2, 4),
            {},
            "SkipDecode trains the last block's output only, but there are exits after blocks [2, 4]. "
            "HINT: Set model.exits.layers=[].",
        ),
        (
            "static:3,warmup=3",
            (),
            {},
            "The schedule static:3,warmup=3 does not end in the last block, whose output gives the logits. "
            "HINT: Let it run more blocks, or fewer warm-up blocks.",
        ),
        (
            "skipdecode:max=8,min=3,prompt=decay",
            (),
            {"prompt_tokens": 5},
            "prompt_tokens=5, but the schedule skipdecode:max=8,min=3,prompt=decay begins at the start of the text. "
            "HINT: Leave prompt_tokens out, or use prompt=max or full.",
        ),
        (
            "skipdecode:max=9,min=3",
            (),
            {},
            "skipdecode has max=9, but the model has 8 blocks. HINT: Set max to 8 or less.",
        ),
        (
            TEXT,
            (),
            {"train_depth": "random", "speeds": (1.5, 5.0)},
            "A speed of 5 leaves 1.6 of 8 blocks. HINT: With warmup=1 it can be 1 to 4.",
        ),
    ],
)
def test_schedules_that_do_not_fit_the_model(schedule, layers, settings, message):
    objective = SkipDecode(schedule, **settings)
    with pytest.raises(ConfigError) as caught:
        objective.bind(layers, 8)
    assert str(caught.value) == message


def test_it_must_be_bound_first():
    with pytest.raises(AssertionError, match="bind the objective to a model first"):
        SkipDecode(TEXT).active_blocks(torch.zeros(1, 2, dtype=torch.int64), step=0)


def model_and_batch():
    model = MultiExitModel(tiny_model("llama", dtype=torch.float64), ExitConfig(layers=[]))
    ids = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    return model, ids, labels


def test_the_loss_is_transformers_own_when_everything_runs():
    model, ids, labels = model_and_batch()
    objective = bound("skipdecode:max=4,min=4", 4)
    out = objective(model(ids, active_LBT=objective.active_blocks(labels, step=0)), labels, step=0)
    wanted = model.causal_lm(ids, labels=labels).loss.double()
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=1e-6)
    assert objective.needs_full_depth()
    assert set(out.terms) == {"ce/full"}
    assert (out.layers, out.statistics) == ((FULL,), None)


def test_the_loss_is_the_cross_entropy_of_the_scheduled_graph():
    model, ids, labels = model_and_batch()
    objective = bound("skipdecode:max=4,min=2,length=5", 4)
    active = objective.active_blocks(labels, step=0)
    logits = model.logits(model(ids, active_LBT=active))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    plain = model.causal_lm(ids, labels=labels).loss.detach()
    for statistics in (False, True):
        out = objective(model(ids, active_LBT=active), labels, step=3, statistics=statistics)
        torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.terms["ce/full"], wanted.detach(), rtol=1e-6, atol=1e-6)
        assert abs(float(out.total.detach() - plain)) > 1e-3
        assert (out.statistics is not None) == statistics
    scored = labels[:, 1:].flatten() != -100
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    found = out.statistics.nll[0].view(3, 12)[:, :-1].flatten()
    torch.testing.assert_close(found[scored].double(), nll[scored].detach(), rtol=1e-5, atol=1e-5)


def test_the_kernel_is_used_for_steps_without_statistics_only():
    """The cut-cross-entropy kernels refuse to run here, so a step that gets through did not ask for them."""
    model, ids, labels = model_and_batch()
    objective = bound("skipdecode:max=4,min=2,length=5", 4, kernel="cce")
    active = objective.active_blocks(labels, step=0)
    assert objective(model(ids, active_LBT=active), labels, step=0, statistics=True).total.isfinite()
    with pytest.raises(ConfigError, match="cce"):
        objective(model(ids, active_LBT=active), labels, step=0)
