"""The KV-cache classifier: from the last layer's keys and values after prefill to one of the four switch
classes.

Legend: B rows, T prompt tokens (padded), D head dim, H kv heads (= groups = queries per group), K = 4
classes, J pairs.

A leaf: torch, safetensors and numpy only. An artefact is a folder with one
`classifier_{high}_{low}.safetensors` per pair and a `config.json` that says what they fit; a folder of
published `classifier_{high}_{low}.pt` state dicts loads too."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmpd.errors import UserError
from pmpd.schedulers.chain import NUM_CLASSES


def mask_of(lengths: Tensor, tokens: int) -> Tensor:
    """bool [B, T]: True where a token is part of the row. `lengths` int64 [B]."""
    return torch.arange(tokens, device=lengths.device)[None, :] < lengths[:, None]


class KVCacheClassifier(nn.Module):
    """Learned queries attend over the cached tokens; a two-layer head reads the result.

    H groups of H queries attend over T (scaled dot product, dropout on the weights); the attended values are
    averaged within each group, concatenated to H·D, layer-normed, Linear(H·D, H·D), ReLU, Linear(H·D, 4).
    Returns logits, never probabilities: a softmax before the cross-entropy would flatten its gradient.

    `generator`: draws the initial weights; None = the process-wide one, which other threads may be drawing
    from.
    """

    generator: torch.Generator | None = None
    """Draws the dropout."""

    def __init__(
        self, dim: int, num_heads: int, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"dim {dim}, num_heads {num_heads}, dropout {dropout}: dim and heads >= 1, 0 <= dropout < 1"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.dropout = dropout
        width = num_heads * dim
        self.queries = nn.Parameter(torch.empty(num_heads, num_heads, dim))
        nn.init.xavier_normal_(self.queries, generator=generator)
        self.norm = nn.LayerNorm(width)
        self.hidden = _linear(width, width, generator)
        self.head = _linear(width, NUM_CLASSES, generator)

    def forward(self, keys_BTD: Tensor, values_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits float32 [B, 4]. Tokens at or after `lengths_B` count for nothing."""
        batch, tokens, dim = keys_BTD.shape
        if dim != self.dim:
            raise UserError(
                f"KV features of head dim {dim}: this classifier reads head dim {self.dim}; it belongs to "
                f"another model"
            )
        queries_QD = self.queries.reshape(-1, dim)
        scores_BQT = torch.matmul(queries_QD, keys_BTD.transpose(1, 2)) / math.sqrt(dim)
        scores_BQT = scores_BQT.masked_fill(~mask_of(lengths_B, tokens)[:, None, :], -math.inf)
        weights_BQT = scores_BQT.softmax(-1)
        if self.training and self.dropout > 0:
            kept = torch.empty_like(weights_BQT).bernoulli_(1 - self.dropout, generator=self.generator)
            weights_BQT = weights_BQT * kept.div_(1 - self.dropout)
        attended = (
            torch.matmul(weights_BQT, values_BTD).view(batch, self.num_heads, self.num_heads, dim).mean(2)
        )
        return self.head(F.relu(self.hidden(self.norm(attended.flatten(1)))))


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """`nn.Linear` with the initial weights it always has, drawn from `generator`."""
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(linear.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    return linear


class MeanPooledClassifier(nn.Module):
    """The simple head every result is compared with: one linear layer on the mean key and the mean value."""

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.head = _linear(2 * dim, NUM_CLASSES, generator)

    def forward(self, keys_BTD: Tensor, values_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits float32 [B, 4]."""
        mask_BT1 = mask_of(lengths_B, keys_BTD.shape[1])[:, :, None]
        pooled = (torch.cat([keys_BTD, values_BTD], dim=-1) * mask_BT1).sum(1) / lengths_B[:, None]
        return self.head(self.norm(pooled))
