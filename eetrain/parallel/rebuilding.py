"""Resuming from a checkpoint with lost stages: which are rebuilt, and the folder as if they had been stored.

How a stage is rebuilt is in :mod:`eetrain.parallel.checkfree`. The stages are those that *wrote* the checkpoint: names
of tensors say nothing of stages, so that any number of processes reads the rebuilt ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from eetrain.backbones import blocks_of
from eetrain.errors import CheckpointError, ConfigError
from eetrain.parallel.checkfree import EXITS, Power, Source, Written, exit_of, mean, rebuild
from eetrain.parallel.engine_state import state_name
from eetrain.training import EarlyExitModule
from eetrain.training.checkpoint_fallback import whole_checkpoint
from eetrain.training.checkpoint_manifest import OPTIMIZER_PREFIX, DamagedFolderError, writer_of
from eetrain.training.checkpoint_reading import CheckpointFolder
from eetrain.training.processes import Processes

Rebuild = Literal["never", "lost"] | list[int]
RECORD = "rebuilt_stages"


class RebuiltFolder(CheckpointFolder):
    """A checkpoint folder in which some stages are made of others; they have no state of the optimizer.

    Args:
        folder: as it is on the disk.
        sources: what every parameter of the rebuilt stages is made of.
        shapes: of these parameters.
        begun: gives a parameter as the run begins with it.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        sources: Mapping[str, Source],
        shapes: Mapping[str, Sequence[int]],
        begun: Callable[[str], Tensor],
    ) -> None:
        super().__init__(folder.path, folder.manifest)
        self._sources, self._shapes, self._begun = sources, shapes, begun
        self._steps = {state_name("step", name) for name in sources} & self.names
        self.names = frozenset(name for name in self.names if not self._forgotten(name))

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU: stored, or rebuilt from the most precise ones there are."""
        if name in self._steps:
            return torch.tensor(0.0)
        source = self._sources.get(name)
        if source is None:
            return super().tensor(name)
        if not source.names:
            return self._begun(name).detach().cpu()
        return mean((super(RebuiltFolder, self).tensor(self._most_precise(of)) for of in source.names), source.weights)

    def hollow(self, name: str) -> Tensor:
        """A tensor's shape, on the meta device."""
        if name in self._sources:
            return torch.empty(tuple(self._shapes[name]), device="meta")
        return super().hollow(name)

    def _most_precise(self, name: str) -> str:
        master = state_name("master", name)
        return master if master in self.names else name

    def _forgotten(self, name: str) -> bool:
        if not name.startswith(OPTIMIZER_PREFIX) or name in self._steps:
            return False
        return name.split("/", 2)[2] in self._sources


class StageRebuilder:
    """Decides for a checkpoint which of its stages are rebuilt, and remembers it in those written afterwards.

    A stage is lost with any of the files that its processes wrote. Remembered are the names of rebuilt parameters, for
    their learning rate, and the stages that were asked for: those are not rebuilt again from checkpoints of a fit that
    asked for them.

    Args:
        rebuild: ``never``, ``lost``, or stages from 0 that are rebuilt though they may be whole.
        power: of the norms, 1 or 2.
        lr_factor: what the learning rate of rebuilt parameters is multiplied by.

    Raises:
        ConfigError: another value of one of them.

    Attributes:
        names: of the parameters that were rebuilt in this run.
    """

    def __init__(self, rebuild: Rebuild, power: Power, lr_factor: float) -> None:
        _check_settings(rebuild, power, lr_factor)
        self.rebuild, self.power, self.lr_factor = rebuild, power, lr_factor
        self.names: frozenset[str] = frozenset()
        self._damage: dict[Path, DamagedFolderError] = {}

    def locate(self, path: Path, *, module: EarlyExitModule, processes: Processes) -> Path:
        """The checkpoint to go on from where ``path`` is asked for: whole, or with stages that can be rebuilt.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            CheckpointError: it is damaged beyond that, and no other is better.
        """
        self._damage.clear()
        return whole_checkpoint(path, processes, mend=partial(self._mend, module=module, processes=processes))

    def _mend(
        self, path: Path, problem: CheckpointError, *, module: EarlyExitModule, processes: Processes
    ) -> CheckpointError | None:
        """See :class:`~eetrain.training.checkpoint_fallback.Mend`."""
        if self.rebuild == "never" or not isinstance(problem, DamagedFolderError) or not problem.files:
            return problem
        reason = None
        try:
            self._plan(CheckpointFolder.open(path, check=False), problem.files, module)
        except CheckpointError as error:
            reason = error.message
        found = next((reason for reason in processes.gather(reason) if reason is not None), None)
        if found is not None:
            return CheckpointError(f"{problem.message} {found}", hint=problem.hint)
        self._damage[path] = problem
        return None

    def open(self, path: Path, *, module: EarlyExitModule, processes: Processes) -> CheckpointFolder:
        """The folder located at ``path``, with the stages in it that are to be rebuilt; warns of them.

        Raises:
            CheckpointError: a stage was asked for that cannot be rebuilt.
        """
        folder, damage = CheckpointFolder.open(path, check=False), self._damage.get(path)
        stages, written, sources = self._plan(folder, () if damage is None else damage.files, module)
        self.names |= {*_record_of(folder).get("names", ()), *sources}
        if not stages:
            return folder
        if processes.rank == 0:
            told = [_account(stage, written, sources, self.power) for stage in sorted(stages)]
            warnings.warn(
                f"{f'{path} is at step {folder.global_step}.' if damage is None else damage.message} {' '.join(told)} "
                "The optimizer's state of what was rebuilt is reset, its learning rate multiplied by "
                f"{self.lr_factor:g} from now on.",
                stacklevel=2,
            )
        return RebuiltFolder(folder, sources, written.shapes, module.get_parameter)

    def record(self) -> dict[str, Any]:
        """What the next checkpoint remembers; nothing if there is nothing to remember."""
        asked = self.rebuild if isinstance(self.rebuild, list) else []
        return {RECORD: {"names": sorted(self.names), "asked": asked}} if self.names or asked else {}

    def _plan(
        self, folder: CheckpointFolder, files: Collection[str], module: EarlyExitModule
    ) -> tuple[set[int], Written, dict[str, Source]]:
        """Stages to rebuild, what all have written, and what the parameters of those stages are made of."""
        lost, stages = lost_stages(folder, files), set[int]()
        if self.rebuild == "lost":
            stages = lost
        elif self.rebuild != "never":
            stages = set(self.rebuild) - set(_record_of(folder).get("asked", ()))
        if lost - stages:
            raise CheckpointError(f"Stage {min(lost - stages)} is lost, and not asked for.", hint="")
        written = written_by(folder, module)
        return stages, written, rebuild(stages, written, self.power)


