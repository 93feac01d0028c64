"""Bad steps on one process, against loops written by hand; what is said of them; when the guard gives up."""

import functools
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.nn.utils import clip_grad_norm_

from eetrain.cli import main
from eetrain.errors import ConfigError, TrainingError
from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_reading import read_trainer_state
from eetrain.training.guard import NumberGuard
from eetrain.training.optimization import build_adamw, build_schedule

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))
from guard_support import NAN, Spoil, SpoilGradient, apart, batches, build, fit

DECLINE = {"schedule": "linear", "schedule_steps": 8, "warmup_steps": 1}
alone = functools.partial(fit, "alone")


def by_hand(steps, clip=None):
    """Weights and moments of a loop whose every step is a list of batches; an empty list only moves the schedule."""
    module = build(**DECLINE)
    optimizer = build_adamw(module.named_parameters(), module.optimizer_config)
    schedule = build_schedule(optimizer, module.optimizer_config, 8)
    for numbers in steps:
        optimizer.zero_grad()
        for batch in batches(numbers):
            (module.compute_loss(batch).total / len(numbers)).backward()
        if numbers:
            if clip is not None:
                clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
        schedule.step()
    found = dict(module.named_parameters())
    for name, parameter in module.named_parameters():
        found |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().float().numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("spoil", [Spoil({2: NAN}), Spoil({2: float("inf")}), SpoilGradient(2)])
def test_a_skipped_step_leaves_all_as_it_was_but_the_schedule(spoil):
    found, trainer = alone(range(4), guard=NumberGuard("skip"), spoil=spoil, optimizer=DECLINE, gradient_clip_val=0.1)
    assert apart(found, by_hand([[0], [1], [], [3]], clip=0.1)) == []
    assert trainer.global_step == 4


def test_one_bad_batch_spoils_the_step_of_all_that_are_accumulated():
    found, _ = alone(
        range(6), guard=NumberGuard("skip"), spoil=Spoil({2: NAN}), optimizer=DECLINE, accumulate_grad_batches=2
    )
    assert apart(found, by_hand([[0, 1], [], [4, 5]])) == []
    with pytest.raises(TrainingError, match=r"^In step 1 \(epoch 0, batch 2; on rank 0\) ce/exit_3 is not finite\."):
        alone(range(6), guard=NumberGuard(), spoil=Spoil({2: NAN}), accumulate_grad_batches=2)
    with pytest.raises(TrainingError, match=r"^In step 1 \(epoch 0, batches 2 to 3; on rank 0\) the gradient of model"):
        alone(range(6), guard=NumberGuard(), spoil=SpoilGradient(3), accumulate_grad_batches=2)


def test_without_bad_numbers_the_guard_changes_nothing():
    with_guard, _ = alone(range(3), guard=NumberGuard(), optimizer=DECLINE)
    assert apart(with_guard, by_hand([[0], [1], [2]])) == []


def test_under_mixed_precision_too():
    found, _ = alone(range(4), guard=NumberGuard("skip"), spoil=Spoil({2: NAN}), precision="bf16-mixed")
    wanted, _ = alone([0, 1, 3], precision="bf16-mixed")
    assert apart(found, wanted) == []


def test_going_back_drops_what_came_since_the_checkpoint(tmp_path):
    guard = NumberGuard("rewind")
    with pytest.warns(UserWarning, match=r"step 3 \(epoch 0, batch 3.*The run went back to step 2 \(.*step=2.ckpt\)"):
        found, trainer = alone(range(6), tmp_path, guard, Spoil({3: NAN}), optimizer=DECLINE)
    assert apart(found, by_hand([[0], [1], [4], [5]])) == []
    assert trainer.global_step == trainer.fit_loop.epoch_loop._batches_that_stepped == 4
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 6


