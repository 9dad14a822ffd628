"""A classifier that scikit-activeml accepts and that says what is known already. Importing this imports scikit-activeml (seconds)."""

from __future__ import annotations

from typing import Any

import numpy as np
from skactiveml.base import SkactivemlClassifier

from backend.learning.heads import Float64Array


class KnownProbabilities(SkactivemlClassifier):  # type: ignore[misc]  # scikit-activeml has no types
    """Answers ``predict_proba`` with given probabilities: the head is fitted elsewhere, the query strategies only read it.

    ``probabilities`` is float64 (N, K), the rows of the candidates in the order in which they will be asked for.
    """

    def __init__(
        self,
        probabilities: Float64Array | None = None,
        classes: Any = None,
        missing_label: float = np.nan,
        cost_matrix: Any = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            classes=classes, missing_label=missing_label, cost_matrix=cost_matrix, random_state=random_state
        )
        self.probabilities = probabilities

    @property
    def classes_(self) -> Any:
        """int64 (K,)."""
        return np.arange(0 if self.probabilities is None else self.probabilities.shape[1])

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KnownProbabilities:  # noqa: ARG002
        """Nothing to fit."""
        return self

    def predict_proba(self, X: Any) -> Float64Array:
        """The known probabilities, whose rows must be those of ``X``."""
        if self.probabilities is None or len(X) != len(self.probabilities):
            raise ValueError(f"probabilities are not known for {len(X)} items")
        return self.probabilities
