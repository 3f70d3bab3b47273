"""Answers to visual questions: the normal form, the official accuracy, soft scores, the vocabulary.

Accuracy and normal form are those of the evaluator that the VQA challenge published, its peculiarities included,
so that a number here is the number there:

* an answer is judged against each of the sets of annotators that leave one out: min(how many gave it / 3, 1),
  averaged over the sets (Antol et al., "VQA: Visual Question Answering", section 4)
* a mark of punctuation is removed where one of its kind stands next to a space or the text holds digits around a
  comma, and becomes a space otherwise; a full stop goes unless a digit follows
* numbers to ten become figures, articles go, a contraction without its apostrophe gets it back (of several
  apostrophes one may be missing)
* where the annotators are not all of one mind, their answers and the model's are brought to the normal form; where
  they are, all are compared as they stand (they may spell what is written in the image)

A set of fewer than four annotators leaves nothing to leave out: two of three cannot be three. An answer then scores the
share of them that gave it, in the normal form whatever their mind: exact match for one annotator. Of four annotators
the official accuracy is this share too, so that the two rules meet.

So an answer that all of four or more annotators gave in another than the normal form can be matched by none of a
vocabulary of normal forms. VQAv2's answers are in the normal form, but for a few.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from pipeline.evaluation.tasks.annotations import require
from sharding.captions import is_text
from sharding.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.vqa.data import Question
    from sharding.storage import Storage

#: Answers of the field's vocabulary for VQAv2.
FREQUENT_ANSWERS = 3129

_FOR_A_FULL_SCORE = 3
#: With fewer annotators an answer's accuracy is the share of them that gave it.
ANNOTATORS_OF_THE_METRIC = _FOR_A_FULL_SCORE + 1
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # the evaluator removes no more: it passes a flag where their number belongs
_NUMBERS = "zero one two three four five six seven eight nine ten"
_FIGURES = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the evaluator too


@lru_cache(maxsize=1 << 16)
def normalised(answer: str) -> str:
    """The normal form of an answer."""
    text = _without_punctuation(_in_one_line(answer))
    words = [_FIGURES.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _in_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(answer: str) -> str:
    text = answer
    all_go = _DIGITS_AROUND_COMMA.search(answer) is not None
    for mark in _PUNCTUATION:
        if mark in answer:
            beside_space = f"{mark} " in answer or f" {mark}" in answer
            text = text.replace(mark, "" if beside_space or all_go else " ")
    return _FULL_STOP.sub("", text, count=_FULL_STOPS)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """The official accuracy, 0 to 1, of an answer; of fewer than four annotators the share that gave it.

    Args:
        answer: the model's, in any form.
        given: by the annotators (ten in VQAv2), as the annotation file has them.
    """
    answer, given = _in_one_line(answer), [_in_one_line(one) for one in given]
    few = len(given) < ANNOTATORS_OF_THE_METRIC
    if few or len(set(given)) > 1:
        answer, given = normalised(answer), [normalised(one) for one in given]
    if few:
        return given.count(answer) / len(given)
    same, others = given.count(answer), len(given) - given.count(answer)
    left_out = [same - 1] * same + [same] * others  # how many are the same, without each annotator in turn
    return sum(min(count / _FOR_A_FULL_SCORE, 1.0) for count in left_out) / len(given)


def soft_scores(given: Sequence[str]) -> dict[str, float]:
    """What a model is trained towards: the official accuracy of every answer (normal form) that scores at all.

    Of ten annotators one makes 0.3, two 0.6, three 0.9 and more 1.0, the scores that ViLT and METER train with.
    """
    scores = {answer: accuracy(answer, given) for answer in dict.fromkeys(map(normalised, given))}
    return {answer: score for answer, score in scores.items() if score > 0}


def frequent_answers(questions: Iterable[Question], size: int = FREQUENT_ANSWERS) -> list[str]:
    """The ``size`` most frequent answers in their normal form; of equally frequent ones the first by alphabet.

    A question counts for the one answer that most of its annotators gave (``multiple_choice_answer``), as in the
    field's vocabulary of 3,129 answers: those that are so given at least nine times in train2014 and val2014.

    Raises:
        UserError: none of the questions has an answer.
    """
    counts = Counter(normalised(question.answer) for question in questions if question.answer is not None)
    counts.pop("", None)
    if not counts:
        raise UserError("no answers to make a vocabulary of: the training questions need annotations")
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:size]


def read_answers(storage: Storage, address: str, field: str) -> list[str]:
    """A vocabulary from a JSON file: the list of its answers, or their numbers by answer, from 0.

    Raises:
        UserError: no such file, or something else in it, naming the field and the address.
    """
    folder, name = require(storage, address, field)
    url = folder.url_of(name)
    try:
        value = folder.read_json(name)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from None
    answers: list[object] = value if isinstance(value, list) else []
    if isinstance(value, dict) and value:
        numbers = list(value.values())
        if any(not isinstance(number, int) for number in numbers) or sorted(numbers) != list(
            range(len(numbers))
        ):
            raise UserError(f"{field}: {url}: the answers must be numbered from 0 to {len(numbers) - 1}")
        answers = sorted(value, key=value.__getitem__)
    texts = [str(answer) for answer in answers if is_text(answer)]
    if not texts or len(texts) != len(answers) or len(set(texts)) != len(texts):
        raise UserError(
            f"{field}: {url} must be a list of different answers, or an object of numbers by answer"
        )
    return texts
