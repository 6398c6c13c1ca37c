"""Tests of gpt.py and kernels.py: `python -m pytest -q`. Quick, without network, in temporary folders."""
import contextlib, ctypes, doctest, gzip, importlib.metadata, importlib.util, io, itertools, json, math, os, pickle, random, re, shutil
import signal, socket, struct, subprocess, sys, tempfile, time, types, zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import pytest
import torch
import torch.nn.functional as F

import gpt

HERE = Path(__file__).parent
SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, batch_size=4)
FLAGS = [word for name, value in SMALL.items() for word in (gpt.flag(name), str(value))]
TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 40

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in an empty folder with a cache of its own, and leaves torch as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT, "utf-8")
    torch.manual_seed(0)

def train(**given):
    return gpt.train(**{**SMALL, "data": "text.txt", "steps": 6, "device": "cpu", "probe": "", **given})

def command(*words, **env):
    """A real process: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, HERE / "gpt.py", *words], capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, **env}, timeout=120)
    return done.returncode, done.stdout, done.stderr

def refused(capsys, *words):
    """The one line that `gpt.py words` ends with; it must be one, on stderr, with exit code 2."""
    capsys.readouterr()
    assert gpt.main(list(words)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error:") == 1
    return error.split("error:")[1]

def weights(folder, name="ckpt.pt"):
    return gpt.read_checkpoint(Path(folder) / name)["model"]

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def losses(folder):
    return [(line["step"], line["train_loss"], line.get("val_loss"))
            for line in map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())]

# --- Settings --------------------------------------------------------------------------------------------------------

def test_flags_can_be_written_in_three_ways():
    expected = gpt.parse(["train", "--n-layer", "3"])
    assert expected == gpt.parse(["train", "--n-layer=3"]) == gpt.parse(["train", "--n_layer", "3"])

def test_a_flag_beats_size_which_beats_arch_which_beats_the_default():
    def settle(**given):
        return gpt.settle({"out": "none", **given}, torch.device("cpu"))[0]
    assert settle(size="gpt2")["n_layer"] == 12 and settle(size="gpt2", n_layer=3)["n_layer"] == 3
    assert settle(arch="gpt2")["pos"] == "learned" and settle(arch="gpt2", pos="rope")["pos"] == "rope"
    assert settle(arch="bigram", size="gpt2")["n_layer"] == 0
    assert gpt.settle({"out": "none"}, torch.device("meta"))[0]["size"] == "baby"

@pytest.mark.parametrize("words, says", [
    (["--n-layr", "3"], "did you mean --n-layer"), (["--n-embd", "30"], "not divisible"), (["--n-layer", "-1"], "at least 0"),
    (["--n-layer", "two"], "whole number"), (["--n-layer", "2.5"], "whole number"), (["--lr", "nan"], "--lr"),
    (["--lr=-1"], "--lr"), (["--lr", "inf"], "--lr"), (["--n-head", "4", "--n-kv-head", "3"], "multiple"),
    (["--n-embd", "12", "--n-head", "4"], "even"), (["--mlp", "reglu"], "relu2"), (["--batch-size", "0"], "at least 1"),
    (["--dropout", "1"], "below 1"), (["--momentum", "1"], "below 1"), (["--steps", "5", "--minutes", "1"], "one of them"), (["--data", "none.txt"], "none.txt"),
    (["--data", "empty"], "empty"), (["--data", "empty.txt"], "too little text"), (["--data", "one.txt"], "too little text"),
    (["--data", "bad.txt"], "byte 5"), (["--data", "bad.jsonl"], "line 2"), (["--data", "cut.txt.gz"], "cut.txt.gz"),
    (["--vocab-size", "5"], "--vocab-size 5"), (["--tokenizer", "bpe", "--vocab-size", "100"], "257"),
    (["--resume"], "no run"), (["--arch", "bigram", "--n-layer", "2"], "no layers"), (["--device", "quantum"], "quantum"),
    (["--init", "none.pt"], "No such file"), (["--init", "text.txt"], "not a checkpoint"), (["word"], "word"), (["--lr"], "--lr"),
    (["--out", "text.txt"], "text.txt")])
def test_a_bad_request_is_one_line_and_writes_nothing(words, says, capsys):
    Path("empty").mkdir()
    Path("empty.txt").touch()
    Path("one.txt").write_text("a")
    Path("bad.txt").write_bytes(b"fine \xff")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    Path("cut.txt.gz").write_bytes(gzip.compress(TEXT.encode())[:-20])
    flags = [] if {"--n-embd", "--n-layer", "--n-head", "--batch-size", "--device"} & set(words) else FLAGS
    assert says in refused(capsys, "train", "--data", "text.txt", *flags, *words)
    assert not Path("out").exists()

def test_python_functions_take_the_same_settings_and_raise_the_same_errors():
    with pytest.raises(gpt.Error, match="n_layr|n-layr"):
        gpt.train(n_layr=3)
    with pytest.raises(ValueError):
        gpt.sample(temperature=-1)

# --- Tokenizers ------------------------------------------------------------------------------------------------------

AWKWARD = ["", "\n", "\x00", "a  b\r\n\r\n\tc ", "naïve café", "汉字かな交じり文", "🙂👩‍👩‍👧‍👦", "<|endoftext|>", "\ufeffx", " " * 70, "x" * 300]

def test_char_tokenizer_round_trips_its_vocabulary_and_names_the_rest():
    tokenizer = gpt.CharTokenizer.train(AWKWARD)
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert gpt.CharTokenizer("abc").encode("cab").tolist() == [2, 0, 1]
    with pytest.raises(gpt.Error, match="ß"):
        gpt.CharTokenizer("abc").encode("aß")

@pytest.fixture(scope="module")
def bpe():
    return gpt.BPETokenizer.train([TEXT, "汉字 " * 50], 300)

def test_bpe_round_trips_any_text(bpe):
    for text in AWKWARD:
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode("🙂")[:1]) == "\ufffd" or len(bpe.encode("🙂")) == 1
    assert len(bpe.tokens) == 300 == len(set(bpe.tokens))

def test_bpe_learns_the_merges_of_its_docstring():
    assert gpt.BPETokenizer.train(["aaa aaa"], 259).tokens[256:] == [b"aa", b"aaa", b"<|endoftext|>"]

def test_bpe_joins_the_commonest_pair_each_time(bpe):
    """Against the definition, slowly: encode with the merges so far, and count."""
    import regex
    words = [list(map(bytes, ([b] for b in word.encode()))) for word in regex.findall(gpt.GPT2_PATTERN, TEXT + "汉字 " * 50)]
    for token in bpe.tokens[256:270]:
        pairs = gpt.Counter(pair for word in words for pair in zip(word, word[1:]))
        assert pairs[max(pairs, key=pairs.get)] == max(n for (a, b), n in pairs.items() if a + b == token)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] + word[i + 1] == token:
                    word[i:i + 2] = [token]
                i += 1

def test_end_of_text_is_ordinary_in_data_and_one_token_in_a_prompt(bpe):
    assert bpe.eot not in bpe.encode("<|endoftext|>") and bpe.encode("<|endoftext|>", special=True).tolist() == [bpe.eot]

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_tokenizers_survive_a_checkpoint(kind, bpe):
    tokenizer = bpe if kind == "bpe" else gpt.CharTokenizer(TEXT)
    buffer = io.BytesIO()
    torch.save(tokenizer.state(), buffer)
    buffer.seek(0)
    again = gpt.tokenizer_from(torch.load(buffer, weights_only=True))
    assert again.tokens == tokenizer.tokens and torch.equal(again.encode(TEXT), tokenizer.encode(TEXT))

needs_gpt2 = pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="TIKTOKEN_CACHE_DIR does not name gpt2's files")

@needs_gpt2
def test_gpt2_tokenizer_is_tiktokens():
    import tiktoken
    reference, ours = tiktoken.get_encoding("gpt2"), gpt.BPETokenizer.gpt2()
    assert len(ours.tokens) == 50257 and ours.eot == 50256
    for text in AWKWARD + [TEXT]:
        assert ours.encode(text).tolist() == reference.encode_ordinary(text)

def test_gpt2_tokenizer_offline_names_the_files(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    def offline(name):
        raise ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(gpt.Error, match="6d1cbeee0f20b3d9449abfede4726ed8212e3aee.*6c7ea1a7e38e3a7f062df639a5b80947f075ffe6.*TIKTOKEN_CACHE_DIR"):
        gpt.BPETokenizer.gpt2()

# --- Model -----------------------------------------------------------------------------------------------------------

def make(arch="qwen3", **given):
    shape = dict(vocab_size=50, n_layer=2, n_head=4, n_embd=32, block_size=16)
    chosen = {k: v for k, v in gpt.ARCHS[arch].items() if k in {f.name for f in gpt.fields(gpt.Config)}}
    return gpt.build(gpt.Config(**{**shape, **chosen, **given}))

def scramble(model):
    """Weights as if trained: nothing is zero."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 1.0)
    return model.eval()

def test_gpt2_has_exactly_its_parameters():
    with torch.device("meta"):
        model = make("gpt2", vocab_size=50257, n_layer=12, n_head=12, n_embd=768, block_size=1024)
    assert gpt.count(model) == 124_439_808

@pytest.mark.parametrize("arch", gpt.ARCHS)
def test_the_first_loss_is_that_of_knowing_nothing(arch):
    model, ids = make(arch), torch.randint(50, (8, 17))
    loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    assert abs(loss / math.log(50) - 1) < 0.03

@pytest.mark.parametrize("given", [dict(arch=a) for a in gpt.ARCHS] + [dict(pos="none"), dict(mlp="relu2"), dict(n_kv_head=1)])
def test_no_prediction_sees_a_later_token(given):
    model, ids = scramble(make(**given)), torch.randint(50, (1, 16))
    changed = ids.clone()
    changed[:, 9:] = torch.randint(50, (7,))
    a, b = model(ids)[0], model(changed)[0]
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-5) and not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-2)

@pytest.mark.parametrize("H_kv, TQ", [(4, 7), (2, 7), (1, 7), (2, 3), (4, 1)])
def test_the_two_attentions_are_equal_and_aligned_with_the_newest_keys(H_kv, TQ):
    q, k, v = (torch.randn(2, h, t, 8, dtype=torch.float64, requires_grad=True) for h, t in ((4, TQ), (H_kv, 7), (H_kv, 7)))
    plain, maps = gpt.plain_attention(q, k, v, maps=True)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, TQ, dtype=torch.float64)) and maps.triu(7 - TQ + 1).max() == 0
    others = [gpt.fused_attention(q, k, v)]
    if not gpt.NO_KERNELS:
        others += [gpt.kernels.attention(q, k, v, impl=impl) for impl in ("auto", "plain")]
    for other in others:
        assert torch.allclose(plain, other)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (plain, other))):
            assert torch.allclose(a, b)

def test_rope_scores_depend_on_distance_alone():
    model, q, k = make(block_size=64), torch.randn(8), torch.randn(8)
    def score(i, j):
        turned = [gpt.rotate(x.view(1, 1, 1, 8), model.cos[t:t + 1], model.sin[t:t + 1]) for x, t in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()
    assert score(5, 3) == pytest.approx(score(40, 38), abs=1e-4) != pytest.approx(score(5, 4), abs=1e-2)
    assert not any("positions" in name for name, _ in model.named_parameters())

def test_a_tied_head_shares_the_embedding_and_targets_of_minus_one_do_not_count():
    model, ids = scramble(make("gpt2")), torch.randint(50, (2, 9))
    assert model.head.weight is model.embed.weight
    targets = ids[:, 1:].clone()
    targets[:, 4:] = -1
    logits = model(ids[:, :-1])[0]
    assert model(ids[:, :-1], targets)[1].item() == pytest.approx(F.cross_entropy(logits[:, :4].flatten(0, 1), ids[:, 1:5].flatten()).item(), rel=1e-5)

def test_activation_checkpointing_changes_no_gradient():
    model, ids = make(dropout=0.1).train(), torch.randint(50, (2, 9))
    torch.nn.init.normal_(model.head.weight)
    grads = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))

def test_every_attention_gives_the_shape_of_its_queries_whatever_the_device():
    """Off the CPU keys and values of a group are repeated, since few kernels know groups."""
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 9, 8, device="meta")
    assert gpt.fused_attention(q, k, k).shape == q.shape

def test_dropout_zeroes_its_share_everywhere_alike_and_keeps_the_mean():
    """On a CPU eight places share a random number: none of them may be favoured, and none may follow another."""
    torch.manual_seed(0)
    x = torch.ones(1 << 18, 8, requires_grad=True)
    y = gpt.dropout(x, 0.1)
    y.sum().backward()
    zero = (y == 0).float()
    assert torch.equal(x.grad, y) and y.max().item() == pytest.approx(1 / 0.9, abs=0.005) and y.mean().item() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(zero.mean(0), torch.tensor(26 / 256), atol=3e-3) and torch.corrcoef(zero.T).fill_diagonal_(0).abs().max() < 0.01
    assert gpt.dropout(x, 0.0) is x and gpt.dropout(x, 0.999).isfinite().all() and not torch.equal(gpt.dropout(x, 0.1), y)
    assert torch.equal(gpt.GPT(gpt.Config(vocab_size=5, dropout=0.5)).eval().dropout(x), x)

# --- Data ------------------------------------------------------------------------------------------------------------

def test_windows_reach_the_last_token_and_differ_between_processes_and_steps():
    tokens = torch.arange(20).to(torch.uint16)
    seen = torch.cat([gpt.training_windows(tokens, 4, (2, 1, 8), 0, 1, step) for step in range(40)])
    assert seen.shape == (640, 5) and seen[:, -1].max() == 19 and seen[:, 0].min() == 0
    both = gpt.training_windows(tokens, 4, (1, 1, 8), 0, 1, 3)
    halves = [gpt.training_windows(tokens, 4, (1, 2, 4), rank, 1, 3) for rank in (0, 1)]
    assert torch.equal(both, torch.cat(halves)) and not torch.equal(*halves)

