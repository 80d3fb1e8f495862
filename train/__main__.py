"""`python -m train -cn tiny key=value ...` trains; started again with the same run.dir, it continues."""

from train.command import main

if __name__ == "__main__":
    raise SystemExit(main())
