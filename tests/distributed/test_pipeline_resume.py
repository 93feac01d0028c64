"""Checkpoints of pipelines: resumed bitwise at their size, closely at any other, and exported to equal folders."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from eetrain.checkpoints.export import export_run
from eetrain.testing.processes import run_on_processes
from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_folder import CheckpointFolder
from eetrain.training.command import RunCLI

OVERLAY = Path(__file__).parents[2] / "configs" / "strategy" / "pipeline.yaml"
# 24 rows, 4 a step, make an epoch of 6 steps: all of it happens inside an epoch.
COURSE = [
    *("--trainer.max_steps", "4", "--trainer.gradient_clip_val", "1", "--trainer.num_sanity_val_steps", "0"),
    *("--model.optimizer.lr", "0.01", "--model.optimizer.eps", "1e-2", "--trainer.limit_val_batches", "0"),
    *("--model.optimizer.schedule", "cosine", "--model.optimizer.warmup_steps", "2"),
    *("--checkpoint.every_n_train_steps", "2", "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{step}"),
]
STRATEGY = "--trainer.strategy."
PLAIN = [f"{STRATEGY}micro_batches=2"]
# Step 0 is the warm-up, 1 and 2 are the gates' turn: a run resumed after step 2 is inside it.
JOINT_GATING = [
    *("--model.exits.gates.cost_weights", "[0.3,1]", "--model.objective", "eetrain.objectives.JointGating"),
    *("--model.objective.warmup_steps", "1", "--model.objective.phase_steps", "2"),
]
GATING = [*JOINT_GATING, *PLAIN]
RANDOM_DEPTHS = [
    *("--model.exits.layers", "[]", "--model.objective", "eetrain.objectives.SkipDecode"),
    *("--model.objective.schedule", "skipdecode:speed=2,length=8", "--model.objective.train_depth", "random"),
    *("--model.objective.speeds", "[1.2,2]", "--model.objective.prompt_tokens", "2", f"{STRATEGY}micro_batches=2"),
]
ONE_EXIT = ["--model.exits.layers", "[1]"]  # so that the last stage has fewer groups of parameters than the first
ZERO = [*PLAIN, *ONE_EXIT, f"{STRATEGY}zero_stage=1"]
NARROW = [*ZERO, f"{STRATEGY}precision=bfloat16"]
LORA = [*PLAIN, "--model.tuning", "lora", "--model.lora.dropout", "0.2"]
FROZEN = [
    *PLAIN,
    *("--model.tuning", "frozen", "--model.objective", "eetrain.objectives.EETuning", "--model.exits.head", "mlp"),
]
DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


class SaveAtStart(Callback):
    """Write again what was read.

    Args:
        path: of the folder to write.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer, module):
        trainer.save_checkpoint(self.path)


def write_base(folder, **changes):
    """A model with tied embeddings and learned positions."""
    folder.mkdir()
    base = write_run(folder, "gpt2")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | changes))
    return base


def fit(base, run, processes, stages, *settings):
    """``eetrain fit`` into the folder ``run`` beside ``base``."""
    size = [f"--trainer.devices={processes}", f"{STRATEGY}stages={stages}"]
    size += [f"--data.batch_size={4 * stages // processes}", f"--run={base.parent / run}"]
    RunCLI(["fit", "-c", str(base), "-c", str(OVERLAY), *COURSE, *size, *map(str, settings)])


def step(base, run, number):
    return base.parent / run / "checkpoints" / f"step={number}.ckpt"


def resume(base, run, processes, stages, of, *settings):
    """The last two steps of the run ``of`` once more; what was read is written again first."""
    again = json.dumps(
        [{"class_path": f"{__name__}.SaveAtStart", "init_args": {"path": str(base.parent / run / "read")}}]
    )
    more = ["--ckpt_path", of, "--seed_everything", 99, "--trainer.callbacks", again]
    fit(base, run, processes, stages, *settings, *more)


def last(base, run):
    return CheckpointFolder.open(base.parent / run / "checkpoints" / "last.ckpt")


PARTS = ("global_step", "lr_schedulers", "eetrain", "CausalLMDataModule", "hyper_parameters", "loops")


