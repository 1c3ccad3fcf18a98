"""What the launch scripts beside train.py do: sample, evaluate, export."""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from digen_jax import media
from digen_jax.assemble import (
  Assembly,
  embedder,
  negative_conditioning,
  with_guidance,
)
from digen_jax.data.embeddings import match_text
from digen_jax.data.prompts import read_prompts
from digen_jax.data.recorded import Recorded, read_recorded
from digen_jax.errors import UserError
from digen_jax.evaluation import Evaluated, evaluate
from digen_jax.grpo.train_step import join
from digen_jax.metrics import pace_reporter
from digen_jax.models.published import recognise
from digen_jax.npz import read_npz
from digen_jax.policy import denoise as denoise_with
from digen_jax.policy import still
from digen_jax.rewards.compose import compose, parse
from digen_jax.runs import (
  check_policy,
  is_run,
  open_policy,
  read_config,
  read_trained,
)
from digen_jax.types import Conditioning
from digen_jax.weights.adapters import (
  FILE,
  merge_pipeline,
  save_adapters,
  train_settings,
)
from digen_jax.weights.export import check_fresh, export_pipeline
from digen_jax.weights.load import read_json
from digen_jax.weights.parity import Comparison, compare

GRID = 64  # samples the overview picture shows at most
# How far latents, and pictures in [0, 1], may be off recorded ones.
LATENTS_WITHIN, IMAGES_WITHIN = 1e-4, 1e-3


def sample_prompts(
  checkpoint: str | Path,
  prompts: str | Path,
  out: str | Path,
  *,
  overrides: Mapping[str, Mapping[str, Any]],
  seed: int,
  samples_per_prompt: int,
  lora: str | Path | None = None,
) -> int:
  """Writes a picture or video per sample, `grid.png` and `samples.jsonl`.

  Each is written as soon as its batch is made, with a line of `samples.jsonl`.

  Args:
    checkpoint: pipeline directory, or run.
    prompts: prompt file.
    out: directory, made if missing.
    overrides: config section -> field -> value.
    seed: of the noise.
    samples_per_prompt: pictures of each prompt.
    lora: LoRA file to sample a pipeline with.

  Returns:
    How many pictures were written.

  Raises:
    UserError: bad input.
  """
  texts = read_prompts(prompts)
  overrides = _with_lora(checkpoint, overrides, lora)
  plan = _check(checkpoint, overrides)
  out = _directory(out)
  if not is_run(checkpoint):
    _say_settings(plan)
  distinct = list(dict.fromkeys(texts))
  place = {text: row for row, text in enumerate(distinct)}
  texts = [text for text in texts for _ in range(samples_per_prompt)]
  # Before the denoiser is read: text encoders need not fit beside it.
  conditioning, negative = _encode(plan, distinct)
  policy = open_policy(checkpoint, overrides)
  batches = policy.sampler().batches(
    policy.trainable,
    conditioning,
    negative,
    seed,
    rows=np.array([place[text] for text in texts]),
  )
  samples = itertools.chain.from_iterable(batches)
  _write_samples(out, samples, texts, seed, plan.config.eval.fps)
  return len(texts)


def _write_samples(
  out: Path,
  samples: Iterable[np.ndarray],
  texts: Sequence[str],
  seed: int,
  fps: int,
) -> None:
  """Writes what comes, as it comes; see `sample_prompts`."""
  shown: list[np.ndarray] = []
  report = pace_reporter("samples")
  with open(out / "samples.jsonl", "w", encoding="utf-8") as lines:
    for i, (text, image) in enumerate(zip(texts, samples, strict=True)):
      slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
      file = _save(out / f"{i:05d}-{slug}", image, fps)
      row = {"file": file, "prompt": text, "seed": seed, "index": i}
      lines.write(json.dumps(row) + "\n")
      lines.flush()
      if i < GRID:
        shown += media.to_uint8([image])  # of a video, a few frames
      report(i + 1, len(texts))
  media.image_grid(shown, labels=texts[:GRID]).save(out / "grid.png")


