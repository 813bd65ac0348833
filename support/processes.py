"""The processes of one training, which torchrun starts: each with a GPU of its own, or on the CPU.

They see different batches of an update, and add up their gradients. Nothing of the algorithm.
"""
import contextlib
import datetime
import os

from support.errors import UserError, require

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)  # of what all processes do together
LONG = datetime.timedelta(days=7)         # of waiting for what the first does alone
# What gloo says where another process has ended, and what NCCL says, which has many words for it.
ENDED = ("by peer", "remote process exit", "communicator was aborted", "ncclremoteerror",
         "ncclsystemerror", "watchdog")


class Processes:
    """This process, number `rank` of `ranks`. Alone, it has nobody to wait for or to add to."""

    def __init__(self, rank=0, ranks=1, slow_group=None):
        self.rank, self.ranks, self.slow_group = rank, ranks, slow_group

    @classmethod
    def join(cls, device):
        """(the processes that torchrun has started, the device of this one)."""
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if ranks == 1:
            return cls(), device
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            require(device.index < torch.cuda.device_count(),
                    f"--nproc-per-node: must be at most the {torch.cuda.device_count()} GPUs here")
            torch.cuda.set_device(device)  # before NCCL chooses one itself
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(rank, ranks, dist.new_group(backend="gloo", timeout=LONG)), device

    def sum_gradients(self, parameters):
        """Give each parameter the sum of its gradients in all processes. They travel in one piece,
        because each message takes its time."""
        if self.ranks > 1:
            gradients = [p.grad for p in parameters]
            whole = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(whole)
            for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))

    def wait(self):
        """Until all are here. What the first does alone may take longer than TIMEOUT."""
        if self.ranks > 1:
            dist.barrier(self.slow_group)

    def leave(self):
        if self.ranks > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def end_together():
    """Where another process has ended, which said why, this one ends with a line of its own."""
    try:
        yield
    except RuntimeError as e:
        if not any(words in str(e).lower() for words in ENDED):
            raise
        if dist.is_initialized():  # else gloo's threads may abort Python at its end
            dist.destroy_process_group()
        raise UserError(f"process {os.environ.get('RANK', 0)} stops, because another one has "
                        f"({str(e).strip().splitlines()[-1].strip()})") from None
