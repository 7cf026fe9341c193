"""Text to rows: bytes are counted exactly, every token is a target once, folders are whole or refused."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lrt.data.corpus import read_text, stdlib_files
from lrt.data.loader import Position, Rows
from lrt.data.packing import pack
from lrt.data.prepare import prepare
from lrt.data.prepared import Documents, Prepared
from lrt.data.shards import SplitWriter
from lrt.data.splits import assign_splits, cut_places
from lrt.data.tokenizer import BOS, LONGEST_WORD, Tokenizer, cut_long_words, gpt2_words
from lrt.data.windows import windows

SAMPLES = (
    "def f(x):\n    return x  # plain code\r\n\ttabs\n",
    "Grüße, déjà vu — ’quoted’ … 你好，世界 🙂👩‍👩‍👧🏽 \U0001f9e0\n",
    f"a line with {BOS} in it, <s> and <|endoftext|>\n",
    " leading space, \u2028 separators, \ufeff and trailing   ",
    "",
)


@pytest.fixture(scope="module")
def library() -> list[Path]:
    return stdlib_files()


@pytest.fixture(scope="module")
def tokenizer(library: list[Path]) -> Tokenizer:
    return Tokenizer.train([read_text(path) for path in library[:40]], 700)


def fallback_tokenizer(prefix: bool) -> Tokenizer:
    """A sentencepiece-like tokenizer: '▁' for a space, bytes for what it does not know."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    merges = [("▁", "a"), ("e", "r"), ("▁", "▁"), ("▁▁", "▁▁"), ("é", "r")]
    for piece in ["▁", *"abcdefghijklmnoprstuvwxyz", "é", *(one + other for one, other in merges)]:
        vocab.setdefault(piece, len(vocab))
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    inner.add_special_tokens(["<unk>", "<s>"])
    return Tokenizer(inner)


def word_tokenizer() -> Tokenizer:
    """A tokenizer that spells tokens neither in bytes nor with byte fallback."""
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        ["plain words only, words and more words"] * 3,
        trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]", "<s>"], show_progress=False),
    )
    return Tokenizer(inner)


