"""How numbers get from the host to the device that computes, and back. Imports nothing of ours."""
import torch


def pinned(data, device):
    """A list or a CPU tensor as a CPU tensor that is copied to `device` without waiting.

    A copy from memory that is not pinned may wait for all that a GPU has queued.
    """
    data = data if torch.is_tensor(data) else torch.tensor(data)
    return data.pin_memory() if device.type == "cuda" else data


def to_device(data, device):
    """A list or a CPU tensor as a tensor on `device`."""
    return pinned(data, device).to(device, non_blocking=True)


def to_host(tensor):
    """Begin to copy a tensor to the host; returns a function that waits for the copy and gives it.

    In between the host can give a GPU more to do.
    """
    copy = tensor.to("cpu", non_blocking=True, copy=True)  # from a GPU to pinned memory
    if not tensor.is_cuda:
        return lambda: copy
    ready = torch.cuda.Event()
    ready.record()
    return lambda: ready.synchronize() or copy
