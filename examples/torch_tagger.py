"""A PyTorch model with a bidirectional LSTM, trained with and without gatewise: the same losses, less time.

    python examples/torch_tagger.py

The task: say of each token whether it has occurred before in its sentence. Embedding, bidirectional LSTM, Linear.
"""

import argparse
import time

import gatewise.torch
import torch
from torch import nn

TOKENS, LENGTH, SENTENCES = 50, 40, 32


class Tagger(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, 2)
        return self.head(self.lstm(self.embedding(tokens))[0])


def sentences(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and answers, (B, T) each."""
    tokens = torch.randint(0, TOKENS, (SENTENCES, LENGTH), generator=generator)
    same = tokens[:, :, None] == tokens[:, None, :]  # (B, T, T)
    return tokens, same.tril(-1).any(-1).long()


def train(model: Tagger, steps: int) -> tuple[list[float], float]:
    """Losses, and seconds."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        tokens, answers = sentences(generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    curves = {}
    for name in ("torch.nn", "gatewise"):
        torch.manual_seed(0)
        model = Tagger(options.hidden)
        if name == "gatewise":
            gatewise.torch.accelerate(model)  # the one line
        losses, seconds = train(model, options.steps)
        curves[name] = torch.tensor(losses)
        print(f"{name:9}  loss {losses[0]:.4f} -> {losses[-1]:.4f}  {seconds:6.2f} s")
    print(f"largest difference of the two curves: {(curves['torch.nn'] - curves['gatewise']).abs().max():.1e}")


if __name__ == "__main__":
    main()
