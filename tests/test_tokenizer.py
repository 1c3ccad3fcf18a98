"""The written tokenizers, as transformers reads them."""

import pytest
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from digen_jax.data import tokenizer as tokenizer_lib
from digen_jax.errors import UserError

# Words that share beginnings, ends and insides: merges must not collide.
WORDS = (
  *("a", "one", "two", "three", "four", "of", "and", "above", "below"),
  *("red", "green", "blue", "yellow", "purple", "left", "right"),
  *("circle", "circles", "clear", "square", "squares", "triangle"),
  *("triangles", "tri", "angle", "abab", "ab", "aaaa", "aaa"),
)
PROMPT = "two red circles left of a blue square"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("pipeline")
  return directory, tokenizer_lib.write_tokenizers(directory, WORDS, 16)


@pytest.mark.parametrize("auto", [False, True])
def test_clip_tokenizer(written, auto):
  directory, info = written
  cls = AutoTokenizer if auto else CLIPTokenizer
  clip = cls.from_pretrained(directory / "tokenizer")
  assert (len(clip), clip.model_max_length) == (info.clip_vocab_size, 16)
  start, end = info.clip_bos_id, info.clip_eos_id
  assert end == info.clip_vocab_size - 1 and clip.pad_token_id == end
  ids = {word: clip(word).input_ids for word in WORDS}
  for word, (first, _, last) in ids.items():
    assert (first, last) == (start, end), word
  assert len({tuple(i) for i in ids.values()}) == len(WORDS)
  padded = clip(PROMPT, padding="max_length", truncation=True, max_length=16)
  expected = [start, *(ids[word][1] for word in PROMPT.split())]
  assert padded.input_ids == expected + [end] * 7
  assert clip("Two  RED\ncircles").input_ids == [*expected[:4], end]
  assert clip.decode(clip("é 你好!").input_ids[1:-1]) == "é 你好 !"
  cut = clip("zebra " * 9, padding="max_length", truncation=True, max_length=16)
  assert len(cut.input_ids) == 16 and cut.input_ids[-1] == end


@pytest.mark.parametrize("auto", [False, True])
def test_t5_tokenizer(written, auto):
  directory, info = written
  cls = AutoTokenizer if auto else T5TokenizerFast
  t5 = cls.from_pretrained(directory / "tokenizer_2")
  assert (len(t5), t5.model_max_length) == (info.t5_vocab_size, 16)
  ids = {word: t5(word).input_ids for word in WORDS}
  for word, (_, last) in ids.items():
    assert last == 1, word
  assert len({tuple(i) for i in ids.values()}) == len(WORDS)
  padded = t5(PROMPT, padding="max_length", truncation=True, max_length=16)
  expected = [ids[word][0] for word in PROMPT.split()]
  assert padded.input_ids == [*expected, 1, *[0] * 7]
  assert t5("Two  RED\ncircles.").input_ids == [
    *t5("two red circles").input_ids[:-1],
    t5.convert_tokens_to_ids("."),
    1,
  ]
  assert t5.tokenize("zebra 42") == ["▁", *"zebra", "▁", *"42"]
  assert 2 in t5("你好").input_ids


@pytest.mark.parametrize(
  ("words", "length", "message"),
  [
    (["red", "Blue"], 16, "'Blue': use lower-case"),
    (["red", "red"], 16, "'red' is listed twice"),
    (["red"], 2, "max_length 2"),
  ],
)
def test_bad_vocabulary(tmp_path, words, length, message):
  with pytest.raises(UserError, match=message):
    tokenizer_lib.write_tokenizers(tmp_path, words, length)
  assert not list(tmp_path.iterdir())
