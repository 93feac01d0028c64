"""Versions, GPUs that are hidden, and an examination that does not fail itself."""

import json

import pytest
from packaging.requirements import Requirement

from eetrain.cluster.launch import Launch
from eetrain.diagnosis.check import Check, guarded
from eetrain.diagnosis.examination import Examination
from eetrain.diagnosis.machine import check_visible
from eetrain.diagnosis.versions import check_version, version_checks, version_table


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ("5.17.0", "ok"),
        ("5.16.9", "error"),
        ("6.0", "ok"),
        ("5.18.0.dev0", "ok"),
        ("5.17.0+cu130", "ok"),
        (None, "error"),
    ],
)
def test_least_versions(found, state):
    check = check_version(Requirement("transformers>=5.17"), found)
    assert check.state == state
    assert check.hint == ("" if state == "ok" else "pip install 'transformers>=5.17'")


def test_optional_packages_name_their_extra():
    wanted = Requirement('wandb>=0.20; extra == "wandb"')
    missing = check_version(wanted, None, "wandb")
    assert (missing.state, missing.hint) == ("note", "Only for the W&B logger: pip install 'eetrain[wandb]'")
    old = check_version(wanted, "0.19", "wandb")
    assert (old.state, old.hint) == ("error", "pip install 'eetrain[wandb]', which asks for wandb>=0.20")


def test_every_package_of_the_project_is_listed():
    names = [check.name for check in version_checks()]
    assert len(names) == len(set(names))
    assert {"python", "eetrain", "torch", "peft", "rich", "deepspeed", "wandb", "cut-cross-entropy"} < set(names)
    assert not {"pytest", "ruff", "mypy"} & set(names)
    table = version_table()
    assert set(names) | {"cuda", "nccl", "slurm"} <= set(table)
    assert "pytest" not in table


def test_hidden_gpus():
    assert check_visible({}) == check_visible({"CUDA_VISIBLE_DEVICES": "0,1"}) == []
    for value in ("", "-1", "NoDevFiles"):
        (check,) = check_visible({"CUDA_VISIBLE_DEVICES": value})
        assert (check.state, check.found) == ("note", f"CUDA_VISIBLE_DEVICES={value!r} hides all GPUs")
    (check,) = check_visible({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"})
    assert check.state == "error"
    assert check.found == "CUDA_VISIBLE_DEVICES='' hides all GPUs, but Slurm gave 4 on this node"


def test_a_check_that_fails_is_a_note():
    def look():
        raise RuntimeError("no such thing\nmore")

    assert guarded("thing", look) == [Check("thing", "could not be examined: no such thing", "note")]


def test_the_verdict_names_every_error_once():
    checks = (Check("a", "x", "error"), Check("b", "x", "note"), Check("c", "x", "error"), Check("a", "y", "error"))
    found = Examination(checks, {"python": "3.11"}, Launch.of({}), {})
    assert (found.ready, found.verdict) == (False, "not ready: a, c")
    good = Examination((Check("b", "x", "note", measured={"free": 1}),), {}, Launch.of({}), {"RANK": "0"})
    assert good.ready
    assert good.verdict.startswith("ready: ")
    plain = json.loads(json.dumps(good.to_dict()))
    assert plain["checks"] == [{"name": "b", "found": "x", "state": "note", "hint": ""}]
    assert plain["measured"] == {"b": {"free": 1}}
    assert plain["launch"]["launcher"] == "plain"
    assert plain["variables"] == {"RANK": "0"}
