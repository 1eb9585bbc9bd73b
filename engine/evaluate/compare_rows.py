# SPDX-License-Identifier: Apache-2.0
"""What a comparison runs and what the papers lead one to expect of it, as data: a row is a name and its settings."""

from dataclasses import dataclass, field, replace

from virst_engine.evaluate.settings import EvaluationSettings

DEFAULT_FAMILY = "full"  # only there objects leave, are hidden, and come back
MANY_ANCHORS = 8  # VIRST's K in a long video: what its choice of the nearest alpha is about
PRESENT, MOTION, REAPPEARING, MOVING = "all", "target moves", "target reappears", "moves or reappears"
SUBSETS = (PRESENT, MOTION, REAPPEARING, MOVING)

# What is reported of a row. In `delayed` no frame is left out, and answers come as late as the reasoner takes here.
OFFLINE, STREAM, DELAYED = "offline", "stream", "delayed"
BOTH_WAYS = (OFFLINE, STREAM, DELAYED)


@dataclass(frozen=True)
class Row:
    """One row of the tables. `settings` without scenes and mode; `shipped` names a reasoner's file in the package."""

    name: str
    group: str
    label: str
    ways: tuple[str, ...]
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    shipped: str = ""


@dataclass(frozen=True)
class Claim:
    """What a paper's table says of two rows, or what is required of ours: `better` is above `worse` by `points`.

    `papers`: the two figures (J&F) as printed; None where no paper compares the two.
    """

    source: str
    better: str
    worse: str
    way: str
    points: float = 0.0
    subset: str = PRESENT
    papers: tuple[float, float] | None = None

    @property
    def is_required(self) -> bool:
        return self.points > 0


GROUPS = {
    "methods": "Methods",
    "anchors": "Which frames are anchors (VIRST, table 5), the whole video known",
    "fusion": "ST-Fusion switched off (VIRST, table 4)",
    "alpha": "Anchors that a frame attends to (VIRST, table 6)",
    "supervision": "Supervision of TempVRS's <TEP> (its table 5)",
    "top-k": "Clips from which TempVRS propagates (its table A2)",
}


def default_rows(detector: str = "", long_s: float = 0.0) -> tuple[Row, ...]:
    """All rows, in the order of the tables; on scenes of `long_s` seconds instead of short ones.

    Raises ValueError for scenes that are too short to be long ones.
    """
    plain = EvaluationSettings(family=DEFAULT_FAMILY, long_s=long_s)

    def anchors(name: str, label: str, count: int = 0) -> Row:
        strategy = name.removeprefix("anchors-").removesuffix("-K")
        settings = replace(plain, mode="offline", anchors=strategy, anchor_count=count)
        return Row(name, "anchors", label, (OFFLINE,), settings)

    def fusion(name: str, label: str, *, initial: bool, second: bool) -> Row:
        settings = replace(plain, no_initial_fusion=not initial, no_second_fusion=not second)
        return Row(name, "fusion", label, (OFFLINE, STREAM), settings)

    def alpha(count: int) -> Row:
        settings = replace(plain, mode="offline", alpha=count, anchor_count=MANY_ANCHORS)
        return Row(f"alpha-{count}", "alpha", f"alpha = {count}", (OFFLINE,), settings)

    def tempvrs(name: str, group: str, label: str, shipped: str = "", top_k: int = 0) -> Row:
        settings = replace(plain, method="tempvrs", top_k=top_k)
        return Row(name, group, label, (OFFLINE, STREAM), settings, shipped)

    return (
        Row("virst", "methods", "VIRST", BOTH_WAYS, plain),
        Row("visa", "methods", "VISA", BOTH_WAYS, replace(plain, method="visa")),
        Row("tempvrs", "methods", "TempVRS", BOTH_WAYS, replace(plain, method="tempvrs")),
        Row(
            "grounding",
            "methods",
            "a zero-shot detector and SAM 2",
            (STREAM, DELAYED),
            replace(plain, method="grounding", detector=detector),
        ),
        anchors("anchors-first-frame", "first frame"),
        anchors("anchors-guided", "one, guided by a score of image and sentence"),
        anchors("anchors-random-3", "three, at random"),
        anchors("anchors-uniform-3", "three, evenly spread"),
        anchors("anchors-dynamic", "dynamic: K = T / 4 of the clip's T frames, the nearest alpha"),
        anchors("anchors-dynamic-K", f"dynamic: K = {MANY_ANCHORS}, the nearest alpha", MANY_ANCHORS),
        fusion("fusion-both", "both stages", initial=True, second=True),
        fusion("fusion-no-initial", "without Initial ST-Fusion", initial=False, second=True),
        fusion("fusion-no-second", "without Second ST-Fusion", initial=True, second=False),
        fusion("fusion-neither", "without both", initial=False, second=False),
        *(alpha(count) for count in (2, 3, 4, 6, 8)),
        tempvrs("tempvrs-clip", "supervision", "clip by clip"),
        tempvrs("tempvrs-frame", "supervision", "frame by frame", "tabletop-tiny-tempvrs-frame.safetensors"),
        *(tempvrs(f"tempvrs-top-{k}", "top-k", f"k = {k}", top_k=k) for k in (3, 5, 7)),
    )


