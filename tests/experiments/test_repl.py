"""The sessions of `repl`: replayed as one program by CPython; floor and distances by another reading of the text."""

from __future__ import annotations

import io
import itertools
import math
import re
from contextlib import redirect_stdout

import pytest
import torch

from lrt.experiments.state_data.repl import REPL, REPL_HIDDEN, WORDS, Repl, add_forms, repl_benchmark, solve_for_one
from lrt.experiments.state_data.rows import BOS, NOTHING, Rows

PRELUDE = "a, b, c, d, e = 0, 1, 2, 3, 4\ns = []\nm = {0: 0, 1: 1, 2: 2, 3: 3}\n"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_lines(row: list[int]) -> list[str]:
    """A row's lines, without the last, which may be cut."""
    return "".join(WORDS[t] for t in row).split("\n")[:-1]


def test_answers_are_what_the_whole_program_prints():
    shown = 0
    for row in REPL.sample(60, 400, seeded()).tokens.tolist():
        lines = whole_lines(row)
        code = [line for line in lines if not line.isdigit()]
        cut = code.pop() if code[-1].startswith("print(") and not lines[-1].isdigit() else None
        with redirect_stdout(io.StringIO()) as out:
            exec(PRELUDE + "\n".join(code), {})
        answers = [line for line in lines if line.isdigit()]
        assert out.getvalue().split() == answers
        assert cut is None or lines[-1] == cut
        shown += len(answers)
    assert shown > 500


OPERANDS = {**dict.fromkeys("abcde", 0.75 / 5), **dict.fromkeys("0123456", 0.25 / 7)}
ADDENDS = {**dict.fromkeys("abcde", 0.2 / 5), **dict.fromkeys("0123456", 0.8 / 7)}


def next_words(text: str, popped: int) -> dict[str, float]:
    """What may follow a text and how likely, with so many things in the list. Written from the documentation alone."""
    line = text.rsplit("\n", 1)[-1]
    if line == "":
        if re.search(r"print\(.*\)\n$", text):  # an answer: any digit, and only the state knows
            return {}
        begin = {"print(": 0.3, "if ": 0.08, "s.append(": 0.08, "m[": 0.08}
        return begin | dict.fromkeys("abcde", 0.46 / 5)
    grammar: list[tuple[str, dict[str, float]]] = [
        (r"(print\(|s\.append\(|if |m\[.\] = |if . % 7 > 3: )$", dict.fromkeys("abcde", 0.2)),
        (r"print\(.$", {" % 7)\n": 1.0}),
        (r"s\.append\(.$", {")\n": 1.0}),
        (r"m\[$", dict.fromkeys("0123", 0.25)),
        (r"m\[.$", {"] = ": 1.0}),
        (r"m\[.\] = .$", {"\n": 1.0}),
        (r". = m\[$", dict.fromkeys("0123", 0.25)),
        (r". = m\[.$", {"]\n": 1.0}),
        (r"if .$", {" % 7 > 3: ": 1.0}),
        (r"if . % 7 > 3: .$", {" = ": 0.5, " += ": 0.5}),
        (r"if . % 7 > 3: . = $", OPERANDS),
        (r"(if . % 7 > 3: )?[a-e] \+= $", ADDENDS),
        (r"(if . % 7 > 3: )?[a-e] \+?= [a-e0-6]$", {"\n": 1.0}),
        (r"[a-e]$", {" = ": 0.45, " += ": 0.25, ", ": 0.3}),
        (r"[a-e] = $", OPERANDS | {"m[": 0.2} | ({"s.pop()\n": 0.2} if popped else {})),
        (r"(?P<x>[a-e]), $", {n: 0.25 for n in "abcde" if n != line[0]}),
        (r"[a-e], .$", {" = ": 1.0}),
        (r"[a-e], . = $", {line[3:4]: 1.0}),
        (r"[a-e], . = .$", {", ": 1.0}),
        (r"[a-e], . = ., $", {line[0]: 1.0}),
        (r"[a-e], . = ., .$", {"\n": 1.0}),
        (r"[0-6]$", {"\n": 1.0}),
    ]
    return next(words for pattern, words in grammar if re.fullmatch(pattern, line))


def test_the_floor_is_what_an_exact_model_pays():
    rows = REPL.sample(40, 300, seeded(1))
    for tokens, floor, asked in zip(rows.tokens.tolist(), rows.floor.tolist(), rows.asked.tolist(), strict=True):
        text = ""
        for token, nats, distance in list(zip(tokens, floor, asked, strict=True))[1:]:
            weights = next_words(text, text.count("s.append(") - text.count("s.pop()"))
            if weights:
                assert distance == NOTHING
                assert nats == pytest.approx(math.log(sum(weights.values()) / weights[WORDS[token]]), abs=1e-5), text
            else:
                assert distance >= 0
                assert nats == 0.0
            text += WORDS[token]


