"""Tests of gpt.py and kernels.py: `python -m pytest -q`. Quick, offline, in temporary folders."""
import contextlib, ctypes, functools, importlib.metadata, importlib.util, io
import itertools, json, math, os, pickle, random, re, shlex, shutil, signal, socket, struct
import subprocess, sys, tempfile, threading, time, types, zipfile
from dataclasses import dataclass, fields
from pathlib import Path

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
SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, batch_size=4, device="cpu", probe="")

def no_network(host, *rest, resolve=socket.getaddrinfo, **named):
    if host in (None, "localhost", "127.0.0.1", socket.gethostname()):
        return resolve(host, *rest, **named)
    raise OSError(f"a test asked for {host}")

@contextlib.contextmanager
def own_folder(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT_CACHE", str(folder / "cache"))
        patch.setattr(socket, "getaddrinfo", no_network)
        Path("text.txt").write_text(TEXT, "utf-8")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        yield folder

@pytest.fixture(autouse=True)
def elsewhere(tmp_path):
    with own_folder(tmp_path):
        yield

def train(**given):
    return gpt.train(**{**SMALL, "data": "text.txt", "steps": 6, **given})

def run_main(*words):
    """gpt.main -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = gpt.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()

def files():
    return {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and "cache" not in p.parts}

def refused(*words, code=2):
    """The one line that a command ends with; it has changed no file."""
    before = files()
    result, _, err = run_main(*words)
    assert result == code and err.count("error: ") == 1 and err.endswith("\n"), err
    line = err.split("error: ")[1]
    assert line.count("\n") == 1 and len(line) < 400 and files() == before
    return line

def start(*words, python=(HERE / "gpt.py",), **options):
    return subprocess.Popen([sys.executable, *python, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8", **options)

def process(*words, **options):
    """A real process -> (exit code, stdout, stderr)."""
    running = start(*words, **options)
    out, err = running.communicate(timeout=120)
    return running.returncode, out, err

def flags(**given):
    """The words for `train(**given)`."""
    given = {**SMALL, "data": "text.txt", "steps": 6, **given}
    words = [(f"--{name.replace('_', '-')}", str(v)) for name, v in given.items() if v is not None]
    return ["train", *itertools.chain.from_iterable(words)]

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
    def train_step(run):
        if run.step == step:
            act()
        return real(run)
    monkeypatch.setattr(gpt.Run, "train_step", train_step)

def offline(*a, **k):
    raise OSError("no network")

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    with own_folder(tmp_path_factory.mktemp("trained")) as folder:
        train(data=str(folder / "text.txt"), out=str(folder / "run"), steps=30)
    return str(folder / "run")

# --- Settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, given", [
    ("train --n-layer 3", {"n_layer": "3"}), ("train --n-layer=3", {"n_layer": "3"}),
    ("train --n_layer 3 --no-qk-norm", {"n_layer": "3", "qk_norm": False}),
    ("train --data a.txt --data b c", {"data": ["a.txt", "b", "c"]}),
    ("sample --prompt '-- create_table users'", {"prompt": "-- create_table users"}),
    ("sample --stop=--- --prompt=--n_layer", {"stop": "---", "prompt": "--n_layer"})])
def test_a_command_receives_what_was_written(words, given, monkeypatch):
    name, received = words.split()[0], {}
    monkeypatch.setitem(gpt.COMMANDS, name, spy := lambda **given: received.update(given))
    vars(spy).update(vars(getattr(gpt, name)))
    assert gpt.main(shlex.split(words)) == 0 and received == given

@pytest.mark.parametrize("given, settled", [
    (dict(size="gpt2"), dict(n_layer=12, pos="rope", n_kv_head=6)),
    (dict(size="gpt2", n_layer=3), dict(n_layer=3, n_head=12)),
    (dict(arch="gpt2", pos="rope"), dict(pos="rope", bias=True, n_kv_head=4)),
    (dict(arch="gpt2", size="gpt2"), dict(pos="learned", lr=2e-3)),
    (dict(arch="bigram", device="meta"), dict(n_layer=0)),
    (dict(device="meta"), dict(size="baby", n_layer=6)), (dict(), dict(size="tiny"))])
def test_a_flag_beats_size_which_beats_arch_which_beats_the_default(given, settled):
    s = gpt.Training.make({"device": "cpu", **given})
    assert settled == {name: getattr(s, name) for name in settled}

BAD = {"empty.txt": b"", "one.txt": b"a", "bad.txt": b"fine \xff", "d/.hidden.txt": b"hidden",
       "bad.jsonl": b'{"text": "fine"}\n["text"]\n', "keys.jsonl": b'{"content": "no text"}\n'}

@pytest.mark.parametrize("words, says", [
    ("--n-layr 3", "did you mean n_layer"), ("--n-embd 30", "not divisible"), ("word", "word"),
    ("--n-layer -1", "n_layer must be of type int from 0"), ("--n-layer two", "type int"),
    ("--n-layer 2.5", "type int"), ("--lr nan", "lr must"), ("--lr=-1", "lr must"),
    ("--lr inf", "lr must"), ("--lr", "--lr"), ("--seed 18446744073709551616", "seed must"),
    ("--n-head 4 --n-kv-head 3", "multiple"), ("--n-embd 12 --n-head 4", "even"),
    ("--mlp reglu", "relu2"), ("--batch-size 0", "from 1"), ("--dropout 1", "to 0.99"),
    ("--momentum 1", "to 0.999"), ("--steps 5 --minutes 1", "one of them"),
    ("--steps 5 --steps 6", "twice"), ("--epochs 3", "did you mean steps"),
    ("--data none.txt", "none.txt"), ("--data d", "'d': no file"), ("--data /dev/null", "no file"),
    ("--data empty.txt", "too little text"), ("--data one.txt", "too little text"),
    ("--block-size 5000", "too little text"),
    ("--data bad.txt", "bad.txt: not UTF-8"), ("--data bad.jsonl", "bad.jsonl: line 2"),
    ("--data keys.jsonl", "line 1"), ("--vocab-size 5", "size 5"),
    ("--tokenizer bpe --vocab-size 100", "256"), ("--device quantum", "quantum"),
    ("--resume", "ckpt.pt"), ("--init none.pt", "No such file"), ("--out text.txt", "text.txt"),
    ("--init text.txt", "not a checkpoint"), ("--device cpu --attention triton", "triton: ")])
def test_a_bad_request_is_one_line_and_writes_nothing(words, says):
    for name, content in BAD.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    data = [] if "--data" in words else ["--data", "text.txt"]
    assert says in refused("train", *data, *words.split()) and not Path("out").exists()

@pytest.mark.parametrize("call, given, says", [
    (gpt.train, dict(n_layr=3), "did you mean n_layer"), (gpt.evaluate, {}, "no run"),
    (gpt.train, dict(data="a long text " * 5000), "a long text"),
    (gpt.sample, dict(stop=["a"]), "stop must"),
    (gpt.sample, dict(temperature=-1), "temperature"), (gpt.train, dict(n_layer=2.5), "n_layer")])
def test_a_bad_call_raises_one_short_line(call, given, says):
    with pytest.raises(ValueError, match=says) as e:
        call(**given)
    assert type(e.value) is gpt.Error and len(str(e.value)) < 300 and "\n" not in str(e.value)

# --- Tokenizers ----------------------------------------------------------------------------------

AWKWARD = ["", "\n", "\x00", "a  b\r\n\r\n\tc ", "naïve café", "汉字かな交じり文", "🙂👩‍👩‍👧‍👦",
           "<|endoftext|>", "\ufeffx", " " * 70, "x" * 300, TEXT]
EXAMPLES = re.findall(r"`([^`\n]+ == [^`\n]+)`", Path(gpt.__file__).read_text("utf-8"))
GPT2 = pytest.param("gpt2", marks=pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR does not name its files"))

@pytest.mark.parametrize("example", EXAMPLES or ["no example was found"])
def test_the_examples_in_docstrings_are_true(example):
    assert eval(example, vars(gpt))

@pytest.fixture(scope="module")
def bpe():
    return gpt.BPETokenizer.train([TEXT, "汉字 " * 50], 300)

@pytest.mark.parametrize("kind", ["char", "bpe", GPT2])
def test_a_tokenizer_loses_nothing_not_even_in_a_checkpoint(kind):
    tokenizer, kept = gpt.TOKENIZERS[kind].train(AWKWARD, 0), io.BytesIO()
    torch.save(tokenizer.state(), kept)
    again = gpt.tokenizer_from(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    assert again.tokens == tokenizer.tokens and len(set(again.tokens)) == len(again.tokens)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert torch.equal(ids, again.encode(text))
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text

def test_a_character_that_a_model_has_never_seen_is_named():
    with pytest.raises(gpt.Error, match="ß"):
        gpt.CharTokenizer("abc").encode("aß")

def test_bpe_joins_the_commonest_pair_each_time(bpe):
    """Against the definition, slowly: encode with the merges so far, and count."""
    import regex
    words = regex.findall(gpt.GPT2_PATTERN, TEXT + "汉字 " * 50)
    words = [[bytes([byte]) for byte in word.encode()] for word in words]
    assert len(bpe.tokens) == 300
    for token in bpe.tokens[256:270]:
        pairs = gpt.Counter(pair for word in words for pair in zip(word, word[1:]))
        assert max(pairs.values()) == max(n for (a, b), n in pairs.items() if a + b == token)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] + word[i + 1] == token:
                    word[i:i + 2] = [token]
                i += 1

def test_end_of_text_is_ordinary_in_data_and_one_token_in_a_prompt(bpe):
    assert bpe.eot not in bpe.encode("<|endoftext|>")
    assert bpe.encode("<|endoftext|>", special=True).tolist() == [bpe.eot] == bpe.first

@pytest.mark.parametrize("kind", [GPT2])
def test_gpt2_tokenizer_is_tiktokens(kind):
    reference = pytest.importorskip("tiktoken").get_encoding(kind)
    ours = gpt.TOKENIZERS[kind].train((), 0)
    assert len(ours.tokens) == reference.n_vocab and ours.eot == reference.eot_token
    for text in [*AWKWARD, "extraordinarily " * 50_000]:
        assert ours.encode(text).tolist() == reference.encode_ordinary(text)

def test_what_cannot_be_downloaded_or_imported_is_one_line(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("tiktoken"), "get_encoding", offline)
    assert "no network" in refused(*flags(tokenizer="gpt2"))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install tiktoken" in refused(*flags(tokenizer="bpe"))

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

every_model = pytest.mark.parametrize("given", [dict(arch=arch) for arch in gpt.ARCHS] + [
    dict(pos="none", n_kv_head=1), dict(mlp="relu2", head_dim=6), dict(mlp="relu", bias=True)])

def test_gpt2_has_exactly_its_parameters():
    layers, heads, channels = gpt.GPT2_SIZES["gpt2"]
    shape = dict(vocab_size=50257, n_layer=layers, n_head=heads, n_embd=channels, block_size=1024)
    with torch.device("meta"):
        assert gpt.count_parameters(make("gpt2", **shape)) == 124_439_808

@every_model
def test_the_first_loss_is_that_of_knowing_nothing(given):
    ids = torch.randint(50, (8, 17))
    assert abs(make(**given)(ids[:, :-1], ids[:, 1:]).item() / math.log(50) - 1) < 0.03

@every_model
def test_no_prediction_sees_a_later_token(given):
    model, ids = scramble(make(**given)), torch.randint(50, (1, 16))
    a, b = model(ids), model(torch.cat((ids[:, :9], (ids[:, 9:] + 1) % 50), dim=1))
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-5)
    assert not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-2)

@every_model
def test_cached_logits_are_the_uncached_ones_at_every_position(given):
    model, ids = scramble(make(**given)), torch.randint(50, (3, 16))
    cache, logits = gpt.KVCache(model, 3), model(ids)
    cached = [model(part, cache=cache) for part in ids.split([5, 1, 1, 6, 3], dim=1)]
    assert torch.allclose(torch.cat(cached, dim=1), logits, atol=1e-4) and cache.length == 16
    assert torch.allclose(model(ids, last=True), logits[:, -1:], atol=1e-5)

@every_model
def test_the_loss_is_the_mean_over_targets_that_count(given):
    model, ids = scramble(make(**given)), torch.randint(50, (2, 9))
    logs = model(ids[:, :4]).double().log_softmax(-1).gather(-1, ids[:, 1:5, None])
    targets = ids[:, 1:].index_fill(1, torch.arange(4, 8), -1)
    assert model(ids[:, :-1], targets).item() == pytest.approx(-logs.mean().item(), rel=1e-5)

@pytest.mark.parametrize("H_kv, TQ", [(4, 7), (2, 7), (1, 7), (2, 3), (4, 1)])
def test_every_attention_is_the_sum_of_its_definition(H_kv, TQ):
    """Outputs and gradients in float64; the queries are the newest of the positions."""
    shapes = (2, TQ, 4, 8), (2, 7, H_kv, 8), (2, 7, H_kv, 8)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    def one(b, t, h):
        seen, group = 7 - TQ + t + 1, h * H_kv // 4
        scores = k[b, :seen, group] @ q[b, t, h] / math.sqrt(8)
        return scores.softmax(0) @ v[b, :seen, group]
    places = itertools.product(range(2), range(TQ), range(4))
    wanted = torch.stack([one(*place) for place in places]).view(2, TQ, 4, 8)
    named = "attention_reference", "attention_sdpa"
    kernels = [] if gpt.NO_KERNELS else [getattr(gpt.kernels, name) for name in named]
    for attend in (gpt.attention, gpt.fused_attention, *kernels):
        got = attend(q, k, v)
        a, b = (torch.autograd.grad((x ** 2).sum(), (q, k, v), retain_graph=True)
                for x in (wanted, got))
        assert torch.allclose(wanted, got) and all(map(torch.allclose, a, b))

@pytest.mark.parametrize("impl, plain", [("auto", True), ("plain", True), ("sdpa", False)])
def test_an_attention_that_was_changed_is_never_silently_ignored(impl, plain, monkeypatch):
    def window(q, k, v):
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool).tril().triu(-3)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    model = make()
    assert gpt.choose_attention(model, impl, torch.float32).startswith("plain") == plain
    assert (model.blocks[1].attn.attend is gpt.attention) == plain
    changed = make()
    changed.blocks[1].attn.attend = window
    assert "does not agree" in gpt.choose_attention(changed, impl, torch.float32)
    assert changed.blocks[1].attn.attend is window
    monkeypatch.setattr(gpt, "attention", window)
    model = make()
    assert ("does not agree" in gpt.choose_attention(model, impl, torch.float32)) != plain
    assert all(block.attn.attend is window for block in model.blocks)
    maps = gpt.attention_maps(model, torch.arange(16))
    assert all((layer.tril(-4) == 0).all() for layer in maps)  # the page shows what is so

def test_rope_scores_depend_on_distance_alone():
    model, q, k = make(block_size=64), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    def score(i, j):
        places = (q, i), (k, j)
        q_turned, k_turned = (gpt.apply_rope(x, model.cos[[t]], model.sin[[t]]) for x, t in places)
        return (q_turned * k_turned).sum().item()
    assert score(5, 3) == pytest.approx(score(40, 38), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-2)

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
    Path("d/deep/folder.txt").mkdir(parents=True)
    Path("d/.git").mkdir()
    for name in ("d/.hidden.txt", "d/.git/x.txt", "d/gpt.py", "d/log.jsonl"):
        Path(name).write_text("no")
    Path("d/dangling.txt").symlink_to("nowhere")
    Path("d/a.txt").write_bytes(b"\xef\xbb\xbfone\r\n" + b"." * 20)
    Path("d/deep/B.TXT").write_text("два", "utf-8")
    Path("c.jsonl").write_text('{"text": "half \\ud83d"}\n\n{"text": "three\\n"}\n')
    one = "one\r\n" + "." * 20
    assert text_of("d") == text_of("~/d") == one + "два" and text_of("d/*.txt") == one
    shutil.copytree("d", "d[1]", symlinks=True)
    assert text_of("d[1]") == text_of("d")
    assert text_of("c.jsonl", "d/deep/B.TXT", "d/a.txt") == "half \ufffdthree\nдва" + one

def test_documents_are_separated_where_the_tokenizer_can(bpe):
    Path("a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    ids = gpt.load_tokens(["a.jsonl", "text.txt"], bpe).ids.tolist()
    assert bpe.decode(ids) == "<|endoftext|>".join(["one", "two", TEXT]) and ids.count(bpe.eot) == 2

@pytest.mark.parametrize("size", [20, 50, 10_000])
@pytest.mark.parametrize("text", ["a\n\n  \n b\n\nc \n d\r\ne\tf\n" * 30, "abc\r\n" * 300, TEXT],
                         ids=range(3))
def test_text_is_cut_into_short_pieces_and_no_token_changes(text, size, bpe):
    """Guards against Windows' line ends and the like, for which a text was one piece."""
    Path("t.txt").write_bytes(text.encode())
    pieces = list(gpt.read_pieces([Path("t.txt")], size))[1:]
    assert "".join(pieces) == text and max(map(len, pieces)) <= 3 * size
    assert torch.equal(torch.cat([bpe.encode(piece) for piece in pieces]), bpe.encode(text))

@pytest.mark.parametrize("tokenizer", ["char", "bpe", GPT2])
def test_a_million_spaces_are_no_obstacle(tokenizer):
    Path("t.txt").write_text(text := "a" + " " * 999_999 + "b")
    assert text_of("t.txt", tokenizer=tokenizer) == text

def test_tokens_are_kept_and_found_again_but_not_for_other_text(monkeypatch):
    first = gpt.load_tokens(["text.txt"])
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "write_tokens", lambda *a: pytest.fail("tokenised twice"))
        again = gpt.load_tokens(["text.txt"])
    assert torch.equal(first.ids, again.ids) and first.fingerprint == again.fingerprint
    next(Path("cache").glob("*.bin")).unlink()  # somebody tidied up
    assert text_of("text.txt") == TEXT
    Path("text.txt").write_text(TEXT[1:])
    assert gpt.load_tokens(["text.txt"]).fingerprint != first.fingerprint