def test_a_damaged_checkpoint_and_those_of_other_runs_are_passed_over(tmp_path):
    class Damage(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 5:
                newest = tmp_path / "step=4.ckpt"
                newest.write_bytes(newest.read_bytes()[:-200])

    alone(range(9), tmp_path, NumberGuard())
    (tmp_path / "step=8.ckpt").rename(tmp_path / "of-another-run.ckpt")
    found, _ = alone(range(7), tmp_path, NumberGuard("rewind"), Spoil({5: NAN}), optimizer=DECLINE, more=[Damage()])
    assert apart(found, by_hand([[0], [1], [6]])) == []


def test_going_back_needs_a_checkpoint(tmp_path):
    alone(range(4), tmp_path, NumberGuard())  # of another run
    with pytest.raises(TrainingError) as caught:
        alone(range(4), tmp_path, NumberGuard("rewind"), Spoil({1: NAN}))
    assert caught.value.message == (
        "In step 1 (epoch 0, batch 1; on rank 0) ce/exit_3 is not finite. There is no checkpoint of this run yet to go "
        f"back to. Nothing was updated; {tmp_path}/last.ckpt holds the run before that step."
    )
    assert caught.value.hint.startswith("Set checkpoint.every_n_train_steps lower")
    with pytest.raises(ConfigError) as refused:
        alone(range(4), guard=NumberGuard(on_spike="rewind"))
    assert refused.value.message == "guard.on_spike=rewind, but the run writes no checkpoints."


def test_it_gives_up_after_so_many_skips_in_a_row():
    spoil = Spoil({1: NAN, 2: NAN, 4: NAN, 5: NAN, 6: NAN})
    with pytest.raises(
        TrainingError, match=r"^In step 6 .* 2 steps before it were skipped \(guard.max_skips\)\. Nothing"
    ):
        alone(range(8), guard=NumberGuard("skip", max_skips=2), spoil=spoil)


def test_it_gives_up_after_going_back_without_getting_further(tmp_path):
    # Each time the step after the checkpoint is bad: steps 2, 2, 2.
    spoil = Spoil({2: NAN, 3: NAN, 4: NAN})
    with pytest.raises(TrainingError, match=r"^In step 2 \(epoch 0, batch 4.* went back 2 times and came no further"):
        alone(range(8), tmp_path, NumberGuard("rewind", max_rewinds=2), spoil)
    further = Spoil({2: NAN, 3: NAN, 5: NAN, 6: NAN})  # steps 2, 2, then 3 after one good one, 2
    _, trainer = alone(range(8), tmp_path, NumberGuard("rewind", max_rewinds=2), further)
    assert trainer.global_step == 3


def steps_of_guard(spoil, folder=None, resume=None, numbers=range(6), **settings):
    """Which steps were warned of as spikes, and the guard."""
    guard = NumberGuard(**{"spike_after": 3, "spike_deviations": 4.0, **settings})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = alone(numbers, folder, guard, spoil, resume, same=True, optimizer={"lr": 1e-4})
    texts = [str(warning.message) for warning in caught if "deviations of" in str(warning.message)]
    return [int(text.split()[2]) for text in texts], guard, found, texts


def test_a_spike_is_warned_of_and_the_step_made():
    warned, _, found, (text,) = steps_of_guard(Spoil({4: 30.0}))
    assert warned == [4]
    assert "deviations of" in text
    assert text.endswith("The step is made.")
    unwatched = steps_of_guard(Spoil({4: 30.0}), spike_deviations=None)
    assert unwatched[0] == []
    assert apart(found, unwatched[2]) == []
    assert steps_of_guard(Spoil({4: 30.0}), spike_after=5)[0] == []
    assert steps_of_guard(Spoil({4: 30.0}), spike_deviations=1e6)[0] == []


def test_a_spike_can_be_skipped_or_stop_the_run():
    *_, found, (text,) = steps_of_guard(Spoil({4: 30.0}), on_spike="skip")
    assert text.endswith("It was skipped, 1 in a row so far.")
    wanted = steps_of_guard(None, numbers=range(5))[2]  # all batches are the same
    assert apart(found, wanted) == []
    with pytest.raises(TrainingError, match=r"^In step 4 .* the loss is .* above its running mean of .*Nothing was up"):
        steps_of_guard(Spoil({4: 30.0}), on_spike="stop")


def test_statistics_go_on_after_a_resume_in_the_middle(tmp_path):
    _, whole, *_ = steps_of_guard(Spoil({4: 30.0}), tmp_path)
    middle = tmp_path / "step=4.ckpt"
    # A plain loader begins anew: what comes first is the batch behind the checkpoint.
    warned, resumed, *_ = steps_of_guard(Spoil({4: 30.0}), None, middle, numbers=[4, 5, 0, 0, 0, 0])
    assert warned == [4]
    assert resumed.state_dict() == whole.state_dict()
    assert whole.state_dict()["watches"]["0"]["count"] == 5
    state = read_trainer_state(middle)["callbacks"]["NumberGuard"]
    assert json.loads(json.dumps(state)) == state
    assert state["watches"]["0"]["count"] == 4


def test_phases_with_losses_of_their_own_are_watched_apart():
    guard = NumberGuard()
    fit("ddp, gates", range(4), guard=guard)  # warm-up, gates, exits, gates
    dist.destroy_process_group()  # one of one process, which other tests must not find
    counts = {phase: watch["count"] for phase, watch in guard.state_dict()["watches"].items()}
    assert counts == {"0": 1, "1": 2, "2": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_nonfinite": "warn"}, "guard.on_nonfinite='warn' is not known."),
        ({"on_spike": "ignore"}, "guard.on_spike='ignore' is not known."),
        ({"spike_deviations": 0.0}, "guard.spike_deviations=0.0."),
        ({"spike_after": 0}, "guard.spike_after=0."),
        ({"max_skips": 0}, "guard.max_skips=0."),
        ({"max_rewinds": 0}, "guard.max_rewinds=0."),
    ],
)
def test_settings_out_of_their_range(settings, message):
    with pytest.raises(ConfigError) as caught:
        NumberGuard(**settings)
    assert caught.value.message == message