@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_a_run_sees_every_part_of_the_text_equally_often(seed):
    """Guards against places drawn by chance, which leave one token in twenty unseen in three passes."""
    N, T, rows = 10_000, 50, 8
    starts = torch.cat([gpt.training_windows(torch.arange(N), T, (1, 1, rows), 0, seed, step)[:, 0] for step in range(3 * N // T // rows)])
    seen = torch.zeros(N).scatter_add_(0, (starts[:, None] + torch.arange(T)).flatten(), torch.ones(len(starts) * T))
    assert 2 <= seen[T:-T].min() and seen.max() <= 4 and len(starts.unique()) == len(starts)

@pytest.mark.parametrize("n, stride", [(50, None), (50, 5), (49, 1), (17, None), (16, None), (2, None), (33, 16)])
def test_mean_loss_counts_each_token_once_with_the_context_it_says(n, stride):
    model, tokens = scramble(make()), torch.randint(50, (n,))
    total = 0.0
    for t in range(1, n):  # predict token t from the window that counts it
        step, T = stride or 16, min(16, n - 1)
        step = min(step, T)
        start = 0 if t <= T else -(-(t - T) // step) * step
        logits = model(tokens[None, start:t])[0][0, -1]
        total += F.cross_entropy(logits, tokens[t]).item()
    loss, counted = gpt.mean_loss(model, tokens, stride, batch_size=3)
    assert counted == n - 1 and loss == pytest.approx(total / (n - 1), rel=1e-4)

# --- Training --------------------------------------------------------------------------------------------------------

def test_orthogonalise_gives_every_singular_value_about_one():
    for shape in ((2, 16, 64), (3, 48, 16)):
        values = torch.linalg.svdvals(gpt.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3

@pytest.mark.parametrize("arch, optimizer", [("qwen3", "muon"), ("gpt2", "muon"), ("gpt2", "adamw"), ("bigram", "muon")])
def test_every_parameter_has_exactly_one_optimizer_and_learns(arch, optimizer):
    model, ids = make(arch), torch.randint(50, (4, 17))
    optimizers = gpt.make_optimizers(model, gpt.Training(optimizer=optimizer, lr=0.1 if arch == "bigram" else 3e-3))
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    first = model(ids[:, :-1], ids[:, 1:])[1].item()
    for _ in range(20):
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert model(ids[:, :-1], ids[:, 1:])[1].item() < first - 0.5

def test_learning_rate_rises_over_the_warmup_and_ends_at_zero():
    shares = [gpt.lr_share(step, step / 10, warmup=3) for step in range(11)]
    assert shares[0] == 0.25 and shares[3] == 0.7 and shares[10] == 0 and max(shares) == shares[3]

def test_precision_follows_capability_not_emulation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert gpt.pick_dtype("auto", torch.device("cuda"))[0] == dtype
    assert gpt.pick_dtype("auto", torch.device("cpu"))[0] == torch.float32

def test_two_runs_are_the_same_to_the_last_bit():
    a, b = (train(out=out) for out in "ab")
    assert equal(weights("a"), weights("b")) and losses("a") == losses("b") and a["train_loss"] == b["train_loss"]

HARD = dict(steps=20, dropout=0.1, accum=2, eval_every=7)

@pytest.fixture
def uninterrupted():
    train(out="whole", **HARD)
    return weights("whole"), losses("whole")

def test_a_run_stopped_by_a_signal_goes_on_exactly(uninterrupted):
    def stop(run):
        if run.step == 8:
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    assert train(out="cut", on_eval=stop, **HARD)["signal"] == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert gpt.train(resume=True, out="cut")["step"] == 20
    assert (equal(weights("cut"), uninterrupted[0]), losses("cut")) == (True, uninterrupted[1])

def test_a_run_whose_last_checkpoint_is_gone_goes_on_exactly_from_the_one_before(uninterrupted):
    train(out="lost", save_every=10, **HARD)
    os.remove("lost/ckpt.pt")
    assert gpt.read_checkpoint(Path("lost/ckpt.prev.pt"))["step"] < 20
    gpt.train(resume=True, out="lost")
    assert (equal(weights("lost"), uninterrupted[0]), losses("lost")) == (True, uninterrupted[1])

def test_resume_refuses_other_data_and_another_shape_but_takes_more_steps(capsys):
    train(out="r", probe="to be")
    Path("other.txt").write_text(TEXT[::-1])
    assert "other data" in refused(capsys, "train", "--resume", "--out", "r", "--data", "other.txt")
    assert "--n-layer 2, not 3" in refused(capsys, "train", "--resume", "--out", "r", "--n-layer", "3")
    before, probes = gpt.read_lines(Path("r/log.jsonl")), Path("r/probe.jsonl").read_text()
    assert gpt.train(resume=True, out="r", steps=9)["step"] == 9 and "complete" not in capsys.readouterr().err
    lines = gpt.read_lines(Path("r/log.jsonl"))
    assert before[-1]["val_loss"] and lines[:len(before)] == before  # what was the end keeps its place in the curve
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert Path("r/probe.jsonl").read_text().startswith(probes)
    gpt.train(resume=True, out="r")
    assert gpt.read_lines(Path("r/log.jsonl")) == lines
    assert "this run is complete; --resume --steps N" in capsys.readouterr().err

def test_a_repeated_command_never_loses_a_run(capsys):
    train(out="r")
    kept = weights("r")
    line = refused(capsys, "train", "--out", "r", "--data", "text.txt", *FLAGS)
    assert all(word in line for word in ("step 6", "--resume", "--out", "--overwrite")) and equal(kept, weights("r"))
    assert train(out="r", overwrite=True, steps=2)["step"] == 2 and len(losses("r")) == 3

def test_two_runs_cannot_write_one_folder(capsys):
    with gpt.locked(Path("r")):
        assert "another run" in refused(capsys, "train", "--out", "r", "--data", "text.txt", *FLAGS)

def test_minutes_end_on_time_with_the_schedule_complete():
    begun = time.monotonic()
    result = train(steps=None, minutes=0.08)
    assert time.monotonic() - begun < 4.8 + 5.0 and result["lr"] < 0.1 * gpt.Training.lr and result["step"] > 3

def test_a_gradient_that_is_not_finite_changes_nothing_and_twenty_end_the_run(monkeypatch, capsys):
    honest = gpt.Run.backward
    def broken(self, windows):
        loss = honest(self, windows)
        return loss * math.nan if self.step in bad else loss
    monkeypatch.setattr(gpt.Run, "backward", broken)
    bad = {3}
    seen = {}
    train(out="one", on_eval=lambda run: seen.update({run.step: [p.clone() for p in run.raw.parameters()]}), eval_every=1)
    assert all(map(torch.equal, seen[3], seen[4])) and not all(map(torch.equal, seen[4], seen[5]))
    bad = set(range(5, 100))
    with pytest.raises(gpt.Error, match="20 steps") as error:
        train(out="many", steps=100, save_every=1)
    assert error.value.code == 1 and all(t.isfinite().all() for t in weights("many").values())

def test_out_of_memory_halves_the_pass_and_keeps_the_step(monkeypatch, capsys):
    class Small(gpt.GPT):
        def forward(self, idx, targets=None, **more):
            if self.training and len(idx) > 2:
                raise torch.OutOfMemoryError
            return super().forward(idx, targets, **more)
    train(out="roomy", steps=3, batch_size=5)
    monkeypatch.setattr(gpt, "GPT", Small)
    train(out="tight", steps=3, batch_size=5)
    assert "2 sequences at a time" in capsys.readouterr().err
    for a, b in zip(losses("roomy"), losses("tight")):
        assert a[2] == pytest.approx(b[2], abs=1e-4)

def test_a_compiler_that_fails_is_not_needed(monkeypatch, capsys):
    def broken(model):
        def fail(*a):
            raise RuntimeError("no C++ compiler")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    assert train(compile="on")["step"] == 6 and "no C++ compiler" in capsys.readouterr().err

def test_memorising_is_said_and_the_best_model_kept(monkeypatch, capsys):
    values = iter([4.0, 2.0, 2.1, 2.2, 2.3])
    monkeypatch.setattr(gpt, "mean_loss", lambda *a, **k: (next(values), 1))
    train(steps=4, eval_every=1)
    assert capsys.readouterr().err.count("rose three times") == 1
    assert gpt.load_run(Path("out"))["val_loss"] == 2.0 and gpt.load_run(Path("out"), "ckpt.pt")["val_loss"] == 2.3

def test_the_log_is_for_programs():
    train()
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7)) and lines[0]["val_loss"] == pytest.approx(math.log(len(set(TEXT))), rel=0.03)
    assert lines[-1]["tokens"] == 6 * 4 * 16 and lines[-1]["val_loss"] and lines[-1]["tokens_per_second"] > 0
    assert {"seconds", "train_loss", "lr", "grad_norm", "memory_mb"} <= lines[-1].keys()

def test_a_run_can_go_on_in_another_precision():
    """float16 needs a loss scale, of which a run in float32 has none: it must not end in a traceback on the way to a T4."""
    train(steps=4)
    for step, dtype in ((6, "float16"), (8, "bfloat16"), (9, "float32")):
        assert gpt.train(resume=True, steps=step, dtype=dtype, device="cpu")["step"] == step

def test_what_is_not_finite_is_null_in_the_logs():
    """JSON has no NaN: one in a log would leave the page of `inspect` empty."""
    gpt.append_line(Path("log.jsonl"), {"step": 1, "grad_norm": math.inf, "lens": [["NaN", math.nan]], "loss": 1.5})
    assert json.loads(Path("log.jsonl").read_text(), parse_constant=pytest.fail) == {"step": 1, "grad_norm": None, "lens": [["NaN", None]], "loss": 1.5}

def test_a_compiled_model_is_compiled_once(monkeypatch):
    """The pass that tries the compiler must be like those of training, or all is compiled again in the first step."""
    from torch._dynamo.testing import CompileCounter
    counter, real, tried, tries = CompileCounter(), torch.compile, [], gpt.compiled
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=counter))
    monkeypatch.setattr(gpt, "compiled", lambda *a: (tries(*a), tried.append(counter.frame_count))[0])
    train(compile="on", dropout=0.1)
    assert tried[0] == counter.frame_count > 0

def test_fine_tuning_keeps_weights_and_tokenizer_and_starts_anew():
    train(out="base")
    Path("more.txt").write_text("not to be " * 50)
    result = gpt.train(init="base", data="more.txt", out="fine", steps=3, batch_size=2)
    state = gpt.read_checkpoint(Path("fine/ckpt.pt"))
    assert result["step"] == 3 and state["tokenizer"]["chars"] == "".join(sorted(set(TEXT)))
    assert state["settings"]["training"]["lr"] == pytest.approx(gpt.Training.lr / 10) and state["settings"]["config"]["n_embd"] == 32

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])

@pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed")
def test_two_processes_give_the_weights_of_one():
    """Gradients must be averaged once per step, and the processes must see different halves of the same batch."""
    common = ["--data", "text.txt", *FLAGS, "--steps", "10", "--dtype", "float64", "--dropout", "0", "--accum", "2", "--device", "cpu"]
    assert gpt.main(["train", *common, "--out", "one"]) == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), HERE / "gpt.py", "train",
                          *common, "--out", "two", "--batch-size", "2"], capture_output=True, text=True, timeout=120)
    assert two.returncode == 0, two.stderr
    a, b = weights("one"), weights("two")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)

def test_torchrun_restarts_a_run_whose_process_died_from_its_checkpoint():
    """The first process comes back late, so that the second one would find the old one's address in torchrun's store."""
    Path("dying.py").write_text("""import os, sys, time
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "0":
    time.sleep(3)
sys.path.insert(0, sys.argv.pop(1))
import gpt
real = gpt.Run.update
def update(run):
    real(run)
    if run.rank == 1 and run.step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
gpt.Run.update = update
sys.exit(gpt.main())""", "utf-8")
    flags = ["--data", "text.txt", *FLAGS, "--steps", "10", "--device", "cpu", "--batch-size", "2", "--save-every", "2", "--overwrite"]
    def run(out, *words):
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", free_port(), *words,
                               "train", *flags, "--out", out], capture_output=True, text=True, timeout=120)
    died = run("died", "dying.py", HERE)
    assert died.returncode == 0, died.stderr
    assert "perhaps another one has died" in died.stderr or "exitcode" in died.stderr
    assert [step for step, _, _ in losses("died")] == list(range(11))
    assert run("whole", HERE / "gpt.py").returncode == 0 and equal(weights("died"), weights("whole"))

# --- Sampling --------------------------------------------------------------------------------------------------------

def test_eval_gives_the_loss_that_training_gave_in_half_precision_too():
    """With rounded weights it would be another model's."""
    loss = train(dtype="bfloat16", steps=30)["val_loss"]
    assert gpt.evaluate(dtype="bfloat16", device="cpu")["loss"] == pytest.approx(loss, abs=2e-4)

def test_greedy_top_k_and_top_p_keep_what_they_should():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    def seen(**how):
        rows = gpt.sample_next(logits.expand(2000, 4), generator=torch.Generator().manual_seed(0), **how)
        return set(rows.tolist())
    assert seen(temperature=0) == {0} and seen() == {0, 1, 2, 3} and seen(top_k=2) == {0, 1} and seen(top_k=99) == {0, 1, 2, 3}
    assert seen(top_p=0.49) == {0} and seen(top_p=0.51) == {0, 1} and seen(top_p=0.01) == {0} and seen(top_p=0.96) == {0, 1, 2, 3}
    assert seen(top_p=0.9, top_k=3) == {0, 1, 2} and seen(temperature=0.05) == {0}

def test_top_p_of_a_flat_large_vocabulary_looks_past_the_sorted_prefix():
    rows = gpt.sample_next(torch.zeros(3000, 5000), top_p=0.9, generator=torch.Generator().manual_seed(0))
    assert len(set(rows.tolist())) > 1500 and max(rows.tolist()) < 5000

def test_logits_that_are_not_finite_are_an_error_not_a_token():
    with pytest.raises(gpt.Error, match="not finite"):
        gpt.sample_next(torch.tensor([[0.0, math.nan]]))

@pytest.mark.parametrize("arch, prompt", [(a, p) for a in gpt.ARCHS for p in (1, 16)] + [("qwen3", 40)])
def test_the_cache_changes_nothing_across_the_edge_of_the_context(arch, prompt, monkeypatch):
    model, idx = scramble(make(arch, n_kv_head=2)), torch.randint(50, (2, prompt))
    honest, logits, runs = gpt.sample_next, [], []
    monkeypatch.setattr(gpt, "sample_next", lambda x, *a: logits.append(x) or honest(x, *a))
    for use_cache in (True, False):
        runs.append(torch.stack(list(gpt.generate(model, idx, 70, temperature=0, use_cache=use_cache))))
    assert torch.equal(*runs)
    for cached, uncached in zip(logits[:70], logits[70:]):
        assert (cached - uncached).abs().max() < 1e-4 * max(1, uncached.abs().max())

class Tape(torch.utils._python_dispatch.TorchDispatchMode):
    """A CUDA graph for CPUs: records ops, and repeats them on the same memory. Python does not run again, so a number
    that came from it stays as it was; and what would wait for a GPU may not be recorded."""
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), op
        out = op(*args, **kwargs or {})
        self.ops.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.ops:
            for old, new in zip(*(torch.utils._pytree.tree_leaves(x) for x in (out, op(*args, **kwargs)))):
                old.copy_(new)

@pytest.fixture
def taped(monkeypatch):
    """torch.cuda's graphs and streams as CPU ones -> the graphs made."""
    made = []
    def graph():
        made.append(Tape())
        made[-1].ops, made[-1].replays = [], 0
        return made[-1]
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in dict(CUDAGraph=graph, Stream=lambda device: stream, current_stream=lambda device: stream,
                               graph=lambda graph, stream: graph, stream=lambda s: contextlib.nullcontext(), synchronize=lambda device: None).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made

def decode(q, k_cache, v_cache, lengths):
    mask = torch.arange(k_cache.size(2)) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q, k_cache, v_cache, mask, enable_gqa=True)

@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_cuda_graph_writes_what_the_model_writes(arch, taped):
    """Guards against a step that keeps the position, the length or the token of its capture."""
    model, idx = scramble(make(arch, n_kv_head=2 if arch == "qwen3" else 4)), torch.randint(50, (2, 5))
    plain = list(gpt.generate(model, idx, 70, temperature=0))
    assert not taped
    for block in model.blocks:
        block.attn.decode = decode
    graphed = list(gpt.generate(model, idx, 70, temperature=0))
    assert torch.equal(torch.stack(graphed), torch.stack(plain)) and taped[0].replays > 60

@pytest.mark.parametrize("wrong", [lambda q, k, v, lengths: v[:, :, :1].repeat(1, 2, 1, 1),  # not what attention gives
                                   lambda q, k, v, lengths: k[:, :, :lengths.max()]])  # what no graph can hold
def test_a_cuda_graph_that_does_not_work_is_not_used(wrong, taped, capsys):
    model, idx = scramble(make(n_kv_head=2)), torch.randint(50, (2, 5))
    plain = list(gpt.generate(model, idx, 70, temperature=0))
    for block in model.blocks:
        block.attn.decode = wrong
    assert torch.equal(torch.stack(list(gpt.generate(model, idx, 70, temperature=0))), torch.stack(plain))
    assert len(lines := capsys.readouterr().err.splitlines()) == 1 and "no CUDA graph here" in lines[0]

def test_prefill_in_chunks_equals_one_pass():
    model, idx = scramble(make(n_kv_head=2)), torch.randint(50, (2, 14))
    whole = model(idx)[0]
    for chunk in (1, 3, 7):
        cache = model.new_cache(2)
        parts = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunk, dim=1)], dim=1)
        assert torch.allclose(parts, whole, atol=1e-4) and cache.length == 14

def test_streamed_text_never_breaks_a_character_and_stops_where_told(bpe):
    for text in AWKWARD:
        pieces = list(gpt.stream_text(bpe, bpe.encode(text).tolist()))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    tokenizer = gpt.CharTokenizer("abcd")
    pieces = list(gpt.stream_text(tokenizer, tokenizer.encode("aababcd").tolist(), stop="abc"))
    assert "".join(pieces) == "aab"
    assert "".join(gpt.stream_text(tokenizer, tokenizer.encode("aaba").tolist(), stop="abc")) == "aaba"
    assert list(gpt.stream_text(bpe, [0xe6, 0xb1, 0x89])) == ["", "", "汉", ""]

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    gpt.train(**SMALL, data=str(folder / "text.txt"), out=str(folder / "run"), steps=30, device="cpu")
    return str(folder / "run")

def test_a_sample_is_its_prompt_and_then_text_and_nothing_else(trained, capsys):
    texts = gpt.sample(out=trained, prompt="To be", tokens=40, seed=3)
    out = capsys.readouterr().out
    assert out == texts[0] + "\n" and texts[0].startswith("To be") and len(texts[0]) == 45
    assert gpt.sample(out=trained, prompt="To be", tokens=40, seed=3, cache=False) == texts
    assert gpt.sample(out=trained, prompt="To be", tokens=40, seed=4) != texts
    several = gpt.sample(out=trained, prompt="To be", tokens=9, num=3)
    capsys.readouterr()
    assert len(several) == 3 == len(set(several)) and all(len(text) == 14 for text in several)

def test_prompts_of_any_kind_are_met(trained, capsys, monkeypatch):
    assert gpt.sample(out=trained, prompt="zß🙂\ud800", tokens=3)[0][:0] == ""
    assert "'z' 'ß' '🙂'" in capsys.readouterr().err
    assert len(gpt.sample(out=trained, tokens=4)[0]) == 4
    assert gpt.sample(out=trained, prompt=TEXT[:300], tokens=4)[0].startswith(TEXT[:300])
    assert "newest 16" in capsys.readouterr().err
    Path("p.txt").write_text("To be")
    monkeypatch.setattr(sys, "stdin", io.StringIO("or not"))
    assert gpt.sample(out=trained, prompt="@p.txt", tokens=0) == ["To be"] and gpt.sample(out=trained, prompt="-", tokens=0) == ["or not"]

