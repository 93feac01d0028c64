import csv

import pytest
import torch

from eetrain.training.csv_log import MetricsCSV


def read(folder, name="metrics"):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def steps(folder):
    return [int(row["step"]) for row in read(folder)]


def test_rows_are_in_the_file_at_once_and_columns_are_added(tmp_path):
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"loss": 2.5}, step=0)
    assert read(tmp_path) == [{"step": "0", "loss": "2.5"}]
    log.log_metrics({"loss": torch.tensor(1.5)}, step=1)
    log.log_metrics({"val": 3.0}, step=1)
    log.log_metrics({"loss": 1.0}, step=2)
    assert read(tmp_path) == [
        {"step": "0", "loss": "2.5", "val": ""},
        {"step": "1", "loss": "1.5", "val": ""},
        {"step": "1", "loss": "", "val": "3.0"},
        {"step": "2", "loss": "1.0", "val": ""},
    ]


def test_an_interrupted_run_replaces_the_steps_it_does_again(tmp_path):
    killed = MetricsCSV(str(tmp_path))
    for step in range(6):
        killed.log_metrics({"loss": float(step)}, step=step)
        killed.log_metrics({"val": float(step)}, step=step)
    resumed = MetricsCSV(str(tmp_path))
    for step in range(3, 8):
        resumed.log_metrics({"loss": 10.0 + step}, step=step)
        resumed.log_metrics({"val": 10.0 + step}, step=step)
    assert steps(tmp_path) == [step for step in range(8) for _ in range(2)]
    assert [row["loss"] for row in read(tmp_path)[::2]] == ["0.0", "1.0", "2.0", "13.0", "14.0", "15.0", "16.0", "17.0"]
    assert [row["val"] for row in read(tmp_path)[1::2]] == ["0.0", "1.0", "2.0", "13.0", "14.0", "15.0", "16.0", "17.0"]


def test_the_first_step_done_again_keeps_what_is_not(tmp_path):
    killed = MetricsCSV(str(tmp_path))
    for name in ("loss", "val"):
        killed.log_metrics({name: 1.0, "epoch": 0}, step=4)
    resumed = MetricsCSV(str(tmp_path))
    resumed.log_metrics({"val": 2.0, "epoch": 0}, step=4)
    assert [(row["loss"], row["val"]) for row in read(tmp_path)] == [("1.0", ""), ("", "2.0")]
    resumed = MetricsCSV(str(tmp_path))
    resumed.log_metrics({"loss": 3.0, "epoch": 0}, step=4)
    resumed.log_metrics({"val": 3.0, "epoch": 0}, step=4)
    assert [(row["loss"], row["val"]) for row in read(tmp_path)] == [("3.0", ""), ("", "3.0")]


def test_going_back_in_one_process(tmp_path):
    log = MetricsCSV(str(tmp_path))
    for step in (0, 1, 2, 3, 1, 2):
        log.log_metrics({"loss": float(step)}, step=step)
    assert steps(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("torn", ["3,0.", "3", "", "nonsense,1.0,2.0,3.0"])
def test_half_a_row_of_a_kill_is_left_out(tmp_path, torn):
    killed = MetricsCSV(str(tmp_path))
    for step in range(3):
        killed.log_metrics({"loss": float(step), "rate": 1.0}, step=step)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + torn)
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 9.0, "rate": 1.0}, step=5)
    assert steps(tmp_path) == [0, 1, 2, 5]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 1.0}, step=0)
    assert list(tmp_path.iterdir()) == []
