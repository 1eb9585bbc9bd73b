# SPDX-License-Identifier: Apache-2.0
"""The phrasings: templates by meaning, trained ones and held-out ones, and the closed vocabulary they span.

Slots: {t} the noun of the target, {ts} its plural, {a} the noun of the thing it is compared with, {n} a number word.
Held-out templates arrange words that the trained templates also use.
"""

import re
from dataclasses import dataclass

from virst_engine.sim.spec import COLOURS, SHAPES, SIZES

PLURALS = {"box": "boxes", "ball": "balls", "can": "cans", "capsule": "capsules", "egg": "eggs", "plate": "plates"}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
HEADS = ("object", "thing", "one")
PLURAL_HEADS = ("objects", "things")
KINDS_PLAIN = ("attribute", "relation", "superlative", "motion", "reasoning")
KINDS_FULL = (*KINDS_PLAIN, "order", "event", "count", "plural")

TRAIN_PREFIXES = (
    "find ",
    "show me ",
    "track ",
    "segment ",
    "please segment ",
    "please track ",
    "look for ",
    "point at ",
)
HELD_OUT_PREFIXES = ("please find ", "please show me ", "please look for ", "please point at ")


@dataclass(frozen=True)
class Phrasings:
    kind: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _reasoning(clause: str, *more: str, held_out: tuple[str, ...] = ()) -> Phrasings:
    train = (f"the {{t}} {clause}", f"something {clause}", f"the thing {clause}", f"the one {clause}", *more)
    return Phrasings("reasoning", train, (f"the object here {clause}", f"something here {clause}", *held_out))


