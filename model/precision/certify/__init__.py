"""Proof, on the machine at hand, that every backend gives the values that define NVFP4: `python -m model.precision.certify`."""
