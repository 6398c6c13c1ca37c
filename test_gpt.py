"""Tests of gpt.py and kernels.py: `python -m pytest -q`. Quick, offline, in temporary folders."""
import contextlib, ctypes, functools, importlib.util, io, itertools, json, math, os, pickle, random
import re, shlex, shutil, signal, socket, subprocess, sys, tempfile, threading, time, types
from dataclasses import fields, make_dataclass
from pathlib import Path
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small: threads only wait
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup both are ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
import pytest
import torch
import torch.nn.functional as F

import gpt

HERE = Path(__file__).parent
TEXT = """To be, or not to be: that is the question.
Whether 'tis nobler in the mind to suffer
""" * 40
SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, batch_size=4, device="cpu", probe="",
             data="text.txt", steps=6)

offline = Mock(side_effect=OSError("no network"))

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    Path("text.txt").write_text(TEXT, "utf-8")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)

def train(**given):
    return gpt.train(**SMALL | given)

def run_main(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = gpt.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()

def files():
    return {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and "cache" not in p.parts}

def refused(*words):
    """The one line that a command ends with, and exit code 2; it has changed no file."""
    before = files()
    code, _, err = run_main(*words)
    assert code == 2 and err.count("error: ") == 1 and err.endswith("\n"), err
    line = err.split("error: ")[1]
    assert line.count("\n") == 1 and len(line) < 400 and files() == before
    return line

def process(*words, python=(HERE / "gpt.py",), **options):
    done = subprocess.run([sys.executable, *python, *words], capture_output=True, text=True,
                          encoding="utf-8", timeout=900, **options)
    return done.returncode, done.stdout, done.stderr

def flags(**given):
    given = SMALL | given
    return ["train", *(f"--{name}={given[name]}" for name in given if given[name] is not None)]

def weights(folder, name="ckpt.pt"):
    return gpt.read_checkpoint(Path(folder) / name)["model"]

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def log(folder="out", name="log.jsonl"):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]

def same(a, b):
    """Two runs ended with the same weights, by the same way."""
    ways = [[(r["step"], r["train_loss"], r["val_loss"]) for r in log(folder)] for folder in (a, b)]
    return equal(weights(a), weights(b)) and ways[0] == ways[1]

def before_step(monkeypatch, step, act):
    real = gpt.Run.train_step
    monkeypatch.setattr(gpt.Run, "train_step", lambda run: run.step == step and act() or real(run))

@functools.cache
def trained():
    train(data=os.path.abspath("text.txt"), out=os.path.abspath("trained"), steps=30)
    return os.path.abspath("trained")

# --- Settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, settled", [
    (dict(size="gpt2", n_layer=3), dict(n_layer=3, n_embd=768, pos="rope", n_kv_head=6)),
    (dict(arch="gpt2", size="gpt2", bias=False), dict(pos="learned", bias=False, n_layer=12)),
    (dict(device="meta"), dict(size="baby", n_layer=6)), ({}, dict(size="tiny", n_layer=4))])
def test_a_flag_beats_size_which_beats_arch_which_beats_the_default(given, settled):
    s = gpt.Training.make({"device": "cpu", **given})
    assert settled == {name: getattr(s, name) for name in settled}

FILES = {"bad.txt": b"fine \xff", "d/.hidden.txt": b"hidden",
         "bad.jsonl": b'{"text": "fine"}\n["text"]\n', "key.jsonl": b'{"content": "no text"}\n'}
BAD = {"train": [("--n-layr 3", "did you mean n_layer"), ("--epochs 3", "did you mean steps"),
    ("--max-iters 3", "mean steps"), ("--n-layer 2.5", "type int from 0"), ("--lr nan", "lr must"),
    ("--mlp reglu", "relu2"), ("--n-embd 30", "not divisible"), ("--n-kv-head 3", "multiple"),
    ("--steps 5 --minutes 1", "one of them"), ("--steps 5 --steps 6", "twice"),
    ("--data d", "'d': no file"), ("--data bad.txt", "not UTF-8"), ("--vocab-size 5", "size 5"),
    ("--data bad.jsonl", "line 2"), ("--data key.jsonl", "line 1"),
    ("--block-size 5000", "too little text"), ("--tokenizer bpe --vocab-size 100", "256"),
    ("--device quantum", "quantum"), ("--device cpu --attention triton", "triton: "),
    ("--resume", "ckpt.pt"), ("--init none.pt", "No such file"), ("--out text.txt", "text.txt")],
    "sample": [("--temperature=-1", "temperature"), ("--prompt @no", "No such"),
    ("--stop ---", "--stop=---"), ("--prompt @@zß\ud800", "'@' 'z' 'ß'")],
    "ablate": [("--vary n_head=1,3", "not divisible"), ("--vary n_head", "n_head must")]}

@pytest.mark.parametrize("command, words, says", [(c, *row) for c in BAD for row in BAD[c]])
def test_a_bad_request_is_one_line_and_writes_nothing(command, words, says):
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    usual = ["--out", trained()] if command == "sample" else ["--data", "text.txt"]
    line = refused(command, *words.split(), *usual * ("--data" not in words))
    assert says in line and not Path("out").exists()

# --- Tokenizers ----------------------------------------------------------------------------------

AWKWARD = ["", "\n", "\x00", "a  b\r\n\r\n\tc ", "naïve café", "汉字かな交じり文", "🙂👩‍👩‍👧‍👦",
           "<|endoftext|>", "\ufeffx", " " * 70]
needs_gpt2 = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="would download")

def test_the_examples_in_docstrings_are_true():
    examples = re.findall(r"`([^`\n]+ == [^`\n]+)`", Path(gpt.__file__).read_text("utf-8"))
    assert examples and all(eval(example, vars(gpt)) for example in examples)

@pytest.fixture(scope="module")
def bpe():
    return gpt.BPETokenizer.train([TEXT, "汉字 " * 50], 300)

