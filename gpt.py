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
import argparse, codecs, contextlib, ctypes, difflib, functools, glob, hashlib, html, io
import itertools, json, math, os, re, signal, sys, uuid, warnings, zipfile
from collections import Counter, defaultdict, namedtuple
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
# Each is declared once, as a field; the command line, its help and its checks come from it.

class Error(ValueError):
    """One line for the user: a request that cannot be met."""
    code = 2

class Failure(Error):
    """One line for the user: a run that cannot go on."""
    code = 1

def setting(default, help, low=0, high=1e18, choices=""):
    """A field with its default, its meaning, and the numbers or the words that it may be."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

CONVERT = {  # what was given, to a field's type
    int: lambda x: int(str(x)), float: lambda x: float(str(x)), str: os.fsdecode,
    bool: lambda x: {"true": True, "false": False}[str(x).lower()],
    list: lambda x: [str(x)] if isinstance(x, (str, Path)) else [str(item) for item in x]}

def checked(f, value):
    """The value given to a field, converted to the field's type, or an Error."""
    low, high, choices = (f.metadata[rule] for rule in ("low", "high", "choices"))
    if value is None and f.default is None:
        return None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        converted = CONVERT[f.type](value)
        number = converted if f.type in (int, float) else low
        if low <= number <= high and (not choices or converted in choices.split("|")):
            return converted
    wanted = choices or f"of type {f.type.__name__}"
    if f.type in (int, float):
        wanted += f" from {low} to {high:g}".removesuffix(" to 1e+18")
    raise Error(f"{f.name} must be {wanted}, not {value!r:.100}")

