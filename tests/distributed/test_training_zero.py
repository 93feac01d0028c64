"""Training with shared out optimizer state, gradients and parameters is training without, gradient by gradient."""

import functools
import os
from unittest.mock import patch

import lightning
import pytest
import torch
import torch.distributed as dist
from layerskip_support import DropsByRow
from lightning.pytorch import Callback
from torch.nn import functional
from torch.utils.data import DataLoader

from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.objectives import (
    Distillation,
    EETuning,
    JointGating,
    LayerDropout,
    LayerSkip,
    MultiExitCrossEntropy,
    SkipDecode,
    linear_ce,
)
from eetrain.parallel import ZeroStrategy
from eetrain.testing.processes import run_on_processes
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule
from eetrain.training.settings import OptimizerConfig

STEPS = 4
LINEAR = functional.linear
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


def gating():
    # Balance is by batch, and a batch is another one on one process.
    return JointGating(warmup_steps=1, phase_steps=1, class_balance=False)


def by_row():
    return DropsByRow("uniform", 1.0, "rotational", 2)


# Those with `ddp` are compared with DDP on two processes: their loss is not a sum over the batch.
CASES = {
    "norm heads, clipped": {"trainer": {"gradient_clip_val": 0.1}},
    "own heads": {"exits": {"head": "mlp", "output": "own"}},
    "block heads, accumulated": {"exits": {"head": "block"}, "trainer": {"accumulate_grad_batches": 2}},
    "tied embeddings": {"exits": {"head": "tied"}, "changes": {"tie_word_embeddings": True}},
    "without the full depth": {"objective": lambda: MultiExitCrossEntropy(full_weight=0.0)},
    "frozen": {"objective": EETuning, "tuning": "frozen", "exits": {"head": "mlp", "output": "own"}},
    "self-supervised": {
        "objective": lambda: EETuning(distillation=Distillation()),
        "tuning": "frozen",
        "exits": {"head": "mlp", "output": "own"},
    },
    "distilled": {"objective": lambda: MultiExitCrossEntropy([0.25, 0.5], distillation=Distillation(0.5, top_k=7))},
    "lora, recomputed": {"tuning": "lora", "module": {"activation_checkpointing": True}},
    "recomputed": {"module": {"activation_checkpointing": True}},
    "soft cap": {"family": "gemma2"},
    "gpt2": {"family": "gpt2"},
    "gates, clipped": {
        "objective": gating,
        "exits": {"gates": GateConfig([0.2, 2.0])},
        "trainer": {"gradient_clip_val": 0.1},
        "ddp": True,
    },
    "gates, frozen": {
        "objective": gating,
        "tuning": "frozen",
        "exits": {"gates": GateConfig([0.2, 2.0], hidden=3)},
        "ddp": True,
    },
    # Processes drop different blocks; heads that are off have gradients of zero.
    "layerskip": {"objective": by_row, "exits": {"head": "mlp", "output": "own"}},
    "layerskip, learned positions": {"family": "gpt2", "objective": by_row, "exits": {"head": "block"}},
    "layerskip, lora": {"objective": by_row, "tuning": "lora"},
    "layerskip, nothing dropped": {
        "objective": lambda: LayerSkip("uniform", 1.0, "rotational", 2),
        "exits": {"head": "block", "output": "own"},
    },
    "experts": {"family": "qwen3_moe", "module": {"activation_checkpointing": True}, "ddp": True},
}
QUICK = [
    ("norm heads, clipped", 1),
    ("block heads, accumulated", 2),
    ("tied embeddings", 3),
    ("gates, clipped", 3),
    ("layerskip", 2),
]
SLOW = [
    (name, stage)
    for name, case in CASES.items()
    for stage in (1, 2, 3)
    if (name, stage) not in QUICK and not (stage == 3 and case.get("objective") is by_row)
]


class Keep(Callback):
    """Gradients of every step, and whether parameters were away between the steps."""

    def __init__(self):
        self.gradients, self.sharded = [], False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.sharded |= all(parameter.numel() == 0 for parameter in module.model.backbone.parameters())

    def on_before_optimizer_step(self, trainer, module, optimizer):
        from deepspeed.utils import safe_get_full_grad

        zero = isinstance(trainer.strategy, ZeroStrategy)
        found = {n: safe_get_full_grad(p) if zero else p.grad for n, p in module.named_parameters() if p.requires_grad}
        self.gradients.append({n: grad.float().numpy().copy() for n, grad in found.items() if grad is not None})


