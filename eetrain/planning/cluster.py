"""The devices a plan is made for: published numbers, to be replaced by measured ones where there are some."""

from __future__ import annotations

from dataclasses import dataclass

from eetrain.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        flops: peak FLOP/s with dense bfloat16 matrices.
        memory: bytes.
        bandwidth: bytes per second to another device of the same node, one way.
    """

    flops: float
    memory: float
    bandwidth: float


DEVICES = {
    "a100-40gb": Device(312e12, 40e9, 300e9),
    "a100-80gb": Device(312e12, 80e9, 300e9),
    "h100": Device(989e12, 80e9, 450e9),
    "h200": Device(989e12, 141e9, 450e9),
    "b200": Device(2250e12, 180e9, 900e9),
    "l40s": Device(362e12, 48e9, 32e9),
    "rtx-4090": Device(165e12, 24e9, 32e9),
    "mi300x": Device(1307e12, 192e9, 64e9),
}
"""From the makers' data sheets: SXM modules with NVLink, L40S and RTX 4090 on PCIe 4, one link of the MI300X."""


@dataclass(frozen=True)
class Cluster:
    """Equal devices.

    Args:
        devices: how many.
        flops: peak FLOP/s of each.
        memory: bytes of each.
        bandwidth: bytes per second between stages and between replicas, one way.
        utilisation: share of the peak that matrix products reach, in (0, 1]; an assumption to be measured.
        latency: seconds a transfer takes besides.

    Raises:
        ConfigError: a number out of its range.
    """

    devices: int
    flops: float
    memory: float
    bandwidth: float
    utilisation: float = 0.4
    latency: float = 1e-5

    def __post_init__(self) -> None:
        checks = {
            "devices": self.devices >= 1,
            "flops": self.flops > 0,
            "utilisation": 0 < self.utilisation <= 1,
            "memory": self.memory > 0,
            "bandwidth": self.bandwidth > 0,
            "latency": self.latency >= 0,
        }
        for name, good in checks.items():
            if not good:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is out of its range.",
                    hint="Numbers of a cluster are positive, its utilisation at most 1.",
                )

    @property
    def speed(self) -> float:
        """FLOP/s that a stage computes with."""
        return self.flops * self.utilisation

    def transfer(self, size: float) -> float:
        """Seconds to send ``size`` bytes from one device to another."""
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, members: int) -> float:
        """Seconds to sum ``size`` bytes over ``n`` members in a ring: ``2 (n - 1) / n`` of them pass each link."""
        steps = 2 * (members - 1)
        return steps * self.latency + steps / members * size / self.bandwidth


def find_device(name: str) -> Device:
    """A device by its name.

    Raises:
        ConfigError: an unknown one.
    """
    if name not in DEVICES:
        raise ConfigError(
            f"device={name!r} is not known.",
            hint=f"One of: {', '.join(DEVICES)}; or custom, with flops, memory and bandwidth.",
        )
    return DEVICES[name]