class Settings:
    """What the classes below have in common: to make one is to check every field."""
    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))
        if "out" in vars(self):
            self.out = os.path.expanduser(self.out)  # a shell leaves the ~ of --out=~/run

    @classmethod
    def make(cls, given):
        """The settings that a command's arguments make; these are kept as `given`."""
        known = cls.__dataclass_fields__
        for name in given.keys() - known.keys():
            plain = re.sub("epochs|max_iters", "steps", name.strip("-").replace("-", "_"))
            near = difflib.get_close_matches(plain, known, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
            raise Error(f"there is no setting {name!r:.100}; {hint}")
        given = {name: checked(known[name], value) for name, value in given.items()}
        s = cls(**cls.complete(given))
        s.given = given
        return s

    @classmethod
    def complete(cls, given):
        """What was given, and the defaults that depend on it."""
        return given

COMMANDS = {}  # name -> function

def command(settings, name):
    """Make f(settings) a command of the shell, and in Python a function of the fields."""
    known = settings.__dataclass_fields__
    names = settings.__annotations__ | known  # inherited ones come last

    def decorate(function):
        @functools.wraps(function)
        def call(**given):
            try:
                return function(settings.make(given))
            except ImportError as e:
                raise Error(f"this needs a package: pip install {e.name}") from None
            except OSError as e:  # if it names no file, it came while writing
                kind = Error if e.filename else Failure
                raise kind(f"{e.filename or name}: {e.strerror or first_line(e)}") from None
            except (MemoryError, RuntimeError) as e:
                if not re.search("(?i)out of memory|allocate|MemoryError", repr(e)):
                    raise
                raise Failure("out of memory: try a smaller batch_size (with a larger accum), "
                              "checkpoint_activations, a smaller block_size or size") from None

        call.settings = settings
        call.__signature__ = Signature([
            Parameter(n, Parameter.KEYWORD_ONLY, default=known[n].default) for n in names])
        COMMANDS[name] = call
        return call
    return decorate

@dataclass
class Config(Settings):
    """The shape of the model. `GPT(Config(vocab_size=65))` is a model."""
    vocab_size: int = setting(0, "tokens in the vocabulary (0: the tokenizer's; bpe: 1024)")
    block_size: int = setting(256, "context: the tokens that a prediction can see", 1, 1 << 20)
    n_layer: int = setting(4, "blocks of attention and MLP; without any it is a bigram", 0, 1000)
    n_head: int = setting(4, "attention heads", 1)
    n_kv_head: int = setting(0, "heads of keys and values (0: n_head; llama, qwen3: half of it)")
    head_dim: int = setting(0, "channels of a head (0: n_embd / n_head)")
    n_embd: int = setting(128, "channels of the residual stream", 1, 1 << 16)
    mlp_hidden: int = setting(0, "channels of the MLP (0: 4 n_embd; swiglu: 8/3 n_embd)")
    pos: str = setting("rope", "how positions enter", choices="learned|rope|none")
    norm: str = setting("rms", "LayerNorm or RMSNorm", choices="layer|rms")
    mlp: str = setting("swiglu", "relu2 is squared, swiglu gated", choices="gelu|relu|relu2|swiglu")
    qk_norm: bool = setting(True, "RMSNorm on queries and keys, so that no score grows too large")
    bias: bool = setting(False, "biases in linear layers and LayerNorm")
    tie: bool = setting(False, "the head shares the embedding's weights")
    rope_theta: float = setting(10000.0, "RoPE: pair i turns by this^(-2 i / head_dim) a token", 1)
    norm_eps: float = setting(1e-6, "added to the mean square inside norms")
    dropout: float = setting(0.0, "share of the stream's inputs that training zeroes", 0, 0.99)

    def __post_init__(self):
        super().__post_init__()
        if not self.head_dim and self.n_embd % self.n_head:
            raise Error(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        gated = math.ceil(self.n_embd * 8 / 3 / 32) * 32  # 3 matrices x 8/3 = 2 x 4
        self.mlp_hidden = self.mlp_hidden or (gated if self.mlp == "swiglu" else 4 * self.n_embd)
        if self.n_head % self.n_kv_head:
            raise Error(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise Error(f"RoPE rotates pairs: head_dim {self.head_dim} is not even")

@dataclass
class Machine(Settings):
    """Where it runs."""
    device: str = setting("auto", "auto (cuda, else mps, else cpu) or a torch device")
    dtype: str = setting("auto", "precision", choices="auto|float32|bfloat16|float16|float64")
    attention: str = setting("auto", "attention kernel", choices="auto|triton|cuda|sdpa|plain")
    seed: int = setting(1337, "the same seed gives the same run", 0, 2 ** 64 - 1)

ARCHS = {
    "bigram": dict(n_layer=0, pos="none"),  # what follows what: embedding times head is the table
    "gpt2": dict(pos="learned", norm="layer", mlp="gelu", qk_norm=False, bias=True, tie=True,
                 norm_eps=1e-5),
    "llama": dict(qk_norm=False),
    "qwen3": {}}
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),  # layers, heads, channels
              "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
SIZES = {
    "tiny": {},
    "baby": dict(n_layer=6, n_head=6, n_embd=384, dropout=0.2, batch_size=64, warmup=50),
    **{name: dict(n_layer=layers, n_head=heads, n_embd=channels, block_size=1024, accum=32,
                  batch_size=16, warmup=200, lr=2e-3, momentum=0.95)
       for name, (layers, heads, channels) in GPT2_SIZES.items()}}
STEPS = {"tiny": 1900, "baby": 2500}  # if neither steps nor minutes are given; else 20,000

@dataclass
class Training(Machine, Config):
    """The settings of `train`."""
    data: list = setting("input.txt", "files (.txt, .jsonl with a `text` a line), folders, globs")
    out: str = setting("out", "folder of the run")
    steps: int = setting(None, "length (default: the size's, or until the text is seen 5 times)", 1)
    minutes: float = setting(None, "length, loading included; --resume counts what came before too")
    size: str = setting("auto", "auto: tiny on a CPU, else baby", choices="auto|" + "|".join(SIZES))
    tokenizer: str = setting("char", "bpe is learnt from the data", choices="char|bpe|gpt2")
    arch: str = setting("qwen3", "architecture", choices="|".join(ARCHS))
    init: str = setting("", "fine-tune: a checkpoint, a run's or a Hugging Face folder, gpt2, ...")
    resume: bool = setting(False, "go on where the run in out stopped")
    overwrite: bool = setting(False, "replace the run in out")
    batch_size: int = setting(8, "sequences per forward pass and process", 1)
    accum: int = setting(1, "forward passes per step", 1)
    lr: float = setting(3e-3, "AdamW's peak learning rate; Muon's is 10 times that; init: a tenth")
    optimizer: str = setting("muon", "muon is for the blocks' matrices", choices="muon|adamw")
    momentum: float = setting(0.9, "Muon's: what a step keeps of earlier gradients", 0, 0.999)
    weight_decay: float = setting(0.1, "how much of a matrix a step takes away, times the rate")
    grad_clip: float = setting(1.0, "longest gradient (2-norm) that a step follows; 0 is off")
    warmup: int = setting(0, "steps over which the learning rate rises")
    eval_every: int = setting(None, "steps between evaluations and saves (default: about 30)", 1)
    probe: str = setting(None, "a text to watch the model read (default: a line; '': none)")
    compile: str = setting("auto", "torch.compile; auto: on CUDA", choices="auto|on|off")
    checkpoint_activations: bool = setting(False, "recompute activations: slower, less memory")

    @classmethod
    def complete(cls, given):
        """What was given beats size, which beats arch, which beats the defaults above."""
        arch, size = given.get("arch", cls.arch), given.get("size", "auto")
        if size == "auto":
            cpu = pick_device(given.get("device", "auto")).type == "cpu"
            size = "tiny" if cpu or arch == "bigram" else "baby"
        settings = ARCHS[arch] | SIZES[size] | given | {"size": size}
        heads = settings.get("n_head", cls.n_head)
        if arch in ("llama", "qwen3") and heads % 2 == 0:
            settings.setdefault("n_kv_head", heads // 2)
        return settings

# --- Tokenizers ----------------------------------------------------------------------------------
# A model reads whole numbers. A tokenizer is a list of byte strings, one a number, and a way to
# cut a text into them.

class Tokenizer:
    """What every tokenizer has:
    tokens   the bytes of each id
    eot      the id between documents, or None
    ends     the ids that end a sample
    first    the ids that begin one without a prompt
    train    (texts, vocab_size) -> a tokenizer
    encode   (text, special) -> ids (T,); special, of a prompt, makes <|endoftext|> one token
    state    () -> its kind, and the arguments that make it again"""
    eot, ends = None, set()

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        ids = torch.as_tensor(ids).tolist()
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", "replace")

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
        return cls(itertools.chain.from_iterable(map(set, texts)))

    def encode(self, text, special=False):
        codes = torch.frombuffer(bytearray(text.encode("utf-32")), dtype=torch.int32)
        ids = self.ids.index_select(0, codes[1:])  # the first is the byte order mark
        if (ids < 0).any():
            unknown = " ".join(repr(c) for c in dict.fromkeys(text) if c not in self.chars)
            raise Error(f"the text has characters that this model has never seen: {unknown:.100} "
                        "(a model trained with --tokenizer bpe reads any text)")
        return ids

    def state(self):
        return {"kind": "char", "chars": self.chars}

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class BPETokenizer(Tokenizer):
    """Byte-pair encoding of UTF-8, as in GPT-2: any text can be written, and tiktoken does the
    merging. `tokens` are in the order in which merges made them; the last is <|endoftext|>."""
    def __init__(self, tokens):
        self.tokens = [t.encode("latin-1") if isinstance(t, str) else t for t in tokens]
        self.eot = len(tokens) - 1
        self.ends, self.first = {self.eot}, [self.eot]
        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        import tiktoken
        self.encoding = tiktoken.Encoding("gpt.py", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={"<|endoftext|>": self.eot})

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges: join the commonest pair of neighbouring tokens, and again.
        `BPETokenizer.train(["aaa aaa"], 259).tokens[256:] == [b"aa", b"aaa", b"<|endoftext|>"]`"""
        import regex  # comes with tiktoken
        if 0 < vocab_size < 257:
            raise Error(f"vocab_size {vocab_size}: bpe needs 256 bytes and the end of text")
        tokens = [bytes([i]) for i in range(256)]
        words, pairs = Counter(), Counter()  # how often each occurs; chr(i) is tokens[i]
        read = 0

        def count(word, n):
            words[word] += n
            for a, b in zip(word, word[1:]):
                pairs[a + b] += n

        for text in texts:
            for word, n in Counter(regex.findall(GPT2_PATTERN, text)).items():
                for part in re.findall("(?s).{1,64}", word.encode().decode("latin-1")):
                    count(part, n)
            read += len(text)
            if read >= 1 << 21:  # two million characters tell enough
                break
        for i in range(256, (vocab_size or 1024) - 1):
            pair = max(pairs, key=pairs.get, default="")
            if pairs[pair] < 1:
                break
            tokens.append(b"".join(tokens[ord(c)] for c in pair))
            for word in [word for word in words if pair in word]:  # merges stay within words
                n = words[word]
                count(word.replace(pair, chr(i)), n)
                count(word, -n)
                del words[word]
        return cls(tokens + [b"<|endoftext|>"])

    def encode(self, text, special=False):
        allowed = {"<|endoftext|>"} if special else set()
        ids = self.encoding.encode(text, allowed_special=allowed, disallowed_special=())
        return torch.tensor(ids, dtype=torch.int32)

    def state(self):
        return {"kind": "bpe", "tokens": [token.decode("latin-1") for token in self.tokens]}

class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own 50,257 tokens, which tiktoken downloads once."""
    @classmethod
    def train(cls, texts, vocab_size):
        import tiktoken
        try:
            theirs = tiktoken.get_encoding("gpt2")
        except OSError:
            raise Error("the tokens of gpt2 could not be downloaded; TIKTOKEN_CACHE_DIR may name "
                        "a folder that has them") from None
        return cls([theirs.decode_single_token_bytes(i) for i in range(theirs.n_vocab)])

TOKENIZERS = {"char": CharTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}

def tokenizer_from(state):
    """A tokenizer from what a checkpoint keeps of it."""
    return TOKENIZERS[state["kind"]](**{name: v for name, v in state.items() if name != "kind"})

# --- Model ---------------------------------------------------------------------------------------
# Each token becomes a vector, the residual stream. Every block reads it and adds to it: attention
# brings what earlier tokens know, the MLP works on each token alone. What the last block leaves is
# compared with one vector per token of the vocabulary, the rows of the head: the larger the
# product, the likelier that token comes next.

def attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v: the definition, which faster ones are checked against.
    q (B, TQ, H, D), of the last TQ positions; k, v (B, TK, H_kv, D), where H / H_kv query heads
    share a key head. With as many key heads, and the heads in front, (B, H, T, D), this is

        mask = torch.full((TQ, TK), -math.inf).triu(TK - TQ + 1)  # -inf hides a later key
        scores = q @ k.mT * D ** -0.5 + mask
        return scores.softmax(dim=-1) @ v

    Here the queries that share a key head stand below each other in one matrix."""
    B, TQ, H, D = q.shape
    TK, H_kv = k.shape[1:3]
    q = q.unflatten(2, (H_kv, H // H_kv)).permute(0, 2, 3, 1, 4).reshape(B * H_kv, -1, D)
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B H_kv, TK, D)
    mask = q.new_full((TQ, TK), -math.inf).triu(TK - TQ + 1).repeat(H // H_kv, 1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=D ** -0.5)  # (B H_kv, H / H_kv TQ, TK)
    out = scores.softmax(dim=-1) @ v
    return out.view(B, H, TQ, -1).transpose(1, 2)  # (B, TQ, H, D)

def torch_attention(q, k, v):
    """The same by torch's own kernels, for where kernels.py is not."""
    TQ, TK, groups = q.size(1), k.size(1), q.size(2) // k.size(2)
    if 1 < TQ < TK:  # never in training or sampling; is_causal's mask is aligned top left
        return attention(q, k, v)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=TQ == TK).transpose(1, 2)

def choose_attention(model, impl, dtype, batch_size=1):
    """Let the blocks use `impl`, or the attention that suits this machine -> what it is, in words.
    It must agree with each block's own, for all queries and for the last alone, as in sampling:
    so a change to the definition is never silently ignored."""
    c, device = model.config, next(model.parameters()).device
    if impl == "plain" or impl == "auto" and device.type == "cpu" and c.block_size <= 256:
        attend, reason = attention, "plain attention"
    elif NO_KERNELS and impl in ("auto", "sdpa"):
        attend, reason = torch_attention, "torch's attention"
    elif NO_KERNELS:
        raise Error(f"attention {impl}: {NO_KERNELS}")
    else:
        shape = batch_size, c.block_size, c.n_head, c.n_kv_head, c.head_dim
        try:
            attend, reason = kernels.choose(device, dtype, shape, impl)
        except ValueError as e:
            raise Error(f"attention {impl}: {e}") from None
    T, definitions = min(c.block_size, 4096), {b.attn.attend for b in model.blocks} - {attend}
    q, k, v = torch.randn(3, 1, T, 2, max(16, c.head_dim), device=device, dtype=dtype)
    v[:, 0] *= T ** 0.5  # large, so that hiding it from one query already shows
    for definition, queries in itertools.product(definitions, (q, q[:, -1:])):
        own = definition(queries.float(), k.float(), v.float())
        error = (attend(queries, k, v) - own).norm(dim=-1) / own.norm(dim=-1)
        if not error.max() < 0.02:  # half precision comes to 0.007
            return f"the model's own attention, with which {reason} does not agree"
    for block in model.blocks:
        block.attn.attend = attend
    return reason

def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, config.norm_eps)

def apply_rope(x, cos, sin):
    """RoPE (Su et al., 2021): turn each pair (x[i], x[i + D/2]) by its position's angle, so that
    the product of a query and a key depends on how far apart they stand, not on where.
    x (B, T, H, D): (a, b) -> (a cos - b sin, b cos + a sin); `sin` (T, 1, D) holds that minus."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)

class Attention(nn.Module):
    """Each token asks with a query; every earlier token, and the token itself, answers with a key;
    the better the two match, by their dot product, the more of that token's value is taken over.
    Several heads do so side by side."""
    def __init__(self, config, layer):
        super().__init__()
        C, D, H, H_kv = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        self.layer, self.head_dim = layer, D
        self.q = nn.Linear(C, H * D, bias=config.bias)
        self.k = nn.Linear(C, H_kv * D, bias=config.bias)
        self.v = nn.Linear(C, H_kv * D, bias=config.bias)
        self.out = nn.Linear(H * D, C, bias=config.bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(D, config.norm_eps), norm(D, config.norm_eps)
        self.attend = attention  # `choose_attention` may put a faster one in its place

    def forward(self, x, rope, cache):
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        q, k = self.q_norm(q.type_as(x)), self.k_norm(k.type_as(x))  # float32 under autocast
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k = q.type_as(v), k.type_as(v)  # (B, T, H, D), (B, T, H_kv, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, TK, H_kv, D)
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
    """One layer. x is the residual stream: blocks only ever add to it."""
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

class KVCache:
    """The keys and values of the first `length` tokens, so that they need not be computed again;
    there is room for T."""
    def __init__(self, model, B, T):
        c, weight = model.config, next(model.parameters())
        self.kv = weight.new_empty(c.n_layer, 2, B, T, c.n_kv_head, c.head_dim)
        self.length = 0

    def append(self, layer, k, v):
        """Keep k and v (B, T, H_kv, D) of new tokens -> those of all tokens of this layer."""
        stop = self.length + k.size(1)
        self.kv[layer, :, :, self.length:stop] = torch.stack((k, v))
        return self.kv[layer, :, :, :stop].to(k.dtype)  # under autocast the cache is float32

def next_token_loss(x, weight, targets):
    """Mean cross-entropy of the logits x @ weight^T: minus the log of the probability that was
    given to the token that came. 0 is certainty, ln(V) is knowing nothing. x (B, T, C); weight
    (V, C); targets (B, T), of which -1 do not count."""
    x, targets = x.flatten(0, 1), targets.flatten()
    if not NO_KERNELS:
        return kernels.linear_cross_entropy(x, weight, targets)  # never holds all logits
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)

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
            frequencies = torch.cat((-frequencies, frequencies))  # the minus of apply_rope
            angles = torch.outer(torch.arange(c.block_size), frequencies)[:, None]  # (T, 1, D)
            self.register_buffer("rope", torch.stack((angles.cos(), angles.sin())), False)
        self.checkpoint_activations = False  # a training run may set it
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
        """With a cache, idx are the tokens after those it holds. `last`: the last logits only."""
        start = cache.length if cache else 0
        stop = start + idx.size(1)
        x = self.embed(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[start:stop]
        x = self.dropout(x)
        rope = self.rope[:, start:stop] if self.config.pos == "rope" else None
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        if cache:
            cache.length = stop
        if targets is not None:
            return next_token_loss(self.norm(x), self.head.weight, targets)  # the head is in it
        return self.head(self.norm(x[:, -1:] if last else x))

def count_parameters(model):
    return sum(p.numel() for p in model.parameters())

# --- Data ----------------------------------------------------------------------------------------
# Text is read in pieces, cut into tokens once, and kept on disk as one long row of whole numbers.
# A step of training looks at windows of it here and there, an evaluation goes through them all.

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
               "data/tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def cache_folder():
    return Path(os.environ.get("GPT_CACHE") or Path.home() / ".cache" / "gpt")

def download(url, path, sha256=None):
    """Fetch an address into a file, once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)
        except Exception as e:  # no network, no such address, another file than expected
            raise Error(f"{url} could not be downloaded ({first_line(e)}); "
                        f"put the file there yourself: {path}") from None
    return path

