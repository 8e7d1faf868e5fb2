import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megacogvx import draws
from megacogvx.errors import DataError
from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, attention, transformer_core
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.tolerance import assert_close, relative_error

CONFIG = CogVideoXConfig(preset="tiny", num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4)
SINCOS = CONFIG.model_copy(update={"use_rotary_positional_embeddings": False})
SIZES = ((2, 8, 8, 5), (1, 4, 6, 3), (3, 6, 4, 1))
TIMESTEPS = (999, 500, 0)


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _model(groups, config=CONFIG, dtype=torch.float32, recompute="none"):
    core = transformer_core(config, ParallelConfig(recompute=recompute), groups, dtype)
    model = CogVideoXTransformer(config, core, groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(draws.normal(tuple(parameter.shape), 0, name) * scale + float(is_norm))
    return model


def _sample(place):
    """Rows and text of one sample, the same in every pack."""
    size = SIZES[place]
    sample = place_sample(place, *size, CONFIG.patch)
    video = draws.normal((sample.video_length, CONFIG.row_size_in), 1, "video", place)
    return sample, video, draws.normal((sample.text_length, CONFIG.text_embed_dim), 1, "text", place)


def _run(model, places, multiple=64, padding_text=0.0, change=None, dtype=torch.float32, steps=TIMESTEPS):
    """Return the rows of each sample of a pack of `places`; `change(place, video, text)` may edit its inputs."""
    samples, videos, texts = zip(*(_sample(place) for place in places), strict=True)
    if change is not None:
        videos, texts = zip(*(change(*entry) for entry in zip(places, videos, texts, strict=True)), strict=True)
    layout = build_layout(samples, CONFIG.patch, multiple=multiple)
    padding = torch.full((layout.samples[-1].length, CONFIG.text_embed_dim), padding_text)
    timesteps = torch.tensor([*(steps[place] for place in places), 0])
    rows = model(torch.cat(videos).to(dtype), torch.cat([*texts, padding]).to(dtype), timesteps, layout)
    return rows.split([sample.video_length for sample in samples])


@pytest.mark.parametrize("config", [CONFIG, SINCOS], ids=["rotary", "sincos"])
def test_a_pack_equals_its_samples_one_by_one(config, groups):
    model = _model(groups, config)
    together = _run(model, (0, 1, 2))
    for place, rows in enumerate(together):
        (alone,) = _run(model, (place,), multiple=1)
        assert_close(rows, alone, 1e-6, f"sample {place}")


def test_rotating_in_the_weights_dtype_differs_by_rounding_alone(groups):
    narrow = CONFIG.model_copy(update={"rope_precision": "weights"})
    for dtype, least, most in ((torch.float32, 0.0, 1e-6), (torch.bfloat16, 1e-5, 3e-2)):
        wide, own = (_run(_model(groups, config, dtype), (0, 1, 2), dtype=dtype) for config in (CONFIG, narrow))
        for a, b in zip(own, wide, strict=True):
            assert least <= relative_error(a, b) <= most


def test_the_place_in_the_pack_does_not_matter(groups):
    model = _model(groups)
    there, back = _run(model, (0, 1, 2)), _run(model, (2, 0, 1))
    for place, moved in ((0, 1), (1, 2), (2, 0)):
        assert_close(back[moved], there[place], 1e-6, f"sample {place}")


def test_a_rank_without_video_has_gradients_of_zeros(groups):
    """Not missing ones: other ranks wait for some of them in the backward pass."""
    model, (sample, _, _) = _model(groups), _sample(0)
    local = build_layout([sample], CONFIG.patch, multiple=64).local((3, 4))
    assert len(local.tokens) and not len(local.video_index)
    hidden = draws.normal((len(local.tokens), 1, CONFIG.hidden_size), 0, "hidden").requires_grad_()
    condition = draws.normal((2, CONFIG.time_embed_dim), 0, "condition").requires_grad_()
    rows = model.head(hidden, condition, local)
    tokens = model.blocks["0"].mlp(hidden[:0])  # what `each_modality` does with a modality that isn't there
    assert (rows.shape, tokens.shape) == ((0, CONFIG.row_size_out), (0, 1, CONFIG.hidden_size))
    (rows.sum() + tokens.sum()).backward()
    parameters = [*model.head.named_parameters(), *model.blocks["0"].mlp.named_parameters()]
    for name, leaf in (*parameters, ("hidden", hidden), ("condition", condition)):
        assert leaf.grad is not None and not leaf.grad.any(), name


@pytest.mark.parametrize("config", [CONFIG, SINCOS], ids=["rotary", "sincos"])
@pytest.mark.parametrize("place", range(3))
def test_one_sample_leaves_the_others_bit_identical(place, config, groups):
    """Its video, its text and its timestep, each alone."""
    model = _model(groups, config)
    before = _run(model, (0, 1, 2))
    steps = [step if other != place else 700 for other, step in enumerate(TIMESTEPS)]
    for change in (
        {"change": lambda p, v, t: (v + float(p == place), t)},
        {"change": lambda p, v, t: (v, t - float(p == place))},
        {"steps": steps},
    ):
        for other, (rows, again) in enumerate(zip(before, _run(model, (0, 1, 2), **change), strict=True)):
            if other != place:
                assert torch.equal(rows, again), f"sample {other}"
            else:
                assert not torch.allclose(rows, again, atol=1e-2)


def test_padding_influences_nothing(groups):
    model = _model(groups)
    before, after = _run(model, (0, 1)), _run(model, (0, 1), padding_text=1e6)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    gradients = []
    for text in (0.0, 1e6):
        model.zero_grad()
        sum(rows.sum() for rows in _run(model, (0, 1), padding_text=text)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_parameter_gets_a_gradient(groups):
    model = _model(groups)
    sum((rows * rows).sum() for rows in _run(model, (0, 1, 2))).backward()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


def test_the_condition_is_made_once_a_forward_and_the_tables_once_a_sample(groups):
    model, calls = _model(groups), []
    for name, module in model.named_modules():
        if name == "time" or name.endswith("modulation"):
            module.register_forward_hook(lambda _, __, table, name=name: calls.append((name, tuple(table.shape))))
    _run(model, (0, 1, 2))
    samples, width = 4, CONFIG.hidden_size  # the padding is one of them
    assert calls[0] == ("time", (samples, CONFIG.time_embed_dim))
    assert [shape for name, shape in calls if name.startswith("blocks")] == [(2 * samples, 3, width)] * 4
    assert calls[-1] == ("head.modulation", (samples, 2, width))
    assert len(calls) == 6


POLICIES = ("none", "selective", "keep_attention", "full", "block:1")


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_recompute_changes_no_bit(groups, policy):
    results = []
    for recompute in ("none", policy):
        model = _model(groups, recompute=recompute)
        rows = torch.cat(_run(model, (0, 1, 2)))
        (rows * rows).sum().backward()
        results.append((rows, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (rows, gradients), (again, gradients_again) = results
    assert torch.equal(rows, again)
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())


def _bytes_kept(groups, policy):
    """Bytes of all tensors kept for the backward pass, each piece of memory once, the weights left out."""
    model, kept = _model(groups, recompute=policy), []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        rows = _run(model, (0, 1, 2))
    memory = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in kept}
    assert rows[0].requires_grad
    return sum(storage.nbytes() for storage in memory.values() if storage.data_ptr() not in weights)


def test_each_recompute_policy_keeps_less_than_the_one_before(groups):
    kept = {policy: _bytes_kept(groups, policy) for policy in POLICIES}
    assert kept["none"] > kept["selective"] > kept["keep_attention"] > kept["full"], kept
    assert kept["full"] < kept["block:1"] < kept["none"], kept
    # 32 D, 24 D and 4 D bytes a token and block (training/estimate/memory.py, held to what autograd keeps), and ends
    assert kept["selective"] < 0.8 * kept["none"] and kept["keep_attention"] < 0.5 * kept["selective"], kept


@pytest.mark.parametrize("policy", ["full", "keep_attention"])
def test_the_input_of_a_block_is_freed_once_its_gradient_is_known(groups, policy):
    model, inputs, alive = _model(groups, recompute=policy), [], []
    model.blocks["1"].register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    model.blocks["0"].attention.qkv.weight.register_post_accumulate_grad_hook(lambda _: alive.append(inputs[0]()))
    torch.cat(_run(model, (0, 1, 2))).sum().backward()
    assert len(inputs) == 1 and alive == [None]


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_what_the_mlp_reads_is_made_again_after_gelus_gradient(groups, policy):
    """GELU's gradient is when `recompute: full` holds most."""
    model, order = _model(groups, recompute=policy), []
    block = model.blocks["1"]
    modulate = block._modulate

    def watched(norm, *arguments):
        if norm is block.mlp_norm and torch.is_grad_enabled():
            order.append("made again")
        return modulate(norm, *arguments)

    def watch(_, arguments, inner):
        if inner.requires_grad:
            inner.register_hook(lambda _: order.append("gradient"))

    block._modulate = watched
    block.mlp.fc1.register_forward_hook(watch)
    torch.cat(_run(model, (0, 1, 2))).sum().backward()
    assert order == ["gradient", "made again"]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_no_tensor_has_a_number_for_each_pair_of_tokens(groups, policy):
    model, largest = _model(groups, recompute=policy), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    tokens = 640  # of the pack and nearly of its one long sample; the widest tensor a token has is the MLP's
    sample = place_sample(0, 10, 16, 16, 0, CONFIG.patch)
    layout = build_layout([sample], CONFIG.patch)
    assert layout.num_tokens == tokens > 2 * CONFIG.ffn_hidden_size
    rows = torch.ones(tokens, CONFIG.row_size_in)
    with Sizes():
        model(rows, torch.ones(0, CONFIG.text_embed_dim), torch.tensor([1, 0]), layout).sum().backward()
    assert max(largest) == tokens * CONFIG.ffn_hidden_size


def test_bf16_parameters_stay_near_fp32(groups):
    wide = torch.cat(_run(_model(groups), (0, 1, 2)))
    model = _model(groups, dtype=torch.bfloat16)
    narrow = torch.cat(_run(model, (0, 1, 2), dtype=torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert_close(narrow, wide, 2e-2)
    narrow.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_sharded_state_covers_every_weight(groups):
    config = CONFIG.model_copy(update={"use_learned_positional_embeddings": True})
    model = CogVideoXTransformer(config, transformer_core(config, ParallelConfig(), groups, torch.float32), groups)
    sharded = model.sharded_state_dict(prefix="model.")
    assert sharded.keys() == {f"model.{name}" for name, tensor in model.state_dict().items() if tensor is not None}
    assert "model.embedding.positions" in sharded


class HostReads(TorchDispatchMode):
    """Fails where the host would wait for the device: it reads a value, or a shape depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in function.name() for name in self.WAITING), f"{function.name()} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", POLICIES[:-1])
def test_no_layer_waits_for_the_device(groups, recompute):
    model = _model(groups, recompute=recompute)
    samples, videos, texts = zip(*(_sample(place) for place in (0, 1, 2)), strict=True)
    layout = build_layout(samples, CONFIG.patch)
    timesteps = torch.tensor([*TIMESTEPS, 0])
    model(torch.cat(videos), torch.cat(texts), timesteps, layout)  # what is made once per pack
    with HostReads():
        model(torch.cat(videos), torch.cat(texts), timesteps, layout).square().sum().backward()
    with pytest.raises(AssertionError, match="waits"), HostReads():
        timesteps.sum().item()


def test_the_kernel_is_logged_once_and_gets_the_offsets_of_the_pack(groups, monkeypatch):
    seen, told = [], []

    def attend(q, k, v, boundaries, *, cu_seqlens, backend):
        seen.append((boundaries, cu_seqlens, backend))
        return v

    attention._say.cache_clear()
    monkeypatch.setattr(attention, "packed_attention", attend)
    monkeypatch.setattr(attention.logger, "info", lambda text, *values: told.append(text % values))
    _run(_model(groups), (0, 1))
    assert told == ["attention: reference (tensors on cpu)"]
    boundaries, offsets, _ = seen[0]
    assert boundaries == (0, 37, 46) and offsets.tolist() == [0, 37, 46] and offsets.dtype == torch.int32
    assert len(seen) == CONFIG.num_layers and all(entry[1] is offsets and entry[2] == "reference" for entry in seen)


def test_bad_packs_are_refused_by_the_model_itself(groups):
    model = _model(groups, CONFIG.model_copy(update={"max_text_seq_length": 4}))
    with pytest.raises(DataError, match="sample 0 has 5 text tokens"):
        _run(model, (0,))
    rows = torch.zeros(16, 4 * CONFIG.row_size_in)
    layout = build_layout([place_sample(0, 1, 8, 8, 1, CONFIG.patch)], CONFIG.patch)
    with pytest.raises(DataError, match="16 channels"):
        _model(groups)(rows, torch.zeros(1, 64), torch.zeros(2, dtype=torch.int64), layout)


def test_a_pack_on_another_rope_grid_is_refused(groups):
    model = _model(groups, CONFIG.model_copy(update={"rope_grid": "crop"}))
    with pytest.raises(AssertionError, match="place_on_rope_grid"):
        _run(model, (1,))


def test_a_pack_of_another_patch_is_refused(groups):
    layout = build_layout([place_sample(0, 2, 4, 4, 1, (2, 2, 2))], (2, 2, 2))
    with pytest.raises(AssertionError, match="patch"):
        _model(groups)(torch.zeros(4, 32), torch.zeros(1, 64), torch.zeros(2, dtype=torch.int64), layout)
