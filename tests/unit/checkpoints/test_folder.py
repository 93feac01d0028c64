"""Checkpoint folders: exact round trips, folders that plain transformers opens, whole or not written, clear errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones.loading import fresh_backbone, load_backbone, parse_dtype
from eetrain.checkpoints import fingerprint as fingerprint_module
from eetrain.checkpoints import folder as folder_module
from eetrain.checkpoints import load_checkpoint, open_model, save_checkpoint
from eetrain.checkpoints.folder import HEADS_FILE
from eetrain.errors import CheckpointError, ConfigError
from eetrain.testing.tiny import FAMILIES, tiny_model

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def model_of(family: str = "llama", head: str = "norm", layers=(1, 3), **changes) -> MultiExitModel:
    plain = tiny_model(family, dtype=torch.float32, **changes)
    model = MultiExitModel(plain, ExitConfig(layers=list(layers), head=head, output="own")).eval()
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: MultiExitModel) -> dict[int | None, torch.Tensor]:
    result = model(IDS)
    return {layer: model.logits(result, layer) for layer in (*model.exit_layers, None)}


def check_same(one: MultiExitModel, two: MultiExitModel, **tolerance: float) -> None:
    got, want = logits(one), logits(two)
    assert set(got) == set(want)
    for layer in want:
        torch.testing.assert_close(got[layer], want[layer], **(tolerance or {"rtol": 0, "atol": 0}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path) -> Path:
    return model_of().save_pretrained(tmp_path / "model")


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head", ["norm", "block"])
def test_round_trip_is_exact(tmp_path, family, head):
    model = model_of(family, head)
    again = MultiExitModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert not again.training
    assert again.config == model.config
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    check_same(again, model)
    before = contents(tmp_path / "model")
    again.save_pretrained(tmp_path / "model")
    after = contents(tmp_path / "model")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"config.json", "generation_config.json"}
    check_same(load_checkpoint(tmp_path / "model"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left beside the folder"


PLAIN = """
import json, sys
sys.modules["eetrain"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
report = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    data = load_file(folder + ".logits")
    with torch.no_grad():
        got = model.eval()(data["ids"]).logits
    report[folder] = {
        "keys": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])),
        "equal": torch.equal(got, data["logits"]),
    }
