#!/bin/sh
# Set everything up and pass the tests: lint, types, then the default suite. Further arguments go to pytest.
#   sh tests/run.sh             everything CI runs
#   sh tests/run.sh -m slow     the longer tests
#   sh tests/run.sh -m gpu      those that need a CUDA device
#   sh tests/run.sh -m slurm    all that run on a real Slurm, which is installed where apt and root are there
set -eu
cd "$(dirname "$0")/.."
sh recipes/setup.sh dev
sh tests/slurm/install.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy eetrain
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
