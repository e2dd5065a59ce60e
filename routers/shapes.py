"""Which parameters a router has: names, shapes and starting values, from its settings alone.

The modules are built from these tables and the counts are sums over them, so they cannot differ.
Nothing here imports torch.

Shapes:  D model width   E experts, all ranks   H width of the recurrent state
"""

import math
from dataclasses import dataclass

from gatewise.routers.config import Cell, RouterConfig, RouterStart, Scorer, Selector

__all__ = ["Start", "Weight", "layer_weights", "router_parameters", "shared_weights", "state_width"]


@dataclass(frozen=True, slots=True)
class Start:
    """How a parameter starts."""

    kind: str = "scaled"  # normal with std value * the model's; or: normal, uniform, constant
    value: float = 1.0  # std of normal, bound of uniform, the constant


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter."""

    shape: tuple[int, ...]
    start: Start = Start()


# Standard deviation of a state at its start, in the mean over twelve layers of unit-variance
# input; measured, and held by a test. By cell and by whether the cell reads the token itself.
_STATE_STD = {
    (Cell.gru, False): 0.185,
    (Cell.gru, True): 0.28,
    (Cell.rnn, False): 0.35,
    (Cell.rnn, True): 0.49,
    (Cell.lstm, False): 0.094,
    (Cell.lstm, True): 0.138,
}
_GATES = {Cell.gru: 3, Cell.rnn: 1, Cell.lstm: 4}
_RELEASE_STD = 0.02


def layer_weights(config: RouterConfig, hidden: int, num_experts: int) -> dict[str, Weight]:
    """Return the parameters that each MoE layer has of its own.

    Args:
        config: settings.
        hidden: D.
        num_experts: E.
    """
    makers = {
        Scorer.linear: _linear_layer,
        Scorer.cosine: _cosine_layer,
        Scorer.mlp: _mlp_layer,
        Scorer.recurrent: _recurrent_layer,
    }
    # sparsity reads the experts' own weights, hash nothing, and a pre-gate may have the scores
    if config.scorer not in makers or config.ahead.weighs:
        return {}
    return makers[config.scorer](config, hidden, num_experts)


def shared_weights(config: RouterConfig, hidden: int) -> dict[str, Weight]:
    """Return the parameters that all MoE layers share: the recurrent scorer's cell, or none.

    Args:
        config: settings.
        hidden: D.
    """
    if config.scorer is not Scorer.recurrent:
        return {}
    width, rows = config.state_dim, _GATES[config.cell] * config.state_dim
    read = hidden if config.shared_projection else width
    release = Start("normal", _RELEASE_STD)
    matched = config.start is RouterStart.matched
    from_input = Start("uniform", read**-0.5) if matched else release
    from_state = Start("uniform", width**-0.5) if matched else release
    return {
        "weight_ih": Weight((rows, read), from_input),
        "weight_hh": Weight((rows, width), from_state),
        "bias_ih": Weight((rows,), from_state),
        "bias_hh": Weight((rows,), from_state),
    }


def state_width(config: RouterConfig, num_experts: int) -> int:
    """Return the width of what the recurrent scorer hands to the next layer; 0 for nothing."""
    width = 0
    if config.scorer is Scorer.recurrent:
        if config.recurrence.name != "none":
            width += config.state_dim * (2 if config.cell is Cell.lstm else 1)
        if config.residual_scores:
            width += num_experts
    return width


def router_parameters(config: RouterConfig, *, hidden: int, num_experts: int, layers: int) -> int:
    """Count the parameters of all routers of a model.

    Args:
        config: settings.
        hidden: D.
        num_experts: E.
        layers: MoE layers.
    """
    own = sum(math.prod(w.shape) for w in layer_weights(config, hidden, num_experts).values())
    shared = sum(math.prod(w.shape) for w in shared_weights(config, hidden).values())
    return layers * own + (shared if layers else 0)


def _linear_layer(config: RouterConfig, hidden: int, num_experts: int) -> dict[str, Weight]:
    if config.selector is Selector.soft:
        return {"weight": Weight((num_experts * config.slots, hidden))}
    if config.learned_noise:  # all experts alike at first, as in the paper
        zero = Start("constant", 0.0)
        shape = (num_experts, hidden)
        weights = {"weight": Weight(shape, zero), "noise_weight": Weight(shape, zero)}
        return weights | _logit_bias(config, num_experts)
    return {"weight": Weight((num_experts, hidden))} | _logit_bias(config, num_experts)


def _logit_bias(config: RouterConfig, num_experts: int) -> dict[str, Weight]:
    if not config.logit_bias:
        return {}
    return {"logit_bias": Weight((num_experts,), Start("constant", 0.0))}


def _mlp_layer(config: RouterConfig, hidden: int, num_experts: int) -> dict[str, Weight]:
    width = config.mlp_width
    return {
        "projection": Weight((width, hidden), Start("uniform", hidden**-0.5)),
        "weight": Weight((num_experts, width), Start("uniform", width**-0.5)),
    }


def _cosine_layer(config: RouterConfig, hidden: int, num_experts: int) -> dict[str, Weight]:
    width = config.cosine_dim or max(num_experts // 2, 1)
    weights = {
        "projection": Weight((width, hidden)),
        "weight": Weight((num_experts, width)),
        "temperature": Weight((1,), Start("constant", -math.log(config.temperature))),
    }
    if config.cosine_bias:
        weights["projection_bias"] = Weight((width,), Start("constant", 0.0))
    return weights


def _recurrent_layer(config: RouterConfig, hidden: int, num_experts: int) -> dict[str, Weight]:
    width = config.state_dim
    weights: dict[str, Weight] = {}
    release = config.start is RouterStart.release
    if not config.shared_projection:
        start = Start("normal", _RELEASE_STD) if release else Start("uniform", hidden**-0.5)
        weights["projection"] = Weight((width, hidden), start)
    # A linear router's logits have std sqrt(D) times its weights'; these have sqrt(H) times the
    # state's times theirs.
    state_std = _STATE_STD[config.cell, config.shared_projection]
    matched = Start("scaled", (hidden / width) ** 0.5 / state_std)
    start = Start("normal", _RELEASE_STD) if release else matched
    weights["weight"] = Weight((num_experts, width), start)
    return weights