# Figures of the papers: J&F on ReVOS (VIRST, table 1), on TempVRS's short test set (its table 3) and short validation
# set (its tables 5 and A2), on MeViS (VIRST, tables 4 to 6; one row of table 4 has one stage off).
CLAIMS = (
    Claim("VIRST, table 1", "virst", "visa", OFFLINE, papers=(68.4, 46.9)),
    Claim("TempVRS, table 3", "tempvrs", "visa", OFFLINE, papers=(42.7, 33.1)),
    Claim("VIRST, table 5", "anchors-dynamic-K", "anchors-random-3", OFFLINE, papers=(62.9, 62.2)),
    Claim("VIRST, table 5", "anchors-random-3", "anchors-uniform-3", OFFLINE, papers=(62.2, 61.9)),
    Claim("VIRST, table 5", "anchors-uniform-3", "anchors-guided", OFFLINE, papers=(61.9, 59.3)),
    Claim("VIRST, table 5", "anchors-guided", "anchors-first-frame", OFFLINE, papers=(59.3, 57.9)),
    Claim("required", "anchors-dynamic-K", "anchors-first-frame", OFFLINE, 3.0, MOVING, papers=(62.9, 57.9)),
    Claim("VIRST, table 4", "fusion-both", "fusion-no-initial", OFFLINE, papers=(62.9, 59.7)),
    Claim("VIRST, table 4", "fusion-both", "fusion-no-second", OFFLINE, papers=(62.9, 59.7)),
    Claim("required", "fusion-both", "fusion-neither", OFFLINE, 2.0, papers=(62.9, 59.4)),
    Claim("VIRST, table 6", "alpha-3", "alpha-2", OFFLINE, papers=(62.9, 62.5)),
    Claim("VIRST, table 6", "alpha-4", "alpha-3", OFFLINE, papers=(62.9, 62.9)),
    Claim("VIRST, table 6", "alpha-6", "alpha-4", OFFLINE, papers=(63.0, 62.9)),
    Claim("VIRST, table 6", "alpha-8", "alpha-6", OFFLINE, papers=(63.2, 63.0)),
    Claim("TempVRS, table 5", "tempvrs-clip", "tempvrs-frame", OFFLINE, papers=(43.9, 41.3)),
    Claim("TempVRS, table A2", "tempvrs-top-5", "tempvrs-top-3", OFFLINE, papers=(43.9, 43.3)),
    Claim("TempVRS, table A2", "tempvrs-top-7", "tempvrs-top-5", OFFLINE, papers=(44.1, 43.9)),
)
STREAM_WITHIN_POINTS = 3.0  # what streaming may cost against the whole video known: required
