"""Structured output: grammars and JSON schemas as masks over the next token."""

from realm_jax.structured.grammar import GrammarState, GrammarTokenizer

__all__ = ["GrammarState", "GrammarTokenizer"]
