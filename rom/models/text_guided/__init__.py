"""Text-guided image classifiers: cosine similarity to a table of class embeddings that starts out as text.

"Hardware Resilience Properties of Text-Guided Image Classifiers", NeurIPS 2023 (arXiv 2311.14062). The head, the
checkpoints' layout and the recipe are those of the released code; `rom.models.text_guided.ablation` asks which part of
it makes a classifier resilient.
"""

from rom.models.text_guided.checkpoints import load_checkpoint, read_checkpoint
from rom.models.text_guided.classifier import LOGIT_SCALE, TextGuidedClassifier, torchvision_backbone
from rom.models.text_guided.encoders import (
    clip_encoder,
    hashed_encoder,
    open_clip_encoder,
    sentence_encoder,
    text_features,
)
from rom.models.text_guided.features import (
    TextFeatures,
    load_text_features,
    random_text_features,
    save_text_features,
    shuffled,
)
from rom.models.text_guided.recipe import RELEASED, Recipe, train

__all__ = [
    "LOGIT_SCALE",
    "RELEASED",
    "Recipe",
    "TextFeatures",
    "TextGuidedClassifier",
    "clip_encoder",
    "hashed_encoder",
    "load_checkpoint",
    "load_text_features",
    "open_clip_encoder",
    "random_text_features",
    "read_checkpoint",
    "save_text_features",
    "sentence_encoder",
    "shuffled",
    "text_features",
    "torchvision_backbone",
    "train",
]
