"""The mistakes of launches, from variables given as mappings."""

from pathlib import Path

import pytest

from eetrain.diagnosis.launch import check_tasks, check_variables, launch_checks, shown_variables
from eetrain.diagnosis.slurm_job import check_script, slurm_checks

ROOT = Path(__file__).parents[3]

# As Slurm 22.05 sets them for the last task of `--nodes=2 --ntasks-per-node=2`, in a step of srun.
TASK = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "job.sh",
    "SLURM_JOB_NODELIST": "d[0-1]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
}
AGENT = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def by_name(checks):
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_a_good_slurm_task():
    found = by_name(launch_checks({**TASK, "SLURM_RESTART_COUNT": "2"}, devices=2, nodes=2))
    assert found["launch"].found == "slurm, job 17 on d[0-1], process 3 of 4, 2 nodes, restarted 2 times"
    assert found["tasks"].found == "2 on each of 2 nodes"
    assert {check.state for check in found.values()} == {"ok"}


def test_good_torchrun_and_plain_shell():
    found = by_name(launch_checks(AGENT))
    assert found["launch"].found == "torchrun, process 1 of 2"
    assert found["variables"].state == "ok"
    assert "tasks" not in found
    plain = by_name(launch_checks({"HOME": "/root"}))
    assert plain["launch"].found == "plain, process 0 of 1"
    assert (plain["variables"].found, plain["variables"].state) == ("none set", "ok")


def test_values_are_shown_of_harmless_names_only():
    environ = {**TASK, "WANDB_API_KEY": "s3cret", "SLURM_JOB_COMMENT": "s3cret", "HF_TOKEN": "s3cret", "RANK": "3"}
    assert "s3cret" not in repr(launch_checks(environ))
    assert "s3cret" not in repr(shown_variables(environ))
    assert shown_variables(environ)["SLURM_JOB_ID"] == "17"


def test_bare_ntasks():
    (check,) = check_tasks(without(TASK, "SLURM_NTASKS_PER_NODE"))
    assert check.state == "error"
    assert "bare --ntasks" in check.found
    assert "#SBATCH --ntasks-per-node=2" in check.hint


def test_tasks_that_differ_from_devices():
    (check,) = check_tasks(TASK, devices=4, nodes=2)
    assert check.state == "error"
    assert check.found == "trainer.devices=4, but Slurm runs 2 tasks on each node (--ntasks-per-node)."
    (check,) = check_tasks(TASK, devices=2, nodes=1)
    assert check.found == "trainer.num_nodes=1, but Slurm gave the job 2 nodes (--nodes)."


def test_tasks_that_differ_from_gpus():
    (check,) = check_tasks({**TASK, "SLURM_GPUS_ON_NODE": "4"})
    assert (check.state, check.found) == ("error", "2 on each of 2 nodes, but 4 GPUs on this one")
    assert "--ntasks-per-node=4" in check.hint
    (check,) = check_tasks({**TASK, "SLURM_GPUS_ON_NODE": "2"})
    assert check.state == "ok"


def test_the_script_itself_is_no_task():
    (check,) = check_tasks(without(TASK, "SLURM_STEP_ID"))
    assert check.state == "note"
    assert check.found.endswith("but this is the script itself, outside srun")
    assert "srun eetrain fit" in check.hint


def test_srun_of_torchrun():
    both = {**TASK, **AGENT}
    check = check_variables(both)
    assert check.state == "error"
    assert check.found.startswith("torchrun inside srun with 4 tasks on 2 nodes: each of the tasks starts processes")
    assert "srun --ntasks-per-node=1 torchrun" in check.hint
    # One torchrun on each node that spans both is right.
    once = {**both, "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "4"}
    assert check_variables(once).state == "ok"


def test_torchrun_on_one_of_two_nodes():
    check = check_variables({**without(TASK, "SLURM_STEP_ID"), **AGENT})
    assert check.state == "error"
    assert check.found.startswith("torchrun runs on 1 of the 2 nodes of this job")
    assert "torchrun --nnodes=2" in check.hint


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE without RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT, and no launcher",
        ),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK without RANK and WORLD_SIZE"),
        (without(AGENT, "TORCHELASTIC_RUN_ID", "RANK"), "LOCAL_RANK and WORLD_SIZE without RANK, and no launcher"),
    ],
)
def test_half_of_a_launchers_variables(environ, text):
    check = check_variables(environ)
    assert check.state == "error"
    assert check.found.startswith(text)
    assert check.hint.startswith(f"unset {' '.join(n for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE') if n in environ)},")


