"""Differential privacy of the model towards everyone but the server: clients drawn, bounded, summed, noised, divided.

McMahan et al. 2018 (arXiv 1710.06963), DP-FedAvg with fixed denominators [N]. The neighbour of a run is the run to
which one client contributes nothing; all public numbers stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.state import BIASES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.privacy.account import EXTRA, Account, stopped
from fedmoe_core.privacy.chance import Chance, Draws, Secret, Seeded
from fedmoe_core.privacy.clipping import clip_share, sensitivity
from fedmoe_core.privacy.discrete_gaussian import discrete_gaussian
from fedmoe_core.privacy.masked import refuse_without_ciphers
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.means import Sums

# sigma is from 2^23 to 2^24 units of the sums. So fine a grid costs nothing (rounding moves a number by at most 1/2),
# and the noise differs from a rounded continuous Gaussian, for which the account is exact, by a total variation below
# sqrt(N / 1152) / sigma^2 over N numbers: 4e-13 for a million.
GRID_BITS = 23


@dataclass(frozen=True)
class Central:
    """The differentially private part of a run's rounds.

    Attributes:
        clip: largest L2 norm of a client's part of the sums.
        noise: sigma over ``clip``.
        clients: of the run.
        drawn: how many take part in a round on average, and what every sum is divided by.
        chance: from which clients and noise are drawn.
        bound: ``aggregation.value_bound`` and ``aggregation.norm_bound``.
    """

    clip: float
    noise: float
    clients: int
    drawn: int
    chance: Chance
    bound: tuple[float, float]

    @classmethod
    def of(cls, config: Config, secret: Secret | None = None) -> Central | None:
        """Return the private part of a run; None where ``privacy.clip`` is 0.

        Args:
            config: of the run.
            secret: of the run, where it has one.

        Raises:
            ValueError: the run has a secret, and it is not here; its seed does not stand in for it.
        """
        privacy, rule = config.privacy, config.aggregation
        if not privacy.clip:
            return None
        if privacy.secret and secret is None:
            raise ValueError("privacy.secret=true needs the secret of the run; start it by simulate.run or resume it")
        chance = secret if secret is not None and privacy.secret else Seeded(config.seed)
        drawn, bound = config.clients_per_round or config.clients, (rule.value_bound, rule.norm_bound)
        return cls(privacy.clip, privacy.noise, config.clients, drawn, chance, bound)

    @property
    def settings(self) -> SumSettings:
        """The number format of the sums: its grid follows from the noise, and any weight above 0 counts as 1."""
        scale_bits = GRID_BITS - math.floor(math.log2(self.clip * (self.noise or 1.0)))
        value_bound, norm_bound = self.bound
        return SumSettings(scale_bits, value_bound, norm_bound, weight_bits=1, max_clients=self.clients)

    @property
    def sigma(self) -> int:
        """The noise of each sum, in units of the sums; never below ``noise`` times the sensitivity."""
        return math.ceil(Fraction(self.noise) * sensitivity(self.settings, self.clip))

    def sample(self, round: int, present: Collection[int]) -> list[int]:
        """Draw each client by itself, by a chance of exactly drawn / clients; ascending."""
        draws = self.chance.at(round).draws("sample-each")
        takes_part = draws.integers(0, self.clients, self.clients) < self.drawn
        return [client for client in sorted(present) if takes_part[client]]

    def share(self, update: ClientUpdate, plan: ExpertPlan, specs: tuple[ParamSpec, ...]) -> float:
        """Return what the deltas of an update are multiplied by; see ``clip_share``."""
        return clip_share(update, plan, specs, self.settings, self.clip)

    def released(self, sums: Sums, round: int) -> Sums:
        """Return sums that may be told: noise on every number that some client could have moved, public denominators.

        Who trained an expert, how many clients answered and what they weighed are data, so noise is on the sums of
        experts without a trainer too, and every sum is divided by ``drawn``.
        """
        den, moving = self.drawn * sums.settings.top_weight, moved_by_training(sums.specs)
        noised, chance = dict(sums.numerators), self.chance.at(round)
        for place, spec in enumerate(sums.specs):
            if spec in moving:
                noised[spec.key] = self._noised(noised[spec.key], chance.draws("privacy-noise", place))
        return replace(
            sums,
            numerators=noised,
            expert_den_LE=torch.full_like(sums.expert_den_LE, den),
            router_den_LE=torch.full_like(sums.router_den_LE, den),
            expert_voters_LE=torch.full_like(sums.expert_voters_LE, self.drawn),
            router_voters_LE=torch.full_like(sums.router_voters_LE, self.drawn),
            gate_den=den,
            dense_den=den,
            round_den=den,
            accepted=self.drawn,
        )

    def _noised(self, total: Tensor, draws: Draws) -> Tensor:
        noise = torch.from_numpy(discrete_gaussian(self.sigma, total.numel(), draws))
        return total + noise.view(total.shape).to(total.device)


def moved_by_training(specs: tuple[ParamSpec, ...]) -> tuple[ParamSpec, ...]:
    """Return the tensors that clients send; beside adapters biases have a sum, and stay as they are."""
    adapted = any(spec.name in FACTORS for spec in specs)
    return tuple(spec for spec in specs if not (adapted and spec.name in BIASES))


def refuse_unfit(config: Config, *, sums_alone: bool) -> None:
    """Refuse privacy for a system that learns of clients past the sums, and a limit that the first round would pass.

    Args:
        config: of the run.
        sums_alone: as the attribute of the algorithm's class.

    Raises:
        ValueError: one of them, or a package of the extra is not installed.
    """
    refuse_without_ciphers(config)
    if config.privacy.secret:
        _refuse_without_stream()
    if not config.privacy.clip:
        return
    if not sums_alone:
        raise ValueError(
            f"privacy.clip={config.privacy.clip:g} is not for algorithm={config.algorithm!r}: it does not say that "
            "what one client measures reaches others through noised sums alone (sums_alone); choose hfedmoe, "
            "hfedmoe_plus, random, most_activated, reap_experts, fedavg or fedavg_smallest, or set privacy.clip=0"
        )
    account = Account.of(config)
    if account is not None and (why := stopped(config)) and not account.affordable(config.rounds):
        raise ValueError(f"{why}; raise privacy.epsilon or privacy.noise, or lower clients_per_round")


def _refuse_without_stream() -> None:
    try:
        import fedmoe_core.privacy.stream  # noqa: F401
    except ImportError as error:
        raise ValueError(f"privacy.secret needs cryptography, which is not installed ({error}); {EXTRA}") from error
