"""Whatever the tokenizer: the bytes that are scored are the document's and it decodes to itself, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from lrt.data import encode_worker, sources
from lrt.data.prepare import prepare
from lrt.data.sources import cut_documents
from lrt.data.tokenizer import Tokenizer

CASES = Path(__file__).parent / "cases"
SPECIAL = ["<unk>", "<s>", "</s>"]
SAMPLE = [
    "some words and Some more, with 12 numbers",
    "größer é e\u0301 words a▁b",
    "<s> more </s> text  of it\n",
    "aab ab a b",
]
FRAGMENTS = (
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "▁",
    "Ġ",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2028",
    "\ufeff",
    "\0",
)
WORDS = (
    "a",
    "ab",
    "word",
    "words",
    "Some",
    "É",
    "é",
    "e\u0301",
    "ﬁ",
    "12",
    "🙂",
    "\U0001f9e0",
    "语",
    "##a",
    "[UNK]",
    "    ",
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS + WORDS) | st.text(max_size=3), min_size=1, max_size=12).map("".join)
TEXTS = TEXTS.filter(bool)


def byte_level(prefix: bool = False, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    inner = Tokenizer.train(SAMPLE, 290).inner
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens(SPECIAL)
    if not prefix:  # else a space is put before whatever follows an added token
        inner.add_tokens([AddedToken("    ", normalized=False), AddedToken("wor", normalized=True)])
    return inner


def partial_alphabet() -> tokenizers.Tokenizer:
    """Byte-level, without most bytes: what it lacks has no token at all."""
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "<s>": 3}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<s>"])
    return inner


def spelled_by_merges() -> tokenizers.Tokenizer:
    """BPE that makes a special token of its characters."""
    data = json.loads(Tokenizer.train(SAMPLE, 290).to_json())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    data["model"]["vocab"] = vocab | {"<s": len(vocab), "<s>": len(vocab) + 1}
    data["model"]["merges"] = [["<", "s"], ["<s", ">"], *merges]
    inner = tokenizers.Tokenizer.from_str(json.dumps(data))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_special_tokens(["<s>"])
    return inner


def fallback(scheme: str, marked: bool = True) -> tokenizers.Tokenizer:
    """BPE with byte fallback, as sentencepiece makes it. marked: whether its vocabulary has the sign for a space."""
    vocab = {token: i for i, token in enumerate(SPECIAL)} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in [*(["▁"] if marked else []), *"abdeomnrsw", *(["▁a"] if marked else []), "or", "é"]:
        vocab[token] = len(vocab)
    merges = [*([("▁", "a")] if marked else []), ("o", "r")]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(joined)
    if scheme == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        inner.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])
    elif scheme == "replace":
        inner.normalizer = replace
    elif scheme != "none":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    inner.add_special_tokens(SPECIAL)
    return inner


def unigram(scheme: str, byte_fallback: bool) -> tokenizers.Tokenizer:
    pieces = [(token, 0.0) for token in SPECIAL]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(token, -3.0) for token in ["▁", *"abdeormnsw<>/12,", "▁wor", "or", "ds", "é"]]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    if byte_fallback:
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(SPECIAL)
    return inner


def word_level(split: pre_tokenizers.PreTokenizer | None) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    if split is not None:
        inner.pre_tokenizer = split
    trainer = trainers.WordLevelTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator([*SAMPLE, "a"], trainer)
    return inner


def word_piece() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator(SAMPLE, trainer)
    return inner


LOSSLESS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "trained": lambda: Tokenizer.train(SAMPLE, 290).inner,
    "byte-level": byte_level,
}
"""What gives back every text."""
MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = LOSSLESS | {
    "byte-level prefix": lambda: byte_level(prefix=True),
    "byte-level NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "byte-level strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "byte-level partial": partial_alphabet,
    "byte-level spelled": spelled_by_merges,
    "fallback": lambda: fallback("replace"),
    "fallback prepend": lambda: fallback("prepend"),
    "fallback unmarked": lambda: fallback("replace", marked=False),
    "fallback unmarked prepend": lambda: fallback("prepend", marked=False),
    "fallback untouched": lambda: fallback("none"),
    **{
        f"fallback metaspace {scheme}": lambda scheme=scheme: fallback(scheme)
        for scheme in ("always", "first", "never")
    },
    **{
        f"unigram {scheme} {bytes_}": lambda scheme=scheme, bytes_=bytes_: unigram(scheme, bytes_)
        for scheme in ("always", "first", "never")
        for bytes_ in (False, True)
    },
    "words": lambda: word_level(pre_tokenizers.Whitespace()),
    "words split": lambda: word_level(pre_tokenizers.WhitespaceSplit()),
    "words whole": lambda: word_level(None),
    "word pieces": word_piece,
}
MADE: dict[str, Tokenizer] = {}


def made(name: str) -> Tokenizer:
    """One tokenizer for all examples."""
    if name not in MADE:
        MADE[name] = Tokenizer(MAKERS[name]())
    return MADE[name]


def encode_document(subject: Tokenizer, text: str) -> tuple[list[int], str]:
    """The ids of a document in its pieces, as `prepare` encodes them, and what they lose."""
    pieces = list(cut_documents([(text, "train")]))
    encoder = encode_worker.Encoder.of(subject.inner)
    ids, lengths = encode_worker.encode(encoder, [p.text for p in pieces], [p.first for p in pieces], "<u4")
    start, losses = 0, []
    for piece, length in zip(pieces, lengths, strict=True):
        losses.append(subject.loss(piece.text, ids[start : start + length].tolist(), piece.first, piece.last))
        start += length
    return ids.tolist(), "".join(losses)


@pytest.fixture(scope="module", autouse=True)
def short_pieces():
    """Documents of some words come in pieces, as those of 262,144 characters do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 10)
        yield


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_every_byte_is_scored_once_or_the_text_is_refused(name: str, text: str) -> None:
    subject = made(name)
    ids, lost = encode_document(subject, text)
    assert not (name in LOSSLESS and lost)
    if lost:
        assert len(lost) > 20
        return
    sizes = subject.token_bytes()
    if sizes is not None:  # else the documents' size itself is what is divided by
        assert int(sizes[ids].sum()) - subject.prefix_bytes("a") == len(text.encode())
    assert subject.decode(ids) == text
    assert subject.special.isdisjoint(ids)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("byte-level partial", "byte-level strip")])
