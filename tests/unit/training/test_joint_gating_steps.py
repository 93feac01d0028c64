"""Joint gating under the LightningModule: who learns in which phase, to the bit, and what is refused and warned of."""

from __future__ import annotations

import copy
import functools

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.objectives import JointGating
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule, OptimizerConfig


def batches(number=3):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 61, (2, 8), generator=generator) for _ in range(number)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in drawn]


def module_of(objective, tuning="full", cost_weights=(0.2, 2.0), **settings):
    config = ExitConfig(layers=[1, 3], gates=GateConfig(list(cost_weights)))
    return EarlyExitModule.from_model(MultiExitModel(tiny_model(), config), objective, tuning=tuning, **settings)


def trainer_of(steps, *callbacks, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    common = {"accelerator": "cpu", "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet}
    return lightning.Trainer(max_steps=steps, callbacks=list(callbacks), **{**common, **settings})


class Keep(Callback):
    """Parameters before every optimizer step, which of them had gradients, and the logged phase."""

    def __init__(self):
        self.states, self.learning, self.phases = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.states.append({name: p.detach().clone() for name, p in module.named_parameters()})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.learning.append({name for name, p in module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, module, *args):
        self.phases.append(trainer.callback_metrics["train/phase"].item())


@pytest.mark.parametrize("tuning", ["full", "frozen", "lora"])
def test_what_rests_stays_bitwise_under_adamw(tuning):
    optimizer = OptimizerConfig(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    module, keep = module_of(JointGating(2, 2), tuning, optimizer=optimizer), Keep()
    trainer_of(8, keep).fit(module, DataLoader(batches(8), batch_size=None))
    keep.on_train_batch_start(None, module, None, 0)
    assert keep.phases == [0, 0, 1, 1, 2, 2, 1, 1]
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for step, phase in enumerate(keep.phases):
        before, after = keep.states[step], keep.states[step + 1]
        gates = {name for name in trained if name.startswith("model.gates.")}
        learning = gates if phase == 1 else trained - gates
        assert keep.learning[step] == learning
        for name in before:
            assert torch.equal(before[name], after[name]) != (name in learning), (step, name)


def test_the_backbone_keeps_no_graph_while_gates_learn():
    module = module_of(JointGating(0, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        module.compute_loss(batches()[0])
    # Gate inputs, targets and logits: at most 4 features for each of 2 * 7 tokens.
    assert saved
    assert max(saved) <= 4 * 14


def test_a_run_too_short_for_the_gates_is_refused_when_the_fit_starts():
    loader = functools.partial(DataLoader, batches(), batch_size=None)
    with pytest.raises(ConfigError, match=r"but the run ends after 3.*HINT: Set warmup_steps and phase_steps"):
        trainer_of(3).fit(module_of(JointGating(2, 2)), loader())
    trainer_of(4).fit(module_of(JointGating(2, 2)), loader())
    trainer_of(-1, fast_dev_run=True).fit(module_of(JointGating(2, 2)), loader())


def validate(module, **settings):
    trainer = trainer_of(1, **settings)
    trainer.validate(module, DataLoader(batches(), batch_size=None), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_validation_measures_the_gates_and_warns_of_those_out_of_use():
    module = module_of(JointGating(2, 2))
    untrained = copy.deepcopy(module)
    with torch.no_grad():
        for layer in (1, 3):
            gate = module.model.gate(layer)
            gate.output.weight.fill_(0.1)
            # Of the first cost weight everyone leaves at exit 1, of the second about half at each exit.
            gate.output.bias.copy_(torch.tensor([100.0, 0.0]))
            gate.output.weight[1] = torch.tensor([0.0, -1.0, 0.0, 0.0])
            gate.output.bias[1] = 3.0
    with pytest.warns(UserWarning, match="Gates out of use") as caught:
        values = validate(module)
    text = next(str(w.message) for w in caught if "Gates out of use" in str(w.message))
    assert "cost weight 0.2: exit_1 takes 100.0% of the tokens; cost weight 0.2: exit_3 takes 0.0%" in text
    assert values["val/gate/0.2/depth"] == 1.0
    assert values["val/gate/0.2/nll"] == pytest.approx(values["val/nll/exit_1"])
    assert values["val/gate/0.2/accuracy"] == pytest.approx(values["val/accuracy/exit_1"])
    shares = [values[f"val/gate/2/share/{depth}"] for depth in ("exit_1", "exit_3", "full")]
    assert sum(shares) == pytest.approx(1.0)
    assert values["val/gate/2/depth"] == pytest.approx(shares[0] + 3 * shares[1] + 4 * shares[2])
    assert ("cost weight 2: exit_1" in text) == (not 0.005 <= shares[0] <= 0.995)
    with pytest.warns() as caught:
        values = validate(untrained)
    assert values["val/gate/2/share/full"] == 1.0
    assert not any("Gates out of use" in str(w.message) for w in caught), "before their first turn that is no news"
