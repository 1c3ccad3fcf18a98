"""Diffusers directories -> models with (sharded) parameters.

Tensors go from the mapped files straight into stacked, transposed, cast leaves
on their devices, several at a time: the host holds `READERS` tensors, and
never a leaf or a file.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models import (
  FAMILIES,
  Family,
  Model,
  abstract_model,
  find_family,
  vae,
)
from digen_jax.models.layers import Params
from digen_jax.weights import names, safetensors
from digen_jax.weights.hub import local_checkpoint
from digen_jax.weights.names import Entry, NameMap
from digen_jax.weights.safetensors import Tensor, component_files

# What makes up a pipeline on disk: any one file of each tuple is enough.
WEIGHTS = tuple(
  f"{stem}.safetensors{suffix}"
  for stem in safetensors.STEMS
  for suffix in ("", ".index.json")
)
TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model")
CORE = ("transformer", "vae", "scheduler")  # what every family has
COMPONENT_FILES = {
  "transformer": (("config.json",), WEIGHTS),
  "vae": (("config.json",), WEIGHTS),
  "scheduler": (("scheduler_config.json",),),
  "text_encoder": (("config.json",), WEIGHTS),
  "text_encoder_2": (("config.json",), WEIGHTS),
  "text_encoder_3": (("config.json",), WEIGHTS),
  "tokenizer": (TOKENIZER,),
  "tokenizer_2": (TOKENIZER,),
  "tokenizer_3": (TOKENIZER,),
}

# Of a pipeline's index: denoisers of Wan2.2, where this is not null or false.
UNSUPPORTED = ("transformer_2", "boundary_ratio", "expand_timesteps")

READERS = 4  # threads; each has one tensor under way
FINGERPRINTED = (".json", ".safetensors")
SAMPLED_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """What a pipeline directory says about itself.

  Attributes:
    path: of the directory.
    family: of its transformer.
    index: content of `model_index.json`.
    scheduler: content of `scheduler/scheduler_config.json`.
  """

  path: Path
  family: Family
  index: dict[str, Any]
  scheduler: dict[str, Any]


def load_pipeline_config(
  path: str | Path, components: Sequence[str] | None = None
) -> PipelineConfig:
  """Reads a pipeline's index and checks that its files are there.

  Args:
    path: a diffusers pipeline directory, or its id on the hub.
    components: what is needed of it; None means `CORE` and what its index
      lists.

  Raises:
    UserError: no pipeline, one of another family or with more than one
      denoiser, or missing files (all of them are listed).
  """
  path = local_checkpoint(path)
  if not (path / "model_index.json").exists():
    raise UserError(
      f"{path} has no model_index.json: give a whole pipeline directory, as "
      "diffusers' save_pretrained writes it"
    )
  index = read_json(path / "model_index.json")
  pipelines = {f.pipeline_name: f for f in FAMILIES.values()}
  name = index.get("_class_name")
  if name not in pipelines:
    raise UserError(
      f"{path} holds a {name}, which is not supported; supported: "
      f"{', '.join(sorted(pipelines))}"
    )
  _check_one_denoiser(path, index)
  if components is None:
    components = [
      c for c in COMPONENT_FILES if c in CORE or any(index.get(c) or ())
    ]
  missing = [
    f"{component}/{' or '.join(choices)}"
    for component in components
    for choices in COMPONENT_FILES[component]
    if not any((path / component / file).exists() for file in choices)
  ]
  if missing:
    variants = [
      str(file.relative_to(path))
      for component in components
      for stem in safetensors.STEMS
      for file in sorted((path / component).glob(f"{stem}.*.safetensors"))
    ]
    if variants:
      raise UserError(
        f"{path} lacks {', '.join(missing)} and has the variant {variants[0]}: "
        "rename it (without the word in the middle), or save the pipeline "
        "without variant="
      )
    raise UserError(
      f"{path} lacks {', '.join(missing)}; copy the missing files from the "
      "checkpoint's source, or save the whole pipeline again with diffusers' "
      "save_pretrained"
    )
  scheduler = {}
  if "scheduler" in components:
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
  return PipelineConfig(path, pipelines[name], index, scheduler)


def _check_one_denoiser(path: Path, index: Mapping[str, Any]) -> None:
  for key in UNSUPPORTED:
    value = index.get(key)
    parts = value if isinstance(value, list) else [value]
    if any(part is not None and part is not False for part in parts):
      raise UserError(
        f"{path}/model_index.json has {key}={json.dumps(value)}, and the two "
        "denoisers and times of single tokens of Wan2.2 are not supported: "
        "give a pipeline without it, e.g. one of Wan2.1"
      )


def load_model(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  param_dtype: DTypeLike | None = None,
  remat: str = "none",
  mesh: jax.sharding.Mesh | None = None,
  rules: Any = None,
) -> Model:
  """Loads a denoiser from a diffusers directory.

  Args:
    path: a transformer's directory, or a pipeline's (its `transformer`), or
      the id of either on the hub.
    dtype: compute dtype; None means float32.
    param_dtype: of the parameters; None means `dtype`. Float32 parameters
      with bfloat16 compute are what training wants. What diffusers keeps in
      float32 is in float32 here too.
    remat: what a backward pass recomputes, see `layers.scan_blocks`.
    mesh: where to place the parameters; None means the default device.
    rules: layout on the mesh, see `parallel/rules.py`; None means its
      `ROLLOUT`.

  Raises:
    UserError: not such a directory, an unsupported class, a checkpoint that
      does not match it (named tensor and file), or a mesh that would cut
      attention heads.
  """
  model = load_abstract(path, dtype=dtype, remat=remat)
  params = read_params(
    module_directory(path, "transformer"),
    model.params,
    names.NAME_MAPS[model.family.class_name],
    dtype=param_dtype or model.config.dtype,
    shardings=_shardings(model, mesh, rules),
  )
  return dataclasses.replace(model, params=params)


def load_abstract(
  path: str | Path, *, dtype: DTypeLike | None = None, remat: str = "none"
) -> Model:
  """A denoiser as `load_model` loads it, with shapes instead of parameters."""
  directory = module_directory(path, "transformer")
  raw = read_json(directory / "config.json")
  family = find_family(raw.get("_class_name", ""))
  dtype = jnp.dtype(dtype or jnp.float32)
  config = family.parse_config(raw, dtype=dtype, remat=remat)
  return abstract_model(family, config)


def load_autoencoder(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  tiling: vae.Tiling | None = None,
  sequential: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> vae.Autoencoder:
  """Loads an autoencoder from its directory, or from a pipeline's `vae`.

  Args:
    path: of the module or the pipeline.
    dtype: compute and parameter dtype; None means float32.
    tiling: spatial tiles for pictures that exceed one; None takes all whole.
    sequential: one tile (and, where the architecture allows, one latent
      frame) at a time: bounded memory, but slow on CPU.
    mesh: where to replicate the parameters; None means the default device.

  Raises:
    UserError: as `load_model`.
  """
  model = load_abstract_autoencoder(
    path, dtype=dtype, tiling=tiling, sequential=sequential
  )
  directory = module_directory(path, "vae")
  class_name = read_json(directory / "config.json")["_class_name"]
  params = read_params(
    directory,
    model.params,
    names.NAME_MAPS[class_name],
    dtype=model.config.dtype,
    shardings=_shardings(model, mesh, None),
  )
  return dataclasses.replace(model, params=params)


def load_abstract_autoencoder(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  tiling: vae.Tiling | None = None,
  sequential: bool = False,
) -> vae.Autoencoder:
  """As `load_autoencoder`, with shapes instead of parameters."""
  directory = module_directory(path, "vae")
  raw = read_json(directory / "config.json")
  family = vae.find_family(raw.get("_class_name", ""))
  dtype = jnp.dtype(dtype or jnp.float32)
  config = family.parse_config(
    raw, dtype=dtype, tiling=tiling, sequential=sequential
  )
  return vae.abstract_autoencoder(config)


def check_weights(path: str | Path, component: str, abstract: Params) -> None:
  """Checks names, shapes and lengths of a module's files; reads headers only.

  Args:
    path: of the module, or of the pipeline.
    component: "transformer" or "vae".
    abstract: nested dict of `jax.ShapeDtypeStruct`s, what is expected.

  Raises:
    UserError: as `read_params`.
  """
  directory = module_directory(path, component)
  class_name = read_json(directory / "config.json")["_class_name"]
  tensors = safetensors.list_tensors(directory)
  _match(directory, abstract, names.NAME_MAPS[class_name], tensors)


def read_params(
  directory: str | Path,
  abstract: Params,
  name_map: NameMap,
  *,
  dtype: DTypeLike = jnp.float32,
  shardings: Params | None = None,
) -> Params:
  """Reads a module's parameters.

  Args:
    directory: holds the safetensors files.
    abstract: nested dict of `jax.ShapeDtypeStruct`s, what is expected.
    name_map: how the files name it.
    dtype: to cast to, but for what the map keeps in float32.
    shardings: nested like `abstract`; None means the default device.

  Returns:
    Arrays nested like `abstract`.

  Raises:
    UserError: files missing or damaged, or a tensor that is missing,
      unexpected or of another shape.
  """
  directory = Path(directory)
  tensors = safetensors.list_tensors(directory)
  found = _match(directory, abstract, name_map, tensors)

  def read(leaf: tuple[Entry, list[Tensor]]) -> jax.Array:
    entry, parts = leaf
    sharding = _at(shardings, entry.path) if shardings is not None else None
    kept = names.keeps_float32(entry, name_map)
    leaf_dtype = np.dtype(np.float32 if kept else dtype)
    return _read(entry, parts, leaf_dtype, sharding)

  with futures.ThreadPoolExecutor(READERS) as pool:
    arrays = list(pool.map(read, found))
  params: Params = {}
  for (entry, _), array in zip(found, arrays):
    node = params
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    node[entry.path[-1]] = array
  return params


def module_directory(path: str | Path, component: str) -> Path:
  """`path` itself if it is a module, or its `component` if a pipeline."""
  path = local_checkpoint(path)
  if (path / "model_index.json").exists():
    path = path / component
  if not (path / "config.json").exists():
    raise UserError(
      f"{path} has no config.json: give a diffusers module directory, or a "
      f"pipeline directory (with model_index.json and {component}/)"
    )
  return path


def fingerprint(path: str | Path, lora: str | Path = "") -> str:
  """Hash that tells one checkpoint from another, wherever it lies.

  Of weight files it reads the size and a megabyte at either end: names and
  shapes of all tensors, values of a few. Enough to notice another checkpoint
  of the same architecture without reading tens of gigabytes. Of a pipeline it
  reads the index and the components, of those what is loaded: what else lies
  there, such as single files or other precisions, may come and go.

  Args:
    path: directory of a pipeline or a module.
    lora: file or directory of adapters to start from; "" for none.

  Raises:
    UserError: either is missing.
  """
  path, digest = local_checkpoint(path), hashlib.sha256()
  folders, files = [path], []
  if (path / "model_index.json").exists():
    folders, files = component_folders(path), [path / "model_index.json"]
  files += [f for folder in folders for f in component_files(folder)]
  for file in sorted(f for f in files if f.suffix in FINGERPRINTED):
    _digest(digest, file.relative_to(path).as_posix(), file)
  if lora:
    lora = Path(lora)
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    if not files or not files[0].is_file():
      raise UserError(f"{lora} does not exist or has no .safetensors file")
    for file in files:
      _digest(digest, "lora", file)
  return digest.hexdigest()


def component_folders(path: Path) -> list[Path]:
  """The components of a pipeline directory that are there."""
  index = read_json(path / "model_index.json")
  listed = (name for name in index if isinstance(index[name], list))
  folders = [path / name for name in dict.fromkeys((*CORE, *listed))]
  return [folder for folder in folders if folder.is_dir()]


def _digest(digest: Any, name: str, file: Path) -> None:
  size = file.stat().st_size
  with open(file, "rb") as stream:
    content = stream.read(SAMPLED_BYTES)
    stream.seek(max(0, size - SAMPLED_BYTES))
    content += stream.read()
  digest.update(f"{name} {size} ".encode() + content)


def read_json(file: Path) -> dict[str, Any]:
  """A JSON object from a file; UserError if it is not one."""
  try:
    content = json.loads(file.read_text())
  except FileNotFoundError as error:
    raise UserError(f"{file} does not exist") from error
  except ValueError as error:
    raise UserError(f"{file} is not valid JSON: {error}") from error
  if not isinstance(content, dict):
    raise UserError(f"{file} does not hold a JSON object")
  return content


def _match(
  directory: Path,
  abstract: Params,
  name_map: NameMap,
  tensors: Mapping[str, Tensor],
) -> list[tuple[Entry, list[Tensor]]]:
  """Accounts for every tensor, on both sides, before anything is read."""
  problems, matched, used = [], [], set()
  for entry in names.entries(abstract, name_map):
    parts = []
    for name in entry.names:
      if name not in tensors and (old := names.old_name(name, name_map)):
        name = old if old in tensors else name
      if name not in tensors:
        problems.append(
          f"tensor {name!r} {list(entry.tensor_shape)} is missing from "
          f"{directory}"
        )
        continue
      tensor = tensors[name]
      used.add(name)
      parts.append(tensor)
      if tensor.shape != entry.tensor_shape:
        problems.append(
          f"tensor {name!r} in {tensor.file} is {list(tensor.shape)}, "
          f"config.json wants {list(entry.tensor_shape)}"
        )
    matched.append((entry, parts))
  problems += [
    f"tensor {name!r} {list(tensor.shape)} in {tensor.file} is not part of "
    "the model"
    for name, tensor in tensors.items()
    if name not in used
    and not any(re.fullmatch(pattern, name) for pattern in name_map.ignored)
  ]
  if problems:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise UserError(
      f"{problems[0]}{more}; the weights and config.json of {directory} do "
      "not belong together: copy both from the same checkpoint"
    )
  return matched


def _read(
  entry: Entry,
  parts: list[Tensor],
  dtype: np.dtype,
  sharding: jax.sharding.NamedSharding | None,
) -> jax.Array:
  """One leaf of our tree, filled on its devices tensor by tensor.

  Transposing is left to the transfer, which is given a strided view of the
  mapped file, and casting to the devices.
  """
  if not entry.stacked:
    array = jax.device_put(entry.to_ours(parts[0].view()), sharding)
    return jnp.array(array, dtype, copy=True)  # it may share the file's pages
  block = jnp.zeros(entry.shape, dtype, device=sharding)
  if sharding is not None:
    spec = jax.P(*sharding.spec[1:])
    sharding = jax.NamedSharding(sharding.mesh, spec)
  for layer, tensor in enumerate(parts):
    part = jax.device_put(entry.to_ours(tensor.view()), sharding)
    # Waiting bounds what is under way, on the host and on the devices.
    block = jax.block_until_ready(_place(block, part, layer))
  return block


@functools.partial(jax.jit, donate_argnums=0)
def _place(block: jax.Array, part: jax.Array, layer: int) -> jax.Array:
  """`block` with another layer, in its own memory."""
  part = part.astype(block.dtype)
  return jax.lax.dynamic_update_index_in_dim(block, part, layer, 0)


def _shardings(
  model: Any, mesh: jax.sharding.Mesh | None, rules: Any
) -> Params | None:
  if mesh is None:
    return None
  from digen_jax.parallel import rules as rules_lib

  if isinstance(model, Model):
    heads = model.config.num_attention_heads
    rules_lib.check_heads(mesh.shape, heads, model.family.class_name)
  return rules_lib.param_shardings(
    mesh, model.logical_axes, model.params, rules or rules_lib.ROLLOUT
  )


def _at(tree: Params, path: tuple[Any, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree
