"""Text encoders in transformers' directory layout: reading and writing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from digen_jax.errors import UserError
from digen_jax.models import text
from digen_jax.models.text import TextEncoder, clip, decoder, t5
from digen_jax.parallel.rules import ROLLOUT, Rules, param_shardings
from digen_jax.weights import load, names, safetensors
from digen_jax.weights.text_names import text_names


def load_text_encoder(
  directory: str | Path,
  *,
  dtype: DTypeLike | None = None,
  skip_layers: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  rules: Rules | None = None,
) -> TextEncoder:
  """Loads CLIP, T5, umT5, Llama, or the language model of Qwen2.5-VL.

  Args:
    directory: holds `config.json` and safetensors files.
    dtype: compute and parameter dtype; None means float32.
    skip_layers: blocks at the end of a language model that are not read, see
      `models/text/decoder.py`.
    mesh: where to place the parameters; None means the default device.
    rules: layout on the mesh, see `parallel/rules.py`; None means its
      `ROLLOUT`.

  Raises:
    UserError: not such a directory, an unsupported encoder, or weights that
      do not match the configuration (named tensor and file).
  """
  config = read_text_config(directory, dtype=dtype)
  if skip_layers:
    config = dataclasses.replace(config, skip_layers=skip_layers)
  model = text.abstract_text_encoder(config)
  shardings = None
  if mesh is not None:
    shardings = param_shardings(
      mesh, model.logical_axes, model.params, rules or ROLLOUT
    )
  params = load.read_params(
    directory,
    model.params,
    text_names(config, safetensors.list_tensors(directory)),
    dtype=config.dtype,
    shardings=shardings,
  )
  return dataclasses.replace(model, params=params)


def read_text_config(
  directory: str | Path, *, dtype: DTypeLike | None = None
) -> text.Config:
  """The config record of a text encoder's directory; raises UserError."""
  raw = load.read_json(Path(directory) / "config.json")
  return text.parse_config(raw, dtype=dtype or jnp.float32)


def save_text_encoder(
  encoder: TextEncoder,
  directory: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
) -> None:
  """Writes CLIP, T5 or umT5 so that transformers 4 and 5 load it.

  Args:
    encoder: what to write.
    directory: made if it is missing; receives `config.json` and
      `model.safetensors`.
    dtype: of the stored tensors, float32 or bfloat16.

  Raises:
    UserError: a language model; there is no way to make a new one here.
  """
  if isinstance(encoder.config, decoder.DecoderConfig):
    raise UserError("cannot write a language model: copy its checkpoint")
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for entry in names.entries(encoder.params, text_names(encoder.config)):
    leaf = encoder.params
    for key in entry.path:
      leaf = leaf[key]
    leaf = np.asarray(leaf).astype(dtype)
    for name, layer in zip(entry.names, leaf if entry.stacked else [leaf]):
      tensors[name] = np.ascontiguousarray(entry.to_theirs(layer))
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  content = json.dumps(_config_json(encoder.config, dtype), indent=2)
  (directory / "config.json").write_text(content + "\n")


def _config_json(config: text.Config, dtype: DTypeLike) -> dict[str, Any]:
  """transformers' `config.json` content of a config record."""
  sizes = dataclasses.asdict(config) | {"dtype": jnp.dtype(dtype).name}
  if isinstance(config, clip.ClipTextConfig):
    # Unset, they default to ids of OpenAI's vocabulary.
    absent = {"bos_token_id": None, "pad_token_id": None}
    projects = config.projection_dim is not None
    if not projects:
      del sizes["projection_dim"]
    name = f"CLIPTextModel{'WithProjection' * projects}"
    kind = {"architectures": [name], "model_type": "clip_text_model"}
    return kind | sizes | absent
  own = isinstance(config, t5.UMT5Config)
  name, model_type = ("UMT5", "umt5") if own else ("T5", "t5")
  architecture = {"architectures": [f"{name}EncoderModel"]}
  return architecture | {"model_type": model_type} | sizes
