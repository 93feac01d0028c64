"""A pipeline of three loses its middle stage: rebuilt at any size, or an older checkpoint; off by default."""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from eetrain.errors import CheckpointError
from eetrain.parallel.rebuilding import RECORD
from eetrain.testing.processes import run_on_processes
from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_folder import CheckpointFolder
from eetrain.training.checkpoint_manifest import writer_of
from eetrain.training.command import RunCLI

pytestmark = pytest.mark.slow
OVERLAY = Path(__file__).parents[2] / "configs" / "strategy" / "pipeline.yaml"
STRATEGY = "--trainer.strategy."
COURSE = [
    *("--trainer.gradient_clip_val", "1", "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"),
    *("--model.optimizer.lr", "0.01", "--model.optimizer.schedule", "cosine", "--model.optimizer.schedule_steps", "40"),
    *("--checkpoint.every_n_train_steps", "2", "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{step}"),
    *(f"{STRATEGY}micro_batches=2", "--trainer.log_every_n_steps", "1", "--model.exits.layers", "[1,3,6]"),
]
ZERO = [f"{STRATEGY}zero_stage=1"]
BLOCKS = "model.backbone.model.layers."


class Notes(Callback):
    """Losses and rates of all steps, and what was read, written again.

    Args:
        path: where that goes.
    """

    def __init__(self, path):
        self.path, self.losses, self.rates = path, [], []

    def on_train_start(self, trainer, module):
        trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *args):
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.losses.append(found["train/loss"])
        self.rates.append({name: rate for name, rate in found.items() if name.startswith("train/lr/")})


def fit(base, run, processes, stages, steps, *settings):
    """``eetrain fit`` into the folder ``run`` beside ``base``; what the callback noted, and warnings of checkpoints."""
    notes = [{"class_path": f"{__name__}.Notes", "init_args": {"path": str(base.parent / run / "read")}}]
    size = [f"--trainer.devices={processes}", f"{STRATEGY}stages={stages}", "--trainer.max_steps", str(steps)]
    size += [f"--data.batch_size={4 * stages // processes}", "--trainer.callbacks", json.dumps(notes)]
    words = ["fit", "-c", str(base), "-c", str(OVERLAY), *COURSE, *size, f"--run={base.parent / run}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli = RunCLI([*words, *map(str, settings)])
    said = [text for one in caught if "Stage " in (text := str(one.message)) or "damaged" in text]
    (kept,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Notes))
    return {"losses": kept.losses, "rates": kept.rates}, said


def refused(*arguments):
    with pytest.raises(CheckpointError) as caught:
        fit(*arguments)
    return caught.value.message


def begun(base):
    """Three stages, plain and with two replicas' worth of ZeRO settings on one."""
    return fit(base, "plain", 3, 3, 8), fit(base, "zero", 3, 3, 4, *ZERO)


def resumed(base):
    """What three processes make of the checkpoint of 8 steps without its middle stage, and of a request."""
    wanted, lost = checkpoint(base, "plain", 8), ["--ckpt_path", checkpoint(base, "hurt", "last")]
    found = {
        "whole": fit(base, "whole", 3, 3, 24, "--ckpt_path", wanted),
        "lost": fit(base, "lost", 3, 3, 24, *lost, f"{STRATEGY}rebuild=lost"),
        "never": fit(base, "never", 3, 3, 9, *lost),
        "asked": fit(base, "asked", 3, 3, 12, "--ckpt_path", wanted, f"{STRATEGY}rebuild=[1]"),
        "once": fit(base, "once", 3, 3, 13, "--ckpt_path", checkpoint(base, "asked", 12), f"{STRATEGY}rebuild=[1]"),
        "after": fit(base, "after", 3, 3, 13, "--ckpt_path", checkpoint(base, "asked", 12)),
        "zero": fit(
            base, "zero-again", 3, 3, 6, *ZERO, "--ckpt_path", checkpoint(base, "zero", 4), f"{STRATEGY}rebuild=[1]"
        ),
    }
    found["first"] = refused(base, "no", 3, 3, 9, "--ckpt_path", wanted, f"{STRATEGY}rebuild=[0]")
    return found


