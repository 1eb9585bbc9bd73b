# SPDX-License-Identifier: Apache-2.0
"""Sentences as the language model of `virst-7b` reads them: Qwen2's chat around a clip, and an answer with [ST] tokens.

The answer to a goal is not generated: it is put there whole, and only its [ST] tokens ("[SEG]" in the vocabulary) are
read. What follows the last of them is left out, since nothing before it can see it. The answer to a question is the
model's own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from virst_engine.errors import BadGoal, WeightsError
from virst_engine.model.virst_7b_config import SEG_TOKEN

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_TOKENS = ("<|endoftext|>", "<|im_end|>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
LONGEST_GOAL_TOKENS = 200
# How Qwen2 splits text before byte pairs are merged.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REMEDY = (
    "convert the weights again with the tokenizer files of OpenGVLab/VideoChat-Flash-Qwen2-7B_res448 in the folder "
    "that --base names"
)


@dataclass(frozen=True)
class ChatRow:
    """One sentence around a clip: tokens before the visual ones, and after; `st` are places in `after`, or none."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    st: tuple[int, ...]


class ChatTokenizer:
    """Qwen2's tokenizer with the token [SEG] behind its own, read from a folder without running anything in it."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """`vocabulary`: rows of the model's embeddings; [SEG] has to be the last. Raises WeightsError."""
        self._tokenizer = _read(folder)
        tokens = [AddedToken(token, special=True, normalized=False) for token in (*CHAT_TOKENS, SEG_TOKEN)]
        self._tokenizer.add_special_tokens(tokens)
        self._seg = self._tokenizer.token_to_id(SEG_TOKEN)
        if self._seg != vocabulary - 1:
            raise WeightsError(
                f"the tokenizer in {folder} is of another model: {SEG_TOKEN} would be its token {self._seg}, and is "
                f"{vocabulary - 1} in the weights; {REMEDY}"
            )
        # What is not text: the marks of a turn, and [SEG]. An answer in words has none of them.
        self.marks = tuple(self._number(token) for token in (*CHAT_TOKENS, SEG_TOKEN))
        self.ends = tuple(self._number(token) for token in END_TOKENS)

    def row(self, sentence: str, st_tokens: int) -> ChatRow:
        """The tokens of a user's goal. Raises BadGoal if it is empty, too long or has special tokens."""
        sentence = self._checked(sentence.lower())
        request = "Please respond with segmentation mask in the Target Image."
        question = (
            f"{sentence} {request}"
            if sentence.endswith("?")
            else f"What is {sentence} in the Reference image? {request}"
        )
        answer = "Sure, " + ", ".join(f"({i}) {SEG_TOKEN}" for i in range(st_tokens))
        after = self._encode(f"\n{question}{ASSISTANT}{answer}")
        st = tuple(place for place, token in enumerate(after) if token == self._seg)
        return ChatRow(tuple(self._encode(f"{SYSTEM}Reference image: ")), tuple(after), st)

    def question(self, sentence: str) -> ChatRow:
        """The tokens of a user's question, as the base model was asked about videos. Raises BadGoal as `row` does."""
        after = self._encode(f"\n{self._checked(sentence)}{ASSISTANT}")
        return ChatRow(tuple(self._encode(SYSTEM)), tuple(after), ())

    def words(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def _checked(self, sentence: str) -> str:
        """The sentence with single spaces."""
        sentence = " ".join(sentence.split())
        own = self._encode(sentence)
        if not own:
            raise BadGoal("the goal has no word; say what to look for, for example 'the red cup'")
        if len(own) > LONGEST_GOAL_TOKENS:
            raise BadGoal(
                f"this model reads goals and questions of at most {LONGEST_GOAL_TOKENS} tokens, got {len(own)}: say it "
                "shorter"
            )
        # Lower-casing keeps [SEG] out of a goal, but not the marks of a turn.
        if set(self.marks) & set(own) or SEG_TOKEN.lower() in sentence.lower():
            raise BadGoal(f"a goal may not hold the marks {', '.join((*CHAT_TOKENS, SEG_TOKEN))}: leave them out")
        return sentence

    def _number(self, mark: str) -> int:
        number: int | None = self._tokenizer.token_to_id(mark)
        assert number is not None, f"{mark} was added"
        return number

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _read(folder: Path) -> Tokenizer:
    whole, vocabulary, merges = (folder / name for name in TOKENIZER_FILES)
    try:
        if whole.is_file():
            return Tokenizer.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            return _byte_pairs(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise WeightsError(f"the tokenizer in {folder} cannot be read ({error}); {REMEDY}") from error
    raise WeightsError(f"{folder} holds neither {whole.name} nor {vocabulary.name} with {merges.name}; {REMEDY}")


def _byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    """Qwen2's tokenizer of its two older files, which have no special tokens."""
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines if line and line[:8] != "#version")]
    tokenizer = Tokenizer(BPE(vocab=words, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