def lost_stages(folder: CheckpointFolder, files: Collection[str]) -> set[int]:
    """Stages whose processes wrote any of these files.

    Raises:
        CheckpointError: one of them is of no stage.
    """
    replicas, stages = folder.topology.get("replicas", 1), set()
    for file in files:
        writer = writer_of(file)
        if writer is None:
            raise CheckpointError(
                f"No stage can be rebuilt without {file}.", hint="Use an older checkpoint of the run."
            )
        stages.add(writer // replicas)
    return stages


def written_by(folder: CheckpointFolder, module: EarlyExitModule) -> Written:
    """What the stages of a checkpoint's pipeline wrote, as far as ``module`` has it as parameters.

    Args:
        folder: of the checkpoint; its manifest is read and nothing else.
        module: the model that it is resumed with; parameters on the meta device will do.
    """
    model = module.model
    assert model is not None
    blocks = blocks_of(model.backbone, model.anatomy)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}
    # Buffers are all on the first stage, those of other stages' blocks as well.
    buffers, replicas = module.state_dict().keys() - shapes.keys(), folder.topology.get("replicas", 1)
    tensors = folder.manifest.tensors
    stage_of = {
        name: writer // replicas
        for name, file in tensors.items()
        if not name.startswith(OPTIMIZER_PREFIX) and name not in buffers and (writer := writer_of(file)) is not None
    }
    return Written(
        stages=folder.topology.get("stages", 1),
        stage_of=stage_of,
        trained={name for name in stage_of if state_name("step", name) in tensors},
        shapes=shapes,
        blocks=next(f"{name}." for name, part in module.named_modules() if part is blocks),
        norms=folder.manifest.gradient_norms,
    )


def _account(stage: int, written: Written, sources: Mapping[str, Source], power: Power) -> str:
    """In a sentence what a stage was made of."""
    own = written.parameters(stage)
    parts, blocks = [], sorted({written.place(name)[0] + 1 for name in own if len(sources[name].names) == 2})
    if blocks:
        before, after = written.weights(stage, power)
        known = "" if written.norms_known(stage) else ", the norms of their gradients being unknown"
        parts.append(
            f"{_span(blocks)} from stages {stage - 1} and {stage + 1} with weights {before / (before + after):.3f} and "
            f"{after / (before + after):.3f}{known}"
        )
    copies = {exit_of(name)[0]: exit_of(sources[name].names[0])[0] for name in own if len(sources[name].names) == 1}
    parts += [f"exit {layer} from exit {other}" for layer, other in sorted(copies.items())]
    fresh = [name for name in own if not sources[name].names]
    parts += [f"exit {layer} anew" for layer in sorted({exit_of(name)[0] for name in fresh if name.startswith(EXITS)})]
    if rest := [name for name in fresh if not name.startswith(EXITS)]:
        parts.append(f"{len(rest)} adapters and frozen weights as the run begins with them")
    return f"Stage {stage} is rebuilt: {'; '.join(parts)}."


def _span(blocks: Sequence[int]) -> str:
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"


def _record_of(folder: CheckpointFolder) -> dict[str, Any]:
    record: dict[str, Any] = folder.trainer_state().get(RECORD, {})
    return record


def _check_settings(rebuild: Rebuild, power: int, lr_factor: float) -> None:
    place = "trainer.strategy.init_args."
    if isinstance(rebuild, str) and rebuild not in ("never", "lost"):
        raise ConfigError(
            f"{place}rebuild={rebuild!r} is not known.", hint="One of: never, lost, or a list of stages, from 0."
        )
    if power not in get_args(Power):
        raise ConfigError(f"{place}rebuild_power={power} is not known.", hint="One of: 1, 2.")
    if not (math.isfinite(lr_factor) and lr_factor > 0):
        raise ConfigError(f"{place}rebuild_lr_factor={lr_factor}.", hint="Set it above 0; 1 changes nothing.")
