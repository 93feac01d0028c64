"""The settings of a training run that are not the Trainer's: plain dataclasses, as they stand in YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eetrain.errors import ConfigError
from eetrain.exits.config import ExitConfig

Tuning = Literal["full", "frozen", "lora"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class BackboneConfig:
    """Where the backbone comes from: exactly one of ``path`` and ``config``.

    Args:
        path: folder or hub id of a pretrained causal LM.
        config: ``model_type`` and the fields of its transformers configuration, to train from scratch.
        dtype: of the parameters: float32, bfloat16, float16, float64, or auto for the stored one.
        load: ``exits`` reads the blocks up to the deepest exit only; needs a frozen backbone and an objective
            without the full depth.
        trust_remote_code: run code that comes with the checkpoint.
        attn_implementation: sdpa, eager, flash_attention_2; the model's default if left out.

    Raises:
        ConfigError: both or neither of ``path`` and ``config``, or a key that goes with ``path`` only.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = "float32"
    load: Literal["full", "exits"] = "full"
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError(
                f"model.backbone: {'neither path nor config is' if self.path is None else 'path and config are both'} "
                "set; exactly one counts.",
                hint="Set model.backbone.path to a folder or hub id, or model.backbone.config to train from scratch.",
            )
        if self.config is not None and self.load == "exits":
            raise ConfigError(
                "model.backbone.load=exits leaves out blocks of a checkpoint, but model.backbone.config starts from "
                "scratch.",
                hint="Set num_hidden_layers in model.backbone.config instead.",
            )


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters of the backbone (LoRA, arXiv 2106.09685); used with ``tuning: lora``.

    Args:
        rank: of the adapters, at least 1.
        alpha: adapters count ``alpha / rank``.
        dropout: on their inputs, in [0, 1).
        target_modules: names of the linear maps to adapt, or ``all-linear``.

    Raises:
        ConfigError: a number out of its range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.lora.rank={self.rank}.", hint="Set it to 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout={self.dropout}.", hint="Set it to 0 or more and below 1.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the course of its learning rate.

    Args:
        lr: peak learning rate.
        weight_decay: of matrices; norms and biases (1-d parameters) do not decay.
        betas: of the running averages.
        eps: in the denominator.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_fraction: the same as a share of all steps; give one of the two.
        schedule: after the warm-up.
        min_lr_ratio: where linear and cosine end, relative to ``lr``.
        schedule_steps: steps until the schedule has ended; the whole run if left out.
        exits_lr_multiplier: learning rate of the exits relative to that of the backbone.
        gates_lr_multiplier: learning rate of the gates relative to that of the backbone.

    Raises:
        ConfigError: a number out of its range, or both forms of the warm-up.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    schedule: Schedule = "constant"
    min_lr_ratio: float = 0.1
    schedule_steps: int | None = None
    exits_lr_multiplier: float = 1.0
    gates_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "lr": self.lr > 0,
            "weight_decay": self.weight_decay >= 0,
            "warmup_steps": self.warmup_steps >= 0,
            "warmup_fraction": 0 <= self.warmup_fraction <= 1,
            "min_lr_ratio": 0 <= self.min_lr_ratio <= 1,
            "schedule_steps": self.schedule_steps is None or self.schedule_steps > 0,
            "exits_lr_multiplier": self.exits_lr_multiplier > 0,
            "gates_lr_multiplier": self.gates_lr_multiplier > 0,
        }
        for name, good in checks.items():
            if not good:
                raise ConfigError(
                    f"model.optimizer.{name}={getattr(self, name)} is out of its range.",
                    hint="Rates and steps are positive, ratios and fractions lie in [0, 1].",
                )
        if self.warmup_steps and self.warmup_fraction:
            raise ConfigError(
                f"model.optimizer has warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction}.",
                hint="Keep one of them.",
            )


@dataclass(frozen=True)
class ModelSettings:
    """All that is needed to build the model of a run again; a checkpoint holds it as plain data.

    Args:
        backbone: where the backbone comes from.
        exits: the exits.
        tuning: what of the backbone is trained: all, nothing, or adapters.
        lora: the adapters.
    """

    backbone: BackboneConfig
    exits: ExitConfig
    tuning: Tuning = "full"
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        if self.tuning not in ("full", "frozen", "lora"):
            raise ConfigError(f"model.tuning={self.tuning!r} is not known.", hint="One of: full, frozen, lora.")
        if self.backbone.load == "exits" and self.tuning != "frozen":
            raise ConfigError(
                f"model.backbone.load=exits leaves out the last blocks, but model.tuning={self.tuning} trains the "
                "backbone.",
                hint="Set model.tuning=frozen, or model.backbone.load=full.",
            )

    @property
    def omits_backbone(self) -> bool:
        """Whether checkpoints leave out the backbone's frozen weights because they can be read again."""
        return self.tuning != "full" and self.backbone.path is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSettings:
        """Read what :meth:`to_dict` wrote, as found under ``hyper_parameters`` of a checkpoint."""
        return cls(
            BackboneConfig(**data["backbone"]),
            ExitConfig.from_dict(data["exits"]),
            data["tuning"],
            LoraSettings(**data["lora"]),
        )
