"""An array job evaluates one policy in each of its tasks."""

import json
import shlex

import pytest
import torch
import yaml
from slurm_harness import Job
from story import Story, eetrain, submit

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.byte_level import byte_tokenizer
from eetrain.testing.tiny import tiny_model

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
POLICIES = ["never", "always:1"]


def test_each_policy_has_its_report_and_compare_reads_them(two_nodes, tmp_path):
    model = MultiExitModel(tiny_model("llama", vocab_size=270, dtype=torch.float32), ExitConfig(layers=[1, 2]))
    model.save_pretrained(tmp_path / "exits", tokenizer=byte_tokenizer(270, ["one two first second"] * 4))
    (tmp_path / "rows.csv").write_text("question,answer\none,first\ntwo,second\n")
    recipe = tmp_path / "evaluate.yaml"
    settings = {"prompt": "{question}=", "response": "{answer}", "max_new_tokens": 4, "repeats": 0}
    recipe.write_text(
        yaml.safe_dump({"model": str(tmp_path / "exits"), "data": str(tmp_path / "rows.csv"), **settings})
    )
    site = Story(tmp_path, two_nodes).site()
    size = ["--time", "30", "--site", site, "--run", tmp_path / "out"]
    told = submit(two_nodes, recipe, "--array", ",".join(POLICIES), *size)
    reports = {}
    for number, policy in enumerate(POLICIES):
        name = f"{told['job']}_{number}"
        task = Job(two_nodes, name, tmp_path / "out" / "slurm" / f"{name}.log")
        task.finish()
        report = tmp_path / "out" / f"{number}-{policy.replace(':', '-')}" / "results.json"
        reports[policy] = json.loads(report.read_text())
    found = {policy: [row["policy"] for row in report["policies"]] for policy, report in reports.items()}
    assert found["never"] == ["never"]
    assert found["always:1"][-1] == "always:1"
    depths = {row["policy"]: row["mean_depth"] for report in reports.values() for row in report["policies"]}
    assert depths["always:1"] < depths["never"]
    verb, *words = shlex.split(told["compare"])[1:]
    status, out, err = eetrain(two_nodes, verb, *words)
    assert status == 0, err
    assert all(name in out for name in ("0-never", "1-always-1")), out
