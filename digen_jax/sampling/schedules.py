"""Sigma schedules: the noise levels a sampler steps through.

They follow the schedulers that published checkpoints carry, to the bit: the
same operations in the same precision as diffusers, so that a rollout and the
diffusers pipeline of the same checkpoint stand on the same grid.
"""

import difflib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from digen_jax.errors import UserError

# The scheduler_config.json of the published checkpoints, as far as it differs
# from the defaults of its class.
_CONFIGS: dict[str, dict[str, Any]] = {
  "flux": {"use_dynamic_shifting": True},
  "flux-schnell": {"shift": 1.0},
  "qwen-image": {
    "use_dynamic_shifting": True,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
  },
  "wan": {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
  },
  "hunyuan-video": {"shift": 7.0},
  "sd3": {"shift": 3.0},
}
# What their pipelines hand to the scheduler, see `schedule_from_config`.
_TABLE_FAMILIES = ("sd3",)
_FAMILIES = (*_CONFIGS, "dance")
_TRAIN_STEPS = 1000  # a model is told thousandths of the noise level
# Entries of which one value is supported; those that are absent have it.
_FIXED_OF_BOTH = {
  "num_train_timesteps": _TRAIN_STEPS,
  "use_karras_sigmas": False,
  "use_exponential_sigmas": False,
  "use_beta_sigmas": False,
}
_FIXED = {
  "FlowMatchEulerDiscreteScheduler": _FIXED_OF_BOTH
  | {"invert_sigmas": False, "stochastic_sampling": False},
  "UniPCMultistepScheduler": _FIXED_OF_BOTH
  | {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "predict_x0": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "solver_p": None,
    "lower_order_final": True,
    "disable_corrector": [],
    "thresholding": False,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "shift_terminal": None,
  },
}
_PIXELS_PER_TOKEN = 16  # 8x autoencoder, 2x2 latent patches


def sigma_schedule(
  family: str,
  num_steps: int,
  *,
  height: int | None = None,
  width: int | None = None,
  shift: float | None = None,
) -> np.ndarray:
  """Falling noise levels [num_steps + 1] float32, from (almost) 1 to 0.

  Args:
    family: "flux", "flux-schnell", "qwen-image", "wan", "hunyuan-video" or
      "sd3" for the schedule of that family's published pipeline; "dance" for
      DanceGRPO's: k t / (1 + (k - 1) t) over t = 1 ... 0.
    num_steps: number of denoising steps.
    height: image height in pixels; "flux" and "qwen-image" shift their
      schedule with the resolution.
    width: image width in pixels.
    shift: k above, in place of the family's own (e.g. "wan" 5 at 720p);
      required by "dance". For "flux" and "qwen-image" it is e^mu, and the
      resolution does not matter.

  Raises:
    UserError: unknown family, impossible number of steps, missing resolution
      or shift.
  """
  if family not in _FAMILIES:
    near = difflib.get_close_matches(family, _FAMILIES, n=1, cutoff=0.0)
    near = next((f for f in _FAMILIES if f.startswith(family)), near[0])
    raise UserError(
      f"sigma_schedule: family {family!r} is not known; did you mean {near!r}? "
      f"(known: {', '.join(_FAMILIES)})"
    )
  if shift is not None and not shift > 0:
    raise UserError(f"sigma_schedule: shift must be positive, got {shift}")
  if family == "dance":
    if shift is None:
      raise UserError("sigma_schedule: family 'dance' needs shift, e.g. 3.0")
    times = np.linspace(1, 0, _checked_steps(num_steps) + 1)
    return _shifted(times, shift).astype(np.float32)
  config = _CONFIGS[family]
  seq_len = None
  if config.get("use_dynamic_shifting") and shift is None:
    seq_len = _image_tokens(family, height, width)
  elif config.get("use_dynamic_shifting"):
    mu = math.log(shift)
    config = {**config, "base_shift": mu, "max_shift": mu}
    seq_len = 0
  elif shift is not None:
    config = {**config, "shift": shift, "flow_shift": shift}
  base = "table" if family in _TABLE_FAMILIES else "uniform"
  return schedule_from_config(config, num_steps, seq_len=seq_len, base=base)