@pytest.mark.parametrize("words, says", [
    (["--temperature=-1"], "--temperature"), (["--top-p", "0"], "top-p"), (["--top-p", "1.5"], "top-p"), (["--prompt", "@no"], "no"),
    (["--tokens", "-5"], "--tokens"), (["--num", "0"], "--num"), (["--out", "nowhere"], "no run"), (["--temprature", "1"], "--temperature")])
def test_bad_requests_to_sample(trained, words, says, capsys):
    assert says in refused(capsys, "sample", "--out", trained, *words)

def test_a_temperature_near_zero_is_greedy(trained):
    assert gpt.sample(out=trained, tokens=20, temperature=1e-38) == gpt.sample(out=trained, tokens=20, temperature=0)

def test_sampling_needs_neither_the_data_nor_a_compiler(trained, monkeypatch):
    monkeypatch.setattr(gpt, "find_files", lambda *a: pytest.fail("read the data"))
    monkeypatch.setattr(torch, "compile", lambda *a: pytest.fail("compiled"))
    assert gpt.sample(out=trained, tokens=5)

def test_eval_is_the_direct_sum_and_knows_bytes(trained, capsys):
    Path("more.txt").write_text("that is the question.\n" * 3)
    result = gpt.evaluate(out=trained, data="more.txt", stride=1)
    model, tokenizer = gpt.load_model(trained)
    ids = tokenizer.encode("that is the question.\n" * 3).long()
    total = sum(F.cross_entropy(model(ids[None, max(0, t - 16):t])[0][0, -1], ids[t]).item() for t in range(1, len(ids)))
    assert result["tokens"] == 65 and result["loss"] == pytest.approx(total / 65, rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(total / 65), rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(total / 65 / math.log(2), rel=1e-4)
    capsys.readouterr()
    assert gpt.main(["eval", "--out", trained, "--json"]) == 0
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "stride"} == json.loads(capsys.readouterr().out).keys()
    Path("odd.txt").write_text("that is ß")
    assert "ß" in refused(capsys, "eval", "--out", trained, "--data", "odd.txt")

# --- Text into tokens ------------------------------------------------------------------------------------------------

def text_of(data, tokenizer="char"):
    tokens, tokenizer, _ = gpt.load_tokens([data] if isinstance(data, str) else data, tokenizer)
    return b"".join(tokenizer.tokens[i] for i in tokens.tolist()).decode()

def test_files_folders_globs_and_archives_are_read_as_they_are():
    Path("d/deep").mkdir(parents=True)
    Path("d/a.txt").write_bytes("\ufeffone\r\n".encode())
    Path("d/deep/b.jsonl").write_text('{"text": "two"}\n\n{"text": "three\\n"}\n')
    Path("d/c.txt.gz").write_bytes(gzip.compress("четыре".encode()))
    Path("d/ignored.py").write_text("no")
    assert text_of("d") == "one\r\nчетыреtwothree\n"
    assert text_of("d/*.txt") == "one\r\n" and text_of(["d/c.txt.gz", "d/a.txt"]) == "четыреone\r\n"

def test_half_a_character_in_json_is_replaced():
    Path("half.jsonl").write_text('{"text": "ab \\ud83d cd"}\n')
    assert "".join(gpt.pieces([Path("half.jsonl")])) == "ab \ufffd cd"

def test_documents_are_separated_where_the_tokenizer_can(bpe):
    Path("b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    assert gpt.load_tokens(["b.jsonl"], bpe)[0].tolist().count(bpe.eot) == 1

@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_cutting_text_into_pieces_changes_no_token(size, bpe):
    text = TEXT[:700] + "\n\n  \n a\n\nb \n c\r\nd\te\n" + "x\n" * 30 + "no newline " * 10
    Path("t.txt").write_bytes(text.encode())
    pieces = list(gpt.pieces([Path("t.txt")], size))
    assert "".join(pieces) == text and (size > 5000 or len(pieces) > 2)
    assert torch.equal(torch.cat([bpe.encode(piece) for piece in pieces]), bpe.encode(text))

def test_tokens_are_kept_and_found_again_but_not_for_other_text(monkeypatch):
    first = gpt.load_tokens(["text.txt"])
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "tokenise", lambda *a: pytest.fail("tokenised twice"))
        again = gpt.load_tokens(["text.txt"])
    assert torch.equal(first[0], again[0]) and first[2] == again[2]
    for kept in Path("cache").glob("*.bin"):  # somebody tidied up
        kept.unlink()
    assert text_of("text.txt") == TEXT
    Path("text.txt").write_text(TEXT[1:])
    assert gpt.load_tokens(["text.txt"])[2] != first[2]

def test_an_interrupted_tokenisation_leaves_nothing_that_looks_whole(monkeypatch):
    def interrupted(*a):
        yield "To be"
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpt, "pieces", interrupted)
        gpt.load_tokens(["text.txt"], gpt.CharTokenizer(TEXT))
    assert not list(Path("cache").glob("*.bin*")) and text_of("text.txt") == TEXT

def test_a_large_vocabulary_takes_four_bytes():
    Path("v.txt").write_text("".join(map(chr, range(0x4e00, 0x9fff))) + "".join(map(chr, range(0x20000, 0x20000 + 50000))), "utf-8")
    tokens, tokenizer, _ = gpt.load_tokens(["v.txt"])
    assert tokens.dtype == torch.uint32 and len(tokenizer.tokens) > 65536 and int(tokens[-1]) == len(tokenizer.tokens) - 1

def test_a_folder_that_cannot_be_written_is_no_obstacle(monkeypatch, capsys):
    Path("file").touch()
    monkeypatch.setenv("GPT_CACHE", "file/cache")
    assert text_of("text.txt") == TEXT and "file/cache" in capsys.readouterr().err

def test_short_texts_shrink_the_context_and_may_have_nothing_to_validate_on(capsys):
    for n in (2, 15, 40):
        Path("short.txt").write_text(("ab" * 20)[:n])
        result = train(data="short.txt", out=f"o{n}", steps=2)
        err = capsys.readouterr().err
        assert ("the context shrinks" in err or n > 20) and ("too short to keep" in err) == (n == 2)
        assert (result["val_loss"] is None) == (n == 2)
        gpt.sample(out=f"o{n}", tokens=5)

# --- Checkpoints -----------------------------------------------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)

def test_damaged_and_foreign_checkpoints_are_one_line_and_run_nothing(capsys):
    train(out="r", steps=2)
    good = Path("r/best.pt").read_bytes()
    number, chance = int(os.environ.get("DAMAGED", 40)) // 2, random.Random(0)  # `DAMAGED=300` is the long form
    damaged = {"empty": b"", "text": b"hello", "pickle": pickle.dumps(Evil())}
    damaged |= {f"cut{i}": good[:i] for i in chance.sample(range(len(good)), number)}
    for i in chance.sample(range(len(good)), number):
        damaged[f"flip{i}"] = good[:i] + bytes([good[i] ^ chance.randrange(1, 256)]) + good[i + chance.choice((0, 1, 2)):]
    for name, write in {"evil": lambda file: torch.save({"format": 1, "model": Evil()}, file),
                        "old evil": lambda file: torch.save({"format": 1, "model": Evil()}, file, _use_new_zipfile_serialization=False),
                        "foreign": lambda file: zipfile.ZipFile(file, "w").writestr("word/document.xml", "<w/>"),
                        "bomb": lambda file: zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED).writestr("data.pkl", bytes(1 << 26)),
                        "tensor": lambda file: torch.save(torch.zeros(3), file), "list": lambda file: torch.save([1], file)}.items():
        write(buffer := io.BytesIO())
        damaged[name] = buffer.getvalue()
    for name, data in damaged.items():
        Path("x.pt").write_bytes(data)
        try:
            assert equal(gpt.load_model("x.pt")[0].state_dict(), weights("r", "best.pt")), name  # a byte that does not matter
        except gpt.Error as e:
            assert "x.pt" in str(e) and "\n" not in str(e)
    assert not Path("evil").exists() and len(damaged) > 2 * number
    state = gpt.read_checkpoint(Path("r/best.pt"))
    torch.save(state | {"format": 99}, "new.pt")
    assert "newer" in refused(capsys, "sample", "--init", "new.pt")
    del state["model"]["embed.weight"]
    torch.save(state, "part.pt")
    assert "fit together" in refused(capsys, "sample", "--init", "part.pt")

def test_a_damaged_checkpoint_falls_back_to_the_one_before(capsys):
    train(out="r", save_every=3)
    Path("r/ckpt.pt").write_bytes(Path("r/ckpt.pt").read_bytes()[:-1000])
    gpt.train(resume=True, out="r")
    assert "the one before" in capsys.readouterr().err
    assert equal(weights("r"), weights("r")) and gpt.read_checkpoint(Path("r/ckpt.pt"))["step"] == 6

def test_saving_that_fails_leaves_the_old_checkpoint_and_training_goes_on(monkeypatch, capsys):
    honest = torch.save
    def full(state, file):
        if state["step"] == 3:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        honest(state, file)
    monkeypatch.setattr(torch, "save", full)
    assert train(save_every=3, eval_every=6)["step"] == 6
    assert "MB are free); training" in capsys.readouterr().err.replace("free; training", "free); training")
    assert not list(Path("out").glob("*.tmp")) and gpt.read_checkpoint(Path("out/ckpt.pt"))["step"] == 6

def test_a_disk_without_room_ends_in_one_line_and_keeps_what_was_there():
    """A limit on the size of files stands in for a full disk; beyond it writes fail, in the middle of a file."""
    limited = "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); import gpt; sys.exit(gpt.main())"
    def run(limit, *words):
        done = subprocess.run([sys.executable, "-c", limited, HERE, str(limit), *words], capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr
    code, err = run(1000, "train", "--data", "text.txt", *FLAGS, "--steps", "2")  # no room for the tokens
    assert code == 1 and "cannot be written: File too large" in err and not list(Path("cache").glob("*.bin*"))
    train(out="r")
    kept = weights("r")
    size = os.path.getsize("r/ckpt.pt")
    code, err = run(size - 1000, "train", "--resume", "--out", "r", "--steps", "9", "--save-every", "1")
    assert code == 1 and "training goes on" in err and "last checkpoint could not be saved" in err and "MB are free" in err
    assert equal(weights("r"), kept) and not list(Path("r").glob("*.tmp"))
    assert gpt.train(resume=True, out="r", steps=9)["step"] == 9

def test_a_checkpoint_is_plain_and_names_no_wrapper():
    train(compile="off")
    state = torch.load("out/ckpt.pt", weights_only=True)
    assert {"format", "model", "settings", "tokenizer", "step", "val_loss", "optimizer", "scaler", "rng", "data"} <= state.keys()
    assert state["model"].keys() == make().state_dict().keys()

# --- Looking inside --------------------------------------------------------------------------------------------------

def test_a_look_sees_what_the_model_does_and_leaves_no_trace():
    torch.manual_seed(1)
    model = gpt.GPT(gpt.Config(vocab_size=11, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, block_size=20, dropout=0.5)).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx, attends = torch.randint(11, (20,)), [block.attn.attend for block in model.blocks]
    probs, maps = gpt.look(model, idx)
    assert model.training and [block.attn.attend for block in model.blocks] == attends
    assert not model.dropout._forward_hooks and not model.blocks[0]._forward_hooks
    assert probs.shape == (4, 20, 11) and maps.shape == (3, 4, 20, 20)
    model.eval()
    for impl in ("plain", "sdpa"):  # the maps come from the plain attention: the fused one must mean the same
        gpt.use_attention(model, impl, torch.float32)
        assert torch.allclose(model(idx[None])[0][0].softmax(-1), probs[-1], atol=1e-5)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 4, 20)) and maps.triu(1).abs().max() == 0
    bare = model.head(model.norm(model.embed(idx))).softmax(-1)
    assert torch.allclose(probs[0], bare, atol=1e-6)  # the lens begins before the first block

def test_a_bigram_can_be_looked_at_too():
    probs, maps = gpt.look(gpt.build(gpt.Config(vocab_size=7, n_layer=0)), torch.arange(5))
    assert probs.shape == (1, 5, 7) and maps.numel() == 0

def test_recitation_is_measured_on_whole_runs():
    assert gpt.longest_run("abcd", "xbcy") == 2 and gpt.longest_run("", "x") == gpt.longest_run("x", "") == 0
    source = "".join(random.Random(0).choices("abc", k=400))
    text = "".join(random.Random(1).choices("abc", k=60)) + source[100:130] + "".join(random.Random(2).choices("abc", k=60))
    slow = max(n for n in range(len(text)) for i in range(len(text) - n + 1) if text[i:i + n] in source)
    assert gpt.longest_run(text, source) == slow >= 30
    marks = gpt.recited(text, source, 25)
    assert all(marks[60:90]) and 30 <= sum(marks) < 40 and not any(gpt.recited(text, source, slow + 1))

def test_probes_change_no_weight_and_record_what_happened():
    runs = {probe: train(out=f"p{probe}", probe=probe, steps=40, dropout=0.1) for probe in ("", "to be, or")}
    assert equal(weights("p"), weights("pto be, or")) and not Path("p/probe.jsonl").exists()
    lines = gpt.read_lines(Path("pto be, or/probe.jsonl"))
    assert [line["step"] for line in lines] == sorted({0, 1, 2, 4, 8, 16, 32, *range(0, 41, 2)})
    last = lines[-1]
    assert "".join(last["text"]) == "to be, or" and len(last["top"]) == 9 and len(last["rank"]) == 8
    assert [len(layer) for layer in last["lens"]] == [9] * 3 and len(last["greedy"]) == 8 + 12
    import base64
    assert len(base64.b64decode(last["maps"])) == 2 * 4 * 45
    assert len(last["samples"]) == 3 and last["longest"][0] >= last["longest"][1] >= 1 and "samples" not in lines[1]
    model, tokenizer = gpt.load_model("pto be, or")
    checkpoint = gpt.read_checkpoint(Path("pto be, or/ckpt.pt"))["model"]
    model.load_state_dict(checkpoint)
    probs = model(tokenizer.encode("to be, or")[None].long())[0][0].softmax(-1)
    assert last["top"][8][0][0] == tokenizer.chars[probs[8].argmax()] and abs(last["top"][8][0][1] - probs[8].max()) < 1e-3

def test_a_line_that_looks_like_a_file_name_is_text(capsys):
    Path("text.txt").write_text("@someone said this, and no more\n" * 200)
    assert train(probe=None, steps=2)["step"] == 2
    assert "".join(gpt.read_lines(Path("out/probe.jsonl"))[0]["text"]).startswith("@someone")
    gpt.inspect()
    Path("out/probe.jsonl").unlink()
    gpt.inspect()

def test_another_probe_after_resuming_and_no_probe_at_all_make_a_page():
    train(out="r", probe="to be", steps=6)
    gpt.train(resume=True, out="r", probe="that is the question", steps=12)
    lengths = {len(record["text"]) for record in page_data(gpt.inspect(out="r"))["records"]}
    assert lengths == {5, 16}  # the context is 16

def test_probes_of_a_resumed_run_are_those_of_one_that_never_stopped():
    def stop(run):
        gpt.watch(run)
        if run.step == 8:
            signal.raise_signal(signal.SIGINT)
    train(out="whole", probe=None, **HARD)
    train(out="cut", probe=None, on_eval=stop, **HARD)
    gpt.train(resume=True, out="cut")
    assert Path("cut/probe.jsonl").read_text() == Path("whole/probe.jsonl").read_text()

def test_heads_are_named_after_where_they_look(monkeypatch):
    idx = torch.tensor([3, 1, 2, 1, 2, 3, 1, 2, 3, 1, 1, 2])
    n = len(idx)
    maps = torch.zeros(1, 4, n, n)
    for t in range(1, n):
        same = [j for j in range(t) if idx[j] == idx[t]]
        maps[0, 0, t, t - 1] = maps[0, 1, t, 0] = 1
        for j in same:
            maps[0, 2, t, j] = 0.5 / len(same)
            maps[0, 3, t, j + 1] = 1 / len(same)
    monkeypatch.setattr(gpt, "look", lambda model, idx, lens: (None, maps))
    scores = gpt.roles(torch.nn.Linear(1, 1), idx)
    found = [scores[name][0, head].item() for head, name in enumerate(("previous token", "first token", "same token", "after the same token"))]
    assert found == pytest.approx([1, 1, 0.5, 1]) and scores["first token"][0, 0] == 0

