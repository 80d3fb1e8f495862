"""`python -m train -cn tiny key=value ...` trains; started again with the same run.dir, it continues."""

from train.cli import main
from train.loop import run

if __name__ == "__main__":
    raise SystemExit(main(run, "train"))
