"""From text files and hub data sets to batches: sources, templates, packing, resumable sampling."""

from eetrain.data.chat import Chat
from eetrain.data.datamodule import CausalLMDataModule
from eetrain.data.sources import Row, read_rows
from eetrain.data.templates import PromptResponse, Template, Text

__all__ = ["CausalLMDataModule", "Chat", "PromptResponse", "Row", "Template", "Text", "read_rows"]
