# SPDX-License-Identifier: MIT
"""Fused GPU kernels for gpt.py, which trains and samples without them too.

    softmax(x)                                the gentlest kernel: one row, one program
    attention_...(q, k, v)                    softmax(q k^T / sqrt(D)) v; no T x T matrix is stored
    linear_cross_entropy(x, weight, targets)  the training loss; never all of the N x V logits

`choose` finds the attention for a machine and a shape: what can run there, gives what torch's own
gives, and is faster than it. `python kernels.py [--json FILE]` checks and times them all.

B batch, H query heads, H_kv key and value heads (GQA; H_kv divides H), TQ queries, TK keys, D head
size, N rows, C channels, V vocabulary. Tensors lie as (B, T, H, D), as projections make them. m, l
and acc are the running maximum, sum and output of the papers: the online softmax
(arxiv.org/abs/1805.02867) and FlashAttention-2 (arxiv.org/abs/2307.08691). LSE is the logarithm,
to base 2, of the sum of exponentials.
"""
import argparse, collections, ctypes, functools, importlib.util, json, math, os, shutil, struct
import sysconfig, time, warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # no Triton for this platform: the kernels stay functions that nobody calls
    triton, tl, constexpr = None, None, None
    jit = lambda function: function

GPT_KERNELS = 2                    # tells this file from the Hugging Face package called kernels
calls = collections.Counter()      # launches of the kernels below, by name
LOG2E = 1.4426950408889634         # e^x = 2^(x log2(e)): exp2 is the GPU's own instruction
HALF = (torch.float16, torch.bfloat16)
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

def op_namespace():
    """A name under which no op is defined yet: a second copy of this file has its own."""
    names = (f"gpt_kernels{n}" for n in range(1000))
    return next(n for n in names if not hasattr(getattr(torch.ops, n), "softmax_forward"))

def op(function):
    """One opaque op: torch.compile keeps its graph whole, and does not look inside."""
    return torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=())

NAMESPACE = op_namespace()

def launch(kernel, grid, *args, **constants):
    """Launch a Triton kernel on the device of its first argument, which need not be the current."""
    calls[kernel.__name__] += 1
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, enable_fp_fusion=True, **constants)  # a * b + c in one instruction

# --- Softmax: the gentlest kernel -----------------------------------------------------------------

# y_i = exp(x_i - max x) / sum_j exp(x_j - max x) over the last dimension; X and Y are (N, n), one
# program a row. It replaces five kernels that each go over the whole matrix (max, subtract, exp,
# sum, divide) by one that reads it once and writes it once: memory is slow, arithmetic nearly free.
@jit
def softmax_kernel(X, Y, n, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)              # 64 bits: row * n passes 2^31 on big matrices
    i = tl.arange(0, BLOCK)                          # a power of two; the mask cuts it to n
    x = tl.load(X + row * n + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))                     # without the max, exp(89) is infinite already
    tl.store(Y + row * n + i, e / tl.sum(e, 0), mask=i < n)

