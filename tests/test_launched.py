"""Which of several ranks a command is, by what launchers put into the environment."""

from __future__ import annotations

import facts
import pytest

from autotune.errors import ConfigurationError
from cli.launched import Launched, launched


def test_ranks_are_those_that_the_environment_names() -> None:
    assert launched(1, {}) is None
    assert launched(2, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}) is None, "accelerate's single one"
    among = launched(1, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert among == Launched(3, 4, 2)
    assert among.share_out(facts.hardware(world_size=2)).world_size == 4
    with pytest.raises(ConfigurationError, match=r"--ranks 2, and this is already one of 4 ranks"):
        launched(2, {"RANK": "3", "WORLD_SIZE": "4"})
