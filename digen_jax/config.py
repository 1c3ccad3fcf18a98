"""The configuration of a run: frozen records, and their checks.

Config files (`configs/*.py`) start from `default_config()`, an
`ml_collections.ConfigDict` with every field below, change what differs and
return it; `from_config_dict` turns the result into a `Config` and checks it.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

from digen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batch:
  """How much one global step generates: prompts x group_size samples."""

  prompts: int = 8
  group_size: int = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How rollouts are sampled.

  Attributes:
    num_steps: denoising steps.
    kernel: "flow_sde", "dance_sde" or "flow_cps".
    noise_level: the kernel's noise level (`a` of Flow-SDE and Flow-CPS, `eta`
      of Dance-SDE).
    window: number of consecutive stochastic, trained steps; 0 trains every
      step but the last, which `window_first` must then leave.
    window_first: the window lies within this many first steps; 0 means
      anywhere before the last step. One start per prompt group.
    shared_noise: start all samples of a group from the same latents, so that
      their rewards differ by what was drawn in the window alone (DanceGRPO).
    height: image height, pixels.
    width: image width, pixels.
    num_frames: of a video; 1 for images.
    guidance_scale: classifier-free guidance; 1 is off.
    embedded_guidance: the guidance value fed to guidance-distilled models.
    negative_prompt: what classifier-free guidance leads away from.
    text_length: tokens that prompts are padded or cut to; 0 means what the
      family's pipeline does.
  """

  num_steps: int = 10
  kernel: str = "flow_sde"
  noise_level: float = 0.7
  window: int = 0
  window_first: int = 0
  shared_noise: bool = False
  height: int = 32
  width: int = 32
  num_frames: int = 1
  guidance_scale: float = 1.0
  embedded_guidance: float = 3.5
  negative_prompt: str = ""
  text_length: int = 0


@dataclasses.dataclass(frozen=True)
class Train:
  """The update: what is trained, and how.

  Attributes:
    learning_rate: peak learning rate of AdamW.
    schedule: "constant" or "cosine" (to zero at the last step).
    warmup_steps: linear warm-up, optimiser updates.
    lora_rank: rank of the adapters; 0 trains every parameter.
    lora_alpha: numerator of the LoRA scale alpha / rank.
    lora_targets: regular expressions searched for in module paths.
    lora_init: LoRA file (diffusers' form) whose adapters the run starts from;
      rank and targets must be those of the file. Empty: zero adapters.
    updates_per_batch: optimiser updates per rollout batch; the first is
      on-policy.
    clip_range: PPO clip of the ratio, 1 +- clip_range.
    weight_by_noise: weight the loss of a step by the noise it adds
      (TempFlow-GRPO); off is plain GRPO.
    kl_weight: weight of the KL to the starting policy; 0 switches it off.
    kl_form: noise the KL is measured in, "diffusion" (the coefficient of the
      SDE, as Flow-GRPO does for images), "transition" (the std of a step, the
      exact Gaussian KL, as it does for Wan), or "auto", by the model's family.
    ema_decay: decay of the averaged parameters; 0 switches them off.
    max_grad_norm: global-norm clip.
    weight_decay: decoupled, on matrices only.
    adam_b1: first-moment decay.
    adam_b2: second-moment decay.
    adam_eps: denominator constant.
    remat: rematerialisation policy, "none", "block" or "dots".
  """

  learning_rate: float = 1e-4
  schedule: str = "constant"
  warmup_steps: int = 0
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = ("attn", "ff")
  lora_init: str = ""
  updates_per_batch: int = 1
  clip_range: float = 1e-4
  weight_by_noise: bool = False
  kl_weight: float = 0.0
  kl_form: str = "auto"
  ema_decay: float = 0.0
  max_grad_norm: float = 1.0
  weight_decay: float = 0.0
  adam_b1: float = 0.9
  adam_b2: float = 0.999
  adam_eps: float = 1e-8
  remat: str = "none"


