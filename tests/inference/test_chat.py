"""A conversation is its tokens: templates as they are written, turns taken back without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import AddedToken

from lrt import LatentRecurrentTransformer, ModelConfig, Sampling
from lrt.data.tokenizer import Tokenizer
from lrt.inference.chat import Conversation
from lrt.inference.chat_template import TEMPLATES, Message, default_template, special_tokens, turn_tokens

GREEDY = Sampling(temperature=0)


def tokenizer(*special: str) -> Tokenizer:
    trained = Tokenizer.train(["User: hello there\nAssistant: hello"] * 3, 280)
    inner = tokenizers.Tokenizer.from_str(trained.to_json())
    inner.add_special_tokens([AddedToken(name, special=True) for name in special])
    return Tokenizer(inner)


def talking(words: Tokenizer, **fields: Any) -> Conversation:
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(
        ModelConfig(depth=2, width=16, heads=2, vocab_size=words.vocab_size, context=256)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return Conversation(model, words, GREEDY, prefill="exact", **fields)


NAMES = {name: sorted(template.special) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_names_its_template(name: str):
    words = tokenizer(*NAMES[name])
    assert default_template(words) == name
    chat = talking(words)
    ids = chat.encode_turn("hello <|im_start|>")  # what the user writes is text, whatever it spells
    names = {i: n for n, i in special_tokens(words).items()}
    template = TEMPLATES[name]
    assert ids[0] == words.bos
    assert [names[i] for i in ids[1:] if i in names] == [
        p for p in (*template.user, *template.assistant) if p in template.special
    ]
    assert "hello <|im_start|>" in words.decode(ids)


def test_turns_continue_one_text_and_are_taken_back_exactly():
    chat, pieces = talking(tokenizer()), []
    first = chat.say("hello", 6, pieces.append)
    assert "".join(pieces).strip() == first
    kept = chat.session
    second = chat.say("there", 6, pieces.append)
    chat.undo()
    assert chat.session is not None
    assert kept is not None
    assert chat.session.tokens == kept.tokens
    assert chat.say("there", 6, pieces.append) == second
    chat.undo()
    chat.undo()
    assert chat.session is None
    assert chat.say("hello", 6, pieces.append) == first
    with pytest.raises(ValueError, match="no turn to take back"):
        talking(tokenizer()).undo()


def test_an_answer_ends_with_the_templates_token_or_a_line():
    words = tokenizer(*NAMES["chatml"])
    chat = talking(words)
    assert special_tokens(words)["<|im_end|>"] in chat.stop
    plain = talking(tokenizer())
    lines = [i for i in plain.stop if i != plain.tokenizer.bos]
    assert lines
    assert all("\n" in plain.tokenizer.decode([i]) for i in lines)


def test_a_conversation_goes_on_after_it_was_saved(tmp_path: Path):
    chat = talking(tokenizer())
    with pytest.raises(ValueError, match="nothing to save yet"):
        chat.save(tmp_path / "talk")
    chat.say("hello", 6, str)
    chat.save(tmp_path / "talk")
    again = talking(tokenizer())
    again.load(tmp_path / "talk")
    assert again.say("there", 6, str) == chat.say("there", 6, str)
    again.undo()
    again.undo()
    assert again.session is None


def test_a_full_disk_leaves_the_saved_conversation_with_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chat = talking(tokenizer())
    chat.say("hello", 6, str)
    chat.save(tmp_path / "talk")
    turns = list(chat.turns)
    chat.say("there", 6, str)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="no space left"):
            chat.save(tmp_path / "talk")
    again = talking(tokenizer())
    again.load(tmp_path / "talk")
    assert again.turns == turns


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown template 'alpaca'; choose one of nanochat, chatml, plain"):
        talking(tokenizer(), template="alpaca")
    with pytest.raises(ValueError, match=r"'chatml' needs the special tokens <\|im_end\|>, <\|im_start\|>"):
        talking(tokenizer(), template="chatml")
    chat = talking(tokenizer())
    with pytest.raises(ValueError, match="the context is 256; take turns back"):
        chat.say("x" * 300, 6, str)
    assert chat.session is None


def test_a_conversation_is_written_as_its_turns_were():
    for name, template in TEMPLATES.items():
        words = tokenizer(*NAMES[name])
        turns = [Message("user", "hello"), Message("assistant", "there"), Message("user", "<|bos|>")]
        ids = turn_tokens(words, template, template.parts(turns))
        end = template.end or "\n"
        expected = [*template.user, "hello", *template.assistant, "there", end, *template.user, "", *template.assistant]
        names = special_tokens(words)
        assert [i for i in ids if i in names.values()] == [names[p] for p in expected if p in template.special]
        assert "<|bos|>" in words.decode(ids)
        system = template.parts([Message("system", "be kind"), turns[0]])
        written = [part for part, by_somebody in system if by_somebody]
        assert written == (["be kind\n\nhello"] if template.system is None else ["be kind", "hello"])
        both = template.parts([turns[0], turns[0]])
        assert [part for part, by_somebody in both if by_somebody] == ["hello\n\nhello"]
    for wrong in ([], [turns[1]], turns[:2], [Message("system", "x")], [turns[0], Message("system", "x"), turns[0]]):
        with pytest.raises(ValueError, match="give at most one of the system"):
            TEMPLATES["plain"].parts(wrong)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_was_cut_is_closed_before_the_next_turn(name: str):
    words = tokenizer(*NAMES[name])
    chat, template = talking(words), TEMPLATES[name]
    chat.say("hello", 2, str)
    assert chat.session is not None
    assert chat.session.tokens[-1] not in chat.stop  # cut by its limit
    closed = turn_tokens(words, template, [(template.end or "\n", False), (template.between, False)])
    assert chat.encode_turn("there")[: len(closed)] == closed
    ended = chat.session.extend(turn_tokens(words, template, [(template.end or "\n", False)]), "exact")
    chat.session = ended
    after = turn_tokens(words, template, [(template.between, False), *template.parts([Message("user", "there")])])
    assert chat.encode_turn("there") == after


def test_turns_that_belong_to_another_session_are_refused(tmp_path: Path):
    chat = talking(tokenizer())
    chat.say("hello", 6, str)
    chat.save(tmp_path / "talk")
    (tmp_path / "talk" / "turns.json").write_text("[0, 4000]")
    kept = chat.session
    with pytest.raises(ValueError, match=r"turns\.json does not belong to this session"):
        chat.load(tmp_path / "talk")
    assert chat.session is kept


def test_text_that_is_not_unicode_is_named():
    with pytest.raises(ValueError, match="not valid Unicode; give UTF-8 text"):
        tokenizer().encode("half \udcff")


def test_a_checkpoints_own_template_goes_on_turn_by_turn(tmp_path: Path):
    """Turn by turn it gives the tokens that it gives for the whole conversation."""
    words = tokenizer("<|im_start|>", "<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ': ' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    chat = talking(words, folder=tmp_path)
    assert chat.name == "of the checkpoint"
    end = special_tokens(words)["<|im_end|>"]
    assert chat.stop == {words.bos, end}
    chat.say("hello <|im_end|>", 3, str)
    assert chat.session is not None
    answer = words.decode(chat.session.tokens[-3:])
    ids = [*chat.session.tokens, *chat.encode_turn("there")]
    turns = [Message("user", "hello <|im_end|>"), Message("assistant", answer), Message("user", "there")]
    whole = turn_tokens(words, chat.template, chat.template.parts(turns))
    assert words.decode(ids) == words.decode(whole).replace("assistant: ", "")
    assert [i for i in ids if i in words.special] == [words.bos, *(i for i in whole if i in words.special)]
