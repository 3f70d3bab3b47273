"""What importing raises."""

from __future__ import annotations

from collections.abc import Sequence


class WeightImportError(ValueError):
    """Weights that cannot be read or do not fit; the model is as it was before.

    Args:
        message: what is wrong, as a whole.
        problems: one sentence for each thing that does not fit (shapes, number of blocks, vocabulary).
        missing: names that the file should have and has not.
        unexpected: names in the file that no part of the model or of its source is known to have.
    """

    def __init__(
        self,
        message: str,
        problems: Sequence[str] = (),
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
    ) -> None:
        self.problems, self.missing, self.unexpected = tuple(problems), tuple(missing), tuple(unexpected)
        lines = [message, *(f"  {problem}" for problem in self.problems)]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"  {title}: {name}" for name in names]
        super().__init__("\n".join(lines))
