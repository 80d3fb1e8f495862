"""The model: a hybrid pattern of Mamba-2, attention and (Latent)MoE layers, multi-token prediction, and their precision."""

import parallel  # noqa: F401  (silences Megatron's import-time warnings before the first import of Megatron)
from model import attention, mamba, mlp, moe  # noqa: F401  (each registers its mixer)
