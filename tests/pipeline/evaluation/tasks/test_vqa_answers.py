"""Answers score what the VQA challenge's evaluator gives them.

The expected values were made with a transcription of that evaluator, and agree on 200,000 drawn answers; here stand
those that show each of its rules.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pipeline.evaluation.tasks.pictures import ImageAddress
from pipeline.evaluation.tasks.vqa.answers import (
    accuracy,
    frequent_answers,
    normalised,
    read_answers,
    soft_scores,
)
from pipeline.evaluation.tasks.vqa.data import Question
from sharding.errors import UserError
from sharding.storage import open_storage


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        (" red ", "red"),
        ("a\nb\tc", "b c"),
        # Articles go, also as the whole answer.
        ("A dog and an apple", "dog and apple"),
        ("the", ""),
        # Numbers to ten are figures.
        ("two", "2"),
        ("None", "0"),
        ("ten 11 twelve", "10 11 twelve"),
        # Contractions get back their apostrophe, one of several.
        ("dont know", "don't know"),
        ("yall'd've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
        ("couldntve", "couldntve"),
        ("let's", "let's"),
        ("lets", "lets"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        # A mark becomes a space, or goes where one of its kind stands beside a space ...
        ("t-shirt", "t shirt"),
        ("hot - dog-house", "hot doghouse"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("hot-dog (bun)", "hot dog bun"),
        ("what?", "what"),
        # ... and all go where digits stand around a comma.
        ("10,000", "10000"),
        ("it's 5,6-7", "it's 567"),
        # A full stop goes unless a digit follows.
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        (".5", ".5"),
        ("...", ""),
        # The evaluator removes 32 of them.
        ("a" + "b." * 34, "a" + "b" * 33 + ".b."),
        # Apostrophes and colons are no punctuation.
        ("5:30", "5:30"),
    ],
)
def test_the_normal_form(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_of_ten_annotators_one_makes_three_tenths(count: int, expected: float) -> None:
    given = ["yes"] * count + ["no"] * (10 - count)
    assert accuracy("yes", given) == pytest.approx(expected, abs=1e-12)
    assert soft_scores(given).get("yes", 0.0) == pytest.approx(expected, abs=1e-12)


def test_accuracy_is_the_mean_over_the_sets_that_leave_one_out() -> None:
    for given in itertools.product(["a b", "c", "d"], repeat=5):
        sets = [given[:one] + given[one + 1 :] for one in range(5)]
        expected = sum(min(others.count("c") / 3, 1) for others in sets) / 5
        if len(set(given)) > 1:
            assert accuracy("The C!", given) == pytest.approx(expected, abs=1e-12)
        assert accuracy("c", given) == pytest.approx(expected, abs=1e-12)


def test_annotators_of_one_mind_are_compared_as_they_stand() -> None:
    assert accuracy("t-shirt", ["T-shirt", *["t-shirt"] * 9]) == 1.0
    assert accuracy("T-Shirt", ["t-shirt"] * 10) == 0.0
    assert accuracy("t-shirt\n", ["t-shirt\t"] * 10) == 1.0
    assert accuracy("2", ["two"] * 10) == 0.0
    assert accuracy("2", ["two"] * 9 + ["three"]) == 1.0
    assert soft_scores(["two"] * 10) == {}


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        *[(["yes"] * count, "yes", 1.0) for count in (1, 2, 3, 4)],
        *[(["yes"] * count, "no", 0.0) for count in (1, 2, 3, 4)],
        (["yes", "no"], "yes", 1 / 2),
        (["yes", "no", "no"], "yes", 1 / 3),
        (["yes", "no", "no"], "no", 2 / 3),
        (["a", "b", "c"], "b", 1 / 3),
    ],
)
def test_of_fewer_than_four_annotators_an_answer_scores_the_share_that_gave_it(
    given: list[str], answer: str, expected: float
) -> None:
    assert accuracy(answer, given) == pytest.approx(expected, abs=1e-12)


def test_with_four_annotators_the_share_and_the_official_accuracy_are_the_same() -> None:
    for count in range(5):
        assert accuracy("c", ["c"] * count + ["d"] * (4 - count)) == pytest.approx(count / 4, abs=1e-12)


def test_few_annotators_are_compared_in_the_normal_form_whatever_their_mind() -> None:
    for people in (1, 2, 3):
        assert accuracy("2", ["Two."] * people) == 1.0
        assert soft_scores(["The Two-Dogs!"] * people) == {"2 dogs": 1.0}
    assert accuracy("2", ["Two."] * 4) == 0.0  # as the official one does


def test_soft_scores_are_the_accuracies_of_normal_forms() -> None:
    given = ["Red", "red", "the red", "dark red", "dark-red", "blue", "red", "2", "two", "Two."]
    expected = {"red": 1.0, "dark red": 0.6, "blue": 0.3, "2": 0.9}
    assert soft_scores(given) == pytest.approx(expected, abs=1e-12)
    assert {answer: accuracy(answer, given) for answer in expected} == soft_scores(given)


def question(number: int, answer: str | None) -> Question:
    given = None if answer is None else (answer,) * 10
    return Question(number, ImageAddress("i", "x"), "?", given, answer, "other")


def test_the_vocabulary_is_of_the_most_frequent_normal_forms() -> None:
    answers = ["two"] * 3 + ["2"] * 2 + ["yes"] * 4 + ["a cat", "cat", "Dog", "dog", "an", None]
    questions = [question(number, answer) for number, answer in enumerate(answers)]
    assert frequent_answers(questions) == ["2", "yes", "cat", "dog"]
    assert frequent_answers(questions, 3) == ["2", "yes", "cat"]
    assert frequent_answers(reversed(questions), 3) == ["2", "yes", "cat"]
    with pytest.raises(UserError, match="no answers to make a vocabulary of"):
        frequent_answers([question(1, None)])


def test_a_vocabulary_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    here = open_storage(tmp_path)
    here.write_json("a.json", {"no": 1, "yes": 0, "2": 2})
    here.write_json("b.json", ["yes", "no", "2"])
    assert read_answers(here, "a.json", "answer2id") == ["yes", "no", "2"]
    assert read_answers(here, f"{here.url}/b.json", "answer2id") == ["yes", "no", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"yes": 0, "no": 2}', "numbered from 0 to 1"),
        ('{"yes": 0, "no": "1"}', "numbered from 0 to 1"),
        ('{"yes": 0, "no": 0}', "numbered from 0 to 1"),
        ('["yes", "yes"]', "must be a list of different answers"),
        ('["yes", 2]', "must be a list of different answers"),
        ('["yes", "\\ud83d"]', "must be a list of different answers"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must be a list of different answers"),
        ("{}", "must be a list of different answers"),
        ("3", "must be a list of different answers"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_vocabulary_is_named(tmp_path: Path, text: str, message: str) -> None:
    here = open_storage(tmp_path)
    here.write_bytes("a.json", text.encode())
    with pytest.raises(UserError, match=f"^answer2id: .*a.json.*{message}"):
        read_answers(here, "a.json", "answer2id")
