"""The language of a caption, by the naive Bayes model that py3langid ships (140 languages)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier


@cache
def _identifier() -> LanguageIdentifier:
    """The packaged model, loaded once a process (half a second; an npz without pickled objects in it)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages() -> frozenset[str]:
    """The ISO 639 codes that the model tells apart."""
    return frozenset(_identifier().labels)


@dataclass(frozen=True)
class Language:
    """Captions whose most probable language is one of ``keep``, at least as probable as ``min_probability``."""

    keep: frozenset[str]
    min_probability: float

    def objection(self, caption: str) -> str | None:
        language, probability = _identifier().classify(caption)
        passes = language in self.keep and probability >= self.min_probability
        return None if passes else "language"
