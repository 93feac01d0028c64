"""A bad step is no step, and a run that went back is one that never saw what came between, on two processes."""

import pytest
from guard_support import NAN, NumberGuard, Spoil, SpoilGradient, apart, fit

from eetrain.errors import TrainingError
from eetrain.testing.processes import run_on_processes

QUICK = ["ddp", "pipeline"]
SLOW = ["zero1", "zero2", "zero3", "zero3, whole", "zero2, bf16", "zero3, bf16", "pipeline, bf16", "pipeline, zero1"]
GATES = ["ddp, gates", "zero3, gates", "pipeline, gates"]
DECLINE = {"schedule": "linear", "schedule_steps": 8, "warmup_steps": 1}


def skip_and_go_back(names, folder):
    """What differs from runs that never had the bad batch (skip), or any after the checkpoint up to it (rewind)."""
    found = {}
    for name in names:
        truth, _ = fit(name, [0, 1, 3])
        spoilt, _ = fit(name, range(4), guard=NumberGuard("skip"), spoil=Spoil({2: NAN}, rank=1))
        infinite, _ = fit(name, range(4), guard=NumberGuard("skip"), spoil=SpoilGradient(2, rank=1))
        # Factor 30 at an exit's head is a spike with finite gradients: engines have no check of their own for it.
        watching = NumberGuard(on_spike="skip", spike_deviations=6, spike_after=2)
        spiked, _ = fit(name, range(4), guard=watching, spoil=Spoil({2: 30.0}))
        wanted, _ = fit(name, [0, 1, 4, 5], optimizer=DECLINE)
        place = f"{folder}/{name}"
        guard = NumberGuard("rewind")
        back, trainer = fit(name, range(6), place, guard, Spoil({3: NAN}, rank=1), optimizer=DECLINE)
        found[name] = {
            "skipped": apart(spoilt, truth),
            "gradient": apart(infinite, truth),
            "spike": apart(spiked, truth),
            "back": apart(back, wanted),
            "steps": trainer.global_step,
            "moved": len(apart(truth, wanted)),
        }
    return found


def stop_and_go_on(names, folder):
    """The error of each process, and what differs between a run that stopped and went on and one that skipped."""
    found = {}
    for name in names:
        place, spoil = f"{folder}/{name}-stop", {2: NAN}
        with pytest.raises(TrainingError) as caught:
            fit(name, range(4), place, NumberGuard(), Spoil(spoil, rank=1))
        # A plain loader begins anew, so that the batch behind the bad one comes first.
        on, _ = fit(name, [3] * 4, place, NumberGuard("skip"), resume=f"{place}/last.ckpt")
        skipped, _ = fit(name, range(4), guard=NumberGuard("skip"), spoil=Spoil(spoil, rank=1))
        with pytest.raises(TrainingError) as of_gradient:
            fit(name, range(4), guard=NumberGuard(), spoil=SpoilGradient(1, rank=1))
        found[name] = (caught.value.message, of_gradient.value.message, apart(on, skipped))
    return found


def gates(names, folder):
    """The last step, in the turn of the gates or of the exits, is left out."""
    found = {}
    for name in names:
        for last in (2, 3):
            truth, _ = fit(name, range(last))
            spoilt, _ = fit(name, range(last + 1), guard=NumberGuard("skip"), spoil=Spoil({last: NAN}))
            found[name, last] = apart({key: spoilt[key] for key in truth}, truth), len(truth)
    return found


def quick_runs(folder):
    return skip_and_go_back(QUICK, folder), stop_and_go_on(["ddp", "pipeline"], folder)


def slow_runs(folder):
    return skip_and_go_back(SLOW, folder), stop_and_go_on(["zero2", "zero3"], folder), gates(GATES, folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_on_processes(quick_runs, 2, tmp_path_factory.mktemp("quick"), timeout=300)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return run_on_processes(slow_runs, 2, tmp_path_factory.mktemp("slow"), timeout=900)


def check(of_ranks, name):
    for found, *_ in of_ranks:
        assert found[name].pop("moved") > 0, "a test of runs that are equal anyway would prove nothing"
        assert found[name] == {"skipped": [], "gradient": [], "spike": [], "back": [], "steps": 4}


def check_stop(of_ranks, name):
    texts = {found[name][0] for _, found, *_ in of_ranks}
    assert len(texts) == 1, "all processes say the same"
    (text,) = texts
    assert text.startswith("In step 2 (epoch 0, batch 2; on rank 1) ce/exit_3 is not finite. Nothing was updated; ")
    assert text.endswith("last.ckpt holds the run before that step.")
    for _, found, *_ in of_ranks:
        _, of_gradient, different = found[name]
        assert of_gradient == (
            "In step 1 (epoch 0, batch 1; on rank 0; on rank 1) the gradient of model.exits.3.norm.weight is not "
            "finite, though every loss term is. Nothing was updated."
        )
        assert different == []


@pytest.mark.parametrize("name", QUICK)
def test_a_bad_step_is_none_and_a_rewound_run_is_one_without_the_bad_batches(quick, name):
    check(quick, name)


@pytest.mark.parametrize("name", ["ddp", "pipeline"])
def test_a_stop_names_term_rank_and_batch_and_can_be_gone_on_from(quick, name):
    check_stop(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_it_is_so_under_every_engine_and_precision(slow, name):
    check(slow, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_stop_under_zero(slow, name):
    check_stop(slow, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("last", [2, 3])
def test_bad_steps_in_the_turns_of_gates_and_exits(slow, name, last):
    for *_, found in slow:
        different, count = found[name, last]
        assert count > 10
        assert different == []
