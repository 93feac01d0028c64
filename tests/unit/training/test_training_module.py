import copy

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eetrain.backbones import blocks_of, final_norm
from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import EETuning, MultiExitCrossEntropy
from eetrain.testing.tiny import tiny_model
from eetrain.training import BackboneConfig, EarlyExitModule, LoraSettings
from eetrain.training.checkpoint_state import check_state, with_frozen_backbone, without_frozen_backbone
from eetrain.training.precision import keeping_tables


def batch(seed=0, rows=3, length=8):
    ids = torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def module_on(family="llama", layers=(1, 2), objective=None, head="norm", **settings):
    model = MultiExitModel(tiny_model(family), ExitConfig(layers=list(layers), head=head))
    return EarlyExitModule.from_model(model, objective, **settings)


def gradients(module, data):
    module.zero_grad()
    module.compute_loss(data).total.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def test_a_validated_module_is_fitted_again():
    module, quiet = module_on(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    for _ in range(2):
        data = DataLoader([batch()], batch_size=None)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
        trainer.fit(module, data, data)
        trainer.validate(module, data, verbose=False)
    assert module.scores["val"]["nll/full"] > 0


def trainable(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_frozen_trains_exits_only_and_keeps_the_backbone_in_evaluation_mode():
    module = module_on(objective=EETuning(), tuning="frozen")
    assert trainable(module) == {"model.exits.1.norm.weight", "model.exits.2.norm.weight"}
    module.train()
    assert not any(part.training for part in module.model.backbone.modules())
    assert module.model.exits["1"].training
    found = gradients(module, batch())
    assert all((grad is not None) == name.startswith("model.exits.") for name, grad in found.items())


def test_full_tuning_puts_a_loaded_backbone_into_training_mode():
    module = module_on()
    assert all(part.training for part in module.model.modules())
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients(module, batch()).values())


def test_lora_trains_adapters_and_exits_only():
    lora = LoraSettings(rank=2, target_modules=["q_proj", "v_proj"])
    module = module_on(tuning="lora", lora=lora)
    adapters = {name for name in trainable(module) if "lora_" in name}
    assert len(adapters) == 4 * 2 * 2
    assert trainable(module) - adapters == {"model.exits.1.norm.weight", "model.exits.2.norm.weight"}
    assert all(name.startswith("model.backbone.") for name in adapters)


def test_lora_on_unknown_modules_is_refused():
    with pytest.raises(ConfigError, match=r"model.lora does not fit the backbone.*HINT: Set model.lora.target_modules"):
        module_on(tuning="lora", lora=LoraSettings(target_modules=["nothing"]))


def test_exit_heads_copied_before_adapters_hold_plain_weights():
    module = module_on(tuning="lora", head="mlp")
    assert not any("lora_" in name for name, _ in module.model.exits.named_parameters())


def test_parts_no_loss_reaches_are_not_trained():
    module = module_on(objective=MultiExitCrossEntropy(full_weight=0.0))
    model = module.model
    blocks = blocks_of(model.backbone, model.anatomy)
    assert [any(p.requires_grad for p in block.parameters()) for block in blocks] == [True, True, False, False]
    assert not final_norm(model.backbone, model.anatomy).weight.requires_grad
    found = gradients(module, batch())
    assert {name for name, grad in found.items() if grad is not None} == trainable(module)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_activation_checkpointing_changes_no_gradient(family):
    plain = gradients(module_on(family), batch())
    module = module_on(family, activation_checkpointing=True)
    calls = []
    block = blocks_of(module.model.backbone, module.model.anatomy)[0]
    block.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(module, batch())
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    inner = next(child for child in block.children() if any(True for _ in child.parameters()))
    count = []
    inner.register_forward_hook(lambda *_: count.append(1))
    gradients(module, batch())
    assert len(count) == 2, "the block runs again in backward"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_loss_is_that_of_transformers(family, padded):
    module = module_on(family, layers=())
    data = batch(rows=2, length=7)
    if padded:
        data["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        data["labels"] = data["labels"].masked_fill(data["attention_mask"] == 0, -100)
    theirs = module.model.backbone(**data, output_router_logits=True, use_cache=False)
    total = module.compute_loss(data).total.item()
    # transformers rounds the logits of this float64 model to float32 before its loss, so the parts are compared too.
    assert total == pytest.approx(theirs.loss.item(), rel=1e-6)
    cross_entropy = F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten()).item()
    auxiliary = module.model.backbone.config.router_aux_loss_coef * theirs.aux_loss.item()
    assert auxiliary > 1e-3
    assert total == pytest.approx(cross_entropy + auxiliary, rel=1e-9)
    without = module_on(family, layers=(), router_loss=False).compute_loss(data).total.item()
    assert without == pytest.approx(cross_entropy, rel=1e-9)


def test_router_loss_sends_gradient_to_the_routers():
    def router_gradient(**settings):
        found = gradients(module_on("mixtral", layers=(), **settings), batch())
        return next(grad for name, grad in found.items() if "gate" in name)

    assert not torch.allclose(router_gradient(), router_gradient(router_loss=False))


def test_casting_keeps_rotary_tables():
    model = tiny_model(dtype=torch.float32)
    table = copy.deepcopy(model.model.rotary_emb.inv_freq)
    with keeping_tables(model):
        model.to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, table)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_frozen_weights_leave_a_state_and_come_back():
    module = module_on(objective=EETuning(), tuning="frozen")
    state = module.state_dict()
    saved = without_frozen_backbone(state, module)
    assert set(saved) == {"model.exits.1.norm.weight", "model.exits.2.norm.weight"}
    whole = with_frozen_backbone(saved, module)
    assert whole.keys() == state.keys()
    check_state(whole, module)


def test_a_state_of_another_model_is_refused():
    module = module_on()
    state = dict(module.state_dict())
    lost = state.pop("model.exits.1.norm.weight")
    state["model.exits.3.norm.weight"] = lost
    state["model.exits.2.norm.weight"] = lost[:5]
    with pytest.raises(CheckpointError, match="HINT: Resume with the settings") as caught:
        check_state(state, module)
    for text in ("missing in it (first model.exits.1", "unknown to this run (first model.exits.3", "of another shape"):
        assert text in str(caught.value)


def test_construction_loads_nothing(tmp_path):
    missing = BackboneConfig(path=str(tmp_path / "missing"))
    module = EarlyExitModule(missing, ExitConfig(layers=[1]), MultiExitCrossEntropy())
    assert module.model is None
    with pytest.raises(CheckpointError, match="missing"):
        module.configure_model()


def test_only_blocks_up_to_the_deepest_exit_are_loaded(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = BackboneConfig(path=str(tmp_path), load="exits", dtype="float64")
    module = EarlyExitModule(config, ExitConfig(fractions=[0.25, 0.5]), EETuning(), tuning="frozen")
    module.configure_model()
    assert (module.model.num_blocks, module.model.exit_layers) == (2, (1, 2))
    assert not module.model.full_depth_loaded
    assert module.hparams["exits"]["layers"] == [1, 2]
    whole = module_on(objective=EETuning(), tuning="frozen")
    assert torch.equal(module.compute_loss(batch()).total, whole.compute_loss(batch()).total)
    built = module.model
    module.configure_model()
    assert module.model is built


def test_dropout_of_a_frozen_backbone_is_off():
    backbone = tiny_model("gpt2")
    for part in backbone.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    model = MultiExitModel(backbone, ExitConfig(layers=[2]))
    module = EarlyExitModule.from_model(model, EETuning(), tuning="frozen").train()
    assert torch.equal(module.compute_loss(batch()).total, module.compute_loss(batch()).total)
