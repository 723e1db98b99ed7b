"""A GPT-2 transformer block: attention and an MLP, each with a LayerNorm and a residual connection.

B: batch, T: tokens in a sequence, D: embedding_dim, H: n_heads. Source: Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners", section 2.3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gptdata.model.documents import Mask, flex_attention

NORM_EPS = 1e-5


class KeyValueCache:
    """The keys and values of the tokens so far in one Attention."""

    values: Tensor | None = None  # (2, B, H, n, D/H)

    @property
    def n(self) -> int:
        return 0 if self.values is None else self.values.shape[3]

    def extend(self, new: Tensor) -> Tensor:
        """Append keys and values of new tokens, (2, B, H, T, D/H), and return all so far."""
        self.values = new if self.values is None else torch.cat((self.values, new), dim=3)
        return self.values


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, D) → (B, T, D).

    With a `cache`, x has the tokens after the cached ones: all tokens of a prompt, then one at a time.
    A `mask` replaces the causal one; see documents.py.
    """

    def __init__(self, embedding_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.out = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, mask: Mask | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, D // self.n_heads)  # (B, T, 3, H, D/H)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            k, v = cache.extend(qkv[1:])  # each (B, H, n, D/H)
            assert T in (1, cache.n)  # is_causal compares positions from 0
        if mask is None or isinstance(mask, Tensor):
            is_causal = mask is None and (cache is None or cache.n == T)
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        else:
            x = flex_attention(q, k, v, mask)
        return self.out(x.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with GELU between them and a hidden width of 4 × D, (B, T, D) → (B, T, D)."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(embedding_dim, 4 * embedding_dim)
        self.contract = nn.Linear(4 * embedding_dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.expand(x), approximate="tanh")  # (B, T, 4D)
        return self.contract(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + dropout(attention(norm(x))), then the same with the MLP: (B, T, D) → (B, T, D)."""

    def __init__(self, embedding_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.attention = Attention(embedding_dim, n_heads, dropout)
        self.mlp_norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.mlp = MLP(embedding_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, mask: Mask | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]