# dx = y * (dy - sum_j y_j dy_j): each output depends on every input through the denominator.
@jit
def softmax_backward_kernel(Y, DY, DX, n, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    y = tl.load(Y + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(DX + row * n + i, y * (dy - tl.sum(y * dy, 0)), mask=i < n)

def softmax_rows(kernel, *inputs):
    """A row sits in the registers of one program: the longer it is, the more warps share it."""
    inputs = [x.contiguous() for x in inputs]
    out, n = torch.empty_like(inputs[0]), inputs[0].shape[-1]
    block = triton.next_power_of_2(n)
    warps = min(max(block // 512, 1), 16)
    launch(kernel, (out.numel() // n,), *inputs, out, n, BLOCK=block, num_warps=warps)
    return out

@op
def softmax_forward(x: Tensor) -> Tensor:
    return softmax_rows(softmax_kernel, x)

@op
def softmax_backward(y: Tensor, dy: Tensor) -> Tensor:
    return softmax_rows(softmax_backward_kernel, y, dy)

softmax_forward.register_fake(lambda x: x.new_empty(x.shape))
softmax_backward.register_fake(lambda y, dy: y.new_empty(y.shape))
softmax_forward.register_autograd(
    lambda ctx, dy: softmax_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output))

def softmax(x):
    """Softmax over the last dimension: by these kernels where they run and a row fits registers."""
    fits = x.dim() and x.numel() and x.shape[-1] <= 16384
    if not fits or cannot_run("triton", x.device, x.dtype):
        return torch.softmax(x, -1)
    return softmax_forward(x)

def softmax_cuda(x):
    """The same in CUDA C++, from its source below: fp16, forward only. How one is launched."""
    if reason := cannot_run("cuda", x.device, x.dtype):
        raise ValueError(reason)
    x = x.contiguous()
    y, n = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // n
    launch_cuda("softmax_rows", (-(-rows // 4), 1), x, "PPii", x.data_ptr(), y.data_ptr(), rows, n)
    return y

# --- Attention, the readable way, and torch's -----------------------------------------------------

def causal_mask(TQ, TK, device):
    """True where query i may see key j. Aligned bottom-right: the last query sees every key.

    >>> causal_mask(2, 3, "cpu").int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(TQ, TK, dtype=torch.bool, device=device).tril(TK - TQ)

def heads_first(q, k, v):
    """(B, T, H, D) -> (B, H, T, D), and each key head as often as it has queries."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

def attention_reference(q, k, v, causal=True, scale=None):
    """The formula, which all else here must agree with: q (B, TQ, H, D), k and v (B, TK, H_kv, D)
    -> (B, TQ, H, D). scale None is 1 / sqrt(D). A query that sees no key gives 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = heads_first(q, k, v)
    s = q @ k.mT * scale                                          # (B, H, TQ, TK)
    hidden = ~causal_mask(q.shape[2], k.shape[2], q.device) & causal
    s = s.masked_fill(hidden, torch.finfo(s.dtype).min)           # a row of -inf has no softmax
    p = s.softmax(-1).masked_fill(hidden, 0.0)
    return (p @ v).transpose(1, 2)

def attention_sdpa(q, k, v, causal=True, scale=None):
    """The same by torch's own kernels. Outside the CPU few of them know groups."""
    TQ, TK = q.shape[1], k.shape[1]
    mask = causal_mask(TQ, TK, q.device) if causal and 1 < TQ != TK else None
    square, groups = causal and TQ == TK, q.shape[2] != k.shape[2]
    if groups and q.device.type != "cpu":
        (q, k, v), groups = heads_first(q, k, v), False
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, scale=scale,
                                       enable_gqa=groups)
    return o.transpose(1, 2)

# --- Attention in Triton: forward -----------------------------------------------------------------

# O = softmax(Q K^T * scale) V, and LSE (B, H, TQ) for the backward pass. It replaces the formula
# above, which writes and reads (B, H, TQ, TK) four times. One program owns BM queries of one head,
# and walks over the keys, BN at a time. The online softmax keeps, per query, the maximum m so far,
# the sum l of 2^(s - m), and acc, the sum of 2^(s - m) v; a new maximum rescales l and acc. A row
# of queries is H * D elements away from the next. DP is D rounded up to a power of two.

@jit
def whose_block(length, H, SIZE: constexpr):
    """(block, b, h) of this program. Blocks vary fastest: neighbours read the same keys."""
    blocks = tl.cdiv(length, SIZE)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # 64 bits, and so is every offset made from it
    return tl.program_id(0) % blocks, head // H, head % H

@jit
def load_rows(base, stride, start, n_rows, ROWS: constexpr, D: constexpr, DP: constexpr,
              CHECK: constexpr = True):
    """Tile (ROWS, DP) from row `start` of a matrix (n_rows, D). Without CHECK all rows are there.
    Only the tile's origin is a 64-bit offset: within the tile 32 bits do, and save registers."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
    place = base + tl.cast(start, tl.int64) * stride + (i * stride + d)
    if CHECK or D < DP:
        return tl.load(place, mask=(i < n_rows - start) & (d < D), other=0.0)
    return tl.load(place)

@jit
def store_rows(base, stride, start, n_rows, tile, D: constexpr, DP: constexpr):
    i, d = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, DP)[None, :]
    place = base + tl.cast(start, tl.int64) * stride + (i * stride + d)
    tl.store(place, tile, mask=(i < n_rows - start) & (d < D))  # rounded to the elements' type

@jit
def key_range(block, TQ, TK, PHASE: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """Keys for a block of queries. Phase 0: tiles that all of them see whole, which need no mask.
    Phase 1: the rest, the diagonal and the ragged end."""
    whole, stop = TK, TK
    if CAUSAL:
        whole = tl.maximum(tl.minimum(TK, block * BM + 1 + TK - TQ), 0)
        stop = tl.maximum(tl.minimum(TK, block * BM + BM + TK - TQ), 0)
    whole = whole // BN * BN
    return (0, whole) if PHASE == 0 else (whole, stop)

@jit
def visible(row, n, TQ, TK, CAUSAL: constexpr):
    """Which (query, key) pairs count. Causal is aligned bottom-right."""
    return (n < TK) & (n <= row + TK - TQ) if CAUSAL else (n < TK) & (row >= 0)

@jit
def attention_forward_kernel(Q, K, V, O, LSE, H, H_kv, TQ, TK, scale_log2, D: constexpr,
                             DP: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    block, b, h = whose_block(TQ, H, BM)
    block = tl.cdiv(TQ, BM) - 1 - block  # the last queries see most keys, so they start first
    m0, row = block * BM, block * BM + tl.arange(0, BM)
    own, walked = (b * TQ * H + h) * D, (b * TK * H_kv + h // (H // H_kv)) * D
    q = load_rows(Q + own, H * D, m0, TQ, BM, D, DP)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for PHASE in tl.static_range(2):  # two loops, one text
        start, stop = key_range(block, TQ, TK, PHASE, BM, BN, CAUSAL)
        for n0 in range(start, stop, BN):
            n = n0 + tl.arange(0, BN)
            k = load_rows(K + walked, H_kv * D, n0, TK, BN, D, DP, PHASE == 1)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if PHASE == 1:
                s = tl.where(visible(row[:, None], n[None, :], TQ, TK, CAUSAL), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            # a query may have seen no key in a tile with a mask: -inf - -inf would be NaN
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if PHASE == 1 else m_new
            p = tl.exp2(s * scale_log2 - m_safe[:, None])  # a multiply-add and an exp2 an element
            alpha = tl.exp2(m - m_safe)
            l = l * alpha + tl.sum(p, 1)
            m = m_new
            v = load_rows(V + walked, H_kv * D, n0, TK, BN, D, DP, PHASE == 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    # a query without keys gives 0, and LSE = inf makes its weights 0 in the backward pass
    l_safe = tl.where(l > 0, l, 1.0)
    lse = tl.where(l > 0, m + tl.log2(l_safe), float("inf"))
    tl.store(LSE + (b * H + h) * TQ + row, lse, mask=row < TQ)
    store_rows(O + own, H * D, m0, TQ, acc / l_safe[:, None], D, DP)

# --- Attention in Triton: backward ----------------------------------------------------------------

# With S = Q K^T * scale, P = softmax(S), O = P V and the gradient dO:
#     dV = P^T dO   dP = dO V^T   dS = P * (dP - delta)   dQ = scale * dS K   dK = scale * dS^T Q
# where delta = rowsum(P * dP) = rowsum(O * dO): the second form needs no matrix. P is made again
# from Q, K and LSE. Two kernels, because dQ sums over keys, and dK and dV sum over queries: each
# program owns what it writes. S and dP are made twice, but without atomics the same input gives the
# same bits. dQ comes first and leaves delta to dK and dV.

@jit
def attention_dq_kernel(Q, K, V, O, DO, DQ, LSE, DELTA, H, H_kv, TQ, TK, scale, scale_log2,
                        D: constexpr, DP: constexpr, BM: constexpr, BN: constexpr,
                        CAUSAL: constexpr):
    block, b, h = whose_block(TQ, H, BM)
    block = tl.cdiv(TQ, BM) - 1 - block
    m0, row, head = block * BM, block * BM + tl.arange(0, BM), (b * H + h) * TQ
    own, walked = (b * TQ * H + h) * D, (b * TK * H_kv + h // (H // H_kv)) * D
    q = load_rows(Q + own, H * D, m0, TQ, BM, D, DP)
    do = load_rows(DO + own, H * D, m0, TQ, BM, D, DP)
    o = load_rows(O + own, H * D, m0, TQ, BM, D, DP)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + head + row, delta, mask=row < TQ)
    lse = tl.load(LSE + head + row, mask=row < TQ, other=float("inf"))
    dq = tl.zeros([BM, DP], tl.float32)
    for PHASE in tl.static_range(2):
        start, stop = key_range(block, TQ, TK, PHASE, BM, BN, CAUSAL)
        for n0 in range(start, stop, BN):
            n = n0 + tl.arange(0, BN)
            k = load_rows(K + walked, H_kv * D, n0, TK, BN, D, DP, PHASE == 1)
            v = load_rows(V + walked, H_kv * D, n0, TK, BN, D, DP, PHASE == 1)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(s * scale_log2 - lse[:, None])
            if PHASE == 1:
                p = tl.where(visible(row[:, None], n[None, :], TQ, TK, CAUSAL), p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(DQ + own, H * D, m0, TQ, dq * scale, D, DP)

@jit
def attention_dkv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, H, H_kv, TQ, TK, scale, scale_log2,
                         D: constexpr, DP: constexpr, BM: constexpr, BN: constexpr,
                         CAUSAL: constexpr):
    block, b, h_kv = whose_block(TK, H_kv, BN)  # the first keys have most queries
    n0, n = block * BN, block * BN + tl.arange(0, BN)
    own = (b * TK * H_kv + h_kv) * D
    k = load_rows(K + own, H_kv * D, n0, TK, BN, D, DP)
    v = load_rows(V + own, H_kv * D, n0, TK, BN, D, DP)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    # Phase 0: the diagonal. Phase 1: queries that see all our keys. Keys beyond TK need no mask:
    # they are rows that nobody stores. Queries beyond TQ load LSE = inf: their weights are 0.
    first, whole = 0, 0
    if CAUSAL:
        first = tl.maximum(n0 + TQ - TK, 0) // BM * BM
        whole = tl.minimum(tl.cdiv(tl.maximum(n0 + BN - 1 + TQ - TK, 0), BM) * BM, TQ)
    for h in range(h_kv * (H // H_kv), (h_kv + 1) * (H // H_kv)):  # the query heads of the group
        walked, head = (b * TQ * H + h) * D, (b * H + h) * TQ
        for PHASE in tl.static_range(2):
            for m0 in range(first if PHASE == 0 else whole, whole if PHASE == 0 else TQ, BM):
                row = m0 + tl.arange(0, BM)
                q = load_rows(Q + walked, H * D, m0, TQ, BM, D, DP)
                do = load_rows(DO + walked, H * D, m0, TQ, BM, D, DP)
                lse = tl.load(LSE + head + row, mask=row < TQ, other=float("inf"))
                delta = tl.load(DELTA + head + row, mask=row < TQ, other=0.0)
                # all tiles are transposed, (BN, BM): P^T and dS^T are left operands as they are
                st = tl.dot(k, tl.trans(q), input_precision="ieee")
                pt = tl.exp2(st * scale_log2 - lse[None, :])
                if PHASE == 0:
                    pt = tl.where(visible(row[None, :], n[:, None], TQ, TK, True), pt, 0.0)
                dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
                dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
                dst = pt * (dpt - delta[None, :])
                dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(DK + own, H_kv * D, n0, TK, dk * scale, D, DP)
    store_rows(DV + own, H_kv * D, n0, TK, dv, D, DP)

# (BM, BN, warps, stages) of the forward, dQ and dK/dV kernels, by padded head size: BM queries, BN
# keys. Constants, not autotune: no search at the first step, the same bits in every run. The shapes
# of Triton's fused-attention tutorial, cut until the compiler spills nothing and shared memory fits
# the smallest GPU that there is (99 KB on RTX 30 to 50). No GPU has measured them.
TILES = {64: ((128, 64, 4, 3), (128, 32, 8, 2), (32, 128, 8, 2)),
         128: ((128, 64, 8, 2), (128, 32, 8, 2), (16, 128, 8, 2))}

def attention_constants(q, causal, kernel):
    """The compile-time arguments of kernel 0, 1 or 2: forward, dQ, dK/dV."""
    D = q.shape[-1]
    DP = max(triton.next_power_of_2(D), 16)  # what tl.dot can multiply
    BM, BN, warps, stages = TILES[max(DP, 64)][kernel]
    return dict(D=D, DP=DP, BM=BM, BN=BN, CAUSAL=causal, num_warps=warps, num_stages=stages)

def sizes(q, k):
    """(H, H_kv, TQ, TK), as every kernel takes them."""
    return q.shape[2], k.shape[2], q.shape[1], k.shape[1]

def triton_forward(q, k, v, o, LSE, causal, scale):
    c = attention_constants(q, causal, 0)
    blocks = triton.cdiv(q.shape[1], c["BM"]) * q.shape[0] * q.shape[2]
    launch(attention_forward_kernel, (blocks,), q, k, v, o, LSE, *sizes(q, k), scale * LOG2E, **c)

def triton_backward(q, k, v, o, do, dq, dk, dv, LSE, delta, causal, scale):
    c, rest = attention_constants(q, causal, 1), (*sizes(q, k), scale, scale * LOG2E)
    blocks = triton.cdiv(q.shape[1], c["BM"]) * q.shape[0] * q.shape[2]
    launch(attention_dq_kernel, (blocks,), q, k, v, o, do, dq, LSE, delta, *rest, **c)
    c = attention_constants(q, causal, 2)
    blocks = triton.cdiv(k.shape[1], c["BN"]) * k.shape[0] * k.shape[2]
    launch(attention_dkv_kernel, (blocks,), q, k, v, do, dk, dv, LSE, delta, *rest, **c)

# --- Attention in CUDA C++, for Turing ------------------------------------------------------------

# The same algorithm one level lower: tiles of 64 x 64, a warp owns 16 rows. No headers: the
# compiler needs no include path. mma.sync multiplies fp16 fragments that lie spread over a warp.
# With g = lane / 4 and t = lane % 4, a lane holds of a 16 x 8 result the places (g, 2t), (g, 2t+1),
# (g+8, 2t), (g+8, 2t+1); of a 16 x 16 left operand the pairs that begin at (g, 2t), (g+8, 2t),
# (g, 2t+8), (g+8, 2t+8); of a 16 x 8 right operand rows 2t, 2t+1, 2t+8, 2t+9 of column g ("Matrix
# Fragments for mma.m16n8k16", docs.nvidia.com/cuda/parallel-thread-execution). So two results side
# by side are a left operand: S becomes P, and P the factor of V, without leaving its registers.
CUDA_SOURCE = r"""
typedef unsigned int u32; typedef unsigned short u16; typedef long long i64;  // u16: one fp16
struct alignas(16) Vec { u32 x, y, z, w; };  // 8 fp16, the widest load
#define D 64
#define TILE 64
#define LD (D + 8)               // padded rows in shared memory: 8 at once hit different banks
#define UNROLL _Pragma("unroll") // arrays live in registers only where every index is known
#define INF __int_as_float(0x7f800000)
#define INLINE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(128)

#ifndef EMULATE                  // five instructions; the tests put their own in place of them
INLINE u16 half_bits(float x) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
INLINE float to_float(u16 h) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h)); return x; }
INLINE float shuffle_xor(float x, int m) { return __shfl_xor_sync(0xffffffffu, x, m); }
INLINE void mma_16x8x8(float c[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}
INLINE void load_transposed(u32 &b0, u32 &b1, const u16 *row) {  // 8 x 8 twice; lane i has row i
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : "=r"(b0), "=r"(b1) : "r"((u32)__cvta_generic_to_shared(row)));
}
#endif

// C (16 x 8) += A (16 x 16) B (16 x 8), in two halves: Turing has no deeper instruction.
INLINE void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
    mma_16x8x8(c, a[0], a[1], b0);
    mma_16x8x8(c, a[2], a[3], b1);
}
INLINE u32 pack(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
INLINE float sum_of_four(float x) {  // lanes that share a row
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Softmax over rows of n, a warp per row. After five exchanges all lanes have the maximum, or sum.
struct Softmax { const u16 *X; u16 *Y; int rows, n; };
KERNEL softmax_rows(const Softmax A) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= A.rows) return;   // the whole warp leaves, so nobody waits for it
    const u16 *x = A.X + (i64)row * A.n;
    u16 *y = A.Y + (i64)row * A.n;
    float m = -INF, l = 0;
    for (int i = lane; i < A.n; i += 32) m = fmaxf(m, to_float(x[i]));
    for (int k = 16; k; k /= 2) m = fmaxf(m, shuffle_xor(m, k));
    for (int i = lane; i < A.n; i += 32) l += expf(to_float(x[i]) - m);
    for (int k = 16; k; k /= 2) l += shuffle_xor(l, k);
    for (int i = lane; i < A.n; i += 32) y[i] = half_bits(expf(to_float(x[i]) - m) / l);
}

struct Attention {               // all lie as (B, T, H, D), LSE and DELTA as (B, H, TQ)
    const u16 *Q, *K, *V, *DO; u16 *O, *DQ, *DK, *DV; float *LSE, *DELTA;
    int H, H_kv, TQ, TK, causal; float scale, scale_log2;
};
struct Matrix { const u16 *base; i64 stride; int rows; };

// 64 rows from global to shared memory; rows beyond the end become 0.
INLINE void load_tile(u16 *tile, const Matrix x, int row0) {
    for (int i = threadIdx.x; i < TILE * (D / 8); i += 128) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        const u16 *from = x.base + (row0 + r) * x.stride + c;
        *(Vec *)(tile + r * LD + c) = row0 + r < x.rows ? *(const Vec *)from : Vec{};
    }
}
// This warp's 16 rows of a tile as left operands, which stay in registers for the whole kernel.
INLINE void load_left(u32 a[D / 16][4], const u16 *tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, col = lane % 4 * 2;
    UNROLL for (int k = 0; k < D / 16; k++) UNROLL for (int i = 0; i < 4; i++)
        a[k][i] = *(const u32 *)&tile[(row + i % 2 * 8) * LD + k * 16 + i / 2 * 8 + col];
}
// C (16 x 64) += A B^T for a tile B: its rows are columns of B^T, right operands as they lie.
INLINE void multiply_abt(float c[8][4], const u32 a[D / 16][4], const u16 *tile) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int k = 0; k < D / 16; k++) UNROLL for (int j = 0; j < 8; j++) {
        const u16 *b = &tile[(j * 8 + lane / 4) * LD + k * 16 + lane % 4 * 2];
        mma(c[j], a[k], *(const u32 *)b, *(const u32 *)(b + 8));
    }
}
// C (16 x D) += P B for a tile B; P (16 x 64) is a result in registers and is rounded to fp16.
INLINE void multiply_pb(float c[D / 8][4], const float p[8][4], const u16 *tile) {
    UNROLL for (int k = 0; k < 4; k++) {
        const float *x = p[2 * k], *y = p[2 * k + 1];
        const u32 a[4] = {pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3])};
        UNROLL for (int j = 0; j < D / 8; j++) {
            u32 b0, b1;
            load_transposed(b0, b1, &tile[(k * 16 + threadIdx.x % 16) * LD + j * 8]);
            mma(c[j], a, b0, b1);
        }
    }
}
// The lane's two rows of a result, times f[0] and f[1], as fp16.
INLINE void store_rows(u16 *base, i64 stride, int row0, int rows, const float c[D / 8][4],
                       float f0, float f1) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = row0 + threadIdx.x / 32 * 16 + lane / 4 + r * 8;
        const float f = r ? f1 : f0;
        u16 *to = base + row * stride + lane % 4 * 2;
        if (row < rows) UNROLL for (int j = 0; j < D / 8; j++)
            *(u32 *)(to + j * 8) = pack(c[j][2 * r] * f, c[j][2 * r + 1] * f);
    }
}

