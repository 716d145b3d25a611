"""The few things that ranks have to agree on; free on one process."""

from typing import Any

import torch


class Ranks:
    """The processes that train together, as Accelerate runs them."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.count = int(accelerator.num_processes)
        self.index = int(accelerator.process_index)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self._accelerator.device
        return device

    def gather(self, *numbers: float) -> list[list[float]]:
        """What every rank says, `[ranks, numbers]`; a collective, to be called by all ranks alike."""
        if self.count == 1:
            return [list(numbers)]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        gathered = self._accelerator.gather(torch.tensor([numbers], device=self.device, dtype=dtype))
        return [[float(number) for number in row] for row in gathered.tolist()]

    def gather_rows(self, own: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The rows of all ranks, `[rows, ...]`, in the order of ranks; `counts` says how many each has.

        Those of other ranks have no gradient.
        """
        padded = own.detach().new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own.detach()
        parts = self._accelerator.gather(padded.contiguous()).split(max(counts))
        kept = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat([own if rank == self.index else part for rank, part in enumerate(kept)])

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(max(row[0] for row in self.gather(number)))

    def lowest(self, number: float) -> float:
        """The smallest of the ranks' numbers."""
        return min(row[0] for row in self.gather(number))

    def mean(self, number: float) -> float:
        """The mean of the ranks' numbers."""
        return sum(row[0] for row in self.gather(number)) / self.count
