# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Kinds of tokens, and the layout of a sequence: one record per token."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Kind(IntEnum):
    """What a token stands for. The first five are inputs, the rest are queries."""

    GOAL = 0
    LANGUAGE = 1
    STATE = 2
    IMAGE = 3
    FLOW = 4
    ACTION = 5
    FUTURE = 6
    PROGRESS = 7


KINDS = tuple(Kind)  # a compiler cannot iterate over an enum
QUERIES = tuple(kind for kind in KINDS if kind >= Kind.FLOW)


@dataclass(frozen=True)
class TokenLayout:
    """One record per token of a sequence of S tokens; all tensors are int64 of shape `(S,)`.

    Attributes:
        kind: [`Kind`] of the token.
        frame: Index of its frame in the window, 0 is the oldest; -1 for the goal.
        group: Index of its view for IMAGE and FUTURE tokens; 0 otherwise.
        rank: Position inside its own group and frame.
        members: Positions of the tokens of each (kind, group), frame by frame in order of rank.
    """

    kind: Tensor
    frame: Tensor
    group: Tensor
    rank: Tensor
    members: dict[tuple[int, int], Tensor]

    @classmethod
    def from_records(cls, records: list[tuple[int, int, int, int]], device=None) -> "TokenLayout":
        """From one (kind, frame, group, rank) per token, in the order of the sequence.

        Positions are found here once: searching a tensor would make every forward pass wait for the GPU.
        """
        members: dict[tuple[int, int], list[int]] = {}
        for position in sorted(range(len(records)), key=lambda i: (records[i][1], records[i][3])):
            kind, _, group, _ = records[position]
            members.setdefault((int(kind), group), []).append(position)
        columns = torch.tensor(records, dtype=torch.int64).unbind(1)
        return cls(
            *(column.to(device) for column in columns),
            members={key: torch.tensor(found, device=device) for key, found in members.items()},
        )

    def __len__(self) -> int:
        return self.kind.numel()

    def positions(self, kind: Kind, group: int = 0) -> Tensor:
        """Positions of all tokens of a kind and view, frame by frame in order of rank: int64 `(tokens,)`."""
        return self.members.get((int(kind), group), self.kind[:0])
