"""Tests of gpt.py and kernels.py: `python -m pytest -q`. Quick, without network, in temporary folders."""
import gzip, io, json, math, os, pickle, re, signal, subprocess, sys, time, types
from pathlib import Path

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
    return gpt.train(**{**SMALL, "data": "text.txt", "steps": 6, "device": "cpu", **given})

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
    (["--dropout", "1"], "below 1"), (["--steps", "5", "--minutes", "1"], "one of them"), (["--data", "none.txt"], "none.txt"),
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
    assert not [path for path in Path(".").glob("out/*") if path.name != ".lock"]

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
        assert b"".join(tokenizer.tokens[i] for i in tokenizer.encode(text)).decode() == text
    assert gpt.CharTokenizer("abc").encode("cab").tolist() == [2, 0, 1]
    with pytest.raises(gpt.Error, match="xdf"):
        gpt.CharTokenizer("abc").encode("aß")

@pytest.fixture(scope="module")
def bpe():
    return gpt.BPETokenizer.train([TEXT, "汉字 " * 50], 300)

def test_bpe_round_trips_any_text(bpe):
    for text in AWKWARD:
        assert b"".join(bpe.tokens[i] for i in bpe.encode(text)).decode() == text
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

# --- Data ------------------------------------------------------------------------------------------------------------

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

def test_windows_reach_the_last_token_and_differ_between_processes_and_steps():
    tokens = torch.arange(20).to(torch.uint16)
    seen = torch.cat([gpt.random_windows(tokens, 4, (2, 1, 8), 0, 1, step) for step in range(40)])
    assert seen.shape == (640, 5) and seen[:, -1].max() == 19 and seen[:, 0].min() == 0
    both = gpt.random_windows(tokens, 4, (1, 1, 8), 0, 1, 3)
    halves = [gpt.random_windows(tokens, 4, (1, 2, 4), rank, 1, 3) for rank in (0, 1)]
    assert torch.equal(both, torch.cat(halves)) and not torch.equal(*halves)

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

def test_short_texts_shrink_the_context_and_may_have_nothing_to_validate_on(capsys):
    for n in (2, 15, 40):
        Path("short.txt").write_text(("ab" * 20)[:n])
        result = train(data="short.txt", out=f"o{n}", steps=2)
        assert "the context shrinks" in capsys.readouterr().err or n > 20
        assert (result["val_loss"] is None) == (n == 2)
        gpt.sample(out=f"o{n}", tokens=5)

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
    train(out="r")
    Path("other.txt").write_text(TEXT[::-1])
    assert "other data" in refused(capsys, "train", "--resume", "--out", "r", "--data", "other.txt")
    assert "--n-layer 2, not 3" in refused(capsys, "train", "--resume", "--out", "r", "--n-layer", "3")
    assert gpt.train(resume=True, out="r", steps=9)["step"] == 9

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
    assert time.monotonic() - begun < 4.8 + 2.0 and result["lr"] < 0.1 * gpt.Training.lr and result["step"] > 3

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
        assert a[2] == pytest.approx(b[2], abs=1e-5)

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

def test_fine_tuning_keeps_weights_and_tokenizer_and_starts_anew():
    train(out="base")
    Path("more.txt").write_text("not to be " * 50)
    result = gpt.train(init="base", data="more.txt", out="fine", steps=3, batch_size=2)
    state = gpt.read_checkpoint(Path("fine/ckpt.pt"))
    assert result["step"] == 3 and state["tokenizer"]["chars"] == "".join(sorted(set(TEXT)))
    assert state["settings"]["training"]["lr"] == pytest.approx(gpt.Training.lr / 10) and state["settings"]["config"]["n_embd"] == 32

@pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed")
def test_two_processes_give_the_weights_of_one():
    """Gradients must be averaged once per step, and the processes must see different halves of the same batch."""
    common = ["--data", "text.txt", *FLAGS, "--steps", "10", "--dtype", "float64", "--dropout", "0", "--accum", "2", "--device", "cpu"]
    assert gpt.main(["train", *common, "--out", "one"]) == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29577", HERE / "gpt.py", "train",
                          *common, "--out", "two", "--batch-size", "2"], capture_output=True, text=True, timeout=120)
    assert two.returncode == 0, two.stderr
    a, b = weights("one"), weights("two")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)

# --- Checkpoints -----------------------------------------------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)

def test_damaged_and_foreign_checkpoints_are_one_line_and_run_nothing(capsys):
    train(out="r", steps=2)
    good = Path("r/best.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    damaged = {"cut": good[:len(good) // 2], "empty": b"", "text": b"hello", "pickle": pickle.dumps(Evil())}
    damaged |= {f"flip{i}": good[:i] + bytes([good[i] ^ 255]) + good[i + 1:] for i in torch.randint(len(good), (15,), generator=generator).tolist()}
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Evil()}, buffer)
    damaged["evil"] = buffer.getvalue()
    for name, data in damaged.items():
        Path("x.pt").write_bytes(data)
        try:
            assert equal(gpt.load_model("x.pt")[0].state_dict(), weights("r", "best.pt")), name  # a byte that does not matter
        except gpt.Error as e:
            assert "x.pt" in str(e) and "\n" not in str(e)
    assert not Path("evil").exists()
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

def test_a_checkpoint_is_plain_and_names_no_wrapper():
    train(compile="off")
    state = torch.load("out/ckpt.pt", weights_only=True)
    assert {"format", "model", "settings", "tokenizer", "step", "val_loss", "optimizer", "scaler", "rng", "data"} <= state.keys()
    assert state["model"].keys() == make().state_dict().keys()

# --- Sampling --------------------------------------------------------------------------------------------------------

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
    assert "'\\xdf'" in capsys.readouterr().err
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
    assert "xdf" in refused(capsys, "eval", "--out", trained, "--data", "odd.txt")

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

def test_an_interrupted_process_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "gpt.py", "train", "--data", "text.txt", *FLAGS, "--steps", "1000000"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step 0" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in err and gpt.read_checkpoint(Path("out/ckpt.pt"))["step"] > 0

def test_killed_at_any_moment_a_run_can_go_on():
    train(out="whole", steps=60, save_every=1, eval_every=60)
    words = ["train", "--data", "text.txt", *FLAGS, "--steps", "60", "--save-every", "1", "--eval-every", "60", "--out", "killed", "--device", "cpu"]
    for attempt in range(6):
        if Path("killed/ckpt.pt").exists() or Path("killed/ckpt.prev.pt").exists():
            words = ["train", "--resume", "--out", "killed"]
        process = subprocess.Popen([sys.executable, HERE / "gpt.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if attempt == 5:
            assert "Traceback" not in process.communicate(timeout=120)[1] and process.returncode == 0
        else:
            while line := process.stdout.readline():
                if "a loss of" in line:
                    break
            time.sleep(0.1 + 0.13 * attempt)
            process.kill()
            process.communicate()
    assert equal(weights("killed"), weights("whole"))

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
    assert module.train(steps=3, device="cpu", n_embd=16, n_head=2)["step"] == 3 and len(module.sample(tokens=50)[0]) == 50

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
        if "gpt2" in words and not os.environ.get("TIKTOKEN_CACHE_DIR"):
            continue
        if words[0] == "train":
            words = [w for i, w in enumerate(words) if w not in ("--steps", "--minutes", "--size") and (i == 0 or words[i - 1] not in ("--steps", "--minutes", "--size"))]
            out = [] if "--out" in words or "--resume" in words else ["--overwrite"]
            words += ["--device", "cpu", *out] + ([] if {"--resume", "--init"} & set(words) else ["--n-embd", "16", "--n-head", "2", "--block-size", "16",
                      *(["--n-layer", "1"] if "bigram" not in words else [])]) + ["--steps", "9" if "--resume" in words else "2"]
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
