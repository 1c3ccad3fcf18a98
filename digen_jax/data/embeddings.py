"""Prompts to conditioning: tokenizers, text encoders, and a cache on disk."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models.text import Config, TextEncoder
from digen_jax.types import Conditioning
from digen_jax.weights import load
from digen_jax.weights.text import load_text_encoder, read_text_config

logger = logging.getLogger(__name__)

# What FLUX pads T5's tokens to, unless the tokenizer's own limit is lower.
T5_MAX_LENGTH = 512
# Part of the cache key: raise it when the meaning of cached arrays changes.
CACHE_VERSION = 1
FINGERPRINTED = (".json", ".model", ".safetensors", ".txt")
COMPONENTS = {
  "text_encoder": "CLIPTextModel",
  "text_encoder_2": "T5EncoderModel",
}


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
  """The text encoders of a FLUX pipeline directory; see `encode`.

  Weights are read when they are first needed: a cached set of prompts costs
  neither the reading nor the memory.

  Attributes:
    directory: of the pipeline.
    clip_tokenizer: transformers' tokenizer of the first encoder.
    t5_tokenizer: of the second one.
    clip_length: tokens that CLIP's prompts are padded or cut to.
    t5_length: tokens that T5's prompts are padded or cut to.
    dtype: compute, parameter and output dtype.
    batch_size: most prompts encoded at once.
  """

  directory: Path
  clip_tokenizer: Any
  t5_tokenizer: Any
  clip_length: int
  t5_length: int
  dtype: np.dtype
  batch_size: int

  def encode(self, prompts: Sequence[str]) -> Conditioning:
    """Encodes prompts as diffusers' FLUX pipeline does.

    CLIP gives the pooled features, T5 the token features; padding is attended
    to, prompts that are too long are cut.

    Args:
      prompts: B texts.

    Returns:
      Host arrays of the encoder's dtype: `text` [B, T, D], `pooled` [B, P].

    Raises:
      UserError: no prompts, or weights that cannot be read.
    """
    if not prompts:
      raise UserError("no prompts to encode: give at least one")
    clip_ids, t5_ids = self.tokenize(prompts)
    batch = min(self.batch_size, len(prompts))
    parts = []
    for start in range(0, len(prompts), batch):
      rows = np.arange(start, start + batch).clip(max=len(prompts) - 1)
      parts.append(self._encode_batch(clip_ids[rows], t5_ids[rows]))
    text, pooled = (
      np.concatenate([np.asarray(part[i]) for part in parts])[: len(prompts)]
      for i in range(2)
    )
    return Conditioning(text=text, pooled=pooled)

  def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """B texts -> CLIP ids [B, clip_length], T5 ids [B, t5_length], int32."""
    return (
      _tokenize(self.clip_tokenizer, prompts, self.clip_length),
      _tokenize(self.t5_tokenizer, prompts, self.t5_length),
    )

  @functools.cached_property
  def encoders(self) -> tuple[TextEncoder, TextEncoder]:
    """CLIP and T5, read on first use."""
    clip, t5 = (
      load_text_encoder(self.directory / name, dtype=self.dtype)
      for name in COMPONENTS
    )
    return clip, t5

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of all that determines an embedding but the prompt itself."""
    settings = (
      CACHE_VERSION,
      self.clip_length,
      self.t5_length,
      self.dtype.name,
    )
    digest = hashlib.sha256(repr(settings).encode())
    for component in (*COMPONENTS, "tokenizer", "tokenizer_2"):
      for file in sorted((self.directory / component).iterdir()):
        if file.suffix not in FINGERPRINTED:
          continue
        with open(file, "rb") as stream:
          content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{component}/{file.name} {content}\n".encode())
    return digest.hexdigest()

  def _encode_batch(
    self, clip_ids: np.ndarray, t5_ids: np.ndarray
  ) -> tuple[jax.Array, jax.Array]:
    clip, t5 = self.encoders
    _, pooled = _jit_encode(clip.encode, clip.params, clip_ids)
    text = _jit_encode(t5.encode, t5.params, t5_ids)
    return text.astype(self.dtype), pooled.astype(self.dtype)