@pytest.mark.parametrize("kind", ["char", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_a_tokenizer_loses_nothing_even_saved_and_gpt2s_is_tiktokens(kind):
    tokenizer = gpt.TOKENIZERS[kind].train(AWKWARD, 0)
    again = gpt.tokenizer_from(json.loads(json.dumps(tokenizer.state())))
    assert again.tokens == tokenizer.tokens and len(set(again.tokens)) == len(again.tokens)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert torch.equal(ids, again.encode(text)) and tokenizer.decode(ids) == text
        if kind == "gpt2":
            theirs = pytest.importorskip("tiktoken").get_encoding("gpt2")
            assert ids.tolist() == theirs.encode_ordinary(text)
            assert tokenizer.eot == theirs.eot_token == len(tokenizer.tokens) - 1

def test_bpe_joins_the_commonest_pair_each_time(bpe):
    regex = pytest.importorskip("regex")
    words = regex.findall(gpt.GPT2_PATTERN, TEXT + "汉字 " * 50)
    for n in range(256, 270):
        so_far, pairs = gpt.BPETokenizer(bpe.tokens[:n] + bpe.tokens[-1:]), gpt.Counter()
        for word in words:
            ids = so_far.encode(word).tolist()
            pairs.update(bpe.tokens[a] + bpe.tokens[b] for a, b in zip(ids, ids[1:]))
        assert pairs[bpe.tokens[n]] == max(pairs.values())
    assert b"aa" in gpt.BPETokenizer.train(["b"] * 99 + ["aa"], 300).tokens  # all documents count

# --- Model ---------------------------------------------------------------------------------------

def make(arch="qwen3", **given):
    shape = dict(vocab_size=50, n_layer=2 * (arch != "bigram"), n_head=4, n_embd=32, block_size=16)
    given = gpt.ARCHS[arch] | shape | given
    return gpt.GPT(gpt.Config(**{k: v for k, v in given.items() if hasattr(gpt.Config, k)}))

def scramble(model):
    """Weights as if trained: nothing is zero."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 1.0)
    return model.eval()

def test_gpt2_has_as_many_parameters_as_gpt2():
    with torch.device("meta"):
        model = make("gpt2", vocab_size=50257, n_layer=12, n_head=12, n_embd=768, block_size=1024)
    assert gpt.count_parameters(model) == 124_439_808

every_model = pytest.mark.parametrize("given", [dict(arch=arch) for arch in gpt.ARCHS] + [
    dict(pos="none", n_kv_head=1), dict(mlp="relu2", head_dim=6), dict(mlp="relu", bias=True)])

@every_model
def test_a_model_begins_by_knowing_nothing_and_sees_no_later_token(given):
    model, ids = make(**given), torch.randint(50, (8, 17))
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(50), rel=0.03)
    model, other = scramble(model), torch.cat((ids[:, :9], (ids[:, 9:] + 1) % 50), dim=1)
    a, b = model(ids[:, :16]), model(other[:, :16])
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-5)
    assert not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-2)

@every_model
@pytest.mark.parametrize("prompt", [1, 16, 40])
def test_the_cache_changes_nothing_across_the_edge_of_the_context(given, prompt, monkeypatch):
    model, idx = scramble(make(**given)), torch.randint(50, (2, prompt))
    honest, logits = gpt.sample_next, []
    monkeypatch.setattr(gpt, "sample_next", lambda x, *a: logits.append(x) or honest(x, *a))
    for cache in (True, False):
        list(gpt.generate(model, idx, gpt.Sampling(temperature=0, cache=cache, tokens=70)))
    assert torch.allclose(logits[0], model(idx[:, -16:])[:, -1], atol=1e-4)
    for cached, uncached in zip(logits[:70], logits[70:], strict=True):
        assert (cached - uncached).abs().max() < 1e-4 * max(1, uncached.abs().max())

@pytest.mark.parametrize("H_kv, TQ", [(4, 7), (2, 7), (1, 7), (2, 3), (4, 1)])
def test_every_attention_and_its_gradients_are_those_of_the_formula(H_kv, TQ, monkeypatch):
    shapes = (2, TQ, 4, 8), (2, 7, H_kv, 8), (2, 7, H_kv, 8)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    keys, values = (x.repeat_interleave(4 // H_kv, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd, bkhd -> bhqk", q, keys) / math.sqrt(8)
    later = torch.arange(7) > torch.arange(7 - TQ, 7)[:, None]  # the queries are the newest
    wanted = torch.einsum("bhqk, bkhd -> bqhd", scores.masked_fill(later, -1e9).softmax(-1), values)
    monkeypatch.setattr(gpt, "NO_KERNELS", "left out")
    gpt.choose_attention(model := make(), "sdpa", torch.float32)
    for attend in (gpt.attention, model.blocks[0].attn.attend):
        a, b = (torch.autograd.grad((x ** 2).sum(), (q, k, v), retain_graph=True)
                for x in (wanted, attend(q, k, v)))
        assert torch.allclose(wanted, attend(q, k, v)) and all(map(torch.allclose, a, b))

@pytest.mark.parametrize("impl, plain", [("auto", True), ("plain", True), ("sdpa", False)])
def test_an_attention_that_was_changed_is_never_silently_ignored(impl, plain, monkeypatch):
    """A window that hides one key from the last query, for all queries and for one with a cache."""
    honest, (model, changed, single) = gpt.attention, (make(block_size=256) for _ in range(3))
    def window(q, k, v):
        return torch.cat((honest(q, k, v)[:, :-1], honest(q[:, -1:], k[:, 1:], v[:, 1:])), dim=1)
    changed.blocks[1].attn.attend = window
    single.blocks[1].attn.attend = lambda q, *kv: (window if q.size(1) == 1 else honest)(q, *kv)
    assert gpt.choose_attention(model, impl, torch.float32).startswith("plain") == plain
    for other in (changed, single):
        assert "does not agree" in gpt.choose_attention(other, impl, torch.float32)
    monkeypatch.setattr(gpt, "attention", window)
    edited = make(block_size=256)
    assert ("does not agree" in gpt.choose_attention(edited, impl, torch.float32)) != plain
    assert edited.blocks[1].attn.attend is changed.blocks[1].attn.attend is window
    assert not gpt.attention_maps(edited, torch.arange(16))[0][:, -1, 0].any()  # as on the page
    monkeypatch.setattr(gpt, "attention", honest)
    narrow = make(n_embd=8)  # heads of 2
    assert "does not" not in gpt.choose_attention(narrow, impl, torch.bfloat16)

def test_activation_checkpointing_changes_no_gradient_and_dropout_is_for_training_alone():
    model, ids, gradients = scramble(make(dropout=0.1)).train(), torch.randint(50, (2, 9)), []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        loss = model(ids[:, :-1], ids[:, 1:])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    assert not torch.allclose(model(ids), model(ids), atol=1e-3)
    assert torch.equal(model.eval()(ids), model(ids))

# --- Data ----------------------------------------------------------------------------------------

def text_of(*data, tokenizer="char"):
    tokens = gpt.load_tokens(data, tokenizer)
    return tokens.tokenizer.decode(tokens.ids)

def test_files_folders_and_globs_are_read_as_they_are(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    Path("d[1]/deep/folder.txt").mkdir(parents=True)
    for name in ("d[1]/.hidden.txt", "d[1]/gpt.py", "d[1]/log.jsonl"):
        Path(name).write_text("no")
    Path("d[1]/a.txt").write_bytes(b"\xef\xbb\xbfone\r\n" + b"." * 20)
    Path("d[1]/deep/B.TXT").write_text("два", "utf-8")
    Path("c.jsonl").write_text('{"text": "half \\ud83d"}\n\n{"text": "three\\n"}\n')
    one = "one\r\n" + "." * 20
    assert text_of("d[1]") == text_of("~/d[1]") == one + "два" and text_of("d*/*.txt") == one
    assert text_of("c.jsonl", "d[1]/deep/B.TXT", "d[1]") == "half \ufffdthree\nдва" + one + "два"
    for count in (40_000, 70_000):  # ids of two bytes, of four
        Path("v.txt").write_text(text := "".join(map(chr, range(0x20000, 0x20000 + count))))
        assert text_of("v.txt") == text
    monkeypatch.setattr(gpt, "write_tokens", lambda *a: pytest.fail("again"))
    same = gpt.load_tokens(["v.txt"]).tokenizer  # as `eval` and --resume have it
    assert text_of("v.txt") == text_of("v.txt", tokenizer=same) == text

def test_end_of_text_stands_between_documents_and_is_ordinary_within(bpe):
    end = "<|endoftext|>"
    Path("a.jsonl").write_text('{"text": "one"}\n{"text": "<|endoftext|>"}\n')
    ids = gpt.load_tokens(["a.jsonl", "text.txt"], bpe).ids.tolist()
    assert bpe.decode(ids) == end.join(["one", end, TEXT]) and ids.count(bpe.eot) == 2
    assert bpe.encode(end, special=True).tolist() == [bpe.eot] == bpe.first

def test_text_is_cut_into_short_pieces_and_no_token_changes(bpe):
    texts = "a\n\n  \n b\n\nc \n d\r\ne\tf\n" * 30, "abc\r\n" * 300, TEXT
    for text, size in itertools.product(texts, (20, 50, 10_000)):
        Path("t.txt").write_bytes(text.encode())
        pieces = list(gpt.read_pieces([Path("t.txt")], size))[1:]
        assert "".join(pieces) == text and max(map(len, pieces)) <= 3 * size
        assert torch.equal(torch.cat([bpe.encode(piece) for piece in pieces]), bpe.encode(text))

@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_a_run_sees_every_part_of_the_text_equally_often(seed):
    ids, T = torch.arange(10_000), 50  # 75 steps are three passes
    windows = torch.cat([gpt.get_batch(ids, T, (1, 1, 8), 0, seed, step) for step in range(75)])
    seen = windows[:, :-1].flatten().bincount(minlength=len(ids))[T:-T]
    assert 2 <= seen.min() and seen.max() <= 4 and len(windows[:, 0].unique()) == len(windows)

@pytest.mark.parametrize("n, stride", [
    (50, None), (50, 5), (49, 1), (17, None), (16, None), (2, None), (33, 16)])
def test_the_loss_counts_each_token_once_with_the_context_it_says(n, stride):
    model, ids, T, total = scramble(make()), torch.randint(50, (n,)), min(16, n - 1), 0.0
    step = min(stride or T, T)
    for t in range(1, n):  # predict token t from the window that counts it
        begin = max(0, -(-(t - T) // step) * step)
        total += F.cross_entropy(model(ids[None, begin:t])[0, -1], ids[t]).item()
    loss, counted = gpt.estimate_loss(model, ids, stride, batch_size=3)
    assert counted == n - 1 and loss == pytest.approx(total / (n - 1), rel=1e-4)
    few, again = (gpt.estimate_loss(model, ids.repeat(20), limit=100) for _ in range(2))
    assert few == again and few[1] <= 100

@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("text", ["".join(AWKWARD) * 20, "\n" * 5000, "x" * 3_000_000,
                                  "a" + " " * 999_999 + "b"], ids=range(4))
def test_any_text_trains_and_samples(text, tokenizer):
    Path("t.txt").write_bytes(text.encode())
    train(data="t.txt", steps=2, tokenizer=tokenizer, block_size=9, seed=2 ** 64 - 1)
    assert text_of("t.txt", tokenizer=tokenizer) == text.removeprefix("\ufeff")
    assert gpt.sample(tokens=20) and gpt.sample(prompt=text[:1], tokens=20, seed=2 ** 64 - 1)

# --- Training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, layers, optimizer", [
    ("qwen3", 2, "muon"), ("gpt2", 2, "muon"), ("gpt2", 2, "adamw"), ("bigram", 0, "muon")])
def test_every_parameter_has_exactly_one_optimizer_and_training_learns(arch, layers, optimizer):
    model = make(arch)
    assert (model.head.weight is model.embed.weight) == (arch == "gpt2")
    optimizers = gpt.make_optimizers(model, gpt.Training(optimizer=optimizer))
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    train(arch=arch, n_layer=layers, optimizer=optimizer, steps=60, lr=0.01)
    assert log()[-1]["val_loss"] < log()[0]["val_loss"] - 0.5

def test_orthogonalise_gives_every_singular_value_about_one():
    for shape in ((2, 16, 64), (3, 48, 16)):
        values = torch.linalg.svdvals(gpt.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3

def test_learning_rate_rises_over_the_warmup_and_ends_at_zero():
    shares = [gpt.lr_share(step, step / 10, warmup=3) for step in range(11)]
    assert shares[0] == 0.25 and shares[3] == 0.7 and shares[10] == 0 and max(shares) == shares[3]

def test_precision_follows_capability_not_emulation(monkeypatch):
    for major, dtype in (9, "bfloat16"), (8, "bfloat16"), (7, "float16"), (6, "float32"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        assert gpt.pick_dtype("auto", torch.device("cuda")) == getattr(torch, dtype)

def test_a_run_sees_its_text_five_times_and_reports_to_people_and_programs():
    code, out, _ = run_main(*flags(steps=None), "--n_kv_head=4", "--no-qk-norm")
    lines, even = log(), {math.ceil(240 * k / 20) for k in range(21)}
    assert code == 0 and "1 file, 3,400 tokens" in out and "5 times in 240 steps" in out
    assert lines[0].keys() == {"step", "tokens", "seconds", "train_loss", "lr", "grad_norm",
                               "val_loss", "tokens_per_second", "memory_mb"}
    state = torch.load("out/ckpt.pt", weights_only=True)
    assert {"model", "settings", "tokenizer", "step", "val_loss", "optimizer", "scaler", "seconds",
            "best", "data_fingerprint"} <= state.keys() and state["format"] == 2
    assert [line["step"] for line in lines] == sorted(even | {1, 2, 4, 8, 16, 32, 64, 128})
    assert lines[0]["val_loss"] == pytest.approx(math.log(len(set(TEXT))), rel=0.03)
    shown = re.findall(r"val (\S+) \((\S+) bits per byte", out)
    for line, (loss, bits) in zip(lines, shown, strict=True):
        assert float(loss) == pytest.approx(line["val_loss"], abs=1e-4)
        assert float(bits) == pytest.approx(line["val_loss"] / math.log(2), abs=1e-3)

@pytest.mark.parametrize("number, step, dtype", [
    (signal.SIGINT, 9, "auto"), (signal.SIGTERM, 7, "bfloat16"), (signal.SIGHUP, 1, "float64")])
def test_a_run_stopped_by_a_signal_says_how_and_goes_on_exactly(number, step, dtype, monkeypatch):
    hard = dict(steps=20, dropout=0.1, accum=2, eval_every=7, dtype=dtype)
    train(**hard, out="whole")
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    before_step(monkeypatch, step - 1, lambda: signal.raise_signal(number))
    code, _, err = run_main(*flags(**hard))
    assert code == 128 + number and f"stopped at step {step} and saved; --resume" in err
    assert gpt.read_checkpoint("out/ckpt.pt")["step"] == step
    assert handlers == [signal.getsignal(n) for n in signal.valid_signals()]
    with open("out/log.jsonl", "a") as file:
        file.write('{"step": 19}\n{"step": 2')  # what came after the checkpoint is done again
    assert gpt.train(resume=True)["step"] == 20 and same("out", "whole")
    assert [line["step"] for line in log()] == [0, 7, 14, 20]
    with gpt.interruptible(), pytest.raises(KeyboardInterrupt):  # the second leaves at once
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

def test_signals_that_belong_to_others_are_left_alone(monkeypatch):
    thread = threading.Thread(target=train)  # where Python allows no handlers
    thread.start()
    thread.join()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # nohup's
    monkeypatch.setattr(signal, "signal", lambda *a: pytest.fail("changed"))
    assert log()[-1]["step"] == train(out="b")["step"] == 6

def test_resuming_refuses_another_run_but_takes_more_steps():
    train()
    old = log()
    Path("other.txt").write_text(TEXT[::-1])
    for words, says in (("--data other.txt", "not the text"), ("--n-layer 3", "n_layer is 2"),
                        ("--seed 1", "seed"), ("--optimizer adamw", "optimizer is 'muon'")):
        assert says in refused("train", "--resume", *words.split())
    os.rename("text.txt", "copy.txt")  # the same text by another name
    assert run_main("train", "--resume", "--steps", 9, "--data", "copy.txt")[0] == 0
    assert log()[:7] == old and [line["step"] for line in log()] == [*range(10)]
    assert gpt.train(resume=True)["step"] == 9 and len(log()) == 10  # complete: nothing to do

def test_a_repeated_command_never_loses_a_run():
    train(out="r")
    assert "--resume goes on with it, --out OTHER" in refused(*flags(out="r"))
    refused(*flags(out="r", data="nowhere.txt"), "--overwrite")
    os.remove("r/ckpt.pt")
    assert "--overwrite" in refused(*flags(out="r"))  # best.pt alone is a run too
    assert train(out="r", overwrite=True, steps=2)["step"] == 2 and len(log("r")) == 3

def test_minutes_end_on_time_and_go_to_training_even_if_looks_are_slow(monkeypatch):
    look, begun = gpt.Run.look, time.monotonic()
    monkeypatch.setattr(gpt.Run, "look", lambda run: (time.sleep(0.1), look(run)))
    monkeypatch.setattr(gpt, "STARTED", begun - 3)
    monkeypatch.setattr(sys, "argv", ["gpt.py", *flags(steps=None, minutes=0.1)])
    assert gpt.main() == 0 and 1 < time.monotonic() - begun < 3 + 1.5
    assert log()[-1]["lr"] < 0.1 * gpt.Training.lr and log()[-1]["step"] > 9 and len(log()) < 9
    assert train(out="b")["seconds"] < 3  # a process' second run counts from its own start

@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["embed.weight", "blocks.0.mlp.up.weight"])  # AdamW's and Muon's
def test_a_gradient_that_is_not_finite_changes_nothing(name, dtype, monkeypatch):
    seen, honest = [], gpt.Run.backward
    def backward(run, windows):
        loss = honest(run, windows)
        if len(seen) in (3, *range(10, 30)):
            run.model.get_parameter(name).grad[0, 0] = math.nan
        seen.append({k: v.clone() for k, v in run.model.state_dict().items()})
        return loss
    monkeypatch.setattr(gpt.Run, "backward", backward)
    with pytest.raises(gpt.Failure, match="20 steps"):
        train(steps=100, dtype=dtype)
    assert equal(seen[3], seen[4]) and not equal(seen[4], seen[5])
    assert equal(seen[10], seen[29]) and equal(seen[10], weights("out"))

@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_is_one_line_with_what_helps(error, monkeypatch):
    full = Mock(side_effect=error("DefaultCPUAllocator: can't allocate memory"))
    monkeypatch.setattr(gpt.Run, "train_step", full)
    code, _, err = run_main(*flags())
    assert code == 1 and err.count("\n") == 1 and "batch_size" in err and "accum" in err

def test_a_compiled_model_is_saved_as_itself_and_no_compiler_is_needed(monkeypatch, capsys):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    train(compile="on", steps=2, out="a")
    assert weights("a").keys() == make().state_dict().keys() and not capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda model: offline)
    assert train(compile="on")["step"] == 6 and "no network" in capsys.readouterr().err

def test_the_best_model_is_kept_and_memorising_said_once(monkeypatch, capsys):
    values = iter([8.0, 6.0, 6.1, 5.9, 6.1, 6.2])
    monkeypatch.setattr(gpt, "estimate_loss", lambda *a: (next(values), 1))
    train(steps=5, eval_every=1)
    assert capsys.readouterr().err.count("by heart") == 1
    best = gpt.read_checkpoint("out/best.pt")
    assert (best["step"], best["val_loss"], log()[-1]["step"]) == (3, 5.9, 5)

def test_a_run_can_go_on_in_another_precision_and_keeps_its_loss_scale():
    train(steps=4)
    for step, dtype, count in (6, "float16", 2), (7, "float16", 3), (8, "bfloat16", None):
        assert gpt.train(resume=True, steps=step, dtype=dtype, device="cpu")["step"] == step
        assert gpt.read_checkpoint("out/ckpt.pt")["scaler"].get("_growth_tracker") == count

def test_fine_tuning_keeps_weights_and_tokenizer_and_starts_anew():
    train(out="base", steps=30, pos="learned")
    Path("more.txt").write_text("not to be " * 50)
    how = dict(steps=3, dropout=0.5, block_size=8, probe="")
    gpt.train(init="base", data="more.txt", out="fine", **how)
    state = gpt.read_checkpoint("fine/ckpt.pt")
    assert state["step"] == 3 and len(state["model"]["positions.weight"]) == 8
    assert state["tokenizer"]["chars"] == "".join(sorted(set(TEXT)))
    assert state["settings"]["lr"] == pytest.approx(gpt.Training.lr / 10)
    assert log("fine")[0]["val_loss"] < log("base")[-1]["val_loss"] + 1
    for words, says in (("--n-embd 64", "n_embd is 32"), ("--tokenizer bpe", "that init names"),
                        ("--arch gpt2", "that init names"), ("--block-size 99", "size is 16")):
        assert says in refused("train", "--init", "base", "--out", "x", *words.split())

def test_two_processes_give_the_weights_of_one(monkeypatch):
    two = dict(steps=10, dtype="float64", batch_size=2, accum=2, eval_every=2)
    Path("run.py").write_text(f"""import glob, sys; sys.path.insert(0, {str(HERE)!r}); import gpt
code = gpt.main()  # a thread that lives on may abort the process at its end
sys.exit(code or any("gloo" in open(f).read() for f in glob.glob("/proc/self/task/*/comm")))""")
    code, out, err = process(f"--master-port={20_000 + os.getpid() % 10_000}", "--nproc-per-node=2",
        "run.py", *flags(**two, out="two"), python=["-m", "torch.distributed.run"])
    assert code == 0 and out.count("step 10  ") == 1, err
    one = train(**two | {"batch_size": 8, "accum": 1})
    assert one["grad_norm"] == pytest.approx(log("two")[-1]["grad_norm"])
    assert all(map(torch.allclose, weights("out").values(), weights("two").values()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(*flags(out="alone"))

# --- Sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("how, kept", [
    (dict(temperature=0), {0}), (dict(), {0, 1, 2, 3}), (dict(top_k=2), {0, 1}),
    (dict(top_k=99), {0, 1, 2, 3}), (dict(top_p=0.49), {0}), (dict(top_p=0.51), {0, 1}),
    (dict(top_p=0), {0}), (dict(top_p=0.9, top_k=3), {0, 1, 2}), (dict(temperature=1e-38), {0})])
def test_greedy_top_k_and_top_p_keep_what_they_should(how, kept):
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log().expand(2000, 4)  # likeliest: 1, 0, 3, 2
    s = gpt.Sampling(**{"temperature": 1} | how)
    rows = gpt.sample_next(logits, s, torch.Generator())
    assert {[1, 0, 3, 2].index(i) for i in rows.tolist()} == kept
    if how == {}:
        assert (rows.bincount() / 2000).tolist() == pytest.approx([0.3, 0.5, 0.05, 0.15], abs=0.05)
    with pytest.raises(gpt.Failure, match="not finite"):
        gpt.sample_next(logits * math.nan, s, None)

@pytest.mark.parametrize("text, stop, pieces", [
    (b"\xe6\xb1\x89", "", ["", "", "汉", ""]), (b"ab\xff", "", ["a", "b", "\ufffd", ""]),
    (b"aababcd", "abc", ["", "a", "", "", "", "ab"]), (b"aaba", "abc", ["", "a", "", "ab", "a"])])
def test_streamed_text_never_breaks_a_character_and_stops_where_told(text, stop, pieces):
    tokenizer = types.SimpleNamespace(tokens=[bytes([i]) for i in range(256)])
    streamed = list(gpt.stream_text(tokenizer, iter(text), stop))
    assert "".join(streamed) == "".join(pieces) and (stop or streamed == pieces)

def test_a_sample_is_its_prompt_and_then_text_and_nothing_else(monkeypatch):
    how = ("sample", "--out", trained(), "--prompt", "To be", "--tokens")
    monkeypatch.setattr(gpt, "find_files", lambda *a: pytest.fail("data"))
    code, out, err = run_main(*how, 40, "--seed", 3)
    assert code == 0 and out.startswith("To be") and len(out) == 46 and "/best.pt: step " in err
    assert run_main(*how, 40, "--seed=3", "--no-cache")[1] == out != run_main(*how, 40)[1]
    assert len(set(gpt.sample(out=trained(), tokens=9, num=3))) == 3
    assert run_main(*how, 0, "--num", 2)[1] == "To be\n---\nTo be\n"

def test_prompts_of_any_kind_are_met(monkeypatch):
    Path("p.txt").write_bytes(b"\xef\xbb\xbfor not\n\n")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"be\n")))
    for prompt, text in (TEXT[:300], TEXT[:300]), ("@p.txt", "or not\n"), ("-", "be"):
        _, out, err = run_main("sample", "--out", trained(), "--prompt", prompt, "--tokens", 0)
        assert out == text + "\n" and ("sees 16" in err) == (len(text) > 16)
    assert "'-' (" in refused("sample", "--out", trained(), "--prompt", "-- to be")  # no option

def test_a_sample_ends_at_the_end_of_text_and_does_not_show_it(monkeypatch):
    chars = gpt.load_model(trained())[1].chars
    monkeypatch.setattr(gpt.Tokenizer, "ends", {9})
    monkeypatch.setattr(gpt, "generate", lambda *a: map(torch.tensor, ([3], [5], [9], [3])))
    assert gpt.sample(out=trained()) == [chars[3] + chars[5]]

def test_eval_gives_the_loss_that_training_gave_but_not_for_another_text():
    Path("text.txt").write_text(TEXT[:160])  # so short that all of the split is looked at
    train(dtype="bfloat16", steps=30, dropout=0.1)  # rounded weights would make it another model's
    loss = pytest.approx(gpt.read_checkpoint("out/best.pt")["val_loss"], abs=2e-4)
    os.utime("text.txt", (1, 1))
    result = gpt.evaluate(dtype="bfloat16", device="cpu")
    assert result["loss"] == loss and result["tokens"] == 15
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
    said = json.loads(run_main("eval", "--data", "text.txt", "--json", "--stride", 1)[1])
    assert said.keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "stride"}
    assert (said["tokens"], said["stride"]) == (159, 1)
    Path("text.txt").write_text(TEXT)
    assert "text.txt has changed" in refused("eval")

# --- Checkpoints ---------------------------------------------------------------------------------

def test_damaged_and_foreign_checkpoints_are_one_line_and_run_nothing():
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("evil",)
    train(out="r", steps=2)
    good, chance = Path("r/best.pt").read_bytes(), random.Random(0)
    damaged = [b"", pickle.dumps(Evil())]
    state = gpt.read_checkpoint("r/best.pt")
    for thing in ({"format": 2, "model": Evil()}, state | {"model": {}}, state | {"format": 3}):
        torch.save(thing, buffer := io.BytesIO())
        damaged.append(buffer.getvalue())
    for i in chance.sample(range(len(good)), 20):
        flipped = bytes([good[i] ^ chance.randrange(1, 256)])
        damaged += [good[:i], good[:i] + flipped + good[i + chance.choice((0, 1, 2)):]]
    for data in damaged:
        Path("x.pt").write_bytes(data)
        try:  # a byte may not matter
            assert equal(gpt.load_model("x.pt")[0].state_dict(), weights("r", "best.pt"))
        except gpt.Error as e:
            assert "x.pt" in str(e) and "\n" not in str(e)
    assert not Path("evil").exists()
    os.replace("r/best.pt", "r/ckpt.pt")
    assert "weights alone" in refused("train", "--resume", "--out", "r")

def test_a_disk_without_room_ends_in_one_line_and_keeps_what_was_there():
    resource = pytest.importorskip("resource")  # a limit on files stands in for a full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    train()
    kept, size = weights("out"), os.path.getsize("out/ckpt.pt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, before[1]))
    code, _, err = run_main("train", "--resume", "--steps", 9)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "training goes on" in err and "ckpt.pt cannot be written: " in err
    assert equal(weights("out"), kept) and not list(Path("out").glob("*.tmp"))

# --- Looking inside ------------------------------------------------------------------------------

def test_a_look_sees_what_the_model_does_and_leaves_no_trace():
    model, idx, seen = scramble(make(n_kv_head=4)), torch.randint(50, (16,)), []
    attn = model.blocks[1].attn
    attn.register_forward_hook(lambda part, given, out: seen.append((given[0], out)))
    probs, maps = gpt.logit_lens(model, idx), gpt.attention_maps(model, idx)
    assert torch.allclose(probs[-1], model(idx[None])[0].softmax(-1), atol=1e-5)
    bare = model.head(model.norm(model.embed(idx))).softmax(-1)
    assert torch.allclose(probs[0], bare, atol=1e-6)  # the lens begins before the first block
    x, out = seen[-1]
    values = attn.v(x)[0].view(16, 4, 8).transpose(0, 1)  # (H, T, D)
    mixed = (maps[1] @ values).transpose(0, 1).reshape(16, 32)
    assert torch.allclose(attn.out(mixed), out[0], atol=1e-4)  # a map weighs the values
    assert attn.attend is gpt.attention and not model.dropout._forward_hooks
    before, ids = torch.zeros(16, 16), torch.arange(16) % 5
    before[range(1, 16), range(15)] = 1
    assert gpt.head_role(before, ids) == "token before 1.00"
    before[range(6, 16), range(5, 15)], before[range(6, 16), range(2, 12)] = 0, 1
    assert gpt.head_role(before, ids) == "after the same 1.00"

def test_probes_change_no_weight_and_record_what_happened(monkeypatch):
    before_step(monkeypatch, 17, lambda: signal.raise_signal(signal.SIGINT))
    Path("text.txt").write_text("@she said, no more\n" * 300)
    for out, probe in (("without", ""), ("with", None)):  # None: a whole line of the text
        train(out=out, probe=probe, steps=40, dropout=0.1, block_size=32)
        gpt.train(resume=True, out=out)
    assert equal(weights("without"), weights("with")) and not log("without", "probe.jsonl")
    last, (model, tokenizer) = log("with", "probe.jsonl")[-1], gpt.load_model("with/ckpt.pt")
    ids = tokenizer.encode("@she said, no more").long()
    assert "".join(last["text"]) == "@she·said,·no·more" and len(last["samples"]) == 4
    costs = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
    assert last["loss"] == pytest.approx([0, *costs.tolist()], abs=1e-3)

def test_attention_is_asked_in_one_precision_even_with_a_cache_or_on_the_page(monkeypatch):
    honest, seen, half, full = gpt.attention, [], {torch.bfloat16}, {torch.float32}
    monkeypatch.setattr(gpt, "attention",
                        lambda *qkv: seen.append({x.dtype for x in qkv}) or honest(*qkv))
    for run in (lambda: train(dtype="bfloat16", probe=None),
                lambda: gpt.inspect(dtype="bfloat16", device="cpu", probe="To be")):
        seen.clear()
        run()
        assert seen[-1] == half and all(dtypes in (half, full) for dtypes in seen)
        assert seen.count(full) <= 4  # the check's own

def test_importance_is_what_the_absence_of_a_part_costs():
    model, ids = scramble(make()), torch.randint(50, (200,))
    heads, base = gpt.head_importance(model, ids), gpt.estimate_loss(model, ids)[0]
    model.blocks[1].attn.out.weight.data[:, 8:16] = 0  # its second head
    assert heads[5] == pytest.approx(gpt.estimate_loss(model, ids)[0] - base, abs=1e-3) != 0

def page_data(path):
    page = Path(path).read_text("utf-8")
    assert page.count("</script>") == 1 and not re.search("(src|href)=|url[(]|@import|http", page)
    return json.loads(re.search(r"^const R = (.*), COLORS", page, re.M).group(1))

def test_inspect_writes_a_page_that_needs_nothing():
    Path("DATA.txt").write_text("</script>\n" * 300)
    train(data="DATA.txt", steps=60, probe="</script>")
    records = page_data(gpt.inspect())
    assert len(records) == len(log()) and "worth" in records[0]["heads"][0][0]["worth"]
    assert 0 < records[-1]["bigram"] < 0.01 and records[0]["blind guess"] == 2.303
    assert "".join(page_data(gpt.inspect(probe="script"))[0]["text"]) == "script"
    assert len(page_data("out/inspect.html")) == len(records)  # is still there
    os.remove("DATA.txt")
    assert "without what needs the text" in run_main("inspect")[2]
    assert page_data("out/inspect.html")[0]["heads"][0][0]["worth"] == ""
    assert "name one with" in refused("inspect", "--init", "out", "--out", "new")

@pytest.mark.parametrize("arch, layers, text", [
    ("qwen3", 2, "漢字かな交じり文を読む。\r\n" * 99), ("bigram", 0, TEXT)])
def test_the_page_works_in_a_browser(arch, layers, text):
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    Path("text.txt").write_text(text, "utf-8", newline="")
    train(steps=10, arch=arch, n_layer=layers, probe=text[:4])
    gpt.train(resume=True, steps=20, probe=None)  # goes on with another line, and a longer one
    page = gpt.inspect().resolve()
    script = """<script>document.querySelector('[data-token="5"]').click()
      const step = $('now').textContent + location.hash; $('at').value = 0; $('at').oninput()
      document.querySelector('[data-token="1"]').click()
      document.onkeydown({key: 'ArrowRight'})
      document.querySelector('[data-head="1.2"]')?.click()
      document.title = [step, $('now').textContent, location.hash].join('|')</script>"""
    page.write_text(page.read_text("utf-8") + script, "utf-8")
    words = "--headless --no-sandbox --dump-dom --virtual-time-budget=3000".split()
    words += [f"--user-data-dir={Path('profile').resolve()}", "--no-first-run", f"file://{page}"]
    out = subprocess.run([chromium, *words], capture_output=True, text=True, timeout=100).stdout
    last, first, place = re.search("<title>(.*?)</title>", out)[1].split("|")
    assert "step 20" in last and "token=5" in last and "step 0" in first and "token=2" in place
    assert arch == "bigram" or "head=1.2" in place

def test_ablate_compares_and_goes_on_where_it_was(monkeypatch):
    words = ["ablate", "--vary", "n_head=1,2", "--vary", "n-layer=1 lr=1e-3 tie=true,false",
             "--vary", "n_head=2", "--seeds", "2", "--out", "a", *flags(steps=3, n_head=None)[1:]]
    real, done = gpt.train, []
    monkeypatch.setattr(gpt, "train", lambda **given: done.append(given["out"]) or real(**given))
    before_step(monkeypatch, 2, lambda: len(done) in (1, 5) and signal.raise_signal(15))
    assert run_main(*words)[0] == 143 and len(done) == 1  # stopped in the first run
    assert "other settings" in refused(*words, "--lr", "0.1")  # it would go on in its own
    assert run_main(*words)[0] == 143 and len(done) == 5  # and in the fourth
    code, out, _ = run_main(*words)
    assert code == 0 and len(done) == 5 + 5 and len(set(done)) == 8  # n_head=2 is not trained twice
    assert run_main(*words) == (0, out, "") and len(done) == 10
    for vary, seeds in ((), "1337 1338"), ("seed=1,2", "1 2"):  # nothing varied; the seed
        runs = gpt.ablate(**SMALL | {"steps": 1, "out": seeds, "vary": vary, "seeds": 2})["runs"]
        assert list(runs) == [f"seed={seed}" for seed in seeds.split()]

# --- Weights in and out --------------------------------------------------------------------------

INPUT = (HERE / "input.txt").read_text("utf-8")
STRANGE = "".join(AWKWARD) + "I'LL we'Ve 3.14\u00a0\u2003x\u0085y ſ'ſ ١٢٣ e\u0301\x7f\n \n  Ünï  "

def auto(what):  # AutoConfig and so on
    return getattr(pytest.importorskip("transformers"), "Auto" + what)

def opened(folder):
    return auto("ModelForCausalLM").from_pretrained(folder, torch_dtype=torch.float32)

def theirs(kind, dtype=torch.float32, **changes):
    """A random model of transformers, in several files of the folder a."""
    shape = dict(vocab_size=131, hidden_size=30, num_hidden_layers=3, num_attention_heads=5,
                 num_key_value_heads=1, head_dim=8, intermediate_size=17,
                 max_position_embeddings=37, bos_token_id=None, eos_token_id=None)
    config = auto("Config").for_model(kind, **shape | changes)
    model = scramble(auto("ModelForCausalLM").from_config(config))
    model.to(dtype).save_pretrained("a", max_shard_size="10KB")
    return opened("a")

def edit(name, value):
    about = json.loads(Path("a/config.json").read_text("utf-8")) | {name: value}
    Path("a/config.json").write_text(json.dumps(about), "utf-8")

def run_folder(arch="qwen3", tokenizer=gpt.CharTokenizer("abcdefgh"), **changes):
    model = scramble(make(arch, **{"vocab_size": len(tokenizer.tokens), **changes}))
    Path("run").mkdir()
    torch.save({"format": gpt.FORMAT, "model": model.state_dict(), "tokenizer": tokenizer.state(),
                "step": 0, "val_loss": 0.0, "settings": gpt.asdict(model.config)}, "run/best.pt")
    return model

def same_model(ours, model):
    """Logits equal, and greedy text: ours through the KV cache, theirs by whole forward passes."""
    idx = torch.randint(ours.config.vocab_size, (3, 16))
    a, b = ours(idx), model(idx).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    greedy = gpt.generate(ours, idx[:1, :4], gpt.Sampling(tokens=12, temperature=0))
    text = model.generate(idx[:1, :4], max_new_tokens=12, do_sample=False, use_cache=False)
    assert [int(i) for i in greedy] == text[0, 4:].tolist()

@pytest.mark.parametrize("kind, changes", [
    ("gpt2", {}), ("gpt2", dict(n_inner=21, tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
    ("llama", dict(attention_bias=True, mlp_bias=True, dtype=torch.float64)),
    ("llama", dict(head_dim=6, rms_norm_eps=1e-3, rope_theta=123.0, tie_word_embeddings=True)),
    ("qwen3", dict(tie_word_embeddings=True, num_key_value_heads=5, dtype=torch.float16)),
    ("qwen3", dict(head_dim=14, rope_theta=1e6, dtype=torch.bfloat16))], ids=str)
def test_their_models_are_the_same_here_and_out_again(kind, changes):
    model = theirs(kind, **changes)
    Path("a/model.fp16.safetensors").write_bytes(b"another's")
    ours = gpt.load_model("a")[0]
    same_model(ours, model)
    gpt.export(folder="b", init="a")
    same_model(ours, opened("b"))

def test_rope_theta_is_found_in_the_spelling_of_any_version():
    for said in ({"rope_theta": 345.0}, {"rope_parameters": {"rope_theta": 345.0}}):
        assert gpt.config_in({"model_type": "llama", **said})[1].rope_theta == 345
    assert gpt.config_in({"model_type": "llama"})[1].rope_theta == 10000

@pytest.mark.parametrize("kind, name, value, says", [
    ("gpt2", "model_type", "mamba", "mamba"), ("gpt2", "activation_function", "relu", "relu"),
    ("gpt2", "n_layer", 4, "is None"), ("gpt2", "scale_attn_weights", False, "attn_weights"),
    ("gpt2", "n_layer", "x", "n_layer"), ("gpt2", "n_layer", 10 ** 9, "n_layer"),
    ("gpt2", "n_layer", [], "n_layer"), ("gpt2", "n_head", 4, "divisible"),
    ("gpt2", "tie_word_embeddings", False, "lm_head.weight"),
    ("llama", "tie_word_embeddings", True, "lm_head.weight"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "inverse"), ("llama", "mlp_bias", 1, "bias"),
    ("llama", "rope_parameters", {"rope_type": "llama3"}, "llama3"), ("gpt2", "n_layer", 2, "None"),
    ("gpt2", "vocab_size", 130, "wte.weight"), ("llama", "max_position_embeddings", 10 ** 15, ""),
    ("llama", "hidden_act", "gelu", "gelu"), ("llama", "rope_scaling", {"type": "yarn"}, "yarn"),
    ("qwen3", "attention_bias", True, "_bias"), ("qwen3", "use_sliding_window", True, "sliding"),
    ("qwen3", "quantization_config", {"quant_method": "fp8"}, "fp8")])
def test_a_model_that_would_be_computed_otherwise_is_refused(kind, name, value, says):
    theirs(kind)
    edit(name, value)
    assert says in refused("sample", "--init", "a")

def packed(header, body, end=b""):
    text = json.dumps(header).encode() + end
    return len(text).to_bytes(8, "little") + text + body

def test_damaged_weights_are_one_line_and_old_ones_are_read():
    model, path = run_folder("gpt2", n_layer=1), Path("a/model.safetensors")
    gpt.export(folder="a", out="run")
    os.remove("a/tokenizer.json")
    whole = path.read_bytes()
    n = 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:n]), whole[n:]
    *_, before, last = header
    start, stop = header[last]["data_offsets"]
    damaged = [whole[:0], whole[:9], whole[:-1], whole + bytes(4), packed(list(header), body)]
    damaged += [n.to_bytes(8, "little") + whole[8:] for n in (0, len(whole), (1 << 64) - 1)]
    damaged += [packed({k: header[k] for k in header if k != last}, body[:start])]
    damaged += [packed(header | {name: header[last] | about}, data) for name, about, data in [
        (last, {"dtype": "F64"}, body), (last, {"dtype": "F8"}, body),
        (last, {"shape": [1, 32]}, body), (last, {"data_offsets": [-4, 4]}, body),
        (last, {"data_offsets": [start + 4, stop + 4]}, body + bytes(4)),
        (last, {"data_offsets": header[before]["data_offsets"]}, body[:start]),
        ("more", {"data_offsets": [stop, stop + 128]}, body + bytes(128))]]
    for i, file in enumerate(damaged):
        path.write_bytes(file)
        assert "a cannot be read" in refused("sample", "--init", "a"), i
    mask = {"dtype": "BOOL", "shape": [2, 2], "data_offsets": [len(body), len(body) + 4]}
    for end in (b"", b" "):  # old ones have masks, and numbers that begin at an odd byte
        path.write_bytes(packed(header | {"h.0.attn.bias": mask}, body + bytes(4), end))
        assert equal(gpt.load_model("a")[0].state_dict(), model.state_dict())

@pytest.mark.parametrize("arch, changes, kind", [
    ("gpt2", {}, "bpe"), ("gpt2", dict(tie=False, mlp_hidden=13, norm_eps=1e-3), "char"),
    ("llama", {}, "char"), ("qwen3", dict(head_dim=14, n_kv_head=1, tie=True), "bpe"),
    ("llama", dict(n_kv_head=1, tie=True, bias=True, rope_theta=99.0), "char"),
    pytest.param("qwen3", {}, "gpt2", marks=needs_gpt2)], ids=str)
def test_an_exported_run_has_the_same_logits_and_token_ids_there(arch, changes, kind):
    tokenizer = gpt.TOKENIZERS[kind].train([INPUT, STRANGE], 800)
    model = run_folder(arch, tokenizer, **changes)
    gpt.export(folder="a", out="run")
    loaded, their = opened("a"), auto("Tokenizer").from_pretrained("a")
    same_model(model, loaded)
    loaded.save_pretrained("b")
    their.save_pretrained("b")
    back, ours = gpt.load_model("b")
    assert equal(model.state_dict(), back.state_dict()) and ours.tokens == tokenizer.tokens
    assert their.eos_token_id == tokenizer.eot == ours.eot
    assert isinstance(ours, gpt.CharTokenizer) == (kind == "char")  # it refuses the unknown
    if kind == "char":
        with pytest.raises(Exception, match="unknown"):
            their("a☃b")
    text = STRANGE + INPUT[-20_000:]
    ids = tokenizer.encode(text, special=True).tolist()
    assert their(text).input_ids == ids == ours.encode(text, special=True).tolist()
    assert torch.equal(ours.encode(text), tokenizer.encode(text))
    assert text == their.decode(ids) == ours.decode(ids) == "".join(gpt.stream_text(ours, ids))

@pytest.mark.parametrize("arch, name, value", [
    ("qwen3", "pos", "none"), ("qwen3", "mlp", "relu2"), ("qwen3", "window", 4),
    ("qwen3", "bias", True), ("gpt2", "n_kv_head", 1), ("gpt2", "head_dim", 6)])
def test_what_transformers_cannot_express_is_named(arch, name, value, monkeypatch):
    window = "window", int, gpt.setting(0, "a new part")
    monkeypatch.setattr(gpt, "Config", make_dataclass("Config", [window], bases=(gpt.Config,)))
    monkeypatch.setattr(gpt, "load_model", lambda init: (make(arch, **{name: value}), None))
    assert f"{name} {value} has no equal" in refused("export", "a", "--init", "x")

def test_export_overwrites_nothing():
    run_folder()
    Path("empty").mkdir()
    code, out, _ = run_main("export", "empty", "--out", "run")
    assert code == 0 and "from_pretrained('empty')" in out and len(os.listdir("empty")) == 4
    for folder in ("text.txt", "run", "empty", ""):
        assert "is there" in refused("export", folder, "--out", "run")

def test_tokenizers_of_others_are_theirs_in_sampling_and_fine_tuning_too():
    model = theirs("gpt2", vocab_size=703)
    t = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    t.train_from_iterator([INPUT, STRANGE], vocab_size=700, show_progress=False,
                          special_tokens=["<|im_end|>", "<|endoftext|>"])
    begin = {"single": "<|im_end|> $A", "special_tokens": [("<|im_end|>", 0)]}  # like Llama's
    t.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(**begin)
    t.save("a/tokenizer.json")
    edit("eos_token_id", 0)
    Path("a/generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    tokenizer = gpt.load_model("a")[1]
    assert (len(tokenizer.tokens), tokenizer.ends, tokenizer.eot) == (703, {0, 1}, 0)
    ids = tokenizer.encode(STRANGE, special=True).tolist()
    assert ids == t.encode(STRANGE).ids and tokenizer.decode(ids[1:]) == STRANGE
    assert not {0, 1} & {*tokenizer.encode(STRANGE).tolist()}  # in data it is text
    made = model.generate(torch.tensor([t.encode("The").ids]), max_new_tokens=20, do_sample=False)
    text = gpt.sample(init="a", prompt="The", tokens=20, temperature=0)
    assert text == [t.decode(made[0, 1:].tolist(), skip_special_tokens=False)]
    gpt.train(init="a", data="text.txt", out="tuned", steps=1, batch_size=1, device="cpu", probe="")
    assert gpt.load_model("tuned")[1].state() == tokenizer.state()
    gpt.export(folder="b", out="tuned")
    assert auto("Tokenizer").from_pretrained("b")(STRANGE).input_ids == ids

def test_a_folder_whose_tokenizer_cannot_be_used_says_why(monkeypatch):
    theirs("gpt2")
    assert "no tokenizer" in refused("sample", "--init", "a")
    Path("a/tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": []}}')
    assert "a cannot be read" in refused("sample", "--init", "a")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refused("sample", "--init", "a")

def test_gpt2_is_downloaded_once_or_its_file_named(monkeypatch):
    model, asked = run_folder("gpt2", vocab_size=50257), []
    gpt.export(folder="x", out="run")
    assert b'"n_ctx"' in Path("x/config.json").read_bytes()  # for llama.cpp's converter
    assert b'"wte.weight"' in Path("x/model.safetensors").read_bytes()  # and for mlx-lm
    def fetch(url, path, *a):
        asked.append(url)
        shutil.copy(Path("x", url.split("/")[-1]), path)
    assert "cache/gpt2/config.json" in refused("sample", "--init", "gpt2")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(gpt.GPT2Tokenizer, "train", lambda *a: "its tokens")
    for _ in range(2):
        ours, tokenizer = gpt.load_model("gpt2")
    assert equal(ours.state_dict(), model.state_dict()) and tokenizer == "its tokens"
    base = "https://huggingface.co/openai-community/gpt2/resolve/main/"
    assert asked == [base + "config.json", base + "model.safetensors"]
    Path("gpt2").mkdir()
    assert "no run in this" in refused("sample", "--init", "gpt2")  # a folder of ours comes first

# --- As a program, in a notebook, in the README --------------------------------------------------

SLOW_DISK = """import os, sys, time; sys.path.insert(0, sys.argv.pop(1)); import gpt
write = os.fsync
os.fsync = lambda file: (time.sleep(0.05), write(file)); sys.exit(gpt.main())"""

def test_killed_at_any_moment_a_run_can_go_on():
    kills, chance = int(os.environ.get("KILLS", 4)), random.Random(5)  # 50 is the long form
    how = dict(steps=40 * kills, eval_every=1, dropout=0.1)
    for number in [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] + [signal.SIGKILL] * kills:
        again = ["--resume"] if Path("out/ckpt.pt").exists() else [*flags(**how)[1:], "--overwrite"]
        words = [sys.executable, "-c", SLOW_DISK, HERE, "train", *again]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
            next(line for line in running.stdout if "which nine tenths" in line)  # said at once
            time.sleep(chance.uniform(0.1, 2))
            running.send_signal(number)
        assert running.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert gpt.train(resume=True)["step"] == 40 * kills and not list(Path("out").glob("*.tmp"))
    train(**how, out="whole")
    assert same("out", "whole")

@pytest.mark.parametrize("stdout", ["", ">&-", "> /dev/full"])
def test_a_command_never_ends_because_of_where_its_words_go(stdout):
    reader, unread = os.pipe()
    os.close(reader)
    for words in (["sample", "--out", trained(), "--tokens", "300"], flags()):
        line = shlex.join([sys.executable, str(HERE / "gpt.py"), *words])
        done = subprocess.run(f"{line} {stdout}", shell=True, stdout=unread, stderr=subprocess.PIPE)
        assert done.returncode == 0 and not re.search(b"Traceback|Exception", done.stderr)

def test_help_names_every_setting_and_begins_with_what_people_set(capsys):
    for name, function in gpt.COMMANDS.items():
        with pytest.raises(SystemExit, match="0"):
            gpt.main([name, "--help"])
        shown = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.M)
        assert {f.name.replace("_", "-") for f in fields(function.settings)} <= {"folder", *shown}
        assert name != "train" or shown[:4] == ["data", "out", "steps", "minutes"]
    assert "invalid choice" in refused("trane") and "required" in refused()

@pytest.mark.parametrize("option, missing", [
    ("-B", ""), ("-B", "triton"), ("-OO", "tiktoken numpy regex kernels")])
def test_importing_is_quiet_does_nothing_and_needs_only_torch(option, missing):
    code = f"""import os, sys; sys.modules.update(dict.fromkeys({missing.split()}))
sys.path.insert(0, {str(HERE)!r}); import gpt
print(os.listdir(), bool(gpt.NO_KERNELS), gpt.torch.cuda.is_initialized())
gpt.train(data='text.txt', steps=2, n_layer=1, n_embd=16, n_head=2, device='cpu')
gpt.sample(tokens=3); gpt.say('\\xe9')"""
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code, out, err = process(python=["-W", "error", option, "-c", code], env=ascii)
    assert code == 0 and out.startswith(f"['text.txt'] {'kernels' in missing} False\n"), err
    assert out.endswith("\n?\n")

def test_pasted_into_a_notebook_it_says_what_to_call_and_works(monkeypatch, capsys):
    for name in ("ipykernel", "kernels", "__main__"):  # these kernels are a foreign package
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    cell = vars(sys.modules["__main__"])
    exec(compile((HERE / "gpt.py").read_text("utf-8"), "<cell>", "exec"), cell)
    assert len(capsys.readouterr().out.splitlines()) == 2 and cell["NO_KERNELS"]
    with pytest.raises(cell["Error"], match="tinyshakespeare.*no network"):
        cell["train"](steps=20, device="cpu")
    tiny = dict(data="text.txt", device="cpu", n_embd=16, n_head=2, steps=2)
    assert cell["train"](**tiny)["step"] == 2 and len(cell["sample"](tokens=50)[0]) == 50

def test_what_the_readme_shows_runs(monkeypatch):
    monkeypatch.setattr(gpt, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(gpt.Run, "synchronise", lambda run: (run.step / 2, 0))  # two steps
    monkeypatch.setitem(gpt.SIZES, "tiny", dict(n_embd=16, block_size=16))
    for name in ("my.txt", "input.txt"):
        Path(name).write_text(TEXT + "MARA:")
    source = (HERE / "README.md").read_text("utf-8")
    bash, python = ("".join(re.findall(rf"```{language}\n(.*?)```", source, re.S))
                    for language in ("bash", "python"))
    lines = re.findall("gpt.py ([^#\n]+)", bash)
    assert len(lines) > 12
    for line in lines:
        code, _, err = run_main(*shlex.split(line))
        assert code == 0, (line, err)
    exec(python, names := dict(vars(gpt)))
    assert names["logits"].shape[:2] == (1, 5)

def test_the_source_keeps_its_promises():
    for name in ("gpt.py", "kernels.py"):
        source = (HERE / name).read_text("utf-8")
        assert not re.search(r"import (flash_attn|numpy)|numpy\(", source)
        for call in re.findall(r"\bopen\([^)]*\)|read_text\([^)]*\)|write_text\(.*\)", source):
            assert re.search("rb|wb|utf-8|def open", call), call
        assert max(map(len, source.splitlines())) <= 100

# --- Kernels -------------------------------------------------------------------------------------
# Without a GPU: Triton's interpreter, a small emulator of CUDA C++, and both compilers.

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

def have(*modules):
    return all(importlib.util.find_spec(module) for module in modules)

def load_kernels(old="", new=""):
    """A fresh kernels.py, whose ops take the place of an earlier one's; with a bug planted."""
    source, path = (HERE / "kernels.py").read_text("utf-8"), Path(tempfile.mkdtemp()) / "kernels.py"
    assert old in source, f"nothing to plant: {old!r} is not in kernels.py"
    path.write_text(source.replace(old, new), "utf-8")
    module = sys.modules["kernels_under_test"] = types.ModuleType("kernels_under_test")
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
    if os.environ.get("TRITON_INTERPRET") == "1":  # it runs anywhere, and pays for each program
        module.TILES = dict.fromkeys((64, 128), ((64, 64, 4, 1),) * 3)
        can = ("triton", FP32), ("triton", FP16)  # its products in bf16 are wrong
        module.cannot_run = lambda impl, device, dtype, *a: "" if (impl, dtype) in can else "no"
    return module

kernels = pytest.fixture(load_kernels)

def alone(interpret):
    """A test in a process of its own, for the whole of which Triton's interpreter is on or off."""
    def make(test):
        @pytest.mark.skipif(not have("triton", "numpy"), reason="needs triton and numpy")
        @functools.wraps(test)
        def run():
            code = f"import {Path(__file__).stem} as tests; tests.{test.__name__}.__wrapped__()"
            env = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": os.getcwd()}
            done = process(python=["-W", "ignore", "-c", code], cwd=HERE, env=env)
            assert done[0] == 0, done
        return run
    return make

in_interpreter = alone("1")

def random_inputs(H, H_kv, TQ, TK, D, dtype, gaps=False, device="cpu"):
    """q, k, v and a gradient; with gaps, parts of something longer, as of a cache."""
    torch.manual_seed(TQ + TK + D)
    shapes = (2, TQ, H, D), (2, TK, H_kv, D), (2, TK, H_kv, D), (2, TQ, H, D)
    made = [torch.randn(shape).to(device, dtype) for shape in shapes]
    if gaps:
        made = [torch.cat((x, x.new_full(x.shape, math.nan)), 1)[:, :x.shape[1]] for x in made]
    return made

def output_and_gradients(run, q, k, v, do):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*inputs)
    return o.detach(), *torch.autograd.grad(o, inputs, do.to(o.dtype))

def attention_error(kernels, case, run, device="cpu", **options):
    """Beside float64 autograd through the readable formula; a second run must give the same."""
    T, D, (H, H_kv), longer, gaps, dtype = case
    inputs = random_inputs(H, H_kv, T, max(T + longer, 1), D, dtype, gaps, device)
    run, formula = (functools.partial(f, **options) for f in (run, kernels.attention_reference))
    ours, again = (output_and_gradients(run, *inputs) for _ in range(2))
    truth = output_and_gradients(formula, *(x.double() for x in inputs))
    return kernels.worst_error(ours, truth) if all(map(torch.equal, ours, again)) else math.inf

REST = [(0, False, FP32), (51, False, FP16), (-13, False, FP32), (0, True, FP16), (51, True, FP32),
        (-13, True, FP16), (0, False, FP16)]
CASES = [((2, 17, 64, 77, 128)[i % 5], (16, 32, 64, 128)[i % 4], ((2, 2), (4, 2), (4, 1))[i % 3],
          *REST[i % 7]) for i in range(35)]  # all pairs: 5, 4, 3 and 7 have no common divisor
TOLERANCE = {FP64: 1e-12, FP32: 2e-6, FP16: 1e-3, BF16: 1e-2}

def check_softmax(softmax, n, dtype, device="cpu"):
    x = torch.randn(5, n).to(device, dtype)  # more rows than a block has
    x[0, 0] = 3e4  # a softmax without the maximum would overflow
    truth = x.double().softmax(-1)
    assert (softmax(x) - truth).norm() < TOLERANCE[dtype] * truth.norm()

def check_machine(device, impl, cases):
    """Everything once; on the interpreter too, so that no GPU meets a test that nobody has run."""
    kernels = load_kernels()
    for case in cases:
        if not kernels.cannot_run(impl, torch.device(device), case[-1], case[1]):
            error = attention_error(kernels, case, kernels.ATTENTION[impl], device)
            assert error < TOLERANCE[case[-1]], f"{impl} {case}: {error:.1e}"
    for n, dtype in itertools.product((1, 77, 3000), {case[-1] for case in cases}):
        check_softmax(kernels.softmax, n, dtype, device)
    if impl == "cuda":
        check_softmax(kernels.softmax_cuda, 300, FP32, device)
    test_loss_agrees_with_torch(kernels, device)
    run, why = kernels.choose(device, FP16, (1, 208, 4, 2, 64), impl)
    assert run is kernels.ATTENTION[impl] and impl in why

@in_interpreter
def test_triton_kernels_and_their_gradients_agree_with_float64():
    torch.use_deterministic_algorithms(True)  # every new tensor is full of NaN
    assert torch.empty(1).isnan()
    check_machine("cpu", "triton", CASES)

@in_interpreter
def test_planted_bugs_in_triton_are_seen():
    for old, new in (("", ""), ("n[None, :] <= row", "n[None, :] < row"),
                     (" - delta[None, :])", ")"), ("acc * alpha[:, None]", "acc"),
                     ("m0 + BM + TK - TQ)", "m0 + TK - TQ)"), ("h // (H // H_kv)", "h % H_kv")):
        kernels, case = load_kernels(old, new), (128, 64, (4, 2), 0, False, FP32)
        error = attention_error(kernels, case, kernels.attention_triton)
        assert not error < 1e-3 if old else error < 2e-6, (old, error)

@in_interpreter
def test_softmax_leaves_to_torch_what_does_not_fit():
    kernels = load_kernels()
    assert all(kernels.row_kernels_work(torch.device("cpu"), dtype) for dtype in (FP16, FP32))
    kernels.fused_softmax = None  # what does not fit does not come here
    for x in (torch.randn(2, 16385), torch.zeros(0, 3), torch.randn(2, 3, requires_grad=True)):
        assert torch.equal(kernels.softmax(x), x.softmax(-1))

@in_interpreter
def test_attention_is_one_op_in_a_compiled_graph_for_all_lengths():
    kernels, graphs = load_kernels(), []
    q, k, v, _ = (x.requires_grad_() for x in random_inputs(4, 2, 40, 40, 16, FP32))
    torch.library.opcheck(kernels.attention_forward, (q, k, v, 0.25, "triton"))
    run = torch.compile(lambda *a: kernels.attention_triton(*a).square().sum(), fullgraph=True,
                        dynamic=True, backend=lambda made, inputs: graphs.append(made) or made)
    for T in (40, 33, 57):
        part = [torch.randn(2, T, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        assert torch.allclose(run(*part), kernels.attention_sdpa(*part).square().sum(), rtol=1e-4)
    assert [made.code.count("gpt_kernels") for made in graphs] == [1]
    kernels.attention_triton(q, k, v).add_(1)  # the output is no view: it may change in place
    with torch.inference_mode():
        one = kernels.attention_triton(q[:, :1], k, v)  # a query beside a cache
        assert torch.allclose(one, kernels.attention_reference(q[:, :1], k, v), atol=1e-5)
    case = 9, 16, (4, 2), -3, False, FP32
    assert attention_error(kernels, case, kernels.attention_triton, causal=False) < 2e-6
    for bad in ((q, k[:, :5], v), (q[:1], k, v)):
        with pytest.raises(ValueError, match="fit"):
            kernels.attention_triton(*bad)

# Every CUDA thread is a thread. An instruction of the whole warp puts its operands into a table,
# waits for the other lanes, reads theirs and waits again. Fragments are the PTX manual's.
EMULATOR = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
using std::min; using std::max;
typedef unsigned int u32; typedef unsigned short u16;
struct alignas(16) uint4 { u32 x, y, z, w; };
static thread_local struct { int x, y; } threadIdx, blockIdx, gridDim;
static std::barrier<> block_barrier(128);
static struct { std::barrier<> barrier{32}; } warps[4];
void __syncthreads() { block_barrier.arrive_and_wait(); }
void sync_warp() { warps[threadIdx.x / 32].barrier.arrive_and_wait(); }
u16 half_bits(float f) { _Float16 x = f; u16 h; memcpy(&h, &x, 2); return h; }
static struct Lane { float x; _Float16 a[8], b[4]; const u16 *row; } table[128];
float shuffle_xor(float x, int m) {
    table[threadIdx.x].x = x; sync_warp();
    x = table[threadIdx.x ^ m].x; sync_warp(); return x;
}
void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
    Lane &own = table[threadIdx.x], *warp = &table[threadIdx.x / 32 * 32];
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    memcpy(own.a, a, 16); memcpy(own.b, &b0, 4); memcpy(own.b + 2, &b1, 4); sync_warp();
    for (int e = 0; e < 4; e++) for (int k = 0; k < 16; k++)
        c[e] += (float)warp[g * 4 + k % 8 / 2].a[k / 8 * 4 + e / 2 * 2 + k % 2]
              * (float)warp[(2 * t + e % 2) * 4 + k % 8 / 2].b[k / 8 * 2 + k % 2];
    sync_warp();
}
void load_transposed(u32 &b0, u32 &b1, const u16 *row) {
    Lane *warp = &table[threadIdx.x / 32 * 32];
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    table[threadIdx.x].row = row; sync_warp();
    b0 = warp[2 * t].row[g] | (u32)warp[2 * t + 1].row[g] << 16;
    b1 = warp[8 + 2 * t].row[g] | (u32)warp[9 + 2 * t].row[g] << 16; sync_warp();
}
CUDA_SOURCE
extern "C" void run(void (*kernel)(const Arguments), int gx, int gy, const Arguments *a) {
    std::jthread threads[128];  // joined at the end
    for (int i = 0; i < 128; i++) threads[i] = std::jthread([=] {
        threadIdx.x = i; gridDim = {gx, gy};
        for (int block = 0; block < gx * gy; block++) {
            blockIdx = {block % gx, block / gx};
            kernel(*a); __syncthreads();
        }
    });
}
"""

def emulated(monkeypatch, old="", new=""):
    """kernels.py whose CUDA launches run on the emulator, with a bug planted."""
    shutil.which("g++") or pytest.skip("needs g++")
    kernels, path = load_kernels(old, new), Path(tempfile.mkdtemp()) / "kernels.so"
    source = EMULATOR.replace("CUDA_SOURCE", kernels.CUDA_SOURCE)
    flags = "-O2 -std=c++20 -pthread -shared -fPIC -DEMULATE -D__device__= -D__global__="
    flags += " -D__shared__=static -D__forceinline__=inline -D__launch_bounds__(n)="
    flags += " -D__int_as_float(i)=INFINITY -xc++"
    subprocess.run(["g++", *flags.split(), "-", "-o", path], input=source, text=True, check=True)
    library = ctypes.CDLL(str(path))
    def launch(function, gx, gy, *rest):
        argument = ctypes.c_void_p.from_address(rest[-2])
        own_and_walked = (ctypes.c_size_t * 4).from_address(argument.value)
        assert all(pointer % 16 == 0 for pointer in own_and_walked), "16 bytes are loaded at once"
        library.run(function, gx, gy, argument)
        return 0,
    bindings = types.SimpleNamespace(driver=types.SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    kernels.cuda_function = lambda name, device: getattr(library, name)
    return kernels

def test_cuda_cpp_agrees_with_float64(monkeypatch):
    kernels = emulated(monkeypatch)
    for T, heads, longer, gaps in ((128, (2, 2), 0, False), (77, (4, 2), 0, True),
                                   (5, (2, 1), 125, True), (90, (2, 2), -50, False)):
        case = T, 64, heads, longer, gaps, FP16
        assert attention_error(kernels, case, kernels.attention_cuda) < 1e-3, case
    q, k, v, do = random_inputs(2, 2, 9, 9, 64, FP16)
    shifted = do.new_empty(do.numel() + 1)[1:].view(do.shape).copy_(do)
    a, b = (output_and_gradients(kernels.attention_cuda, q, k, v, d) for d in (do, shifted))
    assert all(map(torch.equal, a, b))
    check_softmax(kernels.softmax_cuda, 300, FP32)

@pytest.mark.parametrize("bug", [
    ("key > query + offset", "key >= query + offset"), (" - delta[i])", ")"),
    ("__syncthreads();         // the tiles are complete", ""),
    ("*y = p[2 * k + 1];", "*y = p[2 * k];")])
def test_planted_bugs_in_cuda_cpp_are_seen(bug, monkeypatch):
    kernels, case = emulated(monkeypatch, *bug), (128, 64, (1, 1), 0, False, FP16)
    assert not attention_error(kernels, case, kernels.attention_cuda) < 2e-3

def disassembled(cubin, spills=0):
    """Machine code for a GPU that is not here. No more registers go to memory than these."""
    import triton
    path, tools = Path(tempfile.mkdtemp()) / "cubin", Path(triton.__file__).parent / "backends"
    path.write_bytes(cubin)
    code = subprocess.check_output([tools / "nvidia/bin/nvdisasm", "-c", path], text=True)
    assert len(re.findall(r"\b(?:LDL|STL)\b", code)) <= spills
    return code

@alone("0")
def test_triton_compiles_to_tensor_cores_without_spills():
    """All that training launches at GPT-2's shapes, for GPUs that are not here."""
    most = {80: 101376, 90: 232448, 120: 101376}  # bytes; sm_86 has 8.0's tiles and less memory
    kernels, meta = load_kernels(), functools.partial(torch.empty, device="meta")
    for arch, D in itertools.product(most, (64, 128)):
        gpu, made = kernels.triton.backends.compiler.GPUTarget("cuda", arch, 32), []
        kernels.triton.runtime.driver.set_active(types.SimpleNamespace(
            get_current_target=lambda: gpu, get_current_device=lambda: arch,
            get_current_stream=lambda device: 0))
        kernels.launch = lambda f, grid, *a, **given: made.append(f.warmup(*a, grid=grid, **given))
        x, LSE = meta(16, 1024, 12, D, dtype=BF16), meta(16, 12, 1024)
        for which, rows in enumerate((1, 2, 2)):
            kernels.launch_triton(which, [x] * (4 + which) + [LSE] * rows, 0.125)
        logits = meta(1024, 50304, dtype=BF16)[:, :50257]
        kernels.fused_rows(logits, meta(1024, dtype=torch.int64), -1, True)
        kernels.fused_softmax(meta(8, 16384, dtype=BF16))
        for compiled in made:
            case = arch, compiled.metadata.name, D
            spills = 8 * (case == (120, "attention_dkv_kernel", 128))
            code = disassembled(compiled.asm["cubin"], spills)
            assert compiled.metadata.shared <= most[arch], case
            assert "attention" not in case[1] or re.search(r"\bH?GMMA\b|\bHMMA\b", code), case
            if case[1] == "cross_entropy_kernel":
                assert code.count("LDG.E.128") >= 2 and code.count("STG.E.128") >= 1
                assert code.count("LDG.E.U16") <= 1  # z[target]
        assert len(made) == 5

@pytest.mark.skipif(not have("cuda", "cuda.bindings", "nvidia", "triton"),
                    reason="needs cuda-bindings, nvidia-cuda-nvrtc and triton")
def test_cuda_cpp_compiles_to_tensor_cores_without_spills(kernels):
    for arch in (75, 80, 90, 120):
        code = disassembled(kernels.cuda_image(f"sm_{arch}"))
        parts = re.findall(r"\n\.text\.\w+:(.*?)(?=\n\s*\.section|$)", code, re.DOTALL)
        assert len(parts) == 4 and sum("HMMA" in part for part in parts) == 3

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_kernels_on_this_gpu(impl):
    kernels, device = load_kernels(), torch.device("cuda")
    if reason := kernels.cannot_run(impl, device, FP16, 64):
        pytest.skip(reason)
    check_machine("cuda", impl, [(*case, t) for t in (FP16, BF16) for *case, _ in CASES])
    print(*kernels.choose(device, FP16, (16, 1024, 12, 12, 64)))

def test_torch_attention_agrees_with_the_formula(kernels):
    for (*case, _), causal in itertools.product(CASES, (True, False)):
        if case[3] >= 0:  # torch's gives NaN to a query without keys
            error = attention_error(kernels, [*case, FP64], kernels.attention_sdpa, causal=causal)
            assert error < 1e-12, (case, causal)

@pytest.mark.parametrize("impl, capability, dtype, D, reason", [
    ("triton", (8, 0), FP16, 64, ""), ("triton", (12, 0), BF16, 128, ""),
    ("triton", (8, 0), FP32, 64, "fp16 or bf16"), ("triton", (8, 0), FP32, 0, ""),
    ("triton", (8, 0), FP16, 80, "or 128"), ("triton", (7, 5), FP16, 64, "(8, 0)"),
    ("triton", (7, 5), FP16, 0, ""), ("triton", (7, 5), BF16, 0, "(8, 0)"),
    ("cuda", (7, 5), FP16, 64, ""), ("cuda", (7, 5), FP16, 80, "heads of 64"),
    ("cuda", (7, 5), BF16, 64, "fp16"), ("cuda", (7, 0), FP16, 64, "(7, 5)")])
def test_rules_of_what_can_run(impl, capability, dtype, D, reason, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = kernels.cannot_run(impl, torch.device("cuda"), dtype, D)
    assert reason in why and bool(reason) == bool(why)
    assert "heads" in kernels.cannot_run(impl, torch.device("cuda"), FP16, 64, 2 ** 16)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "NVIDIA" in kernels.cannot_run(impl, torch.device("cuda"), dtype, D)

@pytest.mark.parametrize("device, ms, bug, cannot, name, says", [
    ("cuda", 1, None, "", "triton", "triton 1.00 ms, sdpa 2.00 ms"),
    ("cuda", 3, None, "", "sdpa", "triton 3.00 ms, sdpa 2.00 ms"),
    ("cuda", 1, 208, "", "sdpa", "it is 1.0e+00 away"),
    ("cuda", 1, ZeroDivisionError(), "", "sdpa", "it fails, ZeroDivisionError"),
    ("cuda", 1, None, "it is not here", "sdpa", "not triton: it is not here"),
    ("cuda", 1, torch.cuda.OutOfMemoryError(), "", "sdpa", "not enough memory"),
    ("mps", 0, None, "", "sdpa", "right"), ("mps", 0, 33, "", "plain", "away"),
    ("mps", 0, 16, "", "plain", "away")])
def test_the_faster_right_one_is_chosen(device, ms, bug, cannot, name, says, kernels, monkeypatch):
    tried, trials, times = "triton" if device == "cuda" else "sdpa", kernels.trials, [ms, 2]
    def planted(q, k, v, right=kernels.attention_sdpa):  # wrong for this many keys, or it fails
        if isinstance(bug, Exception):
            raise bug
        return right(q, k, v) * (1 + (k.shape[1] == bug))
    kernels.ATTENTION[tried] = planted
    kernels.trials = lambda names, device, *a: trials(names, "cpu", *a)
    kernels.cannot_run = lambda *a: cannot
    kernels.milliseconds = lambda run: times.pop(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choose = functools.partial(kernels.choose, device, FP32, (1, 16, 4, 2, 16))
    run, why = choose()
    assert run is kernels.ATTENTION[name] and why.startswith(name) and says in why
    if "ms" in says:
        assert choose(impl="triton")[0] is planted
    elif device == "cuda":
        with pytest.raises(ValueError, match="triton attention cannot be used"):
            choose(impl="triton")

def test_the_rule_on_a_cpu_and_requests(kernels):
    choose = functools.partial(kernels.choose, "cpu", FP32)
    for T, impl, name in ((256, "auto", "plain"), (257, "auto", "sdpa"), (99, "sdpa", "sdpa"),
                          (999, "plain", "plain")):
        run, why = choose((1, T, 2, 2, 16), impl)
        assert run is kernels.ATTENTION[name] and why.startswith(name)
    for impl, says in (("triton", "used: "), ("cuda", "device is cpu"), ("flash", "cannot")):
        with pytest.raises(ValueError, match=says):
            choose((1, 9, 2, 2, 16), impl)

def loss_inputs(dtype, device="cpu"):
    torch.manual_seed(1)
    made = [torch.randn(n, 16).to(device, dtype).requires_grad_() for n in (300, 301)]
    targets = torch.randint(301, (300,)).to(device)
    targets[::7] = -1
    return *made, targets

def loss_and_gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss * 1.7, inputs)

def test_loss_agrees_with_torch(kernels, device="cpu"):
    for dtype, tolerance in TOLERANCE.items():
        x, weight, targets = loss_inputs(dtype, device)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        truth = loss_and_gradients(kernels.plain_loss(*wide, targets), *wide)
        for kernels.SLICE in (2 ** 24, 300 * 301 - 1, 1):  # the plain formula, one slice, three
            ours = loss_and_gradients(kernels.linear_cross_entropy(x, weight, targets), x, weight)
            assert ours[0].dtype == torch.promote_types(dtype, FP32)
            assert kernels.worst_error(ours, truth) < 3 * tolerance, (dtype, kernels.SLICE)
        assert kernels.linear_cross_entropy(x, weight, targets.clamp(max=-1)).isnan()  # as torch's

@in_interpreter
def test_triton_loss_rows_agree_with_torch():
    kernels, padded = load_kernels(), torch.full((2, 320), math.nan)
    for target, nan in ((299, False), (300, True), (-2, True)):  # out of range: it shows
        loss = kernels.fused_rows(torch.zeros(1, 300), torch.tensor([target]), -1, False)
        assert loss.isnan().item() == nan
    padded[:, :300] = torch.randn(2, 300)
    z = padded[:, :300].clone()
    losses = [kernels.fused_rows(x, torch.tensor([3, -1]), -1, True) for x in (z, padded[:, :300])]
    assert torch.equal(*losses) and torch.equal(z, padded[:, :300]) and not padded.isnan().any()
    for plant, says in ((lambda z, *a: z[:, 0] * 0, "away"), (lambda *a: 1 / 0, "ZeroDivision")):
        kernels, inputs = load_kernels(), loss_inputs(FP32)
        kernels.fused_rows, kernels.SLICE = plant, 1
        with pytest.warns(UserWarning, match=says) as lines:
            losses = [kernels.linear_cross_entropy(*inputs) for _ in range(2)]
        assert len(lines) == 1 and torch.allclose(losses[1], kernels.plain_loss(*inputs))

def test_loss_under_autocast_no_grad_and_compile(kernels):
    kernels.SLICE, (x, weight, targets) = 1, loss_inputs(FP32)
    torch.use_deterministic_algorithms(True)  # what nobody has written is NaN
    with torch.autocast("cpu", BF16):
        losses = [f(x, weight, targets) for f in (kernels.linear_cross_entropy, kernels.plain_loss)]
    ours, plain = (loss_and_gradients(loss, x, weight) for loss in losses)
    assert all(t.dtype == FP32 for t in ours) and kernels.worst_error(ours, plain) < 1e-2
    op, inputs = kernels.summed_loss, (x.detach(), weight.detach(), targets, -1, False)
    assert op(*inputs)[1].numel() == 0
    with torch.inference_mode():
        kernels.linear_cross_entropy(x, weight, targets)
    torch.library.opcheck(op, inputs)
    torch.library.opcheck(op, (x, weight, targets, -1, True))
    compiled = torch.compile(kernels.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    ours, plain = (loss_and_gradients(f(x, weight, targets), x, weight)
                   for f in (compiled, kernels.plain_loss))
    assert kernels.worst_error(ours, plain) < 2e-6

MEMORY = """import sys, torch, kernels
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
x, weight = (torch.randn(n, 64, requires_grad=True) for n in (1024, 50257))
before = peak()
getattr(kernels, sys.argv[1])(x, weight, torch.randint(50257, (1024,))).backward()
print(peak() - before)"""

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loss_keeps_memory_low():
    grown = [float(subprocess.check_output([sys.executable, "-c", MEMORY, name], cwd=HERE))
             for name in ("linear_cross_entropy", "plain_loss")]
    assert grown[0] < 200 and grown[1] > 2.5 * grown[0], grown

def test_kernels_as_a_program(kernels, capsys):
    kernels.ATTENTION["sdpa"] = lambda *a: 1 / 0  # must not end the table
    assert kernels.main(["--json"]) == 1
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert "ZeroDivision" in rows.pop("attention sdpa")["failed"]
    assert {"attention plain", "softmax", "loss"} <= set(rows)
    assert all(row["error"] < 1e-5 and row["forward_ms"] > 0 for row in rows.values())
