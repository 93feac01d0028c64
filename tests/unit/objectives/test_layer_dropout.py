"""Layer dropout: probabilities against the papers' formulas, and draws against probabilities."""

import math

import pytest
import torch

from eetrain.errors import ConfigError
from eetrain.objectives import LayerDropout, LayerSkip

RARE = 10.83  # which chi-square with one degree of freedom exceeds once in a thousand


def chi_square(counts, wanted):
    """Of two counts, or of all cells of a table, against what was expected of each."""
    return sum((count - value) ** 2 / value for count, value in zip(counts, wanted, strict=True))


def dependence(one, two):
    """Chi-square of the table of two rows of booleans against the products of its margins."""
    cells = [(a, b) for a in (False, True) for b in (False, True)]
    counts = [int((one.eq(a) & two.eq(b)).sum()) for a, b in cells]
    wanted = [int(one.eq(a).sum()) * int(two.eq(b).sum()) / len(one) for a, b in cells]
    return chi_square(counts, wanted)


def test_depths_of_eight_blocks():
    found = LayerDropout(1.0).probabilities(0, 8)
    assert [round(value, 3) for value in found] == [0, 0.104, 0.219, 0.346, 0.486, 0.641, 0.811, 1]
    assert LayerDropout(0.2).probabilities(7, 8) == pytest.approx([0.2 * value for value in found])
    assert LayerDropout(0.8, "linear").probabilities(0, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert LayerDropout(0.3, "uniform").probabilities(0, 3) == [0.3] * 3
    assert LayerDropout(0.3).probabilities(0, 1) == [0]


def test_rate_over_time():
    growing = LayerDropout(0.5, "uniform", "exponential", steps=101)
    found = [growing.probabilities(step, 1)[0] for step in (0, 25, 50, 75, 100, 400)]
    # 2^(t / 100) - 1, and it stays.
    assert found == pytest.approx([0, 0.5 * 0.189207, 0.5 * 0.414214, 0.5 * 0.681793, 0.5, 0.5], abs=1e-6)
    by_length = LayerDropout(0.5, "uniform", "exponential")
    assert [by_length.probabilities(step, 1, 101)[0] for step in (0, 25, 50, 75, 100, 400)] == found
    assert LayerDropout(0.5, "uniform", "exponential", steps=1).probabilities(0, 1) == [0]


@pytest.mark.parametrize("theta_bar", [0.5, 0.9])
def test_progressive_layer_dropping_keeps_with_the_probability_of_its_paper(theta_bar):
    dropout = LayerDropout(1 - theta_bar, "linear", "progressive", unit="batch", gamma=0.01)
    for step in (0, 1, 10, 200, 10_000):
        theta = (1 - theta_bar) * math.exp(-0.01 * step) + theta_bar
        kept = [1 - block / 12 * (1 - theta) for block in range(1, 13)]
        assert [1 - value for value in dropout.probabilities(step, 12)] == pytest.approx(kept, abs=1e-12)
    by_length = LayerDropout(1 - theta_bar, "linear", "progressive")
    assert by_length.probabilities(7, 12, 10_000) == pytest.approx(dropout.probabilities(7, 12))


def test_only_some_blocks():
    blocks = [2, 4]
    dropout = LayerDropout(0.4, "uniform", blocks=blocks)
    assert dropout.probabilities(0, 5) == [0, 0.4, 0, 0.4, 0]
    assert blocks == [2, 4]


@pytest.mark.parametrize("depth", ["exponential", "linear", "uniform"])
def test_blocks_drop_as_often_as_the_formula_says(depth):
    """Chi-square of the counts of every block, and of pairs of blocks and of rows, which are independent."""
    torch.manual_seed(0)
    dropout, draws, rows = LayerDropout(0.4, depth), 2000, 4
    wanted_L = dropout.probabilities(0, 6)
    runs_NLB = torch.stack([dropout.draw(0, 6, rows) for _ in range(draws)])
    assert runs_NLB.shape == (draws, 6, rows)
    for block, wanted in enumerate(wanted_L):
        dropped = int((~runs_NLB[:, block]).sum())
        if wanted == 0:
            assert dropped == 0
            continue
        total = draws * rows
        assert chi_square([dropped, total - dropped], [total * wanted, total * (1 - wanted)]) < RARE
    last_NB = runs_NLB[:, -1]
    assert dependence(last_NB[:, 0], last_NB[:, 1]) < RARE, "rows"
    assert dependence(last_NB[:, 0], runs_NLB[:, -2, 0]) < RARE, "blocks"
    assert dependence(last_NB[:-1, 0], last_NB[1:, 0]) < RARE, "steps"


def test_the_chi_squares_see_a_rate_that_is_a_twentieth_off_and_rows_that_agree_too_often():
    torch.manual_seed(0)
    drawn = torch.stack([LayerDropout(0.42, "uniform").draw(0, 1, 4) for _ in range(2000)])
    dropped = int((~drawn).sum())
    assert chi_square([dropped, 8000 - dropped], [8000 * 0.4, 8000 * 0.6]) > RARE
    one, two = drawn[:, 0, 0], drawn[:, 0, 1]
    assert dependence(one, torch.where(torch.rand(2000) < 0.1, one, two)) > RARE


def test_a_batch_shares_its_draw():
    torch.manual_seed(0)
    runs_NLB = torch.stack([LayerDropout(0.5, "uniform", unit="batch").draw(0, 3, 4) for _ in range(100)])
    assert (runs_NLB == runs_NLB[..., :1]).all()
    assert 20 < runs_NLB[:, 0, 0].sum() < 80
    assert (runs_NLB[:, 0] != runs_NLB[:, 1]).any()


def test_evaluation_drops_nothing_and_neither_does_a_rate_of_0():
    objective = LayerSkip(dropout=LayerDropout(1.0, "uniform"))
    objective.bind([1], 3)
    labels = torch.zeros(2, 5, dtype=torch.int64)
    assert objective.active_blocks(labels, step=0, training=False) is None
    active = objective.active_blocks(labels, step=0)
    assert active.shape == (3, 2, 5)
    assert not active.any()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert LayerDropout(0.0).draw(0, 4, 2) is None
    assert LayerDropout(0.5, time="exponential", steps=9).draw(0, 4, 2) is None, "nothing yet"
    assert torch.equal(torch.get_rng_state(), before), "and no draw is spent"


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"rate": 1.01}, "dropout.rate=1.01.", "A probability is a number from 0 to 1."),
        ({"rate": -0.1}, "dropout.rate=-0.1.", "A probability is a number from 0 to 1."),
        ({"rate": math.nan}, "dropout.rate=nan.", "A probability is a number from 0 to 1."),
        (
            {"depth": "square"},
            "dropout.depth='square' is not known.",
            "One of: exponential, linear, uniform.",
        ),
        ({"time": "never"}, "dropout.time='never' is not known.", "One of: constant, exponential, progressive."),
        ({"unit": "token"}, "dropout.unit='token' is not known.", "One of: sample, batch."),
        (
            {"gamma": 0.1},
            "dropout.gamma=0.1 and dropout.time=constant.",
            "gamma is a number above 0 and goes with time=progressive only.",
        ),
        (
            {"gamma": 0.0, "time": "progressive"},
            "dropout.gamma=0.0 and dropout.time=progressive.",
            "gamma is a number above 0 and goes with time=progressive only.",
        ),
        (
            {"steps": 0, "time": "exponential"},
            "dropout.steps=0, dropout.time=exponential and dropout.gamma=None.",
            "steps is 1 or more and goes with time=exponential, or time=progressive without gamma.",
        ),
        (
            {"steps": 9},
            "dropout.steps=9, dropout.time=constant and dropout.gamma=None.",
            "steps is 1 or more and goes with time=exponential, or time=progressive without gamma.",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message, hint):
    with pytest.raises(ConfigError) as caught:
        LayerDropout(**{"rate": 0.1, **settings})
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize("blocks", [[], [0], [4], [2, 2]])
def test_blocks_that_are_not_there(blocks):
    with pytest.raises(ConfigError) as caught:
        LayerSkip(dropout=LayerDropout(0.1, blocks=blocks)).bind([1], 3)
    assert str(caught.value) == (
        f"dropout.blocks={blocks} of a model with 3 blocks. HINT: Name each block once, from 1 to 3, or leave it out "
        "for all of them."
    )


def test_a_run_without_end_gives_no_length():
    growing = LayerSkip(dropout=LayerDropout(0.1, time="exponential"))
    with pytest.raises(ConfigError) as caught:
        growing.prepare_run(math.inf)
    assert str(caught.value) == (
        "LayerSkip goes by the length of the run, and this run has no end (dropout.steps is not set). HINT: Set "
        "model.objective.init_args.dropout.steps, or trainer.max_steps."
    )
    for dropout in (LayerDropout(0.1), LayerDropout(0.1, time="progressive", gamma=0.1)):
        LayerSkip(dropout=dropout).prepare_run(math.inf)
