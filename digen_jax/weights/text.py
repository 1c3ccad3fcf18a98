"""Text encoders in transformers' directory layout: reading and writing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from digen_jax.models import text
from digen_jax.models.text import TextEncoder, clip
from digen_jax.weights import load, names
from digen_jax.weights.text_names import text_names


def load_text_encoder(
  directory: str | Path, *, dtype: DTypeLike | None = None
) -> TextEncoder:
  """Loads a CLIP text encoder or a T5 encoder.

  Args:
    directory: holds `config.json` and safetensors files.
    dtype: compute and parameter dtype; None means float32.

  Raises:
    UserError: not such a directory, an unsupported encoder, or weights that
      do not match the configuration (named tensor and file).
  """
  config = read_text_config(directory, dtype=dtype)
  model = text.abstract_text_encoder(config)
  params = load.read_params(
    directory, model.params, text_names(config), dtype=config.dtype
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
  """Writes a text encoder so that transformers 4 and 5 load it.

  Args:
    encoder: what to write.
    directory: made if it is missing; receives `config.json` and
      `model.safetensors`.
    dtype: of the stored tensors, float32 or bfloat16.
  """
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
    kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    return kind | sizes | absent
  return {"architectures": ["T5EncoderModel"], "model_type": "t5"} | sizes
