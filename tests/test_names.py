"""What settings are called elsewhere."""

from __future__ import annotations

import re

from profiles import FIELDS, profile_names
from profiles.names import ELSEWHERE, ours


def test_what_is_answered_exists_and_no_name_of_ours_is_explained_away() -> None:
    assert not ELSEWHERE.keys() & FIELDS.keys()
    for words in ELSEWHERE.values():
        for option in re.findall(r"--([a-z-]+)", words):
            assert option.replace("-", "_") in {*FIELDS, "auto", "profile"}, words
        for profile in re.findall(r"--profile (\w+)", words):
            assert profile in profile_names()


def test_our_own_names_are_known_with_underscores() -> None:
    assert ours("--max_seq_len", FIELDS) == "--max-seq-len"
    assert ours("--nonsense", FIELDS) is None