def chains(lines: list[str]) -> list[int]:
    """The distance of every answer: the longest chain of updates back to what is in plain sight."""
    far = dict.fromkeys("abcde0123", 0)
    stack: list[int] = []
    answers = []
    for line in lines:
        if match := re.fullmatch(r"print\((.) % 7\)", line):
            answers.append(far[match[1]])
            far[match[1]] = 0
        elif match := re.fullmatch(r"s\.append\((.)\)", line):
            stack.append(far[match[1]] + 1)
        elif match := re.fullmatch(r"(.) = s\.pop\(\)", line):
            far[match[1]] = stack.pop() + 1
        elif match := re.fullmatch(r"m\[(.)\] = (.)|(.) = m\[(.)\]", line):
            target, source = filter(None, match.groups())
            far[target] = far[source] + 1
        elif match := re.fullmatch(r"(.), (.) = .*", line):
            far[match[1]], far[match[2]] = far[match[2]] + 1, far[match[1]] + 1
        elif match := re.fullmatch(r"(if (.).*: )?(.) (\+?)= (.)", line):
            _, condition, target, plus, operand = match.groups()
            of_operand = far[operand] + 1 if operand.isalpha() else 0
            if plus:
                of_operand = max(of_operand, far[target] + 1)
            far[target] = of_operand if condition is None else max(of_operand, far[target] + 1, far[condition] + 1)
        else:
            assert line.isdigit(), line
    return answers


def test_distances_count_the_updates_back_to_what_is_in_sight():
    rows = REPL.sample(60, 400, seeded(2))
    seen: set[int] = set()
    for tokens, asked in zip(rows.tokens.tolist(), rows.asked.tolist(), strict=True):
        distances = [d for d in asked if d != NOTHING]
        expected = chains(whole_lines(tokens))
        assert distances == expected[: len(distances)]
        assert len(expected) - len(distances) in (0, 1)  # the row may end behind the question
        seen |= set(distances)
    assert seen >= set(range(12))


def possible_answers(lines: list[str]) -> list[set[int]]:
    """What each `print` may show, by running the program with every choice of the hidden numbers."""
    count = sum("?" in line for line in lines)
    alive = list(itertools.product(range(7), repeat=count))
    shown: list[list[int]] = []
    for numbers in alive:
        hidden = iter(numbers)
        code = [re.sub(r"\?", lambda _, h=hidden: str(next(h)), line) for line in lines if not line.isdigit()]
        with redirect_stdout(io.StringIO()) as out:
            exec(PRELUDE + "\n".join(code), {})
        shown.append([int(n) for n in out.getvalue().split()])
    answers, possible = [int(line) for line in lines if line.isdigit()], []
    for index, answer in enumerate(answers):
        possible.append({run[index] for run in shown})
        shown = [run for run in shown if run[index] == answer]
    return possible


def test_the_floor_of_hidden_numbers_by_trying_them_all():
    many = repl_benchmark("many", Repl(hidden=0.5, shows=0.4, others={"s.append(": 0.08, "m[": 0.08}))
    rows, unknown, known_again = many.sample(400, 48, seeded(3)), 0, 0
    for tokens, floor, asked in zip(rows.tokens.tolist(), rows.floor.tolist(), rows.asked.tolist(), strict=True):
        text = "".join(WORDS[t] for t in tokens)
        lines = text.split("\n")[:-1]
        if lines[-1].startswith("print("):
            lines.pop()
        if sum("?" in line for line in lines) > 3:
            continue
        answer = [t for t in range(2, 48) if WORDS[tokens[t]].isdigit() and WORDS[tokens[t - 1]] == " % 7)\n"]
        for t, answers in zip(answer, possible_answers(lines), strict=False):
            f = floor[t]
            assert len(answers) in (1, 7)
            assert (asked[t] != NOTHING) == (len(answers) == 1)  # else nothing decides it
            assert f == pytest.approx(math.log(len(answers)), abs=1e-5), text
            unknown, known_again = unknown + (len(answers) == 7), known_again + (len(answers) == 1 and "?" in text)
    assert unknown > 50
    assert known_again > 100


def test_a_number_that_is_solved_for_leaves_nothing_of_its_form():
    for a, b, c in itertools.product(range(1, 7), range(1, 7), range(7)):
        form = {3: a, 5: b, **({8: c} if c else {})}
        number, others = solve_for_one(form)
        rest = {n: x for n, x in form.items() if n != number}
        assert number not in others
        assert add_forms(rest, others, form[number]) == {}


def test_a_row_is_that_of_its_seed_and_no_two_are_alike():
    one, again, other = (REPL.sample(500, 64, seeded(s)) for s in (7, 7, 8))
    assert one.tokens.equal(again.tokens)
    assert one.floor.equal(again.floor)
    rows = {tuple(row) for row in torch.cat((one.tokens, other.tokens)).tolist()}
    assert len(rows) == 1000
    assert one.tokens[:, 0].eq(BOS).all()
    assert one.counted.sum() == 500 * 63


def test_the_hidden_variant_has_its_share():
    rows = REPL_HIDDEN.sample(300, 128, seeded(4))
    constants = sum((rows.tokens == WORDS.index(d)).sum() for d in "0123456") - (rows.asked >= 0).sum()
    keys = (rows.tokens[:, :-1] == WORDS.index("m[")).sum()  # a key follows, which is written as a digit
    hidden = (rows.tokens == WORDS.index("?")).sum()
    assert float(hidden / (hidden + constants - keys)) == pytest.approx(0.1, abs=0.015)
    assert "if " not in REPL_HIDDEN.text(rows.tokens.flatten())


def test_wrong_input_is_answered_in_a_sentence():
    with pytest.raises(ValueError, match="9 names; give 2 to 8"):
        Repl(names=9)
    with pytest.raises(ValueError, match="shows is 0\\.9, hidden 0\\.0; they are probabilities"):
        Repl(shows=0.9)
    with pytest.raises(ValueError, match="a row has BOS and a token at least"):
        REPL.sample(1, 1, seeded())
    with pytest.raises(ValueError, match="the first three are"):
        Rows(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1))
