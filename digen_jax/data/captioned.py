"""The data of pre-training: drawn scenes with captions that are partly wrong."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digen_jax.data import scenes
from digen_jax.data.scenes import Group, Spec
from digen_jax.rewards.protocol import to_uint8


def corrupt(rng: np.random.Generator, spec: Spec, share: float) -> Spec:
  """Replaces each fact of a caption with probability `share` by a random one.

  Numbers, colours, shapes and the relation are facts. What comes out is never
  a held-out caption.
  """
  while True:
    groups = tuple(
      Group(
        _maybe(rng, share, range(1, scenes.MAX_OBJECTS + 1), group.count),
        _maybe(rng, share, scenes.COLOURS, group.colour),
        _maybe(rng, share, scenes.SHAPES, group.shape),
      )
      for group in spec.groups
    )
    relation = spec.relation
    if relation is not None:
      relation = _maybe(rng, share, scenes.RELATIONS, relation)
    corrupted = Spec(groups, relation)
    if not scenes.held_out(scenes.caption(corrupted)):
      return corrupted


def _maybe(
  rng: np.random.Generator, share: float, choices: Iterable, value: Any
) -> Any:
  """A random choice with probability `share`, else `value`."""
  if rng.random() >= share:
    return value
  choices = list(choices)
  return choices[rng.integers(len(choices))]


def draw_scenes(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
  """Random training scenes: images [N, SIZE, SIZE, 3] uint8, and captions.

  Args:
    seed: of everything random.
    count: N scenes.
  """
  rng = np.random.default_rng(seed)
  images = np.empty((count, scenes.SIZE, scenes.SIZE, 3), np.uint8)
  captions = []
  for i in range(count):
    scene = scenes.sample_scene(rng)
    images[i] = to_uint8(scenes.render(scene))
    captions.append(scene.caption)
  return images, captions


def corrupt_captions(
  seed: int, captions: Sequence[str], share: float, variants: int
) -> list[list[str]]:
  """`variants` versions of every caption, corrupted independently.

  Args:
    seed: of what is replaced.
    captions: N texts.
    share: of the facts that are replaced, see `corrupt`.
    variants: versions of each.
  """
  rng = np.random.default_rng(seed)
  return [
    [scenes.caption(corrupt(rng, spec, share)) for _ in range(variants)]
    for spec in map(scenes.parse_caption, captions)
  ]


def tokenize(
  directory: str | Path, captions: Sequence[Sequence[str]], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Token ids of N x V captions for CLIP and for T5: [N, V, T] int32 each.

  Args:
    directory: holds `tokenizer` and `tokenizer_2`.
    captions: N lists of V texts.
    max_length: T.
  """
  import transformers

  texts, index = np.unique(np.asarray(captions), return_inverse=True)
  ids = []
  for name, cls in (
    ("tokenizer", transformers.CLIPTokenizer),
    ("tokenizer_2", transformers.T5TokenizerFast),
  ):
    tokenizer = cls.from_pretrained(Path(directory) / name)
    tokens = tokenizer(
      texts.tolist(),
      padding="max_length",
      max_length=max_length,
      truncation=True,
    )
    ids.append(np.asarray(tokens["input_ids"], np.int32)[index])
  clip_ids, t5_ids = ids
  return clip_ids, t5_ids
