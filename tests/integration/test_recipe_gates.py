"""The script that sets gates against thresholds: its numbers computed again, one token at a time."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoint import VOCABULARY, small_tokenizer

from eetrain import ExitConfig, MultiExitModel
from eetrain.exits import GateConfig
from eetrain.exits.gating import gate_features
from eetrain.testing.tiny import tiny_model

SCRIPT = Path(__file__).parents[2] / "recipes" / "e2e" / "gates_against_thresholds.py"
ROWS = [(f"one two {n}", text) for n, text in enumerate(("three first", "second", "third two", "one"))]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gates_against_thresholds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_numbers_of_the_gates(script, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    backbone = tiny_model("llama", vocab_size=VOCABULARY, dtype=torch.float32)
    model = MultiExitModel(backbone, ExitConfig(layers=[1, 2], gates=GateConfig(cost_weights=[0.5, 1.0]))).eval()
    for gate in model.gates.values():
        torch.nn.init.normal_(gate.output.weight, std=0.5)
    model.save_pretrained(tmp_path / "model", tokenizer=small_tokenizer())
    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *ROWS])
    flags = ["--data", str(tmp_path / "data.csv"), "--prompt", "{mr}", "--response", "{ref}", "--tune", "2"]
    flags += ["--against", f"itself={tmp_path / 'model'}", "--batch_size", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "model"), *flags])
    script.main()
    assert capsys.readouterr().out.startswith("cost_weight 0.5: depth ")
    found = json.loads((tmp_path / "gates.json").read_text())
    for column, weight in enumerate(("0.5", "1")):
        nll, depths = by_hand(model, column)
        row = found["rows"][weight]
        assert row["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
        assert row["mean_depth"] == pytest.approx(sum(depths) / len(depths), rel=1e-6)
        assert {int(d): share for d, share in row["shares"].items() if share} == pytest.approx(
            {d: depths.count(d) / len(depths) for d in set(depths)}, rel=1e-6
        )
        assert row["thresholds"]["nll"] == row["itself"]["nll"]
        assert row["shuffled"]["gates_minus_it"] == pytest.approx(row["nll"] - row["shuffled"]["nll"])
    assert found["tokens"] == len(nll)


@torch.no_grad()
def by_hand(model, column):
    """Of the last two rows, with the rows before them left for tuning."""
    tokenizer, all_nll, all_depths = small_tokenizer(), [], []
    for prompt, response in ROWS[2:]:
        given = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        ids = [*given, *tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        output = model(torch.tensor([ids]))
        for place in range(len(given) - 1, len(ids) - 1):
            depth, logits = model.num_blocks, model.logits(output)[0, place]
            for layer in reversed(model.exit_layers):
                own = model.logits(output, layer)[0, place]
                if model.gate(layer)(gate_features(own[None]))[0, column] >= 0:
                    depth, logits = layer, own
            all_nll.append(-float(logits.log_softmax(-1)[ids[place + 1]]))
            all_depths.append(depth)
    return all_nll, all_depths
