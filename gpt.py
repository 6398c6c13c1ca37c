# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "tiktoken"]
# ///
# SPDX-License-Identifier: MIT
"""A GPT in one file: tokenizer, model, training and sampling, to be read from top to bottom and then changed.

    python gpt.py train                      learn input.txt, a play, in about three minutes on two CPU cores
    python gpt.py sample                     write more of it
    python gpt.py inspect                    write a page that shows how it learnt
    python gpt.py train --data my.txt        learn something else (files, folders, globs, addresses)
    python gpt.py train --help               every setting; `sample`, `eval`, `ablate`, `export` have theirs

The default model differs from GPT-2 in what has proved itself since; `--arch gpt2 --optimizer adamw` is the original:
  - positions rotate the queries and keys (RoPE) instead of being added to the embedding
  - RMSNorm instead of LayerNorm; queries and keys are normalised too; no biases
  - the MLP is gated (SwiGLU) instead of a GELU
  - keys and values may have fewer heads than queries (GQA)
  - the head has weights of its own, and starts, like every block's output, at zero
  - hidden matrices are trained by Muon, everything else by AdamW

The GPT:          Settings, Tokenizers, Model, Data, Training, Sampling. Here a reader may stop.
What is under it: Text into tokens, Checkpoints. Around it: Looking inside, Weights in and out, Command line.
"""
import time
LOADED = time.monotonic()  # `--minutes` counts from here, so that the seconds it takes to load torch are included
import argparse, atexit, base64, codecs, contextlib, ctypes, difflib, functools, glob, gzip, hashlib, html, io
import itertools, json, math, os, re, shlex, shutil, signal, sys, tempfile, threading, unicodedata, warnings, zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from heapq import heappop, heappush
from itertools import groupby
from operator import itemgetter
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch would like it; nothing here needs it
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

try:  # the fused kernels beside this file; every one of them has a plain equivalent
    import kernels
    NO_KERNELS = "" if hasattr(kernels, "GPT_KERNELS") else "kernels.py is not here"  # Hugging Face has a `kernels` too
except Exception as e:
    NO_KERNELS = "kernels.py is not here" if isinstance(e, ImportError) else f"kernels.py fails: {e!r}"

# Shapes, everywhere: B batch, T time (tokens), C channels (n_embd), H heads, D head size, V vocabulary.

# --- Settings --------------------------------------------------------------------------------------------------------
# Each is declared once, here. The command line, its help and its checks are generated from these fields.

class Error(ValueError):
    """A request that cannot be met (exit code 2), or a run that cannot go on (1): one line that says what to do."""
    def __init__(self, line, code=2):
        super().__init__(line)
        self.code = code

    def _render_traceback_(self):  # what IPython shows of it
        return [f"gpt.Error: {self}"]

def setting(default, help, low=0.0, choices=None):
    """A field with its default, its meaning, and the smallest number or the only words it may be."""
    return field(default=default, metadata={"help": help, "low": low, "choices": choices.split() if choices else None})

@dataclass
class Config:
    """The shape of a model. It is stored in every checkpoint; `GPT(Config(vocab_size=65))` is a model."""
    vocab_size: int = setting(0, "tokens in the vocabulary (0: the tokenizer's; asks `bpe` for this many, 0: 1024)")
    block_size: int = setting(128, "context: the tokens a prediction can see", 1)
    n_layer: int = setting(4, "blocks of attention and MLP; 0 is the bigram table")
    n_head: int = setting(4, "attention heads", 1)
    n_kv_head: int = setting(0, "heads of the keys and values (0: n_head; llama and qwen3, if not given: half of it)")
    head_dim: int = setting(0, "channels of a head (0: n_embd / n_head)")
    n_embd: int = setting(128, "channels of the residual stream", 1)
    mlp_hidden: int = setting(0, "hidden channels of the MLP (0: 4 n_embd; swiglu 8/3 n_embd, a multiple of 32)")
    pos: str = setting("rope", "how positions enter", choices="learned rope none")
    norm: str = setting("rms", "LayerNorm or RMSNorm", choices="layer rms")
    mlp: str = setting("swiglu", "the MLP: relu2 is squared, swiglu gated", choices="gelu relu relu2 swiglu")
    qk_norm: bool = setting(True, "RMSNorm on queries and keys, before they are rotated")
    bias: bool = setting(False, "biases in linear layers and LayerNorm")
    tie: bool = setting(False, "the head shares the embedding's weights")
    rope_theta: float = setting(10000.0, "RoPE: wavelengths go from 2 pi up to almost 2 pi times this, in tokens", 1.0)
    norm_eps: float = setting(1e-6, "added to the mean square inside norms")
    dropout: float = setting(0.0, "share of activations zeroed in training")

    def __post_init__(self):
        head_dim_given, self.head_dim = self.head_dim, self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        gated = math.ceil(self.n_embd * 8 / 3 / 32) * 32  # three matrices of 8/3 hold as much as two of 4
        self.mlp_hidden = self.mlp_hidden or (gated if self.mlp == "swiglu" else 4 * self.n_embd)
        if not head_dim_given and self.n_embd % self.n_head:
            raise Error(f"--n-embd {self.n_embd} is not divisible by --n-head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise Error(f"--n-head {self.n_head} is not a multiple of --n-kv-head {self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise Error(f"RoPE rotates pairs, so the head size {self.head_dim} must be even (--n-embd / --n-head)")
        if not self.dropout < 1:
            raise Error(f"--dropout {self.dropout} must be below 1")

@dataclass
class Source:
    """Where a model comes from."""
    out: str = setting("out", "folder of the run")
    init: str = setting("", "start from a checkpoint, a run's folder, a Hugging Face folder, gpt2, gpt2-medium, ...")

@dataclass
class Machine(Source):
    """And where it runs."""
    device: str = setting("auto", "auto (cuda, else mps, else cpu) or a torch device")
    dtype: str = setting("auto", "precision; auto: bfloat16 or float16 on a GPU that is fast in it, else float32",
                         choices="auto float32 bfloat16 float16 float64")
    attention: str = setting("auto", "attention kernel", choices="auto triton cuda sdpa plain")
    seed: int = setting(1337, "the same seed gives the same run (on a GPU up to rounding)")

@dataclass
class Training(Machine):
    data: list = setting(("input.txt",), "files (.txt, .jsonl, .gz), folders, globs or http(s) addresses")
    size: str = setting("auto", "auto: tiny on a CPU, baby elsewhere",
                        choices="auto tiny baby gpt2 gpt2-medium gpt2-large gpt2-xl")
    arch: str = setting("qwen3", "architecture", choices="bigram gpt2 llama qwen3")
    tokenizer: str = setting("char", "bpe is trained on the data", choices="char bpe gpt2")
    steps: int = setting(None, "steps of the whole run (default: the size's)", 1)
    minutes: float = setting(None, "instead of --steps: minutes of the run, from the start of the command to its end")
    batch_size: int = setting(16, "sequences per forward pass and process", 1)
    accum: int = setting(1, "forward passes per step and process", 1)
    lr: float = setting(3e-3, "AdamW's peak learning rate; Muon's is 10 times that; a tenth with --init")
    optimizer: str = setting("muon", "muon: hidden matrices, and AdamW the rest; adamw: all", choices="muon adamw")
    momentum: float = setting(0.9, "Muon's: what a step keeps of the gradients before it")
    weight_decay: float = setting(0.0, "weight decay of matrices")
    grad_clip: float = setting(1.0, "longest gradient (2-norm) that a step follows; 0 is off")
    warmup: int = setting(0, "steps over which the learning rate rises")
    eval_every: int = setting(None, "steps between evaluations (default: 10 in a run)", 1)
    probe: str = setting(None, "a text to watch the model read while it learns (default: a line of the data; '': off)")
    save_every: int = setting(None, "steps between checkpoints (default: at evaluations; also every five minutes)", 1)
    compile: str = setting("auto", "torch.compile; auto: on CUDA", choices="auto on off")
    checkpoint_activations: bool = setting(False, "keep only each block's input and recompute the rest: less memory")
    resume: bool = setting(False, "go on where the run in --out stopped")
    overwrite: bool = setting(False, "replace the run in --out")

    def __post_init__(self):
        if not self.momentum < 1:
            raise Error(f"--momentum {self.momentum} must be below 1")

@dataclass
class Sampling(Machine):
    prompt: str = setting("", "text to go on from; @FILE reads a file, - stdin")
    tokens: int = setting(500, "tokens to generate")
    temperature: float = setting(0.8, "0 always takes the likeliest; 1 samples the model's own distribution")
    top_k: int = setting(0, "sample among the k likeliest (0: all)")
    top_p: float = setting(1.0, "sample among the likeliest that together have this probability")
    num: int = setting(1, "samples", 1)
    stop: str = setting("", "text to stop at; it is not printed")
    cache: bool = setting(True, "keep keys and values of earlier tokens (the KV cache)")

@dataclass
class Evaluation(Machine):
    data: list = setting((), "text to evaluate on (default: the validation split of the run's data)")
    stride: int = setting(None, "tokens between windows (default: the context; smaller is slower and kinder)", 1)
    batch_size: int = setting(32, "windows per forward pass", 1)
    json: bool = setting(False, "print one JSON object")

# An explicit flag beats --size, which beats --arch, which beats the defaults above.
ARCHS = {
    "bigram": dict(n_layer=0, optimizer="adamw", lr=0.05, weight_decay=0.05),  # the decay smooths what was never seen
    "gpt2": dict(pos="learned", norm="layer", mlp="gelu", qk_norm=False, bias=True, tie=True, norm_eps=1e-5),
    "llama": dict(qk_norm=False),  # these two have half as many key and value heads as query heads, where that is even
    "qwen3": dict(),
}
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
              "gpt2-xl": (48, 25, 1600)}  # layers, heads, channels
SIZES = {
    "tiny": dict(steps=2200),
    "baby": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64, steps=2500, warmup=50),
    **{name: dict(n_layer=L, n_head=H, n_embd=C, block_size=1024, batch_size=16, accum=32, steps=20000, warmup=200,
                  lr=2e-3, momentum=0.95, weight_decay=0.1) for name, (L, H, C) in GPT2_SIZES.items()},
}

def flag(name):
    return "--" + name.replace("_", "-")

