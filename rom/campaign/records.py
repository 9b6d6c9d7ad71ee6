"""The one record every part of a campaign speaks: what one fault did to all the samples it met."""

from __future__ import annotations

import numpy as np

#: What a fault can do to the answer for one sample, in order of harm; each cell (fault × sample) has exactly one.
#: masked: the outputs are the golden ones, bit for bit. tolerable: other numbers, same top-1. sdc: another top-1 than
#: the golden run's, which was wrong already. critical: the golden top-1 was right and the faulty one is not.
#: due: NaN or infinity in the outputs (detectable), whatever top-1 says.
OUTCOMES = ("masked", "tolerable", "sdc", "critical", "due")

#: One fault. A fault of an activation meets one sample, a fault of shared memory (weights, biases) all samples of the
#: evaluation set: cells of one fault are not independent, so intervals resample faults, never cells.
RESULT = np.dtype(
    [
        ("position", "<i8"),  # in the plan: plan.take([position]) is the fault
        ("stratum", "<i4"),
        ("sample", "<i8"),  # of the evaluation set; −1: all of them
        ("cells", "<i4"),  # samples it met
        *((outcome, "<i4") for outcome in OUTCOMES),  # cells by outcome; they add up to `cells`
        ("mismatch", "<i4"),  # cells whose top-1 differs from the golden run's, due or not
        ("delta_loss", "<f8"),  # Σ |cross entropy − golden cross entropy| over cells that are not due
        ("old", "<u4"),  # bits of the value before and after, of the fault's first site
        ("new", "<u4"),
    ]
)
