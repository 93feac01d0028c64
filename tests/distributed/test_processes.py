import os
import time

import pytest
import torch
import torch.distributed as dist

from eetrain.errors import ConfigError
from eetrain.testing.processes import run_on_processes


def _sum_over_ranks(start):
    value = torch.tensor(start + dist.get_rank())
    dist.all_reduce(value)
    return dist.get_rank(), int(value), os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def _fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ConfigError("depth=9.", hint="Leave it out.")
    dist.barrier()


def _hang():
    time.sleep(60)


def _die():
    os._exit(3)


def test_values_come_back_by_rank():
    assert run_on_processes(_sum_over_ranks, 2, 10) == [(rank, 21, "1", 1) for rank in range(2)]


def test_the_error_of_a_rank_is_raised_with_its_traceback():
    begin = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        run_on_processes(_fail_on_rank_one, 2)
    assert (caught.value.message, caught.value.hint) == ("depth=9.", "Leave it out.")
    assert "on rank 1:" in caught.value.__notes__[0]
    assert "_fail_on_rank_one" in caught.value.__notes__[0]
    assert time.monotonic() - begin < 30, "rank 0 waits in its barrier and must be killed"


def test_a_process_that_hangs_is_killed():
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 did not end within 4 s"):
        run_on_processes(_hang, 1, timeout=4.0)


def test_a_process_that_dies_is_noticed():
    with pytest.raises(RuntimeError, match="rank 0 ended without a result"):
        run_on_processes(_die, 1)
