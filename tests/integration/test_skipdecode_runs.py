"""SkipDecode from the command line: train, resume, export, generate and evaluate with one schedule."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eetrain import MultiExitModel
from eetrain.cli import main
from eetrain.testing.runs import write_run

OVERLAY = Path(__file__).parents[2] / "configs" / "objective" / "skipdecode.yaml"
POLICY = "skipdecode:max=3,min=2,length=6"
RANDOM = ["--model.objective.train_depth", "random", "--model.objective.speeds", "[1,2]"]
PACKED = ["--data.packing", "true", "--data.max_length", "24"]


def fit(base, *settings):
    schedule = ["--model.objective.schedule", POLICY, "--model.objective.prompt_tokens", "2"]
    return main(["fit", *map(str, ["-c", base, "-c", OVERLAY, *schedule, *settings])])


def load(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("packing", [[], PACKED])
def test_a_resumed_run_with_random_depths_is_bitwise_the_uninterrupted_one(tmp_path, packing):
    base = write_run(tmp_path)
    kept = ["--checkpoint.every_n_train_steps", 2, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "{step}"]
    course = [*RANDOM, *packing, *kept, "--data.batch_size", 2, "--model.optimizer.lr", 0.01]
    assert fit(base, *course) == 0
    middle = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    assert fit(base, *course, "--run", tmp_path / "again", "--ckpt_path", middle, "--seed_everything", 99) == 0
    whole, resumed = load(tmp_path / "run"), load(tmp_path / "again")
    assert whole["global_step"] == 4
    assert_same(whole["state_dict"], resumed["state_dict"])
    assert fit(base, *course[len(RANDOM) :], "--run", tmp_path / "fixed") == 0
    name = "model.backbone.model.layers.1.mlp.up_proj.weight"
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    fixed = load(tmp_path / "fixed")["state_dict"][name]
    assert torch.equal(fixed, start[name.removeprefix("model.backbone.")]), "depth 3 and warmup 1 never run block 2"
    assert not torch.equal(whole["state_dict"][name], fixed), "random depths run it at times"


def test_the_loss_logged_is_that_of_the_schedule(tmp_path, capsys):
    """Validation of a trained run, computed again from the exported folder with the objective's own graph."""
    base = write_run(tmp_path)
    assert fit(base, *RANDOM, "--json") == 0
    printed = capsys.readouterr()
    assert f"Validation, under {POLICY}" in printed.err, "the row of the table is not the full depth here"
    logged = json.loads(printed.out)["metrics"]["val/nll/full"]
    model = MultiExitModel.from_pretrained(exported(tmp_path)).eval()
    total, count = 0.0, 0
    for line in (tmp_path / "eval.jsonl").read_text().splitlines():
        ids = encoded(tmp_path, json.loads(line)["text"])
        depths = [3] * 3 + [max(2, int(3 - t / 5 + 0.5)) for t in range(1, ids.shape[1])]
        active = torch.tensor([[block <= 1 or block > 4 - (n - 1) for n in depths] for block in range(1, 5)])
        with torch.no_grad():
            logits = model.logits(model(ids, active_LBT=active[:, None, : ids.shape[1]]))
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert logged == pytest.approx(total / count, rel=1e-5)


def exported(tmp_path) -> Path:
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--policy", POLICY]) == 0
    return out


def encoded(tmp_path, text):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"]
    return torch.tensor([[1, *ids, 2]])


def test_an_exported_run_generates_and_is_evaluated_under_its_schedule(tmp_path, capsys):
    base = write_run(tmp_path)
    assert fit(base) == 0
    out = exported(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.exit_policy == POLICY
    capsys.readouterr()
    words = ["--prompt", '["the cat", "a big red house"]', "--max_new_tokens", "7", "--json"]
    assert main(["generate", str(out), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["generate", str(out), *words, "--policy", POLICY]) == 0
    named = json.loads(capsys.readouterr().out)
    assert named["generations"] == found["generations"], "the stored policy is the default"
    for row in found["generations"]:
        # The prompt's depth, then 3 - t / 5 rounded half up: 3, 2.8, 2.6, 2.4, 2.2, 2.
        assert row["depths"] == [3, 3, 3, 3, 2, 2, 2][: len(row["depths"])]
        assert len(row["depths"]) > 4
    flags = ["--data", str(tmp_path / "eval.jsonl"), "--prompt_tokens", "2", "--max_new_tokens", "5", "--repeats", "0"]
    assert main(["evaluate", str(out), *flags, "--policies", f"never,{POLICY}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["policies"]
    assert [row["policy"] for row in rows] == ["never", POLICY]
    assert rows[1]["mean_depth"] < rows[0]["mean_depth"] == 4


def test_exits_are_refused_before_training(tmp_path, capsys):
    base = write_run(tmp_path)
    assert fit(base, "--model.exits.layers", "[1]") == 2
    error = capsys.readouterr().err
    assert "SkipDecode trains the last block's output only, but there are exits after blocks [1]." in error
    assert "HINT: Set model.exits.layers=[]." in error


def test_16_bit_training_runs_partially_too(tmp_path, capsys):
    losses = []
    base = write_run(tmp_path)
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        run = ["--run", tmp_path / precision, "--trainer.precision", precision, "--json"]
        assert fit(base, *RANDOM, *run) == 0
        losses.append(json.loads(capsys.readouterr().out)["metrics"]["train/loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-2)
