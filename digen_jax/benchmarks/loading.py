"""From a sharded checkpoint on disk to arrays on devices: memory and speed.

A checkpoint of FLUX.1-dev's width and as many blocks as fill the gigabytes,
random bfloat16 in several files, is read by `load_model` and, as a reference,
by `safetensors` alone, each in a process of its own, in turn. The files are in
the page cache: it is the way from there to the devices that is measured, and
no disk.

Host memory is what the kernel counts (VmHWM, the peak of resident pages):
mapped pages of the files are in it as long as they are mapped. What the
process held before the loading is taken off, and so are the arrays themselves
where devices live in host memory (CPU). What is left is the price of loading.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from digen_jax.benchmarks import output
from digen_jax.weights import export, names, safetensors

FILES = 4
SHARDED = 8  # devices that a CPU plays in the sharded case
ROOT = Path(__file__).parents[2]
# (name, devices); 0 devices is `safetensors` alone.
READERS = (
  ("safetensors", 0),
  ("load_model", 1),
  ("load_model, trainer layout", SHARDED),
)


def run(
  workdir: str | Path,
  *,
  gigabytes: float = 4.0,
  repetitions: int = 3,
  heads: int = 24,
) -> list[dict[str, Any]]:
  """Measures, prints and keeps the table; returns its rows.

  Args:
    workdir: for the results and, meanwhile, the checkpoint.
    gigabytes: of the checkpoint, 10^9 bytes.
    repetitions: of every reader.
    heads: of the model; 24 is FLUX.1's width.
  """
  Path(workdir).mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=workdir) as directory:
    largest = write_checkpoint(Path(directory), gigabytes, heads)
    for file in safetensors.find_files(Path(directory)):
      file.read_bytes()  # into the page cache, should it have left it
    measured: dict[str, list] = {name: [] for name, _ in READERS}
    where: dict[str, Any] = {}
    for number in range(repetitions):
      for name, devices in READERS:
        found = _measure(directory, devices)
        here = found.pop("where")
        where = where or here
        measured[name].append(found)
        print(f"{number + 1}/{repetitions} {name}: {found['seconds']:.3g} s")
  plain = measured["safetensors"]
  rows = [
    _row(name, devices, measured[name], plain, largest)
    for name, devices in READERS
  ]
  details = {"largest_file": largest, "runs": measured, "page_cache": "warm"}
  output.save(workdir, "loading", rows, details, where)
  return rows


def write_checkpoint(directory: Path, gigabytes: float, heads: int) -> int:
  """Writes a module directory in `FILES` files; bytes of the largest.

  One tensor at a time is in memory.
  """
  model = _abstract(heads, _blocks(gigabytes, heads))
  tensors = [
    (name, entry.tensor_shape)
    for entry in names.entries(model.params, names.FLUX)
    for name in entry.names
  ]
  total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
  groups: list[list] = [[]]
  size = 0
  for name, shape in tensors:
    if size > total / FILES * len(groups):
      groups.append([])
    groups[-1].append((name, shape))
    size += 2 * int(np.prod(shape))
  weight_map = {}
  stem = export.FILE_STEM
  for number, group in enumerate(groups, 1):
    file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
    _write_file(directory / file, group)
    weight_map |= {name: file for name, _ in group}
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
  config = model.family.config_dict(model.config)
  (directory / "config.json").write_text(json.dumps(config))
  return max(f.stat().st_size for f in safetensors.find_files(directory))


def _abstract(heads: int, blocks: int) -> Any:
  """FLUX.1-dev with other numbers of heads and blocks, as shapes."""
  from digen_jax import models

  family = models.find_family("FluxTransformer2DModel")
  config = family.config(
    num_layers=blocks,
    num_single_layers=2 * blocks,
    num_attention_heads=heads,
    guidance_embeds=True,
  )
  return models.abstract_model(family, config)


def _blocks(gigabytes: float, heads: int) -> int:
  """Double blocks, each with two single ones, that fill the gigabytes."""
  one, two = (
    sum(2 * int(np.prod(x.shape)) for x in _leaves(_abstract(heads, n)))
    for n in (1, 2)
  )
  return max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)


def _leaves(model: Any) -> list[Any]:
  import jax

  return jax.tree.leaves(model.params)


def _write_file(file: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
  header, end = {}, 0
  for name, shape in tensors:
    begin, end = end, end + 2 * int(np.prod(shape))
    header[name] = {
      "dtype": "BF16",
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(file, "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for block in _noise([np.prod(shape) for _, shape in tensors]):
      stream.write(block)


def _noise(sizes: list[int]) -> Iterator[bytes]:
  """Finite bfloat16 numbers as bytes, those of one tensor at a time."""
  rng = np.random.default_rng(0)
  block = rng.normal(size=2**20).astype(np.float32).view(np.uint32) >> 16
  block = block.astype(np.uint16)
  for number, size in enumerate(sizes):
    yield np.resize(np.roll(block, number), int(size)).tobytes()


def _measure(directory: str, devices: int) -> dict[str, Any]:
  """One reading, in a process of its own."""
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  done = subprocess.run(
    [sys.executable, "-m", __name__, directory, str(devices)],
    env=os.environ | {"PYTHONPATH": path},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def _row(
  name: str, devices: int, runs: list, plain: list, largest: int
) -> dict[str, Any]:
  def median(key: str) -> float:
    return statistics.median(run[key] for run in runs)

  ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, plain)]
  beyond = max(run["beyond"] for run in runs)
  return {
    "reader": name,
    "devices": int(median("devices")) if devices else None,
    "GB": median("bytes") / 1e9,
    "seconds": median("seconds"),
    "CPU seconds": median("cpu_seconds"),
    "GB/s": statistics.median(r["bytes"] / r["seconds"] for r in runs) / 1e9,
    "time / safetensors": statistics.median(ratios),
    "peak host memory beyond arrays, GB": beyond / 1e9,
    "/ largest file": beyond / largest,
  }


def _child(directory: str, devices: int) -> dict[str, Any]:
  """What one process reads and reports."""
  import jax

  jax.config.update("jax_num_cpu_devices", max(1, devices))
  found = jax.devices()  # starts the backend
  before = _status("VmRSS")
  start, cpu = time.perf_counter(), time.process_time()
  if devices:
    arrays = _load(directory, found if devices > 1 else None)
  else:
    arrays = _read_plain(directory)
  seconds = time.perf_counter() - start
  cpu_seconds = time.process_time() - cpu
  size = sum(x.nbytes for x in arrays)
  in_host_memory = not devices or found[0].platform == "cpu"
  held = before + (size if in_host_memory else 0)
  return {
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "bytes": size,
    "devices": len(found) if devices > 1 else devices,
    "beyond": max(0, _status("VmHWM") - held),
    "where": output.environment(),
  }


def _load(directory: str, devices: list | None) -> list[Any]:
  import jax

  from digen_jax.parallel import mesh as mesh_lib
  from digen_jax.parallel import rules
  from digen_jax.weights import load

  mesh = None
  if devices is not None:
    mesh = mesh_lib.make_mesh({"fsdp": len(devices)}, devices)
  model = load.load_model(
    directory, dtype="bfloat16", mesh=mesh, rules=rules.TRAINER
  )
  return jax.block_until_ready(jax.tree.leaves(model.params))


def _read_plain(directory: str) -> list[np.ndarray]:
  from safetensors.numpy import load_file

  files = safetensors.find_files(Path(directory))
  return [x for file in files for x in load_file(file).values()]


def _status(key: str) -> int:
  """A figure of /proc/self/status in bytes."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{key}:"):
      return int(line.split()[1]) * 1024
  raise KeyError(key)


if __name__ == "__main__":
  print(json.dumps(_child(sys.argv[1], int(sys.argv[2]))))
