import pytest

from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, GateConfig
from eetrain.objectives import EETuning, MultiExitCrossEntropy
from eetrain.training import BackboneConfig, EarlyExitModule, LoraSettings, ModelSettings, OptimizerConfig

PATH = BackboneConfig(path="somewhere")
EXITS = ExitConfig(layers=[1])


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: BackboneConfig(), "neither path nor config is set"),
        (lambda: BackboneConfig(path="a", config={}), "path and config are both set"),
        (lambda: BackboneConfig(config={}, load="exits"), "HINT: Set num_hidden_layers"),
        (lambda: LoraSettings(rank=0), "model.lora.rank=0"),
        (lambda: LoraSettings(dropout=1.0), "model.lora.dropout=1.0"),
        (lambda: OptimizerConfig(lr=0.0), "model.optimizer.lr=0.0 is out of its range"),
        (lambda: OptimizerConfig(min_lr_ratio=1.5), "model.optimizer.min_lr_ratio=1.5"),
        (lambda: OptimizerConfig(gates_lr_multiplier=0.0), "model.optimizer.gates_lr_multiplier=0.0"),
        (lambda: OptimizerConfig(schedule_steps=0), "model.optimizer.schedule_steps=0"),
        (lambda: OptimizerConfig(warmup_steps=3, warmup_fraction=0.1), "warmup_steps=3 and warmup_fraction=0.1"),
        (lambda: ModelSettings(PATH, EXITS, "some"), "model.tuning='some' is not known"),
        (lambda: ModelSettings(BackboneConfig(path="a", load="exits"), EXITS), "but model.tuning=full trains"),
        (
            lambda: EarlyExitModule(PATH, ExitConfig(layers=[1], gates=GateConfig([1.0])), EETuning(), "frozen"),
            "model.exits.gates is set, but the objective EETuning trains no gates",
        ),
        (lambda: EarlyExitModule(PATH, EXITS, EETuning(), "lora"), "EETuning trains exits of a frozen backbone"),
        (
            lambda: EarlyExitModule(
                BackboneConfig(path="a", load="exits"), EXITS, MultiExitCrossEntropy(), tuning="frozen"
            ),
            "MultiExitCrossEntropy needs them",
        ),
        (
            lambda: EarlyExitModule(PATH, EXITS, EETuning(), "frozen", activation_checkpointing=True),
            "a frozen backbone keeps no activations",
        ),
    ],
)
def test_contradictions_are_refused(build, text):
    with pytest.raises(ConfigError, match=r"HINT: .+") as caught:
        build()
    assert text in str(caught.value)


def test_settings_survive_as_plain_data():
    settings = ModelSettings(
        BackboneConfig(config={"model_type": "llama"}, dtype="bfloat16"),
        ExitConfig(fractions=[0.25], head="mlp", gates=GateConfig([0.3, 1], hidden=4, position_length=20)),
        "lora",
        LoraSettings(rank=2, target_modules=["q_proj"]),
    )
    assert ModelSettings.from_dict(settings.to_dict()) == settings
    assert EarlyExitModule(PATH, EXITS, MultiExitCrossEntropy()).hparams["backbone"]["path"] == "somewhere"


@pytest.mark.parametrize(
    ("backbone", "tuning", "omits"),
    [(PATH, "full", False), (PATH, "frozen", True), (PATH, "lora", True), (BackboneConfig(config={}), "frozen", False)],
)
def test_checkpoints_omit_frozen_weights_that_can_be_read_again(backbone, tuning, omits):
    assert ModelSettings(backbone, EXITS, tuning).omits_backbone is omits
