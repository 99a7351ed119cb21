"""Rates by step."""

from __future__ import annotations

import pytest

from nanochat.optim.schedule import lr_multiplier, muon_momentum
from nanochat.recipes import Optimizer, Schedule


def curve(schedule: Schedule, steps: int) -> list[float]:
    return [lr_multiplier(schedule, step, steps) for step in range(steps)]


def test_constant_and_then_linear_to_nothing_over_the_last_fifth() -> None:
    rates = curve(Schedule(warmdown=0.2), 100)
    assert rates[:81] == [1.0] * 81
    assert rates[81:] == pytest.approx([left / 20 for left in range(19, 0, -1)])


def test_warmup_rises_from_one_share_to_the_full_rate() -> None:
    rates = curve(Schedule(warmup=0.1, warmdown=0.0), 50)
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[-1] == 1.0


def test_warmdown_may_be_the_whole_stage_and_end_above_nothing() -> None:
    assert curve(Schedule(warmdown=1.0), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert curve(Schedule(warmdown=1.0, final=0.2), 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_a_single_step_has_a_rate() -> None:
    assert curve(Schedule(warmup=0.0, warmdown=0.4), 1) == [1.0]
    assert curve(Schedule(warmup=1.0, warmdown=1.0), 1) == [1.0]


def test_momentum_rises_linearly_and_stays() -> None:
    optimizer = Optimizer(muon_momentum_start=0.8, muon_momentum_end=0.9, muon_momentum_steps=10)
    momenta = [muon_momentum(optimizer, step) for step in (0, 5, 10, 500)]
    assert momenta == pytest.approx([0.8, 0.85, 0.9, 0.9])
