"""Benchmarks, by name; results are printed and kept in the workdir.

  python launch/benchmark.py ladder      what each technique adds, on two cores
  python launch/benchmark.py learning    rewards with and without techniques
  python launch/benchmark.py loading     checkpoint to devices
  python launch/benchmark.py memory      training steps of full size, compiled
  python launch/benchmark.py models      steps of every family
  python launch/benchmark.py published   published set-ups, simulated

--out=FILE.json copies the record there; --quick does less of what is measured.
`python launch/benchmark.py NAME --help` shows the flags; the bodies are
digen_jax/benchmarks/NAME.py.
"""

import functools
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_WORKDIR = flags.DEFINE_string(
  "workdir",
  "runs/benchmarks",
  "Directory for tables, records and what is made on the way.",
)
_OUT = flags.DEFINE_string("out", None, "File that gets the JSON record, too.")
_QUICK = flags.DEFINE_bool(
  "quick", False, "Small sizes, once: shows that it works, not how fast."
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "How often each measurement is taken; medians are shown."
)
_GIGABYTES = flags.DEFINE_float(
  "gigabytes", 4.0, "loading: size of the synthetic checkpoint, 10^9 bytes."
)
_FAMILIES = flags.DEFINE_list(
  "families",
  None,
  "models, memory: which (flux, qwen_image, ...); default: all.",
)
_SIZE = flags.DEFINE_enum(
  "size",
  "auto",
  ["auto", "tiny", "full"],
  "models: published sizes or tiny ones; auto: tiny on CPU, else full.",
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "learning: runs of each variant.")
_STEPS = flags.DEFINE_integer("steps", 50, "learning: global steps of a run.")


def _repetitions() -> int:
  return 1 if _QUICK.value else _REPETITIONS.value


def _ladder() -> None:
  start_devices(1)
  from digen_jax.benchmarks import ladder

  small = {"groups": 6, "group_size": 8} if _QUICK.value else {}
  ladder.run(_WORKDIR.value, repetitions=_repetitions(), **small)


def _learning() -> None:
  from digen_jax.benchmarks import learning

  steps, seeds = (2, 1) if _QUICK.value else (_STEPS.value, _SEEDS.value)
  learning.run(_WORKDIR.value, steps=steps, seeds=range(seeds))


def _loading() -> None:
  # Devices are for the processes that are measured, one after the other.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  start_devices(1)
  from digen_jax.benchmarks import loading

  loading.run(
    _WORKDIR.value,
    gigabytes=0.25 if _QUICK.value else _GIGABYTES.value,
    repetitions=_repetitions(),
  )


def _memory() -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  start_devices(8)
  from digen_jax.benchmarks import memory

  families = _FAMILIES.value or (["sd3"] if _QUICK.value else None)
  memory.run(_WORKDIR.value, families=families)


def _models() -> None:
  start_devices(1)
  from digen_jax.benchmarks import models

  models.run(
    _WORKDIR.value,
    families=_FAMILIES.value,
    size="tiny" if _QUICK.value else _SIZE.value,
    repetitions=_repetitions(),
  )


def _published() -> None:
  start_devices(1)
  from digen_jax.benchmarks import published

  published.run(_WORKDIR.value)


# What runs, and the flags of its own.
BENCHMARKS = {
  "ladder": (_ladder, (_QUICK, _REPETITIONS)),
  "learning": (_learning, (_QUICK, _SEEDS, _STEPS)),
  "loading": (_loading, (_QUICK, _REPETITIONS, _GIGABYTES)),
  "memory": (_memory, (_QUICK, _FAMILIES)),
  "models": (_models, (_QUICK, _REPETITIONS, _FAMILIES, _SIZE)),
  "published": (_published, ()),
}


def main(name: str) -> None:
  from digen_jax.errors import UserError

  if name not in BENCHMARKS:
    raise UserError(
      f"{name!r} is no benchmark: name one of {', '.join(BENCHMARKS)} before "
      "the flags"
    )
  own = {flag.name for flag in BENCHMARKS[name][1]}
  for other, (_, theirs) in BENCHMARKS.items():
    given = [f.name for f in theirs if f.present and f.name not in own]
    if given:
      raise UserError(f"--{given[0]} is a flag of {other}, not of {name}")
  if _OUT.value:  # fails before the benchmark where it cannot be written
    os.makedirs(os.path.dirname(os.path.abspath(_OUT.value)), exist_ok=True)
  BENCHMARKS[name][0]()
  if _OUT.value:
    shutil.copyfile(os.path.join(_WORKDIR.value, f"{name}.json"), _OUT.value)


if __name__ == "__main__":
  named = sys.argv[1:2] and not sys.argv[1].startswith("-")
  run_main(functools.partial(main, sys.argv.pop(1) if named else ""))
