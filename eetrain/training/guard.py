"""Bad numbers: losses and gradients that are not finite, and losses that jump, seen before the optimizer steps."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from eetrain.errors import ConfigError, TrainingError
from eetrain.training.checkpoint_fallback import LAST
from eetrain.training.faults import Finding, Place, listed, where
from eetrain.training.gradients import are_finite, bad_parameters, drop_step, step_gradients
from eetrain.training.module import EarlyExitModule
from eetrain.training.processes import present_processes
from eetrain.training.rewinding import newest_whole, rewind
from eetrain.training.spikes import LossWatch
from eetrain.training.step_terms import PHASE, TOTAL, StepTerms, bad_names

Reaction = Literal["stop", "skip", "rewind"]
SpikeReaction = Literal["warn", "stop", "skip", "rewind"]
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class _Reading:
    """What all processes together know of a step: of gradients, terms and the loss; ``phase`` tells losses apart."""

    gradients_bad: bool
    terms_bad: bool
    loss: float
    phase: int


@dataclass(frozen=True)
class _Fault:
    """A step that was not made, and what is to be done about it when its batch has ended."""

    reaction: Reaction
    text: str
    hint: str


class NumberGuard(Callback):
    """Keep a step that would spoil the model from being made.

    Before every optimizer step all processes agree on whether every loss term and the norm of all gradients are finite,
    and whether the loss is a spike (see :class:`~eetrain.training.spikes.LossWatch`). A bad step changes neither
    weights nor moments nor AdamW's counts, bitwise, under any strategy; it counts as a step, for the schedule and the
    log, and its batches as seen. Then:

    - ``stop``: the run is saved as it was before the step, and ends with an error that names the loss term or the
      parameters, the batch and its rows, and the processes on which the loss was bad.
    - ``skip``: the run goes on. After ``max_skips`` such steps in a row it stops.
    - ``rewind``: weights, moments, learning rates and the step count go back to the newest whole checkpoint of the run,
      and the data go on behind the bad batch (PaLM, arXiv 2204.02311, section 5.1, which skips 200 to 500 batches;
      here it is those between the checkpoint and the bad batch). If ``max_rewinds`` of them in a row bring the run no
      further than the furthest bad step, it stops.
    - ``warn``, for spikes: the step is made.

    With ``accumulate_grad_batches`` one bad batch spoils its step. Under ``precision: 16-mixed`` gradients that are not
    finite belong to the search for a loss scale, which passes over such steps itself: only losses count. Phases of an
    objective, which have losses of their own, are watched for spikes apart.

    Example::

        eetrain fit -c RECIPE --guard.on_nonfinite rewind --guard.on_spike skip --checkpoint.every_n_train_steps 100

    Args:
        on_nonfinite: what to do about a loss or gradient that is not finite.
        on_spike: what to do about a spike.
        spike_deviations: how many deviations above its running mean a loss is a spike; ``None`` watches for none.
        spike_after: steps before any is called a spike.
        max_skips: steps in a row that are skipped at most.
        max_rewinds: times that the run goes back without getting further.

    Raises:
        ConfigError: an unknown reaction or a number out of its range.
    """

    def __init__(
        self,
        on_nonfinite: Reaction = "stop",
        on_spike: SpikeReaction = "warn",
        spike_deviations: float | None = 6.0,
        spike_after: int = 100,
        max_skips: int = 10,
        max_rewinds: int = 3,
    ) -> None:
        _check(on_nonfinite, on_spike, spike_deviations, spike_after, max_skips, max_rewinds)
        self.on_nonfinite, self.on_spike = on_nonfinite, on_spike
        self.spike_deviations, self.spike_after = spike_deviations, spike_after
        self.max_skips, self.max_rewinds = max_skips, max_rewinds
        self._run: str | None = None  # tells this run's checkpoints from others in their folder
        self._watches: dict[int, LossWatch] = {}
        self._skips, self._rewinds, self._furthest = 0, 0, -1
        self._window: list[StepTerms] = []  # of the batches before the present one in its step
        self._judged = False
        self._fault: _Fault | None = None
        self._steps_back = 0  # of the log's own count of steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the run, unless it goes on from a checkpoint.

        Raises:
            ConfigError: it is to go back to checkpoints, and writes none.
        """
        self._window, self._judged, self._fault = [], False, None
        for name in ("on_nonfinite", "on_spike"):
            if getattr(self, name) == "rewind" and not trainer.fast_dev_run and _folder(trainer) is None:
                raise ConfigError(
                    f"guard.{name}=rewind, but the run writes no checkpoints.",
                    hint=f"Leave trainer.enable_checkpointing on, or set guard.{name}=skip.",
                )
        if self._run is None:
            self._run = trainer.strategy.broadcast(uuid.uuid4().hex)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Let the log follow a run that went back, now that the bad step is in it."""
        trainer.fit_loop.epoch_loop._batches_that_stepped -= self._steps_back
        self._steps_back = 0

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Judge the step, and drop it if it is bad."""
        assert isinstance(pl_module, EarlyExitModule)
        self._judged = True
        terms = [*self._window, pl_module.step_terms]
        reading = self._read(trainer, terms)
        if reading.gradients_bad or reading.terms_bad:
            self._refuse(trainer, pl_module, terms, self.on_nonfinite, reading, None)
            return
        watch = self._watch(reading.phase)
        before = None if watch is None else (watch.mean, watch.deviation)
        if watch is None or before is None or not watch.see(reading.loss):
            self._skips = 0
        elif self.on_spike == "warn":
            self._skips = 0
            text = self._describe(trainer, pl_module, terms, reading, before)
            rank_zero_warn(f"{text} The step is made.")
        else:
            self._refuse(trainer, pl_module, terms, self.on_spike, reading, before)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop or go back, now that the batch has ended.

        Raises:
            TrainingError: on every process.
        """
        if not self._judged:
            assert isinstance(pl_module, EarlyExitModule)
            self._window.append(pl_module.step_terms)
            return
        fault, self._fault, self._window, self._judged = self._fault, None, [], False
        if fault is None:
            return
        if fault.reaction == "skip":
            rank_zero_warn(f"{fault.text} It was skipped, {self._skips} in a row so far.")
        elif fault.reaction == "stop" or not self._go_back(trainer, fault):
            raise TrainingError(f"{fault.text} {self._save(trainer)}", hint=fault.hint)

    def state_dict(self) -> dict[str, Any]:
        """Name of the run, statistics of the losses, and what has been tried."""
        return {
            "run": self._run,
            "watches": {str(phase): watch.state_dict() for phase, watch in self._watches.items()},
            "skips": self._skips,
            "rewinds": self._rewinds,
            "furthest": self._furthest,
            "steps_back": self._steps_back,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._run, self._skips = state_dict["run"], state_dict["skips"]
        self._rewinds, self._furthest = state_dict["rewinds"], state_dict["furthest"]
        self._steps_back = state_dict["steps_back"]
        self._load_watches(state_dict)

    def _load_watches(self, state: dict[str, Any]) -> None:
        self._watches = {}
        for phase, of_watch in state["watches"].items():
            if (watch := self._watch(int(phase))) is not None:
                watch.load_state_dict(of_watch)

    def _watch(self, phase: int) -> LossWatch | None:
        if self.spike_deviations is None:
            return None
        return self._watches.setdefault(phase, LossWatch(self.spike_deviations, self.spike_after))

    def _read(self, trainer: Trainer, terms: Sequence[StepTerms]) -> _Reading:
        """Of all processes: each tells the worst it sees, and the largest loss, by one small message."""
        device = trainer.strategy.root_device
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        finite = are_finite([] if scaled else step_gradients(trainer), device)
        values = torch.stack([value.to(device, torch.float32) for of in terms for value in of.means.values()])
        loss = torch.stack([of.means[TOTAL].to(device, torch.float32) for of in terms]).mean()
        phase = terms[-1].means.get(PHASE, loss.new_zeros(())).to(device, torch.float32)
        told = torch.stack([(~finite).float(), (~values.isfinite().all()).float(), loss.nan_to_num(_LARGEST), phase])
        gradients, bad_terms, agreed, agreed_phase = trainer.strategy.reduce(told, reduce_op="max").tolist()
        return _Reading(bool(gradients), bool(bad_terms), agreed, int(agreed_phase))

    def _refuse(
        self,
        trainer: Trainer,
        module: EarlyExitModule,
        terms: Sequence[StepTerms],
        reaction: Reaction,
        reading: _Reading,
        before: tuple[float, float] | None,
    ) -> None:
        text = self._describe(trainer, module, terms, reading, before)
        drop_step(trainer)
        option = "on_nonfinite" if before is None else "on_spike"
        hint = f"Look at these data; go on with --resume auto and --guard.{option} skip or rewind, or with a lower "
        hint += "model.optimizer.lr"
        hint += "." if trainer.precision_plugin.precision not in ("16-mixed", "16-true") else ", or in bfloat16."
        if reaction == "skip":
            self._skips += 1
            if self._skips > self.max_skips:
                reaction, text = "stop", f"{text} {self.max_skips} steps before it were skipped (guard.max_skips)."
        elif reaction == "rewind":
            further = trainer.global_step > self._furthest
            self._rewinds = 1 if further else self._rewinds + 1
            self._furthest = max(self._furthest, trainer.global_step)
            if self._rewinds > self.max_rewinds:
                reaction = "stop"
                text += f" The run went back {self.max_rewinds} times and came no further (guard.max_rewinds)."
        self._fault = _Fault(reaction, text, hint)

    def _describe(
        self,
        trainer: Trainer,
        module: EarlyExitModule,
        terms: Sequence[StepTerms],
        reading: _Reading,
        before: tuple[float, float] | None,
    ) -> str:
        """What is wrong with the step and where; all processes call this, and all get the same words."""
        step, faulty = f"step {trainer.global_step}", [place for place, of in enumerate(terms) if bad_names(of.means)]
        places = faulty[:1] or list(range(len(terms)))
        back = [len(terms) - 1 - place for place in places]
        # A spoilt loss spoils all gradients: then they tell nothing.
        names = [] if faulty or not reading.gradients_bad else bad_parameters(step_gradients(trainer), module)
        here = bad_names(terms[places[0]].local) if faulty else []
        finding = Finding(Place.of_present(trainer, back), tuple(here), tuple(names))
        findings = present_processes().gather(finding)
        at = where(findings)
        if faulty:
            return f"In {step} ({at}) {listed(bad_names(terms[places[0]].means))} is not finite."
        if reading.gradients_bad:
            of_all = list(dict.fromkeys(name for found in findings for name in found.parameters))
            return f"In {step} ({at}) the gradient of {listed(of_all)} is not finite, though every loss term is."
        assert before is not None
        mean, deviation = before
        above = (reading.loss - mean) / deviation
        return (
            f"In {step} ({at}) the loss is {reading.loss:.4g}, {above:.1f} deviations of {deviation:.2g} above its "
            f"running mean of {mean:.4g}."
        )

    def _go_back(self, trainer: Trainer, fault: _Fault) -> bool:
        folder = _folder(trainer)
        path = None if folder is None else newest_whole(folder, self._is_ours, present_processes())
        if path is None:
            text = f"{fault.text} There is no checkpoint of this run yet to go back to."
            raise TrainingError(
                f"{text} {self._save(trainer)}",
                hint="Set checkpoint.every_n_train_steps lower, or guard.on_nonfinite=skip.",
            )
        done = trainer.global_step
        checkpoint = rewind(trainer, path)
        self._steps_back = done - trainer.global_step
        self._load_watches(checkpoint["callbacks"][self.state_key])
        rank_zero_warn(f"{fault.text} The run went back to step {trainer.global_step} ({path}); the data go on.")
        return True

    def _is_ours(self, checkpoint: dict[str, Any]) -> bool:
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        return state.get("run") == self._run and self._run is not None

    def _save(self, trainer: Trainer) -> str:
        folder = _folder(trainer)
        if folder is None:
            return "Nothing was updated."
        self._skips = self._rewinds = 0  # who goes on from here has done something about it
        trainer.save_checkpoint(folder / LAST)
        return f"Nothing was updated; {folder / LAST} holds the run before that step."


def _folder(trainer: Trainer) -> Path | None:
    """Where the run's checkpoints go, if it writes some."""
    folders = [call.dirpath for call in trainer.checkpoint_callbacks if isinstance(call, ModelCheckpoint)]
    return next((Path(folder) for folder in folders if folder is not None), None)


def _check(
    on_nonfinite: str, on_spike: str, deviations: float | None, after: int, max_skips: int, max_rewinds: int
) -> None:
    for name, given, known in (("on_nonfinite", on_nonfinite, Reaction), ("on_spike", on_spike, SpikeReaction)):
        if given not in get_args(known):
            raise ConfigError(f"guard.{name}={given!r} is not known.", hint=f"One of: {', '.join(get_args(known))}.")
    if deviations is not None and not deviations > 0:
        raise ConfigError(
            f"guard.spike_deviations={deviations}.", hint="Set it above 0, or to null to watch for no spikes."
        )
    for name, number in (("spike_after", after), ("max_skips", max_skips), ("max_rewinds", max_rewinds)):
        if number < 1:
            raise ConfigError(f"guard.{name}={number}.", hint="Set it to 1 or more.")
