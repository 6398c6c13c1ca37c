# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "tiktoken"]
# ///
# SPDX-License-Identifier: MIT
"""A GPT in one file: tokenizer, model, training and sampling, to be read from top to bottom.

    python gpt.py train                  learn input.txt, a play, in three minutes on two cores
    python gpt.py sample                 write more of it
    python gpt.py inspect                write a page that shows how it learnt
    python gpt.py train --data my.txt    learn something else
    python gpt.py train --help           every setting; `sample`, `eval`, ... have theirs

What the default model does otherwise than GPT-2 (`--arch gpt2 --optimizer adamw`):
  - positions rotate the queries and keys (RoPE) instead of being added to the embedding
  - RMSNorm instead of LayerNorm; queries and keys are normalised too; no biases
  - the MLP is gated (SwiGLU) instead of a GELU
  - keys and values have half as many heads as queries (GQA)
  - the head has weights of its own, and starts, like every block's output, at zero
  - the blocks' matrices are trained by Muon, everything else by AdamW

Settings, Tokenizers, Model, Data, Training and Sampling are the GPT: a reader may stop there.
Around it: Checkpoints, Looking inside, Weights in and out, Command line.
"""
import time
STARTED = time.monotonic()  # `--minutes` counts from here: loading torch is included
import argparse, codecs, contextlib, ctypes, difflib, functools, glob, hashlib, html
import io, itertools, json, math, os, re, shlex, signal, sys, tempfile, threading, uuid
import warnings, zipfile
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from inspect import Parameter, Signature
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

try:  # the fused kernels beside this file; Hugging Face has a package of the same name
    import kernels
    NO_KERNELS = "" if hasattr(kernels, "GPT_KERNELS") else "kernels.py is not here"
except Exception as e:  # a broken driver or compiler may fail in any way
    NO_KERNELS = f"no kernels.py: {e!r:.99}"

# Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D head size, V vocabulary.

# --- Settings ------------------------------------------------------------------------------------
# Each is declared once, here. The command line, its help and its checks come from these fields.

class Error(ValueError):
    """One line for the user: a request that cannot be met (code 2), a run that cannot go on (1)."""
    def __init__(self, line, code=2):
        super().__init__(line)
        self.code = code

    def _render_traceback_(self):  # what IPython shows of it
        return [f"gpt.Error: {self}"]

def quote(value):
    """What was given, as a message quotes it: at most 100 characters."""
    return repr(value) if len(repr(value)) <= 100 else repr(value)[:97] + "..."

def setting(default, help, low=0, high=math.inf, choices=""):
    """A field with its default, its meaning, and the numbers or the words that it may be."""
    rules = {"help": help, "low": low, "high": high, "choices": choices.split()}
    return field(default=default, metadata=rules)

def checked(f, value):
    """The value given to a field, converted to the field's type, or an Error."""
    kind, low, high = f.type, f.metadata["low"], f.metadata["high"]
    choices = f.metadata["choices"]
    value = str(value) if isinstance(value, os.PathLike) else value
    if value is None and f.default is None:
        return None
    if kind is list and isinstance(value, (str, list, tuple)):
        return [value] if isinstance(value, str) else [str(v) for v in value]
    if kind is str and isinstance(value, str) and (not choices or value in choices):
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float) and isinstance(value, (int, float, str)):
        with contextlib.suppress(ValueError, OverflowError):
            number = kind(value)
            if low <= number <= high and number < math.inf and number in (value, kind(str(value))):
                return number
    wanted = {list: "a text or a list of texts", str: "a text", bool: "true or false",
              int: "a whole number", float: "a number"}[kind]
    if kind in (int, float):
        wanted += f" of at least {low}" + (f" and at most {high}" if high < math.inf else "")
    wanted = f"one of {', '.join(choices)}" if choices else wanted
    raise Error(f"{f.name} is {wanted}; not {quote(value)}")

class Settings:
    """What the classes below have in common: their fields are checked when one is made."""
    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))

    @classmethod
    def check(cls, given):
        """The values in a dict, each converted and checked by the field of its name."""
        known = {f.name: f for f in fields(cls)}
        for name in given.keys() - known.keys():
            close = ["steps"] if name == "epochs" else difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise Error(f"there is no setting {quote(name)}{hint}")
        return {name: checked(known[name], value) for name, value in given.items()}

    @classmethod
    def pick(cls, settings):
        """One made from those items of a larger dict that this class knows."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    @classmethod
    def from_given(cls, given):
        """One made from what a command was given."""
        return cls(**given)

COMMANDS = {}  # name -> function

def command(settings, name=None):
    """Make a function of a `settings` a command of the shell, and a function of its fields."""
    known = {f.name: f for f in fields(settings)}
    names = list(dict.fromkeys([*settings.__annotations__, *known]))  # its own come first

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **given):
            given = call.__signature__.bind(*args).arguments | given
            try:
                return function(settings.from_given(settings.check(given)))
            except (MemoryError, RuntimeError) as e:
                if isinstance(e, torch.OutOfMemoryError) or "memory" in str(e) + repr(e).lower():
                    raise Error("out of memory: try a smaller batch_size (with a larger accum), "
                                "checkpoint_activations, a smaller block_size or size", 1) from None
                raise

        call.__signature__ = Signature([
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=known[name].default)
            for name in names])
        call.settings = settings
        COMMANDS[name or function.__name__] = call
        return call
    return decorate

@dataclass
class Config(Settings):
    """The shape of the model. `GPT(Config(vocab_size=65))` is a model."""
    vocab_size: int = setting(0, "tokens in the vocabulary (0: the tokenizer's; bpe: 1024)")
    block_size: int = setting(128, "context: the tokens that a prediction can see", 1)
    n_layer: int = setting(4, "blocks of attention and MLP; 0 is the bigram table", high=1000)
    n_head: int = setting(4, "attention heads", 1)
    n_kv_head: int = setting(0, "heads of keys and values (0: n_head; llama, qwen3: half of it)")
    head_dim: int = setting(0, "channels of a head (0: n_embd / n_head)")
    n_embd: int = setting(128, "channels of the residual stream", 1, 1 << 16)
    mlp_hidden: int = setting(0, "channels of the MLP (0: 4 n_embd; swiglu: 8/3 n_embd)")
    pos: str = setting("rope", "how positions enter", choices="learned rope none")
    norm: str = setting("rms", "LayerNorm or RMSNorm", choices="layer rms")
    mlp: str = setting("swiglu", "relu2 is squared, swiglu gated", choices="gelu relu relu2 swiglu")
    qk_norm: bool = setting(True, "RMSNorm on queries and keys, so that no score grows too large")
    bias: bool = setting(False, "biases in linear layers and LayerNorm")
    tie: bool = setting(False, "the head shares the embedding's weights")
    rope_theta: float = setting(10000.0, "RoPE: the longest wavelength is 2 pi times this", 1)
    norm_eps: float = setting(1e-6, "added to the mean square inside norms")
    dropout: float = setting(0.0, "share of what blocks add that training zeroes", high=0.99)

    def __post_init__(self):
        super().__post_init__()
        if not self.head_dim and self.n_embd % self.n_head:
            raise Error(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        gated = math.ceil(self.n_embd * 8 / 3 / 32) * 32  # three matrices hold as much as two of 4
        self.mlp_hidden = self.mlp_hidden or (gated if self.mlp == "swiglu" else 4 * self.n_embd)
        if self.n_head % self.n_kv_head:
            raise Error(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise Error(f"RoPE rotates pairs: head_dim {self.head_dim} is not even")

@dataclass
class Machine(Settings):
    """Where it runs."""
    device: str = setting("auto", "auto (cuda, else mps, else cpu) or a torch device")
    dtype: str = setting("auto", "precision; auto: the one that the device is fast in",
                         choices="auto float32 bfloat16 float16 float64")
    attention: str = setting("auto", "attention kernel", choices="auto triton cuda sdpa plain")
    seed: int = setting(1337, "the same seed gives the same run", high=2 ** 64 - 1)

@dataclass
class Training(Machine, Config):
    """A run."""
    data: list = setting(("input.txt",), "files (.txt, .jsonl), folders, globs, http(s) addresses")
    out: str = setting("out", "folder of the run")
    steps: int = setting(None, "length (default: the size's, or until the text is seen 5 times)", 1)
    minutes: float = setting(None, "length, from the start of the command to its end")
    size: str = setting("auto", "auto: tiny on a CPU, baby elsewhere",
                        choices="auto tiny baby gpt2 gpt2-medium gpt2-large gpt2-xl")
    tokenizer: str = setting("char", "bpe is learnt from the data", choices="char bpe gpt2")
    arch: str = setting("qwen3", "architecture", choices="bigram gpt2 llama qwen3")
    init: str = setting("", "fine-tune: a checkpoint, a run's or a Hugging Face folder, gpt2, ...")
    resume: bool = setting(False, "go on where the run in out stopped")
    overwrite: bool = setting(False, "replace the run in out")
    batch_size: int = setting(16, "sequences per forward pass and process", 1)
    accum: int = setting(1, "forward passes per step", 1)
    lr: float = setting(3e-3, "AdamW's peak learning rate; Muon's is 10 times that; init: a tenth")
    optimizer: str = setting("muon", "muon: for the blocks' matrices, and AdamW for the rest",
                             choices="muon adamw")
    momentum: float = setting(0.9, "Muon's: what a step keeps of earlier gradients", high=0.999)
    weight_decay: float = setting(0.1, "how much of a matrix a step takes away, times the rate")
    grad_clip: float = setting(1.0, "longest gradient (2-norm) that a step follows; 0 is off")
    warmup: int = setting(0, "steps over which the learning rate rises")
    eval_every: int = setting(None, "steps between looks: evaluation, log, probe, checkpoint", 1)
    probe: str = setting(None, "a text to watch the model read (default: a line; '': none)")
    compile: str = setting("auto", "torch.compile; auto: on CUDA", choices="auto on off")
    checkpoint_activations: bool = setting(False, "recompute activations: slower, less memory")

    @classmethod
    def from_given(cls, given):
        """What was given beats size, which beats arch, which beats the defaults above."""
        if given.get("steps") and given.get("minutes") is not None:
            raise Error("steps and minutes: give one of them")
        arch, size = given.get("arch", cls.arch), given.get("size", "auto")
        if size == "auto":
            size = "tiny" if pick_device(given.get("device", "auto")).type == "cpu" else "baby"
        settings = ARCHS[arch] | SIZES[size] | given | {"size": size}
        if arch == "bigram":
            if given.get("n_layer"):
                raise Error("arch bigram is a table, it has no layers: leave n_layer out")
            settings |= ARCHS[arch] | given | {"n_layer": 0}  # at any size
        heads = settings.get("n_head", cls.n_head)
        if arch in ("llama", "qwen3") and heads % 2 == 0:
            settings.setdefault("n_kv_head", heads // 2)
        s = cls(**settings)
        s.given = given
        return s

ARCHS = {
    "bigram": dict(optimizer="adamw", lr=0.05, weight_decay=0.05),  # smooths what was never seen
    "gpt2": dict(pos="learned", norm="layer", mlp="gelu", qk_norm=False, bias=True, tie=True,
                 norm_eps=1e-5),
    "llama": dict(qk_norm=False),
    "qwen3": dict(),
}
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),  # layers, heads, channels
              "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
SIZES = {
    "tiny": dict(),
    "baby": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64,
                 warmup=50),
    **{name: dict(n_layer=layers, n_head=heads, n_embd=channels, block_size=1024, accum=32,
                  warmup=200, lr=2e-3, momentum=0.95)
       for name, (layers, heads, channels) in GPT2_SIZES.items()}}
STEPS = {"tiny": 2200, "baby": 2500}  # if neither steps nor minutes are given; else 20,000

# --- Tokenizers ----------------------------------------------------------------------------------
# A model reads whole numbers. A tokenizer is a list of byte strings, one a number, and a way to
# cut a text into them.

# As much of a text as tiktoken can take: it fails on a million blanks. Up to the end of a word.
TIKTOKEN_CAN = r"(?s).{1,300000}(?:\Z|(?<=[^\W_])(?=\s))|.{1,300000}"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class Tokenizer:
    """What every tokenizer has: `tokens`, the bytes of each id; `eot`, the id that ends a document,
    or None; `ends`, the ids that end a sample; `first`, the ids that a text without a prompt begins
    with; `encode(text, special)` -> ids (T,), where `special` makes <|endoftext|> one token; and
    `state()`, what a checkpoint keeps: its kind, and the arguments that make it again."""
    eot, ends = None, frozenset()

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        ids = torch.as_tensor(ids).tolist()
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", "replace")

    def unknown(self, text):
        """The characters of a text that have no token."""
        return []

class CharTokenizer(Tokenizer):
    """One token per character. `CharTokenizer("abc").encode("cab").tolist() == [2, 0, 1]`"""
    def __init__(self, chars):
        self.chars = "".join(sorted(set(chars)))
        self.tokens = [c.encode() for c in self.chars]
        self.first = [max(0, self.chars.find("\n"))]
        self.ids = torch.full((0x110000,), -1, dtype=torch.int32)  # code point -> id
        self.ids[[ord(c) for c in self.chars]] = torch.arange(len(self.chars), dtype=torch.int32)

    @classmethod
    def train(cls, texts, vocab_size):
        chars = set()
        for text in texts:
            chars.update(text)
        return cls(chars)

    def encode(self, text, special=False):
        codes = bytearray(text.encode("utf-32-le"))
        ids = self.ids[torch.frombuffer(codes, dtype=torch.int32)] if text else self.ids[:0]
        if text and ids.min() < 0:
            missing = " ".join(map(repr, self.unknown(text)))
            raise Error(f"the text has characters that this model has never seen: {missing:.100} "
                        "(a model trained with --tokenizer bpe reads any text)")
        return ids

    def unknown(self, text):
        return [c for c in dict.fromkeys(text) if c not in self.chars]

    def state(self):
        return {"kind": "char", "chars": self.chars}

class BPETokenizer(Tokenizer):
    """Byte-pair encoding of UTF-8, as in GPT-2: any text can be written, and tiktoken does the
    merging. `tokens` are in the order in which merges made them; the last is <|endoftext|>."""
    def __init__(self, tokens):
        self.tokens = [t.encode("latin-1") if isinstance(t, str) else t for t in tokens]
        self.eot = len(tokens) - 1
        self.ends, self.first = {self.eot}, [self.eot]
        self.ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        self.encoding = import_tiktoken().Encoding(
            "gpt.py", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks,
            special_tokens={"<|endoftext|>": self.eot})

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges: join the commonest pair of neighbouring tokens, and again.
        `BPETokenizer.train(["aaa aaa"], 259).tokens[256:] == [b"aa", b"aaa", b"<|endoftext|>"]`"""
        vocab_size = vocab_size or 1024
        if vocab_size < 257:
            raise Error(f"vocab_size {vocab_size}: bpe needs 256 bytes and the end of text")
        words = [(list(word), n) for word, n in count_words(texts).items()]
        tokens = [bytes([i]) for i in range(256)]
        pairs, where = Counter(), defaultdict(set)  # how often, and in which words, pairs occur

        def count(i, sign):
            ids, n = words[i]
            for pair in zip(ids, ids[1:]):
                pairs[pair] += sign * n
                where[pair].add(i)

        for i in range(len(words)):
            count(i, 1)
        progress = Progress("learning bpe")
        while len(tokens) < vocab_size - 1 and pairs:
            a, b = max(pairs, key=pairs.get)
            if pairs[a, b] < 1:
                break
            tokens.append(tokens[a] + tokens[b])
            for i in where.pop((a, b)):
                count(i, -1)
                ids, j = words[i][0], 0
                while j < len(ids) - 1:
                    if ids[j] == a and ids[j + 1] == b:
                        ids[j:j + 2] = [len(tokens) - 1]
                    j += 1
                count(i, 1)
            del pairs[a, b]
            progress.say(f"{len(tokens):,} tokens of {vocab_size:,}")
        return cls(tokens + [b"<|endoftext|>"])

    def encode(self, text, special=False):
        allowed, ids = {"<|endoftext|>"} if special else set(), []
        for part in re.findall(TIKTOKEN_CAN, text):
            ids += self.encoding.encode(part, allowed_special=allowed, disallowed_special=())
        return torch.tensor(ids, dtype=torch.int32)

    def state(self):
        return {"kind": "bpe", "tokens": [token.decode("latin-1") for token in self.tokens]}

