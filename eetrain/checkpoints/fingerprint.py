"""A fingerprint of a backbone's weight files, so that exits are not put on weights they were not trained with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eetrain.errors import CheckpointError

_SAMPLE = 64


def weight_files(folder: Path) -> list[Path]:
    """The backbone's (or adapter's) safetensors files in a checkpoint folder."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")])


def fingerprint(folder: str | Path) -> str:
    """Hash of every tensor's name, shape and first numbers; cheap even for large models, independent of sharding.

    Raises:
        CheckpointError: no weight files, or one that is cut short.
    """
    files = weight_files(Path(folder))
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors.", hint="Copy or export the checkpoint again.")
    parts: dict[str, bytes] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no dict
                    parts[name] = _sample(opened.get_slice(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} cannot be read: {error}.", hint="It is cut short or damaged; copy or export it again."
            ) from error
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + b"\0" + parts[name])
    return digest.hexdigest()


def _sample(tensor_slice: object) -> bytes:
    shape = tensor_slice.get_shape()  # type: ignore[attr-defined]
    head = tensor_slice[tuple(slice(0, 1 if dim < len(shape) - 1 else _SAMPLE) for dim in range(len(shape)))]  # type: ignore[index]
    values = head.to(torch.float64).flatten()
    numbers: bytes = values.numpy().tobytes()
    return f"{shape}".encode() + numbers
