"""Writes the two tokenizers of a small FLUX pipeline, for a closed vocabulary.

The files are what transformers' `CLIPTokenizer` and `T5TokenizerFast` read.
Every known word is one token; anything else a user types falls back to bytes
(CLIP) or to characters and `<unk>` (T5). Both ignore case.
"""

import base64
import dataclasses
import json
import pathlib
import re
import string
import struct
from collections.abc import Sequence

from digen_jax.errors import UserError

_CLIP_BOS = "<|startoftext|>"
_CLIP_EOS = "<|endoftext|>"  # also CLIP's padding and unknown token
_WORD_END = "</w>"
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as T5 has them
_T5_SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """What the text encoders' configurations must agree on.

  Attributes:
    clip_vocab_size: number of CLIP tokens.
    clip_bos_id: id of CLIP's start token.
    clip_eos_id: id of CLIP's end (and padding) token, the highest.
    t5_vocab_size: number of T5 tokens; 0 pads, 1 ends, 2 is unknown.
    max_length: `model_max_length` of both.
  """

  clip_vocab_size: int
  clip_bos_id: int
  clip_eos_id: int
  t5_vocab_size: int
  max_length: int


def write_tokenizers(
  directory: str | pathlib.Path, words: Sequence[str], max_length: int
) -> TokenizerInfo:
  """Writes `tokenizer/` (CLIP) and `tokenizer_2/` (T5) under a pipeline.

  Args:
    directory: the pipeline directory; made if it is missing.
    words: the known words, lower-case ASCII letters, each once.
    max_length: `model_max_length`, special tokens included.

  Returns:
    The sizes and ids the text encoders are configured with.

  Raises:
    UserError: a word is not lower-case letters or is listed twice, or
      `max_length` leaves no room for a word.
  """
  for word in words:
    if not re.fullmatch("[a-z]+", word):
      raise UserError(
        f"tokenizer word {word!r}: use lower-case letters a-z only"
      )
  if len(set(words)) != len(words):
    twice = next(w for w in words if list(words).count(w) > 1)
    raise UserError(f"tokenizer word {twice!r} is listed twice: keep one")
  if max_length < 3:
    raise UserError(
      f"tokenizer max_length {max_length}: start, end and a word need 3"
    )
  directory = pathlib.Path(directory)
  vocab, merges = clip_vocabulary(words)
  pieces = t5_vocabulary(words)
  _write_clip(directory / "tokenizer", vocab, merges, max_length)
  _write_t5(directory / "tokenizer_2", pieces, max_length)
  return TokenizerInfo(
    clip_vocab_size=len(vocab),
    clip_bos_id=vocab[_CLIP_BOS],
    clip_eos_id=vocab[_CLIP_EOS],
    t5_vocab_size=len(pieces),
    max_length=max_length,
  )


def clip_vocabulary(
  words: Sequence[str],
) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """Byte-level BPE in which every word merges to a single token.

  A word is encoded with the merges so far, and the first two pieces left
  become the next merge, until one piece is left. Later merges rank lower and
  so never disturb a word that was already whole.

  Args:
    words: lower-case words.

  Returns:
    Token to id, in CLIP's order (256 bytes, 256 word-final bytes, merges,
    start, end), and the merges, best first.
  """
  merges: list[tuple[str, str]] = []
  for word in words:
    while len(pieces := _bpe(word, merges)) > 1:
      merges.append((pieces[0], pieces[1]))
  alphabet = _byte_alphabet()
  tokens = [*alphabet, *(c + _WORD_END for c in alphabet)]
  # Two merges may spell the same token; it has one id.
  tokens += dict.fromkeys(a + b for a, b in merges)
  tokens += [_CLIP_BOS, _CLIP_EOS]
  return {token: i for i, token in enumerate(tokens)}, merges


def t5_vocabulary(words: Sequence[str]) -> list[tuple[str, float]]:
  """Unigram pieces and log-probabilities: special, space, words, characters.

  Args:
    words: lower-case words.

  Returns:
    (piece, score) in the order of ids. One word scores above the characters
    that spell it, whatever its length.
  """
  characters = string.ascii_lowercase + string.digits + string.punctuation
  pieces = [(token, 0.0) for token in _T5_SPECIAL]
  pieces += [(_T5_SPACE, -10.0)]
  pieces += [(_T5_SPACE + word, -2.0) for word in words]
  pieces += [(c, -10.0) for c in characters]
  return pieces


