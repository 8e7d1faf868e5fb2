"""The training objective: squared error of the velocity, without a timestep weight (CogVideoX paper, section 3.2).

It equals the mean of `(x0_predicted - x0)^2 / (1 - abar_t)`, but keeps its precision where 1 - abar_t is small.
Everything here is a sum over the rows that one rank holds; the caller adds the sums of the ranks and divides once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megacogvx.diffusion.config import LossMean
from megacogvx.pack_layout import LocalPack, PackLayout, PackSample
from megacogvx_kernels.transfer import to_device

NUM_INTERVALS = 10  # equal parts of [0, T) for which the loss is reported apart


@dataclass(frozen=True)
class LossSums:
    """Sums over the local rows.

    Attributes:
        total: fp32 scalar with gradient, the weighted sum of row errors.
        by_interval: fp32 `[10]`, the same sum split by timestep interval, without gradient.
        weight_by_interval: fp32 `[10]`, the weights behind `by_interval`.
    """

    total: torch.Tensor
    by_interval: torch.Tensor
    weight_by_interval: torch.Tensor


def v_loss(
    prediction_VP: torch.Tensor,
    target_VP: torch.Tensor,
    timesteps_M: torch.Tensor,
    layout: PackLayout,
    local: LocalPack,
    *,
    loss_mean: LossMean = "sample",
    num_train_timesteps: int = 1000,
) -> LossSums:
    """Sum the squared velocity errors of the local video rows.

    A row's error is the mean over those of its elements that carry loss: a row is ordered (c, q, p, p), and the first
    `local.repeated` of its q frames are copies of the first latent frame, which carry none. A row weighs 1 with
    `loss_mean="token"`, 1 / (rows of its sample) with "sample".

    Args:
        prediction_VP, target_VP: `[V_local, P]`, any floating dtype; the error is taken in fp32.
        timesteps_M: int64 `[M]`, timestep of each sample of the pack (the padding's is not read).
        layout, local: the pack and this rank's share of it.

    Returns:
        Sums over this rank's rows; `total` is zero, with a gradient of zero, when there are none.
    """
    assert prediction_VP.shape == target_VP.shape == (len(local.repeated), target_VP.shape[1]), (
        f"prediction {tuple(prediction_VP.shape)}, target {tuple(target_VP.shape)}, rows {len(local.repeated)}"
    )
    squares_VP = (prediction_VP.float() - target_VP.float()) ** 2
    errors_V = _row_means(squares_VP, local.repeated, layout.patch)
    sample_V = local.modulation_rows[local.video_index] // 2
    weights_V = row_weights(layout, loss_mean, errors_V.device)[sample_V]
    weighted_V = errors_V * weights_V
    interval_V = timesteps_M.to(errors_V.device)[sample_V] * NUM_INTERVALS // num_train_timesteps
    zeros = torch.zeros(NUM_INTERVALS, device=errors_V.device)
    return LossSums(
        total=weighted_V.sum(),
        by_interval=zeros.index_add(0, interval_V, weighted_V.detach()),
        weight_by_interval=zeros.index_add(0, interval_V, weights_V),
    )


def row_weights(layout: PackLayout, loss_mean: LossMean, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return fp32 `[M]`, the weight of one video row of each sample (0 for the padding, which has no rows)."""
    weights = [_weight(sample, loss_mean) / max(sample.video_length, 1) for sample in layout.samples]
    return to_device(torch.tensor(weights, dtype=torch.float32), device)


def sample_weights(layout: PackLayout, loss_mean: LossMean) -> list[float]:
    """Return what each real sample weighs in the loss: one pack's entry in the weights of `step_timesteps`."""
    return [float(_weight(sample, loss_mean)) for sample in layout.samples[:-1]]


def loss_count(layout: PackLayout, context_tokens: range, loss_mean: LossMean) -> int:
    """Return what this context rank adds to the divisor of the loss; summed over context ranks, the pack's weight.

    Counted over the tokens that a context rank shares with its tensor ranks, so it is equal on those. With "sample" a
    sample is counted by the rank that holds its first video token.
    """
    count = 0
    for first, sample in zip(layout.boundaries, layout.samples[:-1], strict=False):
        if not sample.carries_loss:
            continue
        start = first + sample.text_length
        if loss_mean == "sample":
            count += start in context_tokens
        else:
            count += len(range(max(start, context_tokens.start), min(start + sample.video_length, context_tokens.stop)))
    return count


def _weight(sample: PackSample, loss_mean: LossMean) -> int:
    if not sample.carries_loss:
        return 0
    return sample.video_length if loss_mean == "token" else int(sample.video_length > 0)


def _row_means(squares_VP: torch.Tensor, repeated_V: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    q, ph, pw = patch
    frames_Vq = squares_VP.unflatten(1, (squares_VP.shape[1] // (q * ph * pw), q, ph * pw)).mean(dim=(1, 3))
    if q == 1:
        return frames_Vq[:, 0]
    carries_Vq = torch.arange(q, device=squares_VP.device) >= repeated_V[:, None]
    return (frames_Vq * carries_Vq).sum(1) / carries_Vq.sum(1)
