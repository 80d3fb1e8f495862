"""Causal attention of whole sequences, or of the documents packed into them, and what computes it.

    whole sequences                      PyTorch's scaled_dot_product_attention
    documents, 16-bit on a GPU           variable-length flash attention over all documents at once
    documents, anything else             scaled_dot_product_attention of one document after another, those of one length at once
    tokens that follow a cache           scaled_dot_product_attention over the keys held, masked by how many each sequence has

In training no [sequence, sequence] mask is made: flash attention refuses one, and at 8192 tokens it is larger than all else of the layer. Where
ranks split sequences: `model.split_attention`.
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from model.batch import Bounds
from model.cache import ROOM, KeysValues


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Bounds | None) -> Tensor:
    """query [sequence, batch, heads, D]; key, value [sequence, batch, kv_heads, D], kv_heads dividing heads -> query's shape.

    documents: no token sees another document than its own; None: it sees all before it.
    """
    grouped = query.shape[2] != key.shape[2]
    if documents is None:
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped).permute(2, 0, 1, 3)
    batch = query.shape[1]
    # [tokens, heads, D], sequence after sequence
    query, key, value = (each.transpose(0, 1).flatten(0, 1) for each in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        starts, longest = documents.starts, max(documents.lengths)
        out = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
        assert isinstance(out, Tensor)
    else:
        # Documents of one length that follow one another are a batch, [documents, heads, tokens, D].
        runs = [(length, len(list(alike))) for length, alike in groupby(documents.lengths)]
        sizes = [length * count for length, count in runs]
        outs = []
        for (length, _), pieces in zip(runs, zip(*(each.split(sizes) for each in (query, key, value)), strict=True), strict=True):
            q, k, v = (piece.unflatten(0, (-1, length)).transpose(1, 2) for piece in pieces)
            outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(0, 1))
        out = torch.cat(outs)
    return out.unflatten(0, (batch, -1)).transpose(0, 1)


def cached_attention(query: Tensor, key: Tensor, value: Tensor, held: KeysValues, lengths: Tensor, *, singly: bool = False) -> Tensor:
    """Attention of tokens that follow the `lengths` [batch] ones whose keys and values are held; theirs are added. Shapes as `causal_attention`.

    singly: one call for each token, as if it came alone.
    """
    places = lengths[:, None] + torch.arange(len(query), device=query.device)  # [batch, sequence]
    held.add(key, value, places)
    some = 1 if singly else len(query)
    outs = []
    for queries, ends in zip(query.split(some), places.split(some, dim=1), strict=True):
        seen = -(-(int(ends.max()) + 1) // ROOM) * ROOM
        visible = torch.arange(seen, device=query.device) <= ends.unsqueeze(-1)  # [batch, some, seen]
        out = scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3).contiguous(),
            held.keys[:, :seen].transpose(1, 2),
            held.values[:, :seen].transpose(1, 2),
            attn_mask=visible.unsqueeze(1),
            enable_gqa=query.shape[2] != key.shape[2],
        )
        outs.append(out.permute(2, 0, 1, 3))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
