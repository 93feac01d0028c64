"""Which part of the data a process of a pipeline reads."""

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment

from eetrain.parallel import PipelineStrategy
from eetrain.planning.topology import Topology


@pytest.mark.parametrize(("processes", "stages"), [(1, 1), (3, 3), (3, 1), (4, 2), (6, 2), (6, 3)])
def test_stages_of_a_replica_read_the_same_and_replicas_share_the_data(processes, stages):
    strategy, environment = PipelineStrategy(stages=stages), LightningEnvironment()
    strategy.cluster_environment = environment
    environment.set_world_size(processes)
    topology = Topology.of(processes, stages, num_blocks=stages)
    for rank in range(processes):
        environment.set_global_rank(rank)
        share = {"num_replicas": processes // stages, "rank": topology.replica_of(rank)}
        assert strategy.distributed_sampler_kwargs == share
    assert strategy.topology == {"stages": stages, "replicas": processes // stages, "zero_stage": 0}
