"""The states of the global random generators, as tensors of fixed shapes, which ranks can gather."""

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def torch_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's global generators, uint8: "torch" for the CPU, "device" for another device."""
    states = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """`torch_states`, and the states of Python's and numpy's global generators, in fixed shapes.

    "python" and "numpy" are int64 (627,): 624 words, the index of the next word, and the spare normal
    deviate (whether there is one, and its bits).
    """
    _, words, spare = random.getstate()
    _, keys, index, has_spare, numpy_spare = cast(tuple[Any, ...], np.random.get_state())
    return torch_states(device) | {
        "python": torch.tensor([*words, *_bits(spare)]),
        "numpy": torch.tensor([*keys.tolist(), index, *_bits(numpy_spare if has_spare else None)]),
    }


def set_rng_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the global generators to the states that `rng_states` gave."""
    torch.set_rng_state(states["torch"].clone())  # torch ignores the offset of a view
    *words, has_spare, bits = states["python"].tolist()
    random.setstate((3, tuple(words), _float(bits) if has_spare else None))
    *keys, index, has_spare, bits = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), index, has_spare, _float(bits)))
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"].clone())


def _bits(spare: float | None) -> tuple[int, int]:
    return int(spare is not None), int(np.float64(spare or 0.0).view(np.int64))


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
