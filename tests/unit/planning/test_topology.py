"""Ranks, stages and replicas; what does not divide."""

import pytest

from eetrain.errors import TopologyError
from eetrain.planning.topology import Topology, check_micro_batches


def test_replicas_lie_side_by_side_on_a_stage():
    topology = Topology.of(world_size=6, stages=3, num_blocks=4)
    assert topology == Topology(stages=3, replicas=2)
    assert [topology.stage_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [topology.replica_of(rank) for rank in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("stages", range(1, 5))
@pytest.mark.parametrize("replicas", range(1, 5))
def test_every_rank_is_one_stage_of_one_replica(stages, replicas):
    topology = Topology.of(stages * replicas, stages, num_blocks=4)
    assert topology == Topology(stages, replicas)
    ranks = range(stages * replicas)
    assert [topology.rank_of(topology.stage_of(rank), topology.replica_of(rank)) for rank in ranks] == list(ranks)
    assert len({(topology.stage_of(rank), topology.replica_of(rank)) for rank in ranks}) == len(ranks)


def test_the_numbering_is_that_of_deepspeed():
    from eetrain.parallel.deepspeed_setup import load_deepspeed

    load_deepspeed()
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    for stages, replicas in ((1, 3), (2, 2), (3, 2), (4, 1)):
        theirs, ours = PipeDataParallelTopology(num_pp=stages, num_dp=replicas), Topology(stages, replicas)
        for rank in range(stages * replicas):
            place = theirs.get_coord(rank)
            assert (place.pipe, place.data) == (ours.stage_of(rank), ours.replica_of(rank))


@pytest.mark.parametrize(
    ("world_size", "stages", "message", "hint"),
    [
        (4, 5, "stages=5, but the backbone has 4 blocks and every stage needs one.", "Set stages to 4 or fewer."),
        (4, 0, "stages=0, but a pipeline has at least one.", "Set it to 1 or more."),
        (
            6,
            4,
            "stages=4 does not divide the 6 processes of the run.",
            "Every replica is one process a stage: set stages to one of 1, 2, 3, or start a multiple of 4 processes "
            "(trainer.devices times trainer.num_nodes).",
        ),
        (
            2,
            4,
            "stages=4 does not divide the 2 processes of the run.",
            "Every replica is one process a stage: set stages to one of 1, 2, or start a multiple of 4 processes "
            "(trainer.devices times trainer.num_nodes).",
        ),
    ],
)
def test_stages_that_do_not_fit(world_size, stages, message, hint):
    with pytest.raises(TopologyError) as caught:
        Topology.of(world_size, stages, num_blocks=4)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_micro_batches_cut_a_batch_evenly():
    fitting = [count for count in range(1, 13) if _divides(count, 12)]
    assert fitting == [1, 2, 3, 4, 6, 12]
    check_micro_batches(5)


def _divides(count, batch_size):
    try:
        check_micro_batches(count, batch_size)
    except TopologyError:
        return False
    return True


@pytest.mark.parametrize(
    ("count", "batch_size", "message", "hint"),
    [
        (0, None, "micro_batches=0.", "Set it to 1 or more; 4 times the stages is usual."),
        (
            4,
            6,
            "micro_batches=4 does not divide data.batch_size=6, the rows of a replica's step.",
            "Set micro_batches to one of 1, 2, 3, 6, or data.batch_size to a multiple of 4.",
        ),
        (
            8,
            4,
            "micro_batches=8 does not divide data.batch_size=4, the rows of a replica's step.",
            "Set micro_batches to one of 1, 2, 4, or data.batch_size to a multiple of 8.",
        ),
    ],
)
def test_micro_batches_that_do_not_fit(count, batch_size, message, hint):
    with pytest.raises(TopologyError) as caught:
        check_micro_batches(count, batch_size)
    assert (caught.value.message, caught.value.hint) == (message, hint)