def _with_lora(
  checkpoint: str | Path,
  overrides: Mapping[str, Mapping[str, Any]],
  lora: str | Path | None,
) -> Mapping[str, Mapping[str, Any]]:
  """Overrides with which a pipeline has the adapters of a file."""
  if not lora:
    return overrides
  if is_run(checkpoint):
    raise UserError(
      f"--lora={lora} goes with a pipeline directory, and {checkpoint} is a "
      "run: name the pipeline that the adapters were made for"
    )
  return {**overrides, "train": train_settings(lora, checkpoint)}


def _check(
  checkpoint: str | Path, overrides: Mapping[str, Mapping[str, Any]]
) -> Assembly:
  """A policy without weights, whose samples can be written."""
  plan = check_policy(checkpoint, overrides)
  if plan.config.sampling.num_frames > 1:
    media.check_video_writer()
  return plan


def _say_settings(plan: Assembly) -> None:
  """Prints how a published model is sampled: its name is guessed by sizes."""
  name, sampling = recognise(plan.model.config), plan.config.sampling
  if name is None:
    return
  guidance = (
    sampling.embedded_guidance
    if getattr(plan.model.config, "guidance_embeds", False)
    else sampling.guidance_scale
  )
  frames = f"{sampling.num_frames} frames of " * (sampling.num_frames > 1)
  print(
    f"sampled as {name}: {plan.config.eval.num_steps} steps, guidance "
    f"{guidance:g}, {frames}{sampling.width}x{sampling.height}; flags change it"
  )


def _encode(
  assembly: Assembly, texts: list[str]
) -> tuple[Conditioning, Conditioning | None]:
  """Prompts and negative prompt, by text encoders that are read once."""
  embed = embedder(assembly)
  return embed(texts), negative_conditioning(assembly, embed)


def _save(path: Path, image: np.ndarray, fps: int) -> str:
  """Writes a picture or a video; the name of the file."""
  if image.ndim == 4:
    path = path.with_name(path.name + ".mp4")
    media.save_video(path, image, fps)
  else:
    path = path.with_name(path.name + ".png")
    media.save_image(path, Image.fromarray(image))
  return path.name


def sample_recorded(
  checkpoint: str | Path,
  inputs: str | Path,
  out: str | Path,
  *,
  overrides: Mapping[str, Mapping[str, Any]],
  lora: str | Path | None = None,
) -> int:
  """Samples from recorded noise and embeddings, and records every step.

  Writes the pictures and `trajectory.npz`: `latents_after_step` [n, ...] in
  the layout of the inputs, `image` [B, ...] float32 in [0, 1].

  Args:
    checkpoint: pipeline directory, or run.
    inputs: see `data.recorded`.
    out: directory, made if missing.
    overrides: config section -> field -> value.
    lora: LoRA file to sample a pipeline with.

  Returns:
    How many pictures were written.

  Raises:
    UserError: bad input.
  """
  overrides = _with_lora(checkpoint, overrides, lora)
  plan = _check(checkpoint, overrides)
  recorded = _recorded(inputs, plan)
  out = _directory(out)
  steps, images = _again(checkpoint, overrides, *recorded)
  np.savez(out / "trajectory.npz", latents_after_step=steps, image=images)
  for i, image in enumerate(np.round(still(images) * 255).astype(np.uint8)):
    _save(out / f"{i:05d}", image, plan.config.eval.fps)
  return len(images)


