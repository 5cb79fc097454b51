"""Device profiles: what a named piece of hardware can bear in one round, with the source of every fact."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3
MIB = 1024**2

# Assumed for every profile [E]: a device gives a round 10 minutes of arithmetic at 30 % of its peak rate, and one
# minute of its link each way. They turn rates, which data sheets state, into amounts per round, which budgets need.
COMPUTE_SECONDS = 600.0
COMPUTE_SHARE = 0.3
LINK_SECONDS = 60.0
# Energy of links [E]: 0.05 microjoules a byte on a wire, 0.1 on Wi-Fi, 1 on a mobile network. Orders of magnitude, for
# comparing plans on one device; measure your own before you believe a battery.


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: how a budget refers to it.
        memory_bytes: memory of the device, or the limit simulated on it.
        memory_share: the part of it that training may use; the rest is the system's.
        flops_per_second: peak rate; None = not known, so its arithmetic is not limited and takes no time.
        down_mbit, up_mbit: link rates in 10^6 bits a second; None = not limited by this profile, and takes no time.
        watts: power of the whole device while it trains; None = its energy is not known.
        joules_per_byte: of its link, each way.
        limits_flops: whether the peak rate limits a round's operations; else time alone is predicted from it.
        source: where the hardware facts come from.
        assumed: what no source states.
    """

    name: str
    memory_bytes: int
    memory_share: float
    flops_per_second: float | None
    down_mbit: float | None
    up_mbit: float | None
    source: str
    assumed: str
    watts: float | None = None
    joules_per_byte: float = 0.0
    limits_flops: bool = True

    @property
    def joules_per_flop(self) -> float:
        """Energy of an operation at the rate that a round is taken to reach; 0 where power or rate is not known."""
        if self.watts is None or self.flops_per_second is None:
            return 0.0
        return self.watts / (self.flops_per_second * COMPUTE_SHARE)

    @property
    def reached_flops(self) -> float | None:
        """Floating-point operations a second that training is taken to reach."""
        return None if self.flops_per_second is None else self.flops_per_second * COMPUTE_SHARE

    @property
    def down_bits(self) -> float | None:
        """Bits a second to the device."""
        return None if self.down_mbit is None else self.down_mbit * 1e6

    @property
    def up_bits(self) -> float | None:
        """Bits a second from the device."""
        return None if self.up_mbit is None else self.up_mbit * 1e6

    @property
    def usable_bytes(self) -> int:
        """Memory for weights, gradients, optimizer state and activations."""
        return int(self.memory_bytes * self.memory_share)

    @property
    def round_flops(self) -> float | None:
        """Most floating-point operations of one round."""
        if self.flops_per_second is None or not self.limits_flops:
            return None
        return self.flops_per_second * COMPUTE_SECONDS * COMPUTE_SHARE

    @property
    def round_down(self) -> int | None:
        """Bytes that reach the device in one round."""
        return None if self.down_mbit is None else int(self.down_mbit * 1e6 / 8 * LINK_SECONDS)

    @property
    def round_up(self) -> int | None:
        """Bytes that leave the device in one round."""
        return None if self.up_mbit is None else int(self.up_mbit * 1e6 / 8 * LINK_SECONDS)


def _jetson(gib: int) -> Device:
    """Jetson AGX Xavier with the memory limit that HFedMoE simulates on it (12 to 32 GB, section 'Experiments' [N])."""
    board = gib == 32
    return Device(
        f"jetson-agx-xavier-{gib}gb",
        gib * GIB,
        0.9 if board else 1.0,
        11e12,
        1000.0,
        1000.0,
        "HFedMoE, arXiv 2601.00583, testbed of 4 boards limited to 12..32 GB [N]; NVIDIA Jetson AGX Xavier data sheet: "
        "512-core Volta GPU with 64 tensor cores, 32 GB LPDDR4x, 11 TFLOPS fp16, gigabit Ethernet",
        "0.9 of the whole board's memory is free; a simulated limit is the training process's own; its 30 W power mode",
        watts=30.0,
        joules_per_byte=5e-8,
    )


def _tiny(mib: int, down_mb: float, up_mb: float, gflops: float) -> Device:
    """An invented device, small enough that a demo-sized model (about 1 M parameters) does not fit whole.

    Its peak of 10^9 operations a second limits nothing; it is there for the clock, on which such devices shall differ.
    """
    return Device(
        f"tiny-{mib}mib",
        mib * MIB,
        1.0,
        gflops * 1e9,
        down_mb * 8 / LINK_SECONDS,
        up_mb * 8 / LINK_SECONDS,
        "none: invented so that a small model meets hard limits",
        "everything",
        limits_flops=False,
    )


DEVICES: tuple[Device, ...] = (
    *(_jetson(gib) for gib in (12, 16, 20, 24, 28, 32)),
    Device(
        "phone-8gb",
        8 * GIB,
        0.25,
        1e12,
        100.0,
        20.0,
        "Samsung Galaxy S23 has 8 GB of memory (maker's specification)",
        "a background job may use a quarter of memory; 1 TFLOPS; mobile link of 100 Mbit/s down, 20 Mbit/s up; "
        "4 W while it trains",
        watts=4.0,
        joules_per_byte=1e-6,
    ),
    Device(
        "laptop-8gb",
        8 * GIB,
        0.5,
        2e12,
        200.0,
        50.0,
        "Apple MacBook Air (M2): 8 GB of unified memory in the base model (maker's specification)",
        "half of memory is free; 2 TFLOPS; home link of 200 Mbit/s down, 50 Mbit/s up; 20 W",
        watts=20.0,
        joules_per_byte=1e-7,
    ),
    Device(
        "workstation-rtx4090",
        24 * GIB,
        0.9,
        82.6e12,
        1000.0,
        1000.0,
        "NVIDIA GeForce RTX 4090: 24 GB GDDR6X, 82.6 TFLOPS fp32 without tensor cores (maker's specification)",
        "0.9 of memory is free of display and context; gigabit link; 450 W, the card's rated power",
        watts=450.0,
        joules_per_byte=5e-8,
    ),
    Device(
        "raspberry-pi-5-8gb",
        8 * GIB,
        0.75,
        2 * 4 * 4 * 2.4e9 * 2,
        1000.0,
        1000.0,
        "Raspberry Pi 5: four Cortex-A76 cores at 2.4 GHz, 8 GB LPDDR4X, gigabit Ethernet (maker's specification)",
        "three quarters of memory are free; peak = 4 cores x 2 fp32 vector units x 4 lanes x 2 operations; 8 W",
        watts=8.0,
        joules_per_byte=5e-8,
    ),
    _tiny(19, 2.2, 0.7, 0.5),
    _tiny(20, 2.5, 1.0, 1.0),
    _tiny(22, 3.2, 1.2, 1.0),
    _tiny(26, 4.6, 3.2, 2.0),
    _tiny(40, 8.0, 6.0, 4.0),
)


def find_device(name: str) -> Device | None:
    """Return the profile of that name, or None."""
    return next((device for device in DEVICES if device.name == name), None)
