"""Rule reward on coloured shapes: reads the pixels, never the labels.

Pixels are quantised to 8 bits and given to the paint that covers them most;
connected components of painted pixels are objects; their shape follows from
their extent and the share of it they fill (a circle pi/4, a square 1, a
triangle 1/2), both measured with the partial coverage of edge pixels. What is
found is compared with what the prompt asks
(`digen_jax.data.scenes.parse_caption`). All decisions are thresholds on 8-bit
pixels, so rewards are discrete levels and float noise does not move them.

Every score is in [0, 1]. `score_shapes` combines the others and charges for
objects nobody asked for, without which drawing one of everything would pay.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from digen_jax.data import scenes
from digen_jax.data.scenes import Spec
from digen_jax.errors import UserError
from digen_jax.rewards.protocol import checks_prompts, to_uint8

STRAY_COST = 0.25  # off the total for each object beyond the number asked for

# Areas in pixels of a 32 x 32 picture; scenes draw between 40 and 100.
_SPECK = 6  # smaller: noise, not an object
_AREA = (25, 150)  # outside: an object, but of no clear shape
_ELONGATED = 1.5  # extents more unequal: no clear shape
_FILL = (0.68, 0.885)  # below: triangle, between: circle, above: square
_PURE = 0.75  # least share of an object's pixels in its main colour
_COVERED = 0.5  # least coverage of a painted pixel
_FULL_POSITION = 4.0  # pixels apart along the asked axis that count as placed


@dataclasses.dataclass(frozen=True)
class Found:
  """An object read from a picture; colour or shape None where unclear."""

  colour: str | None
  shape: str | None
  x: float  # centre of the bounding box, pixels of a 32 x 32 picture
  y: float


def find_objects(images: np.ndarray) -> list[list[Found]]:
  """The objects in each of N images.

  Args:
    images: [N, S, S', 3] float in [0, 1].
  """
  scale = images.shape[1] / scenes.SIZE
  paint, coverage = _paints(to_uint8(images))
  neighbours = np.zeros((3, 3, 3), bool)  # none across images
  neighbours[1] = ndimage.generate_binary_structure(2, 1)
  labels, _ = ndimage.label(coverage >= _COVERED, neighbours)
  found = [[] for _ in images]
  for label, (image, *sides) in enumerate(ndimage.find_objects(labels), 1):
    n = image.start
    # One pixel of margin: the edge pixels an object covers less than half.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in sides)
    mask = labels[n][box] == label
    if np.count_nonzero(mask) < _SPECK * scale**2:
      continue
    edge = _beside(mask) & (labels[n][box] == 0)
    cover = np.where(mask | edge, coverage[n][box], 0)
    y, x = ((side.start + side.stop) / 2 / scale for side in sides)
    colour = _main_colour(paint[n][box][mask])
    found[n].append(Found(colour, _shape(cover, scale), x, y))
  return found


def _paints(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which paint covers each pixel most, and how much of it: [N, H, W] each.

  A pixel on an edge mixes paint and ground. Less its grey part it keeps the
  direction of the paint, and its length along it is the coverage.
  """
  paints = np.array(list(scenes.COLOURS.values()))
  paints = paints - paints.mean(axis=1, keepdims=True)
  length = np.linalg.norm(paints, axis=1)
  # Colours first: a few long rows instead of many of three or six. The grey
  # part needs no subtraction, directions without any are blind to it.
  planes = np.moveaxis(pixels, -1, 0) / np.float64(255)
  along = np.einsum(
    "pc,cnhw->pnhw", paints / length[:, None], np.ascontiguousarray(planes)
  )
  best, most = np.zeros(along.shape[1:], np.intp), along[0]
  for paint, amount in enumerate(along[1:], start=1):
    best[amount > most] = paint
    most = np.maximum(amount, most)
  return best, np.clip(most / length[best], 0, 1)


def _beside(mask: np.ndarray) -> np.ndarray:
  """A mask [h, w] and the pixels next to it along rows and columns."""
  near = mask.copy()
  near[1:] |= mask[:-1]
  near[:-1] |= mask[1:]
  near[:, 1:] |= mask[:, :-1]
  near[:, :-1] |= mask[:, 1:]
  return near


def _main_colour(paint: np.ndarray) -> str | None:
  """The colour of an object, None when its pixels disagree."""
  counts = np.bincount(paint, minlength=len(scenes.COLOURS))
  pure = counts.max() >= _PURE * paint.size
  return list(scenes.COLOURS)[counts.argmax()] if pure else None


def _shape(cover: np.ndarray, scale: float) -> str | None:
  """The shape of an object from its coverage [h, w], None when unclear."""
  area = cover.sum()
  height, width = cover.max(axis=1).sum(), cover.max(axis=0).sum()
  if not _AREA[0] * scale**2 <= area <= _AREA[1] * scale**2:
    return None
  if max(height, width) > _ELONGATED * min(height, width):
    return None
  kind = bisect.bisect_left(_FILL, area / (height * width))
  return ("triangle", "circle", "square")[kind]


def _matches(objects: list[Found], spec: Spec) -> list[list[Found]]:
  """The objects of each group's colour and shape."""
  return [
    [o for o in objects if (o.colour, o.shape) == (g.colour, g.shape)]
    for g in spec.groups
  ]


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def presence(objects: list[Found], spec: Spec) -> float:
  """Share of the groups with at least one object of colour and shape."""
  return _mean([bool(m) for m in _matches(objects, spec)])


def colour(objects: list[Found], spec: Spec) -> float:
  """Share of the objects asked for that are there in colour, of any shape."""
  asked, hit = 0, 0
  for name in {g.colour for g in spec.groups}:
    wanted = sum(g.count for g in spec.groups if g.colour == name)
    asked += wanted
    hit += min(wanted, sum(o.colour == name for o in objects))
  return hit / asked


def count(objects: list[Found], spec: Spec) -> float:
  """Mean over groups of 1 - |found - asked| / asked, at least 0."""
  return _mean(
    [
      max(0.0, 1 - abs(len(m) - g.count) / g.count)
      for m, g in zip(_matches(objects, spec), spec.groups)
    ]
  )


def position(objects: list[Found], spec: Spec) -> float:
  """Share of the pairs of objects across groups that lie as asked.

  A pair counts half when its centres differ in the asked direction at all,
  and fully from four pixels. Without objects to compare it is 0; a prompt
  that asks for no relation scores its presence.
  """
  if spec.relation is None:
    return presence(objects, spec)
  first, second = _matches(objects, spec)
  levels = []
  for a in first:
    for b in second:
      offset = scenes.offset(spec.relation, a.x - b.x, a.y - b.y)
      levels.append((offset > 0) / 2 + (offset >= _FULL_POSITION) / 2)
  return _mean(levels) if levels else 0.0


def total(objects: list[Found], spec: Spec) -> float:
  """Mean of what the prompt asks, less a charge for each object too many."""
  parts = [presence, colour, count] + [position] * (spec.relation is not None)
  mean = _mean([part(objects, spec) for part in parts])
  stray = max(0, len(objects) - sum(g.count for g in spec.groups))
  return max(0.0, mean - STRAY_COST * stray)


def _score(
  images: np.ndarray,
  prompts: list[str],
  part: Callable[[list[Found], Spec], float],
) -> np.ndarray:
  """Scores N images with one of the functions above: [N] float32."""
  if images.ndim != 4 or images.shape[-1] != 3:
    raise UserError(
      f"the shapes reward reads images [N, H, W, 3], got {images.shape}: choose "
      "another reward for this model"
    )
  specs = [scenes.parse_caption(prompt) for prompt in prompts]
  objects = find_objects(images)
  return np.asarray([part(o, s) for o, s in zip(objects, specs)], np.float32)


@checks_prompts(scenes.parse_caption)
def score_shapes(images: np.ndarray, prompts: list[str]) -> np.ndarray:
  """The whole reward (`total`); arguments as in `rewards.protocol`."""
  return _score(images, prompts, total)


@checks_prompts(scenes.parse_caption)
def score_presence(images: np.ndarray, prompts: list[str]) -> np.ndarray:
  """`presence` alone."""
  return _score(images, prompts, presence)


@checks_prompts(scenes.parse_caption)
def score_colour(images: np.ndarray, prompts: list[str]) -> np.ndarray:
  """`colour` alone."""
  return _score(images, prompts, colour)


@checks_prompts(scenes.parse_caption)
def score_count(images: np.ndarray, prompts: list[str]) -> np.ndarray:
  """`count` alone."""
  return _score(images, prompts, count)


@checks_prompts(scenes.parse_caption)
def score_position(images: np.ndarray, prompts: list[str]) -> np.ndarray:
  """`position` alone."""
  return _score(images, prompts, position)
