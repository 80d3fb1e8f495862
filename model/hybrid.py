"""The hybrid model: embedding, a stack of layers by pattern, head, and multi-token prediction; one pipeline stage of it per rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.embedding import Embedding, likeliest, summed_cross_entropy
from model.layer import Layer
from model.linear import Linear
from model.moe import Experts
from model.mtp import MTPBlock
from model.norm import RMSNorm
from model.precision.formats.base import Format
from model.precision.linear import Site
from model.router import Router
from parallel.stage import Stage


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: some consecutive layers of the stack. first, last: of all parts."""

    layers: range
    first: bool = True
    last: bool = True


class HybridModel(Stage):
    """The model, or one part of its pipeline.

    The first part holds the embedding; the last one the final norm, the head and the MTP blocks, and, when it is another part, a second
    copy of the embedding for MTP or as the head's weight, kept equal by summing both gradients.
    """

    def __init__(self, context: ModelContext, part: Part | None = None):
        super().__init__()
        config = context.config
        part = part or Part(range(len(config.layers)))
        self.context = context
        self.is_first, self.is_last = part.first, part.last
        self.depths = config.mtp_depths
        self.trunk_frozen = False
        self.embeddings: Embedding | None = None
        if self.is_first or (self.is_last and (self.depths or config.tied_embeddings)):
            self.embeddings = Embedding(context)
        self.layers = nn.ModuleDict({str(i): Layer(context, f"layers.{i}", config.layers[i]) for i in part.layers})
        if self.is_last:
            self.norm_f = RMSNorm(context, "norm_f")
            self.lm_head = Linear(
                context,
                "lm_head",
                config.hidden_size,
                config.vocab_size,
                "column",
                std=config.init_std,
                out_dtype=torch.float32,
            )
            if config.tied_embeddings:
                assert self.embeddings is not None
                self.lm_head.weight = self.embeddings.weight
            self.mtp = nn.ModuleList(MTPBlock(context, f"mtp.layers.{i}", config.parsed.mtp[i]) for i in range(config.mtp_blocks))

    def freeze_trunk(self) -> None:
        """Nothing but the MTP blocks is trained from now on: all else, embedding and head included, is computed as ever, but has no gradients."""
        self.trunk_frozen = True
        self.requires_grad_(False)
        self.mtp.requires_grad_(True)

    @property
    def shared_weight(self) -> nn.Parameter | None:
        copied = (self.depths > 0 or self.context.config.tied_embeddings) and not (self.is_first and self.is_last)
        return self.embeddings.weight if copied and self.embeddings is not None else None

    def _stack(self, microbatch: Microbatch, input: Tensor | None) -> Tensor:
        if self.is_first:
            assert self.embeddings is not None
            x = self.embeddings(microbatch.tokens[0])
        else:
            assert input is not None
            x = input
        health = self.context.health
        first = microbatch.own_first(self.context.layout)
        for index, layer in self.layers.items():
            x = layer(x, microbatch)
            health.residual(f"layers.{index}", x, first)
        return x

    def forward(self, microbatch: Microbatch, input: Tensor | None = None) -> Tensor:
        """The last stage: fp32 [1 + depths], the summed losses of the LM head and each MTP depth over their valid targets
        (zeros for the depths outside training), or what `wrong` or `choices` gives where the microbatch asks for that; other stages: the hidden
        states, [sequence, batch, hidden]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_frozen):
            x = self._stack(microbatch, input)
            if not self.is_last:
                return x
            hidden = self.context.recompute.whole("norm", self.norm_f, x)
            if microbatch.wrong:
                return self.wrong(hidden, microbatch)
            if microbatch.choose_from:
                return self.choices(hidden, microbatch)
            losses = [self.head_loss(hidden, microbatch)]
        for depth in range(1, self.depths + 1):
            if not self.training:
                losses.append(torch.zeros_like(losses[0]))
                continue
            hidden = self.deeper(hidden, microbatch.tokens[depth], microbatch, depth)
            losses.append(self.head_loss(hidden, microbatch, depth))
        return torch.stack(losses)

    def deeper(self, hidden: Tensor, tokens: Tensor, microbatch: Microbatch, depth: int) -> Tensor:
        """What MTP depth `depth`, from 1, gives the head: hidden [sequence, batch, hidden], of the depth before (0: the stack); tokens: int64
        [batch, sequence], `depth` places ahead."""
        assert self.embeddings is not None
        block = self.mtp[min(depth, len(self.mtp)) - 1]
        return block(self.embeddings(tokens), hidden, replace(microbatch, depth=depth))

    def choices(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """hidden: as the LM head is given it -> int64 [1 + depths, batch, sequence], the likeliest token for the LM head and each MTP depth among the
        first `choose_from` ids. Depth k at position t sees the microbatch's own tokens up to t + k, whatever the heads before it chose."""
        chosen = []
        for depth in range(self.depths + 1):
            if depth:
                hidden = self.deeper(hidden, microbatch.tokens[depth], microbatch, depth)
            logits = self.lm_head(hidden, replace(microbatch, depth=depth))
            chosen.append(likeliest(logits, microbatch.choose_from, self.context.layout))
        return torch.stack(chosen)

    def head_loss(self, hidden: Tensor, microbatch: Microbatch, depth: int = 0) -> Tensor:
        """hidden [sequence, batch, hidden], normed -> the summed loss of its targets, 0-dim fp32."""
        return self.context.recompute.whole("head", self._head_loss, hidden, microbatch, depth)

    def _head_loss(self, hidden: Tensor, microbatch: Microbatch, depth: int) -> Tensor:
        microbatch = replace(microbatch, depth=depth)
        if self.context.config.head_at_targets:
            logits, labels, _ = self._at_targets(hidden, microbatch)
            return summed_cross_entropy(logits, labels, torch.ones_like(labels, dtype=torch.bool))
        logits = self.lm_head(hidden, microbatch)
        return summed_cross_entropy(logits, microbatch.labels[depth], microbatch.loss_mask[depth])

    def _at_targets(self, hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [targets, 1, vocabulary] where the loss counts, their labels [1, targets], and their sequences [targets]."""
        depth, batch = microbatch.depth, hidden.shape[1]
        microbatch = microbatch if microbatch.targets is not None else microbatch.with_targets()
        assert microbatch.targets is not None
        rows = microbatch.targets[depth]
        logits = self.lm_head(hidden.flatten(0, 1)[rows].unsqueeze(1), microbatch, microbatch.keys(microbatch.positions).at(rows))
        return logits, microbatch.labels[depth].T.flatten()[rows].unsqueeze(0), rows % batch

    def wrong(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """How many of its targets the LM head's likeliest token misses, of every sequence on this rank: fp32 [batch]."""
        if self.context.config.head_at_targets:
            logits, labels, sequences = self._at_targets(hidden, microbatch)
            missed = logits[:, 0].argmax(-1) != labels[0]
            return torch.zeros(hidden.shape[1], device=hidden.device).index_add_(0, sequences, missed.float())
        logits = self.lm_head(hidden, microbatch)
        if self.context.layout.tensor_size > 1:
            logits = mappings.gather_from_tensor_model_parallel_region(logits)
        missed = (microbatch.labels[0] != logits.argmax(-1).T) & microbatch.loss_mask[0]
        return missed.sum(1).float()

    def hidden(self, microbatch: Microbatch) -> Tensor:
        """What the head and the first MTP depth are given, [sequence, batch, hidden]; one pipeline stage only."""
        return self.norm_f(self._stack(microbatch, None))

    def logits(self, microbatch: Microbatch) -> list[Tensor]:
        """Whole-vocabulary logits of the LM head and of every MTP depth, each [batch, sequence, vocabulary]; one pipeline stage only."""
        states = [self.hidden(microbatch)]
        for depth in range(1, self.depths + 1):
            states.append(self.deeper(states[-1], microbatch.tokens[depth], microbatch, depth))
        heads = [self.lm_head(state, microbatch) for state in states]
        if self.context.layout.tensor_size > 1:
            heads = [mappings.gather_from_tensor_model_parallel_region(logits) for logits in heads]
        return [logits.transpose(0, 1) for logits in heads]

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]


