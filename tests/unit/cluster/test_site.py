import re
from pathlib import Path

import pytest

from eetrain.cluster.secrets import looks_secret
from eetrain.cluster.site import Container, Site, read_site
from eetrain.errors import ConfigError

ROOT = Path(__file__).parents[3]


def site(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return read_site(path)


def test_every_key(tmp_path: Path) -> None:
    read = site(
        tmp_path,
        """
        partition: gpu,gpu-long
        account: 4711
        qos: high
        constraint: "[a100|h100]&ib"
        gpu_request: gres
        gpu_type: a100
        cpus_per_task: 8
        memory: 0
        signal_seconds: 120
        modules: [cuda/12.4, gcc]
        setup: [source "my venv/bin/activate", "ulimit -c 0"]
        environment: {HF_HUB_OFFLINE: 1, NAME: "$USER's", SHARE: 0.5}
        caches: $SCRATCH/caches
        container: {image: /images/e.sif, binds: ["/scratch:/scratch", /data]}
        python: python3.11
        sbatch: [--exclusive, "--mail-type=END", "--comment 'two words'"]
        """,
    )
    assert read == Site(
        partition="gpu,gpu-long",
        account="4711",
        qos="high",
        constraint="[a100|h100]&ib",
        gpu_request="gres",
        gpu_type="a100",
        cpus_per_task=8,
        memory="0",
        signal_seconds=120,
        modules=("cuda/12.4", "gcc"),
        setup=('source "my venv/bin/activate"', "ulimit -c 0"),
        environment={"HF_HUB_OFFLINE": "1", "NAME": "$USER's", "SHARE": "0.5"},
        caches="$SCRATCH/caches",
        container=Container("/images/e.sif", ("/scratch:/scratch", "/data")),
        python="python3.11",
        sbatch=("--exclusive", "--mail-type=END", "--comment 'two words'"),
    )


@pytest.mark.parametrize("text", ["", "partition:\nenvironment:\n"])
def test_what_is_left_out_or_empty_has_its_default(tmp_path: Path, text: str) -> None:
    assert site(tmp_path, text) == Site()


def test_the_example_reads_also_with_everything_in_it_turned_on(tmp_path: Path) -> None:
    example = (ROOT / "slurm" / "site.yaml").read_text()
    assert read_site(ROOT / "slurm" / "site.yaml").partition == "gpu"
    # "# key: value" is a setting to turn on, any other comment is text.
    turned_on = re.sub(r"(?m)^( *)# (?=[a-z_A-Z]+:)", r"\1", example).replace("#   image", "  image")
    everything = site(tmp_path, turned_on.replace("#   binds", "  binds"))
    assert everything.container == Container("$HOME/eetrain.sif", ("/scratch",))
    assert (everything.gpu_type, everything.modules) == ("a100", ("cuda/12.4",))
    assert everything.environment["HF_HUB_OFFLINE"] == "1"
    assert everything.sbatch == ("--exclusive", "--mail-type=END")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("partitoin: gpu", "there is no key 'partitoin'", "Did you mean partition?"),
        ("zzz: 1", "there is no key 'zzz'", "Keys: partition, account, qos"),
        ("[gpu]", "holds a list instead of keys", "Keys: partition"),
        ("container: {imag: x}", "container: there is no key 'imag'", "Did you mean image?"),
        ("container: {binds: [/a]}", "container names no image", "container: {image:"),
        ("container: x.sif", "container holds a text instead of keys", "Keys: image, binds."),
        ("partition: [a]", "partition is a list, must be a text", "partition: name"),
        ("partition: ''", "partition is empty, must be a text", "partition: name"),
        ("partition: gpu $USER", "partition='gpu $USER' cannot stand in an #SBATCH line", "expands no variables"),
        ("constraint: a#b", "constraint='a#b' cannot stand", "without blanks"),
        ("cpus_per_task: eight", "cpus_per_task is a text, must be a whole number", "8"),
        ("cpus_per_task: true", "cpus_per_task is true or false, must be a whole number", "8"),
        ("signal_seconds: 0", "signal_seconds=0, must be at least 1", "Leave it out"),
        ("gpu_request: gpus", "gpu_request='gpus' is not known", "One of: gpus-per-node, gres, none."),
        ("modules: cuda", "modules is a text, must be a list of texts", "[first, second]"),
        ("modules: [1]", "modules is a list, must be a list of texts", "[first, second]"),
        ("environment: [A=1]", "environment is a list, must be variables with values", "HF_HUB_OFFLINE"),
        ("environment: {A: true}", "environment.A is true or false, must be a text or a number", 'A: "1"'),
        ("environment: {A-B: x}", "environment: 'A-B' is no name of a variable", "HF_HUB_OFFLINE"),
        ("caches: [a]", "caches is a list, must be a text", "caches: name"),
        ("sbatch: [-p gpu]", "sbatch: '-p gpu' is no option of sbatch", "--name or --name=value"),
        ("sbatch: [--comment=$USER]", "sbatch: '--comment' is no option of sbatch", "without $ and #"),
        ("sbatch: [--ntasks=4]", "sbatch: --ntasks is set elsewhere", "Use --nodes and --gpus of eetrain submit."),
        ("sbatch: [--signal=B:TERM@9]", "sbatch: --signal is set elsewhere", "Use signal_seconds."),
        ("sbatch: [--no-requeue]", "sbatch: --no-requeue is set elsewhere", "nothing: jobs are requeued"),
        ("sbatch: [--output x]", "sbatch: --output is set elsewhere", "Use --run"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        site(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path}/site.yaml")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_site(tmp_path / "gone.yaml")
    assert caught.value.message == f"The site file '{tmp_path}/gone.yaml' cannot be read: No such file or directory."
    assert "slurm/site.yaml" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        site(tmp_path, "partition: gpu\nenvironment: {A: [planted\n")
    assert "is no YAML in line" in caught.value.message
    assert "planted" not in str(caught.value), "the line may hold a secret"
    (tmp_path / "site.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: it is no text"):
        read_site(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("environment: {HF_TOKEN: planted}", "HF_TOKEN looks like a secret"),
        ("environment: {MYTOKEN: planted}", "MYTOKEN looks like a secret"),
        ("environment: {wandb_api_key: planted}", "wandb_api_key looks like a secret"),
        ("environment: {AWS_SECRET_ACCESS: planted}", "AWS_SECRET_ACCESS looks like a secret"),
        ("environment: {DB_PASSWORD: planted}", "DB_PASSWORD looks like a secret"),
        ("environment: {HTTPS_PROXY: 'http://ana:planted@proxy:1'}", "HTTPS_PROXY holds an address with a password"),
        ("setup: ['export A=1 WANDB_API_KEY=planted']", "WANDB_API_KEY looks like a secret"),
        ("setup: ['pip config set x https://ana:planted@host']", "an address with a password stands in it"),
        ("sbatch: ['--export=ALL,HF_TOKEN=planted']", "HF_TOKEN looks like a secret"),
    ],
)
def test_secrets_are_refused_and_not_quoted(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        site(tmp_path, text)
    assert (
        caught.value.message == f"{tmp_path}/site.yaml: {message}, and would be written into the script of every job."
    )
    assert caught.value.hint.startswith("Export it in the shell that submits")
    assert "~/.netrc" in caught.value.hint
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "SSL_KEY_FILE", "KEYBOARD", "MONKEYS"])
def test_what_is_no_secret(tmp_path: Path, name: str) -> None:
    assert not looks_secret(name)
    assert site(tmp_path, f"environment: {{{name}: x}}").environment == {name: "x"}