@dataclasses.dataclass(frozen=True)
class Advantage:
  """Group-relative advantages (`digen_jax.group_advantages`)."""

  scope: str = "group"
  ddof: int = 0
  eps: float = 1e-4
  clip: float = 5.0


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Which techniques are on, and how large a unit of work is.

  Attributes:
    mode: "colocated" (one mesh does both in turn) or "disaggregated".
    gap: generation-axis pipeline: a group is trained as soon as it is scored.
    tsp: time-step parallelism: denoising steps of a sample share a pack.
    tag: trainer-assisted generation: an idle trainer generates.
    rat: rollout-assisted training: an idle rollout lane computes gradients.
    bts: bubble-triggered search for how much an idle lane takes; off, it takes
      what there is.
    tcss: stale fraction: up to this part of a step's Generate units may start
      with the version before, while that is trained on; 0 is off. None do in
      the step before a checkpoint, and where the measured costs say that it
      would not make steps 2 % shorter. What a run learns then depends on timing.
    tag_layout: in which layout a trainer generates: "trainer" (parameters are
      gathered layer by layer in every step), "rollout" (resharded for a block
      of units), or "auto", by measured cost.
    lanes: "local", meshes of this process, or "ray", a process for each lane
      (extra `cluster`).
    retries: how often in a step a unit that failed is run again.
    restarts: how often in a run a rollout process that has died is started
      again ("ray"). What it had in hand goes back, and to the trainer if that
      may generate.
    reward_slots: reward calls under way at once, each in a thread of its own.
    reward_timeout: seconds that a reward call may take before its unit fails
      (see `retries`); 0 waits for ever.
    generate_size: samples per Generate unit; 0 means one group.
    train_size: samples per Train unit; 0 means one group.
    timesteps_per_pack: trained steps per pack under TSP; 0 means all, or on
      accelerators as many as fit into memory.
    held_gradients: how many packs a lane may be ahead of the first that is not
      trained yet (its rewards are slow); 0 sets no limit. Gradients are summed
      in canonical order, so each of them waits in memory, as large as what is
      trained is in float32.
  """

  mode: str = "disaggregated"
  gap: bool = True
  tsp: bool = True
  tag: bool = False
  rat: bool = False
  bts: bool = True
  tcss: float = 0.0
  tag_layout: str = "auto"
  lanes: str = "local"
  retries: int = 0
  restarts: int = 3
  reward_slots: int = 4
  reward_timeout: float = 1800.0
  generate_size: int = 0
  train_size: int = 0
  timesteps_per_pack: int = 0
  held_gradients: int = 0


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Device counts, axis sizes (data, fsdp, sequence, tensor), or "auto".

  A list for the rollout gives as many rollout lanes, which may differ: [2, 4],
  or ["auto", "auto"]. Each takes the next unit when it is done with one, but
  leaves the last of a step to faster ones that will be through sooner.

  data and fsdp divide samples, and fsdp stores parameters in parts; sequence
  divides the tokens of a sample, tensor its heads.
  "auto" is what the other role leaves; for both, the split with which a step is
  predicted to be shortest, from a unit of each kind measured at start-up.

  rollout_gpu and trainer_gpu choose in a Ray cluster with GPUs of several kinds,
  by Ray's names ("H100"); "" takes any. For rollout lanes one name, or a list.
  """

  rollout: Any = "auto"
  trainer: Any = "auto"
  rollout_gpu: Any = ""
  trainer_gpu: str = ""


@dataclasses.dataclass(frozen=True)
class Dtype:
  """Compute dtype of the denoiser: "float32" or "bfloat16"."""

  compute: str = "float32"


