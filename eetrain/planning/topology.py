"""Which process is which stage of which replica, and what of a batch it gets: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from eetrain.errors import TopologyError
from eetrain.planning.partition import check_stages


@dataclass(frozen=True)
class Topology:
    """Stages times replicas, as DeepSpeed numbers them: ``rank = stage * replicas + replica``.

    Args:
        stages: of the pipeline.
        replicas: of the whole pipeline, each with batches of its own.
    """

    stages: int
    replicas: int

    @classmethod
    def of(cls, world_size: int, stages: int, num_blocks: int) -> Topology:
        """The topology of so many processes.

        Raises:
            TopologyError: stages that the backbone cannot have, or that do not divide the processes.
        """
        check_stages(stages, num_blocks)
        if world_size % stages:
            fits = [count for count in range(1, min(world_size, num_blocks) + 1) if world_size % count == 0]
            raise TopologyError(
                f"stages={stages} does not divide the {world_size} processes of the run.",
                hint=f"Every replica is one process a stage: set stages to one of {', '.join(map(str, fits))}, or "
                f"start a multiple of {stages} processes (trainer.devices times trainer.num_nodes).",
            )
        return cls(stages, world_size // stages)

    def stage_of(self, rank: int) -> int:
        """Which stage a process runs, from 0."""
        return rank // self.replicas

    def replica_of(self, rank: int) -> int:
        """Which replica a process belongs to, from 0."""
        return rank % self.replicas

    def rank_of(self, stage: int, replica: int) -> int:
        """The process of a stage and replica."""
        return stage * self.replicas + replica


def check_micro_batches(micro_batches: int, batch_size: int | None = None) -> None:
    """Refuse micro-batches that a batch cannot be cut into.

    Args:
        micro_batches: of a step and replica.
        batch_size: rows of a step and replica, if known.

    Raises:
        TopologyError: none, or they do not divide the batch.
    """
    if micro_batches < 1:
        raise TopologyError(f"micro_batches={micro_batches}.", hint="Set it to 1 or more; 4 times the stages is usual.")
    if batch_size is not None and batch_size % micro_batches:
        fits = ", ".join(str(count) for count in range(1, batch_size + 1) if batch_size % count == 0)
        raise TopologyError(
            f"micro_batches={micro_batches} does not divide data.batch_size={batch_size}, the rows of a replica's "
            "step.",
            hint=f"Set micro_batches to one of {fits}, or data.batch_size to a multiple of {micro_batches}.",
        )
