"""reference.py and formats/ against torch's own functions and against element-by-element decoders.

They are the truth for the other kernels' tests, so here they meet independent code.
"""

from __future__ import annotations

import struct

import pytest
import torch
import torch.nn.functional as F

from gguf_blocks import random_blocks
from octavo.kernels import reference as ops
from octavo.kernels.formats.gguf import BLOCK_FORMATS
from octavo.kernels.routing import Routing
from octavo.kernels.weights import Norm, Planes, quantize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------- block formats


def _half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def _bit(raw: bytes, at: int, j: int) -> int:
    return raw[at + j // 8] >> (j % 8) & 1


def _nibble(raw: bytes, at: int, j: int) -> int:
    """Element j of a group of 32 stored as 16 low, then 16 high nibbles."""
    return raw[at + j] & 15 if j < 16 else raw[at + j - 16] >> 4


def _k_scale_min(raw: bytes, j: int) -> tuple[int, int]:
    s = raw[4:16]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)


def _element(kind: str, raw: bytes, i: int) -> float:
    d = 0.0 if kind == "Q6_K" else _half(raw, 0)
    if kind == "Q4_0":
        return d * (_nibble(raw, 2, i) - 8)
    if kind == "Q4_1":
        return d * _nibble(raw, 4, i) + _half(raw, 2)
    if kind == "Q5_0":
        return d * (_nibble(raw, 6, i) + 16 * _bit(raw, 2, i) - 16)
    if kind == "Q5_1":
        return d * (_nibble(raw, 8, i) + 16 * _bit(raw, 4, i)) + _half(raw, 2)
    if kind == "Q8_0":
        return d * struct.unpack_from("b", raw, 2 + i)[0]
    group, j = i // 32, i % 32
    if kind in ("Q4_K", "Q5_K"):
        scale, low = _k_scale_min(raw, group)
        at = 16 if kind == "Q4_K" else 48
        byte = raw[at + group // 2 * 32 + j]
        q = byte >> 4 if group % 2 else byte & 15
        if kind == "Q5_K":
            q += 16 * (raw[16 + j] >> group & 1)
        return d * scale * q - _half(raw, 2) * low
    half, quarter = group // 4, group % 4
    byte = raw[half * 64 + quarter % 2 * 32 + j]
    q = byte >> 4 if quarter >= 2 else byte & 15
    q += 16 * (raw[128 + half * 32 + j] >> 2 * quarter & 3)
    return _half(raw, 208) * struct.unpack_from("b", raw, 192 + i // 16)[0] * (q - 32)


# The others are held to llama.cpp's own package: tests/core/test_gguf.py.
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_dequantize_matches_the_format(kind: str) -> None:
    n, k = 3, 512
    data = random_blocks(kind, n, k).view(-1)
    elements, nbytes = BLOCK_FORMATS[kind].block, BLOCK_FORMATS[kind].nbytes
    raw = bytes(data.tolist())
    want = torch.tensor(
        [
            _element(kind, raw[i // elements * nbytes : (i // elements + 1) * nbytes], i % elements)
            for i in range(n * k)
        ]
    ).reshape(n, k)
    got = Planes(kind, {"blocks": data.view(n, -1)}, (n, k)).dequantize()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_dequantize_plain_floats_at_an_odd_address(kind: str, dtype: torch.dtype) -> None:
    w = torch.randn(3, 7).to(dtype)
    data = torch.cat([torch.zeros(1, dtype=torch.uint8), w.reshape(-1).view(torch.uint8)])[1:]
    got = Planes(kind, {"blocks": data.view(3, -1)}, (3, 7)).dequantize()
    assert torch.equal(got, w.float())


@pytest.mark.parametrize(("kind", "bound"), [("Q4_0", 0.1), ("Q4_1", 0.09), ("Q8_0", 0.008)])
def test_quantize_round_trip(kind: str, bound: float) -> None:
    w = torch.randn(5, 96)
    w[0] = 0
    w[1] = 2.5
    q = quantize(w, kind)
    got = q.dequantize()
    assert (got - w).norm() / w.norm() < bound
    assert torch.equal(got[0], torch.zeros(96))
    # What is already on the grid stays there.
    again = quantize(got, kind).dequantize()
    torch.testing.assert_close(again, got, rtol=2e-3, atol=2e-3)


def test_row_permutation() -> None:
    q = quantize(torch.randn(4, 32), "Q8_0")
    perm = torch.tensor([2, 0, 3, 1])
    moved = Planes(q.format, q.planes, q.shape, perm)
    assert torch.equal(moved.dequantize(), q.dequantize()[perm])


@pytest.mark.parametrize(
    ("blocks", "name", "shape", "order", "message"),
    [
        (torch.zeros(1, 34, dtype=torch.uint8), "Q9", (1, 32), None, "unknown format"),
        (torch.zeros(1, 34, dtype=torch.uint8), "Q8_0", (1, 33), None, "multiple of 32"),
        (torch.zeros(1, 33, dtype=torch.uint8), "Q8_0", (1, 32), None, "1 rows of 34 bytes"),
        (torch.zeros(1, 34, dtype=torch.int8), "Q8_0", (1, 32), None, "uint8"),
        (torch.zeros(2, 68, dtype=torch.uint8)[:, ::2], "Q8_0", (2, 32), None, "contiguous"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", (2, 32), torch.tensor([0, 0]), "permut"),
    ],
)
def test_planes_refuse(
    blocks: torch.Tensor,
    name: str,
    shape: tuple[int, int],
    order: torch.Tensor | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        Planes(name, {"blocks": blocks}, shape, order)
    with pytest.raises(ValueError, match="one plane, blocks"):
        Planes("Q8_0", {"q": blocks}, (1, 32))


# -------------------------------------------------------------------------------------------- ops


def test_linear_and_embedding() -> None:
    x, w, b = torch.randn(3, 64), torch.randn(10, 64), torch.randn(10)
    torch.testing.assert_close(ops.linear(x, w, b), F.linear(x, w, b))
    stacked = ops.prepare([w, quantize(w, "Q8_0")])
    assert stacked.shape == (20, 64)
    assert torch.equal(stacked.dequantize()[:10], w)
    ids = torch.tensor([4, 0, 4], dtype=torch.int32)
    assert torch.equal(ops.embedding(ids, w, scale=2.0), w[[4, 0, 4]] * 2)


def test_linear_with_what_comes_before_and_after() -> None:
    x, w, b = torch.randn(3, 64), torch.randn(10, 64), torch.randn(10)
    norm = Norm(torch.randn(64), 1e-5, 1.0)
    y = F.linear(F.rms_norm(x, (64,), norm.weight + 1, 1e-5), w, b)
    torch.testing.assert_close(ops.linear(x, w, b, norm=norm), y)
    gated = F.silu(y[:, :5]) * y[:, 5:]
    torch.testing.assert_close(ops.linear(x, w, b, norm=norm, gate="silu"), gated)
    r = torch.randn(3, 10)
    torch.testing.assert_close(ops.linear(x, w, b, residual=r), r + F.linear(x, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    x, r = torch.randn(4, 48).to(dtype), torch.randn(4, 48).to(dtype)
    w, b = torch.randn(48), torch.randn(48)
    tol = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    y, new = ops.rms_norm(x, w, 1e-5, residual=r, weight_offset=1.0)
    torch.testing.assert_close(new, x + r)
    torch.testing.assert_close(y.float(), F.rms_norm((x + r).float(), (48,), w + 1, 1e-5), **tol)
    y, new = ops.layer_norm(x, w, b, 1e-5, residual=r)
    torch.testing.assert_close(new, x + r)
    torch.testing.assert_close(y.float(), F.layer_norm((x + r).float(), (48,), w, b, 1e-5), **tol)
    assert isinstance(ops.rms_norm(x, w, 1e-5), torch.Tensor)


def test_activations() -> None:
    x = torch.randn(3, 20) * 3
    for kind, want in [
        ("silu", F.silu(x)),
        ("gelu", F.gelu(x)),
        ("gelu_tanh", F.gelu(x, approximate="tanh")),
        ("gelu_new", F.gelu(x, approximate="tanh")),
        ("relu", F.relu(x)),
        ("relu2", F.relu(x) ** 2),
    ]:
        torch.testing.assert_close(ops.activation(x, kind), want)
    torch.testing.assert_close(ops.gated_activation(x, "silu"), F.silu(x[:, :10]) * x[:, 10:])
    with pytest.raises(ValueError, match="unknown"):
        ops.activation(x, "swish")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_rotation_and_stores_kv(interleaved: bool) -> None:
    hq, hkv, dh, rot, tokens, block_size = 4, 2, 16, 8, 5, 3
    positions = torch.tensor([0, 1, 7, 9, 2], dtype=torch.int32)
    angles = torch.outer(torch.arange(10.0), 1 / 100 ** (torch.arange(0, rot, 2) / rot))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    qkv = torch.randn(tokens, (hq + 2 * hkv) * dh)
    caches = [torch.full((4, hkv, block_size, dh), float("nan")) for _ in range(2)]
    slot_mapping = torch.tensor([0, 4, -1, 11, 5], dtype=torch.int32)
    q = ops.qk_norm_rope_store_kv(
        qkv,
        positions,
        cos_sin,
        slot_mapping,
        *caches,
        num_heads=hq,
        num_kv_heads=hkv,
        head_dim=dh,
        interleaved=interleaved,
    )
    heads = qkv.view(tokens, -1, dh)
    # As complex numbers: a pair (a, b) times e^(i angle).
    for t in range(tokens):
        for h in range(hq):
            head = heads[t, h, :rot]
            a, b = (head[0::2], head[1::2]) if interleaved else head.chunk(2)
            z = torch.complex(a, b) * torch.polar(torch.ones(rot // 2), angles[positions[t].long()])
            got = q[t, h, :rot]
            a, b = (got[0::2], got[1::2]) if interleaved else got.chunk(2)
            torch.testing.assert_close(torch.complex(a, b), z)
            assert torch.equal(q[t, h, rot:], heads[t, h, rot:])
    v = caches[1].transpose(1, 2).reshape(12, hkv, dh)
    assert torch.equal(v[[0, 4, 11, 5]], heads[[0, 1, 3, 4], hq + hkv :])
    assert v.isnan().all(-1).all(-1).sum() == 12 - 4
    assert torch.equal(caches[0].isnan(), caches[1].isnan())


@pytest.mark.parametrize("window", [0, 4])
def test_paged_attention_is_sdpa(window: int) -> None:
    hq, hkv, dh, block_size = 6, 2, 8, 4
    k_cache, v_cache = torch.randn(2, 12, hkv, block_size, dh)
    block_table = torch.tensor([[5, 2, 9, 0], [7, 1, 0, 0], [3, 11, 8, 6]], dtype=torch.int32)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)
    seq_lens = torch.tensor([13, 9, 0], dtype=torch.int32)
    starts = torch.tensor([0, 1, 6, 6], dtype=torch.int32)
    q = torch.randn(8, hq, dh)
    out = ops.paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        slots,
        seq_lens,
        starts,
        scale=0.3,
        num_decodes=1,
        max_query_len=5,
        max_seq_len=13,
        sliding_window=window,
    )
    for r, (slot, length, start, end) in enumerate([(2, 13, 0, 1), (0, 9, 1, 6)]):
        keys, values = (
            torch.stack(
                [
                    c[block_table[slot, i // block_size].long(), :, i % block_size]
                    for i in range(length)
                ],
                1,
            )
            for c in (k_cache, v_cache)
        )
        i = torch.arange(length)
        mask = i[None, :] <= i[:, None]
        if window:
            mask &= i[:, None] - i[None, :] < window
        want = F.scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask[length - (end - start) :],
            scale=0.3,
            enable_gqa=True,
        )[0].transpose(0, 1)
        torch.testing.assert_close(
            out[start:end], want.reshape(end - start, -1), msg=f"request {r}"
        )
    assert not out[6:].any()


def test_attention_softcap_and_bidirectional() -> None:
    k_cache, v_cache = torch.randn(2, 1, 1, 4, 8)
    q = torch.randn(2, 1, 8) * 5
    args = (
        k_cache,
        v_cache,
        torch.zeros(1, 1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32),
    )
    hints = {"scale": 1.0, "num_decodes": 0, "max_query_len": 2, "max_seq_len": 3}
    out = ops.paged_attention(q, *args, **hints, softcap=2.0, causal=False)
    scores = 2 * torch.tanh(q[:, 0] @ k_cache[0, 0, :3].T / 2)
    torch.testing.assert_close(out, scores.softmax(-1) @ v_cache[0, 0, :3])


def test_attention_sinks_and_slopes() -> None:
    """A sink is a key whose value is zero; a slope counts tokens from the query back."""
    q, cache = torch.randn(1, 2, 4), torch.randn(2, 1, 2, 3, 4)
    args = ([0], [0], [3], [0, 1])
    table, *rest = (torch.tensor(values, dtype=torch.int32) for values in args)
    hints = {"scale": 1.0, "num_decodes": 0, "max_query_len": 1, "max_seq_len": 3}
    sinks, slopes = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    out = ops.paged_attention(
        q, cache[0], cache[1], table[None], *rest, **hints, sinks=sinks, slopes=slopes
    )
    for head in range(2):
        scores = cache[0, 0, head] @ q[0, head] - slopes[head] * torch.tensor([2.0, 1.0, 0.0])
        probs = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:3]
        torch.testing.assert_close(out[0, 4 * head :][:4], probs @ cache[1, 0, head])


def test_clamped_swiglu() -> None:
    x = torch.tensor([[9.0, 1.0, -20.0, 30.0, -8.0, 2.0]])
    gate, up = torch.tensor([7.0, 1.0, -20.0]), torch.tensor([8.0, -6.0, 3.0])
    want = gate * torch.sigmoid(1.702 * gate) * up
    torch.testing.assert_close(ops.gated_activation(x, "swiglu_clamped")[0], want)


@pytest.mark.parametrize("renormalize", [False, True])
def test_moe(renormalize: bool) -> None:
    t, d, f, e = 5, 8, 6, 4
    x, logits = torch.randn(t, d), torch.randn(t, e)
    w13, w2 = torch.randn(e, 2 * f, d), torch.randn(e, d, f)
    got = ops.moe(x, logits, w13, w2, Routing(2, renormalize))
    probs = logits.softmax(-1)
    for row in range(t):
        chosen = probs[row].argsort(descending=True)[:2]
        total = probs[row, chosen].sum() if renormalize else 1.0
        want = sum(
            probs[row, i] / total * (w2[i] @ (F.silu(w13[i, :f] @ x[row]) * (w13[i, f:] @ x[row])))
            for i in chosen
        )
        torch.testing.assert_close(got[row], want)


# --------------------------------------------------------------------------------------- sampling


def _sample(logits: list[float], u: float, **kwargs: float) -> int:
    def row(name: str, default: float) -> torch.Tensor:
        return torch.tensor([kwargs.get(name, default)])

    out = ops.sample(
        torch.tensor([logits]),
        row("temperature", 1.0),
        row("top_k", 0).int(),
        row("top_p", 1.0),
        row("min_p", 0.0),
        torch.tensor([u]),
    )
    assert out.dtype == torch.int32
    return int(out)


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()


@pytest.mark.parametrize(
    ("kwargs", "bounds"),
    [
        # Where the running sum of the kept probabilities moves to the next token.
        ({}, [(0.0, 0), (0.09, 0), (0.11, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3)]),
        ({"top_k": 2}, [(0.0, 1), (4 / 7 - 0.01, 1), (4 / 7 + 0.01, 3), (0.999, 3)]),
        ({"top_p": 0.65}, [(0.0, 1), (4 / 7 - 0.01, 1), (4 / 7 + 0.01, 3), (0.999, 3)]),
        ({"top_p": 0.75}, [(0.0, 1), (4 / 9 + 0.01, 2), (6 / 9 + 0.01, 3)]),
        ({"top_p": 0.0}, [(0.0, 1), (0.999, 1)]),
        ({"min_p": 0.6}, [(0.0, 1), (4 / 7 + 0.01, 3)]),
        # min_p leaves 0.4 and 0.3, top_p is of those: 0.5 is less than 4/7.
        ({"min_p": 0.6, "top_p": 0.5}, [(0.0, 1), (0.999, 1)]),
        ({"temperature": 0.0}, [(0.0, 1), (0.999, 1)]),
        # Squares: 1, 16, 4, 9 of 30.
        ({"temperature": 0.5}, [(0.03, 0), (0.04, 1), (0.56, 1), (0.57, 2), (0.71, 3)]),
    ],
)
def test_sample(kwargs: dict[str, float], bounds: list[tuple[float, int]]) -> None:
    for u, token in bounds:
        assert _sample(LOGITS, u, **kwargs) == token, (u, kwargs)


def test_sample_keeps_equals() -> None:
    assert {_sample([1.0, 2.0, 2.0, 0.0], u, top_k=1) for u in (0.1, 0.9)} == {1, 2}
    assert {_sample([1.0, 2.0, 2.0, 0.0], u, top_p=0.1) for u in (0.1, 0.9)} == {1, 2}
    assert _sample([1.0, 2.0, 2.0], 0.9, temperature=0.0) == 1


def test_argmax_and_logprobs() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, float("-inf")]])
    assert ops.argmax(logits).tolist() == [1, 0]
    ids = torch.tensor([[2, 0], [2, 3]], dtype=torch.int32)
    logprobs, rank = ops.selected_logprobs(logits, ids)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, ids.long()))
    assert rank.tolist() == [1, 2]
