import pytest

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.training.estimate.communication import communication, gradient_buckets, sent_by_term

MODEL = CogVideoXConfig(preset="cogvideox_5b")
TOKENS = 75_264


def _sent(parallel, data_size=1, stage=0):
    clips = [place_sample(place, 13, 60, 90, 226, MODEL.patch) for place in range(4)]
    layout = build_layout(clips, MODEL.patch, TOKENS)
    return sent_by_term(communication(MODEL, parallel, [layout], stage=stage, data_size=data_size, bytes_per_weight=2))


@pytest.mark.parametrize("ranks", [2, 8])
def test_tensor_ranks_send_four_and_six_widths_a_token_and_layer(ranks):
    """Per layer and GPU: forward 4 N d * 2 (g-1)/g, backward 6 N d * 2 (g-1)/g, bf16."""
    sent = _sent(ParallelConfig(tensor_parallel_size=ranks))
    expected = 42 * (4 + 6) * TOKENS * 3072 * 2 * (ranks - 1) / ranks
    linears = sent["attention", "tensor"] + sent["mlp", "tensor"]
    assert linears == pytest.approx(expected, rel=1e-12)
    everything = sum(value for (_, axis), value in sent.items() if axis == "tensor")
    assert everything == pytest.approx(expected, rel=0.01)


def test_one_layer_of_eight_tensor_ranks_at_75k():
    sent = _sent(ParallelConfig(tensor_parallel_size=8))
    per_layer = (sent["attention", "tensor"] + sent["mlp", "tensor"]) / 42 * 75_000 / TOKENS / 1e6
    assert per_layer == pytest.approx(1613 + 2419, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 8])
def test_context_ranks_send_four_widths_of_their_tokens_each_way(ranks):
    sent = _sent(ParallelConfig(context_parallel_size=ranks))
    expected = 42 * (4 + 4) * TOKENS / ranks * 3072 * 2 * (ranks - 1) / ranks
    assert sent["attention", "context"] == pytest.approx(expected, rel=1e-12)
    if ranks == 8:
        assert sent["attention", "context"] / 42 * 75_000 / TOKENS / 1e6 == pytest.approx(202 + 202, rel=0.01)


def test_data_ranks_send_fp32_gradients_and_bf16_weights():
    sent = _sent(ParallelConfig(), data_size=64)
    total = sent["gradients", "data_context"] + sent["weights", "data_context"]
    assert total == pytest.approx(33.4e9 * 63 / 64, rel=0.01)
    assert sent["gradients", "data_context"] == 2 * sent["weights", "data_context"]


def test_recompute_sends_again_what_it_runs_again():
    tensor = ParallelConfig(tensor_parallel_size=2)
    context = ParallelConfig(context_parallel_size=2)

    def times_more(parallel, policy, key):
        return _sent(parallel.model_copy(update={"recompute": policy}))[key] / _sent(parallel)[key]

    for policy in ("full", "keep_attention", "block:42"):
        assert times_more(tensor, policy, ("mlp", "tensor")) == pytest.approx(7 / 5)
        assert times_more(context, policy, ("attention", "context")) == pytest.approx(12 / 8)
    assert times_more(tensor, "selective", ("mlp", "tensor")) == 1
    assert times_more(context, "selective", ("attention", "context")) == pytest.approx(10 / 8)
    assert times_more(tensor, "block:21", ("mlp", "tensor")) == pytest.approx(6 / 5)


def test_stages_send_their_tokens_once_each_way():
    parallel = ParallelConfig(pipeline_parallel_size=3)
    tokens = TOKENS * 3072 * 2
    assert [_sent(parallel, stage=stage)["stages", "pipeline"] for stage in range(3)] == [tokens, 2 * tokens, tokens]


def test_one_gpu_sends_nothing():
    assert _sent(ParallelConfig()) == {}


def test_buffers_are_padded_as_megatron_core_pads_them():
    assert gradient_buckets([65, 64, 1], 3) == [384]  # 1, padded to 64, + 64 + 65 = 193, to a multiple of lcm(3, 128)
    # From the last parameter on: 1 padded to 64, + 64 reaches 100, a bucket of 128; then 65, one of 128.
    assert gradient_buckets([65, 64, 1], 2, largest=100) == [128, 128]
    assert gradient_buckets([64, 64], 2, largest=64) == [128, 128]


def test_overlap_splits_the_gradients_into_buckets():
    """5B holds 5.57e9 weights; buckets of 64 ranks end once they have 64e6."""
    entries = {}
    for overlap in (False, True):
        parallel = ParallelConfig(overlap_grad_reduce=overlap)
        found = communication(MODEL, parallel, [], stage=0, data_size=64, bytes_per_weight=2)
        entries[overlap] = [entry.tensor_bytes for entry in found if entry.term == "gradients"]
    assert len(entries[False]) == 1 and 60 < len(entries[True]) < 5.57e9 / 64e6
    assert sum(entries[True]) == pytest.approx(entries[False][0], rel=1e-4)


def test_a_ring_sends_only_what_others_attend_to():
    """Two clips and two ranks: nothing crosses between them; one clip over both: half its keys and values each way."""
    parallel = ParallelConfig(context_parallel_size=2, ring_size=2)
    clip = place_sample(0, 13, 60, 90, 226, MODEL.patch)
    two = build_layout([clip, clip], MODEL.patch)
    size = {"stage": 0, "data_size": 1, "bytes_per_weight": 2}
    assert ("attention", "ring") not in sent_by_term(communication(MODEL, parallel, [two], **size))
    one = build_layout([clip], MODEL.patch)
    sent = sent_by_term(communication(MODEL, parallel, [one], **size))["attention", "ring"]
    assert sent == 42 * (2 + 1) * 2 * one.num_tokens / 2 * 3072 * 2
