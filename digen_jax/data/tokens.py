"""A pipeline's tokenizers: prompts to ids and masks."""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from digen_jax.errors import UserError

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
  """A batch of tokenized prompts.

  Attributes:
    ids: [B, T] int32, padded on the right.
    mask: [B, T] bool, False where a token is padding.
  """

  ids: np.ndarray
  mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """transformers' tokenizer of one text encoder.

  Attributes:
    theirs: the tokenizer.
    max_length: the longest sequence it was made for.
  """

  theirs: Any
  max_length: int

  def __call__(
    self, prompts: Sequence[str], length: int, *, fill: bool = True
  ) -> Tokens:
    """Tokenizes prompts; those that are too long are cut, with a warning.

    Args:
      prompts: B texts.
      length: most tokens of a prompt, special ones included.
      fill: pad to `length`; else to the longest of these prompts.
    """
    prompts = list(prompts)
    whole = self.theirs(prompts, verbose=False).input_ids
    cut = [text for text, ids in zip(prompts, whole) if len(ids) > length]
    if cut:
      logger.warning(
        "%d of %d prompts are longer than %d tokens and were cut, first: %r",
        len(cut),
        len(prompts),
        length,
        cut[0],
      )
    padded = self.theirs(
      prompts,
      padding="max_length" if fill else "longest",
      padding_side="right",
      max_length=length,
      truncation=True,
    )
    return Tokens(
      np.asarray(padded.input_ids, np.int32),
      np.asarray(padded.attention_mask, bool),
    )

  def prefix_length(self, prefix: str) -> int:
    """How many tokens come before a prompt that follows `prefix`."""
    one, other = self.theirs([prefix + "a", prefix + "b"]).input_ids
    same = [a == b for a, b in zip(one, other)]
    return same.index(False) if False in same else len(same)


@dataclasses.dataclass(frozen=True)
class NoTokenizer:
  """In place of the tokenizer of an encoder that a pipeline leaves out."""

  max_length: int = sys.maxsize

  def __call__(self, prompts: Sequence[str], length: int) -> Tokens:
    """Nothing but padding, [B, length]."""
    shape = (len(prompts), length)
    return Tokens(np.zeros(shape, np.int32), np.zeros(shape, bool))


def load_tokenizer(directory: Path, class_name: str, rows: int) -> Tokenizer:
  """Opens a tokenizer's directory.

  A `tokenizer.json` is taken as it is: it says all there is to say, and
  transformers 5 rebuilds it by the conventions of the class it is asked for.
  Asked for the `LlamaTokenizerFast` of published Llama 3 pipelines, it loses
  line breaks.

  Args:
    directory: of the tokenizer.
    class_name: transformers' class, which says how to read other files.
    rows: of the encoder's table; every id needs one.

  Raises:
    UserError: files missing or damaged, no padding token, or ids that the
      encoder does not have.
  """
  # Without torch transformers advises to install it, which is not needed.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  if not directory.is_dir():
    raise UserError(f"tokenizer directory {directory} does not exist")
  if (directory / "tokenizer.json").exists():
    class_name = "PreTrainedTokenizerFast"
  try:
    cls = getattr(transformers, class_name)
    tokenizer = cls.from_pretrained(directory, local_files_only=True)
  # transformers and tokenizers raise whatever a damaged file leads them to.
  except Exception as error:
    if not (directory / "tokenizer.json").exists():
      raise UserError(
        f"cannot read the {class_name} in {directory}: it has no tokenizer.json, "
        "and its other files need a package (pip install sentencepiece) or are "
        "damaged; transformers' AutoTokenizer can save the one that is missing"
      ) from error
    reason = " ".join(str(error).split())
    raise UserError(
      f"cannot read the {class_name} in {directory} ({reason}); copy it again"
    ) from error
  if tokenizer.pad_token_id is None:
    raise UserError(
      f"the tokenizer in {directory} has no padding token: take its "
      "tokenizer_config.json from the same checkpoint"
    )
  largest = max(tokenizer.get_vocab().values())
  if largest >= rows:
    raise UserError(
      f"the tokenizer in {directory} has ids up to {largest}, its encoder "
      f"only {rows} rows; take both from the same checkpoint"
    )
  return Tokenizer(tokenizer, tokenizer.model_max_length)