def load_prompt_encoder(
  directory: str | Path,
  *,
  dtype: DTypeLike | None = None,
  max_length: int | None = None,
  batch_size: int = 16,
) -> PromptEncoder:
  """Opens the tokenizers and text encoders of a FLUX pipeline directory.

  Args:
    directory: of the pipeline, with `model_index.json`.
    dtype: compute, parameter and output dtype; None means float32.
    max_length: tokens for T5; None means 512, or the tokenizer's
      `model_max_length` where that is lower.
    batch_size: most prompts encoded at once.

  Raises:
    UserError: not such a directory, a component missing or unsupported, or
      a tokenizer with ids that its encoder does not have.
  """
  directory = Path(directory)
  index = load.read_json(directory / "model_index.json")
  for name, supported in COMPONENTS.items():
    found = (index.get(name) or [None])[-1]
    if found != supported:
      raise UserError(
        f"{directory}/model_index.json: {name} is {found!r}, only FLUX's "
        f"{supported} is supported"
      )
  clip_config, t5_config = (
    read_text_config(directory / name) for name in COMPONENTS
  )
  clip = _load_tokenizer(directory / "tokenizer", "CLIPTokenizer", clip_config)
  t5 = _load_tokenizer(directory / "tokenizer_2", "T5TokenizerFast", t5_config)
  return PromptEncoder(
    directory=directory,
    clip_tokenizer=clip,
    t5_tokenizer=t5,
    clip_length=min(clip.model_max_length, clip_config.max_position_embeddings),
    t5_length=max_length or min(T5_MAX_LENGTH, t5.model_max_length),
    dtype=jnp.dtype(dtype or jnp.float32),
    batch_size=batch_size,
  )


def cached_embeddings(
  encoder: PromptEncoder, prompts: Sequence[str], path: str | Path
) -> Conditioning:
  """`encoder.encode(prompts)`, kept in a file.

  A file of other prompts, another encoder or other settings, and one that is
  damaged, is replaced. It is written aside and renamed: a reader sees the old
  file or the new one.

  Args:
    encoder: from `load_prompt_encoder`.
    prompts: B texts.
    path: the file, `.npz`; its directory is made if it is missing.
  """
  path = Path(path)
  key = hashlib.sha256(
    json.dumps([encoder.fingerprint, list(prompts)]).encode()
  ).hexdigest()
  cached = _read_cache(path, key, encoder.dtype)
  if cached is not None:
    return cached
  conditioning = encoder.encode(prompts)
  _write_cache(path, key, conditioning)
  return conditioning


@functools.partial(jax.jit, static_argnums=0)
def _jit_encode(encode: Any, params: Any, ids: jax.Array) -> Any:
  return encode(params, ids)


def _load_tokenizer(directory: Path, class_name: str, config: Config) -> Any:
  """A tokenizer whose every id has a row in its encoder's table."""
  # Without torch transformers advises to install it, which is not needed.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  if not directory.is_dir():
    raise UserError(f"tokenizer directory {directory} does not exist")
  try:
    cls = getattr(transformers, class_name)
    tokenizer = cls.from_pretrained(directory, local_files_only=True)
  # transformers and tokenizers raise whatever a damaged file leads them to.
  except Exception as error:
    reason = " ".join(str(error).split())
    raise UserError(
      f"cannot read the {class_name} in {directory} ({reason}); copy it again"
    ) from error
  largest = max(tokenizer.get_vocab().values())
  if largest >= config.vocab_size:
    raise UserError(
      f"the tokenizer in {directory} has ids up to {largest}, its encoder "
      f"only {config.vocab_size} rows; take both from the same checkpoint"
    )
  return tokenizer


def _tokenize(
  tokenizer: Any, prompts: Sequence[str], length: int
) -> np.ndarray:
  """B texts -> [B, length] int32 ids, ended, padded and cut."""
  prompts = list(prompts)
  whole = tokenizer(prompts, verbose=False).input_ids
  cut = [text for text, ids in zip(prompts, whole) if len(ids) > length]
  if cut:
    logger.warning(
      "%d of %d prompts are longer than %d tokens and were cut, first: %r",
      len(cut),
      len(prompts),
      length,
      cut[0],
    )
  padded = tokenizer(
    prompts, padding="max_length", max_length=length, truncation=True
  )
  return np.asarray(padded.input_ids, np.int32)


def _read_cache(path: Path, key: str, dtype: np.dtype) -> Conditioning | None:
  """What the file holds, or None if it is absent, stale or damaged."""
  try:
    # Opened here: np.load leaves a damaged file open.
    with open(path, "rb") as file, np.load(file) as archive:
      if str(archive["key"]) != key:
        return None
      # Bytes: numpy's format does not know bfloat16.
      text, pooled = (archive[name].view(dtype) for name in ("text", "pooled"))
  except FileNotFoundError:
    return None
  except (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    logger.warning("%s is damaged (%s): encoding again", path, error)
    return None
  return Conditioning(text=text, pooled=pooled)


def _write_cache(path: Path, key: str, conditioning: Conditioning) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with open(aside, "wb") as stream:
      np.savez(
        stream,
        key=np.asarray(key),
        text=conditioning.text.view(np.uint8),
        pooled=conditioning.pooled.view(np.uint8),
      )
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)