def check(given, *classes):
    """Convert and test the settings in the dict `given` by the fields of `classes`."""
    known, checked = {f.name: f for cls in classes for f in fields(cls)}, {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise Error(f"there is no setting {flag(name)}" + (f"; did you mean {flag(close[0])}?" if close else ""))
        kind, rule = known[name].type, known[name].metadata
        if value is None:
            continue
        if kind is list:
            value = [str(v) for v in ([value] if isinstance(value, (str, os.PathLike)) else value)]
        elif kind is bool and not isinstance(value, bool):
            raise Error(f"{flag(name)} is true or false, not {value!r}")
        elif kind is not bool:
            try:
                value, before = kind(value), value
                if kind is not str and not (math.isfinite(value) and value == float(before) and value >= rule["low"]):
                    raise ValueError
            except (ValueError, TypeError, OverflowError):
                noun = "a whole number" if kind is int else "a number"
                raise Error(f"{flag(name)} takes {noun} of at least {rule['low']:g}, not {value}") from None
        if rule["choices"] and value not in rule["choices"]:
            raise Error(f"{flag(name)} is one of {', '.join(rule['choices'])}; not {value!r}")
        checked[name] = value
    return checked

def parts(given, *classes):
    """Split a dict of settings among `classes`; each part holds the fields of one class."""
    return [{f.name: given[f.name] for f in fields(cls) if f.name in given} for cls in classes]

# --- Tokenizers ------------------------------------------------------------------------------------------------------
# A model reads whole numbers. A tokenizer is a list of byte strings, one per number, and a way to cut text into them.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # merges stay within words

class Tokenizer:
    def decode(self, ids):
        """The text of ids (T,); bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.tokens[i] for i in ids.tolist()).decode("utf-8", "replace")

class CharTokenizer(Tokenizer):
    """One token per character. `CharTokenizer("abc").encode("cab").tolist() == [2, 0, 1]`"""
    kind, eot = "char", None

    def __init__(self, chars):
        self.chars = "".join(sorted(set(chars)))
        self.tokens = [c.encode() for c in self.chars]
        codes = torch.tensor([ord(c) for c in self.chars], dtype=torch.long)
        self.table = torch.full((int(codes.max()) + 2 if chars else 1,), -1, dtype=torch.int32)  # code point -> id
        self.table[codes] = torch.arange(len(codes), dtype=torch.int32)

    @staticmethod
    def code_points(text):
        raw = bytearray(text.encode("utf-32-le"))
        return torch.frombuffer(raw, dtype=torch.int32) if raw else torch.zeros(0, dtype=torch.int32)

    @classmethod
    def train(cls, texts):
        seen = torch.zeros(0x110000, dtype=torch.bool)
        for text in texts:
            seen.index_fill_(0, cls.code_points(text).long(), True)
        return cls("".join(map(chr, seen.nonzero().flatten().tolist())))

    def encode(self, text, special=False):
        """Ids of a text as an int32 tensor (T,); a character that is not in the vocabulary is an Error."""
        ids = self.table.index_select(0, self.code_points(text).clamp_(max=len(self.table) - 1))
        if len(ids) and ids.min() < 0:
            raise Error(f"the text has characters that this model has never seen: {self.unknown(text)} (a model "
                        "trained with --tokenizer bpe reads any text)")
        return ids

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def unknown(self, text):
        return " ".join(map(repr, dict.fromkeys(c for c in text if c not in self.chars)))

    def state(self):
        return {"kind": "char", "chars": self.chars}

class BPETokenizer(Tokenizer):
    """Byte-pair encoding: any text can be written; tiktoken does the merging. `tokens` are bytes in the order in which
    merges made them; `special` has names and ids of those that stand for no text, the first of which ends one."""
    kind = "bpe"

    def __init__(self, tokens, pattern=GPT2_PATTERN, special=None, nfc=False):
        self.tokens, self.pattern, self.special = tokens, pattern, special or {"<|endoftext|>": len(tokens) - 1}
        self.eot, self.nfc = next(iter(self.special.values())), nfc
        self.clean = functools.partial(unicodedata.normalize, "NFC") if nfc else str
        self.ranks = {token: i for i, token in enumerate(tokens) if token and i not in self.special.values()}
        self.encoding = tiktoken().Encoding("gpt.py", pat_str=pattern, special_tokens=self.special,
                                            mergeable_ranks=self.ranks)

    @classmethod
    def gpt2(cls):
        try:
            ranks = tiktoken().get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as e:
            raise Error(f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}); once a folder has it, as "
                        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
                        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json), "
                        "set TIKTOKEN_CACHE_DIR to that folder") from None
        return cls(sorted(ranks, key=ranks.get) + [b"<|endoftext|>"])

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges: join the commonest pair of neighbouring tokens, and again, until the vocabulary is full.
        `BPETokenizer.train(["aaa aaa"], 259).tokens[256:] == [b"aa", b"aaa", b"<|endoftext|>"]`"""
        if vocab_size < 257:
            raise Error(f"--vocab-size {vocab_size}: bpe needs at least 257, for 256 bytes and the end of text")
        tiktoken()
        import regex  # comes with tiktoken
        words, short = Counter(), Counter()
        for text in texts:
            words.update(regex.findall(GPT2_PATTERN, text))
        for word, n in words.items():
            for piece in re.findall(b"(?s).{1,64}", word.encode()):
                short[piece] += n
        words = [(list(piece), n) for piece, n in short.items()]
        pairs, where = Counter(), defaultdict(set)  # how often two tokens are neighbours, and in which words
        def count_pairs(i, sign):
            ids, n = words[i]
            for pair in zip(ids, ids[1:]):
                pairs[pair] += sign * n
                where[pair].add(i)
                changed.add(pair)
        tokens, changed, heap = [bytes([i]) for i in range(256)], set(), []
        index = {token: i for i, token in enumerate(tokens)}
        for i in range(len(words)):
            count_pairs(i, 1)
        while len(tokens) < vocab_size - 1:
            for pair in changed:
                heappush(heap, (-pairs[pair], pair))
            changed.clear()
            while heap and -heap[0][0] != pairs[heap[0][1]]:  # out of date; the newer count is there too
                heappop(heap)
            if not heap or not heap[0][0]:
                break
            a, b = heappop(heap)[1]
            new = index.setdefault(tokens[a] + tokens[b], len(tokens))
            tokens += [tokens[a] + tokens[b]] * (new == len(tokens))
            for i in list(where[a, b]):
                count_pairs(i, -1)
                ids, j = words[i][0], 0
                while j < len(ids) - 1:
                    if ids[j] == a and ids[j + 1] == b:
                        ids[j:j + 2] = [new]
                    j += 1
                count_pairs(i, 1)
        return cls(tokens + [b"<|endoftext|>"])

    def encode(self, text, special=False):
        """Ids of a text as an int32 tensor (T,). `<|endoftext|>` is ordinary text, or one token if `special`."""
        allowed, text = set(self.special) if special else set(), self.clean(text)
        ids = self.encoding.encode(text, allowed_special=allowed, disallowed_special=())
        return torch.tensor(ids, dtype=torch.int32)

    def encode_batch(self, texts):
        batch = self.encoding.encode_ordinary_batch([self.clean(text) for text in texts], num_threads=os.cpu_count())
        return [torch.frombuffer(array("i", ids), dtype=torch.int32) for ids in batch if ids]

    def unknown(self, text):
        return ""

    def state(self):
        return {"kind": "bpe", "pattern": self.pattern, "tokens": [token.decode("latin-1") for token in self.tokens],
                "special": self.special, "nfc": self.nfc}

def tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise Error("this tokenizer needs tiktoken: pip install tiktoken") from None
    return tiktoken

def tokenizer_from(state):
    if state["kind"] == "char":
        return CharTokenizer(state["chars"])
    return BPETokenizer([token.encode("latin-1") for token in state["tokens"]], state["pattern"],
                        state.get("special"), state.get("nfc", False))

# --- Model -----------------------------------------------------------------------------------------------------------
# Each token becomes a vector, the residual stream. Every block reads it and adds to it: attention brings what earlier
# tokens know, the MLP works on each token alone. What the last block leaves is compared with one vector per token of
# the vocabulary, the rows of the head: the larger the product, the likelier that token comes next.

def dropout(x, p):
    """Zero a share p of x and scale up the rest. A CPU draws random numbers one at a time: there each one, of 8 bytes,
    decides for 8 activations, which is 4 times as fast as F.dropout, and p becomes a multiple of 1/256."""
    if not p or x.device.type != "cpu":
        return F.dropout(x, p)
    p, noise = min(255, round(256 * p)), torch.randint(-2 ** 63, 2 ** 63 - 1, (x.numel() // 8 + 1,))
    keep = noise.view(torch.uint8)[:x.numel()].view(x.shape) >= p
    return x * keep.to(x.dtype).mul_(256 / (256 - p))

class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x

def plain_attention(q, k, v, dropout_p=0.0, maps=False):
    """softmax(Q K^T / sqrt(D) + mask) V, written out. q (B, H, TQ, D); k, v (B, H_kv, TK, D), H a multiple of H_kv.
    The queries are the last TQ of TK positions. Gives (B, H, TQ, D), and the maps (B, H, TQ, TK) if `maps`."""
    B, H, TQ, D = q.shape
    H_kv, TK = k.shape[1:3]
    mask = torch.full((TQ, TK), -math.inf, dtype=q.dtype, device=q.device).triu(TK - TQ + 1)  # causal: no later key
    q = q.reshape(B * H_kv, -1, D)  # the heads that share a key stand below each other: (B H_kv, H/H_kv TQ, D)
    k, v = k.reshape(B * H_kv, TK, D), v.reshape(B * H_kv, TK, D)
    scores = torch.baddbmm(mask.repeat(H // H_kv, 1), q, k.mT, alpha=D ** -0.5)  # (B H_kv, H/H_kv TQ, TK)
    probs = scores.softmax(dim=-1)
    out = (dropout(probs, dropout_p) @ v).view(B, H, TQ, D)
    return (out, probs.view(B, H, TQ, TK)) if maps else out

def fused_attention(q, k, v, dropout_p=0.0):
    """The same by torch's own fused kernels."""
    TQ, TK, mask = q.size(2), k.size(2), None
    if 1 < TQ < TK:  # is_causal would align the first query with the first key
        mask = torch.ones(TQ, TK, dtype=torch.bool, device=q.device).tril(TK - TQ)
    groups = q.size(1) // k.size(1)
    if groups > 1 and q.device.type != "cpu":  # few kernels for GPUs know groups
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=TQ == TK, enable_gqa=groups > 1)

def use_attention(model, impl, dtype):
    """Let the model's blocks call the attention that suits it best, or `impl`; returns what that is, and why."""
    if model.config.n_layer == 0:
        return "no attention"
    device, products = next(model.parameters()).device, torch.get_float32_matmul_precision()
    case, drops = (device, dtype, model.config.head_dim), model.training and model.config.dropout > 0
    if impl == "auto" and device.type == "cpu" and model.config.block_size <= 256 and products == "medium":
        attend, reason = plain_attention, "plain attention (the fastest to train on a CPU up to context 256)"
    elif impl == "plain":
        attend, reason = plain_attention, "plain attention"
    elif impl in ("triton", "cuda") and (why := NO_KERNELS or kernels.missing(impl, *case, drops)):
        raise Error(f"--attention {impl}: {why}")
    elif not NO_KERNELS:
        attend, reason = functools.partial(kernels.attention, impl=impl), "{} attention ({})".format(
            *kernels.describe(*case, impl, drops))
    else:
        attend, reason = fused_attention, f"torch's attention ({NO_KERNELS})"
    decode = None
    if device.type == "cuda" and not model.training and not NO_KERNELS and impl != "plain":
        impl = "auto" if impl == "cuda" else impl
        if model.config.block_size <= 2048 or kernels.describe(*case, impl)[0] == "triton":  # others read a whole cache
            decode = functools.partial(kernels.decode_attention, impl=impl)
    for block in model.blocks:
        block.attn.attend, block.attn.decode = attend, decode
    return reason

def make_norm(config, size):
    if config.norm == "layer":
        return nn.LayerNorm(size, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(size, config.norm_eps)

def rotate(x, cos, sin):
    """RoPE: turn each pair (x[i], x[i + D/2]) by its position's angle. The dot product of a query and a key, both so
    turned, depends on how far apart they stand, not on where. x (B, H, T, D); cos, sin (T, D), sin with its signs."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)  # (a, b) -> (a cos - b sin, b cos + a sin)

class Attention(nn.Module):
    """Each token asks with a query; every earlier token, and the token itself, answers with a key; the better the two
    match, by their dot product, the more of that token's value is taken over. Several heads do so side by side."""
    def __init__(self, config):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.attend = fused_attention  # any function of q, k, v and dropout_p; `use_attention` picks one
        self.decode = None  # the same for one new token and a whole cache; only a GPU has it, for `captured`

    def forward(self, x, rotary, cache, at, lengths):
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q.type_as(x)), self.k_norm(k.type_as(x))  # under autocast the weights are in float32
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), and twice (B, H_kv, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = q.type_as(v), k.type_as(v)
        if cache is not None:  # write these keys and values behind the earlier ones, and attend to all of them
            cache[:, :, :, at] = torch.stack((k, v))
            k, v = cache if lengths is not None else cache[:, :, :, :at.stop]
        if lengths is not None:
            y = self.decode(q, k, v, lengths)
        else:
            y = self.attend(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.gate = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2's GELU is the approximation
        x = F.relu(self.up(x))
        return self.down(x.square() if self.kind == "relu2" else x)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config, config.n_embd), Attention(config)
        self.mlp_norm, self.mlp = make_norm(config, config.n_embd), MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None, at=None, lengths=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rotary, cache, at, lengths))  # the residual stream is x:
        return x + self.dropout(self.mlp(self.mlp_norm(x)))                             # blocks only ever add to it

@dataclass
class Cache:
    """The keys and values of the first `length` tokens, (n_layer, 2, B, H_kv, block_size, D). In a CUDA graph, where
    nothing but tensors may change, `lengths` (B,) counts them instead, the token on its way included."""
    kv: torch.Tensor
    length: int = 0
    lengths: torch.Tensor = None

class GPT(nn.Module):
    """Ids (B, T) to logits over the next token (B, T, V)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.head.weight = self.embed.weight
        if config.pos == "rope":
            D = config.head_dim
            angles = torch.outer(torch.arange(config.block_size), config.rope_theta ** (-torch.arange(0, D, 2) / D))
            self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)  # (block_size, D)
            self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=1), persistent=False)
        self.checkpoint_activations = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Start where the first loss is ln(V): an untied head, and each block's two outputs, at zero; a tied head
        small, with the 2 n_layer outputs that add up in the stream scaled down by sqrt(2 n_layer), as in GPT-2."""
        c = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if c.tie else module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=0.02 if c.tie else 0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        for block in self.blocks:
            for output in (block.attn.out, block.mlp.down):
                output.weight.mul_((2 * c.n_layer) ** -0.5 if c.tie else 0.0)
        if not c.tie:
            self.head.weight.zero_()

    def new_cache(self, B):
        c = self.config
        return Cache(self.embed.weight.new_empty(c.n_layer, 2, B, c.n_kv_head, c.block_size, c.head_dim))

    def forward(self, idx, targets=None, cache=None, last=False):
        """idx (B, T) int64 -> (logits, loss). With targets (B, T), logits is None and loss the mean in nats, over
        targets that are not -1. Without, loss is None and logits (B, T, V), or (B, 1, V) if `last`. With a cache, idx
        are the tokens after those that it holds."""
        start, lengths = (cache.length, cache.lengths) if cache else (0, None)
        T = idx.size(1)
        at = slice(start, start + T) if lengths is None else lengths[:1].long() - 1  # the positions of idx
        x = self.embed(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[at]
        x = self.dropout(x)
        rotary = (self.cos[at], self.sin[at]) if self.config.pos == "rope" else None
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, cache.kv[i] if cache else None, at, lengths)
        if cache:
            cache.length += T
        if targets is not None:
            return None, head_loss(self.norm(x), self.head.weight, targets)
        return self.head(self.norm(x[:, -1:] if last else x)), None

class Bigram(nn.Module):
    """The simplest language model: row i of a table holds the logits of what follows token i. It sees nothing else."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)

    def new_cache(self, B):
        return Cache(self.table.weight)

    def forward(self, idx, targets=None, cache=None, last=False):
        logits = self.table(idx[:, -1:] if last else idx)  # (B, T, V)
        if cache:
            cache.length += idx.size(1)
        if targets is None:
            return logits, None
        return None, logits_loss(logits.flatten(0, 1), targets.flatten())

def head_loss(x, weight, targets):
    """Mean cross-entropy of x (B, T, C) @ weight^T (C, V) against targets (B, T), of which -1 do not count: minus the
    log of the probability given to the token that came. 0 is certainty, ln(V) is knowing nothing."""
    x, targets = x.flatten(0, 1), targets.flatten()
    if not NO_KERNELS:
        return kernels.linear_cross_entropy(x, weight, targets, ignore_index=-1)  # never holds all the logits
    return logits_loss(F.linear(x, weight), targets)

def logits_loss(logits, targets):
    """Mean cross-entropy of logits (N, V) against targets (N,), computed in float32 at least."""
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets, ignore_index=-1)

def build(config):
    return GPT(config) if config.n_layer else Bigram(config)

def count(model):
    return sum(p.numel() for p in model.parameters())

# --- Data ------------------------------------------------------------------------------------------------------------
# A text is one long row of tokens on the disk; section Text into tokens makes it. A step of training looks at windows
# of it here and there, an evaluation at all of it, window by window.

def split(tokens):
    """The first nine tenths train, the rest validates; too little text to validate on gives an empty second part."""
    n = max(2, int(0.9 * len(tokens)))
    return tokens[:n], tokens[n:]

def training_windows(tokens, T, shape, rank, seed, step):
    """This process's windows (accum x batch, T + 1) of one step: T inputs each, which shifted by one are the targets.
    `shape` is (accum, processes, batch). A run's n-th window begins at n times the golden ratio, as a share of the text
    with whole numbers dropped: wherever a run stops, its windows lie nearly evenly, where random ones leave gaps. The
    seed shifts them all. So no run has to remember where it was."""
    n, shift = math.prod(shape), seed * 2 ** 0.5 % 1
    places = (torch.arange(step * n, step * n + n, dtype=torch.float64) * 0.6180339887498949 + shift) % 1
    starts = (places * (len(tokens) - T)).long().view(shape)[:, rank].flatten()
    return torch.stack([tokens[i:i + T + 1] for i in starts.tolist()]).long()

@torch.no_grad()
def mean_loss(model, tokens, stride=None, batch_size=32, limit=None):
    """Mean loss in nats over a text (N,), each of its N - 1 predictions once: windows of block_size, every `stride`
    tokens; after the first, a window counts only what the one before it has not. At most `limit`, evenly spread."""
    T, N = model.config.block_size, len(tokens)
    T = min(T, N - 1)
    stride = min(stride or T, T)
    starts = torch.arange(0, max(1, N - 1 - T + stride), stride)
    if limit and len(starts) > limit:
        starts = starts[torch.linspace(0, len(starts) - 1, limit).long()]
    device, training, total, counted = next(model.parameters()).device, model.training, 0.0, 0
    model.eval()
    for start in starts.split(batch_size):
        ids = [tokens[i:i + T + 1].long() for i in start.tolist()]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)  # the last may be shorter
        targets = ids[:, 1:].clone()
        targets[start > 0, :T - stride] = -1
        n = int((targets >= 0).sum())
        total += model(ids[:, :-1].clamp(min=0).to(device), targets.to(device))[1].item() * n
        counted += n
    model.train(training)
    return total / counted, counted

# --- Training --------------------------------------------------------------------------------------------------------
# Look at a few windows of the text, measure the loss of every prediction in them, step against its gradient; again.

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for a matrix with singular values S in U S V^T, step along U V^T, which moves all its
    directions equally. Newton-Schulz iterations find U V^T by products alone (Jordan et al., 2024,
    kellerjordan.github.io/posts/muon). Matrices of one shape are stacked and go through them together."""
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                grad = torch.stack([p.grad for p in params])
                state = self.state[params[0]]
                momentum = state["momentum"] = state["momentum"] if state else torch.zeros_like(grad)
                momentum.lerp_(grad, 1 - group["momentum"])
                update = orthogonalise(grad.lerp(momentum, group["momentum"]))  # Nesterov: look ahead by one step
                lr = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-lr)

def orthogonalise(x, steps=5):
    """x (n, rows, columns) -> about the nearest matrices with all singular values 1 (they end between 0.7 and 1.2)."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:  # no element is above 1 any more, so float16 will do where bfloat16 is slow
        x = x.to(torch.bfloat16 if torch.cuda.get_device_capability(x.device) >= (8, 0) else torch.float16)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):  # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x moves singular values towards 1
        xx = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x

def make_optimizers(model, s):
    """Muon for the blocks' matrices, AdamW for embeddings, head and vectors; or AdamW for all."""
    blocks = model.blocks.parameters() if s.optimizer == "muon" and model.config.n_layer else []
    hidden = [p for p in blocks if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    betas = (0.8, 0.95) if hidden else (0.9, 0.95)
    fused = rest[0].device.type != "mps"
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=s.lr, betas=betas, fused=fused)
    optimizers = [adamw] + ([Muon(hidden, 10 * s.lr, s.momentum, s.weight_decay)] if hidden else [])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers

def lr_share(step, progress, warmup):
    """The learning rate as a share of its peak: up over `warmup` steps, then down in a line to zero at the end."""
    return min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1.0 - progress)

