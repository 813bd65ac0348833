"""One training in several processes, started by torchrun, a GPU each; alone all of it does nothing.

Nothing of the algorithm. Follows PyTorch's tutorial on DistributedDataParallel.
"""
import contextlib
import datetime
import os

from support.decoder import pick_device_and_dtype
from support.errors import UserError

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = datetime.timedelta(minutes=10)  # of what all processes do together
# What gloo and NCCL say of a process that has ended, which has told why itself.
ENDED = ("by peer", "remote process exited", "ncclRemoteError", "ncclSystemError",
         "communicator was aborted")


class Processes:
    """This process is number `rank` of `ranks`; `device` and `dtype` are what it computes with."""

    def __init__(self, device, dtype):
        self.rank, self.ranks = (int(os.environ.get(name, default))
                                 for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device, self.dtype = pick_device_and_dtype(device, dtype)
        self.patient = None  # a group to wait in for long
        if self.ranks == 1:
            return
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(self.device)  # before NCCL chooses one itself
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def share(self, module):
        """The module, whose gradients are from now on the mean over all processes."""
        return DistributedDataParallel(module) if self.ranks > 1 else module

    def without_sync(self, module, alone=True):
        """In this context backward passes through a shared module stay in this process."""
        return module.no_sync() if alone and self.ranks > 1 else contextlib.nullcontext()

    def wait(self):
        """Until all processes are here. What one does alone may outlast TIMEOUT."""
        if self.ranks > 1:
            dist.barrier(self.patient)

    def leave(self):
        if self.ranks > 1:
            dist.destroy_process_group()


def run_among_others(run):
    """run(); UserError in one line if it ends because another process has."""
    try:
        run()
    except RuntimeError as e:
        if not any(words in str(e) for words in ENDED):
            raise
        message = f"process {os.environ.get('RANK', 0)} stops, because another one has"
        raise UserError(message) from None
