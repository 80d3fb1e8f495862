"""The state-space recurrence of Mamba-2 ("state space duality", Dao and Gu, arXiv 2405.21060), in its chunked form.

Per head, with step dt_t > 0, decay exp(dt_t A), input x_t (P values), B_t and C_t (N values, the same in a group):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T            state, P x N
    y_t = h_t C_t + D x_t

Sequentially that is one small update after another. In chunks of Q tokens it is matrix products. With u = dt x and s
the running sum of dt A inside a chunk,

    within a chunk     y_i = sum_{j <= i} exp(s_i - s_j) (C_i . B_j) u_j
    across chunks      y_i += exp(s_i) C_i . (state at the start of the chunk)

and only the states go from chunk to chunk. C B^T is computed once per group and never repeated for its heads. Where
documents are packed, a pair (i, j) of different documents counts 0 and no state is carried across a boundary.

Where ranks split a sequence, the same once more: each finds what its tokens alone leave behind, a scan over the ranks (`parallel.context`) says
what the tokens before them left, and that, decayed, is added to the state at the start of every chunk; backward the other way round.

Exactness. Two places cost a plain fp32 version up to 1e-4:

1. s reaches hundreds within a chunk while the differences that matter are near 0. s is summed in fp64 and split into
   hi + lo; exp(hi_i - hi_j) is the Q x Q matrix, and exp(lo_i), exp(-lo_j) are factors on rows and columns, so the
   correction costs no pass over the matrix.
2. The gradient of log decay t is the sum over all pairs j < t <= i of G_ij, the pair's part of the loss gradient. The
   usual form, a reversed running sum of (row sums - column sums) of G, subtracts large numbers. Here prefix sums along
   j are added up over i: nothing cancels.

Trade-off: more FLOPs than the recurrence (about Q/2 instead of N per pair), but nearly all of them in matrix products.
Everything is fp32 (or fp64, for all arguments); the few numbers per token and head are fp64.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNKS = (16, 64)  # smallest and largest


class Between(Protocol):
    """What stands between these tokens and those before and after them: `parallel.context.Scan`, over ranks; `model.cache.MambaState`, over time."""

    def entering(self, added: Tensor, kept: Tensor) -> Tensor:
        """The state these tokens find. added: what they leave of themselves, [batch, groups, N, r, P]; kept broadcasts: the part of what they
        found that is left."""

    def returning(self, added: Tensor, kept: Tensor) -> Tensor:
        """The same back in time, of gradients."""


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    documents: Tensor | None = None,
    chunk_size: int,
    scan: Between | None = None,
    preceding: Tensor | None = None,
) -> Tensor:
    """The recurrence above, by whatever implementation suits the device: y, fp32 [batch, sequence, heads, P].

    x: [batch, sequence, heads, P]; dt: [batch, sequence, heads], positive; a: [heads], negative;
    b, c: [batch, sequence, groups, N]; d: [heads]. documents: int [batch, sequence], 0 or more and not decreasing along
    a sequence, or None for one document. Any sequence length, any strides. scan: these are a part of the tokens of longer sequences;
    preceding: int [batch], documents of the tokens right before them, with `documents`.
    """
    # The seam for GPU kernels (mamba_ssm's Triton scan): one would be chosen here. The chunked form runs everywhere.
    chunk = chunk_size if scan is None else min(chunk_size, x.shape[1])  # a single token that follows a cache is a chunk of one
    if x.device.type == "cpu":
        # Measured: the Q x Q part, memory-bound, balances the products with the states at about Q = P.
        smallest, largest = CPU_CHUNKS
        chunk = min(chunk, largest, max(smallest, x.shape[3]))
    return chunked(x.float(), dt.float(), a.float(), b.float(), c.float(), d.float(), documents, chunk, scan, preceding)


def chunked(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    documents: Tensor | None,
    chunk: int,
    scan: Between | None = None,
    preceding: Tensor | None = None,
) -> Tensor:
    """See `ssd`; all arguments fp32, or all fp64, and so the result."""
    padding = -x.shape[1] % chunk
    if padding:
        # Padded tokens have dt = 0: they add nothing and decay nothing; being of the last document, they let its state through.
        x, b, c = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, b, c))
        dt = torch.nn.functional.pad(dt, (0, 0, 0, padding))
        if documents is not None:
            documents = torch.cat((documents, documents[:, -1:].expand(-1, padding)), dim=1)
    y = _Chunked.apply(x, dt, a, b, c, d, documents, chunk, scan, preceding)
    return y[:, :-padding] if padding else y


# Two layouts of [batch, groups, ...] tensors below, with r heads per group and w standing for P or nothing:
#     by head     [batch, groups, r, chunks, Q, w]    for products over pairs of tokens
#     by token    [batch, groups, chunks, Q, r, w]    for products with the states, [batch, groups, chunks, N, r * P]


def _by_token(t: Tensor, groups: int, chunk: int) -> Tensor:
    """[batch, sequence, heads, ...] as a view by token."""
    return t.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).movedim(3, 1)


def _by_head(t: Tensor) -> Tensor:
    """A view by head of a tensor by token, [batch, groups, chunks, Q, r, ...]."""
    return t.movedim(4, 2)


def _factor(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, groups, r, chunks, Q] as a factor of a tensor by token."""
    return t.movedim(2, -1).unsqueeze(-1).to(dtype)


