"""Every op in plain PyTorch: the definition the Triton and the Rust kernels are tested against.

Nothing here is fast. Arithmetic is float32 whatever the inputs' dtype, and results are rounded once
at the end. Shapes: T token rows, D hidden, N x K a weight, R requests, S sampled rows, V
vocabulary. Index tensors are int32. A KV cache is [num_blocks, num_kv_heads, block_size, head_dim],
laid out as ``kv_cache`` does.

Longer than other files: every op is defined here, and found here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import slots as columns
from .formats.dense import DENSE_FORMATS
from .kv_cache import read_blocks, store_rows
from .opset import OpSet
from .reference_recurrent import RECURRENT_OPS
from .routing import Routing
from .shared_prefixes import SharedPrefixes
from .weights import (
    ExpertBiases,
    Experts,
    Norm,
    Stored,
    Weight,
    dense,
    has_gate,
    stacked_shape,
)

# ---------------------------------------------------------------------------------------- weights


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gate: str = "",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate(norm(x) W^T + bias) of a dense weight [N, K]; see Weight.linear.

    What a separate norm would have written is rounded to x's dtype here too.
    """
    if norm is not None:
        x = _rms(x, norm.weight, norm.eps, norm.weight_offset).to(x.dtype)
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if gate:
        y = gated_activation(y.to(x.dtype), gate)
    if residual is not None:
        return (residual.float() + y.float()).to(residual.dtype)
    return y.to(out_dtype or x.dtype)


def sum_of_ranks(parts: Sequence[Tensor]) -> Tensor:
    """The ranks' tensors added in their order, in their dtype."""
    total = parts[0].float().clone()
    for part in parts[1:]:
        total += part.float()
    return total.to(parts[0].dtype)