class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own 50,257 tokens, which tiktoken downloads once."""
    @classmethod
    def train(cls, texts, vocab_size):
        try:
            ranks = import_tiktoken().get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as e:
            raise Error(f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}); set "
                        "TIKTOKEN_CACHE_DIR to a folder that has its two files, vocab.bpe as "
                        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and encoder.json as "
                        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") from None
        return cls(sorted(ranks, key=ranks.get) + [b"<|endoftext|>"])

TOKENIZERS = {"char": CharTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}

def tokenizer_from(state):
    """A tokenizer from what a checkpoint keeps of it."""
    return TOKENIZERS[state["kind"]](**{name: v for name, v in state.items() if name != "kind"})

def count_words(texts, limit=1 << 19):
    """How often each word occurs, as bytes; merges stay within words. When the different words
    come to `limit` bytes, the rest of the texts is left out."""
    import regex  # comes with tiktoken
    counts = Counter()
    for text in texts:
        for word, n in Counter(regex.findall(GPT2_PATTERN, text)).items():
            for part in re.findall(b"(?s).{1,64}", word.encode()):
                counts[part] += n
        if sum(map(len, counts)) > limit:
            notice("bpe learns from the beginning of the text, which has enough different words")
            break
    return counts

def import_tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise Error("this tokenizer needs tiktoken: pip install tiktoken") from None
    return tiktoken

# --- Model ---------------------------------------------------------------------------------------
# Each token becomes a vector, the residual stream. Every block reads it and adds to it: attention
# brings what earlier tokens know, the MLP works on each token alone. What the last block leaves is
# compared with one vector per token of the vocabulary, the rows of the head: the larger the
# product, the likelier that token comes next.

def causal_mask(TQ, TK, like):
    """0 where query i may see key j, else -inf. The queries are the last TQ of TK positions."""
    mask = torch.full((TQ, TK), -math.inf, dtype=like.dtype, device=like.device)
    return mask.triu(TK - TQ + 1)

def attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v: the definition, which faster ones are checked against.
    q (B, TQ, H, D); k, v (B, TK, H_kv, D), where H / H_kv query heads share a key head. With as
    many key heads, and the heads in front, (B, H, T, D), this is

        scores = q @ k.mT * D ** -0.5 + causal_mask(TQ, TK, q)
        return scores.softmax(dim=-1) @ v

    Here the queries that share a key head stand below each other in one matrix."""
    B, TQ, H, D = q.shape
    TK, H_kv = k.shape[1:3]
    q = q.unflatten(2, (H_kv, H // H_kv)).permute(0, 2, 3, 1, 4).reshape(B * H_kv, -1, D)
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B H_kv, TK, D)
    mask = causal_mask(TQ, TK, q).repeat(H // H_kv, 1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=D ** -0.5)  # (B H_kv, H / H_kv TQ, TK)
    out = scores.softmax(dim=-1) @ v
    return out.view(B, H, TQ, -1).transpose(1, 2)  # (B, TQ, H, D)

def fused_attention(q, k, v):
    """The same by torch's own kernels, of which only the CPU's all know groups."""
    TQ, TK, groups = q.size(1), k.size(1), q.size(2) // k.size(2)
    if groups > 1 and q.device.type != "cpu":
        k, v, groups = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    mask = causal_mask(TQ, TK, q) if 1 < TQ < TK else None
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=TQ == TK, enable_gqa=groups > 1)
    return y.transpose(1, 2)

def choose_attention(model, impl, dtype, batch_size=1, sampling=False):
    """Let the blocks use the attention that suits this machine, or `impl` -> what it is, and why.
    It must agree with `attention` above: what is changed there is never silently ignored."""
    c, device = model.config, next(model.parameters()).device
    cpu = impl == "auto" and device.type == "cpu"  # by a rule: runs there repeat to the bit
    if impl == "plain" or cpu and not sampling and c.block_size <= 256:
        attend, reason = attention, "plain attention"
    elif cpu or NO_KERNELS and impl in ("auto", "sdpa"):
        attend, reason = fused_attention, "torch's attention"
    else:
        shape = batch_size, c.block_size, c.n_head, c.n_kv_head, c.head_dim
        try:
            attend, reason = kernels.choose(device, dtype, shape, impl)
        except (ValueError, NameError, AttributeError) as e:
            raise Error(f"attention {impl}: {NO_KERNELS or e}") from None
    q, k, v = torch.randn(3, 1, c.block_size, 1, c.head_dim, device=device, dtype=dtype)
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    wanted, got = attention(q, k, v).cpu().double(), attend(q, k, v).cpu().double()
    torch.set_float32_matmul_precision(products)
    half = dtype in (torch.float16, torch.bfloat16)  # in which the errors come to 0.006
    if not (got - wanted).norm() < (0.02 if half else 1e-4) * wanted.norm():
        attend, reason = attention, f"plain attention, which {reason} does not agree with"
    for block in getattr(model, "blocks", ()):
        block.attn.attend = attend
    return reason

def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, config.norm_eps)

def apply_rope(x, cos, sin):
    """RoPE (Su et al., 2021): turn each pair (x[i], x[i + D/2]) by its position's angle, so that
    the product of a query and a key depends on how far apart they stand, not on where.
    x (B, T, H, D); cos, sin (T, 1, D): (a, b) -> (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)

class Attention(nn.Module):
    """Each token asks with a query; every earlier token, and the token itself, answers with a key;
    the better the two match, by their dot product, the more of that token's value is taken over.
    Several heads do so side by side."""
    def __init__(self, config, layer):
        super().__init__()
        C, D, bias = config.n_embd, config.head_dim, config.bias
        self.layer, self.head_dim = layer, D
        self.q = nn.Linear(C, config.n_head * D, bias=bias)
        self.k = nn.Linear(C, config.n_kv_head * D, bias=bias)
        self.v = nn.Linear(C, config.n_kv_head * D, bias=bias)
        self.out = nn.Linear(config.n_head * D, C, bias=bias)
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.attend = attention  # `choose_attention` may put a faster one here

    def forward(self, x, rope, cache):
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        q, k = self.q_norm(q.type_as(x)), self.k_norm(k.type_as(x))  # autocast gives x in float32
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k = q.type_as(v), k.type_as(v)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.out(self.attend(q, k, v).reshape(B, T, -1))

class MLP(nn.Module):
    """A hidden layer for each token alone."""
    def __init__(self, config):
        super().__init__()
        C, hidden, self.kind = config.n_embd, config.mlp_hidden, config.mlp
        self.gate = nn.Linear(C, hidden, bias=config.bias) if self.kind == "swiglu" else None
        self.up = nn.Linear(C, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, C, bias=config.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2's approximation
        x = F.relu(self.up(x))
        return self.down(x.square() if self.kind == "relu2" else x)

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None):
        # x is the residual stream: blocks only ever add to it
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

class KVCache:
    """The keys and values of the first `length` tokens, so that they need not be computed again."""
    def __init__(self, model, B):
        c, weight = model.config, next(model.parameters())
        self.kv = weight.new_empty(c.n_layer, 2, B, c.block_size, c.n_kv_head, c.head_dim)
        self.length = 0

    def append(self, layer, k, v):
        """Keep k and v (B, T, H_kv, D) of new tokens -> those of all tokens of this layer."""
        stop = self.length + k.size(1)
        self.kv[layer, 0, :, self.length:stop] = k
        self.kv[layer, 1, :, self.length:stop] = v
        return self.kv[layer, :, :, :stop]

def next_token_loss(x, weight, targets):
    """Mean cross-entropy of the logits x @ weight^T: minus the log of the probability that was
    given to the token that came. 0 is certainty, ln(V) is knowing nothing. x (B, T, C); weight
    (V, C), or None where x are logits; targets (B, T), of which -1 do not count."""
    x, targets = x.flatten(0, 1), targets.flatten()
    if weight is not None and not NO_KERNELS:
        return kernels.linear_cross_entropy(x, weight, targets)  # never holds all logits
    logits = x if weight is None else F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-1)

class GPT(nn.Module):
    """Ids (B, T) to logits over the next token (B, T, V), or with targets (B, T) to the loss."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.positions = nn.Embedding(c.block_size, c.n_embd) if c.pos == "learned" else None
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie:
            self.head.weight = self.embed.weight
        if c.pos == "rope":
            frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
            angles = torch.outer(torch.arange(c.block_size), frequencies)[:, None]
            cos, sin = angles.cos(), angles.sin()  # (T, 1, D / 2)
            self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)
            self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)
        self.checkpoint_activations = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Start where the first loss is ln(V): an untied head, and each block's outputs, at zero;
        a tied head small, and the 2 n_layer outputs scaled by (2 n_layer)^-0.5, as in GPT-2."""
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
            nn.init.zeros_(self.head.weight)

    def forward(self, idx, targets=None, cache=None, last=False):
        """With a cache, idx are the tokens after those that it holds. `last`: (B, 1, V) logits."""
        start = cache.length if cache else 0
        stop = start + idx.size(1)
        x = self.embed(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[start:stop]
        x = self.dropout(x)
        rope = (self.cos[start:stop], self.sin[start:stop]) if self.config.pos == "rope" else None
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        if cache:
            cache.length = stop
        if targets is not None:
            return next_token_loss(self.norm(x), self.head.weight, targets)
        return self.head(self.norm(x[:, -1:] if last else x))

class Bigram(nn.Module):
    """The simplest language model: row i of a table holds the logits of what follows token i."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)

    def forward(self, idx, targets=None, cache=None, last=False):
        logits = self.table(idx[:, -1:] if last else idx)
        if cache:
            cache.length += idx.size(1)
        return logits if targets is None else next_token_loss(logits, None, targets)

def build(config):
    return GPT(config) if config.n_layer else Bigram(config)

def count_parameters(model):
    return sum(p.numel() for p in model.parameters())

# --- Data ----------------------------------------------------------------------------------------
# Text is read in pieces, cut into tokens once, and kept on disk as one long row of whole numbers.
# A step of training looks at windows of it here and there, an evaluation goes through them all.

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

def cache_folder():
    """$GPT_CACHE, else ~/.cache/gpt; where that cannot be written, a temporary one."""
    try:
        folder = Path(os.environ.get("GPT_CACHE") or Path.home() / ".cache" / "gpt")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except (OSError, RuntimeError) as e:  # RuntimeError: a user without a home
        folder = Path(tempfile.mkdtemp(prefix="gpt-"))
        notice(f"no cache folder can be written ({first_line(e)}); tokens are kept in {folder}")
        return folder

def download(url, path, sha256=None):
    """Fetch an address into a file, once."""
    if not path.exists():
        notice(f"downloading {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, sys.stderr is not None)
        except Exception as e:  # no network, no such address, another file than expected
            raise Error(f"{url} could not be downloaded ({first_line(e)}); "
                        f"put the file there yourself: {path}") from None
    return path

def find_files(name):
    """The files that one name in `data` stands for; those of folders and globs are sorted."""
    path = Path(name).expanduser()
    beside = Path(globals().get("__file__", ".")).parent / "input.txt"
    if re.match(r"https?://", name):
        unique = hashlib.sha256(name.encode()).hexdigest()[:16]
        return [download(name, cache_folder() / f"{unique}-{path.name.split('?')[0]}")]
    if not name:
        raise Error("data is an empty name")
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        inside = [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file()]
        found = [path / p for p in inside if p.suffix.lower() == ".txt"
                 and not any(part.startswith(".") for part in p.parts)]
        if not found:
            raise Error(f"{name}: there is no .txt file in this folder")
        return found
    if os.path.exists(path):
        raise Error(f"{name} is a pipe or a device: save the text in a file first")
    if found := sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)):
        return [Path(p) for p in found]
    if name == "input.txt" and beside.is_file():
        return [beside]
    if name == "input.txt":
        notice("there is no input.txt here: using Tiny Shakespeare instead")
        return [download(SHAKESPEARE[0], cache_folder() / "tinyshakespeare.txt", SHAKESPEARE[1])]
    raise Error(f"{quote(name)}: no such file, and no file matches it")

