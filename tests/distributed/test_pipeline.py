"""A pipeline is one process with the batches of all replicas: losses, gradients of every step, metrics and weights."""

import pytest
from pipeline_support import Case, assert_same, fit, merged

from eetrain.exits import GateConfig
from eetrain.objectives import EETuning, JointGating, MultiExitCrossEntropy, SkipDecode
from eetrain.testing.processes import run_on_processes


def gating():
    return JointGating(warmup_steps=1, phase_steps=1)


GATES = GateConfig([0.2, 2.0], hidden=3, position_length=8)
CASES = {
    "tied heads, tied embeddings, clipped": Case(
        changes={"tie_word_embeddings": True},
        exits={"head": "tied"},
        objective=lambda: MultiExitCrossEntropy([0.1, 0.25, 0.5], schedule="linear", schedule_steps=2),
        clip=0.3,
    ),
    "norm heads, packed": Case("qwen2", packed=True),
    "own mlp heads, learned positions": Case("gpt2", exits={"head": "mlp", "output": "own", "layers": [1, 2, 4]}),
    "block heads, soft cap, recomputed": Case(
        "gemma2",
        exits={"head": "block", "layers": [2, 3]},
        objective=lambda: MultiExitCrossEntropy([0.25, 0.5]),
        module={"activation_checkpointing": True},
    ),
    "without the full depth": Case(objective=lambda: MultiExitCrossEntropy(full_weight=0.0), exits={"layers": [1, 2]}),
    "frozen": Case(
        objective=lambda: EETuning(confidence_weights=True), tuning="frozen", exits={"head": "mlp", "output": "own"}
    ),
    "lora, recomputed": Case(tuning="lora", module={"activation_checkpointing": True}, clip=0.3),
    "gates": Case(objective=gating, exits={"gates": GATES}, changes={"tie_word_embeddings": True}, clip=0.3),
    "gates, frozen": Case(objective=gating, exits={"gates": GATES, "head": "mlp"}, tuning="frozen", packed=True),
    "skipdecode, packed": Case(
        objective=lambda: SkipDecode("skipdecode:max=3,min=2,length=4", prompt_tokens=2),
        exits={"layers": []},
        packed=True,
    ),
    # Block 2 runs in prompts only: without any it must rest.
    "skipdecode, a block rests": Case(
        objective=lambda: SkipDecode("skipdecode:max=3,min=2,length=4,prompt=full"),
        exits={"layers": []},
        prompts=True,
    ),
    "skipdecode at random": Case(
        objective=lambda: SkipDecode("skipdecode:speed=2,length=4", "random", (1.2, 2.0), prompt_tokens=2),
        exits={"layers": []},
    ),
    "skipdecode at random, packed": Case(
        objective=lambda: SkipDecode("skipdecode:speed=2,length=4", "random", (1.2, 2.0), prompt_tokens=2),
        exits={"layers": []},
        packed=True,
    ),
}
