"""What NVFP4 costs here, against the eager reference, against fp32 and against other packages, alternating in one process."""

import train as train  # before torch: it says how OpenMP's threads wait