def read_documents(path, size):
    """Each document of a file, as an iterator over blocks of text: a .jsonl has one a line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() != ".jsonl":
            yield iter(lambda: file.read(size), "")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    text = json.loads(line)
                    text = text["text"].encode("utf-16", "surrogatepass")
                except KeyError:
                    raise Error(f"{path}: line {number} has no `text`: {quote([*text])}") from None
                except (ValueError, TypeError, AttributeError, RecursionError):
                    raise Error(f"{path}: line {number} is no JSON object with a `text`") from None
                yield [text.decode("utf-16", "replace")]

WORD_END = re.compile(r"(?s).*[^\W_](?=\s)")  # greedy: the last in a text

def read_pieces(paths, size=1 << 17):
    """The text in pieces of about `size` characters, and None between documents. A piece ends
    between a letter or digit and the white space after it, where no tokenizer joins anything;
    where there is no such place in twice the size, anywhere."""
    first = True
    for path in paths:
        try:
            for document in read_documents(path, size):
                if not first:
                    yield None
                first, rest = False, ""
                for block in document:
                    rest += block
                    end = WORD_END.match(rest)
                    if end or len(rest) >= 2 * size:
                        cut = end.end() if end else len(rest)
                        yield rest[:cut]
                        rest = rest[cut:]
                yield rest
        except UnicodeDecodeError as e:
            raise Error(f"{path}: not UTF-8 text ({e.reason})") from None
        except OSError as e:
            raise Error(f"{path}: {e.strerror}") from None

# ids (N,) are on disk; the fingerprint is theirs, whatever the files are called
Tokens = namedtuple("Tokens", "ids tokenizer fingerprint files text_bytes")

def load_tokens(data, tokenizer="char", vocab_size=0):
    """Tokenise files, or find that it was done before. `tokenizer`: one, or the kind to make."""
    paths = list(itertools.chain.from_iterable(find_files(name) for name in data))
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    what = [tokenizer, vocab_size] if isinstance(tokenizer, str) else tokenizer.state()
    key = hashlib.sha256(json.dumps([FORMAT, files, what]).encode()).hexdigest()[:32]
    folder = cache_folder()
    about, binary = folder / f"{key}.json", folder / f"{key}.bin"
    try:
        known = json.loads(about.read_text("utf-8"))
        complete = binary.stat().st_size == known["count"] * known["width"]
    except (OSError, ValueError, KeyError):
        complete = False
    if not complete:
        if isinstance(tokenizer, str):
            texts = (text for text in read_pieces(paths) if text is not None)
            tokenizer = TOKENIZERS[tokenizer].train(texts, vocab_size)
        known = write_tokens(read_pieces(paths), tokenizer, binary)
        with atomic(about) as file:
            file.write(json.dumps(known | {"tokenizer": tokenizer.state()}).encode())
    elif isinstance(tokenizer, str):
        tokenizer = tokenizer_from(known["tokenizer"])
    if known["count"] < 2:
        raise Error(f"{', '.join(data):.100}: too little text, {known['count']} tokens")
    dtype = torch.uint16 if known["width"] == 2 else torch.int32
    ids = torch.from_file(str(binary), shared=False, size=known["count"], dtype=dtype)
    return Tokens(ids, tokenizer, known["fingerprint"], len(paths), known["text_bytes"])

def write_tokens(pieces, tokenizer, path):
    """Write the ids of all pieces into a file -> what load_tokens must know of it."""
    width = 2 if len(tokenizer.tokens) <= 1 << 16 else 4
    dtype = torch.int16 if width == 2 else torch.int32  # the bits of uint16, but sooner made
    digest, count, text_bytes, progress = hashlib.sha256(), 0, 0, Progress("tokenising")

    between = torch.tensor([] if tokenizer.eot is None else [tokenizer.eot], dtype=torch.int32)

    def encode(batch):
        ids = torch.cat([between if text is None else tokenizer.encode(text) for text in batch])
        raw = bytearray(width * len(ids))
        if raw:
            torch.frombuffer(raw, dtype=dtype).copy_(ids)
        return raw

    batches = batch_pieces(pieces)
    with atomic(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        while several := list(itertools.islice(batches, 2 * os.cpu_count())):
            for raw in pool.map(encode, several):
                digest.update(raw)
                file.write(raw)
                count += len(raw) // width
            text_bytes += sum(len(text.encode()) for batch in several for text in batch if text)
            progress.say(f"{count / 1e6:.0f} million tokens so far")
    return {"count": count, "width": width, "text_bytes": text_bytes,
            "fingerprint": digest.hexdigest()}

def batch_pieces(pieces, size=1 << 17):
    """Lists of pieces with about `size` characters together, however short a document is."""
    batch, characters = [], 0
    for text in pieces:
        batch.append(text)
        characters += len(text or "")
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

def split(ids):
    """The first nine tenths train, the rest validates; that may be empty."""
    n = max(2, int(0.9 * len(ids)))
    return ids[:n], ids[n:]

def get_batch(ids, T, shape, rank, seed, step):
    """This process's windows (accum x batch, T + 1) of a step: T inputs, which shifted by one are
    the targets. `shape`: (accum, processes, batch). The n-th window of a run begins at n times
    the golden ratio, modulo the text (a Weyl sequence): wherever a run stops, its windows lie
    nearly evenly, where random ones leave gaps. The seed shifts them all."""
    n = math.prod(shape)
    places = torch.arange(step * n, step * n + n, dtype=torch.float64) * 0.6180339887498949
    starts = ((places + seed % 2 ** 32 * 2 ** 0.5 % 1) % 1 * (len(ids) - T)).long()
    starts = starts.view(shape)[:, rank].flatten()
    return torch.stack([ids[i:i + T + 1] for i in starts.tolist()]).long()

@torch.no_grad()
def estimate_loss(model, ids, stride=None, batch_size=32, limit=None):
    """Mean loss in nats over a text (N,), each of its N - 1 predictions once -> (loss, how many).
    Windows of block_size begin every `stride` tokens; after the first, one counts only what the one
    before it has not. `limit`: look at about so many tokens, in windows that lie evenly."""
    T = min(model.config.block_size, len(ids) - 1)
    stride = min(stride or T, T)
    starts = torch.arange(0, max(1, len(ids) - 1 - T + stride), stride)
    if limit and len(starts) > max(1, limit // T):
        starts = starts[torch.linspace(0, len(starts) - 1, max(1, limit // T)).long()]
    device, training, total, counted = next(model.parameters()).device, model.training, 0.0, 0
    model.eval()
    for batch in starts.split(batch_size):
        windows = [ids[i:i + T + 1].long() for i in batch.tolist()]
        windows = nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=-1)
        targets = windows[:, 1:].clone()
        targets[batch > 0, :T - stride] = -1
        n = int((targets >= 0).sum())
        total += n * model(windows[:, :-1].clamp(min=0).to(device), targets.to(device)).item()
        counted += n
    model.train(training)
    return total / counted, counted

# --- Training ------------------------------------------------------------------------------------
# Look at a few windows of the text, measure the loss of every prediction in them, step against its
# gradient; again.

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024, kellerjordan.github.io/posts/muon): for a
    matrix with singular values S in U S V^T, step along U V^T, which moves all its directions
    equally. Matrices of one shape are stacked and go through it together."""
    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        group, shapes = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            shapes[p.shape].append(p)
        for (rows, columns), params in shapes.items():
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
            nesterov = grad.lerp(momentum, group["momentum"])
            update = orthogonalise(nesterov).to(grad.dtype)
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-lr)

def orthogonalise(x, steps=5):
    """x (n, rows, columns) -> about the nearest matrices whose singular values are all 1 (they end
    between 0.7 and 1.2), by Newton-Schulz: x <- 3.44 x - 4.78 (x x^T) x + 2.03 (x x^T)^2 x."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:  # no element is above 1 any more, so float16 will do where bfloat16 is slow
        modern = torch.cuda.get_device_capability(x.device) >= (8, 0)
        x = x.to(torch.bfloat16 if modern else torch.float16)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        xx = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x

def make_optimizers(model, s):
    """Muon for the blocks' matrices, AdamW for embeddings, head and vectors; or AdamW for all."""
    muon = s.optimizer == "muon" and model.config.n_layer > 0
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2] if muon else []
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    betas, fused = (0.8 if muon else 0.9, 0.95), rest[0].device.type != "mps"
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], s.lr, betas, fused=fused)]
    if muon:
        optimizers.append(Muon(hidden, 10 * s.lr, s.momentum, s.weight_decay))
    for group in param_groups(optimizers):
        group["peak"] = group["lr"]
    return optimizers

def param_groups(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]

def lr_share(step, progress, warmup):
    """The learning rate as a share of its peak: up over `warmup` steps, then in a line to zero."""
    return min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1.0 - progress)

def pick_device(name):
    """auto -> cuda, mps or cpu, in that order."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise Error(f"device {quote(name)} cannot be used: {first_line(e)}") from None

def pick_dtype(name, device):
    """auto -> the precision that this device is fast in, and why."""
    if name == "float64" and device.type == "mps":
        raise Error("dtype float64: MPS does not have it")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda" or torch.version.hip:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        amx = device.type == "cpu" and capabilities.get("amx_bf16")
        note = ", whose AMX units multiply in bfloat16" if amx else ""
        return torch.float32, f"auto on {device.type}{note}"
    major, minor = torch.cuda.get_device_capability(device)
    dtype = torch.float16 if major == 7 else torch.bfloat16 if major >= 8 else torch.float32
    return dtype, f"auto on compute capability {major}.{minor}"  # before 8.0 bfloat16 is emulated

def precision(device, dtype):
    """Matrix products in `dtype`, the rest as autocast knows to be safe."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype) if half else contextlib.nullcontext()