def embedding(
    ids: Tensor, weight: Tensor, *, scale: float = 1.0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Rows ``ids`` [T] of a dense weight [V, D], times scale: [T, D] in out_dtype or its dtype."""
    return (weight[ids.long()].float() * scale).to(out_dtype or weight.dtype)


class DenseWeight(Weight):
    """A dense weight; quantized ones are dequantized to their planes' dtype."""

    __slots__ = ("format", "nbytes", "shape", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.format = DENSE_FORMATS[tensor.dtype]
        self.nbytes = tensor.nbytes

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        gate: str = "",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return linear(
            x, self.tensor, bias, norm=norm, gate=gate, residual=residual, out_dtype=out_dtype
        )

    def rows(self, ids: Tensor, scale: float = 1.0, out_dtype: torch.dtype | None = None) -> Tensor:
        return embedding(ids, self.tensor, scale=scale, out_dtype=out_dtype)

    def dequantize(self) -> Tensor:
        return self.tensor.float()


def prepare(parts: Sequence[Stored], *, exact: bool = False) -> DenseWeight:
    """A weight of one part, or of several stacked along N (a fused QKV).

    exact: quantized weights meet float activations instead of int8 ones; always so here.

    Raises:
        ValueError: parts that do not stack.
    """
    return DenseWeight(stack_dense(parts))


def stack_dense(parts: Sequence[Stored]) -> Tensor:
    """Parts stacked along N as one dense tensor.

    Raises:
        ValueError: parts that do not stack.
    """
    stacked_shape(parts)
    tensors = [dense(part) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


# ------------------------------------------------------------------------------------------ norms


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [T, D] over its root mean square, times (weight + weight_offset).

    residual [T, D]: the sum x + residual, rounded to x's dtype, is normed and returned as well. A
    kernel may write that sum into ``residual``; callers use the returned one.
    """
    if residual is not None:
        x = (x.float() + residual.float()).to(x.dtype)
    y = _rms(x, weight, eps, weight_offset).to(x.dtype)
    return y if residual is None else (y, x)


def _rms(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    x = x.float()
    return (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.float() + weight_offset)
    )


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [T, D] less its mean, over its deviation, times weight, plus bias; residual as rms_norm."""
    if residual is not None:
        x = (x.float() + residual.float()).to(x.dtype)
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()
    y = (h if bias is None else h + bias.float()).to(x.dtype)
    return y if residual is None else (y, x)


# ------------------------------------------------------------------------------------ activations


def activation(x: Tensor, kind: str) -> Tensor:
    """Elementwise, any shape. kind: silu, gelu, gelu_tanh, gelu_new (the same), relu, relu2.

    Raises:
        ValueError: another kind.
    """
    return _activate(x.float(), kind).to(x.dtype)


def _activate(h: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return h * torch.sigmoid(h)
    if kind == "gelu":
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    if kind in ("gelu_tanh", "gelu_new"):
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    if kind == "relu":
        return h.clamp(min=0)
    if kind == "relu2":
        return h.clamp(min=0).square()
    raise ValueError(f"unknown activation {kind!r}")


# gpt-oss's bound of what its gate takes, and the gain of its sigmoid (swiglu_limit, swiglu_alpha).
_CLAMP, _CLAMPED_GAIN = 7.0, 1.702


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """x [T, 2F] -> act(first half) * second half: [T, F]. kind: silu, gelu, gelu_tanh, or
    swiglu_clamped: gpt-oss's, which bounds both halves and adds 1 to the second.
    """
    if kind not in ("silu", "gelu", "gelu_tanh", "swiglu_clamped"):
        raise ValueError(f"unknown gated activation {kind!r}")
    gate, up = x.float().chunk(2, -1)
    if kind == "swiglu_clamped":
        gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
        return (gate * torch.sigmoid(_CLAMPED_GAIN * gate) * (up + 1)).to(x.dtype)
    return (_activate(gate, kind) * up).to(x.dtype)


# -------------------------------------------------------------------------------------- attention


def qk_norm_rope_store_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Split qkv [T, (Hq + 2 Hkv) Dh], norm and rotate q and k, store k and v: q [T, Hq, Dh].

    positions [T]; cos_sin float32 [max_pos, rot], cos in the first rot / 2 columns, then sin; the
    first rot of a head's Dh elements turn. interleaved: pairs are (0, 1), (2, 3), ...; else
    element i goes with i + rot / 2. q_norm, k_norm [Dh]: rms_norm of each head before rotation.
    slot_mapping [T]: block * block_size + offset in the caches; -1: the row is not stored.
    kv_scales float32 [2, Hkv]: of keys and values in a cache of bytes; None: of each row its own.
    """
    tokens = qkv.shape[0]
    heads = qkv.float().view(tokens, num_heads + 2 * num_kv_heads, head_dim)
    q = heads[:, :num_heads]
    k = heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    if q_norm is not None:
        q = _rms(q, q_norm, eps, weight_offset)
    if k_norm is not None:
        k = _rms(k, k_norm, eps, weight_offset)
    table = cos_sin[positions.long()][:, None, :]  # [T, 1, rot]
    q, k = rotate(q, table, interleaved), rotate(k, table, interleaved)

    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    block, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    scales = (None, None) if kv_scales is None else kv_scales
    store_rows(k_cache, block, offset, k[stored], scales[0])
    store_rows(v_cache, block, offset, v[stored], scales[1])
    return q.to(qkv.dtype)


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, Dh] with its first rot elements turned by table [T, 1, rot], as above."""
    rot = table.shape[-1]
    cos, sin = table.float().chunk(2, -1)
    head, rest = x[..., :rot], x[..., rot:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    shared: SharedPrefixes | None = None,
) -> Tensor:
    """Attention of q [T, Hq, Dh] over the blocks of R requests: [T, Hq * Dh] in q's dtype.

    Request r's queries are rows query_start_loc[r] to query_start_loc[r + 1], the last ones of its
    seq_lens[r] tokens, which are all in the cache; its blocks are block_table[slots[r]]. Query head
    h reads KV head h // (Hq / Hkv). sliding_window w > 0: a query sees itself and w - 1 tokens
    before it, and if not causal as many after it. softcap c > 0: scores become c * tanh(score / c).
    causal=False: every query sees the whole request. sinks float32 [Hq]: every query's softmax has
    one score more, its head's, which no value belongs to. slopes float32 [Hq]: scores fall by a
    head's slope for each token between query and key (ALiBi). num_decodes (leading requests with
    one query), max_query_len and max_seq_len are hints for the kernels' grids; shared tells them
    which of these requests begin with the same blocks. Rows of no request are zero here and
    undefined in the kernels.
    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    out = torch.zeros(tokens, num_heads, head_dim, dtype=torch.float32, device=q.device)
    for r in range(slots.shape[0]):
        start, end = int(query_start_loc[r]), int(query_start_loc[r + 1])
        seq_len = int(seq_lens[r])
        if start == end or seq_len == 0:
            continue
        blocks = block_table[int(slots[r]), : -(-seq_len // block_size)].long()
        # [blocks, Hkv, block_size, Dh] -> [Hkv, seq_len, Dh] -> [Hq, seq_len, Dh]
        k, v = (
            read_blocks(c, blocks)
            .transpose(0, 1)
            .reshape(num_kv_heads, -1, head_dim)[:, :seq_len]
            .repeat_interleave(num_heads // num_kv_heads, 0)
            for c in (k_cache, v_cache)
        )
        scores = q[start:end].float().transpose(0, 1) @ k.transpose(1, 2) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        row = torch.arange(seq_len - (end - start), seq_len, device=q.device)[:, None]
        col = torch.arange(seq_len, device=q.device)[None, :]
        if slopes is not None:
            scores = scores + slopes.float()[:, None, None] * (col - row)
        hidden = torch.zeros_like(row + col, dtype=torch.bool)
        if causal:
            hidden |= col > row
        if sliding_window > 0:
            hidden |= (row - col).abs() >= sliding_window
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(num_heads, end - start, 1)
            scores = torch.cat([scores, sink], -1)
        probs = scores.softmax(-1)[..., :seq_len]
        out[start:end] = (probs @ v).transpose(0, 1)
    return out.reshape(tokens, num_heads * head_dim).to(q.dtype)


def store_latent(rows: Tensor, slot_mapping: Tensor, cache: Tensor) -> None:
    """Store rows [T, D] in a cache [num_blocks, 1, block_size, D] that is keys and values in one.

    slot_mapping [T]: block * block_size + offset; -1: the row is not stored.
    """
    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    block, offset = slots // cache.shape[2], slots % cache.shape[2]
    store_rows(cache, block, offset, rows[stored].float()[:, None])


def latent_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    value_dim: int,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
) -> Tensor:
    """Attention of q [T, Hq, D] over rows that all heads share: [T, Hq, value_dim] in q's dtype.

    A row of the cache [num_blocks, 1, block_size, D] is a key, and its last value_dim elements are
    the value: DeepSeek's latent attention (arXiv 2405.04434), its projections absorbed. The rest is
    as in paged_attention.
    """
    tokens, num_heads, dim = q.shape
    out = paged_attention(
        q,
        cache,
        cache,
        block_table,
        slots,
        seq_lens,
        query_start_loc,
        scale=scale,
        num_decodes=num_decodes,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )
    return out.view(tokens, num_heads, dim)[..., dim - value_dim :]


# ------------------------------------------------------------------------------------------- moe


def moe(
    x: Tensor,
    router_logits: Tensor,
    w13: Tensor,
    w2: Tensor,
    routing: Routing,
    *,
    biases: ExpertBiases | None = None,
    kind: str = "silu",
    first: int = 0,
) -> Tensor:
    """Mixture of E MLPs: each row of x [T, D] goes to the experts that routing chooses.

    router_logits [T, E]; w13 [E, 2F, D] (gate rows, then up rows), or [E, F, D] without a gate, and
    w2 [E, D, F]. Returns [T, D]. Of fewer experts than the router has, ``first`` is the number of
    the first: what is chosen of the others adds nothing.
    """
    probs, experts = routing.choose(router_logits)
    act = gated_activation if has_gate(w13.shape[1], w2.shape[2]) else activation
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(len(w13)):
        rows, which = (experts == first + e).nonzero(as_tuple=True)
        if rows.numel():
            gate_up, down = (None, None) if biases is None else (biases.gate_up[e], biases.down[e])
            hidden = act(linear(x[rows].float(), w13[e], gate_up), kind)
            out.index_add_(0, rows, linear(hidden, w2[e], down) * probs[rows, which, None])
    return out.to(x.dtype)


class DenseExperts(Experts):
    """w13 [E, 2F, D], or [E, F, D] without a gate, and w2 [E, D, F], both dense."""

    __slots__ = ("biases", "num_elements", "w2", "w13")

    def __init__(
        self,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        biases: ExpertBiases | None = None,
    ) -> None:
        self.biases = biases
        self.w13 = torch.stack([stack_dense(parts) for parts in gate_up])
        self.w2 = torch.stack([dense(part) for part in down])
        self.num_elements = self.w13.numel() + self.w2.numel()

    def mix(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        *,
        kind: str = "silu",
        first: int = 0,
    ) -> Tensor:
        return moe(
            x,
            router_logits,
            self.w13,
            self.w2,
            routing,
            biases=self.biases,
            kind=kind,
            first=first,
        )


def prepare_experts(
    gate_up: Sequence[Sequence[Stored]],
    down: Sequence[Stored],
    *,
    biases: ExpertBiases | None = None,
    exact: bool = False,
) -> DenseExperts:
    """Experts of each one's gate and up parts [F, D], and of each one's down part [D, F]."""
    return DenseExperts(gate_up, down, biases)


# --------------------------------------------------------------------------------------- sampling


def adjust_logits(
    logits: Tensor,
    *,
    bias: Tensor,
    allowed: Tensor,
    generated: Tensor,
    in_prompt: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> Tensor:
    """logits [S, V] + bias, only of allowed ids, after the penalties: [S, V] in logits' dtype.

    bias [S, V], rounded in logits' dtype once added; allowed [S, V] bool: others become -inf.
    generated [S, V] int: how often a row has generated each id; in_prompt [S, V] bool. The three
    penalties are [S]: a positive logit of an id that was generated or is in the prompt is divided
    by the repetition penalty, a negative one multiplied with it; an id that was generated n times
    loses n times the frequency penalty, and once the presence penalty.
    """
    z = (logits.float() + bias).to(logits.dtype).float()
    z = torch.where(allowed, z, -math.inf)
    repetition = repetition_penalty[:, None]
    repeated = torch.where(z > 0, z / repetition, z * repetition)
    z = torch.where(in_prompt | (generated > 0), repeated, z)
    z = z - generated * frequency_penalty[:, None] - (generated > 0) * presence_penalty[:, None]
    return z.to(logits.dtype)


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    """logits [S, V], -inf where a mask does not hold the token: [S, V].

    rows [M]: the row that each mask is of, below 0 for none. masks [M, ceil(V / 32)]: token i is
    bit i % 32 of word i // 32.
    """
    out = logits.clone()
    for row, mask in zip(rows.tolist(), masks, strict=True):
        if row >= 0:
            bits = (mask[:, None] >> torch.arange(32, device=mask.device)) & 1
            out[row, bits.flatten()[: logits.shape[1]] == 0] = -math.inf
    return out


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """One token per row of logits [S, V] float32: int32 [S].

    temperature [S]: 0 is greedy (the first of equal maxima). The rest applies in this order to
    softmax(logits / temperature), each to what the one before left, renormalized:
    min_p [S]: keeps probabilities of at least min_p times the largest; 0: off.
    top_k [S] int32: keeps the k largest and their equals; 0 or below: off.
    top_p [S]: keeps a token if those strictly more likely sum to less than top_p; 1 or above: off.
    uniform [S] in [0, 1): the token is the first, in vocabulary order, at which the running sum of
    the kept probabilities exceeds uniform times their total.
    """
    out = logits.argmax(-1)
    for s in range(logits.shape[0]):
        if temperature[s] <= 0:
            continue
        probs = (logits[s].double() / temperature[s].double()).softmax(-1)
        probs[probs < min_p[s].double() * probs.max()] = 0
        k = int(top_k[s])
        if 0 < k < probs.numel():
            probs[probs < probs.topk(k).values[-1]] = 0
        if top_p[s] < 1:
            ordered = (probs / probs.sum()).sort(descending=True).values
            # Mass of what is strictly more likely: equals share the sum before the first of them.
            before = ordered.cumsum(0) - ordered
            first = torch.searchsorted(-ordered, -(probs / probs.sum()))
            probs[before[first] >= max(float(top_p[s]), 1e-12)] = 0
        running = probs.cumsum(0)
        index = torch.searchsorted(running, uniform[s].double() * running[-1], right=True)
        # Rounding may put the target at the very end: the last kept token then.
        out[s] = min(int(index), int(probs.nonzero()[-1]))
    return out.to(torch.int32)


def argmax(logits: Tensor) -> Tensor:
    """The first index of each row's maximum, of logits [S, V] float32: int32 [S]."""
    return logits.argmax(-1).to(torch.int32)


def selected_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax(logits [S, V] float32) at ids [S, C], and the rank of the first column's ids.

    Returns float32 [S, C] and int32 [S]; rank 1 is the largest logit, equals share the best rank.
    """
    index = ids.long()
    logprobs = logits.float().log_softmax(-1).gather(-1, index)
    rank = (logits > logits.gather(-1, index[:, :1])).sum(-1) + 1
    return logprobs, rank.to(torch.int32)


# ------------------------------------------------------------------------------ a step's buffers


def prepare_step(
    packed: Tensor,
    buffers: Mapping[str, Tensor],
    *,
    decode_rows: int,
    prefill_reqs: int,
    prefill_rows: int,
    shares: bool = False,
) -> None:
    """Spread a packed plan over the buffers, padded to a shape; see gpu/step.py for both.

    Rows and requests come as ``decode_rows`` decodes, then ``prefill_reqs`` requests of together
    ``prefill_rows`` tokens; the rest is padding: slot N - 1, sequence length 0, nothing stored.
    ``shares``: the plan, of decodes alone, names groups that share prefixes.
    """
    header, values = packed[:8].tolist(), iter(packed[8:].tolist())
    num_tokens, num_reqs, num_decodes, num_samples, num_updates, num_records, offset, _ = header

    def take(count: int) -> list[int]:
        return [next(values) for _ in range(count)]

    ids, positions, mapping = take(num_tokens), take(num_tokens), take(num_tokens)
    slots, seq_lens, starts = take(num_reqs), take(num_reqs), take(num_reqs + 1)
    sample_rows, sample_slots = take(num_reqs), take(num_reqs)
    places, blocks = take(num_updates), take(num_updates)
    if shares:
        groups = buffers["shared_groups"]
        groups.copy_(torch.tensor(take(groups.numel())).view_as(groups))
        for name in ("shared_members", "shared_tokens"):
            buffers[name][:decode_rows] = 0
            buffers[name][:num_reqs] = torch.tensor(take(num_reqs))
    table = buffers["slot_table"]
    spare = table.shape[0] - 1

    for row in range(decode_rows + prefill_rows):
        token = row if row < decode_rows else row - decode_rows + num_decodes
        used = token < (num_decodes if row < decode_rows else num_tokens)
        token_id = ids[token] if used else 0
        if token_id < 0:
            token_id = int(buffers["sampled_table"][slots[token], columns.LAST_TOKEN.index])
        buffers["input_ids"][row] = token_id
        buffers["positions"][row] = positions[token] if used else 0
        buffers["slot_mapping"][row] = mapping[token] if used else -1
    for place, block in zip(places, blocks, strict=True):
        buffers["block_table"].view(-1)[place] = block
    for n in range(num_records):
        begin = 8 + offset + n * columns.RECORD_LEN
        record = packed[begin : begin + columns.NUM_HOST_COLUMNS]
        table[int(record[columns.SLOT.index]), : columns.NUM_HOST_COLUMNS] = record

    def padded(row: int) -> int:
        return row if row < num_decodes else row - num_decodes + decode_rows

    total_reqs = decode_rows + prefill_reqs
    for r in range(total_reqs):
        req = r if r < decode_rows else r - decode_rows + num_decodes
        used = req < (num_decodes if r < decode_rows else num_reqs)
        buffers["slots"][r] = slots[req] if used else spare
        buffers["seq_lens"][r] = seq_lens[req] if used else 0
        begin = starts[req] if used else num_tokens
        buffers["query_start_loc"][r] = r if r < decode_rows else padded(begin)
        sampled = r < num_samples
        buffers["sample_rows"][r] = padded(sample_rows[r]) if sampled else 0
        buffers["sample_slots"][r] = sample_slots[r] if sampled else spare
        if sampled:
            state = table[sample_slots[r]]
            prompt = int(state[columns.NUM_PROMPT_TOKENS.index])
            state[columns.OUTPUT_POSITION.index] = positions[sample_rows[r]] + 1 - prompt
    buffers["query_start_loc"][total_reqs] = num_tokens - num_decodes + decode_rows


OPS = OpSet(
    prepare=prepare,
    prepare_experts=prepare_experts,
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    activation=activation,
    gated_activation=gated_activation,
    qk_norm_rope_store_kv=qk_norm_rope_store_kv,
    paged_attention=paged_attention,
    store_latent=store_latent,
    latent_attention=latent_attention,
    recurrent=RECURRENT_OPS,
)
