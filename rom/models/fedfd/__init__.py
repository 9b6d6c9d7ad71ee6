"""FedFD: federated learning across different architectures by feature distillation through orthogonal projections.

Li et al., "Feature Distillation is the Better Choice for Model-Heterogeneous Federated Learning", NeurIPS 2025
(arXiv 2507.10348). Each architecture's clients are averaged; then the server's global model learns, on unlabelled proxy
data, to predict every average's features through a projection that is kept orthogonal.
"""

from rom.models.fedfd.aggregation import Update
from rom.models.fedfd.clients import ARCHITECTURES, FeatureClassifier, Group
from rom.models.fedfd.data import Images, Split, digits, dirichlet_partition, split
from rom.models.fedfd.distillation import METHODS, Distillation
from rom.models.fedfd.federation import Federation, Settings, accuracy, pooled_accuracy, train_client

__all__ = [
    "ARCHITECTURES",
    "METHODS",
    "Distillation",
    "FeatureClassifier",
    "Federation",
    "Group",
    "Images",
    "Settings",
    "Split",
    "Update",
    "accuracy",
    "digits",
    "dirichlet_partition",
    "pooled_accuracy",
    "split",
    "train_client",
]