def _sequence(t: Tensor) -> Tensor:
    """By token, [batch, groups, chunks, Q, ...], back to a view [batch, sequence, groups, ...]."""
    return t.movedim(1, 3).flatten(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a * b as a contiguous tensor in the order of its dimensions, whatever the strides of a."""
    out = torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=a.dtype, device=a.device)
    return torch.mul(a, b, out=out)


def _scale_state(state: Tensor, kept: Tensor) -> Tensor:
    """state [batch, groups, N, r * P] times kept [batch, groups, r]."""
    return (state.unflatten(-1, (kept.shape[-1], -1)) * kept[:, :, None, :, None]).flatten(-2)


def _hand_on(states: Tensor, kept: Tensor, between: Callable[[Tensor, Tensor], Tensor] | None, *, back: bool = False) -> None:
    """What every chunk adds becomes, in place, what it finds: states [batch, groups, chunks, N, r * P], kept fp64 [batch, groups, r, chunks].

    between: of a Scan over ranks, or None. back: from the last chunk to the first.
    """
    state = torch.zeros_like(states[:, :, 0])
    factors = list(enumerate(kept.to(states.dtype).unbind(-1)))
    for index, factor in reversed(factors) if back else factors:
        after = _scale_state(state, factor).add_(states[:, :, index])
        states[:, :, index] = state
        state = after
    if between is not None:
        through = (kept.flip(-1) if back else kept).cumprod(-1).to(states.dtype)
        by_head = state.unflatten(-1, (kept.shape[2], -1))
        entering = between(by_head, through[:, :, None, :, -1:].contiguous())
        reached = torch.nn.functional.pad(through[..., :-1], (1, 0), value=1.0)
        reached = (reached.flip(-1) if back else reached).movedim(-1, 2)[:, :, :, None, :, None]
        states.unflatten(-1, by_head.shape[-2:]).addcmul_(entering.unsqueeze(2), reached)


def _later(t: Tensor) -> Tensor:
    """Sum of this and all later entries along the last dimension."""
    return t.flip(-1).cumsum(-1).flip(-1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        documents: Tensor | None,
        chunk: int,
        scan: Between | None,
        preceding: Tensor | None,
    ) -> Tensor:
        batch, length, heads, width = x.shape
        groups, dtype = b.shape[2], x.dtype
        per_group, chunks = heads // groups, length // chunk
        x = _by_token(x, groups, chunk)
        b, c = (t.unflatten(1, (-1, chunk)).movedim(3, 1).contiguous() for t in (b, c))  # [batch, groups, chunks, Q, N]
        d = d.view(groups, 1, 1, per_group, 1)
        steps = _by_head(_by_token(dt, groups, chunk)).double()
        a64 = a.double().view(groups, per_group, 1, 1)
        running = (steps * a64).cumsum(-1)
        rough = running.to(dtype)  # hi
        # exp(lo); lo is below 1 until |s| reaches 1e7, where nothing is left to weigh.
        fine = (running - rough).clamp(-1, 1).exp()

        visible = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
        from_start, to_end = running.exp(), (running[..., -1:] - running).exp()
        kept = running[..., -1].exp()  # [batch, groups, r, chunks]
        if documents is not None:
            documents = documents.unflatten(1, (-1, chunk))[:, None, None]  # [batch, 1, 1, chunks, Q]
            last = documents[..., -1]  # the document the state belongs to after each chunk
            before = torch.nn.functional.pad(last[..., :-1], (1, 0), value=-1)
            if preceding is not None:
                before[..., 0] = preceding[:, None, None]
            visible = visible & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
            from_start = from_start * (documents == before.unsqueeze(-1))
            to_end = to_end * (documents == last.unsqueeze(-1))
            kept = kept * (before == last)

        # Masked before the exponential, so that nothing overflows.
        decay = (rough.unsqueeze(-1) - rough.unsqueeze(-2)).masked_fill_(~visible, -torch.inf).exp_()
        pairs = c @ b.transpose(-1, -2)
        u = _product(_by_head(x), (steps / fine).to(dtype).unsqueeze(-1))
        within = (decay * pairs.unsqueeze(2)) @ u

        weighted = _product(x, _factor(steps * to_end, dtype)).flatten(4)
        states = b.transpose(-1, -2) @ weighted  # first what each chunk adds, then what it finds: [batch, groups, chunks, N, r * P]
        _hand_on(states, kept, None if scan is None else scan.entering)
        across = (c @ states).unflatten(-1, (per_group, width)).mul_(_factor(from_start, dtype))

        # Laid out as [sequence, batch, ...] in memory, as the layers around want it.
        y = torch.empty(chunks, chunk, batch, groups, per_group, width, dtype=dtype, device=x.device)
        by_token = y.permute(2, 3, 0, 1, 4, 5)
        torch.addcmul(across, x, d, out=by_token)
        by_token.addcmul_(within.movedim(2, 4), _factor(fine, dtype))
        ctx.scan = scan
        ctx.save_for_backward(x, steps, a64, b, c, d, decay, pairs, u, weighted, states, across, fine, from_start, to_end, kept)
        return y.flatten(0, 1).flatten(2, 3).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, steps, a64, b, c, d, decay, pairs, u, weighted, states, across, fine, from_start, to_end, kept = ctx.saved_tensors
        _, groups, _, chunk, per_group, width = x.shape
        dtype = dy.dtype
        dy = _by_token(dy, groups, chunk)

        # Within chunks.
        dy_head = _product(_by_head(dy), fine.to(dtype).unsqueeze(-1))
        du_head = (decay * pairs.unsqueeze(2)).transpose(-1, -2) @ dy_head
        weights = (dy_head @ u.transpose(-1, -2)).mul_(decay)
        dpairs = weights.sum(2)
        by_pair = weights.mul_(pairs.unsqueeze(2)).tril_(-1)  # G; a token's effect on itself does not decay
        crossed = by_pair.cumsum(-1).tril_(-1).sum(-2)[..., :-1]
        dlog = torch.nn.functional.pad(crossed, (1, 0)).double()

        # Across chunks: gradients of the states.
        dacross = _product(dy, _factor(from_start, dtype)).flatten(4)
        dstates = c.transpose(-1, -2) @ dacross
        _hand_on(dstates, kept, None if ctx.scan is None else ctx.scan.returning, back=True)  # now of the states after each chunk
        dweighted = (b @ dstates).unflatten(-1, (per_group, width))
        dc = (dpairs @ b).add_(dacross @ states.transpose(-1, -2))
        db = (dpairs.transpose(-1, -2) @ c).add_(weighted @ dstates.transpose(-1, -2))

        # A decay acts on what the chunk found (for all later outputs), on what earlier tokens leave for the next chunk,
        # and on what passes through.
        dlog += _later(_by_head((dy * across).sum(-1)).double())
        left = _by_head((dweighted * weighted.view_as(dweighted)).sum(-1)).double()
        dlog += left.cumsum(-1) - left
        through = (dstates * states).unflatten(-1, (per_group, width)).sum((3, 5)).movedim(-1, 2)  # [batch, groups, r, chunks]
        dlog += (through.double() * kept).unsqueeze(-1)

        du = dweighted.mul_(_factor(to_end, dtype)).addcmul_(du_head.movedim(2, 4), _factor(1 / fine, dtype))
        dsteps = (du * x).sum(-1) + (dlog * a64).to(dtype).movedim(2, -1)
        da = (dlog * steps).sum((0, 3, 4)).flatten().to(dtype)
        dd = (dy * x).sum(-1).sum((0, 2, 3)).flatten()
        dx = du.mul_(_factor(steps, dtype)).addcmul_(dy, d)
        return (
            _sequence(dx).flatten(2, 3),
            _sequence(dsteps).flatten(2, 3),
            da,
            _sequence(db),
            _sequence(dc),
            dd,
            None,
            None,
            None,
            None,
        )


def stepped(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """A few tokens one after another, for text that is made: y as `ssd` gives it, and the states before these tokens and behind each of them, fp32
    [batch, groups, N, r, P]. Arguments as there, fp32; state: before these tokens, None at the beginning.

    Each token is computed as if it came alone: its products have the same shapes however many tokens there are.
    """
    batch, tokens, heads, width = x.shape
    groups = b.shape[2]
    decay = (dt.double() * a.double()).exp().to(x.dtype).unflatten(-1, (groups, -1))  # [batch, tokens, groups, r]
    u = (x * dt.unsqueeze(-1)).unflatten(2, (groups, -1))
    added = b[..., None, None] * u.unsqueeze(3)  # [batch, tokens, groups, N, r, P]
    if state is None:
        state = torch.zeros_like(added[:, 0])
    states, outputs = [state], []
    for t in range(tokens):
        state = torch.addcmul(added[:, t], state, decay[:, t, :, None, :, None])
        states.append(state)
        outputs.append(c[:, t].unsqueeze(2).contiguous() @ state.flatten(3))  # [batch, groups, 1, r * P]
    y = torch.stack(outputs, dim=1).view(batch, tokens, heads, width)
    return torch.addcmul(y, x, d.unsqueeze(-1)), states


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, documents: Tensor | None = None) -> Tensor:
    """The definition, one token after another, in the dtype of its arguments (fp64 for a reference)."""
    batch, length, heads, width = x.shape
    per_group = heads // b.shape[2]
    state = x.new_zeros(batch, heads, width, b.shape[-1])
    outputs = []
    for t in range(length):
        if documents is not None and t > 0:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        bt, ct = (v[:, t].repeat_interleave(per_group, dim=1) for v in (b, c))
        update = (dt[:, t, :, None] * x[:, t])[..., None] * bt[:, :, None, :]
        state = state * torch.exp(dt[:, t] * a)[..., None, None] + update
        outputs.append((state * ct[:, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def ssd_flops(heads: int, width: int, state_size: int, groups: int, chunk: int) -> float:
    """Forward FLOPs per token of the chunked form's matrix products."""
    return 2.0 * (groups * chunk * state_size + heads * chunk * width + 2 * heads * width * state_size)