@contextlib.contextmanager
def interruptible():
    """Yields a list that Ctrl-C, SIGTERM and SIGHUP (a closed terminal) are put into, so that a run
    can finish its step and save. A second one leaves at once."""
    received, before = [], {}

    def stop(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:
            before[getattr(signal, name)] = signal.getsignal(getattr(signal, name))
    before = {number: handler for number, handler in before.items() if handler is not None
              and (handler != signal.SIG_IGN or number == signal.SIGINT)}  # None: the host's own
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

@contextlib.contextmanager
def processes(device):
    """Join the other processes that torchrun started -> (rank, how many)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1
        return
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise Error("WORLD_SIZE is set without RANK and MASTER_ADDR: unset it, or use torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun's store outlives a restart: under a prefix no process finds a dead one's address
    store = dist.PrefixStore(RESTARTS, next(dist.rendezvous("env://"))[0])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(days=1))  # the first may tokenise
    try:
        yield rank, world
    except RuntimeError as e:
        raise Error(f"process {rank} cannot go on; did another die? {first_line(e)}", 1) from None
    finally:
        dist.destroy_process_group()

RESTARTS = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's
MAY_CHANGE = {"out", "resume", "overwrite", "data", "steps", "minutes", "device", "dtype",
              "attention", "compile", "checkpoint_activations", "eval_every", "probe"}  # resuming
LOOKS = 20  # at even distances in a run, besides those at steps 0, 1, 2, 4, 8, ...

@command(Training)
def train(s):
    """train a model"""
    out, device, before = Path(s.out), pick_device(s.device), torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        rank, world = stack.enter_context(processes(device))
        signals = stack.enter_context(interruptible())
        with contextlib.suppress(OSError, AttributeError, TypeError):
            # Linux's malloc keeps what is freed, instead of asking for it anew: 11 % faster
            libc = ctypes.CDLL(None)
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        if rank == 0:
            stack.enter_context(locked(out))
        if s.dtype == "auto":
            # On a CPU "medium" lets oneDNN multiply instead of MKL: float32 all the same, except
            # with AMX units, which take bfloat16, and faster. On a GPU "high" is TF32.
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
        held = (out / "ckpt.pt").exists() or (out / "best.pt").exists()
        checkpoint = tokenizer = weights = None
        if s.resume or held and RESTARTS != "0":
            checkpoint = read_checkpoint(out / "ckpt.pt")
            s, weights = resumed(s, checkpoint), checkpoint["model"]
            tokenizer = tokenizer_from(checkpoint["tokenizer"])
        elif held and not s.overwrite:
            raise Error(f"{out} holds a run: --resume goes on with it, --out OTHER starts another "
                        "beside it, --overwrite replaces it")
        elif s.init:
            model, tokenizer = load_model(s.init)
            s, weights = fine_tuned(s, model.config, tokenizer), model.state_dict()
        run = Run(s, device, rank, world, signals)
        run.prepare(tokenizer, weights)
        if checkpoint:
            run.restore(checkpoint)
        if rank == 0:
            run.clean_folder()
        return run.loop()

def resumed(s, checkpoint):
    """The settings of a run that goes on: its own, and what may change."""
    settings, step = checkpoint["settings"], checkpoint["step"]
    for name in s.given.keys() - MAY_CHANGE:
        if s.given[name] != settings.get(name):
            raise Error(f"resume: the run in {s.out} has {name} {settings.get(name)}, "
                        f"not {quote(s.given[name])}")
    if s.given.get("steps", step) < step:
        raise Error(f"resume: the run in {s.out} is at step {step} already; steps must be more")
    if s.given.keys() & {"steps", "minutes"}:
        settings |= {"steps": None, "minutes": None}
    return Training(**(settings | s.given))

def fine_tuned(s, config, tokenizer):
    """The settings of a run that starts from the weights of another model: that model's shape."""
    need_tokenizer(tokenizer, s.init)
    shape = asdict(config) | {"dropout": s.given.get("dropout", 0.0)}
    for name in s.given.keys() & shape.keys():
        if s.given[name] != shape[name]:
            raise Error(f"init {s.init} has {name} {shape[name]}, not {s.given[name]}")
    return Training(**(asdict(s) | shape | {"lr": s.given.get("lr", s.lr / 10)}))

class Run:
    """A training run. `loop` says what it does; the methods before it make it ready."""
    def __init__(self, s, device, rank, world, signals):
        self.s, self.out, self.device = s, Path(s.out), device
        self.rank, self.world, self.signals = rank, world, signals
        self.started = self.saved_at = getattr(train, "started", None) or time.monotonic()
        self.step, self.begun_at, self.looked, self.seconds_before = 0, 0, -1, 0.0
        self.best, self.val_loss = math.inf, None
        self.last = {"train_loss": None, "lr": 0.0, "grad_norm": None}
        self.skipped = self.worse = self.warned = self.logged = self.busy = 0
        self.looking = self.reserve = 0.0  # seconds of all looks, and of one and the end

    def prepare(self, tokenizer, weights):
        """Read the data and make the model, with the tokenizer and weights if they are given."""
        s = self.s
        self.read_data(tokenizer)
        self.dtype, why = pick_dtype(s.dtype, self.device)
        torch.manual_seed(s.seed)
        self.model = build(Config.pick(asdict(s)))  # what is evaluated, looked into and saved
        self.model.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        if weights:
            self.model.load_state_dict(weights)
        self.model.checkpoint_activations = s.checkpoint_activations
        attention = choose_attention(self.model, s.attention, self.dtype, s.batch_size)
        self.optimizers = make_optimizers(self.model, s)
        # float16 loses small gradients: the loss is multiplied before the backward pass
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.forward = self.model
        if self.rank == 0:
            nothing = f": knowing nothing is a loss of {math.log(s.vocab_size):.2f}"
            say(f"{self.device}, {str(self.dtype)[6:]} ({why}), {attention}")
            say(f"{count_parameters(self.model):,} parameters, {s.vocab_size:,} tokens in the "
                f"vocabulary{'' if s.init else nothing}")
        seconds = self.rehearse()
        steps = s.steps or max(1, int(60 * s.minutes / seconds))
        seen, most = steps * self.tokens_per_step, 1 << (15 if self.device.type == "cpu" else 18)
        self.eval_tokens = max(self.T, min(seen // 600, most))
        text, times = self.text, seen / len(self.train_ids)
        if self.rank == 0:
            files = f"{text.files} file" + ("s" if text.files > 1 else "")
            say(f"{', '.join(s.data):.60}: {text.text_bytes / 1e6:,.2f} MB in {files}, "
                f"{len(text.ids):,} tokens; training reads nine tenths, {times:.2g} times, "
                f"in about {steps:,} steps")
        if s.steps and steps * seconds > 600:
            self.notice(f"a step takes about {seconds:.1f} s, this run {steps * seconds / 60:,.0f} "
                        "minutes; --minutes M makes one that ends in time")

    def read_data(self, tokenizer):
        s = self.s
        if self.rank:  # the first process tokenises; the others wait, and find it done
            dist.barrier()
        self.text = load_tokens(s.data, tokenizer or s.tokenizer, s.vocab_size)
        if self.world > 1 and not self.rank:
            dist.barrier()
        self.tokenizer, V = self.text.tokenizer, len(self.text.tokenizer.tokens)
        self.train_ids, self.val_ids = split(self.text.ids)
        self.T = min(s.block_size, len(self.train_ids) - 1)
        if s.vocab_size not in (0, V) and (tokenizer or s.tokenizer != "bpe"):
            raise Error(f"vocab_size {s.vocab_size}: this tokenizer has {V} tokens")
        if s.vocab_size > V:
            self.notice(f"the text has no more pairs to join: the vocabulary ends at {V}")
        if self.T < s.block_size:
            self.notice(f"the text is short: the context shrinks to {self.T} tokens")
        if len(self.val_ids) < 2:
            self.notice("the text is too short to keep a tenth of it for validation")
        s.vocab_size = V
        s.block_size = s.block_size if tokenizer else self.T
        self.tokens_per_step = s.batch_size * s.accum * self.world * self.T
        if not s.steps and s.minutes is None:
            times = 16 if s.dropout else 5  # more than that it would learn the text by heart
            enough = math.ceil(times * len(self.train_ids) / self.tokens_per_step)
            s.steps = min(STEPS.get(s.size, 20000), max(100, enough))

    def rehearse(self):
        """Passes forward and back that change nothing -> the seconds that a step will take. They
        compile the model, if it is to be; where that fails, training does without."""
        rows = get_batch(self.train_ids, self.T, (1, 1, self.s.batch_size), 0, 0, 0)
        wanted, seconds = self.s.compile, 0
        if wanted == "on" or wanted == "auto" and self.device.type == "cuda":
            try:
                self.forward = torch.compile(self.model)
                self.backward(rows)
            except Exception as e:  # a compiler may fail in any way
                self.notice(f"torch.compile does not work here ({first_line(e)}); going on without")
                self.forward = self.model
        for _ in range(3):
            begun = time.monotonic()
            self.backward(rows)
            self.model.zero_grad()
            seconds = time.monotonic() - begun
            if seconds > 20 or self.signals:
                break
        return seconds * self.s.accum

    def restore(self, checkpoint):
        """Put back what the checkpoint holds besides the weights."""
        if checkpoint["data_fingerprint"] != self.text.fingerprint:
            raise Error(f"resume: the run in {self.out} was trained on other data than "
                        f"{', '.join(self.s.data):.100}")
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        if checkpoint["scaler"] and self.scaler.is_enabled():  # a run in another precision has none
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("step", "looked", "best", "val_loss", "last"):
            setattr(self, name, checkpoint[name])
        self.seconds_before, self.logged = checkpoint["seconds"], self.step
        self.begun_at = self.step

    @functools.cached_property
    def probe_ids(self):
        """What the model is watched reading: `probe`, or a whole line that it does not train on."""
        ids, room = read_prompt(self.s.probe or "", self.tokenizer)[1], min(40, self.T)
        if not ids:
            unseen = self.val_ids if len(self.val_ids) else self.train_ids
            text = self.tokenizer.decode(unseen[:4000])
            lines = [self.tokenizer.encode(line).tolist() for line in text.splitlines()[1:-1]]
            ids = max(lines, key=lambda ids: len(ids) * (len(ids) <= room), default=[])
        return torch.tensor((ids or self.tokenizer.first)[:room])

    def clean_folder(self):
        """Remove what an overwritten run has left, and what is beyond the step to go on from."""
        for name in ("ckpt.pt", "best.pt") if self.looked < 0 and not self.step else ():
            (self.out / name).unlink(missing_ok=True)
        for path in (self.out / "log.jsonl", self.out / "probe.jsonl"):
            lines = [json.dumps(line) + "\n" for line in read_lines(path)
                     if line["step"] <= min(self.step, self.looked)]
            if path.exists():
                with atomic(path) as file:
                    file.write("".join(lines).encode())

    def loop(self):
        looks = math.inf
        while True:
            progress, stop = self.agree()
            done, before, looks = progress >= 1, looks, int(LOOKS * progress + 1e-9)
            due = done or looks > before or self.step & (self.step - 1) == 0  # 0, 1, 2, 4, 8, ...
            if self.s.eval_every:
                due = done or self.step % self.s.eval_every == 0
            elif self.s.minutes:  # of which a sixth at most is for looking
                due = done or due and self.looking <= self.seconds() / 6
            begun = time.monotonic()
            if self.rank == 0 and due and self.looked < self.step:  # not yet, before it went on
                self.look()
            if self.rank == 0 and (due or stop or begun - self.saved_at > 300):
                self.save("ckpt.pt", final=stop or done)
            if done or stop:
                return self.finish(stop)
            self.looking += time.monotonic() - begun
            self.reserve = max(self.reserve, 1.5 * (time.monotonic() - begun) + 0.3)
            begun = time.monotonic()
            self.train_step(progress)
            self.busy += time.monotonic() - begun

    def agree(self):
        """-> (share of the run that is behind us, signal or 0): the first process's word."""
        left = 60 * (self.s.minutes or 0) - self.reserve
        progress = self.step / self.s.steps if self.s.steps else self.seconds() / max(1e-9, left)
        stop = self.signals[0] if self.signals else 0
        if self.world > 1:
            both = torch.tensor([progress * (self.rank == 0), stop], dtype=torch.float64)
            both = both.to(self.device)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            progress, stop = both[0].item(), int(both[1])
        return progress, stop

    def train_step(self, progress):
        """The gradient of the loss over batch_size x accum x processes windows, then a step. All
        chance in it comes from (seed, step, rank): a run that goes on repeats it exactly."""
        s, rate = self.s, lr_share(self.step, progress, self.s.warmup)
        for group in param_groups(self.optimizers):
            group["lr"] = group["peak"] * rate
        torch.manual_seed((s.seed + 7919 * self.step + 104_729 * self.rank) % 2 ** 64)  # dropout's
        shape = s.accum, self.world, s.batch_size
        loss = self.backward(get_batch(self.train_ids, self.T, shape, self.rank, s.seed, self.step))
        if self.signals and s.accum > 1 and self.world == 1:  # it may take long: done again later
            return self.model.zero_grad()
        if self.world > 1:
            for tensor in (loss, *(p.grad for p in self.model.parameters())):
                dist.all_reduce(tensor.div_(self.world))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        loss, norm = torch.stack((loss, norm.to(loss))).tolist()
        self.skipped = 0 if math.isfinite(loss + norm) else self.skipped + 1
        if self.skipped == 20:
            raise Error("20 steps in a row had no finite loss and gradient: try a lower lr, a "
                        "longer warmup or dtype float32; the checkpoint is from before", 1)
        if self.skipped and not self.scaler.is_enabled():  # which finds its scale in this way
            self.notice(f"step {self.step}: loss or gradient are not finite; the step is skipped")
        for optimizer in self.optimizers if not self.skipped else ():
            optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.model.zero_grad()
        self.step += 1
        self.last = {"train_loss": loss, "lr": s.lr * rate, "grad_norm": norm}

    def backward(self, windows):
        """Add up the gradient of the mean loss over windows (rows, T + 1) -> that loss."""
        total, passes = torch.zeros((), device=self.device), windows.split(self.s.batch_size)
        for rows in passes:
            if self.signals and self.s.accum > 1 and self.world == 1:
                break
            rows = rows.to(self.device)
            with precision(self.device, self.dtype):
                loss = self.forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            loss = loss / len(passes)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def look(self):
        """Evaluate, over windows that are always the same; log; let the model read its line."""
        self.looked = self.step
        if len(self.val_ids) > 1:
            with precision(self.device, self.dtype):
                self.val_loss, _ = estimate_loss(self.model, self.val_ids, limit=self.eval_tokens,
                                                 batch_size=self.s.batch_size)
            self.worse = self.worse + 1 if self.val_loss > 1.02 * self.best else 0
            if self.step and self.val_loss < self.best:
                self.best = self.val_loss
                self.save("best.pt")
            if self.worse == 3 and not self.warned:
                self.warned = True
                notice("the validation loss falls no more: the model begins to learn by heart. "
                       f"best.pt keeps the best, {self.best:.4f}; more text, dropout or a smaller "
                       "model would help, a longer run will not")
        self.log()
        if self.s.probe != "":
            record_probe(self)

    def log(self):
        """A line of log.jsonl for programs, and one for people."""
        tokens = (self.step - self.logged) * self.tokens_per_step
        speed = round(tokens / self.busy) if tokens else None
        self.logged, self.busy = self.step, 0.0
        append_line(self.out / "log.jsonl", {
            "step": self.step, "tokens": self.step * self.tokens_per_step,
            "seconds": round(self.seconds(), 3), **self.last, "val_loss": self.val_loss,
            "tokens_per_second": speed, "memory_mb": memory_mb(self.device)})
        text = f"step {self.step}"
        if self.step:
            text += f"  train {self.last['train_loss']:.4f}"
        if self.val_loss is not None:
            bits = self.val_loss / math.log(2) * len(self.text.ids) / self.text.text_bytes
            text += f"  val {self.val_loss:.4f} ({bits:.3f} bits per byte)"
        if speed:
            left = 60 * (self.s.minutes or 0) - self.seconds()
            if self.s.steps:
                left = (self.s.steps - self.step) * self.tokens_per_step / speed
            text += f"  {speed:,} tokens/s  {max(0, left) // 60:.0f}:{max(0, left) % 60:02.0f} left"
        say(text)

    def seconds(self):
        return self.seconds_before + time.monotonic() - self.started

    def notice(self, text):
        if self.rank == 0:
            notice(text)

    def save(self, name, final=False):
        """best.pt has what other commands need, ckpt.pt also what only training needs."""
        state = {"format": FORMAT, "model": self.model.state_dict(), "settings": asdict(self.s),
                 "tokenizer": self.tokenizer.state(), "step": self.step, "val_loss": self.val_loss,
                 "data_fingerprint": self.text.fingerprint}
        if name == "ckpt.pt":
            self.saved_at = time.monotonic()
            state |= {"optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
                      "scaler": self.scaler.state_dict(), "seconds": self.seconds(),
                      "looked": self.looked, "best": self.best, "last": self.last}
        try:
            with atomic(self.out / name) as file:
                torch.save(state, file)
        except Error as e:
            if final:
                raise
            notice(f"{e}; training goes on")

    def finish(self, stop):
        if self.world > 1:  # nobody leaves before the first process has saved
            dist.barrier()
        if self.rank == 0 and stop:
            again = shell("train", resume=True, out=self.out)
            notice(f"stopped at step {self.step} and saved; to go on: {again}")
        elif self.rank == 0 and self.begun_at == self.step > 0:
            notice(f"this run is complete; --resume --steps N, with N above {self.step}, goes on")
        elif self.rank == 0:
            say(f"done, {self.seconds():.0f} seconds in all; now: {shell('sample', out=self.out)}")
        return {"step": self.step, **self.last, "val_loss": self.val_loss,
                "seconds": self.seconds(), "signal": stop}

# --- Sampling ------------------------------------------------------------------------------------
# Ask the model for the distribution of the next token, draw one from it, append it, and ask again.

@dataclass
class Trained(Settings):
    """Which model."""
    out: str = setting("out", "folder of a run: its best.pt, else its ckpt.pt, is opened")
    init: str = setting("", "instead: a checkpoint, a run's or a Hugging Face folder, gpt2, ...")

@dataclass
class Sampling(Machine, Trained):
    """What to write."""
    prompt: str = setting("", "text to go on from; @FILE reads a file (@@ is an @), - stdin")
    tokens: int = setting(500, "tokens to generate")
    temperature: float = setting(0.8, "0 is greedy; 1 is the model's own distribution")
    top_k: int = setting(0, "sample among the k likeliest (0: all)")
    top_p: float = setting(1.0, "sample among the likeliest that have this share together", high=1)
    num: int = setting(1, "samples", 1, 10000)
    stop: str = setting("", "text to stop at; it is not printed")
    cache: bool = setting(True, "keep keys and values of earlier tokens (the KV cache)")

def sample_next(logits, s, generator):
    """Draw ids (B,) from logits (B, V), as a Sampling says. Chance is the CPU's, in float32: every
    device draws the same from the same."""
    logits = logits.float().cpu()
    if not logits.amax(dim=-1).isfinite().all():
        raise Error("the logits are not finite: trained too fast, or in too coarse a precision", 1)
    if s.temperature < 1e-6:
        return logits.argmax(dim=-1)
    logits = logits / s.temperature
    if not s.top_k and s.top_p == 1:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    V = logits.size(-1)
    logits, ids = logits.topk(min(s.top_k or V, V), dim=-1)  # likeliest first
    probs = logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    probs[:, 1:] *= before[:, 1:] < s.top_p  # a token stays if those before it have less than p
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]

@torch.inference_mode()
def generate(model, idx, tokens, s):
    """Continue idx (B, T) by up to `tokens` tokens, yielding each as ids (B,) on the CPU. When one
    finds the context full, the newest block_size // 2 become the context, cache or not."""
    generator = torch.Generator().manual_seed(s.seed)
    block_size = model.config.block_size
    idx = new = idx[:, -block_size:]
    cache = KVCache(model, len(idx)) if s.cache else None
    for _ in range(tokens):
        logits = model(new if s.cache else idx, cache=cache, last=True)  # (B, 1, V)
        ids = sample_next(logits[:, -1], s, generator)
        yield ids
        new = ids[:, None].to(idx.device)
        idx = torch.cat((idx, new), dim=1)
        if idx.size(1) > block_size:
            idx = new = idx[:, -max(1, block_size // 2):]
            if s.cache:
                cache.length = 0

def stream_text(tokenizer, ids, stop=""):
    """Ids one by one -> text piece by piece: never half a character, nothing from `stop` on."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for i in ids:
        held += decoder.decode(tokenizer.tokens[i])
        if stop and stop in held:
            yield held[:held.index(stop)]
            return
        begun = max(n for n in range(len(stop) + 1) if held.endswith(stop[:n]))
        yield held[:len(held) - begun]  # what may be the beginning of `stop` waits
        held = held[len(held) - begun:]
    yield held + decoder.decode(b"", final=True)

def until_ended(rows, ends):
    """Lists of one id a sample, until each sample has come to its end; then says how fast."""
    begun, made, ended = time.monotonic(), 0, set()
    try:
        for row in rows:
            row = row.tolist()
            made += len(row)
            ended |= {n for n, i in enumerate(row) if i in ends}
            if len(ended) == len(row):
                return
            yield row
    finally:
        notice(f"{made / max(1e-9, time.monotonic() - begun):,.0f} tokens/s")

@command(Sampling)
def sample(s):
    """generate text from a trained model"""
    model, tokenizer, _ = open_model(s, half=True)
    prompt, ids = read_prompt(s.prompt, tokenizer)
    if len(ids) > model.config.block_size:
        notice(f"of the prompt's {len(ids)} tokens the model sees {model.config.block_size}")
    device = next(model.parameters()).device
    idx = torch.tensor(ids or tokenizer.first, device=device).expand(s.num, -1)
    rows = until_ended(generate(model, idx, s.tokens, s), tokenizer.ends)
    columns = [(row[0] for row in rows)] if s.num == 1 else list(zip(*rows)) or [()] * s.num
    texts = []
    for column in columns:
        say(("---\n" if texts else "") + prompt, end="")
        texts.append(prompt)
        column = itertools.takewhile(lambda i: i not in tokenizer.ends, column)
        for piece in stream_text(tokenizer, column, s.stop):
            say(piece, end="")
            texts[-1] += piece
        say("")
    return texts

def read_prompt(prompt, tokenizer):
    """A prompt as it is given -> (text, list of ids). What has no token is named and left out."""
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")  # echo's
    elif prompt.startswith("@") and not prompt.startswith("@@"):
        try:
            prompt = Path(prompt[1:]).expanduser().read_text("utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "not UTF-8 text"
            raise Error(f"prompt {quote(prompt)}: {why}") from None
    else:
        prompt = prompt.removeprefix("@")
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if unknown := tokenizer.unknown(prompt):
        shown = " ".join(map(repr, unknown))
        notice(f"left out of the prompt, for the model has never seen them: {shown:.100}")
        prompt = "".join(c for c in prompt if c not in unknown)
    return prompt, tokenizer.encode(prompt, special=True).tolist()

@dataclass
class Evaluation(Machine, Trained):
    """What to measure."""
    data: list = setting((), "text to evaluate on (default: the run's validation split)")
    stride: int = setting(None, "tokens between windows (default: block_size)", 1)
    batch_size: int = setting(32, "windows per forward pass", 1)
    json: bool = setting(False, "print one JSON object")

@command(Evaluation, "eval")
def evaluate(s):
    """measure a model's loss on a text"""
    model, tokenizer, context = open_model(s)
    if s.init and not s.data:
        raise Error("eval with init needs data")
    ids = load_tokens(s.data, tokenizer).ids if s.data else split(run_data(s.out, tokenizer))[1]
    if len(ids) < 2:
        raise Error("fewer than two tokens to evaluate on")
    with context:
        loss, counted = estimate_loss(model, ids, s.stride, s.batch_size)
    lengths = [0 if i == tokenizer.eot else len(token) for i, token in enumerate(tokenizer.tokens)]
    lengths = torch.tensor(lengths)
    text_bytes = sum(int(lengths[part.long()].sum()) for part in ids[1:].split(1 << 20))
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)),
              "bits_per_byte": loss * counted / math.log(2) / max(1, text_bytes), "tokens": counted,
              "stride": min(s.stride or math.inf, model.config.block_size)}
    line = ("loss {loss:.4f} nats, perplexity {perplexity:.3f}, {bits_per_byte:.4f} bits per byte "
            "({tokens:,} tokens, stride {stride})")
    say(json.dumps(result) if s.json else line.format(**result))
    return result

# --- Checkpoints ---------------------------------------------------------------------------------
# A dict of tensors and plain values: no code runs when it is opened, and it opens on any device.

FORMAT = 2

@contextlib.contextmanager
def atomic(path):
    """A binary file that is there whole or not at all: it gets its name when it is on the disk."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # RuntimeError is torch's for a full disk
        why = getattr(e, "strerror", None) or first_line(e)
        raise Error(f"{path} cannot be written: {why}", 1) from None
    finally:
        temporary.unlink(missing_ok=True)

def read_checkpoint(path):
    """A checkpoint as a dict, on the CPU. Its checksums are verified, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type for item in archive.infolist()) or archive.testzip():
                raise ValueError
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        written = checkpoint["format"]
    except (FileNotFoundError, PermissionError, IsADirectoryError) as e:
        raise Error(f"{path}: {e.strerror}") from None
    except Exception:  # a damaged file may fail in any way
        raise Error(f"{path}: not a checkpoint of gpt.py, or damaged") from None
    if written != FORMAT:
        raise Error(f"{path}: format {written} of another gpt.py, this one reads {FORMAT}")
    return checkpoint

