# SPDX-License-Identifier: MIT
"""Fused GPU kernels for gpt.py, which trains and samples without them too.

    softmax, softmax_cuda                     the gentlest kernels: one row, one program or warp
    attention_triton, attention_cuda          softmax(q k^T / sqrt(D)) v without a T x T matrix
    linear_cross_entropy(x, weight, targets)  the training loss without N x V logits
    choose(device, dtype, shape)              the attention that runs here, is right, is fastest
    python kernels.py [--json]                checks and times all of them on this machine

B batch, H query heads, H_kv key heads (H_kv divides H), TQ queries, TK keys, D head size, N rows,
C channels, V vocabulary. m, l and acc are the running maximum, sum and output of the papers: online
softmax (arxiv.org/abs/1805.02867), FlashAttention-2 (2307.08691). LSE is m + log2(l)."""
import ctypes, functools, json, struct, sys, warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    from triton import jit, language as tl
    from triton.language import constexpr
except ImportError:  # its kernels stay functions that nobody calls
    triton = constexpr = None
    jit = lambda function: function

GPT_KERNELS = 2  # tells this file from the Hugging Face package called kernels
HALF = torch.float16, torch.bfloat16

# --- Softmax, the gentlest kernel ----------------------------------------------------------------
# y_i = exp(x_i - max x) / sum_j exp(x_j - max x), for X and Y (N, n), a program a row. It reads and
# writes the matrix once, where five kernels each would: memory is slow, arithmetic nearly free.
@jit
def softmax_kernel(X, Y, n, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * n may pass 2^31
    i = tl.arange(0, BLOCK)              # a power of two; the mask cuts it to n
    x = tl.load(X + row * n + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))         # without the maximum, exp(89) is infinite
    tl.store(Y + row * n + i, e / tl.sum(e, 0), mask=i < n)

def launch(kernel, grid, *args, **constants):
    with torch.cuda.device_of(args[0]):  # which need not be the current device
        kernel[grid](*args, enable_fp_fusion=True, **constants)  # a * b + c in one instruction

