"""`python -m model.precision.backends`: compiles the kernels for this CPU; Numba keeps them."""

import time

from model.precision.backends.cpu import compile_all

if __name__ == "__main__":
    start = time.perf_counter()
    compile_all()
    print(f"NVFP4 kernels for this CPU are ready ({time.perf_counter() - start:.1f} s)")
