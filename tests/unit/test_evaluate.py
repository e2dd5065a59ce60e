"""Loss and bits per byte, on cases that can be done by hand."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from small_models import small_model
from training_runs import make_text, run, tiny

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder, DecoderOutput
from gatewise.parallel.collectives import NO_GROUP
from gatewise.routers.api import Routing
from gatewise.routers.config import RouterConfig
from gatewise.training.config import CheckpointConfig, DataConfig, EvaluationConfig, Tokenizer
from gatewise.training.data import PreparedData, prepare_data
from gatewise.training.evaluate import Evaluation, evaluate
from gatewise.training.measures.churn import RouteProbe
from gatewise.training.step import language_loss


def build(vocab_size: int, dtype: torch.dtype = torch.float32) -> Decoder:
    return small_model(
        ModelConfig(layers=1, hidden=16, heads=2, num_experts=4, expert_width=8),
        RouterConfig(),
        vocab_size=vocab_size,
        dtype=dtype,
    )


def score(model: Decoder, data: PreparedData, **settings: int) -> Evaluation:
    return evaluate(
        model,
        data,
        EvaluationConfig(micro=3, **settings),
        sequence_length=32,
        control=NO_GROUP,
        device=torch.device("cpu"),
    )


def test_a_uniform_model_needs_the_log_of_the_vocabulary_for_each_token(tmp_path: Path) -> None:
    data = make_text(tmp_path)
    model = build(data.tokenizer.vocab_size)
    model.embedding.data.zero_()  # all logits are equal
    result = score(model, data)
    count = len(data.validation.tokens) - 1
    assert result.tokens == count
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    # one file: its last token ends the text and stands for no byte, its first is no target
    assert result.text_bytes == count - 1
    assert result.bits_per_byte == pytest.approx(math.log2(257) * count / (count - 1), rel=1e-6)
    assert result.record()["val/bits_per_byte"] == result.bits_per_byte


def test_bytes_per_token_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    data = make_text(tmp_path)
    config = DataConfig(
        path=str(tmp_path / "text"),
        cache=str(tmp_path / "bpe"),
        sequence_length=32,
        tokenizer=Tokenizer.bpe,
        vocab_size=300,
    )
    bpe = prepare_data(config)
    result = score(build(bpe.tokenizer.vocab_size), bpe)
    text = bpe.tokenizer.decode_bytes(bpe.validation.tokens[1:].tolist())
    assert result.text_bytes == len(text)
    assert result.tokens == len(bpe.validation.tokens) - 1 < score(build(257), data).tokens


@pytest.mark.parametrize("stride", [None, 7, 32])
@pytest.mark.parametrize("limit", [None, 10, 100])
def test_every_target_is_scored_once_as_in_a_pass_of_its_own(
    stride: int | None, limit: int | None, tmp_path: Path
) -> None:
    data = make_text(tmp_path, sentences=4)
    model = build(257)
    settings = {"stride": stride, "tokens": limit}
    result = score(model, data, **{k: v for k, v in settings.items() if v is not None})
    tokens = torch.from_numpy(data.validation.tokens.astype("int64"))
    if limit is not None:
        tokens = tokens[: limit + 1]
    total, length, step = 0.0, min(32, len(tokens) - 1), stride or 32
    scored = 0
    while scored < len(tokens) - 1:  # windows by hand: each one ends `step` targets later
        end = min(max(scored + step, length), len(tokens) - 1)
        inputs, targets = tokens[end - length : end], tokens[end - length + 1 : end + 1]
        with torch.no_grad():
            logits = model.logits(model.eval()(inputs[None]).hidden_BSD[0])
        loss_S = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total += float(loss_S[length - (end - scored) :].double().sum())
        scored = end
    assert result.tokens == len(tokens) - 1
    assert result.nats == pytest.approx(total, rel=1e-6)


def test_evaluation_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    data = make_text(tmp_path, sentences=4)
    model = build(257).train()
    bias = model.moe_layers()[0].router.bias_E  # type: ignore[attr-defined]
    bias.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score(model, data)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_bf16_models_loss_is_summed_in_fp32() -> None:
    """A sum in bf16 is off by up to 0.4 percent: of 5 nats by 0.02, more than a run's progress."""
    torch.manual_seed(0)
    model = build(257, torch.bfloat16)
    hidden_BSD = torch.randn(8, 512, 16).bfloat16()
    target_BS = torch.randint(257, (8, 512))
    target_BS[0, :100] = -100
    have = language_loss(model, DecoderOutput(hidden_BSD, ()), target_BS)
    assert have.dtype == torch.float32
    logits = hidden_BSD.double().flatten(0, 1) @ model.embedding.detach().double().T
    want = torch.nn.functional.cross_entropy(logits, target_BS.flatten(), reduction="sum")
    assert float(have.detach()) == pytest.approx(float(want), rel=5e-5)


def test_the_sums_of_nothing_are_finite() -> None:
    empty = Evaluation(nats=0.0, tokens=0, text_bytes=0)
    assert empty.loss == empty.bits_per_byte == 0
    assert Evaluation(nats=1e6, tokens=1, text_bytes=1).perplexity == math.inf


def test_churn_is_the_share_of_pairs_that_the_look_before_did_not_have() -> None:
    def look(probe: RouteProbe, expert_TK: list[list[int]]) -> list[float]:
        routing = Routing(torch.tensor(expert_TK), torch.ones(1))
        return probe.compare([routing, routing]).tolist()

    probe = RouteProbe()
    assert look(probe, [[0, 1], [2, -1]]) == [0, 0]  # nothing to compare with
    assert look(probe, [[1, 0], [3, 2]]) == [6, 8]  # places do not matter, a new expert does
    assert look(probe, [[1, 0], [-1, -1]]) == [4, 4]  # what is padding or dropped does not count
    resumed = RouteProbe()
    assert resumed.state() == {}
    resumed.restore(probe.state(), torch.device("cpu"))
    assert look(resumed, [[1, 2], [-1, -1]]) == [2, 4]
    assert look(probe, [[1], [1]]) == [0, 0]
    assert probe.compare([]).tolist() == [0, 0]


def test_a_resumed_run_compares_with_the_evaluation_before_the_stop(tmp_path: Path) -> None:
    config = tiny(
        6,
        evaluation=EvaluationConfig(every=2, tokens=400, micro=4),
        checkpoint=CheckpointConfig(every=3, asynchronous=False),
    )
    data = make_text(tmp_path)
    whole = run(config, data, tmp_path / "whole")
    place = Path("checkpoints") / "step_00000003"
    shutil.copytree(whole.folder / place, tmp_path / "resumed" / place)
    resumed = run(config, data, tmp_path / "resumed")
    churn = whole.column("val/router_churn")
    assert resumed.column("val/router_churn") == churn
    assert len(churn) == 2
