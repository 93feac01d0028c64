#!/bin/sh
# Install what the tests of this folder need: Slurm and munge of Debian or Ubuntu. Installs nothing where they are there;
# where it cannot it says why and ends well, and those tests are skipped.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" > /dev/null || missing="$missing $program"
done
if [ -z "$missing" ]; then
  exit 0
fi
if ! command -v apt-get > /dev/null; then
  echo "no tests on a real Slurm:$missing not installed, and there is no apt-get" >&2
  exit 0
fi
if [ "$(id -u)" != 0 ]; then
  echo "no tests on a real Slurm:$missing not installed, and only root can install them" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "installing Slurm for the tests ..." >&2
apt="apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=0"
# RUNLEVEL: the packages' own services are not wanted, the tests start servers of their own.
if ! { $apt update && RUNLEVEL=1 $apt install -y --no-install-recommends slurmctld slurmd slurm-client munge; } \
  > "$log" 2>&1; then
  echo "no tests on a real Slurm: apt-get failed:" >&2
  tail -n 3 "$log" >&2
fi
