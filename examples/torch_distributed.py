"""Data-parallel training on several processes, by PyTorch's own DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/torch_distributed.py

Each process takes its share of one batch; the losses are those of one process with the whole batch, which the first
process computes as well, for comparison.
"""

import gatewise.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS, LENGTH, BATCH, INPUTS, HIDDEN = 60, 30, 64, 4, 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(INPUTS, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (T, B, INPUTS) -> (B, 1)
        return self.head(self.gru(x)[0][-1])


def batches():
    """Sequences (T, B, INPUTS) and what is asked for: the first feature of the step before the last one (B, 1)."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        x = torch.randn(LENGTH, BATCH, INPUTS, generator=generator)
        yield x, x[-2, :, :1]


def make() -> Model:
    torch.manual_seed(0)
    return gatewise.torch.accelerate(Model())


def train(model: nn.Module, rank: int, processes: int) -> list[float]:
    """The mean losses over all processes."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    losses = []
    for x, y in batches():
        loss = nn.functional.mse_loss(model(x[:, rank::processes]), y[rank::processes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    together = train(DistributedDataParallel(make()), rank, processes)
    if rank == 0:
        alone = train(make(), 0, 1)
        difference = max(abs(one - other) for one, other in zip(together, alone, strict=True))
        print(f"{processes} processes: loss {together[0]:.5f} -> {together[-1]:.5f}")
        print(f"one process:  loss {alone[0]:.5f} -> {alone[-1]:.5f}; largest difference {difference:.1e}")
    dist.barrier()  # no one leaves while another still talks
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
