"""Models -> directories that diffusers loads.

Everything is written to a temporary directory beside the target and renamed
at the end: a reader sees the whole result or nothing.
"""

import contextlib
import functools
import json
import operator
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import numpy as safetensors_numpy

from digen_jax.errors import UserError
from digen_jax.models.layers import Params
from digen_jax.weights import names
from digen_jax.weights.load import (
  component_folders,
  load_pipeline_config,
  module_directory,
  read_json,
)
from digen_jax.weights.safetensors import (
  Tensor,
  component_files,
  list_tensors,
)

FILE_STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5 * 2**30
# Of what lies beside the components, README and licence go with an export.
TEXTS = ("", ".md", ".txt")
MAX_TEXT_BYTES = 2**20


def save_module(
  directory: str | Path,
  params: Params,
  config: Mapping[str, Any],
  *,
  dtype: DTypeLike | None = np.float32,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a module directory: `config.json` and safetensors.

  Args:
    directory: must be new or empty.
    params: without adapters (`models.lora.merge_lora`).
    config: content of `config.json`, with `_class_name`; see
      `models.Family.config_dict`.
    dtype: of the file; None means each parameter's own.
    max_shard_bytes: above, the weights are split into shards with an index.

  Raises:
    UserError: the directory is not empty, or an unknown class.
  """
  tensors = _to_tensors(params, _name_map(config), dtype)
  with fresh_directory(directory) as temporary:
    _write_module(temporary, tensors, config, max_shard_bytes)


def export_pipeline(
  source: str | Path, directory: str | Path, params: Params
) -> None:
  """Writes a pipeline: `source` with trained parameters in its transformer.

  They are written in the dtype that they have: a run that trains every
  parameter keeps them in float32, and small changes would be lost in a
  `source` of bfloat16. `adapters.merge_pipeline` is for runs that train
  adapters.

  Args:
    source: see `write_pipeline`.
    directory: must be new or empty.
    params: all of a transformer's, without adapters, placed anywhere;
      `jax.ShapeDtypeStruct`s stand for what is as in `source`.

  Raises:
    UserError: the directory is not empty, or `source` is no pipeline.
  """
  folder = module_directory(source, "transformer")
  name_map = _name_map(read_json(folder / "config.json"))
  stored = list_tensors(folder)
  tensors = _to_tensors(params, name_map, None, stored)
  write_pipeline(source, directory, tensors)


def write_pipeline(
  source: str | Path,
  directory: str | Path,
  tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
  """Writes a pipeline: `source` with other tensors in its transformer.

  Args:
    source: a diffusers pipeline directory; its other components are copied,
      without weights in other precisions or formats.
    directory: must be new or empty.
    tensors: diffusers' names and arrays; as many are held as fit in a shard.

  Raises:
    UserError: the directory is not empty, or `source` is no pipeline.
  """
  source = load_pipeline_config(source, ("transformer",)).path
  config = read_json(module_directory(source, "transformer") / "config.json")
  with fresh_directory(directory) as temporary:
    _copy_pipeline(source, temporary)
    module = temporary / "transformer"
    module.mkdir()
    _write_module(module, tensors, config, MAX_SHARD_BYTES)


def check_fresh(directory: str | Path) -> None:
  """Raises UserError unless a directory is missing, or empty and can go."""
  directory = Path(directory).resolve()
  if directory.is_mount():
    raise UserError(
      f"{directory} is a mount point, which cannot be replaced; name a "
      f"directory inside it, e.g. {directory / 'export'}"
    )
  if directory.exists() and (
    not directory.is_dir() or any(directory.iterdir())
  ):
    raise UserError(
      f"{directory} exists and is not empty; choose another output directory"
    )


@contextlib.contextmanager
def fresh_directory(directory: str | Path) -> Iterator[Path]:
  """A temporary directory that becomes `directory` if the block succeeds.

  Of a symbolic link, what it points to is made.

  Raises:
    UserError: `directory` exists and is not an empty directory, or is a mount
      point.
  """
  check_fresh(directory)
  directory = Path(directory).resolve()
  directory.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(
    tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent)
  )
  try:
    yield temporary
    temporary.chmod(0o755)
    os.replace(temporary, directory)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def _copy_pipeline(source: Path, target: Path) -> None:
  """The index, README and licence, and every component but the transformer."""
  for file in source.iterdir():
    text = file.suffix in TEXTS and file.name[0] != "." and file.is_file()
    small = text and file.stat().st_size <= MAX_TEXT_BYTES
    if small or file.name == "model_index.json":
      shutil.copy(file, target)
  for folder in component_folders(source):
    if folder.name == "transformer":
      continue
    (target / folder.name).mkdir()
    for file in component_files(folder):
      copy = shutil.copytree if file.is_dir() else shutil.copy
      copy(file, target / folder.name / file.name)


def _write_module(
  directory: Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  config: Mapping[str, Any],
  max_shard_bytes: int,
) -> None:
  _write_json(directory / "config.json", config)
  sizes = _write_shards(directory, tensors, max_shard_bytes)
  if len(sizes) == 1:
    (directory / _part(1)).rename(directory / f"{FILE_STEM}.safetensors")
    return
  weight_map = {}
  for number, names_of_shard in enumerate(sizes, 1):
    file = f"{FILE_STEM}-{number:05d}-of-{len(sizes):05d}.safetensors"
    (directory / _part(number)).rename(directory / file)
    weight_map |= dict.fromkeys(names_of_shard, file)
  total = sum(sum(shard.values()) for shard in sizes)
  _write_json(
    directory / f"{FILE_STEM}.safetensors.index.json",
    {"metadata": {"total_size": total}, "weight_map": weight_map},
  )


def _name_map(config: Mapping[str, Any]) -> names.NameMap:
  class_name = config.get("_class_name")
  if class_name not in names.NAME_MAPS:
    raise UserError(f"cannot write a {class_name!r}: its names are unknown")
  return names.NAME_MAPS[class_name]


def _write_shards(
  directory: Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  max_shard_bytes: int,
) -> list[dict[str, int]]:
  """Writes every shard as soon as it is full: the host never holds two.

  Returns:
    Of each shard, its tensors' sizes in bytes by name. Its file is `_part`: how
    many there are, which the final names say, shows at the end.
  """
  sizes: list[dict[str, int]] = []
  shard: dict[str, np.ndarray] = {}

  def write() -> None:
    sizes.append({name: tensor.nbytes for name, tensor in shard.items()})
    _save(directory / _part(len(sizes)), shard)
    shard.clear()

  for name, tensor in tensors:
    size = sum(t.nbytes for t in shard.values())
    if shard and size + tensor.nbytes > max_shard_bytes:
      write()
    shard[name] = tensor
  write()
  return sizes


def _part(number: int) -> str:
  return f"{number:05d}.part"


def _to_tensors(
  params: Params,
  name_map: names.NameMap,
  dtype: DTypeLike | None,
  stored: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
  """Their names and arrays; one layer at a time leaves its device.

  What is a shape only comes from `stored`, as it is there.
  """
  for entry in names.entries(params, name_map):
    leaf = functools.reduce(operator.getitem, entry.path, params)
    for layer, name in enumerate(entry.names):
      if isinstance(leaf, jax.ShapeDtypeStruct):
        yield name, stored[name].view()
        continue
      # Of a slice: an array keeps its host copy as long as it lives.
      part = np.asarray(leaf[layer] if entry.stacked else leaf, dtype)
      yield name, np.ascontiguousarray(entry.to_theirs(part))


def _save(file: Path, tensors: dict[str, np.ndarray]) -> None:
  safetensors_numpy.save_file(tensors, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