def test_the_worth_of_a_part_is_what_its_absence_costs():
    model = gpt.GPT(gpt.Config(vocab_size=9, n_layer=2, n_head=2, n_embd=16, block_size=12)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    tokens = torch.randint(9, (200,), generator=torch.Generator().manual_seed(3))
    heads, layers = gpt.worth(model, tokens)
    base = gpt.mean_loss(model, tokens)[0]
    kept = model.blocks[1].attn.out.weight.data.clone()
    model.blocks[1].attn.out.weight.data[:, 8:] = 0  # its second head
    assert heads[1][1] == pytest.approx(gpt.mean_loss(model, tokens)[0] - base, abs=1e-6) and heads[1][1] != 0
    model.blocks[1].attn.out.weight.data = kept
    assert gpt.mean_loss(model, tokens)[0] == base  # nothing stays silenced
    model.blocks = model.blocks[:1]
    assert layers[1] == pytest.approx(gpt.mean_loss(model, tokens)[0] - base, abs=1e-6)

def test_the_bigram_level_is_what_a_trained_bigram_reaches():
    tokens = torch.randint(5, (4000,), generator=torch.Generator().manual_seed(5)).cumsum(0) % 7
    level = gpt.bigram_loss(tokens[:3600], tokens[3600:], 7)
    Path("text.txt").write_text("".join("abcdefg"[i] for i in tokens))
    gpt.train(arch="bigram", data="text.txt", steps=300, block_size=16, device="cpu", probe="")
    assert abs(gpt.evaluate()["loss"] - level) < 0.02 and level < math.log(5) + 0.05

def page_data(path):
    page = Path(path).read_text("utf-8")
    assert len(page.encode()) < 2_000_000 and page.count("</script>") == 1
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", page), "the page must need no network"
    return json.loads(re.search(r"^const D = (.*), R = D\.records", page, re.M).group(1))

def test_inspect_writes_a_page_that_needs_nothing():
    Path("text.txt").write_text((TEXT + "</script><b>a & b</b>\n") * 3)
    train(out="r", steps=30, probe="</script>")
    path = gpt.inspect(out="r")
    data = page_data(path)
    assert path == Path("r/inspect.html") and len(data["records"]) <= 40 and len(data["heads"]) == 8 and len(data["layers"]) == 2
    assert data["levels"]["ln(V)"] == pytest.approx(math.log(len(gpt.load_model("r")[1].chars))) and "bigram table" in data["levels"]
    for record in data["records"]:
        if record["samples"]:
            assert all(len(part) >= 20 for part, mark in record["samples"][0] if mark)
    gpt.inspect(out="r", probe="or not")
    assert "".join(page_data(path)["records"][0]["text"]) == "or not"

def test_inspect_without_the_text_or_a_run_still_shows_the_model(capsys):
    train(out="r", steps=2, probe="")
    os.remove("text.txt")
    assert "name one with --probe" in refused(capsys, "inspect", "--out", "r")
    assert gpt.main(["inspect", "--out", "r", "--probe", "To be"]) == 0
    assert page_data("r/inspect.html")["heads"][0]["worth"] is None and "without what needs the text" in capsys.readouterr().err
    assert gpt.main(["inspect", "--init", "r", "--probe", "To be", "--out", "elsewhere"]) == 0 and page_data("elsewhere/inspect.html")

def test_ablate_compares_and_goes_on_where_it_was(capsys, monkeypatch):
    words = ["ablate", "--vary", "n_head=1,2", "--vary", "n-layer=1 tie=true,false", "--seeds", "2", "--out", "a", "--data", "text.txt",
             *FLAGS, "--steps", "3", "--device", "cpu"]
    real, done = gpt.train, []
    def counted(**given):
        done.append(given["out"])
        if len(done) == 4:
            given["on_eval"] = lambda run: run.step == 2 and signal.raise_signal(signal.SIGTERM)
        return real(**given)
    monkeypatch.setattr(gpt, "train", counted)
    assert gpt.main(words) == 143 and len(done) == 4  # stopped in the fourth run
    assert len(json.loads(Path("a/ablate.json").read_text())["rows"]) == 3
    capsys.readouterr()
    assert gpt.main(words) == 0 and len(done) == 4 + 5
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["n_head=1", "n_head=2", "n_layer=1 tie=True", "n_layer=1 tie=False"]
    assert "±" in table[2] and gpt.main(words) == 0 and len(done) == 9
    assert "other settings" in refused(capsys, *words[:-4], "--steps", "4")
    assert "not divisible" in refused(capsys, "ablate", "--vary", "n_head=1,3", "--out", "b") and not Path("b").exists()
    for vary, says in {"qk_norm=0,1": "true or false", "seed=1,2": "cannot vary", "out=x,y": "cannot vary"}.items():
        assert says in refused(capsys, "ablate", "--vary", vary, "--out", "b")
    assert "goes on by itself" in refused(capsys, "ablate", "--vary", "n_head=1,2", "--out", "b", "--resume")
    assert all("--vary takes" in refused(capsys, "ablate", "--out", "b", *more) for more in ([], ["--vary", "n_head"]))
    assert "did you mean --n-head" in refused(capsys, "ablate", "--vary", "n_heads=1,3", "--out", "b")

# --- Weights in and out ----------------------------------------------------------------------------------------------
# Held against Hugging Face's transformers, where that is installed.

STRANGE = ("Hello, world! I'LL we'Ve don't \t tabs\r\n\r\n\n  12345 3.14 naïve café 日本語 👩‍👩‍👧 ﬁ ſ'ſ \u00a0\u2003x\u0085y\u200b e\u0301"
           " \x00\x7f ١٢٣ Ⅷ x²  \n \n   <|endoftext|>Ünïcödé   end  ")

@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers, the reference for these tests, is not installed")

@pytest.fixture
def gpt2_tokenizer():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and a test does not download")
    return gpt.BPETokenizer.gpt2()

# model_type, what differs from the small model below: odd sizes everywhere; GQA, tied and untied, biases where a type has them
THEIRS = [
    ("gpt2", {}), ("gpt2", dict(n_inner=21)), ("gpt2", dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
    ("llama", {}), ("llama", dict(num_key_value_heads=5)), ("llama", dict(tie_word_embeddings=True, num_key_value_heads=5)),
    ("llama", dict(attention_bias=True, mlp_bias=True)), ("llama", dict(head_dim=6, rms_norm_eps=1e-3, rope_theta=123.0)),
    ("qwen3", {}), ("qwen3", dict(tie_word_embeddings=True, num_key_value_heads=5)), ("qwen3", dict(head_dim=14, rope_theta=1e6)),
]

def theirs(transformers, kind, changes, folder, dtype=None, **saving):
    """A random model of transformers with no weight at its starting value, saved in a folder."""
    common = dict(vocab_size=131, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        config = transformers.GPT2Config(**common | dict(n_positions=37, n_embd=15, n_layer=3, n_head=5) | changes)
    else:
        make = transformers.LlamaConfig if kind == "llama" else transformers.Qwen3Config
        config = make(**common | dict(hidden_size=30, intermediate_size=17, num_hidden_layers=3, num_attention_heads=5,
                                      num_key_value_heads=1, max_position_embeddings=37) | ({"head_dim": 8} if kind == "qwen3" else {}) | changes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.15)
    (model.to(dtype) if dtype else model).save_pretrained(folder, **saving)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()

def close(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()

@torch.no_grad()
def same_model(ours, model):
    """Logits equal, greedy text equal: theirs by whole forward passes, ours through the KV cache."""
    idx = torch.randint(ours.config.vocab_size, (3, min(19, ours.config.block_size)), generator=torch.Generator().manual_seed(2))
    assert close(ours(idx)[0], model(idx).logits)
    text = idx[:1, :4]
    for _ in range(12):
        text = torch.cat((text, model(text).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert [int(i) for i in gpt.generate(ours, idx[:1, :4], 12, temperature=0)] == text[0, 4:].tolist()

def run_folder(folder, config, tokenizer, seed=3):
    """A run's folder with a random model, every weight away from its starting value."""
    torch.manual_seed(seed)
    model = gpt.build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.15)
    folder.mkdir()
    torch.save({"format": gpt.FORMAT, "model": model.state_dict(), "tokenizer": tokenizer.state(), "step": 0, "val_loss": None,
                "settings": {"config": gpt.asdict(config), "training": {}}}, folder / "best.pt")
    return model

def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def error(function, *args, **given):
    with pytest.raises(gpt.Error) as caught:
        function(*args, **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and caught.value.code in (1, 2)
    return str(caught.value)

# --- from transformers

@pytest.mark.parametrize("kind, changes", THEIRS, ids=str)
def test_logits_of_their_models(transformers, tmp_path, kind, changes):
    model = theirs(transformers, kind, changes, tmp_path / "a")
    ours, tokenizer = gpt.load_model(str(tmp_path / "a"))
    assert tokenizer is None
    same_model(ours, model)

@pytest.mark.parametrize("kind, changes", THEIRS, ids=str)
def test_round_trip_is_bit_equal(transformers, tmp_path, kind, changes):
    model = theirs(transformers, kind, changes, tmp_path / "a")
    gpt.export(init=tmp_path / "a", folder=tmp_path / "b")
    same_weights(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b"))
    same_weights(gpt.load_model(tmp_path / "a")[0], gpt.load_model(tmp_path / "b")[0])

def test_gpt2_defaults(transformers, tmp_path):
    """GPT2Config's own activation (the tanh GELU), epsilon, positions and tied head; only the size is small."""
    same_model(gpt.load_model(_gpt2_default(transformers, tmp_path))[0],
               transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a"))

def _gpt2_default(transformers, tmp_path):
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=300)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    model.save_pretrained(tmp_path / "a")
    return str(tmp_path / "a")

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(transformers, tmp_path, dtype):
    model = theirs(transformers, "llama", {}, tmp_path / "a", dtype)
    ours, _ = gpt.load_model(tmp_path / "a")
    assert ours.embed.weight.dtype == torch.float32
    same_model(ours, model)

def test_sharded(transformers, tmp_path):
    model = theirs(transformers, "qwen3", {}, tmp_path / "a", max_shard_size="10KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2 and not (tmp_path / "a" / "model.safetensors").exists()
    same_model(gpt.load_model(tmp_path / "a")[0], model)
    next((tmp_path / "a").glob("model-00002*")).unlink()
    assert "model-00002" in error(gpt.load_model, tmp_path / "a")

@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_and_old_names(transformers, tmp_path, zipped):
    """The oldest GPT-2 files: no prefix, the causal mask among the weights, no head; pickled in either of torch's ways."""
    model = theirs(transformers, "gpt2", {}, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    old = {name.removeprefix("transformer."): p for name, p in model.state_dict().items() if "lm_head" not in name}
    for i in range(3):
        old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 37, 37).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(old, tmp_path / "a" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same_model(gpt.load_model(tmp_path / "a")[0], model)

def test_a_pickle_runs_no_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2", vocab_size=9, n_positions=9, n_layer=1, n_embd=4, n_head=2)))
    torch.save({"wte.weight": Bad()}, tmp_path / "pytorch_model.bin")
    error(gpt.load_model, tmp_path)
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters", "neither"])
def test_rope_theta_in_both_spellings(transformers, tmp_path, spelling):
    theta = 10000.0 if spelling == "neither" else 345.0
    model = theirs(transformers, "llama", {"rope_theta": theta}, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    about = json.loads(path.read_text())
    for name in ("rope_theta", "rope_parameters", "rope_scaling"):
        about.pop(name, None)
    about |= {"rope_theta": {"rope_theta": theta, "rope_scaling": None}, "neither": {},
              "rope_parameters": {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}}[spelling]
    path.write_text(json.dumps(about))
    ours, _ = gpt.load_model(tmp_path / "a")
    assert ours.config.rope_theta == theta
    same_model(ours, model)

REFUSED = [
    ("gpt2", {"activation_function": "relu"}, "activation_function"), ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"n_head": 4}, "divisible"), ("gpt2", {"n_layer": 4}, "missing"), ("gpt2", {"n_layer": 2}, "not known"),
    ("gpt2", {"n_layer": 10 ** 9}, "fit"), ("gpt2", {"n_layer": 0}, "fit"), ("gpt2", {"n_layer": "x"}, "--n-layer"), ("gpt2", {"n_layer": []}, ""),
    ("gpt2", {"vocab_size": 130}, "wte.weight"), ("gpt2", {"n_embd": None}, "n_embd"), ("gpt2", {"vocab_size": 10 ** 18}, ""),
    ("gpt2", {"tie_word_embeddings": False}, "lm_head.weight"), ("gpt2", {"model_type": "mamba"}, "mamba"), ("gpt2", {"model_type": []}, ""),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "llama3"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
    ("llama", {"rope_parameters": 3}, ""), ("llama", {"max_position_embeddings": 10 ** 15}, ""),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"), ("llama", {"mlp_bias": True}, "mlp_bias"), ("llama", {"model_type": "qwen3"}, "norm"),
    ("qwen3", {"attention_bias": True}, "attention_bias"), ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
]

@pytest.mark.parametrize("kind, changes, says", REFUSED, ids=str)
def test_refused_configs(transformers, tmp_path, kind, changes, says):
    theirs(transformers, kind, {}, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert says in error(gpt.load_model, tmp_path / "a")

# --- safetensors

def packed(header, body=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body

def damaged(whole):
    """100 files, none of which is a whole one."""
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8:8 + length]), whole[8 + length:]
    r = random.Random(0)
    for n in [0, 1, 7, 8, 9, len(whole) - 1] + r.sample(range(10, len(whole) - 1), 19):
        yield whole[:n]
    for n in [0, 1, 2, length - 1, length + 1, len(whole), 1 << 24, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]:
        yield struct.pack("<Q", n) + whole[8:]
    for text in (b"[]", b"null", b"3", b'"x"', b"[" * 100_000, b"{" * 100_000, b"\xff\xfe", b"{}", b'{"a": NaN}', b'{"a": {}}'):
        yield packed(text, body)
    names = [name for name in header if name != "__metadata__"]
    changes = [("dtype", value) for value in ("F8", "", None, 3, [], "F16", "F64", "I64", "U8")]
    changes += [("shape", value) for value in (None, 3, "x", [], [1], [-1, -1], [1 << 62, 1 << 62], [10 ** 400], [1.0], [True], [[1]], [1] * 99, [None])]
    changes += [("data_offsets", value) for value in (None, [], [0], [0, 1], [0, 1, 2], [-4, 4], [1 << 70, 1 << 71], ["0", "4"], [4, 0], [0.5, 1], {}, 5)]
    for key, value in changes:
        yield packed(header | {r.choice(names[1:]): header[names[1]] | {key: value}}, body)
    for name in r.sample(names, 9):
        yield packed({n: a for n, a in header.items() if n != name}, body)  # a hole
    for name in r.sample(names, 4):
        yield packed(header | {"more": header[name]}, body)  # two in one place
    yield packed(header, body + b"\0" * 4)
    yield packed(header | {"gap": {"dtype": "F32", "shape": [1], "data_offsets": [len(body) + 4, len(body) + 8]}}, body + b"\0" * 8)
    for name in r.sample(names, 6):
        yield packed({n.replace(name, name + "x"): a for n, a in header.items()}, body)  # whole, but of another model
    for _ in range(2):
        yield bytes(r.randrange(256) for _ in range(300))

def test_a_hundred_damaged_files(tmp_path, capfd):
    config = dict(model_type="gpt2", vocab_size=11, n_positions=7, n_layer=1, n_embd=6, n_head=2)
    model = run_folder(tmp_path / "run", gpt.config_in(config)[1], gpt.CharTokenizer("abcdefghijk"))
    gpt.export(out=tmp_path / "run", folder=tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    whole = path.read_bytes()
    files = list(damaged(whole))
    assert len(files) >= 100
    capfd.readouterr()
    for i, file in enumerate(files):
        path.write_bytes(file)
        assert gpt.main(["sample", "--init", str(tmp_path / "a")]) == 2, i
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("gpt.py: error: ") and len(err) < 500, (i, err)
    path.write_bytes(whole)
    same_weights(gpt.load_model(tmp_path / "a")[0], model)
    length = struct.unpack("<Q", whole[:8])[0]
    for i in range(0, 8 + length, 7):  # a flipped byte is an Error, or in a comment and harmless
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
        try:
            gpt.load_model(tmp_path / "a")
        except gpt.Error as e:
            assert "\n" not in str(e)

def test_safetensors_read_as_their_package_does(tmp_path):
    """Every dtype, an empty tensor, a scalar, and a header after which numbers begin at an odd byte."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors, the reference for this test, is not installed")
    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 5) * 9).to(dtype) for name, dtype in gpt.SAFETENSORS.items()}
    tensors |= {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    safetensors.save_file(tensors, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    (tmp_path / "y").write_bytes(packed(whole[8:8 + length] + b" ", whole[8 + length:]))
    for name in "xy":
        found = gpt.read_safetensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())

# --- to transformers

OURS = [
    dict(gpt.ARCHS["gpt2"]), gpt.ARCHS["gpt2"] | dict(tie=False, mlp_hidden=13, norm_eps=1e-3),
    dict(qk_norm=False), dict(qk_norm=False, n_kv_head=1, tie=True), dict(qk_norm=False, bias=True, rope_theta=99.0),
    dict(qk_norm=True), dict(qk_norm=True, head_dim=14, n_kv_head=1, tie=True, norm_eps=1e-3),
]
BASE = dict(pos="rope", norm="rms", mlp="swiglu", bias=False, tie=False, block_size=29, n_layer=2, n_head=3, n_embd=18)

@pytest.mark.parametrize("config", OURS, ids=str)
def test_export_a_run(transformers, tmp_path, config):
    tokenizer = gpt.CharTokenizer("\n abcdefghé日👩")
    model = run_folder(tmp_path / "run", gpt.Config(**BASE | config | {"vocab_size": len(tokenizer.tokens)}), tokenizer)
    gpt.export(out=tmp_path / "run", folder=tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert type(loaded).__name__ == ("GPT2LMHeadModel" if config.get("pos") else "Qwen3ForCausalLM" if config["qk_norm"] else "LlamaForCausalLM")
    same_model(model, loaded)
    back, their = gpt.load_model(tmp_path / "a")[1], transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    same_weights(model, gpt.load_model(tmp_path / "a")[0])
    text = "a b\n\n日é  👩 cab 日 h \n"
    assert back.state() == tokenizer.state() and their(text).input_ids == tokenizer.encode(text).tolist()
    assert their.decode(their(text).input_ids) == text
    ids = their("abc", return_tensors="pt").input_ids
    greedy = loaded.generate(ids, max_new_tokens=9, do_sample=False)[0].tolist()  # no token of ours ends it early
    assert greedy == ids[0].tolist() + [int(i) for i in gpt.generate(model, ids, 9, temperature=0)]
    loaded.save_pretrained(tmp_path / "b")
    their.save_pretrained(tmp_path / "b")
    again, tokenizer_again = gpt.load_model(tmp_path / "b")
    same_weights(model, again)
    assert tokenizer_again.state() == tokenizer.state()

@pytest.mark.parametrize("config, name", [
    (dict(n_layer=0), "--n-layer"), (dict(pos="none"), "--pos"), (dict(mlp="relu2"), "--mlp"), (dict(norm="layer"), "--norm"),
    (dict(qk_norm=True, bias=True), "True"), (gpt.ARCHS["gpt2"] | dict(n_kv_head=1), "--n-kv-head"), (gpt.ARCHS["gpt2"] | dict(bias=False), "--bias"),
    (gpt.ARCHS["gpt2"] | dict(head_dim=8), "--head-dim"), (gpt.ARCHS["gpt2"] | dict(mlp="relu"), "--mlp")], ids=str)
def test_what_cannot_be_expressed_is_named(tmp_path, config, name):
    run_folder(tmp_path / "run", gpt.Config(**BASE | config | {"vocab_size": 5}), gpt.CharTokenizer("abcde"))
    assert name in error(gpt.export, out=tmp_path / "run", folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()

def test_export_overwrites_nothing(tmp_path):
    run_folder(tmp_path / "run", gpt.Config(**BASE | {"vocab_size": 5}), gpt.CharTokenizer("abcde"))
    for folder in ("empty", "new/deeper"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert gpt.main(["export", str(tmp_path / folder), "--out", str(tmp_path / "run")]) == 0
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for folder in ("file", "full", "run", "empty"):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert "is there" in error(gpt.export, out=tmp_path / "run", folder=tmp_path / folder)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert gpt.main(["export"]) == 2 and gpt.main(["export", "--out", str(tmp_path / "run")]) == 2
    assert gpt.main(["export", str(tmp_path / "y"), "--out", str(tmp_path / "none")]) == 2

# --- tokenizers

def export_with(tokenizer, tmp_path, name="t"):
    config = gpt.Config(**BASE | {"vocab_size": len(tokenizer.tokens)})
    run_folder(tmp_path / f"{name}-run", config, tokenizer)
    gpt.export(out=tmp_path / f"{name}-run", folder=tmp_path / name)
    return gpt.load_model(tmp_path / name)[1]

def same_ids(tokenizer, their, text=STRANGE):
    ids = their(text, add_special_tokens=False).input_ids
    assert tokenizer.encode(text, special=True).tolist() == ids
    return ids

def test_bpe_round_trip(transformers, tmp_path):
    tokenizer = gpt.BPETokenizer.train([(HERE / "input.txt").read_text()[:200_000] + STRANGE * 3], 800)
    assert export_with(tokenizer, tmp_path).state() == tokenizer.state()
    their = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    for text in (STRANGE, (HERE / "input.txt").read_text()[-20_000:]):
        ids = same_ids(tokenizer, their, text)
        assert their.decode(ids) == text == "".join(gpt.stream_text(tokenizer, ids))
    assert their.eos_token_id == tokenizer.eot and len(their) == 800

def test_gpt2_round_trip(transformers, tmp_path, gpt2_tokenizer):
    assert export_with(gpt2_tokenizer, tmp_path).state() == gpt2_tokenizer.state()
    their = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert their.decode(same_ids(gpt2_tokenizer, their)) == STRANGE
    assert their(STRANGE).input_ids == their(STRANGE, add_special_tokens=False).input_ids
    (tmp_path / "t" / "tokenizer.json").unlink()  # a vocabulary of 50,257 is GPT-2's
    assert gpt.load_model(tmp_path / "t")[1].state() == gpt2_tokenizer.state()

def learnt(tokenizers, size, special, pattern=None, nfc=False):
    """A tokenizer made by Hugging Face's own trainer, whose ids begin with the special tokens."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    t = tokenizers.Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    t.pre_tokenizer = byte if not pattern else pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), byte])
    t.decoder = decoders.ByteLevel()
    if nfc:
        t.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([(HERE / "input.txt").read_text()[:100_000], STRANGE * 3], trainer)
    return t

def their_folder(tmp_path, t, eot):
    """A model whose vocabulary is a little larger than its tokenizer's, as Qwen's is."""
    config = gpt.Config(**BASE | {"vocab_size": t.get_vocab_size() + 3})
    run_folder(tmp_path / "run", config, gpt.CharTokenizer("".join(map(chr, range(config.vocab_size)))))
    gpt.export(out=tmp_path / "run", folder=tmp_path / "a")
    t.save(str(tmp_path / "a" / "tokenizer.json"))
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eot}))
    return tmp_path / "a"

@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("nfc", [False, True])
def test_tokenizers_of_others(transformers, tmp_path, which, nfc):
    tokenizers = pytest.importorskip("tokenizers")
    pattern = gpt.PATTERNS[which]
    t = learnt(tokenizers, 700, ["<|im_end|>", "<|endoftext|>"], pattern if which else None, nfc)
    folder = their_folder(tmp_path, t, None)
    tokenizer = gpt.load_model(folder)[1]
    assert tokenizer.eot == 1 and tokenizer.nfc == nfc and len(tokenizer.tokens) == 703
    assert tokenizer.encode(STRANGE + "<|im_end|>", special=True).tolist() == t.encode(STRANGE + "<|im_end|>").ids
    assert gpt.tokenizer_from(json.loads(json.dumps(tokenizer.state()))).state() == tokenizer.state()
    gpt.export(init=folder, folder=tmp_path / "b")
    their = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    same_ids(tokenizer, their)
    assert gpt.load_model(tmp_path / "b")[1].state() == tokenizer.state()

def test_vocab_and_merges(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    t = learnt(tokenizers, 600, ["<|endoftext|>"])
    tokenizer = gpt.BPETokenizer.train(["abc"], 603)
    run_folder(tmp_path / "run", gpt.Config(**BASE | gpt.ARCHS["gpt2"] | {"vocab_size": 603}), gpt.CharTokenizer("abc"))
    gpt.export(out=tmp_path / "run", folder=tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    t.model.save(str(tmp_path / "a"))
    ours = gpt.load_model(tmp_path / "a")[1]
    assert ours.encode(STRANGE, special=True).tolist() == t.encode(STRANGE).ids

@pytest.mark.parametrize("change", [
    lambda t: t["pre_tokenizer"].update(add_prefix_space=True), lambda t: t["model"]["merges"].pop(50), lambda t: t["model"]["merges"].reverse(),
    lambda t: t["model"].update(type="WordPiece"), lambda t: t["model"].update(dropout=0.1), lambda t: t.update(normalizer={"type": "Lowercase"}),
    lambda t: t.update(pre_tokenizer=None), lambda t: t["model"]["vocab"].pop("!"), lambda t: t.update(added_tokens=[]), lambda t: t.pop("model"),
    lambda t: t["model"].update(vocab=[]), lambda t: t["added_tokens"][0].update(lstrip=True), lambda t: t["added_tokens"][0].update(id=10 ** 9),
    lambda t: t["added_tokens"][0].update(id=-1), lambda t: t["added_tokens"][0].update(id=5), lambda t: t["model"]["vocab"].update({"!": 2.5}),
    lambda t: t.update(post_processor={"type": "TemplateProcessing", "single": [], "special_tokens": {"<s>": {"ids": [0]}}}),
    lambda t: t["model"]["merges"].insert(0, ["x", "q"]), lambda t: t["model"]["merges"].__setitem__(3, 7)])
def test_a_tokenizer_that_would_differ_is_none(tmp_path, change):
    tokenizers = pytest.importorskip("tokenizers")
    folder = their_folder(tmp_path, learnt(tokenizers, 400, ["<|endoftext|>"]), 0)
    assert gpt.load_model(folder)[1] is not None
    file = json.loads((folder / "tokenizer.json").read_text())
    change(file)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert gpt.load_model(folder)[1] is None
    assert gpt.main(["sample", "--init", str(folder)]) == 2

# --- commands

def test_sample_from_their_folder(transformers, tmp_path, capfd):
    """The command, through the KV cache, against generate() of transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    t = learnt(tokenizers, 400, ["<|endoftext|>"])
    model = theirs(transformers, "qwen3", dict(vocab_size=400, max_position_embeddings=64), tmp_path / "a")
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>").save_pretrained(tmp_path / "a")
    capfd.readouterr()
    prompt = "The sea was "
    assert gpt.main(["sample", "--init", str(tmp_path / "a"), "--prompt", prompt, "--tokens", "20", "--temperature", "0"]) == 0
    ids = torch.tensor([t.encode(prompt).ids])
    made = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=0)[0, ids.size(1):].tolist()
    text = prompt + t.decode([i for i in made if i])
    assert capfd.readouterr().out == text + "\n"

def test_fine_tuning(tmp_path, monkeypatch):
    """train --init FOLDER keeps weights and tokenizer and starts at step 0; what it makes can be exported again."""
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    tokenizer = gpt.CharTokenizer("abcd \n")
    run_folder(tmp_path / "run", gpt.Config(**BASE | {"vocab_size": 6}), tokenizer)
    gpt.export(out=tmp_path / "run", folder=tmp_path / "a")
    (tmp_path / "my.txt").write_text("abc dab cad\n" * 60)
    result = gpt.train(init=tmp_path / "a", data=[str(tmp_path / "my.txt")], out=tmp_path / "b", steps=3, batch_size=4, device="cpu")
    assert result["step"] == 3
    gpt.export(out=tmp_path / "b", folder=tmp_path / "c")
    assert gpt.load_model(tmp_path / "c")[1].state() == tokenizer.state()

# --- GPT-2 by name

@pytest.fixture
def small_gpt2(monkeypatch, tmp_path):
    """openai-community/gpt2 as it is, but small: names without prefix, masks among them, no head."""
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(gpt.GPT2_SIZES, "gpt2", (2, 3, 6))
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Config(vocab_size=50257, block_size=1024, n_layer=2, n_head=3, n_embd=6, **gpt.ARCHS["gpt2"])).eval()
    torch.save({"format": gpt.FORMAT, "model": model.state_dict(), "tokenizer": gpt.CharTokenizer("ab").state(), "step": 0,
                "settings": {"config": gpt.asdict(model.config)}}, tmp_path / "x.pt")
    gpt.export(init=tmp_path / "x.pt", folder=tmp_path / "x")
    whole = (tmp_path / "x" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = {name.removeprefix("transformer."): about for name, about in json.loads(whole[8:8 + length]).items()}
    n = len(whole) - 8 - length
    header |= {"h.0.attn.bias": {"dtype": "F32", "shape": [1, 1, 2, 2], "data_offsets": [n, n + 16]}}
    return model, packed(header, whole[8 + length:] + bytes(16))

def test_gpt2_by_name(small_gpt2, gpt2_tokenizer, monkeypatch, tmp_path):
    model, file = small_gpt2
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: asked.append(url) or Path(path).write_bytes(file))
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder called gpt2 does not hide the name
    for _ in range(2):
        ours, tokenizer = gpt.load_model("gpt2")
    assert asked == ["https://huggingface.co/openai-community/gpt2/resolve/main/model.safetensors"]  # once
    same_weights(ours, model)
    assert tokenizer.state() == gpt2_tokenizer.state()
    assert (tmp_path / "cache" / "gpt2" / "model.safetensors").exists()
    assert "no run" in error(gpt.load_model, "./gpt2")

def test_gpt2_offline_or_cut_short(small_gpt2, monkeypatch, tmp_path):
    place = str(tmp_path / "cache" / "gpt2" / "model.safetensors")
    def offline(url, path, **_):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert place in error(gpt.load_model, "gpt2")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: Path(path).write_bytes(small_gpt2[1][:-100]))
    assert "delete" in error(gpt.load_model, "gpt2")
    assert gpt.main(["sample", "--init", "gpt2"]) == 2

# --- As a program, in a notebook, in the README ----------------------------------------------------------------------

def test_ascii_terminals_and_odd_paths_are_fine():
    folder = Path("ä folder 日本")
    folder.mkdir()
    (folder / "текст.txt").write_bytes("\ufeffНочь, улица, фонарь 🙂\r\n".encode() * 30)
    plain = dict(PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    code, _, err = command("train", "--data", folder / "текст.txt", "--out", folder / "out", *FLAGS, "--steps", "2", **plain)
    assert code == 0, err
    code, out, err = command("sample", "--out", folder / "out", "--tokens", "20", **plain)
    assert code == 0 and "?" in out, err

@pytest.mark.parametrize("text, code", [
    (b"", 2), (b"a", 2), (b"a b", 0), (b"\n" * 50, 0), (b"a\0b\0" * 20, 0), (b"\xef\xbb\xbfabc" * 9, 0), (b"a\r\nb\r\n" * 30, 0),
    ("漢字かな交じり文。".encode() * 30, 0), ("🙂🏳️‍🌈👩‍👩‍👧".encode() * 20, 0), (b"x" * 10_000_000, 0), (b"fine, then \xe2\x82", 2), (b"\xff\xfea\0", 2)])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_any_text_trains_and_samples_or_is_refused_in_one_line(text, code, tokenizer, capsys):
    Path("t.txt").write_bytes(text)
    words = ["--device", "cpu", "--out", "t"]
    assert gpt.main(["train", "--data", "t.txt", *FLAGS, "--steps", "2", "--tokenizer", tokenizer, *(["--vocab-size", "260"] if tokenizer == "bpe" else []), *words]) == code
    error = capsys.readouterr().err
    if code:
        assert error.count("error:") == 1 and "t.txt" in error and not list(Path("t").glob("*.pt"))
    else:
        for prompt in ("", "a", "\ud800 lone", "\n", "漢"):
            assert gpt.main(["sample", "--tokens", "20", "--prompt", prompt, *words]) == 0

def test_an_interrupted_process_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "gpt.py", "train", "--data", "text.txt", *FLAGS, "--steps", "1000000"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step 0" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in err and gpt.read_checkpoint(Path("out/ckpt.pt"))["step"] > 0

SLOW_DISK = """import os, sys, time; sys.path.insert(0, sys.argv.pop(1)); import gpt; write = os.fsync
os.fsync = lambda file: (time.sleep(0.05), write(file)); sys.exit(gpt.main())"""

def test_killed_at_any_moment_a_run_can_go_on():
    """SIGKILL at random moments, most of them while a checkpoint is written to a slow disk. `KILLS=50` is the long form."""
    kills, chance = int(os.environ.get("KILLS", 5)), random.Random(5)
    flags = ["--data", "text.txt", *FLAGS, "--steps", str(40 * kills), "--save-every", "1", "--eval-every", "50", "--device", "cpu", "--dropout", "0.1"]
    for kill in range(kills + 1):
        held = any(Path("killed", name).exists() for name in ("ckpt.pt", "ckpt.prev.pt"))
        words = ["train", "--out", "killed", *(["--resume"] if held else [*flags, "--overwrite"])]
        process = subprocess.Popen([sys.executable, "-c", SLOW_DISK, HERE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if kill < kills:
            while "a loss of" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
            time.sleep(chance.uniform(0.1, 2))
            process.kill()
            process.communicate()
    assert "Traceback" not in (err := process.communicate(timeout=300)[1]) and process.returncode == 0, err
    assert gpt.main(["train", "--out", "whole", *flags]) == 0
    assert equal(weights("killed"), weights("whole")) and losses("killed") == losses("whole")

def test_a_closed_stdout_ends_nothing_in_a_traceback(trained):
    for words in (["sample", "--out", trained, "--tokens", "300"], ["train", "--data", "text.txt", *FLAGS, "--steps", "20"]):
        process = subprocess.Popen([sys.executable, HERE / "gpt.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err, err

def test_help_names_every_setting_and_unknown_commands_are_refused(capsys):
    with pytest.raises(SystemExit) as done:
        gpt.main(["train", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(gpt.flag(f.name) in out for cls in (gpt.Config, gpt.Training) for f in gpt.fields(cls))
    refused(capsys, "trane")
    refused(capsys)

def test_importing_does_nothing_and_needs_only_torch():
    code = ("import sys; sys.modules.update(tiktoken=None, numpy=None, kernels=None, regex=None); sys.path.insert(0, sys.argv[1]); "
            "import gpt; gpt.train(data='text.txt', steps=2, n_layer=1, n_embd=16, n_head=2, device='cpu'); gpt.sample(tokens=3)")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(HERE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", "import gpt"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and sorted(os.listdir()) == ["cache", "out", "text.txt"]

def test_a_foreign_package_named_kernels_is_not_mistaken_for_ours():
    Path("kernels.py").write_text("def get_kernel(name): pass\n")
    code = "import sys; sys.path.append(sys.argv[1]); import gpt; assert gpt.NO_KERNELS; gpt.train(data='text.txt', steps=1, n_embd=16, n_head=2)"
    done = subprocess.run([sys.executable, "-c", code, str(HERE)], capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": ""})
    assert done.returncode == 0, done.stderr

def test_pasted_into_a_notebook_it_says_what_to_call_and_works(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "kernels", None)
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile((HERE / "gpt.py").read_text("utf-8"), "<cell>", "exec"), module.__dict__)
    assert len(capsys.readouterr().out.splitlines()) == 2 and module.NO_KERNELS
    def offline(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(module.Error, match="tinyshakespeare.*no network"):
        module.train(steps=20, device="cpu")
    Path("input.txt").write_text(TEXT)
    with pytest.raises(module.Error, match=r"train\(out='cell'\)") as refused:
        module.sample(out="cell")
    assert refused.value._render_traceback_() == [f"gpt.Error: {refused.value}"]  # IPython shows this line alone
    small = dict(device="cpu", n_embd=16, n_head=2)
    assert module.train(steps=3, **small)["step"] == 3 and len(module.sample(tokens=50)[0]) == 50
    module.train(steps=1, out="cell", **small)
    out = capsys.readouterr().out
    assert "now: sample()" in out and "now: sample(out='cell')" in out

def test_the_readme_commands_run(capsys, monkeypatch):
    """Every gpt.py command of the README, made short; its flags and files must exist."""
    Path("my.txt").write_text(TEXT)
    Path("input.txt").write_text(TEXT)
    Path("folder").mkdir()
    Path("folder/a.txt").write_text(TEXT)
    lines = re.findall(r"^(?:python|torchrun \S+ \d) gpt\.py (.*?)(?:\s+#.*)?$", (HERE / "README.md").read_text("utf-8"), re.M)
    assert len(lines) > 8
    for line in lines:
        words = __import__("shlex").split(line)
        if words[-1] == "--help" or "--init gpt2" in line:  # the one leaves by SystemExit, the other downloads
            continue
        if words[0] in ("train", "ablate"):
            words = [w for i, w in enumerate(words) if w not in ("--steps", "--minutes", "--size") and (i == 0 or words[i - 1] not in ("--steps", "--minutes", "--size"))]
            out = [] if words[0] == "ablate" or {"--out", "--resume"} & set(words) else ["--overwrite"]
            words += ["--device", "cpu", *out] + ([] if {"--resume", "--init"} & set(words) else ["--n-embd", "16", "--n-head", "2", "--block-size", "16",
                      *(["--n-layer", "1"] if "bigram" not in line else [])]) + ["--steps", "9" if "--resume" in words else "2"]
        elif words[0] == "sample":
            words += ["--tokens", "5"]
        assert gpt.main(words) == 0, (line, capsys.readouterr().err)

def test_the_source_keeps_its_promises():
    for name in ("gpt.py", "kernels.py"):
        if (HERE / name).exists():
            source = (HERE / name).read_text("utf-8")
            assert not re.search(r"import (flash_attn|numpy)|numpy\(", source)
            for call in re.findall(r"(?<!gzip\.)open\([^)]*\)|read_text\([^)]*\)|write_text\(.*\)", source):
                assert "rb" in call or "wb" in call or "utf-8" in call or "gzip" in call or ".lock" in call, call

# --- Kernels ---------------------------------------------------------------------------------------------------------
# Without a GPU: the Triton kernels in Triton's interpreter, the CUDA C++ on a small emulator, both compilers without a
# device, and everything else as it is.

def have(module):
    return importlib.util.find_spec(module) is not None

def older(module, major, minor):
    return tuple(map(int, importlib.metadata.version(module).split(".")[:2])) < (major, minor)

needs_interpreter = pytest.mark.skipif(not (have('triton') and have('numpy')), reason='needs triton and numpy')
needs_triton = pytest.mark.skipif(not have('triton'), reason='needs triton')
needs_gxx = pytest.mark.skipif(not shutil.which('g++'), reason='needs g++')

def load_kernels(replace=None, name='kernels'):
    """kernels.py as a module; with replace=(old, new), a copy with a planted bug."""
    path = HERE / 'kernels.py'
    if replace:
        source = path.read_text()
        assert source.count(replace[0]) >= 1, f'nothing to plant: {replace[0]!r} is not in kernels.py'
        path = Path(tempfile.mkdtemp()) / 'planted.py'
        path.write_text(source.replace(*replace))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def alone(**environment):
    """Runs a test in a process of its own: Triton's interpreter is switched on before the first import of triton and
    then holds for the whole process."""
    def make(test):
        def run():
            code = f'import {Path(__file__).stem} as tests; tests.{test.__name__}.here()'
            env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TRITON_CACHE_DIR': os.getcwd(), **environment}
            result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=HERE, capture_output=True,
                                    text=True, env=env)
            assert result.returncode == 0, result.stdout + result.stderr
            print(result.stdout)
        run.__name__, run.__doc__, run.here = test.__name__, test.__doc__, test
        return run
    return make

def in_interpreter(test):
    return needs_interpreter(alone(TRITON_INTERPRET='1')(test))

@pytest.fixture(scope='module')
def kernels():
    return load_kernels()

# --- Cases, shared by all implementations

def covering_pairs(*choices):
    """A short list of cases in which every pair of values of every two parameters occurs."""
    rng = random.Random(0)
    todo = {(i, a, j, b) for i, j in itertools.combinations(range(len(choices)), 2)
            for a in choices[i] for b in choices[j]}
    while todo:
        candidates = [[rng.choice(c) for c in choices] for _ in range(60)]
        covers = lambda case: {p for p in todo if case[p[0]] == p[1] and case[p[2]] == p[3]}
        case = max(candidates, key=lambda c: len(covers(c)))
        todo -= covers(case)
        yield case

def laid_out(x, pattern):
    """The values of x, (B, H, T, D), in another place in memory."""
    B, H, T, D = x.shape
    if pattern == 'contiguous':
        return x.contiguous()
    if pattern == 'transposed':       # what a model makes: (B, T, H * D) cut into heads
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if pattern == 'fused':            # a part of one projection to q, k and v
        buffer = x.new_full((B, T, 3 * H, D), math.nan)
        view = buffer[:, :, H:2 * H].transpose(1, 2)
    if pattern == 'gaps':             # a part of a cache that is longer and holds more sequences
        buffer = x.new_full((B + 1, H, 2 * T + 3, D), math.nan)
        view = buffer[1:, :, 1:2 * T + 1:2]
    return view.copy_(x)

def attention_inputs(H, H_kv, TQ, TK, D, dtype, pattern='transposed', B=2, device='cpu'):
    torch.manual_seed(TQ + TK + D)
    make = lambda heads, T: laid_out(torch.randn(B, heads, T, D).to(device, dtype), pattern)
    return make(H, TQ), make(H_kv, TK), make(H_kv, TK), make(H, TQ)

def output_and_gradients(run, q, k, v, do):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*inputs)
    return o.detach(), *torch.autograd.grad(o, inputs, do.to(o.dtype))

def exact(kernels, q, k, v, do, keep=None, **options):
    """float64 autograd through the readable formula; `keep` stands in for dropout."""
    wide = [x.double() for x in (q, k, v, do)]
    if keep is None:
        return output_and_gradients(lambda *a: kernels.attention_reference(*a, **options), *wide)
    real, F.dropout = F.dropout, lambda p, _: p * keep
    try:
        return output_and_gradients(lambda *a: kernels.attention_reference(*a, **options), *wide)
    finally:
        F.dropout = real

def worst_error(ours, truth):
    """The largest |ours - truth| / |truth|; a gradient that is 0 (one key, weight 1) is measured against the output."""
    errors = [((a.double() - b).norm() / max(b.norm(), truth[0].norm())).item() for a, b in zip(ours, truth)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)

def attention_error(kernels, case, impl='triton', device='cpu'):
    T, D, (H, H_kv), causal, other_T, pattern, dtype = case
    TQ, TK = (T, T + other_T) if T + other_T > 0 else (T, 1)
    q, k, v, do = attention_inputs(H, H_kv, TQ, TK, D, dtype, pattern, device=device)
    run = lambda *a: kernels.attention(*a, causal=causal, impl=impl)
    ours = output_and_gradients(run, q, k, v, do)
    again = output_and_gradients(run, q, k, v, do)
    assert all(torch.equal(a, b) for a, b in zip(ours, again)), 'a second run gives other bits'
    return worst_error(ours, exact(kernels, q, k, v, do, causal=causal))

CASES = [(1, 17, 64, 77, 128), (16, 48, 64, 80, 128), ((2, 2), (4, 2), (4, 1)), (True, False), (0, 51, -13),
         ('contiguous', 'transposed', 'fused', 'gaps'), (torch.float32, torch.float16)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

def packed_on_the_way():
    """Saved tensors that come back in another layout, as from torch.autograd.graph.save_on_cpu."""
    pack = lambda x: x.clone(memory_format=torch.contiguous_format)
    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

def check_decode(kernels, impl, H, H_kv, D, T_max, lengths, dtype, device='cpu'):
    q, k, v, _ = attention_inputs(H, H_kv, 1, T_max, D, dtype, device=device)
    masked = q.is_cuda and kernels.describe(q.device, dtype, D, impl)[0] != 'triton'     # masks weigh it with 0
    beyond = 99.0 if masked else math.nan
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = beyond, beyond                 # nobody may look beyond a sequence's length
    strided = torch.tensor([(n, -9) for n in lengths], dtype=torch.int32, device=device)[:, 0]
    ours = kernels.decode_attention(q, k, v, strided, impl=impl)
    for b, n in enumerate(lengths):
        part = [x[b:b + 1].double() for x in (q, k[:, :, :n], v[:, :, :n])]
        truth = kernels.attention_reference(*part) if n else torch.zeros_like(part[0])
        assert (ours[b:b + 1].double() - truth).norm() <= TOLERANCE[dtype] * truth.norm(), (H, H_kv, D, n)

def check_softmax(kernels, n, dtype, rows=3, device='cpu'):
    x, dy = torch.randn(2, rows, n).to(device, dtype)
    x[0, 0] = 3e4                                                 # a softmax without the maximum would overflow
    x, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    y, truth = kernels.softmax(x), wide.softmax(-1)
    ours, want = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(truth, wide, dy.double())[0]
    assert worst_error([y[1:], ours[1:]], [truth[1:], want[1:]]) < TOLERANCE[dtype]
    assert (y[0].double() - truth[0]).abs().max() < 1e-6

# --- Triton kernels in the interpreter

@in_interpreter
def test_triton_attention_agrees_with_float64():
    """Guards against wrong masks, offsets, strides, groups, ragged ends and unwritten outputs, forward and backward."""
    torch.use_deterministic_algorithms(True)   # and every new tensor is full of NaN: reading before writing shows
    kernels = load_kernels()
    assert torch.empty(1).isnan()
    cases = list(covering_pairs(*CASES))
    for case in cases:
        error = attention_error(kernels, case)
        assert error < TOLERANCE[case[-1]], f'{case}: {error:.1e}'
    with packed_on_the_way():
        assert attention_error(kernels, [17, 16, (4, 2), True, 0, 'fused', torch.float32]) < TOLERANCE[torch.float32]
    print(f'{len(cases)} attention cases agree with float64')

PLANTED = [('(n <= row + TK - TQ)', '(n < row + TK - TQ)', 'the mask hides the diagonal'),
           ('acc * alpha[:, None]', 'acc', 'the sum is not rescaled at a new maximum'),
           ('(dpt - delta[None, :])', 'dpt', 'dK without delta'),
           ('block * BM + 1 + TK - TQ', 'block * BM + 2 + TK - TQ + BN', 'a tile of the diagonal goes without a mask'),
           ('h // (H // H_kv)', 'h % H_kv', 'heads are grouped in the wrong order')]

@in_interpreter
def test_planted_bugs_in_triton_are_seen():
    """Guards against tests that pass whatever the kernels do."""
    case = [128, 64, (4, 2), True, 0, 'transposed', torch.float32]
    assert attention_error(load_kernels(), case) < TOLERANCE[torch.float32]
    for old, new, what in PLANTED:
        error = attention_error(load_kernels(replace=(old, new)), case)
        print(f'planted: {what}: error {error:.1e}')
        assert error > 1e-3, what

def philox_uniform(seed, counter):
    """Philox 4x32-10 (Salmon et al. 2011), first output, in [0, 1): from the paper, not from Triton."""
    mask, zero = 0xffffffff, torch.zeros_like(counter)
    c, key = [counter & mask, zero, zero, zero], [seed & mask, seed >> 32]
    def product(a, b):                 # high and low half of a 64-bit product, without overflowing int64
        low = a * (b & 0xffff)
        high = a * (b >> 16) + (low >> 16)
        return high >> 16, ((high & 0xffff) << 16 | low & 0xffff) & mask
    for _ in range(10):
        (high0, low0), (high1, low1) = product(c[0], 0xD2511F53), product(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    signed = torch.where(c[0] >= 2**31, 2**32 - 1 - c[0], c[0])    # Triton folds negative numbers back: -x - 1
    return signed * 4.6566127342e-10

@in_interpreter
def test_dropout_mask_can_be_rebuilt():
    """Guards against a backward pass that drops other elements than the forward pass, and against a biased mask."""
    kernels = load_kernels()
    q, k, v, do = attention_inputs(4, 2, 77, 100, 64, torch.float32)
    B, H, TQ, TK, p = 2, 4, 77, 100, 0.3
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,)).item()
    place = torch.arange(TQ)[:, None] * TK + torch.arange(TK)
    keep = torch.stack([philox_uniform(seed + head, place) >= p for head in range(B * H)]).view(B, H, TQ, TK)
    assert abs(keep.double().mean() - (1 - p)) < 0.01
    torch.manual_seed(7)
    ours = output_and_gradients(lambda *a: kernels.attention(*a, dropout_p=p, impl='triton'), q, k, v, do)
    error = worst_error(ours, exact(kernels, q, k, v, do, keep=keep / (1 - p)))
    assert error < 2e-6, error
    print(f'dropout: the mask rebuilt from the seed gives the same numbers, {error:.1e}')

@in_interpreter
def test_triton_decode_and_softmax_agree_with_float64():
    """Guards against wrong combination of slices, reads beyond a sequence's length, empty slices and overflow."""
    torch.use_deterministic_algorithms(True)
    kernels = load_kernels()
    single, half = torch.float32, torch.float16
    for H, H_kv, D, T_max, lengths, dtype in ((4, 4, 64, 300, (1, 300), single), (6, 2, 48, 700, (129, 640), single),
                                              (8, 1, 128, 260, (0, 257), half), (2, 2, 16, 5, (5, 3), half)):
        check_decode(kernels, 'triton', H, H_kv, D, T_max, lengths, dtype)
    for n, dtype in ((1, single), (77, single), (3000, half), (300, torch.bfloat16)):
        check_softmax(kernels, n, dtype)
    assert kernels.calls['softmax_kernel'] == kernels.calls['softmax_backward_kernel'] == 4
    for x in (torch.randn(2, 16385), torch.randn(2, 3, dtype=torch.float64), torch.zeros(0, 3), torch.ones(())):   # PyTorch's
        assert torch.equal(kernels.softmax(x), x.softmax(-1)) and kernels.calls['softmax_kernel'] == 4
    print('decode, softmax agree with float64;', dict(kernels.calls))

@in_interpreter
def test_ops_compile_and_self_check():
    """Guards against graph breaks, wrong shapes under torch.compile, recompilation per length and wrong kernels."""
    kernels = load_kernels()
    q, k, v, do = attention_inputs(4, 2, 40, 40, 16, torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    seed, x = torch.tensor([5]), torch.randn(4, 9, requires_grad=True)
    lengths = torch.tensor([3, 40], dtype=torch.int32)
    ops = [(kernels.attention_forward, (q, k, v, seed, True, 0.2, 0.25, 'triton')),
           (kernels.attention_forward, (q, k, v, None, False, 0.0, 0.25, 'triton')),
           (kernels.softmax_forward, (x,)),
           (kernels.decode_forward, (q.detach()[:, :, :1], k.detach(), v.detach(), lengths))]
    for function, arguments in ops:
        torch.library.opcheck(function, arguments)
    # One op in the graph, no break, and one compilation for all lengths.
    graphs = []
    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if 'gpt_kernels' in str(node.target)])
        return graph
    run = torch.compile(lambda *a: kernels.attention(*a, impl='triton').square().sum(), backend=backend, fullgraph=True,
                        dynamic=True)
    for T in (40, 33, 57):
        part = [torch.randn(2, heads, T, 16, requires_grad=True) for heads in (4, 2, 2)]
        plain = kernels.attention(*part, impl='sdpa').square().sum()
        assert torch.allclose(run(*part), plain, rtol=1e-4)
    assert all(len(graph) == 1 for graph in graphs) and (len(graphs) == 1 or older('torch', 2, 7)), graphs
    # The self-check: right kernels pass; kernels that return zeros or fail lose to SDPA, with one warning.
    kernels.attention(q, k, v, impl='triton').add_(1)             # the output is no view: it may change in place
    device = torch.device('cpu')
    assert kernels.self_check('triton', device, torch.float32, 16) == ''
    kernels.describe = lambda *a: ('triton', 'planted')
    for dtype, plant, problem in ((torch.float16, lambda kernel, grid, q, k, v, o, *rest, **constants: o.zero_(),
                                   'away from'), (torch.float64, lambda *a, **constants: 1 / 0, 'ZeroDivisionError')):
        kernels.launch = plant
        kernels.missing = lambda *a: ''
        with pytest.warns(UserWarning, match='using PyTorch') as warned:
            for _ in range(2):
                name, reason = kernels.choose(*(x.to(dtype) for x in (q, k, v)))
        assert name == 'sdpa' and problem in reason and len(warned) == 1, reason
    print('ops: opcheck, one op per graph, self-check')

# --- CUDA C++ on an emulator

# Every CUDA thread is a fiber (ucontext). An instruction of the whole warp puts its operands into a table, waits for
# the other lanes, reads theirs and waits again. Fragment layouts are those of the PTX manual.
EMULATOR = r'''
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
static void resume(int i) { int me = threadIdx.x; threadIdx.x = i; if (i != me) swapcontext(&fibers[me], &fibers[i]); }
static void next_of(int first, int count) {         // the next unfinished fiber among `count` from `first`
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
    memcpy(&t[lane][0], &x, 4); sync_warp(); memcpy(&y, &t[lane ^ m][0], 4); sync_warp(); return y;
}
static void mma_16x8x8(float c[4], u32 a0, u32 a1, u32 b) {
    auto &t = table[threadIdx.x / 32]; int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    t[lane][0] = a0; t[lane][1] = a1; t[lane][2] = b;
    sync_warp();
    for (int e = 0; e < 4; e++) for (int k = 0; k < 8; k++)
        c[e] += half_of(t[g * 4 + k / 2][e / 2], k % 2) * half_of(t[(2 * q + e % 2) * 4 + k / 2][2], k % 2);
    sync_warp();
}
static const u16 *rows[THREADS / 32][32];
static void load_transposed(u32 &b0, u32 &b1, const u16 *row) {
    auto &r = rows[threadIdx.x / 32]; int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    r[threadIdx.x % 32] = row; sync_warp();
    b0 = r[2 * t][g] | (u32)r[2 * t + 1][g] << 16; b1 = r[8 + 2 * t][g] | (u32)r[8 + 2 * t + 1][g] << 16; sync_warp();
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
        blockIdx = {x, y}; block_barrier = Barrier(); std::fill(warp_barrier, warp_barrier + THREADS / 32, Barrier());
        for (int i = 0; i < THREADS; i++) {
            finished[i] = false; getcontext(&fibers[i]);
            fibers[i].uc_stack.ss_sp = &stacks[i * 65536]; fibers[i].uc_stack.ss_size = 65536; fibers[i].uc_link = 0;
            makecontext(&fibers[i], fiber, 0);
        }
        threadIdx.x = 0; swapcontext(&caller, &fibers[0]);
    }
}
'''
EMULATOR_MAIN = r'''
#define KERNEL(name, Argument) extern "C" void run_##name(int gx, int gy, Argument *a) { \
    launch(gx, gy, [](void *p) { name(*(Argument *)p); }, a); }
KERNEL(attention_forward, Attention) KERNEL(attention_dq, Attention) KERNEL(attention_dkv, Attention)
KERNEL(softmax_rows, Softmax)
'''

def emulated(replace=('', '')):
    """kernels.py whose CUDA launches run on the emulator; replace plants a bug."""
    kernels, folder = load_kernels(), Path(tempfile.mkdtemp())
    assert replace[0] in kernels.CUDA_SOURCE
    (folder / 'kernels.cpp').write_text(EMULATOR + kernels.CUDA_SOURCE.replace(*replace) + EMULATOR_MAIN)
    options = ['-O2', '-std=c++17', '-w', '-shared', '-fPIC']
    subprocess.run(['g++', *options, 'kernels.cpp', '-o', 'kernels.so'], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / 'kernels.so'))

    def launch_cuda(name, grid, x, layout, *values):
        if 'attention' in name:            # 16 bytes of q, k, v, do and o are loaded at once
            assert all(pointer % 16 == 0 for pointer in values[:5]), 'misaligned'
        getattr(library, 'run_' + name)(*grid, struct.pack(layout + '0P', *values))
    kernels.launch_cuda = launch_cuda
    kernels.describe = lambda device, dtype, D, impl, dropout: (impl, 'emulated')
    kernels.missing = lambda *a: ''
    return kernels

def emulated_error(kernels, case):
    (H, H_kv), TQ, TK, causal, pattern = case
    q, k, v, do = attention_inputs(H, H_kv, TQ, TK, 64, torch.float16, pattern, B=1)
    nan = lambda x: kernels_new_rows(x).fill_(math.nan)
    kernels_new_rows, kernels.new_rows = kernels.new_rows, nan
    try:
        ours = output_and_gradients(lambda *a: kernels.attention(*a, causal=causal, impl='cuda'), q, k, v, do)
    finally:
        kernels.new_rows = kernels_new_rows
    return worst_error(ours, exact(kernels, q, k, v, do, causal=causal))

@needs_gxx
def test_cuda_cpp_agrees_with_float64():
    """Guards against wrong fragments, masks, ragged tiles and groups in CUDA C++, and against misaligned loads."""
    kernels = emulated()
    for case in (((2, 2), 128, 128, True, 'transposed'), ((4, 2), 77, 77, True, 'fused'),
                 ((2, 1), 5, 130, True, 'gaps'), ((2, 2), 100, 70, False, 'contiguous'),
                 ((2, 2), 90, 40, True, 'transposed')):
        assert emulated_error(kernels, case) < 1e-3, case
    with packed_on_the_way():
        assert emulated_error(kernels, ((4, 2), 70, 70, True, 'transposed')) < 1e-3
    q, k, v, do = attention_inputs(2, 2, 9, 9, 64, torch.float16)
    shifted = do.new_empty(do.numel() + 1)[1:].view(2, 9, 2, 64).transpose(1, 2).copy_(do)
    run = lambda *a: kernels.attention(*a, impl='cuda')
    assert all(map(torch.equal, output_and_gradients(run, q, k, v, do), output_and_gradients(run, q, k, v, shifted)))
    with pytest.raises(ValueError, match='too many heads'):
        kernels.attention(*[x[:1, :1].expand(2**16, 1, 9, 64) for x in (q, k, v)], impl='cuda')
    x = torch.randn(7, 100).half()
    x[0] += 3e4                                                   # a softmax without the maximum would overflow
    assert worst_error([kernels.softmax_cuda(x)], [x.double().softmax(-1)]) < 1e-3

@needs_gxx
@pytest.mark.parametrize('bug', [('(A.causal && key > query + offset)', '(A.causal && key >= query + offset)'),
                                 ('__syncthreads();         // the tiles are complete', ''),
                                 ('- (KEYS ? sdelta[i] : delta[r])', ''), ('mma_16x8x8(c, a[2], a[3], b1);', '')])
def test_planted_bugs_in_cuda_cpp_are_seen(bug):
    """Guards against an emulator that forgives: a mask off by one, a missing barrier, no delta, half a product."""
    assert emulated_error(emulated(bug), ((2, 2), 128, 128, True, 'transposed')) > 2e-3

# --- Compilers, without a GPU

INTEGERS, SCALES = {'H', 'H_kv', 'TQ', 'TK', 'slices', 'n', 'ignore_index'}, {'scale', 'scale_log2', 'dropout_p'}
POINTERS = dict(L='*fp32', DELTA='*fp32', SEED='*i64', LENGTHS='*i32', PART='*fp32', TARGETS='*i64',
                LOSS='*fp32')

def compile_triton(kernel, capability, dtype, num_warps=4, num_stages=2, **constants):
    """Cubin and shared memory of a kernel for a GPU that is not here, as a launch on aligned tensors makes it."""
    import triton
    from triton.backends.compiler import GPUTarget
    def type_of(name):
        if name in constants:
            return 'constexpr'
        if name in INTEGERS or re.fullmatch('s[qkv][bht]|stride', name):
            return 'i32'
        return 'fp32' if name in SCALES else POINTERS.get(name, '*' + dtype)
    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, (name, kind) in enumerate(signature.items())
               if kind[0] == '*' or name not in INTEGERS and kind == 'i32'}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    return compiled.asm['cubin'], compiled.metadata.shared

def read_cubin(cubin):
    """{kernel: (registers, stack bytes, static shared bytes)} and the disassembly, by the tools in Triton's wheel."""
    import triton
    tools = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        ask = lambda *command: subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
        usage, code = (ask(tools / tool, flag) for tool, flag in (('cuobjdump', '-res-usage'), ('nvdisasm', '-c')))
    found = re.findall(r'Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)', usage)
    return {name: tuple(map(int, numbers)) for name, *numbers in found}, code

def report(name, arch, registers, spills, shared, code):
    tensor = {i: len(re.findall(rf'\b{i}\b', code)) for i in ('HMMA', 'HGMMA')}
    print(f'{name:26} sm_{arch} {registers:4} registers {spills:3} spills {shared:7} B shared  '
          + ', '.join(f'{n} {i}' for i, n in tensor.items() if n))
    return sum(tensor.values())

@needs_triton
@pytest.mark.skipif(have('triton') and older('triton', 3, 3), reason="Triton's compiler was called otherwise before 3.3")
@alone(TRITON_INTERPRET='0')
def test_triton_compiles_without_spills():
    """Guards against kernels that compile only in the interpreter, tiles beyond the shared memory of a GPU, register
    spills at D = 64 (RTX 50: a few) and products that miss the tensor cores."""
    kernels, gpu = load_kernels(), torch.device('cuda')
    names = ('attention_forward_kernel', 'attention_dq_kernel', 'attention_dkv_kernel')
    limit = {75: 65536, 80: 101376, 90: 232448, 120: 101376}   # bytes a block may have; sm_86 has 8.0's tiles and less
    for arch in limit:
        kernels.capability = lambda device: divmod(arch, 10)
        jobs = [('softmax_kernel', 'fp16', kernels.row_constants(16384)),
                ('softmax_backward_kernel', 'fp16', kernels.row_constants(16384)),
                ('cross_entropy_kernel', 'fp16', dict(GRAD=True, BLOCK=4096, num_warps=8))]
        settings = [('fp16', torch.float16, D, True, False) for D in (64, 128)] if arch >= 80 else []
        if arch in (80, 90):
            settings += [('bf16', torch.bfloat16, 80, False, True)]
            settings += [('fp32', torch.float32, 128, True, False)] if arch == 80 else []
            jobs += [('attention_forward_kernel', 'bf16', dict(kernels.decode_constants(64, 1), TQ=1)),
                     ('decode_combine_kernel', 'bf16', dict(D=64, DP=64, G=1, SP=4)),
                     ('cross_entropy_kernel', 'bf16', dict(GRAD=False, BLOCK=4096, num_warps=8))]
        jobs += [(name, dtype, constants) for dtype, *setting in settings
                 for name, constants in zip(names, kernels.attention_constants(gpu, *setting))]
        for name, dtype, constants in jobs:
            if name == 'attention_forward_kernel':
                constants = {'SLICED': False, **constants}
            cubin, shared = compile_triton(getattr(kernels, name), arch, dtype, **constants)
            usage, code = read_cubin(cubin)
            (registers, stack, _), = usage.values()
            spills = len(re.findall(r'\b(?:LDL|STL)\b', code))
            label = f"{name[:-7]} {dtype} {constants.get('D', '')}"
            tensor = report(label, arch, registers, spills, shared, code)
            assert shared <= limit[arch], f'{label}: {shared} bytes of shared memory'
            if constants.get('D', 64) == 64:
                assert spills <= (16 if arch == 120 else 0), f'{label} spills'
            if dtype != 'fp32' and 'attention' in name:
                assert tensor, f'{label} has no tensor-core instructions'

def have_nvrtc():
    return have('cuda') and have('cuda.bindings') and have('nvidia') and have('triton')

@pytest.mark.skipif(not have_nvrtc(), reason='needs cuda-bindings, nvidia-cuda-nvrtc and triton')
def test_cuda_cpp_compiles_without_spills(kernels, tmp_path, monkeypatch):
    """Guards against CUDA C++ that NVRTC refuses, spills, shared memory above 48 KB and missing tensor-core code."""
    monkeypatch.setenv('GPT_CACHE', str(tmp_path))
    for arch in (75, 80, 90, 120):
        usage, code = read_cubin(kernels.cuda_image(f'sm_{arch}'))
        for name, (registers, stack, shared) in usage.items():
            part = code[code.index(f'.text.{name}:'):]
            part = part[:part.index('.text.', 9) if '.text.' in part[9:] else None]
            spills = len(re.findall(r'\b(?:LDL|STL)\b', part))
            tensor = report(name, arch, registers, spills, shared, part)
            assert spills == 0 and stack == 0 and shared <= 48 * 1024
            assert tensor or name == 'softmax_rows'
        assert len(usage) == 4
    assert b'.target sm_75' in kernels.cuda_image('compute_75')   # PTX for the T4 path on newer GPUs
    written = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.glob('kernels-*')}
    before = written()
    assert len(before) == 5 and kernels.cuda_image('sm_75') and written() == before

# --- A real GPU

def check_machine(device, impl, dtypes, cases):
    """Everything once on a device; the interpreter runs it too, so that no GPU meets a test that nobody has run."""
    kernels, device, gpu = load_kernels(), torch.device(device), device == 'cuda'
    for dtype in dtypes:
        for case in cases:
            name = impl or kernels.describe(device, dtype, case[1])[0]
            if name != 'sdpa':
                error = attention_error(kernels, [*case[:-1], dtype], name, device)
                assert error < TOLERANCE[dtype], f'{name} {dtype} {case}: {error:.1e}'
        name = impl or kernels.describe(device, dtype, 64)[0]
        q, k, v, do = attention_inputs(4, 2, 70, 70, 64, dtype, device=device)
        assert name == 'sdpa' or not kernels.self_check(name, device, dtype, 64)
        ones = torch.ones_like(v).requires_grad_()                # o is linear in v: one mask makes both sums equal
        o = kernels.attention(q, k, ones, dropout_p=0.5, impl=impl or 'auto').double()
        dv, = torch.autograd.grad(o.sum(), ones)
        assert abs(o.mean() - 1) < 0.1 and abs(dv.double().sum() / o.sum() - 1) < TOLERANCE[dtype]
        with torch.autocast(device.type, dtype):
            o = kernels.attention(q.float(), k.float(), v.float(), impl=impl or 'auto')
        assert o.dtype == (dtype if gpu else torch.float32)
        assert worst_error([o], [kernels.attention_reference(q.double(), k.double(), v.double())]) < TOLERANCE[dtype]
        whole = torch.compile(lambda *a: kernels.attention(*a, impl=impl or 'auto'), fullgraph=True,
                              backend='inductor' if gpu else 'aot_eager')
        run = lambda f: output_and_gradients(f, q, k, v, do)
        assert worst_error(run(whole), exact(kernels, q, k, v, do)) < TOLERANCE[dtype]
        check_decode(kernels, impl or 'auto', 6, 2, 48, 700, (129, 640), dtype, device)
        for n in (77, 3000):
            check_softmax(kernels, n, dtype, device=device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_loss(kernels, monkeypatch, device)
    print(device, dict(kernels.calls))
    return kernels

@in_interpreter
def test_what_a_gpu_will_be_asked_runs_here():
    """Guards against typing errors in the test below, which most machines skip."""
    check_machine('cpu', 'triton', [torch.float16], [[17, 48, (4, 1), True, 51, 'gaps', None]])

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_kernels_on_this_gpu(monkeypatch):
    """Guards against everything that the interpreter, the emulator and the compilers cannot show."""
    kernels = check_machine('cuda', None, [torch.float16, torch.bfloat16], list(covering_pairs(*CASES)))
    if not kernels.missing('triton', torch.device('cuda'), torch.float16, 64):
        q, k, v, _ = attention_inputs(4, 2, 1, 300, 64, torch.float16, device='cuda')
        lengths, graph = torch.tensor([3, 300], dtype=torch.int32, device='cuda'), torch.cuda.CUDAGraph()
        decode = lambda: kernels.decode_attention(q, k, v, lengths, impl='triton')
        decode()                                                  # compiles, which a capture may not
        with torch.cuda.graph(graph):
            o = decode()
        lengths.copy_(torch.tensor([200, 1]))
        graph.replay()
        assert torch.equal(o, decode())
    if not kernels.missing('cuda', torch.device('cuda'), torch.float16, 64):   # as PTX, which each GPU translates
        monkeypatch.setattr(kernels, 'cuda_image', lambda arch, image=kernels.cuda_image: image('compute_75'))
        kernels.cuda_function.cache_clear()
        for pattern in ('transposed', 'gaps'):
            assert attention_error(kernels, [77, 64, (4, 2), True, 51, pattern, torch.float16], 'cuda', 'cuda') < 1e-3
        x = torch.randn(7, 100, device='cuda').half()
        assert worst_error([kernels.softmax_cuda(x)], [x.double().softmax(-1)]) < 1e-3

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_sampling_on_this_gpu(monkeypatch):
    """Guards against a CUDA graph that cannot be made, or that writes another text than the model."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay', lambda graph: replays.append(replay(graph)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model, idx = scramble(make(n_kv_head=2)).to('cuda', dtype), torch.randint(50, (2, 5), device='cuda')
        plain = list(gpt.generate(model, idx, 70, temperature=0))
        gpt.use_attention(model, 'auto', dtype)
        replays.clear()
        graphed = list(gpt.generate(model, idx, 70, temperature=0))
        assert dtype != torch.float32 or torch.equal(torch.stack(graphed), torch.stack(plain))
        assert len(replays) > 60

# --- What runs everywhere

@pytest.mark.parametrize('setup', ['', "sys.modules['triton'] = None", "os.environ['TRITON_INTERPRET'] = '1'"])
def test_import_is_quiet_and_works_anywhere(setup):
    """Guards against an import that fails without Triton or a GPU, prints, warns, or starts CUDA."""
    code = f"""if True:
        import os, sys
        {setup or 'pass'}
        import torch
        {'import numpy' if 'INTERPRET' in setup and have('numpy') else 'pass'}
        import warnings; warnings.simplefilter('error')
        import kernels
        assert kernels.GPT_KERNELS == 1 and not torch.cuda.is_initialized()
        q = torch.randn(1, 2, 5, 16)
        assert torch.allclose(kernels.attention(q, q, q), kernels.attention_reference(q, q, q), atol=1e-5)
        assert kernels.choose(q, q, q) == ('sdpa', 'the device is cpu') and not kernels.calls
        try: kernels.attention(q, q, q, impl='cuda')
        except ValueError as error: assert 'the device is cpu' in str(error)
        else: assert False"""
    result = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ''), result.stdout + result.stderr

def test_a_foreign_package_of_the_same_name(tmp_path):
    """Guards against taking Hugging Face's package `kernels` for this file: only ours has the marker, and ours can be
    loaded by its path beside theirs, twice."""
    (tmp_path / 'kernels').mkdir()
    (tmp_path / 'kernels' / '__init__.py').write_text('def get_kernel(): pass\n')
    code = f"""if True:
        import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(HERE)!r})
        import kernels, torch
        assert getattr(kernels, 'GPT_KERNELS', None) is None
        import test_kernels as tests
        first, second = tests.load_kernels(), tests.load_kernels(name='again')
        q = torch.randn(1, 2, 5, 16)
        assert torch.equal(first.attention(q, q, q), second.attention(q, q, q))"""
    code = code.replace('test_kernels', Path(__file__).stem)
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

def test_examples():
    """Guards against examples in docstrings that have gone wrong."""
    result = doctest.testmod(gpt.kernels)
    assert result.attempted and not result.failed

def test_attention_on_this_machine_agrees_with_the_formula(kernels):
    """Guards against SDPA's other conventions: causal aligned top-left, groups, NaN for a query that sees no key."""
    for T, D, (H, H_kv), causal, other, pattern, _ in covering_pairs(*CASES):
        q, k, v, do = attention_inputs(H, H_kv, T, max(T + other, 1), D, torch.float64, pattern)
        ours = output_and_gradients(lambda *a: kernels.attention(*a, causal=causal, scale=0.3), q, k, v, do)
        assert worst_error(ours, exact(kernels, q, k, v, do, causal=causal, scale=0.3)) < 1e-12
        plain = kernels.attention(q, k, v, causal, scale=0.3, impl='plain')
        assert torch.equal(plain, kernels.attention_reference(q, k, v, causal, scale=0.3))

def test_chunks_of_queries_equal_one_pass(kernels):
    """Guards against a mask by position in the chunk instead of position in the sequence."""
    q, k, v, _ = attention_inputs(4, 2, 21, 21, 16, torch.float64)
    whole = kernels.attention(q, k, v)
    for size in (1, 3, 7):
        parts = [kernels.attention(q[:, :, i:i + size], k[:, :, :i + size], v[:, :, :i + size])
                 for i in range(0, 21, size)]
        assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-12)

def test_decode_on_this_machine(kernels):
    """Guards against attention to unused places of a cache, for equal and for ragged lengths."""
    q, k, v, _ = attention_inputs(4, 2, 1, 30, 16, torch.float64)
    for lengths in ((30, 30), (7, 7), (1, 20)):
        ours = kernels.decode_attention(q, k, v, torch.tensor(lengths, dtype=torch.int32))
        for b, n in enumerate(lengths):
            one = slice(b, b + 1)
            truth = kernels.attention_reference(q[one], k[one, :, :n], v[one, :, :n])
            assert torch.allclose(ours[one], truth, atol=1e-12)

def pretend(kernels, monkeypatch, capability, **present):
    """A machine with this GPU, as far as the rules can see."""
    monkeypatch.setattr(kernels, 'capability', lambda device: capability)
    monkeypatch.setattr(kernels, 'has_compiler', lambda: present.get('compiler', True))
    monkeypatch.setattr(kernels, 'triton', object() if present.get('triton', True) else None)
    monkeypatch.setattr(torch.version, 'cuda', '13.0' if present.get('cuda', True) else None)
    spec = importlib.util.find_spec
    found = lambda name: present.get('bindings', True) if 'cuda' in name else spec(name)
    monkeypatch.setattr(importlib.util, 'find_spec', found)
    describe = kernels.describe
    return lambda dtype=torch.float16, D=64, impl='auto', dropout=False: describe('cuda', dtype, D, impl, dropout)

def test_rules(monkeypatch):
    """Guards against a kernel chosen where it cannot run, or SDPA without saying why."""
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    table = [((8, 0), {}, {}, 'triton', 'capability 8.0, float16, D = 64'), ((12, 0), {}, {}, 'triton', '12.0'),
             ((9, 0), {}, dict(dtype=bf16, D=128), 'triton', '9.0'), ((8, 0), {}, dict(dtype=single), 'sdpa', 'fp32'),
             ((8, 0), {}, dict(D=129), 'sdpa', 'D <= 128'), ((8, 0), dict(triton=False), {}, 'sdpa', 'not installed'),
             ((8, 0), dict(compiler=False), {}, 'sdpa', 'C compiler'), ((8, 0), dict(cuda=False), {}, 'sdpa', 'ROCm'),
             ((7, 5), {}, {}, 'cuda', '7.5'), ((7, 5), {}, dict(D=80), 'sdpa', 'D = 64'),
             ((7, 5), {}, dict(dtype=bf16), 'sdpa', 'fp16'), ((7, 5), {}, dict(dropout=True), 'sdpa', 'dropout'),
             ((7, 5), dict(bindings=False), {}, 'sdpa', 'cuda-bindings'), ((7, 0), {}, {}, 'sdpa', 'capability 8.0'),
             ((8, 0), {}, dict(impl='cuda'), 'cuda', 'asked for'), ((7, 5), {}, dict(impl='plain'), 'plain', 'asked')]
    refused = [((7, 5), {}, dict(impl='triton'), 'tensor-core'), ((7, 0), {}, dict(impl='cuda'), '7.5'),
               ((8, 0), dict(triton=False), dict(impl='triton'), 'not installed'),
               ((8, 0), {}, dict(impl='cuda', dropout=True), 'dropout'), ((8, 0), {}, dict(impl='flash'), 'choose one')]
    for capability, present, request, name, reason in table:
        described = pretend(load_kernels(), monkeypatch, capability, **present)(**request)
        assert described[0] == name and reason in described[1], (capability, present, request, described)
    for capability, present, request, reason in refused:
        with pytest.raises(ValueError, match=reason):
            pretend(load_kernels(), monkeypatch, capability, **present)(**request)
    for capability, dtype, reason in (((7, 5), half, ''), ((7, 5), bf16, 'no bf16'), ((8, 0), bf16, ''),
                                      ((7, 0), half, '7.5'), ((8, 0), torch.float64, 'float64')):
        kernels = load_kernels()                                  # softmax and the loss: no tensor cores, no head size
        pretend(kernels, monkeypatch, capability)
        assert reason in (why := kernels.missing('triton', torch.device('cuda'), dtype)) and bool(reason) == bool(why)
    for capability, name in (((9, 0), 'sdpa'), ((8, 0), 'triton')):
        kernels = load_kernels()
        kernels.SDPA_WINS.add(((9, 0), 64))
        assert pretend(kernels, monkeypatch, capability)()[0] == name

@in_interpreter
def test_kernels_refuse_what_they_cannot_read():
    """Guards against kernels that read beyond a tensor, or that overflow under a scale that is not positive."""
    kernels = load_kernels()
    q, k, v, _ = attention_inputs(4, 2, 8, 8, 16, torch.float32)
    for bad, options in (((q, k[:, :, :5], v), {}), ((q[:, :3], k, v), {}), ((q, k.half(), v), {}),
                         ((q, k, v), dict(scale=0.0))):
        with pytest.raises(ValueError, match='cannot run'):
            kernels.attention(*bad, impl='triton', **options)
    with pytest.raises(ValueError, match='cannot run'):
        kernels.softmax_cuda(q.half())

# --- The loss

def loss_inputs(dtype=torch.float64, N=50, C=16, V=300, device='cpu'):
    torch.manual_seed(1)
    x, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(V, (N,))
    targets[::7] = -1
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets.to(device)

def loss_and_gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss * 1.7, inputs)

def check_loss(kernels, monkeypatch, device='cpu'):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3),
                             (torch.bfloat16, 2e-2)):
        x, weight, targets = loss_inputs(dtype, device=device)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        truth = loss_and_gradients(F.cross_entropy(F.linear(*wide), targets, ignore_index=-1), *wide)
        for slice_size in (2**24, 300 * 50 - 1, 300 * 13, 1):     # whole, two slices, several, one row each
            monkeypatch.setattr(kernels, 'SLICE', slice_size)
            ours = loss_and_gradients(kernels.linear_cross_entropy(x, weight, targets), x, weight)
            assert ours[0].dtype == torch.promote_types(dtype, torch.float32) and ours[2].dtype == dtype
            for a, b in zip(ours, truth):
                assert kernels.relative_error(a, b) < tolerance, (dtype, slice_size)
        nothing = kernels.linear_cross_entropy(x, weight, torch.full_like(targets, -1))
        assert nothing.isnan()                                    # as F.cross_entropy: a mean over nothing

