"""The script that looks for differences: none where there is none, all of them where a policy loses something."""

import argparse
import json
import sys

import pytest
import torch
from recipe_scripts import ROWS, load, run, write_tied
from small_checkpoint import small_tokenizer

from eetrain.errors import ConfigError


@pytest.fixture
def script(monkeypatch):
    return load(monkeypatch, "losslessness")


@pytest.mark.parametrize("reference", ["never", "transformers"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_full_depth_has_no_difference_to_itself(script, tmp_path, monkeypatch, capsys, reference, batch_size):
    write_tied(tmp_path / "model")
    flags = ["--policy", "never", "--reference", reference, "--batch_size", batch_size, "--new_tokens", 8]
    assert run(monkeypatch, script, tmp_path, *flags, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "losslessness.json").read_text())
    assert found["differences"] == []
    assert found["summary"] in capsys.readouterr().out
    assert f"{len(ROWS)} prompts, batch {batch_size}, float64" in found["summary"]
    assert found["summary"].endswith("0 texts differ, 0 of them by 0.0001 or more, largest gap 0")


def test_every_difference_is_listed_with_its_gap(script, tmp_path, monkeypatch):
    model = write_tied(tmp_path / "model")
    flags = ["--policy", "threshold:-1", "--batch_size", 2, "--new_tokens", 8, "--out", tmp_path]
    assert run(monkeypatch, script, tmp_path, *flags) == 1
    found = json.loads((tmp_path / "losslessness.json").read_text())
    expected = by_hand(model)
    assert len(expected) >= 3
    for listed, (prompt, position, token, reference, top, gap) in zip(found["differences"], expected, strict=True):
        assert (listed["prompt"], listed["position"]) == (prompt, position)
        assert (listed["token"], listed["reference"]) == (token, reference)
        assert (listed["top_gap"], listed["gap"]) == pytest.approx((top, gap))
    assert found["counted"] == len(expected)
    largest = max(gap for *_, gap in expected)
    assert run(monkeypatch, script, tmp_path, *flags, "--gap", largest + 1) == 0, "all of them are rounding now"
    assert run(monkeypatch, script, tmp_path, *flags, "--gap", largest - 1e-9) == 1


@torch.no_grad()
def by_hand(model):
    """One prompt alone, each token from a full pass over what both texts share."""
    tokenizer, found = small_tokenizer(), []
    model.causal_lm.generation_config.eos_token_id = None
    for number, (prompt, _) in enumerate(ROWS):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        own, other = (
            model.generate(ids, exit_policy=policy, do_sample=False, max_new_tokens=8, pad_token_id=0)[0]
            for policy in ("threshold:-1", "never")
        )
        for place in range(ids.shape[1], len(other)):
            if own[place] != other[place]:
                logits = model.causal_lm(other[None, :place]).logits[0, -1]
                best = logits.sort(descending=True).values
                top, apart = best[0] - best[1], (logits[own[place]] - logits[other[place]]).abs()
                row = (number, place - ids.shape[1], int(own[place]), int(other[place]), float(top))
                found.append((*row, float(max(top, apart))))
                break
    return found


def test_texts_of_unequal_length_differ_for_certain(script, tmp_path):
    model = write_tied(tmp_path / "model")

    class Prompt:
        prompt_ids = (1, 5)

    (found,) = script.differences(model, [Prompt], [[4, 7]], [[4, 7, 9]])
    assert (found.position, found.token, found.reference, found.gap) == (2, None, 9, float("inf"))
    assert 0 < found.top_gap < float("inf")
    assert script.until_end(torch.tensor([5, 2, 0, 0]), 2) == [5, 2]
    assert script.until_end(torch.tensor([5, 2, 0, 0]), [0, 9]) == [5, 2, 0]
    assert script.until_end(torch.tensor([5, 2]), None) == [5, 2]


def test_tied_exits_that_lack_are_added_and_others_refused(script, tmp_path, monkeypatch):
    write_tied(tmp_path / "model", layers=(1,))
    flags = ["--policy", "always:3", "--exits", "3", "--new_tokens", 4]
    assert run(monkeypatch, script, tmp_path, *flags) in (0, 1)
    module = sys.modules["checkpoint_and_prompts"]
    flags = ["model", "--data", str(tmp_path / "data.csv"), "--prompt", "{mr}", "--response", "{ref}"]
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(flags)
    assert module.opened(args, [3])[0].exit_layers == (1, 3)
    assert module.opened(args, [])[0].exit_layers == (1,)
    write_tied(tmp_path / "model", layers=(1,), head="norm")
    assert module.opened(args, [1])[0].exit_layers == (1,)
    with pytest.raises(ConfigError, match=r"no exit after block 3, and its heads are of kind norm\. HINT: .* blocks 1"):
        module.opened(args, [1, 3])
