"""Pictures: grids with captions, before and after, best and worst of a group.

Images come as [N, H, W, 3], float in [0, 1] or uint8, or as a list of such
[H, W, 3]; grids are PIL images. Of videos [N, F, H, W, 3] they show a few
frames beside each other; `video_grid` and `save_video` show them move.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from digen_jax.atomic import replacing
from digen_jax.errors import UserError

CELL = 144  # pixels that small images are enlarged to, about
LARGE = 512, 1024  # rows and columns that a picture in a grid may have
GAP = 8
BACKGROUND = (250, 250, 251)
INK = (38, 41, 48)
FAINT = (112, 118, 130)
STILLS = 3  # frames that stand for a video in a picture
TEXT_LINES = 3  # longer captions end in an ellipsis
FONT_SIZE = 12


def image_grid(
  images: np.ndarray | Sequence[np.ndarray],
  columns: int | None = None,
  *,
  scale: int | None = None,
  labels: Sequence[str] | None = None,
) -> Image.Image:
  """Images in rows, each with a caption below.

  Args:
    images: [N, H, W, 3] float in [0, 1] or uint8.
    columns: images per row; by default about as many as rows.
    scale: whole factor by which every pixel is enlarged (no smoothing); by
      default what brings small images to about 144 pixels. At 1, images of
      more than 512 rows or 1024 columns are shown smaller.
    labels: N captions, wrapped to the width of an image; "\\n" breaks a line.

  Raises:
    ValueError: another shape, or not as many labels as images.
  """
  pixels = to_uint8(images)
  count = len(pixels)
  if labels is not None and len(labels) != count:
    raise ValueError(f"{len(labels)} labels for {count} images")
  columns = columns or math.ceil(math.sqrt(count))
  scale = scale or default_scale(pixels)
  labels = [""] * count if labels is None else labels
  rows = [
    _row(
      list(zip(pixels[i : i + columns], labels[i : i + columns])),
      scale,
    )
    for i in range(0, count, columns)
  ]
  return _stack(rows)


def before_after(
  before: np.ndarray | Sequence[np.ndarray],
  after: np.ndarray | Sequence[np.ndarray],
  prompts: Sequence[str],
  rewards: tuple[Sequence[float], Sequence[float]] | None = None,
  *,
  columns: int = 4,
  scale: int | None = None,
) -> Image.Image:
  """Pairs of the same prompt and noise under two policies, side by side.

  Args:
    before: [N, H, W, 3] images of the policy before.
    after: [N, H, W, 3] images of the policy after.
    prompts: N prompts.
    rewards: ([N], [N]) rewards before and after.
    columns: pairs per row.
    scale: whole factor of enlargement.

  Raises:
    ValueError: the lengths differ.
  """
  pairs = to_uint8(before), to_uint8(after)
  if not len(pairs[0]) == len(pairs[1]) == len(prompts):
    raise ValueError(
      f"{len(pairs[0])} images before, {len(pairs[1])} after, "
      f"{len(prompts)} prompts"
    )
  scale = scale or default_scale(pairs[0])
  cells = []
  for i, prompt in enumerate(prompts):
    words = [
      name if rewards is None else f"{name} {_number(rewards[k][i])}"
      for k, name in enumerate(("before", "after"))
    ]
    pair = _row([(pairs[k][i], words[k]) for k in (0, 1)], scale, gap=2)
    cells.append(_titled(pair, prompt))
  columns = min(columns, len(cells))
  return _stack(
    [_beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
  )


def best_and_worst(
  images: np.ndarray | Sequence[np.ndarray],
  rewards: Sequence[float] | np.ndarray,
  prompts: Sequence[str],
  *,
  max_groups: int = 8,
  count: int = 3,
  scale: int | None = None,
) -> Image.Image:
  """The best and the worst samples of groups, with their rewards.

  Args:
    images: [N, H, W, 3], group by group.
    rewards: [N].
    prompts: one per group; their number divides N.
    max_groups: how many groups are shown, the first ones.
    count: how many of the best and of the worst; fewer in small groups.
    scale: whole factor of enlargement.

  Raises:
    ValueError: the groups do not divide the samples.
  """
  pixels, rewards = to_uint8(images), np.asarray(rewards, np.float64)
  size, rest = divmod(len(pixels), len(prompts))
  if rest or len(rewards) != len(pixels):
    raise ValueError(
      f"{len(pixels)} images, {len(rewards)} rewards, {len(prompts)} groups"
    )
  count = max(1, min(count, size // 2))
  scale = scale or default_scale(pixels)
  rows = []
  for group, prompt in enumerate(prompts[:max_groups]):
    # A NaN reward sorts last when negated: with the worst.
    order = group * size + np.argsort(
      -rewards[group * size : (group + 1) * size], kind="stable"
    )
    halves = [
      _row([(pixels[i], _number(rewards[i])) for i in half], scale, gap=2)
      for half in (order[:count], order[len(order) - count :])
    ]
    titles = ("best: " + prompt, "worst")
    rows.append(
      _beside([_titled(h, t) for h, t in zip(halves, titles)], gap=3 * GAP)
    )
  return _stack(rows)


def save_image(path: str | Path, image: Image.Image) -> None:
  """Writes a PNG file so that a kill leaves none or a whole one."""
  with replacing(path) as temporary:
    image.save(temporary, format="PNG")


def to_uint8(
  images: np.ndarray | Sequence[np.ndarray],
) -> list[np.ndarray]:
  """[H, W, 3] uint8 images from float in [0, 1] (clipped) or uint8 ones.

  A video [F, H, W, 3] becomes a strip of its first, middle and last frames.

  Raises:
    ValueError: no image, or another shape.
  """
  pixels = []
  for image in images:
    image = np.asarray(image)
    if image.ndim == 4:
      image = _strip(image)
    if image.ndim != 3 or image.shape[-1] != 3:
      raise ValueError(f"images are [H, W, 3]; got {image.shape}")
    if image.dtype != np.uint8:
      image = np.clip(np.nan_to_num(image.astype(np.float32)), 0.0, 1.0)
      image = np.round(image * 255.0).astype(np.uint8)
    pixels.append(image)
  if not pixels:
    raise ValueError("no images to show")
  return pixels


def _strip(video: np.ndarray) -> np.ndarray:
  """[F, H, W, 3] -> [H, STILLS W, 3]; fewer where there are fewer frames."""
  count = min(STILLS, len(video))
  frames = np.linspace(0, len(video) - 1, count).round().astype(int)
  return np.concatenate(list(video[frames]), axis=1)


def video_grid(
  videos: np.ndarray, labels: Sequence[str] | None = None
) -> Iterator[np.ndarray]:
  """`image_grid`, frame by frame: F times [H, W, 3] uint8.

  Args:
    videos: [N, F, h, w, 3] float in [0, 1] or uint8.
    labels: N captions.
  """
  for i in range(videos.shape[1]):
    yield np.asarray(image_grid(videos[:, i], labels=labels))


def check_video_writer() -> None:
  """Raises UserError where videos cannot be written."""
  try:
    import av  # noqa: F401
  except ImportError as error:
    raise UserError(
      "writing videos needs PyAV: pip install 'digen-jax[video]'"
    ) from error


def save_video(
  path: str | Path, frames: Iterable[np.ndarray], fps: int
) -> None:
  """Writes an MP4 file (H.264) so that a kill leaves none or a whole one.

  Args:
    path: of the file.
    frames: F times [H, W, 3] float in [0, 1] or uint8, taken one by one; an
      odd row or column at the edge is repeated, as the format has none.
    fps: frames per second.

  Raises:
    UserError: the extra `video` is not installed.
  """
  check_video_writer()
  import av

  with (
    replacing(path) as temporary,
    av.open(str(temporary), "w", format="mp4") as container,
  ):
    stream = container.add_stream("libx264", rate=fps)
    stream.pix_fmt = "yuv420p"
    for i, frame in enumerate(frames):
      (pixels,) = to_uint8([frame])
      odd = [(0, size % 2) for size in pixels.shape[:2]]
      pixels = np.pad(pixels, (*odd, (0, 0)), mode="edge")
      if not i:
        stream.height, stream.width = pixels.shape[:2]
      picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def default_scale(images: Sequence[np.ndarray]) -> int:
  """Whole factor that brings images to about 144 pixels; at least 1."""
  return max(1, round(CELL / max(max(image.shape[:2]) for image in images)))


def _row(
  cells: Sequence[tuple[np.ndarray, str]], scale: int, gap: int = GAP
) -> Image.Image:
  """Images beside each other, captions below."""
  return _beside([_captioned(image, text, scale) for image, text in cells], gap)


def _captioned(image: np.ndarray, text: str, scale: int) -> Image.Image:
  picture = Image.fromarray(image)
  if (
    scale == 1
    and (factor := max(-(-n // most) for n, most in zip(image.shape, LARGE)))
    > 1
  ):
    picture = picture.reduce(factor)
  width, height = picture.size
  picture = picture.resize(
    (width * scale, height * scale), Image.Resampling.NEAREST
  )
  if not text:
    return picture
  return _stack([picture, _text(text, picture.width, INK)], gap=2, margin=0)


def _titled(picture: Image.Image, text: str) -> Image.Image:
  """A picture with a heading."""
  heading = _text(text, picture.width, FAINT)
  return _stack([heading, picture], gap=2, margin=0)


def _text(text: str, width: int, color: tuple[int, int, int]) -> Image.Image:
  font = ImageFont.load_default(FONT_SIZE)
  lines = _wrap(text, width, font)
  height = round(1.35 * FONT_SIZE)
  image = Image.new("RGB", (width, height * len(lines)), BACKGROUND)
  draw = ImageDraw.Draw(image)
  for i, line in enumerate(lines):
    draw.text((1, i * height), line, fill=color, font=font)
  return image


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
  """Lines no wider than `width`; at most `TEXT_LINES`, else an ellipsis."""
  lines: list[str] = []
  for paragraph in text.split("\n"):
    line = ""
    for word in paragraph.split():
      longer = f"{line} {word}".strip()
      if line and font.getlength(longer) > width - 2:
        lines.append(line)
        longer = word
      line = longer
    lines.append(line)
  if len(lines) > TEXT_LINES:
    lines = [*lines[: TEXT_LINES - 1], lines[TEXT_LINES - 1] + " ..."]
  return [_shorten(line, width, font) for line in lines]


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
  if font.getlength(line) <= width - 2:
    return line
  while line and font.getlength(line + "...") > width - 2:
    line = line[:-1].rstrip(" .")
  return line + "..."


def _number(reward: float) -> str:
  return f"{reward:.2f}" if math.isfinite(reward) else "no reward"


def _beside(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
  """Pictures from left to right, tops aligned."""
  width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
  sheet = Image.new("RGB", (width, max(p.height for p in pictures)), BACKGROUND)
  x = 0
  for picture in pictures:
    sheet.paste(picture, (x, 0))
    x += picture.width + gap
  return sheet


def _stack(
  pictures: Sequence[Image.Image], gap: int = GAP, margin: int = GAP
) -> Image.Image:
  """Pictures from top to bottom."""
  height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
  width = max(p.width for p in pictures)
  sheet = Image.new(
    "RGB", (width + 2 * margin, height + 2 * margin), BACKGROUND
  )
  y = margin
  for picture in pictures:
    sheet.paste(picture, (margin, y))
    y += picture.height + gap
  return sheet