def test_loss_agrees_with_pytorch(kernels, monkeypatch):
    """Guards against wrong gradients, slices, ignored targets, dtypes and scales (a loss scaled before backward)."""
    check_loss(kernels, monkeypatch)

@in_interpreter
def test_triton_loss_rows_agree_with_pytorch():
    """Guards against a wrong Triton row kernel: logits overwritten too early, ragged ends, ignored rows."""
    kernels = load_kernels()
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_loss(kernels, monkeypatch)
    assert kernels.calls['cross_entropy_kernel'] > 0
    for target, nan in ((299, False), (300, True), (-2, True)):   # out of range: nothing is read there, and it shows
        loss, _ = kernels.cross_entropy_rows(torch.zeros(1, 300), torch.tensor([target]), -1, False)
        assert loss.isnan().item() == nan
    wide = torch.randn(2, 320)                                    # rows of 300 that begin at multiples of 64
    narrow, beyond, targets = wide[:, :300].clone(), wide[:, 300:].clone(), torch.tensor([3, -1])
    for a, b in zip(*(kernels.cross_entropy_rows(z, targets, -1, True) for z in (wide[:, :300], narrow))):
        assert torch.equal(a, b)
    assert torch.equal(wide[:, 300:], beyond)
    print('cross-entropy rows agree;', dict(kernels.calls))

