"""What the C library does with memory that XLA's CPU client gives back."""

import contextlib
import ctypes

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1
HEAP = 2**26  # bytes of a thread's heap: with this much room none is given back


def keep_freed_memory() -> None:
  """Has glibc keep what is freed; does nothing where there is another library.

  XLA's CPU client takes memory for temporaries anew at every execution. Of
  large blocks glibc gives the pages back to the kernel, which zeroes them when
  they are touched again: 14,500 page faults and 28 of 170 ms for a gradient of
  48 rows of the embedded model. The process keeps its peak instead; blocks of
  more than `HEAP`, which only the main thread's heap holds, are still given
  back by others.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    mallopt(M_TOP_PAD, HEAP)
