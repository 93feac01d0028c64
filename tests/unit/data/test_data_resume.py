"""Two epochs of five batches, interrupted anywhere and resumed, see the batches of the uninterrupted run."""

import itertools
import json
import tempfile
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from eetrain.data import CausalLMDataModule
from eetrain.errors import ConfigError

ROWS, BATCH, EPOCHS = 20, 4, 2
STEPS = ROWS // BATCH


class Recorder(LightningModule):
    """Trains one weight and writes down which rows it saw."""

    def __init__(self, crash_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.crash_at = crash_at

    def training_step(self, batch):
        if len(self.seen) == self.crash_at:
            raise RuntimeError("crash")
        # Two ids suffice: the documents are two letters.
        self.seen.append((batch["input_ids"][:, 1] * 1000 + batch["input_ids"][:, 2]).tolist())
        return self.weight.sum() + 0.0 * batch["labels"].float().mean()

    def validation_step(self, batch):
        self.log("val", float(len(self.seen)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WriteDown(Callback):
    """Writes what this rank saw into a file, as the processes of a fit cannot return it."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_end(self, trainer, module):
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(module.seen))


class SaveAt(Callback):
    """Saves a checkpoint in one hook, each time under the number of batches seen."""

    def __init__(self, hook: str, folder) -> None:
        setattr(self, hook, lambda trainer, module, *_: trainer.save_checkpoint(folder / f"{len(module.seen)}.ckpt"))


@pytest.fixture
def data(tmp_path, tokenizer):
    def build(**settings):
        path = tmp_path / "train.jsonl"
        texts = [chr(65 + n) + chr(98 + n) for n in range(ROWS)]
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return CausalLMDataModule(tokenizer, train=str(path), batch_size=BATCH, seed=5, **settings)

    return build


def fit(data, callbacks=(), module=None, ckpt_path=None, **settings):
    module = Recorder() if module is None else module
    trainer = Trainer(
        **{"max_epochs": EPOCHS, "use_distributed_sampler": False, **settings},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


def test_epochs_show_all_rows_in_other_orders(data):
    seen = fit(data())
    first, second = (list(itertools.chain(*epoch)) for epoch in (seen[:STEPS], seen[STEPS:]))
    assert len(seen) == EPOCHS * STEPS
    assert len(set(first)) == ROWS
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_any_batch(data, tmp_path, workers):
    save = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(data(num_workers=workers), [save])
    assert whole == fit(data())
    for step in range(1, EPOCHS * STEPS + 1):
        rest = fit(data(num_workers=workers), ckpt_path=tmp_path / "all" / f"step={step}.ckpt")
        assert rest == whole[step:], f"after batch {step}"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("limit", [{}, {"max_epochs": -1, "max_steps": EPOCHS * STEPS}])
def test_resume_from_an_epochs_border(data, tmp_path, hook, workers, limit):
    settings = {"num_sanity_val_steps": 0, **limit}
    sources = {"validation": str(tmp_path / "train.jsonl"), "num_workers": workers}
    whole = fit(data(**sources), [SaveAt(hook, tmp_path)], **settings)
    saved = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    assert saved == [STEPS, 2 * STEPS]
    for step in saved:
        assert fit(data(**sources), ckpt_path=tmp_path / f"{step}.ckpt", **settings) == whole[step:], step


def test_resume_from_a_validation_inside_the_epoch(data, tmp_path):
    settings = {"num_sanity_val_steps": 0, "val_check_interval": 2}
    whole = fit(data(validation=str(tmp_path / "train.jsonl")), [SaveAt("on_validation_end", tmp_path)], **settings)
    saved = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    assert saved == [2, 4, 7, 9]
    for step in saved:
        rest = fit(data(validation=str(tmp_path / "train.jsonl")), ckpt_path=tmp_path / f"{step}.ckpt", **settings)
        assert rest == whole[step:], step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [3, STEPS, 7])
def test_resume_what_max_steps_ended(data, tmp_path, step, workers):
    """Lightning counts the epoch in which `max_steps` ends as processed; the data must not."""
    whole = fit(data())
    module, first = Recorder(), data()
    trainer = Trainer(
        max_steps=step, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=first)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert module.seen == whole[:step]
    settings = {"max_epochs": -1, "max_steps": EPOCHS * STEPS}
    assert fit(data(num_workers=workers), ckpt_path=tmp_path / "end.ckpt", **settings) == whole[step:]


class Stop(Callback):
    """Asks the trainer to stop after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, module, *_):
        trainer.should_stop = len(module.seen) == self.after


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_a_stop_inside_an_epoch(data, tmp_path, workers):
    """A checkpoint of the stop itself continues the epoch; for that of the ended fit the epoch is done."""
    whole = fit(data())
    savers = [SaveAt("on_train_batch_end", tmp_path / "stop"), SaveAt("on_train_end", tmp_path / "end")]
    assert fit(data(), [Stop(3), *savers]) == whole[:3]
    assert fit(data(num_workers=workers), ckpt_path=tmp_path / "stop" / "3.ckpt") == whole[3:]
    assert fit(data(num_workers=workers), ckpt_path=tmp_path / "end" / "3.ckpt") == whole[STEPS:]


@pytest.mark.parametrize("crash_at", [0, 3, 5, 8])
def test_resume_after_a_crash_repeats_the_batch_that_failed(data, tmp_path, crash_at):
    whole = fit(data())
    module = Recorder(crash_at)
    with pytest.raises(RuntimeError, match="crash"):
        fit(data(num_workers=2), [SaveAt("on_exception", tmp_path)], module=module)
    assert module.seen == whole[:crash_at]
    assert fit(data(num_workers=2), ckpt_path=tmp_path / f"{crash_at}.ckpt") == whole[crash_at:]


def test_resume_twice(data, tmp_path):
    whole = fit(data())
    fit(data(), [SaveAt("on_train_batch_end", tmp_path)], max_steps=3, max_epochs=-1)
    settings = {"max_epochs": -1, "max_steps": 7}
    second = fit(data(), [SaveAt("on_train_batch_end", tmp_path)], ckpt_path=tmp_path / "3.ckpt", **settings)
    assert second == whole[3:7]
    # The second run has seen four batches by itself.
    assert fit(data(), ckpt_path=tmp_path / "4.ckpt", max_steps=10, max_epochs=-1) == whole[7:]


def test_shorter_epochs_resume_too(data, tmp_path):
    settings = {"limit_train_batches": 3, "max_epochs": 3}
    save = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(data(), [save], **settings)
    assert len(whole) == 9
    assert whole[:3] == fit(data())[:3]
    assert whole[3:6] == fit(data())[STEPS : STEPS + 3]
    for step in range(1, 9):
        assert fit(data(), ckpt_path=tmp_path / "all" / f"step={step}.ckpt", **settings) == whole[step:], step


def test_loader_is_taken_for_resumable(data, tmp_path):
    save = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(data(), [save])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(data(), ckpt_path=tmp_path / "all" / "step=3.ckpt")
    assert not [w for w in caught if "not resumable" in str(w.message)]


def test_other_data_in_the_middle_of_an_epoch_is_refused(data, tmp_path):
    save = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(data(), [save])
    with pytest.raises(ConfigError, match="in the middle of an epoch with num_rows 20, this run has num_rows 12"):
        fit(data(limit=12), ckpt_path=tmp_path / "all" / "step=3.ckpt")


def test_checkpoint_opened_for_validation_leaves_the_next_fit_alone(data, tmp_path):
    save = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(data(), [save])
    again = data(validation=str(tmp_path / "train.jsonl"), limit=12)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(**options).validate(Recorder(), datamodule=again, ckpt_path=tmp_path / "all" / "step=3.ckpt", verbose=False)
    assert fit(again) == fit(data(limit=12))


def test_a_second_fit_with_the_same_data_starts_anew(data):
    shared = data()
    assert fit(shared) == fit(shared)


def test_overfitting_repeats_the_same_batches(data):
    seen = fit(data(), overfit_batches=2)
    assert len(seen) == 4
    assert seen[:2] == seen[2:]


def test_two_processes_share_each_batch_and_resume(data, tmp_path):
    """Two ranks with half the batch size see, side by side, what one process sees; and may resume its checkpoint."""
    save = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(data(), [save])
    settings = {"strategy": "ddp_fork", "devices": 2}
    for step in (0, 3):
        halves = data()
        halves.batch_size = BATCH // 2
        checkpoint = tmp_path / "all" / f"step={step}.ckpt" if step else None
        fit(halves, [WriteDown(tmp_path)], ckpt_path=checkpoint, **settings)
        ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert [a + b for a, b in zip(*ranks, strict=True)] == whole[step:]


def test_sharding_twice_is_refused(data, tmp_path, monkeypatch):
    # The launcher of the processes leaves a file with their error in the temporary folder.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        Exception, match="use_distributed_sampler: true on 2 replicas, but the data module shards by itself"
    ):
        fit(data(), strategy="ddp_fork", devices=2, use_distributed_sampler=True)
