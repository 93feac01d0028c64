"""Where processes meet, and what they talk with."""

import os
import socket

from eetrain.diagnosis.all_reduce import check_all_reduce
from eetrain.diagnosis.communication import check_shared_memory, communication_checks
from eetrain.diagnosis.meeting import check_interfaces, check_meeting_point

HAND = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
SLURM = {"SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0"}


def test_a_free_and_a_taken_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        where, taken = check_meeting_point({**HAND, "MASTER_PORT": port})
        assert (where.found, where.state) == ("127.0.0.1", "ok")
        assert (taken.state, taken.found) == ("error", f"MASTER_PORT={port} is taken on this machine")
        assert taken.hint == "Set MASTER_PORT to a free port, or unset it."
        # torchrun listens there itself, and only the first process of others will.
        assert len(check_meeting_point({**HAND, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"})) == 1
        assert len(check_meeting_point({**SLURM, "SLURM_PROCID": "1", "MASTER_PORT": port})) == 0
    (_, free) = check_meeting_point({**HAND, "MASTER_PORT": port})
    assert (free.state, free.found) == ("ok", f"MASTER_PORT={port} is free")


def test_the_port_of_a_slurm_job_is_that_of_lightning(monkeypatch):
    from lightning.fabric.plugins.environments import SLURMEnvironment

    (check,) = check_meeting_point(SLURM)
    for name in [name for name in os.environ if name.startswith("SLURM_") or name == "MASTER_PORT"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", SLURM["SLURM_JOB_ID"])
    monkeypatch.setenv("MASTER_PORT", "")  # so that it is restored afterwards
    monkeypatch.delenv("MASTER_PORT")
    assert check.found.startswith(f"{SLURMEnvironment().main_port} (from the job's id)")
    monkeypatch.undo()
    assert check_meeting_point({**SLURM, "SLURM_NTASKS": "1"}) == []
    assert check_meeting_point({}) == []


def test_addresses_and_ports_that_are_none():
    where, port = check_meeting_point({**HAND, "MASTER_ADDR": "no such host", "MASTER_PORT": "70000"})
    assert where.state == "error"
    assert where.found.startswith("MASTER_ADDR=no such host has no address (")
    assert (port.state, port.found) == ("error", "MASTER_PORT='70000' is no port")


def test_interfaces_of_gloo():
    (found,) = check_interfaces({"GLOO_SOCKET_IFNAME": "ib0"}, ["lo", "ib0"])
    assert (found.name, found.state) == ("gloo interface", "ok")
    (missing,) = check_interfaces({"GLOO_SOCKET_IFNAME": "eth9"}, ["lo", "ib0"])
    assert (missing.state, missing.found) == ("error", "GLOO_SOCKET_IFNAME=eth9, which is not there")
    assert missing.hint.startswith("This machine has ib0, lo;")


def nccl(value):
    checks = check_interfaces({"NCCL_SOCKET_IFNAME": value}, ["lo", "eth0", "eth1", "ib0"])
    return checks[-1].state, checks[-1].found


def test_interfaces_of_nccl_are_beginnings_of_names():
    assert nccl("eth") == ("ok", "eth0, eth1 (NCCL_SOCKET_IFNAME=eth)")
    assert nccl("=eth0") == ("ok", "eth0 (NCCL_SOCKET_IFNAME==eth0)")
    assert nccl("=eth") == ("error", "NCCL_SOCKET_IFNAME==eth, which is not there")
    assert nccl("^lo,eth") == ("ok", "ib0 (NCCL_SOCKET_IFNAME=^lo,eth)")
    assert nccl("bond") == ("error", "NCCL_SOCKET_IFNAME=bond, which is not there")


def test_two_processes_add_up(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # without a store: taken away meanwhile
    check = check_all_reduce()
    assert check.state == "ok", check.found
    assert check.found.startswith("two processes over gloo: 4 MiB in ")
    assert 0 < check.measured["seconds"] < check.measured["whole_seconds"]
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def test_a_missing_interface_fails_in_words(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    check = check_all_reduce()
    assert check.state == "error"
    assert check.found.startswith("two processes over gloo failed: ")
    assert "nosuch0" in check.found
    found = {each.name: each for each in communication_checks()}
    assert found["backends"].found.startswith("gloo, ")


def test_shared_memory(tmp_path):
    assert check_shared_memory(tmp_path / "missing") == []
    (check,) = check_shared_memory(tmp_path)
    assert check.measured["free_bytes"] > 0
    (proc,) = check_shared_memory(type(tmp_path)("/proc"))  # a file system of no size
    assert proc.state == "note"
    assert "--shm-size" in proc.hint
