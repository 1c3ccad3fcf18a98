"""Held-out reward of a policy: fixed prompts, fixed noise, no randomness."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from digen_jax.config import Config
from digen_jax.rewards.compose import Scores
from digen_jax.types import Conditioning

# The same noise whatever the run's seed: policies of several runs compare.
NOISE_SEED = 0
# Values that rewards see at once, 1 GiB: of long videos a few at a time.
SCORED = 2**28


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """What an evaluation saw.

  Attributes:
    step: global steps trained.
    prompts: [N] texts.
    images: [N, H, W, 3] uint8.
    rewards: [N] float32 weighted total.
    parts: reward name -> [N] float32.
    split: "held_out", or "train" for prompts that are trained on.
    setting: digest of what rewards depend on beside the policy; those of equal
      settings compare.
  """

  step: int
  prompts: Sequence[str]
  images: np.ndarray
  rewards: np.ndarray
  parts: dict[str, np.ndarray]
  split: str = "held_out"
  setting: str = ""

  @property
  def label(self) -> str:
    """The split, for people."""
    return self.split.replace("_", "-")

  def row(self) -> dict[str, Any]:
    """Its entry in evaluation.json."""
    return {
      "step": self.step,
      "split": self.split,
      "setting": self.setting,
      "prompts": len(self.prompts),
      "reward_mean": float(self.rewards.mean()),
      "reward_std": float(self.rewards.std()),
      **{f"{name}_mean": float(v.mean()) for name, v in self.parts.items()},
    }


def setting(config: Config, prompts: Sequence[str]) -> str:
  """A digest of all that an evaluation depends on beside the policy."""
  sampling = config.sampling
  what = (
    config.reward,
    config.eval.num_steps,
    (sampling.height, sampling.width, sampling.num_frames),
    (sampling.guidance_scale, sampling.embedded_guidance),
    (sampling.negative_prompt, sampling.text_length),
    list(prompts),
  )
  return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def select(prompts: list[str], config: Config) -> list[str]:
  """The prompts an evaluation uses: the first `config.eval.num_prompts`."""
  return prompts[: config.eval.num_prompts or len(prompts)]


def evaluate(
  sample: Callable[[Conditioning, Conditioning | None, int], np.ndarray],
  prompts: Sequence[str],
  conditioning: Conditioning,
  negative: Conditioning | None,
  score: Callable[[np.ndarray, list[str]], Scores],
  step: int,
) -> Evaluated:
  """Samples one image per prompt and scores them.

  `score` sees at most `SCORED` values at once, or one sample.

  Args:
    sample: the policy, called with conditioning, negative and a seed.
    prompts: [N] texts.
    conditioning: [N, ...] their conditioning, on the host.
    negative: [1, ...] conditioning of the negative prompt, with guidance.
    score: scores of images, see `Composite.score`.
    step: how far the policy has been trained.
  """
  images = sample(conditioning, negative, NOISE_SEED)
  scores = []
  size = max(1, SCORED // images[0].size)
  for first in range(0, len(images), size):
    rows = slice(first, first + size)
    scores.append(score(as_floats(images[rows]), list(prompts[rows])))
  total = np.concatenate([score.total for score in scores])
  parts = {
    name: np.concatenate([score.parts[name] for score in scores])
    for name in scores[0].parts
  }
  return Evaluated(step, prompts, images, total, parts)


def as_floats(images: np.ndarray) -> np.ndarray:
  """uint8 pictures as rewards take them: float32 in [0, 1]."""
  return np.divide(images, np.float32(255), dtype=np.float32)
