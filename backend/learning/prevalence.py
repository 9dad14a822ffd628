"""How frequent the classes are taken to be, and what that makes of a head's probabilities.

A head learns with all classes weighing the same, so its calibrated probabilities are those for classes that are equally
frequent. For others the odds are multiplied by how much more frequent each class is (Saerens, Latinne, Decaestecker,
"Adjusting the outputs of a classifier to new a priori probabilities", Neural Computation 2002, eq. 2.4:
:func:`backend.learning.heads.at_prevalence`).

The frequencies are those that the project states (``model_prior`` in the labelling config), else those among the
labelled slides. That is an assumption, and is shown as one beside each figure: labels that the labelling order chose
hold more of a rare class than the archive does. Estimating the frequencies from what the head says of all slides (the
same paper's EM) was measured and left out: on a simulated archive with 5 % positives it found 0.2 to 1 % after labels
chosen by uncertainty and 12 ± 17 % for a weak head after random ones, where the labelled had 9 to 13 % and 5 ± 1 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from backend.learning.heads import Float64Array


def class_prior(classes: Sequence[str], counts: Mapping[str, int], stated: Mapping[str, float]) -> Float64Array:
    """float64 (K,): how frequent each class of one choice among several is taken to be; sums to 1.

    Parameters
    ----------
    classes
        The K that the head knows.
    counts
        Labels of each.
    stated
        Frequencies in (0, 1) of some of the classes, which sum to at most 1; the rest of 1 belongs to the others, in
        the proportion of their labels. Without any, all are as among the labels.
    """
    seen = np.array([counts[name] for name in classes], dtype=np.float64)
    known = np.array([name in stated for name in classes])
    if not known.any():
        return np.asarray(seen / seen.sum(), dtype=np.float64)
    values = np.array([stated.get(name, 0.0) for name in classes])
    others = seen * ~known
    if others.sum() > 0:
        # Stated ones that sum to 1 leave nothing for a class that has been seen all the same: it keeps a trace.
        values += max(1 - sum(stated.values()), 1e-3) * others / others.sum()
    return np.asarray(values / values.sum(), dtype=np.float64)
