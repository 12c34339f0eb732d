"""Published devices: memory and power, the figures that hold for any model.

jetson-tx2: 8 GB, 15 W.  jetson-xavier-nx: 16 GB, 20 W.  a100: 80 GB, 400 W.  h100 (SXM): 80 GB, 700 W.  Read at
huggingface.co/hardware/<name>, as the makers state them.  Seconds of a step and tokens per second depend on the model,
its precision and its runtime, so no preset has them; nor has any a link, which is the place's and not the device's.
"""

from __future__ import annotations

from rayfed_sub.config.schema import Device

PRESETS: dict[str, tuple[int, float]] = {
    "jetson-tx2": (8 * 10**9, 15.0),
    "jetson-xavier-nx": (16 * 10**9, 20.0),
    "a100": (80 * 10**9, 400.0),
    "h100": (80 * 10**9, 700.0),
}
"""Bytes of memory and watts by name."""


def memory_of(device: Device) -> int | None:
    """Bytes of the device's memory: its own, or its preset's; None where neither is known."""
    if device.memory is not None:
        return int(device.memory)
    return None if device.preset is None else PRESETS[device.preset][0]


def power_of(device: Device) -> float | None:
    """Watts while it trains, as `memory_of`."""
    if device.power is not None:
        return device.power
    return None if device.preset is None else PRESETS[device.preset][1]
