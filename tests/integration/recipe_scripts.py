"""Run the scripts of recipes/bench inside a test, on a small checkpoint."""

import csv
import importlib
import sys
from pathlib import Path

import torch
from small_checkpoint import VOCABULARY, small_tokenizer

from eetrain import ExitConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model

BENCH = Path(__file__).parents[2] / "recipes" / "bench"
ROWS = [("one two three", "first"), ("two", "second"), ("three one one two", "third"), ("first", "one"), ("a", "two")]


def load(monkeypatch, name):
    """The script as a module, freshly imported with its siblings."""
    monkeypatch.syspath_prepend(str(BENCH))
    for path in BENCH.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module(name)


def write_tied(folder, layers=(1, 3), dtype=torch.float64, head="tied"):
    backbone = tiny_model("llama", vocab_size=VOCABULARY, dtype=dtype)
    model = MultiExitModel(backbone, ExitConfig(list(layers), head=head)).eval()
    model.save_pretrained(folder, tokenizer=small_tokenizer())
    return model


def write_prompts(path):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *ROWS])
    return path


def run(monkeypatch, module, folder, *flags):
    """Call main as the command line would."""
    data = write_prompts(folder / "data.csv")
    given = [str(folder / "model"), "--data", str(data), "--prompt", "{mr}", "--response", "{ref}", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", ["script", *given])
    return module.main()
