"""The model: a hybrid pattern of Mamba-2, attention and (Latent)MoE layers, multi-token prediction, and their precision."""
