"""Fused GPU kernels for gpt.py, which trains and samples without them too.

    softmax(x)                                      the gentlest kernel: one row, one program. Read it first
    attention(q, k, v)                              softmax(q k^T / sqrt(D)) v; no T x T matrix is ever stored
    decode_attention(q, k_cache, v_cache, lengths)  the same for one new token per sequence and a long cache
    linear_cross_entropy(x, weight, targets)        the training loss; the N x V logits never exist all at once

Each runs on every device. `attention` picks an implementation by rules, before any launch; `choose` says which and why:

    triton   capability 8.0 and up (A100, H100, RTX 30 and newer), fp16 and bf16, D <= 128
    cuda     capability 7.5 (T4, the free Colab GPU), fp16, D = 64. Triton emits no tensor-core instructions there
    sdpa     PyTorch's scaled_dot_product_attention: everything else, CPUs included
    plain    attention_reference below, for readers; only when asked for

`python kernels.py [--json FILE]` checks what runs on this machine against float64 and times it. With TRITON_INTERPRET=1
in front it also checks the Triton kernels, without a GPU.

B batch, H query heads, H_kv key and value heads (GQA; H_kv divides H), TQ queries, TK keys, D head size, N rows,
C channels, V vocabulary. m, l and acc are the running maximum, sum and output of the papers: the online softmax
(arxiv.org/abs/1805.02867) and FlashAttention-2 (arxiv.org/abs/2307.08691).
"""
# SPDX-License-Identifier: MIT
import argparse, collections, ctypes, functools, hashlib, importlib.util, json, math, operator, os  # noqa: E401
import pathlib, shutil, struct, sysconfig, warnings  # noqa: E401

warnings.filterwarnings('ignore', message='Failed to initialize NumPy')   # torch would like it; nothing here needs it
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:   # no Triton for this platform: the kernels stay Python functions that nobody calls
    triton, tl, jit, constexpr = None, None, lambda function: function, None

GPT_KERNELS = 1                      # tells this file from the Hugging Face package that is also called kernels
calls = collections.Counter()        # launches of the kernels below, by name
LOG2E = 1.4426950408889634           # kernels use exp2, the GPU's own instruction: e^x = 2^(x log2(e))
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
INTERPRET = triton is not None and os.environ.get('TRITON_INTERPRET') == '1'


# --- Which implementation: rules, asked before anything is launched

def constant(function):
    """Remembers results. The mark is what torch.compiler.assume_constant_result sets: torch.compile calls the function
    while it traces and keeps the answer. That decorator itself would import 0.7 s of compiler into every run."""
    remembered = functools.lru_cache(None)(function)
    call = functools.wraps(function)(lambda *args, **kwargs: remembered(*args, **kwargs))
    call._dynamo_marked_constant = True
    return call

@constant
def capability(device):
    return torch.cuda.get_device_capability(device)

def has_compiler():
    """Triton builds a small C launcher for each kernel; container images often lack a compiler or Python.h."""
    header = os.path.join(sysconfig.get_path('include'), 'Python.h')
    return bool(os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')) and os.path.exists(header)

@constant
def missing(impl, device, dtype, D=0, dropout=False):
    """Why kernels of this kind ('triton', 'cuda') cannot run here, or ''. With a head size D: why attention cannot."""
    interpreted, bf16 = impl == 'triton' and INTERPRET, dtype == torch.bfloat16
    arch = capability(device) if device.type == 'cuda' and torch.version.cuda and not interpreted else (99, 0)
    rules = [(device.type != ('cpu' if interpreted else 'cuda'),
              f'the device is {device.type}' + ', and TRITON_INTERPRET=1' * interpreted),
             (not interpreted and not torch.version.cuda, 'nobody has tried these kernels on ROCm')]
    if impl == 'triton':
        rules = [(triton is None, 'Triton is not installed'),
                 (dtype not in FLOATS or D > 128, 'the Triton kernels are written for fp16, bf16, fp32 and D <= 128, '
                  f'not for {str(dtype)[6:]}' + f' and D = {D}' * bool(D)),
                 *rules,
                 (arch < ((8, 0) if D or bf16 else (7, 5)), 'below capability 8.0 Triton emits no tensor-core '
                  'instructions and no bf16; below 7.5 nobody tried'),
                 (not interpreted and not has_compiler(), 'Triton needs a C compiler and Python.h'),
                 (interpreted and D and bf16, "bf16 products are wrong in Triton's interpreter")]
    else:
        rules += [(arch < (7, 5), 'the tensor-core instructions of the CUDA C++ kernels need capability 7.5'),
                  (not (importlib.util.find_spec('cuda') and importlib.util.find_spec('cuda.bindings')),
                   'the package cuda-bindings is not installed'),
                  (D and (dtype != torch.float16 or D != 64 or dropout),
                   'the CUDA C++ kernels are written for fp16 and D = 64, without dropout')]
    return next((reason for broken, reason in rules if broken), '')

def refuse(impl, reason):
    if reason:
        raise ValueError(f'impl={impl!r} cannot run: {reason}')

SDPA_WINS = set()   # (capability, D) where PyTorch's attention was measured faster. Empty: no GPU has measured it yet

@constant
def describe(device, dtype, head_dim, impl='auto', dropout=False):
    """(name, reason) from device, dtype and head size alone. Cheap: nothing is compiled or launched."""
    device = torch.device(device)
    if impl not in ('auto', 'triton', 'cuda', 'sdpa', 'plain'):
        raise ValueError(f'impl={impl!r}: choose one of auto, triton, cuda, sdpa, plain')
    if impl != 'auto':
        refuse(impl, impl in ('triton', 'cuda') and missing(impl, device, dtype, head_dim, dropout))
        return impl, 'asked for'
    if device.type != 'cuda':
        return 'sdpa', f'the device is {device.type}'
    arch = capability(device)
    name = 'cuda' if arch == (7, 5) else 'triton'
    where = f'capability {arch[0]}.{arch[1]}, {str(dtype)[6:]}, D = {head_dim}'
    reason = (missing(name, device, dtype, head_dim, dropout)
              or dtype == torch.float32 and 'fp32 does not use tensor cores'
              or (arch, head_dim) in SDPA_WINS and f'measured faster at {where}')
    return ('sdpa', reason) if reason else (name, where)

@constant
def self_check(name, device, dtype, D):
    """Runs an implementation once, forward and backward, beside PyTorch's, on a ragged causal case with grouped heads.
    Returns what is wrong, or ''. Kernels have been known to compile and to return zeros (Triton issue 3478)."""
    generator, results = torch.Generator(device).manual_seed(0), []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            inputs = [torch.randn(1, heads, 200, D, device=device, dtype=dtype, generator=generator).requires_grad_()
                      for heads in (4, 2, 2)]
            for impl in (name, 'sdpa'):
                o = attention(*inputs, impl=impl)
                results.append((o, *torch.autograd.grad(o, inputs, inputs[0].detach())))
        worst = max(map(relative_error, *results))
        if worst < 0.02:                                          # bf16 comes to 0.006, the others to less
            return ''
        problem = f'is {worst:.1e} away from PyTorch'
    except Exception as error:            # a compiler or driver that does not suit this GPU or this build of PyTorch
        problem = f'fails, {error!r:.200},'
    problem = f'{name} attention {problem} in {dtype}, D = {D}, on {device}'
    warnings.warn(f'{problem}; using PyTorch')
    return problem

def relative_error(a, b):
    """|a - b| / |b| in float64; NaN counts as infinite."""
    error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(error) else error

def choose(q, k, v, causal=True, dropout_p=0.0, impl='auto'):
    """(name, reason): the implementation that `attention` uses for these tensors."""
    D, dropout = operator.index(q.shape[-1]), True if dropout_p else False    # plain values, for torch.compile too
    name, reason = describe(q.device, q.dtype, D, impl, dropout)
    if name in ('sdpa', 'plain'):
        return name, reason
    fits = (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and k.shape == v.shape
            and (len(q), D) == (len(k), k.shape[-1]) and q.numel() and k.numel() and q.shape[1] % k.shape[1] == 0
            and (name != 'cuda' or len(q) * q.shape[1] < 2**16))              # what a grid's y can count
    problem = '' if fits else 'q, k and v do not fit together, are empty, or have too many heads'
    if impl != 'auto':
        refuse(impl, problem)
    elif problem := problem or self_check(name, q.device, q.dtype, D):
        return 'sdpa', problem
    return name, reason


# --- Ops and launches

# A second copy of this file in one process (a reload, an import by path) must not define the same ops again.
NAMESPACE = next(name for name in (f'gpt_kernels{n or ""}' for n in range(1000))
                 if not hasattr(getattr(torch.ops, name), 'softmax_forward'))
LIBRARY = torch.library.Library(NAMESPACE, 'DEF')

def op(schema, fake, backward=None, save=None):
    """Makes a function one opaque op: torch.compile keeps its graph whole and does not look inside. `fake` makes empty
    outputs from shapes alone. Library.define costs 8 us a call where custom_op costs 47."""
    def register(function):
        name = f'{NAMESPACE}::{function.__name__}'
        LIBRARY.define(function.__name__ + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(function.__name__, function, 'CompositeExplicitAutograd')    # for every device
        torch.library.register_fake(name, fake, lib=LIBRARY)
        if backward:
            torch.library.register_autograd(name, backward, setup_context=save, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), function.__name__).default
    return register

def launch(kernel, grid, *args, **constants):
    """Launches a Triton kernel on the device of its first argument, which need not be the current device."""
    calls[kernel.__name__] += 1
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, enable_fp_fusion=True, **constants)   # a * b + c in one instruction: no default any more


