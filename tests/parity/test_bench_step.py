"""What `tools/bench_step.py` compares is the same computation, and its figures are what they say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import bench_step
import bench_step_gpu
import bench_step_turns
from bench_step_sides import Case, OneByOne, OurPack, TheirBatch, diffusers_model, gradients, our_model

from megacogvx.models.transformer import CogVideoXConfig
from megacogvx.models.transformer.flops import training_flops
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.tolerance import assert_all_close, assert_close
from megacogvx.training.estimate.memory import block_activations

CONFIG = CogVideoXConfig(preset="tiny", num_layers=2, attention_head_dim=16, text_embed_dim=24)
EQUAL, MIXED = ((3, 8, 12, 5),) * 2, ((3, 8, 12, 5), (1, 4, 6, 3), (2, 6, 16, 4))


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _sides(sizes, groups):
    case = Case(CONFIG, sizes)
    theirs = diffusers_model(case)
    return case, theirs, our_model(case, theirs, groups)


def _assert_same(case, theirs, run_theirs, ours, run_ours):
    expected, actual = run_theirs(), run_ours()
    assert len(actual) == len(case.sizes)
    for place, rows in enumerate(expected):
        assert_close(actual[place], rows, 1e-5, f"sample {place}")
    references, computed = (dict(gradients(model, CONFIG)) for model in (theirs, ours))
    assert_all_close(computed, references, 1e-4)


def test_a_pack_and_a_batch_of_equal_samples_are_the_same_computation(groups):
    case, theirs, ours = _sides(EQUAL, groups)
    _assert_same(case, theirs, TheirBatch(case, theirs, range(2)), ours, OurPack(case, ours, range(2)))


def test_a_pack_and_samples_one_by_one_are_the_same_computation(groups):
    case, theirs, ours = _sides(MIXED, groups)
    each = OneByOne([TheirBatch(case, theirs, (place,)) for place in range(3)])
    _assert_same(case, theirs, each, ours, OurPack(case, ours, range(3)))


def test_padding_gives_every_sample_the_size_of_the_longest(groups):
    case, theirs, _ = _sides(MIXED, groups)
    batch = TheirBatch(case, theirs, range(3), size_of=0)
    assert batch.video.shape == (3, 3, 16, 8, 12) and batch.text.shape[:2] == (3, 5)


def test_a_wrong_result_is_marked(groups):
    case, theirs, ours = _sides(EQUAL, groups)
    reference = bench_step_turns.Side("diffusers", TheirBatch(case, theirs, range(2)), theirs)
    side = bench_step_turns.Side("megacogvx", OurPack(case, ours, range(2)), ours)
    bench_step_turns.take_turns([reference, side], case, rounds=1)
    assert "BROKEN" not in bench_step_turns.compare(side, reference, torch.float32)
    assert len(side.wall) == len(side.cpu) == len(side.faults) == 1
    assert bench_step_turns.ratio(side, reference).wall == side.wall[0] / reference.wall[0]
    side.rows[1] = side.rows[1] * 1.001
    assert "BROKEN" in bench_step_turns.compare(side, reference, torch.float32)


def test_processes_are_summed_up_by_their_median():
    runs = [{"ours": bench_step_turns.Ratio(wall, 1 - wall, 0.5)} for wall in (0.3, 0.1, 0.9)]
    (line,) = bench_step.spread(runs)
    assert line.split(maxsplit=1)[1] == (
        "wall 0.300 (0.100 to 0.900), cpu 0.700 (0.100 to 0.900), peak 0.500 (0.500 to 0.500)"
    )


def test_bf16_is_compared_with_fp32_of_the_same_rounded_numbers(groups):
    case = Case(CONFIG, EQUAL, torch.bfloat16)
    theirs = diffusers_model(case)
    run, ours = TheirBatch(case, theirs, range(2)), our_model(case, theirs, groups)
    reference = bench_step_turns.Side("diffusers", run, theirs)
    side = bench_step_turns.Side("megacogvx", OurPack(case, ours, range(2)), ours)
    bench_step_turns.take_turns([reference, side], case, rounds=1)
    truth = bench_step_turns.exact(case, reference)
    assert all(rows.dtype == torch.float32 for rows in truth.rows)
    rounded = dict(theirs.named_parameters())
    assert all(torch.equal(p, rounded[name].float()) for name, p in truth.model.named_parameters())
    assert torch.equal(truth.run.sides[1].video[0], run.video[1].float())
    assert "BROKEN" not in bench_step_turns.compare(side, truth, torch.bfloat16)
    assert "BROKEN" in bench_step_turns.compare(side, truth, torch.float32)


def test_the_peak_is_four_fifths_of_diffusers_without_and_with_full_recompute(groups):
    small = {"num_attention_heads": 2, "time_embed_dim": 32, "text_embed_dim": 32}
    case = Case(CogVideoXConfig(num_layers=2, use_rotary_positional_embeddings=True, **small), ((3, 16, 16, 64),) * 2)
    theirs = diffusers_model(case)
    for policy in ("none", "full"):
        if policy == "full":
            theirs.enable_gradient_checkpointing()
        ours = our_model(case, theirs, groups, policy)
        sides = ((OurPack(case, ours, range(2)), ours), (TheirBatch(case, theirs, range(2)), theirs))
        mine, other = (bench_step_turns.peak_bytes(bench_step_turns.Side("x", run, model)) for run, model in sides)
        assert mine <= 0.8 * other, f"{policy}: {mine / other:.3f}"


def test_peak_bytes_count_what_lives_at_a_time():
    weight = torch.ones(1000, requires_grad=True)
    model = torch.nn.ParameterList([weight])

    def run():
        for _ in range(10):
            torch.ones(1000)  # freed at once
        (weight * 2 * torch.ones(1000)).sum().backward()
        return []

    peak = bench_step_turns.peak_bytes(bench_step_turns.Side("x", run, model))
    assert 3 * 4000 <= peak < 6 * 4000  # two products, the ones, then the gradient in the place of what was freed


def test_the_mixed_samples_keep_the_shares_of_the_distribution():
    sizes = bench_step.mixed_sizes(1)
    assert len(sizes) == 12 and max(frames for frames, *_ in sizes) == 25
    assert all(height == 8 and width in range(8, 13) and text == 14 for _, height, width, text in sizes)


def test_the_packs_of_the_gpu_part_have_the_stated_lengths_and_flops():
    lengths = []
    for samples, latents, _ in bench_step_gpu.PACKS:
        case = bench_step_gpu.case_of(samples, latents)
        lengths.append((samples, case.layout.samples[0].length))
        flops = bench_step_gpu.block_flops(case.config, case.layout)
        whole = training_flops(CogVideoXConfig(preset="cogvideox_5b"), case.layout)
        assert 42 * flops == pytest.approx(whole, rel=0.005)
    assert lengths == [(5, 5218), (4, 17776), (1, 85906), (8, 85906)]


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 64>", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("vectorized_layer_norm_kernel", "norms, modulation, rotation, GELU, copies"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, part):
    assert bench_step_gpu.part_of(kernel) == part


def test_the_switch_for_the_gpu_runs_its_part_and_nothing_else(monkeypatch):
    ran = []
    monkeypatch.setattr(bench_step_gpu, "main", lambda packs: ran.append(list(packs)))
    monkeypatch.setattr(bench_step, "initialize", lambda config: ran.append("cpu"))
    for arguments in ([], ["--packs", "1", "3"]):
        monkeypatch.setattr(sys, "argv", ["bench_step.py", "--gpu", *arguments])
        bench_step.main()
    assert ran == [[0, 1, 2, 3], [1, 3]]


@pytest.mark.parametrize("policy", bench_step_gpu.KEPT_PER_TOKEN)
def test_the_memory_that_the_gpu_part_expects_is_the_estimates(policy):
    case = bench_step_gpu.case_of(*bench_step_gpu.PACKS[1][:2])
    kept = block_activations(case.config, ParallelConfig(recompute=policy), case.layout, 0, 2, "fused")
    expected = bench_step_gpu.KEPT_PER_TOKEN[policy] * case.config.hidden_size * case.layout.num_tokens
    assert kept == pytest.approx(expected, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    bench_step_gpu.main()
    assert "not measured" in capsys.readouterr().out


def _small_layers(groups, monkeypatch):
    """What the GPU part compares, small, in fp32 on the CPU, and not compiled."""
    case = Case(CONFIG.model_copy(update={"num_layers": 1}), EQUAL)
    monkeypatch.setattr(torch, "compile", lambda block, dynamic: block)
    return case, bench_step_gpu.layers(case, groups)


def test_the_sides_of_the_gpu_part_are_the_same_computation(groups, monkeypatch):
    _, sides = _small_layers(groups, monkeypatch)
    results = []
    for side in sides:
        out = side.forward()
        torch.autograd.backward(out, side.cotangents)
        inputs = [leaf.grad for leaf in side.leaves[: len(out)]]
        results.append((side.tokens(out), side.tokens(tuple(g if g.dim() == 3 else g[:, None] for g in inputs))))
        bench_step_gpu.drop_gradients(side)
    for side, (tokens, gradient) in zip(sides, results, strict=True):
        assert_close(tokens, results[-1][0], 1e-5, side.name)
        assert_close(gradient, results[-1][1], 1e-4, f"gradient, {side.name}")
    assert [bool(side.predicted) for side in sides] == [True, True, True, False, False]


def _table_of_the_gpu_part(groups, monkeypatch, capsys, failing):
    """Its clocks and counters are a GPU's; here they are played."""
    case, sides = _small_layers(groups, monkeypatch)

    def step(side):
        if failing in side.name:
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.autograd.backward(side.forward(), side.cotangents)
        bench_step_gpu.drop_gradients(side)
        return 2.0 if "eager" in side.name else 1.0

    monkeypatch.setattr(bench_step_gpu, "case_of", lambda *_: case)
    monkeypatch.setattr(bench_step_gpu, "layers", lambda *_: sides)
    monkeypatch.setattr(bench_step_gpu, "step", step)
    monkeypatch.setattr(bench_step_gpu, "kept_and_peak", lambda side: (int(1.01 * side.predicted), 2**30))
    monkeypatch.setattr(bench_step_gpu, "time_by_part", lambda side: ({"attention": 0.25}, "sdpa_sm90"))
    monkeypatch.setattr(bench_step_gpu, "PACKS", ((2, (3, 8, 12), 2),))
    monkeypatch.setattr(bench_step_gpu, "PEAK_TFLOPS", bench_step_gpu.block_flops(case.config, case.layout) / 1e9)
    bench_step_gpu.measure(0, groups)
    lines = [line for line in capsys.readouterr().out.splitlines() if "megacogvx" in line or "diffusers" in line]
    rows = {
        name: next(line for line in lines if name in line and "│" in line)
        for name in ("megacogvx, none", "keep_attention", "eager", "compiled", "selective")
    }
    return lines, rows