def _bpe(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
  """Splits a word as byte-pair encoding does: best-ranked merge first."""
  pieces = [*word[:-1], word[-1] + _WORD_END]
  for a, b in merges:
    i = 0
    while i < len(pieces) - 1:
      if (pieces[i], pieces[i + 1]) == (a, b):
        pieces[i : i + 2] = [a + b]
      i += 1
  return pieces


def _byte_alphabet() -> list[str]:
  """The printable character that stands for each byte in byte-level BPE.

  Printable Latin-1 stands for itself; the other bytes, in order, for the
  code points from 256 on (GPT-2's convention, which CLIP keeps). Ordered as
  CLIP's ids are: the printable ones first.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = range(256, 256 + (256 - len(printable)))
  return [chr(c) for c in (*printable, *rest)]


def _lowercase_charsmap() -> bytes:
  """A SentencePiece character map that lower-cases ASCII.

  The format is a double-array trie from byte strings to offsets in a table
  of zero-terminated replacements, preceded by the trie's size in bytes. A
  unit holds its label in bits 0-7, "has a value" in bit 8, and from bit 10
  the offset that, xor-ed with the next byte, leads on; a value has bit 31.
  T5's tokenizer takes no other normaliser than such a map.
  """
  units = [0] * 768  # the root's block, the letters' block, the values' block
  units[0] = 256 << 10
  for i, letter in enumerate(string.ascii_uppercase.encode()):
    node, value = 256 ^ letter, 512 + i
    units[node] = ((node ^ value) << 10) | (1 << 8) | letter
    units[value] = (1 << 31) | (2 * i)
  trie = struct.pack("<768I", *units)
  table = "".join(c + "\0" for c in string.ascii_lowercase).encode()
  return struct.pack("<I", len(trie)) + trie + table


def _write_clip(
  directory: pathlib.Path,
  vocab: dict[str, int],
  merges: Sequence[tuple[str, str]],
  max_length: int,
) -> None:
  """Writes vocab.json, merges.txt and the two settings files of CLIP."""
  special = {
    "bos_token": _CLIP_BOS,
    "eos_token": _CLIP_EOS,
    "pad_token": _CLIP_EOS,
    "unk_token": _CLIP_EOS,
  }
  lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
  directory.mkdir(parents=True, exist_ok=True)
  _write_json(directory / "vocab.json", vocab)
  (directory / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
  _write_json(directory / "special_tokens_map.json", special)
  _write_json(
    directory / "tokenizer_config.json",
    {
      **special,
      "do_lower_case": True,
      "model_max_length": max_length,
      "tokenizer_class": "CLIPTokenizer",
    },
  )


def _write_t5(
  directory: pathlib.Path,
  pieces: Sequence[tuple[str, float]],
  max_length: int,
) -> None:
  """Writes tokenizer.json and the two settings files of T5."""
  pad, eos, unk = _T5_SPECIAL
  special = {"eos_token": eos, "pad_token": pad, "unk_token": unk}
  metaspace = {
    "type": "Metaspace",
    "replacement": _T5_SPACE,
    "prepend_scheme": "always",
    "split": True,
  }
  plain = {"single_word": False, "lstrip": False, "rstrip": False}
  sequence_a = {"Sequence": {"id": "A", "type_id": 0}}
  sequence_b = {"Sequence": {"id": "B", "type_id": 0}}
  end = {"SpecialToken": {"id": eos, "type_id": 0}}
  charsmap = base64.b64encode(_lowercase_charsmap()).decode()
  tokenizer = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {"id": i, "content": token, **plain, "normalized": False, "special": True}
      for i, token in enumerate(_T5_SPECIAL)
    ],
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
    },
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [sequence_a, end],
      "pair": [sequence_a, end, sequence_b, end],
      "special_tokens": {
        eos: {"id": eos, "ids": [_T5_SPECIAL.index(eos)], "tokens": [eos]}
      },
    },
    "decoder": metaspace,
    "model": {
      "type": "Unigram",
      "unk_id": _T5_SPECIAL.index(unk),
      "vocab": [list(piece) for piece in pieces],
      "byte_fallback": False,
    },
  }
  directory.mkdir(parents=True, exist_ok=True)
  _write_json(directory / "tokenizer.json", tokenizer)
  _write_json(directory / "special_tokens_map.json", special)
  _write_json(
    directory / "tokenizer_config.json",
    {
      **special,
      "extra_ids": 0,
      "model_max_length": max_length,
      "tokenizer_class": "T5Tokenizer",
    },
  )


def _write_json(path: pathlib.Path, value: object) -> None:
  path.write_text(
    json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8"
  )
