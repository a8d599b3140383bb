"""One-dimensional logistic probes: b + w x for every (feature, class), at the optimum of the data.

For feature j and class c a probe minimizes, over b and w, with x standardized over the training
rows,

    mean_i [ softplus(b + w x_ij) - y_ic (b + w x_ij) ] + ridge/2 (w^2 + (b - b0_c)^2)        (nats)

where b0_c is the log-odds of the class's prevalence: the objective of saev's SAE probes. The labels
enter through sums, and softplus through the distribution of x_j, which is the same for all classes:
one pass over the codes leaves a sketch of each feature (`sketch`), and Newton's method (`logistic`,
`solver`) goes over that, whatever the number of rows. What the sketch does not settle, by its own
bound, is settled on finer sketches of the features concerned, and what those do not, on the rows
themselves. One-hot codes need no sketch: a table of counts says all.
"""

from assay.numerics.probe.certificate import Certificate, CertificateError, Certifying
from assay.numerics.probe.confusion import count_predictions
from assay.numerics.probe.estimator import LogisticProbe1d, certify_sweep, fit_sweep, judge_sweep
from assay.numerics.probe.labeled import LabeledCodes, Progress, solved_together
from assay.numerics.probe.passes import count_table
from assay.numerics.probe.state import FittedProbes
from assay.numerics.probe.sweep import Sweep

__all__ = [
    "Certificate",
    "CertificateError",
    "Certifying",
    "FittedProbes",
    "LabeledCodes",
    "LogisticProbe1d",
    "Progress",
    "Sweep",
    "certify_sweep",
    "count_predictions",
    "count_table",
    "fit_sweep",
    "judge_sweep",
    "solved_together",
]