def one_process(base):
    """One stage where three were; the second time the first stage is lost, and only older checkpoints are left."""
    settings = ["--ckpt_path", checkpoint(base, "hurt", "last"), f"{STRATEGY}rebuild=lost"]
    found = {"lost": fit(base, "pp1", 1, 1, 10, *settings)}
    settings[1] = checkpoint(base, "headless", "last")
    found["headless"] = fit(base, "pp1-headless", 1, 1, 9, *settings)
    return found


def checkpoint(base, run, step):
    return base.parent / run / "checkpoints" / (f"step={step}.ckpt" if isinstance(step, int) else f"{step}.ckpt")


def lose(base, run, rank):
    """A copy of the plain run whose ``last.ckpt`` lacks a process's files, as does the other one of that step."""
    shutil.copytree(base.parent / "plain", base.parent / run)
    for name in ("last", 8):
        for path in checkpoint(base, run, name).glob(f"weights-{rank:02d}-*"):
            path.unlink()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "base"
    folder.mkdir()
    base = write_run(folder, "llama", num_hidden_layers=6)
    base = base.rename(folder.parent / "base.yaml")
    run_on_processes(begun, 3, base, timeout=240)
    lose(base, "hurt", 1)
    lose(base, "headless", 0)
    three = run_on_processes(resumed, 3, base, timeout=400)
    return base, three, run_on_processes(one_process, 1, base, timeout=240)[0]


def stage_of(folder):
    return {name: writer_of(file) for name, file in folder.manifest.tensors.items()}


def by_hand(whole, name):
    """The middle stage's tensor from its neighbours; the sizes of all stages are those of the manifest."""
    stages = stage_of(whole)
    blocks = [
        sorted(
            {
                int(key.removeprefix(BLOCKS).split(".")[0])
                for key in stages
                if key.startswith(BLOCKS) and stages[key] == s
            }
        )
        for s in range(3)
    ]
    number, _, rest = name.removeprefix(BLOCKS).partition(".")
    place = (blocks[1].index(int(number)) + 0.5) / len(blocks[1])
    before, after = (
        whole.tensor(f"{BLOCKS}{side[math.floor(place * len(side))]}.{rest}") for side in (blocks[0], blocks[2])
    )
    one, two = (norm + 1e-4 for norm in whole.manifest.gradient_norms[::2])
    return (one * before.double() + two * after.double()) / (one + two)


def assert_rebuilt(read, whole):
    """Weights of the middle stage by the formula and without moments, everything else bitwise."""
    stages, rebuilt = stage_of(whole), []
    for name in sorted(whole.names):
        if stages[name] != 1:
            assert torch.equal(read.tensor(name), whole.tensor(name)), name
        elif name.startswith("optimizer/step/"):
            assert read.tensor(name) == 0 < whole.tensor(name)
        elif name.startswith("optimizer/"):
            assert name not in read.names or not read.tensor(name).any(), name
        elif name.startswith(BLOCKS):
            torch.testing.assert_close(read.tensor(name), by_hand(whole, name).float(), rtol=0, atol=1e-7)
            rebuilt.append(name)
        else:
            # Exits 1, 3 and 6 are on one stage each: the nearest to the middle one is the first.
            assert torch.equal(read.tensor(name), whole.tensor(name.replace("exits.3", "exits.1"))), name
            assert not torch.equal(read.tensor(name), whole.tensor(name)), name
            rebuilt.append(name)
    assert f"{BLOCKS}2.mlp.up_proj.weight" in rebuilt
    assert "model.exits.3.norm.weight" in rebuilt


def test_what_a_checkpoint_records(runs):
    base, _, _ = runs
    whole = CheckpointFolder.open(checkpoint(base, "plain", 8))
    norms = whole.manifest.gradient_norms
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)
    assert sum(norm**2 for norm in norms) <= 1, "clipped to 1 together"
    assert RECORD not in whole.trainer_state()
    content = json.loads((whole.path / "manifest.json").read_text())
    assert content["gradient_norms"] == norms
    zero = CheckpointFolder.open(checkpoint(base, "zero", 4)).manifest.gradient_norms
    same = CheckpointFolder.open(checkpoint(base, "plain", 4)).manifest.gradient_norms
    assert zero == pytest.approx(same, rel=1e-4), "ZeRO's flat pieces hold the same gradient"


