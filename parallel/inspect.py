"""A command, which nothing imports: what one rank of a layout would hold and with whom it would talk (see `train.inspection`).

python -m parallel.inspect -cn nemotron3_super world=1024 rank=137
"""

import sys

from train.inspection import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
