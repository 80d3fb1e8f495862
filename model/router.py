"""The router of a mixture of experts: which experts a token visits, with which weight, and what keeps them evenly loaded.

    score = sigmoid(x W^T)                          fp32
    chosen = the top_k of score + bias              the bias chooses, it never weighs
    weight = score / sum of the chosen scores * routed_scaling_factor

The bias moves by a fixed rate per optimizer step, up for experts that got less than the mean load, down for the others (auxiliary-loss-free
balancing, arXiv 2408.15664). A small auxiliary loss balances every sequence by itself: with f_e the share of a sequence's choices that fell on
expert e (times the number of experts) and P_e its mean normalised score, coefficient * sum_e f_e P_e, averaged over the sequences of the
global batch.
"""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.elementwise import even_rows
from model.linear import Linear
from parallel.shards import set_pieces, whole


class Router(nn.Module):
    """Router of one MoE layer; every rank holds it whole and routes its own tokens.

    scaling_factor, aux_loss, bias_update_rate: routed_scaling_factor, the coefficient and the rate above.
    """

    def __init__(
        self, context: ModelContext, name: str, *, experts: int, top_k: int, scaling_factor: float, aux_loss: float, bias_update_rate: float
    ):
        super().__init__()
        config = context.config
        self.context, self.experts, self.top_k = context, experts, top_k
        self.scaling_factor, self.aux_loss, self.bias_update_rate = scaling_factor, aux_loss, bias_update_rate
        self.gate = Linear(context, name, config.hidden_size, experts, "replicated", std=config.init_std, out_dtype=torch.float32)
        bias = torch.zeros(experts, dtype=torch.float32, device=context.device)
        set_pieces(bias, [whole(f"{name}.e_score_correction_bias", (experts,))])
        self.register_buffer("bias", bias)
        # Of the current optimizer step, on this rank: choices per expert, and the sum of the auxiliary loss.
        self.register_buffer("load", torch.zeros_like(bias), persistent=False)
        self.register_buffer("loss", torch.zeros((), dtype=torch.float32, device=context.device), persistent=False)
        self.bias: Tensor
        self.load: Tensor
        self.loss: Tensor

    def forward(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """x [sequence, batch, hidden] -> weights fp32 and choices bool, both [sequence * batch, experts]."""
        logits = self.gate(x, microbatch)
        rows = logits.flatten(0, 1)
        if microbatch.singly:
            rows = nn.functional.pad(rows, (0, 0, 0, even_rows(len(rows), self.experts) - len(rows)))
        weights, chosen = topk_routing_with_score_function(
            rows, self.top_k, scaling_factor=self.scaling_factor, score_function="sigmoid", expert_bias=self.bias
        )
        if microbatch.singly:
            weights, chosen = (each[: logits.shape[0] * logits.shape[1]] for each in (weights, chosen))
        if torch.is_grad_enabled() and self.training:
            once = not self.context.recompute.repeating
            if once:
                self.load += chosen.sum(0)
            if self.aux_loss > 0:
                loss = self.aux_loss * self.balance_loss(logits, microbatch.sequence_length)
                if once:
                    self.loss += loss.detach()
                weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, chosen

    def balance_loss(self, logits: Tensor, sequence_length: int) -> Tensor:
        """This rank's contribution to the auxiliary loss without its coefficient: contributions of microbatches and ranks add up."""
        layout = self.context.layout
        shape = logits.shape
        chosen, scores = compute_routing_scores_for_aux_loss(logits.flatten(0, 1), self.top_k, "sigmoid")
        counts = chosen.view(shape).sum(0).float()  # [batch, experts], of this rank's part of each sequence
        if layout.sequence_parallel or layout.context_size > 1:
            dist.all_reduce(counts, group=layout.groups.tp_cp)
        mass = scores.view(shape).sum(0)
        scale = self.experts / (self.top_k * sequence_length**2 * self.context.global_batch_size)
        return scale * (counts * mass).sum()
