"""Weighted sums of rewards."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from digen_jax.errors import UserError
from digen_jax.rewards.protocol import Reward, resolve_reward, score


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a composed reward says of N samples.

  Attributes:
    total: [N] float32, the weighted sum.
    parts: name of each reward -> [N] float32, unweighted.
  """

  total: np.ndarray
  parts: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Composite:
  """Rewards and their weights, in a fixed order.

  Attributes:
    rewards: the functions.
    weights: one for each.
    timeout: seconds that a call may take; 0 sets no limit.
  """

  rewards: tuple[Reward, ...]
  weights: tuple[float, ...]
  timeout: float = 0.0

  def check(self, prompts: Iterable[str]) -> None:
    """Raises UserError where a reward cannot read one of the prompts."""
    for reward in self.rewards:
      check = getattr(reward.function, "check_prompt", None)
      for prompt in dict.fromkeys(prompts) if check else ():
        check(prompt)

  def score(self, images: np.ndarray, prompts: list[str]) -> Scores:
    """Scores N images; arguments and errors as in `protocol.score`."""
    parts = {
      r.name: score(r, images, prompts, self.timeout) for r in self.rewards
    }
    total = np.zeros(len(prompts), np.float32)
    for weight, values in zip(self.weights, parts.values()):
      total += np.float32(weight) * values
    return Scores(total, parts)


def parse(text: str) -> dict[str, float]:
  """Reads "0.7*shapes + 0.3*path/to/file.py:function" as {spec: weight}.

  A term without a weight has weight 1.

  Raises:
    UserError: an empty term, a weight that is no number, or a repeated reward.
  """
  weights: dict[str, float] = {}
  for term in text.split(" + "):
    weight, star, spec = term.strip().rpartition("*")
    try:
      number = float(weight) if star else 1.0
    except ValueError as error:
      raise UserError(
        f'reward "{term.strip()}": "{weight}" is no weight; write e.g. '
        '"0.7*shapes + 0.3*jpeg_compressibility"'
      ) from error
    if not spec.strip():
      raise UserError(
        f'reward "{text}" has an empty term: name at least one reward, e.g. '
        '"shapes"'
      )
    if spec.strip() in weights:
      raise UserError(f'reward "{spec.strip()}" is given twice in "{text}"')
    weights[spec.strip()] = number
  return weights


def compose(
  rewards: str
  | Callable
  | Reward
  | Mapping[str, float]
  | Sequence[tuple[str | Callable | Reward, float]],
  timeout: float = 0.0,
) -> Composite:
  """One reward, or several as {spec: weight} or (spec, weight) pairs.

  Args:
    rewards: what to compose.
    timeout: seconds that a call may take; 0 sets no limit.

  Raises:
    UserError: no reward, a spec that `resolve_reward` refuses, two of the
      same name, or a weight that is not a finite number other than 0.
  """
  if isinstance(rewards, str | Reward) or callable(rewards):
    rewards = {rewards: 1.0}
  if isinstance(rewards, Mapping):
    rewards = tuple(rewards.items())
  if not rewards:
    raise UserError('no reward given: name at least one, e.g. {"shapes": 1.0}')
  for spec, weight in rewards:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight == 0:
      raise UserError(
        f'reward "{spec}" has weight {weight!r}: give a finite number other '
        "than 0, or leave the reward out"
      )
  resolved = tuple(resolve_reward(spec) for spec, _ in rewards)
  names = [reward.name for reward in resolved]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'reward "{name}" is given twice: add up its weights')
  weights = tuple(float(weight) for _, weight in rewards)
  return Composite(resolved, weights, timeout)
