"""What all library tests share: the same examples on every run, and one thread, so that a failure can be repeated."""

import torch
from hypothesis import settings

settings.register_profile("kernelbook", derandomize=True, deadline=None, max_examples=20, database=None)
settings.load_profile("kernelbook")
torch.set_num_threads(1)
