"""Set before torch and Triton load. Without a GPU, Triton's kernels run in its interpreter, which it reads
once, when it is first imported. OpenMP's threads spin for a bounded time: tests and their Ray workers
share the machine."""

import os

from pmpd import threads

threads.prepare()

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