def test_a_plain_text_is_taken(name: str) -> None:
    """The property would hold, too, if everything were refused."""
    unmarked = "unmarked" in name
    text = {"words whole": "a", "words": "some", "words split": "some", "word pieces": "some"}.get(
        name, "a word or a wordword or"
    )
    ids, lost = encode_document(made(name), text)
    assert (lost != "") == (unmarked or (made(name).token_bytes() is None and len(text) > 10)), lost
    assert len(ids) > 0


def test_further_pieces_get_no_space_of_their_own() -> None:
    for name in ("byte-level prefix", "fallback prepend", "fallback metaspace always", "unigram always True"):
        text = "wordword" * 20
        ids, lost = encode_document(made(name), text)
        assert lost == ""
        assert made(name).decode(ids) == text


@pytest.mark.parametrize("name", ["space_by_fallback", "special_spelled"])
def test_prepare_refuses_and_names_why(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 1 << 18)
    texts = {
        "space_by_fallback": "the cat sat on the mat",
        "special_spelled": "a text with <s> in it",
    }
    lines = [{"text": f"{texts[name]} {number}"} for number in range(300)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    why = {"space_by_fallback": "is not in the vocabulary", "special_spelled": "it spells a special token"}[name]
    with pytest.raises(ValueError, match=rf"loses text of text\.jsonl, in the document .*{why}"):
        prepare(
            tmp_path / "out", [tmp_path / "text.jsonl"], tokenizer=CASES / f"{name}.json", progress=False, workers=0
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]


@pytest.mark.parametrize("name", ["unigram never False", "unigram always True", "words split", "byte-level spelled"])
def test_no_text_encodes_to_a_special_token(name: str) -> None:
    for encode in (made(name).encode, lambda text: made(name).encode_batch([text])):
        with pytest.raises(ValueError, match="spells '<s>', which this tokenizer has as a special token only"):
            encode("a <s> b")
    assert made("byte-level").encode("a <s> b")
