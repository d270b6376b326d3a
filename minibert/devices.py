"""Where tensors can be: the device that a user named, or an error that says what there is."""

import torch


def find_device(name: str | torch.device) -> torch.device:
    """The device with this name: "cpu", "cuda", "cuda:1", "mps", …; "auto" is CUDA where there is one, else the CPU.

    Raises ValueError, naming what there is, if torch knows no such device or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "no cuda"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the device {name} cannot be used here, where there is cpu and {gpus}"
            f"{' and mps' if torch.backends.mps.is_available() else ''} ({reason}). cpu is everywhere"
        ) from error
    return device


def computing_device(name: str) -> torch.device:
    """`find_device` for a command, which needs numbers: "meta" has none."""
    device = find_device(name)
    if device.type == "meta":
        raise ValueError("--device meta holds no numbers: choose auto, cpu, cuda or mps")
    return device