// One walk serves three kernels. A block owns 64 rows of two matrices, a warp 16 of them as left
// operands, and walks over tiles of two others. With S = own1 walked1^T and dP = own2 walked2^T:
//     forward   own Q        walked K, V     O = sum of P V, by the online softmax
//     dQ        own Q, dO    walked K, V     dQ = sum of dS K; leaves delta = rowsum(O * dO)
//     dK, dV    own K, V     walked Q, dO    dK = sum of dS Q, dV = sum of P dO, over the group's
//               query heads. Keys down, queries across: P^T and dS^T are left operands as they are
// Grid (ceil(owned rows / 64), B * heads).
template <bool BACKWARD, bool KEYS> INLINE void walk(const Attention &A) {  // KEYS: we own keys
    __shared__ __align__(16) u16 walked1[TILE * LD], walked2[TILE * LD];
    __shared__ float sLSE[TILE], sdelta[TILE];
    const int lane = threadIdx.x % 32, g = threadIdx.x / 32 * 16 + lane / 4, t = lane % 4;
    const int heads = KEYS ? A.H_kv : A.H, T = KEYS ? A.TK : A.TQ, offset = A.TK - A.TQ;
    const int group = A.H / A.H_kv, b = blockIdx.y / heads;
    const int h0 = blockIdx.y % heads * (KEYS ? group : 1), h_kv = h0 / group;
    const int row0 = (KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * TILE;  // most work first
    const i64 ours = ((i64)b * T * heads + blockIdx.y % heads) * D, stride = (i64)heads * D;
    const i64 query0 = ((i64)b * A.TQ * A.H + h0) * D;
    const i64 key0 = ((i64)b * A.TK * A.H_kv + h_kv) * D, key_stride = (i64)A.H_kv * D;
    const Matrix K = {A.K + key0, key_stride, A.TK}, V = {A.V + key0, key_stride, A.TK};
    Matrix Q = {A.Q + query0, (i64)A.H * D, A.TQ}, DO = {A.DO + query0, (i64)A.H * D, A.TQ};
    float acc1[D / 8][4] = {}, acc2[D / 8][4] = {}, m[2] = {-INF, -INF}, l[2] = {0, 0};
    float delta[2], LSE[2];
    u32 own1[D / 16][4], own2[D / 16][4];
    load_tile(walked1, KEYS ? K : Q, row0);  // what we own passes through these tiles, once
    if (BACKWARD) load_tile(walked2, KEYS ? V : DO, row0);
    __syncthreads();
    load_left(own1, walked1);
    if (BACKWARD) load_left(own2, walked2);
    if (BACKWARD && !KEYS) {
        __syncthreads();
        load_tile(walked1, Matrix{A.O + ours, stride, T}, row0);
        __syncthreads();
        UNROLL for (int r = 0; r < 2; r++) {
            const int row = row0 + g + r * 8;
            const i64 place = (i64)blockIdx.y * T + row;
            float sum = 0;
            for (int i = (g + r * 8) * LD + t, n = 0; n < D; i += 4, n += 4)
                sum += to_float(walked1[i]) * to_float(walked2[i]);
            delta[r] = sum_of_four(sum);
            LSE[r] = row < T ? A.LSE[place] : INF;
            if (t == 0 && row < T) A.DELTA[place] = delta[r];
        }
    }
    const int first = KEYS && A.causal ? max(0, row0 - offset) / TILE * TILE : 0;
    const int stop = KEYS ? A.TQ : A.causal ? min(A.TK, row0 + TILE + offset) : A.TK;
    for (int h = h0; h < h0 + (KEYS ? group : 1); h++, Q.base += D, DO.base += D)
    for (int n0 = first; n0 < stop; n0 += TILE) {
        __syncthreads();         // nobody still reads what we are about to overwrite
        load_tile(walked1, KEYS ? Q : K, n0);
        load_tile(walked2, KEYS ? DO : V, n0);
        if (KEYS) for (int i = threadIdx.x; i < TILE; i += 128) {
            const i64 place = (i64)(b * A.H + h) * A.TQ + n0 + i;
            sLSE[i] = n0 + i < A.TQ ? A.LSE[place] : INF;  // beyond the end: weights 2^-inf = 0
            sdelta[i] = n0 + i < A.TQ ? A.DELTA[place] : 0;
        }
        __syncthreads();         // the tiles are complete
        float p[8][4] = {}, ds[8][4] = {};
        multiply_abt(p, own1, walked1);
        if (BACKWARD) multiply_abt(ds, own2, walked2);
        UNROLL for (int r = 0; r < 2; r++) {  // row g, then row g + 8
            float m_new = m[r], sum = 0;
            UNROLL for (int j = 0; j < 8; j++) UNROLL for (int e = 2 * r; e < 2 * r + 2; e++) {
                const int i = j * 8 + 2 * t + e % 2, row = row0 + g + r * 8, col = n0 + i;
                const int query = KEYS ? col : row, key = KEYS ? row : col;
                const bool hidden = key >= A.TK || (A.causal && key > query + offset);
                p[j][e] = hidden ? -INF : p[j][e] * A.scale_log2;
                m_new = fmaxf(m_new, p[j][e]);
                if (BACKWARD) p[j][e] = exp2f(p[j][e] - (KEYS ? sLSE[i] : LSE[r]));
                if (BACKWARD) ds[j][e] = p[j][e] * (ds[j][e] - (KEYS ? sdelta[i] : delta[r]));
            }
            if (BACKWARD) continue;
            m_new = fmaxf(m_new, shuffle_xor(m_new, 1));  // four lanes share a row
            m_new = fmaxf(m_new, shuffle_xor(m_new, 2));
            const float m_safe = m_new == -INF ? 0.f : m_new, alpha = exp2f(m[r] - m_safe);
            UNROLL for (int j = 0; j < 8; j++) UNROLL for (int e = 2 * r; e < 2 * r + 2; e++) {
                sum += p[j][e] = exp2f(p[j][e] - m_safe);
                acc2[j][e] *= alpha;  // as wide as p: D = TILE
            }
            l[r] = l[r] * alpha + sum;
            m[r] = m_new;
        }
        if (KEYS || !BACKWARD) multiply_pb(acc2, p, walked2);
        if (BACKWARD) multiply_pb(acc1, ds, walked1);
    }
    if (BACKWARD) store_rows((KEYS ? A.DK : A.DQ) + ours, stride, row0, T, acc1, A.scale, A.scale);
    if (KEYS) store_rows(A.DV + ours, stride, row0, T, acc2, 1, 1);
    if (BACKWARD) return;
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = row0 + g + r * 8;
        l[r] = sum_of_four(l[r]);
        const float lse = l[r] > 0 ? m[r] + log2f(l[r]) : INF;
        if (t == 0 && row < T) A.LSE[(i64)blockIdx.y * T + row] = lse;
        l[r] = l[r] > 0 ? 1 / l[r] : 0;
    }
    store_rows(A.O + ours, stride, row0, T, acc2, l[0], l[1]);
}
KERNEL attention_forward(const Attention A) { walk<false, false>(A); }
KERNEL attention_dq(const Attention A) { walk<true, false>(A); }
KERNEL attention_dkv(const Attention A) { walk<true, true>(A); }
"""

def checked(result):
    """cuda.bindings returns (error, value)."""
    if int(result[0]):
        raise RuntimeError(f"CUDA C++ kernels: {result[0]!r}")
    return result[1] if len(result) > 1 else None

def cuda_image(arch):
    """Machine code for an arch like sm_75, which NVRTC makes in about a second."""
    from cuda.bindings import nvrtc
    options = [f"--gpu-architecture={arch}".encode(), b"-std=c++17", b"--use_fast_math"]
    program = checked(nvrtc.nvrtcCreateProgram(CUDA_SOURCE.encode(), b"kernels.cu", 0, [], []))
    failed, = nvrtc.nvrtcCompileProgram(program, len(options), options)
    name = "ProgramLog" if int(failed) else "CUBIN"
    image = b" " * checked(getattr(nvrtc, f"nvrtcGet{name}Size")(program))
    checked(getattr(nvrtc, f"nvrtcGet{name}")(program, image))
    if int(failed):
        raise RuntimeError("CUDA C++ kernels do not compile:\n" + image.decode())
    return image

@functools.lru_cache(None)
def cuda_function(name, device_index, arch):
    from cuda.bindings import driver
    module = checked(driver.cuModuleLoadData(cuda_image(arch)))
    return checked(driver.cuModuleGetFunction(module, name.encode()))

def launch_cuda(name, grid, x, layout, *values):
    """Launch a kernel of CUDA_SOURCE in blocks of 128 threads, on x's device and torch's stream.
    Its one argument is a C struct of these values: P a pointer, i an int, f a float."""
    from cuda.bindings import driver
    calls[name] += 1
    argument = ctypes.create_string_buffer(struct.pack(layout + "0P", *values))  # 0P pads, as C
    place = ctypes.c_void_p(ctypes.addressof(argument))
    with torch.cuda.device(x.device):
        # a fresh thread, such as autograd's, has no context until something makes torch's current
        if not int(checked(driver.cuCtxGetCurrent())):
            context = checked(driver.cuDevicePrimaryCtxRetain(x.device.index))
            checked(driver.cuCtxSetCurrent(context))
        major, minor = torch.cuda.get_device_capability(x.device)
        function = cuda_function(name, x.device.index, f"sm_{major}{minor}")
        stream = torch.cuda.current_stream().cuda_stream
        checked(driver.cuLaunchKernel(function, *grid, 1, 128, 1, 1, 0, stream,
                                      ctypes.addressof(place), 0))

def launch_cuda_attention(name, heads, T, causal, scale, q, k, v, *others):
    """The struct Attention, field by field; `others` are do, o, dq, dk, dv, LSE and delta."""
    pointers = (0 if x is None else x.data_ptr() for x in (q, k, v, *others))
    launch_cuda(name, (-(-T // 64), q.shape[0] * heads), q, "10P5i2f", *pointers, *sizes(q, k),
                causal, scale, scale * LOG2E)

def cuda_forward(q, k, v, o, LSE, causal, scale):
    launch_cuda_attention("attention_forward", q.shape[2], q.shape[1], causal, scale, q, k, v,
                          None, o, None, None, None, LSE, None)

def cuda_backward(q, k, v, o, do, dq, dk, dv, LSE, delta, causal, scale):
    for name, own in (("attention_dq", q), ("attention_dkv", k)):
        launch_cuda_attention(name, own.shape[2], own.shape[1], causal, scale, q, k, v,
                              do, o, dq, dk, dv, LSE, delta)

# --- Attention as differentiable ops --------------------------------------------------------------

def rows(x):
    """x as the kernels read it: contiguous, and beginning at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x