def pick_device(name):
    """auto -> cuda, mps or cpu, in that order."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise Error(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from None
    return device

def pick_dtype(name, device):
    """auto -> the precision that this device is fast in, and why."""
    if name == "float64" and device.type == "mps":
        raise Error("--dtype float64: MPS does not have it")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda" or torch.version.hip:
        amx = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
        return torch.float32, f"auto on {device.type}" + ", whose AMX units multiply in bfloat16" * bool(amx)
    major, minor = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    return dtype, f"auto on compute capability {major}.{minor}"

def precision(device, dtype):
    """Matrix products in `dtype`, the rest as autocast knows to be safe; float32 and float64 as they are."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype) if half else contextlib.nullcontext()

@contextlib.contextmanager
def listening(run):
    """Ctrl-C or SIGTERM: finish the step and save. A second one leaves at once."""
    def stop(number, frame):
        run.signal = number
        signal.signal(number, handlers[number])
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

def train(on_eval=None, started=None, **given):
    """Train a model. Keyword arguments are the flags of `python gpt.py train`; returns the last metrics as a dict.
    `on_eval(run)` (`watch`, unless probe="") is called after every evaluation, at up to twenty even distances,
    and at steps 1, 2, 4, 8, ...; time counts from `started`."""
    given = check(given, Config, Training)
    if {"steps", "minutes"} <= given.keys():
        raise Error("--steps and --minutes: give one of them")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux: keep freed memory for the next step,
            libc = ctypes.CDLL(None)                                   # instead of asking the kernel for it anew
            libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 25)       # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        run = Run(given, started or time.monotonic(), stack)
        stack.enter_context(listening(run))
        try:
            return run.loop(on_eval or (watch if run.s.probe != "" else None))
        except RuntimeError as e:
            if run.world == 1:
                raise
            raise Error(f"process {run.rank} cannot go on; perhaps another one has died ({first_line(e)})", 1) from None

class Run:
    """A training run. `loop` says what it does; the methods after it say how; those before it make it ready."""

    def __init__(self, given, started, stack):
        self.out, self.started, self.signal, self.saved_at = Path(given.get("out", "out")), started, 0, time.monotonic()
        self.step, self.skipped, self.busy, self.reserve, self.seconds_before = 0, 0, 0.0, 0.0, 0.0
        self.history, self.last, self.notes = [], {"train_loss": None, "lr": 0.0, "grad_norm": None}, {}
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(given.get("device", "auto"))
        if self.world > 1:
            # torchrun's store outlives restarts: without a prefix, a process may find there the address of a dead one.
            store, rank, world = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend, patience = "nccl" if self.device.type == "cuda" else "gloo", timedelta(days=1)  # to tokenise
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
            stack.callback(dist.destroy_process_group)
        if self.rank == 0:
            stack.enter_context(locked(self.out))
        settings, checkpoint, weights, tokenizer = settle(given, self.device)
        config, training = parts(settings, Config, Training)
        self.s = Training(**training)
        if self.s.dtype == "auto":
            # On a CPU "medium" lets oneDNN multiply matrices instead of MKL: twice as fast on AMD, and float32 all the
            # same, except with AMX units, which take bfloat16. On a GPU "high" is TF32.
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("medium" if self.device.type == "cpu" else "high")
        self.read_data(config, tokenizer, new=weights is None)
        if checkpoint and checkpoint["data"]["fingerprint"] != self.fingerprint:
            raise Error(f"--resume: the run in {self.out} was trained on other data than {', '.join(self.s.data)}")
        self.make_model(Config(**config), weights)
        if checkpoint:
            self.restore(checkpoint)
            if self.s.steps and self.step >= self.s.steps and self.rank == 0:
                notice(f"this run is complete; --resume --steps N, with N above {self.step}, makes it longer")
        if self.rank == 0:
            for name in ("best.pt", "ckpt.pt", "ckpt.prev.pt") if not checkpoint else ():
                (self.out / name).unlink(missing_ok=True)
            for name in ("log.jsonl", "probe.jsonl"):
                keep_lines(self.out / name, self.step + self.evaluated())
        self.progress = max(0, self.step - 1) / self.s.steps if self.s.steps else 0.0
        self.begun, self.logged = (self.progress, time.monotonic()), (self.step, 0.0)

    def read_data(self, config, tokenizer, new):
        s = self.s
        if self.rank:  # the first process tokenises; the others wait, and find it done
            dist.barrier()
        asked = config.get("vocab_size", 0)
        tokens, self.tokenizer, self.fingerprint = load_tokens(s.data, tokenizer or s.tokenizer, asked)
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        self.train_tokens, self.val_tokens = split(tokens)
        V, block_size = len(self.tokenizer.tokens), config.get("block_size", Config.block_size)
        self.T = min(block_size, len(self.train_tokens) - 1)
        if self.T < block_size:
            notice(f"the text has {len(self.train_tokens)} tokens to train on, so the context shrinks to {self.T}")
        if len(self.val_tokens) < 2 and self.rank == 0:
            notice("the text is too short to keep a tenth of it for validation")
        if asked and asked != V:
            if tokenizer or s.tokenizer != "bpe":
                raise Error(f"--vocab-size {asked}: this tokenizer has {V} tokens")
            notice(f"the text has no more pairs to join: the vocabulary ends at {V}")
        if new:
            config.update(vocab_size=V, block_size=self.T)

    def make_model(self, config, weights):
        s = self.s
        torch.manual_seed(s.seed)
        self.raw = build(config)
        if weights:
            self.raw.load_state_dict(weights)
        self.dtype, why = pick_dtype(s.dtype, self.device)
        self.raw.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.raw.checkpoint_activations = s.checkpoint_activations
        attention = use_attention(self.raw, s.attention, self.dtype)
        self.optimizers = make_optimizers(self.raw, s)
        # float16 loses small gradients: the loss is multiplied before the backward pass, the gradients divided after it
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.micro = s.batch_size  # sequences in one forward pass
        self.model = self.raw
        if s.compile == "on" or (s.compile == "auto" and self.device.type == "cuda"):
            x = self.windows(0)[:s.batch_size, 1:].to(self.device).contiguous()
            self.model = compiled(self.raw, x, precision(self.device, self.dtype))
        if self.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        if self.rank == 0:
            V = config.vocab_size
            say(f"{self.device}, {str(self.dtype)[6:]} ({why}), {attention}\n{count(self.raw):,} parameters, {V:,} "
                f"tokens in the vocabulary: a model that knows nothing has a loss of {math.log(V):.2f}")

    def restore(self, checkpoint):
        self.raw.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        if checkpoint["scaler"]:  # a run in another precision has none
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.seconds_before = checkpoint["step"], checkpoint["seconds"]
        self.reserve = checkpoint.get("reserve", 0.0)
        self.history, self.last = checkpoint["history"], checkpoint["last"]

    def loop(self, on_eval):
        times = 10 if self.s.steps else min(10, 1 + int(4 * self.s.minutes))  # a short run has no time for more
        while True:
            before, (self.progress, stop) = self.progress, self.agree()
            done, seen = self.progress >= 1, self.evaluated()  # seen: before it was resumed here
            def due(every, times):  # every so many steps, or else so many times in a run
                return self.step % every == 0 if every else int(before * times) < int(self.progress * times)
            evaluating = not (stop or seen) and (done or self.step == 0 or due(self.s.eval_every, times))
            if self.rank == 0:
                begun = time.monotonic()
                if evaluating:
                    self.evaluate()
                if evaluating or due(None, 500) and not seen:
                    self.log()
                early = self.step & (self.step - 1) == 0  # 1, 2, 4, 8, ...
                if on_eval and not (stop or seen) and (evaluating or early or due(None, 2 * times)):
                    on_eval(self)
                if evaluating:  # seconds that the last evaluation and the saving after it will take
                    self.reserve = 1.25 * (time.monotonic() - begun) + 0.5
                saving = due(self.s.save_every or self.s.eval_every, times) or time.monotonic() - self.saved_at > 300
                if done or stop or saving:
                    self.save(final=done or stop)
            if done or stop:
                return self.finish()
            begun = time.monotonic()
            self.update()
            self.busy += time.monotonic() - begun

    def agree(self):
        """-> (share of the run that is behind us, signal to stop or 0): the same in all processes, so that all take
        the first one's clock and stop after the same step."""
        s, left = self.s, 60 * (self.s.minutes or 0) - self.reserve
        progress = self.step / s.steps if s.steps else self.seconds() / left if left > 0 else 1.0
        if self.world > 1:
            both = torch.tensor([progress * (self.rank == 0), self.signal], dtype=torch.float64, device=self.device)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            progress, signal = both.tolist()
            self.signal = self.signal or int(signal)
            return progress, int(signal)
        return progress, self.signal

    def evaluated(self):
        """Whether the model has been evaluated as it is after this step."""
        return bool(self.history) and self.history[-1][0] == self.step

    def seconds(self):
        return self.seconds_before + time.monotonic() - self.started

    def windows(self, step):
        shape = self.s.accum, self.world, self.s.batch_size
        return training_windows(self.train_tokens, self.T, shape, self.rank, self.s.seed, step)

    def update(self):
        """One step: the gradient of the loss over batch_size x accum x processes windows, then the optimizers.
        All chance in it comes from (seed, step, rank), so a resumed run repeats it exactly."""
        s, rate = self.s, lr_share(self.step, self.progress, self.s.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        torch.manual_seed(s.seed + 7919 * self.step + 104_729 * self.rank)  # for dropout
        try:
            loss = self.backward(self.windows(self.step))
        except torch.OutOfMemoryError:
            if self.step or self.micro == 1 or self.world > 1:
                raise Error("out of memory: try --batch-size half as large with --accum twice as large, "
                            "--checkpoint-activations, a smaller --block-size or --size", 1) from None
            loss, self.micro = None, (self.micro + 1) // 2
            notice(f"out of memory: trying {self.micro} sequences at a time; a step still sees as many")
        if loss is None:  # try again, now that the exception no longer holds on to the memory
            self.raw.zero_grad()
            return self.update()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), s.grad_clip or math.inf)
        loss, norm = torch.stack((loss, norm.to(loss))).tolist()
        self.skipped = 0 if math.isfinite(loss + norm) else self.skipped + 1
        if not self.skipped:
            for optimizer in self.optimizers:
                optimizer.step()
        elif self.skipped == 20:
            raise Error("20 steps in a row had no finite loss and gradient: try a lower --lr, a longer --warmup or "
                        f"--dtype float32; the last checkpoint in {self.out} is from before", 1)
        elif not self.scaler.is_enabled():  # in float16 it is how the scaler finds the largest scale that works
            notice(f"step {self.step}: the loss or its gradient is not finite; the step is skipped")
        if self.scaler.is_enabled():
            self.scaler.update()
        self.raw.zero_grad()
        self.step += 1
        self.last = {"train_loss": loss, "lr": s.lr * rate, "grad_norm": norm}

    def backward(self, windows):
        """Accumulate the gradient of the mean loss over windows (rows, T + 1); returns that loss."""
        windows = windows.to(self.device)  # all at once: a copy waits until the GPU has nothing else to do
        total, passes = torch.zeros((), device=self.device), windows.split(self.micro)
        for rows in passes:
            x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            if self.world > 1:  # gradients travel between the processes once, in the last pass
                self.model.require_backward_grad_sync = rows is passes[-1]
            with precision(self.device, self.dtype):
                loss = self.model(x, y)[1] * (len(rows) / len(windows))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        return total / self.world

    def evaluate(self):
        """The validation loss, over windows that are always the same. The best model so far is kept."""
        val = None
        best = min((loss for step, loss in self.history if loss is not None and step), default=math.inf)
        if len(self.val_tokens) > 1:
            with precision(self.device, self.dtype):
                tokens = 1 << (15 if self.device.type == "cpu" else 18)
                limit = max(1, tokens // self.T)
                val, _ = mean_loss(self.raw, self.val_tokens, batch_size=self.micro, limit=limit)
            recent = [loss for _, loss in self.history[-3:]] + [val]
            if len(recent) == 4 and all(a < b for a, b in zip(recent, recent[1:])):
                notice("the validation loss rose three times in a row: the model begins to memorise; "
                       f"best.pt has {best:.4f}")
        self.history.append((self.step, val))
        if val is not None and val < best and self.step:
            self.save_as("best.pt", self.state())

    def log(self):
        """A line of log.jsonl for programs, and one of progress for people."""
        evaluated = self.evaluated()
        per_step, (logged, busy) = self.s.batch_size * self.s.accum * self.world * self.T, self.logged
        speed = round((self.step - logged) * per_step / (self.busy - busy)) if self.step > logged else None
        self.logged = self.step, self.busy
        line = {"step": self.step, "tokens": self.step * per_step, "seconds": round(self.seconds(), 3), **self.last,
                "tokens_per_second": speed, "memory_mb": memory_mb(self.device)}
        val = self.history[-1][1] if self.history else None
        append_line(self.out / "log.jsonl", line | {"val_loss": val} if evaluated else line)
        if evaluated or sys.stdout.isatty():
            share = min(1.0, self.progress)
            left = (time.monotonic() - self.begun[1]) / max(1e-9, share - self.begun[0]) * (1 - share)
            clock = f"  {speed:,} tokens/s  {int(left) // 60}:{int(left) % 60:02d} left" if speed else ""
            text = (f"[{'#' * int(20 * share):.<20}] step {self.step}  train {show(self.last['train_loss'])}  "
                    f"val {show(val)}{clock}")
            say("\r\x1b[K" + text if sys.stdout.isatty() else text, end="\n" if evaluated else "")

    def state(self):
        """What a checkpoint holds for sampling; `save` adds what only training needs."""
        return {"format": FORMAT, "model": self.raw.state_dict(), "tokenizer": self.tokenizer.state(),
                "step": self.step, "settings": {"config": asdict(self.raw.config), "training": asdict(self.s)},
                "val_loss": self.history[-1][1] if self.history else None}

    def save(self, final):
        self.saved_at = time.monotonic()
        self.save_as("ckpt.pt", self.state() | {
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers], "scaler": self.scaler.state_dict(),
            "rng": self.s.seed, "data": {"fingerprint": self.fingerprint, "position": self.step},
            "seconds": self.seconds(), "reserve": self.reserve, "history": self.history, "last": self.last}, final)

    def save_as(self, name, state, final=False):
        try:
            save_checkpoint(state, self.out / name)
        except OSError as e:
            if final:
                raise Error(f"the last checkpoint could not be saved: {e}", 1) from None
            notice(f"{e}; training goes on")

    def finish(self):
        if self.world > 1:  # nobody leaves before the first process has saved
            self.model = self.raw
            dist.barrier()
        if self.rank == 0 and self.signal:
            notice(f"stopped at step {self.step} and saved; to go on: {command('train', resume=True, out=self.out)}")
        elif self.rank == 0:
            say(f"done in {self.seconds():.0f} seconds; now: {command('sample', out=self.out)}")
        return {"step": self.step, **self.last, "val_loss": self.history[-1][1] if self.history else None,
                "seconds": self.seconds(), "signal": self.signal}

