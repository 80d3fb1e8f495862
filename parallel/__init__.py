"""Where a rank stands and how ranks work together.

`layout` and `groups`: which rank does what. `shards` and `stage`: what an engine must know of a model. `engine`: what an engine is, `engines`:
which there are, `megatron/`: one of them. `cluster`: the hardware.
"""

import warnings

# Megatron says at import that Transformer Engine and Apex are missing; both are optional, and what runs is in the precision table.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="Apex is not installed")
# Its own default of a field it deprecated.
warnings.filterwarnings("ignore", message="full scope is deprecated")
