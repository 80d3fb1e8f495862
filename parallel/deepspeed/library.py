"""DeepSpeed, imported as this project needs it: on the devices torch has, silent, and without compiling anything.

On a CPU DeepSpeed would compile an extension for all-reduces over shared memory when it meets a process group, which takes minutes and a C++
compiler. Only its inference uses that, so it is told that there is none.
"""

import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.moe.layer import MoE
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, logger

logger.setLevel(logging.ERROR)  # it warns of every optimizer it was not tested with
if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__ = {}

__all__ = ["DeepSpeedZeRoOffload", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "Init", "MoE", "deepspeed", "groups"]