def test_loss_under_autocast_no_grad_and_compile(kernels, monkeypatch):
    """Guards against a loss made in bf16, gradients in another dtype than the parameters, gradients made in evaluation
    and more than one op in a compiled graph."""
    x, weight, targets = loss_inputs(torch.float32)
    for slice_size in (2**24, 300 * 13):
        monkeypatch.setattr(kernels, 'SLICE', slice_size)
        with torch.autocast('cpu', torch.bfloat16):
            plain = F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)
            loss = kernels.linear_cross_entropy(x, weight, targets)
        assert loss.dtype == torch.float32 and abs(loss - plain) < 1e-5
        for a, b in zip(loss_and_gradients(loss, x, weight), loss_and_gradients(plain, x, weight)):
            assert a.dtype == b.dtype == torch.float32 and kernels.relative_error(a, b) < 1e-2
    made = kernels.linear_cross_entropy_forward(x.detach(), weight.detach(), targets, -1, False)
    assert made[2].numel() == made[3].numel() == 0
    asked = []
    real = kernels.linear_cross_entropy_forward
    monkeypatch.setattr(kernels, 'linear_cross_entropy_forward', lambda *a: asked.append(a[-1]) or real(*a))
    with torch.no_grad():
        without = kernels.linear_cross_entropy(x, weight, targets)
    assert torch.equal(without, kernels.linear_cross_entropy(x, weight, targets)) and asked == [False, True]
    monkeypatch.undo()
    monkeypatch.setattr(kernels, 'SLICE', 300 * 13)
    torch.library.opcheck(kernels.linear_cross_entropy_forward, (x, weight, targets, -1, True))
    torch.library.opcheck(kernels.linear_cross_entropy_forward, (x.detach(), weight.detach(), targets, -1, False))
    compiled = torch.compile(kernels.linear_cross_entropy, backend='aot_eager', fullgraph=True)
    for N in (50, 41):
        for a, b in zip(*(loss_and_gradients(f(x[:N], weight, targets[:N]), x, weight)
                          for f in (compiled, kernels.linear_cross_entropy))):
            assert kernels.relative_error(a, b) < 1e-6