def find_run(out):
    """The checkpoint that speaks for a run."""
    for path in (Path(out) / "best.pt", Path(out) / "ckpt.pt"):
        if path.exists():
            return path
    raise Error(f"{out}: there is no run in this folder; this makes one: {shell('train', out=out)}")

def load_model(source, device="cpu"):
    """Open whatever `init` may name -> (model, tokenizer)."""
    path = Path(source).expanduser()
    if source in GPT2_SIZES or (path / "config.json").is_file():
        model, tokenizer = load_folder(source)
        return model.eval().to(device), tokenizer
    path = find_run(path) if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    try:
        model = build(Config.pick(checkpoint["settings"]))
        model.load_state_dict(checkpoint["model"])
        tokenizer = tokenizer_from(checkpoint["tokenizer"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise Error(f"{path}: the parts of it do not fit together ({first_line(e)})") from None
    last = path.with_name("ckpt.pt")
    if path.name == "best.pt" and last.exists():
        notice(f"{path} is of step {checkpoint['step']}, validation loss "
               f"{checkpoint['val_loss']:.4f}; --init {last} is the last step")
    return model.eval().to(device), tokenizer

def open_model(s, half=False):
    """The model that `init` or `out` names -> (model on its device, tokenizer, precision to call it
    in). If `half`, its weights are in half precision: sampling, which waits for them, is faster."""
    device = pick_device(s.device)
    model, tokenizer = load_model(s.init or find_run(s.out))
    need_tokenizer(tokenizer, s.init)
    dtype, _ = pick_dtype(s.dtype, device)
    model.to(device, dtype if half or dtype == torch.float64 else torch.float32)
    choose_attention(model, s.attention, dtype, sampling=half)
    return model, tokenizer, precision(device, dtype)

def need_tokenizer(tokenizer, name):
    if tokenizer is None:
        raise Error(f"{name}: there is no tokenizer in it that gpt.py can read")

def run_data(out, tokenizer):
    """The ids (N,) that a run was trained on, if they are still the same."""
    checkpoint = read_checkpoint(find_run(out))
    data = checkpoint["settings"]["data"]
    tokens = load_tokens(data, tokenizer)
    if tokens.fingerprint != checkpoint["data_fingerprint"]:
        raise Error(f"{', '.join(data):.100} has changed since {out} was trained on it")
    return tokens.ids

def append_line(path, line):
    line = json.loads(json.dumps(line), parse_constant=lambda name: None)  # JSON has no NaN
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

@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process. The operating system lets go of it however a process dies."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w", encoding="utf-8")
    except OSError as e:
        raise Error(f"out {folder}: {e.strerror}") from None
    with file:
        try:
            with contextlib.suppress(ImportError):  # Windows: not locked
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Error(f"out {folder}: another run is writing there") from None
        try:
            yield
        finally:
            if new and os.listdir(folder) == [".lock"]:  # a request that was refused leaves nothing
                (folder / ".lock").unlink()
                folder.rmdir()

def memory_mb(device):
    """The most memory that was in use, of the GPU or else of the process; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    with contextlib.suppress(ImportError):
        import resource
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)

# --- Looking inside ------------------------------------------------------------------------------
# What the model would say next, layer by layer; where its heads look, and what each is worth; when
# it begins to recite what it has read.

@torch.no_grad()
def logit_lens(model, idx):
    """Ids (T,) -> the next token's probabilities as each layer has them, (n_layer + 1, T, V), from
    the bare embedding on: the head reads a stream that is not finished."""
    streams, hooks = [], []
    for part in (model.dropout, *model.blocks) if model.config.n_layer else ():
        hooks.append(part.register_forward_hook(lambda part, given, x: streams.append(x)))
    try:
        logits = model(idx[None])
    finally:
        for hook in hooks:
            hook.remove()
    views = [model.head(model.norm(x)) for x in streams] or [logits]
    return torch.cat(views).float().cpu().softmax(dim=-1)

@torch.no_grad()
def attention_maps(model, idx):
    """Ids (T,) -> where each token's attention goes, (n_layer, H, T, T). It is the model's own:
    what `attention` makes of each block's q and k, with the identity in the place of v."""
    maps, blocks = [], getattr(model, "blocks", ())
    attends = [block.attn.attend for block in blocks]

    def recording(attend, q, k, v):
        identity = torch.eye(len(idx), dtype=v.dtype, device=v.device)[None, :, None]
        probs = attention(q, k, identity.expand(-1, -1, k.size(2), -1))  # (1, T, H, T)
        maps.append(probs[0].transpose(0, 1).float().cpu())
        return attend(q, k, v)

    try:
        for block, attend in zip(blocks, attends):
            block.attn.attend = functools.partial(recording, attend)
        model(idx[None])
    finally:
        for block, attend in zip(blocks, attends):
            block.attn.attend = attend
    return torch.stack(maps) if maps else torch.zeros(0, 0, len(idx), len(idx))

def shown_layers(config):
    """Layers whose maps are kept: evenly spread, with about 36 heads between them."""
    count = min(config.n_layer, 36 // config.n_head + 1)
    return torch.linspace(0, config.n_layer - 1, count).long()

def look_at(model, tokenizer, idx):
    """What the model makes of ids (T,), as plain values for the page."""
    probs, maps, T = logit_lens(model, idx), attention_maps(model, idx), len(idx)
    maps = maps[shown_layers(model.config)][..., torch.ones(T, T).tril().bool()]
    words = [tokenizer.tokens[i].decode("utf-8", "backslashreplace") for i in idx.tolist()]
    true = probs[-1, :-1].gather(-1, idx[1:, None].cpu())[:, 0]

    def likeliest(row, n):
        return [[tokenizer.tokens[i].decode("utf-8", "backslashreplace"), round(p, 3)]
                for p, i in zip(*map(torch.Tensor.tolist, row.topk(min(n, len(row)))))]

    return {"text": words, "loss": [round(x, 3) for x in (-true.log()).tolist()],
            "top": [likeliest(row, 5) for row in probs[-1]],
            "lens": [[likeliest(row, 1)[0] for row in layer] for layer in probs],
            # a character from 0 to o for each 64th of attention, row by row up to the diagonal
            "maps": bytes((maps * 63 + 48).round().byte().flatten().tolist()).decode()}

def copied(text, source):
    """For each character of a text, how many from there on stand in `source` in this order.
    `copied("abcx", "xbc") == [0, 2, 1, 1]`"""
    lengths, n = [], 0
    for i in range(len(text)):
        n = max(0, n - 1)
        while i + n < len(text) and text[i:i + n + 1] in source:
            n += 1
        lengths.append(n)
    return lengths

def record_probe(run):
    """Add to probe.jsonl what the model makes of its line at this step, and what it writes."""
    model, tokenizer, idx = run.model.eval(), run.tokenizer, run.probe_ids.to(run.device)
    record = {"step": run.step, "samples": []}
    with contextlib.suppress(Error), precision(run.device, run.dtype):  # logits not finite: no text
        record |= look_at(model, tokenizer, idx)
        first = torch.tensor([tokenizer.first] * 3, device=run.device)
        for start, n, temperature in ((idx[None, :8], 12, 0.0), (first, 40, 0.8)):
            s = Sampling(temperature=temperature, seed=run.s.seed)
            rows = torch.stack(list(generate(model, start, n, s)), dim=1)
            record["samples"] += [tokenizer.decode(row) for row in rows]
    model.train()
    append_line(run.out / "probe.jsonl", record)

@contextlib.contextmanager
def zeroed(*tensors):
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    try:
        yield
    finally:
        for tensor, values in zip(tensors, kept):
            tensor.copy_(values)

@torch.no_grad()
def head_importance(model, ids):
    """How much the loss on a text (N,) rises without a head, that is with its columns of the output
    projection at zero, n_layer lists of H; and without a block, n_layer."""
    D, limit = model.config.head_dim, min(1 << 15, (1 << 34) // count_parameters(model))
    base, _ = estimate_loss(model, ids, limit=limit)

    def rise(*tensors):
        with zeroed(*tensors):
            return round(estimate_loss(model, ids, limit=limit)[0] - base, 4)

    heads = [[rise(columns) for columns in block.attn.out.weight.split(D, dim=1)]
             for block in model.blocks]
    return heads, [rise(*block.attn.out.parameters(), *block.mlp.down.parameters())
                   for block in model.blocks]

def bigram_loss(train, val, V):
    """The loss on `val` of counting what follows what in `train`, a tenth added to each count."""
    train, val = train[:1 << 24].long(), val[:1 << 24].long()
    counts = torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V) + 0.1
    return -(counts / counts.sum(1, keepdim=True)).log()[val[:-1], val[1:]].mean().item()

@dataclass
class Inspection(Machine, Trained):
    """At what to look."""
    probe: str = setting("", "look at this text, in the best model alone")

@command(Inspection)
def inspect(s):
    """write a page that shows what a model has learnt, and how"""
    (model, tokenizer, context), out, log, records = open_model(s), Path(s.out), [], []
    config, V, train, val = model.config, len(tokenizer.tokens), torch.zeros(0), torch.zeros(0)
    if not s.init:
        log = read_lines(out / "log.jsonl")
        records = [] if s.probe else read_lines(out / "probe.jsonl")
        try:
            train, val = split(run_data(out, tokenizer))
        except Error as e:
            notice(f"{e}; the page goes without what needs the text")
    if not records:
        ids = torch.tensor(read_prompt(s.probe, tokenizer)[1]) if s.probe else val
        ids = ids[:min(40, config.block_size)].long()
        if len(ids) < 2:
            raise Error("inspect: there is no record and no text to look at; name one with probe")
        ids = ids.to(next(model.parameters()).device)
        records = [{"step": 0, "samples": [], **look_at(model, tokenizer, ids)}]
    sources = [tokenizer.decode(ids[:1 << 22]) for ids in (train, val)]
    for record in records:
        runs = [[copied(text, source) for text in record["samples"]] for source in sources]
        record["longest"] = [max(map(max, lengths), default=0) for lengths in runs]
        record["samples"] = list(zip(record["samples"], runs[0]))
    heads, layers, levels = [], [], {"ln(V)": math.log(V)}
    if config.n_layer and len(val) > 16:
        notice(f"measuring what {config.n_layer * config.n_head} heads are worth")
        with context:
            heads, layers = head_importance(model, val)
    if len(val) > 1 and V <= 4096:
        levels["bigram"] = bigram_loss(train, val, V)
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"
    title = f"{s.init or out}: {shape}"
    about = f"{count_parameters(model):,} parameters, {V:,} tokens in the vocabulary"
    if not s.init:
        run = read_checkpoint(find_run(out))
        about += f"; learnt {', '.join(run['settings']['data'])}"
        title += f", validation loss {run['val_loss']:.3f}" if run["val_loss"] else ""
    data = json.dumps({
        "about": about, "log": log, "levels": levels, "records": records, "heads": heads,
        "layers": layers, "n_head": config.n_head, "shown": shown_layers(config).tolist()})
    page = PAGE.replace("TITLE", html.escape(title))
    page = page.replace("DATA", data.replace("<", "\\u003c"), 1)
    path = out / f"inspect{'-init' if s.init else '-probe' if s.probe else ''}.html"
    out.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(page.encode())
    say(path)
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import HTML, display
        display(HTML(f'<iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe>'))
    return path

@dataclass
class Ablation(Training):
    """What to compare."""
    vary: list = setting((), "n_head=1,2,4; 'n_head=1,2 n_layer=2,4' makes all four pairs")
    seeds: int = setting(1, "runs of each setting, with the seeds that follow seed", 1)

@command(Ablation)
def ablate(s):
    """train a model in several settings, and compare"""
    out = Path(s.given.get("out", "out-ablate"))
    given = {name: s.given[name] for name in s.given.keys() - {"vary", "seeds", "out"}}
    if refused := {"resume", "overwrite"} & given.keys():
        raise Error(f"ablate goes on by itself where it was: leave {refused.pop()} out")
    sweeps = [plans_of(words) for words in s.vary]
    if not sweeps:
        raise Error("ablate: vary takes a setting and its values, as in --vary n_head=1,2,4")
    for plan in itertools.chain(*sweeps):  # what cannot work is found before an hour has passed
        Training.from_given(given | Training.check(plan))
    path = out / "ablate.json"
    done = read_json(path) if path.exists() else {"base": given, "rows": []}
    if done["base"] != given:
        raise Error(f"{path} has other settings, {quote(done['base'])}; name another out")
    plans = {plan_name(plan): plan for plan in itertools.chain(*sweeps)}  # each once
    todo = list(itertools.product(plans, range(s.seed, s.seed + s.seeds)))
    for i, (name, seed) in enumerate(todo):
        if any((row["setting"], row["seed"]) == (name, seed) for row in done["rows"]):
            continue
        folder = out / f"{name} seed={seed}"
        notice(f"run {i + 1} of {len(todo)}: {folder.name}")
        settings = given | plans[name] | {"seed": seed, "overwrite": True}
        settings = {"resume": True} if (folder / "ckpt.pt").exists() else settings
        with contextlib.redirect_stdout(io.StringIO()):
            last = train(**settings, out=str(folder))
            if last["signal"]:
                notice("the same command goes on with it, and with the runs after it")
                return {"signal": last["signal"]}
            loss = evaluate(out=str(folder), device=s.device)["loss"]
        parameters = count_parameters(load_model(folder)[0])
        done["rows"].append({"setting": name, "seed": seed, "parameters": parameters, "loss": loss,
                             "steps": last["step"], "seconds": round(last["seconds"], 1)})
        out.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(json.dumps(done, indent=1).encode())
        notice(f"loss {loss:.4f} after {last['seconds']:.0f} s")
    print_table(sweeps, done["rows"])
    return done

def plans_of(words):
    """`n_head=1,2 n_layer=2,4` -> the four dicts of settings."""
    axes = []
    for word in words.split():
        name, _, values = word.partition("=")
        name = name.replace("-", "_")
        if not values or name in ("seed", "out", "resume", "overwrite"):
            raise Error(f"ablate: {quote(word)} cannot vary; vary takes it as in n_head=1,2,4")
        axes.append([(name, value) for value in values.split(",")])
    return [dict(plan) for plan in itertools.product(*axes)]

def plan_name(plan):
    return " ".join(f"{name}={value}" for name, value in plan.items())

def print_table(sweeps, rows):
    say("| setting | parameters | loss | improvement over the first of its sweep | seconds |")
    say("| --- | --- | --- | --- | --- |")
    for plans in sweeps:
        first = None
        for name in dict.fromkeys(map(plan_name, plans)):
            same = [row for row in rows if row["setting"] == name]
            loss = torch.tensor([row["loss"] for row in same], dtype=torch.float64)
            seconds = sum(row["seconds"] for row in same) / len(same)
            first = loss.mean() if first is None else first
            spread = f" ± {loss.std():.4f}" if len(same) > 1 else ""
            say(f"| {name} | {same[0]['parameters']:,} | {loss.mean():.4f}{spread} | "
                f"{first - loss.mean():.4f} | {seconds:.0f} |")

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#222, #ddd); --soft: light-dark(#666, #999);
  --back: light-dark(#fff, #16181c); --line: light-dark(#ddd, #383c44);
  --a: light-dark(#0b62c4, #5aa9ff); --b: light-dark(#b4540a, #ffa04d) }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 64rem; margin: auto; padding: 0 1rem 4rem }
h1 { font-size: 1.3rem } h2 { margin: 2rem 0 .2rem; font-size: 1.1rem }
p, small, figcaption { color: var(--soft); margin: .2rem 0 .6rem }
header { position: sticky; top: 0; background: var(--back); padding: .5rem 0; z-index: 1;
  border-bottom: 1px solid var(--line) }
header div { display: flex; gap: .6rem } input { flex: 1; accent-color: var(--a) }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--line) }
#line { font: 1.15rem/2.1 ui-monospace, monospace }
#line button, #heads button { padding: .1rem .12rem; border-color: transparent; cursor: pointer;
  border-bottom: 3px solid color-mix(in srgb, var(--a) calc(var(--w, 0) * 1%), transparent);
  background: color-mix(in srgb, var(--b) calc(var(--p, 0) * 1%), transparent) }
#line button[aria-pressed=true], #heads button[aria-pressed=true] { outline: 2px solid var(--ink) }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem } figure { margin: 0; flex: 1 1 20rem }
table { border-collapse: collapse; font: 13px/1.6 ui-monospace, monospace }
td, th { padding: 0 .5rem; text-align: start; white-space: pre }
td { background: linear-gradient(to right, color-mix(in srgb, var(--a) 35%, transparent)
  calc(var(--p, 0) * 1%), transparent 0) } .true { font-weight: bold; text-decoration: underline }
#heads { overflow-x: auto } #heads td { background: none; text-align: center; vertical-align: top }
canvas { width: 6rem; height: 6rem; image-rendering: pixelated; border: 1px solid var(--line) }
#heads small { display: block; font: 11px/1.3 system-ui; white-space: normal; width: 6rem }
pre { white-space: pre-wrap; border-inline-start: 3px solid var(--line); padding: 0 .8rem;
  flex: 1 1 18rem }
mark { background: color-mix(in srgb, var(--b) 40%, transparent); color: inherit }
svg text { fill: var(--soft); font-size: 11px } path { fill: none; stroke-width: 2 }
</style>
<h1>TITLE</h1><p id="about"></p>
<header><div><button id="play" aria-label="play">▶</button><input id="at" type="range" min="0"
aria-label="training step"></div><output id="now"></output></header>
<h2>The line that the model reads</h2>
<p>A line of the validation text, which it never trains on. The redder a token, the more it cost:
its loss, in nats. Choose one, by pointer or arrow keys, to see what the model expects after it.</p>
<div id="line" dir="auto"></div>
<p id="chosen" aria-live="polite"></p>
<div class="row"><div><small>Likeliest next tokens</small><table id="next"></table></div>
<div><small>The likeliest, if it had to answer after so many blocks (the logit lens)</small>
<table id="lens"></table></div></div>
<h2>Where heads look</h2>
<p>A row is a token that looks, a column the token looked at. Choose a head: the line above is then
underlined where the chosen token looks. A head has a name when 0.4 of its attention, from the ninth
token on, goes to the token before, the first token, earlier ones of the same kind, or what came
after those (induction). Worth: how much the loss rises without it, at the end of the run.</p>
<div id="heads"></div>
<h2>Over training</h2>
<p>Steps on a logarithmic axis, for most happens at the beginning.</p>
<div class="row" id="curves"></div>
<h2>What it writes</h2>
<p>First the likeliest continuation of the line's first tokens, then samples at temperature 0.8.
<mark>Marked</mark>: 20 characters or more that stand in the training text word for word.</p>
<div class="row" id="texts"></div>
<script>
const D = DATA, R = D.records, $ = id => document.getElementById(id)
const hidden = {'\n': '⏎', ' ': '·', '\t': '⇥', '\r': '␍', '\u200b': '∅', '\u00a0': '⍽'}
const shown = t => t.replace(/[\n \t\r\u200b\u00a0]/g, c => hidden[c]) || '∅'
function add(parent, tag, text = '', attributes = {}) {
  const kind = ['svg', 'path', 'text', 'line'].includes(tag) ? '2000/svg' : '1999/xhtml'
  const e = document.createElementNS('http://www.w3.org/' + kind, tag)
  e.textContent = text
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value)
  parent.append(e)
  return e
}
const state = {step: R.at(-1).step, token: 0, head: '1.1'}
for (const [k, v] of new URLSearchParams(location.hash.slice(1))) state[k] = k === 'head' ? v : +v
const T = R[0].text.length, size = T * (T + 1) / 2
const record = () => R.findLast(r => r.step <= state.step) ?? R[0]
const weight = (r, n, i, j) =>
  j > i ? 0 : (r.maps.charCodeAt(n * size + i * (i + 1) / 2 + j) - 48) / 63

