"""What gates would do over a data set, and the warning and table that show it."""

from __future__ import annotations

import pytest
import torch

from eetrain.objectives.objective import FULL
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.training.console import exit_rows, gate_rows, show_gates
from eetrain.training.gate_metrics import GateMetrics, collapsed

WEIGHTS, LAYERS, BLOCKS = (0.5, 2.0), (1, 3), 4


def draw(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (tokens,), generator=generator)
    labels[::4] = -100
    nll = torch.rand(3, tokens, generator=generator)
    prediction = torch.randint(5, (3, tokens), generator=generator)
    logits = torch.randn(int((labels != -100).sum()), 2, 2, generator=generator)
    return logits, TokenStatistics(nll, prediction, torch.zeros(3, tokens)), labels


def test_every_value_over_two_batches_follows_its_definition():
    metrics = GateMetrics(LAYERS, BLOCKS, WEIGHTS)
    used = {k: [] for k in range(2)}
    for seed, tokens in ((0, 9), (1, 14)):
        logits, statistics, labels = draw(tokens, seed)
        metrics.update(logits, statistics, (*LAYERS, FULL), labels)
        for place, token in enumerate((labels != -100).nonzero().flatten().tolist()):
            for k in range(2):
                willing = [gate for gate in range(2) if logits[place, k, gate] >= 0]
                row = willing[0] if willing else 2
                hit = statistics.prediction[row, token] == labels[token]
                used[k].append((row, statistics.nll[row, token].item(), float(hit)))
    values = {name: value.item() for name, value in metrics.compute().items()}
    for k, name in enumerate(("0.5", "2")):
        rows, nll, hits = (torch.tensor(column, dtype=torch.float64) for column in zip(*used[k], strict=True))
        for row, depth in enumerate(("exit_1", "exit_3", "full")):
            share = values.pop(f"gate/{name}/share/{depth}")
            assert share == pytest.approx((rows == row).double().mean().item())
            assert 0 < share < 1
        blocks = torch.tensor([1.0, 3.0, 4.0])[rows.long()]
        assert values.pop(f"gate/{name}/depth") == pytest.approx(blocks.mean().item())
        assert values.pop(f"gate/{name}/nll") == pytest.approx(nll.mean().item())
        assert values.pop(f"gate/{name}/accuracy") == pytest.approx(hits.mean().item())
    assert values == {}


def test_rows_are_found_by_their_layer():
    logits, statistics, labels = draw(9, 0)
    wanted, mixed = GateMetrics(LAYERS, BLOCKS, WEIGHTS), GateMetrics(LAYERS, BLOCKS, WEIGHTS)
    wanted.update(logits, statistics, (1, 3, FULL), labels)
    turned = TokenStatistics(statistics.nll.flip(0), statistics.prediction.flip(0), statistics.max_prob)
    mixed.update(logits, turned, (FULL, 3, 1), labels)
    assert wanted.compute() == mixed.compute()


SCORES = {
    "nll/exit_1": 2.0,
    "nll/full": 1.0,
    "gate/0.5/depth": 3.25,
    "gate/0.5/nll": 1.5,
    "gate/0.5/accuracy": 0.5,
    "gate/0.5/share/exit_1": 0.004,
    "gate/0.5/share/exit_3": 0.005,
    "gate/0.5/share/full": 0.991,
    "gate/2/depth": 1.0,
    "gate/2/nll": 2.0,
    "gate/2/accuracy": 0.25,
    "gate/2/share/exit_1": 0.996,
    "gate/2/share/exit_3": 0.995,
    "gate/2/share/full": 0.0,
}


def test_an_exit_out_of_use_is_named():
    assert collapsed(SCORES) == [
        "cost weight 0.5: exit_1 takes 0.4% of the tokens",
        "cost weight 2: exit_1 takes 99.6% of the tokens",
    ]


def test_the_table_has_a_row_for_every_cost_weight():
    assert gate_rows(SCORES) == [
        ("cost weight", "depth", "nll", "accuracy", "exit_1", "exit_3", "full"),
        ("0.5", "3.2500", "1.5000", "0.5000", "0.4%", "0.5%", "99.1%"),
        ("2", "1.0000", "2.0000", "0.2500", "99.6%", "99.5%", "0.0%"),
    ]
    assert [row[0] for row in exit_rows(SCORES)] == ["exit_1", "full"]
    assert gate_rows({"nll/full": 1.0}) == []


def test_the_table_on_stderr_ends_with_the_exits_out_of_use(capsys):
    show_gates({"nll/full": 1.0})
    assert capsys.readouterr().err == ""
    show_gates(SCORES)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Gates, tokens leave at g >= 0.5"
    assert lines[2].split() == ["0.5", "3.2500", "1.5000", "0.5000", "0.4%", "0.5%", "99.1%"]
    assert lines[4:] == [f"out of use: {phrase}" for phrase in collapsed(SCORES)]
