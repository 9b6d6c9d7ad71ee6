"""A Routing Mamba block learns to copy a token it saw earlier: which experts does it use? Seconds on a CPU."""

import torch
from torch.nn.functional import cross_entropy

import rom

VOCABULARY, LENGTH, STEPS = 16, 24, 90


class Copier(torch.nn.Module):
    """Embedding, two blocks, and a head."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, dim)
        self.blocks = torch.nn.ModuleList(rom.RoutingMambaBlock(dim, num_experts=4) for _ in range(2))
        self.norms = torch.nn.ParameterList(torch.ones(dim) for _ in range(3))
        self.head = torch.nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of tokens (batch, length)."""
        hidden, stream = self.embedding(tokens), None
        for block, norm in zip(self.blocks, self.norms):
            hidden, stream = rom.ops.add_rms_norm(hidden, norm, stream)
            hidden = block(hidden)
        return self.head(rom.ops.add_rms_norm(hidden, self.norms[-1], stream)[0])


def main() -> None:
    """Trains and prints."""
    torch.manual_seed(0)
    model = Copier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY, (16, LENGTH))
        logits = model(tokens)
        loss = cross_entropy(logits[:, 3:].flatten(0, 1), tokens[:, :-3].flatten())  # say what stood three places ago
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0 or step == STEPS - 1:
            loads = [block.load_statistics().fraction.tolist() for block in model.blocks]
            shares = "   ".join(" ".join(f"{x:4.0%}" for x in load) for load in loads)
            print(f"step {step:4d}   loss {loss.item():.3f}   experts {shares}")


if __name__ == "__main__":
    main()
