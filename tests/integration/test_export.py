"""`eetrain export`: what a run trained is what the folder holds, for every way of training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eetrain import ExitConfig, MultiExitModel
from eetrain.checkpoints.export import export_run, read_lightning_checkpoint
from eetrain.cli import main
from eetrain.errors import CheckpointError
from eetrain.testing.runs import write_run

IDS = torch.tensor([[1, 5, 9, 4, 11, 7], [1, 8, 8, 6, 10, 12]])
FROZEN = ["--model.tuning", "frozen", "--model.objective", "eetrain.objectives.EETuning"]
SCRATCH = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
SCRATCH |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
WAYS = {
    "full": [],
    "frozen": FROZEN,
    "frozen, first blocks only": [*FROZEN, "--model.backbone.load", "exits"],
    "lora": ["--model.tuning", "lora"],
    "scratch": ["--model.backbone.path", "null", "--model.backbone.config", json.dumps(SCRATCH)],
}


def fit(tmp_path, *settings):
    assert main(["fit", "-c", str(write_run(tmp_path)), "--model.optimizer.lr", "0.03", *settings]) == 0
    return tmp_path / "run"


def stored(run):
    return read_lightning_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("way", WAYS)
def test_the_folder_holds_what_was_trained(tmp_path, capsys, way):
    run, out = fit(tmp_path, *WAYS[way]), tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(out), "--policy", "threshold:0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    trained = {name: tensor for name, tensor in stored(run).items() if name.startswith("model.exits.")}
    heads = load_file(out / "exit_heads.safetensors")
    assert {name.removeprefix("model.") for name in trained} == set(heads)
    assert all(torch.equal(heads[name.removeprefix("model.")], tensor) for name, tensor in trained.items())
    plain, model = AutoModelForCausalLM.from_pretrained(out).eval(), MultiExitModel.from_pretrained(out)
    with torch.no_grad():
        full = model.logits(model(IDS))
        assert torch.equal(plain(IDS).logits, full)
        if "scratch" not in way:
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
            assert torch.equal(base(IDS).logits, full) == ("frozen" in way)
    assert model.causal_lm.generation_config.exit_policy == "threshold:0.5"
    assert AutoTokenizer.from_pretrained(out)("cat sat")["input_ids"]


def test_a_merged_adapter_gives_the_logits_of_the_kept_one(tmp_path):
    run = fit(tmp_path, "--model.tuning", "lora")
    merged = MultiExitModel.from_pretrained(export_run(run, tmp_path / "merged"))
    kept = MultiExitModel.from_pretrained(export_run(run, tmp_path / "kept", keep_adapter=True))
    assert (tmp_path / "kept" / "adapter_model.safetensors").exists()
    with torch.no_grad():
        one, two = merged(IDS), kept(IDS)
        for layer in (1, 2, None):
            torch.testing.assert_close(merged.logits(one, layer), kept.logits(two, layer), rtol=0, atol=1e-5)


def test_results_go_into_the_model_card(tmp_path):
    run, results = fit(tmp_path, *FROZEN), tmp_path / "results.json"
    results.write_text(json.dumps({"policies": [{"policy": "never", "bleu": 68.4599, "mean_depth": 4.0, "other": 1}]}))
    card = (export_run(run, tmp_path / "out", results=results) / "README.md").read_text()
    assert "| policy | bleu | mean_depth |" in card
    assert "| never | 68.46 | 4 |" in card
    results.write_text("[]")
    with pytest.raises(CheckpointError, match=r"results.json cannot be read as results") as caught:
        export_run(run, tmp_path / "out", results=results)
    assert "eetrain evaluate" in caught.value.hint


def test_what_is_wrong_with_a_run_is_said(tmp_path, capsys):
    run = fit(tmp_path, *FROZEN)
    with pytest.raises(CheckpointError, match="no checkpoint 'best'; found last"):
        export_run(run, tmp_path / "out", checkpoint="best")
    ckpt = run / "checkpoints" / "last.ckpt"
    whole = ckpt.read_bytes()
    ckpt.write_bytes(whole[: len(whole) // 2])
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "last.ckpt cannot be read" in error
    assert "HINT: It is cut short" in error
    assert not (tmp_path / "out").exists()
    torch.save({"weights": torch.ones(1)}, ckpt)
    with pytest.raises(CheckpointError, match="was not written by `eetrain fit`"):
        export_run(run, tmp_path / "out")
    ckpt.write_bytes(whole)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match="Cannot load a causal language model from"):
        export_run(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("policy", "message"), [("sometimes", "'sometimes' is none of never"), ("always:3", "no exit after block 3")]
)
def test_a_default_policy_must_fit(tmp_path, capsys, policy, message):
    run = fit(tmp_path, *FROZEN)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--policy", policy]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_policy_of_the_backbone_stays_only_if_it_fits_the_exits(tmp_path):
    first = export_run(fit(tmp_path, *FROZEN), tmp_path / "first", exit_policy="always:2")
    for layers, kept in (([2, 3], "always:2"), ([1, 3], None)):
        model = MultiExitModel.attach(first, ExitConfig(layers=layers))
        again = MultiExitModel.from_pretrained(model.save_pretrained(tmp_path / f"again{layers[0]}"))
        assert getattr(again.causal_lm.generation_config, "exit_policy", None) == kept


def test_a_folder_that_differs_from_the_run_is_noticed(tmp_path, monkeypatch):
    """The check after writing can fail: here a head is changed between writing and reading."""
    import eetrain.checkpoints.export as export

    run, save = fit(tmp_path, *FROZEN), export.save_checkpoint

    def save_and_spoil(model, folder, **settings):
        path = save(model, folder, **settings) / "exit_heads.safetensors"
        heads = load_file(path)
        save_file({name: tensor + 1 if ".2." in name else tensor for name, tensor in heads.items()}, path)

    monkeypatch.setattr(export, "save_checkpoint", save_and_spoil)
    with pytest.raises(CheckpointError, match="exit 2 gives other logits than the run"):
        export_run(run, tmp_path / "out")