def test_an_interrupted_tokenisation_leaves_nothing_that_looks_whole(monkeypatch):
    def interrupted(*a):
        yield "To be"
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpt, "read_pieces", interrupted)
        gpt.load_tokens(["text.txt"], gpt.CharTokenizer(TEXT))
    assert not os.listdir("cache") and text_of("text.txt") == TEXT

@pytest.mark.parametrize("count", [40_000, 70_000])
def test_a_large_vocabulary_fits_between_documents_too(count):
    text = "".join(map(chr, range(0x20000, 0x20000 + count)))
    Path("v.jsonl").write_text((json.dumps({"text": text}) + "\n") * 2)
    assert text_of("v.jsonl") == text * 2

def test_windows_reach_the_last_token_and_differ_between_processes_and_steps():
    ids = torch.arange(20).to(torch.uint16)
    seen = torch.cat([gpt.get_batch(ids, 4, (2, 1, 8), 0, 1, step) for step in range(40)])
    assert seen.shape == (640, 5) and seen.max() == 19 and seen.min() == 0
    both = gpt.get_batch(ids, 4, (1, 1, 8), 0, 1, 3)
    halves = [gpt.get_batch(ids, 4, (1, 2, 4), rank, 1, 3) for rank in (0, 1)]
    assert torch.equal(both, torch.cat(halves)) and not torch.equal(*halves)

@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_a_run_sees_every_part_of_the_text_equally_often(seed):
    """Guards against places drawn by chance, which leave one in twenty unseen in three passes."""
    ids, T = torch.arange(10_000), 50
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

def test_a_limited_loss_looks_at_the_same_few_windows_each_time():
    model, ids = scramble(make()), torch.randint(50, (1000,))
    first, again = (gpt.estimate_loss(model, ids, limit=100) for _ in range(2))
    assert first == again and 80 < first[1] <= 100

ODD = ["a b" * 99, "\n" * 5000, "a\0b\0" * 20, "\ufeffabc" * 9, "a\r\nb\r\n" * 30, "x" * 3_000_000,
       "漢字かな交じり文。" * 30, "🙂🏳️‍🌈👩‍👩‍👧" * 20, "a" + " " * 999_999 + "b"]

@pytest.mark.parametrize("tokenizer, vocab_size", [("char", 0), ("bpe", 260)])
@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_any_text_trains_and_samples(text, tokenizer, vocab_size):
    Path("t.txt").write_bytes(text.encode())
    train(data="t.txt", steps=2, tokenizer=tokenizer, vocab_size=vocab_size, seed=2 ** 64 - 1)
    for prompt in ("", text[:1], "漢\ud800"):
        if tokenizer == "bpe" or prompt in text:
            assert gpt.sample(prompt=prompt, tokens=20, seed=2 ** 64 - 1)

# --- Training ------------------------------------------------------------------------------------

def test_orthogonalise_gives_every_singular_value_about_one():
    for shape in ((2, 16, 64), (3, 48, 16)):
        values = torch.linalg.svdvals(gpt.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3

@pytest.mark.parametrize("arch, optimizer, lr", [
    ("qwen3", "muon", 3e-3), ("gpt2", "muon", 3e-3), ("gpt2", "adamw", 3e-3),
    ("bigram", "muon", 0.03)])
def test_every_parameter_has_exactly_one_optimizer_and_learns(arch, optimizer, lr):
    model, ids = make(arch), torch.randint(50, (4, 17))
    optimizers = gpt.make_optimizers(model, gpt.Training(optimizer=optimizer, lr=lr))
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    first = model(ids[:, :-1], ids[:, 1:]).item()
    for _ in range(20):
        model(ids[:, :-1], ids[:, 1:]).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert model(ids[:, :-1], ids[:, 1:]).item() < first - 0.5

def test_only_the_first_run_of_a_process_counts_from_the_start_of_the_command():
    """Guards against an ablation by minutes whose second run is over before it begins."""
    gpt.train.started = time.monotonic() - 1000
    assert train(out="a")["seconds"] > 1000 > 100 > train(out="b")["seconds"]

def test_learning_rate_rises_over_the_warmup_and_ends_at_zero():
    shares = [gpt.lr_share(step, step / 10, warmup=3) for step in range(11)]
    assert shares[0] == 0.25 and shares[3] == 0.7 and shares[10] == 0 and max(shares) == shares[3]

def test_precision_follows_capability_not_emulation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    for capability, dtype in {(9, 0): "bfloat16", (8, 0): "bfloat16", (7, 5): "float16",
                              (6, 1): "float32"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert gpt.pick_dtype("auto", torch.device("cuda")) == getattr(torch, dtype)
    assert gpt.pick_dtype("auto", torch.device("cpu")) == torch.float32

def test_two_runs_are_the_same_to_the_last_bit():
    a, b = train(out="a"), train(out="b")
    assert same("a", "b") and a["train_loss"] == b["train_loss"]
    train(out="c", seed=1)
    assert not same("a", "c")

HARD = dict(steps=20, dropout=0.1, accum=2, eval_every=7)  # with Muon, whose state is saved too

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with own_folder(tmp_path_factory.mktemp("whole")) as folder:
        train(**HARD)
    return folder / "out"

@pytest.mark.parametrize("name, step", [("SIGINT", 9), ("SIGTERM", 7), ("SIGHUP", 1)])
def test_a_run_stopped_by_a_signal_goes_on_exactly(name, step, whole, monkeypatch):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    before_step(monkeypatch, step - 1, lambda: signal.raise_signal(number))
    stopped = train(**HARD)
    assert stopped["step"] == step
    assert (stopped["signal"], signal.getsignal(number)) == (number, before)
    monkeypatch.undo()
    assert gpt.train(resume=True)["step"] == 20 and same("out", whole)

def test_what_came_after_the_last_checkpoint_is_done_again(whole, monkeypatch):
    before_step(monkeypatch, 10, lambda: shutil.copy("out/ckpt.pt", "seven.pt"))
    train(**HARD)
    shutil.move("seven.pt", "out/ckpt.pt")
    with open("out/log.jsonl", "a") as file:
        file.write('{"step": 2')  # its process died in the middle of a line
    gpt.train(resume=True)
    assert same("out", whole)

def test_signals_that_belong_to_others_are_left_alone(monkeypatch):
    with gpt.interruptible() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):  # the second leaves at once
            signal.raise_signal(signal.SIGINT)
    for mine in (None, signal.SIG_IGN):  # a C host's; nohup's
        with monkeypatch.context() as patch:
            patch.setattr(signal, "getsignal", lambda number: mine)
            patch.setattr(signal, "signal", lambda *a: pytest.fail())
            with gpt.interruptible():
                pass
    thread = threading.Thread(target=train)  # where Python allows no handlers
    thread.start()
    thread.join()
    assert log()[-1]["step"] == 6

def test_resuming_refuses_another_run_but_takes_more_steps():
    train(probe="to be")
    Path("other.txt").write_text(TEXT[::-1])
    for words, says in {"--data other.txt": "not the text", "--n-layer 3": "n_layer is 2",
                        "--seed 1": "seed", "--optimizer adamw": "optimizer is muon"}.items():
        assert says in refused("train", "--resume", *words.split())
    old = log()
    Path("copy.txt").write_text(TEXT)  # the same text, whatever its file is called
    assert run_main("train", "--resume", "--steps", 9, "--data", "copy.txt")[0] == 0
    new = log()
    assert new[:len(old)] == old and [r["step"] for r in new] == [*range(10)]
    code, out, _ = run_main("train", "--resume")
    assert code == 0 and "complete at step 9" in out and log() == new

def test_a_repeated_command_never_loses_a_run():
    train(out="r")
    line = refused(*flags(out="r"))
    assert all(word in line for word in ("--resume", "--out", "--overwrite"))
    refused(*flags(out="r", data="nowhere.txt"), "--overwrite")
    os.rename("r/ckpt.pt", "kept.pt")
    assert "--overwrite" in refused(*flags(out="r"))  # best.pt alone is a run too
    assert train(out="r", overwrite=True, steps=2)["step"] == 2 and len(log("r")) == 3

def test_looks_are_at_powers_of_two_and_twenty_even_distances(monkeypatch):
    cost, real = [], gpt.estimate_loss
    def spy(model, ids, *how):
        loss, counted = real(model, ids, *how)
        cost.append(counted)
        return loss, counted
    monkeypatch.setattr(gpt, "estimate_loss", spy)
    train(steps=200)
    even = {math.ceil(200 * k / 20) for k in range(21)}
    assert [r["step"] for r in log()] == sorted(even | {1, 2, 4, 8, 16, 32, 64, 128})
    assert len(set(cost)) == 1 and 0 < cost[0] <= 200 * 4 * 16 / 250  # always the same windows
    train(steps=20, eval_every=7, overwrite=True)
    assert [r["step"] for r in log()] == [0, 7, 14, 20]

def test_minutes_end_on_time_with_the_schedule_complete():
    begun = time.monotonic()
    code, out, err = process(*flags(steps=None, minutes=0.1))
    assert code == 0 and 3 < time.monotonic() - begun < 6 + 1.5, err
    assert log()[-1]["lr"] < 0.1 * gpt.Training.lr and log()[-1]["step"] > 20

def test_minutes_go_to_training_not_to_looking(monkeypatch):
    """Where a look takes as long as ten steps, four fifths of the time are still for steps."""
    spent, estimate = [], gpt.estimate_loss
    def slow(*a):
        begun = time.monotonic()
        time.sleep(0.05)
        result = estimate(*a)
        spent.append(time.monotonic() - begun)
        return result
    monkeypatch.setattr(gpt, "estimate_loss", slow)
    result = train(steps=None, minutes=0.1)
    assert sum(spent) < 0.2 * result["seconds"] < 1.4

@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["embed.weight", "blocks.0.mlp.up.weight"])  # AdamW's and Muon's
def test_a_gradient_that_is_not_finite_changes_nothing(name, dtype, monkeypatch):
    """Both optimizers step or neither, with a loss scale too."""
    seen, bad, honest, run = [], {3}, torch.nn.utils.clip_grad_norm_, {}
    def clip(parameters, limit):
        model = run["model"]
        if len(seen) in bad:
            model.get_parameter(name).grad[0, 0] = math.nan
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return honest(model.parameters(), limit)
    make_optimizers = gpt.make_optimizers
    monkeypatch.setattr(gpt, "make_optimizers",
                        lambda model, s: run.update(model=model) or make_optimizers(model, s))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train(dtype=dtype)
    assert equal(seen[3], seen[4]) and not equal(seen[4], seen[5])
    bad = set(range(10, 100))
    with pytest.raises(gpt.Error, match="20 steps") as error:
        train(steps=100, overwrite=True, dtype=dtype)
    assert error.value.code == 1 and all(t.isfinite().all() for t in weights("out").values())

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_is_one_line_with_what_helps(error, monkeypatch):
    def broken(*a, **k):
        raise error
    monkeypatch.setattr(gpt.Run, "train_step", broken)
    code, _, err = run_main(*flags())
    assert code == 1 and err.count("\n") == 1
    assert all(word in err for word in ("batch_size", "accum", "checkpoint_activations"))

