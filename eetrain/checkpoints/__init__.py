"""Multi-exit checkpoints: folders that plain transformers opens as well."""

from eetrain.checkpoints.folder import load_checkpoint, open_model, save_checkpoint

__all__ = ["load_checkpoint", "open_model", "save_checkpoint"]