def test_loss_with_a_tied_weight(kernels, monkeypatch):
    """Guards against losing one of the two gradients of a weight that is embedding and head at once."""
    monkeypatch.setattr(kernels, 'SLICE', 300 * 13)
    _, weight, targets = loss_inputs()
    x = weight[targets.clamp(min=0)]
    ours, = torch.autograd.grad(kernels.linear_cross_entropy(x, weight, targets), weight, retain_graph=True)
    truth, = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1), weight)
    assert torch.allclose(ours, truth, atol=1e-12)

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the peak of memory from /proc')
def test_loss_keeps_memory_low():
    """Guards against logits that exist as a whole: 1,024 tokens at GPT-2's vocabulary are 206 MB, three times over."""
    code = """if True:
        import sys, torch, kernels
        peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
        torch.set_num_threads(1)
        N, C, V = 1024, 64, 50257
        x, t = torch.randn(N, C, requires_grad=True), torch.randint(V, (N,))
        w = (torch.randn(V, C) * 0.02).requires_grad_()
        before = peak()
        if 'plain' in sys.argv: torch.nn.functional.cross_entropy(x @ w.T, t).backward()
        else: kernels.linear_cross_entropy(x, w, t).backward()
        print(peak() - before)"""
    grown = {}
    for how in ('sliced', 'plain'):
        result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, how], cwd=HERE, capture_output=True,
                                text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert result.returncode == 0, result.stderr
        grown[how] = float(result.stdout)
    print(', '.join(f'{how} +{grown[how]:.0f} MB' for how in grown))
    assert grown['sliced'] < 200 and grown['plain'] > 2.5 * grown['sliced']

