"""Which parameters a pre-gate has: names, shapes and starting values, from its settings alone.

Matrices start with the scale that keeps a normed input's. Nothing here imports torch.

Shapes:  V vocabulary   W width of the trunk   L decisions   E experts, all ranks
         H width of the GRU's state
"""

import math

from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadTrunk
from gatewise.routers.shapes import Start, Weight

__all__ = ["gru_weights", "pregate_parameters", "read_me_weights", "trunk_weights"]

_ONE, _ZERO = Start("constant", 1.0), Start("constant", 0.0)


def trunk_weights(vocab_size: int, width: int, *, block: bool) -> dict[str, Weight]:
    """Return the parameters of `Trunk`.

    Args:
        vocab_size: V.
        width: W.
        block: whether it has the causal block.
    """
    # small: the embedding is normed before it is used, and so moves quickly at first
    weights = {"embedding": Weight((vocab_size, width), Start("normal", 0.02))}
    if block:
        matrix, bias = Start("normal", width**-0.5), Weight((width,), _ZERO)
        square = Weight((width, width), matrix)
        weights |= {
            "gain_attention": Weight((width,), _ONE),
            "w_qkv": Weight((3 * width, width), matrix),
            "b_qkv": Weight((3 * width,), _ZERO),
            "w_attention": square,
            "b_attention": bias,
            "gain_mlp": Weight((width,), _ONE),
            "w_up": square,
            "b_up": bias,
            "w_down": square,
            "b_down": bias,
        }
    weights["gain_final"] = Weight((width,), _ONE)
    return weights


def read_me_weights(config: AheadConfig, num_experts: int, layers: int) -> dict[str, Weight]:
    """Return the parameters of `ReadMeGate` beside its trunk."""
    rows = config.decisions(layers) * num_experts
    start = Start("normal", config.width**-0.5)
    return {"w_head": Weight((rows, config.width), start), "b_head": Weight((rows,), _ZERO)}


def gru_weights(config: AheadConfig, num_experts: int, layers: int) -> dict[str, Weight]:
    """Return the parameters of `GruGate` beside its trunk."""
    state = config.state
    cell = Start("uniform", state**-0.5)
    return {
        "w_features": Weight((state, config.width), Start("normal", config.width**-0.5)),
        "layer_LH": Weight((layers, state), Start("normal", 0.1)),
        "w_input": Weight((3 * state, state), cell),
        "w_state": Weight((3 * state, state), cell),
        "b_input": Weight((3 * state,), cell),
        "b_state": Weight((3 * state,), cell),
        "w_head_LEH": Weight((layers, num_experts, state), Start("normal", state**-0.5)),
    }


def pregate_parameters(
    config: AheadConfig, *, vocab_size: int, num_experts: int, layers: int
) -> int:
    """Count the parameters of a model's pre-gate; 0 where it has none.

    Args:
        config: settings.
        vocab_size: V.
        num_experts: E.
        layers: MoE layers of the model.
    """
    if not config.learns or not layers:
        return 0
    own = gru_weights if config.kind is AheadKind.gru else read_me_weights
    weights = [
        *trunk_weights(vocab_size, config.width, block=config.trunk is AheadTrunk.block).values(),
        *own(config, num_experts, layers).values(),
    ]
    return sum(math.prod(weight.shape) for weight in weights)