// What a head does at this step, worked out from its map.
function role(r, n) {
  const sums = {'token before': 0, 'first token': 0, 'same token': 0, 'after the same': 0}
  const from = Math.min(8, T >> 1)
  for (let i = from; i < T; i++) for (let j = 0; j <= i; j++) {
    const w = weight(r, n, i, j) / (T - from)
    if (j === i - 1) sums['token before'] += w
    if (j === 0) sums['first token'] += w
    if (j < i && r.text[j] === r.text[i]) sums['same token'] += w
    if (j > 0 && j < i && r.text[j - 1] === r.text[i]) sums['after the same'] += w
  }
  const [name, share] = Object.entries(sums).sort((a, b) => b[1] - a[1])[0]
  return share >= 0.4 ? `${name} ${share.toFixed(2)}` : ''
}

// Curves: a series is [name, colour, [[step, y], ...]], levels are lines across.
const last = Math.max(1, ...R.map(r => r.step)), curves = []
const x = step => 40 + 430 * Math.log1p(step) / Math.log1p(last)
function chart(title, series, levels = {}) {
  series = series.map(s => [s[0], s[1], s[2].filter(p => p[1] != null)]).filter(s => s[2].length)
  const high = Math.max(...series.flatMap(s => s[2].map(p => p[1])), ...Object.values(levels))
  if (!series.length || high <= 0) return
  const unit = 10 ** Math.floor(Math.log10(high / 2))
  const tick = unit * [1, 2, 5].find(m => high <= 5 * m * unit)
  const top = Math.ceil(high / tick) * tick, y = v => 190 - 175 * v / top
  const figure = add($('curves'), 'figure')
  const svg = add(figure, 'svg', '', {viewBox: '0 0 500 210', role: 'img', 'aria-label': title})
  for (let s = 1; s <= last; s *= 4) add(svg, 'text', s, {x: x(s), y: 205, 'text-anchor': 'middle'})
  for (let v = 0; v <= top + tick / 2; v += tick)
    add(svg, 'text', +v.toPrecision(3), {x: 34, y: y(v) + 4, 'text-anchor': 'end'})
  for (const [name, v] of Object.entries(levels)) {
    add(svg, 'line', '', {x1: 40, x2: 470, y1: y(v), y2: y(v), stroke: 'var(--soft)',
      'stroke-dasharray': 4})
    add(svg, 'text', `${name} ${v.toFixed(3)}`, {x: 470, y: y(v) - 4, 'text-anchor': 'end'})
  }
  for (const [, stroke, points] of series)
    add(svg, 'path', '', {d: 'M' + points.map(p => [x(p[0]), y(p[1])]).join('L'), stroke})
  curves.push({title, series, marker: add(svg, 'line', '', {y1: 10, y2: 190, stroke: 'var(--ink)'}),
    caption: add(figure, 'figcaption')})
}
const over = (rows, f) => rows.map(r => [r.step, f(r)])
chart('Loss, nats per token', [['training', 'var(--a)', over(D.log, r => r.train_loss)],
  ['validation', 'var(--b)', over(D.log, r => r.val_loss)]], D.levels)