def check_recorded(directory: str | Path) -> list[Comparison]:
  """Compares a recorded run of a pipeline with ours, step by step.

  Args:
    directory: has `pipeline/`, `trajectory.npz` (what `sample_recorded` takes,
      and diffusers' `latents_after_step` and `image`) and `meta.json` with
      height, width, num_inference_steps and the other arguments of the call,
      `call_kwargs`.

  Returns:
    The latents after every step, and the pictures.

  Raises:
    UserError: bad input.
  """
  directory = Path(directory)
  checkpoint, file = directory / "pipeline", directory / "trajectory.npz"
  overrides = _as_called(read_json(directory / "meta.json"), checkpoint)
  wanted = read_npz(file)
  if missing := {"latents_after_step", "image"} - set(wanted):
    raise UserError(
      f"{file} lacks {', '.join(sorted(missing))} to compare with"
    )
  plan = _check(checkpoint, overrides)
  steps, images = _again(checkpoint, overrides, *_recorded(file, plan))
  results = {
    f"latents after step {i + 1}": (step, theirs, LATENTS_WITHIN)
    for i, (step, theirs) in enumerate(
      itertools.zip_longest(steps, wanted["latents_after_step"])
    )
  }
  results["image"] = (still(images), wanted["image"], IMAGES_WITHIN)
  return [
    compare(name, np.asarray(ours), np.asarray(theirs), within)
    for name, (ours, theirs, within) in results.items()
  ]


