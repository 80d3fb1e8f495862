"""What others read of an exported model.

    transformers       NemotronHForCausalLM; ignores mtp.*
    vllm, sglang       NemotronHForCausalLM, and nemotron_h_mtp to draft with the MTP block: one block, of attention and MoE layers
    megatron_bridge    NemotronHForCausalLM with any number of MTP depths, of attention, MoE and MLP layers

NVFP4 weights are for vllm and sglang; in compressed-tensors' layout also for transformers where there are no experts: version 5.23 loads packed ones
without their scales.

Sources: `nemotron_h_mtp.py` of vLLM and SGLang (`num_nextn_predict_layers == 1`, letters `*` and `E`), `nemotron_h_bridge.py` of Megatron-Bridge.
"""

from collections.abc import Sequence

from model.config import ModelConfig

MTP_LETTERS = {"transformers": "", "vllm": "*E", "sglang": "*E", "megatron_bridge": "*E-"}
"""By reader: letters of an MTP depth it knows; none: it does not read MTP."""
ONE_BLOCK = ("vllm", "sglang")
PACKED = ("vllm", "sglang")


def problem(reader: str, model: ModelConfig, format: str | None) -> str | None:
    """Why a reader cannot use all it reads of this model in this format, in one sentence that names the key; None where it can."""
    experts_alone = reader == "transformers" and format == "nvfp4"
    if format and reader not in PACKED and not (experts_alone and not model.has_experts):
        what = "experts" if experts_alone else "weights"
        return f"format={format} packs {what} in a way {reader} does not read: leave the format out, or {reader} out of readers"
    known = MTP_LETTERS[reader]
    if not model.mtp_depths or not known:
        return None
    if unknown := sorted(set("".join(model.parsed.mtp)) - set(known)):
        return (
            f"model.pattern={model.pattern!r} has {', '.join(map(repr, unknown))} layers in its MTP depths, where {reader} knows only "
            f"{' and '.join(map(repr, known))}: train such depths, or leave {reader} out of readers"
        )
    if reader in ONE_BLOCK and model.mtp_blocks > 1:
        return (
            f"model.mtp_shared=false with {model.mtp_blocks} MTP depths gives num_nextn_predict_layers={model.mtp_blocks}, and {reader} drafts with "
            f"one block only: train with model.mtp_shared=true, or leave {reader} out of readers"
        )
    return None


def check_readers(readers: Sequence[str], model: ModelConfig, format: str | None) -> None:
    """Raises ValueError, in one sentence, for a reader there is not, or that cannot use the model."""
    for reader in readers:
        if reader not in MTP_LETTERS:
            raise ValueError(f"readers={reader} is unknown: use some of {', '.join(MTP_LETTERS)}")
        if found := problem(reader, model, format):
            raise ValueError(found)
