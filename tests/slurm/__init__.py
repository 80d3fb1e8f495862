"""The launcher against a real Slurm on this machine: `make test-slurm`."""
