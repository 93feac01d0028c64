"""`eetrain plan`: a pipeline on a cluster that need not be there."""

from __future__ import annotations

from typing import Any, Literal

from eetrain.commands.output import print_json
from eetrain.commands.plan_table import picture_title, show_plan
from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig
from eetrain.exits.config import HeadKind, OutputKind
from eetrain.planning.cluster import Cluster, find_device
from eetrain.planning.memory import Precision
from eetrain.planning.plan import Workload
from eetrain.planning.plan_files import write_plan
from eetrain.planning.planner import Planner
from eetrain.planning.shapes import find_config, hollow_model
from eetrain.training.settings import Tuning

_OF_CHECKPOINT = ("format", "fingerprint")
"""What an ``exits`` entry of a checkpoint holds besides the exits' settings."""


def plan(
    model: str,
    exits: str | list[int] | None = None,
    head: HeadKind = "norm",
    output: OutputKind = "tied",
    tuning: Tuning = "full",
    full_depth: bool = True,
    devices: int = 8,
    device: str = "h100",
    flops: float | None = None,
    memory: float | None = None,
    bandwidth: float | None = None,
    latency: float = 1e-5,
    utilisation: float = 0.4,
    stages: int | None = None,
    batch_size: int = 256,
    micro_batch_size: int = 1,
    length: int = 4096,
    precision: Precision = "bfloat16",
    zero_stage: Literal[0, 1] = 1,
    activation_checkpointing: bool = False,
    fill: bool = False,
    out: str | None = None,
    json: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Plan a pipeline: step time, bubbles, memory and the cost of each exit, by arithmetic alone.

    Args:
        model: llama-2-7b, llama-3-70b or llama-3.1-405b, or a folder or hub id, of which only config.json is read.
        exits: blocks with an exit, such as 8,16,24; by default those of the folder, if it has some.
        head: of the exits given by --exits: tied, norm, mlp or block.
        output: their output matrix: tied or own.
        tuning: what of the backbone is trained: full, frozen, or lora with the default adapters.
        full_depth: whether the full depth has a loss, too.
        devices: how many; stages times replicas.
        device: a100-40gb, a100-80gb, h100, h200, b200, l40s, rtx-4090, mi300x, or custom.
        flops: peak FLOP/s of a device with dense matrices, in place of the published number.
        memory: bytes of a device, likewise.
        bandwidth: bytes per second between devices, one way, likewise; published is that within a node.
        latency: seconds of a transfer besides.
        utilisation: share of the peak that matrix products reach; measure it on one device.
        stages: of the pipeline; by default the best number that divides the devices.
        batch_size: rows of one optimizer step, over all replicas.
        micro_batch_size: rows of a micro-batch.
        length: tokens of a row.
        precision: bfloat16 or float32, of parameters, gradients and activations.
        zero_stage: 1 divides the optimizer's state over the replicas, 0 does not.
        activation_checkpointing: recompute blocks in backward instead of keeping their activations.
        fill: run extra micro-batches in the bubbles.
        out: folder for plan.json and timeline.png.
        json: write one JSON object.
        trust_remote_code: run code that comes with the model's configuration.
    """
    cluster = _cluster(device, devices, flops, memory, bandwidth, latency, utilisation)
    workload = Workload(batch_size, length, micro_batch_size, activation_checkpointing, zero_stage, fill)
    fields = find_config(model, trust_remote_code=trust_remote_code)
    config = _exits(fields.pop("exits", None), exits, head, output)
    hollow = hollow_model(fields, config, precision=precision, tuning=tuning, full_depth=full_depth)
    planner = Planner.of(hollow, cluster, workload, precision=precision, full_depth=full_depth)
    layouts = planner.layouts() if stages is None else [planner.layout(stages)]
    best = planner.plan(layouts[0])
    about = {
        "model": model,
        "device": device,
        "precision": precision,
        "tuning": tuning,
        "exit_layers": list(hollow.exit_layers),
        "parameters": sum(parameter.numel() for parameter in hollow.parameters()),
    }
    found: dict[str, Any] = {**about, **best.to_dict(), "candidates": [layout.summary() for layout in layouts]}
    written = [] if out is None else write_plan(found, best.timeline, out, title=picture_title(about, best))
    files = [str(path) for path in written]
    if json:
        print_json({**found, "files": files})
    else:
        show_plan(about, best, layouts)
    return 0


def _cluster(
    device: str,
    devices: int,
    flops: float | None,
    memory: float | None,
    bandwidth: float | None,
    latency: float,
    utilisation: float,
) -> Cluster:
    given = {"flops": flops, "memory": memory, "bandwidth": bandwidth}
    if device == "custom":
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ConfigError(
                f"device=custom, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
                hint="Set --flops (FLOP/s), --memory (bytes) and --bandwidth (bytes per second).",
            )
        numbers = {name: float(value) for name, value in given.items() if value is not None}
    else:
        published = find_device(device)
        numbers = {name: float(getattr(published, name) if value is None else value) for name, value in given.items()}
    return Cluster(devices, **numbers, utilisation=utilisation, latency=latency)


def _exits(
    stored: dict[str, Any] | None, given: str | list[int] | None, head: HeadKind, output: OutputKind
) -> ExitConfig:
    if given is None and stored is not None:
        return ExitConfig.from_dict({key: value for key, value in stored.items() if key not in _OF_CHECKPOINT})
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(f"exits={given!r} is no list of blocks.", hint="For example --exits 8,16,24.")
        given = [int(part) for part in parts]
    return ExitConfig(layers=given or [], head=head, output=output)
