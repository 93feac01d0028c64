"""Pipelines train as one process whatever is combined: every pair of settings meets in some case.

Run it with ``sh tests/run.sh -m slow -k pipeline``.
"""

import functools

import pytest
from pairwise_support import covering_rows, pairs_of, possible_rows
from pipeline_support import Case, assert_same, fit, merged

from eetrain.exits import GateConfig
from eetrain.objectives import EETuning, JointGating, MultiExitCrossEntropy, SkipDecode
from eetrain.testing.processes import run_on_processes
from eetrain.testing.tiny import FAMILIES

OBJECTIVES = {
    "multi-exit": {"objective": lambda: MultiExitCrossEntropy([0.1, 0.25, 0.5])},
    "no full depth": {"objective": lambda: MultiExitCrossEntropy([0.1, 0.25, 0.5], full_weight=0.0)},
    "lora": {"objective": lambda: MultiExitCrossEntropy([0.1, 0.25, 0.5]), "tuning": "lora"},
    "ee-tuning": {"objective": lambda: EETuning(confidence_weights=True), "tuning": "frozen"},
    "gating": {"objective": lambda: JointGating(warmup_steps=1, phase_steps=1)},
    "gating, frozen": {"objective": lambda: JointGating(warmup_steps=1, phase_steps=1), "tuning": "frozen"},
    "skipdecode": {"objective": lambda: SkipDecode("skipdecode:max=3,min=2,length=4,prompt=full"), "prompts": True},
}
SIZES = {"pp1": (1, 1), "pp2": (2, 2), "pp3": (3, 3), "pp4": (4, 4), "2x2": (4, 2)}
FACTORS = {
    "family": list(FAMILIES),
    "head": ["tied", "norm", "mlp", "block", "no exits"],
    "output": ["tied", "own"],
    "embeddings": ["tied", "untied"],
    "objective": list(OBJECTIVES),
    "rows": ["padded", "packed"],
    "blocks": ["kept", "recomputed"],
    "size": list(SIZES),
}


def impossible(row):
    """Why there is no such case, or ``None``."""
    frozen = OBJECTIVES[row["objective"]].get("tuning") == "frozen"
    if (row["head"] == "no exits") != (row["objective"] == "skipdecode"):
        return "SkipDecode trains a model without exits, and all others train exits"
    if row["head"] in ("tied", "no exits") and row["output"] == "own":
        return "an output matrix of its own belongs to a head with a norm of its own"
    if row["head"] == "tied" and frozen:
        return "tied heads on a frozen backbone have nothing to train"
    if row["blocks"] == "recomputed" and frozen:
        return "a frozen backbone keeps no activations to compute again"
    return None


@functools.cache
def rows():
    return covering_rows(possible_rows(FACTORS, impossible))


def case_of(row):
    settings = dict(OBJECTIVES[row["objective"]])
    exits = {"head": row["head"], "output": row["output"]} if row["head"] != "no exits" else {"layers": []}
    if row["objective"].startswith("gating"):
        exits["gates"] = GateConfig([0.2, 2.0])
    return Case(
        row["family"],
        changes={"tie_word_embeddings": row["embeddings"] == "tied"},
        exits=exits,
        # Routers of a mixture of experts learn without their auxiliary loss, which a pipeline refuses.
        module={"router_loss": False, "activation_checkpointing": row["blocks"] == "recomputed"},
        packed=row["rows"] == "packed",
        **settings,
    )


def fit_rows(places, stages):
    return {place: fit(case_of(rows()[place]), stages) for place in places}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_pipeline_trains_as_one_process_for_every_pair(size):
    processes, stages = SIZES[size]
    places = [place for place, row in enumerate(rows()) if row["size"] == size]
    of_ranks = run_on_processes(fit_rows, processes, places, stages, timeout=1200)
    for place in places:
        name = ", ".join(rows()[place].values())
        assert_same(merged([found[place] for found in of_ranks]), fit(case_of(rows()[place])), name)


def test_every_pair_that_is_possible_is_there():
    possible = {pair for row in possible_rows(FACTORS, impossible) for pair in pairs_of(row)}
    assert set().union(*map(pairs_of, rows())) == possible
    assert {(("family", "gemma2"), ("size", "pp3")), (("head", "block"), ("objective", "gating"))} <= possible
    # 605 but for exits of SkipDecode (4), others without (6), own matrices of these (3), and what a frozen backbone
    # does not go with: tied heads (2) and computing activations again (2).
    assert len(possible) == 588
    assert len(rows()) < 120
    assert all(sum(row["size"] == size for row in rows()) < 30 for size in SIZES)


def test_rows_cover_every_pair_and_only_possible_rows_are_taken():
    factors = {"a": ["1", "2", "3"], "b": ["x", "y", "z"], "c": ["p", "q"], "d": ["u", "v"]}
    chosen = covering_rows(possible_rows(factors, lambda row: None))
    met = set().union(*map(pairs_of, chosen))
    assert len(met) == 9 + 4 * 6 + 4, "3 x 3, three times 3 x 2 twice over, and 2 x 2"
    assert 9 <= len(chosen) <= 11, "not fewer than the two largest factors have pairs, of 36 in all"
    without = covering_rows(possible_rows(factors, lambda row: "no" if row["a"] == "1" and row["b"] == "x" else None))
    assert set().union(*map(pairs_of, without)) == met - {(("a", "1"), ("b", "x"))}
    assert all((row["a"], row["b"]) != ("1", "x") for row in without)
