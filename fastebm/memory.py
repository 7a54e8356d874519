"""How much memory there is, and whether a result fits into it: asked before any work is done for it."""

from __future__ import annotations

import os
import resource

import torch


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a device can give to this process: all of a GPU's, or what the system has free, swap included.

    Where the system does not tell, as other ones than Linux, all that the machine has.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        with open("/proc/meminfo") as file:
            kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in file)}
        free = 1024 * (kibibytes["MemAvailable"] + kibibytes["SwapFree"])
    except (OSError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else min(free, limit)


def check_memory(what: str, needed: int, device: torch.device | str = "cpu") -> None:
    """Raises ValueError where `what` takes more bytes than there are on a device."""
    free = free_memory(device)
    if needed > free:
        raise ValueError(f"{what} would need {size_in_words(needed)} of memory, and {size_in_words(free)} are free")


def size_in_words(number_of_bytes: int) -> str:
    """Bytes in the largest unit of which there is one: "1.5 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(max(0, (max(1, number_of_bytes).bit_length() - 1) // 10), len(units) - 1)
    return f"{number_of_bytes / 1024**power:,.4g} {units[power]}"
