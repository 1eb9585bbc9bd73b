# SPDX-License-Identifier: Apache-2.0
"""Whether an English expression asks for several things: "the balls", "both cans", "two red boxes on the table".

A rule for noun phrases, not a parser. What it takes for plural is split into single objects, so where it is not clear
it says no: "a pair of socks", "the cup and the plate", "the scissors" and other languages are not recognised. Known
mistakes: "all the water" counts as several things, and so does an unknown singular in -s ("the kudos").
"""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ASKED = _words(
    "please find show me track segment look for point at follow detect locate highlight where are give us pick up "
    "grab mask get watch mark select"
)
SEVERAL = _words("all both every each several many these those")  # whatever follows
# Where the noun and what stands before it end.
ENDS = _words(
    "of in on at to from with without within into onto by for near nearest next behind beside besides under "
    "underneath between among above below over inside outside around against across along before after left right "
    "that which who whose where when while than the a an this is are was were do does did can could will would has "
    "have i you he she it we they there here and or but not , ; :"
)
IRREGULAR = _words("people men women children feet teeth mice geese oxen dice cacti")
# End in s and are one thing, or two halves of one; "pushed two times" counts no things.
ONE_THING = _words(
    "lens gas canvas atlas series species news yes chaos physics mathematics electronics headquarters always "
    "perhaps scissors pliers tweezers glasses sunglasses spectacles goggles binoculars trousers pants jeans shorts "
    "tights tongs times headphones earphones clippers shears pincers pyjamas overalls"
)


def is_plural(sentence: str) -> bool:
    """Whether the things that the sentence names first are several."""
    text = sentence.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    words = re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[,;:]", text)
    while words and words[0] in ASKED:
        words.pop(0)
    if words[:1] == ["one"]:
        return False
    if words and words[0] in SEVERAL:
        return True
    if words and words[0] in {"the", "a", "an", "my", "our", "your", "any", "some"}:
        words.pop(0)
    end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
    phrase = words[:end]
    for i, word in enumerate(phrase):
        after = phrase[i + 1] if i + 1 < len(phrase) else ""
        is_head = not after or after.endswith(("ing", "ed"))  # "the glasses case", "the balls standing still"
        if is_head and _looks_plural(word):
            return True
    return False


def _looks_plural(word: str) -> bool:
    if word in IRREGULAR:
        return True
    return (
        len(word) > 2
        and word.isalpha()
        and word.endswith("s")
        and not word.endswith(("ss", "us", "is"))
        and word not in ONE_THING
    )
