"""Where a rank stands and how ranks work together: layouts, Megatron's groups, schedule, optimizer, and Megatron without CUDA."""
