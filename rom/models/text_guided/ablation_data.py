"""What the ablation runs on: handwritten digits, and pairs of them for a hundred classes. Nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from rom.models.fedfd.data import Images, digits, split
from rom.models.text_guided.digit_descriptions import DIGITS
from rom.models.text_guided.encoders import hashed_encoder, text_features
from rom.models.text_guided.features import TextFeatures


class Study(NamedTuple):
    """Images to train and to test on, and the classes' text."""

    train: Images
    test: Images
    text: TextFeatures


def ten_digits(seed: int, test: float, width: int) -> Study:
    """The digits of scikit-learn, 8 × 8, and their hashed descriptions."""
    data = split(digits(), seed, test=test, proxy=0.0)
    return Study(data.train, data.test, text_features(DIGITS, hashed_encoder(width)))


def digit_pairs(seed: int, test: float, width: int, times: int = 5) -> Study:
    """Numbers of two digits, 8 × 16: 100 classes, every image `times` times on the left in training, once in the test.

    A class's text is the left digit's embedding, half of the width, beside the right one's: hashed words alone would
    not tell 37 from 73.
    """
    data = split(digits(), seed, test=test, proxy=0.0)
    one = text_features(DIGITS, hashed_encoder(width // 2))
    unit = one.table / one.table.norm(dim=1, keepdim=True)
    table = torch.cat([unit.repeat_interleave(10, 0), unit.repeat(10, 1)], 1)
    draw = np.random.default_rng([seed, 2])
    return Study(
        _pairs(data.train, times, draw),
        _pairs(data.test, 1, draw),
        TextFeatures(table, f"{one.source}, left and right"),
    )


def _pairs(data: Images, times: int, draw: np.random.Generator) -> Images:
    left, right = (data[np.concatenate([draw.permutation(len(data)) for _ in range(times)])] for _ in range(2))
    return Images(torch.cat([left.images, right.images], 3), 10 * left.labels + right.labels)


DATA = {"digits": ten_digits, "pairs": digit_pairs}
