# SPDX-License-Identifier: Apache-2.0
"""The presets of the paper and of the released code, and a configuration as text."""

import json
from dataclasses import replace

import pytest

from virst_engine.model.virst_7b_config import Virst7bConfig, with_preset


def test_the_presets_differ_in_the_choices_and_in_nothing_else() -> None:
    paper, released = with_preset(Virst7bConfig(), "paper"), with_preset(Virst7bConfig(), "released")
    assert paper == Virst7bConfig()
    assert (paper.st_rows, released.st_rows) == (10, 1)
    assert (paper.fusion.initial_fusion, released.fusion.initial_fusion) == (True, False)
    assert (paper.seg_sampling, released.seg_sampling) == ("uniform", "random")
    assert (paper.anchor_rule, released.anchor_rule) == ("nearest", "bracketing")
    assert with_preset(released, "paper") == paper
    with pytest.raises(ValueError, match="paper or released"):
        with_preset(paper, "mine")


def test_a_configuration_comes_back_from_its_text() -> None:
    config = with_preset(replace(Virst7bConfig(), seg_frames=5), "released")
    assert Virst7bConfig.from_json(config.to_json()) == config
    raw = json.loads(config.to_json())
    with pytest.raises(ValueError, match="unknown fields of UmtConfig: depth"):
        Virst7bConfig.from_json(json.dumps(raw | {"vision": raw["vision"] | {"depth": 3}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seg_sampling": "dense"}, "seg_sampling must be one of uniform, random"),
        ({"anchor_rule": "all"}, "anchor_rule must be one of nearest, bracketing"),
        ({"seg_frames": 0}, r"seg_frames must be 1 to fusion.max_frames \(100\), got 0"),
        ({"seg_frames": 101}, "got 101"),
    ],
)
def test_choices_that_do_not_exist_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Virst7bConfig(), **change)  # type: ignore[arg-type]
