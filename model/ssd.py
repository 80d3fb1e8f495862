"""The state-space recurrence of Mamba-2 ("state space duality", Dao and Gu, arXiv 2405.21060), in its chunked form.

Per head, with step dt_t > 0, decay a_t = exp(dt_t A), input x_t (P values), B_t and C_t (N values, shared by the heads of a group):

    h_t = a_t h_{t-1} + dt_t x_t B_t^T            state, P x N
    y_t = h_t C_t + D x_t

Sequentially that is one small update after another. In chunks of Q tokens it is matrix products: inside a chunk

    Y = (L o C B^T) (dt x),      L_ij = a_i ... a_{j+1} for i >= j, else 0

and between chunks only the states are carried. With a = exp(dt A), the product is exp(s_i - s_j) for the running sum s of dt A; the difference
is masked *before* the exponential, so nothing overflows. C B^T is computed once per group and never repeated for its heads. Where documents
are packed, L_ij is 0 between different documents and no state is carried across a boundary.

Trade-off: more FLOPs than the recurrence (Q/2 instead of N per pair), but all of them in matrix products. Everything is fp32.
"""

import torch
from torch import Tensor

CPU_CHUNK = 64


def ssd(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, documents: Tensor | None = None, chunk_size: int
) -> Tensor:
    """The recurrence above, by whatever implementation suits the device: y, fp32 [batch, sequence, heads, P].

    x: [batch, sequence, heads, P]; dt: [batch, sequence, heads], positive; a: [heads], negative; b, c: [batch, sequence, groups, N];
    d: [heads]. documents: int [batch, sequence], not decreasing along a sequence, or None for one document. Any sequence length.
    """
    # The seam for GPU kernels (mamba_ssm's Triton scan): it would be chosen here, by device. The chunked form runs everywhere.
    chunk = min(chunk_size, CPU_CHUNK) if x.device.type == "cpu" else chunk_size
    return chunked(x.float(), dt.float(), a.float(), b.float(), c.float(), d.float(), documents, chunk)


def chunked(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, documents: Tensor | None, chunk: int
) -> Tensor:
    """See `ssd`; all arguments fp32, or all fp64."""
    batch, length, heads, width = x.shape
    groups = b.shape[2]
    per_group = heads // groups
    padding = -length % chunk
    # Padded tokens have dt = 0: they add nothing and decay nothing.
    skip = x * d[:, None]
    if padding:
        x, b, c = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, b, c))
        dt = torch.nn.functional.pad(dt, (0, 0, 0, padding))
        if documents is not None:
            documents = torch.nn.functional.pad(documents, (0, padding), value=torch.iinfo(documents.dtype).max)

    # [batch, groups, heads of a group, chunks, Q, ...]
    def by_head(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, chunk)).unflatten(3, (groups, per_group)).movedim((3, 4), (1, 2))

    # [batch, groups, chunks, Q, N]
    def by_group(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, chunk)).movedim(3, 1)

    inputs = by_head(x * dt.unsqueeze(-1))  # [batch, groups, per_group, chunks, Q, P]
    log_decay = by_head(dt * a)  # [batch, groups, per_group, chunks, Q]
    b, c = by_group(b), by_group(c)
    running = log_decay.cumsum(-1)

    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if documents is not None:
        documents = documents.unflatten(1, (-1, chunk))[:, None, None]  # [batch, 1, 1, chunks, Q]
        visible = visible & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
    decay = (running.unsqueeze(-1) - running.unsqueeze(-2)).masked_fill(~visible, -torch.inf).exp()
    within = ((c @ b.transpose(-1, -2)).unsqueeze(2) * decay) @ inputs

    # What every chunk adds to the state, [batch, groups, chunks, per_group * P, N], and what is left of the state it found.
    to_end = (running[..., -1:] - running).exp()
    kept = running[..., -1].exp()  # [batch, groups, per_group, chunks]
    from_start = running.exp()
    if documents is not None:
        last = documents[..., -1]  # document the state belongs to after each chunk
        before = torch.nn.functional.pad(last[..., :-1], (1, 0), value=-1)
        to_end = to_end * (documents == last.unsqueeze(-1))
        kept = kept * (before == last)
        from_start = from_start * (documents == before.unsqueeze(-1))
    weighted = (inputs * to_end.unsqueeze(-1)).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)
    added = (weighted @ b).unflatten(3, (per_group, width))
    kept = kept.movedim(3, 2)[..., None, None]
    state = torch.zeros_like(added[:, :, 0])
    found = []
    for index in range(added.shape[2]):
        found.append(state)
        state = state * kept[:, :, index] + added[:, :, index]
    states = torch.stack(found, dim=2).flatten(3, 4)  # [batch, groups, chunks, per_group * P, N]
    across = (c @ states.transpose(-1, -2)).unflatten(-1, (per_group, width)).permute(0, 1, 4, 2, 3, 5)
    y = within + across * from_start.unsqueeze(-1)
    y = y.movedim((1, 2), (3, 4)).flatten(3, 4).flatten(1, 2)
    return y[:, :length] + skip


def recurrence(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, documents: Tensor | None = None
) -> Tensor:
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