def test_the_table_of_the_gpu_part_has_all_figures_and_names_what_fails(groups, monkeypatch, capsys):
    lines, rows = _table_of_the_gpu_part(groups, monkeypatch, capsys, "selective")
    none, keep, eager = rows["megacogvx, none"], rows["keep_attention"], rows["eager"]
    assert lines[0].startswith("megacogvx, none 1.0 ms, ") and "selective" not in lines[0], "medians come first"
    assert "100.0%" in none and "50.0%" in eager and "100.0%" in rows["compiled"] and "(+1.0%)" in keep
    assert "out of memory" in rows["selective"]
    assert float(none.split("│")[-2]) < 1e-5 and not eager.split("│")[-2].strip()
    assert sum("attention 0.2 ms; attention kernel: sdpa_sm90" in line for line in lines) == 4


def test_outputs_are_compared_where_diffusers_has_no_memory_for_its_backward_pass(groups, monkeypatch, capsys):
    """Eight samples of 85,906 tokens on one GPU: its forward pass alone fits."""
    _, rows = _table_of_the_gpu_part(groups, monkeypatch, capsys, "eager")
    assert "out of memory" in rows["eager"]
    assert float(rows["megacogvx, none"].split("│")[-2]) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_layers_of_the_gpu_part_compute_the_same(monkeypatch):
    groups = initialize(ParallelConfig(device="cuda"))
    case = bench_step_gpu.case_of(2, (3, 32, 48))
    *ours, theirs = (side for side in bench_step_gpu.layers(case, groups) if "compiled" not in side.name)
    reference = theirs.tokens(theirs.forward())
    for side in ours:
        assert_close(side.tokens(side.forward()), reference, 2e-2, side.name)
        kept, peak = bench_step_gpu.kept_and_peak(side)
        assert 0 < kept <= peak
        assert bench_step_gpu.step(side) > 0
    shutdown()
