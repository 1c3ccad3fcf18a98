"""Rewards: the protocol, built-in scorers that read pixels, composition."""

from digen_jax.rewards.compose import Composite, Scores, compose
from digen_jax.rewards.protocol import (
  BUILT_IN,
  Reward,
  resolve_reward,
  score,
  takes_pil,
)

__all__ = [
  "BUILT_IN",
  "Composite",
  "Reward",
  "Scores",
  "compose",
  "resolve_reward",
  "score",
  "takes_pil",
]
