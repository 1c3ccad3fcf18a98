"""Safetensors files: where every tensor lies, and views of their bytes.

Files are memory-mapped: a tensor, or a slice of one, costs only the pages
that are read. Nothing here knows models.

Format: 8 bytes little-endian header length, a JSON header with each tensor's
dtype, shape and byte range, then the bytes.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from digen_jax.errors import UserError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100_000_000
METADATA = "__metadata__"
STEMS = ("diffusion_pytorch_model", "model")
INDEX = ".safetensors.index.json"
# The same weights often lie side by side in several formats.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".gguf", ".h5", ".msgpack")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies.

  Attributes:
    name: as in the file.
    file: path of the file.
    dtype: of the stored elements.
    shape: of the stored array.
    offset: of the first byte, from the beginning of the file.
  """

  name: str
  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def view(self) -> np.ndarray:
    """A read-only memory-mapped view of the tensor."""
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    # Not np.memmap with an offset and shape directly: it rejects shape ().
    flat = np.memmap(
      self.file,
      self.dtype,
      mode="r",
      offset=self.offset,
      shape=(math.prod(self.shape),),
    )
    return flat.reshape(self.shape)


def list_tensors(directory: str | Path) -> dict[str, Tensor]:
  """The tensors of a module directory, of one file or several shards.

  Args:
    directory: holds `<stem>.safetensors`, or `<stem>.safetensors.index.json`
      and the shards that it names; the stem is diffusers' or transformers'.

  Raises:
    UserError: no such files, or a damaged one.
  """
  directory = Path(directory)
  tensors: dict[str, Tensor] = {}
  for file in find_files(directory):
    for name, tensor in read_header(file).items():
      if name in tensors:
        raise UserError(
          f"tensor {name!r} is in both {tensors[name].file} and {file}"
        )
      tensors[name] = tensor
  return tensors


def find_files(directory: Path) -> list[Path]:
  """The safetensors files of a module directory; UserError if incomplete."""
  for stem in STEMS:
    single = directory / f"{stem}.safetensors"
    index = directory / f"{stem}{INDEX}"
    if index.exists():
      return _sharded_files(index)
    if single.exists():
      return [single]
  raise UserError(
    f"{directory} has no {STEMS[0]}.safetensors (nor {STEMS[1]}.safetensors, "
    "nor an index of shards); save the checkpoint with safe_serialization=True"
  )


def component_files(directory: Path) -> list[Path]:
  """What makes up a component of a pipeline, sorted.

  Of weights only what is read (`find_files`): others are the same in another
  precision or format, and may come and go. A component without any that can
  be read has all its files. Hidden files are left out.
  """
  found = [f for f in sorted(directory.iterdir()) if f.name[0] != "."]
  try:
    weights = find_files(directory)
  except UserError:
    return found
  indices = [f"{stem}{INDEX}" for stem in STEMS]
  return [
    file
    for file in found
    if file in weights
    or file.name in indices
    or (file.suffix not in WEIGHT_SUFFIXES and ".index." not in file.name)
  ]


def read_header(file: Path) -> dict[str, Tensor]:
  """The tensors of one file; UserError if it is damaged."""
  entries, start, size = _read_json(file)
  entries.pop(METADATA, None)
  return {
    name: _tensor(name, file, entry, start, size)
    for name, entry in entries.items()
  }


def read_metadata(file: Path) -> dict[str, str]:
  """What a file says about itself; UserError if it is damaged."""
  return _read_json(file)[0].get(METADATA) or {}


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
  """The header, where the data begin, and the size of the file."""
  size = file.stat().st_size
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
      raise UserError(
        f"{file} is truncated or no safetensors file ({size} bytes, header of "
        f"{length}); copy it again"
      )
    header = stream.read(length)
  try:
    entries = json.loads(header)
    if not isinstance(entries, dict):
      raise ValueError("no JSON object")
  except ValueError as error:
    raise UserError(
      f"{file} has an unreadable safetensors header ({error}); copy it again"
    ) from error
  return entries, 8 + length, size


def _sharded_files(index: Path) -> list[Path]:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    names = sorted(set(weight_map.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{index} is no index of shards ({error!r}); copy it again"
    ) from error
  files = [index.parent / name for name in names]
  missing = [file.name for file in files if not file.exists()]
  if missing:
    raise UserError(
      f"{index.parent} lacks {len(missing)} of {len(files)} shards: "
      f"{', '.join(missing)}; copy them from the checkpoint's source"
    )
  return files


def _tensor(name: str, file: Path, entry: Any, start: int, size: int) -> Tensor:
  try:
    code, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"tensor {name!r} in {file} has a damaged header entry {entry!r}; copy "
      "the file again"
    ) from error
  if code not in DTYPES:
    raise UserError(
      f"tensor {name!r} in {file} has dtype {code}, which is not supported; "
      f"use a checkpoint in one of {', '.join(DTYPES)}"
    )
  dtype = DTYPES[code]
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise UserError(
      f"tensor {name!r} in {file}: {end - begin} bytes do not hold {code} "
      f"{list(shape)}; copy the file again"
    )
  if start + end > size:
    raise UserError(
      f"{file} is truncated: tensor {name!r} ends at byte {start + end} of a "
      f"file of {size}; copy it again"
    )
  return Tensor(name, file, dtype, shape, start + begin)
