"""`python -m pmpd.kernels`: which kernels multiply on this machine, and why."""

from __future__ import annotations

import torch

from pmpd.kernels import cpu, dispatch


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"cpu   {str(dtype).removeprefix('torch.'):9} {dispatch.explain(torch.device('cpu'), dtype)}")
    print(f"native CPU library: {cpu.describe()}; torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        print("cuda: no device, or a torch without CUDA")
        return
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        print(f"cuda  {str(dtype).removeprefix('torch.'):9} {dispatch.explain(torch.device('cuda'), dtype)}")


if __name__ == "__main__":
    main()