def test_command_line(tmp_path):
    """Guards against a benchmark that fails, or says nothing useful, on a machine without a GPU."""
    file = tmp_path / 'out.json'
    result = subprocess.run([sys.executable, '-W', 'ignore', 'kernels.py', '--json', str(file)], cwd=HERE, text=True,
                            capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    rows = json.loads(file.read_text())['rows']
    assert {row['name'] for row in rows} == {'attention', 'decode_attention', 'linear_cross_entropy', 'softmax'}
    assert all(row['ok'] and row['forward_ms'] > 0 and row['ran'] for row in rows)

def test_benchmark_survives_what_fails(kernels, monkeypatch, capsys):
    """Guards against one kernel that cannot run here taking the rest of the table with it."""
    works = ('softmax', 'sdpa', *[lambda x: x.softmax(-1)] * 2, [torch.randn(3, 4)], 96, 'GB/s')
    monkeypatch.setattr(kernels, 'cases', lambda device, big: [('attention', 'cuda', None, None, [], 1, 'GB/s'), works])
    assert kernels.main([]) == 1
    failed, fine, verdict = capsys.readouterr().out.splitlines()[-3:]
    assert 'Error' in failed and failed.endswith('WRONG') and 'softmax' in fine and 'WRONG' not in fine
    assert verdict == '1 of 2 wrong'