@pytest.mark.parametrize("run", ["lost", "pp2", "pp1"])
def test_a_lost_stage_is_rebuilt_on_any_number_of_stages(runs, run):
    base, _, _ = runs
    if run == "pp2":
        settings = ["--ckpt_path", checkpoint(base, "hurt", "last"), f"{STRATEGY}rebuild=lost"]
        run_on_processes(fit, 2, base, run, 2, 2, 10, *settings, timeout=240)
    whole = CheckpointFolder.open(checkpoint(base, "plain", 8))
    assert_rebuilt(CheckpointFolder.open(base.parent / run / "read"), whole)
    assert CheckpointFolder.open(checkpoint(base, run, "last")).global_step > 8


def test_training_goes_on_and_the_loss_falls(runs):
    _, three, _ = runs
    (lost, _), (whole, _) = three[0]["lost"], three[0]["whole"]
    assert len(lost["losses"]) == len(whole["losses"]) == 16
    assert lost["losses"][0] != whole["losses"][0]
    assert sum(lost["losses"][-4:]) < sum(lost["losses"][:4])


def test_it_is_told_once_with_weights(runs):
    base, three, alone = runs
    whole = CheckpointFolder.open(checkpoint(base, "plain", 8))
    one, two = (norm + 1e-4 for norm in whole.manifest.gradient_norms[::2])
    stages = stage_of(whole)
    own = {
        int(name.removeprefix(BLOCKS).split(".")[0]) + 1
        for name in whole.names
        if name.startswith(BLOCKS) and stages[name] == 1
    }
    account = (
        f"Stage 1 is rebuilt: blocks {min(own)}-{max(own)} from stages 0 and 2 with weights {one / (one + two):.3f} "
        f"and {two / (one + two):.3f}; exit 3 from exit 1. The optimizer's state of what was rebuilt is reset, its "
        "learning rate multiplied by 1.1 from now on."
    )
    last = checkpoint(base, "hurt", "last")
    for _, said in (three[0]["lost"], alone["lost"]):
        assert said == [f"{last} is damaged: weights-01-00.safetensors is missing. {account}"]
    assert three[0]["asked"][1] == [f"{checkpoint(base, 'plain', 8)} is at step 8. {account}"]
    assert [result["lost"][1] for result in three[1:]] == [[], []]


def test_off_by_default_an_older_checkpoint_is_used(runs):
    base, three, _ = runs
    kept, said = three[0]["never"]
    assert said == [
        f"{checkpoint(base, 'hurt', 'last')} is damaged: weights-01-00.safetensors is missing. Going on from "
        f"{checkpoint(base, 'hurt', 6)} at step 6 instead; 2 steps are lost."
    ]
    assert len(kept["losses"]) == 3
    read, older = (
        CheckpointFolder.open(path) for path in (base.parent / "never" / "read", checkpoint(base, "plain", 6))
    )
    assert all(torch.equal(read.tensor(name), older.tensor(name)) for name in older.names)


def test_the_first_stage_is_not_rebuilt(runs):
    base, three, alone = runs
    reason = (
        "Stage 0 cannot be rebuilt: embedding, final norm and output matrix are on the first and the last stage, and "
        "no stage beside them holds their like."
    )
    assert three[0]["first"] == three[2]["first"] == reason
    assert alone["headless"][1] == [
        f"{checkpoint(base, 'headless', 'last')} is damaged: weights-00-00.safetensors is missing. {reason} Going on "
        f"from {checkpoint(base, 'headless', 6)} at step 6 instead; 2 steps are lost."
    ]


