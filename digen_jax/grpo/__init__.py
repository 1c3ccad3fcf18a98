"""Advantages, windows, losses and the gradient of one pack."""

from digen_jax.grpo.advantages import group_advantages
from digen_jax.grpo.losses import grpo_loss, grpo_loss_rows, kl_to_reference
from digen_jax.grpo.train_step import (
  add_metrics,
  fold,
  join,
  mean_metrics,
  pad,
  train_step,
)
from digen_jax.grpo.windows import (
  check_window,
  progressive_window_start,
  window_start,
)

__all__ = [
  "add_metrics",
  "check_window",
  "fold",
  "group_advantages",
  "grpo_loss",
  "grpo_loss_rows",
  "join",
  "kl_to_reference",
  "mean_metrics",
  "pad",
  "progressive_window_start",
  "train_step",
  "window_start",
]