def _as_called(meta: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
  """Overrides that ask for what a diffusers pipeline was called with."""
  transformer = read_json(checkpoint / "transformer" / "config.json")
  for name in ("height", "width", "num_inference_steps"):
    if not isinstance(meta.get(name), int):
      raise UserError(
        f"{checkpoint.parent}/meta.json has no {name}, a number: it has to say "
        "what the pipeline was called with"
      )
  sizes = {name: meta[name] for name in ("height", "width")}
  called = {
    k: v for k, v in meta.get("call_kwargs", {}).items() if v is not None
  }
  if "num_frames" in called:
    sizes["num_frames"] = called["num_frames"]
  # To these models diffusers gives its guidance_scale as an input; a second
  # pass has a scale of its own.
  told = "guidance_scale"
  if "guidance_embeds" in transformer:
    told, sizes["guidance_scale"] = "embedded_guidance", 1.0
  for theirs, ours in (
    ("guidance_scale", told),
    ("true_cfg_scale", "guidance_scale"),
  ):
    if theirs in called:
      scale = called[theirs]  # a second pass at 1 or less is none, to diffusers
      sizes[ours] = scale if ours != "guidance_scale" else max(scale, 1.0)
  return {
    "sampling": sizes,
    "eval": {"num_steps": meta["num_inference_steps"]},
    "dtype": {"compute": "float32"},
  }


def _recorded(
  inputs: str | Path, plan: Assembly
) -> tuple[Recorded, Conditioning, Conditioning | None]:
  """Recorded inputs, and the conditioning of both passes."""
  config = plan.config
  recorded = read_recorded(inputs, plan.recipe.latent_shape)
  prompts, negative = (
    None if c is None else with_guidance(config, plan.model, c)
    for c in match_text(
      recorded.prompts,
      recorded.negative,
      masked=plan.model.family.masks_text,
    )
  )
  if config.sampling.guidance_scale == 1.0:
    negative = None
  elif negative is None:
    raise UserError(
      f"{inputs} has no negative_prompt_embeds, which a guidance scale of "
      f"{config.sampling.guidance_scale} needs: add them, or set it to 1"
    )
  return recorded, prompts, negative


def _again(
  checkpoint: str | Path,
  overrides: Mapping[str, Mapping[str, Any]],
  recorded: Recorded,
  prompts: Conditioning,
  negative: Conditioning | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Latents [n, ...] in the layout of recorded inputs, and images [B, ...]."""
  policy = open_policy(checkpoint, overrides)
  recipe = policy.assembly.recipe
  with jax.default_matmul_precision("highest"):
    denoise = jax.jit(functools.partial(denoise_with, recipe, record=True))
    states = denoise(
      join(policy.trainable, policy.assembly.weights.frozen),
      recorded.latents,
      prompts,
      negative,
    )
    decoder = policy.assembly.weights.decoder
    images = np.asarray(jax.jit(recipe.decode)(decoder, states[-1]))
  return recorded.theirs(np.asarray(states)), images


def evaluate_run(
  run: str | Path,
  prompts: str | Path,
  out: str | Path | None,
  num_steps: int | None,
) -> tuple[Evaluated, Evaluated]:
  """Base and trained policy on the same prompts and noise.

  Writes `evaluation.json` and `before_after.png`.

  Args:
    run: directory of the run.
    prompts: prompt file.
    out: directory for the results; None means `run`/evaluation.
    num_steps: denoising steps; None means what the run used.

  Returns:
    Base and trained.

  Raises:
    UserError: bad input.
  """
  texts = read_prompts(prompts)
  config = read_config(run)
  reward = compose(parse(config.reward), config.pipeline.reward_timeout)
  reward.check(texts)
  steps = {} if num_steps is None else {"num_steps": num_steps}
  plan = check_policy(run, {"eval": steps})
  out = _directory(out or Path(run) / "evaluation")
  conditioning, negative = _encode(plan, texts)
  policy = open_policy(run, {"eval": steps})
  sampler = policy.sampler()
  base, trained = (
    evaluate(
      functools.partial(sampler, params),
      texts,
      conditioning,
      negative,
      reward.score,
      step,
    )
    for params, step in ((policy.base, 0), (policy.trainable, policy.step))
  )
  result = {
    "base": base.row(),
    "trained": trained.row(),
    "samples": [
      {"prompt": text, "base": float(b), "trained": float(t)}
      for text, b, t in zip(texts, base.rewards, trained.rewards)
    ],
  }
  (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
  media.before_after(
    base.images[:GRID],
    trained.images[:GRID],
    texts[:GRID],
    (base.rewards[:GRID], trained.rewards[:GRID]),
  ).save(out / "before_after.png")
  return base, trained


def export_run(
  run: str | Path, out: str | Path, form: str | None = None
) -> str:
  """Writes a run's policy for diffusers.

  Args:
    run: directory of the run.
    out: directory to write; must not exist or be empty.
    form: "lora", the adapters as one file; "pipeline", a whole pipeline, with
      adapters folded in (in the dtypes of the checkpoint that they adapt; if
      every parameter was trained, in float32); None, "lora" where adapters
      were trained.

  Returns:
    What was written and how diffusers loads it, one line.

  Raises:
    UserError: not a run, `out` is taken, or there are no adapters.
  """
  config = read_config(run)
  adapted = config.train.lora_rank > 0
  form = form or ("lora" if adapted else "pipeline")
  if form == "lora" and not adapted:
    raise UserError(
      f"{run} trained every parameter, so it has no LoRA adapters: use "
      "--format=pipeline"
    )
  check_fresh(out)
  model, alpha = read_trained(run), config.train.lora_alpha
  if form == "lora":
    name = model.family.class_name
    count = save_adapters(out, model.params, name, alpha=alpha)
    return (
      f"wrote {Path(out) / FILE}, adapters of {count} layers; in diffusers: "
      f"pipe.load_lora_weights({str(out)!r})"
    )
  if adapted:
    merge_pipeline(config.checkpoint, out, model.params, alpha=alpha)
  else:
    export_pipeline(config.checkpoint, out, model.params)
  return (
    f"wrote {out}; in diffusers: "
    f"DiffusionPipeline.from_pretrained({str(out)!r})"
  )


def table(base: Evaluated, trained: Evaluated) -> str:
  """Rewards side by side, with the standard error of the difference."""
  difference = trained.rewards - base.rewards
  error = difference.std() / np.sqrt(len(difference))
  lines = [f"{'reward':24s} {'base':>8s} {'trained':>8s} {'change':>8s}"]
  rows = {"total": (base.rewards, trained.rewards)} | {
    name: (values, trained.parts[name]) for name, values in base.parts.items()
  }
  for name, (before, after) in rows.items():
    before, after = before.mean(), after.mean()
    lines.append(
      f"{name:24s} {before:8.3f} {after:8.3f} {after - before:+8.3f}"
    )
  lines.append(
    f"{len(difference)} prompts, same noise; standard error of the change "
    f"{error:.3f}; better on {(difference > 0).mean():.0%}, worse on "
    f"{(difference < 0).mean():.0%}"
  )
  return "\n".join(lines)


def _directory(path: str | Path) -> Path:
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise UserError(f"--out={path} is a file; name a directory")
  path.mkdir(parents=True, exist_ok=True)
  return path
