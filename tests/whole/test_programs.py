"""A sample of `tests.programs`, and that it would find what it is for."""

from collections import Counter

import pytest

from pemn_surgery.masks import kept
from pemn_surgery.masks.adapter_mask import AdapterMask
from tests import programs


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_keeping_weights_changes_nothing(first):
    done, wrong = Counter(), []
    for seed in range(first, first + 10):
        counted, difference = programs.run(seed)
        done += counted
        wrong += [difference] if difference else []
    assert wrong == []
    assert sum(done.values()) == 200
    assert done["say"] > 5
    assert done["backward"] > 5


@pytest.mark.slow
def test_programs_find_a_stale_weight(monkeypatch):
    """Without a look at what they are made of, weights are soon stale."""
    monkeypatch.setattr(kept, "_look_at", lambda weights: None)
    assert any(programs.run(seed)[1] for seed in range(20))


@pytest.mark.slow
def test_a_look_finds_what_is_trained_too(monkeypatch):
    """Scores are no bits; were they kept like these, the sample would still tell."""
    monkeypatch.setattr(AdapterMask, "lasts", property(lambda mask: True))
    assert not any(programs.run(seed)[1] for seed in range(20))
