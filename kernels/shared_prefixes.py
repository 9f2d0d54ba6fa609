"""SharedPrefixes: which single queries of a step attend to the same leading blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Groups of a step; further requests attend alone.
MAX_GROUPS = 16
# The first of a group's members, their number, the tokens they share.
GROUP_FIELDS = 3


class SharedPrefixes(NamedTuple):
    """Groups of a batch of R single queries whose block tables begin alike, int32 on the device.

    A group attends to the shared tokens through its first member's table.
    """

    groups: Tensor  # [MAX_GROUPS, GROUP_FIELDS]; zeros where there are fewer
    members: Tensor  # [R]: rows, group by group
    tokens: Tensor  # [R]: leading tokens that a row's group attends to; 0: it is in none
