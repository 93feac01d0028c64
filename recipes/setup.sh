#!/bin/sh
# Make .venv at the repository's root and install eetrain into it, with the versions the tests ran with.
# Sourced by quickstart.sh and tests/run.sh: sh recipes/setup.sh [EXTRAS]; a second call installs nothing.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
extras=${1:-}
cd "$root"
python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: eetrain needs Python 3.11 or newer on PATH; found: ${python:-none}" >&2
  exit 1
fi
wanted=$(cat pyproject.toml .constraints.txt | cksum)
stamp=.venv/.eetrain-${extras:-plain}
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing eetrain into .venv ..." >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt \
  --editable ".${extras:+[$extras]}"
printf '%s\n' "$wanted" > "$stamp"
