"""`eetrain plan` from the command line: tables, JSON, files, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

from eetrain.cli import main
from eetrain.commands.plan import plan
from eetrain.commands.plan_table import short_pieces

SMALL = ["--exits", "8,16,24", "--devices", "4", "--batch_size", "8", "--activation-checkpointing"]


def test_command_line_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = [*SMALL, "--stages", "4", "--fill", "--out", str(tmp_path / "out"), "--json"]
    assert main(["plan", "llama-2-7b", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, "one JSON object and nothing else"
    found = json.loads(captured.out)
    assert found.pop("files") == [str(tmp_path / "out" / name) for name in ("plan.json", "timeline.png")]
    assert found == json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert (found["num_stages"], found["replicas"], found["micro_batches"]) == (4, 1, 8)
    assert found["parameters"] == 6_738_415_616 + 3 * 4096
    assert (found["device"], found["cluster"]["flops"], found["cluster"]["bandwidth"]) == ("h100", 989e12, 450e9)
    assert [own["stage"] for own in found["exits"]] == [0, 1, 2]
    # A block: 2 * (4 d^2 + 3 d f) a token and 4 T d for attention; an exit 2 d V.
    d, f, v, t = 4096, 11008, 32000, 4096
    block, head = 2 * (4 * d * d + 3 * d * f) * t + 4 * t * t * d, 2 * d * v * t
    speed = 0.4 * 989e12
    for stage in found["stages"]:
        assert stage["times"]["forward"] == pytest.approx(8 * block / speed)
        assert stage["times"]["heads"] == pytest.approx(3 * head / speed)
        assert stage["times"]["backward"] == pytest.approx(3 * 8 * block / speed)
    assert found["exits"][0]["seconds"] == pytest.approx(3 * head / speed, rel=0.02)
    assert found["filling"]["warmup"] == [2, 1, 0, 0]
    assert found["candidates"][0]["step_seconds"] == found["step_seconds"]


def test_tables(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama-2-7b", *SMALL, "--fill", "--bandwidth", "5e10", "--memory", "6e10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "numbers of stages, the best first"
    assert lines[1].split()[:3] == ["stages", "replicas", "micro-batches"]
    # One stage holds 6.7 B * (2 + 2 + 12 / 4) bytes, two of two replicas half of 2 + 2 + 12 / 2.
    assert [(own.split()[0], own.split()[1], own.split()[-1]) for own in lines[2:5]] == [
        ("1", "4", "yes"), ("2", "2", "yes"), ("4", "1", "yes")
    ]  # fmt: skip
    assert float(lines[2].split()[-2]) == pytest.approx(6.738 * 7, rel=0.2)
    assert lines[5].startswith("llama-2-7b, 6.738 B parameters, full, exits 8, 16, 24; 4 x h100 at 40%: 1 stage x 4")
    assert lines[6].startswith("step ")
    assert lines[6].endswith(" of 60 GB")
    header = lines.index("what an exit adds to the step on these stages")
    assert [line.split()[0] for line in lines[header + 2 : header + 5]] == ["8", "16", "24"]
    assert lines[header + 5].startswith("all exits: +")
    assert "extra micro-batches in the bubbles" in lines


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama-3-70b", "--devices", "2", "--stages", "2", "--batch_size", "2"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT: " in out
    assert "GB of 80, stages 0, 1" in out
    assert "what an exit adds" not in out


def test_four_hundred_billion_in_seconds(capsys: pytest.CaptureFixture[str]):
    flags = ["--exits", "31,63,95", "--devices", "1008", "--stages", "42", "--batch_size", "1008", "--json"]
    assert main(["plan", "llama-3.1-405b", *flags, "--activation-checkpointing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 405_853_388_800 + 3 * 16384
    assert [own["seconds"] / own["head_seconds"] for own in found["exits"]] == pytest.approx([1, 1, 1], abs=0.02)
    assert found["exits_percent"] < 1


def test_a_folder_with_its_own_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_checkpoint(tmp_path / "model")
    capsys.readouterr()
    custom = ["--device", "custom", "--flops", "1e9", "--memory", "1e9", "--bandwidth", "1e9", "--precision", "float32"]
    common = ["--devices", "2", "--stages", "2", "--batch_size", "4", "--length", "16", "--json"]
    assert main(["plan", str(tmp_path / "model"), *custom, *common]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["exit_layers"] == [1, 2]
    assert main(["plan", str(tmp_path / "model"), "--exits", "3", "--head", "mlp", *custom, *common]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["exit_layers"] == [3]
    assert main(["plan", str(tmp_path / "model"), "--exits", "", *custom, *common]) == 0
    assert json.loads(capsys.readouterr().out)["exits"] == []


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--exits", "a"], "error: exits='a' is no list of blocks.", "For example --exits 8,16,24."),
        (["--exits", "33"], "error: Exits after blocks [33]: [33] outside 1..32", "Blocks count from 1"),
        (["--stages", "33", "--devices", "33"], "error: stages=33, but the backbone has 32 blocks", "32 or fewer"),
        (["--stages", "3"], "error: stages=3 does not divide the 8 processes", "set stages to one of 1, 2, 4, 8"),
        (["--batch_size", "9", "--stages", "4"], "error: batch_size=9 cannot be cut", "to a multiple of 2."),
        (["--device", "h1"], "error: device='h1' is not known.", "One of: a100-40gb"),
        (
            ["--device", "custom", "--flops", "1e12"],
            "error: device=custom, but memory and bandwidth are not set.",
            "Set --flops (FLOP/s), --memory (bytes) and --bandwidth",
        ),
        (["--tuning", "frozen"], "error: There is nothing to train", "Set tuning to full or lora"),
        (["--zero_stage", "2"], "error: zero_stage: ", "`eetrain plan --help`"),
    ],
)
def test_bad_use(words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama-2-7b", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert hint in captured.err.partition("HINT: ")[2]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["plan", "llama-2-7b", *SMALL, "--stages", "1", "--out", str(tmp_path / "file")]) == 2
    assert "The plan cannot be written to" in capsys.readouterr().err
    assert main(["plan", "/nowhere/at/all"]) == 1
    assert "Shapes by name: llama-2-7b, llama-3-70b, llama-3.1-405b." in capsys.readouterr().err


def test_pieces_in_short():
    assert short_pieces(["exit 2", "block 3", "block 4", "exit 4", "block 5", "tail"]) == (
        "exit 2, blocks 3-4, exit 4, block 5, tail"
    )


def test_deepspeed_is_not_needed():
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from eetrain.cli import main\n"
        "sys.exit(main(['plan', 'llama-2-7b', '--devices', '2', '--batch_size', '2']))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_function_gives_its_status():
    assert plan("llama-2-7b", exits=[8], devices=1, batch_size=1, stages=1, json=True) == 0
