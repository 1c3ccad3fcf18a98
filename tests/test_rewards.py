import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from digen_jax import evaluation, rewards
from digen_jax.config import from_config_dict
from digen_jax.data import scenes
from digen_jax.data.scenes import Object, Scene
from digen_jax.errors import UserError
from digen_jax.rewards import shapes
from digen_jax.rewards.compose import compose
from digen_jax.rewards.jpeg import jpeg_kilobytes
from digen_jax.rewards.protocol import Reward, to_uint8


def draw(*objects, size=32):
  items = tuple(Object(c, s, x, y, 5.0) for c, s, x, y in objects)
  return scenes.render(Scene(items, ""), size)


RED_LEFT = draw(("red", "circle", 7, 16), ("blue", "square", 24, 16))


def total(image, prompt):
  return float(shapes.score_shapes(image[None], [prompt])[0])


def test_drawn_scenes_score_one():
  rng = np.random.default_rng(0)
  drawn = [scenes.sample_scene(rng) for _ in range(300)]
  for size in (32, 64):
    images = np.stack([scenes.render(s, size) for s in drawn])
    captions = [s.caption for s in drawn]
    np.testing.assert_array_equal(shapes.score_shapes(images, captions), 1)


def test_scores_survive_noise():
  rng = np.random.default_rng(1)
  drawn = [scenes.sample_scene(rng) for _ in range(200)]
  images = np.stack([scenes.render(s) for s in drawn])
  captions = [s.caption for s in drawn[1:] + drawn[:1]]  # all kinds of wrong
  clean = shapes.score_shapes(images, captions)
  tiny = images + rng.uniform(-1e-6, 1e-6, images.shape)
  np.testing.assert_array_equal(shapes.score_shapes(tiny, captions), clean)
  grainy = np.clip(images + rng.normal(0, 0.03, images.shape), 0, 1)
  right = shapes.score_shapes(grainy, [s.caption for s in drawn])
  assert right.mean() > 0.98


def test_find_objects_reads_colour_shape_and_place():
  image = draw(
    ("green", "triangle", 8, 9),
    ("purple", "square", 23, 9),
    ("yellow", "circle", 16, 24),
  )
  found = shapes.find_objects(image[None])[0]
  assert {(o.colour, o.shape) for o in found} == {
    ("green", "triangle"),
    ("purple", "square"),
    ("yellow", "circle"),
  }
  circle = next(o for o in found if o.shape == "circle")
  assert (circle.x, circle.y) == (16, 24)


@pytest.mark.parametrize(
  ("prompt", "expected"),
  [
    ("a red circle left of a blue square", 1.0),
    ("a red circle and a blue square", 1.0),
    # presence 1, colour 1, count 1, position 0
    ("a red circle right of a blue square", 0.75),
    # side by side is neither above nor below
    ("a red circle above a blue square", 0.75),
    # presence 1, colour 2/3, count (1/2 + 1)/2
    ("two red circles and a blue square", (1 + 2 / 3 + 0.75) / 3),
    # presence 1/2, colour 1, count 1/2: the colours are right
    ("a red square and a blue square", (0.5 + 1 + 0.5) / 3),
    # all right, but the square is a stray
    ("a red circle", 0.75),
    # nothing right
    ("a green triangle and a yellow triangle", 0.0),
  ],
)
def test_partial_credit(prompt, expected):
  assert total(RED_LEFT, prompt) == pytest.approx(expected, abs=1e-6)


def test_components_alone():
  prompts = ["two red circles right of a blue square"]
  images = RED_LEFT[None]
  assert shapes.score_presence(images, prompts)[0] == 1
  assert shapes.score_colour(images, prompts)[0] == pytest.approx(2 / 3)
  assert shapes.score_count(images, prompts)[0] == pytest.approx(0.75)
  assert shapes.score_position(images, prompts)[0] == 0
  near = draw(("red", "circle", 16, 8), ("blue", "square", 13, 24))[None]
  assert shapes.score_position(near, prompts)[0] == 0.5
  assert shapes.score_position(images, ["a red circle"])[0] == 1


