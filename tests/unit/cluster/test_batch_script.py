import os
import subprocess
from pathlib import Path

import pytest

from eetrain.cluster.batch_script import (
    Resources,
    expanding,
    folder_options,
    quoted,
    render,
    seconds,
    signal_option,
    site_options,
    site_settings,
)
from eetrain.cluster.site import Container, Site
from eetrain.errors import ConfigError

TEMPLATE = """#!/bin/bash
# A remark on #SBATCH lines.
#SBATCH --nodes=1
# Why.
#SBATCH --time=1:00:00
#SBATCH --requeue

# >>> settings
x=1
# <<< settings
echo "$x"
#SBATCH-like text stays
"""


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("1:30:00", 5400),
        ("90:00:00", 324000),
        ("1-0", 86400),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("2-02:30:15", 181815),
        ("0", 0),
    ],
)
def test_times(time: str, expected: int) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "5m", "1.5", "-1", " 5", "1:2:3:4", "1-", "-3", "1-2:3:4:5", "1 day", "٣", "5\n"])
def test_no_times(time: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Resources(1, 1, time)
    assert caught.value.message == f"--time {time!r} is no time."
    assert caught.value.hint == ("Write minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, such as 24:00:00.")


@pytest.mark.parametrize(
    ("nodes", "devices", "flag"), [(0, 1, "nodes is 0"), (1, 0, "gpus is 0"), (1, -2, "gpus is -2")]
)
def test_at_least_one_of_each(nodes: int, devices: int, flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{flag}, must be at least 1\. HINT: --gpus counts those of each node"):
        Resources(nodes, devices, "60")


def test_options_of_a_site() -> None:
    assert site_options(Site(), Resources(2, 4, "24:00:00")) == {
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "time": "24:00:00",
    }
    full = Site(
        partition="gpu",
        account="a",
        qos="q",
        constraint="c",
        gpu_request="gres",
        gpu_type="a100",
        cpus_per_task=8,
        memory="0",
        sbatch=("--exclusive", "--mail-type=END", "--comment 'a b=c'"),
    )
    assert site_options(full, Resources(1, 2, "5")) == {
        **{"partition": "gpu", "account": "a", "qos": "q", "constraint": "c", "nodes": "1", "ntasks-per-node": "2"},
        **{"gres": "gpu:a100:2", "cpus-per-task": "8", "mem": "0", "time": "5"},
        **{"exclusive": None, "mail-type": "END", "comment": "'a b=c'"},
    }
    assert site_options(Site(gpu_type="h100"), Resources(1, 2, "5"))["gpus-per-node"] == "h100:2"
    assert list(site_options(Site(gpu_request="none"), Resources(1, 2, "5"))) == ["nodes", "ntasks-per-node", "time"]


def test_the_signal_leaves_time_to_train() -> None:
    assert signal_option(Site(), Resources(1, 1, "4:00")) == "SIGUSR1@180"
    assert signal_option(Site(signal_seconds=60), Resources(1, 1, "2")) == "SIGUSR1@60"
    assert signal_option(Site(), Resources(1, 1, "0")) == "SIGUSR1@180"
    with pytest.raises(ConfigError) as caught:
        signal_option(Site(), Resources(1, 1, "3:59"))
    assert caught.value.message == "--time 3:59 is 239 s, but a job is told to save 180 s before its end."
    assert "signal_seconds" in caught.value.hint


def test_options_replace_lines_or_follow_them() -> None:
    rendered = render(TEMPLATE, {"time": "5", "partition": "gpu", "nodes": "2", "exclusive": None}, ["x=2", "y=3"])
    assert rendered == TEMPLATE.replace("nodes=1", "nodes=2").replace("time=1:00:00", "time=5").replace(
        "#SBATCH --requeue\n", "#SBATCH --requeue\n#SBATCH --partition=gpu\n#SBATCH --exclusive\n"
    ).replace("x=1", "x=2\ny=3")
    assert render(TEMPLATE, {}, ["x=1"]) == TEMPLATE


@pytest.mark.parametrize(
    "broken",
    [
        TEMPLATE.replace("# >>> settings\n", ""),
        TEMPLATE.replace("# <<< settings", "# >>> settings"),
        TEMPLATE.replace("#SBATCH --", "# --"),
        TEMPLATE.replace(">>>", "!").replace("<<<", ">>>").replace("!", "<<<"),
    ],
)
def test_templates_that_cannot_be_filled_in(broken: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no lines '# >>> settings' and '# <<< settings' once each.*slurm/train\.sbatch"
    ):
        render(broken, {}, [])


def test_paths_in_sbatch_lines() -> None:
    assert folder_options(Path("/a b/100%/slurm"), "%j.log", Path("/w 50%")) == {
        "chdir": '"/w 50%"',
        "output": '"/a b/100%%/slurm/%j.log"',
    }
    for path in ('/a"b', "/a\\b", "/a\nb", "/a$b"):
        with pytest.raises(ConfigError, match=r"cannot stand in an #SBATCH line\. HINT: Use one without"):
            folder_options(Path(path), "%j.log", Path("/"))


def bash(lines: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash"],
        input="set -euo pipefail\n" + "\n".join(lines),
        env={"PATH": os.environ["PATH"]} | environ,
        capture_output=True,
        text=True,
    )


NASTY = ["it's", 'a "b"', "a\nb", "$(touch x)", "`touch x`", "\\", "a\\", "$", "$1 $$ ${a:-b} ${", "!", "*", "", "# no"]


@pytest.mark.parametrize("text", NASTY)
def test_texts_survive_bash(text: str, tmp_path: Path) -> None:
    for word in (quoted(text), expanding(text)):
        done = bash([f"cd {quoted(tmp_path)}", f"printf %s {word}"])
        assert (done.stdout, done.stderr) == (text, "")
    assert not list(tmp_path.iterdir())


def test_variables_are_filled_in_and_must_be_there() -> None:
    done = bash([f"printf %s {expanding('$SCRATCH/${USER}x/$(no)')}"], SCRATCH="/s c", USER="ana")
    assert done.stdout == "/s c/anax/$(no)"
    missing = bash([f"printf %s {expanding('$NOWHERE/x')}"])
    assert missing.returncode != 0
    assert "NOWHERE: unbound variable" in missing.stderr


def test_settings_of_a_site_run_in_their_order() -> None:
    site = Site(
        modules=("cuda/12.4", "a b"),
        setup=('echo "setup ${NOT_SET-}$ALSO_NOT_SET"',),
        environment={"HF_HOME": "$HOME/own", "QUOTES": "a'b\"c"},
        caches="$HOME/caches",
        python="$HOME/bin/python",
    )
    shown = 'printf "%s|" "$HF_HOME" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$QUOTES" "${python[@]}"'
    done = bash(['module() { printf "<%s>" "$@"; echo; }', *site_settings(site), shown, "echo $NOT_SET"], HOME="/h o")
    assert done.stdout.splitlines() == [
        "<load><cuda/12.4>",
        "<load><a b>",
        "setup ",
        "/h o/own|/h o/caches/triton|/h o/caches/inductor|a'b\"c|/h o/bin/python|",
    ]
    assert "NOT_SET: unbound variable" in done.stderr, "after the site's own lines unset variables are errors again"
    assert site_settings(Site()) == ['python=("python")']


def test_in_a_container_signals_are_survived_inside_too(tmp_path: Path) -> None:
    fake = tmp_path / "apptainer"
    fake.write_text('#!/bin/sh\nprintf "%s|" "$@"; echo\nwhile [ "$1" != sh ]; do shift; done\nexec "$@"\n')
    fake.chmod(0o755)
    site = Site(container=Container("$HOME/e x.sif", ("/a b:/b", "$HOME")), python="python3")
    lines = [*site_settings(site), '"${python[@]}" -c "import signal as s; print(int(s.getsignal(s.SIGUSR1)))"']
    done = bash(lines, HOME="/h", PATH=f"{tmp_path}:{os.environ['PATH']}")
    words = done.stdout.splitlines()[0].split("|")
    assert words[:8] == ["exec", "--nv", "--bind", "/a b:/b", "--bind", "/h", "/h/e x.sif", "sh"]
    assert done.stdout.splitlines()[1] == "1", "SIG_IGN"
    assert "--nv" not in site_settings(Site(container=Container("x"), gpu_request="none"))[-1]
