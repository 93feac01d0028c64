"""sbatch is a script here that says what Slurm 22.05 says; the real one is called by the tests in tests/slurm."""

from pathlib import Path

import pytest

from eetrain.cluster.submission import check, required_sbatch, sbatch_command, submit, without_job
from eetrain.errors import ConfigError

NO_CONFIGURATION = """sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
sbatch: error: fetch_config: DNS SRV lookup failed
sbatch: error: _establish_config_source: failed to fetch config
sbatch: fatal: Could not establish a configuration source
"""
NO_CONTROLLER = "allocation failure: Unable to contact slurm controller (connect failure)\n"


def fake(folder: Path, *, status: int = 0, out: str = "", err: str = "") -> str:
    """A program that keeps what it was given in ``seen``."""
    (folder / "out").write_text(out)
    (folder / "err").write_text(err)
    path = folder / "sbatch"
    path.write_text(
        f'#!/bin/sh\n{{ printf "%s\\n" "$@"; env | grep ^SLURM; cat; }} >"{folder}/seen"\n'
        f'cat "{folder}/out"; cat "{folder}/err" >&2; exit {status}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_a_script_is_checked_through_stdin(tmp_path: Path) -> None:
    command = fake(tmp_path, err="sbatch: Job 1 to start at 2026-11-20T20:55:27 using 2 processors on nodes n1\n")
    assert check(command, "#!/bin/bash\necho 'ü'\n") is None
    assert (tmp_path / "seen").read_text() == "--test-only\n#!/bin/bash\necho 'ü'\n"


@pytest.mark.parametrize("said", [NO_CONFIGURATION, NO_CONTROLLER])
def test_no_slurm_answers(tmp_path: Path, said: str) -> None:
    command = fake(tmp_path, status=1, err=said)
    assert check(command, "") == "no Slurm answers here"
    with pytest.raises(ConfigError) as caught:
        submit(command, tmp_path / "job.sbatch")
    assert caught.value.message.startswith("sbatch gave no number of a job: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        (
            "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid partition name specified\n",
            "invalid partition specified: nope; Invalid partition name specified",
            "Set partition in the site file to one that `sinfo` shows.",
        ),
        (
            "sbatch: error: Invalid generic resource (gres) specification\n",
            "Invalid generic resource (gres) specification",
            "Set gpu_request in the site file",
        ),
        (
            "allocation failure: Requested node configuration is not available\n",
            "Requested node configuration is not available",
            "Ask for less: --nodes, --gpus",
        ),
        (
            "allocation failure: Invalid feature specification\n",
            "Invalid feature specification",
            "Set constraint in the site file",
        ),
        (
            "sbatch: unrecognized option '--badopt'\nTry \"sbatch --help\" for more information\n",
            "unrecognized option '--badopt'",
            "Check the entries of sbatch in the site file.",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
            "Batch job submission failed: Invalid account or account/partition combination specified",
            "Set account in the site file",
        ),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\n", "QOSMaxSubmitJobPerUserLimit", "Set qos in the site file"),
        ("sbatch: error: No.\nsbatch: error: No.\n", "No", "`sinfo` shows what the cluster has."),
        ("", "sbatch said nothing", "`sinfo` shows what the cluster has."),
    ],
)
def test_refusals_as_one_line_with_a_hint(tmp_path: Path, said: str, message: str, hint: str) -> None:
    command = fake(tmp_path, status=1, err=said)
    for refused in (lambda: check(command, ""), lambda: submit(command, tmp_path / "job.sbatch")):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert caught.value.message == f"Slurm does not take the job: {message}."
        assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("out", ["4711\n", "4711;cluster\n", "a site's greeting\n4711\n"])
def test_the_number_of_a_job(tmp_path: Path, out: str) -> None:
    command = fake(tmp_path, out=out, err="sbatch: a site's remark\n")
    assert submit(command, tmp_path / "a b.sbatch") == "4711"
    assert (tmp_path / "seen").read_text() == f"--parsable\n{tmp_path}/a b.sbatch\n"


def test_an_answer_without_a_number(tmp_path: Path) -> None:
    command = fake(tmp_path, out="thanks 12\n")
    with pytest.raises(ConfigError, match=r"gave no number of a job: it said nothing\. HINT: Look at `sinfo`"):
        submit(command, tmp_path / "job.sbatch")


def test_a_job_submitted_from_a_job_does_not_take_over_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "9", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    assert without_job(own) == {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    outside = {"SLURM_TIME_FORMAT": "relative", "PATH": "/bin"}
    assert without_job(outside) == outside
    launchers = ["MASTER_PORT", "MASTER_ADDR", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    leftover = dict.fromkeys([*launchers, "TORCHELASTIC_RUN_ID"], "1")
    assert without_job({**leftover, "PATH": "/bin", "RANKING": "x"}) == {"PATH": "/bin", "RANKING": "x"}
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "9")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    assert submit(fake(tmp_path, out="5\n"), tmp_path / "x") == "5"
    assert (tmp_path / "seen").read_text() == f"--parsable\n{tmp_path}/x\n"


def test_where_sbatch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sbatch_command() is None
    with pytest.raises(ConfigError) as caught:
        required_sbatch()
    assert caught.value.message == "There is no sbatch here, so nothing can be submitted."
    assert "--dry-run" in caught.value.hint
    assert "torchrun" in caught.value.hint
    command = fake(tmp_path)
    assert sbatch_command() == required_sbatch() == command
