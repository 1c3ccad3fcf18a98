"""What a reward is, how one is named, and how its answer is checked.

A reward is a function `(images, prompts) -> rewards`:

  images: [N, H, W, 3] float32 in [0, 1] (videos: [N, T, H, W, 3]), a NumPy
    array that is read-only, as other rewards see the same one; with the
    decorator `takes_pil` a list of N PIL images instead (no videos).
  prompts: list of N strings.
  rewards: N finite real numbers, as anything NumPy can read; higher is better.

It may be a coroutine function (`async def`), e.g. to ask a server: all of them
run in one event loop, so that a client may outlive a call. Others are called
from several threads at once (`config.pipeline.reward_slots`; 1 for functions
that cannot bear it). In a
configuration it is named by a built-in name, "path/to/file.py:function" or
"package.module:function".
"""

import asyncio
import concurrent.futures
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from digen_jax.errors import UserError

BUILT_IN = {
  "shapes": "digen_jax.rewards.shapes:score_shapes",
  "shapes_presence": "digen_jax.rewards.shapes:score_presence",
  "shapes_colour": "digen_jax.rewards.shapes:score_colour",
  "shapes_count": "digen_jax.rewards.shapes:score_count",
  "shapes_position": "digen_jax.rewards.shapes:score_position",
  "jpeg_compressibility": "digen_jax.rewards.jpeg:compressibility",
  "jpeg_incompressibility": "digen_jax.rewards.jpeg:incompressibility",
}


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward function and the name it goes by in messages and metrics."""

  name: str
  function: Callable


def takes_pil(function: Callable) -> Callable:
  """Decorator: the reward wants a list of PIL images, not an array."""
  function.takes_pil = True
  return function


def checks_prompts(check: Callable[[str], object]) -> Callable:
  """Decorator: the reward can read only some prompts.

  Args:
    check: raises `UserError` on a prompt that it cannot; called with every
      prompt of a run before anything is generated.
  """

  def decorate(function: Callable) -> Callable:
    function.check_prompt = check
    return function

  return decorate


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Images in [0, 1] as uint8, clipped and rounded; uint8 stays as it is."""
  if images.dtype == np.uint8:
    return images
  return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def resolve_reward(spec: str | Callable | Reward) -> Reward:
  """Finds the reward that `spec` names; a function stands for itself.

  Raises:
    UserError: unknown name, missing file, module or function, or a file that
      does not import.
  """
  if isinstance(spec, Reward):
    return spec
  if callable(spec):
    return Reward(getattr(spec, "__name__", type(spec).__name__), spec)
  target = BUILT_IN.get(spec, spec)
  source, colon, attribute = target.rpartition(":")
  if not colon:
    near = difflib.get_close_matches(spec, BUILT_IN, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise UserError(
      f'no reward is called "{spec}"{hint} Choose one of '
      f'{", ".join(BUILT_IN)}, or name your own as "path/to/file.py:function"'
    )
  module = _import(source, spec)
  function = getattr(module, attribute, None)
  if not callable(function):
    raise UserError(
      f'reward "{spec}": {source} has no function "{attribute}"; define it, or '
      "mend the name after the colon"
    )
  return Reward(spec, function)


def _import(source: str, spec: str):  # noqa: ANN202
  """Imports a module by file or dotted name."""
  try:
    if not source.endswith(".py"):
      return importlib.import_module(source)
    path = pathlib.Path(source).resolve()
    if not path.is_file():
      raise UserError(
        f'reward "{spec}": file {source} does not exist; mend the path before '
        "the colon"
      )
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"digen_jax_reward_{digest}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # so that dataclasses and pickle find it
    module_spec.loader.exec_module(module)
    return module
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f'reward "{spec}": importing {source} failed with {_describe(error)}; '
      "mend the file or the name"
    ) from error


