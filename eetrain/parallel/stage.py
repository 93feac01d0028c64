"""One stage of a pipeline: some blocks, exits and perhaps both ends of a multi-exit model, run as the model runs them.

The same machinery as on one process: the decoder's own forward is harvested once per stage and micro-batch, from ids on
the first stage and from the hidden state on the others, and the real blocks are called with what it handed out. Ids,
positions and labels do not travel: every process of a replica reads the same batches.

Shape suffixes: ``B`` rows, ``T`` positions, ``D`` hidden size, ``N = B * T`` tokens, ``L`` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eetrain.backbones import Harvest, Harvester, PartialBlocks, Projection, blocks_of
from eetrain.backbones.anatomy import causal_lm_of, decoder_of, submodule
from eetrain.exits import MultiExitModel
from eetrain.exits.model import RunBlocks
from eetrain.objectives import FULL
from eetrain.parallel.injection import carry
from eetrain.planning.pieces import Piece


@dataclass
class MicroBatch:
    """A slice of a replica's batch, and what the stage harvested for it.

    Args:
        place: which of the batch's micro-batches.
        input_ids: ``[B, T]``.
        labels_N: shifted labels.
        attention_mask: ``[B, T]`` or ``None``.
        position_ids: ``[B, T]`` or ``None``.
        active_LBT: where each block runs, or ``None`` for everywhere.
        teacher_BTD: normed features of the full depth, in backward, if exits are distilled from it.
    """

    place: int
    input_ids: Tensor
    labels_N: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    active_LBT: Tensor | None = None
    harvest: Harvest | None = None
    run: RunBlocks | None = None
    teacher_BTD: Tensor | None = None


class Stage:
    """What one process runs.

    Args:
        model: whole; see :meth:`keep_own`.
        pieces: of the whole pipeline.
        bounds: of all stages, see :func:`eetrain.planning.partition.partition`.
        index: which stage this is, from 0.
    """

    def __init__(self, model: MultiExitModel, pieces: Sequence[Piece], bounds: Sequence[int], index: int) -> None:
        self.model, self.index, self.num_stages = model, index, len(bounds) - 1
        self.pieces = tuple(pieces[bounds[index] : bounds[index + 1]])
        self.frozen = not any(parameter.requires_grad for parameter in model.backbone.parameters())
        self.last_trained_block = model.num_blocks
        self.reach_all = False  # whether what a step leaves out has gradients of zero
        self._harvester: Harvester | None = None

    @property
    def is_first(self) -> bool:
        """Whether ids enter here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the last block ends here."""
        return self.index == self.num_stages - 1

    @property
    def depths(self) -> tuple[int, ...]:
        """Exits of this stage, ascending, then :data:`FULL` on the last one."""
        exits = [piece.layer for piece in self.pieces if piece.kind == "exit"]
        return (*exits, FULL) if self.is_last else tuple(exits)

    def renew(self) -> None:
        """Take over modes of the modules (training, evaluation) before a batch."""
        self._harvester = Harvester(self.model.backbone, self.model.anatomy)

    def begin(self, micro: MicroBatch, hidden_BTD: Tensor | None) -> Tensor:
        """Harvest for a micro-batch; returns the state that the stage's blocks start from.

        Args:
            micro: completed in place.
            hidden_BTD: from the stage before; ``None`` on the first.
        """
        assert self._harvester is not None, "renew the stage first"
        masks = {"attention_mask": micro.attention_mask, "position_ids": micro.position_ids}
        if hidden_BTD is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                micro.harvest = self._harvester(micro.input_ids, **masks)
            hidden_BTD = micro.harvest.hidden_BTD
        else:
            with torch.no_grad():
                micro.harvest = self._harvester(inputs_embeds=hidden_BTD.detach(), **masks)
        if micro.active_LBT is None:
            harvester, harvest = self._harvester, micro.harvest
            micro.run = lambda state_BTD, blocks: harvester.run(harvest, state_BTD, blocks)
        else:
            micro.run = PartialBlocks(
                self._harvester, micro.harvest, micro.active_LBT, **masks, reach_all=self.reach_all
            ).run
        return hidden_BTD

    def run_block(self, layer: int, hidden_BTD: Tensor, micro: MicroBatch) -> Tensor:
        """The residual stream after block ``layer``; without a loss behind it the block is left out of training."""
        assert micro.run is not None, "begin the micro-batch first"
        if torch.is_grad_enabled() and layer > self.last_trained_block:
            return hidden_BTD
        if not (self.frozen and torch.is_grad_enabled()):
            return micro.run(hidden_BTD, [layer])
        with torch.no_grad():
            after_BTD = micro.run(hidden_BTD, [layer])
        return carry(hidden_BTD, after_BTD)

    def features(self, depth: int, hidden_BTD: Tensor, micro: MicroBatch) -> tuple[Tensor, Projection]:
        """Features ``[N, D]`` of an exit or of the full depth, and their map to logits."""
        assert micro.harvest is not None, "begin the micro-batch first"
        shared_norm, shared = self.model.shared_tail()
        if depth == FULL:
            return shared_norm(hidden_BTD).flatten(0, 1), shared
        head = self.model.head(depth)
        features_BTD = head(hidden_BTD, self.model.head_call(depth, micro.harvest), shared_norm)
        return features_BTD.flatten(0, 1), head.projection(shared)

    def trained_at(self, depth: int) -> list[nn.Parameter]:
        """Trained parameters between a hidden state and the logits of a depth."""
        return [parameter for parameter in _of_depth(self.model, depth) if parameter.requires_grad]

    def trained_in_blocks(self) -> list[nn.Parameter]:
        """Trained parameters of the stage's blocks."""
        blocks = [piece for piece in self.pieces if piece.kind == "block"]
        return [p for block in blocks for p in parameters_of(self.model, block) if p.requires_grad]

    def keep_own(self) -> None:
        """Give up the storage of what other stages hold; names, shapes and modules stay.

        What the decoder runs outside its blocks (learned positions, say) stays as well, on stages behind the first as a
        frozen copy: its output is not used there, but harvesting runs it. Gates are small and stay on every stage.
        """
        own = {id(p) for piece in self.pieces for p in parameters_of(self.model, piece)}
        own |= {id(p) for p in self.model.gates.parameters()}
        frame = {id(p) for p in frame_parameters(self.model)}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in own:
                    continue
                value = parameter.detach() if id(parameter) in frame else torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def parameters_of(model: MultiExitModel, piece: Piece) -> list[nn.Parameter]:
    """All parameters that a piece uses, each once; those of gates excepted."""
    if piece.kind == "block":
        found = list(blocks_of(model.backbone, model.anatomy)[piece.layer - 1].parameters())
    elif piece.kind == "embed":
        embedding = causal_lm_of(model.backbone).get_input_embeddings()  # type: ignore[operator]
        found = [*embedding.parameters(), *frame_parameters(model)]
    else:
        found = _of_depth(model, piece.layer or FULL)
    return list({id(parameter): parameter for parameter in found}.values())


def frame_parameters(model: MultiExitModel) -> list[nn.Parameter]:
    """What the decoder runs outside embedding of ids, blocks and final norm."""
    decoder = decoder_of(model.backbone, model.anatomy)
    norm = submodule(decoder, model.anatomy.norm)
    embedding = causal_lm_of(model.backbone).get_input_embeddings()  # type: ignore[operator]
    elsewhere = [embedding, norm, blocks_of(model.backbone, model.anatomy)]
    known = {id(parameter) for module in elsewhere for parameter in module.parameters()}
    return [parameter for parameter in decoder.parameters() if id(parameter) not in known]


def _of_depth(model: MultiExitModel, depth: int) -> list[nn.Parameter]:
    shared_norm, shared = model.shared_tail()
    tail = [tensor for tensor in (shared.weight, shared.bias) if isinstance(tensor, nn.Parameter)]
    if depth == FULL:
        return [*shared_norm.parameters(), *tail]
    head = model.head(depth)
    norm = shared_norm.parameters() if head.norm is None else ()
    return [*head.parameters(), *norm, *(tail if head.output is None else ())]