def part(rank, num):
    """Every ``num``-th row of every batch; rows have very different numbers of scored tokens."""
    batches = []
    for seed in range(2 * STEPS):
        ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
        scored = torch.arange(9) < torch.tensor([9, 2, 7, 4])[:, None]
        rows = {"input_ids": ids, "labels": ids.masked_fill(~scored, -100), "attention_mask": scored.long()}
        batches.append({name: value[rank::num] for name, value in rows.items()})
    return batches


def build(family="llama", changes=None, exits=None, objective=None, tuning="full", module=None, **_):
    torch.manual_seed(0)
    config = ExitConfig(**{"layers": [1, 2], **(exits or {})})
    model = MultiExitModel(tiny_model(family, dtype=torch.float32, **(changes or {})), config)
    built = EarlyExitModule.from_model(
        model,
        MultiExitCrossEntropy([0.25, 0.5]) if objective is None else objective(),
        tuning=tuning,
        # A large eps makes updates follow gradients instead of their signs.
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-3, schedule="linear", warmup_steps=2),
        **(module or {}),
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:  # 0 at first, which hides the other half
                parameter.normal_(std=0.1)
    return built


def count_hooks(module):
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]


def run(name, strategy, module=None):
    """Weights, gradients, metrics and what became of the parameters; validates in the fit, and after it."""
    rank, num = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    case, keep = CASES[name], Keep()
    module, loader = module or build(**case), functools.partial(DataLoader, part(rank, num), batch_size=None)
    hooks = count_hooks(module)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=num,
        strategy=strategy,
        callbacks=[keep],
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        inference_mode=False,  # whose tensors in metrics could not be updated by another fit
        val_check_interval=2,
        limit_val_batches=3,  # with which ZeRO-3 compares the calls of the processes in the phase of the exits
        **case.get("trainer", {}),
        **QUIET,
    )
    trainer.fit(module, loader(), loader())
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.validate(module, loader(), verbose=False)
    logged |= {f"after/{key}": float(value) for key, value in trainer.callback_metrics.items()}
    weights = {key: parameter.detach().float().numpy() for key, parameter in module.named_parameters()}
    plain = functional.linear is LINEAR and count_hooks(module) == hooks
    plain &= not any(name.startswith("ds_") for part in module.modules() for name in vars(part))
    return {
        "weights": weights,
        "gradients": keep.gradients,
        "logged": logged,
        "sharded": keep.sharded,
        "plain": plain and not any(hasattr(parameter, "ds_id") for parameter in module.parameters()),
    }


def run_zero(cases):
    """Every case under ZeRO; tokens go through the loss in chunks of 4, of which the processes have unequally many."""
    linear_ce._LOGITS_PER_CHUNK_CPU, linear_ce._FEWEST_ROWS = 4 * 61, 1
    results = {case: run(case[0], ZeroStrategy(case[1], stage3_param_persistence_threshold=0)) for case in cases}
    with_ddp = sorted({name for name, _ in cases if CASES[name].get("ddp")})  # in one order on all processes
    return results, {name: run(name, "ddp_find_unused_parameters_true") for name in with_ddp}


def assert_same(one, two, tolerance, what):
    assert one.keys() == two.keys()
    for key in one:
        found, wanted = torch.as_tensor(one[key]), torch.as_tensor(two[key])
        largest = max(1.0, float(wanted.abs().max()))
        assert (found - wanted).abs().max() <= tolerance * largest, f"{what} {key}"


def check(results, name, stage):
    """Gradients of the first step are equal to 1e-6; what comes after builds on weights that were rounded elsewhere."""
    for of_rank, with_ddp in results:
        found, wanted = of_rank[name, stage], with_ddp.get(name) or run(name, "auto")
        assert_same(found["weights"], wanted["weights"], 3e-6, "weight")
        assert len(found["gradients"]) == len(wanted["gradients"]) == STEPS
        for step, gradients in enumerate(wanted["gradients"]):
            # ZeRO-3 still has the gradients of an earlier step where none came in this one.
            learning = {key: found["gradients"][step][key] for key in gradients}
            assert_same(learning, gradients, 3e-6 if step else 1e-6, f"gradient of step {step}")
        assert found["logged"] == pytest.approx(wanted["logged"], rel=1e-5, abs=1e-6)
        assert {"train/loss", "val/nll/full", "after/val/nll/exit_1"} <= wanted["logged"].keys()
        assert found["sharded"] == (stage == 3), "a test of whole parameters would prove nothing"
        assert found["plain"], "what the engine hung on the module is still there"


