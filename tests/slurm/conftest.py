import pytest

pytest.register_assert_rewrite("slurm_harness", "story")  # their assertions show values, too

from slurm_harness import Slurm, missing  # noqa: E402


def cluster(nodes):
    if reason := missing():
        pytest.skip(reason)
    with Slurm(nodes) as slurm:
        yield slurm


@pytest.fixture(scope="session")
def one_node():
    """A Slurm of one node, for all tests of this process."""
    yield from cluster(1)


@pytest.fixture(scope="session")
def two_nodes():
    """A Slurm of two nodes, for all tests of this process."""
    yield from cluster(2)
