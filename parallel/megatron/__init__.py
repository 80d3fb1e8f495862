"""The engine on Megatron-core: its data parallelism, schedules and optimizers, and Megatron without CUDA.

`engine` is what the rest of the project uses; `stage` is the contract Megatron has with a model, and the only place that knows its names.
"""