PHRASINGS: dict[str, Phrasings] = {
    "colour_shape": Phrasings(
        "attribute",
        (
            "the {c} {s}",
            "the {c} {s}",
            "the {s} that is {c}",
            "the {s} with the color {c}",
            "a {c} {s}",
            "the object here that is a {c} {s}",
        ),
        ("the one that is a {c} {s}", "a {s} that is {c}", "a {s} with the color {c}"),
    ),
    "shape": Phrasings(
        "attribute",
        (
            "the {s}",
            "the {s}",
            "a {s}",
            "the thing that is a {s}",
            "the {s} on the table",
            "the thing with the shape of a {s}",
        ),
        ("a {s} on the table", "the object that is a {s}", "the one with the shape of a {s}"),
    ),
    "colour": Phrasings(
        "attribute",
        (
            "the {c} {h}",
            "the {h} that is {c}",
            "the {h} with the color {c}",
            "something {c}",
            "the {c} {h} on the table",
        ),
        ("something that is {c}", "something with the color {c}", "the {h} on the table that is {c}"),
    ),
    "size_shape": Phrasings(
        "attribute",
        ("the {z} {s}", "the {z} {s}", "the {s} that is {z}", "the {z} {s} on the table", "a {z} {s}"),
        ("a {s} that is {z}", "the one that is a {z} {s}"),
    ),
    "size_colour_shape": Phrasings(
        "attribute",
        ("the {z} {c} {s}", "the {c} {s} that is {z}", "a {z} {c} {s}", "the {z} {s} that is {c}"),
        ("a {c} {s} that is {z}", "the {z} {s} with the color {c}"),
    ),
    "left_of": Phrasings(
        "relation",
        (
            "the {t} left of the {a}",
            "the {t} to the left of the {a}",
            "the {t} that is left of the {a}",
            "the {t} on the left side of the {a}",
            "the {t} to the left side of the {a}",
        ),
        ("the {t} on the left of the {a}", "the {t} that is to the left of the {a}"),
    ),
    "right_of": Phrasings(
        "relation",
        (
            "the {t} right of the {a}",
            "the {t} to the right of the {a}",
            "the {t} that is right of the {a}",
            "the {t} on the right side of the {a}",
            "the {t} to the right side of the {a}",
        ),
        ("the {t} on the right of the {a}", "the {t} that is to the right of the {a}"),
    ),
    "behind": Phrasings(
        "relation",
        (
            "the {t} behind the {a}",
            "the {t} that is behind the {a}",
            "the {t} farther away than the {a}",
            "the {t} farther from the camera than the {a}",
            "the {t} standing behind the {a}",
        ),
        ("the {t} that is farther away than the {a}", "the {t} that is standing behind the {a}"),
    ),
    "in_front_of": Phrasings(
        "relation",
        (
            "the {t} in front of the {a}",
            "the {t} that is in front of the {a}",
            "the {t} nearer than the {a}",
            "the {t} closer to the camera than the {a}",
            "the {t} standing in front of the {a}",
        ),
        ("the {t} that is closer to the camera than the {a}", "the {t} that is nearer than the {a}"),
    ),
    "nearest_to": Phrasings(
        "relation",
        (
            "the {t} closest to the {a}",
            "the {t} nearest to the {a}",
            "the {t} next to the {a}",
            "the {t} that is closest to the {a}",
            "the {t} that is next to the {a}",
        ),
        ("the {t} that is nearest to the {a}", "the {t} standing closest to the {a}"),
    ),
    "leftmost": Phrasings(
        "superlative",
        (
            "the leftmost {t}",
            "the {t} farthest to the left",
            "the {t} at the far left",
            "the {t} that is leftmost",
            "the {t} most to the left",
        ),
        ("the {t} that is farthest to the left", "the {t} that is at the far left"),
    ),
    "rightmost": Phrasings(
        "superlative",
        (
            "the rightmost {t}",
            "the {t} farthest to the right",
            "the {t} at the far right",
            "the {t} that is rightmost",
            "the {t} most to the right",
        ),
        ("the {t} that is farthest to the right", "the {t} that is at the far right"),
    ),
    "largest": Phrasings(
        "superlative",
        (
            "the largest {t}",
            "the biggest {t}",
            "the {t} that is largest",
            "the {t} bigger than all others",
            "the {t} that is larger than all others",
        ),
        ("the {t} that is biggest", "the {t} that is bigger than all others", "the {t} larger than all others"),
    ),
    "smallest": Phrasings(
        "superlative",
        (
            "the smallest {t}",
            "the {t} that is smallest",
            "the {t} smaller than all others",
            "the tiniest {t}",
            "the {t} with the smallest size",
        ),
        ("the {t} that is smaller than all others", "the {t} that is tiniest"),
    ),
    "nearest": Phrasings(
        "superlative",
        (
            "the {t} nearest to the camera",
            "the nearest {t}",
            "the closest {t}",
            "the {t} that is closest to the camera",
            "the {t} in front of all others",
        ),
        ("the {t} closest to the camera", "the {t} that is nearest to the camera"),
    ),
    "farthest": Phrasings(
        "superlative",
        (
            "the {t} farthest from the camera",
            "the farthest {t}",
            "the {t} farthest away",
            "the {t} that is farthest away",
            "the {t} behind all others",
        ),
        ("the {t} that is farthest from the camera", "the {t} farthest away from the camera"),
    ),
    "tallest": Phrasings(
        "superlative",
        ("the tallest {t}", "the {t} that is tallest", "the {t} taller than all others", "the highest {t}"),
        ("the {t} that is taller than all others", "the {t} that is highest"),
    ),
    "moving_left": Phrasings(
        "motion",
        (
            "the {t} moving to the left",
            "the {t} moving left",
            "the {t} that moves to the left",
            "the {t} that is going left",
            "the {t} going to the left side",
        ),
        ("the {t} that is moving to the left", "the {t} going to the left", "the {t} that is moving left"),
    ),
    "moving_right": Phrasings(
        "motion",
        (
            "the {t} moving to the right",
            "the {t} moving right",
            "the {t} that moves to the right",
            "the {t} that is going right",
            "the {t} going to the right side",
        ),
        ("the {t} that is moving to the right", "the {t} going to the right", "the {t} that is moving right"),
    ),
    "moving_away": Phrasings(
        "motion",
        (
            "the {t} moving away",
            "the {t} moving away from the camera",
            "the {t} that moves away",
            "the {t} that is going away from the camera",
        ),
        ("the {t} that is moving away from the camera", "the {t} going away"),
    ),
    "moving_toward": Phrasings(
        "motion",
        (
            "the {t} moving toward the camera",
            "the {t} coming closer",
            "the {t} that moves toward the camera",
            "the {t} that is coming toward the camera",
        ),
        ("the {t} that is moving toward the camera", "the {t} that is coming closer"),
    ),
    "moving": Phrasings(
        "motion",
        (
            "the moving {t}",
            "the {t} that is moving",
            "the {t} that moves",
            "the {t} in motion",
            "something that is moving",
        ),
        ("the {t} that is in motion", "something in motion", "something that moves"),
    ),
    "still": Phrasings(
        "motion",
        ("the {t} that does not move", "the {t} standing still", "the {t} that stays in place", "the {t} not moving"),
        ("the {t} that is standing still", "the {t} that is not moving"),
    ),
    "rolling": Phrasings(
        "motion",
        (
            "the rolling {t}",
            "the {t} that is rolling",
            "the {t} rolling over the table",
            "the {t} that rolls",
            "something that is rolling",
        ),
        ("the {t} that rolls over the table", "something rolling over the table"),
    ),
    "sliding": Phrasings(
        "motion",
        (
            "the sliding {t}",
            "the {t} that is sliding",
            "the {t} sliding over the table",
            "the {t} that slides",
            "something that is sliding",
        ),
        ("the {t} that slides over the table", "something sliding over the table"),
    ),
    "fastest": Phrasings(
        "motion",
        (
            "the fastest {t}",
            "the {t} that moves fastest",
            "the {t} moving faster than all others",
            "the {t} that is fastest",
        ),
        ("the {t} that moves faster than all others", "the {t} moving fastest"),
    ),
    "fell": Phrasings(
        "motion",
        (
            "the {t} that fell",
            "the {t} that was dropped",
            "the {t} that fell onto the table",
            "something that fell down",
        ),
        ("the {t} that was dropped onto the table", "the {t} that fell down"),
    ),
    "can_roll": _reasoning(
        "that can roll",
        "the thing that could roll away",
        "something that would roll if pushed",
        held_out=("something that could roll away", "the one that would roll if pushed"),
    ),
    "cannot_roll": _reasoning(
        "that cannot roll",
        "the thing that would not roll away",
        held_out=("something that would not roll away", "the one that would not roll if pushed"),
    ),
    "stackable": _reasoning(
        "you could stack a box on",
        "the thing with a flat top",
        "something with a flat top",
        held_out=("the one with a flat top", "the thing here you could stack a box on"),
    ),
    "tips_over": _reasoning(
        "that would fall over if pushed",
        "the thing that could fall over",
        held_out=("the one that could fall over", "something that could fall over"),
    ),
    "about_to_fall": _reasoning(
        "that is about to fall",
        "whatever is about to fall",
        "the thing in the air",
        "something in the air",
        held_out=("the one in the air", "whatever is in the air"),
    ),
    "for_ball": _reasoning("you could play catch with", "the thing to throw", held_out=("something to throw",)),
    "for_can": _reasoning("you could drink from", "the thing to drink from", held_out=("something to drink from",)),
    "for_egg": _reasoning("a hen could lay", "the thing to cook", held_out=("something to cook",)),
    "for_plate": _reasoning("you could serve food on", "the thing to eat from", held_out=("something to eat from",)),
    "for_box": _reasoning("with corners", "the thing with edges", held_out=("something with edges",)),
    "for_capsule": _reasoning("shaped like a pill", "the thing like a pill", held_out=("something like a pill",)),
    "moved_before": Phrasings(
        "order",
        (
            "the {t} that moved before the {a}",
            "the {t} that moved before the {a} moved",
            "the {t} that started before the {a}",
            "the {t} that was moving before the {a} moved",
        ),
        ("the {t} that started moving before the {a}", "the {t} that started before the {a} moved"),
    ),
    "moved_after": Phrasings(
        "order",
        (
            "the {t} that moved after the {a}",
            "the {t} that moved after the {a} moved",
            "the {t} that started after the {a}",
            "the {t} that started moving after the {a} stopped",
        ),
        ("the {t} that started moving after the {a}", "the {t} that moved after the {a} stopped"),
    ),
    "stopped_before": Phrasings(
        "order",
        (
            "the {t} that stopped before the {a} moved",
            "the {t} that stopped before the {a}",
            "the {t} that stopped before the {a} started moving",
            "the {t} that was still before the {a} moved",
        ),
        ("the {t} that stopped before the {a} started", "the {t} that was still before the {a} started moving"),
    ),
    "moved_first": Phrasings(
        "order",
        ("the {t} that moved first", "the first {t} that moved", "the {t} that started first", "the first {t} to move"),
        ("the first {t} that started", "the {t} that started moving first"),
    ),
    "moved_last": Phrasings(
        "order",
        ("the {t} that moved last", "the last {t} that moved", "the {t} that started last", "the last {t} to move"),
        ("the last {t} that started", "the {t} that started moving last"),
    ),
    "stopped": Phrasings(
        "event",
        (
            "the {t} that stopped",
            "the {t} that stopped moving",
            "the {t} that moved and stopped",
            "the {t} that was moving and is still now",
        ),
        ("the {t} that was moving and stopped", "the {t} that moved and is still now"),
    ),
    "started": Phrasings(
        "event",
        (
            "the {t} that started moving",
            "the {t} that started to move",
            "the {t} that was still and started moving",
            "the {t} that was still and is moving now",
        ),
        ("the {t} that was still and started to move", "the {t} that started moving now"),
    ),
    "came_back": Phrasings(
        "event",
        (
            "the {t} that left and came back",
            "the {t} that came back",
            "the {t} that left the view and came back",
            "the {t} that was out of view and is back",
        ),
        ("the {t} that left the view and is back", "the {t} that was out of view and came back"),
    ),
    "was_hidden": Phrasings(
        "event",
        (
            "the {t} that was hidden",
            "the {t} that was hidden and is back",
            "the {t} that was behind something",
            "the {t} that was hidden behind something",
        ),
        ("the {t} that was behind something and is back", "the {t} that was hidden and came back"),
    ),
    "entered": Phrasings(
        "event",
        (
            "the {t} that came into view",
            "the {t} that entered the view",
            "the {t} that entered",
            "the new {t} in the view",
        ),
        ("the {t} that came into the view", "the new {t} that entered"),
    ),
    "moved_once": Phrasings(
        "count",
        (
            "the {t} that moved once",
            "the {t} that moved one time",
            "the {t} pushed once",
            "the {t} that was pushed one time",
        ),
        ("the {t} that was pushed once", "the {t} pushed one time"),
    ),
    "moved_twice": Phrasings(
        "count",
        (
            "the {t} that moved twice",
            "the {t} that moved two times",
            "the {t} pushed twice",
            "the {t} that was pushed two times",
        ),
        ("the {t} that was pushed twice", "the {t} pushed two times"),
    ),
    "all": Phrasings(
        "plural",
        ("the {ts}", "all {ts}", "all the {ts}", "the {ts} on the table", "the {n} {ts}"),
        ("all {ts} on the table", "all the {ts} on the table", "the {n} {ts} on the table"),
    ),
    "all_can_roll": Phrasings(
        "plural",
        (
            "the {ts} that can roll",
            "all {ts} that can roll",
            "all {ts} that could roll away",
            "the {n} {ts} that can roll",
        ),
        ("the {ts} that could roll away", "all the {ts} that can roll"),
    ),
    "all_stackable": Phrasings(
        "plural",
        (
            "the {ts} you could stack a box on",
            "all {ts} with a flat top",
            "all {ts} you could stack a box on",
            "the {n} {ts} with a flat top",
        ),
        ("the {ts} with a flat top", "all the {ts} you could stack a box on"),
    ),
    "all_moving": Phrasings(
        "plural",
        ("the {ts} that are moving", "all {ts} that move", "all moving {ts}", "the {n} {ts} that move"),
        ("all {ts} that are moving", "the moving {ts}"),
    ),
    "all_still": Phrasings(
        "plural",
        (
            "the {ts} that do not move",
            "all {ts} that do not move",
            "the {ts} standing still",
            "all {ts} that stay in place",
        ),
        ("all {ts} standing still", "the {ts} that stay in place"),
    ),
    "all_left_of": Phrasings(
        "plural",
        (
            "the {ts} left of the {a}",
            "all {ts} left of the {a}",
            "the {ts} to the left of the {a}",
            "all {ts} on the left side of the {a}",
        ),
        ("all {ts} to the left of the {a}", "the {ts} on the left side of the {a}"),
    ),
    "all_right_of": Phrasings(
        "plural",
        (
            "the {ts} right of the {a}",
            "all {ts} right of the {a}",
            "the {ts} to the right of the {a}",
            "all {ts} on the right side of the {a}",
        ),
        ("all {ts} to the right of the {a}", "the {ts} on the right side of the {a}"),
    ),
}


def finish(text: str) -> str:
    """The sentence with the right articles and single spaces."""
    return re.sub(r"\ba (?=[aeio])", "an ", " ".join(text.split()))


def _vocabulary() -> tuple[str, ...]:
    words: set[str] = {
        "none",
        "an",
        *HEADS,
        *PLURAL_HEADS,
        *COLOURS,
        *SHAPES,
        *PLURALS.values(),
        *NUMBERS.values(),
        *SIZES,
    }
    for synonyms in SIZE_WORDS.values():
        words.update(synonyms)
    templates = [*TRAIN_PREFIXES, *HELD_OUT_PREFIXES]
    for phrasings in PHRASINGS.values():
        templates += [*phrasings.train, *phrasings.held_out]
    for template in templates:
        words.update(re.sub(r"\{\w+\}", " ", template).split())
    return tuple(sorted(words))


VOCABULARY: tuple[str, ...] = _vocabulary()
