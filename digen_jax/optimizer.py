"""The optimiser of a run, from optax."""

from typing import Any

import jax
import optax

from digen_jax.config import Train

DECAYED = ("kernel", "lora_a", "lora_b")  # not norms, biases, tables


def make_schedule(train: Train, updates: int) -> optax.Schedule:
  """Learning rate by optimiser update: linear warm-up, then constant or cosine.

  Args:
    train: the settings.
    updates: number of optimiser updates of the whole run (end of the cosine).
  """
  peak, warmup = train.learning_rate, train.warmup_steps
  if train.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, max(updates - warmup, 1))
  else:
    after = optax.constant_schedule(peak)
  if not warmup:
    return after
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
  train: Train, updates: int
) -> optax.GradientTransformationExtraArgs:
  """AdamW after a clip by global norm; decay on matrices only."""
  return optax.chain(
    optax.clip_by_global_norm(train.max_grad_norm),
    optax.adamw(
      make_schedule(train, updates),
      b1=train.adam_b1,
      b2=train.adam_b2,
      eps=train.adam_eps,
      weight_decay=train.weight_decay,
      mask=decay_mask,
    ),
  )


def decay_mask(params: Any) -> Any:
  """True for the leaves that weight decay applies to."""
  return jax.tree.map_with_path(
    lambda path, _: getattr(path[-1], "key", None) in DECAYED, params
  )


def ema_update(ema: Any, params: Any, decay: float) -> Any:
  """decay * ema + (1 - decay) * params, leaf by leaf."""
  return jax.tree.map(lambda e, p: e * decay + p * (1.0 - decay), ema, params)