def test_drawing_everything_does_not_pay():
  one = draw(("red", "circle", 7, 7))
  two = draw(("red", "circle", 7, 7), ("red", "circle", 24, 7))
  four = draw(
    ("red", "circle", 7, 7),
    ("blue", "square", 24, 7),
    ("green", "circle", 7, 24),
    ("red", "square", 24, 24),
  )
  prompt = "a red circle"
  assert total(one, prompt) == 1
  assert total(two, prompt) == pytest.approx(2 / 3 - 0.25)
  assert total(four, prompt) == pytest.approx(0.25)


def test_what_is_no_clear_shape_costs():
  smear = RED_LEFT.copy()
  smear[28:31, 2:30] = scenes.COLOURS["green"]  # a bar, an object too many
  assert total(smear, "a red circle left of a blue square") == 0.75
  half = RED_LEFT.copy()
  half[:, :7][half[:, :7, 1] < 0.5] = scenes.COLOURS["blue"]
  assert None in {o.colour for o in shapes.find_objects(half[None])[0]}
  assert total(np.full((32, 32, 3), 0.88), "a red circle") == 0
  flood = np.broadcast_to(np.float32(scenes.COLOURS["red"]), (32, 32, 3))
  assert total(flood, "a red square") < 0.4


def test_shapes_refuses_what_it_cannot_read():
  reward = rewards.resolve_reward("shapes")
  with pytest.raises(UserError, match='prompt "a dog" is outside the grammar'):
    rewards.score(reward, RED_LEFT[None], ["a dog"])
  with pytest.raises(UserError, match=r"\[N, H, W, 3\], got \(1, 2, 32"):
    rewards.score(reward, np.zeros((1, 2, 32, 32, 3)), ["a red circle"])


def test_jpeg_rewards_are_file_sizes():
  rng = np.random.default_rng(0)
  images = np.stack([RED_LEFT, rng.random((32, 32, 3))]).astype(np.float32)
  sizes = jpeg_kilobytes(images)
  buffer = io.BytesIO()
  Image.fromarray(to_uint8(images[0])).save(buffer, "JPEG", quality=95)
  assert sizes[0] == np.float32(len(buffer.getvalue()) / 1000)
  assert sizes[1] > 1.3 * sizes[0]
  up = rewards.score(
    rewards.resolve_reward("jpeg_incompressibility"), images, ["", ""]
  )
  down = rewards.score(
    rewards.resolve_reward("jpeg_compressibility"), images, ["", ""]
  )
  np.testing.assert_array_equal(up, sizes)
  np.testing.assert_array_equal(down, -sizes)


# The protocol.

IMAGES = np.zeros((3, 4, 4, 3), np.float32)
PROMPTS = ["one", "two", "three"]


def run(function, images=IMAGES, prompts=PROMPTS):
  return rewards.score(rewards.resolve_reward(function), images, prompts)


def test_functions_may_answer_in_many_ways():
  import jax.numpy as jnp
  import torch

  for answer in (
    [1, 2, 3],
    (1.0, 2.0, 3.0),
    np.array([1, 2, 3], np.float64),
    jnp.array([1.0, 2.0, 3.0], jnp.bfloat16),
    torch.tensor([1.0, 2.0, 3.0]),
  ):
    values = run(lambda images, prompts, answer=answer: answer)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [1, 2, 3])


def test_function_sees_float_images_and_prompts():
  seen = {}

  def reward(images, prompts):
    seen.update(images=images, prompts=prompts)
    return np.zeros(len(images))

  pixels = np.arange(3 * 48).reshape(3, 4, 4, 3).astype(np.uint8)
  run(reward, pixels)
  assert seen["images"].dtype == np.float32
  np.testing.assert_array_equal(to_uint8(seen["images"]), pixels)
  assert seen["prompts"] == PROMPTS


def test_pil_images_on_request():
  @rewards.takes_pil
  def reward(images, prompts):
    assert all(isinstance(image, Image.Image) for image in images)
    return [image.getpixel((1, 0))[2] for image in images]

  images = IMAGES.copy()
  images[1, 0, 1, 2] = 0.5
  np.testing.assert_array_equal(run(reward, images), [0, 128, 0])