class Overflow(Callback):
    """Makes a gradient infinite in one batch of a run from the command line.

    Args:
        batch: its number.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_after_backward(self, trainer, module):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            module.model.exits["1"].norm.weight.grad[0] = float("inf")


def test_the_command_line_stops_with_the_rows_and_goes_on_skipping(tmp_path, capsys):
    base = write_run(tmp_path)
    spoilt = json.dumps([{"class_path": f"{__name__}.Overflow", "init_args": {"batch": 1}}])
    words = ["fit", "-c", str(base), "--trainer.limit_val_batches", "0", "--trainer.callbacks", spoilt]
    assert main(words) == 1
    error = capsys.readouterr().err
    from eetrain.data.sampling import epoch_order

    rows = ", ".join(map(str, epoch_order(24, 0, 0)[4:8].tolist()))
    assert f"error: In step 1 (epoch 0, batch 1; on rank 0 rows {rows}) the gradient of model.exits.1.norm" in error
    assert "HINT: Look at these data; go on with --resume auto and --guard.on_nonfinite skip or rewind" in error
    assert main([*words, "--resume", "auto", "--guard.on_nonfinite", "skip"]) == 0
    state = read_trainer_state(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 4


def test_a_fit_without_checkpoints_is_guarded_too(tmp_path, capsys):
    base = write_run(tmp_path)
    spoilt = json.dumps([{"class_path": f"{__name__}.Overflow", "init_args": {"batch": 0}}])
    words = ["fit", "-c", str(base), "--trainer.enable_checkpointing", "false", "--trainer.callbacks", spoilt]
    assert main(words) == 1
    assert "though every loss term is. Nothing was updated.\n" in capsys.readouterr().err
