"""Blocks dropped from whole rows, over all families: every row as if alone with its own blocks, at no cost."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families_support import ALL, backbone, close, perturb
from test_families_schedules import counted_blocks

from eetrain import ExitConfig, MultiExitModel
from eetrain.backbones import Harvester
from eetrain.testing.tiny import tiny_model

# Documents of each row; the window of the sliding families is 8.
TEXTS = {"rows": ((11,), (11,), (11,)), "padded": ((11,), (5,), (9,)), "packed": ((11,), (4, 7), (2, 3, 6))}
# Blocks that each of three rows runs: block 2 runs in one row, block 3 in none, block 4 in all.
RUNS = ((1, 4), (1, 2, 4), (4,))
# Their norms take a turn through float32; gemma2 is all float32 here.
GRADIENTS = {"gemma": 1e-6, "gemma3_text": 1e-6, "gemma2": 2e-5}


@cache
def model_of(family: str, head: str) -> MultiExitModel:
    model = MultiExitModel(backbone(family), ExitConfig(layers=[1, 3], head=head)).eval()
    perturb(model.exits)
    return model


def active_of(runs, length: int) -> torch.Tensor:
    runs_LB = torch.tensor([[block in row for row in runs] for block in range(1, 5)])
    return runs_LB[..., None].expand(-1, -1, length)


def rows_of(kind: str):
    """Ids, mask and positions of a batch, and the ids of each document."""
    draw = torch.Generator().manual_seed(3)
    documents = [[torch.randint(3, 61, (length,), generator=draw) for length in row] for row in TEXTS[kind]]
    longest = max(sum(row) for row in TEXTS[kind])
    whole = [torch.cat(row) for row in documents]
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in whole])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in whole])
    positions = (
        torch.stack([torch.cat([torch.arange(n) for n in row]) for row in TEXTS[kind]]) if kind == "packed" else None
    )
    return ids, mask if kind == "padded" else None, positions, documents


def alone(model: MultiExitModel, ids_T: torch.Tensor, blocks) -> dict[int, torch.Tensor]:
    """Logits at exits and full depth of one document, whose blocks are called one by one; nothing else exists."""
    harvester = Harvester(model.backbone, model.anatomy)
    harvest = harvester(ids_T[None])
    norm, shared = model.shared_tail()
    state, logits = harvest.hidden_BTD, {}
    for block in range(1, 5):
        if block in blocks:
            state = harvester.run(harvest, state, [block])
        if block in model.exit_layers:
            head = model.head(block)
            logits[block] = head.projection(shared)(head(state, model.head_call(block, harvest), norm))[0]
    return {**logits, 4: shared(norm(state))[0]}


def gradients(model: MultiExitModel, total: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    total.backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def weighed(logits: dict[int, torch.Tensor], seed: int) -> torch.Tensor:
    """A scalar that depends on every logit."""
    draw = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for depth in sorted(logits):
        values = logits[depth].double()
        total = total + (values * torch.randn(values.shape, generator=draw, dtype=torch.float64)).sum()
    return total


def check(family: str, kind: str, head: str, runs, *, reach_all: bool) -> dict[str, torch.Tensor | None]:
    """Compare with rows alone; returns the gradients."""
    model = model_of(family, head)
    ids, mask, positions, documents = rows_of(kind)
    active = active_of(runs, ids.shape[1])
    output = model(ids, mask, positions, active_LBT=active, reach_all=reach_all)
    logits = {layer: model.logits(output, layer) for layer in model.exit_layers} | {4: model.logits(output)}
    got = wanted = torch.zeros((), dtype=torch.float64)
    for row, texts in enumerate(documents):
        begin = 0
        for place, text in enumerate(texts):
            truth = alone(model, text, runs[row])
            mine = {depth: values[row, begin : begin + len(text)] for depth, values in logits.items()}
            for depth, values in truth.items():
                torch.testing.assert_close(mine[depth], values, **close(family))
            got, wanted = got + weighed(mine, 10 * row + place), wanted + weighed(truth, 10 * row + place)
            begin += len(text)
    found, expected = gradients(model, got), gradients(model, wanted)
    for name, theirs in expected.items():
        mine = found[name]
        if theirs is None or mine is None:
            assert mine is None or not mine.any(), name
            assert theirs is None or not theirs.any(), name
            continue
        tolerance = (1 + float(theirs.abs().max())) * GRADIENTS.get(family, 1e-10)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return found


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("family", ALL)
def test_every_row_is_as_if_alone_with_its_own_blocks(family, kind):
    check(family, kind, "norm", RUNS, reach_all=False)


@pytest.mark.parametrize("head", ["tied", "mlp", "block"])
def test_heads_of_every_kind_see_whole_rows(head):
    for kind in TEXTS:
        check("llama", kind, head, RUNS, reach_all=False)


@pytest.mark.parametrize("family", ALL)
def test_blocks_that_no_row_runs_get_zeros_if_wanted_and_nothing_else(family):
    blocks = {name for name, _ in model_of(family, "norm").named_parameters() if name.startswith("backbone.")}
    for kind in ("padded", "packed"):
        resting = check(family, kind, "norm", RUNS, reach_all=False)
        reached = check(family, kind, "norm", RUNS, reach_all=True)
        third = {name for name in blocks if ".2." in name and not name.startswith("backbone.lm_head")}
        assert third
        for name in third:
            assert resting[name] is None
            # A mixture of experts calls few of its experts for one position, in families that loop over them.
            assert reached[name] is not None or "expert" in name, name
            assert reached[name] is None or not reached[name].any()
        for name in blocks - third:
            assert (resting[name] is None) == (reached[name] is None), name
            assert resting[name] is None or torch.equal(resting[name], reached[name]), name


@pytest.mark.parametrize("family", ALL)
def test_rows_without_a_block_cost_nothing(family):
    model = model_of(family, "norm")
    ids, mask, positions, _ = rows_of("packed")
    with torch.no_grad(), counted_blocks(model) as counts:
        model(ids, mask, positions, active_LBT=active_of(RUNS, 11))
    assert [counts[block] for block in range(1, 5)] == [22, 11, 0, 33]
    with counted_blocks(model) as counts:
        model(ids, mask, positions, active_LBT=active_of(RUNS, 11), reach_all=True)
    assert [counts[block] for block in range(1, 5)] == [22, 11, 1, 33]


@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
@pytest.mark.parametrize("output", ["tied", "own"])
def test_exits_that_are_not_kept_are_not_computed_and_get_zeros_if_wanted(head, output):
    model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 2, 3], head=head, output=output))
    seen = []
    for layer in model.exit_layers:
        model.head(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen.append((layer, args[0].shape[:2]))
        )
    ids = rows_of("rows")[0]
    full = model.logits(model(ids, exits=[])).sum()
    kept = model(ids, exits=[2])
    assert seen == [(2, (3, 11))]
    assert kept.hidden.keys() == kept.features.keys() == kept.projections.keys() == {2}
    plain = gradients(model, model.logits(kept).sum() + model.logits(kept, 2).sum())
    output_ = model(ids, exits=[2], reach_all=True)
    assert sorted(seen[1:]) == [(1, (1, 1)), (2, (3, 11)), (3, (1, 1))]
    assert torch.equal(model.logits(output_).sum(), full)
    reached = gradients(model, model.logits(output_).sum() + model.logits(output_, 2).sum())
    for name, grad in reached.items():
        assert grad is not None, name
        if name.startswith(("exits.1.", "exits.3.")):
            assert plain[name] is None
            assert not grad.any()
        else:
            torch.testing.assert_close(grad, plain[name], rtol=0, atol=1e-12)