def run_more(cases):
    """All that, one module fitted at three stages in turn, bfloat16, and a refusal."""
    results = run_zero(cases)
    module = build()
    in_turn = [run("own heads", ZeroStrategy(stage), module) for stage in (3, 1, 3)]
    with pytest.raises(ConfigError) as caught:
        run(
            "own heads",
            ZeroStrategy(),
            EarlyExitModule.from_model(MultiExitModel(tiny_model(), ExitConfig(layers=[1]))),
        )
    narrow = {stage: run("norm heads, clipped", ZeroStrategy(stage, "bfloat16"))["logged"] for stage in (1, 2, 3)}
    return results, in_turn, narrow, str(caught.value)


@pytest.fixture(scope="module")
def quick():
    return run_on_processes(run_zero, 2, QUICK)


@pytest.fixture(scope="module")
def slow():
    return run_on_processes(run_more, 2, SLOW, timeout=900)


@pytest.mark.parametrize(("name", "stage"), QUICK)
def test_two_processes_train_as_without_sharding(name, stage, quick):
    check(quick, name, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), SLOW)
def test_two_processes_train_as_without_sharding_in_every_case(name, stage, slow):
    check([results for results, *_ in slow], name, stage)


@pytest.mark.slow
def test_a_module_can_be_fitted_again(slow):
    module = build()
    for turn in range(3):
        wanted = run("own heads", "auto", module)
        for _, in_turn, *_ in slow:
            assert_same(in_turn[turn]["weights"], wanted["weights"], 1e-5, f"weight after fit {turn}")
            assert in_turn[turn]["plain"]


@pytest.mark.slow
def test_parameters_of_another_precision_are_refused(slow):
    assert {text for *_, text in slow} == {
        "trainer.strategy.init_args.precision=float32, but the model has parameters in float64. HINT: Set "
        "model.backbone.dtype=float32; the strategy's precision decides about the rest."
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_close_to_float32(slow, stage):
    wanted = run("norm heads, clipped", "auto")["logged"]
    for _, _, narrow, _ in slow:
        for name in ("train/loss", "val/nll/exit_1", "after/val/nll/full"):
            assert narrow[stage][name] != wanted[name]
            assert narrow[stage][name] == pytest.approx(wanted[name], rel=2e-2)


@pytest.mark.parametrize(
    ("trainer", "case", "strategy", "message", "hint"),
    [
        (
            {"precision": "bf16-true"},
            {},
            {},
            "trainer.precision=bf16-true, but ZeroStrategy sets the precision.",
            "Leave trainer.precision out and set trainer.strategy.init_args.precision=bfloat16.",
        ),
        (
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            {},
            {},
            "trainer.gradient_clip_algorithm=value, but ZeroStrategy clips by the norm of all gradients.",
            "Set trainer.gradient_clip_algorithm=norm, or leave it out.",
        ),
        (
            {},
            {"objective": lambda: SkipDecode("static:3", prompt_tokens=2), "exits": {"layers": []}},
            {},
            "The objective SkipDecode leaves single blocks out of a step, and ZeRO steps all parameters of a group: "
            "weights and moments of these blocks would decay.",
            "Set trainer.strategy=ddp_find_unused_parameters_true.",
        ),
        (
            {},
            {"objective": lambda: LayerSkip(dropout=LayerDropout(0.1))},
            {"stage": 3},
            "The objective LayerSkip drops blocks, each process its own, but in stage 3 of ZeRO all must call "
            "the same modules in the same order.",
            "Set trainer.strategy.init_args.stage=2, or leave dropout out of the objective.",
        ),
        (
            {},
            {"objective": gating, "exits": {"gates": GateConfig([0.2])}},
            {"precision": "bfloat16"},
            "The objective JointGating trains gates, which stay in float32, but DeepSpeed would make all parameters "
            "bfloat16.",
            "Set trainer.strategy.init_args.precision=float32, or trainer.strategy=ddp_find_unused_parameters_true and "
            "trainer.precision=bf16-true.",
        ),
    ],
)
def test_settings_in_the_wrong_place_are_refused_before_processes_meet(trainer, case, strategy, message, hint):
    module, loader = build(**case), DataLoader(part(0, 2), batch_size=None)
    built = lightning.Trainer(accelerator="cpu", devices=1, strategy=ZeroStrategy(**strategy), **trainer, **QUIET)
    # Lightning leaves behind where it is, and later processes would believe to be there as well.
    with patch.dict(os.environ), pytest.raises(ConfigError) as caught:
        built.fit(module, loader)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 0}, "trainer.strategy.init_args.stage=0 is not known."),
        ({"precision": "16"}, "trainer.strategy.init_args.precision='16' is not known."),
        ({"stage3_param_persistence_threshold": -1}, "stage3_param_persistence_threshold=-1."),
    ],
)
def test_arguments_out_of_their_range(arguments, message):
    with pytest.raises(ConfigError) as caught:
        ZeroStrategy(**arguments)
    assert caught.value.message == message