def test_videos_are_no_pil_images():
  reward = rewards.takes_pil(lambda images, prompts: np.zeros(len(images)))
  with pytest.raises(UserError, match=r"takes PIL images.*videos") as error:
    run(reward, np.zeros((3, 2, 4, 4, 3), np.float32))
  assert "\n" not in str(error.value)


def test_rewards_cannot_change_what_others_see():
  def reward(images, prompts):
    images[:] = 0
    return np.zeros(len(images))

  for dtype in (np.float32, np.uint8):
    images = np.ones((3, 4, 4, 3), dtype)
    with pytest.raises(UserError, match="read-only"):
      run(reward, images)
    assert images.all() and images.flags.writeable


def test_coroutine_functions_also_inside_a_running_loop():
  async def reward(images, prompts):
    await asyncio.sleep(0)
    return [len(p) for p in prompts]

  np.testing.assert_array_equal(run(reward), [3, 3, 5])

  async def inside():
    return run(reward)

  np.testing.assert_array_equal(asyncio.run(inside()), [3, 3, 5])


def test_coroutines_of_all_calls_share_a_loop():
  loops = []

  async def reward(images, prompts):
    loops.append(asyncio.get_running_loop())
    return [0.0] * len(prompts)

  with ThreadPoolExecutor(2) as threads:
    for call in [threads.submit(run, reward) for _ in range(3)]:
      call.result()
  assert len(set(loops)) == 1
  assert not loops[0].is_closed()


def test_a_reward_that_does_not_answer_is_given_up():
  hung = threading.Event()

  def reward(images, prompts):
    hung.wait(20)
    return [1.0] * len(prompts)

  composite = compose(reward, timeout=0.05)
  with pytest.raises(UserError, match=r"not answered for 0.05 s .* is up, or"):
    composite.score(np.zeros((1, 4, 4, 3), np.float32), ["a"])
  hung.set()
  found = compose(reward, timeout=5.0).score(np.zeros((1, 4, 4, 3)), ["a"])
  assert found.total == [1.0]


@pytest.mark.parametrize(
  ("answer", "message"),
  [
    (
      [1, float("nan"), float("inf")],
      'nan for sample 1, prompt "two" \\(2 of 3',
    ),
    ([1, 2], r"shape \(2,\) for 3 samples"),
    (1.0, r"shape \(\) for 3 samples"),
    ([[1], [2], [3]], r"shape \(3, 1\).*one float per sample, shape \(3,\)"),
    (None, "NoneType, not numbers"),
    (["a", "b", "c"], "list, not numbers"),
    ([1, [2], 3], "list, not numbers"),
    ({"score": [1, 2, 3]}, "dict, not numbers"),
    ([1j, 2, 3], "list, not numbers"),
  ],
)
def test_bad_answers_are_named(answer, message):
  def mine(images, prompts):
    return answer

  with pytest.raises(UserError, match=f'reward "mine" returned {message}') as e:
    run(mine)
  assert "\n" not in str(e.value)
  assert "return" in str(e.value).split(";")[-1]


def test_a_reward_that_raises_is_named():
  def mine(images, prompts):
    raise KeyError("two\nlines")

  with pytest.raises(UserError, match=r'"mine" raised KeyError.*"one"') as e:
    run(mine)
  assert "\n" not in str(e.value)

  async def later(images, prompts):
    raise TimeoutError("no answer")

  with pytest.raises(UserError, match='"later" raised TimeoutError: no answer'):
    run(later)


def test_counts_of_images_and_prompts_must_agree():
  with pytest.raises(UserError, match="3 images and 1 prompts"):
    run(lambda images, prompts: [1], prompts=["one"])


def test_rewards_by_file_and_module(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "def brightness(images, prompts):\n  return images.mean((1, 2, 3))\n"
  )
  reward = rewards.resolve_reward(f"{file}:brightness")
  np.testing.assert_array_equal(
    rewards.score(reward, IMAGES + np.float32(0.5), PROMPTS), 0.5
  )
  by_module = rewards.resolve_reward("digen_jax.rewards.jpeg:compressibility")
  assert (
    by_module.function
    is rewards.resolve_reward("jpeg_compressibility").function
  )


