"""A stage's memory: the formula by hand, and its activations against what a real stage keeps."""

import pytest
import torch
from hollow_support import LENGTH, handed_to, hollow, storages
from torch import Tensor

from eetrain.backbones import Harvester
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import linear_ce
from eetrain.parallel.injection import inject
from eetrain.planning.activations import PieceActivations, saved_activations
from eetrain.planning.costs import PieceCost, Weight, piece_costs
from eetrain.planning.memory import StageMemory, TrainingState, loss_chunk, stage_memory
from eetrain.planning.pieces import Piece
from eetrain.testing.tiny import tiny_model


def test_bytes_of_a_parameter():
    assert (TrainingState("float32", 0, 4).number_bytes, TrainingState("float32", 0, 4).optimizer_bytes) == (4, 8)
    assert TrainingState("float32", 1, 4).optimizer_bytes == (4 + 8) / 4
    assert TrainingState("bfloat16", 1, 4).number_bytes == 2
    assert TrainingState("bfloat16", 1, 4).optimizer_bytes == (4 + 8) / 4
    assert TrainingState("bfloat16", 0, 4).optimizer_bytes == 3


SHARED = Weight("head", 1000, True)
COSTS = (
    PieceCost(Piece("exit", 3), 10, 20, (Weight("norm 3", 8, True), SHARED), 64),
    PieceCost(Piece("block", 4), 10, 20, (Weight("four", 300, True), Weight("frozen", 70, False)), 64),
    PieceCost(Piece("block", 5), 10, 20, (Weight("five", 300, True),), 64),
    PieceCost(Piece("tail"), 10, 20, (Weight("norm", 8, True), SHARED), 0),
)
ACTIVATIONS = (
    PieceActivations(5, True, vocabulary=100, logit_bytes=4, matrix_gradient=4000),
    PieceActivations(700, True),
    PieceActivations(900, False),
    PieceActivations(6, True, vocabulary=100, logit_bytes=4, matrix_gradient=4000),
)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula(checkpointing):
    found = stage_memory(
        COSTS,
        ACTIVATIONS,
        state=TrainingState("float32", 0),
        rows=2,
        length=16,
        in_flight=3,
        checkpointing=checkpointing,
    )
    numbers = 8 + 1000 + 300 + 70 + 300 + 8  # the shared matrix once
    # Hidden states behind block 3 (it came in; the exit and block 4 keep it) and behind 5 (for the tail); behind 4 only
    # where block 5 keeps its input.
    activations = 3 * 2 * ((3 * 64) if checkpointing else 700 + 900 + 2 * 64)
    head = 2 * (6 + 64) + 32 * 100 * 4 + 4000
    assert found == StageMemory(
        weights=4 * numbers, gradients=4 * (numbers - 70), optimizer=8 * (numbers - 70), activations=activations,
        workspace=max(head, 2 * 900),
    )  # fmt: skip
    assert found.total == 4 * numbers + 12 * (numbers - 70) + activations + head


def test_running_a_block_again_can_be_the_most():
    activations = (ACTIVATIONS[0], PieceActivations(10**6, True), *ACTIVATIONS[2:])
    state = TrainingState("float32", 0)
    for checkpointing in (True, False):
        found = stage_memory(
            COSTS, activations, state=state, rows=2, length=16, in_flight=1, checkpointing=checkpointing
        )
        assert (found.workspace == 2 * 10**6) == checkpointing


def test_chunks_are_those_of_the_loss():
    for vocabulary in (61, 1000, 32000, 128256, 10**7):
        weight = torch.empty(vocabulary, 2, device="meta")
        chunk = linear_ce._default_chunk(weight)
        assert loss_chunk(10**9, vocabulary) == chunk
        assert loss_chunk(100, vocabulary) == min(100, chunk)
    assert loss_chunk(4096, 128256) == 1024
    assert linear_ce._LOGITS_PER_CHUNK_ACCELERATOR == 2**27


def measured(model: MultiExitModel, layers: list[int], exits: list[int], *, first: bool, last: bool) -> int:
    """Bytes a stage of a real model holds of one micro-batch: saved tensors, what came in and what goes out."""
    harvester = Harvester(model.backbone, model.anatomy)
    harvest = harvester(torch.ones(1, LENGTH, dtype=torch.long))
    hidden = harvest.hidden_BTD.detach().requires_grad_()
    held: list[Tensor] = [] if first else [hidden]

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    def losses(layer: int, state: Tensor) -> Tensor:
        return inject(state, lambda own: own.sum(), [], through=True) if layer in exits else state

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state = losses(layers[0] - 1, hidden)
        for layer in layers:
            state = losses(layer, harvester.run(harvest, state, [layer]))
    held += [] if last else [state]
    handed = handed_to(model, harvest)
    return sum(size for key, size in storages(held).items() if key not in handed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("part", "layers", "exits"),
    [
        (slice(0, 3), [1], [1]),  # embed, block 1, exit 1
        (slice(1, 4), [1, 2], [1]),
        (slice(2, 4), [2], [1]),  # exit 1 starts the stage
        (slice(3, 6), [2, 3], [3]),  # an exit ends it
        (slice(4, 8), [3, 4], [3, 4]),  # block 3, exit 3, block 4, tail
    ],
)
def test_a_real_stage_keeps_as_much(part, layers, exits, dtype, checkpointing):
    model = hollow("llama", dtype=dtype)
    costs = piece_costs(model, LENGTH)
    activations = saved_activations(model, costs, LENGTH)
    found = stage_memory(
        costs[part], activations[part], state=TrainingState(), rows=1, length=LENGTH, in_flight=1,
        checkpointing=checkpointing,
    )  # fmt: skip
    real = MultiExitModel(tiny_model("llama", dtype=dtype), ExitConfig([1, 3])).train()
    if checkpointing:
        real.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    first, last = costs[part][0].piece.kind == "embed", costs[part][-1].piece.kind == "tail"
    assert found.activations == measured(real, layers, exits, first=first, last=last)


def test_tied_embeddings_on_one_stage_are_one_matrix():
    model = hollow("llama", tie_word_embeddings=True)
    costs = piece_costs(model, LENGTH)
    activations = saved_activations(model, costs, LENGTH)
    state = TrainingState("float32", 0)

    def weights(part: slice) -> float:
        return stage_memory(
            costs[part], activations[part], state=state, rows=1, length=LENGTH, in_flight=1, checkpointing=False
        ).weights

    whole = sum(parameter.numel() for parameter in model.parameters())
    assert weights(slice(0, 8)) == 4 * whole
    # Cut behind block 2, with one exit on either side: the matrix on both stages.
    assert weights(slice(0, 4)) + weights(slice(4, 8)) == 4 * (whole + 61 * 32)