json.dump(report, open(sys.argv[1], "w"))
"""


def test_plain_transformers_opens_the_folders_without_eetrain(tmp_path):
    folders = []
    for family in sorted(FAMILIES):
        model = model_of(family, "block")
        folder = str(model.save_pretrained(tmp_path / family, exit_policy="threshold:0.9"))
        save_file({"ids": IDS, "logits": logits(model)[None].contiguous()}, folder + ".logits")
        folders.append(folder)
    report = tmp_path / "report.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(report), *folders], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(report.read_text())
    assert len(result) == 14
    assert {folder: entry for folder, entry in result.items() if entry != {"keys": [], "equal": True}} == {}


def lora(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return wrapped.eval()


def test_an_adapter_is_merged_into_the_folder_not_into_the_model(tmp_path):
    model = MultiExitModel(lora(tiny_model("llama", dtype=torch.float32)), ExitConfig(layers=[2], head="mlp")).eval()
    want = logits(model)
    folder = model.save_pretrained(tmp_path / "merged")
    assert not list(folder.glob("adapter*"))
    assert hasattr(model.backbone, "peft_config")
    assert torch.equal(logits(model)[None], want[None])
    check_same(load_checkpoint(folder), model, rtol=0, atol=1e-5)


def test_an_adapter_may_stay_an_adapter(tmp_path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = load_backbone(tmp_path / "base")
    model = MultiExitModel(lora(base), ExitConfig(layers=[2])).eval()
    folder = model.save_pretrained(tmp_path / "adapter", keep_adapter=True, exit_policy="always:2")
    assert (folder / "adapter_model.safetensors").exists()
    assert not list(folder.glob("model*.safetensors"))
    again = load_checkpoint(folder)
    check_same(again, model)
    assert again.causal_lm.generation_config.exit_policy == "always:2"
    plain = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model.logits(model(IDS)))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"Cannot load a causal language model from .*base"):
        load_checkpoint(folder)


def test_files_of_the_folder(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    results = [{"policy": "never", "tokens/s": 12.34567, "depth": 4}, {"policy": "always:1", "tokens/s": 50.0}]
    folder = model_of().save_pretrained(tmp_path / "m", tokenizer=Tokenizer(), exit_policy="always:1", results=results)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        HEADS_FILE,
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    entry = json.loads((folder / "config.json").read_text())["exits"]
    assert entry.pop("fingerprint") == fingerprint_module.fingerprint(folder)
    assert entry == {"layers": [1, 3], "head": "norm", "output": "own", "format": 1}
    assert sorted(load_file(folder / HEADS_FILE)) == [
        "exits.1.norm.weight",
        "exits.1.output.weight",
        "exits.3.norm.weight",
        "exits.3.output.weight",
    ]
    card = (folder / "README.md").read_text()
    for line in (
        "| exits after blocks | 1, 3 |",
        "| heads | `norm`, output matrix own, 3,968 parameters |",
        "| default policy | `always:1` |",
        "| policy | tokens/s | depth |",
        "| never | 12.35 | 4 |",
        "| always:1 | 50 | - |",
    ):
        assert line in card


def test_generation_settings_survive(tmp_path):
    """transformers drops unknown keys from a file that says it was derived from the model's config."""
    model = model_of()
    generation = model.causal_lm.generation_config
    generation._from_model_config = True
    generation.top_p, generation.temperature, generation.do_sample = 0.8, 0.7, True
    folder = model.save_pretrained(tmp_path / "m", exit_policy="always:3")
    stored = json.loads((folder / "generation_config.json").read_text())
    assert stored["exit_policy"] == "always:3"
    assert "_from_model_config" not in stored or not stored["_from_model_config"]
    again = load_checkpoint(folder)
    loaded = again.causal_lm.generation_config
    assert (loaded.top_p, loaded.temperature, loaded.do_sample) == (0.8, 0.7, True)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (2, 0)
    out = again.generate(IDS, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert out.exit_trace.unique().tolist() == [3]
    second = again.save_pretrained(tmp_path / "again")
    assert load_checkpoint(second).causal_lm.generation_config.exit_policy == "always:3"
    assert "| default policy | `always:3` |" in (second / "README.md").read_text()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_loading_the_first_blocks_only(saved, depth):
    whole, part = load_checkpoint(saved), load_checkpoint(saved, depth=depth)
    assert part.num_blocks == depth
    assert part.exit_layers == tuple(layer for layer in (1, 3) if layer <= depth)
    new = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for layer in part.exit_layers:
        got, want = (model.generate(IDS, exit_policy=f"always:{layer}", **new) for model in (part, whole))
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    if depth == 4:
        assert torch.equal(part.generate(IDS, max_new_tokens=3), whole.generate(IDS, max_new_tokens=3))
        return
    with pytest.raises(ConfigError, match=f"Exit policy never runs the full depth, but only blocks 1..{depth} were"):
        part.generate(IDS)
    with pytest.raises(CheckpointError, match=f"Only blocks 1..{depth} of the backbone are loaded; a checkpoint needs"):
        part.save_pretrained(saved.parent / "part")
    assert not (saved.parent / "part").exists()


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "gpt2", "opt"])
def test_first_blocks_of_mixed_layers(tmp_path, family):
    folder = model_of(family).save_pretrained(tmp_path / "m")
    whole, part = load_checkpoint(folder), load_checkpoint(folder, depth=3)
    for layer in (1, 3):
        got, want = (model.generate(IDS, exit_policy=f"always:{layer}", max_new_tokens=4) for model in (part, whole))
        assert torch.equal(got, want)


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_a_depth_outside_the_backbone(saved, depth):
    with pytest.raises(ConfigError, match=rf"depth={depth}, but the backbone has blocks 1\.\.4"):
        load_checkpoint(saved, depth=depth)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.safetensors", r"model.safetensors cannot be read: .*\. HINT: It is cut short or damaged"),
        (HEADS_FILE, r"exit_heads.safetensors cannot be read: .*\. HINT: It is missing or cut short; export again"),
        ("config.json", r"config.json cannot be read: .*\. HINT: Give a folder that `eetrain export` wrote"),
    ],
)
def test_files_cut_short(saved, name, reason):
    cut(saved / name)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.safetensors", r"no model\*.safetensors. HINT: Copy or export"),
        (HEADS_FILE, "exit_heads.safetensors cannot be read"),
        ("config.json", "config.json cannot be read"),
    ],
)
def test_files_that_are_missing(saved, name, reason):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", ["[]", "7", '"config"', "\udcff"])
def test_a_config_that_is_something_else(saved, text):
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"is a model without exits|config.json cannot be read"):
        load_checkpoint(saved)