def score(
  reward: Reward,
  images: np.ndarray,
  prompts: list[str],
  timeout: float = 0.0,
) -> np.ndarray:
  """Runs a reward on N images and checks its answer.

  Args:
    reward: what `resolve_reward` returned.
    images: [N, H, W, 3] or [N, T, H, W, 3], float32 in [0, 1] or uint8; the
      reward sees float32 in [0, 1], or PIL images (`takes_pil`).
    prompts: N strings.
    timeout: seconds after which it is given up; 0 waits for ever.

  Returns:
    [N] float32, finite.

  Raises:
    UserError: the reward raised, or answered with the wrong length, with
      something that is not numbers, or with NaN or infinity, or not in time;
      or it takes PIL images and there are videos.
  """
  if len(images) != len(prompts):
    raise UserError(
      f'reward "{reward.name}" was given {len(images)} images and '
      f"{len(prompts)} prompts: give one prompt per image"
    )

  def call() -> Any:
    answer = reward.function(_as_taken(reward, images), list(prompts))
    return _wait(answer) if inspect.isawaitable(answer) else answer

  try:
    answer = _within(timeout, call) if timeout else call()
  except _TooLate as error:
    raise UserError(
      f'reward "{reward.name}" has not answered for {timeout:g} s on a batch '
      f"of {len(prompts)} samples that starts with prompt {_first(prompts)}: "
      "see whether what it asks is up, or raise config.pipeline.reward_timeout"
    ) from error
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f'reward "{reward.name}" raised {_describe(error)} on a batch of '
      f"{len(prompts)} samples that starts with prompt {_first(prompts)}; mend "
      "the reward function"
    ) from error
  return _checked(answer, reward.name, prompts)


def _as_taken(
  reward: Reward, images: np.ndarray
) -> np.ndarray | list[Image.Image]:
  """Images in the form that a reward takes."""
  images = np.asarray(images)
  if getattr(reward.function, "takes_pil", False):
    if images.ndim != 4:
      raise UserError(
        f'reward "{reward.name}" takes PIL images, and these are videos of '
        f"shape {images.shape}: drop `takes_pil` and read the array"
      )
    return [Image.fromarray(image) for image in to_uint8(images)]
  if images.dtype == np.uint8:
    images = images.astype(np.float32) / 255
  images = images.view()
  images.flags.writeable = False
  return images


def _checked(answer: object, name: str, prompts: list[str]) -> np.ndarray:
  """`answer` as [N] finite float32, or a UserError that says what it is."""
  what = f"{len(prompts)} samples, the first with prompt {_first(prompts)}"
  try:
    values = np.asarray(answer)
    numbers = values.dtype.kind in "fiub" or values.dtype.name == "bfloat16"
  except Exception:  # whatever the user's type raises when asked for an array
    numbers = False
  if not numbers:
    raise UserError(
      f'reward "{name}" returned {type(answer).__name__}, not numbers, for '
      f"{what}; return a list or an array of one float per sample"
    )
  if values.shape != (len(prompts),):
    raise UserError(
      f'reward "{name}" returned shape {values.shape} for {what}; return one '
      f"float per sample, shape ({len(prompts)},)"
    )
  values = values.astype(np.float32)
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    raise UserError(
      f'reward "{name}" returned {values[bad[0]]} for sample {bad[0]}, prompt '
      f'"{prompts[bad[0]]}" ({bad.size} of {len(prompts)} not finite); return a '
      "finite number for every image"
    )
  return values


def _first(prompts: list[str]) -> str:
  return f'"{prompts[0]}"' if prompts else "(none)"


def _describe(error: Exception) -> str:
  """An exception on one line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _wait(awaitable: Any) -> Any:
  """Runs an awaitable to its end in the loop of all rewards."""

  async def main() -> Any:
    return await awaitable

  return asyncio.run_coroutine_threadsafe(main(), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
  """One for the process: a client of `httpx` is bound to the loop it began in."""
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
  return loop


class _TooLate(Exception):
  """A call has not ended in time."""


def _within(seconds: float, call: Callable[[], Any]) -> Any:
  """What `call()` gives; its thread is left behind if that takes longer."""
  answer: concurrent.futures.Future = concurrent.futures.Future()

  def run() -> None:
    try:
      answer.set_result(call())
    except BaseException as error:  # to be raised where it is waited for
      answer.set_exception(error)

  threading.Thread(target=run, name="reward call", daemon=True).start()
  if not concurrent.futures.wait([answer], seconds).done:
    raise _TooLate
  return answer.result()
