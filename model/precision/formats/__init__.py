"""The number formats a GEMM may run in: `base` says what a format is, `registry` which there are, and every other file is one of them."""