def test_a_missing_folder(tmp_path):
    for load in (load_checkpoint, open_model, load_backbone):
        with pytest.raises(CheckpointError, match="nowhere") as caught:
            load(tmp_path / "nowhere")
        assert caught.value.hint


def test_exits_on_other_weights_than_they_were_trained_with(saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="trained with other backbone weights than those in the folder") as caught:
        load_checkpoint(saved)
    assert "Export again" in caught.value.hint


def test_the_fingerprint_does_not_depend_on_sharding(tmp_path):
    plain = tiny_model("llama", dtype=torch.float32)
    plain.save_pretrained(tmp_path / "one")
    plain.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model*.safetensors"))) > 2
    assert fingerprint_module.fingerprint(tmp_path / "one") == fingerprint_module.fingerprint(tmp_path / "many")


def test_the_fingerprint_sees_names_shapes_and_single_numbers(tmp_path):
    def of(**tensors):
        (tmp_path / "x").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "x" / "model.safetensors")
        return fingerprint_module.fingerprint(tmp_path / "x")

    base = of(a=torch.zeros(4, 4))
    others = [of(b=torch.zeros(4, 4)), of(a=torch.zeros(2, 8)), of(a=torch.eye(4)), of(a=torch.tensor(0.0))]
    assert len({base, *others}) == 5
    assert of(a=torch.zeros(4, 4)) == base
    assert of(a=torch.zeros(4, 4, dtype=torch.bfloat16)) == base, "a stored type says nothing about the weights"


def test_heads_of_another_shape_or_number(saved):
    heads = load_file(saved / HEADS_FILE)
    save_file({**heads, "exits.1.norm.weight": torch.ones(31)}, saved / HEADS_FILE)
    with pytest.raises(CheckpointError, match=r"1 tensors of the exits do not fit .*, first 'exits.1.norm.weight'"):
        load_checkpoint(saved)
    save_file({name: heads[name] for name in heads if "output" not in name}, saved / HEADS_FILE)
    with pytest.raises(CheckpointError, match=r"2 tensors of the exits do not fit .*, first 'exits.1.output.weight'"):
        load_checkpoint(saved)
    save_file({**heads, "exits.9.norm.weight": torch.ones(32)}, saved / HEADS_FILE)
    with pytest.raises(CheckpointError, match=r"1 tensors of the exits do not fit .*, first 'exits.9.norm.weight'"):
        load_checkpoint(saved)


def test_a_config_of_another_model(saved):
    edit_config(saved, lambda config: config.update(intermediate_size=56))
    with pytest.raises(CheckpointError, match=r"weights of the model are missing or have another shape|Cannot load"):
        load_checkpoint(saved)


def test_entries_that_are_missing_or_of_another_format(saved):
    edit_config(saved, lambda config: config["exits"].update(format=99))
    with pytest.raises(CheckpointError, match="an unknown format of exits"):
        load_checkpoint(saved)
    edit_config(saved, lambda config: config["exits"].update(format=1, router="x"))
    with pytest.raises(CheckpointError, match="settings this version does not know: router"):
        load_checkpoint(saved)
    edit_config(saved, lambda config: config.pop("exits"))
    with pytest.raises(CheckpointError, match="is a model without exits") as caught:
        load_checkpoint(saved)
    assert "MultiExitModel.attach" in caught.value.hint


def test_open_model_takes_both_kinds(saved, tmp_path):
    assert open_model(saved).exit_layers == (1, 3)
    tiny_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "plain")
    plain = open_model(tmp_path / "plain")
    assert plain.exit_layers == ()
    assert not plain.training


class FullDiskError(OSError):
    def __init__(self):
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_always(*_args, **_kwargs):
    raise FullDiskError


