"""Learning rate and momentum as functions of the step: never of time, so a slow machine learns the same."""

from __future__ import annotations

from nanochat.recipes import Optimizer, Schedule


def lr_multiplier(schedule: Schedule, step: int, steps: int) -> float:
    """The factor on every learning rate in step `step` (0 … steps - 1) of `steps`.

    Linear up over the first `warmup` share of the steps, 1 between, and over the last `warmdown`
    share linear from 1 to `final` (reached just after the last step).
    """
    assert 0 <= step < steps, f"step {step} of {steps}"
    warmup = round(schedule.warmup * steps)
    warmdown = round(schedule.warmdown * steps)
    if step < warmup:
        return (step + 1) / warmup
    if steps - step >= warmdown:
        return 1.0
    remaining = (steps - step) / warmdown
    return remaining + (1.0 - remaining) * schedule.final


def muon_momentum(optimizer: Optimizer, step: int) -> float:
    """Linear from start to end over the first `muon_momentum_steps` steps."""
    share = min(step / optimizer.muon_momentum_steps, 1.0)
    return (1.0 - share) * optimizer.muon_momentum_start + share * optimizer.muon_momentum_end
