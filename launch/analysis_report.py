"""What `gatewise analyze` shows people: a Markdown page with tables, and pictures beside it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewise.launch.pictures import Panel, heat_maps, histograms, lines

__all__ = ["draw_pictures", "report_text", "summary_lines"]

_LAYER_COLUMNS = (
    ("load", "max_violation", "max violation"),
    ("load", "cv", "CV"),
    ("load", "entropy", "load entropy"),
    ("load", "effective_experts", "effective experts"),
    ("load", "dead_experts", "dead"),
    ("load", "effective_k", "effective k"),
    ("load", "drop_ratio", "dropped"),
)
_SCORE_COLUMNS = (
    ("scores", "entropy", "gate entropy"),
    ("scores", "inner_balance", "inner balance"),
    ("scores", "outer_balance", "outer balance"),
    ("scores", "weight_sum", "weight sum"),
    ("scores", "logsumexp", "logsumexp"),
    ("scores", "max_logit", "max logit"),
)
_EXPERT_COLUMNS = (
    ("experts", "similarity_mean", "similarity"),
    ("experts", "weight_norm_min", "weight norm, min"),
    ("experts", "weight_norm_median", "median"),
    ("experts", "output_rms_min", "output RMS, min"),
    ("experts", "output_rms_median", "median"),
)


def draw_pictures(found: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the pictures of an analysis into a folder and return the files' names.

    Args:
        found: what `gatewise analyze` found.
        folder: exists.
    """
    layers = found["layers"]
    names = [layer["layer"] for layer in layers]
    across = found["across_layers"]
    excess = [
        [plain - chance for plain, chance in zip(row, base, strict=True)]
        for row, base in zip(across["information"], across["information_shuffled"], strict=True)
    ]
    # the diagonals hold entropies, far above the rest: the scale is that of pairs
    panels = (excess, across["information_binned"])
    pairs = [m[i][j] for m in panels for i in range(len(m)) for j in range(len(m)) if i != j]
    pictures = {
        "load.svg": heat_maps(
            "Load of each expert over the mean",
            [Panel("count / mean", [layer["load"]["ratio"] for layer in layers])],
            row_label="layer",
            column_label="expert",
            low=0.0,
            high=max(2.0, *(max(layer["load"]["ratio"]) for layer in layers)),
            row_names=names,
        ),
        "information.svg": heat_maps(
            "Information between the first experts of two layers, nats",
            [
                Panel("less the shuffled baseline", excess),
                Panel("binned scores within a token", across["information_binned"]),
            ],
            row_label="layer",
            column_label="layer",
            low=0.0,
            high=max(pairs, default=None),
            row_names=names,
            column_names=names,
        ),
        "entropy.svg": histograms(
            "Entropy of a token's scores",
            [(f"layer {x['layer']}", x["scores"]["entropy_histogram"]) for x in layers],
            end=math.log(max(found["num_experts"], 2)),
            x_label="nats, up to ln E",
        ),
        "similarity.svg": heat_maps(
            "Similarity of experts (mean cosine of their weights' mean directions)",
            [Panel(f"layer {x['layer']}", x["experts"]["similarity"]) for x in layers],
            row_label="expert",
            column_label="expert",
            low=0.0,
            high=1.0,
        ),
    }
    history = found["over_checkpoints"]
    if history is not None:
        pictures["saturation.svg"] = lines(
            "Share of a token's final experts that it chose already",
            history["steps"],
            [
                (f"layer {name}", row)
                for name, row in zip(names, history["saturation"], strict=True)
            ],
            x_label="step",
            y_label="saturation",
        )
    for name, text in pictures.items():
        (folder / name).write_text(text, encoding="utf-8")
    return list(pictures)


