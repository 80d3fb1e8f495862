"""What somebody outside the project writes: register, then hand over to the command.

torchrun --nproc-per-node 2 -m tests.extension --config-dir tests/extension/recipes -cn extended
"""

from tests.extension.everything import register
from train.command import main

if __name__ == "__main__":
    register()
    raise SystemExit(main("tests.extension"))
