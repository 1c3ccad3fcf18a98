#!/usr/bin/env bash
# Trains the embedded text-to-image model on the embedded task, from nothing.
#   launch/quickstart.sh [--workdir=DIR] [--config.seed=1 …]
source "$(dirname "$0")/setup.sh" ""  # else it would read our arguments
args=("$@")
case " $* " in
  *" --workdir"*) ;;
  *) args+=(--workdir=runs/quickstart) ;;
esac
exec .venv/bin/python launch/train.py --config=configs/tiny_shapes.py "${args[@]}"
