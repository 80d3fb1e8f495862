"""Number formats and where they apply: NVFP4 and MXFP8 to the operation, random bits, the policy, and the GEMMs of a linear layer."""