def fail_as_safetensors_does(*_args, **_kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_second():
    calls, real = [], os.replace

    def replace(*args):
        calls.append(args)
        if len(calls) == 2:
            raise FullDiskError
        return real(*args)

    return replace


@pytest.mark.parametrize(
    ("where", "name", "how"),
    [
        (folder_module, "save_file", fail_always),
        (folder_module, "save_file", fail_as_safetensors_does),
        (folder_module, "model_card", fail_always),
        (os, "replace", fail_always),
        (os, "replace", fail_second()),
    ],
    ids=["heads", "safetensors", "card", "replace", "second replace"],
)
def test_a_write_that_fails_leaves_the_old_folder_and_nothing_else(saved, monkeypatch, where, name, how):
    before, other = contents(saved), model_of(head="mlp", layers=(2,))
    monkeypatch.setattr(where, name, how)
    with pytest.raises(CheckpointError, match=r"Cannot write .*model: .*No space left on device") as caught:
        other.save_pretrained(saved)
    monkeypatch.undo()
    assert "The disk is full" in caught.value.hint
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert load_checkpoint(saved).exit_layers == (1, 3)


def test_other_failures_of_a_write_say_where(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folder_module, "save_file", refuse)
    with pytest.raises(CheckpointError, match=r"Cannot write .*out: Permission denied") as caught:
        model_of().save_pretrained(tmp_path / "out")
    assert "rights to write" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model_of().save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_targets_that_are_not_models_are_left_alone(tmp_path):
    model = model_of()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file is a file. HINT: Name a folder"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds something that is not a model. HINT: Name a new or empty folder"):
        model.save_pretrained(tmp_path / "thesis")
    assert contents(tmp_path) == {"file": b"mine", "thesis/chapter.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    check_same(load_checkpoint(model.save_pretrained(tmp_path / "empty")), model)
    check_same(load_checkpoint(model.save_pretrained(tmp_path / "a" / "b" / "c")), model)


def test_an_older_checkpoint_is_replaced_whole(saved):
    (saved / "leftover.bin").write_text("x")
    other = model_of(head="mlp", layers=(2,))
    other.save_pretrained(saved)
    assert not (saved / "leftover.bin").exists()
    check_same(load_checkpoint(saved), other)


def test_a_backbone_that_is_attached_from_a_folder(tmp_path):
    plain = tiny_model("qwen3", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    kept = MultiExitModel.attach(tmp_path / "plain", ExitConfig(layers=[2]))
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    cast = MultiExitModel.attach(str(tmp_path / "plain"), ExitConfig(layers=[2]), dtype="float32", depth=2)
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.float32}
    assert cast.num_blocks == 2
    assert not cast.full_depth_loaded
    assert MultiExitModel.attach(plain, ExitConfig(layers=[2])).backbone is plain


def test_weights_that_are_missing_are_an_error(tmp_path):
    plain = tiny_model("llama", dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights .* first 'model.layers.3.mlp.up_proj.weight'") as caught:
        load_backbone(tmp_path / "plain")
    assert "incomplete" in caught.value.hint
    assert load_backbone(tmp_path / "plain", depth=3).config.num_hidden_layers == 3, "the block is not needed then"


def test_pickled_weights_are_not_read(tmp_path):
    plain = tiny_model("llama", dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    torch.save(plain.state_dict(), tmp_path / "plain" / "pytorch_model.bin")
    (tmp_path / "plain" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Cannot load a causal language model from") as caught:
        load_backbone(tmp_path / "plain")
    assert "*.safetensors" in caught.value.hint


def test_names_of_types():
    assert parse_dtype("auto") == "auto"
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype(torch.float16) is torch.float16
    with pytest.raises(ConfigError, match=r"dtype='fp32' is not known. HINT: One of: auto, float32, bfloat16"):
        parse_dtype("fp32")


def test_a_fresh_backbone_from_its_configuration():
    fields = {"model_type": "llama", **FAMILIES["llama"]}
    model = fresh_backbone(fields, dtype="bfloat16")
    assert model.config.num_hidden_layers == 4
    assert next(model.parameters()).dtype == torch.bfloat16
    assert "model_type" in fields, "the caller's dict stays as it is"
    for broken in ({"hidden_size": 4}, {"model_type": "lama"}):
        with pytest.raises(ConfigError, match="The backbone's configuration does not build"):
            fresh_backbone(broken)


def test_a_checkpoint_may_move(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path / "elsewhere").exit_layers == (1, 3)


def test_saving_what_was_loaded_with_an_adapter(tmp_path):
    """Kept or merged the second time, weights and exits must still agree."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = MultiExitModel(lora(load_backbone(tmp_path / "base")), ExitConfig(layers=[2])).eval()
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "adapter", keep_adapter=True))
    kept = load_checkpoint(save_checkpoint(loaded, tmp_path / "kept", keep_adapter=True))
    check_same(kept, model)
    merged = load_checkpoint(save_checkpoint(kept, tmp_path / "merged"))
    check_same(merged, model, rtol=0, atol=1e-5)
