# SPDX-License-Identifier: Apache-2.0
"""Sentences about a recording whose truth is known, in the frames a reasoner sees and as the camera sees them.

A meaning is a noun and a property with three values per object (facts.py). A singular sentence is used when exactly one
object answers to it and none is in doubt; a plural one when two or more do; an absent one when no object does.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from virst_engine.errors import SceneError
from virst_engine.sim.facts import NO, UNCLEAR, YES, Facts, Tri, best_of, both, negation, the_only
from virst_engine.sim.grammar import (
    HEADS,
    HELD_OUT_PREFIXES,
    KINDS_FULL,
    KINDS_PLAIN,
    NUMBERS,
    PHRASINGS,
    PLURAL_HEADS,
    PLURALS,
    SIZE_WORDS,
    TRAIN_PREFIXES,
    VOCABULARY,
    finish,
)
from virst_engine.sim.recording import Recording
from virst_engine.sim.spec import COLOURS, SHAPES, Family

__all__ = ["KINDS_FULL", "KINDS_PLAIN", "VOCABULARY", "Expression", "expressions", "find_meaning", "sample_expressions"]

SPLITS = ("train", "held-out", "all")
WINDOW_FRAMES = 22  # 2.1 s at 10 Hz: eight frames 0.3 s apart
ABSENT_SHARE = 0.22
PREFIX_SHARE = 0.3
OTHER_SIDE = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
GENERIC = "generic"  # stands for object, thing or one until a sentence is made

# a few meanings of a kind are easy to come by; these are drawn less often than the others of their kind
RARELY = {"all": 0.7, "moved_once": 0.7, "cannot_roll": 0.5, "still": 0.5, "colour_shape~far": 0.25}


@dataclass(frozen=True)
class Expression:
    """A sentence and what it means.

    `kind` of an absent one is "absent" (`topic` keeps the kind it imitates). `template_id` names the phrasing, such as
    "left_of/2" or, held out, "left_of/h0". `answer` describes the target in the same vocabulary: "red ball",
    "two boxes", "none". `landmark_ids` is the object that the target is told by ("left of the blue can"), if any.
    """

    text: str
    kind: str
    target_ids: tuple[int, ...]
    template_id: str
    held_out: bool
    answer: str
    topic: str = ""
    landmark_ids: tuple[int, ...] = ()

    @property
    def mirrored_text(self) -> str:
        """The sentence that means the same objects when the images are mirrored: left and right change places."""
        name = self.template_id.partition("/")[0]
        if not OTHER_SIDE.keys() & set(name.split("_")):
            return self.text  # "the ball that left and came back" names no side
        return " ".join(OTHER_SIDE.get(word, word) for word in self.text.split())


@dataclass(frozen=True)
class _Noun:
    one: str
    many: str
    is_it: Tri


@dataclass(frozen=True)
class _Meaning:
    kind: str
    name: str  # of its phrasings, and after a "~" what sets it apart when drawing
    target_ids: tuple[int, ...]
    slots: dict[str, str]
    landmark_ids: tuple[int, ...] = ()

    @property
    def phrasings(self) -> str:
        return self.name.partition("~")[0]


def expressions(
    recording: Recording,
    *,
    query_frame: int,
    rng: np.random.Generator,
    split: str = "train",
    window_frames: int = WINDOW_FRAMES,
) -> list[Expression]:
    """Every meaning that is clear in frames (query_frame - window_frames, query_frame], each in one phrasing.

    Absent ones are included, as many as there are; `sample_expressions` balances. Works without images.

    Args:
        split: "train", "held-out" or "all" phrasings, the latter half and half.

    Raises:
        SceneError: no such frame, or an unknown split.
    """
    facts = Facts(recording, query_frame, window_frames)
    meanings = _Meanings(facts)
    kinds = KINDS_FULL if recording.spec.family == "full" else KINDS_PLAIN
    found = []
    for kind in kinds:
        present, absent = meanings.of(kind)
        found += [_phrase(facts, meaning, rng, split) for meaning in (*present, *absent)]
    return found


def sample_expressions(
    recording: Recording,
    rng: np.random.Generator,
    count: int,
    query_frame: int,
    split: str = "train",
    family: Family | None = None,
    *,
    window_frames: int = WINDOW_FRAMES,
    absent_share: float = ABSENT_SHARE,
    kinds: tuple[str, ...] | None = None,
) -> list[Expression]:
    """`count` sentences, evenly over the kinds that the frames allow, within a kind evenly over its meanings' names.

    No text comes twice unless the frames allow fewer than `count`.

    Args:
        family: which kinds to draw from; the recording's own when None.
        kinds: in place of the family's kinds.
    """
    facts = Facts(recording, query_frame, window_frames)
    meanings = _Meanings(facts)
    kinds = kinds or (KINDS_FULL if (family or recording.spec.family) == "full" else KINDS_PLAIN)
    chosen: list[Expression] = []
    texts: set[str] = set()
    usable = list(kinds)
    misses = 0
    while len(chosen) < count:
        wants_absent = rng.random() < absent_share
        kind = usable[int(rng.integers(len(usable)))]
        pool = meanings.of(kind)[1 if wants_absent else 0]
        misses += 1
        if not pool and misses <= 40 * count:
            continue
        if not pool:
            break
        expression = _phrase(facts, _draw(pool, rng), rng, split)
        if expression.text in texts and misses <= 20 * count:
            continue
        texts.add(expression.text)
        chosen.append(expression)
    if len(chosen) < count and not chosen:
        raise SceneError(
            f"no clear sentence of kinds {', '.join(kinds)} at frame {query_frame} of seed {recording.spec.seed};"
            " choose another frame or other kinds"
        )
    while len(chosen) < count:
        chosen.append(chosen[int(rng.integers(len(chosen)))])
    return chosen


def find_meaning(
    recording: Recording, sentence: str, *, query_frame: int, window_frames: int = WINDOW_FRAMES
) -> Expression | None:
    """What a sentence of the grammar means in these frames; None if it is none, or not clear in them."""
    text = finish(sentence.lower())
    for prefix in sorted((*TRAIN_PREFIXES, *HELD_OUT_PREFIXES), key=len, reverse=True):
        text = text.removeprefix(prefix)
    facts = Facts(recording, query_frame, window_frames)
    meanings = _Meanings(facts)
    for kind in KINDS_FULL:
        present, absent = meanings.of(kind)
        for meaning in (*present, *absent):
            for held_out, templates in (
                (False, PHRASINGS[meaning.phrasings].train),
                (True, PHRASINGS[meaning.phrasings].held_out),
            ):
                for number, template in enumerate(templates):
                    if any(finish(template.format(**slots)) == text for slots in _wordings(meaning.slots)):
                        return _expression(facts, meaning, sentence, number, held_out)
    return None


def _wordings(slots: dict[str, str]) -> Iterator[dict[str, str]]:
    """The slots with every choice of generic nouns and size words."""
    for head, heads in itertools.product(HEADS, PLURAL_HEADS):
        filled = {k: v if v != GENERIC else heads if k == "ts" else head for k, v in slots.items()}
        for size in SIZE_WORDS.get(slots.get("z", ""), ("",)):
            yield {**filled, "z": size}
        if GENERIC not in slots.values():
            return


def _draw(pool: list[_Meaning], rng: np.random.Generator) -> _Meaning:
    names = sorted({meaning.name for meaning in pool})
    weights = np.array([RARELY.get(name, 1.0) for name in names])
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    same = [meaning for meaning in pool if meaning.name == name]
    return same[int(rng.integers(len(same)))]


def _phrase(facts: Facts, meaning: _Meaning, rng: np.random.Generator, split: str) -> Expression:
    phrasings = PHRASINGS[meaning.phrasings]
    if split not in SPLITS:
        raise SceneError(f"unknown split {split!r}; use train, held-out or all")
    held_out = split == "held-out" or (split == "all" and rng.random() < 0.5)
    templates = phrasings.held_out if held_out else phrasings.train
    number = int(rng.integers(len(templates)))
    slots = dict(meaning.slots)
    for slot in ("t", "h"):
        if slots.get(slot) == GENERIC:
            slots[slot] = HEADS[int(rng.integers(len(HEADS)))]
    if slots.get("ts") == GENERIC:
        slots["ts"] = PLURAL_HEADS[int(rng.integers(len(PLURAL_HEADS)))]
    if "z" in slots:
        words = SIZE_WORDS[slots["z"]]
        slots["z"] = words[int(rng.integers(len(words)))]
    text = templates[number].format(**slots)
    if rng.random() < PREFIX_SHARE:
        prefixes = TRAIN_PREFIXES + (HELD_OUT_PREFIXES if held_out else ())
        text = prefixes[int(rng.integers(len(prefixes)))] + text
    return _expression(facts, meaning, finish(text), number, held_out)


def _expression(facts: Facts, meaning: _Meaning, text: str, number: int, held_out: bool) -> Expression:
    return Expression(
        text=text,
        kind=meaning.kind if meaning.target_ids else "absent",
        target_ids=meaning.target_ids,
        template_id=f"{meaning.phrasings}/{'h' if held_out else ''}{number}",
        held_out=held_out,
        answer=describe(facts, meaning.target_ids),
        topic=meaning.kind,
        landmark_ids=meaning.landmark_ids,
    )


def describe(facts: Facts, target_ids: tuple[int, ...]) -> str:
    """The targets in words: "red ball", "two boxes", "three red objects", "none"."""
    if not target_ids:
        return "none"
    things = [facts.objects[k] for k in target_ids]
    if len(things) == 1:
        return f"{things[0].colour} {things[0].shape}"
    colours, shapes = {t.colour for t in things}, {t.shape for t in things}
    noun = PLURALS[things[0].shape] if len(shapes) == 1 else "objects"
    colour = f"{things[0].colour} " if len(colours) == 1 else ""
    return f"{NUMBERS[len(things)]} {colour}{noun}"


class _Meanings:
    """The meanings that are clear in one window, by kind: (present, absent), worked out when asked for."""

    def __init__(self, facts: Facts):
        self.f = facts
        self._by_kind: dict[str, tuple[list[_Meaning], list[_Meaning]]] = {}
        self._landmarks: dict[str, int] = {}  # the one object that answers to a noun
        shown = [o for k, o in enumerate(facts.objects) if facts.ever_shown[k]]
        self.shapes = [s for s in SHAPES if any(o.shape == s for o in shown)]
        self.colours = [c for c in COLOURS if any(o.colour == c for o in shown)]
        self.looks = [
            (c, s) for c in self.colours for s in self.shapes if any(o.colour == c and o.shape == s for o in shown)
        ]
        everything = np.full(facts.n, YES, np.int8)
        self.anything = _Noun(GENERIC, GENERIC, everything)
        self.shape_nouns = [_Noun(s, PLURALS[s], facts.shape_is(s)) for s in self.shapes]
        self.look_nouns = [self._look(c, s) for c, s in self.looks]
        # what fits nothing here but could be said of such a scene
        self.wrong_looks = [self._look(c, s) for c in self.colours for s in self.shapes if (c, s) not in self.looks]

    def _look(self, colour: str, shape: str) -> _Noun:
        is_it = both(self.f.colour_is(colour), self.f.shape_is(shape))
        return _Noun(f"{colour} {shape}", f"{colour} {PLURALS[shape]}", is_it)

    def of(self, kind: str) -> tuple[list[_Meaning], list[_Meaning]]:
        if kind not in self._by_kind:
            present: list[_Meaning] = []
            absent: list[_Meaning] = []
            for name, answers, slots in getattr(self, f"_{kind}")():
                codes = answers.tobytes()  # thousands of arrays of a few numbers: bytes are searched faster
                if UNCLEAR in codes:
                    continue
                ids = tuple(k for k, code in enumerate(codes) if code == YES) if YES in codes else ()
                landmarks = (self._landmarks[slots["a"]],) if "a" in slots else ()
                if not ids:
                    absent.append(_Meaning(kind, name, (), slots, landmarks))
                elif (len(ids) > 1) == (kind == "plural") and slots.get("n") in (None, NUMBERS.get(len(ids))):
                    present.append(_Meaning(kind, name, ids, slots, landmarks))
            self._by_kind[kind] = present, absent
        return self._by_kind[kind]

    # Each of these yields (name of the phrasings, who answers to it, slots); the clear ones are kept by `of`.

    def _attribute(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        for colour in COLOURS:
            for shape in SHAPES:
                name = "colour_shape" if colour in self.colours or shape in self.shapes else "colour_shape~far"
                yield name, both(f.known, both(f.colour_is(colour), f.shape_is(shape))), {"c": colour, "s": shape}
        for shape in SHAPES:
            yield "shape", both(f.known, f.shape_is(shape)), {"s": shape}
        for colour in COLOURS:
            yield "colour", both(f.known, f.colour_is(colour)), {"c": colour, "h": GENERIC}
        for size in ("small", "large"):
            for shape in self.shapes:
                of_shape = both(f.known, f.shape_is(shape))
                if len(set(f.size[of_shape != NO])) < 2:
                    continue  # small and large mean something among one's likes
                yield "size_shape", both(of_shape, f.size_is(size)), {"z": size, "s": shape}
                for colour in self.colours:
                    alike = both(of_shape, f.colour_is(colour))
                    if len(set(f.size[alike != NO])) == 2:
                        yield "size_colour_shape", both(alike, f.size_is(size)), {"z": size, "c": colour, "s": shape}

    def _anchors(self) -> Iterator[tuple[_Noun, int]]:
        for noun in (*self.shape_nouns, *self.look_nouns):
            anchor = the_only(both(self.f.seen_now, noun.is_it))
            if anchor is not None:
                self._landmarks[noun.one] = anchor
                yield noun, anchor

    def _relation(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        pairs = {"left_of": f.left_of, "right_of": f.right_of, "behind": f.behind, "in_front_of": f.in_front_of}
        targets = [self.anything, *self.shape_nouns, *self.look_nouns, *self.wrong_looks]
        for anchor_noun, anchor in self._anchors():
            for target in targets:
                if target.one == anchor_noun.one:
                    continue
                is_target = both(f.seen_now, target.is_it)
                slots = {"t": target.one, "a": anchor_noun.one}
                for name, pair in pairs.items():
                    yield name, both(is_target, pair[:, anchor]), slots
                if np.count_nonzero(is_target == YES) >= 2 and not (is_target == UNCLEAR).any():
                    yield "nearest_to", both(is_target, f.nearest_to(anchor, is_target)), slots

    def _superlative(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        x = f.xy[-1, :, 0]
        for noun in (self.anything, *self.shape_nouns, *[self._of_colour(c) for c in self.colours]):
            among = both(f.seen_now, noun.is_it)
            if np.count_nonzero(among != NO) < 2:
                continue
            some = among != NO
            slots = {"t": noun.one}
            yield "leftmost", both(among, _extreme(-x, some, 0.05)), slots
            yield "rightmost", both(among, _extreme(x, some, 0.05)), slots
            low = (f.lift < 0.02) | ~some
            if low.all():
                yield "nearest", both(among, _extreme(-f._ground_distance, some, 0.05)), slots
                yield "farthest", both(among, _extreme(f._ground_distance, some, 0.05)), slots
                yield "tallest", both(among, best_of(f.height, some, 0.02, 1.3)), slots
            volume = np.array([_bulk(o.shape, o.half_m) for o in f.objects])
            yield "largest", both(among, best_of(volume, some, 0.0, 1.3, second=f.area)), slots
            yield "smallest", both(among, best_of(-volume, some, 0.0, 1.3, second=-f.area)), slots
        for shape in SHAPES:
            if shape not in self.shapes:
                for name in ("leftmost", "rightmost", "largest", "smallest", "nearest", "farthest"):
                    yield name, np.zeros(f.n, np.int8), {"t": shape}

    def _of_colour(self, colour: str) -> _Noun:
        return _Noun(f"{colour} object", f"{colour} objects", self.f.colour_is(colour))

    def _motion(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        properties = {
            "moving_left": f.moving_left,
            "moving_right": f.moving_right,
            "moving_away": f.moving_away,
            "moving_toward": f.moving_toward,
            "moving": f.moving,
            "still": f.still,
            "rolling": f.rolling,
            "sliding": f.sliding,
            "fell": f.fell,
        }
        nouns = [self.anything, *self.shape_nouns, *self.look_nouns]
        for noun in nouns:
            among = both(f.seen_now, noun.is_it)
            for name, holds in properties.items():
                # "something that is moving" is among the phrasings: only the bare noun may use those names
                if noun is not self.anything and any(
                    "{t}" not in t for t in PHRASINGS[name].train + PHRASINGS[name].held_out
                ):
                    continue
                # where the noun alone says it, "that is not moving" teaches nothing
                if name == "still" and np.count_nonzero(among != NO) == 1:
                    continue
                yield name, both(among, holds), {"t": noun.one}
            if np.count_nonzero(among != NO) >= 2:
                yield "fastest", both(among, f.fastest(among)), {"t": noun.one}

    def _reasoning(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        slots = {"t": GENERIC}
        yield "can_roll", both(f.seen_now, f.rolls), slots
        yield "cannot_roll", both(f.seen_now, negation(f.rolls)), slots
        yield "stackable", both(f.seen_now, f.flat_on_top), slots
        yield "tips_over", both(f.seen_now, f.tips_over), slots
        yield "about_to_fall", both(f.seen_now, f.about_to_fall), slots
        for shape in SHAPES:
            yield f"for_{shape}", both(f.seen_now, f.shape_is(shape)), slots

    def _moving_anchors(self) -> Iterator[tuple[_Noun, int]]:
        for noun in (*self.shape_nouns, *self.look_nouns):
            anchor = the_only(both(self.f.known, noun.is_it))
            if anchor is not None and self.f.episodes[anchor]:
                self._landmarks[noun.one] = anchor
                yield noun, anchor

    def _order(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        nouns = [self.anything, *self.shape_nouns, *self.look_nouns]
        for anchor_noun, anchor in self._moving_anchors():
            relations = {
                "moved_before": f.moved_before(anchor),
                "moved_after": f.moved_after(anchor),
                "stopped_before": f.stopped_before(anchor),
            }
            for noun in nouns:
                if noun.one == anchor_noun.one:
                    continue
                among = both(f.known, noun.is_it)
                for name, holds in relations.items():
                    yield name, both(among, holds), {"t": noun.one, "a": anchor_noun.one}
        for noun in nouns:
            among = both(f.known, noun.is_it)
            if np.count_nonzero(among != NO) >= 2:
                yield "moved_first", both(among, f.moved_first(among)), {"t": noun.one}
                yield "moved_last", both(among, f.moved_last(among)), {"t": noun.one}

    def _event(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        properties = {
            "stopped": f.stopped,
            "started": f.started,
            "came_back": f.came_back,
            "was_hidden": f.was_hidden,
            "entered": f.entered,
        }
        for noun in (self.anything, *self.shape_nouns, *self.look_nouns):
            among = both(f.known, noun.is_it)
            for name, holds in properties.items():
                yield name, both(among, holds), {"t": noun.one}

    def _count(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        for noun in (self.anything, *self.shape_nouns, *self.look_nouns):
            among = both(f.known, noun.is_it)
            yield "moved_once", both(among, f.moved_times(1)), {"t": noun.one}
            yield "moved_twice", both(among, f.moved_times(2)), {"t": noun.one}

    def _plural(self) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        f = self.f
        colour_nouns = [self._of_colour(c) for c in self.colours]
        for noun in (*self.shape_nouns, *self.look_nouns, *colour_nouns):
            yield from self._counted("all", both(f.known, noun.is_it), {"ts": noun.many})
        for shape in SHAPES:
            if shape not in self.shapes:
                yield "all", np.zeros(f.n, np.int8), {"ts": PLURALS[shape], "n": NUMBERS[2]}
        for noun in self.wrong_looks:
            yield "all", noun.is_it, {"ts": noun.many, "n": NUMBERS[2]}
        yield from self._counted("all_can_roll", both(f.seen_now, f.rolls), {"ts": GENERIC})
        yield from self._counted("all_stackable", both(f.seen_now, f.flat_on_top), {"ts": GENERIC})
        for noun in (self.anything, *self.shape_nouns):
            among = both(f.seen_now, noun.is_it)
            yield from self._counted("all_moving", both(among, f.moving), {"ts": noun.many})
            yield from self._counted("all_still", both(among, f.still), {"ts": noun.many})
            for anchor_noun, anchor in self._anchors():
                if anchor_noun.one == noun.one:
                    continue
                slots = {"ts": noun.many, "a": anchor_noun.one}
                yield from self._counted("all_left_of", both(among, f.left_of[:, anchor]), slots)
                yield from self._counted("all_right_of", both(among, f.right_of[:, anchor]), slots)

    def _counted(self, name: str, answers: Tri, slots: dict[str, str]) -> Iterator[tuple[str, Tri, dict[str, str]]]:
        count = int(np.count_nonzero(answers == YES))
        yield name, answers, {**slots, "n": NUMBERS.get(count, NUMBERS[2])}


def _extreme(amount: np.ndarray, candidates: np.ndarray, least: float) -> Tri:
    """The candidate whose amount is largest by `least`; all are unclear if none is."""
    result = np.zeros(len(amount), np.int8)
    ids = np.flatnonzero(candidates)
    order = ids[np.argsort(-amount[ids])]
    if len(order) >= 2 and amount[order[0]] - amount[order[1]] < least:
        result[ids] = UNCLEAR
    elif len(order):
        result[order[0]] = YES
    return result


def _bulk(shape: str, half_m: tuple[float, float, float]) -> float:
    """Volume in m3, near enough to rank sizes."""
    a, b, c = half_m
    if shape == "box":
        return 8 * a * b * c
    if shape in ("can", "plate"):
        return 2 * np.pi * a * a * c
    if shape == "capsule":
        return np.pi * a * a * (2 * c + 4 / 3 * a)
    return 4 / 3 * np.pi * a * b * c
