"""How the MoE blocks of a stock model are made, in the words of our layer: read from the modules, and tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from fedmoe_bindings.transformers.live.switch import RULE, TOP_K, switch_activation, switch_tensors
from fedmoe_bindings.transformers.split.families import SPLIT
from fedmoe_bindings.transformers.stock.blocks import StockBlock
from fedmoe_bindings.transformers.stock.cut import named_tensors
from fedmoe_bindings.transformers.stock.experts import halves, in_turn
from fedmoe_bindings.transformers.stock.forms import form_of
from fedmoe_bindings.transformers.stock.outside import SwitchExperts
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.state import LayerState
from fedmoe_kernels.routing.route import route

# Where most families keep their tensors.
STOCK = MappingProxyType({"router": "gate.weight", "w_in": "experts.gate_up_proj", "w_out": "experts.down_proj"})
Absent = Literal["auto", "renormalize", "share"]
_TRIED_TOKENS = 64
_SAME = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUGHLY_SAME = 5e-2


@dataclass(frozen=True)
class Family:
    """How one model's MoE blocks are made.

    Attributes:
        rule: how its router sends tokens to experts.
        top_k: k; None = the configuration's ``num_experts_per_tok``.
        activation: of its experts, as ``fedmoe_kernels.moe_mlp``.
        tensors: where its block keeps each tensor of a ``LayerState``, by our name; ``{}`` in a place stands for the
            number of an expert, where each has a tensor of its own.
        shared: the block's children that are its shared expert: a module, and a sigmoid gate on it if there is one.
        transposed, interleaved: as ``Form``, of the experts' matrices.
        pair: the block returns a second value beside the hidden states.
        unit: our router's rows over the stock ones; a power of two, so that the way there and back keeps every bit.
    """

    rule: RoutingRule
    top_k: int | None = None
    activation: str = "swiglu"
    tensors: Mapping[str, str] = field(default_factory=lambda: STOCK)
    shared: tuple[str, ...] = ()
    transposed: bool = False
    interleaved: bool = False
    pair: bool = False
    unit: float = 1.0

    def state(self, block: StockBlock) -> LayerState:
        """Return the block's own tensors under our names and in our layout."""
        held: dict[str, Tensor] = {}
        for ours, place in self.tensors.items():
            each = [place.format(n) for n in range(block.num_experts)] if "{}" in place else []
            stacked = torch.stack([_at(block.module, p) for p in each]) if each else _at(block.module, place)
            held[ours] = self.ours(ours, stacked)
        return LayerState.of(held)

    def stock_tensors(self, block: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's tensors, global ones under our names, under the stock names and in the stock layout."""
        found: dict[str, Tensor] = {}
        for ours, place in self.tensors.items():
            value = self.stock(ours, state[ours])
            if "{}" in place:
                found |= {f"{block}.{place.format(n)}": own for n, own in enumerate(value)}
            else:
                found[f"{block}.{place}"] = value
        return found

    def ours(self, name: str, stock: Tensor) -> Tensor:
        """Lay a stock tensor out as our layer has it."""
        if self.transposed and name in ("w_in", "w_out"):
            stock = stock.mT
        if name == "router" and self.unit != 1.0:
            stock = stock * self.unit
        return halves(stock) if self.interleaved and name in ("w_in", "bias_in") else stock

    def stock(self, name: str, ours: Tensor) -> Tensor:
        """Lay one of our tensors out as the stock block has it, the inverse of ``ours``."""
        if self.interleaved and name in ("w_in", "bias_in"):
            ours = in_turn(ours)
        if name == "router" and self.unit != 1.0:
            ours = ours / self.unit
        return ours.mT.contiguous() if self.transposed and name in ("w_in", "w_out") else ours


def family_of(block: StockBlock) -> Family:
    """Find out how a stock block is made: its layout from its marks, its routing rule by trying.

    Raises:
        ValueError: our layer has no such experts, router or shared expert; the sentence says which.
    """
    if block.outside not in (None, SwitchExperts):
        raise ValueError(
            f"the experts of {block.name} do not run through transformers' experts interface; the simulator does not "
            "serve them, use_fedmoe does"
        )
    if block.outside is SwitchExperts:
        _refuse_noise(block)
        return Family(RULE, TOP_K, switch_activation(block), switch_tensors(block))
    form = form_of(block.experts)
    if not form.fused:
        raise ValueError(
            f"the experts of {block.name} ({type(block.experts).__name__}) have an activation or a norm that "
            "fedmoe's layer does not have; use use_fedmoe, which runs the module's own"
        )
    first = "gate_up_proj" if form.gated else "up_proj"
    inside = block.experts_name
    tensors = {"w_in": f"{inside}.{first}", "w_out": f"{inside}.down_proj"}
    if form.biased:
        tensors |= {"bias_in": f"{inside}.{first}_bias", "bias_out": f"{inside}.down_proj_bias"}
    tensors |= _steering(block)
    rule, top_k = _rule(block, tensors)
    _refuse_noise(block)  # after the rule: what PhiMoE calls jitter is a threshold of its rule, no chance
    with torch.no_grad():
        width, like = _at(block.module, tensors["router"]).shape[1], _at(block.module, tensors["w_out"])
        pair = isinstance(_run(block, _tokens(width, like)[:1]), tuple)
    return Family(
        rule,
        top_k,
        cast(str, form.activation),
        tensors,
        _shared(block),
        form.transposed,
        form.interleaved,
        pair,
    )


def inflates(family: Family, config: PreTrainedConfig) -> bool:
    """Tell whether weights are renormalised in a model that was split, whose experts' outputs add up."""
    return bool(getattr(config, SPLIT, None)) and family.rule.renormalize is True


def of_split(family: Family, config: PreTrainedConfig, *, absent: Absent) -> Family:
    """Return the family with what becomes of weight on absent experts; "auto" asks the model's configuration.

    A model that ``split`` made has its router in natural units here, and its weights are shares: see ``RoutingRule``.

    Args:
        family: as its blocks were found.
        config: of the model.
        absent: "share" leaves their weight out, "renormalize" gives it to the others; "auto": share for a split model.

    Raises:
        ValueError: "share" was asked of a family whose weights are not a softmax that sums to 1.
    """
    told = getattr(config, SPLIT, None)
    if absent == "renormalize" or (absent == "auto" and not told):
        return family
    rule = family.rule
    if rule.scoring == "sigmoid" or not rule.renormalize:
        raise ValueError(
            f"absent='share' is for routers whose weights are a softmax that sums to 1, and this one is {rule.scoring} "
            f"with renormalize={rule.renormalize}; leave it at auto"
        )
    unit, k = float(told["temperature"]) if told else 1.0, family.top_k or config.num_experts_per_tok
    return replace(family, rule=replace(rule, renormalize="share", of=k, temperature=unit), unit=unit)


def _refuse_noise(block: StockBlock) -> None:
    noisy = [n for m in (block.module, block.router) for n, value in vars(m).items() if "jitter" in n and value]
    if noisy:
        raise ValueError(
            f"{block.name} has {noisy[0]}, which fedmoe's layer does not have; set router_jitter_noise=0 and the like "
            "in the model's configuration, or use use_fedmoe"
        )


@torch.no_grad()
def check_layer(block: StockBlock, layer: MoE) -> None:
    """Compare a layer with the block it was made of on a few tokens.

    Raises:
        ValueError: they differ by more than rounding.
    """
    x_TH = _tokens(layer.hidden_size, layer.w_in)
    if x_TH.device.type == "meta":
        return
    want = _run(block, x_TH)
    want_TH = (want[0] if isinstance(want, tuple) else want).reshape(x_TH.shape).double()
    y_TH, layer.last_stats = layer(x_TH), None
    error_T = (y_TH.double() - want_TH).norm(dim=1) / want_TH.norm(dim=1).clamp(min=1e-30)
    error = float(error_T.median())  # of a token; in 16 bits a tie may send one to another expert
    if not error <= _SAME.get(x_TH.dtype, _ROUGHLY_SAME):
        raise ValueError(
            f"{block.name} ({type(block.module).__name__}) computes something else than fedmoe's layer with the same "
            f"weights (a token differs by {error:.1e}); use use_fedmoe, which leaves the block as it is"
        )


def _steering(block: StockBlock) -> dict[str, str]:
    """Where the router's matrix and the biases of experts are."""
    count = block.num_experts
    found: dict[str, str] = {}
    places = {f"{block.router_name}.{name}": value for name, value in named_tensors(block.router).items()}
    places |= {name: value for name, value in named_tensors(block.module).items() if "." not in name}
    for place, value in places.items():
        name = place.rpartition(".")[2]
        if value.dim() == 2 and value.shape[0] == count and "router" not in found:
            found["router"] = place
        elif value.shape == (count,):
            ours = "router_bias" if name == "bias" else "correction_bias"
            if ours in found:
                raise ValueError(f"the router of {block.name} has two tensors of one number per expert, {place} one")
            found[ours] = place
        elif place.startswith(f"{block.router_name}."):
            raise ValueError(
                f"the router of {block.name} has {place}, which a router of fedmoe's layer does not have; use "
                "use_fedmoe, which runs the router itself"
            )
    if "router" not in found:
        raise ValueError(f"the router of {block.name} has no matrix with a row for each of its {count} experts")
    return found


def _rule(block: StockBlock, tensors: Mapping[str, str]) -> tuple[RoutingRule, int]:
    """The first of our rules that routes random tokens as the router does, and k; with random weights and biases."""
    generator = torch.Generator().manual_seed(0)
    router, inside = block.router, f"{block.router_name}."
    count, width = block.num_experts, _at(block.module, tensors["router"]).shape[1]
    drawn: dict[str, Tensor] = {}
    for ours in ("router", "router_bias", "correction_bias"):
        if ours in tensors:
            shape = (count, width) if ours == "router" else (count,)
            drawn[ours] = torch.randn(shape, generator=generator) * (width**-0.5 if ours == "router" else 0.3)
    x_TH = torch.randn(_TRIED_TOKENS, width, generator=generator)
    swapped = {p.removeprefix(inside): drawn[o] for o, p in tensors.items() if o in drawn and p.startswith(inside)}
    handed = [drawn[o] for o, p in tensors.items() if o in drawn and not p.startswith(inside)]
    training = router.training
    try:
        router.eval()
        with torch.no_grad():
            _, weights_TK, ids_TK, *_ = functional_call(router, swapped, (x_TH, *handed))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the router of {block.name} cannot be tried by itself ({reason}); use use_fedmoe, which runs it in place"
        ) from error
    finally:
        router.train(training)
    want_TE = _dense(weights_TK.float(), ids_TK, count)
    logits_TE = x_TH @ drawn["router"].T + drawn.get("router_bias", torch.zeros(()))
    k = ids_TK.shape[1]
    for rule in _rules(block, count, corrected="correction_bias" in drawn):
        routing = route(
            logits_TE,
            k,
            scoring=rule.scoring,
            renormalize=rule.renormalize,
            bias_E=drawn.get("correction_bias"),
            groups=rule.groups,
            scale=rule.scale,
        )
        found_TE = _dense(routing.weights_TK, routing.experts_TK, count)
        if float((found_TE - want_TE).norm()) < 1e-3 * float(want_TE.norm()):
            return rule, k
    raise ValueError(
        f"the router of {block.name} ({type(router).__name__}) follows none of the rules of fedmoe's layer (softmax, "
        "topk_softmax, sigmoid; groups; scale); use use_fedmoe, which runs the router itself"
    )


