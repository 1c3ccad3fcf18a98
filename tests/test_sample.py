"""launch/sample.py: its flags, its encoders, recorded inputs with adapters."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from digen_jax import assemble, assets, jobs, media, runs
from digen_jax.data.prompt_encoder import PromptEncoder
from digen_jax.errors import UserError
from digen_jax.models import lora, published
from digen_jax.sampler import Sampler
from digen_jax.weights import load
from digen_jax.weights.adapters import save_adapters
from tests.references import normal

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parents[1]
FLUX = assets.path("tiny_flux")
SMALL = {"sampling": {"height": 16, "width": 16}, "eval": {"num_steps": 2}}
SCRIPT = """
import json
from digen_jax import jobs
from digen_jax.launching import run_main
from launch import sample

def show(*args, **options):
  print(json.dumps(options))
  return 0

jobs.sample_prompts = jobs.sample_recorded = show
run_main(sample.main)
"""


def options(*flags):
  """What the script hands to `jobs`, or its line of error."""
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, "--checkpoint=c", "--out=o", *flags],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  if done.returncode:
    return done.stderr
  return json.loads(done.stdout.splitlines()[0])


def test_what_no_flag_says_is_left_to_the_run():
  found = options("--prompts=p")
  assert found["overrides"]["eval"] == {}
  assert found["seed"] == 0


def test_flags_reach_both_ways_of_sampling():
  found = options(
    "--inputs=i",
    "--num_steps=7",
    "--fps=3",
    "--batch_size=2",
    "--lora=f",
    "--vae_tiling=128",
  )
  assert found["overrides"]["vae"] == {"tiling": 128}
  assert found["overrides"]["eval"] == {
    "num_steps": 7,
    "fps": 3,
    "batch_size": 2,
  }
  assert found["lora"] == "f"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_of_32_bits(seed):
  line = options("--prompts=p", f"--seed={seed}")
  assert line.startswith("error: ") and "--seed" in line
  assert len(line.splitlines()) == 1


def test_overrides_are_checked(tmp_path):
  (tmp_path / "p.txt").write_text("a red circle\n")
  with pytest.raises(UserError, match=r"eval\.num_steps must be at least 1"):
    jobs.sample_prompts(
      FLUX,
      tmp_path / "p.txt",
      tmp_path / "out",
      overrides={"eval": {"num_steps": 0}},
      seed=0,
      samples_per_prompt=1,
    )


def test_text_encoders_are_read_once_and_before_the_denoiser(
  tmp_path, monkeypatch, capsys
):
  opened = []

  def note(name):
    real = getattr(assemble, name)

    def call(*args, **options):
      opened.append(name)
      return real(*args, **options)

    monkeypatch.setattr(assemble, name, call)

  note("load_prompt_encoder")
  note("load_model")
  sizes = dataclasses.asdict(load.load_abstract(FLUX).config)
  known = dataclasses.replace(
    published.MODELS["flux-dev"],
    sizes={k: v for k, v in sizes.items() if k not in ("dtype", "remat")},
  )
  monkeypatch.setitem(published.MODELS, "small", known)
  (tmp_path / "p.txt").write_text("a red circle\n")
  jobs.sample_prompts(
    FLUX,
    tmp_path / "p.txt",
    tmp_path / "out",
    overrides=SMALL | {"sampling": SMALL["sampling"] | {"guidance_scale": 2.0}},
    seed=0,
    samples_per_prompt=1,
  )
  assert opened == ["load_prompt_encoder", "load_model"]
  said = "sampled as small: 2 steps, guidance 2, 16x16; flags change it\n"
  assert capsys.readouterr().out == said


def test_samples_are_written_as_they_come(tmp_path, monkeypatch):
  prompts, out = ["a red circle", "two squares"], tmp_path / "out"
  (tmp_path / "p.txt").write_text("\n".join([*prompts, prompts[0]]))
  events, encoded, shown = [], [], []
  encode, save, grid = PromptEncoder.encode, jobs._save, media.image_grid
  batches = Sampler.batches

  def note_prompts(self, prompts):
    encoded.append(prompts)
    return encode(self, prompts)

  def note_batches(self, *args, rows):
    assert rows.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    for batch in batches(self, *args, rows=rows):
      events.append("batch")
      yield batch

  def note_file(path, image, fps):
    lines = (out / "samples.jsonl").read_text().splitlines()
    events.append(len(lines))  # those of all before it
    return save(path, image, fps)

  def note_grid(images, labels):
    shown.append(len(images))
    return grid(images, labels=labels)

  monkeypatch.setattr(PromptEncoder, "encode", note_prompts)
  monkeypatch.setattr(Sampler, "batches", note_batches)
  monkeypatch.setattr(jobs, "_save", note_file)
  monkeypatch.setattr(jobs, "GRID", 3)
  monkeypatch.setattr(media, "image_grid", note_grid)
  count = jobs.sample_prompts(
    FLUX,
    tmp_path / "p.txt",
    out,
    overrides=SMALL,
    seed=3,
    samples_per_prompt=4,
  )
  assert count == 12 and encoded == [prompts] and shown == [3]
  assert events == ["batch", *range(8), "batch", *range(8, 12)]
  rows = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
  files = sorted(path.name for path in out.glob("0*.png"))
  assert [row["file"] for row in rows] == files
  found = np.stack([np.asarray(Image.open(out / file)) for file in files])
  assert len(np.unique(found, axis=0)) == 12
  assert (out / "grid.png").exists()


def test_only_training_adds_to_a_set_of_embeddings(tmp_path):
  folder = tmp_path / "set"

  def embedder(dtype, keep=None):
    plan = runs.check_policy(FLUX, SMALL | {"dtype": {"compute": dtype}})
    config = dataclasses.replace(plan.config, embeddings=str(folder))
    return assemble.embedder(dataclasses.replace(plan, config=config), keep)

  embedder("float32", tmp_path / "run")(["a red circle"])
  before = {f: f.read_bytes() for f in folder.iterdir()}
  assert len(before) == 2
  for dtype in ("float32", "bfloat16"):  # the set is in float32
    found = embedder(dtype)(["a red circle", "two squares"])
    assert found.text.dtype == dtype
  assert {f: f.read_bytes() for f in folder.iterdir()} == before
  assert not (tmp_path / "run").exists()


def recorded_inputs(model):
  vae = load.load_abstract_autoencoder(FLUX).config
  side = 16 // vae.downscale
  return dict(
    latents=normal(0, 1, vae.latent_channels, side, side),
    prompt_embeds=normal(1, 1, 5, model.config.joint_attention_dim),
    pooled_prompt_embeds=normal(2, 1, model.config.pooled_projection_dim),
  )


def test_a_recorded_run_is_compared_step_by_step(tmp_path):
  inputs = recorded_inputs(load.load_model(FLUX))
  file = tmp_path / "trajectory.npz"
  np.savez(file, **inputs)
  (tmp_path / "pipeline").symlink_to(FLUX)
  called = {"guidance_scale": 2.0, "true_cfg_scale": 1.0}
  meta = dict(height=16, width=16, num_inference_steps=3, call_kwargs=called)
  (tmp_path / "meta.json").write_text(json.dumps(meta))
  with pytest.raises(UserError, match="lacks image, latents_after_step"):
    jobs.check_recorded(tmp_path)
  (tmp_path / "meta.json").write_text(json.dumps(meta | {"height": None}))
  with pytest.raises(UserError, match=r"meta\.json has no height, a number"):
    jobs.check_recorded(tmp_path)
  (tmp_path / "meta.json").write_text(json.dumps(meta))
  sampling = dict(height=16, width=16, embedded_guidance=2.0)
  overrides = {"sampling": sampling, "eval": {"num_steps": 3}}
  jobs.sample_recorded(FLUX, file, tmp_path / "out", overrides=overrides)
  found = dict(np.load(tmp_path / "out" / "trajectory.npz"))
  found["latents_after_step"][1] += 2e-4
  found["image"] = found["image"] + 2e-4
  np.savez(file, **inputs, **found)
  results = jobs.check_recorded(tmp_path)
  assert [r.output for r in results if not r.passed] == ["latents after step 2"]
  assert len(results) == 4
  # Steps that only one side has are no match.
  found["latents_after_step"] = found["latents_after_step"][:2]
  np.savez(file, **inputs, **found)
  assert not jobs.check_recorded(tmp_path)[2].passed


def test_recorded_inputs_with_adapters(tmp_path):
  model = load.load_model(FLUX)
  np.savez(tmp_path / "in.npz", **recorded_inputs(model))
  adapted = lora.adapt(
    model, rank=2, alpha=2.0, targets=("attn",), key=jax.random.key(0)
  )
  params = jax.tree.map_with_path(
    lambda path, x: jnp.ones_like(x) if path[-1].key == "lora_b" else x,
    adapted.params,
  )
  save_adapters(tmp_path / "lora", params, model.family.class_name, alpha=2.0)
  found = []
  for name, file in (("plain", None), ("adapted", tmp_path / "lora")):
    out = tmp_path / name
    jobs.sample_recorded(
      FLUX, tmp_path / "in.npz", out, overrides=SMALL, lora=file
    )
    found.append(np.load(out / "trajectory.npz")["latents_after_step"])
  assert np.abs(found[0] - found[1]).max() > 1e-3