def fused_softmax(x):
    x, n = x.contiguous(), x.shape[-1]
    y, block = torch.empty_like(x), triton.next_power_of_2(n)  # a row sits in one program
    warps = min(max(block // 512, 1), 16)
    launch(softmax_kernel, (x.numel() // n,), x, y, n, BLOCK=block, num_warps=warps)
    return y

def softmax(x):
    """Over the last dimension; by torch where the kernel, a row or a gradient does not fit."""
    fits = x.numel() and x.shape[-1] <= 16384 and not (x.requires_grad and torch.is_grad_enabled())
    return fused_softmax(x) if fits and row_kernels_work(x.device, x.dtype) else x.softmax(-1)

# --- Attention, the readable way, and torch's ----------------------------------------------------

def causal_mask(TQ, TK, device):
    """True where query i may see key j. Aligned bottom-right: the last query sees every key."""
    return torch.ones(TQ, TK, dtype=torch.bool, device=device).tril(TK - TQ)

def heads_first(q, k, v, groups):
    """(B, T, H, D) -> (B, H, T, D), and each head of k and v `groups` times."""
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

def attention_reference(q, k, v, causal=True, scale=None):
    """The formula that all below agree with: q (B, TQ, H, D), k and v (B, TK, H_kv, D) -> like q.
    scale None is 1 / sqrt(D). A query that sees no key gives 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = heads_first(q, k, v, q.shape[2] // k.shape[2])
    s = q @ k.mT * scale                                 # (B, H, TQ, TK)
    hidden = ~causal_mask(*s.shape[2:], s.device) & causal
    s = s.masked_fill(hidden, torch.finfo(s.dtype).min)  # a row of -inf would have no softmax
    return (s.softmax(-1).masked_fill(hidden, 0.0) @ v).transpose(1, 2)

def attention_sdpa(q, k, v, causal=True, scale=None):
    """The same by torch's own kernels. Outside the CPU few of them know groups."""
    TQ, TK, groups, cpu = q.shape[1], k.shape[1], q.shape[2] // k.shape[2], q.device.type == "cpu"
    mask = causal_mask(TQ, TK, q.device) if causal and 1 < TQ != TK else None
    q, k, v = heads_first(q, k, v, 1 if cpu else groups)
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and TQ == TK, scale=scale,
                                       enable_gqa=cpu and groups > 1)
    return o.transpose(1, 2)

# --- Attention in Triton -------------------------------------------------------------------------
# Where the rows of a tile lie. Only its origin is a 64-bit offset: that saves registers.
@jit
def tile(X, stride, start, ROWS: constexpr, D: constexpr):
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    return X + tl.cast(start, tl.int64) * stride + (i * stride + d)

# O = softmax(Q K^T * scale) V, and LSE (B, H, TQ) for the backward pass. A program owns BM queries
# of one head and walks over the keys, BN at a time. It keeps, per query, the maximum m so far, the
# sum l of 2^(s - m), and acc, the sum of 2^(s - m) v; a new maximum rescales both.
@jit
def attention_forward_kernel(Q, K, V, O, LSE, H, H_kv, TQ, TK, scale, D: constexpr,
                             BM: constexpr, BN: constexpr):
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the last queries see most: they start
    head = tl.program_id(1).to(tl.int64)  # 64 bits, and so is every offset made from it
    b, h = head // H, head % H
    own, walked = (b * TQ * H + h) * D, (b * TK * H_kv + h // (H // H_kv)) * D
    row, scale_log2 = m0 + tl.arange(0, BM), scale * 1.44269504  # e^x = 2^(x log2(e))
    ours = tl.arange(0, BM)[:, None] < TQ - m0  # row < TQ here would spill registers
    q = tl.load(tile(Q + own, H * D, m0, BM, D), mask=ours, other=0.0)
    m = tl.full([BM], -1e30, tl.float32)  # not -inf: with no key yet, -inf - -inf would be NaN
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n0 in range(0, tl.minimum(TK, m0 + BM + TK - TQ), BN):
        n = n0 + tl.arange(0, BN)
        inside = tl.arange(0, BN)[:, None] < TK - n0
        k = tl.load(tile(K + walked, H_kv * D, n0, BN, D), mask=inside, other=0.0)
        v = tl.load(tile(V + walked, H_kv * D, n0, BN, D), mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k))
        s = tl.where(n[None, :] <= row[:, None] + TK - TQ, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])  # a multiply-add and an exp2 each
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    # A query without keys gives 0, and LSE = inf makes its weights 0 in the backward pass.
    lse = tl.where(l > 0, m + tl.log2(l), float("inf"))
    tl.store(LSE + head * TQ + row, lse, mask=row < TQ)
    o = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(tile(O + own, H * D, m0, BM, D), o, mask=row[:, None] < TQ)

# With S = Q K^T * scale, P = softmax(S), O = P V, the gradient dO, and delta = rowsum(O * dO):
#     dV = P^T dO   dP = dO V^T   dS = P * (dP - delta)   dQ = scale * dS K   dK = scale * dS^T Q
# P is made again from Q, K and LSE. Two kernels, because dQ sums over keys, dK and dV over queries:
# each program owns what it writes, so the same input gives the same bits.
@jit
def attention_dq_kernel(Q, K, V, DO, DQ, LSE, DELTA, H, H_kv, TQ, TK, scale, D: constexpr,
                        BM: constexpr, BN: constexpr):
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    own, walked = (b * TQ * H + h) * D, (b * TK * H_kv + h // (H // H_kv)) * D
    row, scale_log2 = m0 + tl.arange(0, BM), scale * 1.44269504
    q = tl.load(tile(Q + own, H * D, m0, BM, D), mask=row[:, None] < TQ, other=0.0)
    do = tl.load(tile(DO + own, H * D, m0, BM, D), mask=row[:, None] < TQ, other=0.0)
    delta = tl.load(DELTA + head * TQ + row, mask=row < TQ, other=0.0)
    lse = tl.load(LSE + head * TQ + row, mask=row < TQ, other=float("inf"))
    dq = tl.zeros([BM, D], tl.float32)
    for n0 in range(0, tl.minimum(TK, m0 + BM + TK - TQ), BN):
        n = n0 + tl.arange(0, BN)
        k = tl.load(tile(K + walked, H_kv * D, n0, BN, D), mask=n[:, None] < TK, other=0.0)
        v = tl.load(tile(V + walked, H_kv * D, n0, BN, D), mask=n[:, None] < TK, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
        p = tl.where(n[None, :] <= row[:, None] + TK - TQ, p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(tile(DQ + own, H * D, m0, BM, D), dq * scale, mask=row[:, None] < TQ)

@jit
def attention_dkv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, H, H_kv, TQ, TK, scale, D: constexpr,
                         BM: constexpr, BN: constexpr):
    n0, head = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    b, h_kv = head // H_kv, head % H_kv
    own = (b * TK * H_kv + h_kv) * D
    n, scale_log2 = n0 + tl.arange(0, BN), scale * 1.44269504
    k = tl.load(tile(K + own, H_kv * D, n0, BN, D), mask=n[:, None] < TK, other=0.0)
    v = tl.load(tile(V + own, H_kv * D, n0, BN, D), mask=n[:, None] < TK, other=0.0)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    first = tl.maximum(n0 + TQ - TK, 0) // BM * BM  # the first queries to see our keys
    for h in range(h_kv * (H // H_kv), (h_kv + 1) * (H // H_kv)):  # the heads of the group
        walked, head = (b * TQ * H + h) * D, (b * H + h) * TQ
        for m0 in range(first, TQ, BM):
            row = m0 + tl.arange(0, BM)
            q = tl.load(tile(Q + walked, H * D, m0, BM, D), mask=row[:, None] < TQ, other=0.0)
            do = tl.load(tile(DO + walked, H * D, m0, BM, D), mask=row[:, None] < TQ, other=0.0)
            lse = tl.load(LSE + head + row, mask=row < TQ, other=float("inf"))  # beyond: weights 0
            delta = tl.load(DELTA + head + row, mask=row < TQ, other=0.0)
            # Tiles are transposed, (BN, BM): P^T and dS^T are left operands as they are.
            pt = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
            pt = tl.where(n[:, None] <= row[None, :] + TK - TQ, pt, 0.0)
            dv = tl.dot(pt.to(do.dtype), do, dv)
            dst = pt * (tl.dot(v, tl.trans(do)) - delta[None, :])
            dk = tl.dot(dst.to(q.dtype), q, dk)
    tl.store(tile(DK + own, H_kv * D, n0, BN, D), dk * scale, mask=n[:, None] < TK)
    tl.store(tile(DV + own, H_kv * D, n0, BN, D), dv, mask=n[:, None] < TK)

# (BM, BN, warps, stages) of forward, dQ, dK/dV by D, in the 99 KB of an RTX: the same bits each run
TILES = {64: ((128, 64, 4, 3), (128, 32, 8, 2), (32, 128, 8, 2)),
         128: ((128, 64, 8, 2), (128, 32, 8, 2), (16, 128, 8, 2))}

def launch_triton(which, tensors, scale):
    """Kernel 0, 1 or 2: forward, dQ, dK/dV. The first two tensors are q and k."""
    kernel = (attention_forward_kernel, attention_dq_kernel, attention_dkv_kernel)[which]
    (B, TQ, H, D), (_, TK, H_kv, _) = tensors[0].shape, tensors[1].shape
    BM, BN, warps, stages = TILES[max(D, 64)][which]
    grid = (triton.cdiv(TK, BN), B * H_kv) if which == 2 else (triton.cdiv(TQ, BM), B * H)
    launch(kernel, grid, *tensors, H, H_kv, TQ, TK, scale, D=D, BM=BM, BN=BN, num_warps=warps,
           num_stages=stages)

# --- Attention in CUDA C++, for Turing -----------------------------------------------------------
# The same one level lower, in tiles of 64 x 64, 16 rows a warp. mma.sync multiplies fragments
# spread over a warp (PTX manual, "Matrix Fragments"). Two of its results side by side lie as a left
# operand does: S becomes P, the factor of V, in its registers.
CUDA_SOURCE = r"""
typedef unsigned int u32; typedef unsigned short u16; typedef long long i64;  // u16: one fp16
typedef float Result[8][4];  // a warp's 16 x 64, of which this lane holds 32
typedef u32 Left[4][4];      // a warp's 16 x 64 as left operands
#define D 64                 // the size of a head, and the rows of a tile
#define LD (D + 8)           // padded rows in shared memory: 8 at once hit different banks
#define LANE (threadIdx.x % 32)
#define ROW (threadIdx.x / 32 * 16 + LANE / 4)
#define COL (LANE % 4 * 2)
#define INF __int_as_float(0x7f800000)
#define INLINE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(128)
#define FOR(i, n) _Pragma("unroll") for (int i = 0; i < n; i++)  // so arrays live in registers
#ifndef EMULATE  // the tests put their own in the place of these four
INLINE u16 half_bits(float x) { u16 h; asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(x)); return h; }
INLINE float shuffle_xor(float x, int m) { return __shfl_xor_sync(0xffffffffu, x, m); }
INLINE void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {  // C += A B; Turing's is 8 deep
    FOR(i, 2) asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(i ? b1 : b0));
}
INLINE void load_transposed(u32 &b0, u32 &b1, const u16 *row) {  // 8 x 8 twice; lane i has row i
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : "=r"(b0), "=r"(b1) : "r"((u32)__cvta_generic_to_shared(row)));
}
#endif

struct Arguments {
    const u16 *own1, *own2, *walked1, *walked2; u16 *out1, *out2; float *LSE, *DELTA;
    int H, rows, n; float scale;  // rows of each head of what is owned, and of what is walked
};
// Softmax of rows of n, a warp each. Five exchanges give all lanes the maximum, or the sum.
KERNEL softmax_rows(const Arguments A) {
    const i64 row = blockIdx.x * 4 + threadIdx.x / 32, start = row * A.n;
    if (row >= A.rows) return;  // the whole warp leaves, so nobody waits for it
    const float *x = A.LSE + start;
    float m = -INF, l = 0;
    for (int i = LANE; i < A.n; i += 32) m = fmaxf(m, x[i]);
    FOR(k, 5) m = fmaxf(m, shuffle_xor(m, 1 << k));
    for (int i = LANE; i < A.n; i += 32) l += expf(x[i] - m);
    FOR(k, 5) l += shuffle_xor(l, 1 << k);
    for (int i = LANE; i < A.n; i += 32) A.DELTA[start + i] = expf(x[i] - m) / l;
}

// C += A B^T for a tile B: its rows are columns of B^T, right operands as they lie.
INLINE void multiply_abt(Result c, const Left a, const u16 *tile) {
    FOR(k, 4) FOR(j, 8) {
        const u32 *b = (const u32 *)&tile[(j * 8 + LANE / 4) * LD + k * 16 + COL];
        mma(c[j], a[k], b[0], b[4]);
    }
}
INLINE u32 pack(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
// C += P B for a tile B; P is a result in registers, and is rounded to fp16.
INLINE void multiply_pb(Result c, const Result p, const u16 *tile) {
    FOR(k, 4) {
        const float *x = p[2 * k], *y = p[2 * k + 1];
        const u32 a[4] = {pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3])};
        FOR(j, 8) {
            u32 b0, b1;
            load_transposed(b0, b1, &tile[(k * 16 + threadIdx.x % 16) * LD + j * 8]);
            mma(c[j], a, b0, b1);
        }
    }
}

// One walk serves three kernels. A block owns 64 rows of two matrices, a warp 16 of them as left
// operands, and walks over tiles of two others. S = own1 walked1^T and dP = own2 walked2^T:
//     forward   own Q       walked K, V    out2: O = sum of P V, by the online softmax
//     dQ        own Q, dO   walked K, V    out1: dQ = sum of dS K
//     dK, dV    own K, V    walked Q, dO   out1: dK = sum of dS Q, out2: dV = sum of P dO
template <bool BACKWARD, bool KEYS> INLINE void walk(const Arguments &A) {  // KEYS: we own keys
    alignas(16) __shared__ u16 tile1[D * LD], tile2[D * LD];
    __shared__ float lse[D], delta[D];                      // of the queries at hand
    const int row0 = (KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * D;  // most work first
    const int TQ = KEYS ? A.n : A.rows, offset = (KEYS ? A.rows : A.n) - TQ;
    const i64 b = blockIdx.y / A.H, h = blockIdx.y % A.H, stride = A.H * D;
    const i64 own = (b * A.rows * A.H + h) * D, walked = (b * A.n * A.H + h) * D;
    float *LSE = A.LSE + (i64)blockIdx.y * TQ, *DELTA = A.DELTA + (i64)blockIdx.y * TQ;
    const float scale_log2 = A.scale * 1.44269504f;         // e^x = 2^(x log2(e))
    float m[2] = {-1e30f, -1e30f}, l[2] = {0, 0};           // not -inf: -inf - -inf would be NaN
    Result acc1 = {}, acc2 = {};
    Left left1, left2;
    auto load = [&](const u16 *x1, const u16 *x2, int first, int rows, bool queries) {
        const int i = threadIdx.x, query = first + i;
        __syncthreads();         // nobody still reads what we are about to overwrite
        for (int j = i; j < D * D / 8; j += 128) {          // rows beyond the end become 0
            const int r = j / (D / 8), c = j % (D / 8) * 8;
            const i64 place = (first + r) * stride + c;
            *(uint4 *)&tile1[r * LD + c] = first + r < rows ? *(const uint4 *)&x1[place] : uint4{};
            *(uint4 *)&tile2[r * LD + c] = first + r < rows ? *(const uint4 *)&x2[place] : uint4{};
        }
        if (BACKWARD && queries && i < D) {
            lse[i] = query < TQ ? LSE[query] : INF;         // 2^-inf = 0
            delta[i] = query < TQ ? DELTA[query] : 0;
        }
        __syncthreads();         // the tiles are complete
    };
    load(A.own1 + own, A.own2 + own, row0, A.rows, !KEYS);  // passes through, once
    FOR(k, 4) FOR(i, 4) {
        const int place = (ROW + i % 2 * 8) * LD + k * 16 + i / 2 * 8 + COL;
        left1[k][i] = *(const u32 *)&tile1[place];
        left2[k][i] = *(const u32 *)&tile2[place];
    }
    const int first = KEYS ? max(0, row0 - offset) / D * D : 0;
    const int stop = KEYS ? A.n : min(A.n, row0 + D + offset);
    for (int n0 = first; n0 < stop; n0 += D) {
        load(A.walked1 + walked, A.walked2 + walked, n0, A.n, KEYS);
        Result p = {}, ds = {};
        multiply_abt(p, left1, tile1);
        if (BACKWARD) multiply_abt(ds, left2, tile2);
        FOR(j, 8) FOR(e, 4) {
            const int row = ROW + e / 2 * 8, col = j * 8 + COL + e % 2, i = KEYS ? col : row;
            const int query = KEYS ? n0 + col : row0 + row, key = KEYS ? row0 + row : n0 + col;
            p[j][e] = key > query + offset ? -INF : p[j][e] * scale_log2;
            if (BACKWARD) p[j][e] = exp2f(p[j][e] - lse[i]);
            if (BACKWARD) ds[j][e] = p[j][e] * (ds[j][e] - delta[i]);
        }
        if (!BACKWARD) FOR(r, 2) {                          // our row, then the one 8 below
            float m_new = m[r];
            FOR(j, 8) m_new = fmaxf(m_new, fmaxf(p[j][2 * r], p[j][2 * r + 1]));
            m_new = fmaxf(m_new, shuffle_xor(m_new, 1));    // four lanes share a row
            m_new = fmaxf(m_new, shuffle_xor(m_new, 2));
            const float alpha = exp2f(m[r] - m_new);
            l[r] *= alpha;
            m[r] = m_new;
            FOR(j, 8) for (int e = 2 * r; e < 2 * r + 2; e++) {
                l[r] += p[j][e] = exp2f(p[j][e] - m_new);
                acc2[j][e] *= alpha;
            }
        }
        if (KEYS || !BACKWARD) multiply_pb(acc2, p, tile2);
        if (BACKWARD) multiply_pb(acc1, ds, tile1);
    }
    FOR(r, 2) {
        const int row = row0 + ROW + r * 8;
        l[r] += shuffle_xor(l[r], 1);
        l[r] += shuffle_xor(l[r], 2);
        if (!BACKWARD && COL == 0 && row < TQ) LSE[row] = l[r] > 0 ? m[r] + log2f(l[r]) : INF;
        const float factor = BACKWARD ? 1 : l[r] > 0 ? 1 / l[r] : 0;
        if (row < A.rows) FOR(j, 8) {
            const i64 place = own + row * stride + j * 8 + COL;
            const float *x = &acc1[j][2 * r], *y = &acc2[j][2 * r];
            if (BACKWARD) *(u32 *)(A.out1 + place) = pack(x[0] * A.scale, x[1] * A.scale);
            if (KEYS || !BACKWARD) *(u32 *)(A.out2 + place) = pack(y[0] * factor, y[1] * factor);
        }
    }
}
KERNEL attention_forward(const Arguments A) { walk<false, false>(A); }
KERNEL attention_dq(const Arguments A) { walk<true, false>(A); }
KERNEL attention_dkv(const Arguments A) { walk<true, true>(A); }
"""

def call(function, *args):
    error, *value = function(*args)  # as all of cuda.bindings
    if int(error):
        raise RuntimeError(f"{function.__name__}: {error!r}")
    return value[0] if value else None

@functools.lru_cache(None)
def cuda_image(arch):
    """Machine code for an arch like sm_75, which NVRTC makes in seconds: once for all kernels."""
    from cuda.bindings import nvrtc
    program = call(nvrtc.nvrtcCreateProgram, CUDA_SOURCE.encode(), b"kernels.cu", 0, [], [])
    call(nvrtc.nvrtcCompileProgram, program, 2, [f"-arch={arch}".encode(), b"-use_fast_math"])
    image = b" " * call(nvrtc.nvrtcGetCUBINSize, program)
    call(nvrtc.nvrtcGetCUBIN, program, image)
    return image

@functools.lru_cache(None)
def cuda_function(name, device):
    from cuda.bindings import driver
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    module = call(driver.cuModuleLoadData, cuda_image(arch))
    return call(driver.cuModuleGetFunction, module, name.encode())

def launch_cuda(name, grid, tensors, *numbers):
    """Tensors and numbers as in the struct Arguments; a block has 128 threads."""
    from cuda.bindings import driver
    pointers = [x.data_ptr() for x in tensors]
    argument = ctypes.create_string_buffer(struct.pack("8P3if", *pointers, *numbers))
    place = ctypes.c_void_p(ctypes.addressof(argument))
    with torch.cuda.device_of(tensors[0]):
        function = cuda_function(name, tensors[0].device)
        stream = torch.cuda.current_stream().cuda_stream
        call(driver.cuLaunchKernel, function, *grid, 1, 128, 1, 1, 0, stream,
             ctypes.addressof(place), 0)

def launch_walk(name, tensors, scale):
    (B, rows, H, _), n = tensors[0].shape, tensors[2].shape[1]  # a block owns 64 rows of a head
    launch_cuda(name, (-(-rows // 64), B * H), tensors, H, rows, n, scale)

def softmax_cuda(x):
    """softmax in CUDA C++, for fp32, forward alone."""
    x, n = x.float().contiguous(), x.shape[-1]
    y, rows = torch.empty_like(x), x.numel() // n
    launch_cuda("softmax_rows", (-(-rows // 4), 1), (x, x, x, x, x, x, x, y), 1, rows, n, 1.0)
    return y

# --- Attention as differentiable ops -------------------------------------------------------------

def as_rows(*tensors):
    """As the kernels read them: contiguous, and from multiples of 16 bytes."""
    return [x.clone() if x.data_ptr() % 16 else x for x in (x.contiguous() for x in tensors)]

@torch.library.custom_op("gpt_kernels::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float,
                      impl: str) -> tuple[Tensor, Tensor]:
    q, k, v = as_rows(q, k, v)
    o, LSE = fake_attention(q)
    if impl == "triton":
        launch_triton(0, (q, k, v, o, LSE), scale)
    else:
        launch_walk("attention_forward", (q, q, k, v, o, o, LSE, LSE), scale)
    return o, LSE

@attention_forward.register_fake
def fake_attention(q, *rest):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

@torch.library.custom_op("gpt_kernels::attention_backward", mutates_args=())
def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, LSE: Tensor,
                       scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, o, do = as_rows(q, k, v, o, do)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # torch's sum also gives autograd's thread the context that a launch of our own needs.
    delta = (o * do).sum(-1, dtype=torch.float32).transpose(1, 2).contiguous()
    if impl == "triton":
        launch_triton(1, (q, k, v, do, dq, LSE, delta), scale)
        launch_triton(2, (q, k, v, do, dk, dv, LSE, delta), scale)
    else:
        launch_walk("attention_dq", (q, do, k, v, dq, dq, LSE, delta), scale)
        launch_walk("attention_dkv", (k, v, q, do, dk, dv, LSE, delta), scale)
    return dq, dk, dv
attention_backward.register_fake(lambda do, *rest: tuple(x.new_empty(x.shape) for x in rest[:3]))

def save_attention(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)

def grad_attention(ctx, do, _):
    return *attention_backward(do, *ctx.saved_tensors, *ctx.options), None, None
attention_forward.register_autograd(grad_attention, setup_context=save_attention)

def fused_attention(q, k, v, causal=True, scale=None, *, impl):
    """By the kernels of `impl`; by torch's for one query, no mask or a scale not above 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] == 1 or not causal or scale <= 0:
        return attention_sdpa(q, k, v, causal, scale)
    if k.shape != v.shape or q.shape[::3] != k.shape[::3] or not q.dtype == k.dtype == v.dtype:
        raise ValueError("q, k and v do not fit together")
    if impl == "cuda" and q.shape[2] > k.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    return attention_forward(q, k, v, scale, impl)[0]

attention_triton = functools.partial(fused_attention, impl="triton")
attention_cuda = functools.partial(fused_attention, impl="cuda")

# --- Linear cross-entropy, the training loss -----------------------------------------------------
# Of the logits z = x W^T one slice of rows exists at a time. Its gradient p - onehot takes their
# place and is multiplied into dx and dW, which the backward pass scales: fp16 would lose p / N.
SLICE = 2 ** 24  # logits in a slice (64 MB in fp32). Fewer than this altogether: the plain formula

# One program a row: the online softmax, then the logits become their gradient. Rows are `stride`
# apart, a multiple of 128 bytes, and loads run to there, for only so are they 128 bits wide.
@jit
def cross_entropy_kernel(Z, TARGETS, LOSS, stride, n, ignored, GRAD: constexpr, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    Z, target = Z + row * stride, tl.load(TARGETS + row)
    valid, m, l = target != ignored, -1e30, 0.0
    for start in range(0, stride, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(Z + i, mask=i < stride, other=0.0).to(tl.float32)
        z = tl.where(i < n, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    logsumexp = m + tl.log(l)
    known = valid & (target >= 0) & (target < n)  # any other target makes the loss NaN
    z_target = tl.load(Z + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(LOSS + row, tl.where(valid, logsumexp - z_target, 0.0))
    if GRAD:
        tl.debug_barrier()  # all have read z[target] before one overwrites it
        for start in range(0, stride, BLOCK):
            i = start + tl.arange(0, BLOCK)
            z = tl.load(Z + i, mask=i < stride, other=0.0).to(tl.float32)
            dz = tl.exp(z - logsumexp) - tl.where(i == target, 1.0, 0.0)
            tl.store(Z + i, tl.where(valid & (i < n), dz, 0.0), mask=i < stride)

def fused_rows(z, targets, ignore_index, grad):
    """-> the loss of each row of logits z (n, V), 0 without a target; z becomes its gradient."""
    loss = z.new_empty(len(z), dtype=torch.float32)
    launch(cross_entropy_kernel, (len(z),), z, targets, loss, z.stride(0), z.shape[1], ignore_index,
           GRAD=grad, BLOCK=min(4096, triton.next_power_of_2(z.shape[1])), num_warps=8)
    return loss

def plain_rows(z, targets, ignore_index, grad):
    valid, wide = targets != ignore_index, z.float() if z.dtype in HALF else z
    place, logsumexp = targets.where(valid, 0)[:, None], wide.logsumexp(1, keepdim=True)
    loss = (logsumexp - wide.gather(1, place))[:, 0].where(valid, 0.0)
    if grad:
        wide.sub_(logsumexp).exp_().scatter_add_(1, place, torch.full_like(logsumexp, -1.0))
        z.copy_(wide.mul_(valid[:, None]))
    return loss

@torch.library.custom_op("gpt_kernels::summed_loss", mutates_args=())
def summed_loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
                grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum of losses, dx, dW). W is cast here, so that dW is never rounded to 16 bits."""
    loss, dx, dw = (t.zero_() for t in fake_loss(x, weight, targets, ignore_index, grad))
    weight, V, N = weight.to(x.dtype), len(weight), len(x)
    rows = fused_rows if row_kernels_work(x.device, x.dtype) else plain_rows
    mixed = {"out_dtype": dw.dtype} if dw.dtype != x.dtype else {}
    # More rows than 4,096 might overflow a 16-bit dW. MPS errs in gaps (pytorch issue 104832), and
    # oneDNN on AMX reads them, times zero (oneDNN issue 5717): so no NaN may stand there.
    size = min(4096, max(128, SLICE * (4 if x.is_cuda else 1) // V // 128 * 128), N)
    logits = x.new_zeros(size, V if x.device.type == "mps" else -(-V // 64) * 64)[:, :V]
    for start in range(0, N, size):
        part = slice(start, start + size)
        z = torch.mm(x[part], weight.T, out=logits[:len(x[part])])
        loss += rows(z, targets[part].contiguous(), ignore_index, grad).sum()
        if grad:
            torch.mm(z, weight, out=dx[part])
            try:  # dW += z^T x in fp32 without a temporary: torch 2.10 on CUDA, or fp32 alone
                torch.addmm(dw, z.T, x[part], **mixed, out=dw)
            except (RuntimeError, TypeError, NotImplementedError):  # it leaves dW as it was
                dw += z.T @ x[part]
    return loss, dx, dw

@summed_loss.register_fake
def fake_loss(x, weight, targets, ignore_index, grad):
    wide = torch.promote_types(x.dtype, torch.float32)  # sums are made in fp32 (float64 in tests)
    dw = weight.new_empty(weight.shape if grad else 0, dtype=wide)
    return x.new_empty((), dtype=wide), x.new_empty(x.shape if grad else 0), dw

def save_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the gradients of dx and dW
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype

def grad_loss(ctx, g, *rest):
    dx, dw = ctx.saved_tensors
    return (dx.to(g.dtype) * g).to(dx.dtype), (dw * g).to(ctx.dtype), None, None, None
summed_loss.register_autograd(grad_loss, setup_context=save_loss)

def plain_loss(x, weight, targets, ignore_index=-1):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.cross_entropy(F.linear(x, weight).to(wide), targets, ignore_index=ignore_index)

def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean cross-entropy of the logits x W^T, in fp32: x (N, C), weight (V, C), targets (N,) int64
    -> scalar. The logits exist one slice at a time; without gradients none are made."""
    if len(x) * len(weight) <= SLICE:
        return plain_loss(x, weight, targets, ignore_index)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, _, _ = summed_loss(x, weight, targets, ignore_index, grad)
    return loss / (targets != ignore_index).sum()  # no valid target: 0 / 0, NaN like torch's

# --- Which kernels: can they run, are they right, are they faster --------------------------------

def cannot_run(impl, device, dtype, D=0, heads=1):
    """Why kernels cannot run here, or "" (D 0: those of rows). What a driver lacks, a try shows."""
    if impl == "triton" and triton is None:
        return "Triton is not installed"
    if device.type != "cuda" or not torch.version.cuda:
        return f"it is made for NVIDIA's GPUs, the device is {device.type}"
    needs, least = "fp16 or bf16, heads of 16, 32, 64 or 128", (8, 0)  # Triton's tensor cores, bf16
    fits = dtype in HALF and D in (16, 32, 64, 128)
    if impl == "cuda":
        needs, least, fits = "fp16, heads of 64", (7, 5), dtype == torch.float16 and D == 64
    elif not D:
        least, fits = (8, 0) if dtype == torch.bfloat16 else (7, 5), dtype in (*HALF, torch.float32)
    able = torch.cuda.get_device_capability(device) >= least
    return "" if able and fits and heads < 2 ** 16 else f"it needs {needs}, capability {least}"

def worst_error(ours, truth):
    """The largest |a - b| / |b|; where b is 0, beside the first of them, the output."""
    ours, truth = ([x.detach().cpu().double() for x in tensors] for tensors in (ours, truth))
    errors = [(a - b).norm() / max(b.norm(), truth[0].norm()) for a, b in zip(ours, truth)]
    return torch.stack(errors).max().item()

def what_is_wrong(run, reference):
    """How run() differs from reference(), or "". Kernels have been known to give zeros."""
    try:
        error = worst_error(run(), reference())
    except torch.cuda.OutOfMemoryError:  # says nothing about a kernel, and is not remembered
        raise
    except Exception as error:  # a compiler or driver that does not suit this GPU or this torch
        return f"it fails, {error!r:.200}"
    return "" if error < 0.02 else f"it is {error:.1e} away"  # bf16 comes to 0.006

@functools.lru_cache(None)
def row_kernels_work(device, dtype):
    """Whether softmax and the loss can use Triton here: tried once, on eight rows."""
    if cannot_run("triton", device, dtype):
        return False
    def run(softmax, rows):
        x = torch.arange(8192, device=device).sin().to(dtype).view(8, 1024)
        y, z = softmax(x), x[:, :1001]
        return y, rows(z, torch.arange(8, device=device), 0, True), z
    problem = what_is_wrong(lambda: run(fused_softmax, fused_rows),
                            lambda: run(torch.nn.Softmax(-1), plain_rows))
    if problem:
        warnings.warn(f"softmax and the loss use torch on {device}, not Triton: {problem}")
    return not problem

def with_gradients(function, inputs):
    """The output, and the gradients for the first input as the output's."""
    o = function(*inputs)
    do = inputs[0].detach() if o.shape == inputs[0].shape else None
    return o, *(torch.autograd.grad(o, inputs, do) if o.requires_grad else ())

def trials(names, device, dtype, B, TQ, TK, H, H_kv, D):
    """A call for each of these attentions, forward and backward, on the same inputs."""
    shapes = (B, TQ, H, D), (B, TK, H_kv, D), (B, TK, H_kv, D)
    inputs = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
    return [functools.partial(with_gradients, ATTENTION[name], inputs) for name in names]

def milliseconds(run):  # the mean of ten, after two to warm up; torch waits for the GPU
    from torch.utils.benchmark import Timer
    threads = torch.get_num_threads()
    return 1e3 * Timer("run()", globals={"run": run}, num_threads=threads).timeit(10).mean

ATTENTION = dict(triton=attention_triton, cuda=attention_cuda, sdpa=attention_sdpa,
                 plain=attention_reference)

@torch.inference_mode(False)
@torch.enable_grad()
def choose(device, dtype, shape, impl="auto"):
    """-> (function of q, k, v, why): the attention for `shape` = (B, T, H, H_kv, D). A forced
    `impl` (triton, cuda, sdpa, plain) that cannot run here raises ValueError with the reason."""
    device, (B, T, H, H_kv, D), auto = torch.device(device), shape, impl == "auto"
    if auto and device.type == "cpu":  # a rule, for runs there repeat to the bit
        impl = "plain" if T <= 256 else "sdpa"
    if impl in ("plain", "sdpa"):
        return ATTENTION[impl], f"{impl} attention"
    name, other, cases = impl, "sdpa", [(1, 208, 208, 4, 2, D)]  # 208 = 13 * 16: no tile divides it
    if auto and device.type == "mps":  # where torch's own has been wrong for some lengths
        name, other = "sdpa", "plain"  # (github.com/pytorch/pytorch/issues/169222, 195910)
        cases = [(B, T, T, H, H_kv, D), (B, 1, 33, H, H_kv, D)]
    elif auto:
        name = "triton" if torch.cuda.get_device_capability(device) >= (8, 0) else "cuda"
    why = "tried, and right"
    try:
        problem = "" if name == "sdpa" else cannot_run(name, device, dtype, D, B * H)
        for case in cases:
            problem = problem or what_is_wrong(*trials((name, other), device, dtype, *case))
        if auto and device.type == "cuda" and not problem:
            calls = trials((name, other), device, dtype, B, T, T, H, H_kv, D)
            ours, torchs = [milliseconds(call) for call in calls]
            why = f"forward and backward: {name} {ours:.2f} ms, {other} {torchs:.2f} ms"
            name = name if ours < torchs else other
    except torch.cuda.OutOfMemoryError:
        problem = "there is not enough memory to try it"
    if problem and not auto:
        raise ValueError(f"{name} attention cannot be used: {problem}")
    if problem:
        name, why = other, f"not {name}: {problem}"
    return ATTENTION[name], f"{name} attention ({why})"

# --- python kernels.py ---------------------------------------------------------------------------

def main(argv):
    """A line for each kernel: its error beside float64, its times, its rate."""
    gpu, good = torch.cuda.is_available(), True
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.float16 if gpu else torch.float32
    B, T, H, D = (1, 2048, 16, 64) if gpu else (2, 208, 4, 64)
    N, C, V = (4096, 768, 50257) if gpu else (400, 64, 50257)
    x, weight, *qkv = (torch.randn(shape, device=device).to(dtype).requires_grad_()
                       for shape in [(N, C), (V, C)] + 3 * [(B, T, H, D)])
    ours, torchs = (functools.partial(loss, targets=torch.arange(N, device=device))
                    for loss in (linear_cross_entropy, plain_loss))
    cases = [("softmax", softmax, torch.nn.Softmax(-1), [x.detach()], 5 * N * C),
             ("loss", ours, torchs, [x, weight], 2 * N * C * V),
             ("loss torch", torchs, torchs, [x, weight], 2 * N * C * V)]
    cases += [("attention " + name, function, attention_reference, qkv, 2 * B * H * T * T * D)
              for name, function in ATTENTION.items()
              if name in ("sdpa", "plain") or not cannot_run(name, device, dtype, D)]
    for name, function, formula, inputs, work in cases:
        row = {"name": name}
        try:
            wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
            truth = with_gradients(formula, wide)
            row["error"] = worst_error(with_gradients(function, inputs), truth)
            row["forward_ms"] = milliseconds(torch.no_grad()(lambda: function(*inputs)))
            both_ms = milliseconds(lambda: with_gradients(function, inputs))
            row["backward_ms"] = both_ms - row["forward_ms"]
            row["tflops"] = work / row["forward_ms"] / 1e9
            good = good and row["error"] < (3e-2 if gpu else 1e-5)
        except Exception as error:  # the others still have something to say
            row["failed"], good = f"{error!r:.200}", False
        print(json.dumps(row) if "--json" in argv else row, flush=True)
    return 0 if good else 1

if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
