"""python -m model.precision.certify"""

import sys

from model.precision.certify.command import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
