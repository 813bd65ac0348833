"""How numbers of the host get to the device that computes. Imports nothing of ours."""
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
