"""Attention of some queries to some of their keys, with what it takes to merge such parts exactly.

softmax over all keys = softmax over each part, weighted by exp(lse of the part - lse of all), lse being the log of the
sum of the exponents (Milakov and Gimelshein 2018). The gradient of a part needs only the merged output and lse: with
P = exp(S - lse) and delta = rowsum(dO * O), dV = P^T dO, dS = P * (dO V^T - delta) (Dao et al. 2022, algorithm 4).

The kernels are those that torch's own context parallelism merges
(`torch/distributed/tensor/experimental/_context_parallel/_attention.py` of torch 2.13): `scaled_dot_product_attention`
returns no lse, the operators under it do.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten
CHUNK = 1024  # queries at a time where there is no kernel: scores are [N, CHUNK, keys], never [N, queries, keys]


def attend_block(q_SNK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(q k^T K^-0.5) v over these keys, and its lse.

    Args:
        q_SNK: `[S, N, K]`, at least one query.
        k_TNK, v_TNK: `[T, N, K]`, at least one key.

    Returns:
        (out `[S, N, K]` in the dtype of q, lse fp32 `[S, N]`). Backward: `attend_block_backward`; autograd sees
        nothing.
    """
    q, k, v = _heads_first(q_SNK), _heads_first(k_TNK), _heads_first(v_TNK)
    kernel = _kernel(q_SNK, k_TNK)
    if kernel == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif kernel == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        lse = lse.view(q.shape[:3])  # it comes with a last axis of 1
    elif kernel == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse = _plain(q, k, v)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def attend_block_backward(
    grad_SNK: torch.Tensor,
    q_SNK: torch.Tensor,
    k_TNK: torch.Tensor,
    v_TNK: torch.Tensor,
    out_SNK: torch.Tensor,
    lse_SN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what these keys contribute to the gradients of q, k and v.

    Args:
        grad_SNK: gradient of the merged output `[S, N, K]`.
        q_SNK, k_TNK, v_TNK: as in `attend_block`.
        out_SNK, lse_SN: merged over all keys that these queries attend to.

    Returns:
        dq `[S, N, K]`, to be added over the parts; dk and dv `[T, N, K]`, to be added over all queries.
    """
    tensors = [_heads_first(x) for x in (grad_SNK, q_SNK, k_TNK, v_TNK, out_SNK)]
    lse = lse_SN.transpose(0, 1)[None].contiguous()
    queries, keys = q_SNK.shape[0], k_TNK.shape[0]
    kernel = _kernel(q_SNK, k_TNK)
    if kernel == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, False)
    elif kernel == "plain":
        grad, q, k, v, out = tensors
        grads = _plain_backward(grad, q, k, v, out, lse)
    else:
        # Offsets of samples, which a dense call has none of, then dropout with its seed and offset: none.
        sizes = (None, None, queries, keys, 0.0, False)
        seed = torch.zeros(2, dtype=torch.uint64 if kernel == "flash" else torch.int64, device=q_SNK.device)
        if kernel == "cudnn":
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                *tensors, lse[..., None], seed[0], seed[1], None, *sizes
            )
        else:
            grads = aten._scaled_dot_product_flash_attention_backward(*tensors, lse, *sizes, seed, seed[:0])
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
    return dq, dk, dv


def _kernel(q_SNK: torch.Tensor, k_TNK: torch.Tensor) -> str:
    """Return which operator computes a part; on GPUs there is one for half precision only.

    cuDNN has none for a single token, which a sample may well reach into the next rank with. Under
    `scaled_dot_product_attention` torch turns such a call away from it (`check_cudnn_tensor_shapes` in
    `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`); the operator itself doesn't look.
    """
    if q_SNK.device.type == "cpu":
        return "cpu"
    if q_SNK.dtype not in (torch.bfloat16, torch.float16):
        return "plain"
    several = min(len(q_SNK), len(k_TNK)) > 1
    return "cudnn" if several and torch.cuda.get_device_capability(q_SNK.device) >= (9, 0) else "flash"


def _heads_first(x_SNK: torch.Tensor) -> torch.Tensor:
    return x_SNK.transpose(0, 1)[None]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, some queries at a time; `[1, N, S, K]` in, (`[1, N, S, K]`, fp32 `[1, N, S]`) out."""
    outs, lses = [], []
    for part in q.split(CHUNK, dim=2):
        scores = part.float() @ k.float().mT * q.shape[-1] ** -0.5
        lse = scores.logsumexp(dim=-1)
        outs.append((scores - lse[..., None]).exp() @ v.float())
        lses.append(lse)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _plain_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, k32, v32 = q.shape[-1] ** -0.5, k.float(), v.float()
    dq, dk, dv = [], torch.zeros_like(k32), torch.zeros_like(v32)
    parts = (x.split(CHUNK, dim=2) for x in (grad.float(), q.float(), out.float(), lse))
    for grad_part, q_part, out_part, lse_part in zip(*parts, strict=True):
        weights = (q_part @ k32.mT * scale - lse_part[..., None]).exp()
        delta = (grad_part * out_part).sum(dim=-1, keepdim=True)
        d_scores = weights * (grad_part @ v32.mT - delta) * scale
        dq.append(d_scores @ k32)
        dk += d_scores.mT @ q_part
        dv += weights.mT @ grad_part
    return torch.cat(dq, dim=2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
