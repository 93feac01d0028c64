"""A small real tokenizer: byte-level BPE trained on a few sentences."""

import pytest
from transformers import PreTrainedTokenizerFast

from eetrain.testing.byte_level import byte_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A restaurant near the river serves cheap Italian food.",
    "name[The Eagle], food[Japanese], area[riverside]\n=> ",
    "Close to the city centre, The Eagle serves delicious food.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(special: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    return byte_tokenizer(380, SENTENCES * 4, special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    built = build_tokenizer()
    built.chat_template = CHAT_TEMPLATE
    return built


@pytest.fixture(scope="session")
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Neither bos nor eos nor pad."""
    return build_tokenizer({})