def test_a_compiler_that_fails_is_not_needed(monkeypatch, capsys):
    def broken(*a):
        raise RuntimeError("no C++ compiler")
    monkeypatch.setattr(torch, "compile", lambda model: broken)
    assert train(compile="on")["step"] == 6 and "no C++ compiler" in capsys.readouterr().err

def test_a_compiled_model_is_compiled_once_and_saved_without_its_wrapper(monkeypatch):
    from torch._dynamo.testing import CompileCounter
    counter, real = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=counter))
    train(compile="on", dropout=0.1, steps=2)
    once = counter.frame_count
    train(compile="on", dropout=0.1, steps=9, out="more")
    assert counter.frame_count == once > 0  # the same code, whatever the run
    assert weights("out").keys() == make().state_dict().keys()

def test_the_best_model_is_kept_and_memorising_said_once(monkeypatch, capsys):
    values = iter([4.0, 2.0, 2.1, 2.2, 2.3, 1.9, 2.1, 2.2, 2.3])
    monkeypatch.setattr(gpt, "estimate_loss", lambda *a: (next(values), 1))
    train(steps=8, eval_every=1)
    err = capsys.readouterr().err
    assert err.count("by heart") == 1 and "dropout" in err
    best, last = (gpt.read_checkpoint(Path("out", name)) for name in ("best.pt", "ckpt.pt"))
    assert (best["step"], best["val_loss"], last["step"], last["val_loss"]) == (5, 1.9, 8, 2.3)

def test_the_log_is_for_programs_and_the_lines_for_people(capsys):
    train()
    lines, out = log(), capsys.readouterr().out
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[0]["val_loss"] == pytest.approx(math.log(len(set(TEXT))), rel=0.03)
    assert lines[-1]["tokens"] == 6 * 4 * 16 and lines[-1]["tokens_per_second"] > 0
    assert {"seconds", "train_loss", "lr", "grad_norm", "memory_mb", "val_loss"} <= lines[-1].keys()
    shown = re.findall(r"val (\S+) \((\S+) bits per byte", out)
    assert len(shown) == 7 and float(shown[-1][0]) == pytest.approx(lines[-1]["val_loss"], abs=1e-4)
    assert all(float(bits) == pytest.approx(float(loss) / math.log(2), rel=0.01)
               for loss, bits in shown)
    gpt.append_line(Path("x.jsonl"), {"norm": math.inf, "lens": [["NaN", math.nan]], "loss": 1.5})
    read = json.loads(Path("x.jsonl").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    assert read == {"norm": None, "lens": [["NaN", None]], "loss": 1.5}

@pytest.mark.parametrize("characters, steps", [(3400, 240), (800, 100)])
def test_a_run_without_steps_sees_its_text_five_times_and_says_so(characters, steps, monkeypatch):
    def count(run):
        run.step += 1
        run.last["train_loss"] = 1.0
    monkeypatch.setattr(gpt.Run, "train_step", count)
    Path("text.txt").write_text(TEXT[:characters])
    code, out, err = run_main(*flags(steps=None))
    assert code == 0 and log()[-1]["step"] == steps
    said = re.search(r"1 file, ([\d,]+) tokens.* (\S+) times in (\d+) steps", out)
    seen = steps * 64 / int(0.9 * characters)
    assert said[1] == f"{characters:,}" and float(said[2]) == pytest.approx(seen, rel=0.05)
    assert int(said[3]) == steps

def test_a_run_can_go_on_in_another_precision():
    """float16 needs a loss scale, of which a run in float32 has none: on the way to a T4."""
    train(steps=4)
    for step, dtype in ((6, "float16"), (8, "bfloat16"), (9, "float32")):
        assert gpt.train(resume=True, steps=step, dtype=dtype, device="cpu")["step"] == step

def test_fine_tuning_keeps_weights_and_tokenizer_and_starts_anew():
    train(out="base", steps=30)
    learnt = log("base")[-1]["val_loss"]
    Path("more.txt").write_text("not to be " * 50)
    result = gpt.train(init="base", data="more.txt", out="fine", steps=3, batch_size=2, probe="")
    state = gpt.read_checkpoint(Path("fine/ckpt.pt"))
    assert result["step"] == 3 and state["tokenizer"]["chars"] == "".join(sorted(set(TEXT)))
    assert state["settings"]["lr"] == pytest.approx(gpt.Training.lr / 10)
    assert state["settings"]["n_embd"] == 32 and log("fine")[0]["val_loss"] < learnt + 1
    dropped = gpt.train(init="base", data="more.txt", out="d", steps=3, batch_size=2, dropout=0.5)
    assert dropped["train_loss"] != result["train_loss"]  # its own, not that of the base
    assert "n_embd is 32" in refused("train", "--init", "base", "--n-embd", "64", "--out", "x")

def test_two_processes_give_the_weights_of_one():
    """Gradients are averaged once a step; the processes see different halves of one batch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    two = dict(steps=10, dtype="float64", batch_size=2, accum=2, eval_every=2)
    code, out, err = process("--nproc-per-node", "2", "--master-port", port, HERE / "gpt.py",
                             *flags(**two, out="two"), python=["-m", "torch.distributed.run"])
    assert code == 0 and out.count("step 10  ") == 1, err
    train(**{**two, "batch_size": 4})
    a, b = weights("out"), weights("two")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)

# --- Sampling ------------------------------------------------------------------------------------

def test_eval_gives_the_loss_that_training_gave_in_half_precision_too():
    """With rounded weights it would be another model's."""
    Path("text.txt").write_text(TEXT[:160])  # so short that all of the split is looked at
    train(dtype="bfloat16", steps=30)
    best = gpt.read_checkpoint(Path("out/best.pt"))["val_loss"]
    assert gpt.evaluate(dtype="bfloat16", device="cpu")["loss"] == pytest.approx(best, abs=2e-4)

@pytest.mark.parametrize("how, kept", [
    (dict(temperature=0), {0}), (dict(), {0, 1, 2, 3}), (dict(top_k=2), {0, 1}),
    (dict(top_k=99), {0, 1, 2, 3}), (dict(top_p=0.49), {0}), (dict(top_p=0.51), {0, 1}),
    (dict(top_p=0.01), {0}), (dict(top_p=0.96), {0, 1, 2, 3}),
    (dict(top_p=0.9, top_k=3), {0, 1, 2}),
    (dict(temperature=0.05), {0}), (dict(temperature=1e-38), {0})])
def test_greedy_top_k_and_top_p_keep_what_they_should(how, kept):
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log().expand(2000, 4)  # likeliest: 1, 0, 3, 2
    rows = gpt.sample_next(logits, gpt.Sampling(**{"temperature": 1, **how}), torch.Generator())
    assert {[1, 0, 3, 2].index(i) for i in rows.tolist()} == kept
    if how == {}:
        assert rows.bincount() / 2000 == pytest.approx([0.3, 0.5, 0.05, 0.15], abs=0.05)

def test_logits_that_are_not_finite_are_an_error_not_a_token():
    with pytest.raises(gpt.Error, match="not finite"):
        gpt.sample_next(torch.tensor([[0.0, math.nan]]), gpt.Sampling(), None)

@pytest.mark.parametrize("arch, prompt", [*itertools.product(gpt.ARCHS, (1, 16)), ("qwen3", 40)])
def test_the_cache_changes_nothing_across_the_edge_of_the_context(arch, prompt, monkeypatch):
    model, idx = scramble(make(arch, n_kv_head=2)), torch.randint(50, (2, prompt))
    honest, logits, runs = gpt.sample_next, [], []
    monkeypatch.setattr(gpt, "sample_next", lambda x, *a: logits.append(x) or honest(x, *a))
    for cache in (True, False):
        how = gpt.Sampling(temperature=0, cache=cache, tokens=70)
        runs.append(torch.stack(list(gpt.generate(model, idx, how))))
    assert torch.equal(*runs)
    for cached, uncached in zip(logits[:70], logits[70:]):
        assert (cached - uncached).abs().max() < 1e-4 * max(1, uncached.abs().max())

@pytest.mark.parametrize("text, stop, pieces", [
    (b"\xe6\xb1\x89", "", ["", "", "汉", ""]), (b"ab\xff", "", ["a", "b", "\ufffd", ""]),
    (b"aababcd", "abc", ["", "a", "", "", "", "ab"]), (b"aaba", "abc", ["", "a", "", "ab", "a"])])
def test_streamed_text_never_breaks_a_character_and_stops_where_told(text, stop, pieces):
    tokenizer = types.SimpleNamespace(tokens=[bytes([i]) for i in range(256)])
    streamed = list(gpt.stream_text(tokenizer, iter(text), stop))
    assert "".join(streamed) == "".join(pieces) and "\ufffd" not in "".join(streamed[:2])
    if not stop:
        assert streamed == pieces

def test_a_sample_is_its_prompt_and_then_text_and_nothing_else(trained, monkeypatch):
    monkeypatch.setattr(gpt, "find_files", lambda *a: pytest.fail("read the data"))
    monkeypatch.setattr(torch, "compile", lambda *a: pytest.fail("compiled"))
    how = ("sample", "--out", trained, "--prompt", "To be", "--tokens", 40)
    code, out, err = run_main(*how, "--seed", 3)
    assert code == 0 and out.startswith("To be") and len(out) == 46
    assert f"{trained}/best.pt: step " in err and "ckpt.pt" in err and "tokens/s" in err
    assert run_main(*how, "--seed", 3, "--no-cache")[1] == out != run_main(*how, "--seed", 4)[1]
    several = gpt.sample(out=trained, prompt="To be", tokens=9, num=3)
    assert len(set(several)) == 3 and all(len(text) == 14 for text in several)
    assert run_main(*how[:5], "--num", 2, "--tokens", 0)[1] == "To be\n---\nTo be\n"

@pytest.mark.parametrize("prompt, stdin, text, says", [
    ("", "", "", ""), (TEXT[:300], "", TEXT[:300], "sees 16"),
    ("@p.txt", "", "or not\n", ""), ("-", "be\n", "be", "")])
def test_prompts_of_any_kind_are_met(prompt, stdin, text, says, trained, monkeypatch):
    Path("p.txt").write_bytes(b"\xef\xbb\xbfor not\n\n")
    stream = types.SimpleNamespace(buffer=io.BytesIO(stdin.encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    code, out, err = run_main("sample", "--out", trained, "--prompt", prompt, "--tokens", 3)
    assert code == 0 and out[:-4] == text and says in err

@pytest.mark.parametrize("words, says", [
    (["--temperature=-1"], "temperature"), (["--top-p", "1.5"], "top_p"),
    (["--prompt", "@no"], "No such"), (["--tokens", "-5"], "tokens"), (["--num", "0"], "num"),
    (["--prompt", "zTß🙂\ud800"], "'z' 'ß' '🙂'"), (["--prompt", "@@p.txt"], "'@' 'p'"),
    (["--temprature", "1"], "did you mean temperature"), (["--stop", "---"], "--stop=---"),
    (["--seed", "18446744073709551616"], "seed"), (["--top-k", "1", "--top-k", "2"], "twice")])
def test_bad_requests_to_sample(trained, words, says):
    assert says in refused("sample", "--out", trained, *words)

def test_a_sample_ends_at_the_end_of_text_and_does_not_show_it(trained, monkeypatch):
    rows = [torch.tensor([i]) for i in (3, 5, 9, 3)]
    monkeypatch.setattr(gpt, "generate", lambda *a: iter(rows))
    load = gpt.load_model
    def with_ends(*a):
        model, tokenizer = load(*a)
        tokenizer.ends = {9}
        return model, tokenizer
    monkeypatch.setattr(gpt, "load_model", with_ends)
    letters = gpt.load_model(trained)[1].chars
    assert gpt.sample(out=trained) == [letters[3] + letters[5]]

def test_eval_is_the_direct_sum_and_knows_bytes(trained):
    Path("more.txt").write_text("that is the question.\n" * 3)
    result = gpt.evaluate(out=trained, data="more.txt", stride=1)
    model, tokenizer = gpt.load_model(trained)
    ids = tokenizer.encode("that is the question.\n" * 3).long()
    total = sum(F.cross_entropy(model(ids[None, max(0, t - 16):t])[0, -1], ids[t]).item()
                for t in range(1, len(ids)))
    assert result["tokens"] == 65 and result["loss"] == pytest.approx(total / 65, rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(total / 65), rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(total / 65 / math.log(2), rel=1e-4)
    said = json.loads(run_main("eval", "--out", trained, "--json")[1])
    assert said.keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "stride"}
    Path("odd.txt").write_text("that is ß" * 5)
    assert "ß" in refused("eval", "--out", trained, "--data", "odd.txt")

def test_eval_refuses_a_text_that_has_changed_but_not_one_that_was_touched():
    train()
    os.utime("text.txt", (1, 1))
    assert run_main("eval")[0] == 0
    Path("text.txt").write_text(TEXT + "to be")
    assert "text.txt has changed" in refused("eval")

# --- Checkpoints ---------------------------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)

def saved(thing, **how):
    torch.save(thing, buffer := io.BytesIO(), **how)
    return buffer.getvalue()

def zipped(name, data, **how):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", **how) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()

def test_damaged_and_foreign_checkpoints_are_one_line_and_run_nothing():
    train(out="r", steps=2)
    good, chance = Path("r/best.pt").read_bytes(), random.Random(0)
    number = int(os.environ.get("DAMAGED", 40)) // 2  # `DAMAGED=300` is the long form
    damaged = [b"", b"hello", pickle.dumps(Evil()), zipped("word/document.xml", "<w/>"),
               saved(torch.zeros(3)), saved([1]), saved({"format": 2, "model": Evil()}),
               saved({"format": 2}, _use_new_zipfile_serialization=False),
               zipped("data.pkl", bytes(1 << 26), compression=zipfile.ZIP_DEFLATED)]
    damaged += [good[:i] for i in chance.sample(range(len(good)), number)]
    for i in chance.sample(range(len(good)), number):
        flipped = bytes([good[i] ^ chance.randrange(1, 256)])
        damaged.append(good[:i] + flipped + good[i + chance.choice((0, 1, 2)):])
    for data in damaged:
        Path("x.pt").write_bytes(data)
        try:  # a byte may not matter
            assert equal(gpt.load_model("x.pt")[0].state_dict(), weights("r", "best.pt"))
        except gpt.Error as e:
            assert "x.pt" in str(e) and "\n" not in str(e)
    assert not Path("evil").exists()
    state = gpt.read_checkpoint(Path("r/best.pt"))
    torch.save(state | {"format": 99}, "new.pt")
    assert "format 99" in refused("sample", "--init", "new.pt")
    del state["model"]["embed.weight"]
    torch.save(state, "part.pt")
    assert "fit together" in refused("sample", "--init", "part.pt")

def test_saving_that_fails_leaves_the_old_checkpoint_and_training_goes_on(monkeypatch, capsys):
    honest = torch.save
    def full(state, file):
        if state["step"] == 3:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        honest(state, file)
    monkeypatch.setattr(torch, "save", full)
    assert train(eval_every=1)["step"] == 6
    assert "failed writing file; training goes on" in capsys.readouterr().err
    assert not list(Path("out").glob("*.tmp"))
    assert gpt.read_checkpoint(Path("out/ckpt.pt"))["step"] == 6

LIMITED = """import resource, sys; sys.path.insert(0, sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
import gpt; sys.exit(gpt.main())"""

def test_a_disk_without_room_ends_in_one_line_and_keeps_what_was_there():
    """A limit on the size of files stands in for a full disk."""
    code, _, err = process(HERE, "1000", *flags(), python=["-c", LIMITED])  # no room for the tokens
    assert code == 1 and "cannot be written: File too large" in err and "Traceback" not in err
    assert not list(Path("cache").glob("*.bin*"))
    train(out="r")
    kept, size = weights("r"), os.path.getsize("r/ckpt.pt")
    words = ("train", "--resume", "--out", "r", "--steps", "9")
    code, _, err = process(HERE, str(size - 1000), *words, python=["-c", LIMITED])
    assert code == 1 and "training goes on" in err and "ckpt.pt cannot be written" in err
    assert equal(weights("r"), kept) and not list(Path("r").glob("*.tmp"))
    assert gpt.train(resume=True, out="r", steps=9)["step"] == 9

def test_a_checkpoint_is_plain_and_names_no_wrapper():
    train()
    state = torch.load("out/ckpt.pt", weights_only=True)
    assert {"format", "model", "settings", "tokenizer", "step", "val_loss", "optimizer", "scaler",
            "seconds", "best", "data_fingerprint"} <= state.keys() and state["format"] == 2
    assert state["model"].keys() == make().state_dict().keys()

# --- Looking inside ------------------------------------------------------------------------------

def small(**given):
    shape = dict(vocab_size=11, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, block_size=20)
    return scramble(gpt.GPT(gpt.Config(**shape | given)))

def test_a_look_sees_what_the_model_does_and_leaves_no_trace():
    model, idx = small(), torch.randint(11, (20,))
    gpt.choose_attention(model, "sdpa", torch.float32)
    attends = [block.attn.attend for block in model.blocks]
    probs, maps = gpt.logit_lens(model, idx), torch.stack(gpt.attention_maps(model, idx))
    assert [block.attn.attend for block in model.blocks] == attends
    assert not model.dropout._forward_hooks and not model.blocks[0]._forward_hooks
    assert probs.shape == (4, 20, 11) and maps.shape == (3, 4, 20, 20)
    assert torch.allclose(model(idx[None])[0].softmax(-1), probs[-1], atol=1e-5)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 4, 20)) and maps.triu(1).abs().max() == 0
    bare = model.head(model.norm(model.embed(idx))).softmax(-1)
    assert torch.allclose(probs[0], bare, atol=1e-6)  # the lens begins before the first block

def test_a_map_is_the_attention_that_the_block_itself_computes():
    """Weighing the values by the map and projecting them gives what the block's attention adds."""
    model, idx = small(n_kv_head=4), torch.randint(11, (20,))
    attn, seen = model.blocks[1].attn, []
    attn.register_forward_hook(lambda part, given, out: seen.append((given[0], out)))
    maps = gpt.attention_maps(model, idx)[1]
    x, out = seen[0]
    values = attn.v(x)[0].view(20, 4, 8).transpose(0, 1)  # (H, T, D)
    mixed = (maps @ values).transpose(0, 1).reshape(20, 32)
    assert torch.allclose(attn.out(mixed), out[0], atol=1e-4)

def test_copied_counts_from_each_character():
    source = "".join(random.Random(0).choices("abc", k=400))
    text = "".join(random.Random(1).choices("abc", k=60)) + source[100:130]
    slow = [max(n for n in range(len(text) - i + 1) if text[i:i + n] in source) for i in range(90)]
    assert gpt.copied(text, source) == slow and slow[60] == 30

def test_probes_change_no_weight_and_record_what_happened(monkeypatch):
    before_step(monkeypatch, 17, lambda: signal.raise_signal(signal.SIGINT))
    for probe in ("", "to be, or"):
        train(out=f"p{probe}", probe=probe, steps=40, dropout=0.1)
        gpt.train(resume=True, out=f"p{probe}")
    assert equal(weights("p"), weights("pto be, or")) and not log("p", "probe.jsonl")
    lines = log("pto be, or", "probe.jsonl")
    assert [line["step"] for line in lines] == sorted({0, 1, 2, 4, 8, 16, 32, *range(0, 41, 2)})
    last = lines[-1]
    assert "".join(last["text"]) == "to·be,·or" and len(last["loss"]) == 9
    assert [len(layer) for layer in last["lens"]] == [9] * 3 and len(last["lens"][-1][0]) == 5
    assert [len(head["map"]) for layer in last["heads"] for head in layer] == [45] * 8
    assert len(last["samples"]) == 4
    model, tokenizer = gpt.load_model("pto be, or/ckpt.pt")
    ids = tokenizer.encode("to be, or").long()
    probs = model(ids[None])[0].softmax(-1)
    token, p = last["lens"][-1][8][0]
    assert token.replace("·", " ") == tokenizer.chars[probs[8].argmax()]
    assert p == pytest.approx(probs[8].max().item(), abs=1e-3)
    assert last["loss"][1] == pytest.approx(-probs[0, ids[1]].log().item(), abs=1e-3)

def test_the_line_that_is_read_is_a_whole_one_even_if_it_looks_like_a_file_name():
    Path("text.txt").write_text("@she said, no more\n" * 300)
    train(probe=None, steps=2, block_size=32)
    assert "".join(log(name="probe.jsonl")[0]["text"]) == "@she·said,·no·more"

def test_importance_is_what_the_absence_of_a_part_costs():
    model, ids = small(), torch.randint(11, (200,))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    heads = gpt.head_importance(model, ids)
    assert equal(before, model.state_dict()) and len(heads) == 3 * 4
    base = gpt.estimate_loss(model, ids)[0]
    model.blocks[1].attn.out.weight.data[:, 8:16] = 0  # its second head
    assert heads[5] == pytest.approx(gpt.estimate_loss(model, ids)[0] - base, abs=1e-3) != 0

def test_the_bigram_level_is_what_a_trained_bigram_reaches():
    tokens = torch.randint(5, (4000,)).cumsum(0) % 7
    level = gpt.bigram_loss(tokens[:3600], tokens[3600:], 7)
    Path("text.txt").write_text("".join("abcdefg"[i] for i in tokens))
    gpt.train(arch="bigram", data="text.txt", steps=300, block_size=16, device="cpu", probe="")
    assert abs(gpt.evaluate()["loss"] - level) < 0.02 and level < math.log(5) + 0.05

def page_data(path):
    page = Path(path).read_text("utf-8")
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page), "network"
    return json.loads(re.search(r"^const R = (.*), T = R\[0\]", page, re.M).group(1))

