# SPDX-License-Identifier: Apache-2.0
"""What a detector learns to read in recorded scenes: sentences that one frame answers, and plain noun phrases.

A detector sees no time. Of "the red ball that stopped first" it is taught what any detector makes of it, the red balls.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

from virst_engine.data.clips import RecordedScene, Sentence, visible_ids
from virst_engine.sim.expressions import Expression
from virst_engine.sim.grammar import HEADS, PLURAL_HEADS, PLURALS, TRAIN_PREFIXES, finish
from virst_engine.sim.queries import TEMPORAL_KINDS
from virst_engine.sim.spec import COLOURS, SHAPES
from virst_engine.train.config import NOUN_PHRASE

COLOUR_NAMES, SHAPE_NAMES = tuple(COLOURS), tuple(SHAPES)
TIMELESS_KINDS = ("attribute", "superlative", "reasoning", "plural", "relation")
TIME_KINDS = ("motion", *TEMPORAL_KINDS)
MOVING_PLURALS = ("all_moving", "all_still")
ANYTHING = (*HEADS, *PLURAL_HEADS, "something")
SHAPE_OF_NOUN = {**{shape: shape for shape in SHAPES}, **{many: one for one, many in PLURALS.items()}}
ABSENT_PHRASES = 0.4  # share of the noun phrases that name nothing in the picture
STRANGE_NOUNS = 0.25  # of those: with a noun that no sentence knows, so that a banana is not a can
BARE = 0.3  # share of noun phrases without article


@dataclass(frozen=True)
class NounPhrase:
    """A `Sentence` of a colour and a shape, either of them or both; its targets are all objects that it fits."""

    text: str
    kind: str  # NOUN_PHRASE, or "absent" when it fits nothing
    target_ids: tuple[int, ...]
    landmark_ids: tuple[int, ...] = ()
    answer: str = ""

    @property
    def mirrored_text(self) -> str:
        return self.text


class PhraseScene:
    """A recorded scene whose sentences a detector can learn.

    Every other time they are plain noun phrases, which cost nothing to make; else most are the grammar's. Of the kind
    NOUN_PHRASE they are all noun phrases.
    """

    def __init__(self, scene: RecordedScene) -> None:
        self._scene = scene
        self.colours, self.shapes = scene.colours, scene.shapes

    @property
    def frames_rgb_u8(self) -> UInt8[np.ndarray, "frames size size 3"]:
        return self._scene.frames_rgb_u8

    @property
    def instance_masks(self) -> UInt8[np.ndarray, "frames size size"]:
        return self._scene.instance_masks

    def sentences(
        self,
        query_frame: int,
        count: int,
        rng: np.random.Generator,
        *,
        kinds: tuple[str, ...] = (),
        absent_share: float = 0.0,
    ) -> Sequence[Sentence]:
        has_sentences = kinds != (NOUN_PHRASE,) and rng.random() < 0.5
        of_grammar = (count + 1) * 3 // 4 if has_sentences else 0
        said: Sequence[Sentence] = ()
        if of_grammar:
            said = self._scene.sentences(query_frame, of_grammar, rng, kinds=kinds, absent_share=absent_share)
        seen = visible_ids(np.asarray(self.instance_masks[query_frame]))
        phrases = [self._phrase(seen, rng) for _ in range(count - len(said))]
        return [*(self._timeless(sentence, seen) for sentence in said), *phrases]

    def _timeless(self, sentence: Sentence, seen: Sequence[int]) -> Sentence:
        """The sentence as one frame has to understand it."""
        if not isinstance(sentence, Expression):
            return sentence
        is_of_time = sentence.topic in TIME_KINDS or sentence.template_id.partition("/")[0] in MOVING_PLURALS
        if not is_of_time:
            return sentence
        targets = self._that_are(*noun_of(sentence.text), seen)
        return replace(sentence, kind=sentence.topic if targets else "absent", target_ids=targets)

    def _that_are(self, colour: str, shape: str, seen: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            i
            for i in seen
            if colour in ("", COLOUR_NAMES[self.colours[i] - 1]) and shape in ("", SHAPE_NAMES[self.shapes[i] - 1])
        )

    def _phrase(self, seen: Sequence[int], rng: np.random.Generator) -> NounPhrase:
        has_colour, has_shape = ((True, True), (True, True), (True, False), (False, True))[int(rng.integers(4))]
        wants_absent = rng.random() < ABSENT_PHRASES
        colour, shape = _pick(COLOUR_NAMES, rng), _pick(SHAPE_NAMES, rng)
        if seen:  # one word fits, so that neither alone decides
            model = seen[int(rng.integers(len(seen)))]
            keeps = rng.integers(2) if wants_absent else 2
            colour = COLOUR_NAMES[self.colours[model] - 1] if keeps != 1 else colour
            shape = SHAPE_NAMES[self.shapes[model] - 1] if keeps != 0 else shape
        colour, shape = colour if has_colour else "", shape if has_shape else ""
        targets = self._that_are(colour, shape, seen)
        is_plural = len(targets) > 1 or rng.random() < 0.1
        heads = PLURAL_HEADS if is_plural else HEADS
        noun = (PLURALS[shape] if is_plural else shape) if shape else _pick(heads, rng)
        if wants_absent and rng.random() < STRANGE_NOUNS:
            targets, noun = (), strange_word(rng)
        bare = rng.random() < BARE
        article = "" if bare else _pick(("the", "all", "all the") if is_plural else ("the", "a", "the"), rng)
        prefix = "" if bare or rng.random() < 0.8 else _pick(TRAIN_PREFIXES, rng)
        text = finish(f"{prefix} {article} {colour} {noun}")
        return NounPhrase(text, NOUN_PHRASE if targets else "absent", targets)


def noun_of(sentence: str) -> tuple[str, str]:
    """(colour, shape) of the first noun of a sentence of the grammar; empty where it says none."""
    before = ""
    for word in re.findall(r"[a-z]+", sentence.lower()):
        if word in SHAPE_OF_NOUN or word in ANYTHING:
            return before if before in COLOURS else "", SHAPE_OF_NOUN.get(word, "")
        before = word
    return "", ""


def strange_word(rng: np.random.Generator) -> str:
    """A word that no sentence knows, but that could be one."""
    syllables = (_pick(tuple("bcdfghklmnprstvz"), rng) + _pick(tuple("aeiou"), rng) for _ in range(2))
    return "".join(syllables) + _pick(("", "n", "r", "s", "t", "ng"), rng)


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