def find_files(name):
    """The files that one name in `data` stands for: a file's, a glob's, a folder's visible .txt."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        path = os.path.join(glob.escape(path), "**", "*.[tT][xX][tT]")
    found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    found = [Path(p) for p in found if os.path.isfile(p)]
    if not found and name == "input.txt":
        beside = Path(globals().get("__file__", ".")).parent / name
        kept = cache_folder() / "tinyshakespeare.txt"
        return [beside if beside.is_file() else download(SHAKESPEARE, kept, SHAKESPEARE_SHA256)]
    if not found:
        raise Error(f"data {name!r:.100}: no file, no folder with .txt files, no glob of files")
    return found

def whole_characters(text):
    """The text with halves of surrogate pairs joined, or replaced where they stand alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def read_pieces(paths, size=1 << 17):
    """The text in pieces, and None before each document: a file, or a line of a .jsonl. A file is
    cut about every `size` characters, between a letter or digit and the white space after it,
    where no tokenizer joins anything; where there is no such place, anywhere."""
    piece = re.compile(rf"(?s).*[^\W_](?=\s)|.{{1,{size}}}")  # greedy: to the last such place
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                if path.suffix.lower() == ".jsonl":
                    yield from read_jsonl(file)
                    continue
                yield None
                rest = ""
                while text := rest + file.read(size):
                    cut = piece.match(text).end()
                    yield text[:cut]
                    rest = text[cut:]
        except (UnicodeDecodeError, OSError) as e:
            raise Error(f"{path}: {getattr(e, 'strerror', 'not UTF-8 text')}") from None

