"""Comparing a loaded module with recorded outputs of its reference.

A case is a diffusers module directory with `inputs.npz` (named as the forward
arguments of the reference), `outputs.npz`, and optionally `meta.json` with
the reference's own noise floors. Arrays are in the reference's layout (NCHW,
NCFHW). Outputs of tiled execution are of tiles of 32 pixels, 24 apart.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import vae
from digen_jax.models.layers import Params
from digen_jax.npz import read_npz
from digen_jax.weights import load

FLOOR = 2e-5
NOISE_FACTOR = 8.0
TIME_TABLE_FACTOR = 2.0
TILING = vae.Tiling(size=32, stride=24)

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One output against its reference.

  Attributes:
    output: its name.
    max_abs: largest absolute difference; infinite if the shapes differ.
    relative: norm of the difference over the norm of the reference.
    tolerance: on `max_abs`.
  """

  output: str
  max_abs: float
  relative: float
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether the output is within tolerance (NaN is not)."""
    return self.max_abs <= self.tolerance


def check_case(directory: str | Path) -> list[Comparison]:
  """Runs every recorded output that the module has a method for.

  What we have no method for is left out. Matrix products run in full float32
  on every device.

  Args:
    directory: the case.

  Raises:
    UserError: no such case, an input it lacks, or nothing to compare.
  """
  directory = Path(directory)
  config = load.read_json(
    load.module_directory(directory, "transformer") / "config.json"
  )
  inputs, outputs = (
    read_npz(directory / f"{name}.npz") for name in ("inputs", "outputs")
  )
  meta = directory / "meta.json"
  meta = load.read_json(meta) if meta.exists() else {}
  class_name = config.get("_class_name")
  if class_name not in RUNNERS:
    raise UserError(
      f"{directory} holds a {class_name}; what can be compared is "
      f"{', '.join(RUNNERS)}"
    )
  with jax.default_matmul_precision("highest"):
    results = RUNNERS[class_name](directory, inputs, outputs)
    compared = [
      compare(name, np.asarray(result), outputs[name], tolerance(name, meta))
      for name, result in results
    ]
  if not compared:
    raise UserError(
      f"{directory}/outputs.npz has nothing to compare: {', '.join(outputs)}"
    )
  return compared


def tolerance(output: str, meta: dict) -> float:
  """How far an output may be off, from the reference's own noise.

  The largest of a floor, 8 x the reference's float32-to-float64 difference,
  and the floor + 2 x what one unit in the last place of the sinusoidal time
  table changes.
  """
  noise = meta.get("fp32_vs_fp64", {}).get(output, {}).get("max_abs", 0.0)
  table = meta.get("time_table_ulp_sens", {}).get(output, 0.0)
  return max(FLOOR, NOISE_FACTOR * noise, FLOOR + TIME_TABLE_FACTOR * table)


def compare(
  name: str, result: np.ndarray, reference: np.ndarray, within: float
) -> Comparison:
  """An array and what it should be, of any shapes; `within` as tolerance."""
  if result.shape != reference.shape:
    return Comparison(name, np.inf, np.inf, within)
  difference = result.astype(np.float64) - reference.astype(np.float64)
  norm = np.linalg.norm(reference.ravel().astype(np.float64))
  return Comparison(
    output=name,
    max_abs=float(np.abs(difference).max()),
    relative=float(np.linalg.norm(difference.ravel()) / (norm + 1e-30)),
    tolerance=within,
  )


def _run_flux(
  directory: Path, inputs: Arrays, outputs: Arrays
) -> list[tuple[str, jax.Array]]:
  del outputs  # a denoiser has the one
  model = load.load_model(directory)
  # Positions are not traced: the rotation table is built in float64.
  ids = {key: _get(inputs, key, directory) for key in ("img_ids", "txt_ids")}
  ids = {key: x[0] if x.ndim == 3 else x for key, x in ids.items()}

  @jax.jit
  def run(params: Params, *args: jax.Array, **kwargs: jax.Array) -> jax.Array:
    return nnx.merge(model.graphdef, params)(*args, **ids, **kwargs)

  arguments = [
    _get(inputs, key, directory)
    for key in (
      "hidden_states",
      "encoder_hidden_states",
      "pooled_projections",
      "timestep",
    )
  ]
  guidance = {k: v for k, v in inputs.items() if k == "guidance"}
  return [("sample", run(model.params, *arguments, **guidance))]


def _run_qwen_image(
  directory: Path, inputs: Arrays, outputs: Arrays
) -> list[tuple[str, jax.Array]]:
  del outputs  # a denoiser has the one
  model = load.load_model(directory)
  img_shape = tuple(map(int, _get(inputs, "img_shape", directory)))
  mask = inputs.get("encoder_hidden_states_mask")

  @jax.jit
  def run(params: Params, *args: jax.Array | None) -> jax.Array:
    return nnx.merge(model.graphdef, params)(*args, img_shape)

  sample = run(
    model.params,
    _get(inputs, "hidden_states", directory),
    _get(inputs, "encoder_hidden_states", directory),
    None if mask is None else mask.astype(bool),
    _get(inputs, "timestep", directory),
  )
  return [("sample", sample)]


def _run_sd3(
  directory: Path, inputs: Arrays, outputs: Arrays
) -> list[tuple[str, jax.Array]]:
  del outputs  # a denoiser has the one
  model = load.load_model(directory)

  @jax.jit
  def run(params: Params, *args: jax.Array) -> jax.Array:
    return nnx.merge(model.graphdef, params)(*args)

  sample = run(
    model.params,
    _get(inputs, "hidden_states", directory).transpose(0, 2, 3, 1),
    _get(inputs, "encoder_hidden_states", directory),
    _get(inputs, "pooled_projections", directory),
    _get(inputs, "timestep", directory),
  )
  return [("sample", sample.transpose(0, 3, 1, 2))]


def _run_wan(
  directory: Path, inputs: Arrays, outputs: Arrays
) -> list[tuple[str, jax.Array]]:
  del outputs  # a denoiser has the one
  return _run_video(
    directory,
    _get(inputs, "hidden_states", directory),
    _get(inputs, "timestep", directory).astype(np.float32),
    _get(inputs, "encoder_hidden_states", directory),
  )


def _run_hunyuan_video(
  directory: Path, inputs: Arrays, outputs: Arrays
) -> list[tuple[str, jax.Array]]:
  del outputs  # a denoiser has the one
  return _run_video(
    directory,
    _get(inputs, "hidden_states", directory),
    _get(inputs, "timestep", directory).astype(np.float32),
    _get(inputs, "encoder_hidden_states", directory),
    _get(inputs, "encoder_attention_mask", directory).astype(bool),
    _get(inputs, "pooled_projections", directory),
    inputs.get("guidance"),
  )


def _run_video(
  directory: Path, latents: np.ndarray, *args: np.ndarray | None
) -> list[tuple[str, jax.Array]]:
  """A denoiser on latents [B, c, f, h, w]."""
  model = load.load_model(directory)

  @jax.jit
  def run(params: Params, *args: jax.Array | None) -> jax.Array:
    return nnx.merge(model.graphdef, params)(*args)

  sample = run(model.params, latents.transpose(0, 2, 3, 4, 1), *args)
  return [("sample", sample.transpose(0, 4, 1, 2, 3))]


def _run_autoencoder(
  directory: Path, inputs: Arrays, outputs: Arrays
) -> list[tuple[str, jax.Array]]:
  """Outputs are `method[.part][:variant]`; a variant is an input, or tiled."""
  whole, tiled = (
    load.load_autoencoder(directory, tiling=tiling) for tiling in (None, TILING)
  )

  @functools.cache
  def run(
    model: vae.Autoencoder, method: str, key: str
  ) -> dict[str, jax.Array]:
    x = np.moveaxis(_get(inputs, key, directory), 1, -1)
    results = jax.jit(AUTOENCODER_METHODS[method], static_argnums=0)(
      model.graphdef, model.params, x
    )
    return {name: jnp.moveaxis(y, -1, 1) for name, y in results.items()}

  results = []
  for output in outputs:
    name, _, variant = output.partition(":")
    method = name.partition(".")[0]
    if method in AUTOENCODER_METHODS:
      model = tiled if variant == "tiled" else whole
      key = "z" if method == "decode" else "sample"
      if variant not in ("", "tiled"):
        key = variant
      if name in (found := run(model, method, key)):
        results.append((output, found[name]))
  return results


def _encode(
  graphdef: nnx.GraphDef, params: Params, pixels: jax.Array
) -> dict[str, jax.Array]:
  module = nnx.merge(graphdef, params)
  mean, logvar = module.encode(pixels)
  return {
    "encode.parameters": module.moments(pixels),
    "encode.mean": mean,
    "encode.logvar": logvar,
    "encode.std": jnp.exp(logvar / 2),
  }


def _decode(
  graphdef: nnx.GraphDef, params: Params, z: jax.Array
) -> dict[str, jax.Array]:
  return {"decode": nnx.merge(graphdef, params).decode(z)}


def _reconstruct(
  graphdef: nnx.GraphDef, params: Params, pixels: jax.Array
) -> dict[str, jax.Array]:
  module = nnx.merge(graphdef, params)
  return {"forward_mode": module.decode(module.encode(pixels)[0])}


AUTOENCODER_METHODS = {
  "encode": _encode,
  "decode": _decode,
  "forward_mode": _reconstruct,
}

# Reference class -> run(directory, inputs, outputs) -> (output, ours) pairs.
RUNNERS = {
  "FluxTransformer2DModel": _run_flux,
  "QwenImageTransformer2DModel": _run_qwen_image,
  "SD3Transformer2DModel": _run_sd3,
  "WanTransformer3DModel": _run_wan,
  "HunyuanVideoTransformer3DModel": _run_hunyuan_video,
} | dict.fromkeys(vae.FAMILIES, _run_autoencoder)


def _get(inputs: Arrays, key: str, directory: Path) -> np.ndarray:
  if key not in inputs:
    raise UserError(
      f"{directory}/inputs.npz lacks {key!r}; it has {', '.join(inputs)}"
    )
  return inputs[key]
