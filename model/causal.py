"""Causal attention of whole sequences, or of pieces of them, and what computes it.

    whole sequences                      PyTorch's scaled_dot_product_attention
    pieces, 16-bit on a GPU              variable-length flash attention over all pieces at once
    pieces, anything else                scaled_dot_product_attention of one piece after another

Pieces are the documents packed into a sequence, and what a rank has of one that ranks share (`model.batch.Bounds`). No [sequence, sequence] mask is
made: flash attention refuses one, and at 8192 tokens it is larger than all else of the layer.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from model.batch import Bounds


def causal_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds | None) -> Tensor:
    """query [sequence, batch, heads, D]; key, value [keys, batch, kv_heads, D], kv_heads dividing heads -> query's shape.

    The last query stands at the place of the last key. bounds: what queries see; None: all up to their own place, and there are as many.
    """
    grouped = query.shape[2] != key.shape[2]
    if bounds is None:
        whole = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=grouped).permute(2, 0, 1, 3)
    length, batch = query.shape[:2]
    query = query.transpose(0, 1).flatten(0, 1)  # [tokens, heads, D], sequence after sequence
    key, value = (_seen(each, length, bounds) for each in (key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        longest = max(bounds.queries), max(bounds.keys)
        # Causal from the last query and key on, as flash attention has it.
        out = varlen_attn(query, key, value, bounds.query_starts, bounds.key_starts, *longest, window_size=(-1, 0), enable_gqa=grouped)
        assert isinstance(out, Tensor)
    else:
        counts = bounds.queries, bounds.keys, bounds.keys
        pieces = zip(*(each.transpose(0, 1).split(n, dim=1) for each, n in zip((query, key, value), counts, strict=True)), strict=True)
        out = torch.cat([_piece(*piece, grouped) for piece in pieces], dim=1).transpose(0, 1)
    return out.unflatten(0, (batch, -1)).transpose(0, 1)


def _seen(x: Tensor, length: int, bounds: Bounds) -> Tensor:
    """x [keys, batch, heads, D] -> [tokens, heads, D]: of each sequence what its queries see, sequence after sequence."""
    if len(x) == length:
        return x.transpose(0, 1).flatten(0, 1)
    return torch.cat([x[len(x) - length - before :, row] for row, before in enumerate(bounds.before)])


def _piece(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> Tensor:
    """query [heads, tokens, D]; key, value [kv_heads, keys, D]."""
    queries, keys = query.shape[1], key.shape[1]
    mask = None
    if queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    # With a dimension for the batch, without which grouped heads are refused.
    parts = (each.unsqueeze(0) for each in (query, key, value))
    return scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)[0]