def schedule_from_config(
  config: Mapping[str, Any],
  num_steps: int,
  *,
  seq_len: int | None = None,
  base: Literal["uniform", "table"] = "uniform",
) -> np.ndarray:
  """The schedule a diffusers `scheduler_config.json` describes.

  Args:
    config: its contents: a FlowMatchEulerDiscreteScheduler, or a
      UniPCMultistepScheduler with flow sigmas; absent entries have the
      defaults of the class.
    num_steps: number of denoising steps.
    seq_len: image tokens per sample, needed where the config shifts with the
      resolution.
    base: what the family's pipeline hands to a FlowMatchEuler scheduler:
      "uniform", 1 ... 1/n (FLUX, Qwen-Image, HunyuanVideo), or "table",
      nothing, so that the scheduler spans its own training table, which is
      shifted already and is shifted again (Stable Diffusion 3).

  Returns:
    [num_steps + 1] float32, terminal 0.

  Raises:
    UserError: a scheduler or option that is not supported, seq_len missing,
      or a number of steps the schedule is not defined for.
  """
  num_steps = _checked_steps(num_steps)
  name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
  if name not in _FIXED:
    raise UserError(
      f"scheduler_config.json: scheduler {name!r} is not supported; use "
      "FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with "
      "use_flow_sigmas=true"
    )
  unipc = name == "UniPCMultistepScheduler"
  if unipc:  # the class has another default
    config = {"use_flow_sigmas": False, **config}
  _check_fixed(config, _FIXED[name])
  if unipc:
    return _unipc_flow(config, num_steps)
  sigmas = _euler_base(config, num_steps, base)
  if config.get("use_dynamic_shifting"):
    sigmas = _dynamic_shift(sigmas, config, seq_len)
  else:
    sigmas = _shifted(sigmas, config.get("shift", 1.0))
  if config.get("shift_terminal"):
    sigmas = _stretched(sigmas, config["shift_terminal"])
  return np.append(sigmas.astype(np.float32), np.float32(0))


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
  for key, wanted in fixed.items():
    value = config.get(key, wanted)
    if value != wanted and (value or wanted):  # null is as good as false
      raise UserError(
        f"scheduler_config.json: {key}={json.dumps(value)} is not supported; "
        f"set it to {json.dumps(wanted)}"
      )


def _euler_base(
  config: Mapping[str, Any], num_steps: int, base: str
) -> np.ndarray:
  """[n] levels before the shift."""
  if base == "uniform":
    return np.linspace(1, 1 / num_steps, num_steps).astype(np.float32)
  table = np.arange(_TRAIN_STEPS, 0, -1, dtype=np.float32)
  table = table / np.float32(_TRAIN_STEPS)
  if not config.get("use_dynamic_shifting"):
    table = _shifted(table, config.get("shift", 1.0))
  ends = float(table[0]) * _TRAIN_STEPS, float(table[-1]) * _TRAIN_STEPS
  return np.linspace(*ends, num_steps) / _TRAIN_STEPS


def _unipc_flow(config: Mapping[str, Any], num_steps: int) -> np.ndarray:
  """Wan's schedule; UniPC takes log(1 - sigma), so it starts below 1."""
  sigmas = np.linspace(1, 1 / _TRAIN_STEPS, num_steps + 1)[:-1]
  sigmas = _shifted(sigmas, config.get("flow_shift", 1.0))
  sigmas[0] -= 1e-6
  return np.append(sigmas, 0).astype(np.float32)


def _shifted(t: np.ndarray, shift: float) -> np.ndarray:
  """k t / (1 + (k - 1) t): more steps at high noise for k > 1."""
  return shift * t / (1 + (shift - 1) * t)


def _dynamic_shift(
  t: np.ndarray, config: Mapping[str, Any], seq_len: int | None
) -> np.ndarray:
  """The shift grows with the number of tokens: k = e^mu, mu linear in it."""
  if seq_len is None:
    raise UserError(
      "scheduler_config.json: use_dynamic_shifting=true needs the number of "
      "image tokens; pass seq_len"
    )
  low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
  first = config.get("base_image_seq_len", 256)
  slope = (high - low) / (config.get("max_image_seq_len", 4096) - first)
  mu = seq_len * slope + (low - slope * first)
  if config.get("time_shift_type", "exponential") == "exponential":
    mu = math.exp(mu)
  return mu / (mu + (1 / t - 1))


def _stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
  """Stretches the schedule so that its last entry is `terminal`."""
  if len(sigmas) == 1:
    raise UserError(
      "sigma_schedule: a schedule with shift_terminal (Qwen-Image) is not "
      "defined for one step; use num_steps >= 2"
    )
  rest = 1 - sigmas
  return 1 - rest / (rest[-1] / (1 - terminal))


def _checked_steps(num_steps: int) -> int:
  try:
    steps = operator.index(num_steps)
  except TypeError:
    steps = 0
  if steps < 1:
    raise UserError(
      f"sigma_schedule: num_steps must be an integer >= 1, got {num_steps!r}"
    )
  return steps


def _image_tokens(family: str, height: int | None, width: int | None) -> int:
  for name, value in (("height", height), ("width", width)):
    if value is None or value < _PIXELS_PER_TOKEN:
      raise UserError(
        f"sigma_schedule: family {family!r} depends on the resolution; pass "
        f"height and width in pixels, at least {_PIXELS_PER_TOKEN} "
        f"({name}={value}), or shift"
      )
  return (height // _PIXELS_PER_TOKEN) * (width // _PIXELS_PER_TOKEN)
