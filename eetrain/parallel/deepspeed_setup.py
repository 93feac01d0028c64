"""DeepSpeed as we use it: quiet, without just-in-time builds, with torch's own AdamW, on a CPU as well."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import torch

from eetrain.errors import ConfigError
from eetrain.parallel.engine_state import prepare_state

EnginePrecision = Literal["float32", "bfloat16"]


def load_deepspeed() -> ModuleType:
    """Import DeepSpeed for the device at hand.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "This strategy needs deepspeed, which is not installed.", hint="pip install 'eetrain[deepspeed]'"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
        import deepspeed
        import deepspeed.ops

        # Its first collective on a CPU would compile this for half a minute; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    module: ModuleType = deepspeed
    return module


def join_processes(local_rank: int, device: torch.device) -> None:
    """Let DeepSpeed use the process group that is there already, on this process's device."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = load_deepspeed()
    with quiet():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)


def engine_config(
    *, zero_stage: int, precision: EnginePrecision, clip_norm: float | None, accumulate: int = 1, **zero: Any
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        zero_stage: 0 to 3.
        precision: of parameters and activations; with ``bfloat16`` the optimizer keeps float32 masters.
        clip_norm: largest norm of all gradients; ``None`` leaves them.
        accumulate: micro-batches of a step.
        **zero: more keys of ``zero_optimization``.
    """
    config: dict[str, Any] = {
        # The engine counts with it and never looks at the batches.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip_norm or 0.0,
        "steps_per_print": None,
        "zero_optimization": {"stage": zero_stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bfloat16"},
    }
    return config


def start_engine(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], **extra: Any
) -> Any:
    """DeepSpeed's engine around ``module``.

    Args:
        module: the model, or a ``PipelineModule``.
        optimizer: over its trained parameters; ``None`` where nothing is trained.
        config: from :func:`engine_config`.
        **extra: of ``deepspeed.initialize``.
    """
    deepspeed = load_deepspeed()
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False, **extra
        )
    if optimizer is not None:
        prepare_state(engine)
    return engine


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed from printing to stdout, which belongs to the command line's own output."""
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("EETRAIN_DEBUG") == "1" else _Nowhere()):
        yield


class _Nowhere:
    def write(self, text: str) -> int:
        """Drop the text."""
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""