def test_inspect_writes_a_page_that_needs_nothing():
    Path("text.txt").write_text((TEXT + "</script><b>a & b</b>\n") * 3)
    train(out="r", steps=30, probe="</script>")
    path = gpt.inspect(out="r")
    records = page_data(path)
    assert path == Path("r/inspect.html") and len(records) == 24
    assert all(record["validation"] > 0 for record in records)
    assert all("worth" in head["worth"] for layer in records[0]["heads"] for head in layer)
    chars = gpt.load_model("r")[1].chars
    assert records[0]["blind guess"] == pytest.approx(math.log(len(chars)), abs=1e-3)
    assert 0 < records[-1]["bigram"] < records[0]["blind guess"]
    assert all(len(text) == len(lengths) for text, lengths in records[-1]["samples"])
    other = page_data(gpt.inspect(out="r", probe="or not"))
    assert len(other) == 1 and "".join(other[0]["text"]) == "or·not"
    os.remove("text.txt")
    code, _, err = run_main("inspect", "--out", "r")
    assert code == 0 and page_data(path)[0]["heads"][0][0]["worth"] == "" and "without what needs the text" in err
    assert run_main("inspect", "--init", "r", "--probe", "To be", "--out", "new")[0] == 0
    assert page_data("new/inspect.html") and "name a text" in refused("inspect", "--init", "r")

@pytest.mark.parametrize("arch, text", [
    ("qwen3", TEXT), ("bigram", TEXT), ("qwen3", "漢字かな交じり文を読む。\r\n" * 99),
    ("gpt2", "مرحبا بالعالم\n" * 99)])
def test_the_page_works_in_a_browser(arch, text):
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    Path("text.txt").write_text(text, "utf-8", newline="")
    layers = 0 if arch == "bigram" else 2
    train(data="text.txt", steps=20, arch=arch, n_layer=layers, probe=None)
    page = gpt.inspect().resolve()
    script = """<script>const step = $('now').textContent; $('at').value = 0; $('at').oninput()
      document.querySelector('[data-token="1"]').click()
      document.onkeydown({key: 'ArrowRight'})
      document.querySelector('[data-head="1.2"]')?.click()
      document.title = ['worked', step, $('now').textContent, state.token, location.hash].join('|')
      </script>"""
    page.write_text(page.read_text("utf-8") + script, "utf-8")
    out = subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                          f"--user-data-dir={Path('profile').resolve()}",
                          "--virtual-time-budget=3000", "--disable-background-networking",
                          "--no-first-run", f"file://{page}"],
                         capture_output=True, text=True, timeout=100).stdout
    title = re.search("<title>(.*?)</title>", out)[1].split("|")
    assert title[0] == "worked" and "step 20" in title[1] and "step 0" in title[2], title
    assert title[3] == "2" and "token=2" in title[4]
    assert arch == "bigram" or "head=1.2" in title[4]

def test_ablate_compares_and_goes_on_where_it_was(monkeypatch):
    words = ["ablate", "--vary", "n_head=1,2", "--vary", "n-layer=1 tie=true,false",
             "--vary", "n_head=2", "--seeds", "2", "--out", "a", *flags(steps=3, n_head=None)[1:]]
    real, done = gpt.train, []
    def counted(**given):
        done.append(given["out"])
        if len(done) == 4:
            before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        return real(**given)
    monkeypatch.setattr(gpt, "train", counted)
    assert run_main(*words)[0] == 143 and len(done) == 4  # stopped in the fourth run
    assert len(json.loads(Path("a/ablate.json").read_text())["runs"]) == 3
    monkeypatch.undo()
    monkeypatch.setattr(gpt, "train", lambda **given: done.append(given["out"]) or real(**given))
    code, out, _ = run_main(*words)
    names = {line.split("|")[1].strip() for line in out.splitlines()[2:]}
    assert code == 0 and len(done) == 4 + 5 and len(set(done)) == 8  # n_head=2 is not trained twice
    assert names == {f"{name} seed={seed}" for seed in (1337, 1338) for name in (
        "n_head=1", "n_head=2", "n_layer=1 tie=true", "n_layer=1 tie=false")}
    assert run_main(*words) == (0, out, "") and len(done) == 9
    assert "other settings" in refused(*words, "--lr", "0.1")

@pytest.mark.parametrize("words, says", [
    (["--vary", "n_head=1,3"], "not divisible"), (["--vary", "qk_norm=0,1"], "qk_norm must"),
    (["--vary", "n_head"], "n_head must"), (["--vary", "n_heads=1,3"], "did you mean n_head")])
def test_bad_requests_to_ablate_train_nothing(words, says):
    assert says in refused("ablate", "--data", "text.txt", "--out", "b", *words)

# --- Weights in and out --------------------------------------------------------------------------
# Held against Hugging Face's transformers, where that is installed.

STRANGE = ("Hello, world! I'LL we'Ve don't \t tabs\r\n\r\n\n  12345 3.14 naïve café 日本語 👩‍👩‍👧 ﬁ "
           "ſ'ſ \u00a0\u2003x\u0085y\u200b e\u0301 \x00\x7f ١٢٣ Ⅷ x²  \n \n   <|endoftext|>Ünïcödé "
           " end  ")
BASE = dict(vocab_size=8, block_size=29, n_layer=2, n_head=3, n_embd=18)

@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")

