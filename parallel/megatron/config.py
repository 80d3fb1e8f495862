"""Megatron's TransformerConfig as the pieces we reuse need it: router functions, dispatchers, schedules, DDP."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.engine import ModelSizes
from parallel.layout import ParallelConfig


def transformer_config(parallel: ParallelConfig, sizes: ModelSizes) -> TransformerConfig:
    """Our layout and sizes in Megatron's terms.

    `calculate_per_token_loss` makes Megatron add gradients up and never divide them: losses arrive normalised over the global batch.
    """
    interleaved = parallel.virtual_pipeline > 1
    moe = {}
    if sizes.experts is not None:
        moe = {
            "num_moe_experts": sizes.experts,
            "moe_router_topk": sizes.top_k,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_ffn_hidden_size": sizes.hidden_size,
        }
    return TransformerConfig(
        num_layers=max(sizes.layers, parallel.pipeline),
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.attention_heads,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        pipeline_dtype=sizes.params_dtype,
        params_dtype=sizes.params_dtype,
        bf16=sizes.params_dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=torch.cuda.is_available() and not interleaved,  # gloo has no batched point-to-point transfers
        batch_p2p_sync=False,  # the host would wait for the device after each, for the sake of old versions of PyTorch
        overlap_p2p_comm=interleaved,  # the interleaved schedule computes another part meanwhile; batched transfers could not
        variable_seq_lengths=False,
        gradient_accumulation_fusion=False,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        **moe,
    )