chart('Longest piece of a sample, in characters, that stands word for word in', [
  ['the training text', 'var(--a)', over(R, r => r.longest?.[0])],
  ['the validation text', 'var(--b)', over(R, r => r.longest?.[1])]])

// The parts of the page are made once; `draw` fills them for the step, token and head chosen.
$('about').textContent = D.about
const tokens = R[0].text.map((t, i) => {
  const b = add($('line'), 'button', '', {dir: 'auto'})
  add(b, 'bdi', shown(t))
  b.onclick = b.onfocus = () => set({token: i})
  return b
})
$('line').onkeydown = e => {
  const by = {ArrowRight: 1, ArrowLeft: -1}[e.key]
  if (!by) return
  e.preventDefault()
  set({token: Math.max(0, Math.min(T - 1, state.token + by))})
  tokens[state.token].focus()
}
const heads = [], table = add($('heads'), 'table')
D.shown.forEach((layer, l) => {
  const row = add(table, 'tr')
  const worth = x => x == null ? '' : `worth ${x.toFixed(3)}`
  add(row, 'th', `layer ${layer + 1}\n${worth(D.layers[layer])}`)
  for (let h = 0; h < D.n_head; h++) {
    const id = `${layer + 1}.${h + 1}`
    const button = add(add(row, 'td'), 'button', '', {'aria-label': `head ${id}`})
    const canvas = add(button, 'canvas', '', {width: T, height: T}), name = add(button, 'small')
    add(button, 'small', worth(D.heads[layer]?.[h]))
    button.onclick = () => set({head: id})
    heads.push({id, n: l * D.n_head + h, button, canvas, name})
  }
})
function set(change) {
  Object.assign(state, change)
  history.replaceState(null, '', '#' + new URLSearchParams(state))
  draw()
}
function fill(table, rows) {
  table.textContent = ''
  for (const [head, [token, p], truth] of rows) {
    const row = add(table, 'tr')
    if (head) add(row, 'th', head)
    const cell = add(row, 'td', '', {style: `--p: ${100 * p}`})
    add(cell, 'bdi', shown(token), {class: token === truth ? 'true' : ''})
    add(row, 'td', (100 * p).toFixed(1) + ' %')
  }
}
function draw() {
  const r = record(), i = Math.max(0, Math.min(T - 1, state.token || 0)), truth = r.text[i + 1]
  const log = D.log.findLast(l => l.step <= r.step) ?? {}
  const head = heads.find(h => h.id === state.head)
  const loss = (name, value) => value == null ? '' : `, ${name} loss ${value.toFixed(3)}`
  $('at').value = R.indexOf(r)
  $('now').textContent = `step ${r.step}` + loss('training', log.train_loss) +
    loss('validation', log.val_loss)
  tokens.forEach((b, j) => {
    b.setAttribute('aria-pressed', j === i)
    b.title = j ? `loss ${r.loss[j - 1].toFixed(2)}` : 'the first: nothing before it'
    b.style.setProperty('--p', j ? Math.min(90, 15 * r.loss[j - 1]) : 0)
    b.style.setProperty('--w', head ? 100 * Math.sqrt(weight(r, head.n, i, j)) : 0)
  })
  $('chosen').textContent = `After “${shown(r.text[i])}” (token ${i + 1}) ` + (truth ?
    `came “${shown(truth)}”, which cost ${r.loss[i].toFixed(2)} nats.` : 'the line ends here.')
  fill($('next'), r.top[i].map(t => ['', t, truth]))
  fill($('lens'), r.lens.map((layer, l) => [l ? `block ${l}` : 'none', layer[i], truth]))
  const ink = getComputedStyle(document.body).color.match(/\d+/g).slice(0, 3)
  for (const h of heads) {
    const image = new ImageData(T, T)
    for (let a = 0; a < T; a++) for (let b = 0; b < T; b++)
      image.data.set([...ink, 255 * weight(r, h.n, a, b)], 4 * (a * T + b))
    h.canvas.getContext('2d').putImageData(image, 0, 0)
    h.name.textContent = role(r, h.n) || '·'
    h.button.setAttribute('aria-pressed', h === head)
  }
  for (const c of curves) {
    for (const end of ['x1', 'x2']) c.marker.setAttribute(end, x(r.step))
    c.caption.textContent = c.title + ': '
    for (const [name, color, points] of c.series) {
      const point = points.findLast(p => p[0] <= r.step)
      if (point) add(c.caption, 'b', `${name} ${+point[1].toFixed(3)} `, {style: `color: ${color}`})
    }
  }
  $('texts').textContent = ''
  for (const [text, copied] of r.samples) {
    const pre = add($('texts'), 'pre', '', {dir: 'auto'})
    let end = 0, part
    for (const [i, c] of [...text].entries()) {
      if (copied[i] >= 20) end = i + copied[i]
      const tag = i < end ? 'mark' : 'span'
      if (part?.localName !== tag) part = add(pre, tag)
      part.textContent += c
    }
  }
}
$('at').max = R.length - 1
$('at').oninput = () => set({step: R[+$('at').value].step})
let timer
$('play').onclick = () => {
  if (+$('at').value === R.length - 1) set({step: R[0].step})
  timer = timer ? clearInterval(timer) : setInterval(() => {
    const next = R[R.indexOf(record()) + 1]
    next ? set({step: next.step}) : timer = clearInterval(timer)
  }, 400)
}
matchMedia('(prefers-color-scheme: dark)').onchange = draw
document.querySelector('header').hidden = R.length < 2
draw()
</script>
"""

# --- Weights in and out --------------------------------------------------------------------------
# Hugging Face's transformers knows three of the architectures that these settings can make. One
# table says what the settings and weights of each are called there, and serves both directions.

def pairs(text):
    return dict(pair.split("=") for pair in text.split())

LLAMA = {
    "class": "LlamaForCausalLM", "prefix": "model.", "block": "layers.",
    "ours": dict(pos="rope", norm="rms", mlp="swiglu", qk_norm=False),
    "must": dict(hidden_act="silu"),
    "settings": pairs("""vocab_size=vocab_size block_size=max_position_embeddings
        n_layer=num_hidden_layers n_embd=hidden_size n_head=num_attention_heads head_dim=head_dim
        n_kv_head=num_key_value_heads mlp_hidden=intermediate_size rope_theta=rope_theta
        norm_eps=rms_norm_eps tie=tie_word_embeddings bias=attention_bias,mlp_bias"""),
    "parts": pairs("""embed=embed_tokens norm=norm head=lm_head attn_norm=input_layernorm
        mlp_norm=post_attention_layernorm attn.q=self_attn.q_proj attn.k=self_attn.k_proj
        attn.v=self_attn.v_proj attn.out=self_attn.o_proj attn.q_norm=self_attn.q_norm
        attn.k_norm=self_attn.k_norm mlp.gate=mlp.gate_proj mlp.up=mlp.up_proj
        mlp.down=mlp.down_proj""")}
FAMILIES = {  # `must` is what else a config.json has to say, or to leave out
    "gpt2": {
        "class": "GPT2LMHeadModel", "prefix": "", "block": "h.", "ours": ARCHS["gpt2"],
        "must": dict(activation_function="gelu_new", scale_attn_weights=True,
                     scale_attn_by_inverse_layer_idx=False),
        "settings": pairs("""vocab_size=vocab_size block_size=n_positions,n_ctx n_layer=n_layer
            n_embd=n_embd n_head=n_head mlp_hidden=n_inner norm_eps=layer_norm_epsilon
            tie=tie_word_embeddings"""),
        "parts": pairs("""embed=wte positions=wpe norm=ln_f head=lm_head attn_norm=ln_1
            mlp_norm=ln_2 attn.q=attn.c_attn attn.k=attn.c_attn attn.v=attn.c_attn
            attn.out=attn.c_proj mlp.up=mlp.c_fc mlp.down=mlp.c_proj""")},
    "llama": LLAMA,
    "qwen3": LLAMA | {"class": "Qwen3ForCausalLM", "ours": LLAMA["ours"] | dict(
        qk_norm=True, head_dim=128), "must": dict(
        hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)}}

def config_in(about):
    """A config.json's dict -> (model_type, Config); what would be computed otherwise is refused."""
    kind = str(about.get("model_type"))
    if kind not in FAMILIES:
        raise Error(f"model_type {kind} is not one of {', '.join(FAMILIES)}")
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}  # transformers 5, 4
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
        raise Error(f"RoPE of type {rope_type} ({', '.join(rope)}) is not supported")
    about = {name: value for name, value in (about | rope).items() if value is not None}
    for name, value in FAMILIES[kind]["must"].items():
        if about.get(name, value) != value:
            raise Error(f"{name} {about[name]} is not supported, only {value}")
    values = dict(FAMILIES[kind]["ours"])
    for ours, theirs in FAMILIES[kind]["settings"].items():
        said = {about[name] for name in theirs.split(",") if name in about}
        if len(said) > 1:
            raise Error(f"{theirs} differ")
        if not said and ours in ("vocab_size", "block_size", "n_layer", "n_embd", "n_head"):
            raise Error(f"{theirs.split(',')[0]} is missing")
        values |= {ours: value for value in said}
    return kind, Config(**values)

def config_out(config):
    """A Config -> (model_type, config.json's dict). Read again, it must be the same Config: what
    transformers cannot express, and any setting that the table does not know, is refused."""
    if not config.n_layer:
        raise Error("export: a bigram has no equal in transformers")
    found = {}
    for kind, family in FAMILIES.items():
        about = {name: getattr(config, ours) for ours, theirs in family["settings"].items()
                 for name in theirs.split(",")}
        about |= {"model_type": kind, "architectures": [family["class"]], **family["must"]}
        if "rope_theta" in about:
            about["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        again = {}
        with contextlib.suppress(Error):
            again = asdict(config_in(about)[1])
        lost = [name for name, value in asdict(config).items()
                if name != "dropout" and again.get(name) != value]
        if not lost:
            return kind, about
        found[len(lost)] = kind, lost
    kind, lost = found[min(found)]
    raise Error(f"export: {lost[0]} {getattr(config, lost[0])} has no equal in {kind}, the nearest")

def their_weights(model, kind):
    """Their names, without prefix -> (our parameters, which theirs is a stack of; transposed?)"""
    family, weights = FAMILIES[kind], {}
    for name, p in model.named_parameters():  # a tied head is the embedding, not listed again
        block, part, end = re.fullmatch(r"(?:blocks\.(\d+\.))?(.+)\.(\w+)", name).groups()
        theirs = (family["block"] + block if block else "") + family["parts"][part] + "." + end
        turned = kind == "gpt2" and block is not None and p.dim() == 2  # its Conv1D is x @ W
        weights.setdefault(theirs, ([], turned))[0].append(p)
    return weights

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
               "BOOL": torch.bool}