def _rules(block: StockBlock, count: int, *, corrected: bool) -> Iterator[RoutingRule]:
    """What a router may follow, by the numbers that it carries."""
    router: Any = block.router
    names = ("num_group", "n_group", "num_groups"), ("topk_group", "topk_groups")
    groups = tuple(next((getattr(router, n) for n in group if hasattr(router, n)), None) for group in names)
    scales = {1.0, *(float(s) for m in (router, block.module) if (s := getattr(m, "routed_scaling_factor", None)))}
    for scoring in ("sigmoid",) if corrected else ("softmax", "topk_softmax", "sigmoid"):
        grouped = scoring == "sigmoid" and None not in groups and cast(int, groups[0]) > 1
        choices = [cast("tuple[int, int]", groups), None] if grouped else [None]
        for renormalize, scale, chosen in product((True, False), sorted(scales), choices):
            rule = RoutingRule(scoring, renormalize, chosen, scale)
            rule.check(count)
            yield rule


def _dense(weights_TK: Tensor, ids_TK: Tensor, count: int) -> Tensor:
    here_TK = (ids_TK >= 0) & (ids_TK < count)
    return torch.zeros(len(ids_TK), count).scatter_add_(1, ids_TK.where(here_TK, 0), weights_TK.where(here_TK, 0.0))


