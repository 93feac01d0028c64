"""A byte-level BPE tokenizer, trained in a moment: any text survives the way to ids and back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def byte_tokenizer(
    size: int = 259, texts: Sequence[str] = (), special: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Ids 0, 1, 2 are padding, begin and end, then come the 256 bytes, then merges learned from ``texts``.

    Args:
        size: of the vocabulary, at most; 259 is bytes only.
        texts: to learn merges from.
        special: which of the special tokens the tokenizer knows by role; all of :data:`SPECIAL` by default.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(SPECIAL if special is None else special))
