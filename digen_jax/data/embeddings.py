"""Sets of prompt embeddings on disk: encoded once, mapped into memory.

A set is a directory. `embeddings.json` says which encoder and settings it was
made with; every other file holds one batch, in safetensors format:

  prompts  uint8 [bytes]      JSON list of the n prompts, UTF-8
  text     [sum(rows), D]     token features, zeros at the end of each left out
  rows     int32 [n]          how many of them each prompt has
  length   int32 [n]          T to pad them to; where there is a mask, `rows`
  valid    int32 [n]          True entries of the mask, for families with one
  pooled   [n, P]             for families with pooled features

A batch is written aside and renamed, so that a killed writer leaves whole
batches; whoever goes on encodes only what is missing. Batches are named by
prompts and settings and say in their header what they were made with: two
writers do not disturb each other, and if their settings differ, what the one
wrote is not there for the other.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from digen_jax.atomic import replacing, write_text
from digen_jax.data.prompt_encoder import PromptEncoder
from digen_jax.errors import UserError
from digen_jax.types import Conditioning
from digen_jax.weights.load import read_json
from digen_jax.weights.safetensors import Tensor, read_header, read_metadata

logger = logging.getLogger(__name__)

MANIFEST = "embeddings.json"
FINGERPRINT = "fingerprint"  # in the header of a batch
# (prompts done, prompts to do), whenever a batch is on disk.
Report = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Embedding:
  """Where one prompt's embedding lies.

  Attributes:
    text: tensor that holds its token features.
    start: first of its rows.
    stop: after the last of its rows.
    length: tokens to pad them to.
    valid: True entries of its mask, or None.
    pooled: tensor that holds its pooled features, or None.
    place: row of `pooled`.
  """

  text: Tensor
  start: int
  stop: int
  length: int
  valid: int | None
  pooled: Tensor | None
  place: int

  def text_rows(self) -> np.ndarray:
    """[rows, D] mapped token features."""
    return self.text.view()[self.start : self.stop]

  def pooled_row(self) -> np.ndarray:
    """[P] mapped pooled features."""
    return self.pooled.view()[self.place]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """An array [N, ...] whose rows stay on disk until they are indexed.

  Attributes:
    readers: N functions, each giving its row, or the beginning of it.
    shape: of the whole array; the rest of a row is zeros.
    dtype: of its elements.
  """

  readers: Sequence[Callable[[], np.ndarray]]
  shape: tuple[int, ...]
  dtype: np.dtype

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    """The rows that an index of the first axis selects, in memory."""
    chosen = np.arange(len(self))[index]
    out = np.zeros((chosen.size, *self.shape[1:]), self.dtype)
    for place, number in zip(out, chosen.ravel()):
      row = self.readers[number]()
      place[: len(row)] = row
    return out.reshape(chosen.shape + self.shape[1:])

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """The whole array, in memory."""
    del copy  # always one
    return self[:].astype(dtype or self.dtype, copy=False)


def match_text(
  prompts: Conditioning,
  negative: Conditioning | None,
  *,
  masked: bool = False,
) -> tuple[Conditioning, Conditioning | None]:
  """Pads the shorter text, so that both can share a batch.

  Only where the model is told the mask: elsewhere padding has a meaning, and
  encoders pad to one length.

  Args:
    prompts: [B, T, ...] conditioning.
    negative: [1 or B, T', ...] conditioning; None is handed back.
    masked: whether the model takes a mask; it does where either has one. One
      that is missing is all True.
  """
  if negative is None:
    return prompts, negative
  masks = [c.mask is not None for c in (prompts, negative)]
  lengths = [c.text.shape[1] for c in (prompts, negative)]
  if not any(masks) and (not masked or lengths[0] == lengths[1]):
    return prompts, negative
  length = max(lengths)
  return _padded(prompts, length), _padded(negative, length)


def _padded(conditioning: Conditioning, length: int) -> Conditioning:
  text, mask = conditioning.text, conditioning.mask
  missing = length - text.shape[1]
  if not missing and mask is not None:
    return conditioning
  if mask is None:
    mask = np.ones(text.shape[:2], bool)
  if isinstance(text, Rows):
    shape = (text.shape[0], length, *text.shape[2:])
    text = dataclasses.replace(text, shape=shape)
  else:
    text = np.pad(text, ((0, 0), (0, missing), (0, 0)))
  mask = np.pad(mask, ((0, 0), (0, missing)))
  return dataclasses.replace(conditioning, text=text, mask=mask)


def cached_embeddings(
  encoder: PromptEncoder,
  prompts: Sequence[str],
  directory: str | Path,
  report: Report | None = None,
) -> Conditioning:
  """`encoder.encode(prompts)`, kept in a set on disk.

  Prompts that the set lacks are encoded and added to it.

  Args:
    encoder: from `load_prompt_encoder`.
    prompts: B texts; repeated ones are encoded once.
    directory: of the set; made if it is missing.
    report: is told how far it is.

  Returns:
    Conditioning whose `text` and `pooled` are read from disk when they are
    indexed, see `Rows`; equal to what `encode` gives.

  Raises:
    UserError: the set is of another encoder or other settings, or no set.
  """
  if not prompts:
    raise UserError("no prompts to encode: give at least one")
  directory = Path(directory)
  check_set(encoder, directory)
  known = read_set(directory, encoder.fingerprint)
  distinct = list(dict.fromkeys(prompts))
  missing = [i for i, prompt in enumerate(distinct) if prompt not in known]
  if missing:
    _encode_missing(encoder, distinct, np.array(missing), directory, report)
    known = read_set(directory, encoder.fingerprint)
  return _gather([known[prompt] for prompt in prompts], encoder.dtype)


def known_embeddings(
  encoder: PromptEncoder, prompts: Sequence[str], directory: str | Path
) -> Conditioning:
  """`encoder.encode(prompts)`, read from a set on disk that has them.

  Nothing is written: what the set lacks, or a set that was made differently,
  is encoded here and not kept.

  Args:
    encoder: from `load_prompt_encoder`.
    prompts: B texts.
    directory: of the set; may be missing.

  Raises:
    UserError: no prompts, or weights or a record that cannot be read.
  """
  directory = Path(directory)
  manifest = directory / MANIFEST
  if manifest.exists():
    same = read_json(manifest).get("fingerprint") == encoder.fingerprint
    known = read_set(directory, encoder.fingerprint) if same else {}
    if prompts and all(prompt in known for prompt in prompts):
      return _gather([known[prompt] for prompt in prompts], encoder.dtype)
  return encoder.encode(prompts)


def check_set(encoder: PromptEncoder, directory: Path) -> None:
  """Raises UserError where a directory cannot be a set of this encoder's."""
  if not directory.exists():
    return
  if not directory.is_dir():
    raise UserError(f"{directory} is a file; name a directory for embeddings")
  if not (directory / MANIFEST).exists():
    # What a killed writer leaves is hidden.
    if any(not path.name.startswith(".") for path in directory.iterdir()):
      raise UserError(
        f"{directory} is not empty and has no {MANIFEST}: name another "
        "directory for embeddings"
      )
    return
  theirs = read_json(directory / MANIFEST)
  ours = _manifest(encoder)
  if theirs.get("fingerprint") == ours["fingerprint"]:
    return
  differ = [
    f"{name} is {theirs.get(name)!r}, now {value!r}"
    for name, value in ours.items()
    if name not in ("fingerprint", "encoders") and theirs.get(name) != value
  ]
  if theirs.get("encoders") != ours["encoders"]:
    differ.append("the files of its text encoders or tokenizers are others")
  raise UserError(
    f"the embeddings in {directory} were made differently: "
    f"{'; '.join(differ) or 'the record is damaged'}; name another directory "
    "for embeddings, or delete this one"
  )


def read_set(directory: Path, fingerprint: str) -> dict[str, Embedding]:
  """What a set holds of an encoder's, by prompt.

  Damaged files are passed over.

  Args:
    directory: of the set.
    fingerprint: of the encoder.
  """
  known: dict[str, Embedding] = {}
  for file in sorted(directory.glob("[!.]*.safetensors")):
    try:
      # Sets of earlier versions do not say it.
      made_with = read_metadata(file).get(FINGERPRINT, fingerprint)
      if made_with == fingerprint:
        known.update(_read_batch(file))
    except (UserError, KeyError, ValueError) as error:
      logger.warning("%s is damaged, encoding again: %s", file, error)
  return known


def _manifest(encoder: PromptEncoder) -> dict[str, Any]:
  return encoder.settings | {"fingerprint": encoder.fingerprint}


def _encode_missing(
  encoder: PromptEncoder,
  prompts: list[str],
  missing: np.ndarray,
  directory: Path,
  report: Report | None,
) -> None:
  # All of them: what they are padded to should not depend on what is missing.
  tokens = encoder.tokenize(prompts)
  done = 0
  for batch in encoder.encode_tokens(tokens, missing):
    if not done:  # nothing is written before the first batch is there
      directory.mkdir(parents=True, exist_ok=True)
      check_set(encoder, directory)  # another writer may have been quicker
      text = json.dumps(_manifest(encoder), indent=2)
      write_text(directory / MANIFEST, text + "\n")
    count = len(batch.text)
    names = [prompts[i] for i in missing[done : done + count]]
    _write_batch(directory, names, batch, encoder.fingerprint)
    done += count
    if report is not None:
      report(done, len(missing))


def _write_batch(
  directory: Path,
  prompts: Sequence[str],
  batch: Conditioning,
  fingerprint: str,
) -> None:
  """Writes n prompts' embeddings as one file."""
  kept = [_without_last_zeros(row) for row in batch.text]
  rows = np.array([len(row) for row in kept], np.int32)
  name = json.dumps(list(prompts)).encode()
  tensors = {
    "prompts": np.frombuffer(name, np.uint8),
    "text": np.concatenate(kept),
    "rows": rows,
    "length": np.full_like(rows, batch.text.shape[1]),
  }
  if batch.mask is not None:
    tensors["valid"] = batch.mask.sum(axis=1, dtype=np.int32)
    tensors["length"] = rows
  if batch.pooled is not None:
    tensors["pooled"] = batch.pooled
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  stem = hashlib.sha256(fingerprint.encode() + name).hexdigest()[:24]
  with replacing(directory / f"{stem}.safetensors") as path:
    save_file(tensors, path, metadata={FINGERPRINT: fingerprint})


def _without_last_zeros(row: np.ndarray) -> np.ndarray:
  """[T, D] -> its beginning, up to the last token that is not all zeros."""
  used = np.flatnonzero(row.any(axis=-1))
  return row[: used[-1] + 1 if len(used) else 0]


def _read_batch(file: Path) -> Iterable[tuple[str, Embedding]]:
  """Each prompt of a file, and where its embedding lies."""
  tensors = read_header(file)
  prompts = json.loads(tensors["prompts"].view().tobytes())
  rows, length = tensors["rows"].view(), tensors["length"].view()
  valid = tensors["valid"].view() if "valid" in tensors else None
  stops = np.cumsum(rows)
  return [
    (
      prompt,
      Embedding(
        text=tensors["text"],
        start=int(stops[i] - rows[i]),
        stop=int(stops[i]),
        length=int(length[i]),
        valid=None if valid is None else int(valid[i]),
        pooled=tensors.get("pooled"),
        place=i,
      ),
    )
    for i, prompt in enumerate(prompts)
  ]


def _gather(found: Sequence[Embedding], dtype: np.dtype) -> Conditioning:
  """The conditioning of prompts that a set holds."""
  count, first = len(found), found[0]
  length = max(e.length for e in found)
  text = Rows(
    [e.text_rows for e in found],
    (count, length, first.text.shape[-1]),
    dtype,
  )
  pooled = mask = None
  if first.pooled is not None:
    shape = (count, first.pooled.shape[-1])
    pooled = Rows([e.pooled_row for e in found], shape, dtype)
  if first.valid is not None:
    valid = np.array([e.valid for e in found])
    mask = np.arange(length)[None] < valid[:, None]
  return Conditioning(text=text, pooled=pooled, mask=mask)
