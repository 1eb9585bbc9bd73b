# SPDX-License-Identifier: Apache-2.0
"""The word tokenizer of `tabletop-tiny`: a closed vocabulary, one token a word."""

import re

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from virst_engine.errors import BadGoal

PAD, UNKNOWN, ANSWER, END = range(4)  # special tokens; words follow
SPECIAL_TOKENS = 4
LONGEST_SHOWN = 40  # characters of an unknown word in a message


class WordTokenizer:
    """Sentences -> token rows. `words` in the order of their embeddings, without special tokens."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self._index = {word: i + SPECIAL_TOKENS for i, word in enumerate(words)}

    @staticmethod
    def split(sentence: str) -> list[str]:
        """Lower-case words; punctuation separates."""
        return re.findall(r"[^\W_]+", sentence.lower())

    def encode(self, sentence: str) -> list[int]:
        """Tokens of a sentence; unknown words are UNKNOWN."""
        return [self._index.get(word, UNKNOWN) for word in self.split(sentence)]

    def encode_goal(self, sentence: str, longest: int) -> list[int]:
        """Tokens of a user's goal. Raises BadGoal when words are unknown or there are more than `longest`."""
        words = self.split(sentence)
        unknown = [word for word in words if word not in self._index]
        if unknown or not words:
            named = ", ".join(repr(_shorten(word)) for word in unknown[:5])
            reason = f"this model does not know {named}" if unknown else "the goal has no word at all"
            raise BadGoal(
                f"{reason}; the model speaks a small English of {len(self.words)} words about "
                "tabletop objects, for example 'the red ball' (`virst words` lists them all)"
            )
        if len(words) > longest:
            raise BadGoal(f"this model reads goals of at most {longest} words, got {len(words)}: say it shorter")
        return [self._index[word] for word in words]

    def decode(self, tokens: list[int]) -> str:
        """Words of a token row, up to END."""
        out = []
        for token in tokens:
            if token == END:
                break
            if token >= SPECIAL_TOKENS:
                out.append(self.words[token - SPECIAL_TOKENS])
        return " ".join(out)


def _shorten(word: str) -> str:
    """A word for a message: whoever sends a goal may send a word of any length."""
    return word if len(word) <= LONGEST_SHOWN else f"{word[: LONGEST_SHOWN - 1]}…"


def pad_rows(rows: list[list[int]], *, left: bool = False) -> tuple[Int[Tensor, "b length"], Bool[Tensor, "b length"]]:
    """Token rows as one tensor and its validity mask."""
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), PAD)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, part] = torch.tensor(row, dtype=torch.long)
        valid[i, part] = True
    return tokens, valid
