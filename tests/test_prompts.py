import logging

import numpy as np
import pytest

from digen_jax.data.prompts import PromptStream, read_prompts
from digen_jax.errors import UserError


def write(tmp_path, content, name="prompts.txt"):
  path = tmp_path / name
  path.write_bytes(content)
  return path


def test_lines_blank_lines_and_byte_order_mark(tmp_path, caplog):
  content = "\ufeffa red circle\r\n\n  \n два круга  \nlast".encode()
  path = write(tmp_path, content)
  with caplog.at_level(logging.WARNING):
    assert read_prompts(path) == ["a red circle", "два круга", "last"]
  assert "skipped 2 blank lines" in caplog.text


def test_jsonl(tmp_path):
  content = b'{"prompt": "a", "id": 3}\n\n{"prompt": " b "}\n'
  assert read_prompts(write(tmp_path, content, "p.jsonl")) == ["a", "b"]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("p.txt", b"", "holds no prompt"),
    ("p.txt", b"\n \n", "holds no prompt"),
    ("p.txt", b"fine\ncaf\xe9\n", r"line 2 is not UTF-8 \(byte 4: 0xe9\)"),
    ("p.jsonl", b'{"prompt": "a"}\nb\n', "line 2 is not a JSON object"),
    ("p.jsonl", b'{"text": "a"}\n', "line 1 is not a JSON object"),
    ("p.jsonl", b'{"prompt": 3}\n', "line 1 is not a JSON object"),
    ("p.jsonl", b"[1]\n", "line 1 is not a JSON object"),
    ("p.jsonl", b'{"prompt": " "}\n', "line 1 has an empty prompt"),
  ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
  path = write(tmp_path, content, name)
  with pytest.raises(UserError, match=message) as error:
    read_prompts(path)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


def test_missing_file_and_directory(tmp_path):
  for path in (tmp_path / "gone.txt", tmp_path):
    with pytest.raises(UserError, match="does not exist"):
      read_prompts(path)


def test_epochs_draw_every_prompt_once():
  prompts = tuple(f"p{i}" for i in range(10))
  stream = PromptStream(prompts, seed=3, per_step=4)
  walk = np.concatenate([stream.indices(k) for k in range(10)])
  epochs = walk.reshape(4, 10)
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(e) for e in epochs}) == 4
  assert list(stream.indices(1)) == list(walk[4:8])


def test_a_step_is_a_function_of_seed_and_step():
  prompts = tuple(map(str, range(50)))
  stream = PromptStream(prompts, seed=3, per_step=24)
  later = PromptStream(prompts, seed=3, per_step=24).indices(1000)
  for k in (0, 7):
    stream.indices(k)
  np.testing.assert_array_equal(stream.indices(1000), later)
  other = PromptStream(prompts, seed=4, per_step=24)
  assert list(other.indices(0)) != list(stream.indices(0))
  # A literal: runs of an older version resume with the same prompts.
  assert list(PromptStream(prompts, 0, 5).indices(0)) == [18, 23, 36, 4, 2]


def test_more_per_step_than_prompts():
  stream = PromptStream(("a", "b", "c"), seed=0, per_step=7)
  counts = np.bincount(stream.indices(0), minlength=3)
  assert counts.sum() == 7
  assert counts.min() >= 2


def test_empty_streams_are_refused():
  with pytest.raises(UserError, match="0 prompts"):
    PromptStream((), seed=0, per_step=1)
  with pytest.raises(UserError, match="0 per step"):
    PromptStream(("a",), seed=0, per_step=0)
