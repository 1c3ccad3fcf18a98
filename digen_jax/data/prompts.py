"""Prompt files and the order in which training walks through them."""

import dataclasses
import json
import logging
import os
import pathlib

import numpy as np

from digen_jax.errors import UserError

_log = logging.getLogger(__name__)


def read_prompts(path: str | os.PathLike) -> list[str]:
  """Reads a UTF-8 prompts file: a prompt per line, or JSON lines.

  In a file named `*.jsonl` every line is an object with a string "prompt";
  other fields are ignored. Blank lines are skipped, and their number logged.

  Raises:
    UserError: no such file, no prompt in it, or a line that is not UTF-8 or
      not the JSON asked for.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(
      f"prompts file {path} does not exist: give the path of a text file with "
      "one prompt per line"
    )
  prompts, blank = [], 0
  lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
  for number, line in enumerate(lines, start=1):
    text = _decode(line, f"{path} line {number}").strip()
    if not text:
      blank += 1
      continue
    if path.suffix == ".jsonl":
      text = _prompt_of_json(text, f"{path} line {number}")
    prompts.append(text)
  if not prompts:
    raise UserError(
      f"prompts file {path} holds no prompt: write one prompt per line"
    )
  if blank:
    _log.warning("%s: skipped %d blank lines", path, blank)
  return prompts


def _decode(line: bytes, where: str) -> str:
  try:
    return line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where} is not UTF-8 (byte {error.start + 1}: "
      f"0x{line[error.start]:02x}): save the file as UTF-8, e.g. "
      "`iconv -f latin1 -t utf-8`"
    ) from error


def _prompt_of_json(text: str, where: str) -> str:
  try:
    prompt = json.loads(text)["prompt"].strip()
    prompt.encode()  # "\ud83d" alone is JSON and no text
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f'{where} is not a JSON object with a string "prompt": write e.g. '
      '{"prompt": "a red circle"}'
    ) from error
  if not prompt:
    raise UserError(
      f"{where} has an empty prompt: fill it in or delete the line"
    )
  return prompt


@dataclasses.dataclass(frozen=True)
class PromptStream:
  """The prompts of every training step, a pure function of (seed, step).

  Epochs are shuffled anew and drawn without replacement; a step may straddle
  two of them. There is no state to save but the step itself.

  Attributes:
    prompts: all prompts, in file order.
    seed: of the shuffles.
    per_step: prompts a step takes.
  """

  prompts: tuple[str, ...]
  seed: int
  per_step: int

  def __post_init__(self):
    if not self.prompts or self.per_step < 1:
      raise UserError(
        f"a prompt stream needs prompts and at least one of them per step, got "
        f"{len(self.prompts)} prompts, {self.per_step} per step"
      )

  def indices(self, step: int) -> np.ndarray:
    """Indices into `prompts` of step `step` (from 0): [per_step] int64."""
    position = step * self.per_step + np.arange(self.per_step)
    epoch, place = np.divmod(position, len(self.prompts))
    orders = {e: self._order(e) for e in np.unique(epoch)}
    return np.array([orders[e][p] for e, p in zip(epoch, place)])

  def _order(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([self.seed, int(epoch)])
    return rng.permutation(len(self.prompts))
