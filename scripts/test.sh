#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest (scripts/test.sh -m slow runs the long ones).
set -euo pipefail
source "$(dirname "$0")/setup.sh" test
python -m pytest -q "$@"