# --- Softmax: the gentlest kernel

# y_i = exp(x_i - max x) / sum_j exp(x_j - max x) over the last dimension; X and Y are (N, n), one program per row.
# Replaces five kernels that each go over the whole matrix (max, subtract, exp, sum, divide) by one that reads it once
# and writes it once. Memory is slow and arithmetic nearly free, so that is what decides the time.
@jit
def softmax_kernel(X, Y, n, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)              # 64 bits: row * n passes 2^31 on big matrices
    i = tl.arange(0, BLOCK)                          # a power of two, as Triton needs; the mask cuts it to n
    x = tl.load(X + row * n + i, mask=i < n, other=float('-inf')).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))                     # without the max, exp(89) is already infinite in fp32
    tl.store(Y + row * n + i, e / tl.sum(e, 0), mask=i < n)          # rounded to Y's type

# dx = y * (dy - sum_j y_j dy_j). Each output depends on every input through the denominator: hence the sum.
@jit
def softmax_backward_kernel(Y, DY, DX, n, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    y = tl.load(Y + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(DX + row * n + i, y * (dy - tl.sum(y * dy, 0)), mask=i < n)

def row_constants(n):
    """A whole row sits in the registers of one program: the longer the row, the more warps share it."""
    block = triton.next_power_of_2(n)
    return dict(BLOCK=block, num_warps=min(max(block // 512, 1), 16))

@op('(Tensor y, Tensor dy) -> Tensor', fake=lambda y, dy: y.new_empty(y.shape))
def softmax_backward(y, dy):
    dx, n = torch.empty_like(y), y.shape[-1]
    launch(softmax_backward_kernel, (y.numel() // n,), y, dy.contiguous(), dx, n, **row_constants(n))
    return dx

@op('(Tensor x) -> Tensor', fake=lambda x: x.new_empty(x.shape),
    backward=lambda ctx, dy: softmax_backward(*ctx.saved_tensors, dy),
    save=lambda ctx, inputs, output: ctx.save_for_backward(output))
def softmax_forward(x):
    x, n = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    launch(softmax_kernel, (x.numel() // n,), x, y, n, **row_constants(n))
    return y

def softmax(x):
    """Softmax over the last dimension: by these kernels where they run, for rows that fit into registers."""
    fits = x.dim() and x.numel() and x.shape[-1] <= 16384 and not missing('triton', x.device, x.dtype)
    return softmax_forward(x) if fits else torch.softmax(x, -1)

def softmax_cuda(x):
    """The same in CUDA C++, from its source below: fp16, forward only. An example of how one is launched."""
    refuse('cuda', missing('cuda', x.device, x.dtype) or x.dtype != torch.float16 and 'it is written for fp16')
    x = x.contiguous()
    y, n = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // n
    launch_cuda('softmax_rows', (-(-rows // 4), 1), x, 'PPii', x.data_ptr(), y.data_ptr(), rows, n)
    return y


# --- Attention, the readable way, and PyTorch's

def causal_mask(TQ, TK, device):
    """True where query i may see key j. Aligned bottom-right: the last query sees every key, as with a cache.

    >>> causal_mask(2, 3, 'cpu').int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(TQ, TK, dtype=torch.bool, device=device).tril(TK - TQ)

def attention_reference(q, k, v, causal=True, dropout_p=0.0, scale=None):
    """The formula, step by step; what all else in this file must agree with. A query that sees no key gives 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))   # each kv head serves a group
    s = q @ k.transpose(-2, -1) * scale                                              # (B, H, TQ, TK)
    hidden = ~causal_mask(q.shape[2], k.shape[2], q.device) & causal
    s = s.masked_fill(hidden, torch.finfo(s.dtype).min)           # not -inf: a row of them has no softmax
    p = s.softmax(-1).masked_fill(hidden, 0.0)
    return F.dropout(p, dropout_p) @ v                            # (B, H, TQ, D)

def attention_sdpa(q, k, v, causal, dropout_p, scale):
    """scaled_dot_product_attention with our conventions. The hot path on a CPU, so it does only what it must."""
    TQ, TK = q.shape[2], k.shape[2]
    mask, square = None, TQ == TK
    if causal and not square and TQ > 1:                          # is_causal aligns top-left; one query sees all
        mask = causal_mask(TQ, TK, q.device)
    grouped = q.shape[1] != k.shape[1]
    flash = mask is None and q.is_cuda and q.dtype in HALF and capability(q.device) >= (8, 0)
    if grouped and q.device.type != 'cpu' and not flash:
        # Only the CPU and FlashAttention know groups; elsewhere enable_gqa falls back to the slow formula.
        k, v, grouped = *(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v)), False
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal and square, scale=scale, enable_gqa=grouped)


# --- Attention in Triton: forward

# O = softmax(Q K^T * scale) V for Q (B, H, TQ, D), K and V (B, H_kv, TK, D), and L (B, H, TQ), the log2 of the sum, for
# the backward pass. Replaces the formula above, which writes and reads (B, H, TQ, TK) four times.
# One program owns BM queries of one head and walks over the keys, BN at a time. The online softmax keeps, per query,
# the maximum m so far, the sum l of 2^(s - m), and acc, the sum of 2^(s - m) v. A new maximum rescales l and acc.
# Q, K and V come with any strides. What we make ourselves (O, dQ, dK, dV) lies as (B, T, H, D) in memory, so that the
# model's transpose and reshape after attention copy nothing. DP is D rounded up to a power of two; the rest is zeros.
# Decoding walks the same way: if SLICED, H counts slices of the keys, not heads, H / H_kv of each kv head. See below.

@jit
def whose_block(length, H, SIZE):
    """(block, b, h) of this program. Blocks vary fastest: neighbours read the same keys from the cache."""
    blocks = tl.cdiv(length, SIZE)
    head = (tl.program_id(0) // blocks).to(tl.int64)              # 64 bits, and so is every offset made from b and h
    return tl.program_id(0) % blocks, head // H, head % H

@jit
def load_rows(base, stride, start, n_rows, ROWS: constexpr, D: constexpr, DP: constexpr, CHECK: constexpr = True):
    """Tile (ROWS, DP) from row `start` of a matrix (n_rows, D). Without CHECK the caller knows that all rows are there.
    Only the tile's origin is a 64-bit offset: within the tile 32 bits do, and save registers."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
    at = base + tl.cast(start, tl.int64) * stride + (i * stride + d)
    return tl.load(at, mask=(i < n_rows - start) & (d < D), other=0.0) if CHECK or D < DP else tl.load(at)

@jit
def store_rows(base, stride, start, n_rows, tile, D: constexpr, DP: constexpr):
    i, d = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, DP)[None, :]
    at = base + tl.cast(start, tl.int64) * stride + (i * stride + d)
    tl.store(at, tile, mask=(i < n_rows - start) & (d < D))       # rounded to the type of the elements there

@jit
def key_range(block, TQ, TK, PHASE: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """Keys for a block of queries. Phase 0: tiles that all of them see whole, so that nothing needs a mask.
    Phase 1: the rest, the diagonal and the ragged end."""
    whole, stop = TK, TK
    if CAUSAL:
        whole = tl.maximum(tl.minimum(TK, block * BM + 1 + TK - TQ), 0)
        stop = tl.maximum(tl.minimum(TK, block * BM + BM + TK - TQ), 0)
    whole = whole // BN * BN
    return (0, whole) if PHASE == 0 else (whole, stop)

@jit
def visible(row, n, TQ, TK, CAUSAL: constexpr):
    """Which (query, key) pairs count. Causal is aligned bottom-right: the last query sees the last key."""
    return (n < TK) & (n <= row + TK - TQ) if CAUSAL else (n < TK) & (row >= 0)

@jit
def dropout(x, SEED, head, row, n, TK, dropout_p):
    """Philox makes the random number a function of the place (head, row, n) alone. The backward kernels, whose tiles
    differ, make the same mask again, and nobody stores it."""
    return tl.where(tl.rand(tl.load(SEED) + head, row * TK + n) >= dropout_p, x / (1 - dropout_p), 0.0)

@jit
def attention_forward_kernel(Q, K, V, O, L, SEED, LENGTHS, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, H, H_kv, TQ, TK,
                             scale_log2, dropout_p, D: constexpr, DP: constexpr, BM: constexpr, BN: constexpr,
                             CAUSAL: constexpr, DROPOUT: constexpr, SLICED: constexpr):
    block, b, h = whose_block(TQ, H, BM)
    block = tl.cdiv(TQ, BM) - 1 - block                           # the last queries see most keys, so they start first
    head, h_kv, h_q, m0 = b * H + h, h // (H // H_kv), h, block * BM
    if SLICED:                                                    # of these keys, for the queries of all their slices
        h_q, TK, slices = h_kv, tl.load(LENGTHS + b), H // H_kv
        slice_size, i = tl.cdiv(tl.cdiv(TK, slices), BN) * BN, (h % slices).to(tl.int32)
    row = m0 + tl.arange(0, BM)
    q = load_rows(Q + b * sqb + h_q * sqh, sqt, m0, TQ, BM, D, DP)
    m = tl.full([BM], float('-inf'), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for PHASE in tl.static_range(2):                              # two loops, one text
        start, stop = key_range(block, TQ, TK, PHASE, BM, BN, CAUSAL)
        if SLICED:
            start, stop = tl.maximum(start, i * slice_size), tl.minimum(stop, (i + 1) * slice_size)
        for n0 in range(start, stop, BN):
            n = n0 + tl.arange(0, BN)
            k = load_rows(K + b * skb + h_kv * skh, skt, n0, TK, BN, D, DP, PHASE == 1)
            s = tl.dot(q, tl.trans(k), input_precision='ieee')
            if PHASE == 1:
                s = tl.where(visible(row[:, None], n[None, :], TQ, TK, CAUSAL), s, float('-inf'))
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            # A query may have seen no key in a tile with a mask: -inf - -inf would be NaN.
            m_safe = tl.where(m_new == float('-inf'), 0.0, m_new) if PHASE == 1 else m_new
            p = tl.exp2(s * scale_log2 - m_safe[:, None])         # one multiply-add and one exp2 per element
            alpha = tl.exp2(m - m_safe)
            l = l * alpha + tl.sum(p, 1)
            m = m_new
            if DROPOUT:                                           # after l: it acts on the normalised weights
                p = dropout(p, SEED, head, row[:, None], n[None, :], TK, dropout_p)
            v = load_rows(V + b * svb + h_kv * svh, svt, n0, TK, BN, D, DP, PHASE == 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision='ieee')
    # A query without keys gives 0, and L = inf makes its weights 0 in the backward pass; a slice without keys L = -inf.
    l_safe, nothing = tl.where(l > 0, l, 1.0), float('-inf') if SLICED else float('inf')
    tl.store(L + head * TQ + row, tl.where(l > 0, m + tl.log2(l_safe), nothing), mask=row < TQ)
    store_rows(O + (b * TQ * H + h) * D, H * D, m0, TQ, acc / l_safe[:, None], D, DP)


# --- Attention in Triton: backward

# With S = Q K^T * scale, P = softmax(S), O = P V and the gradient dO:
#     dV = P^T dO     dP = dO V^T     dS = P * (dP - delta)     dQ = scale * dS K     dK = scale * dS^T Q
# where delta = rowsum(P * dP) = rowsum(O * dO): the second form needs no matrix. P is made again from Q, K and L.
# Two kernels, because dQ sums over keys, and dK and dV sum over queries: each program owns what it writes. S and dP are
# made twice, but without atomics the same input gives the same bits. dQ comes first and leaves delta to dK and dV.

@jit
def attention_dq_kernel(Q, K, V, O, DO, DQ, L, DELTA, SEED, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
                        H, H_kv, TQ, TK, scale, scale_log2, dropout_p, D: constexpr, DP: constexpr,
                        BM: constexpr, BN: constexpr, CAUSAL: constexpr, DROPOUT: constexpr):
    block, b, h = whose_block(TQ, H, BM)
    block = tl.cdiv(TQ, BM) - 1 - block
    head, h_kv, m0 = b * H + h, h // (H // H_kv), block * BM
    row, ours = m0 + tl.arange(0, BM), (b * TQ * H + h) * D       # where this head begins in O, dO and dQ
    q = load_rows(Q + b * sqb + h * sqh, sqt, m0, TQ, BM, D, DP)
    do = load_rows(DO + ours, H * D, m0, TQ, BM, D, DP)
    o = load_rows(O + ours, H * D, m0, TQ, BM, D, DP)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + head * TQ + row, delta, mask=row < TQ)
    lse = tl.load(L + head * TQ + row, mask=row < TQ, other=float('inf'))
    dq = tl.zeros([BM, DP], tl.float32)
    for PHASE in tl.static_range(2):
        start, stop = key_range(block, TQ, TK, PHASE, BM, BN, CAUSAL)
        for n0 in range(start, stop, BN):
            n = n0 + tl.arange(0, BN)
            k = load_rows(K + b * skb + h_kv * skh, skt, n0, TK, BN, D, DP, PHASE == 1)
            v = load_rows(V + b * svb + h_kv * svh, svt, n0, TK, BN, D, DP, PHASE == 1)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2 - lse[:, None])
            if PHASE == 1:
                p = tl.where(visible(row[:, None], n[None, :], TQ, TK, CAUSAL), p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision='ieee')
            if DROPOUT:
                dp = dropout(dp, SEED, head, row[:, None], n[None, :], TK, dropout_p)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision='ieee')
    store_rows(DQ + ours, H * D, m0, TQ, dq * scale, D, DP)

@jit
def attention_dkv_kernel(Q, K, V, DO, DK, DV, L, DELTA, SEED, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
                         H, H_kv, TQ, TK, scale, scale_log2, dropout_p, D: constexpr, DP: constexpr,
                         BM: constexpr, BN: constexpr, CAUSAL: constexpr, DROPOUT: constexpr):
    block, b, h_kv = whose_block(TK, H_kv, BN)                    # BN keys of one kv head; the first have most queries
    n0, ours = block * BN, (b * TK * H_kv + h_kv) * D
    n = n0 + tl.arange(0, BN)
    k = load_rows(K + b * skb + h_kv * skh, skt, n0, TK, BN, D, DP)
    v = load_rows(V + b * svb + h_kv * svh, svt, n0, TK, BN, D, DP)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    # Phase 0: the diagonal. Phase 1: queries that see all our keys. Keys beyond TK need no mask: rows of dK and
    # dV that nobody stores. Queries beyond TQ load L = inf, so their weights are 0.
    first, whole = 0, 0
    if CAUSAL:
        first = tl.maximum(n0 + TQ - TK, 0) // BM * BM
        whole = tl.minimum(tl.cdiv(tl.maximum(n0 + BN - 1 + TQ - TK, 0), BM) * BM, TQ)
    for h in range(h_kv * (H // H_kv), (h_kv + 1) * (H // H_kv)):  # sum over the query heads of the group
        head = b * H + h
        for PHASE in tl.static_range(2):
            for m0 in range(first if PHASE == 0 else whole, whole if PHASE == 0 else TQ, BM):
                row = m0 + tl.arange(0, BM)
                q = load_rows(Q + b * sqb + h * sqh, sqt, m0, TQ, BM, D, DP)
                do = load_rows(DO + (b * TQ * H + h) * D, H * D, m0, TQ, BM, D, DP)
                lse = tl.load(L + head * TQ + row, mask=row < TQ, other=float('inf'))
                delta = tl.load(DELTA + head * TQ + row, mask=row < TQ, other=0.0)
                # All tiles transposed, (BN, BM): P^T and dS^T are then the left operands of their products as they are.
                pt = tl.exp2(tl.dot(k, tl.trans(q), input_precision='ieee') * scale_log2 - lse[None, :])
                if PHASE == 0:
                    pt = tl.where(visible(row[None, :], n[:, None], TQ, TK, True), pt, 0.0)
                dpt = tl.dot(v, tl.trans(do), input_precision='ieee')
                kept = pt
                if DROPOUT:
                    kept = dropout(pt, SEED, head, row[None, :], n[:, None], TK, dropout_p)
                    dpt = dropout(dpt, SEED, head, row[None, :], n[:, None], TK, dropout_p)
                dv = tl.dot(kept.to(do.dtype), do, dv, input_precision='ieee')
                dst = pt * (dpt - delta[None, :])
                dk = tl.dot(dst.to(q.dtype), q, dk, input_precision='ieee')
    store_rows(DK + ours, H_kv * D, n0, TK, dk * scale, D, DP)
    store_rows(DV + ours, H_kv * D, n0, TK, dv, D, DP)

# (BM, BN, warps, stages) of the forward, dQ and dK/dV kernels, by padded head size. BM counts queries, BN keys.
# Constants, not autotune: no minutes of search at the first step, the same bits in every run.
# The shapes of Triton's fused-attention tutorial, cut until the compiler reports no spills at D = 64 (RTX 50: 9) and
# shared memory fits the smallest GPU that there is (99 KB on RTX 30 to 50). No GPU has measured them.
TILES = {64: ((128, 64, 4, 3), (128, 32, 8, 2), (32, 128, 8, 2)),
         128: ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
         'Hopper': (128, 64, 8, 3),                                # forward, for two warpgroups and 227 KB
         'float32': ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),   # full-precision products, without tensor cores
         'interpreter': ((64, 64, 4, 1),) * 3}                     # big: the interpreter pays per program and step

def padded(n):
    return max(triton.next_power_of_2(n), 16)                     # what tl.dot can multiply

def attention_constants(device, dtype, D, causal, dropout):
    """The compile-time arguments of the three kernels: forward, dQ, dK/dV."""
    DP = padded(D)
    tiles = TILES['interpreter' if device.type == 'cpu' else 'float32' if dtype == torch.float32 else max(DP, 64)]
    if device.type == 'cuda' and dtype in HALF and capability(device) == (9, 0):
        tiles = TILES['Hopper'], *tiles[1:]
    return [dict(D=D, DP=DP, BM=BM, BN=BN, CAUSAL=causal, DROPOUT=dropout, num_warps=warps,
                 num_stages=stages) for BM, BN, warps, stages in tiles]


# --- Attention in CUDA C++, for Turing

# The same algorithm one level lower: tiles of 64 x 64, a warp owns 16 rows. No headers: the compiler needs no include
# path. mma.sync multiplies fp16 fragments that lie spread over a warp. With g = lane / 4 and t = lane % 4, a lane holds
# of a 16 x 8 result the places (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); of a 16 x 16 left operand the pairs that
# begin at (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); of a 16 x 8 right operand rows 2t, 2t+1, 2t+8, 2t+9 of column g
# (docs.nvidia.com/cuda/parallel-thread-execution, "Matrix Fragments for mma.m16n8k16"). So two results side by side
# already are a left operand: S becomes P, and P the factor of V, without leaving its registers.
CUDA_SOURCE = r'''
typedef unsigned int u32; typedef unsigned short u16; typedef long long i64;   // a u16 holds the bits of one fp16
struct alignas(16) Vec { u32 x, y, z, w; };                                    // 8 fp16, the widest load
#define D 64
#define TILE 64
#define LD (D + 8)               // padded rows in shared memory: 8 rows read at once hit different banks
#define UNROLL _Pragma("unroll") // arrays live in registers only where every index is known at compile time
#define INF __int_as_float(0x7f800000)
#define INLINE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(128)

#ifndef EMULATE                  // five instructions; the tests put their own in place of them
INLINE u16 half_bits(float x) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
INLINE float to_float(u16 h) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h)); return x; }
INLINE float shuffle_xor(float x, int m) { return __shfl_xor_sync(0xffffffffu, x, m); }
INLINE void mma_16x8x8(float c[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}
INLINE void load_transposed(u32 &b0, u32 &b1, const u16 *row) {   // two 8 x 8 blocks; lane i points at row i of 16
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : "=r"(b0), "=r"(b1) : "r"((u32)__cvta_generic_to_shared(row)));
}
#endif

// C (16 x 8) += A (16 x 16) B (16 x 8), in two halves: Turing has no deeper instruction, and newer GPUs have this one.
INLINE void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
    mma_16x8x8(c, a[0], a[1], b0);
    mma_16x8x8(c, a[2], a[3], b1);
}
INLINE u32 pack(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
INLINE float sum_of_four(float x) { x += shuffle_xor(x, 1); return x + shuffle_xor(x, 2); }   // lanes that share a row

// Softmax over rows of n, a warp per row. Butterflies: after five exchanges all lanes have the maximum, then the sum.
struct Softmax { const u16 *X; u16 *Y; int rows, n; };
KERNEL softmax_rows(const Softmax A) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= A.rows) return;   // the whole warp leaves, so nobody waits for it
    const u16 *x = A.X + (i64)row * A.n;
    float m = -INF, l = 0;
    for (int i = lane; i < A.n; i += 32) m = fmaxf(m, to_float(x[i]));
    for (int k = 16; k; k /= 2) m = fmaxf(m, shuffle_xor(m, k));
    for (int i = lane; i < A.n; i += 32) l += expf(to_float(x[i]) - m);
    for (int k = 16; k; k /= 2) l += shuffle_xor(l, k);
    for (int i = lane; i < A.n; i += 32) A.Y[(i64)row * A.n + i] = half_bits(expf(to_float(x[i]) - m) / l);
}

struct Attention {               // strides of q, k, v: batch, head, time. O, DO, DQ, DK and DV lie as (B, T, H, D)
    const u16 *Q, *K, *V, *DO; u16 *O, *DQ, *DK, *DV; float *L, *DELTA;
    i64 q[3], k[3], v[3]; int H, H_kv, TQ, TK, causal; float scale, scale_log2;
};

struct Matrix { const u16 *base; i64 stride; int rows; };

// 64 rows from global to shared memory; rows beyond the end become 0.
INLINE void load_tile(u16 *tile, const Matrix x, int row0) {
    for (int i = threadIdx.x; i < TILE * (D / 8); i += 128) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        *(Vec *)(tile + r * LD + c) = row0 + r < x.rows ? *(const Vec *)(x.base + (row0 + r) * x.stride + c) : Vec{};
    }
}
// This warp's 16 rows of a tile as left operands, which stay in registers for the whole kernel.
INLINE void load_left(u32 a[D / 16][4], const u16 *tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, col = lane % 4 * 2;
    UNROLL for (int k = 0; k < D / 16; k++) UNROLL for (int i = 0; i < 4; i++)
        a[k][i] = *(const u32 *)&tile[(row + i % 2 * 8) * LD + k * 16 + i / 2 * 8 + col];
}
// C (16 x 64) += A B^T for a tile B. Rows of B are columns of B^T: the right operand is read as it lies.
INLINE void multiply_abt(float c[8][4], const u32 a[D / 16][4], const u16 *tile) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int k = 0; k < D / 16; k++) UNROLL for (int j = 0; j < 8; j++) {
        const u16 *b = &tile[(j * 8 + lane / 4) * LD + k * 16 + lane % 4 * 2];
        mma(c[j], a[k], *(const u32 *)b, *(const u32 *)(b + 8));
    }
}
// C (16 x D) += P B for a tile B; P (16 x 64) is a result still in registers and is rounded to fp16.
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
// The lane's two rows of a result, times f0 and f1, as fp16.
INLINE void store_rows(u16 *base, i64 stride, int row0, int rows, const float c[D / 8][4], float f0, float f1) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = row0 + threadIdx.x / 32 * 16 + lane / 4 + r * 8;
        const float f = r ? f1 : f0;
        if (row < rows) UNROLL for (int j = 0; j < D / 8; j++)
            *(u32 *)(base + row * stride + j * 8 + lane % 4 * 2) = pack(c[j][2*r] * f, c[j][2*r+1] * f);
    }
}

// One walk serves three kernels. A block owns 64 rows of A1 and A2, a warp 16 of them as left operands, and walks over
// tiles of B1 and B2. With S = A1 B1^T and dP = A2 B2^T:
//     forward   A1 Q, B1 K, B2 V             O = sum of P B2, by the online softmax
//     dQ        A1 Q, A2 dO, B1 K, B2 V      dQ = sum of dS B1; leaves delta = rowsum(O * dO) for the next
//     dK, dV    A1 K, A2 V, B1 Q, B2 dO      dK = sum of dS B1, dV = sum of P B2, over the query heads of the group.
//                                            Keys down, queries across: so P^T and dS^T are left operands as they are
// Grid (ceil(owned rows / 64), B * heads).
template <bool BACKWARD, bool KEYS> INLINE void walk(const Attention &A) {     // KEYS: we own keys, not queries
    __shared__ __align__(16) u16 b1[TILE * LD], b2[TILE * LD];
    __shared__ float sl[TILE], sdelta[TILE];
    const int lane = threadIdx.x % 32, g = threadIdx.x / 32 * 16 + lane / 4, t = lane % 4;   // g is our first row
    const int heads = KEYS ? A.H_kv : A.H, T = KEYS ? A.TK : A.TQ, group = A.H / A.H_kv, offset = A.TK - A.TQ;
    const int b = blockIdx.y / heads, h0 = blockIdx.y % heads * (KEYS ? group : 1), h_kv = h0 / group;
    const int row0 = (KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * TILE;  // blocks with most to do start first
    const i64 ours = ((i64)b * T * heads + blockIdx.y % heads) * D, stride = (i64)heads * D;
    const Matrix K = {A.K + b * A.k[0] + h_kv * A.k[1], A.k[2], A.TK};
    const Matrix V = {A.V + b * A.v[0] + h_kv * A.v[1], A.v[2], A.TK};
    Matrix Q = {A.Q + b * A.q[0] + h0 * A.q[1], A.q[2], A.TQ};
    Matrix DO = {A.DO + ((i64)b * A.TQ * A.H + h0) * D, (i64)A.H * D, A.TQ};
    float acc1[D / 8][4] = {}, acc2[D / 8][4] = {}, m[2] = {-INF, -INF}, l[2] = {0, 0}, delta[2];
    u32 a1[D / 16][4], a2[D / 16][4];
    load_tile(b1, KEYS ? K : Q, row0);                               // what we own passes through these tiles, once
    if (BACKWARD) load_tile(b2, KEYS ? V : DO, row0);
    __syncthreads();
    load_left(a1, b1);
    if (BACKWARD) load_left(a2, b2);
    if (BACKWARD && !KEYS) {
        __syncthreads();
        load_tile(b1, Matrix{A.O + ours, stride, T}, row0);
        __syncthreads();
        UNROLL for (int r = 0; r < 2; r++) {
            const int row = row0 + g + r * 8;
            const i64 place = (i64)blockIdx.y * T + row;
            float sum = 0;
            for (int i = (g + r * 8) * LD + t, n = 0; n < D; i += 4, n += 4) sum += to_float(b1[i]) * to_float(b2[i]);
            delta[r] = sum_of_four(sum);
            l[r] = row < T ? A.L[place] : INF;                       // backward: the log2 of the sum, as in L
            if (t == 0 && row < T) A.DELTA[place] = delta[r];
        }
    }
    const int first = KEYS && A.causal ? max(0, row0 - offset) / TILE * TILE : 0;    // others see no key of ours
    const int stop = KEYS ? A.TQ : A.causal ? min(A.TK, row0 + TILE + offset) : A.TK;
    for (int h = h0; h < h0 + (KEYS ? group : 1); h++, Q.base += A.q[1], DO.base += D)
    for (int n0 = first; n0 < stop; n0 += TILE) {
        __syncthreads();         // nobody still reads what we are about to overwrite
        load_tile(b1, KEYS ? Q : K, n0);
        load_tile(b2, KEYS ? DO : V, n0);
        if (KEYS) for (int i = threadIdx.x; i < TILE; i += 128) {
            const i64 place = (i64)(b * A.H + h) * A.TQ + n0 + i;
            sl[i] = n0 + i < A.TQ ? A.L[place] : INF;                // queries beyond the end weigh 2^-inf = 0
            sdelta[i] = n0 + i < A.TQ ? A.DELTA[place] : 0;
        }
        __syncthreads();         // the tiles are complete
        float p[8][4] = {}, ds[8][4] = {};
        multiply_abt(p, a1, b1);
        if (BACKWARD) multiply_abt(ds, a2, b2);
        UNROLL for (int r = 0; r < 2; r++) {                         // row g, then row g + 8
            float m_new = m[r], sum = 0;
            UNROLL for (int j = 0; j < 8; j++) UNROLL for (int e = 2 * r; e < 2 * r + 2; e++) {
                const int i = j * 8 + 2 * t + e % 2, row = row0 + g + r * 8, col = n0 + i;
                const int query = KEYS ? col : row, key = KEYS ? row : col;
                p[j][e] = key >= A.TK || (A.causal && key > query + offset) ? -INF : p[j][e] * A.scale_log2;
                m_new = fmaxf(m_new, p[j][e]);
                if (BACKWARD) p[j][e] = exp2f(p[j][e] - (KEYS ? sl[i] : l[r]));
                if (BACKWARD) ds[j][e] = p[j][e] * (ds[j][e] - (KEYS ? sdelta[i] : delta[r]));
            }
            if (BACKWARD) continue;
            m_new = fmaxf(m_new, shuffle_xor(m_new, 1));             // four lanes share a row
            m_new = fmaxf(m_new, shuffle_xor(m_new, 2));
            const float m_safe = m_new == -INF ? 0.f : m_new, alpha = exp2f(m[r] - m_safe);
            UNROLL for (int j = 0; j < 8; j++) UNROLL for (int e = 2 * r; e < 2 * r + 2; e++) {
                sum += p[j][e] = exp2f(p[j][e] - m_safe);
                acc2[j][e] *= alpha;                                 // as wide as p: D = TILE
            }
            l[r] = l[r] * alpha + sum;
            m[r] = m_new;
        }
        if (KEYS || !BACKWARD) multiply_pb(acc2, p, b2);
        if (BACKWARD) multiply_pb(acc1, ds, b1);
    }
    if (BACKWARD) store_rows((KEYS ? A.DK : A.DQ) + ours, stride, row0, T, acc1, A.scale, A.scale);
    if (KEYS) store_rows(A.DV + ours, stride, row0, T, acc2, 1, 1);
    if (BACKWARD) return;
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = row0 + g + r * 8;
        l[r] = sum_of_four(l[r]);
        if (t == 0 && row < T) A.L[(i64)blockIdx.y * T + row] = l[r] > 0 ? m[r] + log2f(l[r]) : INF;
        l[r] = l[r] > 0 ? 1 / l[r] : 0;
    }
    store_rows(A.O + ours, stride, row0, T, acc2, l[0], l[1]);
}
KERNEL attention_forward(const Attention A) { walk<false, false>(A); }
KERNEL attention_dq(const Attention A) { walk<true, false>(A); }
KERNEL attention_dkv(const Attention A) { walk<true, true>(A); }
'''

def checked(result):
    """cuda.bindings returns (error, value)."""
    if int(result[0]):
        raise RuntimeError(f'CUDA C++ kernels: {result[0]!r}')
    return result[1] if len(result) > 1 else None

def cuda_image(arch):
    """Machine code for an arch like sm_75; for compute_75 PTX, which newer GPUs translate. NVRTC compiles each source,
    options and arch once, in about a second; the result is kept on disk."""
    options = (f'--gpu-architecture={arch}', '-std=c++17', '--use_fast_math')
    key = hashlib.sha256('\n'.join((CUDA_SOURCE, *options)).encode()).hexdigest()[:32]
    path = pathlib.Path(os.environ.get('GPT_CACHE') or pathlib.Path.home() / '.cache' / 'gpt') / f'kernels-{key}'
    if path.exists():
        return path.read_bytes()
    from cuda.bindings import nvrtc
    program = checked(nvrtc.nvrtcCreateProgram(CUDA_SOURCE.encode(), b'kernels.cu', 0, [], []))
    failed, = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    name = 'ProgramLog' if int(failed) else 'PTX' if arch.startswith('compute') else 'CUBIN'
    image = b' ' * checked(getattr(nvrtc, f'nvrtcGet{name}Size')(program))
    checked(getattr(nvrtc, f'nvrtcGet{name}')(program, image))
    if int(failed):
        raise RuntimeError('CUDA C++ kernels do not compile:\n' + image.decode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f'.{os.getpid()}')
        part.write_bytes(image)
        part.replace(path)                             # in one step: no other process reads half a file
    except OSError:                                    # a read-only home pays that second again each time
        pass
    return image

@functools.lru_cache(None)
def cuda_function(name, device_index, arch):
    from cuda.bindings import driver
    return checked(driver.cuModuleGetFunction(checked(driver.cuModuleLoadData(cuda_image(arch))), name.encode()))

def launch_cuda(name, grid, x, layout, *values):
    """Launches a kernel of CUDA_SOURCE in blocks of 128 threads, on x's device and PyTorch's current stream. Its one
    argument is a C struct of these values: P a pointer, q an i64, i an int, f a float."""
    from cuda.bindings import driver
    calls[name] += 1
    argument = ctypes.create_string_buffer(struct.pack(layout + '0P', *values))    # 0P pads the end, as C does
    place = ctypes.c_void_p(ctypes.addressof(argument))
    with torch.cuda.device(x.device):
        # A fresh thread, such as autograd's, has no context for driver calls until something makes PyTorch's current.
        if not int(checked(driver.cuCtxGetCurrent())):
            checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(x.device.index))))
        function = cuda_function(name, x.device.index, 'sm_{}{}'.format(*capability(x.device)))
        stream = torch.cuda.current_stream().cuda_stream
        checked(driver.cuLaunchKernel(function, *grid, 1, 128, 1, 1, 0, stream, ctypes.addressof(place), 0))

def launch_cuda_attention(name, heads, T, causal, scale, q, k, v, *others):
    """The struct Attention, field by field; `others` are do, o, dq, dk, dv, l and delta."""
    pointers = (0 if x is None else x.data_ptr() for x in (q, k, v, *others))
    launch_cuda(name, (-(-T // 64), q.shape[0] * heads), q, '10P9q5i2f', *pointers, *strides(q, k, v), q.shape[1],
                k.shape[1], q.shape[2], k.shape[2], causal, scale, scale * LOG2E)


# --- Attention: one door

def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]

def new_rows(x):
    """An empty tensor of x's shape (B, H, T, D) that lies as (B, T, H, D) in memory."""
    B, H, T, D = x.shape
    return x.new_empty_strided((B, H, T, D), (T * H * D, D, H * D, 1))

def as_rows(x):
    """x, or a copy that lies as new_rows does and begins at a multiple of 16 bytes. Usually gradients do already; so do
    saved outputs, unless a hook such as save_on_cpu has brought them back in another layout."""
    x = x.transpose(1, 2).contiguous()
    return (x.clone() if x.data_ptr() % 16 else x).transpose(1, 2)

def readable(x, impl):
    """x, or a copy if the kernels cannot read it as it lies: elements of a row side by side, rows near enough for
    32-bit offsets within a tile, and for CUDA C++ at multiples of 16 bytes, which it reads at once."""
    ok = x.stride(-1) == 1 and x.stride(-2) < 2**24
    ok = ok and (impl != 'cuda' or x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1]))
    return x if ok else x.clone(memory_format=torch.contiguous_format)

@op('(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor l, Tensor? seed, bool causal, float dropout_p, '
    'float scale, str impl) -> (Tensor, Tensor, Tensor)', lambda do, q, k, v, *rest: tuple(map(new_rows, (q, k, v))))
def attention_backward(do, q, k, v, o, l, seed, causal, dropout_p, scale, impl):
    q, k, v, do, o = *(readable(x, impl) for x in (q, k, v)), as_rows(do), as_rows(o)
    dq, dk, dv, delta = new_rows(q), new_rows(k), new_rows(v), torch.empty_like(l)
    (B, H, TQ, D), (_, H_kv, TK, _) = q.shape, k.shape
    if impl == 'cuda':
        for name, heads, T in (('attention_dq', H, TQ), ('attention_dkv', H_kv, TK)):
            launch_cuda_attention(name, heads, T, causal, scale, q, k, v, do, o, dq, dk, dv, l, delta)
        return dq, dk, dv
    _, for_dq, for_dkv = attention_constants(q.device, q.dtype, D, causal, dropout_p > 0)
    rest = (l, delta, q if seed is None else seed, *strides(q, k, v), H, H_kv, TQ, TK, scale, scale * LOG2E, dropout_p)
    launch(attention_dq_kernel, (triton.cdiv(TQ, for_dq['BM']) * B * H,), q, k, v, o, do, dq, *rest, **for_dq)
    launch(attention_dkv_kernel, (triton.cdiv(TK, for_dkv['BN']) * B * H_kv,), q, k, v, do, dk, dv, *rest, **for_dkv)
    return dq, dk, dv

def fake_attention(q, k, v, *rest):
    return new_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)

def save_attention(ctx, inputs, output):
    q, k, v, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, seed)
    ctx.set_materialize_grads(False)                              # else PyTorch makes zeros for l's gradient each time

def grad_attention(ctx, do, dl):
    return *attention_backward(do, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None

@op('(Tensor q, Tensor k, Tensor v, Tensor? seed, bool causal, float dropout_p, float scale, str impl)'
    ' -> (Tensor, Tensor)', fake_attention, grad_attention, save_attention)
def attention_forward(q, k, v, seed, causal, dropout_p, scale, impl):
    q, k, v = (readable(x, impl) for x in (q, k, v))
    (B, H, TQ, D), (o, l) = q.shape, fake_attention(q, k, v)
    if impl == 'cuda':
        launch_cuda_attention('attention_forward', H, TQ, causal, scale, q, k, v, None, o, None, None, None, l, None)
    else:
        constants, _, _ = attention_constants(q.device, q.dtype, D, causal, dropout_p > 0)
        seed = q if seed is None else seed                        # without dropout nobody reads it; nor lengths, ever
        launch(attention_forward_kernel, (triton.cdiv(TQ, constants['BM']) * B * H,), q, k, v, o, l, seed, l,
               *strides(q, k, v), H, k.shape[1], TQ, k.shape[2], scale * LOG2E, dropout_p, SLICED=False, **constants)
    return o, l

def attention(q, k, v, causal=True, dropout_p=0.0, scale=None, impl='auto'):
    """softmax(q k^T * scale) v: q (B, H, TQ, D), k and v (B, H_kv, TK, D) -> (B, H, TQ, D). Differentiable.
    scale None is 1 / sqrt(D). Causal is aligned bottom-right. `impl`: auto, triton, cuda, sdpa or plain; a forced one
    that cannot run here raises ValueError with the reason."""
    # First, because a small model on a CPU feels each us. The kernels scale the maximum: they need a positive scale.
    if impl == 'sdpa' or impl == 'auto' and not (q.is_cuda and (scale is None or scale > 0)):
        return attention_sdpa(q, k, v, causal, dropout_p, scale)
    if q.is_cuda and torch.is_autocast_enabled('cuda'):           # as PyTorch does for its own attention
        q, k, v = (t.to(torch.get_autocast_dtype('cuda')) for t in (q, k, v))
    name, _ = choose(q, k, v, causal, dropout_p, impl)
    if name in ('sdpa', 'plain'):
        return (attention_sdpa if name == 'sdpa' else attention_reference)(q, k, v, causal, dropout_p, scale)
    # The seed stays on the device: no wait for it, a fresh mask at each replay of a CUDA graph, and the same mask when
    # activation checkpointing restores the generator and computes again.
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refuse(name, scale <= 0 and 'scale must be positive')
    return attention_forward(q, k, v, seed, causal, dropout_p, scale, name)[0]


# --- Decoding: one new token, a long cache

# o = softmax(q K[:length]^T / sqrt(D)) V[:length] for q (B, H, 1, D), caches (B, H_kv, T_max, D), lengths (B,).
# One query per head is too little work to fill a GPU. So the G = H / H_kv heads of a group become G queries of one kv
# head, several programs of attention_forward_kernel take a slice of its cache each, and the kernel below combines them
# as the online softmax combines tiles ("Flash-Decoding", pytorch.org/blog/flash-decoding). Replaces a mask over the
# whole cache. The grid depends on shapes alone, and lengths stay on the device: CUDA graphs work.
@jit
def decode_combine_kernel(PART, L, O, H_kv, slices, D: constexpr, DP: constexpr, G: constexpr, SP: constexpr):
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)        # PART (B, G, H_kv, slices, D), L (B, H_kv, slices, G)
    h_kv, g, i, d = h // G, h % G, tl.arange(0, SP), tl.arange(0, DP)
    l = tl.load(L + ((b * H_kv + h_kv) * slices + i) * G + g, mask=i < slices, other=float('-inf'))
    weight = tl.exp2(l - tl.maximum(tl.max(l, 0), -3e38))         # 0 for a slice without keys
    part = load_rows(PART + ((b * G + g) * H_kv + h_kv) * slices * D, D, 0, slices, SP, D, DP)
    total = tl.maximum(tl.sum(weight, 0), 1.0)                    # the largest weight is 1; a cache of length 0 gives 0
    tl.store(O + (b * H_kv * G + h) * D + d, tl.sum(part * weight[:, None], 0) / total, mask=d < D)

def decode_constants(D, G):
    return dict(D=D, DP=padded(D), BM=padded(G), BN=64 if D <= 64 else 32, CAUSAL=False, DROPOUT=False, SLICED=True)

@op('(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths) -> Tensor', fake=lambda q, *rest: q.new_empty(q.shape))
def decode_forward(q, k_cache, v_cache, lengths):
    (B, H, _, D), (_, H_kv, T_max, _) = q.shape, k_cache.shape
    # Enough slices for two programs per multiprocessor, but none under 128 keys of a full cache.
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    slices, G = max(1, min(-(-2 * processors // (B * H_kv)), -(-T_max // 128), 64)), H // H_kv
    q, k, v = (readable(x, 'triton') for x in (q.reshape(B, H_kv, G, D), k_cache, v_cache))
    part, l = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, G, H_kv, slices, D), (B, H_kv, slices, G)))
    o, constants = q.new_empty((B, H, 1, D)), decode_constants(D, G)
    launch(attention_forward_kernel, (B * H_kv * slices,), q, k, v, part, l, q, lengths.contiguous(),
           *strides(q, k, v), H_kv * slices, H_kv, G, T_max, D ** -0.5 * LOG2E, 0.0, **constants)
    launch(decode_combine_kernel, (B, H), part, l, o, H_kv, slices, D=D, DP=constants['DP'], G=G,
           SP=triton.next_power_of_2(slices))
    return o

def decode_attention(q, k_cache, v_cache, lengths, impl='auto'):
    """Attention of one new token per sequence: q (B, H, 1, D), caches (B, H_kv, T_max, D). Sequence b has filled the
    first lengths[b] places of its own (int32, on the device, at least 1); finite numbers must fill the others. For
    sampling: no gradient."""
    name, _ = describe(q.device, q.dtype, q.shape[-1], 'sdpa' if impl == 'plain' else impl)
    refuse(impl, impl == 'cuda' and 'decode_attention has no CUDA C++ kernel')
    if name == 'triton' and (impl == 'triton' or not self_check(name, q.device, q.dtype, q.shape[-1])):
        return decode_forward(q, k_cache, v_cache, lengths)
    mask = None
    if q.device.type == 'cpu':                                    # lengths can be read for nothing: cut instead of mask
        shortest, longest = lengths.aminmax()
        k_cache, v_cache = k_cache[:, :, :int(longest)], v_cache[:, :, :int(longest)]
    if q.device.type != 'cpu' or shortest != longest:
        mask = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None, None, None]     # (B, 1, 1, T)
    groups = q.reshape(q.shape[0], k_cache.shape[1], -1, q.shape[3])   # heads with the same keys: as several queries
    return F.scaled_dot_product_attention(groups, k_cache, v_cache, mask).reshape(q.shape)


# --- Linear cross-entropy: the training loss

# loss = mean over the valid rows of logsumexp(z) - z[target], z = x W^T, for x (N, C), W (V, C), targets (N,). At V =
# 50,257 the logits z, their softmax and their gradient are each far larger than the activations of the model. Here they
# exist for one slice of rows at a time: while it is at hand, its gradient p - onehot(target) is made in its place and
# multiplied into dx and dW, so that the backward pass only scales those two. That scale holds 1 / valid rows too: p -
# onehot is of order one, which fp16 can hold; divided by 16,384 it would vanish before a loss scale could save it.
SLICE = 2**24                        # logits in a slice (64 MB in fp32). Fewer than this altogether: the plain formula

# One program per row. First pass: online softmax over the row. Second: the logits become their gradient.
@jit
def cross_entropy_kernel(Z, TARGETS, LOSS, stride, n, ignore_index, GRAD: constexpr, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    target = tl.load(TARGETS + row)
    valid = target != ignore_index
    i = tl.arange(0, BLOCK)
    m, l = -3e38, 0.0                                             # not -inf: a block of -inf would give NaN
    for start in range(0, n, BLOCK):
        z = tl.load(Z + start + i, mask=start + i < n, other=float('-inf')).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 0))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    logsumexp = m + tl.log(l)
    inside = valid & (target >= 0) & (target < n)                 # any other target makes the loss NaN
    z_target = tl.load(Z + target, mask=inside, other=float('nan')).to(tl.float32)
    tl.store(LOSS + row, tl.where(valid, logsumexp - z_target, 0.0))
    if GRAD:
        tl.debug_barrier()                                        # all have read z[target] before one overwrites it
        for start in range(0, n, BLOCK):
            z = tl.load(Z + start + i, mask=start + i < n, other=0.0).to(tl.float32)
            dz = tl.exp(z - logsumexp) - tl.where(start + i == target, 1.0, 0.0)
            tl.store(Z + start + i, tl.where(valid, dz, 0.0), mask=start + i < n)

def cross_entropy_rows(z, targets, ignore_index, grad):
    """(loss per row, gradient of its sum): logits z (n, V); z's memory is used up. Rows without a target give 0."""
    if not missing('triton', z.device, z.dtype):
        loss = torch.empty(len(z), dtype=torch.float32, device=z.device)
        launch(cross_entropy_kernel, (len(z),), z, targets, loss, z.stride(0), z.shape[1], ignore_index, GRAD=grad,
               BLOCK=min(4096, triton.next_power_of_2(z.shape[1])), num_warps=8)
        return loss, z
    valid, wide = targets != ignore_index, z.float() if z.dtype in HALF else z
    at, logsumexp = targets.where(valid, 0)[:, None], wide.logsumexp(1, keepdim=True)
    loss = (logsumexp - wide.gather(1, at))[:, 0].where(valid, 0.0)
    if grad:
        wide.sub_(logsumexp).exp_().scatter_add_(1, at, torch.full_like(logsumexp, -1.0)).mul_(valid[:, None])
    return loss, wide.to(z.dtype)

def fake_loss(x, weight, targets, ignore_index, grad):
    wide = torch.promote_types(x.dtype, torch.float32)            # sums are made in fp32 (float64 in tests)
    loss, valid = x.new_empty((), dtype=wide), x.new_empty((), dtype=wide)
    return loss, valid, x.new_empty(x.shape if grad else 0), weight.new_empty(weight.shape if grad else 0, dtype=wide)

def save_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype

def grad_loss(ctx, g, *rest):
    valid, dx, dw = ctx.saved_tensors
    return dx * (g / valid), (dw * (g / valid)).to(ctx.dtype), None, None, None

@op('(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool grad) -> (Tensor, Tensor, Tensor, Tensor)',
    fake_loss, grad_loss, save_loss)
def linear_cross_entropy_forward(x, weight, targets, ignore_index, grad):
    """(loss, number of valid targets, dx, dW); the gradients are those of the sum of losses, not yet of their mean."""
    loss, valid, dx, dw = (t.zero_() for t in fake_loss(x, weight, targets, ignore_index, grad))
    # A GPU needs taller matrices to be busy; in more rows than 4,096 a 16-bit sum for dW might overflow. Products and
    # loads are fastest on rows that begin at multiples of 16 bytes, which those of 50,257 logits would not; on MPS,
    # products into such a view have been wrong (github.com/pytorch/pytorch/issues/104832).
    V, rows = len(weight), max(1, min(len(x), 4096, SLICE * (4 if x.is_cuda else 1) // len(weight)))
    logits = x.new_empty(rows, V if x.device.type == 'mps' else -(-V // 64) * 64)[:, :V]
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        z = torch.mm(x[part], weight.T, out=logits[:len(x[part])])
        losses, dz = cross_entropy_rows(z, targets[part].contiguous(), ignore_index, grad)
        loss += losses.sum()
        if grad:
            torch.mm(dz, weight, out=dx[part])
            if dz.dtype == dw.dtype:
                dw.addmm_(dz.T, x[part])
            else:
                dw += dz.T @ x[part]                              # a 16-bit product, summed over the slices in fp32
    valid += (targets != ignore_index).sum()
    return loss / valid, valid, dx, dw                            # no valid target: 0 / 0, NaN like PyTorch's

def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean cross-entropy of the logits x W^T, in fp32: x (N, C), weight (V, C), targets (N,) int64 -> scalar.
    The logits exist one slice at a time. Without gradients (no_grad, evaluation) none are made."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    if len(x) * len(weight) <= SLICE:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.float() if logits.dtype in HALF else logits, targets, ignore_index=ignore_index)
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return linear_cross_entropy_forward(x, weight, targets, ignore_index, grad)[0]


# --- python kernels.py

def cases(device, big):
    """(name, impl, function, formula, inputs, work, unit): big inputs for times, small ragged ones for errors."""
    gpu = device.type == 'cuda'
    large, dtypes = gpu and big, HALF[:1 + (capability(device) >= (8, 0))] if gpu else (torch.float32,)
    runs = lambda *a: [impl for impl in ('triton', 'cuda') if not missing(impl, device, *a)] + ['sdpa']
    make = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    for dtype in dtypes:
        for D, T in ((64, 1024), (64, 4096), (128, 4096)) if gpu else ((64, 512),):
            B, H, T = (16384 // T, 2048 // D, T) if large else (1, 4, T) if big else (2, 4, 77)
            for impl in [*runs(dtype, D), *['plain'] * (T < 4096)]:    # there it needs more memory than many GPUs have
                qkv = [make(B, T, H, D).transpose(1, 2) for _ in 'qkv']
                yield ('attention', impl, functools.partial(attention, impl=impl), attention_reference, qkv,
                       2 * B * H * T * T * D, 'TFLOP/s')
    for impl in runs(dtype):
        dtype = torch.float16 if impl == 'cuda' else dtypes[-1]
        x, formula = make(*((16384, 4096) if large else (300, 1000))), lambda x: torch.softmax(x, -1)
        function = dict(triton=softmax, cuda=softmax_cuda, sdpa=formula)[impl]
        yield 'softmax', impl, function, formula, [x], 2 * x.nbytes, 'GB/s'
    B, H, T = (32, 12, 1024) if large else (2, 2, 300)
    decode = functools.partial(decode_attention, lengths=torch.full((B,), T, dtype=torch.int32, device=device))
    for impl in [impl for impl in runs(dtype, 64) if impl != 'cuda']:
        qkv = [make(B, H, t, 64) for t in (1, T, T)]              # the work: reading keys and values once
        yield ('decode_attention', impl, functools.partial(decode, impl=impl), attention_reference, qkv,
               2 * qkv[1].nbytes, 'GB/s')
    N, C, V = (16384, 768, 50257) if large else (400, 64, 50257)
    targets = torch.randint(V, (N,), device=device)
    formula = lambda x, w: F.cross_entropy(F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), targets)
    for impl, function in (('sliced', lambda x, w: linear_cross_entropy(x, w, targets)), ('plain', formula)):
        yield 'linear_cross_entropy', impl, function, formula, [make(N, C), make(V, C) / 8], 2 * N * C * V, 'TFLOP/s'

def with_gradients(function, inputs):
    o = function(*inputs)                                         # the first input stands in for the gradient
    do = inputs[0].detach() if o.shape == inputs[0].shape else None
    return o, *(torch.autograd.grad(o, inputs, do) if o.requires_grad else ())

def milliseconds(run, device):
    """The median. On a GPU by Triton's own bench: it empties the cache first, behind which most of a launch hides."""
    if device.type == 'cuda' and not missing('triton', device, torch.float32):
        return triton.testing.do_bench(run, return_mode='median')
    from torch.utils import benchmark
    timer = benchmark.Timer('run()', globals={'run': run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.2).median * 1e3

def measure(device, small, big, ceilings):
    """A row of the table: the error on small inputs against float64, the times on big ones."""
    name, impl, function, formula, inputs, _, _ = small
    gpu, learns = device.type == 'cuda', name != 'decode_attention' and function is not softmax_cuda
    truth, ours = (with_gradients(f, [x.detach().to(dtype).requires_grad_(learns) for x in inputs])
                   for f, dtype in ((formula, torch.float64), (function, inputs[0].dtype)))
    error = max(map(relative_error, ours, truth))
    row = dict(name=name, impl=impl, dtype=str(inputs[0].dtype)[6:], error=error,
               ok=error < (1e-5 if inputs[0].dtype == torch.float32 else 3e-2))
    if INTERPRET and impl in ('triton', 'sliced'):
        return row                                                # the interpreter's time would mean nothing
    _, _, function, _, inputs, work, unit = big
    inputs = [x.requires_grad_(learns) for x in inputs]
    run, train = torch.no_grad()(lambda: function(*inputs)), lambda: with_gradients(function, inputs)
    forward, both = milliseconds(run, device), milliseconds(train, device) if learns else None
    kind, cost = ('CUDA', 'self_device_time_total') if gpu else ('CPU', 'self_cpu_time_total')
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        run()                                                     # asked which kernel ran, not assumed
    longest, memory = max(profile.key_averages(), key=operator.attrgetter(cost), default=None), None
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    rate = work / forward / (1e9 if unit == 'TFLOP/s' else 1e6)
    return dict(row, shape=' '.join(map(str, inputs[name == 'decode_attention'].shape)), forward_ms=forward,
                backward_ms=both and both - forward, rate=rate, unit=unit, share=rate / ceilings[unit],
                memory_mb=memory, ran=longest and longest.key.removeprefix('aten::'))

def main(argv=None):
    parser = argparse.ArgumentParser(description='Checks kernels.py on this machine and times it.')
    parser.add_argument('--json', metavar='FILE', help='write the table there too')
    args = parser.parse_args(argv)
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')                # the profiler's own remarks
    gpu = torch.cuda.is_available() and not INTERPRET
    device = torch.device('cuda' if gpu else 'cpu')
    n, dtype = (16384, torch.float16) if gpu else (512, torch.float32)
    a = torch.randn(2, n, n, device=device).to(dtype)
    ceilings = {'TFLOP/s': 2 * n**3 / milliseconds(lambda: a[0] @ a[1], device) / 1e9,
                'GB/s': a.nbytes / milliseconds(lambda: a[0].copy_(a[1]), device) / 1e6}
    del a                                                         # 1 GB, which a small GPU needs below
    where = torch.cuda.get_device_name() if gpu else 'CPU'
    print(f"{where}, torch {torch.__version__}{f', triton {triton.__version__}' if triton else ''}")
    for impl in ('triton', 'cuda'):
        if reason := missing(impl, device, torch.float16):
            print(f'no {impl} kernels here: {reason}')
    print('error: against float64. share: of the {TFLOP/s:.3g} TFLOP/s of a product of matrices, or of the {GB/s:.3g} '
          'GB/s of a copy.\nmemory: beyond the inputs. ran: the kernel that took longest'.format(**ceilings))
    keys = 'name impl dtype error shape forward_ms backward_ms rate unit share memory_mb ran'.split()
    line = '{:21}{:7}{:9}{:>8}{:>17}{:>11}{:>12}{:>8} {:8}{:>6}{:>10} {:.40}'.format
    print(line(*keys))
    rows = []
    for small, big in zip(cases(device, False), cases(device, True)):
        try:
            row = measure(device, small, big, ceilings)
        except Exception as error:                                # the others still have something to say
            row = dict(name=small[0], impl=small[1], ok=False, ran=f'{error!r:.60}')
        rows.append(row)
        text = (f'{x:.3g}' if isinstance(x, float) else x or '-' for x in map(row.get, keys))
        print(line(*text) + ('' if row['ok'] else '  WRONG'), flush=True)
    if args.json:
        table = dict(device=str(device), ceilings=ceilings, rows=rows)
        pathlib.Path(args.json).write_text(json.dumps(table, indent=1), 'utf-8')
    wrong = sum(not row['ok'] for row in rows)
    print(f'{wrong} of {len(rows)} wrong' if wrong else 'all of them agree with float64')
    return 1 if wrong else 0

if __name__ == '__main__':
    raise SystemExit(main())
