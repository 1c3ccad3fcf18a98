"""LoRA adapters as a file that diffusers and PEFT load, and back.

The portable form is one safetensors file with two tensors a linear layer,
`transformer.<module>.lora_A.weight` [rank, in] and `.lora_B.weight`
[out, rank], so that W' = W + B A: alpha / rank is folded into B, because
readers disagree on where they look for alpha. Stacked blocks become one module
a layer. Names come from the same tables as those of whole checkpoints.

Files with `lora_adapter_metadata` in their header, as diffusers'
`save_lora_weights` writes it, are read with the alpha that it tells.
"""

import dataclasses
import functools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from digen_jax.errors import UserError
from digen_jax.grpo.train_step import join
from digen_jax.models import Model, lora
from digen_jax.models.layers import Params
from digen_jax.weights import names, safetensors
from digen_jax.weights.export import fresh_directory, write_pipeline
from digen_jax.weights.load import load_abstract, module_directory, read_json
from digen_jax.weights.safetensors import Tensor

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")
METADATA = "lora_adapter_metadata"
SHOWN = 3  # modules that an error names


@dataclasses.dataclass(frozen=True)
class AdapterFile:
  """What a file of adapters holds.

  Attributes:
    file: its path.
    rank: of all adapters.
    alpha: their strength; the update is scaled by alpha / rank.
    tensors: by name, without the prefix.
    modules: diffusers' paths of the adapted layers.
  """

  file: Path
  rank: int
  alpha: float
  tensors: Mapping[str, Tensor]
  modules: tuple[str, ...]


def save_adapters(
  directory: str | Path, params: Params, class_name: str, *, alpha: float
) -> int:
  """Writes the adapters of a model in the portable form, float32.

  Args:
    directory: must be new or empty.
    params: all of an adapted model's; but for the adapters they may be
      `jax.ShapeDtypeStruct`s.
    class_name: diffusers' name of the transformer class.
    alpha: as given to `lora.adapt`.

  Returns:
    How many layers are adapted, those of a stack counted one by one.

  Raises:
    UserError: no adapters, or the directory is not empty.
  """
  tensors = _to_tensors(params, class_name, alpha)
  with fresh_directory(directory) as temporary:
    safetensors_numpy.save_file(
      {PREFIX + name: tensor for name, tensor in tensors.items()},
      temporary / FILE,
      metadata={"format": "pt"},
    )
  return len(tensors) // 2


def merge_pipeline(
  source: str | Path, directory: str | Path, params: Params, *, alpha: float
) -> None:
  """Writes a pipeline: `source` with adapters folded into its transformer.

  Every tensor has the dtype that it has in `source`: the sums are taken in
  float32, from the files of `source`, and then rounded to it. What has no
  adapters is copied.

  Args:
    source: see `export.write_pipeline`.
    directory: must be new or empty.
    params: as for `save_adapters`.
    alpha: as given to `lora.adapt`.

  Raises:
    UserError: no adapters, `source` is no pipeline or lacks adapted layers, or
      the directory is not empty.
  """
  folder = module_directory(source, "transformer")
  stored = safetensors.list_tensors(folder)
  class_name = read_json(folder / "config.json")["_class_name"]
  factors = _to_tensors(params, class_name, alpha)
  modules = _modules(factors)
  if unknown := [m for m in modules if f"{m}.weight" not in stored]:
    raise UserError(
      f"{folder} lacks {_some(unknown)}, which have adapters: give the "
      "checkpoint that they were trained on"
    )
  write_pipeline(source, directory, _merged(stored, factors))