# model_type, and what differs from the small model below
THEIRS = [
    ("gpt2", {}), ("gpt2", dict(n_inner=21)),
    ("gpt2", dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
    ("llama", {}), ("llama", dict(tie_word_embeddings=True, num_key_value_heads=5)),
    ("llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", dict(head_dim=6, rms_norm_eps=1e-3, rope_theta=123.0)), ("qwen3", {}),
    ("qwen3", dict(tie_word_embeddings=True, num_key_value_heads=5)),
    ("qwen3", dict(head_dim=14, rope_theta=1e6))]

def theirs(transformers, kind, changes, folder, dtype=torch.float32, **saving):
    """A random model of transformers with no weight at its starting value, saved in a folder."""
    about = dict(vocab_size=131, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        about |= dict(n_positions=37, n_embd=15, n_layer=3, n_head=5)
        config = transformers.GPT2Config(**about | changes)
    else:
        make = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[kind]
        about |= dict(hidden_size=30, intermediate_size=17, num_hidden_layers=3, head_dim=8,
                      num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=37)
        config = make(**about | changes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.15)
    model.to(dtype).save_pretrained(folder, **saving)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, torch_dtype=torch.float32).eval()

@torch.no_grad()
def same_model(ours, model):
    """Logits equal, and greedy text: theirs by whole forward passes, ours through the KV cache."""
    idx = torch.randint(ours.config.vocab_size, (3, 19))
    a, b = ours(idx), model(idx).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    text = idx[:1, :4]
    for _ in range(12):
        text = torch.cat((text, model(text).logits[:, -1].argmax(-1, keepdim=True)), 1)
    greedy = gpt.generate(ours, idx[:1, :4], gpt.Sampling(tokens=12, temperature=0))
    assert [int(i) for i in greedy] == text[0, 4:].tolist()

def run_folder(config, tokenizer, folder="run"):
    """A run's folder with a random model."""
    model = scramble(gpt.GPT(config))
    Path(folder).mkdir()
    torch.save({"format": gpt.FORMAT, "model": model.state_dict(), "tokenizer": tokenizer.state(),
                "step": 0, "val_loss": 0.0, "settings": gpt.asdict(config)}, f"{folder}/best.pt")
    return model

def edit(path, change):
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")

def error(function, *args, **given):
    with pytest.raises(gpt.Error) as caught:
        function(*args, **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)

@pytest.mark.parametrize("kind, changes", THEIRS, ids=str)
def test_their_models_in_and_out_again(transformers, kind, changes):
    model = theirs(transformers, kind, changes, "a")
    ours, tokenizer = gpt.load_model("a")
    assert tokenizer is None
    same_model(ours, model)
    gpt.export(folder="b", init="a")
    again = transformers.AutoModelForCausalLM.from_pretrained("b")
    assert equal(model.state_dict(), again.state_dict())
    assert equal(ours.state_dict(), gpt.load_model("b")[0].state_dict())

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_several_files(transformers, dtype):
    model = theirs(transformers, "qwen3", {}, "a", dtype, max_shard_size="10KB")
    assert len(list(Path("a").glob("model-*.safetensors"))) > 2
    same_model(gpt.load_model("a")[0], model)
    next(Path("a").glob("model-00002*")).unlink()
    assert "is None" in error(gpt.load_model, "a")

@pytest.mark.parametrize("about, theta", [
    ({"rope_theta": 345.0, "rope_scaling": None}, 345.0), ({}, 10000.0),
    ({"rope_parameters": {"rope_theta": 345.0, "rope_type": "default"}}, 345.0)])
def test_rope_theta_in_both_spellings(transformers, about, theta):
    model = theirs(transformers, "llama", {"rope_theta": theta}, "a")
    file = json.loads(Path("a/config.json").read_text())
    file = {name: value for name, value in file.items() if "rope" not in name}
    Path("a/config.json").write_text(json.dumps(file | about))
    same_model(gpt.load_model("a")[0], model)

@pytest.mark.parametrize("kind, changes, says", [
    ("gpt2", {"activation_function": "relu"}, "activation_function"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"n_head": 4}, "divisible"), ("gpt2", {"n_layer": 4}, "is None"),
    ("gpt2", {"n_layer": 2}, "None"), ("gpt2", {"n_layer": 10 ** 9}, "n_layer"),
    ("gpt2", {"n_layer": 0}, "None"), ("gpt2", {"n_layer": "x"}, "n_layer"),
    ("gpt2", {"n_layer": []}, ""),
    ("gpt2", {"vocab_size": 130}, "wte.weight"), ("gpt2", {"n_embd": None}, "n_embd 128"),
    ("gpt2", {"vocab_size": 10 ** 18}, ""),
    ("gpt2", {"tie_word_embeddings": False}, "lm_head.weight"),
    ("gpt2", {"model_type": "mamba"}, "mamba"), ("gpt2", {"model_type": []}, ""),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "linear"),
    ("llama", {"rope_parameters": 3}, ""), ("llama", {"max_position_embeddings": 10 ** 15}, ""),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"), ("llama", {"mlp_bias": True}, "bias"),
    ("llama", {"model_type": "qwen3"}, "norm"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window")], ids=str)
def test_refused_configs(transformers, kind, changes, says):
    theirs(transformers, kind, {}, "a")
    edit("a/config.json", changes)
    assert says in error(gpt.load_model, "a")

def packed(header, body=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body

def damaged(whole):
    """Files none of which is a whole one."""
    length = struct.unpack("<Q", whole[:8])[0]
    header, body, chance = json.loads(whole[8:8 + length]), whole[8 + length:], random.Random(0)
    yield from (whole[:n] for n in [0, 1, 8, 9, *chance.sample(range(10, len(whole)), 9)])
    for n in [0, 2, length - 1, length + 1, len(whole), 1 << 24, (1 << 64) - 1]:
        yield struct.pack("<Q", n) + whole[8:]
    for text in (b"[]", b"null", b"[" * 99999, b"\xff\xfe", b"{}", b'{"a": NaN}'):
        yield packed(text, body)
    rows = {"dtype": ["F8", None, 3, [], "F64", "U8"],
            "shape": [None, 3, [1], [-1, -1], [1 << 62, 1 << 62], [10 ** 400], [1.0], [[1]]],
            "data_offsets": [None, [], [0], [0, 1, 2], [-4, 4], [1 << 70, 1 << 71], ["0", "4"], 5]}
    names = [name for name in header if name != "__metadata__"]
    for key, value in ((key, value) for key, values in rows.items() for value in values):
        yield packed(header | {chance.choice(names[1:]): header[names[1]] | {key: value}}, body)
    for name in chance.sample(names, 5):  # a hole; two in one place; another model's
        yield packed({n: a for n, a in header.items() if n != name}, body)
        yield packed(header | {"more": header[name]}, body)
        yield packed({n.replace(name, name + "x"): a for n, a in header.items()}, body)
    yield packed(header, body + b"\0" * 4)

def test_damaged_files_are_one_line_each():
    config = dict(model_type="gpt2", vocab_size=11, n_positions=7, n_layer=1, n_embd=6, n_head=2)
    model = run_folder(gpt.config_in(config)[1], gpt.CharTokenizer("abcdefghijk"))
    gpt.export(folder="a", out="run")
    path, whole = Path("a/model.safetensors"), Path("a/model.safetensors").read_bytes()
    for i, file in enumerate(damaged(whole)):
        path.write_bytes(file)
        code, out, err = run_main("sample", "--init", "a")
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("gpt.py: error: "), i
    path.write_bytes(whole)
    assert equal(gpt.load_model("a")[0].state_dict(), model.state_dict())

def test_safetensors_are_read_as_their_package_does():
    """Every dtype, an empty tensor, a scalar, and numbers that begin at an odd byte."""
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: (torch.randn(3, 5) * 9).to(dtype) for name, dtype in gpt.SAFETENSORS.items()}
    tensors |= {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    package.save_file(tensors, "x")
    whole = Path("x").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    Path("y").write_bytes(packed(whole[8:8 + length] + b" ", whole[8 + length:]))
    for name in "xy":
        found = gpt.read_safetensors(name)
        assert equal(found, tensors) and all(found[n].dtype == t.dtype for n, t in tensors.items())

@pytest.mark.parametrize("changes", [
    dict(gpt.ARCHS["gpt2"]), gpt.ARCHS["gpt2"] | dict(tie=False, mlp_hidden=13, norm_eps=1e-3),
    dict(qk_norm=False), dict(qk_norm=False, n_kv_head=1, tie=True), {},
    dict(qk_norm=False, bias=True, rope_theta=99.0),
    dict(head_dim=14, n_kv_head=1, tie=True), dict(n_layer=0)], ids=str)
def test_an_exported_run_is_the_same_model_there(transformers, changes):
    tokenizer = gpt.CharTokenizer("\n abcdefghé日👩")
    config = gpt.Config(**BASE | changes | {"vocab_size": len(tokenizer.tokens)})
    model = run_folder(config, tokenizer)
    gpt.export(folder="a", out="run")
    loaded = transformers.AutoModelForCausalLM.from_pretrained("a").eval()
    same_model(model, loaded)
    their, text = transformers.AutoTokenizer.from_pretrained("a"), "a b\n\n日é  👩 cab 日 h \n"
    assert their(text).input_ids == tokenizer.encode(text).tolist()
    assert their.decode(their(text).input_ids) == text
    loaded.save_pretrained("b")
    their.save_pretrained("b")
    back, ours = gpt.load_model("b")
    assert equal(model.state_dict(), back.state_dict()) and ours.tokens == tokenizer.tokens
    assert ours.encode(text).tolist() == tokenizer.encode(text).tolist()
    if config.pos == "learned":  # llama.cpp's converter and mlx-lm read these
        assert "wte.weight" in gpt.read_safetensors("a/model.safetensors")
        assert json.loads(Path("a/config.json").read_text())["n_ctx"] == 29

@pytest.mark.parametrize("changes, name", [
    (dict(pos="none"), "pos"), (dict(mlp="relu2"), "mlp"),
    (dict(norm="layer"), "norm"), (dict(bias=True), "bias"),
    (gpt.ARCHS["gpt2"] | dict(n_kv_head=1), "n_kv_head"),
    (gpt.ARCHS["gpt2"] | dict(bias=False), "bias"),
    (gpt.ARCHS["gpt2"] | dict(head_dim=8), "head_dim"),
    (gpt.ARCHS["gpt2"] | dict(mlp="relu"), "mlp")], ids=str)
def test_what_cannot_be_expressed_is_named(changes, name):
    run_folder(gpt.Config(**BASE | changes), gpt.CharTokenizer("abcdefgh"))
    assert name in error(gpt.export, out="run", folder="a") and not Path("a").exists()

def test_a_setting_that_the_table_does_not_know_is_refused(monkeypatch):
    """A model with a new part would go out as one without it."""
    @dataclass
    class Config(gpt.Config):
        window: int = gpt.setting(0, "tokens that attention sees")
    monkeypatch.setattr(gpt, "Config", Config)
    gpt.config_out(Config(**BASE))
    assert "window" in error(gpt.config_out, Config(**BASE, window=4))

def test_export_overwrites_nothing():
    run_folder(gpt.Config(**BASE), gpt.CharTokenizer("abcdefgh"))
    Path("empty").mkdir()
    for folder in ("empty", "new/deeper"):
        code, out, _ = run_main("export", folder, "--out", "run")
        assert code == 0 and f"from_pretrained('{folder}')" in out
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json",
                                              "tokenizer_config.json"]
    for folder in ("text.txt", "run", "empty"):
        assert "is there" in refused("export", folder, "--out", "run")
    for words in ([], ["--out", "run"], ["y", "--out", "none"]):
        refused("export", *words)

@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_our_tokenizers_give_the_same_ids_there(transformers, kind):
    if kind == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and a test does not download")
    text = (HERE / "input.txt").read_text()
    tokenizer = gpt.TOKENIZERS[kind].train([text[:200_000], STRANGE * 3], 800)
    run_folder(gpt.Config(**BASE | {"vocab_size": len(tokenizer.tokens)}), tokenizer)
    gpt.export(folder="t", out="run")
    ours, their = gpt.load_model("t")[1], transformers.AutoTokenizer.from_pretrained("t")
    for text in (STRANGE, text[-20_000:]):
        ids = tokenizer.encode(text, special=True).tolist()
        assert their(text, add_special_tokens=False).input_ids == ids
        assert ours.encode(text, special=True).tolist() == ids and ours.decode(ids) == text
        assert ours.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert "".join(gpt.stream_text(ours, ids)) == text == their.decode(ids)
    assert their.eos_token_id == tokenizer.eot == ours.eot and ours.tokens == tokenizer.tokens

def learnt(size, special):
    """A tokenizer made by Hugging Face's own trainer, whose ids begin with the special tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from tokenizers import decoders, models, pre_tokenizers, trainers
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([(HERE / "input.txt").read_text()[:100_000], STRANGE * 3], trainer)
    return t

def test_tokenizers_of_others_are_theirs(transformers):
    t = learnt(700, ["<|im_end|>", "<|endoftext|>"])
    theirs(transformers, "gpt2", dict(vocab_size=703), "a")
    edit("a/config.json", {"eos_token_id": [1, 0]})
    t.save("a/tokenizer.json")
    tokenizer = gpt.load_model("a")[1]
    assert len(tokenizer.tokens) == 703 and tokenizer.ends == {0, 1} and tokenizer.eot == 1
    ids = tokenizer.encode(STRANGE, special=True).tolist()
    assert ids == t.encode(STRANGE).ids and tokenizer.decode(ids) == STRANGE
    assert 1 not in tokenizer.encode(STRANGE).tolist()  # in data it is text
    again = gpt.tokenizer_from(json.loads(json.dumps(tokenizer.state())))
    assert again.state() == tokenizer.state()
    assert torch.equal(again.encode(STRANGE), tokenizer.encode(STRANGE))
    gpt.train(init="a", data="text.txt", out="tuned", steps=1, batch_size=1, device="cpu", probe="")
    gpt.export(folder="b", out="tuned")
    their = transformers.AutoTokenizer.from_pretrained("b")
    assert their(STRANGE, add_special_tokens=False).input_ids == ids

@pytest.mark.parametrize("file", [b"", b"{}", b"[1]", b'{"model": {"type": "BPE", "vocab": []}}'])
def test_a_damaged_tokenizer_is_one_line(transformers, file):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    theirs(transformers, "gpt2", {}, "a")
    Path("a/tokenizer.json").write_bytes(file)
    assert "a cannot be read" in refused("sample", "--init", "a")

def test_a_folder_without_a_tokenizer_or_its_package_says_so(transformers, monkeypatch):
    theirs(transformers, "gpt2", {}, "a")
    assert "no tokenizer" in refused("sample", "--init", "a")
    Path("a/tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refused("sample", "--init", "a")

def test_sampling_from_their_folder_is_their_generate(transformers):
    t = learnt(400, ["<|endoftext|>"])
    model = theirs(transformers, "qwen3", dict(vocab_size=400, max_position_embeddings=64), "a")
    t.save("a/tokenizer.json")
    words = ["--prompt", "The sea was ", "--tokens", "20", "--temperature", "0"]
    code, out, _ = run_main("sample", "--init", "a", *words)
    ids = torch.tensor([t.encode("The sea was ").ids])
    made = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
    assert code == 0 and out == t.decode(made, skip_special_tokens=False) + "\n"

@pytest.fixture
def small_gpt2(monkeypatch):
    """openai-community/gpt2 as it is, but small: masks among the weights, no head."""
    monkeypatch.setitem(gpt.GPT2_SIZES, "gpt2", (2, 3, 6))
    model = run_folder(gpt.Config(vocab_size=50257, block_size=1024, n_layer=2, n_head=3, n_embd=6,
                                  **gpt.ARCHS["gpt2"]), gpt.CharTokenizer("ab"))
    gpt.export(folder="x", out="run")
    about, whole = (Path(f"x/{n}").read_bytes() for n in ("config.json", "model.safetensors"))
    length = struct.unpack("<Q", whole[:8])[0]
    n = len(whole) - 8 - length
    mask = {"h.0.attn.bias": {"dtype": "F32", "shape": [1, 1, 2, 2], "data_offsets": [n, n + 16]}}
    file = packed(json.loads(whole[8:8 + length]) | mask, whole[8 + length:] + bytes(16))
    return model, {"config.json": about, "model.safetensors": file}

def test_gpt2_by_name_is_downloaded_once(small_gpt2, monkeypatch):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and a test does not download")
    (model, files), asked = small_gpt2, []
    def fetch(url, path, *a):
        asked.append(url)
        Path(path).write_bytes(files[url.split("/")[-1]])
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    Path("gpt2").mkdir()  # does not hide the name
    for _ in range(2):
        ours, tokenizer = gpt.load_model("gpt2")
    assert asked == [f"https://huggingface.co/openai-community/gpt2/resolve/main/{file}"
                     for file in files]
    assert equal(ours.state_dict(), model.state_dict()) and len(tokenizer.tokens) == 50257
    assert "no run" in error(gpt.load_model, "./gpt2")

def test_gpt2_offline_or_cut_short_names_the_file(small_gpt2, monkeypatch):
    place = str(gpt.cache_folder() / "gpt2")
    def offline(*a):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert place in error(gpt.load_model, "gpt2")
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, path, *a: Path(path).write_bytes(
                            small_gpt2[1][url.split("/")[-1]][:-100]))
    assert f"{place} cannot be read" in error(gpt.load_model, "gpt2")

# --- As a program, in a notebook, in the README --------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_process_saves_and_says_how_to_go_on(number):
    running = start(*flags(steps=1000000))
    while "step 2 " not in (line := running.stdout.readline()):
        assert line
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number and "--resume" in err and "Traceback" not in err
    assert gpt.read_checkpoint(Path("out/ckpt.pt"))["step"] > 0

SLOW_DISK = """import os, sys, time; sys.path.insert(0, sys.argv.pop(1)); import gpt
write = os.fsync
os.fsync = lambda file: (time.sleep(0.05), write(file)); sys.exit(gpt.main())"""

def test_killed_at_any_moment_a_run_can_go_on():
    """SIGKILL at random, mostly while a checkpoint is written. `KILLS=50` is the long form."""
    kills, chance = int(os.environ.get("KILLS", 4)), random.Random(5)
    words = flags(steps=15 * kills, eval_every=1, dropout=0.1)
    for kill in range(kills + 1):
        again = ["train", "--resume"] if Path("out/ckpt.pt").exists() else [*words, "--overwrite"]
        running = start(HERE, *again, python=["-c", SLOW_DISK])
        if kill < kills:
            while "which nine tenths" not in (line := running.stdout.readline()):
                assert line, running.stderr.read()
            time.sleep(chance.uniform(0.1, 2))
            running.kill()
        err = running.communicate(timeout=300)[1]
    assert running.returncode == 0 and "Traceback" not in err, err
    assert run_main(*words, "--out", "whole")[0] == 0 and same("out", "whole")

@pytest.mark.parametrize("how", ["closed", "missing", "full"])
def test_a_run_never_ends_because_of_where_its_words_go(how, trained):
    for words in (["sample", "--out", trained, "--tokens", "300"], flags(out=how)):
        if how == "closed":
            running = start(*words)
            running.stdout.close()
            err = running.stderr.read()
            code = running.wait(60)
        else:
            to = ">&-" if how == "missing" else "> /dev/full"
            line = shlex.join([sys.executable, str(HERE / "gpt.py"), *map(str, words)])
            done = subprocess.run(["sh", "-c", f"{line} {to}"], stderr=subprocess.PIPE, text=True)
            code, err = done.returncode, done.stderr
        assert code == 0 and "Traceback" not in err and "Exception" not in err, err

def test_help_names_every_setting_and_begins_with_what_people_set(capsys):
    for name, function in gpt.COMMANDS.items():
        with pytest.raises(SystemExit) as done:
            gpt.main([name, "--help"])
        out = capsys.readouterr().out
        names = [f.name for f in fields(function.settings)]
        assert done.value.code == 0
        assert all(("--" + n.replace("_", "-") if n != "folder" else n) in out for n in names)
        order = re.findall(r"^  --([a-z-]+)", out, re.M)
        assert name != "train" or order[:4] == ["data", "out", "steps", "minutes"]
    assert "invalid choice" in refused("trane") and "required" in refused()
    assert "--data" in refused("train", "my.txt")

def test_importing_does_nothing_and_needs_only_torch():
    code = f"""import sys; sys.modules.update(tiktoken=None, numpy=None, kernels=None, regex=None)
sys.path.insert(0, {str(HERE)!r}); import gpt
gpt.train(data='text.txt', steps=2, n_layer=1, n_embd=16, n_head=2, device='cpu')
gpt.sample(tokens=3)"""
    for options in ([], ["-OO"]):
        done = subprocess.run([sys.executable, "-W", "error", *options, "-c", code], text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        shutil.rmtree("out")
    done = subprocess.run([sys.executable, "-c", "import gpt"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir()) == ["cache", "text.txt"]

def test_the_folder_that_one_works_in_is_data_without_what_a_run_leaves_there():
    for words in (flags(data="."), ["train", "--resume", "--steps", 8], ["eval"], ["inspect"]):
        code, _, err = run_main(*words)
        assert code == 0, (words, err)

def test_world_size_without_torchrun_is_one_line():
    code, _, err = process(*flags(), env={**os.environ, "WORLD_SIZE": "2"})
    assert code == 2 and err.count("\n") == 1 and "torchrun" in err

def test_a_foreign_package_named_kernels_is_not_mistaken_for_ours():
    Path("kernels.py").write_text("def get_kernel(name): pass\n")
    code = f"""import sys; sys.path.append({str(HERE)!r}); import gpt; assert gpt.NO_KERNELS
gpt.train(data='text.txt', steps=1, n_embd=16, n_head=2, device='cpu')"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_pasted_into_a_notebook_it_says_what_to_call_and_works(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "kernels", None)
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile((HERE / "gpt.py").read_text("utf-8"), "<cell>", "exec"), module.__dict__)
    assert len(capsys.readouterr().out.splitlines()) == 2 and module.NO_KERNELS
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(module.Error, match="tinyshakespeare.*no network"):
        module.train(steps=20, device="cpu")
    Path("input.txt").write_text(TEXT)
    with pytest.raises(module.Error, match="no run"):
        module.sample(out="cell")
    tiny = dict(device="cpu", n_embd=16, n_head=2, steps=2)
    assert module.train(**tiny)["step"] == 2 and len(module.sample(tokens=50)[0]) == 50

def readme(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)

def test_the_readme_commands_run():
    """Every gpt.py command of the README, made short; its flags and files must exist."""
    for name in ("my.txt", "input.txt"):
        Path(name).write_text(TEXT + "MARA:")
    lines = [line.split("#")[0] for block in readme("bash") for line in block.splitlines()]
    lines = [line.partition("gpt.py ")[2] for line in lines if "gpt.py " in line]
    assert len(lines) > 12
    for line in lines:
        words = shlex.split(line)
        if words[0] in ("train", "ablate"):
            words = re.sub(r"--(steps|minutes) \S+", "", line)
            new = not re.search("--(resume|init)", line)
            steps = "9" if "--resume" in line else "2"
            words = shlex.split(words) + ["--device", "cpu", "--steps", steps]
            words += ["--n-embd", "16", "--n-head", "4", "--block-size", "16"] if new else []
            words += ["--overwrite"] if new and words[0] == "train" else []
            if words[0] == "ablate":
                words = [w for w in words if w not in ("--n-head", "4")]
        elif words[0] == "sample":
            words += ["--tokens", "5"]
        code, _, err = run_main(*words)
        assert code == 0, (line, err)

def test_the_readme_python_runs(monkeypatch):
    Path("my.txt").write_text(TEXT)
    real = gpt.train
    tiny = dict(n_embd=16, n_head=2, device="cpu")
    names = {**vars(gpt), "train": lambda **given: real(**{**given, **tiny, "steps": 2})}
    for block in readme("python"):
        exec(block.replace("(1, 5, V)", ""), names)
    assert names["logits"].shape[:2] == (1, 5)

def test_the_source_keeps_its_promises():
    for name in ("gpt.py", "kernels.py"):
        source = (HERE / name).read_text("utf-8")
        assert not re.search(r"import (flash_attn|numpy)|numpy\(", source)
        for call in re.findall(r"\bopen\([^)]*\)|read_text\([^)]*\)|write_text\(.*\)", source):
            assert re.search("rb|wb|utf-8|def open", call), call
    assert max(map(len, (HERE / "gpt.py").read_text("utf-8").splitlines())) <= 100

# --- Kernels -------------------------------------------------------------------------------------
# Without a GPU: the Triton kernels in Triton's interpreter, the CUDA C++ on a small emulator, both
# compilers without a device, and everything else as it is.

def have(module):
    return importlib.util.find_spec(module) is not None

def older(module, *version):
    return tuple(map(int, importlib.metadata.version(module).split(".")[:2])) < version

needs_triton = pytest.mark.skipif(not have("triton") or older("triton", 3, 3),
                                  reason="needs triton 3.3 or later")
needs_interpreter = pytest.mark.skipif(not (have("triton") and have("numpy")),
                                       reason="needs triton and numpy")
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def load_kernels(old="", new=""):
    """A fresh kernels.py, whose ops take the place of an earlier one's; with a bug planted."""
    source = (HERE / "kernels.py").read_text("utf-8")
    assert old in source, f"nothing to plant: {old!r} is not in kernels.py"
    path = HERE / "kernels.py"
    if old:
        path = Path(tempfile.mkdtemp()) / "planted.py"
        path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location("kernels_under_test", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.INTERPRET:  # big tiles: the interpreter pays for each program and step
        module.TILES = dict.fromkeys((64, 128), ((64, 64, 4, 1),) * 3)
    return module

@pytest.fixture
def kernels():
    return load_kernels()

def alone(interpret):
    """Runs a test in a process of its own: Triton's interpreter is switched on before the first
    import of triton, and then holds for the whole process."""
    def make(test):
        def run():
            code = f"import {Path(__file__).stem} as tests; tests.{test.__name__}.here()"
            env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret}
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=HERE,
                                      env={**env, "TRITON_CACHE_DIR": cache}, text=True,
                                      capture_output=True)
            print(done.stdout)
            assert done.returncode == 0, done.stdout + done.stderr
        run.__name__, run.__doc__, run.here = test.__name__, test.__doc__, test
        return run
    return make