def test_all_variables_by_hand_are_accepted():
    assert check_variables(without(AGENT, "TORCHELASTIC_RUN_ID")).state == "ok"


def test_slurms_variables_without_a_job():
    check = check_variables({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert check.state == "error"
    assert check.found.startswith("SLURM_NTASKS is set, but there is no job (SLURM_JOB_ID)")
    assert check.hint == "unset SLURM_NTASKS SLURM_PROCID"


def scontrol(folder, answer, status=0, script=""):
    """A program in the place of Slurm's, that answers as it does."""
    (folder / "answer").write_text(answer)
    (folder / "script").write_text(script)
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then cat {folder}/answer; exit {status}; fi\n'
        f'[ "$1 $2 $3 $4" = "write batch_script 17 -" ] && cat {folder}/script\n'
    )
    program.chmod(0o755)
    return {**TASK, "PATH": f"{folder}:/usr/bin:/bin"}


def test_a_job_that_can_be_requeued(tmp_path):
    script = "#!/bin/bash\n#SBATCH --signal=SIGUSR1@180\n#SBATCH --output=%j.log\nsrun x $HOME\n"
    said = "JobId=17 JobName=a Requeue=1 Restarts=0 TimeLimit=01:00:00 NtasksPerN:B:S:C=2:0:*:*\n"
    checks = slurm_checks(scontrol(tmp_path, said, script=script))
    assert [(check.name, check.found, check.state) for check in checks] == [
        ("requeue", "on, time limit 01:00:00", "ok"),
        ("signal", "SIGUSR1 before the time limit", "ok"),
    ]


def test_a_job_that_cannot_be_requeued(tmp_path):
    requeue, signal = slurm_checks(scontrol(tmp_path, "JobId=17 Requeue=0 TimeLimit=5:00\n", script="#!/bin/bash\n"))
    assert (requeue.state, requeue.found) == ("note", "off for this job, time limit 5:00")
    assert "#SBATCH --requeue" in requeue.hint
    assert signal.state == "note"
    assert "#SBATCH --signal=SIGUSR1@180" in signal.hint


def test_variables_of_a_job_that_has_ended(tmp_path):
    (check,) = slurm_checks(scontrol(tmp_path, "slurm_load_jobs error: Invalid job id specified\n", status=1))
    assert (check.state, check.found) == ("error", "Slurm knows no job 17")
    (check, _) = slurm_checks(scontrol(tmp_path, "Unable to contact slurm controller\n", status=1))
    assert (check.state, check.found) == ("note", "scontrol gives no answer here")


def test_no_scontrol_and_no_job(tmp_path):
    (check,) = slurm_checks({**TASK, "PATH": str(tmp_path)})
    assert (check.state, check.found) == ("note", "no scontrol on PATH: the job cannot requeue itself")
    assert "status 75" in check.hint
    assert slurm_checks({"PATH": "/usr/bin"}) == []


def test_scripts():
    (lost,) = check_script("#SBATCH --signal=B:USR1@60\nsrun x\n")
    assert lost.found == "B:USR1 goes to the script alone, which has no trap for it"
    (kept,) = check_script("#SBATCH --signal=B:USR1@60\ntrap 'kill -USR1 $child' USR1\nsrun x & wait\n")
    assert kept.state == "ok"
    (deaf,) = check_script("#SBATCH --signal=USR2@60\n")
    assert deaf.found == "USR2, which a run does not listen to"
    _, unexpanded = check_script("#SBATCH --signal=USR1@60\n#SBATCH --output=$HOME/a.log\n#SBATCH --time $T\n")
    assert unexpanded.state == "error"
    assert unexpanded.found == "--output, --time with a $, not expanded there"


@pytest.mark.parametrize("name", ["train.sbatch", "eval_array.sbatch"])
def test_our_own_scripts_have_no_fault(name):
    checks = check_script((ROOT / "slurm" / name).read_text(encoding="utf-8"))
    assert [check for check in checks if check.state == "error"] == []
