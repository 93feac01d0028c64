"""The run folder, on real file systems."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eetrain.diagnosis import lock_trial
from eetrain.diagnosis.check import duration, size
from eetrain.diagnosis.checkpoint_size import CheckpointSize
from eetrain.diagnosis.mounts import check_file_system, mount_of
from eetrain.diagnosis.storage import check_disk, check_file_limit, check_files, storage_checks
from eetrain.diagnosis.writing import (
    Speed,
    check_clock,
    check_locks,
    check_speed,
    clock_offset,
    measure_speed,
    renaming_problem,
    writing_checks,
)

GIB = 2**30
TABLE = """/dev/sda1 / ext4 rw,relatime 0 0
tmpfs /dev/shm tmpfs rw,size=64k 0 0
server:/home /home nfs4 rw,relatime,vers=4.2 0 0
/dev/sdb /home/with\\040space xfs ro,relatime 0 0
over /run/box overlay rw 0 0
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_good_folder(tmp_path):
    found = {check.name: check for check in storage_checks(tmp_path, {})}
    assert found["run folder"].found == str(tmp_path)
    for name in ("run folder", "disk", "writing", "renaming", "locks", "clock"):
        assert found[name].state != "error", found[name]
    assert found["locks"].found == "a second process is kept out"
    assert found["writing"].measured["write_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == [], "nothing is left there"


def test_a_folder_that_is_not_there_yet_and_a_file(tmp_path):
    run = tmp_path / "a" / "b"
    found = {check.name: check for check in storage_checks(run, {})}
    assert found["run folder"].found == f"{run} is not there yet; a fit makes it in {tmp_path}"
    assert found["writing"].state != "error"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    (check,) = storage_checks(tmp_path / "file" / "run", {})
    assert (check.state, check.found) == ("error", f"{tmp_path}/file is a file")


def test_where_nothing_can_be_written():
    (check,) = writing_checks(Path("/proc"), GIB, None)
    assert (check.name, check.state) == ("writing", "error")
    assert check.found.startswith("/proc: ")
    assert check.hint.startswith("Set a folder by --run that you may write to")


def test_a_read_only_mount(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    found = {check.name: check for check in storage_checks(small_disk, {})}
    assert found["file system"].state == "error"
    assert found["file system"].found == f"tmpfs at {small_disk}, read-only"
    assert (found["writing"].state, found["writing"].found) == ("error", f"{small_disk}: Read-only file system")
    assert "locks" not in found


def test_a_full_disk(small_disk):
    (small_disk / "big").write_bytes(bytes(2 * 2**20))
    found = {check.name: check for check in storage_checks(small_disk, {})}
    assert (found["writing"].state, found["writing"].found) == ("error", f"{small_disk}: No space left on device")
    assert found["disk"].state == "error"
    assert found["disk"].hint == "Free some space: a checkpoint does not fit."
    assert found["file system"].state == "note"


def test_room_for_checkpoints():
    estimate = CheckpointSize(10 * GIB, "worked out from its settings", False)
    there = CheckpointSize(10 * GIB, "run/checkpoints/last.ckpt", True)
    assert check_disk(20 * GIB, 99 * GIB, estimate).state == "ok"
    one = check_disk(20 * GIB - 1, 99 * GIB, estimate)
    assert one.state == "error"
    assert one.found == ("20.0 GiB of 99.0 GiB free; a checkpoint has 10.0 GiB (worked out from its settings), 1 fit")
    assert one.measured == {"free_bytes": 20 * GIB - 1, "checkpoint_bytes": 10 * GIB, "checkpoints_that_fit": 1}
    assert check_disk(10 * GIB, 99 * GIB, there).state == "ok", "one of the two is there already"
    assert check_disk(10 * GIB - 1, 99 * GIB, there).state == "error"
    assert check_disk(GIB - 1, 99 * GIB, None).state == "error"
    assert check_disk(GIB, 99 * GIB, None).state == "ok"


def test_entries_and_the_limit_of_files():
    assert check_files(0, 0) == [], "a file system that does not count them"
    assert [check.state for check in check_files(999, 10**6)] == ["error"]
    assert [check.state for check in check_files(1000, 10**6)] == ["ok"]
    size_of_one = CheckpointSize(GIB, "x", True)
    assert check_file_limit(resource.RLIM_INFINITY, size_of_one) == []
    (error,) = check_file_limit(GIB - 1, size_of_one)
    assert (error.state, error.found) == (
        "error",
        "files are limited to 1024.0 MiB (ulimit -f), a checkpoint has 1.0 GiB",
    )
    (note,) = check_file_limit(GIB, size_of_one)
    assert note.state == "note"


def test_the_limit_of_files_is_met_in_words(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from eetrain.diagnosis.writing import writing_checks\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "[check] = writing_checks(Path(sys.argv[1]), 2**30, None); print(check.state, check.found)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert ran.stdout == f"error {tmp_path}: File too large\n", ran.stderr


def test_speed(tmp_path):
    speed = measure_speed(tmp_path, 20 * 2**20)
    assert speed.count == 16 * 2**20, "whole blocks of 8 MiB"
    assert measure_speed(tmp_path, 5000).count == 5000
    assert check_speed(Speed(64 * 2**20, 0.5, 0.1), None).found == "64.0 MiB at 134 MB/s, read back at 671 MB/s"
    # 64 MiB in 0.5 s: 8 GiB take 64 s.
    slow = check_speed(Speed(64 * 2**20, 0.5, 0.1), 8 * GIB)
    assert slow.state == "note"
    assert slow.found.endswith("; a checkpoint takes 64.0 s")
    assert slow.hint.endswith("#SBATCH --signal=SIGUSR1@128")
    assert slow.measured["checkpoint_seconds"] == pytest.approx(64)
    assert check_speed(Speed(64 * 2**20, 0.5, 0.1), GIB).state == "ok"
    assert check_speed(Speed(10**6, 0.0201, 0.1), None).state == "note", "below 50 MB/s"


def test_clocks(tmp_path):
    assert abs(clock_offset(tmp_path)) < 1
    assert check_clock(1.9).state == check_clock(-1.9).state == "ok"
    ahead, behind = check_clock(90.0), check_clock(-7200.0)
    assert (ahead.state, ahead.found) == ("note", "the file system's is 90.0 s ahead of this machine's")
    assert (behind.state, behind.found) == ("note", "the file system's is 2.0 h behind this machine's")


def test_the_offset_is_that_of_the_files_time(tmp_path, monkeypatch):
    real = time.time
    monkeypatch.setattr("eetrain.diagnosis.writing.time.time", lambda: real() - 100)
    assert clock_offset(tmp_path) == pytest.approx(100, abs=1)
    monkeypatch.setattr("eetrain.diagnosis.writing.time.time", lambda: real() + 100)
    assert clock_offset(tmp_path) == pytest.approx(-100, abs=1)


def test_locks(tmp_path):
    assert lock_trial.main(str(tmp_path / "lock")) == lock_trial.KEPT
    assert check_locks(tmp_path / "lock").state == "ok"
    none = check_locks(Path("/dev/null/x"))
    assert none.state == "note"
    assert none.found == "none here: the trial failed"
    slow = check_locks(tmp_path / "lock", seconds=0.001)
    assert (slow.state, slow.found) == ("error", "no answer within 0.001 s")


def test_a_file_that_is_locked_already(tmp_path):
    import fcntl

    with open(tmp_path / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        check = check_locks(tmp_path / "lock")
    assert check.found == f"none here: {os.strerror(11)}"


def test_renaming(tmp_path, monkeypatch):
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    assert renaming_problem(first) is None

    def in_two_steps(source, target):
        os.unlink(target)
        time.sleep(0.01)
        os.rename(source, target)

    monkeypatch.setattr("eetrain.diagnosis.writing.os.replace", in_two_steps)
    assert renaming_problem(second) == "while a file was replaced, a reader found: No such file or directory"


def test_file_systems():
    assert mount_of(Path("/home/me"), TABLE).kind == "nfs4"
    assert mount_of(Path("/homework"), TABLE).point == "/"
    assert mount_of(Path("/home/with space/run"), TABLE).kind == "xfs"
    shown = {}
    for folder in ("/data", "/home/me", "/home/with space", "/dev/shm/run", "/run/box"):
        (check,) = check_file_system(Path(folder), TABLE)
        shown[folder] = (check.state, check.found)
    assert shown == {
        "/data": ("ok", "ext4 at /"),
        "/home/me": ("ok", "nfs4 at /home, over the network; a quota does not show here"),
        "/home/with space": ("error", "xfs at /home/with space, read-only"),
        "/dev/shm/run": ("note", "tmpfs at /dev/shm, in memory"),
        "/run/box": ("note", "overlay at /run/box, a container's own layer"),
    }
    assert check_file_system(Path("/data"), "") == []


def test_numbers_for_people():
    assert [size(count) for count in (0, 1023, 1536, 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 GiB",
        "2.0 TiB",
    ]
    assert [duration(each) for each in (0.25, 99, 120, 7200)] == ["0.2 s", "99.0 s", "2 min", "2.0 h"]