def read_safetensors(path):
    """{name: tensor}. Eight bytes say how long the header is; it is JSON; the tensors follow, no
    gaps. The file is mapped: a tensor is read from the disk when it is used."""
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 8 + length <= size or length > 1 << 24:  # real headers are below a megabyte
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors, stop = {}, 8 + length
    header.pop("__metadata__", None)
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, start = SAFETENSORS[about["dtype"]], about["shape"], stop
        stop += math.prod(shape[:8]) * dtype.itemsize
        if about["data_offsets"] != [start - 8 - length, stop - 8 - length] or stop > size:
            raise ValueError(f"the place or shape of {name}")
        raw = data[start:stop]  # in old files it may begin where no view of numbers can
        raw = raw.clone() if start % dtype.itemsize else raw
        tensors[name] = raw.view(dtype).view(shape)
    if stop != size:
        raise ValueError(f"{size} bytes, where the header speaks of {stop}")
    return tensors

def write_safetensors(path, weights):
    """weights: {name: (shape, function that makes the tensor)}: no second model is held."""
    header, stop = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, _) in weights.items():
        start, stop = stop, stop + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, make in weights.values():
            tensor = make().float().contiguous()
            raw = bytearray(tensor.nbytes)
            torch.frombuffer(raw, dtype=torch.float32).copy_(tensor.view(-1))
            file.write(raw)

def read_json(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise Error(f"{path.name}: {getattr(e, 'strerror', None) or 'not a JSON object'}") from None

def read_weights(folder):
    """{name: tensor} of one file, or of the several that an index names."""
    files, tensors = ["model.safetensors"], {}
    if not (folder / files[0]).exists():
        index = read_json(folder / "model.safetensors.index.json")
        files = sorted({Path(file).name for file in index["weight_map"].values()})
    for name in files:
        try:
            tensors |= read_safetensors(folder / name)
        except Exception as e:  # a damaged file can fail in any way
            raise Error(f"{name} is damaged or unreadable ({first_line(e)})") from None
    return {re.sub(r"^(transformer|model)\.", "", name): x for name, x in tensors.items()}

@torch.no_grad()
def load_folder(source):
    """A Hugging Face folder, or the name of a GPT-2 -> (model, tokenizer; None if it has none)."""
    folder, about = Path(source).expanduser(), None
    if source in GPT2_SIZES:
        folder, (layers, heads, channels) = cache_folder() / source, GPT2_SIZES[source]
        about = dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_layer=layers,
                     n_head=heads, n_embd=channels)
        download(f"https://huggingface.co/openai-community/{source}/resolve/main/model.safetensors",
                 folder / "model.safetensors")
    try:
        about = about or read_json(folder / "config.json")
        kind, config = config_in(about)
        found = read_weights(folder)
        if not 0 < config.n_layer <= len(found) or config.block_size > 1 << 24:
            raise Error("config.json and the weights do not fit together")
        with torch.device("meta"):  # shapes without memory: a wrong config.json costs none
            wanted = their_weights(GPT(config), kind)
        for name in wanted.keys() | found.keys():
            parts, turned = wanted.get(name, ([], False))
            shape = [sum(len(p) for p in parts), *parts[0].shape[1:]] if parts else "not known"
            has = list(found[name].shape) if name in found else "missing"
            ignored = re.search(r"\.attn\.(masked_)?bias$|\.inv_freq$|^lm_head\.weight$", name)
            if not (parts or ignored) or parts and has != (shape[::-1] if turned else shape):
                raise Error(f"{name} is {has}, in a {kind} with this config.json it is {shape}")
        model = GPT(config).eval()
        for name, (parts, turned) in their_weights(model, kind).items():
            rows = found[name].mT if turned else found[name]
            for p, part in zip(parts, rows.split([len(p) for p in parts])):
                p.copy_(part)
        return model, folder_tokenizer(folder, kind, config.vocab_size, about)
    except (Error, TypeError, AttributeError, KeyError, RuntimeError) as e:
        raise Error(f"{folder}: {first_line(e)}") from None

class HuggingFaceTokenizer(Tokenizer):
    """Somebody's tokenizer.json, run by the package `tokenizers`: the ids are theirs."""
    def __init__(self, text, ends, size):
        try:
            import tokenizers
        except ImportError:
            raise Error("this model's tokenizer needs a package: pip install tokenizers") from None
        self.text, self.encoding = text, tokenizers.Tokenizer.from_str(text)
        self.eot, self.ends = ends[0] if ends else None, set(ends)
        self.first, self.tokens = ends[:1] or [0], [b""] * size
        special = self.encoding.get_added_tokens_decoder()
        byte = {letter: b for b, letter in byte_letters().items()} if '"ByteLevel"' in text else {}
        for name, i in self.encoding.get_vocab().items():
            if i in special or not all(c in byte for c in name):
                code = re.fullmatch("<0x(..)>", name)
                text = name.replace("▁", " ").encode()
                self.tokens[i] = bytes.fromhex(code[1]) if code else text
            else:
                self.tokens[i] = bytes(byte[c] for c in name)

    def encode(self, text, special=False):
        self.encoding.encode_special_tokens = not special
        ids = self.encoding.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int32)

    def state(self):
        ends = sorted(self.ends, key=lambda i: i != self.eot)
        return {"kind": "huggingface", "text": self.text, "ends": ends, "size": len(self.tokens)}

TOKENIZERS["huggingface"] = HuggingFaceTokenizer

def folder_tokenizer(folder, kind, size, about):
    """The tokenizer of a folder, None if it has none."""
    ends = []
    for file in (about, *map(read_json, filter(Path.exists, [folder / "generation_config.json"]))):
        ids = file.get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    ends = [i for i in dict.fromkeys(ends) if isinstance(i, int) and 0 <= i < size]
    try:
        if (folder / "tokenizer.json").exists():
            text = (folder / "tokenizer.json").read_text("utf-8")
            return HuggingFaceTokenizer(text, ends, size)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            from tokenizers import ByteLevelBPETokenizer
            old = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
            old.add_special_tokens(["<|endoftext|>"])
            return HuggingFaceTokenizer(old.to_str(), ends, size)
    except Error:
        raise
    except Exception as e:  # what the package says of a damaged file
        raise Error(f"tokenizer.json: {first_line(e)}") from None
    return GPT2Tokenizer.train((), 0) if kind == "gpt2" and size == 50257 else None

def byte_letters():
    """{byte: letter}: how tokenizer.json writes bytes; itself where Latin-1 shows something."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != 32]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}

def merges(ranks):
    """The two halves that byte-pair encoding makes each token from."""
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        halves = [token[i:i + 1] for i in range(len(token))]
        while len(halves) > 2:
            best = min(range(len(halves) - 1),
                       key=lambda i: ranks.get(halves[i] + halves[i + 1], math.inf))
            halves[best:best + 2] = [halves[best] + halves[best + 1]]
        yield halves

def tokenizer_out(tokenizer):
    """tokenizer.json's dict. Characters are byte-pair encoding without bytes and without pairs."""
    state = tokenizer.state()
    if state["kind"] == "huggingface":
        return json.loads(tokenizer.text)
    file = {"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}}
    if state["kind"] == "char":
        vocab = {c: i for i, c in enumerate(tokenizer.chars)}
        return file | {"model": {"type": "BPE", "vocab": vocab, "merges": []}}
    if state["kind"] != "bpe":
        raise Error(f"export: a tokenizer of kind {state['kind']} has no equal")
    letter, eot = byte_letters(), {"<|endoftext|>": tokenizer.eot}
    spell = {token: "".join(letter[b] for b in token) for token in tokenizer.ranks}
    vocab = {spell[token]: i for token, i in tokenizer.ranks.items()} | eot
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    return file | {
        "added_tokens": [{"id": tokenizer.eot, "content": "<|endoftext|>", "special": True,
                          "normalized": False, "single_word": False, "lstrip": False,
                          "rstrip": False}],
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "ignore_merges": True,
                  "merges": [f"{spell[a]} {spell[b]}" for a, b in merges(tokenizer.ranks)]}}

@dataclass
class Export(Trained):
    """Where to."""
    folder: str = setting("", "folder to write, new or empty")

@command(Export)
def export(s):
    """write a Hugging Face folder"""
    folder = Path(s.folder).expanduser()
    if not s.folder or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Error(f"export: {quote(s.folder)} is there already; name a new or an empty folder")
    model, tokenizer = load_model(s.init or find_run(s.out))
    kind, about = config_out(model.config)
    files = {}
    if tokenizer:
        ends = sorted(tokenizer.ends, key=lambda i: i != tokenizer.eot)
        eos = ends if len(ends) > 1 else tokenizer.eot
        about |= {"bos_token_id": tokenizer.eot, "eos_token_id": eos}
        names = {} if tokenizer.eot is None else dict.fromkeys(
            ("bos_token", "eos_token"), tokenizer.tokens[tokenizer.eot].decode())
        files = {"tokenizer.json": tokenizer_out(tokenizer), "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.block_size, **names}}
    weights = {}
    for name, (parts, turned) in their_weights(model, kind).items():
        name = name if name == "lm_head.weight" else FAMILIES[kind]["prefix"] + name
        make = functools.partial(stack, parts, turned)
        weights[name] = make().shape, make
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Error(f"export: {folder} cannot be made: {e.strerror}") from None
    write_safetensors(folder / "model.safetensors", weights)
    for name, file in (files | {"config.json": about}).items():  # the last: without it, no model
        with atomic(folder / name) as out:
            out.write(json.dumps(file, indent=1).encode())
    say(f"{folder} is written; in Python: AutoModelForCausalLM.from_pretrained({s.folder!r})")

@torch.no_grad()
def stack(parts, turned):
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.mT if turned else whole

# --- Command line --------------------------------------------------------------------------------
# Reports go to stdout, notices to stderr, and nothing that is wrong with them ends a run.

def say(text, end="\n"):
    """Print at once. If nobody reads stdout any more, go on in silence."""
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")

def notice(text):
    with contextlib.suppress(OSError, ValueError):
        print(f"gpt.py: {text}", file=sys.stderr, flush=True)

class Progress:
    """A notice every two seconds, and none for what is done sooner."""
    def __init__(self, what):
        self.what, self.shown = what, time.monotonic()

    def say(self, text):
        if time.monotonic() - self.shown > 2:
            self.shown = time.monotonic()
            notice(f"{self.what}: {text}")

def first_line(e):
    """What an exception says, in one short line."""
    return (str(e).strip() or repr(e)).splitlines()[0][:99]

def shell(name, **given):
    """A command as one writes it here: in a shell or, if that is where we are, in a notebook."""
    given = {key: value if value is True else str(value) for key, value in given.items()
             if str(value) != Training.out}
    if not hasattr(sys.modules["__main__"], "__file__"):
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
    flags = [f"--{key}" if value is True else f"--{key} {shlex.quote(value)}"
             for key, value in given.items()]
    return " ".join(["python gpt.py", name, *flags])

class Once(argparse.Action):
    """An option that may be given once."""
    def __call__(self, parser, namespace, value, option=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{option} is given twice")
        setattr(namespace, self.dest, value)

class Help(argparse.HelpFormatter):
    def _format_action_invocation(self, action):
        """`--n-layer N` alone: that `--n_layer` is taken too need not be said each time."""
        shown = super()._format_action_invocation(action).split(", ")
        return ", ".join(part for part in shown if "_" not in part.split(" ")[0])

class Parser(argparse.ArgumentParser):
    def error(self, message):
        if "expected one argument" in message:
            message += "; one that begins with - is given as in --stop=---"
        raise Error(f"{message} (--help lists what there is)")

def make_parser():
    parser = Parser(prog="gpt.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, function in COMMANDS.items():
        about = dict(help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        sub = commands.add_parser(command, formatter_class=Help, **about)
        for name in function.__signature__.parameters:
            f = function.settings.__dataclass_fields__[name]
            default = " ".join(f.default) if f.type is list else f.default
            shown = "" if default in (None, "") else f" [{default}]"
            help = f.metadata["help"].replace("%", "%%") + shown
            about = dict(help=help, default=argparse.SUPPRESS)
            flags = dict.fromkeys(["--" + name.replace("_", "-"), "--" + name])
            if f.type is bool:
                sub.add_argument(*flags, action=argparse.BooleanOptionalAction, **about)
                continue
            kind = {str: "TEXT", list: "TEXT", int: "N", float: "X"}[f.type]
            about["metavar"] = "|".join(f.metadata["choices"]) or kind
            if name == "folder":  # export's, without a flag
                sub.add_argument(name, **about)
            elif f.type is list:
                sub.add_argument(*flags, nargs="+", action="extend", **about)
            else:
                sub.add_argument(*flags, action=Once, **about)
    return parser

def main(argv=None):
    """Run a command -> exit code: 0 done, 2 the request was wrong, 1 it failed, 128 + signal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        given, unknown = make_parser().parse_known_args(argv)
        given = vars(given)
        function = COMMANDS[given.pop("command")]
        for word in sorted(unknown, key=lambda word: not word.startswith("--")):
            if not word.startswith("--"):
                raise Error(f"{quote(word)} was not expected here; a text is given with --data")
            function(**{word[2:].split("=")[0].replace("-", "_"): None})  # says what is close to it
        train.started = STARTED if argv is None else None
        result = function(**given)
        stop = result.get("signal") if isinstance(result, dict) else 0
        return 128 + stop if stop else 0
    except Error as e:
        notice(f"error: {e}")
        return e.code
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    if "__file__" not in globals() and {"IPython", "ipykernel"} & sys.modules.keys():
        print("gpt.py is ready. To learn a text: train(minutes=3), or train(data='my.txt')\n"
              "Then to write more of it: sample(), or sample(prompt='To be', temperature=0.7)")
    else:
        sys.exit(main())
