from __future__ import annotations

import math

import pytest
import torch

from nanochat.inference.sampling import Sampler, Sampling, draw


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("seed", -1),
    ],
)
def test_wrong_wishes_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


def draws(sampling: Sampling, logits: list[float], times: int) -> list[int]:
    return draw(torch.tensor([logits] * times), [Sampler(sampling, stream) for stream in range(times)])


def test_temperature_zero_takes_the_most_likely() -> None:
    assert set(draws(Sampling(), [0.0, 3.0, 1.0], 10)) == {1}


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    assert set(draws(Sampling(temperature=1e-30, seed=0), [0.0, 14.9, 15.0], 50)) == {2}


def test_draws_follow_the_softmax() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    counts = torch.bincount(
        torch.tensor(draws(Sampling(temperature=1.0, seed=1), logits, 20_000)), minlength=4
    )
    assert (counts / 20_000).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.012)


def test_temperature_sharpens_and_flattens() -> None:
    logits = [math.log(p) for p in (0.8, 0.2)]
    for temperature in (0.5, 2.0):
        weights = [p ** (1 / temperature) for p in (0.8, 0.2)]
        drawn = draws(Sampling(temperature=temperature, seed=2), logits, 20_000)
        assert drawn.count(0) / 20_000 == pytest.approx(weights[0] / sum(weights), abs=0.012)


def test_top_k_leaves_the_others_out() -> None:
    logits = [1.0, 2.0, 1.9, 0.5]
    assert set(draws(Sampling(temperature=5.0, top_k=2, seed=3), logits, 2000)) == {1, 2}
    assert set(draws(Sampling(temperature=5.0, top_k=100, seed=3), logits, 2000)) == {0, 1, 2, 3}


def test_what_is_impossible_is_never_drawn() -> None:
    logits = [0.0, -math.inf, 0.0, -math.inf]
    assert set(draws(Sampling(temperature=1.0, seed=4), logits, 2000)) == {0, 2}


def test_no_seed_differs_from_time_to_time() -> None:
    sampling = Sampling(temperature=1.0)
    assert draws(sampling, [0.0] * 50, 20) != draws(sampling, [0.0] * 50, 20)


def test_streams_go_on_when_rows_leave() -> None:
    sampling, logits = Sampling(temperature=1.0, seed=5), torch.zeros(3, 1000)
    whole, cut = ([Sampler(sampling, stream) for stream in range(3)] for _ in range(2))
    assert draw(logits, whole) == draw(logits, cut)
    assert draw(logits[:1], cut[2:]) == [draw(logits, whole)[2]]
