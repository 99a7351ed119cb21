"""The architecture does what its text says, and the cache changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat import costs
from nanochat.model import gpt
from nanochat.model.gpt import GPT, NORM_EPS, norm, rotate
from nanochat.model.kv_cache import KVCache
from nanochat.recipes import Model, named_recipes

MHA = Model(depth=3, width=32, heads=4, kv_heads=4, context=24)
GQA = Model(depth=3, width=32, heads=4, kv_heads=2, context=24)
VOCAB = 50


def random_gpt(config: Model, seed: int = 0) -> GPT:
    """All weights random: the initial zeros would hide most mistakes."""
    model = GPT(config, VOCAB)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def plain_forward(model: GPT, ids_T: torch.Tensor) -> torch.Tensor:
    """The architecture once more, token by token and head by head, from its description."""
    config, weights = model.config, dict(model.named_parameters())
    half = config.head_dim // 2

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()

    def turn(x_K: torch.Tensor, position: int) -> torch.Tensor:
        out = torch.empty_like(x_K)
        for i in range(half):
            angle = -position * config.rope_theta ** (-2 * i / config.head_dim)
            out[i] = x_K[i] * math.cos(angle) - x_K[half + i] * math.sin(angle)
            out[half + i] = x_K[i] * math.sin(angle) + x_K[half + i] * math.cos(angle)
        return out

    x_TD = rms(weights["wte.weight"][ids_T])
    T = len(ids_T)
    for layer in range(config.depth):
        prefix = f"blocks.{layer}."
        h_TD = rms(x_TD)
        q = (h_TD @ weights[prefix + "attn.c_q.weight"].T).view(T, config.heads, -1)
        k = (h_TD @ weights[prefix + "attn.c_k.weight"].T).view(T, config.kv_heads, -1)
        v = (h_TD @ weights[prefix + "attn.c_v.weight"].T).view(T, config.kv_heads, -1)
        y = torch.zeros(T, config.heads, config.head_dim)
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            for t in range(T):
                query = rms(turn(q[t, head], t))
                scores = torch.stack([query @ rms(turn(k[s, shared], s)) for s in range(t + 1)])
                mix = (scores / config.head_dim**0.5).softmax(0)
                y[t, head] = (mix[:, None] * v[: t + 1, shared]).sum(0)
        x_TD = x_TD + y.reshape(T, -1) @ weights[prefix + "attn.c_proj.weight"].T
        h_TD = rms(x_TD)
        hidden = F.relu(h_TD @ weights[prefix + "mlp.c_fc.weight"].T) ** 2
        x_TD = x_TD + hidden @ weights[prefix + "mlp.c_proj.weight"].T
    logits = rms(x_TD) @ weights["lm_head.weight"].T
    return config.logit_softcap * torch.tanh(logits / config.logit_softcap)


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
def test_forward_equals_the_architecture_written_out_head_by_head(config: Model) -> None:
    model, ids_BT = random_gpt(config), random_ids(2, 11)
    with torch.no_grad():
        logits = model(ids_BT)
        for row in range(2):
            torch.testing.assert_close(logits[row], plain_forward(model, ids_BT[row]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
def test_reading_with_a_cache_equals_reading_at_once(config: Model) -> None:
    model, ids_BT = random_gpt(config), random_ids(3, 20)
    with torch.no_grad():
        whole = model(ids_BT)
        cache = KVCache(config, batch=3, capacity=20)
        pieces = [model(ids_BT[:, a:b], cache) for a, b in [(0, 7), (7, 8), (8, 9), (9, 15), (15, 20)]]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_rows_of_different_lengths_share_a_cache() -> None:
    model, lengths = random_gpt(GQA), [3, 9, 6]
    ids_BT = random_ids(3, 14)
    cache = KVCache(GQA, batch=3, capacity=16)
    padded = torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, :length] = ids_BT[row, :length]
    with torch.no_grad():
        last = model(padded, cache, last_only=True, lengths=lengths)
        for row, length in enumerate(lengths):
            alone = model(ids_BT[row : row + 1, :length])[:, -1]
            torch.testing.assert_close(last[row], alone, atol=1e-5, rtol=1e-4)
        for step in range(3):
            new = torch.stack([ids_BT[row, length + step] for row, length in enumerate(lengths)])
            last = model(new[:, None], cache, last_only=True)
            for row, length in enumerate(lengths):
                alone = model(ids_BT[row : row + 1, : length + step + 1])[:, -1]
                torch.testing.assert_close(last[row], alone, atol=1e-5, rtol=1e-4)
        cache.remove(0)
        cache.remove(1)
        cache.append(cache.prefix(0, 8))
        last = model(ids_BT[[2, 0], :1], cache, last_only=True)
        for row, (source, first, length) in enumerate([(2, 2, 9), (2, 0, 8)]):
            alone = model(torch.cat([ids_BT[source : source + 1, :length], ids_BT[[first], :1]], dim=1))
            torch.testing.assert_close(last[row], alone[:, -1], atol=1e-5, rtol=1e-4)


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    model, ids_BT = random_gpt(GQA), random_ids(2, 20)
    cache = KVCache(GQA, batch=1, capacity=4)
    with torch.no_grad():
        model(ids_BT[:1, :4], cache)
        cache.reserve(1, 5)
        assert cache.capacity == 8
        cache.append(cache.prefix(0, 2))
        cache.reserve(2, 20)
        assert (cache.batch, cache.capacity, cache.lengths) == (2, 20, [4, 2])
        last = model(torch.stack([ids_BT[0, 4:6], ids_BT[1, 2:4]]), cache, last_only=True)
        for row, ids in enumerate([ids_BT[0, :6], torch.cat([ids_BT[0, :2], ids_BT[1, 2:4]])]):
            torch.testing.assert_close(last[row], model(ids[None])[0, -1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("copies", [True, False])
def test_a_fused_model_says_the_same(config: Model, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "SINGLE_ROW_COPY_BYTES", 10**9 if copies else 0)
    model, fused = random_gpt(config), random_gpt(config).fuse()
    with torch.no_grad():
        # One row, a few, more than are multiplied the other way round, and one token after others.
        for rows, tokens in ((1, 1), (2, 12), (4, 12)):
            ids_BT = random_ids(rows, tokens)
            torch.testing.assert_close(fused(ids_BT), model(ids_BT), atol=1e-5, rtol=1e-4)
            cache = KVCache(config, batch=rows, capacity=tokens + 1)
            fused(ids_BT, cache)
            last = fused(ids_BT[:, :1], cache, last_only=True)
            whole = model(torch.cat((ids_BT, ids_BT[:, :1]), dim=1))
            torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=1e-4)
        half = random_gpt(config).to(torch.bfloat16)
        ids_BT = random_ids(2, 5)
        expected = half(ids_BT)
        torch.testing.assert_close(half.fuse()(ids_BT), expected, atol=0.05, rtol=0.02)


def test_last_only_gives_the_last_row_of_the_full_logits() -> None:
    model, ids_BT = random_gpt(MHA), random_ids(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT, last_only=True), model(ids_BT)[:, -1:])


def test_no_token_sees_a_later_one() -> None:
    model, ids_BT = random_gpt(MHA), random_ids(1, 12)
    changed = ids_BT.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(ids_BT)[:, :8], model(changed)[:, :8])


def test_the_initial_prediction_is_uniform_and_the_seed_is_the_model() -> None:
    model, twin, other = (GPT(MHA, VOCAB) for _ in range(3))
    model.init_weights(7)
    twin.init_weights(7)
    other.init_weights(8)
    ids_BT = random_ids(2, 9)
    loss = model.loss_sum(ids_BT[:, :-1], ids_BT[:, 1:], torch.ones(2, 8) / 16)
    assert float(loss.detach()) == pytest.approx(math.log(VOCAB), rel=1e-5)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, twin.get_parameter(name))
    assert not torch.equal(model.wte.weight, other.wte.weight)
    assert model.wte.weight.std().item() == pytest.approx(1.0, abs=0.05)


def test_bfloat16_compute_stays_near_fp32_and_keeps_the_rope_tables_exact() -> None:
    model, ids_BT = random_gpt(GQA), random_ids(2, 20)
    with torch.no_grad():
        exact = model(ids_BT)
        model.compute_dtype = torch.bfloat16
        assert (model(ids_BT) - exact).abs().max() < 0.1
        cast = random_gpt(GQA).to(dtype=torch.bfloat16)
        assert cast.cos_TK2.dtype == torch.float32
        assert (cast(ids_BT).float() - exact).abs().max() < 0.1


def test_the_explicit_bfloat16_attention_gives_what_sdpa_gives() -> None:
    from nanochat.model.attention import attend

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 17, 8, generator=generator) for heads in (4, 2, 2))
    sdpa = attend(q, k, v)
    explicit = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(explicit.float(), sdpa, atol=0.03, rtol=0.03)


def test_rotation_turns_by_minus_the_angle_and_keeps_lengths() -> None:
    x = torch.tensor([[[[1.0, 0.0]]]])
    angle = torch.tensor([[[0.3]]])
    turned = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([math.cos(0.3), -math.sin(0.3)]))
    torch.testing.assert_close(norm(torch.full((4,), 3.0)), torch.ones(4))


def test_too_many_tokens_are_refused_by_name() -> None:
    model = random_gpt(MHA)
    with pytest.raises(ValueError, match="25 tokens are more than the model's context of 24"):
        model(random_ids(1, 25))
    cache = KVCache(MHA, batch=1, capacity=5)
    model(random_ids(1, 4), cache)
    with pytest.raises(ValueError, match="holds 5 tokens; 4 are in use and 2 more do not fit"):
        model(random_ids(1, 2), cache)


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
def test_cost_methods_agree_with_counted_tensors(config: Model) -> None:
    model = GPT(config, VOCAB)
    counted = sum(parameter.numel() for parameter in model.parameters())
    multiplied = counted - model.wte.weight.numel()
    assert model.num_parameters() == counted == costs.parameters(config, VOCAB)
    attention = 12 * config.depth * config.width * config.context
    assert model.flops_per_token() == 6 * multiplied + attention
    cache = KVCache(config, batch=2, capacity=5, dtype=torch.bfloat16)
    stored = cache.k_LBGSD.nbytes + cache.v_LBGSD.nbytes
    assert model.kv_bytes_per_token(torch.bfloat16) * 2 * 5 == stored


def test_d20_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert GPT(named_recipes()["d20"].model, 65_536).num_parameters() == 560_988_160
