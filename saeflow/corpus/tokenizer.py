"""What a tokenizer makes of texts, as the recipe's `[tokens]` asks."""

from __future__ import annotations

from typing import Any

from saeflow.recipe.settings import TokensConfig
from saeflow.runtime.errors import UserError


def ids_of(tokenizer: Any, texts: list[str], config: TokensConfig) -> list[list[int]]:
    """The vocabulary ids of texts. Names of special tokens in them are text like any other, unless the recipe says."""
    literal = {} if config.parse_special else {"split_special_tokens": True}
    return list(tokenizer(texts, add_special_tokens=False, verbose=False, **literal)["input_ids"])


def bos_ids(tokenizer: Any, config: TokensConfig) -> list[int]:
    """The ids put before each document."""
    habit = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    wanted = habit if config.prepend_bos is None else config.prepend_bos
    if wanted and tokenizer.bos_token_id is None:
        raise UserError("tokens.prepend_bos is true, but the tokenizer has no BOS token. Set it to false.")
    return [tokenizer.bos_token_id] if wanted else []