@op
def attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float,
                      impl: str) -> tuple[Tensor, Tensor]:
    q, k, v = rows(q), rows(k), rows(v)
    o, LSE = fake_attention_forward(q, k, v, causal, scale, impl)
    (cuda_forward if impl == "cuda" else triton_forward)(q, k, v, o, LSE, causal, scale)
    return o, LSE

@attention_forward.register_fake
def fake_attention_forward(q, k, v, causal, scale, impl):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

@op
def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, LSE: Tensor,
                       causal: bool, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, o, do = rows(q), rows(k), rows(v), rows(o), rows(do)
    dq, dk, dv, delta = *map(torch.empty_like, (q, k, v)), torch.empty_like(LSE)
    backward = cuda_backward if impl == "cuda" else triton_backward
    backward(q, k, v, o, do, dq, dk, dv, LSE, delta, causal, scale)
    return dq, dk, dv

@attention_backward.register_fake
def fake_attention_backward(do, q, k, v, o, LSE, causal, scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

def save_attention(ctx, inputs, output):
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # else torch makes zeros for LSE's gradient each time

def grad_attention(ctx, do, dLSE):
    return *attention_backward(do, *ctx.saved_tensors, *ctx.settings), None, None, None

attention_forward.register_autograd(grad_attention, setup_context=save_attention)

def fused(q, k, v, causal, scale, impl):
    """One query alone reads the whole cache once, as it lies: torch's kernels do that well."""
    if q.shape[1] == 1:
        return attention_sdpa(q, k, v, causal, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_forward(q, k, v, causal, scale, impl)[0]

def attention_triton(q, k, v, causal=True, scale=None):
    """attention_reference by the Triton kernels; scale above 0."""
    return fused(q, k, v, causal, scale, "triton")

def attention_cuda(q, k, v, causal=True, scale=None):
    """attention_reference by the CUDA C++ kernels; scale above 0."""
    return fused(q, k, v, causal, scale, "cuda")

# --- Linear cross-entropy: the training loss ------------------------------------------------------

# loss = mean over the valid rows of logsumexp(z) - z[target], z = x W^T, for x (N, C), W (V, C),
# targets (N,). At V = 50,257 the logits z, their softmax and their gradient are each far larger
# than the activations of the model. Here they exist for one slice of rows at a time: while it is at
# hand, its gradient p - onehot(target) is made in its place and multiplied into dx and dW, so that
# the backward pass only scales those two. That scale holds 1 / valid rows too: p - onehot is of
# order one, which fp16 can hold; divided by 16,384 it would vanish before a loss scale saved it.
SLICE = 2 ** 24  # logits in a slice (64 MB in fp32). Fewer than this altogether: the plain formula

# One program a row. First pass: online softmax over the row. Second: the logits become their
# gradient. Rows begin at multiples of 16 bytes and are `stride` apart; only where the mask is a
# multiple of 8 elements too are loads 128 bits wide: what lies beyond n is masked by value.
@jit
def cross_entropy_kernel(Z, TARGETS, LOSS, stride, n, ignore_index, GRAD: constexpr,
                         BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    target = tl.load(TARGETS + row)
    valid = target != ignore_index
    i = tl.arange(0, BLOCK)
    m, l = -3e38, 0.0  # not -inf: a block of -inf would give NaN
    for start in range(0, stride, BLOCK):
        z = tl.load(Z + start + i, mask=start + i < stride, other=0.0).to(tl.float32)
        z = tl.where(start + i < n, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    logsumexp = m + tl.log(l)
    inside = valid & (target >= 0) & (target < n)  # any other target makes the loss NaN
    z_target = tl.load(Z + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(LOSS + row, tl.where(valid, logsumexp - z_target, 0.0))
    if GRAD:
        tl.debug_barrier()  # all have read z[target] before one overwrites it
        for start in range(0, stride, BLOCK):
            z = tl.load(Z + start + i, mask=start + i < stride, other=0.0).to(tl.float32)
            dz = tl.exp(z - logsumexp) - tl.where(start + i == target, 1.0, 0.0)
            dz = tl.where(valid & (start + i < n), dz, 0.0)
            tl.store(Z + start + i, dz, mask=start + i < stride)

def fused_rows(z, targets, ignore_index, grad):
    loss = torch.empty(len(z), dtype=torch.float32, device=z.device)
    block = min(4096, triton.next_power_of_2(z.shape[1]))
    launch(cross_entropy_kernel, (len(z),), z, targets, loss, z.stride(0), z.shape[1],
           ignore_index, GRAD=grad, BLOCK=block, num_warps=8)
    return loss, z

def plain_rows(z, targets, ignore_index, grad):
    valid, wide = targets != ignore_index, z.float() if z.dtype in HALF else z
    places, logsumexp = targets.where(valid, 0)[:, None], wide.logsumexp(1, keepdim=True)
    loss = (logsumexp - wide.gather(1, places))[:, 0].where(valid, 0.0)
    if grad:
        wide.sub_(logsumexp).exp_().scatter_add_(1, places, torch.full_like(logsumexp, -1.0))
        wide.mul_(valid[:, None])
    return loss, wide.to(z.dtype)

@functools.lru_cache(None)
def choose_rows(device, dtype):
    """The row kernel, if it runs here and is right; tried once. -> (losses, gradient of their sum)
    of logits z (n, V), whose memory is used up. Rows without a target give 0."""
    if cannot_run("triton", device, dtype):
        return plain_rows
    z = torch.randn(8, 1024, device=device).to(dtype)[:, :1001]
    targets = torch.tensor([0, 1000, -1, 3, 4, 5, 6, 7], device=device)
    try:
        wanted, got = (f(z.clone(memory_format=torch.preserve_format), targets, -1, True)
                       for f in (plain_rows, fused_rows))
        problem = max(map(relative_error, got, wanted))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a driver may refuse in any way
        problem = f"{error!r:.200}"
    if isinstance(problem, float) and problem < 0.02:
        return fused_rows
    warnings.warn(f"the loss's Triton kernel is not used on {device}: {problem}")
    return plain_rows

def add_product(dw, dz, x):
    """dw += dz^T x, in float32 without a temporary where torch can (2.8 and later, on CUDA)."""
    if dz.dtype == dw.dtype:
        return dw.addmm_(dz.T, x)
    try:
        torch.addmm(dw, dz.T, x, out_dtype=dw.dtype, out=dw)
    except (RuntimeError, TypeError):
        dw += dz.T @ x  # a 16-bit product, summed over the slices in float32

@op
def linear_cross_entropy_forward(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
        grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, number of valid targets, dx, dW); the gradients are those of the sum of losses, not
    yet of their mean. W is cast here, so that dW need not be rounded to x's precision."""
    loss, valid, dx, dw = fake_loss(x, weight, targets, ignore_index, grad)
    for tensor in (loss, valid, dw):
        tensor.zero_()
    weight, V, row_loss = weight.to(x.dtype), len(weight), choose_rows(x.device, x.dtype)
    # In more rows than 4,096 a 16-bit sum for dW might overflow. On MPS products into a view with
    # gaps between its rows have been wrong (github.com/pytorch/pytorch/issues/104832).
    count = min(4096, SLICE * (4 if x.is_cuda else 1) // V // 128 * 128)
    count = max(1, min(len(x), count or 128))
    logits = x.new_empty(count, V if x.device.type == "mps" else -(-V // 64) * 64)[:, :V]
    for start in range(0, len(x), count):
        part = slice(start, start + count)
        z = torch.mm(x[part], weight.T, out=logits[:len(x[part])])
        losses, dz = row_loss(z, targets[part].contiguous(), ignore_index, grad)
        loss += losses.sum()
        if grad:
            torch.mm(dz, weight, out=dx[part])
            add_product(dw, dz, x[part])
    valid += (targets != ignore_index).sum()
    return loss / valid, valid, dx, dw  # no valid target: 0 / 0, NaN like torch's

@linear_cross_entropy_forward.register_fake
def fake_loss(x, weight, targets, ignore_index, grad):
    wide = torch.promote_types(x.dtype, torch.float32)  # sums are made in fp32 (float64 in tests)
    dw = weight.new_empty(weight.shape if grad else 0, dtype=wide)
    return (x.new_empty((), dtype=wide), x.new_empty((), dtype=wide),
            x.new_empty(x.shape if grad else 0), dw)

def save_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype

def grad_loss(ctx, g, *rest):
    valid, dx, dw = ctx.saved_tensors
    return dx * (g / valid).to(dx.dtype), (dw * (g / valid)).to(ctx.dtype), None, None, None

linear_cross_entropy_forward.register_autograd(grad_loss, setup_context=save_loss)

def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean cross-entropy of the logits x W^T, in fp32: x (N, C), weight (V, C), targets (N,) int64
    -> scalar. The logits exist one slice at a time; without gradients none are made."""
    if len(x) * len(weight) <= SLICE:
        logits = F.linear(x, weight)
        logits = logits.float() if logits.dtype in HALF else logits
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return linear_cross_entropy_forward(x, weight, targets, ignore_index, grad)[0]

# --- Which attention: can it run, is it right, is it faster ---------------------------------------

def cannot_run(impl, device, dtype, D=0):
    """Why kernels of this kind (triton, cuda) cannot run here, or "". With a head size D: why their
    attention cannot. Cheap: nothing is compiled or launched."""
    interpreted = impl == "triton" and INTERPRET
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"the device is {device.type}"
    if impl == "triton" and triton is None:
        return "Triton is not installed"
    if impl == "triton" and dtype not in (*HALF, torch.float32) or D > 128:
        return f"the kernels are not written for {str(dtype)[6:]} and heads of {D}"
    if interpreted:
        return "bf16 products are wrong in Triton's interpreter" if dtype == HALF[1] else ""
    if not torch.version.cuda:
        return "nobody has tried these kernels on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if impl == "cuda":
        if capability < (7, 5) or dtype != torch.float16 or D not in (0, 64):
            return "the CUDA C++ kernels are for capability 7.5 and up, fp16 and heads of 64"
        find = importlib.util.find_spec
        found = find("cuda") and find("cuda.bindings")
        return "" if found else "the package cuda-bindings is not installed"
    if capability < ((8, 0) if D or dtype == torch.bfloat16 else (7, 5)):
        return "below capability 8.0 Triton emits no tensor-core instructions and no bf16"
    if D and dtype == torch.float32:
        return "fp32 does not use tensor cores"
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return "" if compiler and os.path.exists(header) else "Triton needs a C compiler and Python.h"

def relative_error(a, b):
    """|a - b| / |b| in float64, which MPS does not have; NaN counts as infinite."""
    a, b = a.cpu(), b.cpu()
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    return math.inf if error.isnan() else error.item()

def with_gradients(function, inputs):
    """The output, and the inputs' gradients for the first input as the gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.inference_mode(False), torch.enable_grad():
        o = function(*inputs)
        do = inputs[0].detach() if o.shape == inputs[0].shape else None
        return o, *torch.autograd.grad(o, inputs, do)

def error_beside(function, reference, device, dtype, heads=(4, 2), TQ=208, TK=208, D=64):
    """How far a function is from another, outputs and gradients. T = 208: a multiple of 16, as
    training has, and not of a tile."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (1, TQ, heads[0], D), (1, TK, heads[1], D), (1, TK, heads[1], D)
    inputs = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    results = (with_gradients(f, inputs) for f in (function, reference))
    return max(map(relative_error, *results))

def milliseconds(function, inputs):
    """Forward and back: the median of ten, after three to warm up."""
    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with_gradients(function, inputs)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times[3:])[5]

FUNCTIONS = {"triton": attention_triton, "cuda": attention_cuda, "sdpa": attention_sdpa,
             "plain": attention_reference}

def choose(device, dtype, shape, impl="auto"):
    """-> (function of q, k, v, why): the attention for q of shape (B, T, H, D) and H_kv key heads,
    `shape` = (B, T, H, H_kv, D). `impl`: auto, or one to be used; a forced one that cannot run here
    raises ValueError with the reason."""
    device, (B, T, H, H_kv, D) = torch.device(device), shape
    if impl not in ("auto", *FUNCTIONS):
        raise ValueError(f"choose one of auto, {', '.join(FUNCTIONS)}; not {impl!r}")
    if impl in ("sdpa", "plain"):
        return FUNCTIONS[impl], f"{impl} attention (as asked)"
    if impl == "auto" and device.type == "cpu":  # a rule: runs there repeat to the bit
        name = "plain" if T <= 256 else "sdpa"
        return FUNCTIONS[name], f"{name} attention (on a CPU, for a context of {T})"
    if impl == "auto" and device.type == "mps":
        return choose_on_mps(device, dtype, shape)
    turing = device.type == "cuda" and torch.cuda.get_device_capability(device) == (7, 5)
    name = impl if impl != "auto" else "cuda" if turing else "triton"
    reason = cannot_run(name, device, dtype, D) or is_wrong(name, device, dtype, D)
    if impl != "auto":
        if reason:
            raise ValueError(f"{name} attention cannot be used: {reason}")
        return FUNCTIONS[name], f"{name} attention (as asked)"
    if reason:
        return attention_sdpa, f"sdpa attention (not {name}: {reason})"
    heads = (H, H_kv, H_kv)
    inputs = [torch.randn(B, T, h, D, device=device).to(dtype) for h in heads]
    ours, theirs = (milliseconds(f, inputs) for f in (FUNCTIONS[name], attention_sdpa))
    winner = name if ours < theirs else "sdpa"
    return FUNCTIONS[winner], f"{winner} attention ({name} {ours:.2f} ms, sdpa {theirs:.2f} ms)"

def is_wrong(name, device, dtype, D):
    """What is wrong with an implementation, beside torch's, forward and backward, or "". Kernels
    have been known to compile and to return zeros (github.com/triton-lang/triton/issues/3478)."""
    try:
        error = error_beside(FUNCTIONS[name], attention_sdpa, device, dtype, D=D)
    except torch.OutOfMemoryError:
        return "there was not enough memory to try it"
    except Exception as error:  # a compiler or driver that does not suit this GPU or this torch
        return f"it fails, {error!r:.200}"
    return "" if error < 0.02 else f"it is {error:.1e} away from torch's"  # bf16 comes to 0.006

def choose_on_mps(device, dtype, shape):
    """torch's own has been wrong there for some key lengths (github.com/pytorch/pytorch/issues/
    169222 and 195910): it is compared with the formula, at this shape and for one query."""
    _, T, H, H_kv, D = shape
    worst = 0.0
    for TQ, TK in ((T, T), (1, 33)):
        worst = max(worst, error_beside(attention_sdpa, attention_reference, device, dtype,
                                        (H, H_kv), TQ, TK, D))
    if worst < 0.02:
        return attention_sdpa, "sdpa attention (on MPS, where it agrees with the formula)"
    return attention_reference, f"plain attention (sdpa is {worst:.1e} away from it on this MPS)"

# --- python kernels.py ----------------------------------------------------------------------------

def cases(device, dtype):
    """(name, implementation, function, formula, inputs): what can run here."""
    gpu = device.type == "cuda"
    B, T, H, D = (4, 4096, 16, 64) if gpu and not INTERPRET else (1, 208, 4, 64)
    qkv = [torch.randn(B, T, H, D, device=device).to(dtype) for _ in range(3)]
    for name in ("triton", "cuda", "sdpa"):
        if name == "sdpa" or not cannot_run(name, device, dtype, D):
            yield "attention", name, FUNCTIONS[name], attention_reference, qkv
    formula = functools.partial(torch.softmax, dim=-1)
    x = torch.randn(16384 if gpu else 300, 4096 if gpu else 1000, device=device).to(dtype)
    yield "softmax", "triton", softmax, formula, [x]
    N, C, V = (16384, 768, 50257) if gpu else (400, 64, 50257)
    targets = torch.randint(V, (N,), device=device)
    x, w = (torch.randn(n, C, device=device).to(dtype) / 4 for n in (N, V))

    def plain_loss(x, w):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.cross_entropy(F.linear(x, w).to(wide), targets)

    yield "loss", "sliced", lambda x, w: linear_cross_entropy(x, w, targets), plain_loss, [x, w]
    yield "loss", "plain", plain_loss, plain_loss, [x, w]

def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks the kernels on this machine, times them.")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    args, table = parser.parse_args(argv), []
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    print(f"{device}, {str(dtype)[6:]}, torch {torch.__version__}\n"
          f"{'':10} {'':7} {'error':>8} {'forward and backward, ms':>25}")
    for name, impl, function, formula, inputs in cases(device, dtype):
        few = [x[:1] for x in inputs] if name == "attention" else inputs
        row = {"name": name, "impl": impl, "device": str(device)}
        try:
            truth = with_gradients(formula, [x.double() for x in few])
            row["error"] = max(map(relative_error, with_gradients(function, few), truth))
            row["ms"] = milliseconds(function, inputs) if device.type == "cuda" else None
        except Exception as error:  # the others still have something to say
            row |= {"error": math.inf, "ms": None, "failed": f"{error!r:.200}"}
        row["ok"] = row["error"] < (1e-5 if dtype == torch.float32 else 3e-2)
        table.append(row)
        ms = "-" if row["ms"] is None else f"{row['ms']:.2f}"
        print(f"{name:10} {impl:7} {row['error']:8.1e} {ms:>25} {'' if row['ok'] else 'WRONG'}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
    return 0 if all(row["ok"] for row in table) else 1

if __name__ == "__main__":
    raise SystemExit(main())
