"""Text to token ids and back: byte-level BPE trained here, or any `tokenizer.json` of the tokenizers library.

Shapes: V tokens in the vocabulary.

The bytes of a token are read off its spelling, in the byte-level alphabet (GPT-2) or in byte fallback
(sentencepiece's `<0x0A>`, with '▁' for a space). Decoding a token alone would not do: half a UTF-8 character decodes
to U+FFFD, three bytes that were never in the text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lrt.data.encode_worker import without_processing

BOS = "<|bos|>"
"""The one special token of a tokenizer trained here."""
BOS_NAMES = (BOS, "<|endoftext|>", "<s>", "<bos>", "<|begin_of_text|>")
"""Special tokens that may open a document in a tokenizer made elsewhere, in order of preference."""
SMALLEST_VOCAB = 256 + 1
"""Every byte and BOS: below this some text could not be written."""
LARGEST_VOCAB = 1 << 22
"""Tokens of the largest vocabulary that is trained; known ones have up to 262,144."""
LONGEST_WORD = 1024
"""Characters of the longest word that a vocabulary is learnt from: the trainer's time grows with a word's square.

The longest word in 33 MB of books has 141, that of Python's standard library less than 100 (docs/log.md).
"""
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
"""What a text with a longer word holds: a word is blank or, behind its first character, has no blanks."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with the three things a language model needs of it: ids, BOS and bytes per token."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "the tokenizer") -> None:
        """Wrap `inner`, which is changed: no truncation, no padding, and special tokens in a text stay text.

        ValueError if it has no special token that can open a document; `name` is what the message calls it.
        """
        self.inner = without_processing(inner)
        added = inner.get_added_tokens_decoder()
        self.special: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        """Ids of the special tokens: they stand for no bytes, and no text encodes to them."""
        names = {added[i].content: i for i in self.special}  # content -> id
        candidates = [names[bos] for bos in BOS_NAMES if bos in names]
        if len(candidates) == 0:
            raise ValueError(
                f"{name} has no special token that can open a document (looked for {', '.join(BOS_NAMES)}); "
                f"add one to its added_tokens, for example with tokenizers' add_special_tokens(['{BOS}'])"
            )
        self.bos: int = candidates[0]
        """Id of the token that opens every document, window and row."""
        ids = inner.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids) + 1
        """V, one more than the largest id: some tokenizers leave holes."""

    def __repr__(self) -> str:
        return f"Tokenizer(vocabulary {self.vocab_size:,})"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE over `texts`; the same texts in the same order give the same tokenizer.

        Merging stops early where no pair of tokens occurs twice, so a small text gives fewer than `vocab_size`
        tokens. Words of more than `LONGEST_WORD` characters are learnt from in parts. ValueError below 257 tokens
        (256 bytes and BOS), and above `LARGEST_VOCAB`.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise ValueError(
                f"vocab_size is {vocab_size}; byte-level BPE needs at least {SMALLEST_VOCAB}: 256 bytes and {BOS}"
            )
        if vocab_size > LARGEST_VOCAB:
            raise ValueError(f"vocab_size is {vocab_size}; at most {LARGEST_VOCAB:,} tokens are learnt; give fewer")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = gpt2_words()
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(itertools.chain.from_iterable(map(cut_long_words, texts)), trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a `tokenizer.json`; ValueError naming the file if it is missing, damaged or without a BOS token."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no tokenizer file {path}; give the path of a tokenizer.json")
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for whatever it cannot read
            raise ValueError(f"{path} is not a readable tokenizer.json ({error}); save or copy it again") from error
        return cls(inner, name=str(path))

    def save(self, path: Path | str) -> None:
        """Write the tokenizer as one JSON file, which `load` and the tokenizers library read."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The canonical serialisation: the library's compact one, in which the vocabulary is ordered by id."""
        return self.inner.to_str(pretty=False)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of `to_json()`: two tokenizers with the same digest give the same tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no BOS or other special token is ever among them, but the one for what is unknown.

        ValueError for half a surrogate pair, and for a special token that is spelled in the text where the model makes
        that token of it (Unigram, WordLevel): a document would begin there.
        """
        try:
            return self._without_special(self.inner.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise not_unicode_error([text]) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel. ValueError as there."""
        try:
            encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise not_unicode_error(texts) from None
        return [self._without_special(encoding.ids) for encoding in encodings]

    def _without_special(self, ids: list[int]) -> list[int]:
        """`ids`; ValueError where a special token is among them."""
        if not self._unspellable.isdisjoint(ids):
            name = self.inner.id_to_token(next(i for i in ids if i in self._unspellable))
            raise ValueError(
                f"the text spells {name!r}, which this tokenizer has as a special token only; leave it out"
            )
        return ids

    def loss(self, text: str, ids: Sequence[int], first: bool = True, last: bool = True) -> str:
        """What is lost where `ids` stand for a piece of a document; "" where they give back every byte of it.

        first, last: whether the document begins and ends with the piece.
        """
        if self._pieces is None:
            if not (first and last):
                return "it is longer than is encoded at once, and only whole documents can be held against their tokens"
            kept = self.decode(ids) == text
        else:
            prefix = b" " if first and text and self._strips_space else b""
            kept = b"".join(map(self._pieces.__getitem__, ids)) == prefix + text.encode()
        return "" if kept and self.special.isdisjoint(ids) else self._describe_loss(text, ids)

    def _describe_loss(self, text: str, ids: Sequence[int]) -> str:
        """Where `ids` first part from `text`, and why."""
        back = self.decode(ids)
        at = next((i for i, (one, other) in enumerate(zip(text, back, strict=False)) if one != other), len(back))
        reasons = {
            "it spells a special token, which the model makes of the text": any(i in self._unspellable for i in ids),
            "the vocabulary lacks some of its characters": any(i in self.special - self._unspellable for i in ids),
            "'▁' (U+2581) stands for a space, and is in the text": "▁" in text,
            "'▁' (U+2581) is to stand for a space, and is not in the vocabulary": "▁" in back,
            "it begins with a space, as the tokenizer lets every text begin": text[:1] == " " != back[:1],
            "the tokenizer puts in a space": back.count(" ") > text.count(" "),
            "the normaliser rewrites it": self.inner.normalizer is not None,
        }
        why = next((reason for reason, holds in reasons.items() if holds), "the tokenizer does not keep all bytes")
        return f"{text[at : at + 20]!r} comes back as {back[at : at + 20]!r} ({why})"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens and ids outside the vocabulary give none, invalid UTF-8 gives U+FFFD."""
        if self._pieces is None:
            return self.inner.decode(list(ids), skip_special_tokens=True)
        stream = ByteStream(self._pieces, self._strips_space)
        return "".join([*map(stream.push, ids), stream.finish()])

    def decoder(self, after: Sequence[int] = ()) -> Stream:
        """Decode token by token, for printing as they arrive; `after` are the ids of the prompt they continue."""
        if self._pieces is None:
            return LibraryStream(self.inner, after)
        stream = ByteStream(self._pieces, self._strips_space)
        for i in after:  # the prompt may end within a character, and has the text's first space
            stream.push(i)
        return stream

    def spelling(self, token: int) -> bytes:
        """The bytes that one token adds to a text, which may be a part of a character; none for special tokens."""
        if self._pieces is None:
            return self.inner.decode([token], skip_special_tokens=True).encode()
        return self._pieces.get(token, b"")

    def token_bytes(self) -> torch.Tensor | None:
        """(V,) int64: UTF-8 bytes each token stands for, 0 for special tokens and holes.

        None where the tokenizer spells tokens neither in the byte-level alphabet nor with byte fallback; then only
        the size of whole documents is known. The table counts what is encoded: a normaliser that rewrites the text
        (NFC), or a space put in front of it (`prefix_bytes`), makes the sum over a document differ from its size.
        """
        if self._pieces is None:
            return None
        sizes = torch.zeros(self.vocab_size, dtype=torch.int64)
        for i, piece in self._pieces.items():
            sizes[i] = len(piece)
        return sizes

    def prefix_bytes(self, text: str) -> int:
        """Bytes of the space that some tokenizers (sentencepiece) put before a text; 0 for those trained here.

        `token_bytes()[encode(text)].sum() - prefix_bytes(text)` is the size of `text` in bytes.
        """
        if self._pieces is None or text == "":
            return 0
        first = text[0]  # alone it gets the same space, and is quickly encoded
        return sum(len(self._pieces.get(i, b"")) for i in self.encode(first)) - len(first.encode())

    @functools.cached_property
    def _pieces(self) -> Mapping[int, bytes] | None:
        """Token id -> its bytes. None where the vocabulary is neither byte-level (GPT-2) nor has byte fallback."""
        vocab = self.inner.get_vocab(with_added_tokens=True)
        added = self.inner.get_added_tokens_decoder()
        if "ByteLevel" in component_types(json.loads(self.to_json())):
            alphabet = byte_alphabet()
            # Added tokens are matched in the raw text and spelled as written, not in the alphabet.
            pieces = {i: s.encode() if i in added else alphabet_bytes(s, alphabet) for s, i in vocab.items()}
        elif all(fallback_name(byte) in vocab for byte in range(256)):
            single = {fallback_name(byte): bytes([byte]) for byte in range(256)}
            own = self.inner.get_vocab(with_added_tokens=False)
            # Added tokens as above, but for two kinds: where the normaliser has been at work ('▁' for a space), and
            # what the model can give too (Gemma adds its runs of '▁', which nearly always come from spaces).
            raw = {i for i, token in added.items() if not token.normalized and token.content not in own}
            pieces = {
                i: s.encode() if i in raw else single.get(s) or s.replace("▁", " ").encode() for s, i in vocab.items()
            }
        else:
            return None
        # No text encodes to a special token (`without_processing`), so that none of its bytes are a special token's.
        return pieces | dict.fromkeys(self.special, b"")

    @functools.cached_property
    def _strips_space(self) -> bool:
        """Whether the encoder puts a space before a text, which decoding then removes."""
        return self.prefix_bytes("a") > 0

    @functools.cached_property
    def _unspellable(self) -> frozenset[int]:
        """The special tokens but the one that stands for what is unknown, which comes of text."""
        model = json.loads(self.to_json())["model"]
        unknown = model.get("unk_id")
        if model.get("unk_token") is not None:
            unknown = self.inner.token_to_id(model["unk_token"])
        return self.special - {unknown}


class Stream(Protocol):
    """Incremental decoding: the concatenation of all it returns is the text."""

    def push(self, token: int) -> str:
        """Text that became certain with `token`; empty while a UTF-8 character is incomplete."""
        ...

    def finish(self) -> str:
        """What is still held back, an incomplete character as U+FFFD."""
        ...


class ByteStream:
    """Decode tokens whose bytes are known."""

    def __init__(self, pieces: Mapping[int, bytes], strip_space: bool) -> None:
        """`strip_space`: drop one space at the very beginning of the text."""
        self.pieces = pieces
        self.strip_space = strip_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._strip(self.utf8.decode(self.pieces.get(token, b"")))

    def finish(self) -> str:
        return self._strip(self.utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self.strip_space and text:
            self.strip_space = False
            return text.removeprefix(" ")
        return text


class LibraryStream:
    """Decode tokens of a tokenizer without bytes, such as WordPiece: the library knows how they join."""

    def __init__(self, inner: tokenizers.Tokenizer, after: Sequence[int]) -> None:
        self.inner = inner
        self.stream = decoders.DecodeStream(ids=list(after), skip_special_tokens=True)

    def push(self, token: int) -> str:
        return self.stream.step(self.inner, token) or ""

    def finish(self) -> str:
        return ""  # no bytes, so nothing is ever held back


def not_unicode_error(texts: Sequence[str]) -> ValueError:
    """Of texts that the library refuses: the one with half a surrogate pair, as Python has bytes that are not UTF-8."""
    wrong = next((text for text in texts if any("\ud800" <= character <= "\udfff" for character in text)), texts[0])
    return ValueError(f"{wrong[:80]!r} is not valid Unicode; give UTF-8 text")


def gpt2_words() -> pre_tokenizers.PreTokenizer:
    """What splits a text into words as GPT-2 does."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def cut_long_words(text: str) -> Iterator[str]:
    """`text` in parts, none of whose words has more than `LONGEST_WORD` characters; shorter words stay as they are."""
    start = 0
    if LONG_RUN.search(text):
        for _, (first, end) in gpt2_words().pre_tokenize_str(text):
            for cut in range(first + LONGEST_WORD, end, LONGEST_WORD):
                yield text[start:cut]
                start = cut
    yield text[start:]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable characters stand for themselves, other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def alphabet_bytes(spelling: str, alphabet: Mapping[str, int]) -> bytes:
    """Bytes that a token's spelling stands for; a spelling outside the alphabet stands for itself."""
    if all(character in alphabet for character in spelling):
        return bytes(alphabet[character] for character in spelling)
    return spelling.encode()


def fallback_name(byte: int) -> str:
    """How byte fallback spells a byte: <0x0A>."""
    return f"<0x{byte:02X}>"


def component_types(serialised: Mapping[str, Any]) -> set[str]:
    """The `type` of each part that splits or joins text, nested sequences included."""
    types: set[str] = set()
    parts: list[Any] = [serialised[key] for key in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            types.add(part.get("type", ""))
            for key in ("normalizers", "pretokenizers", "decoders"):
                parts.extend(part.get(key, []))
    return types
