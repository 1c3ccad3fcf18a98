"""What a benchmark leaves behind: a table, and where it was measured."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "flax", "numpy", "safetensors", "torch", "diffusers")


def environment() -> dict[str, Any]:
  """When and where: date, host, JAX's devices, versions."""
  import jax

  devices = jax.devices()
  return {
    "date": datetime.date.today().isoformat(),
    "cpu": cpu_name(),
    "cores": len(os.sched_getaffinity(0)),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "versions": {"python": platform.python_version()} | _versions(),
  }


def cpu_name() -> str:
  """The processor as `lscpu` names it."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [x.partition(":")[2].strip() for x in lines if "model name" in x]
  return names[0] if names else platform.processor() or platform.machine()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of equal keys as a table that reads well unrendered, too.

  Floats get three significant digits; None is a dash.
  """
  columns = list(rows[0])
  cells = [columns, *([_text(row[c]) for c in columns] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  lines = [
    "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |"
    for line in cells
  ]
  lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
  return "\n".join(lines)


def save(
  workdir: str | Path,
  name: str,
  rows: Sequence[Mapping[str, Any]],
  details: Mapping[str, Any],
  where: Mapping[str, Any] | None = None,
) -> None:
  """Prints the table and where it is kept; arguments as for `write`."""
  print(write(workdir, name, rows, details, where))
  print(f"written: {Path(workdir) / name}.md and .json")


def write(
  workdir: str | Path,
  name: str,
  rows: Sequence[Mapping[str, Any]],
  details: Mapping[str, Any],
  where: Mapping[str, Any] | None = None,
) -> str:
  """Writes `<name>.md` and `<name>.json` to `workdir`; returns the table.

  Args:
    workdir: made if it is missing.
    name: of the benchmark.
    rows: of the table.
    details: whatever else is to be kept in the JSON file.
    where: `environment` of the process that measured, if it was another.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  where = {**(where or environment()), "command": _command(name)}
  table = markdown(rows)
  versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
  fragment = (
    f"{table}\n\n`{where['command']}`, {where['date']}, {where['cpu']} "
    f"({where['cores']} cores), {where['devices']}; {versions}.\n"
  )
  content = {"benchmark": name, **where, "rows": list(rows), **details}
  (workdir / f"{name}.md").write_text(fragment)
  (workdir / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
  return table


def _command(name: str) -> str:
  """What was typed; the dispatcher takes the name out of the arguments."""
  return " ".join(["python", sys.argv[0], name, *sys.argv[1:]])


def _text(value: Any) -> str:
  if value is None:
    return "–"
  if not isinstance(value, float):
    return str(value)
  # Three digits, but no exponents: 1234.5 is 1234, 0.01234 is 0.0123.
  return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _versions() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
