#!/usr/bin/env bash
# Installs what the tests need and runs them in up to four processes; arguments go to pytest (-m slow: the long ones).
set -euo pipefail
source "$(dirname "$0")/setup.sh" test
cores=$(env -u OMP_NUM_THREADS nproc) # which would count the threads of this variable
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # of each process
python -m pytest -q -n $((cores < 4 ? cores + 1 : 4)) --dist worksteal "$@" # one more than cores: some tests wait