def assert_same(one, two, tolerance=0.0, parts=PARTS):
    """Weights, moments and progress of two checkpoint folders."""
    assert one.names == two.names
    for name in one.names:
        found, wanted = one.tensor(name), two.tensor(name)
        assert found.dtype == wanted.dtype, name
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    states = [folder.trainer_state() for folder in (one, two)]
    for part in parts:
        assert states[0][part] == states[1][part], part


def assert_read_whole(base, run, of):
    """What ``run`` wrote at once is bitwise what it had read: at no size is a part of the state left behind."""
    # Lightning's own progress has moved on to the next epoch where the checkpoint ends one.
    assert_same(CheckpointFolder.open(base.parent / run / "read"), CheckpointFolder.open(of), parts=PARTS[:-1])


def two_processes(dry, wet):
    """Every fit of the default tests: with dropout for what is bitwise, and without for another size."""
    for run, settings in (("gating", GATING), ("random", RANDOM_DEPTHS)):
        fit(wet, run, 2, 2, *settings)
        resume(wet, f"{run}-again", 2, 2, step(wet, run, 2), *settings)
    fit(dry, "plain", 2, 2, *PLAIN)
    resume(dry, "plain-1x2", 2, 1, step(dry, "plain", 2), *PLAIN)
    return {verb: score(verb, wet, "gating", "-c", OVERLAY, "--trainer.devices=2") for verb in ("validate", "test")}


def score(verb, base, run, *settings):
    """Metrics of a run's last checkpoint."""
    checkpoint = base.parent / run / "checkpoints" / "last.ckpt"
    scored = RunCLI([verb, "-c", str(base), "--ckpt_path", str(checkpoint), *JOINT_GATING, *map(str, settings)])
    return {name: float(value) for name, value in scored.trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    dry, wet = write_base(folder / "dry"), write_base(folder / "wet", **DROPOUT)
    return dry, wet, run_on_processes(two_processes, 2, dry, wet, timeout=300)


@pytest.mark.parametrize("run", ["gating", "random"])
def test_two_stages_resume_bitwise_in_the_middle_of_an_epoch_with_dropout(runs, run):
    _, wet, _ = runs
    whole, middle = last(wet, run), CheckpointFolder.open(step(wet, run, 2))
    assert whole.topology == {"stages": 2, "replicas": 1, "zero_stage": 0}
    assert (middle.global_step, whole.global_step) == (2, 4)
    assert_same(last(wet, f"{run}-again"), whole)
    assert_read_whole(wet, f"{run}-again", step(wet, run, 2))
    weight = "model.backbone.transformer.h.3.mlp.c_fc.weight"
    assert not torch.equal(middle.tensor(weight), whole.tensor(weight)), "a test of runs that stand would prove nothing"
    assert whole.tensor(f"optimizer/step/{weight}") == (2 if run == "gating" else 4)


def test_gates_were_in_the_middle_of_their_turn(runs):
    _, wet, _ = runs
    gate = "model.gates.1.output.weight"
    begun, done = CheckpointFolder.open(step(wet, "gating", 2)), last(wet, "gating")
    steps = [folder.tensor(f"optimizer/step/{gate}") for folder in (begun, done)]
    assert steps == [1, 2], "one of two steps of their turn"
    assert not torch.equal(begun.tensor(gate), done.tensor(gate))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_stages_score_a_checkpoint_as_one_process_does(runs, verb):
    _, wet, scores = runs
    wanted = score(verb, wet, "gating")
    prefix = "val" if verb == "validate" else "test"
    assert {f"{prefix}/nll/exit_1", f"{prefix}/ece/full", f"{prefix}/gate/0.3/depth"} <= wanted.keys()
    for of_process in scores:
        assert of_process[verb] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_one_stage_and_two_replicas_go_on_where_two_stages_stopped(runs):
    dry, _, _ = runs
    whole, moved = last(dry, "plain"), last(dry, "plain-1x2")
    assert moved.topology == {"stages": 1, "replicas": 2, "zero_stage": 0}
    assert_read_whole(dry, "plain-1x2", step(dry, "plain", 2))
    assert_same(moved, whole, 1e-6)


def four_processes(dry, wet):
    """Two stages twice: whole runs, and their second halves again."""
    for run, base, settings in (
        ("plain", dry, PLAIN),
        ("zero", dry, ZERO),
        ("wet", wet, ZERO),
        ("narrow", wet, NARROW),
    ):
        fit(base, f"2x2-{run}", 4, 2, *settings)
        resume(base, f"2x2-{run}-again", 4, 2, step(base, f"2x2-{run}", 2), *settings)
    fit(dry, "2x2-gating", 4, 2, *GATING)


def two_processes_after_four(dry, wet):
    """One replica goes on where two stopped, with its whole optimizer where theirs was shared out."""
    for run, base, settings in (("plain", dry, PLAIN), ("zero", dry, [*PLAIN, *ONE_EXIT]), ("gating", dry, GATING)):
        resume(base, f"pp2-{run}", 2, 2, step(base, f"2x2-{run}", 2), *settings)
    for run, settings in (("lora", LORA), ("frozen", FROZEN), ("bf16", NARROW[:-2] + NARROW[-1:])):
        fit(wet, run, 2, 2, *settings)
        resume(wet, f"{run}-again", 2, 2, step(wet, run, 2), *settings)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    dry, wet = write_base(folder / "dry"), write_base(folder / "wet", **DROPOUT)
    run_on_processes(four_processes, 4, dry, wet, timeout=600)
    run_on_processes(two_processes_after_four, 2, dry, wet, timeout=600)
    return dry, wet


@pytest.mark.slow
@pytest.mark.parametrize("run", ["2x2-plain", "2x2-zero"])
def test_replicas_of_stages_resume_bitwise(more_runs, run):
    dry, _ = more_runs
    assert last(dry, run).topology == {"stages": 2, "replicas": 2, "zero_stage": int(run == "2x2-zero")}
    assert_same(last(dry, f"{run}-again"), last(dry, run))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["2x2-wet", "2x2-narrow", "lora", "frozen", "bf16"])
