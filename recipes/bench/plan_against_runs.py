"""Compare planned step times of a pipeline with real ones.

    python recipes/bench/plan_against_runs.py

Runs: a random Llama, all trained, in one process and on two stages, one thread each, without exits, with one and with
three. The plan knows of the machine only how many FLOP/s a process reaches in that step while another one does the
same: cores share memory and clock. Speed-up is the step of one process alone over that of the pipeline.

Harness, labelled as such: DeepSpeed's real engine and schedule on four stages that sleep as long as the plan says each
of a 7B model's stages computes, scaled down; so that the timing of the schedule is tested without four devices. With
and without an exit on a middle stage, which must cost once a step and not once a micro-batch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import transformers

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones.loading import fresh_backbone
from eetrain.objectives import MultiExitCrossEntropy
from eetrain.parallel.cut import balanced_bounds, cut
from eetrain.parallel.deepspeed_setup import engine_config, join_processes, load_deepspeed, quiet, start_engine
from eetrain.planning.cluster import Cluster
from eetrain.planning.costs import piece_costs
from eetrain.planning.partition import partition
from eetrain.planning.pieces import pipeline_pieces
from eetrain.planning.schedule import one_forward_one_backward
from eetrain.planning.shapes import find_config, hollow_model
from eetrain.planning.simulation import StageTimes, simulate
from eetrain.planning.timing import stage_times
from eetrain.planning.topology import Topology
from eetrain.testing.processes import run_on_processes

EXITS = ([], [4], [2, 4, 6])


def main() -> None:
    args = arguments()
    print(f"{platform.processor() or platform.machine()}, 1 thread a process, torch {torch.__version__}, ", end="")
    print(
        f"transformers {transformers.__version__}, float32, hidden {args.hidden}, {args.blocks} blocks, vocabulary ",
        end="",
    )
    print(f"{args.vocab}, {args.micro_batches} micro-batches of 1 x {args.length} tokens, medians of {args.repeats}")
    for exits in EXITS:
        compare(args, exits)
    harness(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": 256, "blocks": 8, "vocab": 4096, "length": 256, "micro_batches": 8, "repeats": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sleep", type=float, default=1.5, help="seconds of a planned step of the harness")
    return parser.parse_args()


def compare(args: argparse.Namespace, exits: list[int]) -> None:
    alone, _, flops = run_on_processes(run, 1, vars(args), exits, timeout=900)[0]
    with ThreadPoolExecutor(2) as pool:
        pair = list(pool.map(lambda _: run_on_processes(run, 1, vars(args), exits, timeout=900)[0][0], range(2)))
    piped, bounds, _ = run_on_processes(run, 2, vars(args), exits, timeout=900)[0]
    one, two = statistics.median(alone), statistics.median(piped)
    beside = statistics.median([seconds for run_of_two in pair for seconds in run_of_two])
    cluster = Cluster(devices=2, flops=flops / beside, utilisation=1.0, memory=1e12, bandwidth=1e9)
    costs = piece_costs(build(args, exits), args.length)
    times = stage_times(costs, bounds, cluster, rows=1)
    sent = cluster.transfer(args.length * args.hidden * 4)
    schedule = one_forward_one_backward(2, args.micro_batches)
    planned = simulate(schedule, times, send_activation=sent, send_gradient=sent)
    print(
        f"exits {exits}: one process {one:.3f} s ({min(alone):.3f}..{max(alone):.3f}), {beside:.3f} s beside "
        f"another one, two stages {two:.3f} s ({min(piped):.3f}..{max(piped):.3f}), speed-up {one / two:.2f}; "
        f"planned {planned.seconds:.3f} s, measured/planned {two / planned.seconds:.2f}, "
        f"planned bubble {planned.bubble_share:.0%}"
    )


def build(args: argparse.Namespace, exits: list[int]) -> MultiExitModel:
    torch.manual_seed(0)
    backbone = fresh_backbone(
        {
            "model_type": "llama",
            "hidden_size": args.hidden,
            "intermediate_size": 3 * args.hidden,
            "num_hidden_layers": args.blocks,
            "num_attention_heads": args.hidden // 64,
            "vocab_size": args.vocab,
        }
    )
    return MultiExitModel(backbone, ExitConfig(layers=exits, head="norm"))


def run(settings: dict, exits: list[int]) -> tuple[list[float], tuple[int, ...], float]:
    """Seconds of every step, the bounds of the stages, and the FLOPs of a step."""
    args = argparse.Namespace(**settings)
    load_deepspeed()
    join_processes(dist.get_rank(), torch.device("cpu"))
    from eetrain.parallel.pipeline import ExitPipeline
    from eetrain.parallel.runner import PipelineRunner

    model, stages = build(args, exits), dist.get_world_size()
    objective = MultiExitCrossEntropy(0.5)
    objective.bind(model.exit_layers, model.num_blocks)
    flops = args.micro_batches * sum(cost.flops for cost in piece_costs(model, args.length))
    bounds = balanced_bounds(model, stages, args.length, full_depth=True)
    topology = Topology.of(stages, stages, model.num_blocks)
    pipeline = ExitPipeline(cut(model, bounds, topology, dist.get_rank()))
    optimizer = torch.optim.AdamW([p for p in pipeline.parameters() if p.requires_grad])
    config = engine_config(zero_stage=0, precision="float32", clip_norm=None, accumulate=args.micro_batches)
    runner = PipelineRunner(
        pipeline, start_engine(pipeline, optimizer, config), objective, topology, args.micro_batches
    )
    ids = torch.randint(0, args.vocab, (args.micro_batches, args.length))
    return timed(lambda: runner.train({"input_ids": ids, "labels": ids}, 0), args.repeats), bounds, float(flops)


def timed(step, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def harness(args: argparse.Namespace) -> None:
    """Sleeping stages of a 7B model on four devices."""
    stages, found = 4, {}
    for exits in ([], [10]):
        model = hollow_model(find_config("llama-2-7b"), ExitConfig(layers=exits, head="norm"))
        costs = piece_costs(model, 2048)
        # Stages as they are best without exits: the question is what an exit costs, not how stages move.
        plain = [0.0 if cost.piece.kind == "exit" else float(cost.flops) for cost in costs]
        bounds = partition(pipeline_pieces(model.num_blocks, exits), plain, stages)
        cluster = Cluster(devices=stages, flops=1.0, utilisation=1.0, memory=1e12, bandwidth=1e30)
        found[bool(exits)] = stage_times(costs, bounds, cluster, rows=1)
    schedule = one_forward_one_backward(stages, args.micro_batches)
    scale = args.sleep / simulate(schedule, found[False]).seconds
    for exits, times in found.items():
        times = [StageTimes(t.forward * scale, t.heads * scale, t.backward * scale) for t in times]
        planned = simulate(schedule, times).seconds
        seconds = statistics.median(run_on_processes(sleep_run, stages, times, args.micro_batches, args.repeats)[0])
        what = "one exit on the second stage" if exits else "no exit"
        heads = max(t.heads for t in times[:-1])
        print(
            f"harness, four sleeping stages, {what}: measured {seconds:.3f} s, planned {planned:.3f} s, "
            f"measured/planned {seconds / planned:.2f}" + (f"; the exit's own time {heads:.3f} s" if exits else "")
        )


class Sleep(torch.autograd.Function):
    """Identity that takes its time in both directions."""

    @staticmethod
    def forward(ctx, hidden, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


class SleepingStage(torch.nn.Module):
    """A stage that computes nothing.

    Args:
        times: how long it takes.
        last: whether it ends in the loss.
    """

    def __init__(self, times: StageTimes, last: bool) -> None:
        super().__init__()
        self.scale, self.times, self.last = torch.nn.Parameter(torch.ones(1)), times, last

    def forward(self, hidden):
        after = Sleep.apply(hidden * self.scale, self.times.forward, self.times.heads + self.times.backward)
        return after.sum() if self.last else after


def sleep_run(times: list[StageTimes], micro_batches: int, repeats: int) -> list[float]:
    deepspeed = load_deepspeed()
    join_processes(dist.get_rank(), torch.device("cpu"))
    with quiet():
        layers = [SleepingStage(own, last=place == len(times) - 1) for place, own in enumerate(times)]
        module = deepspeed.pipe.PipelineModule(layers, num_stages=len(times), partition_method="uniform")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    config = engine_config(zero_stage=0, precision="float32", clip_norm=None, accumulate=micro_batches)
    engine = start_engine(module, optimizer, config)
    batch = (torch.ones(1, 8), torch.ones(1))
    return timed(lambda: engine.train_batch(iter([batch] * micro_batches)), repeats)


if __name__ == "__main__":
    main()
