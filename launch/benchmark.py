"""Benchmarks, by name; results are printed and kept in the workdir.

  python launch/benchmark.py loading --workdir=DIR   checkpoint to devices
  python launch/benchmark.py models --workdir=DIR    steps of every family

`python launch/benchmark.py NAME --help` shows the flags; the bodies are
digen_jax/benchmarks/NAME.py.
"""

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for tables, records and what is made on the way."
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "How often each measurement is taken; medians are shown."
)
_GIGABYTES = flags.DEFINE_float(
  "gigabytes", 4.0, "loading: size of the synthetic checkpoint, 10^9 bytes."
)
_FAMILIES = flags.DEFINE_list(
  "families", None, "models: which (flux, qwen_image, ...); default: all."
)
_SIZE = flags.DEFINE_enum(
  "size",
  "auto",
  ["auto", "tiny", "full"],
  "models: published sizes or tiny ones; auto: tiny on CPU, else full.",
)
flags.mark_flag_as_required("workdir")


def _loading() -> None:
  # Devices are for the processes that are measured, one after the other.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  start_devices(1)
  from digen_jax.benchmarks import loading

  loading.run(
    _WORKDIR.value,
    gigabytes=_GIGABYTES.value,
    repetitions=_REPETITIONS.value,
  )


def _models() -> None:
  start_devices(1)
  from digen_jax.benchmarks import models

  models.run(
    _WORKDIR.value,
    families=_FAMILIES.value,
    size=_SIZE.value,
    repetitions=_REPETITIONS.value,
  )


# What runs, and the flags of its own.
BENCHMARKS = {
  "loading": (_loading, (_GIGABYTES,)),
  "models": (_models, (_FAMILIES, _SIZE)),
}


def main(name: str) -> None:
  from digen_jax.errors import UserError

  if name not in BENCHMARKS:
    raise UserError(
      f"{name!r} is no benchmark: name one of {', '.join(BENCHMARKS)} before "
      "the flags"
    )
  for other, (_, own) in BENCHMARKS.items():
    given = [flag.name for flag in own if flag.present]
    if other != name and given:
      raise UserError(f"--{given[0]} is a flag of {other}, not of {name}")
  BENCHMARKS[name][0]()


if __name__ == "__main__":
  named = sys.argv[1:2] and not sys.argv[1].startswith("-")
  run_main(functools.partial(main, sys.argv.pop(1) if named else ""))