def test_runs_with_dropout_resume_bitwise(more_runs, run):
    _, wet = more_runs
    whole = last(wet, run)
    assert_same(last(wet, f"{run}-again"), whole)
    assert_read_whole(wet, f"{run}-again", step(wet, run, 2))
    assert any(name.startswith("optimizer/master/") for name in whole.names) == (run in ("2x2-narrow", "bf16"))
    assert ("model.backbone.transformer.wte.weight" in whole.names) == (run not in ("lora", "frozen"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["plain", "zero", "gating"])
def test_one_replica_goes_on_where_two_stopped(more_runs, run):
    dry, _ = more_runs
    assert_read_whole(dry, f"pp2-{run}", step(dry, f"2x2-{run}", 2))
    assert last(dry, f"pp2-{run}").topology == {"stages": 2, "replicas": 1, "zero_stage": 0}
    assert_same(last(dry, f"pp2-{run}"), last(dry, f"2x2-{run}"), 1e-6)


@pytest.mark.slow
def test_two_then_three_then_one_stage_are_two_stages_throughout(tmp_path):
    """Into the second epoch; the last change of size is where an epoch ends. Exports are equal, too."""
    base, longer = write_base(tmp_path / "base"), [*PLAIN, "--trainer.max_steps", "8"]
    run_on_processes(fit, 2, base, "pp2", 2, 2, *longer)
    run_on_processes(resume, 3, base, "pp3", 3, 3, step(base, "pp2", 2), *longer)
    run_on_processes(resume, 1, base, "pp1", 1, 1, step(base, "pp3", 6), *longer)
    assert last(base, "pp1").global_step == 8
    assert last(base, "pp1").topology == {"stages": 1, "replicas": 1, "zero_stage": 0}
    for run, of in (("pp3", step(base, "pp2", 2)), ("pp1", step(base, "pp3", 6))):
        assert_read_whole(base, run, of)
        assert exported(base.parent / run / "read", tmp_path / "again") == exported(of, tmp_path / "once")
        assert_same(last(base, run), last(base, "pp2"), 5e-6, PARTS[:-1])
    folders = {run: exported(base.parent / run, tmp_path / run) for run in ("pp1", "pp2", "pp3")}
    files = [name for name in folders["pp2"] if name.endswith(".safetensors")]
    assert len(files) == 2
    for run in ("pp1", "pp3"):
        assert folders[run].keys() == folders["pp2"].keys()
        for name in files:
            one, two = (load_file(tmp_path / size / name) for size in (run, "pp2"))
            assert one.keys() == two.keys()
            for key in two:
                torch.testing.assert_close(one[key], two[key], rtol=0, atol=5e-6)


def exported(run, out):
    """The bytes of every file of an exported folder; its logits have been compared with the run's by then."""
    folder = export_run(run, out)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