def _merged(
  stored: Mapping[str, Tensor], factors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a module with W + B A for W, one at a time."""
  for name, tensor in stored.items():
    weight, module = tensor.view(), name.removesuffix(".weight")
    if f"{module}.lora_A.weight" in factors:
      a, b = (factors[f"{module}.lora_{x}.weight"] for x in "AB")
      weight = (weight.astype(np.float32) + b @ a).astype(weight.dtype)
    yield name, weight


def _to_tensors(
  params: Params, class_name: str, alpha: float
) -> dict[str, np.ndarray]:
  """The portable form of a model's adapters, without the prefix."""
  tensors = {}
  for entry in _adapter_entries(params, class_name):
    leaf = functools.reduce(operator.getitem, entry.path, params)
    leaf = np.asarray(leaf, np.float32)
    if entry.path[-1] == "lora_b":
      leaf = leaf * np.float32(alpha / leaf.shape[-2])
    for name, part in zip(entry.names, leaf if entry.stacked else [leaf]):
      tensors[name] = np.ascontiguousarray(entry.to_theirs(part))
  return tensors


def read_adapter_file(path: str | Path) -> AdapterFile:
  """Reads what a file of adapters holds, but not the numbers.

  Args:
    path: the file, or the directory of a `pytorch_lora_weights.safetensors`.

  Raises:
    UserError: no such file, a damaged one, or not the portable form.
  """
  file = Path(path) / FILE if Path(path).is_dir() else Path(path)
  if not file.is_file():
    raise UserError(
      f"{file} does not exist: give a LoRA file in diffusers' form, or the "
      f"directory of a {FILE}"
    )
  tensors = safetensors.read_header(file)
  if others := [name for name in tensors if name.startswith("text_encoder")]:
    raise UserError(
      f"{file} also adapts a text encoder ({others[0]}), which is not "
      "supported: save its transformer's adapters alone (save_lora_weights "
      "with transformer_lora_layers and transformer_lora_adapter_metadata)"
    )
  for name, tensor in tensors.items():
    if not KEY.fullmatch(name) or len(tensor.shape) != 2:
      raise UserError(
        f"tensor {name!r} in {file} is not in diffusers' portable form "
        f"({PREFIX}MODULE.lora_A.weight and .lora_B.weight, alpha folded in); "
        "load the file with diffusers and save it with save_lora_weights "
        "(transformer_lora_adapter_metadata keeps alpha)"
      )
  ranks = sorted(
    {t.shape[0 if "lora_A" in name else -1] for name, t in tensors.items()}
  )
  if len(ranks) != 1:
    raise UserError(
      f"{file} holds adapters of ranks {ranks}; only files of one rank are "
      "supported"
    )
  return AdapterFile(
    file=file,
    rank=ranks[0],
    alpha=_read_alpha(file, ranks[0]),
    tensors={n.removeprefix(PREFIX): t for n, t in tensors.items()},
    modules=tuple(dict.fromkeys(KEY.fullmatch(name)[1] for name in tensors)),
  )


def load_adapters(model: Model, path: str | Path, *, alpha: float) -> Model:
  """The adapted model with the adapters of a file instead of its own.

  Args:
    model: from `lora.adapt`; its rank and targets must be those of the file.
    path: see `read_adapter_file`.
    alpha: as given to `lora.adapt`; B is rescaled to it.

  Raises:
    UserError: no such file, another rank, or other adapted layers.
  """
  found = read_adapter_file(path)
  _, base = lora.split_trainable(model.params, "lora")
  entries = _adapter_entries(model.params, model.family.class_name)
  _check(found, entries)
  params: Params = {}
  for entry in entries:
    parts = [
      entry.to_ours(np.asarray(found.tensors[name].view(), np.float32))
      for name in entry.names
    ]
    node = params
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    leaf = np.stack(parts) if entry.stacked else parts[0]
    if entry.path[-1] == "lora_b":
      leaf = leaf * np.float32(found.alpha / alpha)
    own = functools.reduce(operator.getitem, entry.path, model.params)
    node[entry.path[-1]] = jax.device_put(leaf, own.sharding)
  return dataclasses.replace(model, params=join(params, base))


def check_adapters(model: Model, path: str | Path) -> None:
  """Raises UserError where `load_adapters` would; reads no tensor.

  Args:
    model: from `lora.adapt`; its arrays may be `jax.ShapeDtypeStruct`s.
    path: see `read_adapter_file`.
  """
  entries = _adapter_entries(model.params, model.family.class_name)
  _check(read_adapter_file(path), entries)


def train_settings(path: str | Path, checkpoint: str | Path) -> dict[str, Any]:
  """The fields of `config.train` with which a file's adapters are loaded.

  Args:
    path: see `read_adapter_file`.
    checkpoint: the pipeline that they adapt.

  Raises:
    UserError: no such file, or it does not fit the checkpoint.
  """
  found = read_adapter_file(path)
  return dict(
    lora_init=str(path),
    lora_rank=found.rank,
    lora_alpha=found.alpha,
    lora_targets=find_targets(load_abstract(checkpoint), found),
  )


def find_targets(model: Model, found: AdapterFile) -> tuple[str, ...]:
  """Targets for `lora.adapt` that match the layers of a file and no others.

  Args:
    model: without adapters; its arrays may be `jax.ShapeDtypeStruct`s.
    found: the file.

  Raises:
    UserError: the file adapts what is no linear layer of the model.
  """
  targets, known = [], set()
  for path, modules in _linear_layers(model):
    if any(module in found.modules for module in modules):
      if left := [module for module in modules if module not in found.modules]:
        raise UserError(
          f"{found.file} adapts some layers of a stack but not {_some(left)}: "
          "only files that adapt a kind of layer in all blocks are supported"
        )
      targets.append(f"^{re.escape(path)}$")
      known.update(modules)
  if unknown := [m for m in found.modules if m not in known]:
    raise UserError(
      f"{found.file} adapts {_some(unknown)}: no linear layer of this "
      f"{model.family.class_name}; use it with the checkpoint it was made for"
    )
  return tuple(targets)


def _adapter_entries(params: Params, class_name: str) -> list[names.Entry]:
  """What the adapters of a model are made of; UserError without any."""
  # Named within the whole model: how a stack is numbered may depend on others.
  entries = [
    entry
    for entry in names.entries(params, names.NAME_MAPS[class_name])
    if entry.path[-1] in lora.LEAVES
  ]
  if not entries:
    raise UserError("these parameters have no LoRA adapters; see lora.adapt")
  return entries


def _linear_layers(model: Model) -> Iterator[tuple[str, list[str]]]:
  """Our path of every linear layer, and their paths of its modules."""
  name_map = names.NAME_MAPS[model.family.class_name]
  for entry in names.entries(model.params, name_map):
    if entry.path[-1] == "kernel" and len(entry.order) == 2:
      path = ".".join(map(str, entry.path[:-1]))
      yield path, [name.removesuffix(".weight") for name in entry.names]


def _check(found: AdapterFile, entries: list[names.Entry]) -> None:
  """Raises UserError where a file is not what a model was adapted for."""
  rank = next(e.tensor_shape[0] for e in entries if e.path[-1] == "lora_a")
  if found.rank != rank:
    raise UserError(
      f"{found.file} holds adapters of rank {found.rank}, not {rank}: set "
      f"config.train.lora_rank={found.rank}, or use another file"
    )
  wanted = {name: entry for entry in entries for name in entry.names}
  if missing := _modules(n for n in wanted if n not in found.tensors):
    raise UserError(
      f"{found.file} lacks adapters of {_some(missing)}, which "
      "config.train.lora_targets match: give the targets it was trained with"
    )
  if extra := _modules(n for n in found.tensors if n not in wanted):
    raise UserError(
      f"{found.file} holds adapters of {_some(extra)}, which "
      "config.train.lora_targets do not match: give the targets it was "
      "trained with, and the checkpoint"
    )
  for name, entry in wanted.items():
    if found.tensors[name].shape != entry.tensor_shape:
      raise UserError(
        f"tensor {PREFIX + name!r} in {found.file} is "
        f"{list(found.tensors[name].shape)}, the checkpoint wants "
        f"{list(entry.tensor_shape)}; use it with the checkpoint it was made "
        "for"
      )


def _modules(tensors: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(name.rsplit(".", 2)[0] for name in tensors))


def _some(modules: list[str]) -> str:
  more = len(modules) - SHOWN
  shown = ", ".join(modules[:SHOWN])
  return f"{shown} and {more} more" if more > 0 else shown


def _read_alpha(file: Path, rank: int) -> float:
  """Alpha of the file's metadata; without any, the update is B A itself."""
  text = safetensors.read_metadata(file).get(METADATA)
  if text is None:
    return float(rank)
  try:
    values = {k.removeprefix(PREFIX): v for k, v in json.loads(text).items()}
    alpha = float(values.get("lora_alpha", rank))
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f"{file} has unreadable {METADATA}: {error}") from error
  for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
    if values.get(name):
      raise UserError(
        f"{file} was trained with {name}={values[name]!r}, which is not "
        "supported; merge it into its checkpoint with diffusers"
      )
  return alpha
