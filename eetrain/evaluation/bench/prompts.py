"""What a benchmark decodes: batches of random ids, or of real prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eetrain.errors import ConfigError, DataError
from eetrain.evaluation.batches import left_padded
from eetrain.evaluation.samples import Sample

_SEED = 0


@dataclass(frozen=True)
class Workload:
    """What every candidate decodes at one setting.

    Attributes:
        batch_size: rows of each batch.
        prompt_length: columns of the widest batch.
        batches: ids and attention mask ``[B, T]``, left-padded.
    """

    batch_size: int
    prompt_length: int
    batches: tuple[tuple[Tensor, Tensor], ...]

    @property
    def rows(self) -> int:
        """Prompts of all batches."""
        return self.batch_size * len(self.batches)


def random_prompts(vocab_size: int, batch_size: int, length: int, device: torch.device) -> Workload:
    """One batch of uniform random ids, the same in every process.

    Args:
        vocab_size: ids are below it.
        batch_size: rows.
        length: tokens of each prompt.
        device: of the model.

    Raises:
        ConfigError: a size below 1.
    """
    for name, value in (("batch_sizes", batch_size), ("prompt_lengths", length)):
        if value < 1:
            raise ConfigError(f"{name} holds {value}, must be at least 1.", hint=f"For example --{name} 1,8.")
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocab_size, (batch_size, length), generator=generator).to(device)
    return Workload(batch_size, length, ((ids, torch.ones_like(ids)),))


def real_prompts(samples: Sequence[Sample], batch_size: int, pad_id: int, device: torch.device) -> Workload:
    """Prompts in whole batches; those that do not fill one are left out, so that each step decodes the same rows.

    Args:
        samples: whose prompts are taken, in their order.
        batch_size: rows of a batch.
        pad_id: fills shorter prompts.
        device: of the model.

    Raises:
        ConfigError: a size below 1.
        DataError: there are fewer prompts than one batch needs.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_sizes holds {batch_size}, must be at least 1.", hint="For example --batch_sizes 1,8.")
    if len(samples) < batch_size:
        raise DataError(
            f"The data have {len(samples)} prompts, too few for a batch of {batch_size}.",
            hint="Lower --batch_sizes, raise --limit, or give more data.",
        )
    prompts = [sample.prompt_ids for sample in samples[: len(samples) - len(samples) % batch_size]]
    starts = range(0, len(prompts), batch_size)
    batches = tuple(left_padded(prompts[start : start + batch_size], pad_id, device) for start in starts)
    return Workload(batch_size, max(ids.shape[1] for ids, _ in batches), batches)
