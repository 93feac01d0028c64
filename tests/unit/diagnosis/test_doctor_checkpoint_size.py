"""The size of a checkpoint, against checkpoints that real fits write."""

import pytest
import yaml

from eetrain.cli import main
from eetrain.diagnosis.checkpoint_size import estimated_bytes, largest_checkpoint, read_recipe
from eetrain.diagnosis.storage import checkpoint_size, storage_checks
from eetrain.testing.runs import write_run

WIDE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("tuning", "precision"), [("full", "32-true"), ("frozen", "32-true"), ("lora", "32-true"), ("full", "bf16-true")]
)
def test_the_estimate_is_what_a_fit_writes(tuning, precision, tmp_path):
    base = write_run(tmp_path, **WIDE)
    recipe = yaml.safe_load(base.read_text())
    recipe["model"] |= {"tuning": tuning, "lora": {"rank": 64, "target_modules": "all-linear"}}
    recipe["model"]["exits"] |= {"head": "norm", "output": "own"}
    recipe["trainer"] |= {"precision": precision, "max_steps": 1, "limit_val_batches": 0}
    base.write_text(yaml.safe_dump(recipe))
    before = estimated_bytes(recipe)
    assert main(["fit", "-c", str(base)]) == 0
    found = largest_checkpoint(tmp_path / "run")
    assert found.exists
    assert found.source == str(tmp_path / "run/checkpoints/last.ckpt")
    assert found.count == (tmp_path / "run/checkpoints/last.ckpt").stat().st_size
    assert before == pytest.approx(found.count, rel=0.03)
    assert estimated_bytes(read_recipe(tmp_path / "run")) == before, "from the resolved configuration as well"


def config(**trainer):
    backbone = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    return {"model": {"backbone": {"config": backbone}, "exits": {"layers": []}}, "trainer": trainer}


def test_by_hand():
    parameters = 2 * 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert estimated_bytes(config()) == parameters * 4 * 3
    assert estimated_bytes(config(precision="bf16-true")) == parameters * 2 * 3
    pipeline = {"class_path": "eetrain.parallel.PipelineStrategy", "init_args": {"stages": 2}}
    assert estimated_bytes(config(precision="bf16-true", strategy=pipeline)) == parameters * (2 + 12)
    assert estimated_bytes(config(strategy=pipeline)) == parameters * 4 * 3


def test_folders_count_all_their_files(tmp_path):
    for name, count in (("a.ckpt", 10), ("last.ckpt", 30)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "checkpoints" / name / f"{number}.safetensors").write_bytes(bytes(count))
    found = largest_checkpoint(tmp_path)
    assert (found.count, found.source) == (60, str(tmp_path / "checkpoints/last.ckpt"))
    disk = next(check for check in storage_checks(tmp_path, {}) if check.name == "disk")
    assert disk.measured["checkpoint_bytes"] == 60


def test_settings_that_give_no_size(tmp_path):
    assert checkpoint_size(tmp_path, {}) == (None, [])
    none, (line,) = checkpoint_size(tmp_path, {"model": {"backbone": {"path": None}}})
    assert none is None
    assert (line.state, line.found) == ("note", "the backbone is not on this machine")
    assert checkpoint_size(tmp_path, {"model": {"backbone": {"path": "nobody/nothing"}}})[1] == [line]
    bad = config()
    bad["model"]["exits"] = {"layers": [7]}
    none, (line,) = checkpoint_size(tmp_path, bad)
    assert none is None
    assert line.found.startswith("the settings give none: ")
    assert "7" in line.found
    (tmp_path / "config.yaml").write_text("a: [")
    assert read_recipe(tmp_path) == read_recipe(tmp_path / "missing") == {}