@dataclasses.dataclass(frozen=True)
class Vae:
  """How the autoencoder decodes.

  Attributes:
    sequential: decode a device's samples one after the other, and each in
      chunks of frames (and tiles) one after the other: memory of one, but slow
      on CPU. "videos", "always" or "never".
    tiling: side of the tiles, in pixels, into which larger pictures are cut;
      they overlap by a quarter and are blended, which shows a little. 0 takes
      pictures whole, as diffusers does until `enable_tiling` is called.
      Long videos of HunyuanVideo are cut in time in either case, as there.
  """

  sequential: str = "videos"
  tiling: int = 0


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation on held-out prompts: fixed noise, deterministic sampler.

  Attributes:
    prompts: prompt file; empty means the training prompts.
    num_prompts: how many of them, from the top; 0 means all.
    num_steps: denoising steps of the sampler.
    batch_size: samples made at once, rounded up to what the devices divide; 0
      means as many as a Generate unit makes.
    images: how many samples the picture grids show.
    fps: frames per second of the videos written.
  """

  prompts: str = ""
  num_prompts: int = 64
  num_steps: int = 20
  batch_size: int = 0
  images: int = 16
  fps: int = 16


@dataclasses.dataclass(frozen=True)
class Config:
  """A run. See the sections' own records.

  Attributes:
    seed: everything random follows from it; from 0 to 2**32 - 1.
    steps: global steps.
    checkpoint: a diffusers pipeline directory, or its id on the hub,
      "owner/name" or "owner/name@revision"; a run keeps to the commit that it
      began with.
    prompts: training prompts, one per line.
    embeddings: directory of prompt embeddings, made by
      `launch/encode_prompts.py` or by a run; what it lacks is added, in
      training alone. Empty means one in the run's directory.
    reward: what is optimised, as `rewards.compose.parse` reads it: "shapes",
      "0.7*shapes + 0.3*path/to/file.py:function".
    eval_every: global steps between evaluations; 0 means first and last.
    checkpoint_every: global steps between checkpoints; 0 means the last.
    keep_checkpoints: how many checkpoints to keep.
    devices: virtual CPU devices to create where there is no accelerator.
    tracker: "" or "wandb" (extra `track`), beside TensorBoard.
  """

  seed: int = 0
  steps: int = 100
  checkpoint: str = ""
  prompts: str = ""
  embeddings: str = ""
  reward: str = ""
  eval_every: int = 0
  checkpoint_every: int = 50
  keep_checkpoints: int = 2
  devices: int = 2
  tracker: str = ""
  batch: Batch = Batch()
  sampling: Sampling = Sampling()
  train: Train = Train()
  advantage: Advantage = Advantage()
  pipeline: Pipeline = Pipeline()
  mesh: Mesh = Mesh()
  dtype: Dtype = Dtype()
  vae: Vae = Vae()
  eval: Eval = Eval()


def to_dict(config: Any) -> dict[str, Any]:
  """A config record as nested dicts of plain values."""
  return {
    f.name: to_dict(value)
    if dataclasses.is_dataclass(value := getattr(config, f.name))
    else value
    for f in dataclasses.fields(config)
  }


def default_config():  # noqa: ANN201
  """Every field of `Config` at its default, as an `ml_collections.ConfigDict`.

  It is locked, so that a typo in a config file is an error.
  """
  import ml_collections

  config = ml_collections.ConfigDict(to_dict(Config()), type_safe=False)
  return config.lock()


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """Builds and checks a `Config`.

  Args:
    values: nested mapping, e.g. a `ConfigDict`; missing fields take defaults.

  Raises:
    UserError: unknown field (names the nearest), wrong type, or a value that
      cannot work.
  """
  if hasattr(values, "to_dict"):
    values = values.to_dict()
  config = _build(Config, values, "")
  check(config)
  return config


def _build(record: type, values: Mapping[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(record)
  for name in values:
    if name not in hints:
      raise UserError(unknown_field(prefix + name, hints, prefix))
  fields = {}
  for name, value in values.items():
    where, hint = prefix + name, hints[name]
    if dataclasses.is_dataclass(hint):
      if not isinstance(value, Mapping):
        raise UserError(
          f"config.{where} is a section with fields "
          f"{', '.join(typing.get_type_hints(hint))}; got {value!r}"
        )
      fields[name] = _build(hint, value, where + ".")
    else:
      fields[name] = _convert(where, value, hint)
  return record(**fields)


def unknown_field(where: str, known: Any, prefix: str = "") -> str:
  """One line for a config field that does not exist, with the nearest."""
  names = [prefix + name for name in known]
  near = difflib.get_close_matches(where, names, n=1, cutoff=0.0)
  return f"unknown config field config.{where}: did you mean config.{near[0]}?"


def _convert(where: str, value: Any, hint: Any) -> Any:
  """`value` as the annotated type; int -> float is the only silent change."""
  if hint is Any:  # a mesh; as a flag it is text: "4", "{'data': 2}"
    with contextlib.suppress(ValueError, SyntaxError):
      return ast.literal_eval(value) if isinstance(value, str) else value
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint == tuple[str, ...]:
    if isinstance(value, (list, tuple)) and all(
      isinstance(v, str) for v in value
    ):
      return tuple(value)
    raise UserError(f"config.{where} takes a list of strings; got {value!r}")
  if not isinstance(value, hint) or (
    hint is not bool and isinstance(value, bool)
  ):
    raise UserError(
      f"config.{where} takes a value of type {hint.__name__}; got {value!r}"
    )
  return value


def check(config: Config) -> None:
  """Raises UserError for values that cannot work together."""
  batch, sampling, train = config.batch, config.sampling, config.train
  _choice("sampling.kernel", sampling.kernel, KERNELS)
  _choice("train.schedule", train.schedule, ("constant", "cosine"))
  _choice("train.kl_form", train.kl_form, KL_FORMS)
  _choice("train.remat", train.remat, ("none", "block", "dots"))
  _choice("advantage.scope", config.advantage.scope, ("group", "global"))
  _choice("dtype.compute", config.dtype.compute, ("float32", "bfloat16"))
  _choice("pipeline.mode", config.pipeline.mode, ("colocated", "disaggregated"))
  _choice(
    "pipeline.tag_layout",
    config.pipeline.tag_layout,
    ("auto", "trainer", "rollout"),
  )
  _choice("pipeline.lanes", config.pipeline.lanes, ("local", "ray"))
  _choice(
    "vae.sequential", config.vae.sequential, ("videos", "always", "never")
  )
  _choice("tracker", config.tracker, ("", "wandb"))
  if not 0 <= config.seed < 2**32:
    raise UserError(
      f"config.seed must be from 0 to 2**32 - 1; got {config.seed}"
    )
  if not 0.0 <= config.pipeline.tcss <= 1.0:
    raise UserError(
      "config.pipeline.tcss is the part of a step that may be stale, from 0 "
      f"(off) to 1; got {config.pipeline.tcss}"
    )
  for where, value, least in (
    ("steps", config.steps, 1),
    ("devices", config.devices, 1),
    ("eval_every", config.eval_every, 0),
    ("checkpoint_every", config.checkpoint_every, 0),
    ("keep_checkpoints", config.keep_checkpoints, 1),
    ("batch.prompts", batch.prompts, 1),
    ("sampling.num_steps", sampling.num_steps, 2),
    ("sampling.text_length", sampling.text_length, 0),
    ("sampling.num_frames", sampling.num_frames, 1),
    ("train.updates_per_batch", train.updates_per_batch, 1),
    ("train.lora_rank", train.lora_rank, 0),
    ("train.warmup_steps", train.warmup_steps, 0),
    ("pipeline.retries", config.pipeline.retries, 0),
    ("pipeline.restarts", config.pipeline.restarts, 0),
    ("pipeline.reward_slots", config.pipeline.reward_slots, 1),
    ("vae.tiling", config.vae.tiling, 0),
    ("eval.num_steps", config.eval.num_steps, 1),
    ("eval.num_prompts", config.eval.num_prompts, 0),
    ("eval.batch_size", config.eval.batch_size, 0),
    ("eval.images", config.eval.images, 1),
    ("eval.fps", config.eval.fps, 1),
    ("advantage.ddof", config.advantage.ddof, 0),
    ("pipeline.timesteps_per_pack", config.pipeline.timesteps_per_pack, 0),
    ("pipeline.held_gradients", config.pipeline.held_gradients, 0),
  ):
    if value < least:
      raise UserError(f"config.{where} must be at least {least}; got {value}")
  for where, value in (
    ("sampling.noise_level", sampling.noise_level),
    ("train.learning_rate", train.learning_rate),
    ("train.clip_range", train.clip_range),
    ("train.max_grad_norm", train.max_grad_norm),
    ("train.lora_alpha", train.lora_alpha),
    ("advantage.clip", config.advantage.clip),
  ):
    if not 0 < value < math.inf:
      raise UserError(
        f"config.{where} must be positive and finite; got {value}"
      )
  for where, value, below in (
    ("train.kl_weight", train.kl_weight, math.inf),
    ("train.weight_decay", train.weight_decay, math.inf),
    ("train.adam_eps", train.adam_eps, math.inf),
    ("advantage.eps", config.advantage.eps, math.inf),
    ("sampling.embedded_guidance", sampling.embedded_guidance, math.inf),
    ("pipeline.reward_timeout", config.pipeline.reward_timeout, math.inf),
    ("train.adam_b1", train.adam_b1, 1),
    ("train.adam_b2", train.adam_b2, 1),
    ("train.ema_decay", train.ema_decay, 1),
  ):
    if not 0 <= value < below:
      raise UserError(f"config.{where} must be in [0, {below}); got {value}")
  if not 0 < sampling.guidance_scale < math.inf:
    raise UserError(
      "config.sampling.guidance_scale must be positive: 1 is without guidance "
      "(0 would follow the negative prompt alone); got "
      f"{sampling.guidance_scale}"
    )
  if config.advantage.ddof >= batch.group_size > 1:
    raise UserError(
      f"config.advantage.ddof={config.advantage.ddof} must be less than "
      f"config.batch.group_size={batch.group_size}: it is taken off the number "
      "of samples that a standard deviation is divided by"
    )
  if sampling.kernel == "flow_cps" and sampling.noise_level > 1:
    raise UserError(
      "config.sampling.noise_level is the share of an angle with "
      f"kernel='flow_cps', above 0 and at most 1; got {sampling.noise_level}"
    )
  if train.lora_init and not train.lora_rank:
    raise UserError(
      f"config.train.lora_init={train.lora_init!r} needs adapters to load: set "
      "config.train.lora_rank to the rank of the file"
    )
  if batch.group_size < 2:
    raise UserError(
      "config.batch.group_size must be at least 2: advantages compare the "
      f"samples of one prompt; got {batch.group_size}"
    )
  if batch.prompts % train.updates_per_batch:
    raise UserError(
      f"config.train.updates_per_batch={train.updates_per_batch} does not "
      f"divide config.batch.prompts={batch.prompts}: every update takes the "
      "same number of whole groups"
    )
  _check_window(sampling)
  _check_sizes(config)
  _check_lora(train)


KERNELS = ("flow_sde", "dance_sde", "flow_cps")
KL_FORMS = ("auto", "diffusion", "transition")


def _check_window(sampling: Sampling) -> None:
  last = sampling.num_steps - 1  # the last step is never trained
  first = sampling.window_first or last
  window = sampling.window or last
  if first > last or window > first or sampling.window < 0:
    raise UserError(
      f"config.sampling.window={sampling.window} (0 is all) within the first "
      f"window_first={sampling.window_first} of num_steps="
      f"{sampling.num_steps} steps does not fit: it needs window <= "
      f"window_first <= {last} (the last step is never trained)"
    )


def _check_sizes(config: Config) -> None:
  size = config.batch.group_size
  for name in ("generate_size", "train_size"):
    value = getattr(config.pipeline, name)
    if value < 0 or (value and value % size and size % value):
      raise UserError(
        f"config.pipeline.{name}={value} must divide the group size {size}, "
        "or be a multiple of it"
      )


def _check_lora(train: Train) -> None:
  if train.lora_rank and not train.lora_targets:
    raise UserError(
      "config.train.lora_targets is empty: name the layers that get adapters, "
      "such as ('attn', 'ff'), or set config.train.lora_rank=0"
    )
  for target in train.lora_targets if train.lora_rank else ():
    try:
      re.compile(target)
    except re.error as error:
      raise UserError(
        f"config.train.lora_targets: {target!r} is no regular expression "
        f"({error}); part of a layer's name is one, such as 'attn'"
      ) from error


def _choice(where: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    shown = ", ".join(repr(c) for c in choices)
    raise UserError(f"config.{where} must be one of {shown}; got {value!r}")
