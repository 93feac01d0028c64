"""What each piece of a pipeline computes and holds, counted from the model's own modules; the meta device is fine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from eetrain.backbones import blocks_of, decoder_of, final_norm
from eetrain.exits import MultiExitModel
from eetrain.planning.matrices import Matrix, attention_products, matrices_of
from eetrain.planning.pieces import Piece, pipeline_pieces


@dataclass(frozen=True)
class Weight:
    """One parameter of a piece; equal names in two pieces are one parameter, of which every stage has a copy.

    Attributes:
        name: in the model's state dict, where it stands first.
        size: how many numbers.
        trained: whether it gets a gradient.
    """

    name: str
    size: int
    trained: bool


@dataclass(frozen=True)
class PieceCost:
    """One piece, for one row of tokens.

    Attributes:
        piece: which one.
        forward_flops: a multiply-add is two.
        backward_flops: without the forward pass that activation checkpointing repeats.
        weights: its parameters; those it shares with other pieces, too.
        output_bytes: of the hidden state it hands on, in the backbone's type; 0 for the tail.
    """

    piece: Piece
    forward_flops: int
    backward_flops: int
    weights: tuple[Weight, ...]
    output_bytes: int

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    def step_flops(self, *, checkpointing: bool = False) -> int:
        """What stages are balanced by: forward, backward, and what activation checkpointing runs again."""
        again = checkpointing and self.piece.kind == "block" and self.backward_flops > 0
        return self.flops + again * self.forward_flops

    @property
    def parameters(self) -> int:
        """Numbers in its weights, shared ones included."""
        return sum(weight.size for weight in self.weights)

    @property
    def trained_parameters(self) -> int:
        """Numbers in its weights that get a gradient."""
        return sum(weight.size for weight in self.weights if weight.trained)


def piece_costs(
    model: MultiExitModel, length: int, *, full_depth: bool = True, distils: bool = False
) -> tuple[PieceCost, ...]:
    """Costs of all pieces in their order, for one row of ``length`` tokens.

    With ``A`` the multiply-adds of a piece (see :mod:`eetrain.planning.matrices`), forward is ``2 A``. Backward is
    ``2 A`` for the gradients of its inputs, if anything before it or in it is trained, and ``2 A`` over the matrices
    that are trained themselves; attention's own products have no weights and count ``2 * 2 A``, without the scores that
    a flash kernel computes again. So a frozen backbone has no backward, and one with adapters about half of it. In the
    first block that trains anything the inputs of all its matrices are counted, those in front of the first trained
    one included. Norms, activations, rotary tables, softmax and the optimizer are not counted, nor are gates, whose
    inputs are four numbers a token.

    Args:
        model: the backbone with its exits; ``requires_grad`` says what is trained.
        length: tokens of the row, with a label each.
        full_depth: whether the full depth has a loss, too. If not, blocks behind the deepest exit cost nothing.
        distils: whether exits learn from the full depth: each computes the full depth's logits as well.

    Raises:
        UnsupportedModelError: a mixture of experts that does not say how many of them a token runs.
    """
    counter = _Counter(model, length)
    deepest = model.num_blocks if full_depth else max(model.exit_layers, default=0)
    trained_before = False
    costs = []
    for piece in pipeline_pieces(model.num_blocks, model.exit_layers):
        matrices, products = counter.work(piece)
        weights = counter.weights(piece)
        runs = full_depth if piece.kind == "tail" else piece.layer <= deepest
        moves = trained_before or any(weight.trained for weight in weights if not weight.name.startswith("gates."))
        forward = 2 * sum(matrix.multiply_adds for matrix in matrices) + 2 * products
        backward = 2 * sum(matrix.multiply_adds for matrix in matrices if matrix.trained)
        if moves:
            backward += forward + 2 * products
        output_bytes = 0 if piece.kind == "tail" else counter.hidden_bytes
        if distils and piece.kind == "exit":
            forward += counter.teacher_flops
        costs.append(PieceCost(piece, runs * forward, runs * backward, weights, output_bytes))
        if piece.kind in ("embed", "block"):
            trained_before |= any(weight.trained for weight in weights)
    return tuple(costs)


class _Counter:
    """Where the pieces of one model are."""

    def __init__(self, model: MultiExitModel, length: int) -> None:
        self.model, self.length = model, length
        self.config = model.causal_lm.config.get_text_config(decoder=True)
        self.blocks = blocks_of(model.backbone, model.anatomy)
        self.norm = final_norm(model.backbone, model.anatomy)
        self.head: nn.Module = model.causal_lm.get_output_embeddings()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        first = next(model.backbone.parameters())
        self.hidden_bytes = length * model.anatomy.hidden_size * first.element_size()

    @property
    def teacher_flops(self) -> int:
        """Logits of the full depth."""
        return 2 * sum(matrix.multiply_adds for matrix in self._matrices(self.head))

    def work(self, piece: Piece) -> tuple[list[Matrix], int]:
        """Products with matrices, and multiply-adds of attention's own."""
        attention = attention_products(self.length, self.config)
        if piece.kind == "embed":
            return [], 0
        if piece.kind == "block":
            return self._matrices(self.blocks[piece.layer - 1]), attention
        if piece.kind == "tail":
            return self._matrices(self.head), 0
        head = self.model.head(piece.layer)
        inner = [] if head.inner is None else self._matrices(head.inner)
        output = self._matrices(self.head if head.output is None else head.output)
        return inner + output, attention if head.attends else 0

    def weights(self, piece: Piece) -> tuple[Weight, ...]:
        """Every parameter once, in the order of the modules."""
        found = {id(parameter): parameter for module in self._modules(piece) for parameter in module.parameters()}
        if piece.kind == "embed":
            others = (self.blocks, self.norm)
            elsewhere = {id(parameter) for module in others for parameter in module.parameters()}
            found = {key: parameter for key, parameter in found.items() if key not in elsewhere}
        return tuple(Weight(self.names[key], p.numel(), p.requires_grad) for key, p in found.items())

    def _modules(self, piece: Piece) -> Iterable[nn.Module]:
        if piece.kind == "embed":
            return [decoder_of(self.model.backbone, self.model.anatomy)]
        if piece.kind == "block":
            return [self.blocks[piece.layer - 1]]
        if piece.kind == "tail":
            return [self.norm, self.head]
        head = self.model.head(piece.layer)
        shared = [self.norm] if head.norm is None else []
        shared += [self.head] if head.output is None else []
        gates = [self.model.gate(piece.layer)] if str(piece.layer) in self.model.gates else []
        return [head, *shared, *gates]

    def _matrices(self, module: nn.Module) -> list[Matrix]:
        return list(matrices_of(module, self.length, self.config))
