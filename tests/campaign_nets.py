"""Small models with everything a campaign meets: batch norm, skip connections, in-place layers, attention."""

from itertools import pairwise

from torch import nn


class Skip(nn.Module):
    """Convolutions with a skip connection and a strided shortcut, in-place additions and activations, a pool."""

    def __init__(self, classes=5):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.third, self.shortcut = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(12, classes)

    def forward(self, x):
        x = self.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(x))
        y += x
        x = self.pool(self.relu(y))
        x = self.relu(self.third(x) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class Attentive(nn.Module):
    """Two encoder layers, samples second in the first of them, over tokens that begin with one of the model's own."""

    def __init__(self, classes=4):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.token, self.places = nn.Parameter(nn.init.normal_(nn.Linear(16, 1).weight)), nn.Embedding(6, 16)
        self.seq_first = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0)
        self.batch_first = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.embed(x)
        x = nn.functional.pad(x, (0, 0, 1, 0)) + self.token
        x = x + self.places.weight
        x = self.seq_first(x.transpose(0, 1)).transpose(0, 1)
        return self.head(self.batch_first(x)[:, 0])


def mlp(sizes=(12, 16, 16, 5)):
    """Linear layers with ReLU between them."""
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
