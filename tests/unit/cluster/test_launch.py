import os

import pytest

from eetrain.cluster.launch import Launch, check_launch, this_process
from eetrain.errors import TopologyError

SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_RESTART_COUNT": "3",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "1",
}


def test_slurm():
    assert Launch.of(SLURM) == Launch("slurm", 5, 1, 8, 2, 4, "123", 3)


def test_an_array_task_is_named_as_scontrol_takes_it():
    array = {**SLURM, "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "7"}
    assert Launch.of(array).job_id == "120_7"


def test_torchrun():
    assert Launch.of(TORCHRUN) == Launch("torchrun", 3, 1, 4, 2, None, None, 1)


def test_torchrun_inside_a_slurm_job_is_torchrun():
    assert Launch.of({**SLURM, **TORCHRUN}) == Launch("torchrun", 3, 1, 4, 2, None, "123", 1)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_of_slurm_is_plain(name):
    launch = Launch.of({**SLURM, "SLURM_JOB_NAME": name})
    assert (launch.launcher, launch.rank, launch.job_id) == ("plain", 0, "123")


def test_plain():
    assert Launch.of({}) == Launch("plain", 0, 0, 1, 1, None, None, 0)
    child = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}
    assert Launch.of(child) == Launch("plain", 1, 1, 2, 1, None, None, 0)
    assert Launch.of({"NODE_RANK": "1"}).rank != 0, "the first process of another machine is not the first of the run"


def test_what_slurm_writes_for_several_nodes_is_read():
    assert Launch.of({**SLURM, "SLURM_NTASKS_PER_NODE": "4(x2)"}).tasks_per_node == 4


def test_a_launch_that_fits():
    check_launch(4, 2, SLURM)
    check_launch("auto", 2, SLURM)
    check_launch(7, 9, {})
    check_launch(1, 1, {**SLURM, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"} | {"SLURM_NTASKS_PER_NODE": ""})


def refused(*args):
    with pytest.raises(TopologyError) as caught:
        check_launch(*args)
    return caught.value.message, caught.value.hint


def test_tasks_that_differ_from_devices():
    message, hint = refused(2, 2, SLURM)
    assert message == "trainer.devices=2, but Slurm runs 4 tasks on each node (--ntasks-per-node)."
    assert hint == "Set trainer.devices=4, or #SBATCH --ntasks-per-node=2: one task for each device."


def test_devices_as_the_command_line_gives_them():
    assert refused("2", 2, SLURM)[0].startswith("trainer.devices=2, but Slurm runs 4 tasks")


def test_nodes_that_differ():
    message, hint = refused(4, 1, SLURM)
    assert message == "trainer.num_nodes=1, but Slurm gave the job 2 nodes (--nodes)."
    assert "trainer.num_nodes=2" in hint


def test_a_bare_number_of_tasks():
    bare = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
    message, hint = refused(4, 2, bare)
    assert "8 tasks by a bare --ntasks" in message
    assert hint == "Write #SBATCH --nodes=2 and #SBATCH --ntasks-per-node=4 instead of --ntasks."


def test_the_owner_is_named():
    named = this_process({"SLURM_JOB_ID": "77"})
    assert named.endswith(f"process {os.getpid()}, job 77")
