"""Grids of images."""

import numpy as np
import pytest
from PIL import Image

from digen_jax.media import (
  GAP,
  before_after,
  best_and_worst,
  default_scale,
  image_grid,
  save_image,
  save_video,
  to_uint8,
  video_grid,
)

COLORS = np.random.default_rng(0).integers(0, 256, (16, 3)).astype(np.uint8)


def flat(count, size=32):
  """Images of one colour each, by which they are found again."""
  return np.broadcast_to(
    COLORS[:count, None, None, :], (count, size, size, 3)
  ).copy()


def box(grid, color):
  """(left, top, width, height) of the pixels of a colour; None without."""
  rows, columns = np.nonzero((np.asarray(grid) == color).all(-1))
  if not len(rows):
    return None
  return (
    columns.min(),
    rows.min(),
    np.ptp(columns) + 1,
    np.ptp(rows) + 1,
  )


def test_grid_places_and_enlarges():
  grid = image_grid(flat(5), columns=3, scale=2)
  assert grid.size == (3 * 64 + 4 * GAP, 2 * 64 + 3 * GAP)
  for i in range(5):
    row, column = divmod(i, 3)
    left, top = GAP + column * (64 + GAP), GAP + row * (64 + GAP)
    assert box(grid, COLORS[i]) == (left, top, 64, 64)


def test_enlargement_keeps_hard_edges():
  image = np.indices((32, 32)).sum(0) % 2
  image = np.repeat(image[..., None], 3, -1).astype(np.float32)
  grid = np.asarray(image_grid(image[None], scale=3))
  inner = grid[GAP:-GAP, GAP:-GAP]
  expected = (np.kron(image[..., 0], np.ones((3, 3))) * 255).astype(np.uint8)
  np.testing.assert_array_equal(inner[..., 1], expected)


def test_floats_are_rounded_and_clipped():
  values = np.float32([-0.5, 0.0, 0.5, 1.0, 7.0, np.nan])
  image = np.broadcast_to(values[None, :, None], (1, 6, 3))
  assert to_uint8([image])[0][0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
  same = flat(2)
  np.testing.assert_array_equal(to_uint8(same), same)


def test_captions_take_room_and_leave_the_pictures_whole():
  labels = ["0.25 two red circles and a blue square", "short", "", "a" * 200]
  grid = image_grid(flat(4), columns=4, scale=4, labels=labels)
  assert grid.height > 128 + 2 * GAP + 2 * 12  # two lines at least
  boxes = [box(grid, COLORS[i]) for i in range(4)]
  assert [b[2:] for b in boxes] == [(128, 128)] * 4
  pixels = np.asarray(grid).astype(int)
  dark = [
    int((pixels[GAP + 130 :, x : x + 128].sum(-1) < 300).sum())
    for x in (b[0] for b in boxes)
  ]
  assert dark[0] > dark[1] > 0 and dark[2] == 0 and dark[3] > 0
  between = pixels[GAP + 130 :, boxes[2][0] : boxes[3][0]]
  assert between.min() > 200  # the long word does not run into its neighbour


def test_default_scale():
  assert default_scale(flat(1)) == 4
  assert default_scale([np.zeros((100, 64, 3))]) == 1
  assert default_scale([np.zeros((1024, 1024, 3))]) == 1


def test_before_and_after_lie_side_by_side():
  before, after = flat(3), flat(6)[3:]
  grid = before_after(
    before,
    after,
    ["one", "two", "three"],
    ([0.1, 0.2, np.nan], [0.9, 0.8, 0.7]),
    columns=2,
    scale=2,
  )
  boxes = [box(grid, COLORS[i]) for i in range(6)]
  for i in range(3):
    assert boxes[i][1] == boxes[i + 3][1]  # one row
    assert boxes[i + 3][0] - (boxes[i][0] + 64) == 2
  assert boxes[0][1] == boxes[1][1] < boxes[2][1]
  with pytest.raises(ValueError, match="3 images before, 2 after"):
    before_after(before, after[:2], ["one", "two", "three"])


def test_best_and_worst_of_each_group():
  rewards = [0.1, 0.9, 0.5, 0.3, np.nan, 0.2, 0.8, 0.4]
  grid = best_and_worst(flat(8), rewards, ["a", "b"], count=1, scale=2)
  shown = {i: box(grid, COLORS[i]) for i in range(8)}
  assert [i for i, b in shown.items() if b] == [0, 1, 4, 6]
  assert shown[1][0] < shown[0][0] and shown[1][1] == shown[0][1]
  assert shown[6][0] < shown[4][0]  # a NaN reward is the worst
  assert shown[1][1] < shown[6][1]
  first = best_and_worst(flat(8), rewards, ["a", "b"], max_groups=1)
  assert box(first, COLORS[6]) is None and box(first, COLORS[1])
  with pytest.raises(ValueError, match="3 groups"):
    best_and_worst(flat(8), rewards, ["a", "b", "c"])


def test_saving(tmp_path):
  grid = image_grid(flat(2) / np.float32(255))
  save_image(tmp_path / "grid.png", grid)
  with Image.open(tmp_path / "grid.png") as opened:
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(grid))
  assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_bad_input():
  with pytest.raises(ValueError, match=r"\[H, W, 3\]; got \(32, 32\)"):
    image_grid(np.zeros((4, 32, 32)))
  with pytest.raises(ValueError, match="2 labels for 3 images"):
    image_grid(flat(3), labels=["a", "b"])
  with pytest.raises(ValueError, match="no images"):
    image_grid([])


def test_a_video_is_written_and_read_back(tmp_path):
  import av

  levels = np.linspace(0, 1, 5, dtype=np.float32)
  video = np.broadcast_to(levels[:, None, None, None], (5, 17, 32, 3))
  save_video(tmp_path / "v.mp4", video, fps=8)
  with av.open(str(tmp_path / "v.mp4")) as container:
    assert container.streams.video[0].average_rate == 8
    frames = [
      frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)
    ]
  assert [frame.shape for frame in frames] == [(18, 32, 3)] * 5
  means = [frame.mean() / 255 for frame in frames]
  np.testing.assert_allclose(means, levels, atol=0.02)


def test_large_pictures_are_shown_smaller():
  wide, high = np.zeros((100, 2100, 3)), np.zeros((1100, 60, 3))
  frame = 40  # gaps and captions, at most
  assert 0 <= image_grid([wide]).size[0] - 2100 // 3 < frame
  assert 0 <= image_grid([high]).size[1] - 1100 // 3 < frame
  assert image_grid([wide], scale=2).size[0] > 2 * 2100


def test_a_grid_of_videos_has_its_frames_in_order():
  levels = np.arange(3, dtype=np.uint8)[:, None, None, None]
  videos = np.stack([levels + np.zeros((3, 200, 200, 3), np.uint8)] * 2)
  frames = list(video_grid(videos, ["a", "b"]))
  assert [frame[50, 50, 0] for frame in frames] == [0, 1, 2]


def test_a_video_in_a_picture_is_its_first_middle_and_last_frame():
  video = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones(
    (5, 4, 6, 3), np.uint8
  )
  (strip,) = to_uint8([video])
  assert strip.shape == (4, 18, 3)
  assert [strip[0, i, 0] for i in (0, 6, 12)] == [0, 2, 4]
