"""What exits cost a pipeline beside time: nothing on the wires between stages, and no activations kept."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.objectives import Distillation, EETuning, JointGating, MultiExitCrossEntropy
from eetrain.testing.processes import run_on_processes
from eetrain.testing.tiny import tiny_model

pytestmark = pytest.mark.slow
STAGES, BLOCKS, MICRO_BATCHES, ROWS, LENGTH, WIDTH, VOCABULARY = 4, 8, 8, 2, 24, 32, 4099
GATES = [0.2, 2.0]
HIDDEN_BYTES = ROWS * LENGTH * WIDTH * 4
MASS_BYTES = ROWS * LENGTH * len(GATES) * 4
MIDDLE = [3, 4, 5]  # on the stages 1, 1 and 2 of 0 to 3
MULTI_EXIT = partial(MultiExitCrossEntropy, 0.5)
# Exits, objective, step.
VARIANTS = {
    "no exits": (ExitConfig(layers=[]), MULTI_EXIT, 0),
    "tied exits": (ExitConfig(layers=MIDDLE, head="tied"), MULTI_EXIT, 0),
    "own exits on every stage": (ExitConfig(layers=[1, 3, 5, 7], head="mlp", output="own"), MULTI_EXIT, 0),
    "frozen": (ExitConfig(layers=MIDDLE, head="norm"), EETuning, 0),
    "distilled": (ExitConfig(layers=MIDDLE, head="tied"), partial(MULTI_EXIT, distillation=Distillation()), 0),
    "self-supervised": (ExitConfig(layers=MIDDLE, head="norm"), partial(EETuning, distillation=Distillation()), 0),
    "without the full depth": (ExitConfig(layers=[1, 3]), partial(MULTI_EXIT, full_weight=0.0), 0),
    "exits in their phase": (
        ExitConfig(layers=MIDDLE, head="tied", gates=GateConfig(GATES)),
        partial(JointGating, warmup_steps=0, phase_steps=1),
        1,
    ),
}
# Mistakes that the counts must see.
MISTAKES = ("the exits' loss in the forward pass", "their logits in the forward pass")
VARIANTS |= dict.fromkeys(MISTAKES, VARIANTS["tied exits"])


class Kept:
    """Bytes that autograd keeps for backward at the same time, each storage once, parameters left out."""

    def __init__(self, parameters):
        self.known = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.users, self.live, self.peak = {}, 0, 0

    class Package:
        """What autograd holds in the place of a tensor; it is there as long as the graph needs it."""

        def __init__(self, tensor):
            self.tensor = tensor

    def pack(self, tensor):
        package, key = self.Package(tensor), tensor.untyped_storage()._cdata
        if key not in self.known:
            size = tensor.untyped_storage().nbytes()
            if self.users.setdefault(key, 0) == 0:
                self.live += size
                self.peak = max(self.peak, self.live)
            self.users[key] += 1
            weakref.finalize(package, self.drop, key, size)
        return package

    def drop(self, key, size):
        self.users[key] -= 1
        if self.users[key] == 0:
            self.live -= size


def loss_in_forward(hidden_BTD, loss, parameters, *, through):
    """The loss in use, when the micro-batch passes: it has no logits, but a gradient of the matrix."""
    return hidden_BTD + 0 * loss(hidden_BTD)


def logits_in_forward(hidden_BTD, loss, parameters, *, through):
    """Plain cross-entropy."""
    *_, matrix_VD = parameters
    value = F.cross_entropy((hidden_BTD @ matrix_VD.t()).flatten(0, 1), torch.zeros(ROWS * LENGTH, dtype=torch.long))
    return hidden_BTD + 0 * value


def build(variant):
    """The second half of what a strategy does, with two blocks on every stage whatever they cost."""
    from eetrain.parallel.cut import cut
    from eetrain.parallel.deepspeed_setup import engine_config, join_processes, load_deepspeed, start_engine
    from eetrain.planning.pieces import pipeline_pieces
    from eetrain.planning.topology import Topology

    load_deepspeed()
    join_processes(dist.get_rank(), torch.device("cpu"))
    from eetrain.parallel.pipeline import ExitPipeline
    from eetrain.parallel.runner import PipelineRunner

    exits, objective, step = VARIANTS[variant][0], VARIANTS[variant][1](), VARIANTS[variant][2]
    torch.manual_seed(0)
    backbone = tiny_model(num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, dtype=torch.float32)
    model = MultiExitModel(backbone, exits).train()
    objective.bind(model.exit_layers, BLOCKS)
    objective.bind_gates(GATES)
    backbone.requires_grad_(not objective.freezes_backbone)
    pieces = pipeline_pieces(BLOCKS, model.exit_layers)
    inside = [max(place for place, piece in enumerate(pieces) if piece.layer == last) + 1 for last in (2, 4, 6)]
    topology = Topology(STAGES, 1)
    pipeline = ExitPipeline(cut(model, (0, *inside, len(pieces)), topology, dist.get_rank()))
    optimizer = torch.optim.SGD([p for p in pipeline.parameters() if p.requires_grad], lr=0.0)
    config = engine_config(zero_stage=0, precision="float32", clip_norm=None, accumulate=MICRO_BATCHES)
    engine = start_engine(pipeline, optimizer, config)
    return PipelineRunner(pipeline, engine, objective, topology, MICRO_BATCHES), step


def measure(variant):
    """One step of a process.

    Returns what it sent, as (to which stage, bytes), which gradients it sent back were not 0, most bytes kept for
    backward, and gradients of the output matrix that are kept in flight.
    """
    runner, step = build(variant)
    from deepspeed.runtime.pipe import p2p

    from eetrain.parallel import tasks

    ids_BT = torch.randint(3, VOCABULARY, (ROWS * MICRO_BATCHES, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids_BT, "labels": ids_BT}
    runner.train(batch, step)  # its first messages tell shapes
    messages, news, matrices, send, forward = [], [], [], p2p.send, runner.pipeline.forward
    kept, before = Kept(runner.model.parameters()), matrices_alive()

    def counted(tensor, stage, async_op=False):
        messages.append((stage, tensor.nbytes))
        if stage < runner.pipeline.stage.index:
            news.append(bool(tensor.any()))
        return send(tensor, stage, async_op)

    def looked_at(travelling):
        result = forward(travelling)
        if not runner.pipeline.work.micros:  # as many are in flight as ever
            gradients = sum(p.grad is not None and p.shape == (VOCABULARY, WIDTH) for p in runner.pipeline.parameters())
            matrices.append(matrices_alive() - before - gradients)
        return result

    inject = dict(zip(MISTAKES, (loss_in_forward, logits_in_forward), strict=True)).get(variant, tasks.inject)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p2p, "send", counted)
        patch.setattr(tasks, "inject", inject)
        patch.setattr(runner.pipeline, "forward", looked_at)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda package: package.tensor):
            runner.train(batch, step)
    assert kept.live == 0, "backward has let go of everything"
    return {"messages": messages, "news": news, "kept": kept.peak, "matrices": matrices[0]}


def matrices_alive():
    """Tensors of the output matrix's shape: itself and gradients of it."""
    gc.collect()  # what earlier steps left must not go between two counts
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    return sum(tensor.shape == (VOCABULARY, WIDTH) for tensor in tensors)