def in_interpreter(test):
    return needs_interpreter(alone("1")(test))

def covering_pairs(*choices):
    """A short list of cases in which every pair of values of every two parameters occurs."""
    rng = random.Random(0)
    todo = {(i, a, j, b) for i, j in itertools.combinations(range(len(choices)), 2)
            for a in choices[i] for b in choices[j]}
    def covered(case):
        return {p for p in todo if case[p[0]] == p[1] and case[p[2]] == p[3]}
    while todo:
        candidates = [[rng.choice(c) for c in choices] for _ in range(60)]
        case = max(candidates, key=lambda case: len(covered(case)))
        todo -= covered(case)
        yield case

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

def attention_error(kernels, case, run=None, device="cpu"):
    """Beside float64 autograd through the readable formula; a second run must give the same."""
    T, D, (H, H_kv), causal, longer, gaps, dtype = case
    inputs = random_inputs(H, H_kv, T, max(T + longer, 1), D, dtype, gaps, device)
    run = functools.partial(run or kernels.attention_triton, causal=causal)
    ours, again = (output_and_gradients(run, *inputs) for _ in range(2))
    if not all(map(torch.equal, ours, again)):
        return math.inf  # a second run gives other bits
    truth = output_and_gradients(functools.partial(kernels.attention_reference, causal=causal),
                                 *(x.double() for x in inputs))
    return kernels.worst_error(ours, truth)