def documents(lengths: list[int]) -> Documents:
    """Documents in which every token occurs once: token i + 1 at place i, BOS is 0."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Documents(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, bos=0)


def write_files(folder: Path, count: int, lines: int = 60) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"text{i}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes("".join(f"file {i}, line {n}: größer 🙂 {n * n}\n" for n in range(lines)).encode())
    return paths


# Tokenizer


def test_token_bytes_sum_to_the_file(library: list[Path], tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes.dtype == torch.int64
    assert sizes[tokenizer.bos] == 0
    for text in [*SAMPLES, *(read_text(path) for path in library[100:110])]:
        ids = tokenizer.encode(text)
        assert sum(sizes[i].item() for i in ids) == len(text.encode())
        assert tokenizer.prefix_bytes(text) == 0
        assert tokenizer.decode(ids) == text


def test_bytes_are_not_those_of_a_token_decoded_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9e0")
    sizes = tokenizer.token_bytes()
    assert len(ids) > 1
    assert sizes is not None
    assert sum(sizes[i].item() for i in ids) == 4 != sum(len(tokenizer.decode([i]).encode()) for i in ids)


@pytest.mark.parametrize("prefix", [False, True])
def test_token_bytes_with_byte_fallback(prefix: bool) -> None:
    tokenizer = fallback_tokenizer(prefix)
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    assert sizes[0] == sizes[1] == 0
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert sum(sizes[i].item() for i in ids) - tokenizer.prefix_bytes(text) == len(text.encode())
        assert tokenizer.prefix_bytes(text) == (1 if prefix and text else 0)
        assert tokenizer.decode(ids) == text == tokenizer.inner.decode(ids)
    assert any(2 <= i < 258 for i in tokenizer.encode("🙂"))  # the fallback was in fact used


def test_added_tokens_that_are_not_special_count_as_written() -> None:
    inner = Tokenizer.train(["some text " * 5], 300).inner
    inner.add_tokens([tokenizers.AddedToken("    ", normalized=False), tokenizers.AddedToken("é🙂", normalized=False)])
    tokenizer = Tokenizer(inner)
    sizes, text = tokenizer.token_bytes(), "x    é🙂 y"
    ids = tokenizer.encode(text)
    assert sizes is not None
    assert len(ids) == 5
    assert sum(sizes[i].item() for i in ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_added_tokens_beside_byte_fallback_count_as_written() -> None:
    inner = fallback_tokenizer(prefix=False).inner
    # The first is matched in the raw text, so that its '▁' is one. The second is a token of the model too: two spaces.
    inner.add_tokens([tokenizers.AddedToken(s, normalized=False) for s in ("<tool▁call>", "▁▁")])
    tokenizer = Tokenizer(inner)
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    for text, count in (("a<tool▁call>b", 3), ("a  b", 3)):
        ids = tokenizer.encode(text)
        assert len(ids) == count
        assert sum(sizes[i].item() for i in ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_a_tokenizer_without_bytes_says_so() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.token_bytes() is None
    assert tokenizer.prefix_bytes("words") == 0
    ids = tokenizer.encode("plain words and more")
    stream = tokenizer.decoder()
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == tokenizer.decode(ids) == "plain words and more"


@pytest.mark.parametrize("kind", ["trained", "fallback", "prefixed"])
def test_streaming_equals_decoding_at_once(kind: str, tokenizer: Tokenizer) -> None:
    subject = tokenizer if kind == "trained" else fallback_tokenizer(prefix=kind == "prefixed")
    rng = random.Random(0)
    streams = [subject.encode(text) for text in SAMPLES]
    streams += [[rng.randrange(subject.vocab_size + 3) for _ in range(50)] for _ in range(50)]  # mostly invalid UTF-8
    for ids in streams:
        stream = subject.decoder()
        pieces = [stream.push(i) for i in ids]
        assert "".join([*pieces, stream.finish()]) == subject.decode(ids)
    for text in SAMPLES:
        stream = subject.decoder()
        assert all("\ufffd" not in stream.push(i) for i in subject.encode(text))


def test_streaming_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    stream = tokenizer.decoder()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🙂"]
    assert [stream.push(ids[0]), stream.finish()] == ["", "\ufffd"]


def test_a_stream_after_a_prompt_keeps_its_first_space() -> None:
    subject = fallback_tokenizer(prefix=True)
    prompt, continuation = subject.encode("hi"), subject.encode("a")
    assert "".join(subject.decoder().push(i) for i in continuation) == "a"
    stream = subject.decoder(after=prompt)
    assert "".join(stream.push(i) for i in continuation) == " a"


def test_special_tokens_in_a_file_stay_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for subject in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        text = f"{BOS}x{BOS}"
        assert subject.bos not in subject.encode(text)
        assert subject.decode(subject.encode(text)) == text
        assert subject.encode_batch([text, "y"]) == [subject.encode(text), subject.encode("y")]
    assert 1 not in fallback_tokenizer(prefix=False).encode("a <s> b")
    heavy = Tokenizer.train([BOS * 50], 400)
    assert heavy.bos not in heavy.encode(BOS * 3)


def test_training_is_deterministic_and_saved_exactly(library: list[Path], tmp_path: Path) -> None:
    texts = [read_text(path) for path in library[:12]]
    one, other = Tokenizer.train(texts, 400), Tokenizer.train(iter(texts), 400)
    assert one.vocab_size == 400
    assert one.bos == 0
    assert one.to_json() == other.to_json()
    assert one.sha256 == other.sha256
    one.save(tmp_path / "a.json")
    one.inner.save(str(tmp_path / "b.json"), pretty=True)
    assert Tokenizer.load(tmp_path / "a.json").sha256 == Tokenizer.load(tmp_path / "b.json").sha256 == one.sha256
    assert Tokenizer.train(texts[1:], 400).sha256 != one.sha256


def uncut(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """What the library's own trainer learns from whole words."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