def weight_changes(chunks: Sequence[HybridModel], step: int, progress: float) -> dict[nn.Parameter, Callable[[Tensor], None]]:
    """What number formats do to weights after optimizer step `step` (from 0), which was taken at `progress`: for `Engine.update_masters`."""
    policy = chunks[0].context.policy
    if not policy.changes_weights:
        return {}
    changes: dict[nn.Parameter, Callable[[Tensor], None]] = {}
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, Linear | Experts):
            for site, weight in module.weights():
                form = policy.format_for(site.name, "fprop", progress)
                if form.changes_weights and weight.requires_grad:
                    changes[weight] = partial(_after_step, form, site, step)
    return changes


def _after_step(form: Format, site: Site, step: int, master: Tensor) -> None:
    form.after_step(master if master.dim() == 3 else master.unsqueeze(0), site, step)


@torch.no_grad()
def end_step(chunks: Sequence[HybridModel], *, update: bool = True) -> dict[str, float]:
    """Moves every expert bias by the load of the step just taken, and forgets it, and the quantised weights of before the step.

    chunks: of the model on this rank. Collective; the same result on every rank. update: False when the step was not taken. Returns
    moe/aux_loss (as added to the loss) and moe/max_violation (largest load over mean load, of the worst layer); nothing without MoE layers.
    """
    context = chunks[0].context
    context.weights.clear()
    if not context.config.has_experts:
        return {}
    layout, routers = context.layout, [router for chunk in chunks for router in chunk.routers()]
    violation = torch.zeros((), device=context.device)
    aux = torch.zeros((), device=context.device)
    if routers:
        load = torch.stack([router.load for router in routers])
        # sums `load` over the tensor, context and data-parallel ranks on the way
        biases = get_updated_expert_bias(load, torch.stack([router.bias for router in routers]), routers[0].bias_update_rate)
        aux = torch.stack([router.loss for router in routers]).sum()
        dist.all_reduce(aux, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        mean = load.mean(1)
        violation = torch.where(mean > 0, load.amax(1) / mean.clamp(min=1e-9), torch.zeros_like(mean)).max()
        for router, bias in zip(routers, biases, strict=True):
            if update:
                router.bias.copy_(bias)
            router.load.zero_()
            router.loss.zero_()
    if layout.pipeline_size > 1:
        dist.all_reduce(aux, group=layout.groups.pp)
        dist.all_reduce(violation, op=dist.ReduceOp.MAX, group=layout.groups.pp)
    return {"moe/max_violation": violation.item(), "moe/aux_loss": aux.item()}
