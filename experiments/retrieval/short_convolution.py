"""A gated short convolution, which tells a model of attention alone what stood right before: letter C, once it is registered.

    y = out_proj(gate * silu(conv(x)))          gate | x = in_proj(input)

Zoology (arXiv 2312.04927) calls such a layer BaseConv, and its code puts one before each attention. It is Mamba-2's block without the recurrence.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.cache import MambaState
from model.context import ModelContext
from model.convolution import causal_convolution
from model.linear import Linear
from model.mixer import MIXERS, NOT_GIVEN, Dimension, Mixer, Needed, Sizes, register_mixer
from model.parameter import output_std, sharded_parameter
from parallel.shards import Section, split_sections

WIDTH = 4  # tokens, as Mamba-2's


@dataclass(frozen=True)
class ShortConvolutionSizes(Sizes):
    convolution_channels: Needed = NOT_GIVEN
    """Channels of a gated short convolution."""


class ShortConvolution(nn.Module):
    """Channels are split over the tensor group; sequences are whole."""

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config, rank, size = context.config, context.layout.tensor_rank, context.layout.tensor_size
        channels = config.sizes(ShortConvolutionSizes).convolution_channels
        halves = [Section(f"{name}.in_proj.weight", channels, start) for start in (0, channels)]
        self.in_proj = Linear(context, f"{name}.in_proj", config.hidden_size, 2 * channels, "column", std=config.init_std, sections=halves)

        def parameter(tensor: str, trailing: tuple[int, ...]) -> nn.Parameter:
            pieces = split_sections([Section(f"{name}.{tensor}", channels)], trailing, rank, size)
            return sharded_parameter(context, (channels // size, *trailing), pieces, init.uniform(WIDTH**-0.5), "rows")

        self.conv_weight, self.conv_bias = parameter("conv1d.weight", (1, WIDTH)), parameter("conv1d.bias", ())
        self.out_proj = Linear(context, f"{name}.out_proj", channels, config.hidden_size, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        gate, x = self.in_proj(x, microbatch).chunk(2, dim=-1)
        documents, before = microbatch.documents if microbatch.reset else None, None
        if microbatch.cache is not None:
            before = microbatch.cache.of(self, lambda: MambaState(x.new_zeros(WIDTH - 1, *x.shape[1:]))).shift(x)
        return self.out_proj(gate * causal_convolution(x, self.conv_weight, self.conv_bias, documents, before), microbatch)


SHORT_CONVOLUTION = Mixer(
    letter="C",
    name="short convolution",
    build=ShortConvolution,
    sizes=ShortConvolutionSizes,
    dimensions=(Dimension("convolution_channels", ("tensor",)),),
)


def register() -> None:
    """Makes the letter known, to be called before a recipe is read; again does nothing."""
    if SHORT_CONVOLUTION.letter not in MIXERS:
        register_mixer(SHORT_CONVOLUTION)
