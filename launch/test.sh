#!/usr/bin/env bash
# Sets up .venv with the test extra and runs the tests.
#   launch/test.sh            lint and every test but those marked slow
#   launch/test.sh --slow     the slow ones: learning, kill points, full runs
#   launch/test.sh ARGS…      passed on to pytest
source "$(dirname "$0")/setup.sh" test
if [ "${1:-}" = "--slow" ]; then
  shift
  exec .venv/bin/python -m pytest -m slow "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -m "not slow" \
  --numprocesses=logical --maxprocesses=8 --dist=worksteal "$@"
