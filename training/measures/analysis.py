"""Put the measures of a probe together: one plain dict for `result.json`, the report, a benchmark.

Read first: `probe.py`. Values are per layer, then across layers; numbers and lists only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.model import Decoder
from gatewise.routers.balance import max_violation
from gatewise.training.measures.experts import (
    expert_similarity,
    mean_off_diagonal,
    weight_norms,
)
from gatewise.training.measures.groups import (
    agreement,
    conditional_independence,
    context_independence,
    count_by_group,
    drops_by_position,
    saturation,
    saturation_step,
    std_score,
    top_groups,
)
from gatewise.training.measures.information import (
    layer_information,
    path_entropy,
    redundancy,
    set_labels,
    shuffled_layer_information,
)
from gatewise.training.measures.load import (
    dead_share,
    drop_ratio,
    effective_experts,
    effective_k,
    load_cv,
    load_entropy,
    load_ratio,
)
from gatewise.training.measures.probe import LayerProbe, Probe

__all__ = ["HISTOGRAM_BINS", "across_layers", "layer_measures", "over_checkpoints"]

HISTOGRAM_BINS = 40  # of the gate entropy, from 0 to ln E
_BUCKETS = 8  # of positions, where token ids are looked at within a position
_DROP_BUCKET = 128


def layer_measures(
    probe: Probe, model: Decoder, *, vocab_size: int, seed: int
) -> list[dict[str, Any]]:
    """Measure every MoE layer by itself.

    Args:
        probe: of the model.
        model: its experts' weights are looked at too.
        vocab_size: V.
        seed: of the shuffled baselines.
    """
    indices = model.config.moe_layers()
    return [
        {
            "layer": index,
            "load": _load(part, model),
            "scores": _scores(part, model),
            "experts": _experts(part, layer.experts.w_in_eGD, layer.experts.w_out_eDF, model),
            "context": _context(probe, part, model, vocab_size=vocab_size, seed=seed),
        }
        for index, part, layer in zip(indices, probe.layers, model.moe_layers(), strict=True)
    ]


def across_layers(probe: Probe, *, num_experts: int, seed: int) -> dict[str, Any]:
    """Measure what the layers' choices share.

    Args:
        probe: of the model.
        num_experts: E.
        seed: of the shuffled baselines.
    """
    generator = torch.Generator().manual_seed(seed)
    expert_LTK = probe.expert_LTK()
    first_LT = torch.stack([part.first_T for part in probe.layers])
    first_LT = torch.where(first_LT < 0, num_experts, first_LT)  # no expert: a state of its own
    states = num_experts + int((first_LT == num_experts).any())
    plain_LL = layer_information(first_LT, states)
    shuffled_LL = shuffled_layer_information(first_LT, states, generator=generator)
    return {
        "information": plain_LL.tolist(),
        "information_shuffled": shuffled_LL.tolist(),
        "information_near": _mean_of(plain_LL - shuffled_LL, near=True),
        "information_far": _mean_of(plain_LL - shuffled_LL, near=False),
        "information_binned": probe.binned_LL.tolist(),
        "binned_tokens": probe.binned_tokens,
        "paths": dataclasses.asdict(path_entropy(first_LT, states, generator=generator)),
        "redundancy_first": dataclasses.asdict(redundancy(first_LT)),
        "redundancy_set": dataclasses.asdict(redundancy(set_labels(expert_LTK))),
    }


def over_checkpoints(
    steps: Sequence[int],
    expert_CLTK: Sequence[Tensor],
    token_T: Tensor,
    *,
    num_experts: int,
    vocab_size: int,
) -> dict[str, Any]:
    """Measure how early the final routing was there.

    Args:
        steps: of the checkpoints, rising; the last one is the final routing.
        expert_CLTK: the choices of each checkpoint on the same text.
        token_T: token ids of that text.
        num_experts: E.
        vocab_size: V.
    """
    final_LTK = expert_CLTK[-1]
    layers = range(len(final_LTK))

    def counts(expert_TK: Tensor) -> Tensor:
        return count_by_group(expert_TK, token_T, num_experts=num_experts, num_groups=vocab_size)

    final_LVE = [counts(final_LTK[layer]) for layer in layers]
    saturation_LC = [
        [saturation(part[layer], final_LTK[layer]) for part in expert_CLTK] for layer in layers
    ]
    return {
        "steps": list(steps),
        "saturation": saturation_LC,
        "agreement": [
            [agreement(counts(part[layer]), final_LVE[layer]) for part in expert_CLTK]
            for layer in layers
        ],
        "saturated_at_step": [saturation_step(steps, row) for row in saturation_LC],
        "chance": final_LTK.shape[2] / num_experts,
    }


def _load(part: LayerProbe, model: Decoder) -> dict[str, Any]:
    count_E = _count(part.expert_TK, model.config.num_experts)
    pairs, dropped = count_E.sum(), part.dropped_T.sum()
    tokens = torch.tensor(len(part.expert_TK))
    return {
        "ratio": load_ratio(count_E).tolist(),
        "max_violation": float(max_violation(count_E)),
        "cv": float(load_cv(count_E)),
        "entropy": float(load_entropy(count_E)),
        "effective_experts": float(effective_experts(count_E)),
        "dead_experts": round(float(dead_share(count_E)) * len(count_E)),
        "effective_k": float(effective_k(pairs, dropped, tokens)),
        "drop_ratio": float(drop_ratio(dropped, pairs)),
    }


def _scores(part: LayerProbe, model: Decoder) -> dict[str, Any]:
    ceiling = float(torch.tensor(float(model.config.num_experts)).log())
    histogram = torch.histc(part.entropy_T.float(), HISTOGRAM_BINS, 0, max(ceiling, 1e-6))
    return {
        "entropy": float(part.entropy_T.mean()),
        "entropy_histogram": histogram.tolist(),
        "inner_balance": float(part.inner_T.median()),
        "outer_balance": float(part.outer_T.median()),
        "weight_sum": float(part.weight_T.mean()),
        "logsumexp": float(part.logsumexp_T.mean()),
        "max_logit": part.largest_logit,
    }


def _experts(
    part: LayerProbe, w_in_EGD: Tensor, w_out_EDF: Tensor, model: Decoder
) -> dict[str, Any]:
    weights = (w_in_EGD.detach(), w_out_EDF.detach())
    similarity_EE = expert_similarity(*weights, activation=model.config.activation)
    norm_E, rms_E = weight_norms(*weights), part.outputs.rms()
    return {
        "similarity": similarity_EE.tolist(),
        "similarity_mean": mean_off_diagonal(similarity_EE),
        "weight_norm": norm_E.tolist(),
        "weight_norm_min": float(norm_E.min()),
        "weight_norm_median": float(norm_E.median()),
        "output_rms": rms_E.tolist(),
        "output_rms_min": float(rms_E.min()),
        "output_rms_median": float(rms_E.median()),
    }


def _context(
    probe: Probe, part: LayerProbe, model: Decoder, *, vocab_size: int, seed: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    experts = model.config.num_experts
    sizes = {"num_experts": experts, "num_groups": vocab_size}
    length = int(probe.position_T.max()) + 1
    bucket_T = probe.position_T * _BUCKETS // length
    position = context_independence(
        part.expert_TK, bucket_T, num_experts=experts, num_groups=_BUCKETS, generator=generator
    )
    count_VE = count_by_group(part.expert_TK, probe.token_T, **sizes)
    mixed_T = probe.token_T[torch.randperm(len(probe.token_T), generator=generator)]
    tokens_V = torch.bincount(probe.token_T, minlength=vocab_size)
    ids_EN, pairs_EN = top_groups(count_VE)
    pairs_T = (part.expert_TK >= 0).sum(1)
    drops = drops_by_position(part.dropped_T, pairs_T, probe.position_T, bucket=_DROP_BUCKET)
    return {
        "by_token": dataclasses.asdict(
            context_independence(part.expert_TK, probe.token_T, generator=generator, **sizes)
        ),
        "by_next_token": dataclasses.asdict(
            context_independence(part.expert_TK, probe.next_T, generator=generator, **sizes)
        ),
        "by_token_within_position": conditional_independence(
            part.expert_TK, probe.token_T, bucket_T, generator=generator, **sizes
        ),
        "by_position": dataclasses.asdict(position),
        "std_score": std_score(count_VE, tokens_V),
        "std_score_shuffled": std_score(count_by_group(part.expert_TK, mixed_T, **sizes), tokens_V),
        "top_ids": ids_EN.tolist(),
        "top_ids_pairs": pairs_EN.tolist(),
        "drops": dataclasses.asdict(drops),
    }


def _count(expert_TK: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(expert_TK[expert_TK >= 0], minlength=num_experts).double()


def _mean_of(value_LL: Tensor, *, near: bool) -> float | None:
    """Return the mean over pairs of neighbours, or of layers further apart; None without pairs."""
    place_L = torch.arange(len(value_LL))
    distance_LL = (place_L.unsqueeze(0) - place_L.unsqueeze(1)).abs()
    kept_LL = distance_LL == 1 if near else distance_LL > 1
    return float(value_LL[kept_LL].mean()) if bool(kept_LL.any()) else None