def report_text(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Return the Markdown page of an analysis.

    Args:
        found: what `gatewise analyze` found, with the pieces of the top ids as text.
        pictures: names of the files in `pictures/`.
    """
    layers, across = found["layers"], found["across_layers"]
    parts = [
        "# Routing of a checkpoint",
        f"`{found['checkpoint']}`, step {found['step']}: router `{found['router']}`, "
        f"{len(layers)} MoE layers, {found['num_experts']} experts, top {found['top_k']}; "
        f"{found['tokens']} tokens of the {found['split']} split.",
        "## Load",
        _layer_table(layers, _LAYER_COLUMNS),
        "0 is balance for max violation and CV, 1 for the load entropy (over ln E). Dropped is "
        "what the capacity of training would drop.",
        _picture("load.svg", pictures),
        "## Scores",
        _layer_table(layers, _SCORE_COLUMNS),
        f"Entropy in nats, at most {math.log(found['num_experts']):.3f}. Inner balance: median of "
        "a token's best score over its second; outer balance: median share of the chosen.",
        _picture("entropy.svg", pictures),
        "## Between layers",
        _across_table(across),
        _picture("information.svg", pictures),
        "## Context",
        _context_table(layers),
        "Share of H(E) that the group explains, less what shuffled groups explain; std score: "
        "spread of a token id's pairs over experts, and the same for shuffled ids.",
        "### Token ids with most pairs",
        _top_table(layers),
        "## Experts",
        _layer_table(layers, _EXPERT_COLUMNS),
        _picture("similarity.svg", pictures),
        "## Gradients of the router",
        _gradient_table(found["gradients"]),
    ]
    if found["over_checkpoints"] is not None:
        parts += [
            "## Over checkpoints",
            _history_table(layers, found["over_checkpoints"]),
            f"Saturation; chance level {found['over_checkpoints']['chance']:.3f}.",
            _picture("saturation.svg", pictures),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the few lines that the command prints."""
    layers, across = found["layers"], found["across_layers"]
    worst = max(layers, key=lambda layer: float(layer["load"]["max_violation"]))
    lowest = min(layer["scores"]["entropy"] for layer in layers)
    highest = max(layer["scores"]["entropy"] for layer in layers)
    by_token = [layer["context"]["by_token"]["corrected"] for layer in layers]
    similar = max(layer["experts"]["similarity_mean"] for layer in layers)
    near = across["information_near"]
    return [
        f"step {found['step']}, {found['tokens']} tokens, {len(layers)} MoE layers of "
        f"{found['num_experts']} experts",
        f"  load: max violation {worst['load']['max_violation']:.2f} (layer {worst['layer']}), "
        f"{sum(layer['load']['dead_experts'] for layer in layers)} dead experts",
        f"  gate entropy {lowest:.2f} to {highest:.2f} nats of "
        f"{math.log(found['num_experts']):.2f}; experts' similarity at most {similar:.2f}",
        f"  token id explains {min(by_token):.0%} to {max(by_token):.0%} of the choice"
        + ("" if near is None else f"; neighbouring layers share {near:.2f} nats"),
    ]


def _layer_table(
    layers: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]
) -> str:
    rows = [
        [str(layer["layer"]), *(_shown(layer[group][key]) for group, key, _ in columns)]
        for layer in layers
    ]
    return _table(["layer", *(title for _, _, title in columns)], rows)


def _across_table(across: Mapping[str, Any]) -> str:
    paths, first, sets = (across[n] for n in ("paths", "redundancy_first", "redundancy_set"))
    rows = [
        ["information of neighbours, nats above shuffled", _shown(across["information_near"])],
        ["information of layers further apart", _shown(across["information_far"])],
        ["path entropy, nats", _shown(paths["entropy"])],
        ["... with shuffled layers", _shown(paths["shuffled"])],
        ["... largest possible here", _shown(paths["ceiling"])],
        ["next layer's first expert guessed from this layer's", _mean(first["markov_accuracy"])],
        ["next layer's set guessed from this layer's", _mean(sets["markov_accuracy"])],
        [
            f"all first experts guessed from layer {first['best_layer']}'s",
            _shown(first["one_layer_accuracy"]),
        ],
        ["layers that agree with a token's commonest index", _shown(first["agreement"])],
    ]
    return _table(["value", "all layers"], rows)


def _context_table(layers: Sequence[Mapping[str, Any]]) -> str:
    titles = ["layer", "token id", "next id", "id within position", "position"]
    rows = []
    for layer in layers:
        context = layer["context"]
        rows.append(
            [
                str(layer["layer"]),
                *(
                    _shown(value)
                    for value in (
                        context["by_token"]["corrected"],
                        context["by_next_token"]["corrected"],
                        context["by_token_within_position"],
                        context["by_position"]["corrected"],
                        context["std_score"],
                        context["std_score_shuffled"],
                        context["drops"]["towards_end"],
                    )
                ),
            ]
        )
    return _table([*titles, "std score", "shuffled", "drops towards the end"], rows)


def _top_table(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [str(layer["layer"]), str(expert), " ".join(_code(piece) for piece in pieces)]
        for layer in layers
        for expert, pieces in enumerate(layer["context"]["top_texts"])
    ]
    return _table(["layer", "expert", "ids"], rows)


def _gradient_table(gradients: Mapping[str, Any]) -> str:
    rows = [
        [name, _shown(norm), _shown(gradients["cosines"][name])]
        for name, norm in gradients["norms"].items()
    ]
    return _table(["loss", "norm", "cosine with the language loss's"], rows)


def _history_table(layers: Sequence[Mapping[str, Any]], history: Mapping[str, Any]) -> str:
    titles = ["layer", *(f"step {step}" for step in history["steps"]), "0.9 reached at"]
    rows = [
        [str(layer["layer"]), *(_shown(value) for value in row), str(step)]
        for layer, row, step in zip(
            layers, history["saturation"], history["saturated_at_step"], strict=True
        )
    ]
    return _table(titles, rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines_ = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines_)


def _picture(name: str, pictures: Sequence[str]) -> str:
    return f"![{name.removesuffix('.svg')}](pictures/{name})" if name in pictures else ""


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _mean(values: Sequence[float]) -> str:
    return _shown(sum(values) / len(values)) if values else "-"


def _code(text: str) -> str:
    """Return a piece of text as Markdown code that a table's cell can hold."""
    shown = repr(text)[1:-1].replace("|", "\\|").replace("`", "'") or " "
    return f"`{shown}`"
