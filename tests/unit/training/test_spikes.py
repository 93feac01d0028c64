"""Running statistics of a loss against their closed form, and what counts as a spike."""

import json
import math
import random

import pytest

from eetrain.training.spikes import DECAY, FLOOR, LEVEL, LossWatch


def closed_form(losses):
    """Mean and deviation with weights that fall by DECAY a step into the past."""
    weights = [DECAY**age for age in range(len(losses))][::-1]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, losses, strict=True)) / sum(weights)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 400])
def test_mean_and_deviation_are_those_of_the_weighted_losses(count):
    draw = random.Random(count)
    losses = [3 + draw.gauss(0, 0.5) for _ in range(count)]
    watch = LossWatch(deviations=1e9, after=1)
    assert not any(watch.see(loss) for loss in losses)
    mean, deviation = closed_form(losses)
    assert watch.mean == pytest.approx(mean, rel=1e-12)
    assert math.sqrt(watch.variance) == pytest.approx(deviation, rel=1e-9, abs=1e-12)
    assert watch.count == count


def watch_of(losses, deviations=4.0, after=2):
    watch = LossWatch(deviations, after)
    for loss in losses:
        assert not watch.see(loss)
    return watch


def test_a_spike_is_above_the_limit_and_not_at_it():
    mean, deviation = closed_form([2.0, 3.0])
    for above, spike in ((0.0, False), (1e-9, True)):
        watch = watch_of([2.0, 3.0])
        assert watch.limit == pytest.approx(mean + 4 * deviation, rel=1e-12)
        assert watch.see(watch.limit + above) == spike


def test_a_spike_is_not_counted_in_and_does_not_hide_the_next():
    watch = watch_of([2.0, 3.0])
    before = watch.state_dict()
    assert watch.see(50.0)
    assert watch.see(6.0), "with 50 counted in, 6 would be near the mean"
    assert watch.state_dict() == {**before, "in_a_row": 2}
    assert not watch.see(2.5)
    assert watch.in_a_row == 0


def test_nothing_is_a_spike_at_first_and_a_fall_never_is():
    watch = LossWatch(deviations=1.0, after=3)
    assert not any(watch.see(loss) for loss in (1.0, 1.0, 100.0))
    assert not watch.see(-1e6)


def test_the_deviation_of_a_quiet_loss_has_a_floor():
    watch = watch_of([2.0, 2.0, 2.0], deviations=6.0)
    assert watch.variance == 0
    assert watch.limit == pytest.approx(2.0 * (1 + 6 * FLOOR))
    assert not watch.see(2.0 * (1 + 5.9 * FLOOR))


def test_many_spikes_in_a_row_are_a_new_level():
    watch = watch_of([2.0, 3.0])
    assert all(watch.see(90.0) for _ in range(LEVEL))
    assert (watch.count, watch.mean) == (0, 0.0)
    assert not watch.see(90.0)
    assert watch.mean == pytest.approx(90.0)


def test_resumes_exactly_through_json_and_takes_other_settings():
    draw = random.Random(0)
    losses = [3 + draw.gauss(0, 0.5) + (40 if place in (20, 31) else 0) for place in range(60)]
    whole, first = LossWatch(5.0, 10), LossWatch(5.0, 10)
    wanted = [whole.see(loss) for loss in losses]
    found = [first.see(loss) for loss in losses[:21]]
    second = LossWatch(5.0, 10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.see(loss) for loss in losses[21:]]
    assert found == wanted
    assert [place for place, spike in enumerate(wanted) if spike] == [20, 31]
    assert second == whole
    other = LossWatch(7.0, 2)
    other.load_state_dict(whole.state_dict())
    assert (other.deviations, other.after, other.mean) == (7.0, 2, whole.mean)
