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
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("stop", ("a", "")),
        ("logprobs", -1),
        ("logprobs", 21),
        ("seed", -1),
    ],
)
def test_wrong_wishes_name_their_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


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


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    logits = [math.log(p) for p in (0.05, 0.5, 0.15, 0.3)]
    for top_p, kept in ((0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.81, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert set(draws(Sampling(temperature=1.0, top_p=top_p, seed=6), logits, 2000)) == kept
    assert set(draws(Sampling(temperature=1.0, top_k=2, top_p=0.7, seed=6), logits, 2000)) == {1, 3}
    assert set(draws(Sampling(temperature=1.0, top_k=2, top_p=0.6, seed=6), logits, 2000)) == {1}


def test_a_nucleus_may_be_wider_than_its_candidates() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=7)
    flat, peaked = torch.zeros(3000), torch.zeros(3000)
    peaked[17] = 30.0
    wide, narrow = [], []
    samplers = [Sampler(sampling, stream) for stream in range(2)]
    for _ in range(300):
        drawn = draw(torch.stack([flat, peaked]), samplers)
        wide.append(drawn[0])
        narrow.append(drawn[1])
    assert len(set(wide)) > 250
    assert set(narrow) == {17}


def test_the_penalty_pushes_down_what_was_met() -> None:
    logits = [2.0, 1.5, -1.0, -1.5]
    assert set(draws(Sampling(), logits, 3)) == {0}
    sampler = Sampler(Sampling(repetition_penalty=2.0), context=[0])
    assert draw(torch.tensor([logits]), [sampler]) == [1]
    sampler.met(1)
    assert draw(torch.tensor([logits]), [sampler]) == [0]  # 1.0 against 0.75
    negative = Sampler(Sampling(repetition_penalty=2.0), context=[0, 1, 2])
    assert draw(torch.tensor([[-9.0, -9.0, -1.0, -1.5]]), [negative]) == [3]  # -2.0 against -1.5


def test_rows_with_other_wishes_change_no_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    wishes = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=4, seed=1),
        Sampling(temperature=1.0, top_p=0.6, seed=1),
        Sampling(temperature=2.0, top_k=9, top_p=0.6, seed=1),
        Sampling(temperature=1.0, repetition_penalty=1.7, seed=1),
    ]
    together = draw(logits.clone(), [Sampler(wish, 0, [1, 2, 3]) for wish in wishes])
    alone = [draw(logits[[row]].clone(), [Sampler(wish, 0, [1, 2, 3])])[0] for row, wish in enumerate(wishes)]
    assert together == alone