# --- Sampling --------------------------------------------------------------------------------------------------------
# Ask the model for the distribution of the next token, draw one from it, append it, and ask again.

def sample_next(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw (B,) ids from logits (B, V). Chance is the CPU's, in float32: every device draws the same from the same."""
    greedy = temperature < 1e-6
    logits = logits if greedy and logits.is_cuda else logits.float().cpu()
    best, ids = logits.max(dim=-1)  # NaN if any is; of several equal ones the first
    if not best.isfinite().all():
        raise Error("the model's logits are not finite: trained too fast, or half precision is too coarse for it", 1)
    if greedy:
        return ids
    logits, V = logits / temperature, logits.size(-1)
    top_k = top_k if top_k < V else 0
    if not top_k and top_p >= 1:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    values, ids = logits.topk(top_k or min(V, 1024), dim=-1)  # likeliest first
    probs = (values - (values if top_k else logits).logsumexp(dim=-1, keepdim=True)).exp()
    if not top_k and probs.sum(dim=-1).min() < top_p:  # rare, and slow for a large vocabulary: sort all of it
        values, ids = logits.sort(dim=-1, descending=True)
        probs = values.softmax(dim=-1)
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0.0  # top-p: a token stays if those before it have less than p
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]

@torch.inference_mode()
def generate(model, idx, tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, use_cache=True):
    """Continue idx (B, T) by up to `tokens` tokens, yielding each as ids (B,) on the CPU. When a new token finds the
    context full, the newest block_size // 2 tokens become the context, with a cache or without."""
    block_size = model.config.block_size
    idx = new = idx[:, -block_size:]
    cache = model.new_cache(len(idx)) if use_cache else None
    step = captured(model, cache) if use_cache and tokens > 64 else None  # for a few it is not worth the time it takes
    for _ in range(tokens):
        if step and cache.length:
            logits = step(new)
        else:
            logits, _ = model(new if use_cache else idx, cache=cache, last=True)  # (B, 1, V)
        ids = sample_next(logits[:, -1], temperature, top_k, top_p, generator)
        yield ids.cpu()
        new = ids[:, None].to(idx.device)
        idx = torch.cat((idx, new), dim=1)
        if idx.size(1) > block_size:
            idx = new = idx[:, -max(1, block_size // 2):]
            if use_cache:
                cache.length = 0

def captured(model, cache):
    """A step by one token a row as a CUDA graph, in which hundreds of launches become one: a function of ids (B, 1),
    which gives the next logits (B, 1, V), or None where there is no GPU, or where it does not do what `model` does."""
    if not (model.config.n_layer and model.blocks[0].attn.decode):
        return None
    B, device = cache.kv.size(2), cache.kv.device
    ids, lengths = torch.zeros(B, 1, dtype=torch.long, device=device), torch.ones(B, dtype=torch.int32, device=device)
    def forward():
        return model(ids, cache=Cache(cache.kv, lengths=lengths), last=True)[0]
    def step(new):
        ids.copy_(new)
        lengths.fill_(cache.length + 1)
        graph.replay()
        cache.length += 1
        return logits
    cache.kv.zero_()  # some kernels weigh what is not written yet with zero, and zero times NaN is NaN
    try:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            forward()  # what is made at a first call, such as compiled kernels, must be there
            with torch.cuda.graph(graph, stream=side):
                logits = forward()
        torch.cuda.current_stream(device).wait_stream(side)
        few = torch.arange(min(4, model.config.block_size), device=device).expand(B, -1) % model.config.vocab_size
        plain = model(few, cache=Cache(cache.kv), last=True)[0]
        made = [step(new) for new in few.split(1, dim=1)][-1]
        error = kernels.relative_error(made, plain)
        if not error < 0.05:  # half precisions come to about 0.01
            raise RuntimeError(f"its logits are {error:.2g} away")
        return step
    except Exception as e:  # a driver may fail in any way
        torch.cuda.synchronize(device)
        notice(f"no CUDA graph here ({first_line(e)}); going on without, more slowly")
    finally:
        cache.length = 0

def stream_text(tokenizer, ids, stop=""):
    """Ids one by one -> text piece by piece: never half a character, nothing of `stop` nor after it."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for i in itertools.chain(ids, [None]):
        held += decoder.decode(tokenizer.tokens[i]) if i is not None else decoder.decode(b"", final=True)
        if stop and stop in held:
            yield held[:held.index(stop)]
            return
        begun = next(n for n in range(len(stop), -1, -1) if held.endswith(stop[:n])) if i is not None else 0
        yield held[:len(held) - begun]  # what may be the beginning of `stop` waits for the next token
        held = held[len(held) - begun:]

def sample(**given):
    """Generate text: prints it as it comes, and returns the list of texts, each with its prompt. Keyword arguments are
    the flags of `python gpt.py sample`."""
    s = Sampling(**check(given, Sampling))
    if not 0 < s.top_p <= 1:
        raise Error(f"--top-p {s.top_p} must be above 0 and at most 1")
    model, tokenizer, _ = open_model(s, half=True)
    prompt, ids = read_prompt(s.prompt, tokenizer)
    if len(ids) > model.config.block_size:
        notice(f"the prompt has {len(ids)} tokens; the model sees the newest {model.config.block_size}")
    ids = ids if len(ids) else first_token(tokenizer)
    idx = ids.long().expand(s.num, -1).to(next(model.parameters()).device)
    made, begun, generator = 0, time.monotonic(), torch.Generator().manual_seed(s.seed)
    def rows():
        nonlocal made
        ended = torch.zeros(s.num, dtype=torch.bool)
        for row in generate(model, idx, s.tokens, s.temperature, s.top_k, s.top_p, generator, s.cache):
            made += s.num
            ended |= row == (-1 if tokenizer.eot is None else tokenizer.eot)
            if ended.all():
                return
            yield row.tolist()
    columns = [(row[0] for row in rows())] if s.num == 1 else list(zip(*rows())) or [()] * s.num
    texts = []
    for n, column in enumerate(columns):
        texts.append(prompt)
        say("---\n" * (n > 0) + prompt, end="")
        for text in stream_text(tokenizer, itertools.takewhile(lambda i: i != tokenizer.eot, column), s.stop):
            say(text, end="")
            texts[-1] += text
        say("")
    notice(f"{made / max(1e-9, time.monotonic() - begun):,.0f} tokens/s")
    return texts

def first_token(tokenizer):
    """What a text without a prompt begins with, as a document does, or a line: ids (1,)."""
    return torch.tensor([tokenizer.eot if tokenizer.eot is not None else max(0, tokenizer.chars.find("\n"))])

def read_prompt(prompt, tokenizer):
    """--prompt -> (text, ids (T,)). What the vocabulary lacks is named and left out."""
    if prompt == "-":
        prompt = sys.stdin.read()
    elif prompt.startswith("@"):
        with reading(prompt[1:]):
            prompt = Path(prompt[1:]).read_text("utf-8")
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if unknown := tokenizer.unknown(prompt):
        notice(f"left out of the prompt, for the model has never seen them: {unknown}")
        prompt = "".join(c for c in prompt if c in tokenizer.chars)
    return prompt, tokenizer.encode(prompt, special=True)

def load_source(s):
    return load_model(s.init) if s.init else from_checkpoint(load_run(Path(s.out)), s.out)

def open_model(s, half=False):
    """The model that --init or --out names, on its device -> (model, tokenizer, the precision to call it in). If
    `half`, the weights themselves are in a half precision: sampling, which mostly waits for them, is faster so."""
    device = pick_device(s.device)
    model, tokenizer = load_source(s)
    need_tokenizer(tokenizer, s.init)
    dtype, _ = pick_dtype(s.dtype, device)
    model.to(device, dtype if half or dtype == torch.float64 else torch.float32)
    use_attention(model, s.attention, dtype)
    return model, tokenizer, precision(device, dtype)

def evaluate(**given):
    """Loss of a model over a text, each token predicted once -> dict. Keyword arguments are the flags of `eval`."""
    s = Evaluation(**check(given, Evaluation))
    model, tokenizer, context = open_model(s)
    if not s.data and s.init:
        raise Error("eval --init needs --data")
    data = s.data or load_run(Path(s.out))["settings"]["training"]["data"]
    tokens = load_tokens(data, tokenizer)[0]
    tokens = tokens if s.data else split(tokens)[1]
    if len(tokens) < 2:
        raise Error("fewer than two tokens to evaluate on")
    with context:
        loss, counted = mean_loss(model, tokens, s.stride, s.batch_size)
    lengths = torch.tensor([len(token) * (i != tokenizer.eot) for i, token in enumerate(tokenizer.tokens)])
    count_bytes = sum(int(lengths[part.long()].sum()) for part in tokens[1:].split(1 << 20))
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)),
              "bits_per_byte": loss * counted / math.log(2) / max(1, count_bytes), "tokens": counted,
              "stride": min(s.stride or math.inf, model.config.block_size)}
    say(json.dumps(result) if s.json else f"loss {loss:.4f} nats, perplexity {result['perplexity']:.3f}, "
        f"{result['bits_per_byte']:.4f} bits per byte ({counted:,} tokens, stride {result['stride']})")
    return result

# --- Text into tokens ------------------------------------------------------------------------------------------------
# Text is read in pieces, cut into tokens once, and kept on disk as whole numbers, from where it is mapped into memory.

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def cache_folder():
    """$GPT_CACHE, else ~/.cache/gpt, else, where that cannot be written, a folder for this process alone."""
    try:
        folder = Path(os.environ.get("GPT_CACHE") or Path.home() / ".cache" / "gpt")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as e:
        return temporary_folder(f"{folder}: {e.strerror}")
    except RuntimeError:
        return temporary_folder("this user has no home folder")

@functools.cache
def temporary_folder(reason):
    folder = Path(tempfile.mkdtemp(prefix="gpt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    notice(f"{reason}; tokens are kept in {folder} until this program ends")
    return folder

def download(url, sha256=None, path=None):
    """Fetch an address into the cache folder, once; progress on stderr."""
    instead = f"put the file there yourself: {path}" if path else "with a file of your own: --data FILE"
    path = path or cache_folder() / (hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + Path(url.split("?")[0]).name)
    if not path.exists():
        notice(f"downloading {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (OSError, ValueError) as e:
            raise Error(f"could not download {url} ({e}); {instead}") from None
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.unlink()
        raise Error(f"what {url} sent is not the file that was expected; try again, or use --data FILE")
    return path

def find_files(data):
    """The files that --data names, in the order given; folders and globs sorted."""
    found = []
    for name in data:
        if re.match(r"https?://", name):
            found.append(download(name))
        elif os.path.isdir(name):
            inside = sorted(p for p in Path(name).rglob("*") if re.search(r"\.(txt|jsonl)(\.gz)?$", p.name))
            if not inside:
                raise Error(f"{name}: no .txt or .jsonl file (or .gz of one) in this folder")
            found += inside
        elif os.path.exists(name):
            found.append(Path(name))
        elif matches := sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p)):
            found += map(Path, matches)
        elif name == "input.txt" and "__file__" in globals() and (beside := Path(__file__).with_name(name)).exists():
            found.append(beside)
        elif name == "input.txt":
            notice("there is no input.txt here: using Tiny Shakespeare instead")
            found.append(download(SHAKESPEARE, SHAKESPEARE_SHA256))
        else:
            raise Error(f"{name}: no such file, and no file matches it")
    return found

@contextlib.contextmanager
def reading(path):
    """What can go wrong in reading a file, in one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        raise Error(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    except UnicodeDecodeError as e:
        raise Error(f"{path}: not UTF-8 text (byte {e.start})") from None

def documents(path, size):
    """Each document of a file as an iterator over blocks of text: a .txt is one, a .jsonl line has one as `text`."""
    with reading(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        if ".jsonl" not in path.suffixes:
            yield blocks(file, path, size)
            return
        for number, line in enumerate(file, 1):
            try:
                yield [json.loads(line)["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")]
            except (ValueError, KeyError, TypeError, AttributeError):
                if line.strip():
                    raise Error(f"{path}: line {number} is not a JSON object with a `text`") from None

def blocks(file, path, size):
    """The text of a UTF-8 file, `size` bytes at a time; part of a character at a block's end waits for the next."""
    decoder, offset, block = codecs.getincrementaldecoder("utf-8")(), 0, None
    while block != b"":
        with reading(path):
            block, waiting = file.read(size), len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                e.start += offset - waiting
                raise
        yield text.removeprefix("\ufeff") if offset == 0 else text  # a byte-order mark is not text
        offset += len(block)

def pieces(paths, size=1 << 18):
    """The text in pieces of about `size` characters, and None between documents. A piece ends only after a newline
    between two characters that are not space, where no tokenizer here joins anything."""
    first = True
    for document in itertools.chain.from_iterable(documents(path, size) for path in paths):
        if not first:
            yield None
        first, buffer = False, ""
        for text in document:
            buffer += text
            cut = len(buffer) - 1 if len(buffer) >= size else 0
            while cut > 1 and (buffer[cut - 1] != "\n" or buffer[cut].isspace() or buffer[cut - 2].isspace()):
                cut = buffer.rfind("\n", 0, cut - 1) + 1
            if cut > 1:
                yield buffer[:cut]
                buffer = buffer[cut:]
        if buffer:
            yield buffer

def load_tokens(data, tokenizer="char", vocab_size=0):
    """Tokenise files, or find that it was done before -> (tokens (N,) uint16 or uint32, tokenizer, checksum of tokens).
    `tokenizer` is a tokenizer, or the kind of one to train or load; vocab_size is for bpe."""
    paths, digest = find_files(data), hashlib.sha256(b"1")  # the number changes with the format of the cache
    for path in paths:
        digest.update(f"|{path.suffixes[-2:]}|".encode())
        with reading(path), open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    def remembered(key, make):  # -> (a dict, a file for its tokens): as kept under a key, or else made, and kept
        path = cache_folder() / (hashlib.sha256(digest.digest() + key.encode()).hexdigest()[:32] + ".json")
        binary = path.with_suffix(".bin")
        try:
            value = json.loads(path.read_text("utf-8"))
            if value.get("bytes", 0) == (binary.stat().st_size if "bytes" in value else 0):
                return value, binary
        except (OSError, ValueError):
            pass
        value = make(binary)
        write_whole(path, [json.dumps(value).encode()])
        return value, binary
    if isinstance(tokenizer, str):
        kind, texts = tokenizer, (text for text in pieces(paths) if text is not None)
        state, _ = remembered(f"{kind} {vocab_size}", lambda _: make_tokenizer(kind, texts, vocab_size).state())
        tokenizer = tokenizer_from(state)
    dtype = torch.uint16 if len(tokenizer.tokens) <= 1 << 16 else torch.uint32
    about, binary = remembered(json.dumps(tokenizer.state()), lambda binary: tokenise(paths, tokenizer, binary, dtype))
    if about["count"] < 2:
        raise Error(f"{', '.join(map(str, paths))}: too little text ({about['count']} tokens; two at least)")
    return torch.from_file(str(binary), shared=False, size=about["count"], dtype=dtype), tokenizer, about["sha256"]

def make_tokenizer(kind, texts, vocab_size):
    if kind == "char":
        return CharTokenizer.train(texts)
    return BPETokenizer.gpt2() if kind == "gpt2" else BPETokenizer.train(texts, vocab_size or 1024)

def tokenise(paths, tokenizer, path, dtype):
    """Write the tokens of `paths` into the file `path`; returns what to remember of them."""
    about, shown = {"count": 0}, time.monotonic()
    digest = hashlib.sha256()
    signed = torch.int16 if dtype == torch.uint16 else torch.int32  # the same bits, written faster
    def raw_ids():
        nonlocal shown
        stream = pieces(paths)
        between = torch.tensor([] if tokenizer.eot is None else [tokenizer.eot], dtype=torch.int32)
        while batch := list(itertools.islice(stream, 2 * os.cpu_count())):
            encoded = iter(tokenizer.encode_batch([text for text in batch if text is not None]))
            ids = torch.cat([between if text is None else next(encoded) for text in batch])
            raw = bytearray(dtype.itemsize * len(ids))
            if len(ids):
                torch.frombuffer(raw, dtype=signed).copy_(ids)
            digest.update(raw)
            about["count"] += len(ids)
            yield raw
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                notice(f"tokenising: {about['count'] / 1e6:.0f} million tokens so far")
    write_whole(path, raw_ids())
    return about | {"bytes": about["count"] * dtype.itemsize, "sha256": digest.hexdigest()}

def write_whole(path, blocks):
    """A file that is there whole or not at all: written under another name, put on the disk, and renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise Error(f"{path} cannot be written: {e.strerror}", 1) from None
    finally:
        temporary.unlink(missing_ok=True)

# --- Checkpoints -----------------------------------------------------------------------------------------------------
# A dict of tensors and plain values: no code runs when it is opened, and it opens on any device.

FORMAT = 1  # a higher number comes from a newer gpt.py
MAY_CHANGE = {"out", "resume", "overwrite", "data", "steps", "minutes", "device", "dtype", "attention", "compile",
              "checkpoint_activations", "eval_every", "save_every", "probe"}  # what --resume may be given

def can_resume(folder):
    """Whether a run has left in a folder what `--resume` needs; best.pt is not enough."""
    return any((folder / name).exists() for name in ("ckpt.pt", "ckpt.prev.pt"))

def settle(given, device):
    """-> (settings, checkpoint, weights, tokenizer) of a run: one that goes on, a new one, or one from others' weights.
    An explicit flag beats --size, which beats --arch, which beats the defaults."""
    out = Path(given.get("out", Source.out))
    held = can_resume(out) or (out / "best.pt").exists()
    if given.get("resume") or (held and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"):
        checkpoint = load_run(out, "ckpt.pt", "ckpt.prev.pt")
        settings = checkpoint["settings"]["config"] | checkpoint["settings"]["training"]
        for name in given.keys() - MAY_CHANGE:
            if given[name] != settings.get(name):
                raise Error(f"--resume: the run in {out} has {flag(name)} {settings.get(name)}, not {given[name]}")
        if given.keys() & {"steps", "minutes"}:
            settings.update(steps=None, minutes=None)
        return settings | given, checkpoint, checkpoint["model"], tokenizer_from(checkpoint["tokenizer"])
    if held and not given.get("overwrite"):
        run = load_run(out, "ckpt.pt", "ckpt.prev.pt", "best.pt")
        resume = "--resume goes on with it, " * can_resume(out)
        raise Error(f"{out} holds a run (step {run['step']}, validation loss {show(run['val_loss'])}): {resume}"
                    "--out OTHER starts another beside it, --overwrite replaces it")
    arch, size = given.get("arch", Training.arch), given.get("size", "auto")
    size = ("tiny" if device.type == "cpu" else "baby") if size == "auto" else size
    settings = ARCHS[arch] | SIZES[size] | (ARCHS["bigram"] if arch == "bigram" else {})  # it has no layers at any size
    if arch == "bigram" and given.get("n_layer"):
        raise Error("--arch bigram is a table, it has no layers: leave --n-layer out")
    if "minutes" in given:
        del settings["steps"]
    settings |= given | {"size": size}
    if arch in ("llama", "qwen3") and settings.get("n_head", Config.n_head) % 2 == 0:
        settings.setdefault("n_kv_head", settings.get("n_head", Config.n_head) // 2)
    if not given.get("init"):
        return settings, None, None, None
    model, tokenizer = load_model(given["init"])
    need_tokenizer(tokenizer, given["init"])
    inherited = asdict(model.config) | {"dropout": given.get("dropout", 0.0)}
    for name in given.keys() & inherited.keys():
        if given[name] != inherited[name]:
            raise Error(f"--init {given['init']} has {flag(name)} {inherited[name]}, not {given[name]}")
    lr = given.get("lr", settings.get("lr", Training.lr) / 10)
    return settings | inherited | {"lr": lr}, None, model.state_dict(), tokenizer

def save_checkpoint(state, path):
    """Write to a temporary file, see it on the disk, rename: whatever happens, a whole file is there. The ckpt.pt
    before becomes ckpt.prev.pt."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "ckpt.pt" and path.exists():
            os.replace(path, path.with_name("ckpt.prev.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # RuntimeError is torch's for a full disk
        temporary.unlink(missing_ok=True)
        need = sum(t.nbytes for t in state["model"].values()) * (3 if "optimizer" in state else 1)
        why, free = getattr(e, "strerror", None) or "writing failed", shutil.disk_usage(path.parent).free
        raise OSError(f"{path} could not be written ({why}): it needs about {need / 1e6:.0f} MB, and "
                      f"{free / 1e6:.0f} MB are free") from None

def read_checkpoint(path):
    """A checkpoint as a dict, on the CPU. Its checksums are verified first, which torch.load does not do."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type for item in archive.infolist()) or archive.testzip():
                raise ValueError
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        if checkpoint["format"] > FORMAT:
            raise Error(f"{path}: written by a newer gpt.py (format {checkpoint['format']}, this one reads {FORMAT})")
        return checkpoint
    except (FileNotFoundError, PermissionError, Error) as e:
        raise e if isinstance(e, Error) else Error(f"{path}: {e.strerror}") from None
    except Exception:  # a damaged file may fail in any way
        raise Error(f"{path}: not a checkpoint of gpt.py, or damaged") from None

def load_run(folder, *names):
    """The first of a folder's checkpoints that can be read; a line for each that cannot."""
    present = [folder / name for name in names or ("best.pt", "ckpt.pt", "ckpt.prev.pt") if (folder / name).exists()]
    if not present:
        raise Error(f"{folder}: no run to be found in this folder; this makes one: {command('train', out=folder)}")
    for path in present:
        try:
            return read_checkpoint(path)
        except Error as e:
            if path == present[-1]:
                raise
            notice(f"{e}; reading the one before it")

def from_checkpoint(checkpoint, name):
    try:
        model = build(Config(**checkpoint["settings"]["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.eval(), tokenizer_from(checkpoint["tokenizer"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise Error(f"{name}: a checkpoint whose parts do not fit together ({first_line(e)})") from None

def need_tokenizer(tokenizer, name):
    if tokenizer is None:
        raise Error(f"{name}: its tokenizer is none that gpt.py can read")

def append_line(path, line):
    line = json.loads(json.dumps(line), parse_constant=lambda name: None)  # JSON has neither NaN nor Infinity
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as e:
        notice(f"{path}: {e.strerror}; training goes on")

def read_lines(path):
    """The objects in a .jsonl file; a line half written when its process died does not count."""
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines

def keep_lines(path, step):
    """Cut a log's lines at `step` and after: a run that goes on from there writes them again."""
    if path.exists():
        write_whole(path, [(json.dumps(line) + "\n").encode() for line in read_lines(path) if line["step"] < step])

@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process. The operating system lets go of it when the process dies, however it dies."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as e:
        raise Error(f"--out {folder}: {e.strerror}") from None
    with file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Error(f"--out {folder}: another run is writing there") from None
        try:
            yield
        finally:
            if new and os.listdir(folder) == [".lock"]:  # a request that was refused leaves nothing
                shutil.rmtree(folder, ignore_errors=True)

def compiled(model, x, context):
    """The model compiled by torch, if a first pass forward and back works; else as it was, and a line that says why."""
    try:
        fast = torch.compile(model)
        with context:
            loss = fast(x, x.clone())[1]  # not x twice: that would be compiled as a case of its own
        loss.backward()
    except torch.OutOfMemoryError:
        pass  # the first step finds how many sequences fit
    except Exception as e:  # a compiler may fail in any way; training does not need it
        notice(f"torch.compile does not work here ({first_line(e)}); going on without")
        fast = model
    model.zero_grad(set_to_none=True)
    return fast

def memory_mb(device):
    """The most memory that was in use, of the GPU or else of the process, in megabytes; None where it is not told."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        import resource
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))
    except ImportError:
        return None

# --- Looking inside --------------------------------------------------------------------------------------------------
# What the model would say next, layer by layer; where its heads look, and what each is worth; when it begins to recite.

@torch.no_grad()
def look(model, idx, lens=True):
    """Ids (T,) -> the next token's probabilities as each layer has them, (n_layer + 1, T, V), beginning with the bare
    embedding (the logit lens: the head reads a stream that is not finished), or only as the last one has them; and
    attention maps (n_layer, H, T, T)."""
    streams, maps, blocks, training = [], [], getattr(model, "blocks", ()), model.training
    def recording(q, k, v, dropout_p=0.0):
        out, probs = plain_attention(q, k, v, maps=True)
        maps.append(probs[0].float().cpu())
        return out
    attends = [block.attn.attend for block in blocks]
    hooks = [part.register_forward_hook(lambda part, given, x: streams.append(x))
             for part in ((model.dropout, *blocks) if blocks else ())]
    try:
        model.eval()
        for block in blocks:
            block.attn.attend = recording
        logits, _ = model(idx[None])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
        for block, attend in zip(blocks, attends):
            block.attn.attend = attend
    views = torch.cat([model.head(model.norm(x)) for x in streams * lens] or [logits])
    return views.float().cpu().softmax(dim=-1), torch.stack(maps) if maps else torch.zeros(0, 0, len(idx), len(idx))

def shown_layers(config):
    """Layers whose maps are kept: evenly spread, with 36 heads at most between them."""
    return torch.linspace(0, config.n_layer - 1, min(config.n_layer, max(1, 36 // config.n_head))).long()

def observe(model, tokenizer, idx):
    """One look at ids (T,) as plain values: five likeliest tokens a position, ranks of the true ones, lens, maps."""
    probs, maps = look(model, idx)
    def word(i):
        return tokenizer.tokens[i].decode("utf-8", "backslashreplace")
    def named(values, ids):
        return [[(word(i), round(p, 4)) for p, i in zip(*row)] for row in zip(values.tolist(), ids.tolist())]
    true, idx = probs[-1, :-1].gather(-1, idx[1:, None].cpu()), idx.cpu()
    lower = torch.ones(len(idx), len(idx), dtype=torch.bool).tril()
    raw = (maps[shown_layers(model.config), :36][..., lower] * 255).round().byte()  # (layers, heads, T (T + 1) / 2)
    return {"text": [word(i) for i in idx.tolist()], "top": named(*probs[-1].topk(min(5, probs.size(-1)))),
            "rank": ((probs[-1, :-1] > true).sum(-1) + 1).tolist(), "lens": [named(*row.topk(1)) for row in probs],
            "maps": base64.b64encode(bytes(raw.flatten().tolist())).decode()}

def recited(text, source, n):
    """For each character of a text, whether it is in a run of n or more that stands in `source` word for word."""
    marks = [False] * len(text)
    for i in range(len(text) - n + 1):
        if text[i:i + n] in source:
            marks[i:i + n] = [True] * n
    return marks

def longest_run(text, source):
    """Characters in the longest piece of a text that stands in `source`. `longest_run("abcd", "xbcy") == 2`"""
    longest = 0
    for i in range(len(text)):
        while i + longest < len(text) and text[i:i + longest + 1] in source:
            longest += 1
    return longest

def watch(run):
    """Called by `train` at evaluations and, more densely early, between them: writes a line of probe.jsonl."""
    model, tokenizer, seen = run.raw, run.tokenizer, run.notes
    if not seen:
        seen["texts"] = [tokenizer.decode(tokens[:1 << 22]) for tokens in (run.train_tokens, run.val_tokens)]
        lines = (seen["texts"][1] or seen["texts"][0])[:2000].splitlines() or [""]
        ids = tokenizer.encode(max(lines, key=len)) if run.s.probe is None else read_prompt(run.s.probe, tokenizer)[1]
        seen["idx"] = (ids if len(ids) else first_token(tokenizer))[:min(32, run.T)].long().to(run.device)
    def write(idx, tokens, temperature):
        rows = zip(*(ids.tolist() for ids in generate(model.eval(), idx, tokens, temperature, generator=generator)))
        return [tokenizer.decode(torch.tensor(row)) for row in rows]
    generator, training, idx = torch.Generator().manual_seed(run.s.seed), model.training, seen["idx"]
    line = {"step": run.step, **observe(model, tokenizer, idx)}
    with contextlib.suppress(Error), precision(run.device, run.dtype):  # training sees to logits that are not finite
        line["greedy"] = tokenizer.decode(idx[:8]) + write(idx[None, :8], 12, 0)[0]
        if run.evaluated():
            line["samples"] = texts = write(first_token(tokenizer).to(run.device).expand(3, 1), 80, 0.8)
            line["longest"] = [max(longest_run(text, source) for text in texts) for source in seen["texts"]]
            line["share"] = [sum(sum(recited(text, source, 50)) for text in texts) / max(1, sum(map(len, texts)))
                             for source in seen["texts"]]
    model.train(training)
    append_line(run.out / "probe.jsonl", line)

def roles(model, idx):
    """The share of each head's attention that goes where a name says, (n_layer, H), over ids (T,) from the ninth on."""
    _, maps = look(model, idx.to(next(model.parameters()).device), lens=False)
    at, idx = torch.arange(len(idx)), idx.cpu()
    same = (idx[:, None] == idx) & (at[:, None] > at)
    masks = {"previous token": at[:, None] - 1 == at, "first token": at.expand(len(idx), -1) == 0,
             "same token": same, "after the same token": same.roll(1, dims=1)}  # the last is an induction head's
    return {name: (maps * mask).sum(-1)[..., 8:].mean(-1) for name, mask in masks.items()}

def worth(model, tokens):
    """The rise of the loss on a text (N,) when what a head gives is zeroed, (n_layer, H), and when a block is skipped,
    (n_layer,)."""
    config = model.config
    limit = max(1, min(1 << 15, (1 << 34) // count(model)) // config.block_size)
    base, _ = mean_loss(model, tokens, limit=limit)
    def rise(hook):
        try:
            return mean_loss(model, tokens, limit=limit)[0] - base
        finally:
            hook.remove()
    def silence(head):
        def hook(part, given):
            x = given[0].unflatten(-1, (config.n_head, -1)).clone()  # (B, T, H, D)
            x[:, :, head] = 0
            return x.flatten(-2)
        return hook
    heads = [[rise(block.attn.out.register_forward_pre_hook(silence(head))) for head in range(config.n_head)]
             for block in model.blocks]
    return heads, [rise(block.register_forward_hook(lambda part, given, x: given[0])) for block in model.blocks]

def bigram_loss(train, val, V):
    """Loss on `val` of a table that counts what follows what in `train`, plus a tenth: where a bigram model ends."""
    train, val = train[:1 << 24].long(), val[:1 << 24].long()
    counts = torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V) + 0.1
    return -(counts / counts.sum(1, keepdim=True)).log()[val[:-1], val[1:]].mean().item()

@dataclass
class Inspection(Machine):
    probe: str = setting("", "look at this text, in the best model alone (default: what `train` recorded)")

def inspect(**given):
    """Write inspect.html, a page without network or library, into the run's folder -> its path. In a notebook it is
    shown too. Keyword arguments are the flags of `inspect`."""
    s = Inspection(**check(given, Inspection))
    (model, tokenizer, context), out, log, records = open_model(s), Path(s.out), [], []
    config, V, train, val = model.config, len(tokenizer.tokens), torch.zeros(0), torch.zeros(0)
    if not s.init:
        log, records = read_lines(out / "log.jsonl"), read_lines(out / "probe.jsonl") if not s.probe else []
        try:
            train, val = split(load_tokens(load_run(out)["settings"]["training"]["data"], tokenizer)[0])
        except Error as e:
            notice(f"{e}; the page goes without what needs the text")
    if not records:
        idx = read_prompt(s.probe, tokenizer)[1] if s.probe else val if len(val) else train
        idx = idx[:min(32, config.block_size)].long()
        if not len(idx):
            raise Error("inspect: there is no record and no text to look at; name one with --probe TEXT")
        records = [{"step": 0, **observe(model, tokenizer, idx.to(next(model.parameters()).device))}]
    records = [records[i] for i in torch.linspace(0, len(records) - 1, min(40, len(records))).long().tolist()]
    source = tokenizer.decode(train[:1 << 22])
    for record in records:
        marked = [zip(text, recited(text, source, 20)) for text in record.get("samples", ())]
        record["samples"] = [[("".join(c for c, _ in run), mark) for mark, run in groupby(pairs, itemgetter(1))]
                             for pairs in marked]
    scores, each, layers = {}, None, []
    if config.n_layer and len(val) > 16:
        notice(f"measuring what {config.n_layer * config.n_head} heads are worth")
        with context:
            scores, (each, layers) = roles(model, val[:min(256, config.block_size)].long()), worth(model, val)
    heads = [dict(layer=l, head=h, worth=each and each[l][h],
                  scores={role: x[l, h].item() for role, x in scores.items()})
             for l in shown_layers(config).tolist() for h in range(config.n_head)][:36]
    levels = {"ln(V)": math.log(V)}
    if len(val) > 1 and V <= 4096:
        levels["bigram table"] = bigram_loss(train, val, V)
    about = f"{count(model):,} parameters, {config.n_layer} layers, {config.n_head} heads, a vocabulary of {V:,} tokens"
    data = json.dumps(dict(about=about, log=log, levels=levels, records=records, heads=heads, layers=layers))
    page = PAGE.replace("DATA", data.replace("<", "\\u003c"), 1)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "inspect.html", [page.encode()])
    say(out / "inspect.html")
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import HTML, display
        display(HTML(f'<div><iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe></div>'))
    return out / "inspect.html"

@dataclass
class Ablation(Training):
    out: str = setting("out-ablate", "folder of all the runs")
    vary: list = setting((), "what to vary: n_head=1,2,4 varies one setting, 'n_head=1,2 n_layer=2,4' makes every pair")
    seeds: int = setting(1, "runs of each setting, with the seeds that follow --seed", 1)

def ablate(**given):
    """Train every setting that `vary` names, everything else being equal; print a table, write ablate.json -> its rows.
    Interrupted and called again, it goes on where it was. Keyword arguments are the flags of `ablate`."""
    given = check(given, Config, Ablation)
    vary, seeds, out = given.pop("vary", []), given.pop("seeds", 1), Path(given.pop("out", Ablation.out))
    groups, path = [], out / "ablate.json"
    if not vary or not all("=" in word for words in vary for word in words.split()):
        raise Error("ablate: --vary takes a setting and its values, as in --vary n_head=1,2,4 --vary arch=bigram,qwen3")
    for words in vary:
        axes = [[(name.replace("-", "_"), {"true": True, "false": False}.get(value.lower(), value))
                 for value in values.split(",")] for name, _, values in (word.partition("=") for word in words.split())]
        groups.append([check(dict(plan), Config, Training) for plan in itertools.product(*axes)])
    plans = [plan for group in groups for plan in group]
    fixed = {"seed", "out", "resume", "overwrite"} & {name for plan in plans for name in plan}
    if fixed:
        raise Error(f"ablate: {flag(fixed.pop())} cannot vary")
    if {"resume", "overwrite"} & given.keys():
        raise Error("ablate goes on by itself where it was; another --out starts anew")
    for plan in plans:  # what cannot work is found before the first hour has passed
        settings, *_ = settle({**given, **plan, "out": str(out / "new")}, torch.device("cpu"))
        config, training = parts(settings, Config, Training)
        Config(**config), Training(**training)
    done = read_json(path) if path.exists() else {"base": given, "rows": []}
    if done["base"] != given:
        raise Error(f"{path} has other settings: {done['base']}; name another --out")
    def text(plan):
        return " ".join(f"{name}={value}" for name, value in plan.items())
    for i, (plan, n) in enumerate(todo := list(itertools.product(plans, range(seeds)))):
        seed, rows = given.get("seed", Machine.seed) + n, done["rows"]
        if any(row["setting"] == text(plan) and row["seed"] == seed for row in rows):
            continue
        folder = out / f"{text(plan)} seed={seed}"
        notice(f"run {i + 1} of {len(todo)}: {folder.name}")
        with contextlib.redirect_stdout(io.StringIO()):
            begun = {"resume": True} if can_resume(folder) else given | plan | {"seed": seed, "overwrite": True}
            last = train(**begun, out=str(folder))
            if last["signal"]:
                notice("the same `ablate` command goes on with it, and with the runs after it")
                return {"signal": last["signal"]}
            loss = evaluate(out=str(folder), device=given.get("device", "auto"))["loss"]
        rows.append({"setting": text(plan), "seed": seed, "parameters": count(load_model(folder)[0]), "loss": loss,
                     "steps": last["step"], "seconds": round(last["seconds"], 1)})
        write_whole(path, [json.dumps(done, indent=1).encode()])
        notice(f"loss {loss:.4f} after {last['seconds']:.0f} s")
    say("| setting | parameters | loss | improvement over the first of its sweep | seconds |")
    say("| --- | --- | --- | --- | --- |")
    for plan in plans:
        rows = [row for row in done["rows"] if row["setting"] == text(plan)]
        loss, seconds = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("loss", "seconds"))
        first = loss.mean() if any(plan is group[0] for group in groups) else first
        spread = f" ± {loss.std():.4f}" if len(rows) > 1 else ""
        say(f"| {text(plan)} | {rows[0]['parameters']:,} | {loss.mean():.4f}{spread} | {first - loss.mean():.4f} | "
            f"{seconds.mean():.0f} |")
    return done

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Inside a GPT</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#222, #ddd); --soft: light-dark(#6b6b6b, #999);
  --back: light-dark(#fff, #16181c); --line: light-dark(#ddd, #383c44); --a: light-dark(#0b62c4, #5aa9ff);
  --b: light-dark(#b4540a, #ffa04d); --good: light-dark(#0a7a38, #4ccb80) }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 76rem;
  margin: auto; padding: 0 1rem 4rem }
h2 { margin: 2.2rem 0 .2rem } p, small { color: var(--soft); margin: .2rem 0 .8rem; max-width: 50rem }
header { position: sticky; top: 0; background: var(--back); border-bottom: 1px solid var(--line); padding: .5rem 0 }
input { width: 100%; accent-color: var(--a) } .row { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; flex: 1 1 22rem; max-width: 36rem } path { stroke-width: 2 }
svg text { fill: var(--soft); font-size: 11px } .card { width: 8.4rem }
.bar { font: 12px/1.5 ui-monospace, monospace; white-space: pre; overflow: hidden; padding: 0 .3rem;
  background: linear-gradient(to right, color-mix(in srgb, var(--a) 35%, transparent) var(--p), transparent var(--p)) }
.true { color: var(--good); font-weight: bold } table { border-collapse: collapse; font: 12px ui-monospace, monospace }
td, th { border: 1px solid var(--line); padding: .15rem .35rem; white-space: pre; text-align: center }
.wide { overflow-x: auto } canvas { width: 8.4rem; image-rendering: pixelated; border: 1px solid var(--line) }
pre { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .8rem; flex: 1 1 20rem; margin: .3rem 0 }
mark { background: color-mix(in srgb, var(--b) 40%, transparent); color: inherit }
</style>
<h1>Inside a GPT</h1><p id="about"></p>
<header><label for="at">Training step <output id="now" for="at"></output></label>
<input id="at" type="range" min="0" value="0"></header>
<main>
<h2>Loss</h2>
<p>Nats per token. The axis of steps is logarithmic, for most happens at the beginning.</p>
<div class="row" id="curves"></div>
<h2>The next token</h2>
<p>After each token of the probe, the five that the model finds likeliest. <b class="true">Green</b> is what the text
goes on with; the number behind it is its place among all.</p>
<div class="row" id="next"></div>
<h2>Layer by layer</h2>
<p>The likeliest next token, if the model had to answer after so many blocks (the logit lens). The stronger the colour,
the surer; green is right.</p>
<div class="wide"><table id="lens"></table></div>
<h2>Where heads look</h2>
<p>Row: the token that looks. Column: the token looked at. Point at a map, or focus it and use the arrow keys, for its
values. A head is named after where at least 0.4 of its attention goes, on average over validation text: to the token
before, to the first token, to earlier tokens equal to this one, or to those right after such. Worth: the rise of the
validation loss when what this head gives is zeroed. Both are of the model with the lowest validation loss.</p>
<p id="cell" aria-live="polite">&nbsp;</p>
<div class="row" id="maps"></div>
<div class="wide" id="layers"></div>
<h2>What it writes</h2>
<p>First the likeliest continuation of the probe's first eight tokens, then samples at temperature 0.8;
<mark>marked</mark> is what stands in the training text word for word for 20 characters or more.</p>
<div class="row" id="texts"></div>
</main>
<script>
const D = DATA, R = D.records, $ = id => document.getElementById(id)
const shown = t => t.replace(/\n/g, '⏎').replace(/ /g, '·').replace(/\t/g, '⇥')
function add(parent, tag, text = '', attributes = {}) {
  const kind = ['svg', 'path', 'text', 'line'].includes(tag) ? '2000/svg' : '1999/xhtml'
  const e = document.createElementNS('http://www.w3.org/' + kind, tag)
  e.textContent = text
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value)
  parent.append(e)
  return e
}

// Curves over training. A series is [name, colour, [[step, y], ...]]; levels are lines across.
const last = Math.max(1, ...D.log.map(l => l.step), ...R.map(r => r.step)), markers = []
const x = step => 40 + 440 * Math.log1p(step) / Math.log1p(last)
function chart(title, series, levels = {}) {
  series = series.filter(s => s[2].length)
  if (!series.length) return
  const top = Math.max(...series.flatMap(s => s[2].map(p => p[1])), ...Object.values(levels)) * 1.03 || 1
  const y = v => 190 - 175 * v / top, end = s => `${s[0]} ${s[2].at(-1)[1].toFixed(2)}`
  const figure = add($('curves'), 'figure'), svg = add(figure, 'svg', '', {viewBox: '0 0 500 210', role: 'img',
    'aria-label': `${title}; at the end: ${series.map(end).join(', ')}`})
  for (let s = 1; s <= last; s *= 4) add(svg, 'text', s, {x: x(s), y: 205, 'text-anchor': 'middle'})
  for (let v = 0; v <= top; v += top / 4)
    add(svg, 'text', v.toPrecision(3), {x: 34, y: y(v) + 4, 'text-anchor': 'end'})
  for (const [name, v] of Object.entries(levels)) {
    add(svg, 'line', '', {x1: 40, x2: 480, y1: y(v), y2: y(v), stroke: 'var(--soft)', 'stroke-dasharray': 4})
    add(svg, 'text', `${name} ${v.toFixed(3)}`, {x: 480, y: y(v) - 4, 'text-anchor': 'end'})
  }
  for (const [, stroke, points] of series)
    add(svg, 'path', '', {d: 'M' + points.map(p => [x(p[0]), y(p[1])]).join('L'), fill: 'none', stroke})
  markers.push(add(svg, 'line', '', {y1: 10, y2: 190, stroke: 'var(--ink)'}))
  const caption = add(figure, 'figcaption', title + ': ')
  for (const s of series) add(caption, 'b', end(s) + ' ', {style: `color: ${s[1]}`})
}
const logged = key => D.log.filter(l => Number.isFinite(l[key])).map(l => [l.step, l[key]])
const both = key => ['training', 'validation'].map((name, i) => [`the ${name} text`, i ? 'var(--b)' : 'var(--a)',
  R.filter(r => r[key]).map(r => [r.step, r[key][i]])])
$('about').textContent = D.about
chart('Loss', [['training', 'var(--a)', logged('train_loss')], ['validation', 'var(--b)', logged('val_loss')]],
  D.levels)
chart('Longest run of characters in a sample that stands word for word in', both('longest'))
chart('Share of the samples in such runs of 50 or more, in', both('share'))

// One canvas for each head's map; `draw` fills them.
let T = 1
const canvases = D.heads.map(head => {
  const best = Object.entries(head.scores).sort((a, b) => b[1] - a[1])[0]
  const name = `layer ${head.layer + 1}, head ${head.head + 1}`, box = add($('maps'), 'div', '', {class: 'card'})
  const role = best?.[1] >= 0.4 ? `${best[0]} ${best[1].toFixed(2)}` : ''
  const canvas = add(box, 'canvas', '', {tabindex: 0, role: 'img',
    'aria-label': `attention of ${name}, ${role}`})
  add(box, 'div', name)
  add(box, 'div', role, {class: 'true'})
  if (head.worth != null) add(box, 'small', `worth ${head.worth.toFixed(3)}`)
  const cell = [0, 0], token = i => `“${shown(R[at].text[i])}” (${i + 1})`
  const move = (...to) => {
    to.forEach((v, i) => cell[i] = Math.max(0, Math.min(T - 1, Math.floor(v))))
    const weight = (canvas.map(...cell) / 255).toFixed(2)
    $('cell').textContent = `${name}: ${token(cell[0])} looks at ${token(cell[1])}: ${weight}`
  }
  canvas.onmousemove = e => move(e.offsetY / canvas.clientHeight * T, e.offsetX / canvas.clientWidth * T)
  canvas.onkeydown = e => {
    const by = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key]
    if (by) { move(cell[0] + by[0], cell[1] + by[1]); e.preventDefault() }
  }
  return canvas
})
if (D.layers.length) {
  const table = add($('layers'), 'table'), head = add(table, 'tr'), row = add(table, 'tr')
  add(head, 'th', 'block skipped', {scope: 'row'}); add(row, 'th', 'loss rises by', {scope: 'row'})
  D.layers.forEach((worth, i) => { add(head, 'th', i + 1, {scope: 'col'}); add(row, 'td', worth.toFixed(3)) })
}
let at = R.length - 1
function draw() {  // everything that the slider moves
  const r = R[at], val = D.log.findLast(l => l.val_loss != null && l.step <= r.step)?.val_loss
  $('now').textContent = r.step + (val ? `, validation loss ${val.toFixed(3)}` : '')
  for (const marker of markers) for (const end of ['x1', 'x2']) marker.setAttribute(end, x(r.step))
  for (const id of ['next', 'lens', 'texts']) $(id).textContent = ''
  r.top.forEach((top, i) => {
    const card = add($('next'), 'div', '', {class: 'card'}), truth = r.text[i + 1]
    add(card, 'b', `${i + 1} ${shown(r.text[i])}`)
    if (truth) add(card, 'small', ` then ${shown(truth)} (rank ${r.rank[i]})`)
    for (const [token, p] of top)
      add(card, 'div', `${shown(token).padEnd(4)} ${(100 * p).toFixed(1)}%`,
        {class: token === truth ? 'bar true' : 'bar', style: `--p: ${100 * p}%`})
  })
  const head = add($('lens'), 'tr')
  add(head, 'th', 'after block', {scope: 'col'})
  for (const token of r.text) add(head, 'th', shown(token), {scope: 'col'})
  r.lens.forEach((layer, l) => {
    const row = add($('lens'), 'tr')
    add(row, 'th', l || 'none', {scope: 'row'})
    layer.forEach(([[token, p]], i) => add(row, 'td', shown(token), {class: token === r.text[i + 1] ? 'true' : '',
      title: p, style: `background: color-mix(in srgb, var(--a) ${50 * p}%, transparent)`}))
  })
  T = r.text.length
  const bytes = Uint8Array.from(atob(r.maps), c => c.charCodeAt(0)), size = T * (T + 1) / 2
  const ink = getComputedStyle(document.body).color.match(/\d+/g).slice(0, 3)
  canvases.forEach((canvas, n) => {
    const image = new ImageData(T, T)
    canvas.width = canvas.height = T
    canvas.map = (i, j) => j > i ? 0 : bytes[n * size + i * (i + 1) / 2 + j]
    for (let i = 0; i < T; i++)
      for (let j = 0; j < T; j++) image.data.set([...ink, canvas.map(i, j)], 4 * (i * T + j))
    canvas.getContext('2d').putImageData(image, 0, 0)
  })
  if (r.greedy) add($('texts'), 'pre', r.greedy)
  for (const text of R.slice(0, at + 1).findLast(r => r.samples.length)?.samples ?? []) {
    const pre = add($('texts'), 'pre')
    for (const [part, known] of text) add(pre, known ? 'mark' : 'span', part)
  }
}
$('at').max = at; $('at').value = at
$('at').oninput = () => { at = +$('at').value; draw() }
matchMedia('(prefers-color-scheme: dark)').onchange = draw
document.querySelector('header').hidden = R.length < 2
draw()
</script>
"""

# --- Weights in and out ----------------------------------------------------------------------------------------------
# Hugging Face's transformers knows three of the architectures that these settings can make. One table says what the
# settings and weights of each are called there, and serves both directions; its files need no package of theirs.

def words(text):
    return dict(pair.split("=") for pair in text.split())

LLAMA = dict(
    name="LlamaForCausalLM", prefix="model.", block="layers.{}.", must=dict(hidden_act="silu"),
    ours=dict(pos="rope", norm="rms", mlp="swiglu", qk_norm=False, bias=False, tie=False, norm_eps=1e-6,
              rope_theta=1e4),
    settings=words("""vocab_size=vocab_size block_size=max_position_embeddings n_layer=num_hidden_layers
        n_embd=hidden_size n_head=num_attention_heads n_kv_head=num_key_value_heads head_dim=head_dim
        mlp_hidden=intermediate_size rope_theta=rope_theta norm_eps=rms_norm_eps tie=tie_word_embeddings"""),
    parts=words("""embed=embed_tokens norm=norm head=lm_head attn_norm=input_layernorm mlp_norm=post_attention_layernorm
        attn.q=self_attn.q_proj attn.k=self_attn.k_proj attn.v=self_attn.v_proj attn.out=self_attn.o_proj
        attn.q_norm=self_attn.q_norm attn.k_norm=self_attn.k_norm
        mlp.gate=mlp.gate_proj mlp.up=mlp.up_proj mlp.down=mlp.down_proj"""))
FAMILIES = {  # `ours` makes it here, or is the default; `must` is what else its config.json has to say, or leave out
    "gpt2": dict(
        name="GPT2LMHeadModel", prefix="transformer.", block="h.{}.", ours=ARCHS["gpt2"],
        must=dict(activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
        settings=words("""vocab_size=vocab_size block_size=n_positions n_layer=n_layer n_embd=n_embd n_head=n_head
            mlp_hidden=n_inner norm_eps=layer_norm_epsilon tie=tie_word_embeddings"""),
        parts=words("""embed=wte positions=wpe norm=ln_f head=lm_head attn_norm=ln_1 mlp_norm=ln_2 attn.q=attn.c_attn
            attn.k=attn.c_attn attn.v=attn.c_attn attn.out=attn.c_proj mlp.up=mlp.c_fc mlp.down=mlp.c_proj""")),
    "llama": LLAMA | dict(settings=LLAMA["settings"] | dict(bias="attention_bias mlp_bias")),  # our one bias is both
    "qwen3": LLAMA | dict(name="Qwen3ForCausalLM", ours=LLAMA["ours"] | dict(qk_norm=True, head_dim=128),
                          must=dict(hidden_act="silu", attention_bias=False, use_sliding_window=False))}

def config_in(about):
    """A config.json's dict -> (model_type, Config); what would be computed differently here is refused."""
    kind, values = str(about.get("model_type")), {}
    if kind not in FAMILIES:
        raise Error(f"model_type {kind} is not one of {', '.join(FAMILIES)}")
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}  # transformers 5, 4
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
        raise Error(f"RoPE of type {rope_type} with {', '.join(rope)} is not supported, only the default type")
    about = {name: value for name, value in (about | rope).items() if value is not None}
    for name, value in FAMILIES[kind]["must"].items():
        if about.get(name, value) != value:
            raise Error(f"{name} {about[name]} is not supported, only {value}")
    for ours, theirs in FAMILIES[kind]["settings"].items():
        said = {about[name] for name in theirs.split() if name in about}
        if len(said) > 1 or not said and ours in ("vocab_size", "block_size", "n_layer", "n_embd", "n_head"):
            raise Error(f"{theirs.replace(' ', ' and ')}: {'they differ' if said else 'missing'}")
        values.update({ours: value for value in said})
    return kind, Config(**check(FAMILIES[kind]["ours"] | values, Config))

def config_out(config):
    """A Config -> (model_type, config.json's dict); a setting that transformers cannot express is refused."""
    mine = asdict(config)
    def odd(family):
        wanted = {"n_kv_head": config.n_head, "head_dim": config.n_embd / config.n_head} | family["ours"]
        return [item for item in wanted.items() if item[0] not in family["settings"] and mine[item[0]] != item[1]]
    kind, family = min(FAMILIES.items(), key=lambda item: len(odd(item[1])))
    for name, value in odd(family) + [("n_layer", "at least 1")] * (config.n_layer < 1):
        raise Error(f"export: {flag(name)} {mine[name]} has no equal: in {family['name']}, the nearest, it is {value}")
    about = {theirs: mine[ours] for ours, names in family["settings"].items() for theirs in names.split()}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}} if kind != "gpt2" else {}
    return kind, {"model_type": kind, "architectures": [family["name"]], **family["must"], **about, **rope}

def their_weights(model, kind):
    """Their names, without the prefix that some files leave out -> ([our parameters, stacked], whether transposed)."""
    family, weights = FAMILIES[kind], {}
    for name, p in model.named_parameters():  # a tied head is the embedding, and not listed again
        block, part, end = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        theirs = (family["block"].format(block) if block else "") + family["parts"][part] + "." + end
        turned = kind == "gpt2" and block is not None and p.dim() == 2  # its Conv1D holds a Linear's matrix transposed
        weights.setdefault(theirs, ([], turned))[0].append(p)
    return weights

def stack(parts, turned):
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.mT if turned else whole

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
               "BOOL": torch.bool}

def read_safetensors(path):
    """{name: tensor}. Eight bytes say how long the header is; it is JSON; the tensors follow without gaps. The file is
    mapped into memory, so a tensor is read from the disk when it is used, and not before."""
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 8 + length <= size or length > 1 << 24:  # real headers are below a megabyte
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    data, tensors, at = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8), {}, 8 + length
    header.pop("__metadata__", None)
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, begin = SAFETENSORS[about["dtype"]], about["shape"], at
        at += math.prod(shape[:8]) * dtype.itemsize
        if about["data_offsets"] != [begin - 8 - length, at - 8 - length] or at > size or len(shape) > 8:
            raise ValueError(f"the place or shape of {name}")
        raw = data[begin:at]  # in old files it may begin at an odd byte, where no view of numbers can
        tensors[name] = (raw if begin % dtype.itemsize == 0 else raw.clone()).view(dtype).view(shape)
    if at != size:
        raise ValueError(f"{size} bytes, where the header speaks of {at}")
    return tensors

def write_safetensors(path, weights):
    """weights: {name: a function that makes the tensor}, so that no second copy of the model is held."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, make in weights.items():
        shape, begin = list(make().shape), at
        at += 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, at]}
    def raw(tensor):
        data = bytearray(4 * tensor.numel())
        torch.frombuffer(data, dtype=torch.float32).copy_(tensor.detach().reshape(-1))
        return data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    write_whole(path, itertools.chain([len(text).to_bytes(8, "little"), text], (raw(w()) for w in weights.values())))

def read_weights(folder):
    """{name: tensor} of one file, or of the several that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, files, tensors = folder / (name + ".index.json"), [], {}
        if (folder / name).exists():
            files = [name]
        elif index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        for path in [folder / Path(file).name for file in files]:
            try:
                tensors |= read_safetensors(path) if name == "model.safetensors" else torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except Exception as e:  # a damaged file can fail in any way
                raise Error(f"{path.name} is damaged or unreadable ({type(e).__name__}: {str(e)[:99]!r})") from None
        if files:
            return {re.sub(r"^(transformer|model)\.", "", name): tensor for name, tensor in tensors.items()}
    raise Error("neither model.safetensors nor pytorch_model.bin is in this folder")

def read_json(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise Error(f"{path.name}: {getattr(e, 'strerror', None) or 'not a JSON object'}") from None

@torch.no_grad()
def load_folder(source):
    """A Hugging Face folder, or the name of a GPT-2 -> (model, tokenizer, None if none here does exactly the same)."""
    folder, again = Path(source), ""
    if source in GPT2_SIZES:
        (L, H, C), folder = GPT2_SIZES[source], cache_folder() / source
        download(f"https://huggingface.co/openai-community/{source}/resolve/main/model.safetensors",
                 path=folder / "model.safetensors")
        again = " (delete what is there, to download it again)"
    try:
        gpt2 = again and dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_layer=L, n_head=H, n_embd=C)
        about = gpt2 or read_json(folder / "config.json")
        kind, config = config_in(about)
        found = read_weights(folder)
        if not 0 < config.n_layer <= len(found) or config.block_size > 1 << 24:
            raise Error("config.json and the weights do not fit together")
        with torch.device("meta"):  # shapes without memory: a wrong config.json costs none
            wanted = {name: stack(*parts).shape for name, parts in their_weights(GPT(config), kind).items()}
        for name in wanted | found:
            if name in wanted or not re.search(r"\.attn\.(masked_)?bias$|\.inv_freq$|^lm_head\.weight$", name):
                has, wants = found[name].shape if name in found else "missing", wanted.get(name, "not known")
                if has != wants or not found[name].is_floating_point():
                    raise Error(f"{name} is {has}; in numbers, in a {kind} with this config.json, it is {wants}")
        model = GPT(config).eval()
        for name, (parts, turned) in their_weights(model, kind).items():
            rows = found[name].mT if turned else found[name]
            for p, part in zip(parts, rows.split([len(p) for p in parts])):
                p.copy_(part)
        return model, read_tokenizer(folder, kind, config.vocab_size, about.get("eos_token_id"))
    except (Error, TypeError, AttributeError, KeyError, RuntimeError) as e:
        raise Error(f"{folder}: {str(e).splitlines()[0]}{again}") from None

QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = (GPT2_PATTERN, QWEN_PATTERN, QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))  # the last is Llama 3's

def letters():
    """tokenizer.json writes a byte as one character: itself where Latin-1 shows something, else U+0100 and up."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != 32]
    return dict(zip(shown + [b for b in range(256) if b not in shown], map(chr, shown + list(range(256, 512)))))

def merges(ranks):
    """The two halves that byte-pair encoding makes each token from, None if it never does. They depend on the token's
    bytes alone; so if a file lists these merges, in this order, tiktoken does the same with every text."""
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        halves, rank = [token[i:i + 1] for i in range(len(token))], 0
        while len(halves) > 2 and rank < math.inf:
            rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(halves, halves[1:])))
            halves[i:i + 2] = [halves[i] + halves[i + 1]]
        yield halves if rank < math.inf else None

def tokenizer_out(tokenizer):
    """A tokenizer -> tokenizer.json's dict. One of characters is byte-pair encoding without bytes and without pairs."""
    special, decoder, steps, nfc = {}, {"type": "Fuse"}, None, getattr(tokenizer, "nfc", False)
    model = {"vocab": {token.decode("utf-8", "replace"): i for i, token in enumerate(tokenizer.tokens)}, "merges": []}
    if tokenizer.kind == "bpe":
        special, letter, plain = tokenizer.special, letters(), tokenizer.pattern == GPT2_PATTERN  # ByteLevel has it
        cut = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": plain}
        steps = {"type": "Sequence", "pretokenizers": [decoder] if plain else [cut, decoder]}
        spell = {token: "".join(letter[b] for b in token) for token in tokenizer.ranks}
        model = {"vocab": {spell[token]: i for token, i in tokenizer.ranks.items()} | special, "ignore_merges": True,
                 "merges": [f"{spell[pair[0]]} {spell[pair[1]]}" for pair in merges(tokenizer.ranks) if pair]}
    added = [{"id": i, "content": name, "special": True, "normalized": False, "single_word": False, "lstrip": False,
              "rstrip": False} for name, i in special.items()]
    return {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": steps, "model": {"type": "BPE", **model}, "decoder": decoder}

def essence(file):
    """What in a tokenizer.json's dict decides which ids a text has; odd is whatever has no equal here."""
    def steps(part):
        return part.get("pretokenizers") or part.get("processors") or [part] if part else []
    model, added = file["model"], file.get("added_tokens") or []
    odd = [model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    odd += [token.get(key) for token in added for key in ("single_word", "lstrip", "rstrip")]
    odd += [step.get("special_tokens") for step in steps(file.get("post_processor"))]  # put around every text
    cut = [{"use_regex": True} | step | {"trim_offsets": True} for step in steps(file.get("pre_tokenizer"))]
    return dict(type=model["type"], vocab=model["vocab"] | {token["content"]: token["id"] for token in added}, cut=cut,
                merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]], odd=any(odd),
                normalizer=file.get("normalizer"), decoder=file["decoder"]["type"])

def read_tokenizer(folder, kind, V, eot):
    """The tokenizer of V tokens that, written out again, would be this folder's; None if there is no such one."""
    if (folder / "tokenizer.json").exists():
        file = read_json(folder / "tokenizer.json")
    elif kind == "gpt2" and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab, lines = read_json(folder / "vocab.json"), (folder / "merges.txt").read_text("utf-8").splitlines()
        file = {"model": {"type": "BPE", "vocab": vocab, "merges": [line for line in lines if line[:8] != "#version"]},
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "decoder": {"type": "ByteLevel"},
                "added_tokens": [{"content": "<|endoftext|>", "id": vocab.get("<|endoftext|>")}]}
    else:
        return BPETokenizer.gpt2() if V == 50257 else None
    try:
        theirs, letter, tokens = essence(file), {c: b for b, c in letters().items()}, [b""] * V
        if theirs["decoder"] == "Fuse":
            tokenizer, exact = CharTokenizer("".join(theirs["vocab"])), len(theirs["vocab"]) == V
        else:
            special = {token["content"]: token["id"] for token in file["added_tokens"]}
            ends = [name for name in special if name == "<|endoftext|>"] + [n for n, i in special.items() if i == eot]
            for name, i in theirs["vocab"].items():
                tokens[i] = name.encode() if name in special else bytes(letter[c] for c in name)
            pattern, ids = theirs["cut"][0].get("pattern", {"Regex": GPT2_PATTERN})["Regex"], theirs["vocab"].values()
            if pattern not in PATTERNS or max(map(len, tokens)) > 512 or not all(special):
                return None
            if len({*ids} & {*range(V)}) < len(ids):
                return None
            tokenizer = BPETokenizer(tokens, pattern, {ends[0]: special[ends[0]]} | special, bool(theirs["normalizer"]))
            exact = all(bytes([b]) in tokenizer.ranks for b in range(256))
            exact &= bool(file["model"].get("ignore_merges")) or None not in merges(tokenizer.ranks)
        return tokenizer if exact and essence(tokenizer_out(tokenizer)) == theirs else None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return None if tiktoken() else None  # not in silence where only tiktoken is missing

@dataclass
class Export(Source):
    folder: str = setting("", "folder to write, new or empty")

def export(**given):
    """Write a folder from which transformers loads the same model and tokenizer. Keyword arguments are `folder` and the
    flags of `export`."""
    s = Export(**check(given, Export))
    folder = Path(s.folder)
    if not s.folder or os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise Error(f"export: {folder} is there already; name a new or an empty folder")
    model, tokenizer = load_source(s)
    (kind, about), eot = config_out(model.config), getattr(tokenizer, "eot", None)
    files = {"config.json": about | {"torch_dtype": "float32", "bos_token_id": eot, "eos_token_id": eot}}
    if tokenizer:
        end = {key: tokenizer.tokens[eot].decode() for key in ("bos_token", "eos_token")} if eot is not None else {}
        files |= {"tokenizer.json": tokenizer_out(tokenizer), "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size,
            "clean_up_tokenization_spaces": False, **end}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Error(f"export: {folder} cannot be made: {e.strerror}") from None
    write_safetensors(folder / "model.safetensors", {
        FAMILIES[kind]["prefix"] * (name != "lm_head.weight") + name: functools.partial(stack, *parts)
        for name, parts in their_weights(model, kind).items()})
    for name in reversed(files):  # config.json last: what is there without it is no model
        write_whole(folder / name, [json.dumps(files[name], indent=1).encode()])
    say(f"{folder}: model.safetensors, {', '.join(files)}")

# --- Command line ----------------------------------------------------------------------------------------------------

def say(text, end="\n"):
    """Print at once. If nobody reads stdout any more, go on in silence."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")

def load_model(source, device="cpu"):
    """Open whatever --init accepts -> (model, tokenizer)."""
    path = Path(source)
    if source in GPT2_SIZES or (path / "config.json").is_file():
        model, tokenizer = load_folder(source)
    else:
        model, tokenizer = from_checkpoint(load_run(path) if path.is_dir() else read_checkpoint(path), source)
    return model.to(device), tokenizer

def command(name, **given):
    """A command as one writes it here, in a shell or, if that is where we are, in a notebook."""
    given = {key: value if value is True else str(value) for key, value in given.items() if str(value) != Source.out}
    if not hasattr(sys.modules["__main__"], "__file__"):
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
    words = [flag(key) + (f" {shlex.quote(value)}" if value is not True else "") for key, value in given.items()]
    return " ".join(["python gpt.py", name, *words])

def first_line(e):
    """What an exception says, in one short line."""
    return (str(e).strip() or repr(e)).splitlines()[0][:99]

def notice(text):
    print("\r\x1b[K" * sys.stderr.isatty() + f"gpt.py: {text}", file=sys.stderr, flush=True)  # over a line of progress

def show(loss):
    return "-" if loss is None else f"{loss:.4f}"

COMMANDS = {
    "train": (train, (Config, Training), "train a model"),
    "sample": (sample, (Sampling,), "generate text from a trained model"),
    "eval": (evaluate, (Evaluation,), "measure a model's loss on a text"),
    "inspect": (inspect, (Inspection,), "write a page that shows what a model has learnt, and how"),
    "ablate": (ablate, (Config, Ablation), "train a model in several settings, and compare"),
    "export": (export, (Export,), "write a Hugging Face folder"),
}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Error(f"{message} (--help lists what there is)")

def parse(argv):
    """Arguments -> (function, settings given). `--n-layer 4`, `--n-layer=4` and `--n_layer 4` are the same."""
    parser = Parser(prog="gpt.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, classes, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False,
                                  argument_default=argparse.SUPPRESS)
        for f in {f.name: f for cls in classes for f in fields(cls)}.values():
            default = " ".join(f.default) if f.type is list else "" if f.default is None else str(f.default)
            about = {"help": f.metadata["help"].replace("%", "%%") + (f" [{default}]" if default else "")}
            if f.name == "folder":
                sub.add_argument(f.name, metavar="DIR", **about)
            elif f.type is bool:
                sub.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **about)
            else:
                kinds = {list: "NAME=VALUES" if f.name == "vary" else "DATA", str: "TEXT", int: "N", float: "X"}
                metavar = "|".join(f.metadata["choices"] or [kinds[f.type]])
                several = {"nargs": "+", "action": "extend" if f.name == "vary" else "store"} if f.type is list else {}
                sub.add_argument(flag(f.name), metavar=metavar, **several, **about)
    argv = [re.sub("_", "-", a.split("=")[0]) + a[len(a.split("=")[0]):] if a.startswith("--") else a for a in argv]
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    function, classes, _ = COMMANDS[given.pop("command")]
    for word in unknown:
        if word.startswith("--"):
            check({word[2:].split("=")[0].replace("-", "_"): None}, *classes)
        raise Error(f"{word!r} was not expected here")
    return function, given

def main(argv=None):
    """Run a command; returns the exit code: 0 done, 2 the request was wrong, 1 it failed, 130 or 143 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        function, given = parse(sys.argv[1:] if argv is None else argv)
        result = function(**given, **({"started": LOADED} if function is train else {}))
        return 128 + result.get("signal", 0) if isinstance(result, dict) and result.get("signal") else 0
    except Error as e:
        notice(f"error: {e}")
        return e.code
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    if "__file__" not in globals() and {"IPython", "ipykernel"} & sys.modules.keys():
        print("gpt.py is ready. To learn a text: train(minutes=3), or train(data='my.txt', steps=500)\n"
              "Then to write more of it: sample(tokens=500), or sample(prompt='To be', temperature=0.7)")
    else:
        sys.exit(main())