def _shared(block: StockBlock) -> tuple[str, ...]:
    """The block's other children with weights: a shared expert, and the linear gate on it."""
    own = {block.experts_name.partition(".")[0], block.router_name}
    others = {n: m for n, m in block.module.named_children() if n not in own and next(m.parameters(), None) is not None}
    gates = [n for n, m in others.items() if isinstance(m, nn.Linear) and m.out_features == 1]
    inside = [n for n in others if n not in gates]
    if len(inside) > 1 or len(gates) > len(inside):
        raise ValueError(
            f"{block.name} has {', '.join(others)} beside its experts; fedmoe's layer has one shared expert"
        )
    return (*inside, *gates)


def _run(block: StockBlock, x_TH: Tensor) -> Any:
    """What the block gives with transformers' eager experts, in evaluation mode; each token a sequence of its own."""
    config: Any = getattr(block.experts, "config", None)
    training, chosen = block.module.training, getattr(config, "_experts_implementation", None)
    try:
        block.module.eval()
        if config is not None:
            config._experts_implementation = "eager"
        return block.module(x_TH[:, None].clone())
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{block.name} ({type(block.module).__name__}) does not run on hidden states alone ({reason}); use "
            "use_fedmoe, which leaves it in place"
        ) from error
    finally:
        block.module.train(training)
        if config is not None:
            config._experts_implementation = chosen


def _tokens(width: int, like: Tensor) -> Tensor:
    drawn = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    return drawn.to(like.device, like.dtype)


def _at(module: nn.Module, place: str) -> Tensor:
    inside, _, name = place.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(inside), name))
