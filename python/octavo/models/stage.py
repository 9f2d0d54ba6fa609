"""Stage: a range of a model's layers, as a pipeline splits them over devices."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octavo.errors import ModelLoadError
from octavo.models.config import ModelConfig

# A layer's number comes before those of its own parts, such as experts.
_LAYER = re.compile(r"(?:^|\.)(?:blk|blocks|h|layers)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers ``layers`` of a model, whose input is what the stage before has computed.

    The first stage also embeds; the last has the final norm and the output head.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """True if its input is token ids."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """True if its output is what logits are computed from."""
        return self.index == self.count - 1

    def reads(self, name: str) -> bool:
        """False for a tensor of a layer that another stage computes, by its name in the files."""
        numbered = _LAYER.search(name) if self.count > 1 else None
        return numbered is None or int(numbered[1]) in self.layers


def whole(config: ModelConfig) -> Stage:
    """The only stage of a model that no pipeline splits."""
    return Stage(0, 1, range(config.num_layers))


def stages_of(config: ModelConfig, count: int) -> list[Stage]:
    """Stages whose largest has as few weights as any split allows, every one at least a layer.

    Raises:
        ModelLoadError: there are fewer layers than stages, or too many read what others keep.
    """
    num_layers, cuts = config.num_layers, _cuts(config)
    if count > len(cuts) + 1:
        why, most = "", "that many"
        if len(cuts) < num_layers - 1:
            why, most = ", of which some read what earlier ones keep", str(len(cuts) + 1)
        raise ModelLoadError(
            f"pipeline_parallel_size {count}: "
            f"the model has {num_layers} layers{why}; at most {most}"
        )
    table = config.vocab_size * config.hidden_size
    sizes = [_layer_weights(config, layer) for layer in range(num_layers)]
    sizes[0] += table + config.per_layer_vocab * config.per_layer_size * num_layers
    sizes[-1] += table
    # least[k][n]: the smallest possible largest stage of the first n layers in k stages, and where
    # the last of these begins.
    least: list[list[tuple[int, int]]] = [[(sum(sizes[:n]), 0) for n in range(num_layers + 1)]]
    for k in range(1, count):
        row = [(sum(sizes) + 1, 0)] * (k + 1)
        for n in range(k + 1, num_layers + 1):
            ways = ((max(least[k - 1][m][0], sum(sizes[m:n])), m) for m in cuts if k <= m < n)
            row.append(min(ways, default=row[0]))
        least.append(row)
    ranges, end = [], num_layers
    for k in reversed(range(count)):
        begin = least[k][end][1]
        ranges.append(range(begin, end))
        end = begin
    return [Stage(index, count, layers) for index, layers in enumerate(reversed(ranges))]


def _cuts(config: ModelConfig) -> list[int]:
    """The layers that a stage may begin with: none from there on reads what is kept before it."""
    sources = config.kv_sources or tuple(range(config.num_layers))
    return [m for m in range(1, config.num_layers) if min(sources[m:]) >= m]


def _layer_weights(config: ModelConfig, layer: int) -> int:
    """Elements of one layer's matrices."""
    d = config.hidden_size
    attention = 2 * d * (config.q_size + config.kv_size)
    if config.num_experts and (not config.moe_layers or config.moe_layers[layer]):
        return attention + 3 * d * config.moe_intermediate_size * config.num_experts
    return attention + 3 * d * config.intermediate_size