@pytest.mark.parametrize(
    "text",
    [
        "".join(chr(97 + n * n % 7) for n in range(LONGEST_WORD)),  # the longest word that is not cut
        " " + "größer" * (LONGEST_WORD // 6) + "🙂" * 900 + "12345" * 200 + " " * 900 + "\n" * 100,
        "a,b;c=" * 5000,  # a long run without blanks, of short words
    ],
)
def test_words_below_the_bound_are_learnt_from_whole(text: str, library: list[Path]) -> None:
    texts = [read_text(library[0]), f"{text}. {text}", text]
    assert Tokenizer.train(texts, 500).to_json() == Tokenizer(uncut(texts, 500)).to_json()


def test_other_texts_learn_what_they_did(library: list[Path]) -> None:
    texts = [read_text(path) for path in library[:60]]
    assert Tokenizer.train(texts, 600).to_json() == Tokenizer(uncut(texts, 600)).to_json()


@pytest.mark.parametrize("letters", ["abcdefghij", "语言模型学习文字", " \n", "0123456789"])
def test_a_long_word_is_cut_for_training_alone(letters: str) -> None:
    rng = random.Random(0)
    word = "".join(rng.choice(letters) for _ in range(3 * LONGEST_WORD + 7))
    text = f"some words {word} and more"
    parts = list(cut_long_words(text))
    assert "".join(parts) == text
    words = [(word, end - first) for part in parts for word, (first, end) in gpt2_words().pre_tokenize_str(part)]
    whole = gpt2_words().pre_tokenize_str(text)
    short = [word for word, (first, end) in whole if end - first <= LONGEST_WORD]
    assert short[0] == "some"
    kept = set(short)
    assert [word for word, _ in words if word in kept] == short
    assert max(size for _, size in words) <= LONGEST_WORD
    made = Tokenizer.train([text], 400)
    assert made.decode(made.encode(text)) == text


def test_a_text_without_a_space_is_learnt_from_in_its_length() -> None:
    """A word of 300 KB took minutes: time grew with its square. Seconds of CPU, here 0.5."""
    rng = random.Random(0)
    text = "".join(rng.choice("abcdefghij") for _ in range(300_000))
    began = time.process_time()
    assert Tokenizer.train([text], 600).vocab_size == 600
    assert time.process_time() - began < 15


def test_a_loaded_tokenizer_neither_truncates_nor_pads(tmp_path: Path) -> None:
    inner = Tokenizer.train(["some text"], 300).inner
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.decode(loaded.encode("some text")) == "some text"
    assert loaded.bos not in loaded.encode("some text")


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train(["text"], 256)
    with pytest.raises(ValueError, match=r"no tokenizer file .*nowhere\.json"):
        Tokenizer.load(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"broken\.json is not a readable"):
        Tokenizer.load(tmp_path / "broken.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.json is not a readable"):
        Tokenizer.load(tmp_path / "bytes.json")
    tokenizers.Tokenizer(models.BPE({"<s>": 0, "a": 1}, [])).save(str(tmp_path / "plain.json"))
    with pytest.raises(ValueError, match=r"plain\.json has no special token"):
        Tokenizer.load(tmp_path / "plain.json")


# Preparing


def test_stdlib_files(library: list[Path]) -> None:
    root = next(folder for folder in library[0].parents if (folder / "os.py") in library)
    names = [path.relative_to(root).as_posix() for path in library]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert library == stdlib_files()
    assert sum(path.stat().st_size for path in library) > 5_000_000
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any(excluded & set(Path(name).parts) for name in names)
    assert all(name.endswith(".py") for name in names)


def test_prepare_splits_files(library: list[Path], tmp_path: Path) -> None:
    files = library[:60]
    made = prepare(tmp_path / "out", files, vocab_size=400, progress=False)
    entries = made.manifest["splits"]
    assert sum(entry["files"] for entry in entries.values()) == len(files)
    assert sum(entry["bytes"] for entry in entries.values()) == sum(path.stat().st_size for path in files)
    sizes = made.tokenizer.token_bytes()
    assert sizes is not None
    texts = []
    for name, entry in entries.items():
        split = made.split(name)
        assert len(split) == entry["files"] == entry["documents"] > 0
        assert split.bytes == entry["bytes"]
        assert len(split.tokens) == entry["tokens"]
        assert split.tokens.dtype == np.uint16
        assert isinstance(split.tokens, np.memmap)
        assert int(sizes[torch.from_numpy(split.tokens.astype(np.int64))].sum()) == entry["bytes"]
        assert made.tokenizer.bos not in split.tokens
        texts += [made.tokenizer.decode(document.tolist()) for document in split]
    assert sorted(texts) == sorted(read_text(path) for path in files)
    train = [read_text(path) for path in files]
    train = [text for text in train if text in texts[: len(made.split("train"))]]
    assert Tokenizer.train(train, 400).sha256 == made.tokenizer.sha256  # the training split alone
    with pytest.raises(ValueError, match="no split 'valid'"):
        made.split("valid")


def test_splits_are_stable_when_files_are_added() -> None:
    names = [f"folder/file{i}.py" for i in range(1000)]
    before, after = (
        dict(zip(names, assign_splits(names), strict=True)),
        assign_splits(sorted([*names, "a", "zz", "folder/new"])),
    )
    assert before.items() <= dict(zip(sorted([*names, "a", "zz", "folder/new"]), after, strict=True)).items()
    assert 860 < list(before.values()).count("train") < 940
    for count in range(10, 40):
        assert set(assign_splits(names[:count])) == {"train", "val", "test"}


def test_prepare_three_files_of_a_user(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", 3)
    made = prepare(tmp_path / "out", files, vocab_size=300, progress=False)
    parts = {name: [made.tokenizer.decode(d.tolist()) for d in made.split(name)] for name in ("train", "val", "test")}
    for i, path in enumerate(files):
        assert "".join(parts[name][i] for name in parts) == read_text(path)
        assert all(parts[name][i].endswith("\n") for name in parts)
    assert {key: value for key, value in made.manifest["splits"]["val"].items() if key != "shards"} == {
        **{"files": 3, "documents": 3, "tokens": len(made.split("val").tokens)},
        "bytes": sum(len(text.encode()) for text in parts["val"]),
    }


def test_contiguous_parts_without_lines() -> None:
    for text in ("é" * 1000, "xé" * 500, "ab\n" * 500, "a" * 930 + "\n" + "b" * 69, "abc", "\n" * 100):
        data = text.encode()
        val, test = cut_places(data)
        parts = [data[:val].decode(), data[val:test].decode(), data[test:].decode()]
        assert "".join(parts) == text
        if len(data) >= 100:
            assert 0.87 <= val / len(data) <= 0.93
            assert min(map(len, parts)) > 0


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text("".join(f"{n} " for n in range(600)))
    made = prepare(tmp_path / "out", [path], vocab_size=50_000, progress=False)
    assert 257 < made.vocab_size < 2000
    assert made.manifest["vocab_size"] == made.vocab_size


def test_prepare_with_a_given_tokenizer(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", 2)
    fallback_tokenizer(prefix=True).save(tmp_path / "given.json")
    made = prepare(tmp_path / "out", files, tokenizer=tmp_path / "given.json", progress=False)
    assert made.tokenizer.sha256 == Tokenizer.load(tmp_path / "given.json").sha256
    assert made.split("train").bos == 1
    assert made.manifest["arguments"]["vocab_size"] is None


def test_large_vocabularies_use_uint32(tmp_path: Path) -> None:
    inner = Tokenizer.train(["text"], 300).inner
    inner.add_tokens([f"never{i}" for i in range(1 << 16)])
    inner.save(str(tmp_path / "large.json"))
    files = write_files(tmp_path / "in", 2)
    made = prepare(tmp_path / "out", files, tokenizer=tmp_path / "large.json", progress=False)
    assert made.split("train").tokens.dtype == np.uint32


def test_a_prepared_folder_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_files(tmp_path / "in", 3)
    out = tmp_path / "out"
    first = prepare(out, files, vocab_size=300, progress=False)
    stamp = (out / "train.00000.tokens.npy").stat()
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", None)  # any work would fail
        again = prepare(out, files[::-1], vocab_size=300, progress=False)
    assert again.manifest == first.manifest
    assert (out / "train.00000.tokens.npy").stat().st_ino == stamp.st_ino
    other = prepare(tmp_path / "elsewhere", files, vocab_size=300, progress=False)
    assert other.manifest == first.manifest  # hashes of the tokens included

    assert prepare(out, files, vocab_size=290, progress=False).vocab_size == 290
    before = first.manifest["splits"]["test"]["bytes"]
    files[0].write_text(read_text(files[0]) + "one more line\n")
    changed = prepare(out, files, vocab_size=290, progress=False)
    assert changed.split("test").bytes > before
    (out / "val.00000.tokens.npy").write_bytes(b"damaged")
    assert prepare(out, files, vocab_size=290, progress=False).manifest == changed.manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "in", "out"]


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    cases = {
        "empty.txt": (b"", "empty.txt holds no text"),
        "blank.txt": (b" \n\t\r\n", "blank.txt holds no text"),
        "nul.bin": (b"text\0more", r"nul.bin is binary \(a NUL byte at offset 4"),
        "latin.txt": (b"caf\xe9 au lait", r"latin.txt is not UTF-8 text \(byte 0xe9 at offset 3"),
        "short.txt": (b"x" * 1999, "too short: 1999 bytes in 1 file"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "out", [tmp_path / name], progress=False)
    with pytest.raises(ValueError, match=r"no file .*nowhere\.txt"):
        prepare(tmp_path / "out", [tmp_path / "nowhere.txt"], progress=False)
    with pytest.raises(ValueError, match=r"out lies in .*; write to a folder outside it"):
        prepare(tmp_path / "out", [tmp_path], progress=False)
    with pytest.raises(ValueError, match="texts is empty"):
        prepare(tmp_path / "out", [], progress=False)
    with pytest.raises(ValueError, match=r"short\.txt is given twice"):
        prepare(tmp_path / "out", [tmp_path / "short.txt", tmp_path / "in" / ".." / "short.txt"], progress=False)
    assert not (tmp_path / "out").exists()


def test_newlines_and_bytes_are_untouched(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfone\r\ntwo\rthree\n\n\tfour"
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt").encode() == data


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", 3)
    with pytest.raises(ValueError, match=r"holds other files \(text0\.txt"):
        prepare(tmp_path / "in", files, vocab_size=300, progress=False)
    with pytest.raises(ValueError, match=r"text0\.txt is a file"):
        prepare(files[0], files, vocab_size=300, progress=False)
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", files, vocab_size=300, progress=False).vocab_size == 300


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    files, out = write_files(tmp_path / "in", 3), tmp_path / "out"

    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Prepared.open(out)
        for file in out.iterdir():
            file.unlink()
        prepare(out, files, vocab_size=300, progress=False)

    def edit(change) -> None:
        manifest = json.loads((out / "manifest.json").read_text())
        change(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ValueError, match="is not a prepared folder"):
        Prepared.open(out)
    prepare(out, files, vocab_size=300, progress=False)
    for name in ("train.00000.tokens.npy", "val.00000.documents.npy"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-2])
        refuses(f"{name} is truncated")
        (out / name).unlink()
        refuses(f"{name} is missing")
    (out / "test.00000.tokens.npy").write_bytes(b"")
    refuses(r"test\.00000\.tokens\.npy is truncated")
    np.save(out / "test.00000.tokens.npy", np.zeros(3, np.uint16))
    refuses(r"test\.00000\.tokens\.npy holds \(3,\)")
    offsets = np.load(out / "val.00000.documents.npy")
    np.save(out / "val.00000.documents.npy", offsets[::-1])
    refuses(r"val\.00000\.documents\.npy is damaged")
    (out / "manifest.json").write_text("{")
    refuses(r"manifest\.json is damaged")
    edit(lambda m: m.update(format=99))
    refuses("not a manifest of format")
    edit(lambda m: m["splits"]["train"].update(tokens=5))
    refuses(r"manifest\.json is damaged \(train has 5 tokens, its shards")
    edit(lambda m: m["splits"]["train"]["shards"][0].update(tokens=5))
    refuses(r"train\.00000\.tokens\.npy holds .* says 5")
    edit(lambda m: m["splits"]["train"].update(shards=[]))
    refuses(r"manifest\.json is damaged \(no shards of train")
    edit(lambda m: m["splits"].pop("val"))
    refuses(r"manifest\.json is damaged .*val")
    edit(lambda m: m.update(tokenizer_sha256="0"))
    refuses(r"tokenizer\.json is not the tokenizer")
    Tokenizer.train(["another"], 300).save(out / "tokenizer.json")
    refuses(r"tokenizer\.json is not the tokenizer")


# Windows


@pytest.mark.parametrize("context", [2, 5, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_windows_score_every_token_once(context: int, batch_size: int) -> None:
    data = documents([1, 40, 15, 16, 3, 2, 30, 1])
    seen: list[int] = []
    chosen = windows(data, context)
    assert chosen.complete
    for batch in chosen.batches(batch_size):
        tokens, targets = batch.tokens, batch.targets
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.shape == targets.shape
        assert tokens.shape[0] <= batch_size
        assert tokens.shape[1] <= context
        assert batch.documents is None
        assert (tokens[:, 0] == data.bos).all()
        assert (targets[:, -1] == -1).all()
        valid = targets[:, :-1] >= 0
        assert (targets[:, :-1][valid] == tokens[:, 1:][valid]).all()
        assert (tokens[:, 1:][~valid] == data.bos).all()
        for row in targets:
            text = row[row >= 0]
            assert (text == torch.arange(int(text[0]), int(text[0]) + len(text))).all()
            assert len(set(np.searchsorted(data.offsets, text.numpy() - 1, side="right"))) == 1
            seen += text.tolist()
    assert sorted(seen) == list(range(1, len(data.tokens) + 1))
    assert chosen.targets == len(seen)


def test_windows_of_a_file_hold_its_bytes(tmp_path: Path) -> None:
    made = prepare(tmp_path / "out", write_files(tmp_path / "in", 3), vocab_size=300, progress=False)
    sizes = made.tokenizer.token_bytes()
    assert sizes is not None
    for name in ("train", "val", "test"):
        targets = torch.cat([batch.targets.flatten() for batch in windows(made.split(name), 32).batches(8)])
        assert int(sizes[targets[targets >= 0]].sum()) == made.split(name).bytes


def test_a_sample_of_windows_is_spread_and_reproducible() -> None:
    data = documents([(n * 37) % 200 + 1 for n in range(200)])
    chosen, again = windows(data, 16, at_least=3000, seed=1), windows(data, 16, at_least=3000, seed=1)
    assert not chosen.complete
    assert 3000 <= chosen.targets <= 3200
    assert (chosen.starts == again.starts).all()
    assert (chosen.lengths == again.lengths).all()
    assert len(set(chosen.starts.tolist())) == len(chosen)
    assert chosen.starts.tolist() != windows(data, 16, at_least=3000, seed=2).starts.tolist()
    quarters = np.histogram(chosen.starts, bins=4, range=(0, len(data.tokens)))[0]
    assert quarters.min() > 0.8 * quarters.max()

    def targets(batch_size: int) -> list[int]:
        return sorted(t for b in chosen.batches(batch_size) for t in b.targets[b.targets >= 0].tolist())

    assert targets(1) == targets(7) == targets(1000)
    assert len(targets(7)) == chosen.targets
    widths = [batch.tokens.shape[1] for batch in chosen.batches(7)]
    assert widths == sorted(widths, reverse=True)
    everything = windows(data, 16, at_least=None)
    assert everything.complete
    assert everything.targets == len(data.tokens)
    assert windows(data, 16, at_least=len(data.tokens) - 1).targets >= len(data.tokens) - 1


# Rows


@pytest.mark.parametrize("context", [1, 2, 7, 16, 500])
def test_rows_hold_every_token_once_and_cross_no_document(context: int) -> None:
    data = documents([1, 40, 15, 16, 3, 2, 30, 1, 7, 8, 6])
    rows = Rows(data, context)
    batch, after = rows.batch(Position(), len(rows))
    assert after == Position(1, 0)
    assert batch.tokens.shape == batch.targets.shape == (len(rows), context)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    numbers = torch.zeros_like(batch.tokens) if batch.documents is None else batch.documents
    seen: list[int] = []
    for tokens, targets, number in zip(batch.tokens, batch.targets, numbers, strict=True):
        for piece in range(int(number.max()) + 1):
            inside = number == piece
            text = targets[inside & (targets >= 0)]
            if len(text) == 0:  # padding: BOS, at the end, a document of its own
                assert piece == number.max()
                assert (tokens[inside] == data.bos).all()
                continue
            places = torch.nonzero(inside & (targets >= 0)).flatten()
            assert (places.diff() == 1).all()
            assert tokens[places[0]] == data.bos
            assert (tokens[places[1:]] == text[:-1]).all()
            assert len(set(np.searchsorted(data.offsets, text.numpy() - 1, side="right"))) == 1
            seen += text.tolist()
    assert sorted(seen) == list(range(1, len(data.tokens) + 1))
    assert rows.targets == len(seen)
    assert rows.cropped == 0
    assert rows.padded == int((batch.targets < 0).sum()) == len(rows) * context - len(seen)


def test_documents_are_numbered_only_where_rows_are_shared() -> None:
    alone = Rows(documents([8, 16, 8]), 8).batch(Position(), 4)[0]
    assert alone.documents is None
    padded = Rows(documents([8, 5]), 8).batch(Position(), 2)[0]
    assert padded.documents is None
    assert int((padded.targets < 0).sum()) == 3
    shared = Rows(documents([5, 2]), 8).batch(Position(), 1)[0]
    assert shared.documents is not None
    assert shared.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2]]
    assert shared.tokens.tolist() == [[0, 1, 2, 3, 4, 0, 6, 0]]
    assert shared.targets.tolist() == [[1, 2, 3, 4, 5, 6, 7, -1]]
    moved = shared.to("meta")
    assert moved.tokens.is_meta
    assert moved.documents is not None
    assert moved.documents.is_meta


def test_rows_resume_from_a_position() -> None:
    data = documents([(n * 37) % 90 + 1 for n in range(60)])
    rows, position = Rows(data, 16, seed=3), Position()
    recorded = []
    for _ in range(2 * len(rows) // 5 + 2):  # over two ends of an epoch, in batches that do not divide it
        batch, after = rows.batch(position, 5)
        recorded.append((position, batch))
        position = after
    assert position.epoch == 2
    fresh = Rows(data, 16, seed=3)
    for position, batch in reversed(recorded):
        again = fresh.batch(position, 5)[0]
        assert torch.equal(again.tokens, batch.tokens)
        assert torch.equal(again.targets, batch.targets)
        assert (again.documents is None) == (batch.documents is None)
    epochs = [rows.batch(Position(epoch), len(rows))[0].targets for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].flatten().sort().values, epochs[1].flatten().sort().values)
    stepwise = torch.cat([rows.batch(Position(row=r), 1)[0].targets for r in range(len(rows))])
    assert torch.equal(stepwise, epochs[0])
    across = rows.batch(Position(row=3), 2 * len(rows))
    assert across[1] == Position(2, 3)
    assert torch.equal(across[0].targets[: len(rows) - 3], epochs[0][3:])
    assert not torch.equal(Rows(data, 16, seed=4).batch(Position(), 5)[0].tokens, recorded[0][1].tokens)


def test_packing_is_tight() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 3000)
    groups = pack(lengths, 64)
    assert sorted(i for group in groups for i in group) == list(range(3000))
    assert max(int(lengths[group].sum()) for group in groups) <= 64
    rooms: list[int] = []  # plain first-fit decreasing
    for length in sorted(lengths.tolist(), reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        rooms[at:] = rooms[at:] or [64]
        rooms[at] -= length
    assert len(groups) <= 1.01 * len(rooms)
    assert groups == pack(lengths, 64)
    assert pack(np.array([], np.int64), 64) == []


def test_loader_errors() -> None:
    data = documents([5, 6])
    with pytest.raises(ValueError, match="context is 1"):
        windows(data, 1)
    with pytest.raises(ValueError, match="context is 0"):
        Rows(data, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Rows(data, 4).batch(Position(), 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(windows(data, 4).batches(0))
    with pytest.raises(ValueError, match="non-empty documents"):
        Documents(np.arange(5), np.array([0, 3, 3, 5]), bos=0)
    with pytest.raises(IndexError):
        data[2]


def test_a_prepare_that_was_killed_while_it_removed_empty_files_goes_on(tmp_path: Path):
    """A split to which nothing came has no files in the end; those that it was begun with may be gone already."""
    state = SplitWriter(tmp_path, "val", "<u2", 100).sync()
    for file in tmp_path.iterdir():
        file.unlink()
    SplitWriter(tmp_path, "val", "<u2", 100, state).finish()
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_is_named_however_texts_are_encoded():
    """A terminal's bytes that are not UTF-8; chats and served prompts are encoded as a batch."""
    tokenizer = Tokenizer.train(["hello world " * 50], 260)
    for encode in (lambda: tokenizer.encode("hello \udc80"), lambda: tokenizer.encode_batch(["hello", "hello \udc80"])):
        with pytest.raises(ValueError, match=r"'hello \\udc80' is not valid Unicode"):
            encode()
