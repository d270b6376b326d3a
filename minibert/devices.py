"""Where tensors can be: the device that a user named, or an error that says what there is."""

import torch


def find_device(name: str | torch.device) -> torch.device:
    """The device with this name: "cpu", "cuda", "cuda:1", …

    Raises ValueError, naming what there is, if torch knows no such device or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "no cuda"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the device {name} cannot be used here, where there is cpu and {gpus} ({reason}). cpu is everywhere"
        ) from error
    return device