def measure_all():
    return {variant: measure(variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def of_stages():
    return run_on_processes(measure_all, STAGES, timeout=300)


def messages_to(found, stage):
    return [size for to, size in found["messages"] if to == stage]


@pytest.mark.parametrize(
    "variant", ["no exits", "tied exits", "own exits on every stage", "frozen", "without the full depth"]
)
def test_a_micro_batch_is_a_hidden_state_forward_and_its_gradient_back_with_and_without_exits(variant, of_stages):
    for stage, results in enumerate(of_stages):
        found = results[variant]
        assert messages_to(found, stage + 1) == [HIDDEN_BYTES] * MICRO_BATCHES * (stage < STAGES - 1)
        assert messages_to(found, stage - 1) == [HIDDEN_BYTES] * MICRO_BATCHES * (stage > 0)
        assert found["messages"] == results["no exits"]["messages"], "labels do not travel either, and in this order"


def test_exits_that_learn_under_their_gates_send_the_probability_left_as_well(of_stages):
    for stage, results in enumerate(of_stages):
        found = results["exits in their phase"]
        assert messages_to(found, stage + 1) == [HIDDEN_BYTES, MASS_BYTES] * MICRO_BATCHES * (stage < STAGES - 1)
        assert messages_to(found, stage - 1) == [HIDDEN_BYTES] * MICRO_BATCHES * (stage > 0)
        assert MASS_BYTES == ROWS * LENGTH * 4 * 2, "a float32 for every token and cost weight"


@pytest.mark.parametrize("variant", ["distilled", "self-supervised"])
def test_exits_that_are_distilled_cost_a_second_tensor_of_that_size_each_way_and_nothing_else(variant, of_stages):
    for stage, results in enumerate(of_stages):
        found = results[variant]
        assert messages_to(found, stage + 1) == [HIDDEN_BYTES] * 2 * MICRO_BATCHES * (stage < STAGES - 1)
        assert messages_to(found, stage - 1) == [HIDDEN_BYTES] * 2 * MICRO_BATCHES * (stage > 0)
        # The teacher always says something; behind a frozen backbone the other gradient does not.
        learns = [True, variant == "distilled"]
        assert found["news"] == learns * MICRO_BATCHES * (stage > 0)


def most_kept(of_stages, variant):
    return max(results[variant]["kept"] for results in of_stages)


@pytest.mark.parametrize("variant", ["tied exits", "own exits on every stage", "exits in their phase", "distilled"])
def test_exits_keep_no_activations(variant, of_stages):
    assert most_kept(of_stages, variant) <= 1.05 * most_kept(of_stages, "no exits")
    for results in of_stages:
        # On its own stage an exit needs what its head keeps for one micro-batch, while its loss is computed.
        assert results[variant]["kept"] <= results["no exits"]["kept"] + 6 * HIDDEN_BYTES
        assert results[variant]["matrices"] <= 0


def test_a_frozen_backbone_keeps_the_states_at_its_exits_only(of_stages):
    # Two exits of stage 1 and one of stage 2, and the head of one of them while its loss is computed.
    states = [results["frozen"]["kept"] / HIDDEN_BYTES for results in of_stages]
    in_flight = [stage_exits * (STAGES - stage) for stage, stage_exits in enumerate((0, 2, 1, 0))]
    assert [0 <= kept - least <= 3 for kept, least in zip(states, in_flight, strict=True)] == [True] * STAGES


def test_a_frozen_backbone_is_not_differentiated_through(of_stages):
    for stage, results in enumerate(of_stages):
        assert results["frozen"]["news"] == [False] * MICRO_BATCHES * (stage > 0)
        assert results["tied exits"]["news"] == [True] * MICRO_BATCHES * (stage > 0)


def test_blocks_behind_the_deepest_exit_do_not_run(of_stages):
    whole, shallow = (
        [results[name]["kept"] for results in of_stages] for name in ("no exits", "without the full depth")
    )
    assert shallow[2:] == [0, 0]
    assert 0 < shallow[1] < 0.6 * whole[1], "one of two blocks"


def test_the_counts_see_a_loss_that_is_computed_in_the_forward_pass(of_stages):
    in_use, plain = MISTAKES
    assert most_kept(of_stages, plain) > 2 * most_kept(of_stages, "no exits")
    assert [results[in_use]["matrices"] for results in of_stages] == [0, 6, 2, 1], "two exits by three in flight ..."
