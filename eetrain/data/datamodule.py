"""The data module: from sources to batches, for every stage of a run."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from eetrain.data.batches import FillPacked, PadLeft, PadRight, PromptRows, TokenRows
from eetrain.data.corpus import HUB_SPLIT, Corpus, Split
from eetrain.data.resume import FitPosition, ResumableDataLoader
from eetrain.data.sampling import FixedSampler, ResumableBatchSampler
from eetrain.data.sources import HubSource, is_hub
from eetrain.data.templates import Template, Text
from eetrain.data.tokenization import TextEncoder, load_tokenizer
from eetrain.errors import ConfigError

_SPLITS_OF_STAGE: dict[str | None, list[Split]] = {
    "fit": ["train", "validation"],
    "validate": ["validation"],
    "test": ["test"],
    "predict": ["predict"],
    None: ["train", "validation", "test", "predict"],
}


class CausalLMDataModule(LightningDataModule):
    """Text files or hub data sets as batches for a causal language model.

    Training, validation and test batches are dicts of int64 tensors: `input_ids`, `labels` (aligned with
    `input_ids`, -100 = not scored) and either `attention_mask` (padded on the right) or, when packing,
    `position_ids` that restart at each document. Predict batches hold `input_ids` and `attention_mask` of
    prompts padded on the left, and `index` into `prompts(...).rows` (-1: a filler that evens out the
    replicas, to be dropped). Fit with ``Trainer(use_distributed_sampler=False)``: the data module shards, and
    resumes in the middle of an epoch with exactly the batches that are left.

    Example:
        >>> data = CausalLMDataModule("path/to/model", train="data/*.txt", packing=True, max_length=1024)

    Args:
        tokenizer: folder, hub id or object.
        train: source or sources of the training rows: files, glob patterns, ``hub:owner/name@config#split``;
            see `eetrain.data.sources`.
        validation: likewise.
        test: likewise.
        predict: likewise; the rows to generate for.
        template: how a row becomes tokens, see `eetrain.data.templates`; ``None``: `Text`.
        max_length: most tokens of a row, at least 2.
        packing: put several documents into a row of exactly `max_length` tokens.
        batch_size: rows per step and replica in training.
        eval_batch_size: the same elsewhere; ``None``: `batch_size`.
        num_workers: processes that build batches; 0 builds them in the main process.
        seed: of the shuffle and of `validation_fraction`.
        limit: use at most this many rows of each split.
        overflow: what to do with documents longer than `max_length`: ``split`` (documents scored whole only),
            ``truncate``, or ``error``. ``None``: ``split`` where the template allows it, else ``truncate``.
        vocab_size: rows of the backbone's embedding, to refuse a tokenizer that does not fit; may be set
            until `setup`.
        trust_remote_code: run code that the tokenizer's repository brings.
        validation_fraction: between 0 and 1: without `validation`, hold out this part of the training rows.
        drop_last: drop the rows that do not fill the last global batch; otherwise it is filled up with the
            epoch's first rows.

    Raises:
        ConfigError: an argument is out of its range or contradicts another one.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        template: Template | None = None,
        max_length: int = 512,
        packing: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        overflow: Literal["split", "truncate", "error"] | None = None,
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
        validation_fraction: float | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        given: dict[Split, str | list[str] | None] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": predict,
        }
        self.sources: dict[Split, list[str]] = {
            k: [v] if isinstance(v, str) else list(v or []) for k, v in given.items()
        }
        self.template = Text() if template is None else template
        self.max_length, self.packing = max_length, packing
        self.batch_size, self.eval_batch_size = (
            batch_size,
            batch_size if eval_batch_size is None else eval_batch_size,
        )
        self.num_workers, self.seed, self.limit = num_workers, seed, limit
        self.overflow: Literal["split", "truncate", "error"] = overflow or (
            "split" if self.template.splittable else "truncate"
        )
        self.vocab_size, self.trust_remote_code = vocab_size, trust_remote_code
        self.validation_fraction, self.drop_last = validation_fraction, drop_last
        self._given_tokenizer = tokenizer
        self._known_position = FitPosition()
        self._state_to_load: dict[str, Any] | None = None
        self._sampler: ResumableBatchSampler | None = None
        self._check_arguments()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        return load_tokenizer(self._given_tokenizer, self.trust_remote_code)

    @cached_property
    def corpus(self) -> Corpus:
        """The splits, each read when first asked for."""
        return Corpus(
            sources=self.sources,
            template=self.template,
            encoder=TextEncoder(self.tokenizer, self.vocab_size),
            max_length=self.max_length,
            packing=self.packing,
            overflow=self.overflow,
            seed=self.seed,
            limit=self.limit,
            validation_fraction=self.validation_fraction,
        )

    def prepare_data(self) -> None:
        """Download tokenizer and hub data sets, once per node."""
        _ = self.tokenizer
        for split, sources in self.sources.items():
            for source in filter(is_hub, sources):
                HubSource.parse(source).load(HUB_SPLIT[split])

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what a stage (``fit``, ``validate``, ``test``, ``predict``) or all need."""
        if stage in ("fit", None):
            # What an earlier fit or a checkpoint opened for validation left behind; Lightning brings the state of a
            # fit that is resumed after this.
            self._known_position, self._state_to_load, self._sampler = FitPosition(), None, None
        for split in filter(self.corpus.has, _SPLITS_OF_STAGE[stage]):
            if split == "predict":
                self.corpus.prompts(split)
            else:
                self.corpus.rows(split)

    def rows(self, split: Split) -> TokenRows:
        """Return the tokenised rows of a split, see `Corpus.rows`."""
        return self.corpus.rows(split)

    def prompts(self, split: Split) -> PromptRows:
        """Return the prompts of a split with the rows they came from, see `Corpus.prompts`."""
        return self.corpus.prompts(split)

    def train_dataloader(self) -> ResumableDataLoader:
        """Return shuffled batches; each iteration starts where the run stands."""
        rows = self.corpus.rows("train")
        overfitting = self.trainer is not None and self.trainer.overfit_batches > 0
        self._sampler = ResumableBatchSampler(
            len(rows),
            self.batch_size,
            *self._replica(),
            seed=self.seed,
            shuffle=not overfitting,
            drop_last=self.drop_last,
        )
        if self._state_to_load is not None:
            state, self._state_to_load = self._state_to_load, None
            self._sampler.load_state_dict(state["sampler"])
            self._known_position = FitPosition(self._sampler.epoch, self._sampler.start, state["total_batches"])
        return ResumableDataLoader(
            rows,
            self._sampler,
            self._position,
            persistent_workers=self.num_workers > 0,
            **self._token_options(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches in file order; an empty list where there are no validation data."""
        return self._eval_loader("validation") if self.corpus.has("validation") else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches in file order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the prompts to generate from, padded on the left, in file order."""
        prompts = self.corpus.prompts("predict")
        sampler = FixedSampler(len(prompts), *self._replica())
        collate = PadLeft(self.corpus.encoder.pad_id)
        return DataLoader(
            prompts, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=collate, **self._worker_options()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the fit stands in its data; empty outside a fit."""
        if self._sampler is None:
            return {}
        position = self._position()
        sampler = {**self._sampler.state_dict(), "epoch": position.epoch, "batches": position.batches}
        return {"sampler": sampler, "total_batches": position.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position of an interrupted fit; `train_dataloader` checks it and goes there."""
        self._state_to_load = state_dict or None

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        rows = self.corpus.rows(split)
        sampler = FixedSampler(len(rows), *self._replica())
        return DataLoader(rows, batch_size=self.eval_batch_size, sampler=sampler, **self._token_options())

    def _token_options(self) -> dict[str, Any]:
        pad_id = self.corpus.encoder.pad_id
        collate = FillPacked(pad_id, self.max_length) if self.packing else PadRight(pad_id)
        return {"collate_fn": collate, **self._worker_options()}

    def _worker_options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _position(self) -> FitPosition:
        if self.trainer is None or self._sampler is None:
            return self._known_position
        return self._known_position.now(self.trainer, len(self._sampler))

    def _replica(self) -> tuple[int, int]:
        """Return the number of replicas and which this is; the stages of a pipeline are one replica."""
        options = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        if self.trainer is None or options is None or options["num_replicas"] == 1:
            return 1, 0
        # Lightning tells this nowhere in public, and would shard what is sharded already.
        if self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                f"The trainer has use_distributed_sampler: true on {options['num_replicas']} replicas, but the data "
                "module shards by itself.",
                hint="Set trainer.use_distributed_sampler: false.",
            )
        return options["num_replicas"], options["rank"]

    def _check_arguments(self) -> None:
        for name, least in (("max_length", 2), ("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}.", hint=f"Set it to {least} or more.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}.", hint="Set it to 1 or more, or leave it out for all rows.")
        if self.overflow == "split" and not self.template.splittable:
            raise ConfigError(
                f"overflow: split does not go with the template {type(self.template).__name__}: a later "
                "part would lack its prompt.",
                hint="Set overflow: truncate or error.",
            )
        if self.validation_fraction is None:
            return
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction is {self.validation_fraction}.",
                hint="Set it between 0 and 1, both excluded.",
            )
        if self.sources["validation"]:
            raise ConfigError("Both validation and validation_fraction are set.", hint="Keep one of them.")
