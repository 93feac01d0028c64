"""``eetrain export``: a run becomes a Hugging Face folder."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

from eetrain.checkpoints.export import export_run


def export(
    run: str,
    out: str | None = None,
    checkpoint: str = "last",
    policy: str | None = None,
    keep_adapter: bool = False,
    results: str | None = None,
    json: bool = False,
) -> int:
    """Write a run's model as a folder that AutoModelForCausalLM and MultiExitModel open, and verify it.

    Args:
        run: folder of the run, or one of its .ckpt files or folders.
        out: folder to write; new, empty, or an older export, which is replaced. By default the run's name followed
            by -export.
        checkpoint: which of the run's checkpoints, by name.
        policy: exit policy that generate uses by default, such as threshold:0.9; if left out, the one that the
            objective trained for, if any.
        keep_adapter: write a LoRA adapter and refer to its base model instead of merging it.
        results: results.json of eetrain evaluate, for the model card.
        json: print one JSON object.
    """
    folder = export_run(
        run,
        out or _beside(run),
        checkpoint=checkpoint,
        exit_policy=policy,
        keep_adapter=keep_adapter,
        results=results,
    )
    files = sorted(path.name for path in folder.iterdir())
    if json:
        sys.stdout.write(dumps({"folder": str(folder), "files": files, "verified": True}) + "\n")
    else:
        sys.stdout.write(f"wrote {folder}: {', '.join(files)}\nverified: every exit gives the run's logits\n")
    return 0


def _beside(run: str) -> str:
    path = Path(run)
    return str(path.with_name(f"{path.stem if path.suffix == '.ckpt' else path.name}-export"))
