# Sourced by the other scripts: makes .venv in the checkout, and installs only
# what is missing. Usage: source launch/setup.sh [EXTRA]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python="$candidate"
      break
    fi
  done
fi
[ -n "$python" ] || {
  echo "digen_jax needs Python 3.11 or newer: install one, or set PYTHON" >&2
  exit 2
}
# Without pip it is what a failed or interrupted attempt left behind.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
# The stamp holds what was installed: a changed pyproject.toml installs again.
stamp=".venv/.digen_jax-${extra:-core}"
if ! cmp -s pyproject.toml "$stamp"; then
  echo "installing digen_jax${extra:+ with the extra '$extra'} into .venv" >&2
  # Byte code is made of what is imported, when it is.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-compile --editable ".${extra:+[$extra]}"
  cp pyproject.toml "$stamp"
fi
