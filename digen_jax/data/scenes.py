"""Procedural captioned scenes: coloured shapes on light grey, counted, placed.

A caption asks for one or two groups of like objects, at most four objects in
all, and perhaps how the first group lies to the second:

  three green squares
  two red circles and a blue square
  two red circles left of a blue square

A fifth of the captions is held out from training by a hash of their text
(`held_out`), so that every part of the project agrees on the split.
"""

import dataclasses
import functools
import hashlib
import itertools

import numpy as np

from digen_jax.errors import UserError

SIZE = 32  # pixels a side that every length below is meant for
GROUND = (0.88, 0.88, 0.88)
COLOURS = {
  "red": (0.86, 0.14, 0.14),
  "green": (0.14, 0.66, 0.24),
  "blue": (0.14, 0.30, 0.86),
  "yellow": (0.96, 0.80, 0.10),
  "purple": (0.62, 0.18, 0.76),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = (
  *NUMBERS,
  "one",
  *COLOURS,
  *SHAPES,
  *(shape + "s" for shape in SHAPES),
  *("and", "left", "right", "of", "above", "below"),
)
MAX_OBJECTS = 4

_RADIUS = (4.2, 5.6)  # pixels, of the circle a shape is drawn around
_GAP = 2.0  # least distance in pixels between the boxes of two objects
_SIDE_BY_SIDE = 8.0  # least distance of centres along the axis of a relation
# Half widths in radii, so that the three shapes look about equally large.
_HALF_WIDTH = {"circle": 1.0, "square": 0.9, "triangle": 1.1}


@dataclasses.dataclass(frozen=True)
class Group:
  """`count` like objects."""

  count: int
  colour: str
  shape: str


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a caption asks for; `relation` places groups[0] against groups[1]."""

  groups: tuple[Group, ...]
  relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Object:
  """One object: centre x, y and radius in pixels of a SIZE x SIZE picture."""

  colour: str
  shape: str
  x: float
  y: float
  radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """Objects that do not touch, and the caption they satisfy."""

  objects: tuple[Object, ...]
  caption: str


def caption(spec: Spec) -> str:
  """The English of a spec, the inverse of `parse_caption`."""
  phrases = [
    f"{NUMBERS[g.count - 1]} {g.colour} {g.shape}{'s' * (g.count > 1)}"
    for g in spec.groups
  ]
  return f" {spec.relation or 'and'} ".join(phrases)


def parse_caption(text: str) -> Spec:
  """Reads a caption; "one" and "an" are taken for "a", case is ignored.

  Raises:
    UserError: the text is outside the grammar of the module docstring.
  """
  words = text.lower().strip().rstrip(".").split()
  first, rest = _read_group(words)
  if first and not rest:
    return Spec((first,))
  for joint in (*RELATIONS, "and"):
    length = len(joint.split())
    if first and rest[:length] == joint.split():
      second, left_over = _read_group(rest[length:])
      if second and not left_over:
        return Spec((first, second), None if joint == "and" else joint)
  raise UserError(
    f'prompt "{text}" is outside the grammar of the shapes reward: write e.g. '
    '"three green squares" or "two red circles left of a blue square" '
    f"(colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; joined by "
    f"and, {', '.join(RELATIONS)}), or choose another reward"
  )


def _read_group(words: list[str]) -> tuple[Group | None, list[str]]:
  """Reads a number, a colour and a shape; None when they are not there."""
  if len(words) < 3:
    return None, words
  number, colour, shape = words[:3]
  number = {"one": "a", "an": "a"}.get(number, number)
  if number not in NUMBERS or colour not in COLOURS:
    return None, words
  if shape.removesuffix("s") not in SHAPES:
    return None, words
  count = NUMBERS.index(number) + 1
  return Group(count, colour, shape.removesuffix("s")), words[3:]


@functools.cache
def all_specs() -> tuple[Spec, ...]:
  """Every spec a caption is made of, in a fixed order.

  Groups of a pair differ in colour or shape and hold at most four objects
  together, three when a relation places them.
  """
  kinds = list(itertools.product(COLOURS, SHAPES))
  specs = [Spec((Group(n, *k),)) for n in range(1, 5) for k in kinds]
  for joint in (None, *RELATIONS):
    most = MAX_OBJECTS if joint is None else 3
    for n, m in itertools.product(range(1, 4), repeat=2):
      if n + m <= most:
        specs += [
          Spec((Group(n, *a), Group(m, *b)), joint)
          for a, b in itertools.permutations(kinds, 2)
        ]
  return tuple(specs)


def all_captions() -> list[str]:
  """Every caption, training and held out, in a fixed order."""
  return [caption(spec) for spec in all_specs()]


def held_out(text: str) -> bool:
  """Whether a caption is kept from training: a fifth, by a stable hash."""
  return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0


@functools.cache
def _training_specs() -> tuple[tuple[Spec, ...], ...]:
  """Training specs by kind: one group, two groups, a relation."""
  kinds = ([], [], [])
  for spec in all_specs():
    if not held_out(caption(spec)):
      kinds[2 if spec.relation else len(spec.groups) - 1].append(spec)
  return tuple(map(tuple, kinds))


def sample_spec(rng: np.random.Generator) -> Spec:
  """A training spec; its kind first (1:2:2), as there are few of one group."""
  kind = _training_specs()[rng.choice(3, p=(0.2, 0.4, 0.4))]
  return kind[rng.integers(len(kind))]


def sample_scene(rng: np.random.Generator, spec: Spec | None = None) -> Scene:
  """Places the objects of `spec`, or of a random training spec, at random."""
  spec = spec or sample_spec(rng)
  kinds = [(g.colour, g.shape) for g in spec.groups for _ in range(g.count)]
  while True:
    objects = _place(rng, kinds)
    if objects and _related(objects, spec):
      return Scene(tuple(objects), caption(spec))


def _place(
  rng: np.random.Generator, kinds: list[tuple[str, str]]
) -> list[Object] | None:
  """Objects at random places that do not touch; None when one found none."""
  objects = []
  for colour, shape in kinds:
    for _ in range(20):
      radius = rng.uniform(*_RADIUS)
      margin = _HALF_WIDTH[shape] * radius + 0.5
      x, y = rng.uniform(margin, SIZE - margin, 2)
      new = Object(colour, shape, float(x), float(y), float(radius))
      if all(_apart(new, other) for other in objects):
        objects.append(new)
        break
    else:
      return None
  return objects


def _apart(a: Object, b: Object) -> bool:
  """Whether the bounding boxes of two objects keep their distance."""
  reach = _HALF_WIDTH[a.shape] * a.radius + _HALF_WIDTH[b.shape] * b.radius
  return max(abs(a.x - b.x), abs(a.y - b.y)) >= reach + _GAP


def _related(objects: list[Object], spec: Spec) -> bool:
  """Whether every object of group 0 lies as asked to every one of group 1."""
  if spec.relation is None:
    return True
  split = spec.groups[0].count
  return all(
    offset(spec.relation, a.x - b.x, a.y - b.y) >= _SIDE_BY_SIDE
    for a in objects[:split]
    for b in objects[split:]
  )


def offset(relation: str, dx: float, dy: float) -> float:
  """How far a lies in the asked direction of b, given a - b, y downwards."""
  return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
  """Draws a scene with anti-aliased edges: [size, size, 3] float32 in [0, 1].

  Coverage of a pixel is its signed distance to the edge, clipped to a pixel.
  """
  scale = size / SIZE
  image = np.broadcast_to(np.float32(GROUND), (size, size, 3))
  centres = (np.arange(size, dtype=np.float32) + 0.5) / scale
  for item in scene.objects:
    distance = _signed_distance(
      item, centres[None, :] - item.x, centres[:, None] - item.y
    )
    cover = np.clip(0.5 - distance * scale, 0, 1).astype(np.float32)
    paint = np.float32(COLOURS[item.colour])
    image = image + cover[:, :, None] * (paint - image)
  return image


def _signed_distance(
  item: Object, dx: np.ndarray, dy: np.ndarray
) -> np.ndarray:
  """Distance in pixels to the edge of a shape, negative inside."""
  half = _HALF_WIDTH[item.shape] * item.radius
  if item.shape == "circle":
    return np.hypot(dx, dy) - half
  if item.shape == "square":
    return np.maximum(np.abs(dx), np.abs(dy)) - half
  # A triangle with its tip up, as high as wide: the base and two sloped sides.
  slope = (2 * np.abs(dx) - dy - half) / np.sqrt(np.float32(5))
  return np.maximum(dy - half, slope)