CASES = [(2, 17, 64, 77, 128), (16, 32, 64, 128), ((2, 2), (4, 2), (4, 1)), (True, False),
         (0, 51, -13), (False, True), (torch.float32, torch.float16)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

def check_softmax(kernels, n, dtype, device="cpu"):
    x = torch.randn(3, n).to(device, dtype)
    x[0, 0] = 3e4  # a softmax without the maximum would overflow
    assert kernels.worst_error([kernels.softmax(x)], [x.double().softmax(-1)]) < TOLERANCE[dtype]

@in_interpreter
def test_triton_attention_agrees_with_float64():
    """Guards against wrong masks, offsets, groups, ragged ends and unwritten outputs."""
    torch.use_deterministic_algorithms(True)  # every new tensor is full of NaN
    kernels = load_kernels()
    assert torch.empty(1).isnan()
    for case in covering_pairs(*CASES):
        error = attention_error(kernels, case)
        assert error < TOLERANCE[case[-1]], f"{case}: {error:.1e}"

PLANTED = [("n[None, :] <= row", "n[None, :] < row", "the mask hides the diagonal"),
           ("acc * alpha[:, None]", "acc", "the sum is not rescaled at a new maximum"),
           (" - delta[None, :])", ")", "dK without delta"),
           ("m0 + BM + TK - TQ)", "m0 + TK - TQ)", "the last keys are left out"),
           ("h // (H // H_kv)", "h % H_kv", "heads are grouped in the wrong order")]

@in_interpreter
def test_planted_bugs_in_triton_are_seen():
    """Guards against tests that pass whatever the kernels do."""
    case = [128, 64, (4, 2), True, 0, False, torch.float32]
    assert attention_error(load_kernels(), case) < TOLERANCE[torch.float32]
    for old, new, what in PLANTED:
        assert not attention_error(load_kernels(old, new), case) < 1e-3, what

@in_interpreter
def test_triton_softmax_agrees_with_float64():
    """Guards against overflow, ragged rows and rows that do not fit."""
    kernels, launched = load_kernels(), []
    fused = kernels.fused_softmax
    kernels.fused_softmax = lambda x: launched.append(x) or fused(x)
    for n, dtype in ((1, torch.float32), (77, torch.float32), (3000, torch.float16)):
        check_softmax(kernels, n, dtype)
    ran = len(launched)
    for x in (torch.randn(2, 16385), torch.zeros(0, 3), torch.randn(2, 3, requires_grad=True)):
        assert torch.equal(kernels.softmax(x), x.softmax(-1))
    assert len(launched) == ran >= 3

@in_interpreter
def test_attention_is_one_op_in_a_compiled_graph():
    """Guards against graph breaks, wrong shapes under torch.compile and a compilation a length."""
    kernels = load_kernels()
    q, k, v, _ = (x.requires_grad_() for x in random_inputs(4, 2, 40, 40, 16, torch.float32))
    torch.library.opcheck(kernels.attention_forward, (q, k, v, 0.25, "triton"))
    graphs = []
    def backend(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if "gpt_kernels" in str(node.target)])
        return graph
    run = torch.compile(lambda *a: kernels.attention_triton(*a).square().sum(), backend=backend,
                        fullgraph=True, dynamic=True)
    for T in (40, 33, 57):
        part = [torch.randn(2, T, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        assert torch.allclose(run(*part), kernels.attention_sdpa(*part).square().sum(), rtol=1e-4)
    assert all(len(graph) == 1 for graph in graphs)
    assert len(graphs) == 1 or older("torch", 2, 7)
    kernels.attention_triton(q, k, v).add_(1)  # the output is no view: it may change in place
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            one = kernels.attention_triton(q[:, :1], k, v)  # a query beside a cache
            assert torch.allclose(one, kernels.attention_reference(q[:, :1], k, v), atol=1e-5)
    for bad in ((q, k[:, :5], v), (q[:1], k, v)):
        with pytest.raises(ValueError, match="fit"):
            kernels.attention_triton(*bad)

# Every CUDA thread is a fiber (ucontext). An instruction of the whole warp puts its operands into a
# table, waits for the other lanes, reads theirs and waits again. Fragments are the PTX manual's.
EMULATOR = r"""
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#define EMULATE
#define __align__(n) __attribute__((aligned(n)))
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static
using std::min; using std::max;
typedef unsigned int u32; typedef unsigned short u16;
struct Index { int x, y; };
static Index threadIdx, blockIdx, gridDim;
static const int THREADS = 128;
static ucontext_t fibers[THREADS], caller;
static bool finished[THREADS];
static void resume(int i) {
    int me = threadIdx.x; threadIdx.x = i;
    if (i != me) swapcontext(&fibers[me], &fibers[i]);
}
static void next_of(int first, int count) {  // the next unfinished fiber among `count` from `first`
    for (int k = 1; k <= count; k++) {
        int i = first + (threadIdx.x - first + k) % count;
        if (!finished[i]) return resume(i);
    }
}
struct Barrier { int arrived = 0, generation = 0; };
static Barrier block_barrier, warp_barrier[THREADS / 32];
static void wait(Barrier &b, int first, int count) {
    int generation = b.generation;
    if (++b.arrived == count) { b.arrived = 0; b.generation++; }
    else while (b.generation == generation) next_of(first, count);
}
static void __syncthreads() { wait(block_barrier, 0, THREADS); }
static void sync_warp() { int w = threadIdx.x / 32; wait(warp_barrier[w], w * 32, 32); }
static float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
static float to_float(u16 h) { _Float16 x; memcpy(&x, &h, 2); return x; }
static u16 half_bits(float f) { _Float16 x = f; u16 h; memcpy(&h, &x, 2); return h; }
static float half_of(u32 pair, int which) { return to_float(which ? pair >> 16 : pair & 0xffff); }
static u32 table[THREADS / 32][32][3];
static float shuffle_xor(float x, int m) {
    auto &t = table[threadIdx.x / 32]; int lane = threadIdx.x % 32; float y;
    memcpy(&t[lane][0], &x, 4); sync_warp();
    memcpy(&y, &t[lane ^ m][0], 4); sync_warp();
    return y;
}
static void mma_16x8x8(float c[4], u32 a0, u32 a1, u32 b) {
    auto &t = table[threadIdx.x / 32]; int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    t[lane][0] = a0; t[lane][1] = a1; t[lane][2] = b;
    sync_warp();
    for (int e = 0; e < 4; e++) for (int k = 0; k < 8; k++)
        c[e] += half_of(t[g * 4 + k / 2][e / 2], k % 2)
                * half_of(t[(2 * q + e % 2) * 4 + k / 2][2], k % 2);
    sync_warp();
}
static const u16 *rows[THREADS / 32][32];
static void load_transposed(u32 &b0, u32 &b1, const u16 *row) {
    auto &r = rows[threadIdx.x / 32]; int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    r[threadIdx.x % 32] = row; sync_warp();
    b0 = r[2 * t][g] | (u32)r[2 * t + 1][g] << 16;
    b1 = r[8 + 2 * t][g] | (u32)r[8 + 2 * t + 1][g] << 16; sync_warp();
}
static void (*body)(void *); static void *body_argument;
static void fiber() {
    body(body_argument);
    finished[threadIdx.x] = true;
    next_of(0, THREADS);
    ucontext_t unused; swapcontext(&unused, &caller);   // the last one
}
static void launch(int gx, int gy, void (*f)(void *), void *argument) {
    static std::vector<char> stacks(THREADS * 65536);
    body = f; body_argument = argument; gridDim = {gx, gy};
    for (int y = 0; y < gy; y++) for (int x = 0; x < gx; x++) {
        blockIdx = {x, y}; block_barrier = Barrier();
        std::fill(warp_barrier, warp_barrier + THREADS / 32, Barrier());
        for (int i = 0; i < THREADS; i++) {
            finished[i] = false; getcontext(&fibers[i]);
            fibers[i].uc_stack.ss_sp = &stacks[i * 65536]; fibers[i].uc_stack.ss_size = 65536;
            fibers[i].uc_link = 0;
            makecontext(&fibers[i], fiber, 0);
        }
        threadIdx.x = 0; swapcontext(&caller, &fibers[0]);
    }
}
"""
EMULATOR_MAIN = r"""
#define KERNEL(name, Argument) extern "C" void run_##name(int gx, int gy, Argument *a) { \
    launch(gx, gy, [](void *p) { name(*(Argument *)p); }, a); }
KERNEL(attention_forward, Attention) KERNEL(attention_dq, Attention)
KERNEL(attention_dkv, Attention) KERNEL(softmax_rows, Softmax)
"""

def emulated(old="", new=""):
    """kernels.py whose CUDA launches run on the emulator, with a bug planted."""
    kernels, folder = load_kernels(), Path(tempfile.mkdtemp())
    assert old in kernels.CUDA_SOURCE, f"nothing to plant: {old!r} is not in CUDA_SOURCE"
    source = EMULATOR + kernels.CUDA_SOURCE.replace(old, new) + EMULATOR_MAIN
    (folder / "kernels.cpp").write_text(source, "utf-8")
    options = ["-O2", "-std=c++17", "-w", "-shared", "-fPIC"]
    subprocess.run(["g++", *options, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    def launch_cuda(name, grid, layout, *values):
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
        if "attention" in name:  # 16 bytes of q, k, v and do are loaded at once
            assert all(pointer % 16 == 0 for pointer in values[:4]), "misaligned"
        getattr(library, "run_" + name)(*grid, struct.pack(layout + "0P", *values))
    kernels.launch_cuda = launch_cuda
    return kernels

@needs_gxx
def test_cuda_cpp_agrees_with_float64(monkeypatch):
    """Guards against wrong fragments, masks, ragged tiles, groups, and misaligned loads."""
    kernels = emulated()
    for T, heads, causal, longer, gaps in (
            (128, (2, 2), True, 0, False), (77, (4, 2), True, 0, True),
                                           (5, (2, 1), True, 125, True), (90, (2, 2), True, -50, 0),
                                           (100, (2, 2), False, -30, False)):
        case = T, 64, heads, causal, longer, gaps, torch.float16
        assert attention_error(kernels, case, kernels.attention_cuda) < 1e-3, case
    q, k, v, do = random_inputs(2, 2, 9, 9, 64, torch.float16)
    shifted = do.new_empty(do.numel() + 1)[1:].view(do.shape).copy_(do)
    a, b = (output_and_gradients(kernels.attention_cuda, q, k, v, d) for d in (do, shifted))
    assert all(map(torch.equal, a, b))
    x = torch.randn(7, 100).half()
    x[0] += 3e4  # a softmax without the maximum would overflow
    with pytest.raises(ValueError, match="cpu"):
        kernels.softmax_cuda(x)
    monkeypatch.setattr(kernels, "cannot_run", lambda *a: "")
    assert kernels.worst_error([kernels.softmax_cuda(x)], [x.double().softmax(-1)]) < 1e-3

@needs_gxx
@pytest.mark.parametrize("bug", [
    ("key > query + offset", "key >= query + offset"),
    ("__syncthreads();         // the tiles are complete", ""),
    (" - delta[i])", ")"), ("mma_16x8x8(c, a[2], a[3], b1);", "")])
def test_planted_bugs_in_cuda_cpp_are_seen(bug):
    """Guards against an emulator that forgives a mask off by one, or a missing barrier."""
    kernels, case = emulated(*bug), (128, 64, (2, 2), True, 0, False, torch.float16)
    assert not attention_error(kernels, case, kernels.attention_cuda) < 2e-3

def compile_triton(arch, kernel, args, num_warps, num_stages=3, **constants):
    """Code and shared memory of a launch for a GPU that is not here, as Triton specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
             torch.int64: "*i64"}
    signature, aligned = {}, {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, args)):
        plain = "fp32" if isinstance(x, float) else "i32"
        signature[name] = types[x.dtype] if isinstance(x, torch.Tensor) else plain
        if isinstance(x, torch.Tensor) or plain == "i32" and x % 16 == 0:
            aligned[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return read_cubin(made.asm["cubin"])[1], made.metadata.shared

def read_cubin(cubin):
    """{kernel: (stack, static shared bytes)} and the disassembly, by tools in Triton's wheel."""
    import triton
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([tools / tool, flag, file.name], capture_output=True,
                                      text=True, check=True).stdout
                       for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    found = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:(\d+)", usage)
    return {name: (int(stack), int(shared)) for name, stack, shared in found}, code

def spills(code):
    return len(re.findall(r"\b(?:LDL|STL)\b", code))

def launches(kernels, D, dtype):
    """(kernel, arguments, constants) of all that training launches, at GPT-2's shapes."""
    made, meta = [], functools.partial(torch.empty, device="meta")
    kernels.launch = lambda kernel, grid, *args, **constants: made.append((kernel, args, constants))
    x, LSE = meta(16, 1024, 12, D, dtype=dtype), meta(16, 12, 1024)
    given = (x, x, x, x, LSE), (x,) * 5 + (LSE, LSE), (x,) * 6 + (LSE, LSE)
    for which, tensors in enumerate(given):
        kernels.launch_triton(which, tensors, 0.125)
    kernels.fused_softmax(meta(8, 16384, dtype=dtype))
    logits = meta(1024, 50304, dtype=dtype)[:, :50257]
    kernels.fused_rows(logits, meta(1024, dtype=torch.int64), -1, True)
    return made

SHARED = {80: 101376, 90: 232448, 120: 101376}  # bytes; sm_86 has 8.0's tiles and less memory
SPILLS = {(120, "attention_forward_kernel", 64): 40, (120, "attention_dkv_kernel", 128): 8}

@needs_triton
@alone("0")
def test_triton_compiles_to_tensor_cores_without_spills():
    """Guards against kernels that compile only in the interpreter, tiles beyond a GPU's shared
    memory, register spills, products that miss the tensor cores and 16-bit loads of logits."""
    kernels = load_kernels()
    wrong = []
    for arch, D in itertools.product(SHARED, (64, 128)):
        for kernel, args, constants in launches(kernels, D, torch.bfloat16):
            name = kernel.__name__
            if D == 128 and "attention" not in name:
                continue
            code, shared = compile_triton(arch, kernel, args, **constants)
            most = SPILLS.get((arch, name, D), 0)
            print(arch, name, D, spills(code), shared)
            good = shared <= SHARED[arch] and spills(code) <= most
            if "attention" in name:
                good = good and re.search(r"\bH?GMMA\b|\bHMMA\b", code)
            if name == "cross_entropy_kernel":
                wide = code.count("LDG.E.128"), code.count("STG.E.128"), code.count("LDG.E.U16")
                print(*wide)
                good = good and wide[0] >= 2 and wide[1] >= 1 and wide[2] <= 1  # z[target]
            if not good:
                wrong.append((arch, name, D, spills(code), shared))
    assert not wrong, wrong

@pytest.mark.skipif(not (have("cuda") and have("cuda.bindings") and have("nvidia")
                         and have("triton")),
                    reason="needs cuda-bindings, nvidia-cuda-nvrtc and triton")
def test_cuda_cpp_compiles_to_tensor_cores_without_spills(kernels):
    """Guards against CUDA C++ that NVRTC refuses, spills and shared memory above 48 KB."""
    for arch in (75, *SHARED):
        usage, code = read_cubin(kernels.cuda_image(f"sm_{arch}"))
        assert len(usage) == 4
        for name, (stack, shared) in usage.items():
            part = code[code.index(f".text.{name}:"):]
            part = part[:part.index(".text.", 9) if ".text." in part[9:] else None]
            assert spills(part) == stack == 0 and shared <= 48 * 1024, name
            assert "HMMA" in part or name == "softmax_rows"

def check_machine(device, impl, dtypes, cases):
    """Everything once on a device; the interpreter runs it too, so that no GPU meets a test that
    nobody has run."""
    kernels = load_kernels()
    for dtype in dtypes:
        for case in cases:
            if not kernels.cannot_run(impl, torch.device(device), dtype, case[1]):
                run = kernels.ATTENTION[impl]
                error = attention_error(kernels, [*case[:-1], dtype], run, device)
                assert error < TOLERANCE[dtype], f"{impl} {dtype} {case}: {error:.1e}"
        check_softmax(kernels, 3000, dtype, device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_loss(kernels, monkeypatch, device)
    run, why = kernels.choose(device, dtypes[0], (1, 208, 4, 2, 64), impl)
    assert run is kernels.ATTENTION[impl] and impl in why

@in_interpreter
def test_what_a_gpu_will_be_asked_runs_here():
    check_machine("cpu", "triton", [torch.float16], [[17, 32, (4, 1), True, 51, True, None]])

@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_kernels_on_this_gpu(impl):
    """Guards against all that the interpreter, the emulator and the compilers cannot show."""
    kernels, device = load_kernels(), torch.device("cuda")
    if reason := kernels.cannot_run(impl, device, torch.float16, 64):
        pytest.skip(reason)
    check_machine("cuda", impl, [torch.float16, torch.bfloat16], list(covering_pairs(*CASES)))
    print(*kernels.choose(device, torch.float16, (16, 1024, 12, 12, 64)))

@pytest.mark.parametrize("setup", ["", "sys.modules['triton'] = None",
                                   "os.environ['TRITON_INTERPRET'] = '1'"])
def test_import_is_quiet_and_works_anywhere(setup, tmp_path):
    """Guards against an import that fails without Triton or a GPU, prints, or starts CUDA; and
    against taking Hugging Face's package of this name for ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): pass")
    code = f"""if True:
        import os, sys
        {setup or 'pass'}
        import torch
        {'import numpy' if 'INTERPRET' in setup and have('numpy') else 'pass'}
        import warnings; warnings.simplefilter('error')
        import kernels
        assert kernels.GPT_KERNELS and not torch.cuda.is_initialized()
        run, why = kernels.choose('cpu', torch.float32, (1, 5, 2, 2, 16))
        q = torch.randn(1, 5, 2, 16)
        assert torch.allclose(run(q, q, q), kernels.attention_sdpa(q, q, q), atol=1e-5)
        del sys.modules['kernels']
        sys.path.insert(0, {str(tmp_path)!r})
        import kernels as theirs
        assert not hasattr(theirs, 'GPT_KERNELS')"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

def test_torch_attention_agrees_with_the_formula(kernels):
    """Guards against its other conventions: causal aligned top-left, groups."""
    for T, D, heads, causal, longer, gaps, _ in covering_pairs(*CASES):
        case = T, D, heads, causal, max(longer, 0), gaps, torch.float64
        run = functools.partial(kernels.attention_sdpa, scale=D ** -0.5)
        assert attention_error(kernels, case, run) < 1e-12

@pytest.mark.parametrize("impl, capability, dtype, D, reason", [
    ("triton", (8, 0), torch.float16, 64, ""), ("triton", (12, 0), torch.bfloat16, 128, ""),
    ("triton", (8, 0), torch.float32, 64, "fp16 or bf16"), ("triton", (8, 0), torch.float32, 0, ""),
    ("triton", (8, 0), torch.float16, 80, "or 128"),
    ("triton", (7, 5), torch.float16, 64, "(8, 0)"),
    ("triton", (7, 5), torch.float16, 0, ""), ("triton", (7, 5), torch.bfloat16, 0, "(8, 0)"),
    ("cuda", (7, 5), torch.float16, 64, ""), ("cuda", (7, 5), torch.float16, 80, "heads of 64"),
    ("cuda", (7, 5), torch.bfloat16, 64, "fp16"), ("cuda", (7, 0), torch.float16, 64, "(7, 5)")])
def test_rules(impl, capability, dtype, D, reason, kernels, monkeypatch):
    """Guards against a kernel that is tried where it cannot run, or left out without a reason."""
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = kernels.cannot_run(impl, torch.device("cuda"), dtype, D)
    assert reason in why and bool(reason) == bool(why)
    assert "heads" in kernels.cannot_run(impl, torch.device("cuda"), torch.float16, 64, 2 ** 16)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "NVIDIA" in kernels.cannot_run(impl, torch.device("cuda"), dtype, D)

def stand_in(kernels, monkeypatch, device, plants):
    """A CPU that takes itself for a GPU (or MPS): tensors are made here, attentions replaced."""
    trials = kernels.trials
    monkeypatch.setattr(kernels, "trials", lambda names, device, *a: trials(names, "cpu", *a))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for name, function in plants.items():
        monkeypatch.setitem(kernels.ATTENTION, name, function)
    return functools.partial(kernels.choose, device, torch.float32, (1, 16, 4, 2, 16))

def out_of_memory(*a):
    raise torch.cuda.OutOfMemoryError("no memory left")

@pytest.mark.parametrize("ms, plant, name, reason", [
    (1, lambda right: right, "triton", "triton 1.00 ms, sdpa 2.00 ms"),
    (3, lambda right: right, "sdpa", "triton 3.00 ms, sdpa 2.00 ms"),
    (1, lambda right: lambda *a: right(*a) * 0, "sdpa", "it is 1.0e+00 away"),
    (1, lambda right: lambda *a: 1 / 0, "sdpa", "it fails, ZeroDivisionError"),
    (1, None, "sdpa", "not triton: it is not here"),
    (1, lambda right: out_of_memory, "sdpa", "not enough memory")],
    ids=["faster", "slower", "zeros", "raises", "cannot run", "out of memory"])
def test_choose_takes_what_runs_is_right_and_faster(ms, plant, name, reason, kernels, monkeypatch):
    """On a CPU, with stand-ins for the kernel, its rules, its clock and the device."""
    planted = (plant or (lambda right: right))(lambda *a: kernels.attention_sdpa(*a))
    choose, times = stand_in(kernels, monkeypatch, "cuda", {"triton": planted}), [ms, 2]
    monkeypatch.setattr(kernels, "cannot_run", lambda *a: "" if plant else "it is not here")
    monkeypatch.setattr(kernels, "milliseconds", lambda run: times.pop(0))
    run, why = choose()
    assert run is kernels.ATTENTION[name] and why.startswith(name) and reason in why
    if "ms" in reason:
        assert choose(impl="triton")[0] is planted
    else:
        with pytest.raises(ValueError, match="triton attention cannot be used"):
            choose(impl="triton")

def test_an_attention_of_mps_that_is_wrong_is_not_used(kernels, monkeypatch):
    """Stand-in for a bug of its own: wrong for one query and 33 keys, or for the run's shape."""
    right = kernels.attention_sdpa
    for keys, name in ((0, "sdpa"), (33, "plain"), (16, "plain")):
        def planted(q, k, v):
            return right(q, k, v) * (2 if k.shape[1] == keys else 1)
        run, why = stand_in(kernels, monkeypatch, "mps", {"sdpa": planted})()
        assert run is kernels.ATTENTION[name] and name in why

def test_the_rule_on_a_cpu_and_requests(kernels):
    for T, impl, name in ((256, "auto", "plain"), (257, "auto", "sdpa"), (99, "sdpa", "sdpa"),
                          (999, "plain", "plain")):
        run, why = kernels.choose("cpu", torch.float32, (1, T, 2, 2, 16), impl)
        assert run is kernels.ATTENTION[name] and why.startswith(name)
    for impl, says in (("triton", "device is cpu"), ("cuda", "cpu"), ("flash", "cannot be used")):
        with pytest.raises(ValueError, match=says):
            kernels.choose("cpu", torch.float32, (1, 9, 2, 2, 16), impl)

def loss_inputs(dtype=torch.float64, N=300, C=16, V=301, device="cpu"):
    torch.manual_seed(1)
    x, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(V, (N,))
    targets[::7] = -1
    made = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    return *made, targets.to(device)

def loss_and_gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss * 1.7, inputs)

def check_loss(kernels, monkeypatch, device="cpu"):
    for dtype, tolerance in TOLERANCE.items():
        x, weight, targets = loss_inputs(dtype, device=device)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        truth = loss_and_gradients(kernels.plain_loss(*wide, targets), *wide)
        for size in (2 ** 24, 300 * 301 - 1, 1):  # the plain formula, one slice, three
            monkeypatch.setattr(kernels, "SLICE", size)
            ours = loss_and_gradients(kernels.linear_cross_entropy(x, weight, targets), x, weight)
            assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
            assert kernels.worst_error(ours, truth) < 3 * tolerance, (dtype, size)
        assert kernels.linear_cross_entropy(x, weight, targets.clamp(max=-1)).isnan()  # as torch's

def test_loss_agrees_with_torch(kernels, monkeypatch):
    """Guards against wrong gradients, slices, ignored targets, dtypes and loss scales."""
    check_loss(kernels, monkeypatch)

@in_interpreter
def test_triton_loss_rows_agree_with_torch():
    """Guards against logits overwritten too early, ragged ends and padding that is read; and
    against a kernel that is wrong, or refused, and used."""
    for target, nan in ((299, False), (300, True), (-2, True)):  # out of range: it shows
        loss = load_kernels().fused_rows(torch.zeros(1, 300), torch.tensor([target]), -1, False)
        assert loss.isnan().item() == nan
    padded, results = torch.full((2, 320), math.nan), []
    padded[:, :300] = torch.randn(2, 300)
    for z in (padded[:, :300].clone(), padded[:, :300]):
        results.append((load_kernels().fused_rows(z, torch.tensor([3, -1]), -1, True), z))
    assert all(map(torch.equal, *results)) and not padded.isnan().any()
    for plant, says in ((lambda z, *a: z[:, 0] * 0, "away"), (lambda *a: 1 / 0, "ZeroDivision")):
        kernels = load_kernels()
        kernels.fused_rows = plant
        kernels.SLICE = 1
        x, weight, targets = loss_inputs(torch.float32)
        with pytest.warns(UserWarning, match=says) as lines:
            losses = [kernels.linear_cross_entropy(x, weight, targets) for _ in range(2)]
        assert len(lines) == 1
        assert torch.allclose(losses[1], kernels.plain_loss(x, weight, targets))

def test_loss_under_autocast_no_grad_and_compile(kernels, monkeypatch):
    """Guards against a loss made in bf16, rounded gradients, and more than one op in a graph."""
    monkeypatch.setattr(kernels, "SLICE", 1)
    x, weight, targets = loss_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [f(x, weight, targets) for f in (kernels.linear_cross_entropy, kernels.plain_loss)]
    ours, plain = (loss_and_gradients(loss, x, weight) for loss in losses)
    assert all(t.dtype == torch.float32 for t in ours) and kernels.worst_error(ours, plain) < 1e-2
    op, inputs = kernels.summed_loss, (x.detach(), weight.detach(), targets, -1)
    assert op(*inputs, False)[1].numel() == 0
    with torch.inference_mode():
        kernels.linear_cross_entropy(x, weight, targets)
    torch.library.opcheck(op, (x, weight, targets, -1, True))
    torch.library.opcheck(op, (*inputs, False))
    compiled = torch.compile(kernels.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    ours, plain = (loss_and_gradients(f(x, weight, targets), x, weight)
                   for f in (compiled, kernels.plain_loss))
    assert kernels.worst_error(ours, plain) < 2e-6

MEMORY = """import sys, torch, kernels
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
torch.set_num_threads(1)
N, C, V = 1024, 64, 50257
x, t = torch.randn(N, C, requires_grad=True), torch.randint(V, (N,))
w = (torch.randn(V, C) * 0.02).requires_grad_()
before = peak()
getattr(kernels, sys.argv[1])(x, w, t).backward()
print(peak() - before)"""

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loss_keeps_memory_low():
    """Guards against logits that exist as a whole: 206 MB here, three times over."""
    grown = [float(subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, name], cwd=HERE,
                                  text=True, capture_output=True, check=True).stdout)
             for name in ("linear_cross_entropy", "plain_loss")]
    assert grown[0] < 200 and grown[1] > 2.5 * grown[0], grown

def test_kernels_as_a_program(kernels, monkeypatch, capsys):
    """Guards against a table that one failing kernel ends."""
    def broken(*a):
        raise RuntimeError("no such kernel")
    monkeypatch.setitem(kernels.ATTENTION, "sdpa", broken)
    assert kernels.main(["--json"]) == 1
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert "no such kernel" in rows.pop("attention sdpa")["failed"]
    assert {"attention plain", "softmax", "loss"} <= set(rows)
    assert all(row["error"] < 1e-5 and row["forward_ms"] > 0 for row in rows.values())
