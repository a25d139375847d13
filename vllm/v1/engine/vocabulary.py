"""What grammars must know of a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.engine.detokenizer import TokenTable
from vllm.v1.engine.tokenizer import load_tokenizer
from vllm.v1.structured_output.spec import Vocabulary

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def load_vocabulary(config: VllmConfig, tokenizer: Any | None = None) -> Vocabulary:
    """The vocabulary of a configuration's model.

    Args:
        tokenizer: the model's; None reads it.

    Raises:
        ValueError, FileNotFoundError: there is no tokenizer, or not one with a byte-level decoder.
    """
    hf_config = config.model_config.hf_config
    table = TokenTable(load_tokenizer(config) if tokenizer is None else tokenizer)
    size = hf_config.text.vocab_size
    tokens = [b"" if token_id in table.special_ids else table.bytes_of(token_id) for token_id in range(size)]
    return Vocabulary(tokens, sorted(token_id for token_id in hf_config.eos_token_ids if token_id < size))
