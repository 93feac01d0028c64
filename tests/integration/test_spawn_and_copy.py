"""A model travels to a spawned process and computes the same there."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp

from eetrain import ExitConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def _all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        result = model(IDS)
        return torch.stack([model.logits(result, layer) for layer in (1, 3, None)])


def _child(model, queue) -> None:
    torch.set_num_threads(1)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, exit_policy="threshold:0.045")
    queue.put((_all_logits(model).numpy(), tokens.numpy()))


def test_a_spawned_process_computes_the_same():
    model = MultiExitModel(tiny_model("gemma3_text"), ExitConfig(layers=[1, 3], head="block")).eval()
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, exit_policy="threshold:0.045")
    context = mp.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_child, args=(model, queue))
    child.start()
    try:
        logits, there = queue.get(timeout=90)
        child.join(timeout=30)
    finally:
        if child.is_alive():
            child.terminate()
    assert child.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(logits), _all_logits(model), rtol=0, atol=1e-12)
    assert torch.equal(torch.from_numpy(there), tokens)