def test_names_that_lead_nowhere(tmp_path):
  broken = tmp_path / "broken.py"
  broken.write_text("import nothing_of_that_name\n")
  empty = tmp_path / "empty.py"
  empty.write_text("x = 1\n")
  for spec, message in (
    ("shape", 'did you mean "shapes"'),
    ("quality", 'no reward is called "quality"'),
    (f"{tmp_path}/gone.py:f", "gone.py does not exist"),
    (f"{broken}:f", "ModuleNotFoundError.*nothing_of_that_name"),
    (f"{empty}:f", 'has no function "f"'),
    (f"{empty}:x", 'has no function "x"'),
    ("no.such.module:f", "ModuleNotFoundError"),
  ):
    with pytest.raises(UserError, match=message):
      rewards.resolve_reward(spec)


def test_weighted_sum():
  def first(images, prompts):
    return [1, 2, 3]

  def second(images, prompts):
    return [10, 0, -10]

  composite = rewards.compose([(first, 1.0), (second, 0.5)])
  scores = composite.score(IMAGES, PROMPTS)
  np.testing.assert_array_equal(scores.total, [6, 2, -2])
  np.testing.assert_array_equal(scores.parts["second"], [10, 0, -10])
  named = rewards.compose({"shapes": 1.0, "jpeg_compressibility": 0.1})
  assert [r.name for r in named.rewards] == ["shapes", "jpeg_compressibility"]
  single = rewards.compose("shapes")
  assert single.weights == (1.0,)
  reward = Reward("mine", first)
  assert rewards.compose(reward).rewards == (reward,)


def test_bad_compositions():
  for bad, message in (
    ({}, "no reward given"),
    ({"shapes": float("nan")}, "weight nan"),
    ({"shapes": 0}, "weight 0"),
    ({"shapes": "1"}, "weight '1'"),
    ([("shapes", 1.0), ("shapes", 2.0)], "given twice"),
    ("shaeps", "did you mean"),
  ):
    with pytest.raises(UserError, match=message):
      rewards.compose(bad)


@pytest.mark.parametrize(("most", "size"), [(8 * 48, 8), (50, 1), (40, 1)])
def test_evaluations_are_scored_in_slices(most, size, monkeypatch):
  monkeypatch.setattr(evaluation, "SCORED", most)
  seen = []

  def brightness(images, prompts):
    assert images.dtype == np.float32
    seen.append(len(prompts))
    return images.mean((1, 2, 3)) + np.asarray([len(p) for p in prompts])

  images = np.random.default_rng(0).integers(0, 256, (19, 4, 4, 3), np.uint8)
  prompts = ["x" * i for i in range(19)]
  reward = compose([(brightness, 0.5)])
  found = evaluation.evaluate(
    lambda *_: images, prompts, None, None, reward.score, 3
  )
  assert max(seen) == size and sum(seen) == 19
  expected = images.astype(np.float32).mean((1, 2, 3)) / 255 + np.arange(19)
  np.testing.assert_allclose(found.parts["brightness"], expected, rtol=1e-6)
  np.testing.assert_allclose(found.rewards, expected / 2, rtol=1e-6)


def test_evaluations_of_another_reward_or_other_prompts_do_not_compare():
  config = from_config_dict({"reward": "shapes"})
  same = evaluation.setting(config, ["a red circle"])
  assert evaluation.setting(
    from_config_dict({"reward": "shapes", "seed": 3}), ["a red circle"]
  ) == (same)
  assert evaluation.setting(config, ["a blue circle"]) != same
  for changes in ({"reward": "shapes_count"}, {"eval": {"num_steps": 7}}):
    other = from_config_dict({"reward": "shapes", **changes})
    assert evaluation.setting(other, ["a red circle"]) != same


def test_pixels_beside_a_mask():
  cross = ndimage.generate_binary_structure(2, 1)
  for seed in range(20):
    mask = np.random.default_rng(seed).random((6, 7)) < 0.2
    wanted = ndimage.binary_dilation(mask, cross)
    np.testing.assert_array_equal(shapes._beside(mask), wanted)
