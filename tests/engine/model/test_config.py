# SPDX-License-Identifier: Apache-2.0
"""Dimensions survive their trip through a file's header, and nothing else gets through."""

import json

import pytest

from tests.engine.model.small_models import SMALL
from virst_engine.model.config import VirstConfig, tabletop_tiny
from virst_engine.sim.expressions import VOCABULARY


@pytest.mark.parametrize("config", [VirstConfig(), tabletop_tiny(("red", "ball")), SMALL])
def test_json_round_trip(config: VirstConfig) -> None:
    assert VirstConfig.from_json(config.to_json()) == config


def test_a_field_added_later_takes_its_default_in_an_older_file() -> None:
    raw = json.loads(VirstConfig().to_json())
    del raw["sam2"]["pointer_distance_limit"]
    assert VirstConfig.from_json(json.dumps(raw)) == VirstConfig()


def test_unknown_fields_are_refused_by_name() -> None:
    raw = json.loads(SMALL.to_json())
    raw["fusion"]["magic"] = 1
    with pytest.raises(ValueError, match="unknown fields of FusionConfig: magic"):
        VirstConfig.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"sam2": 3}', '{"name": "x", "sam2": {}}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        VirstConfig.from_json(text)


def test_the_vocabulary_of_the_tiny_model_is_its_words_and_the_special_tokens() -> None:
    config = tabletop_tiny(VOCABULARY)
    assert config.language.vocabulary == len(VOCABULARY) + 4
    assert config.sam2.grid == 8
    assert config.video.tokens_per_frame == 16
