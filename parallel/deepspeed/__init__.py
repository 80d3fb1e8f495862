"""The engine on DeepSpeed, an optional package: ZeRO over the data-parallel ranks, behind the same interface as `parallel.megatron`.

`limits` says what it cannot do, without the package; `engine` is what the rest of the project uses; `library` imports DeepSpeed as this project
needs it; `unit` tells it of our process groups.
"""
