"""A process killed alone: the job ends soon, and one line says who it was."""

import os
import re
import signal
import time

import pytest
from story import PIPELINE, Story

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SECONDS = 60


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("place", ["one-node", "two-nodes"])
def test_a_killed_process_ends_the_job_and_is_named(request, tmp_path, place, killed, record_property):
    """The other process waits for it in a step."""
    cluster = request.getfixturevalue(place.replace("-", "_"))
    story = Story(tmp_path, cluster, {"step": 3, "ranks": [killed]}, strategy="ddp")
    nodes = 1 if place == "one-node" else 2
    overlay = [] if nodes == 1 else ["-c", PIPELINE]
    size = ["--nodes", nodes, "--gpus", 2 // nodes, "--time", "0:30:00", "--site", story.site()]
    job = story.submit("run", *overlay, *size)
    process = story.held(job, [killed])[killed]
    start = time.monotonic()
    os.kill(process, signal.SIGKILL)
    assert job.end(SECONDS + 30) == "FAILED", job.told()
    took = time.monotonic() - start
    record_property("seconds from the kill to the end of the job", round(took, 1))
    print(f"{place}: killed process {killed}, job ended after {took:.1f} s")
    assert took < SECONDS
    assert job.restarts == 0
    errors = re.findall(r"^error: .*$", job.text, flags=re.MULTILINE)
    assert len(errors) == 1, job.told()
    assert re.match(rf"error: process {killed} of 2 \(host \S+, pid {process}\) was killed", errors[0]), errors
