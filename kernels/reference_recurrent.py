"""Ops of layers with a state in plain PyTorch: the definition of ``recurrent``'s, token by token.

As in ``reference``: nothing here is fast, arithmetic is float32, results are rounded once. T token
rows, R requests, N rows of states.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .recurrent import RecurrentOps, Steps


def _requests(steps: Steps) -> Iterator[tuple[int, int, int, bool]]:
    """Each request that has tokens: its state's row, its token rows, and whether it begins."""
    slots, seq_lens = steps.slots.tolist(), steps.seq_lens.tolist()
    starts = steps.query_start_loc.tolist()
    for r, (slot, seq_len) in enumerate(zip(slots, seq_lens, strict=True)):
        begin, end = starts[r], starts[r + 1]
        if seq_len > 0 and end > begin:
            yield slot, begin, end, seq_len == end - begin


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    steps: Steps,
    *,
    activation: str = "",
) -> Tensor:
    """Each channel of x [T, C] convolved with its own taps, weight [C, K]: [T, C] in x's dtype.

    A token sees itself and the K - 1 tokens before it, of its request; bias [C]. activation: "" or
    "silu". state [N, C, K - 1]: the last inputs, the oldest first, in x's dtype. x may be a slice
    of wider rows.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot, begin, end, begins in _requests(steps):
        before = torch.zeros_like(state[slot]) if begins else state[slot]
        inputs = torch.cat([before.float(), x[begin:end].float().T], 1)  # [C, K - 1 + tokens]
        windows = inputs.unfold(1, weight.shape[1], 1)  # [C, tokens, K]
        y = (windows * weight.float()[:, None]).sum(-1).T
        out[begin:end] = y if bias is None else y + bias.float()
        state[slot] = inputs[:, inputs.shape[1] - state.shape[2] :].to(state.dtype)
    if activation == "silu":
        out = out * torch.sigmoid(out)
    return out.to(x.dtype)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, steps: Steps
) -> Tensor:
    """c * causal_conv(b * v), of x [T, 3C] = (b, c, v): [T, C]. weight [C, K], state [N, C, K - 1].

    What is convolved is rounded to x's dtype.
    """
    b, c, v = x.chunk(3, -1)
    y = causal_conv((b.float() * v.float()).to(x.dtype), weight, bias, state, steps)
    return (c.float() * y.float()).to(x.dtype)


def gated_delta_rule(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    steps: Steps,
    *,
    num_key_heads: int,
    beta_scale: float = 1.0,
) -> Tensor:
    """Gated delta rule (Yang et al., arXiv:2412.06464): [T, Hv * Dv] in qkv's dtype.

    qkv [T, 2 Hk Dk + Hv Dv]: queries and keys of Hk heads, of which each serves Hv / Hk values'.
    They are divided by their lengths, queries by sqrt(Dk) on top. a, b [T, Hv]; decay and dt_bias
    float32 [Hv]. state float32 [N, Hv, Dk, Dv] is for each token, with
    g = decay * softplus(a + dt_bias) and beta = beta_scale * sigmoid(b)::

        state = exp(g) * state
        state = state + k outer beta * (v - k state)
        out = q state

    a [T, Hv Dk] and dt_bias [Hv Dk] give each row of a state a g of its own: Kimi's delta attention
    (arXiv:2510.26692).
    """
    _, num_heads, dk, dv = state.shape
    q, k, v = qkv.float().split_with_sizes(
        [num_key_heads * dk, num_key_heads * dk, num_heads * dv], -1
    )

    def unit(x: Tensor) -> Tensor:
        heads = x.view(-1, num_key_heads, dk)
        heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)
        return heads.repeat_interleave(num_heads // num_key_heads, 1)

    q, k, v = unit(q) * dk**-0.5, unit(k), v.reshape(-1, num_heads, dv)
    # [T, Hv, Dk or 1]
    step = softplus(a.float() + dt_bias).view(len(a), num_heads, -1)
    keep = torch.exp(decay[:, None] * step)
    beta = beta_scale * torch.sigmoid(b.float())
    out = torch.zeros(v.shape, dtype=torch.float32, device=qkv.device)
    for slot, begin, end, begins in _requests(steps):
        s = torch.zeros_like(state[slot]) if begins else state[slot].clone()
        for t in range(begin, end):
            s = s * keep[t, :, :, None]
            change = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], s))
            s = s + k[t, :, :, None] * change[:, None, :]
            out[t] = torch.einsum("hk,hkv->hv", q[t], s)
        state[slot] = s
    return out.view(-1, num_heads * dv).to(qkv.dtype)


def selective_scan(
    xbc: Tensor,
    dt: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    state: Tensor,
    steps: Steps,
    *,
    num_groups: int,
    dt_limits: tuple[float, float],
) -> Tensor:
    """Mamba's state space (Dao and Gu, arXiv:2405.21060): [T, H * P] in xbc's dtype.

    xbc [T, H P + 2 G S]: inputs x of H heads, then what writes to (B) and reads from (C) the state,
    of G groups of heads. dt [T, H]; decay, dt_bias and skip float32 [H]. state float32 [N, H, P, S]
    is for each token, with d = softplus(dt + dt_bias) within dt_limits::

        state = exp(d * decay) * state + d * x outer B
        out = state C + skip * x

    decay may be [H, S], each column's: with P = 1 that is the first form (arXiv:2312.00752), whose
    heads are channels.
    """
    _, num_heads, p, size = state.shape
    x, b, c = xbc.float().split_with_sizes(
        [num_heads * p, num_groups * size, num_groups * size], -1
    )
    x = x.reshape(-1, num_heads, p)
    b, c = (
        t.reshape(-1, num_groups, size).repeat_interleave(num_heads // num_groups, 1)
        for t in (b, c)
    )
    d = softplus(dt.float() + dt_bias).clamp(*dt_limits)
    # [T, H, S or 1]
    keep = torch.exp(d[:, :, None] * decay.view(num_heads, -1))
    out = x * skip[:, None]
    for slot, begin, end, begins in _requests(steps):
        s = torch.zeros_like(state[slot]) if begins else state[slot].clone()
        for t in range(begin, end):
            s = keep[t, :, None] * s + (d[t, :, None] * x[t])[:, :, None] * b[t, :, None, :]
            out[t] += torch.einsum("hps,hs->hp", s, c[t])
        state[slot] = s
    return out.view(-1, num_heads * p).to(xbc.dtype)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, group_size: int, gate_first: bool
) -> Tensor:
    """RMSNorm of groups of x's channels, times silu(gate) before it or after it: [T, C].

    x [T, C]; gate [T, C], maybe a slice of wider rows; weight [C], or [group_size] for all groups.
    """
    h: Tensor = x.float()
    g: Tensor = gate.float()
    g = g * torch.sigmoid(g)
    if gate_first:
        h = h * g
    groups = h.reshape(h.shape[0], -1, group_size)
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y: Tensor = (groups * weight.float().view(-1, group_size)).view(x.shape)
    return (y if gate_first else y * g).to(x.dtype)


def copy_rows(states: Tensor, rows: Tensor) -> None:
    """Copy rows of states [L, N, ...] in every layer.

    rows int32 [2 * copies]: those that are read, then those that are written, none of them read.
    """
    source, target = rows.long().view(2, -1)
    states[:, target] = states[:, source]


RECURRENT_OPS = RecurrentOps(
    causal_conv=causal_conv,
    short_conv=short_conv,
    gated_delta_rule=gated_delta_rule,
    selective_scan=selective_scan,
    gated_norm=gated_norm,
    copy_rows=copy_rows,
)
