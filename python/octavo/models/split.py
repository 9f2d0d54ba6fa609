"""check_split: refuses shards that a model's heads, states or experts cannot be divided among."""

from __future__ import annotations

from octavo.errors import ModelLoadError
from octavo.models.config import ModelConfig


def check_split(config: ModelConfig, size: int, *, whole_experts: bool = False) -> None:
    """Refuse a model that cannot be split over ``size`` ranks.

    Raises:
        ModelLoadError: with the numbers, and sizes that would do.
    """
    pairs = {}
    if any(config.kv_layers):
        kv_heads = {shape.num_heads for shape in config.cache_shapes} or {config.num_kv_heads}
        for num_kv_heads in sorted(kv_heads):
            words = f"heads and {num_kv_heads} key-value heads"
            pairs[words] = (config.num_heads, num_kv_heads)
    state = config.state if any(config.state_layers) else None
    # A head of one row is a channel, and channels are divided anywhere.
    if state is not None and state.recurrent is not None and state.recurrent[1] > 1:
        pairs[f"heads of states in {state.groups} groups"] = (state.recurrent[0], state.groups)
    most = max((heads for heads, _ in pairs.values()), default=config.hidden_size)
    fits = [
        n
        for n in range(1, most + 1)
        if all(_divides(heads, groups, n) for heads, groups in pairs.values())
    ]
    if size not in fits:
        numbers = ", ".join(f"{heads} {words}" for words, (heads, _) in pairs.items())
        raise ModelLoadError(
            f"tensor_parallel_size {size}: {numbers} do not divide by it; "
            f"these would: {', '.join(map(str, fits))}"
        )
    if whole_experts and 0 < config.num_experts < size:
        raise ModelLoadError(
            f"tensor_parallel_size {size}: {config.num_experts} experts are fewer than the GPUs; "
            "without enable_expert_parallel each expert is split"
        )


def _divides(heads: int, groups: int, size: int) -> bool:
    """True if each rank has as many heads, and whole groups of them or heads of one group."""
    return heads % size == 0 and (groups % size == 0 or size % groups == 0)
