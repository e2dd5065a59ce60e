"""The layouts of transformers that a model of ours may have, and which one fits a model.

The body of a model (attention, widths, which layers have experts) must fit exactly. What only the
router has beside a layout's own goes into the sidecar, and is said aloud (`hand_out.py`).
"""

from dataclasses import dataclass
from typing import Literal

from gatewise.moe.config import Activation, ModelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import RouterConfig, ScoreFunction, Scorer, Selector

__all__ = ["FAMILIES", "Family", "choose_family", "own_differences"]

Biases = Literal["none", "all", "qkv", "qkv or none"]


@dataclass(frozen=True, slots=True)
class Family:
    """One layout; defaults are what most have."""

    kind: str  # model_type of config.json
    architecture: str
    experts: bool = True
    norm: Literal["none", "head", "whole", "latent"] = "none"  # of queries and keys
    biases: Biases = "none"  # of attention; "all": of all four projections, or of none
    window: Literal["none", "every layer", "by layer"] = "none"
    dense_layers: Literal["none", "first", "any"] = "none"
    shared: Literal["none", "gated", "plain"] = "none"
    norm_eps: float = 1e-6  # this, the base and the window where config.json has none
    rope_base: float = 10000.0
    window_size: int | None = None
    always_renormalises: bool = False
    balance_bias: bool = False  # sigmoid scores with a bias that balances, groups, a scale
    clamped: bool = False  # gpt-oss: clamped experts with biases, sinks, a bias of the router


FAMILIES = {
    family.kind: family
    for family in (
        Family("llama", "LlamaForCausalLM", experts=False, biases="all"),
        Family(
            "mistral",
            "MistralForCausalLM",
            experts=False,
            window="every layer",
            window_size=4096,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            experts=False,
            biases="qkv",
            window="by layer",
            window_size=4096,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            experts=False,
            norm="head",
            biases="all",
            window="by layer",
            window_size=4096,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            window="every layer",
            norm_eps=1e-5,
            rope_base=1e6,
            always_renormalises=True,
        ),
        Family("olmoe", "OlmoeForCausalLM", norm="whole", biases="all", norm_eps=1e-5),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            biases="qkv or none",
            window="by layer",
            window_size=4096,
            dense_layers="any",
            shared="gated",
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            norm="head",
            biases="all",
            window="every layer",
            window_size=4096,
            dense_layers="any",
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            norm="latent",
            dense_layers="first",
            shared="plain",
            balance_bias=True,
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            biases="all",
            window="by layer",
            window_size=128,
            norm_eps=1e-5,
            rope_base=150000.0,
            always_renormalises=True,
            clamped=True,
        ),
    )
}


def choose_family(model: ModelConfig, router: RouterConfig) -> tuple[Family, list[str]]:
    """Return the layout of a model, and what its router has beside it.

    Raises:
        ConfigError: with the reasons of the nearest layout, if no layout has the model's body.
    """
    bodies = {kind: _body(family, model) for kind, family in FAMILIES.items()}
    fitting = [FAMILIES[kind] for kind, reasons in bodies.items() if not reasons]
    if not fitting:
        kind = min(bodies, key=lambda name: len(bodies[name]))
        raise ConfigError(
            "this model has no counterpart in transformers' layouts; the nearest is "
            f"{kind}: {bodies[kind][0]}"
        )
    found = [(family, own_differences(family, model, router)) for family in fitting]
    return min(found, key=lambda item: len(item[1]))


def own_differences(family: Family, model: ModelConfig, router: RouterConfig) -> list[str]:
    """Return what the router does that the layout does not; only gatewise computes it."""
    if not model.moe_layers():
        return []
    found = []
    if router.ahead.is_on:
        found.append(f"a pre-gate ({router.ahead.kind.name}) chooses the experts")
    score = ScoreFunction.sigmoid if family.balance_bias else ScoreFunction.softmax
    for name, value, wanted in (
        ("scorer", router.scorer, Scorer.linear),
        ("selector", router.selector, Selector.topk),
        ("score", router.score, score),
    ):
        if value is not wanted:
            found.append(f"router.{name} is {value.name}, not {wanted.name}")
    if router.scale != 1 and not family.balance_bias:
        found.append(f"router.scale is {router.scale:g}, not 1")
    if router.num_groups > 1 and not family.balance_bias:
        found.append(f"router.num_groups is {router.num_groups}")
    if router.hash_layers:
        found.append(f"router.hash_layers is {router.hash_layers}")
    renormalises = router.renormalise and model.top_k > 1
    if family.always_renormalises and not renormalises:
        found.append("its weights are not renormalised")
    if router.logit_bias and not family.clamped:
        found.append("router.logit_bias is true")
    return found


def _body(family: Family, model: ModelConfig) -> list[str]:
    """Return why the body of a model is not that of a layout."""
    extra, moe_layers = model.attention, model.moe_layers()
    norm, shared = _norm(model), _shared(model)
    biases = (extra.qkv_bias, extra.out_bias)
    first = list(range(model.dense_layers, model.layers)) == moe_layers
    missing = bool(moe_layers) and len(moe_layers) < model.layers
    has_window = extra.window is not None
    checks = (
        (bool(moe_layers) != family.experts, f"it has {'' if moe_layers else 'no '}experts"),
        (
            model.activation is not Activation.swiglu,
            f"model.activation is {model.activation.name}, not swiglu",
        ),
        (
            model.clamped_experts != family.clamped,
            f"model.clamped_experts is {model.clamped_experts}",
        ),
        (extra.sinks != family.clamped, f"model.attention.sinks is {extra.sinks}"),
        (norm != family.norm, f"its queries and keys have the norm '{norm}', not '{family.norm}'"),
        (
            norm == "whole" and model.heads * model.head_width() != model.hidden,
            "its heads together are not as wide as model.hidden",
        ),
        (
            biases not in _BIASES[family.biases],
            f"model.attention.qkv_bias is {biases[0]} and out_bias {biases[1]}",
        ),
        (
            has_window and family.window == "none",
            f"model.attention.window is {extra.window}",
        ),
        (
            has_window and family.window == "every layer" and extra.full_every > 0,
            f"model.attention.full_every is {extra.full_every}",
        ),
        (
            (missing and family.dense_layers == "none")
            or (family.dense_layers == "first" and not first),
            f"it has dense layers (experts in {moe_layers} of {model.layers})",
        ),
        (shared != family.shared, _shared_reason(model, family)),
        (
            shared == "plain" and model.shared() % model.expert_width > 0,
            "model.shared_width is no multiple of model.expert_width",
        ),
    )
    return [reason for is_wrong, reason in checks if is_wrong]


# Biases of queries, keys and values, and of the output, that a layout can say.
_BIASES: dict[Biases, list[tuple[bool, bool]]] = {
    "none": [(False, False)],
    "all": [(False, False), (True, True)],
    "qkv": [(True, False)],
    "qkv or none": [(False, False), (True, False)],
}


def _norm(model: ModelConfig) -> str:
    if model.attention.latent.is_on:
        return "latent"
    if not model.qk_norm:
        return "none"
    return "whole" if model.attention.norm_whole else "head"


def _shared(model: ModelConfig) -> str:
    if not model.shared_experts or not model.moe_layers():
        return "none"
    return "gated" if model.shared_gate else "plain"


def _shared_reason(model: ModelConfig, family: Family) -> str:
    gate = f" and model.shared_gate is {model.shared_gate}" if family.shared != "none" else ""
    return f"model.shared_experts is {model.shared_experts}{gate}"
