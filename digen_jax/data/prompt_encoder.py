"""The text encoders of a pipeline directory: prompts to conditioning."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from digen_jax.data.prompt_recipes import RECIPES, Recipe, has_ftfy
from digen_jax.data.tokens import (
  NoTokenizer,
  Tokenizer,
  Tokens,
  load_tokenizer,
  logger,
)
from digen_jax.errors import UserError
from digen_jax.models.text import NoEncoder, TextEncoder
from digen_jax.parallel.mesh import batch_sharding, padded_size
from digen_jax.types import Conditioning
from digen_jax.weights import load
from digen_jax.weights.hub import local_checkpoint
from digen_jax.weights.text import load_text_encoder, read_text_config

# Part of the settings: raise it when the meaning of embeddings changes.
VERSION = 2
TOKENIZER_FILES = (".json", ".model", ".txt")


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
  """A pipeline's tokenizers and text encoders; see `encode`.

  Weights are read when they are first needed: a cached set of prompts costs
  neither the reading nor the memory.

  Attributes:
    directory: of the pipeline.
    pipeline: class name of the pipeline.
    recipe: what is done with them.
    tokenizers: one per encoder.
    max_length: tokens that prompts are padded or cut to.
    dtype: compute, parameter and output dtype.
    batch_size: prompts encoded at once.
    mesh: where the encoders run; None means the default device.
  """

  directory: Path
  pipeline: str
  recipe: Recipe
  tokenizers: tuple[Tokenizer | NoTokenizer, ...]
  max_length: int
  dtype: np.dtype
  batch_size: int
  mesh: Mesh | None

  def encode(self, prompts: Sequence[str]) -> Conditioning:
    """Encodes prompts as diffusers' pipeline of this family does.

    Args:
      prompts: B texts; those that are too long are cut.

    Returns:
      Host arrays of the encoder's dtype: `text` [B, T, D], and what the family
      has of `pooled` [B, P] and `mask` [B, T] bool.

    Raises:
      UserError: no prompts, or weights that cannot be read.
    """
    if not prompts:
      raise UserError("no prompts to encode: give at least one")
    tokens = self.tokenize(prompts)
    batches = list(self.encode_tokens(tokens, np.arange(len(prompts))))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

  def tokenize(self, prompts: Sequence[str]) -> list[Tokens]:
    """B texts -> the tokens [B, ...] of each encoder."""
    return self.recipe.tokenize(self.tokenizers, prompts, self.max_length)

  def encode_tokens(
    self, tokens: Sequence[Tokens], rows: np.ndarray
  ) -> Iterator[Conditioning]:
    """Encodes some of the tokenized prompts, a batch at a time.

    Every batch is computed with the same shapes, so that an embedding does
    not depend on what is encoded with it.

    Args:
      tokens: from `tokenize`.
      rows: [N] which of the prompts.

    Yields:
      Host arrays of at most `batch_size` rows each, in order.
    """
    batch = self.batch_size
    if self.mesh is not None:
      batch = padded_size(batch, self.mesh)
    models, params = zip(*((e.encode, e.params) for e in self.encoders))
    for start in range(0, len(rows), batch):
      chosen = rows[start : start + batch]
      padded = np.pad(chosen, (0, batch - len(chosen)), mode="edge")
      inputs = jax.tree.map(lambda x: x[padded], tuple(tokens))  # noqa: B023
      if self.mesh is not None:
        inputs = jax.device_put(inputs, batch_sharding(self.mesh))
      out = _encode(self.recipe.encode, models, self.dtype, params, inputs)
      yield jax.tree.map(lambda x: np.asarray(x)[: len(chosen)], out)  # noqa: B023

  @functools.cached_property
  def encoders(self) -> tuple[TextEncoder | NoEncoder, ...]:
    """The text encoders, read on first use."""
    return tuple(
      load_text_encoder(
        self.directory / name,
        dtype=self.dtype,
        skip_layers=0 if number else self.recipe.skip_layers,
        mesh=self.mesh,
      )
      if name in self._present
      else NoEncoder(self._text_width())
      for number, name in enumerate(self.recipe.encoders)
    )

  @property
  def _present(self) -> tuple[str, ...]:
    """The components of the encoders that the pipeline has."""
    pairs = zip(self.recipe.encoders, self.tokenizers)
    return tuple(n for n, t in pairs if not isinstance(t, NoTokenizer))

  def _text_width(self) -> int:
    """How wide the denoiser takes token states."""
    file = self.directory / "transformer" / "config.json"
    return load.read_json(file)["joint_attention_dim"]

  @functools.cached_property
  def settings(self) -> dict[str, Any]:
    """All that determines an embedding but the prompt itself."""
    return {
      "version": VERSION,
      "pipeline": self.pipeline,
      "max_length": self.max_length,
      "dtype": self.dtype.name,
      "ftfy": self.pipeline == "WanPipeline" and has_ftfy(),
      "encoders": self._files_digest(),
    }

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of `settings`."""
    content = json.dumps(self.settings, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

  def _files_digest(self) -> str:
    """Hash of encoders and tokenizers, wherever they lie."""
    digest = hashlib.sha256()
    for name in self._present:
      weights = load.fingerprint(self.directory / name)
      digest.update(f"{name} {weights}\n".encode())
      folder = self.directory / tokenizer_of(name)
      for file in sorted(folder.iterdir()):
        if file.suffix in TOKENIZER_FILES:
          content = hashlib.sha256(file.read_bytes()).hexdigest()
          digest.update(f"{name} {file.name} {content}\n".encode())
    return digest.hexdigest()


def tokenizer_of(encoder: str) -> str:
  """The component name of a text encoder's tokenizer."""
  return encoder.replace("text_encoder", "tokenizer")


def load_prompt_encoder(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  max_length: int | None = None,
  batch_size: int = 16,
  mesh: Mesh | None = None,
) -> PromptEncoder:
  """Opens the tokenizers and text encoders of a pipeline.

  Args:
    path: directory with `model_index.json`, or hub id.
    dtype: compute, parameter and output dtype; None means float32.
    max_length: tokens that prompts are padded or cut to; None means what the
      family's pipeline does, or what its tokenizer allows where that is less.
    batch_size: prompts encoded at once.
    mesh: splits batches (`data`, `fsdp`) and encoders (`tensor`).

  Raises:
    UserError: not such a directory, a family without a recipe, a component
      missing or unsupported, or a tokenizer with ids that its encoder does
      not have.
  """
  directory = local_checkpoint(path)
  index = load.read_json(directory / "model_index.json")
  pipeline = index.get("_class_name")
  if pipeline not in RECIPES:
    raise UserError(
      f"{directory} holds a {pipeline}, whose prompts cannot be encoded; "
      f"supported: {', '.join(sorted(RECIPES))}"
    )
  recipe = RECIPES[pipeline]
  tokenizers = tuple(
    _open_tokenizer(directory, index, name, *classes, name == recipe.optional)
    for name, classes in recipe.encoders.items()
  )
  _check_template(recipe, tokenizers[0], directory)
  if max_length is not None and max_length < 1:
    raise UserError(f"prompts of {max_length} tokens: give at least 1")
  longest = recipe.max_length
  if not recipe.template:
    longest = min(longest, tokenizers[-1].max_length)
  return PromptEncoder(
    directory=directory,
    pipeline=pipeline,
    recipe=recipe,
    tokenizers=tokenizers,
    max_length=max_length or longest,
    dtype=jnp.dtype(dtype or jnp.float32),
    batch_size=batch_size,
    mesh=mesh,
  )


def _open_tokenizer(
  directory: Path,
  index: dict[str, Any],
  name: str,
  encoder_class: str,
  tokenizer_class: str,
  optional: bool,
) -> Tokenizer | NoTokenizer:
  found = (index.get(name) or [None])[-1]
  if optional and found is None:
    return NoTokenizer()
  if found != encoder_class:
    raise UserError(
      f"{directory}/model_index.json: {name} is {found!r}, only "
      f"{encoder_class} is supported in a {index['_class_name']}"
    )
  config = read_text_config(directory / name)
  tokenizer = load_tokenizer(
    directory / tokenizer_of(name), tokenizer_class, config.vocab_size
  )
  positions = getattr(config, "max_position_embeddings", tokenizer.max_length)
  return dataclasses.replace(
    tokenizer, max_length=min(tokenizer.max_length, positions)
  )


def _check_template(
  recipe: Recipe, tokenizer: Tokenizer, directory: Path
) -> None:
  """Warns where the tokens that are dropped are not those of the template."""
  if not recipe.template:
    return
  count = tokenizer.prefix_length(recipe.template.split("{}")[0])
  if count != recipe.dropped:
    logger.warning(
      "%s: the template has %d tokens before the prompt and %d are dropped; "
      "the tokenizer may not be the one of this pipeline",
      directory,
      count,
      recipe.dropped,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(
  recipe_encode: Any, models: Any, dtype: np.dtype, params: Any, tokens: Any
) -> Conditioning:
  encoders = [functools.partial(m, p) for m, p in zip(models, params)]
  out = recipe_encode(encoders, tokens)
  return jax.tree.map(
    lambda x: x if x.dtype == jnp.bool_ else x.astype(dtype), out
  )