def read_jsonl(file):
    for number, line in enumerate(file, 1):
        try:
            if not line.isspace():
                yield from (None, whole_characters(json.loads(line)["text"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise Error(f"{file.name}: line {number} is no JSON object with a `text`") from None

# ids (N,), mapped from disk; fingerprint, a hash of them; files, how many there are
Tokens = namedtuple("Tokens", "ids tokenizer fingerprint files text_bytes")

def load_tokens(data, tokenizer="char", vocab_size=0):
    """Tokenise files, or find in cache_folder() that it was done: empty that after a change to how
    a text is read. `tokenizer`: one, or the kind to make."""
    paths = [path for name in data for path in find_files(name)]
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

    def kept(*what):  # the JSON of something made from these files
        key = hashlib.sha256(json.dumps([FORMAT, what, files]).encode()).hexdigest()[:32]
        return cache_folder() / f"{key}.json"

    if isinstance(tokenizer, str):
        made = kept(tokenizer, vocab_size)
        if not made.exists():
            new = TOKENIZERS[tokenizer].train(filter(None, read_pieces(paths)), vocab_size)
            write_json(made, new.state())
        tokenizer = tokenizer_from(json.loads(made.read_text("utf-8")))
    about = kept(tokenizer.state())
    binary = about.with_suffix(".bin")
    if not (about.exists() and binary.exists()):
        write_json(about, write_tokens(paths, tokenizer, binary))
    known = json.loads(about.read_text("utf-8"))
    dtype = id_dtype(tokenizer)
    size = binary.stat().st_size // dtype.itemsize
    if size < 20:
        raise Error(f"{', '.join(data):.100}: too little text, {size} tokens")
    ids = torch.from_file(str(binary), size=size, dtype=dtype)
    return Tokens(ids, tokenizer, known["fingerprint"], len(paths), known["text_bytes"])

def id_dtype(tokenizer):
    return torch.uint16 if len(tokenizer.tokens) <= 1 << 16 else torch.int32

def write_tokens(paths, tokenizer, binary):
    """Write the ids of the files' text into one file -> what must be known of it."""
    digest, text_bytes = hashlib.sha256(), 0
    eot = torch.tensor([] if tokenizer.eot is None else [tokenizer.eot], dtype=torch.int32)
    with atomic(binary) as file:
        for text in itertools.islice(read_pieces(paths), 1, None):  # no eot before the first
            ids = eot if text is None else tokenizer.encode(text)
            ids = ids.to(id_dtype(tokenizer))
            raw = ctypes.string_at(ids.data_ptr(), ids.nbytes)
            file.write(raw)
            digest.update(raw)
            text_bytes += len((text or "").encode())
    return {"text_bytes": text_bytes, "fingerprint": digest.hexdigest()}

def split(ids):
    """The first nine tenths train, the rest validates."""
    n = int(0.9 * len(ids))
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
    starts = torch.arange(0, len(ids) - 1 - T + stride, stride)
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
    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for rows, columns in {p.shape for p in group["params"]}:
            params = [p for p in group["params"] if p.shape == (rows, columns)]
            grad = torch.stack([p.grad for p in params])
            momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 1 - group["momentum"])
            nesterov = grad.lerp(momentum, group["momentum"])
            update = orthogonalise(nesterov).to(grad.dtype)
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            for p, step in zip(params, update):  # cautious decay: where the step shrinks p too
                p.mul_(1 - group["lr"] * group["weight_decay"] * (p * step > 0))
                p.add_(step, alpha=-lr)

def orthogonalise(x, steps=5):
    """x (n, rows, columns) -> about the nearest matrices whose singular values are all 1 (they end
    between 0.7 and 1.2), by Newton-Schulz: x <- 3.44 x - 4.78 (x x^T) x + 2.03 (x x^T)^2 x."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:  # no element is above 1 any more, so float16 will do where bfloat16 is slow
        x = x.to(pick_dtype("auto", x.device))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        xx = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x

def make_optimizers(model, s):
    """Muon for the blocks' matrices, AdamW for embeddings, head and vectors; or AdamW for all."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2 and s.optimizer == "muon"]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    betas, fused = (0.8 if hidden else 0.9, 0.95), rest[0].device.type != "mps"
    adamw = torch.optim.AdamW(groups, s.lr, betas, fused=fused)
    how = dict(lr=10 * s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    return [adamw, Muon(hidden, how)] if hidden else [adamw]

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
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise Error(f"device {name!r:.100} cannot be used: {first_line(e)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # clocks wait for the current one, and its memory is counted
    return device

def pick_dtype(name, device):
    """auto -> the precision that this device is fast in."""
    if name == "float64" and device.type == "mps":
        raise Error("dtype float64: MPS does not have it")
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda" or torch.version.hip:
        return torch.float32
    major, _ = torch.cuda.get_device_capability(device)  # before 8 bfloat16 is emulated
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32

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

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # Python takes handlers from its main thread alone
            for number in signal.valid_signals() & {1, 2, 15}:  # SIGHUP, SIGINT, SIGTERM
                if signal.getsignal(number) not in (None, signal.SIG_IGN):  # set in C; by nohup
                    before[number] = signal.signal(number, stop)
                    stack.callback(signal.signal, number, before[number])
        yield received

def join_processes(device, stack):
    """Join the others that torchrun started, until the stack closes -> (rank, how many there are).
    Only the first speaks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if "MASTER_ADDR" not in os.environ:
        raise Error("WORLD_SIZE is set without MASTER_ADDR: unset it, or use torchrun")
    import torch.distributed.nn  # imported later, it keeps the group and its threads alive
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    stack.callback(dist.destroy_process_group)
    for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr) if rank else ():
        stack.enter_context(redirect(io.StringIO()))
    return rank, world

MAY_CHANGE = {"out", "resume", "data", "steps", "minutes", "device", "dtype", "attention",
              "compile", "checkpoint_activations", "eval_every", "probe"}  # when a run goes on

@command(Training, "train")
def train(s):
    """train a model"""
    device, path = pick_device(s.device), Path(s.out) / "ckpt.pt"
    if s.given.get("steps") and s.given.get("minutes"):
        raise Error("steps and minutes: give one of them")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)  # glibc is to keep freed memory: training is 11 % faster
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
    with contextlib.ExitStack() as stack:
        rank, world = join_processes(device, stack)
        old = tokenizer = checkpoint = None
        if s.resume:
            checkpoint = read_checkpoint(path)
            old, tokenizer = model_from(checkpoint, path)
            if "optimizer" not in checkpoint:
                raise Error(f"{path} has weights alone, like a best.pt: --init can use it")
            settings = asdict(old.config) | {"out": s.out}
            if {"steps", "minutes"} & s.given.keys():
                settings |= {"steps": None, "minutes": None}
            s = inherit(s, settings, MAY_CHANGE)
        elif (path.exists() or path.with_name("best.pt").exists()) and not s.overwrite:
            raise Error(f"{s.out} holds a run: --resume goes on with it, --out OTHER starts "
                        "another beside it, --overwrite replaces it")
        elif s.init:
            old, tokenizer = load_model(s.init)
            if "arch" in s.given or tokenizer and "tokenizer" in s.given:
                raise Error("arch and tokenizer are those of the model that init names")
            shape = {f.name: getattr(old.config, f.name) for f in fields(Config)}
            shorter = {"block_size"} if s.block_size < old.config.block_size else set()
            s = inherit(s, shape | {"dropout": 0.0, "lr": s.lr / 10}, {"dropout", "lr"} | shorter)
        if rank:  # the first process tokenises; the others wait, and find it done
            dist.barrier()
        text = load_tokens(s.data, tokenizer or s.tokenizer, s.vocab_size)
        if world > 1 and not rank:
            dist.barrier()
        if checkpoint and checkpoint["data_fingerprint"] != text.fingerprint:
            raise Error(f"{', '.join(s.data):.100} is not the text of the run in {s.out}")
        fit_to_text(s, text, world)
        torch.manual_seed(s.seed)
        model = GPT(s)
        if old:
            if old.positions is not None:  # a shorter context needs no later ones
                old.positions.weight.data = old.positions.weight.data[:s.block_size]
            model.to(old.head.weight.dtype).load_state_dict(old.state_dict())
        run = Run(s, model, text, device, rank, world, checkpoint)
        del old, checkpoint  # they are as large as the run
        with interruptible() as run.signals:  # before, there is nothing to save
            return run.loop()

def inherit(s, settings, may_change):
    """s with a model's or a run's settings, of which only `may_change` can be given anew."""
    for name in (s.given.keys() & settings.keys()) - may_change:
        if s.given[name] != settings[name]:
            raise Error(f"{name} is {settings[name]!r} there; it cannot be {s.given[name]!r:.100}")
    return Training(**(asdict(s) | settings | s.given))

def fit_to_text(s, text, world):
    """Fill in what depends on the text: the vocabulary, and how many steps if none were given."""
    V, N = len(text.tokenizer.tokens), len(split(text.ids)[0])
    if s.vocab_size not in (0, V) and (s.vocab_size < V or s.tokenizer != "bpe"):
        raise Error(f"vocab_size {s.vocab_size}: this tokenizer has {V} tokens")
    if N <= s.block_size:
        raise Error(f"too little text: {N} tokens to train on, at least {s.block_size + 1} needed "
                    f"by a block_size of {s.block_size}")
    s.vocab_size = V
    if not s.steps and s.minutes is None:
        times = 16 if s.dropout else 5  # more than that it would learn the text by heart
        enough = math.ceil(times * N / (s.batch_size * s.accum * world * s.block_size))
        s.steps = min(STEPS.get(s.size, 20000), max(100, enough))

class Run:
    """A training run. `loop` says what it does, the other methods how."""
    def __init__(self, s, model, text, device, rank, world, checkpoint):
        self.s, self.model, self.text, self.out = s, model, text, Path(s.out)
        self.device, self.rank, self.world = device, rank, world
        self.train_ids, self.val_ids = split(text.ids)
        self.line = probe_line(s.probe, text.tokenizer, self.val_ids, s.block_size)
        self.tokens_per_step = s.batch_size * s.accum * world * s.block_size
        self.dtype = pick_dtype(s.dtype, device)
        # TF32 on a GPU; oneDNN on a CPU, float32 there too unless it has AMX
        fast = "medium" if device.type == "cpu" else "high"
        torch.set_float32_matmul_precision(fast if s.dtype == "auto" else "highest")
        model.to(device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        model.checkpoint_activations = s.checkpoint_activations
        attention = choose_attention(model, s.attention, self.dtype, s.batch_size)
        self.forward = model  # below it may be compiled
        self.eval_model = model  # is evaluated, probed and kept as best; it could be an average
        self.optimizers = make_optimizers(model, s)
        # float16 loses small gradients: the loss is multiplied before the backward pass
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step, self.looked_step, self.skipped, self.best = 0, -1, 0, math.inf
        self.last = {"train_loss": None, "lr": 0.0, "grad_norm": None, "val_loss": math.nan}
        self.progress, self.longest_look = 0.0, 0.0  # share of the run; seconds
        started = vars(train).pop("started", None)  # the shell's command, in `main`
        self.began = self.looked = self.saved = started or time.monotonic()
        if checkpoint:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer"]):
                optimizer.load_state_dict(state)
            if checkpoint["scaler"]:  # one that was not in use has nothing
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.step = self.looked_step = checkpoint["step"]
            self.best, self.last["val_loss"] = checkpoint["best"], checkpoint["val_loss"]
            self.began -= checkpoint["seconds"]
        if s.compile == "on" or s.compile == "auto" and device.type == "cuda":
            self.forward = torch.compile(model)
            try:  # a pass like those of training
                self.backward(self.train_ids[:s.block_size + 1].long().expand(s.batch_size, -1))
            except Exception as e:  # a compiler may fail in any way
                notice(f"torch.compile does not work here ({first_line(e)}); going on without")
                self.forward = model
            model.zero_grad()
        times = (s.steps or 0) * self.tokens_per_step / len(self.train_ids)
        seen = f", {times:.2g} times in {s.steps:,} steps" if times else ""
        say(f"{device}, {str(self.dtype)[6:]}, {attention}; {count_parameters(model):,} "
            f"parameters, {s.vocab_size:,} tokens in the vocabulary\n{', '.join(s.data):.60}: "
            f"{text.text_bytes / 1e6:,.2f} MB in {text.files} file{'s' * (text.files > 1)}, "
            f"{len(text.ids):,} tokens, of which nine tenths train{seen}")

    def loop(self):
        """Step by step; look when it is due; until all is done or a signal came -> the metrics."""
        if self.rank == 0:
            clean_folder(self.out, self.looked_step)
        while True:
            before = self.progress
            self.progress, stop = self.synchronise()
            done = self.progress >= 1
            due = self.looked_step < self.step and (done or self.due(before))
            begun = time.monotonic()
            try:
                if self.rank == 0 and due:
                    self.look()
                elif self.rank == 0 and (stop or begun - self.saved > 300):
                    self.save("ckpt.pt")
            except (Error, OSError) as e:  # a full disk, above all
                if done or stop:
                    raise
                notice(f"{e}; training goes on")
            self.longest_look = max(self.longest_look, time.monotonic() - begun)
            if done or stop:
                return self.finish(stop)
            self.train_step()

    def synchronise(self):
        """-> (share of the run that is done, signal or 0), the same in all processes: they wait
        for each other here."""
        limit = 60 * (self.s.minutes or 0) - 1.5 * self.longest_look - 0.3  # leaves time to save
        progress = self.step / self.s.steps if self.s.steps else self.seconds() / max(1e-9, limit)
        stop = self.signals[0] if self.signals else 0
        if self.world > 1:
            both = torch.tensor([progress, stop], dtype=torch.float64, device=self.device)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            progress, stop = both.tolist()
        return progress, int(stop)

    def due(self, before):
        """Is it time to look? Of a run in minutes, looks take a sixth at most."""
        if self.s.eval_every:
            return self.step % self.s.eval_every == 0
        if self.s.minutes and time.monotonic() - self.looked < 5 * self.longest_look:
            return False
        even = int(20 * self.progress + 1e-9) > int(20 * before + 1e-9)  # twenty times in all
        return even or self.step & (self.step - 1) == 0  # 0, 1, 2, 4, 8, ...

    def seconds(self):
        return time.monotonic() - self.began

    def train_step(self):
        """The gradient of the loss over batch_size x accum x processes windows, then a step. All
        chance in it comes from (seed, step, rank): a run that goes on repeats it exactly."""
        s, share = self.s, lr_share(self.step, self.progress, self.s.warmup)
        torch.manual_seed((s.seed + 7919 * self.step + 104_729 * self.rank) % 2 ** 64)  # dropout's
        shape = s.accum, self.world, s.batch_size
        windows = get_batch(self.train_ids, s.block_size, shape, self.rank, s.seed, self.step)
        loss = self.backward(windows)
        if self.world > 1:
            for tensor in (loss, *(p.grad for p in self.model.parameters())):
                dist.all_reduce(tensor.div_(self.world))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        loss, norm = torch.stack((loss, norm.to(loss))).tolist()  # waits for the GPU once
        self.skipped = 0 if math.isfinite(loss + norm) else self.skipped + 1
        if self.skipped == 20:
            raise Failure("20 steps in a row had no finite loss and gradient: try a lower lr, a "
                          "longer warmup or dtype float32")
        for optimizer in self.optimizers if not self.skipped else ():  # both step, or neither
            for group in optimizer.param_groups:
                group["lr"] = share * group.setdefault("peak", group["lr"])  # at first the peak
            optimizer.step()
        self.scaler.update()
        self.model.zero_grad()
        self.step += 1
        self.last |= {"train_loss": loss, "lr": s.lr * share, "grad_norm": norm}

    def backward(self, windows):
        """Add up the gradient of the mean loss over windows (rows, T + 1) -> that loss."""
        total, passes = torch.zeros((), device=self.device), windows.split(self.s.batch_size)
        for rows in passes:
            rows = rows.to(self.device)
            with precision(self.device, self.dtype):
                loss = self.forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            self.scaler.scale(loss / len(passes)).backward()
            total += loss.detach() / len(passes)
        return total

    def look(self):
        """Evaluate, over windows that are always the same; log; read the line; save."""
        s, steps = self.s, self.step - max(0, self.looked_step)
        speed = steps * self.tokens_per_step / (time.monotonic() - self.looked)
        run_tokens = s.steps * self.tokens_per_step if s.steps else 1 << 22
        most = 1 << (15 if self.device.type == "cpu" else 18)
        limit = max(8 * s.block_size, min(run_tokens // 600, most))
        with precision(self.device, self.dtype):
            loss, _ = estimate_loss(self.eval_model, self.val_ids, None, s.batch_size, limit)
        self.last["val_loss"] = loss
        if self.step and loss < self.best:
            self.save("best.pt")
            self.best = loss  # now that it is kept
        append_line(self.out / "log.jsonl", {
            "step": self.step, "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds(), **self.last, "tokens_per_second": speed,
            "memory_mb": torch.cuda.max_memory_allocated() / 1e6})
        train_loss = f"train {self.last['train_loss']:.4f}  " if self.step else ""
        bits = loss / math.log(2) * len(self.text.ids) / self.text.text_bytes
        say(f"step {self.step}  {train_loss}val {loss:.4f} ({bits:.3f} bits per byte)  "
            f"{speed:,.0f} tokens/s  {100 * min(1, self.progress):.0f} % in {self.seconds():.0f} s")
        if s.probe != "":
            record_probe(self)
        self.looked_step = self.step
        self.save("ckpt.pt")
        self.looked = time.monotonic()

    def save(self, name):
        """best.pt has what other commands need, ckpt.pt also what only training needs."""
        state = {"format": FORMAT, "model": self.eval_model.state_dict(), "step": self.step,
                 "settings": asdict(self.s), "tokenizer": self.text.tokenizer.state(),
                 "val_loss": self.last["val_loss"], "data_fingerprint": self.text.fingerprint}
        if name == "ckpt.pt":
            self.saved = time.monotonic()
            state |= {"model": self.model.state_dict(), "scaler": self.scaler.state_dict(),
                      "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
                      "seconds": self.seconds(), "best": self.best}
        with atomic(self.out / name) as file:
            torch.save(state, file)

    def finish(self, stop):
        self.synchronise()  # nobody leaves before the first process has saved
        if self.last["val_loss"] > 1.02 * self.best > (self.last["train_loss"] or 0):
            notice(f"best.pt keeps the lowest validation loss, {self.best:.4f}; after it the model "
                   "learnt by heart: more text, dropout or a smaller model would help")
        if stop:
            notice(f"stopped at step {self.step} and saved; --resume --out '{self.out}' goes on")
        else:
            say(f"{self.out} is complete at step {self.step}, after {self.seconds():.0f} s")
        return {"step": self.step, **self.last, "seconds": self.seconds(), "signal": stop}

def clean_folder(out, step):
    """Remove what an overwritten run has left, and what is beyond the step to go on from."""
    out.mkdir(parents=True, exist_ok=True)
    old = [out / "ckpt.pt", out / "best.pt"] if step < 0 else []
    for path in (*old, *out.glob("*.????????.tmp")):  # a process that was killed leaves these
        path.unlink(missing_ok=True)
    for path in (out / "log.jsonl", out / "probe.jsonl"):
        kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
        with atomic(path) as file:
            file.write("".join(kept).encode())

# --- Sampling ------------------------------------------------------------------------------------
# Ask the model for the distribution of the next token, draw one from it, append it, and ask again.

@dataclass
class Trained(Settings):
    """Which model."""
    out: str = setting("out", "folder of a run: its best.pt, else its ckpt.pt, is opened")
    init: str = setting("", "instead: a checkpoint, a run's or a Hugging Face folder, gpt2, ...")

@dataclass
class Sampling(Machine, Trained):
    prompt: str = setting("", "text to go on from; @FILE reads a file (@@ is an @), - stdin")
    tokens: int = setting(500, "tokens to generate")
    temperature: float = setting(0.8, "0 is greedy; 1 is the model's own distribution")
    top_k: int = setting(0, "sample among the k likeliest (0: all)")
    top_p: float = setting(1.0, "sample among the likeliest that have this share together", 0, 1)
    num: int = setting(1, "samples", 1)
    stop: str = setting("", "text to stop at; it is not printed")
    cache: bool = setting(True, "keep keys and values of earlier tokens (the KV cache)")

def sample_next(logits, s, generator):
    """Draw ids (B,) from logits (B, V), as s, a Sampling, says: on the CPU and in float32, so that
    the same logits give the same ids on every device."""
    logits = logits.float().cpu()
    if not logits.amax(dim=-1).isfinite().all():
        raise Failure("the logits are not finite: trained too fast, or in too coarse a precision")
    if s.temperature < 1e-6:
        return logits.argmax(dim=-1)
    logits = logits / s.temperature
    if s.top_k or s.top_p < 1:
        V = logits.size(-1)
        ranked, ids = logits.topk(min(s.top_k or V, V))  # the likeliest first
        before = ranked.softmax(dim=-1).cumsum(dim=-1)[:, :-1]  # what likelier ones have together
        if s.top_p < 1:
            ranked[:, 1:][before >= s.top_p] = -math.inf
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, ranked)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

@torch.inference_mode()
def generate(model, idx, s, generator=None):
    """Continue idx (B, T) by s.tokens tokens, yielding each as ids (B,) on the CPU. When
    the context is full, its newest block_size // 2 go on, with a cache or without."""
    generator = generator or torch.Generator().manual_seed(s.seed)
    block_size = model.config.block_size
    idx = idx[:, -block_size:]
    room = min(block_size, idx.size(1) + s.tokens)  # a whole context may take gigabytes
    cache = KVCache(model, len(idx), room) if s.cache else None
    for _ in range(s.tokens):
        new = idx[:, cache.length:] if cache else idx
        logits = model(new, cache=cache, last=True)  # (B, 1, V)
        ids = sample_next(logits[:, -1], s, generator)
        yield ids
        idx = torch.cat((idx, ids[:, None].to(idx.device)), dim=1)
        if idx.size(1) > block_size:
            idx = idx[:, -max(1, block_size // 2):]
            if cache:
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

@command(Sampling, "sample")
def sample(s):
    """generate text from a trained model"""
    model, tokenizer, device, _ = open_model(s, sampling=True)
    if not s.init:
        notice(f"{model.origin}; --init {s.out}/ckpt.pt is the last step")
    prompt = read_prompt(s.prompt)
    ids = tokenizer.encode(prompt, special=True).tolist()
    if len(ids) > model.config.block_size:
        notice(f"of the prompt's {len(ids)} tokens the model sees {model.config.block_size}")
    idx = torch.tensor([ids or tokenizer.first], device=device)
    generator, texts = torch.Generator().manual_seed(s.seed), []
    begun, pieces = time.monotonic(), 0
    for n in range(s.num):
        say("---\n" * (n > 0) + prompt, end="")
        ids = (int(row) for row in generate(model, idx, s, generator))
        ids = itertools.takewhile(lambda i: i not in tokenizer.ends, ids)
        texts.append(prompt)
        for pieces, piece in enumerate(stream_text(tokenizer, ids, s.stop), pieces):  # each token
            say(piece, end="")
            texts[-1] += piece
        say("")
    notice(f"{pieces / (time.monotonic() - begun):,.0f} tokens/s")
    return texts

def read_prompt(prompt):
    if prompt == "-":
        text = sys.stdin.buffer.read() if sys.stdin else b""
    elif prompt.startswith("@") and not prompt.startswith("@@"):
        text = Path(os.path.expanduser(prompt[1:])).read_bytes()
    else:
        return whole_characters(prompt.removeprefix("@"))
    return text.decode("utf-8-sig", "replace").removesuffix("\n")  # echo's, or an editor's

@dataclass
class Evaluation(Machine, Trained):
    data: list = setting((), "text to evaluate on (default: the run's validation split)")
    stride: int = setting(None, "tokens between windows (default: block_size)", 1)
    batch_size: int = setting(32, "windows per forward pass", 1)
    json: bool = setting(False, "print one JSON object")

@command(Evaluation, "eval")
def evaluate(s):
    """measure a model's loss on a text"""
    model, tokenizer, device, dtype = open_model(s)
    if s.init and not s.data:
        raise Error("eval with init needs data")
    ids = load_tokens(s.data, tokenizer).ids if s.data else split(run_data(model, tokenizer))[1]
    with precision(device, dtype):
        loss, counted = estimate_loss(model, ids, s.stride, s.batch_size)
    lengths = torch.tensor([len(t) * (i != tokenizer.eot) for i, t in enumerate(tokenizer.tokens)])
    text_bytes = sum(int(lengths[part.long()].sum()) for part in ids[1:].split(1 << 20))
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)),
              "bits_per_byte": loss * counted / math.log(2) / max(1, text_bytes), "tokens": counted,
              "stride": min(s.stride or math.inf, model.config.block_size)}
    say(json.dumps(result) if s.json else
        "loss {loss:.4f} nats, perplexity {perplexity:.3f}, {bits_per_byte:.4f} bits per byte "
        "({tokens:,} tokens, stride {stride})".format(**result))
    return result

# --- Checkpoints ---------------------------------------------------------------------------------
# A dict of tensors and plain values: no code runs when it is opened, and it opens on any device.

FORMAT = 2

@contextlib.contextmanager
def atomic(path):
    """A binary file that is there whole or not at all: it gets its name when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # RuntimeError is torch's for a full disk
        why = getattr(e, "strerror", None) or first_line(e)
        raise Failure(f"{path} cannot be written: {why}") from None
    finally:
        temporary.unlink(missing_ok=True)

def write_json(path, value):
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1).encode())

def read_checkpoint(path):
    """A checkpoint as a dict, on the CPU. Its checksums are verified, which torch.load does not."""
    open(path, "rb").close()  # one that is not there, or not ours to read, says so itself
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type for item in archive.infolist()) or archive.testzip():
                raise ValueError("its checksums are wrong")
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        written = checkpoint["format"]
    except Exception as e:  # a damaged file may fail in any way
        raise Error(f"{path}: not a checkpoint of gpt.py, or damaged ({first_line(e)})") from None
    if written != FORMAT:
        raise Error(f"{path}: format {written} of another gpt.py, this one reads {FORMAT}")
    return checkpoint

def find_run(out):
    """A run's best checkpoint, else its last."""
    for path in (Path(out) / "best.pt", Path(out) / "ckpt.pt"):
        if path.exists():
            return path
    raise Error(f"{out}: there is no run in this folder; `train` makes one")

def load_model(source):
    """Open whatever `init` may name -> (model, tokenizer)."""
    path = Path(os.path.expanduser(source))
    if source in GPT2_SIZES and not path.is_dir():  # what is here comes first
        path = cache_folder() / source
        for file in ("config.json", "model.safetensors"):
            download(f"https://huggingface.co/openai-community/{source}/resolve/main/{file}",
                     path / file)
    if (path / "config.json").is_file():
        return load_folder(path)
    path = find_run(path) if path.is_dir() else path
    return model_from(read_checkpoint(path), path)

def model_from(checkpoint, path):
    """What a checkpoint holds -> (model, tokenizer)."""
    try:
        model = GPT(Training(**checkpoint["settings"]))
        model.to(checkpoint["model"]["head.weight"].dtype)  # float64 keeps all its bits
        model.load_state_dict(checkpoint["model"])
        tokenizer = tokenizer_from(checkpoint["tokenizer"])
        model.origin = f"{path}: step {checkpoint['step']}, loss {checkpoint['val_loss']:.4f}"
        model.data_fingerprint = checkpoint.get("data_fingerprint")
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise Error(f"{path}: the parts of it do not fit together ({first_line(e)})") from None
    return model.eval(), tokenizer

def open_model(s, sampling=False):
    """The model that `init` or `out` names -> (model, tokenizer, device, precision to call it in).
    For sampling, whose speed is that of reading the weights, they too are in this precision."""
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    model, tokenizer = load_model(s.init or find_run(s.out))
    if tokenizer is None:
        raise Error(f"{s.init}: there is no tokenizer in it that gpt.py can read")
    model.to(device, dtype if sampling or dtype == torch.float64 else torch.float32)
    one_query = sampling and s.attention == "auto" and device.type != "mps"  # torch's is faster
    choose_attention(model, "sdpa" if one_query else s.attention, dtype)
    return model, tokenizer, device, dtype

def run_data(model, tokenizer):
    """The ids (N,) of the text that a run's model learnt, if it is still the same."""
    data = model.config.data
    tokens = load_tokens(data, tokenizer)
    if tokens.fingerprint != model.data_fingerprint:
        raise Error(f"{', '.join(data):.100} has changed since the training")
    return tokens.ids

def append_line(path, line):
    line = json.loads(json.dumps(line), parse_constant=lambda name: None)  # JSON has no NaN
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

def read_lines(path):
    """The objects in a .jsonl file; a line half written when its process died does not count."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)

# --- Looking inside ------------------------------------------------------------------------------
# What the model would say next, layer by layer; where its heads look, and what each is worth; when
# it begins to recite what it has read.

@torch.no_grad()
def logit_lens(model, idx):
    """Ids (T,) -> the next token's probabilities as each layer has them, (n_layer + 1, T, V), from
    the bare embedding on: the head reads a stream that is not finished."""
    streams = []
    hooks = [part.register_forward_hook(lambda _, inputs, output: streams.append(output))
             for part in (model.dropout, *model.blocks)]
    model(idx[None], last=True)
    for hook in hooks:
        hook.remove()
    return torch.cat([model.head(model.norm(x)) for x in streams]).float().cpu().softmax(dim=-1)

@torch.no_grad()
def attention_maps(model, idx):
    """Ids (T,) -> where each token's attention goes, (H, T, T) for each block: what the model's own
    attention makes of the identity matrix as v, D columns at a time."""
    attends, calls, maps = [block.attn.attend for block in model.blocks], [], []
    for block, attend in zip(model.blocks, attends):
        block.attn.attend = lambda *qkv, attend=attend: calls.append(qkv) or attend(*qkv)
    model(idx[None], last=True)
    for block, attend, (q, k, v) in zip(model.blocks, attends, calls):
        block.attn.attend = attend
        T, D = len(idx), v.size(-1)
        identity = torch.eye(T, T + D).to(v)[None, :, None]
        columns = [attend(q, k, identity[..., j:j + D].expand_as(v)) for j in range(0, T, D)]
        maps.append(torch.cat(columns, dim=-1)[0, ..., :T].transpose(0, 1).float().cpu())
    return maps

def head_role(probs, idx):
    """What a head does, by its map (T, T) of ids (T,): where 0.4 or more of its attention goes."""
    T, same = len(idx), (idx[:, None] == idx).float()
    kinds = {"token before": torch.eye(T).roll(1, 0).tril(-1), "first token": torch.eye(T)[0],
             "same token": same.tril(-1), "after the same": F.pad(same, (1, 0))[:, :T].tril(-1)}
    shares = {kind: (probs * where)[min(8, T // 2):].sum(-1).mean().item()
              for kind, where in kinds.items()}  # without the first rows, which see little
    kind = max(shares, key=shares.get)  # "after the same" is an induction head
    return f"{kind} {shares[kind]:.2f}" if shares[kind] >= 0.4 else ""

def look_at(model, tokenizer, idx):
    """What the model makes of ids (T,), as plain values for the page."""
    probs, maps, idx = logit_lens(model, idx), attention_maps(model, idx), idx.cpu()
    losses = -probs[-1, :-1].gather(-1, idx[1:, None]).log()[:, 0]
    visible = str.maketrans("\n \t\r\u200b\u00a0", "⏎·⇥␍∅⍽")

    def word(i):
        text = tokenizer.tokens[i].decode("utf-8", "backslashreplace")
        return text.translate(visible) or "∅"

    def likeliest(layer, n):
        top = layer.topk(min(n, layer.size(-1)))  # (T, n)
        rows = zip(top.indices.tolist(), top.values.tolist())
        return [[[word(i), p] for i, p in zip(*row)] for row in rows]

    def head(name, probs):  # a character from 0 to o for each 64th, row by row to the diagonal
        codes = (probs[torch.ones_like(probs).tril() > 0] * 63 + 48).round().byte()
        return {"name": name, "worth": "", "role": head_role(probs, idx),
                "map": bytes(codes.tolist()).decode()}

    return {"text": [word(i) for i in idx.tolist()], "loss": [0.0, *losses.tolist()],
            "lens": [*(likeliest(layer, 1) for layer in probs[:-1]), likeliest(probs[-1], 5)],
            "heads": [[head(f"{l}.{h}", probs) for h, probs in enumerate(layer, 1)]
                      for l, layer in enumerate(maps, 1)]}

def copied(text, source):
    """For each character of a text, how many from there on stand in `source` in this order.
    `copied("abcx", "xbc") == [0, 2, 1, 1]`"""
    lengths, end = [], 0
    for i in range(len(text)):
        end = max(i, end)
        while end < len(text) and text[i:end + 1] in source:
            end += 1
        lengths.append(end - i)
    return lengths

def probe_line(probe, tokenizer, unseen, block_size):
    """The ids of what a model is watched reading: `probe`, or a whole line of the unseen text."""
    room = min(40, block_size)
    lines = map(tokenizer.encode, tokenizer.decode(unseen[:4000]).splitlines()[1:-1])
    whole = [ids for ids in lines if 0 < len(ids) <= room]
    line = tokenizer.encode(read_prompt(probe)) if probe else max(whole, key=len, default=unseen)
    if not len(line):
        raise Error("there is no text to look at: name one with probe")
    return line[:room].long()

def record_probe(run):
    """Add to probe.jsonl what the model makes of its line at this step, and what it writes."""
    model, tokenizer, idx = run.eval_model, run.text.tokenizer, run.line.to(run.device)
    model.eval()
    record = {"step": run.step, "samples": []}
    with contextlib.suppress(Error), precision(run.device, run.dtype):  # logits not finite: no text
        record |= look_at(model, tokenizer, idx)
        first = torch.tensor([tokenizer.first] * 3, device=run.device)
        for start, n, temperature in ((idx[None, :8], 12, 0.0), (first, 40, 0.8)):
            s = Sampling(tokens=n, temperature=temperature, seed=run.s.seed)
            rows = torch.stack(list(generate(model, start, s)), dim=1)
            record["samples"] += [tokenizer.decode(row) for row in rows]
    model.train()
    append_line(run.out / "probe.jsonl", record)

@torch.no_grad()
def head_importance(model, ids):
    """How much the loss on a text (N,) rises without each head, block by block: without a head its
    columns of the output projection are zero."""
    limit, rises = min(1 << 15, (1 << 34) // count_parameters(model)), []
    base, _ = estimate_loss(model, ids, limit=limit)
    for block in model.blocks:
        for columns in block.attn.out.weight.split(model.config.head_dim, dim=1):
            kept = columns.clone()
            columns.zero_()
            rises.append(estimate_loss(model, ids, limit=limit)[0] - base)
            columns.copy_(kept)
    return rises

def bigram_loss(train, val, V):
    """The loss on `val` of counting what follows what in `train`, a tenth added to each count."""
    train, val = train[:1 << 24].long(), val[:1 << 24].long()
    counts = torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V) + 0.1
    return -(counts / counts.sum(1, keepdim=True)).log()[val[:-1], val[1:]].mean().item()

@dataclass
class Inspection(Machine, Trained):
    probe: str = setting("", "look at this text, in the best model alone: probe.html")

@command(Inspection, "inspect")
def inspect(s):
    """write a page that shows what a model has learnt, and how"""
    model, tokenizer, device, dtype = open_model(s)
    c, V, out = model.config, len(tokenizer.tokens), Path(s.out)
    about = (f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide; {count_parameters(model):,} "
             f"parameters, {V:,} tokens in the vocabulary")
    records, log, rises, levels = [], {}, [], {"blind guess": math.log(V)}
    train = val = torch.zeros(0)
    if not s.init:
        about += f"; learnt {', '.join(c.data)}"
        log = {line["step"]: line for line in read_lines(out / "log.jsonl")}
        records = [r for r in read_lines(out / "probe.jsonl") if "heads" in r]  # as they are now
        try:
            train, val = split(run_data(model, tokenizer))
        except Error as e:
            notice(f"{e}; the page goes without what needs the text")
    with precision(device, dtype):
        if s.probe or not records:
            ids = probe_line(s.probe, tokenizer, val, c.block_size).to(device)
            records = [{"step": None, "samples": [], **look_at(model, tokenizer, ids)}]
        if len(val):
            notice(f"measuring what {c.n_layer * c.n_head} heads are worth")
            rises = head_importance(model, val)
            levels |= {"bigram": bigram_loss(train, val, V)} if V <= 4096 else {}
    sources = [tokenizer.decode(ids[:1 << 22]) for ids in (train, val)]
    for record in records:
        for head, rise in zip(itertools.chain(*record["heads"]), rises):
            head["worth"] = f"worth {rise:.3f}"
        line, samples = log.get(record["step"], {}), record["samples"]
        learnt, unseen = ([copied(text, source) for text in samples] for source in sources)
        record |= levels | {
            "training": line.get("train_loss"), "validation": line.get("val_loss"),
            "from training text": max(itertools.chain(*learnt), default=0),
            "from validation text": max(itertools.chain(*unseen), default=0),
            "samples": list(zip(samples, learnt))}
    records[0] |= {"title": f"Inside {model.origin}", "about": about}
    # three digits of a number are enough, and no text may end the script
    records = json.loads(json.dumps(records), parse_float=lambda number: round(float(number), 3))
    data = json.dumps(records, separators=(",", ":")).replace("<", "\\u003c")
    page = PAGE.replace("DATA", data)
    path = out / ("probe.html" if s.probe else "inspect.html")
    with atomic(path) as file:
        file.write(page.encode())
    say(path)
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import HTML, display
        display(HTML(f'<iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe>'))
    return path

@dataclass
class Ablation(Training):
    out: str = setting("out-ablate", "folder of the runs and of their table")
    vary: list = setting((), "n_head=1,2,4; 'n_head=1,2 n_layer=2,4' makes all four pairs")
    seeds: int = setting(1, "runs of each setting, with the seeds that follow seed", 1)

@command(Ablation, "ablate")
def ablate(s):
    """train a model in several settings, and compare"""
    base = {name: value for name, value in s.given.items() if name not in ("vary", "seeds", "out")}
    folder, plans = Path(s.out), {}
    for sweep in s.vary or [""]:  # nothing varied: the seeds alone
        axes = [word.partition("=") for word in sweep.split()]
        for values in itertools.product(*(values.split(",") for _, _, values in axes)):
            plan = {name.replace("-", "_"): value for (name, _, _), value in zip(axes, values)}
            Training.make(base | plan)  # what cannot work is found before an hour has passed
            for seed in range(s.seed, s.seed + s.seeds):
                named = plan | {"seed": plan.get("seed", seed)}
                plans[" ".join(f"{name}={value}" for name, value in named.items())] = base | named
    path, about = folder / "ablate.json", {"format": FORMAT, "base": base}
    done = json.loads(path.read_text("utf-8")) if path.exists() else {"base": "unknown"}
    if not (done.get("runs") or any(folder.glob("**/ckpt.pt"))):  # nothing there goes on
        done = about | {"runs": {}}
    if done | about != done:
        raise Error(f"{path} is of other settings, {done['base']!r:.100}; name another out")
    write_json(path, done)  # at once: a run that was stopped goes on in its own settings
    say("| setting | parameters | loss | bits per byte | seconds |\n" + "| --- " * 5 + "|")
    for name, plan in plans.items():
        if name not in done["runs"]:
            notice(f"training {name}")
            out = str(folder / name)
            how = {"resume": True} if (folder / name / "ckpt.pt").exists() else plan
            with contextlib.redirect_stdout(io.StringIO()):
                last = train(**how | {"out": out})
                if last["signal"]:
                    notice("the same command again goes on with the table")
                    return last
                result = evaluate(out=out, device=s.device)
            parameters, bits = count_parameters(load_model(out)[0]), result["bits_per_byte"]
            done["runs"][name] = [parameters, result["loss"], bits, last["seconds"]]
            write_json(path, done)
        parameters, loss, bits, seconds = done["runs"][name]
        say(f"| {name} | {parameters:,} | {loss:.4f} | {bits:.4f} | {seconds:.0f} |")
    return done

PAGE = r"""<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark } svg { width: 100%; height: 9rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: 1rem }
header { position: sticky; top: 0; background: canvas; z-index: 1 } input { width: 60% }
.row, #heads div { display: flex; align-items: start; gap: .6rem } .row { flex-wrap: wrap }
figure, pre { flex: 1 1 18rem; margin: 0 } #heads button { flex: 0 0 8rem }
path { fill: none; vector-effect: non-scaling-stroke } pre { white-space: pre-wrap }
button { font: inherit; color: inherit; background: rgb(224 112 32 / var(--cost, 0)); border: 0;
  padding: .1rem; border-bottom: 4px solid rgb(74 144 226 / var(--look, 0)) }
[aria-pressed=true] { outline: 2px solid; outline-offset: -2px }
#line, td, th { font: 1rem/1.9 ui-monospace, monospace; padding-right: 1rem; text-align: left }
#heads, #next { display: block; overflow-x: auto; white-space: nowrap }
canvas { width: 6rem; image-rendering: pixelated; background: #8882 }
</style>
<h1 id="title"></h1><p id="about"></p>
<header><button id="play">▶</button> <input id="at" type="range"> <b id="now"></b></header>
<div class="row" id="curves"></div>
<h2>The line that the model reads</h2>
<p>The probe, or a line of the validation text, which it never trains on. A token's colour is its
loss, minus the log of the probability it was given, in nats. Choose one, by pointer or arrow keys:
the table has what comes next in its view, after so many blocks (logit lens). ✓ is what came.</p>
<div id="line" dir="auto"></div><p id="chosen" aria-live="polite"></p><table id="next"></table>
<h2>Where its heads look</h2>
<p>2.1 is the first head of block 2. A row is a token that looks, a column one that is looked at.
Choose one: the line above is underlined where the chosen token looks. It has a name when 0.4 of its
attention, from the ninth token on, goes to the token before, the first token, earlier equal ones,
or what came after those (induction). Worth: the rise of the best model's loss without it.</p>
<div id="heads"></div><h2>What it writes</h2>
<p>The likeliest end of the line after its eighth token, then samples at temperature 0.8. <mark>
Marked</mark>: 20 characters or more of the training text. Pieces about as long as those of the
validation text are chance; much longer ones it has learnt by heart.</p>
<div class="row" id="texts"></div>
<script>
const R = DATA, COLORS = ['#4a90e2', '#e07020', '#888', '#2a9d5c']
const $ = id => document.getElementById(id), each = (list, f) => list.map(f).join('')
const state = {step: R.at(-1).step, token: 0, head: '1.1',
  ...Object.fromEntries(new URLSearchParams(location.hash.slice(1)))}
const escaped = t => t.replace(/[&<]/g, c => `&#${c.charCodeAt()};`)
const word = t => `<bdi>${escaped(t)}</bdi>`
const weight = (head, i, j) => (head.map.charCodeAt(i * (i + 1) / 2 + j) - 48) / 63
function chart(at, title, names) { // a line for each name, over the positions of the slider
  names = names.filter(name => R.some(r => r[name] > 0))
  if (!names.length || R.length < 2) return ''
  const end = R.length - 1, high = Math.max(...names.flatMap(name => R.map(r => r[name])))
  const points = name => R.flatMap((r, i) => r[name] == null ? [] : `${i} ${-r[name] / high}`)
  return `<figure><svg viewBox="0 -1.02 ${end} 1.02" preserveAspectRatio="none" role="img">
    <path stroke="gray" d="M${at} 0V-1.02M0 0H${end}" />` + each(names, (name, n) =>
    `<path stroke-width="2" stroke="${COLORS[n]}" d="M${points(name)}" />`) +
    `</svg><figcaption>${title} at each stop, 0 to ${+high.toFixed(1)}: ` + each(names, (name, n) =>
    `<b style="color: ${COLORS[n]}">${name} ${R[at][name] ?? ''}</b> `) + `</figcaption></figure>`
}
function marked([text, copied]) { // what belongs to a copied piece
  let end = 0
  return `<pre dir="auto">` + each([...text], (c, i) => {
    if (copied[i] >= 20) end = i + copied[i]
    c = c === '\n' ? '⏎\n' : escaped(c)
    return i < end ? `<mark>${c}</mark>` : c
  }) + `</pre>`
}
function draw() {
  const at = Math.max(0, R.findLastIndex(r => r.step <= state.step)), r = R[at], T = r.text.length
  const i = state.token = Math.max(0, Math.min(T - 1, state.token | 0)), heads = r.heads.flat()
  const head = heads.find(head => head.name === state.head)
  $('at').value = at
  $('now').innerText = R.length > 1 ? `step ${r.step}, validation loss ${r.validation}` : ''
  $('curves').innerHTML = chart(at, 'Loss', ['training', 'validation', 'blind guess', 'bigram'])
    + chart(at, 'Longest copied piece', ['from training text', 'from validation text'])
  $('line').innerHTML = each(r.text, (t, j) => `<button data-token=${j} aria-pressed=${j === i}
    style="--cost: ${Math.min(0.9, 0.15 * r.loss[j])};
    --look: ${head && j <= i ? Math.sqrt(weight(head, i, j)) : 0}">${word(t)}</button>`)
  $('chosen').innerHTML = `“${word(r.text[i])}” ${i ? 'cost ' + r.loss[i] : 'was given'}` +
    (i < T - 1 ? `. Then came “${word(r.text[i + 1])}”, for ${r.loss[i + 1]}.` : ', the last.')
  $('next').innerHTML = each(r.lens, (layer, l) => `<tr><th>${l ? 'block ' + l : 'no block'}` +
    each(layer[i], ([t, p]) =>
      `<td>${word(t)} ${(100 * p).toFixed(1)} %${t === r.text[i + 1] ? ' ✓' : ''}`))
  $('heads').innerHTML = each(r.heads, layer => '<div>' + each(layer, h => `<button
    data-head=${h.name} aria-pressed=${h === head}><canvas width=${T} height=${T}></canvas><br>
    ${h.name} <small>${h.worth}<br>${h.role || '–'}</small></button>`) + '</div>')
  document.querySelectorAll('canvas').forEach((canvas, n) => {
    const ink = canvas.getContext('2d')
    for (let a = 0; a < T; a++) for (let b = 0; b <= a; b++) {
      ink.fillStyle = `rgb(74 144 226 / ${weight(heads[n], a, b)})`
      ink.fillRect(b, a, 1, 1)
    }
  })
  $('texts').innerHTML = each(r.samples, marked)
}
function set(change) {
  Object.assign(state, change)
  draw()
  history.replaceState(null, '', '#' + new URLSearchParams(state))
}
function play(n) {
  set({step: R[n].step})
  if (n + 1 < R.length) setTimeout(() => $('at').value == n && play(n + 1), 300)
}
document.title = $('title').innerText = R[0].title
$('about').innerText = R[0].about
$('at').max = R.length - 1
$('play').onclick = () => play(0)
$('at').oninput = () => set({step: R[$('at').value].step})
document.onclick = e => set({...e.target.closest('button')?.dataset})
document.onkeydown = e => {
  const by = {ArrowRight: 1, ArrowLeft: -1}[e.key]
  if (by && e.target !== $('at')) set({token: state.token + by})
}
draw()
</script>
"""

# --- Weights in and out --------------------------------------------------------------------------
# Hugging Face's transformers knows three of the architectures that these settings can make. One
# table says what the settings and weights of each are called there, and serves both directions.

def pairs(text):
    return dict(pair.split("=") for pair in text.split())

LLAMA = {  # `ours` makes it here; `must` is what else a config.json has to say, or to leave out
    "class": "LlamaForCausalLM", "block": "model.layers.",
    "ours": dict(pos="rope", norm="rms", mlp="swiglu", qk_norm=False),
    "must": dict(hidden_act="silu", rope_type="default", partial_rotary_factor=1.0),
    "settings": pairs("""vocab_size=vocab_size max_position_embeddings=block_size
        num_hidden_layers=n_layer hidden_size=n_embd num_attention_heads=n_head head_dim=head_dim
        num_key_value_heads=n_kv_head intermediate_size=mlp_hidden rope_theta=rope_theta
        rms_norm_eps=norm_eps tie_word_embeddings=tie attention_bias=bias mlp_bias=bias"""),
    "parts": pairs("""embed=model.embed_tokens norm=model.norm head=lm_head
        attn_norm=input_layernorm mlp_norm=post_attention_layernorm attn.q=self_attn.q_proj
        attn.k=self_attn.k_proj attn.v=self_attn.v_proj attn.out=self_attn.o_proj
        attn.q_norm=self_attn.q_norm attn.k_norm=self_attn.k_norm mlp.gate=mlp.gate_proj
        mlp.up=mlp.up_proj mlp.down=mlp.down_proj""")}
QWEN3 = LLAMA | {
    "class": "Qwen3ForCausalLM", "ours": LLAMA["ours"] | dict(qk_norm=True, head_dim=128),
    "must": LLAMA["must"] | dict(attention_bias=False, mlp_bias=False, use_sliding_window=False)}
GPT2 = {
    "class": "GPT2LMHeadModel", "block": "h.", "ours": ARCHS["gpt2"],
    "must": dict(activation_function="gelu_new", scale_attn_weights=True,
                 scale_attn_by_inverse_layer_idx=False),
    "settings": pairs("""vocab_size=vocab_size n_ctx=block_size n_positions=block_size
        n_layer=n_layer n_head=n_head n_embd=n_embd n_inner=mlp_hidden
        layer_norm_epsilon=norm_eps tie_word_embeddings=tie"""),
    "parts": pairs("""embed=wte positions=wpe norm=ln_f head=lm_head attn_norm=ln_1 mlp_norm=ln_2
        attn.q=attn.c_attn attn.k=attn.c_attn attn.v=attn.c_attn attn.out=attn.c_proj
        mlp.up=mlp.c_fc mlp.down=mlp.c_proj""")}
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}

def config_in(about):
    """A config.json's dict -> (model_type, Config); what would be computed otherwise is refused."""
    kind = str(about.get("model_type"))
    if kind not in FAMILIES:
        raise Error(f"model_type {kind} is not one of {', '.join(FAMILIES)}")
    rope = about.get("rope_scaling") or about.get("rope_parameters") or {}  # as they choose
    about = {"rope_type": rope.get("type")} | about | rope
    for name, value in (FAMILIES[kind]["must"] | {"quantization_config": None}).items():
        if about.get(name) not in (None, value):
            raise Error(f"{name} {about[name]} is not supported, only {value}")
    names = FAMILIES[kind]["settings"].items()
    said = {ours: about[name] for name, ours in names if about.get(name) is not None}
    return kind, Config(**FAMILIES[kind]["ours"] | said)

def config_out(config):
    """A Config -> (model_type, config.json's dict), which read again gives the same Config: so a
    setting that transformers cannot express, or that the table does not know, is refused."""
    kind = "gpt2" if config.pos == "learned" else "qwen3" if config.qk_norm else "llama"
    family = FAMILIES[kind]
    about = {name: getattr(config, ours) for name, ours in family["settings"].items()}
    about |= {"model_type": kind, "architectures": [family["class"]], **family["must"]}
    for name, again in asdict(config_in(about)[1]).items():
        if name != "dropout" and getattr(config, name) != again:
            raise Error(f"export: {name} {getattr(config, name)} has no equal in {kind}")
    return kind, about

def their_weights(model, kind):
    """Their names -> [views of ours]: theirs is those joined along the last dim."""
    weights = defaultdict(list)
    for name, p in model.named_parameters():  # a tied head is the embedding, not listed again
        block, part, end = re.fullmatch(r"(?:blocks\.(\d+\.))?(.+)\.(\w+)", name).groups("")
        theirs = FAMILIES[kind]["block"] * bool(block) + block + FAMILIES[kind]["parts"][part]
        turned = kind == "gpt2" and block and p.dim() == 2  # its Conv1D is x @ W
        weights[f"{theirs}.{end}"].append(p.detach().mT if turned else p.detach())
    return weights

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(path):
    """Yields (name, tensor). Eight bytes say how long the header is; it is JSON; the tensors
    follow, no gaps. The file is mapped: a tensor is read from the disk when it is used."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 1 << 24)))  # real ones are below a megabyte
    header.pop("__metadata__", None)
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    sizes = [stop - start for start, stop in (header[name]["data_offsets"] for name in order)]
    data = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)[8 + length:]
    for name, raw in zip(order, data.split(sizes)):  # which must be all of it
        dtype = SAFETENSORS[header[name]["dtype"]]
        if raw.storage_offset() % dtype.itemsize:  # in old files: no view of numbers begins there
            raw = raw.clone()
        yield name, raw.view(dtype).view(header[name]["shape"])

def write_safetensors(path, weights):
    """{name: [tensors to join along the last dim]}: no second copy of the model is held."""
    header, stop = {"__metadata__": {"format": "pt"}}, 0
    for name, parts in weights.items():
        shape, start = [*parts[0].shape[:-1], sum(p.size(-1) for p in parts)], stop
        stop += 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parts in weights.values():
            tensor = torch.cat(parts, dim=-1).float().contiguous()
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))

def load_folder(folder):
    """A Hugging Face folder -> (model, tokenizer; None if it has none)."""
    try:
        names = "config.json", "generation_config.json", "tokenizer.json"
        texts = {name: (folder / name).read_text("utf-8")
                 for name in names if (folder / name).exists()}
        kind, config = config_in(json.loads(texts["config.json"]))
        files = [*folder.glob("model.safetensors")] or [*folder.glob("model-*.safetensors")]
        if not files:
            raise Error("there is no model.safetensors")
        bare = functools.partial(re.sub, r"^(transformer|model)\.", "")  # a GPT2Model's has none
        found = {bare(name): tensor for path in files for name, tensor in read_safetensors(path)}
        with torch.device("meta"):  # shapes without memory: a wrong config.json costs none
            wanted = {bare(name): torch.cat(views, dim=-1).shape
                      for name, views in their_weights(GPT(config), kind).items()}
        ignored = re.compile(r"\.attn\.(masked_)?bias$|\.inv_freq$|^lm_head\.weight$")
        shapes = {name: tensor.shape for name, tensor in found.items()}
        for name, _ in wanted.items() ^ shapes.items():  # missing, or not of this shape
            if name in wanted or not ignored.search(name):
                raise Error(f"{name} is {shapes.get(name)}, in this {kind} {wanted.get(name)}")
        model = GPT(config).eval()
        model.origin = str(folder)
        for name, views in their_weights(model, kind).items():
            for view, part in zip(views, found[bare(name)].chunk(len(views), dim=-1)):
                view.copy_(part)
        head = model.head.weight.detach()
        if config.tie and not torch.equal(found.get("lm_head.weight", head).float(), head):
            raise Error("tie_word_embeddings is true, but lm_head.weight is not the embedding")
        return model, folder_tokenizer(texts, kind, config.vocab_size)
    except ImportError:
        raise
    except Exception as e:  # a damaged file may fail in any way
        raise Error(f"{folder} cannot be read: {first_line(e)}") from None

# In a tokenizer.json a letter stands for each byte: itself where Latin-1 shows something.
HIDDEN = [b for b in range(256) if not chr(b).isprintable() or b == ord(" ")]
BYTE_LETTERS = [chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b) for b in range(256)]

class HuggingFaceTokenizer(Tokenizer):
    """Somebody's tokenizer.json, run by the package `tokenizers`: the ids are theirs."""
    def __init__(self, text, ends, size):
        import tokenizers
        self.arguments = {"text": text, "ends": ends, "size": size}
        self.encoding = tokenizers.Tokenizer.from_str(text)
        self.encoding.no_truncation()  # a file may ask for both
        self.encoding.no_padding()
        self.eot, self.ends = (ends or [None])[0], set(ends)
        self.first = ends[:1] or self.encode("\n").tolist()[:1] or [0]
        self.tokens = [b""] * size  # a model may have more ids than its tokenizer, not fewer
        spelt, added = {"▁": b" "}, []
        if '"ByteLevel"' in text:
            spelt = {letter: bytes([b]) for b, letter in enumerate(BYTE_LETTERS)}
            added = self.encoding.get_added_tokens_decoder()  # these are plain text
        for name, i in self.encoding.get_vocab().items():
            if i >= size:
                raise Error(f"its tokenizer has a token {i}, {name!r:.30}, the model only {size}")
            parts = [name] if i in added else name
            self.tokens[i] = b"".join(spelt.get(part) or part.encode() for part in parts)
            if "▁" in spelt and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
                self.tokens[i] = bytes.fromhex(name[3:5])

    def encode(self, text, special=False):
        self.encoding.encode_special_tokens = not special
        ids = self.encoding.encode(text, add_special_tokens=special).ids  # Llama's <s>
        return torch.tensor(ids, dtype=torch.int32)

    def state(self):
        return {"kind": "huggingface", **self.arguments}

TOKENIZERS["huggingface"] = HuggingFaceTokenizer

def folder_tokenizer(texts, kind, size):
    """What a folder's .json files make, or None. Two of them may say which ids end a sample."""
    if "tokenizer.json" not in texts:
        return GPT2Tokenizer.train((), 0) if kind == "gpt2" and size == 50257 else None
    ends = []
    for name in ("config.json", "generation_config.json"):
        ids = json.loads(texts.get(name, "{}")).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    ends = [i for i in dict.fromkeys(ends) if i in range(size)]
    model = json.loads(texts["tokenizer.json"])["model"]
    if model.get("merges") == [] and [*model["vocab"]] == sorted("".join(model["vocab"])):
        return CharTokenizer(model["vocab"])  # theirs has no words for what it does not know
    return HuggingFaceTokenizer(texts["tokenizer.json"], ends, size)

def tokenizer_out(tokenizer):
    """tokenizer.json's dict. Characters are byte-pair encoding without bytes and without pairs."""
    state, eot = tokenizer.state(), tokenizer.eot
    if state["kind"] == "huggingface":
        return json.loads(state["text"])
    if state["kind"] not in ("char", "bpe"):
        raise Error(f"export: a tokenizer of kind {state['kind']} has no equal")
    names = state.get("chars") or [token.translate(BYTE_LETTERS) for token in state["tokens"]]
    file = {"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}}
    if state["kind"] == "bpe":
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        special = {"id": eot, "content": names[eot], "special": True, "normalized": False,
                   "single_word": False, "lstrip": False, "rstrip": False}
        file |= {"added_tokens": [special], "pre_tokenizer": level, "decoder": level}
    vocab = {name: i for i, name in enumerate(names)}
    merges = [f"{name[:i]} {name[i:]}" for name in names[:eot] for i in range(1, len(name))
              if name[:i] in vocab and name[i:] in vocab]
    return file | {"model": {"type": "BPE", "vocab": vocab, "merges": merges,
                             "unk_token": "<unknown>"}}  # not in vocab: what is unknown is an error

@dataclass
class Export(Trained):
    folder: str = setting("", "folder to write, new or empty")

@command(Export, "export")
def export(s):
    """write a Hugging Face folder"""
    folder = Path(os.path.expanduser(s.folder))
    if not s.folder or folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise Error(f"export: {s.folder!r:.100} is there already; name a new or an empty folder")
    model, tokenizer = load_model(s.init or find_run(s.out))
    kind, about = config_out(model.config)
    files, eot = {}, getattr(tokenizer, "eot", None)
    ends = None if eot is None else [eot, *tokenizer.ends - {eot}]
    about |= {"bos_token_id": eot, "eos_token_id": ends}  # left out, they would be a Llama's
    if tokenizer:
        files = {"tokenizer.json": tokenizer_out(tokenizer), "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.block_size,
            "eos_token": None if eot is None else tokenizer.tokens[eot].decode()}}
    write_safetensors(folder / "model.safetensors", their_weights(model, kind))
    for name, file in (files | {"config.json": about}).items():  # the last: without it, no model
        write_json(folder / name, file)
    say(f"{folder} is written; in Python: AutoModelForCausalLM.from_pretrained({str(folder)!r})")

# --- Command line --------------------------------------------------------------------------------
# Reports go to stdout, notices to stderr; a run goes on when these are closed.

def say(text, end="\n", stream="stdout"):
    """Print at once. If nobody reads it any more, go on in silence."""
    file = getattr(sys, stream) or io.StringIO()
    known = getattr(file, "encoding", None) or "utf-8"  # a terminal may not know every letter
    try:
        print(str(text).encode(known, "replace").decode(known), end=end, file=file, flush=True)
    except (OSError, ValueError, LookupError, TypeError):  # closed, full, of no known encoding
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))

def notice(text):
    say(f"gpt.py: {text}", stream="stderr")

def first_line(e):
    """What an exception says, in one short line."""
    return (str(e).strip() or repr(e)).splitlines()[0][:99]

class Once(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{option} is given twice")
        setattr(namespace, self.dest, value)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Error(f"{message} (--help lists what there is; a text may follow =, as --stop=---)")

def make_parser():
    parser = Parser(prog="gpt.py", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, function in COMMANDS.items():
        about = dict(help=function.__doc__, description=function.__doc__)
        sub = commands.add_parser(command, usage=f"gpt.py {command} [options]", allow_abbrev=False,
                                  argument_default=argparse.SUPPRESS, **about)
        for name in function.__signature__.parameters:
            f = function.settings.__dataclass_fields__[name]
            flags = sorted({"--" + name.replace("_", "-"), "--" + name})
            flags = [name] if name == "folder" else flags  # export's
            how = dict(action=Once, metavar=f.metadata["choices"] or f.type.__name__.upper())
            if f.type is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            if f.type is list:
                how = dict(action="extend", nargs="+", metavar="TEXT")
            shown = "" if f.default in (None, "", ()) else f" [{f.default}]"
            sub.add_argument(*flags, help=f.metadata["help"] + shown, **how)
    return parser

def main(argv=None):
    """Run a command -> exit code: 0 done, 2 the request was wrong, 1 it failed, 128 + signal."""
    try:
        words, unknown = make_parser().parse_known_args(argv)
        if unknown and not unknown[0].startswith("--"):
            raise Error(f"{unknown[0]!r:.100} was not expected; a text to learn is --data's")
        given = vars(words)
        if unknown:  # the settings know what is close to it
            given[unknown[0].split("=")[0]] = None
        function = COMMANDS[given.pop("command")]
        function.started = STARTED if argv is None else None
        result = function(**given)
        stop = result.get("signal") if isinstance(result, dict) else 0
        return 128 + stop if stop else 0
    except Error as e:
        notice(f"error: {e}")
        return e.code
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    if "__file__" in globals() or not {"IPython", "ipykernel"} & sys.modules.keys():
        sys.exit(main())
    print("gpt.py is ready. To learn a text: train(minutes=3), or train(data='my.txt')\n"
          "Then to write more of it: sample(), or sample(prompt='To be', temperature=0.7)")