def test_a_request_is_met_once_and_its_rate_survives(runs):
    base, three, _ = runs
    whole, asked = (
        CheckpointFolder.open(checkpoint(base, "plain", 8)),
        CheckpointFolder.open(base.parent / "asked" / "read"),
    )
    assert_rebuilt(asked, whole)
    after = CheckpointFolder.open(checkpoint(base, "asked", 12))
    for run in ("once", "after"):
        read = CheckpointFolder.open(base.parent / run / "read")
        assert read.names == after.names
        assert all(torch.equal(read.tensor(name), after.tensor(name)) for name in after.names)
        assert three[0][run][1] == []
        rates = three[0][run][0]["rates"][0]
        assert rates["train/lr/backbone_rebuilt"] == pytest.approx(1.1 * rates["train/lr/backbone"])
        assert rates["train/lr/exits_rebuilt"] == pytest.approx(1.1 * rates["train/lr/exits"])
    plain = three[0]["whole"][0]["rates"]
    assert not any("rebuilt" in name for name in plain[0])
    of_asked = three[0]["asked"][0]["rates"]
    assert [r["train/lr/backbone"] for r in of_asked] == pytest.approx([r["train/lr/backbone"] for r in plain[:4]])
    record = after.trainer_state()[RECORD]
    assert record["asked"] == [1]
    stages = stage_of(whole)
    assert record["names"] == sorted(n for n in whole.names if stages[n] == 1 and not n.startswith("optimizer/"))


def test_moments_under_zero_begin_anew_as_well(runs):
    base, _, _ = runs
    whole, read = (
        CheckpointFolder.open(checkpoint(base, "zero", 4)),
        CheckpointFolder.open(base.parent / "zero-again" / "read"),
    )
    assert_rebuilt(read, whole)
    done = CheckpointFolder.open(checkpoint(base, "zero-again", "last"))
    name = f"{BLOCKS}2.mlp.up_proj.weight"
    assert done.tensor(f"optimizer/step/{name}") == 2
    assert not torch.equal(done.tensor(name), read.tensor(name))
    assert done.tensor(f"optimizer/step/{BLOCKS}0.mlp.up_proj.weight") == 6


NARROW = [*ZERO, f"{STRATEGY}precision=bfloat16"]
LORA = ["--model.tuning", "lora"]


def other_runs(base):
    """A request to a run with masters and one with adapters."""
    asked = f"{STRATEGY}rebuild=[1]"
    for run, settings in (("narrow", NARROW), ("lora", LORA)):
        fit(base, run, 3, 3, 4, *settings)
        fit(base, f"{run}-again", 3, 3, 6, *settings, "--ckpt_path", checkpoint(base, run, 4), asked)


def test_masters_are_averaged_and_adapters_begin_anew(tmp_path):
    (tmp_path / "model").mkdir()
    base = write_run(tmp_path / "model", "llama", num_hidden_layers=6).rename(tmp_path / "base.yaml")
    run_on_processes(other_runs, 3, base, timeout=400)
    whole, read = (
        CheckpointFolder.open(path) for path in (checkpoint(base, "narrow", 4), tmp_path / "narrow-again" / "read")
    )
    assert all(norm > 0 for norm in whole.manifest.gradient_norms)
    name = f"{BLOCKS}2.mlp.up_proj.weight"
    one, two = (norm + 1e-4 for norm in whole.manifest.gradient_norms[::2])
    before, after = (whole.tensor(f"optimizer/master/{BLOCKS}{block}.mlp.up_proj.weight") for block in (0, 4))
    wanted = (one * before.double() + two * after.double()) / (one + two)
    torch.testing.assert_close(read.tensor(f"optimizer/master/{name}"), wanted.float(), rtol=0, atol=1e-7)
    assert torch.equal(read.tensor(name), wanted.to(torch.float32).bfloat16())
    assert not read.tensor(f"optimizer/exp_avg/{name}").any()
    assert whole.tensor(f"optimizer/exp_avg/{name}").any()

    whole, read = (
        CheckpointFolder.open(checkpoint(base, "lora", 4)),
        CheckpointFolder.open(tmp_path / "lora-again" / "read"),
    )
    stages = stage_of(whole)
    adapters = [key for key in whole.names if "lora_B" in key and not key.startswith("optimizer/")]
    assert {stages[key] for key in adapters} == {0, 1, 2}
    for key in adapters:
        assert whole.tensor(key).any()
        assert torch.equal(
            read.tensor(key), torch.zeros_like(whole.tensor(key)) if stages[key] == 1 else whole.tensor(key)
        )
