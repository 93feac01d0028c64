"""The sweep over exits and draft lengths: on policies that wait for tokens, as drafts do, and on counts made up."""

import csv
import json
from dataclasses import dataclass

import pytest
import torch
from recipe_scripts import load, run, write_tied

from eetrain.evaluation.bench.candidates import Candidate, Run
from eetrain.evaluation.bench.prompts import Workload
from eetrain.evaluation.bench.rows import Measured, Setting
from eetrain.evaluation.speed_model import RoundCosts
from eetrain.evaluation.timing import Timing


@pytest.fixture
def sweep(monkeypatch):
    return load(monkeypatch, "speculation_sweep")


def test_every_cell_is_measured_and_drawn(sweep, tmp_path, monkeypatch, capsys):
    write_tied(tmp_path / "model", dtype=torch.float32)
    capsys.readouterr()
    flags = ["--exits", "1,3", "--drafts", "2,4", "--batch_sizes", "1,2", "--new_tokens", 4, "--repeats", 2]
    flags += ["--limit", 4, "--out", tmp_path / "out"]
    run(monkeypatch, sweep, tmp_path, *flags)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    cells = [(row["batch_size"], row["exit"], row["draft"]) for row in found["rows"]]
    assert cells == [(size, layer, draft) for size in (1, 2) for layer in (1, 3) for draft in (2, 4)]
    assert all(row["same_tokens"] for row in found["rows"])
    assert [row["assistant"] is None for row in found["rows"]] == [False] * 4 + [True] * 4
    assert all(row["assistant"].startswith(f"assistant:{row['exit']}") for row in found["rows"][:4])
    reason = "transformers' assisted generation decodes one row at a time"
    assert found["missing"] == {
        f"assistant:{layer}{draft}, batch 2": reason for layer in (1, 3) for draft in ("", ",draft=2", ",draft=4")
    }
    for row in found["rows"]:
        assert row["over_never_min"] <= row["over_never"] <= row["over_never_max"]
        assert 0 <= row["acceptance"] <= 1 <= row["tokens_per_round"] <= row["draft"] + 1
        assert row["predicted"] > 0
        assert row["round_ms"] > 0
        assert min(row["early_ms"], row["head_ms"], row["full_ms"], row["verify_ms"]) > 0
    with (tmp_path / "out" / "sweep.csv").open() as file:
        assert [float(line["over_never"]) for line in csv.DictReader(file)] == [
            row["over_never"] for row in found["rows"]
        ]
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rivals = [(rival["batch_size"], rival["candidate"]) for rival in found["rivals"]]
    assert rivals == [
        (1, "never"),
        *((1, f"assistant:{layer}{draft}") for layer in (1, 3) for draft in ("", ",draft=2", ",draft=4")),
        (2, "never"),
    ]
    assert all(rival["over_dynamic"] > 0 for rival in found["rivals"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8 + 8 + 6


@dataclass(frozen=True)
class Counts:
    rounds: int = 10
    acceptance: float = 0.5
    tokens_per_round: float = 2.0


def test_predicted_beside_measured(sweep):
    policy = Candidate("speculative:exit=3,draft=2", "policy", None, drafts_at=(3,))
    never = Candidate("never", "policy", None)
    tokens = [torch.zeros(1, 6), torch.zeros(1, 16)]
    entries = [
        Measured(never, Run(tokens, Timing(), 0.0, [4] * 20, 80), [Timing(0, 20.0), Timing(0, 40.0)], True, None),
        Measured(
            policy, Run(tokens, Timing(), 0.0, [3] * 20, 80, Counts()), [Timing(0, 10.0), Timing(0, 10.0)], True, None
        ),
    ]
    batch = torch.zeros(1, 3), torch.ones(1, 3)
    setting = Setting(Workload(1, 3, (batch, batch)), 20, [], {}, entries)
    costs = {3: RoundCosts(early=0.2, head=0.05, verify=0.5, verify_more=0.1, full=1.4)}
    row = sweep.row(setting, policy.name, (3, 2), costs, 4)
    whole = 3 * 0.2 + 2 * 0.05 + 0.5 + 2 * 0.1
    assert (row["over_never"], row["over_never_min"], row["over_never_max"]) == (3, 2, 4)
    assert row["predicted"] == pytest.approx(2 * 1.4 / whole)
    assert row["predicted_independent"] == pytest.approx((1 + 0.5 + 0.25) * 1.4 / whole)
    assert row["predicted_round_ms"] == pytest.approx(1000 * whole)
    assert row["round_ms"] == 1000 * 10 / 10
    assert row["full_ms"] == 1400
    assert sweep.step_seconds(setting) == 30 / (5 + 15)


def test_the_picture_says_what_the_cells_hold(monkeypatch, tmp_path):
    maps = load(monkeypatch, "speed_map")
    rows = [
        {"batch_size": b, "exit": e, "draft": g, "over_never": 1 + e * g / 10, "acceptance": 0.25 if b == 1 else None}
        for b in (1, 8)
        for e in (3, 2)
        for g in (4, 1)
    ]
    figure = maps.draw_map(rows, tmp_path / "map.png", "a model", "a machine")
    one, eight = figure.axes[:2]
    assert [text.get_text() for text in one.texts] == [
        "1.20\n25% right", "1.80\n25% right", "1.30\n25% right", "2.20\n25% right"
    ]  # fmt: skip
    assert [text.get_text() for text in eight.texts] == ["1.20", "1.80", "1.30", "2.20"]
    assert [label.get_text() for label in one.get_yticklabels()] == ["2", "3"]
    assert one.images[0].get_array()[1, 0] == pytest.approx(1.3), "exit 3, one draft"
    assert figure._suptitle.get_text() == "a model\na machine"


def test_a_line_through_times(monkeypatch):
    times = load(monkeypatch, "block_times")
    assert times.line({1: 5.0}) == (5.0, 0.0)
    assert times.line({1: 5.0, 3: 7.0, 5: 9.0}) == pytest.approx((5.0, 1.0))
    assert times.line({1: 5.0, 3: 4.0}) == (4.5, 0.0), "noise, not a gain"


def test_the_parts_compute_what_decoding_computes(monkeypatch, tmp_path):
    """Blocks and tail against a filled cache give the full model's next token."""
    times = load(monkeypatch, "block_times")
    model = write_tied(tmp_path / "model")
    parts = times.Parts(model, rows=2, context=5)
    with torch.inference_mode():
        lower, width = parts.blocks(1, 3, 2), 2
        other = parts.head(1)
        other()
        state = lower()
        text = torch.cat([parts.ids, parts.ids[:, :1].expand(-1, width)], 1)
        truth = model(text)
        torch.testing.assert_close(state, truth.hidden[3][:, -width:])
        early = parts.blocks(1, 1, 1)()
        torch.testing.assert_close(early, model(text[:, :6]).hidden[1][:, -1:])
    assert set(times.verification(parts, 3, (1, 4))) == {"verify 3 1", "verify 3 4"}
    spent = times.medians({"a": lambda: None, "b": lambda: sum(range(30_000))}, 3)
    assert 0 <= spent["a"] < spent["b"]
