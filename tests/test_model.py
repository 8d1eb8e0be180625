"""Finding and loading models: one clear message for each way that it fails. The hub is a small server of our own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

import finetune

REFUSALS = {  # status, error code, as the hub's API sends them
    "owner/gated": (403, "GatedRepo"),
    "owner/missing": (404, "RepoNotFound"),
}
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def sharded(tiny_model, tmp_path_factory):
    """The tiny model with its weights in several files and an index of them."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "sharded"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="150KB")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def hub(sharded):
    """The hub's API for owner/sharded, and refusals for the others. `server.asked` are the files it gave."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/owner/sharded"):
                files = [(file.name, file.stat().st_size) for file in sorted(sharded.iterdir())]
                tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files]
                siblings = [{"rfilename": name, "size": size} for name, size in files]
                info = {"id": "owner/sharded", "modelId": "owner/sharded", "sha": COMMIT, "siblings": siblings}
                body = json.dumps(tree if "/tree/" in path else info).encode()
                return self.reply(200, body, Content_Type="application/json")
            if path.startswith("/owner/sharded/resolve/"):
                name = path.rpartition("/")[2]
                if not (sharded / name).is_file():
                    return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                body = (sharded / name).read_bytes()
                etag = hashlib.sha256(body).hexdigest()
                if self.command == "GET":
                    self.server.asked.append(name)
                return self.reply(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
            name = next((name for name in REFUSALS if name in self.path), "owner/missing")
            status, code = REFUSALS[name]
            return self.reply(status, X_Error_Code=code)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def address(hub):
    return f"http://127.0.0.1:{hub.server_port}"


def fails(run, faq, tmp_path, model, *expected, **env):
    before = set(tmp_path.rglob("*"))
    done = run("--data", faq, "--model", model, HF_HOME=str(tmp_path.parent / "hf"), **env)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in (f"--model {model}", *expected)), done.stderr
    assert "Traceback" not in done.stderr and set(tmp_path.rglob("*")) == before
    return done


def test_gated_model(run, faq, tmp_path, address):
    secret = "hf_" + "x" * 34
    env = {"HF_ENDPOINT": address, "HF_TOKEN": secret}
    done = fails(run, faq, tmp_path, "owner/gated", "gated", "licence", "HF_TOKEN", **env)
    assert secret not in done.stderr + done.stdout


def test_missing_model(run, faq, tmp_path, address):
    fails(run, faq, tmp_path, "owner/missing", "not on the hub", HF_ENDPOINT=address)


def test_no_network(run, faq, tmp_path):
    fails(run, faq, tmp_path, "owner/anything", "cannot be reached", "local folder", HF_ENDPOINT="http://127.0.0.1:9")


FETCH = """
import json, sys, finetune
finetune.guard_torchvision()
source = finetune.find_model("owner/sharded", gpu=False)
lacking = [finetune.missing_weights(source.folder)]
for broken in sys.argv[1:]:
    finetune.fetch_weights(source)
    (source.folder / broken).resolve().unlink()
    (source.folder / broken).unlink()
    lacking.append(finetune.missing_weights(source.folder))
finetune.fetch_weights(source)
finetune.load_4bit(source, finetune.compute_dtype())
print(json.dumps([str(source.folder), source.name, source.revision, lacking, finetune.missing_weights(source.folder)]))
"""


def test_a_sharded_model_is_fetched_and_a_half_fetched_one_completed(hub, address, sharded, tmp_path):
    """The config and tokenizer first, the weights when they are needed; a shard that is gone comes again, alone."""
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FETCH, shards[1]], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, name, revision, lacking, at_last = json.loads(done.stdout.splitlines()[-1])
    assert (name, revision) == ("sharded", COMMIT) and lacking == [shards, [shards[1]]] and at_last == []
    for file in sharded.glob("*.safetensors"):
        assert (Path(folder) / file.name).read_bytes() == file.read_bytes()
    given = [file for file in hub.asked if file.endswith(".safetensors")]
    assert sorted(given) == sorted([*shards, shards[1]]) and "pytorch_model.bin" not in hub.asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mistral-7B-Instruct-v0.2", "did you mean"),
        ("what is this?", "hub id like owner/name"),
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_bad_names(run, faq, tmp_path, name, message):
    fails(run, faq, tmp_path, name, message)


def test_folders_that_are_no_model(run, faq, tmp_path, tiny_model):
    folders = tmp_path / "models"
    for name in ("empty", "adapter", "pickled", "encoder", "gptq", "no-template"):
        (folders / name).mkdir(parents=True)
    config = json.loads((tiny_model / "config.json").read_text())
    (folders / "adapter/adapter_config.json").write_text("{}")
    (folders / "pickled/config.json").write_text(json.dumps(config))
    (folders / "pickled/pytorch_model.bin").write_bytes(b"pickle")
    for name, change in (
        ("encoder", {"architectures": ["BertForMaskedLM"]}),
        ("gptq", {"quantization_config": {"quant_method": "gptq"}}),
        ("no-template", {}),
    ):
        shutil.copytree(tiny_model, folders / name, dirs_exist_ok=True)
        (folders / name / "config.json").write_text(json.dumps(config | change))
    (folders / "no-template/chat_template.jinja").unlink()
    (folders / "wrong.gguf").write_bytes(b"not a model")
    for name, message in (
        ("empty", "no config.json"),
        ("adapter", "is an adapter"),
        ("pickled", "no .safetensors"),
        ("encoder", "BertForMaskedLM"),
        ("gptq", "gptq"),
        ("no-template", "no chat template"),
        ("wrong.gguf", "not a GGUF file"),
    ):
        fails(run, faq, tmp_path, f"models/{name}", message)


def test_torchvision_that_cannot_be_imported_is_hidden(run, tmp_path):
    """The guard in a process of its own, beside a torchvision that raises as a mismatched build does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = "import finetune; finetune.guard_torchvision(); from transformers import LlamaForCausalLM; print('fine')"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_mistral_by_its_own_name_is_the_prequantized_one():
    assert finetune.PREQUANTIZED["mistralai/Mistral-7B-Instruct-v0.2"] == finetune.GPU_MODEL


def test_memory_estimate_of_the_seeds_model():
    """The seed's README: 41.9M trainable parameters, 3.7B of effective size; NF4 weights of 3.8 GiB."""
    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    weights = finetune.count_weights(shape, finetune.Config())
    assert weights.total == weights.linear + weights.embeddings == 7_241_465_856 and weights.lora == 41_943_040
    need = finetune.estimate_memory(shape, finetune.Config(), 470, 280, False, gpu=True)
    assert 3.7 < need["weights"] < 4.0 and 6.0 < sum(need.values()) < 7.0  # 6.43 GiB measured on an H100


@pytest.mark.parametrize(("memory", "micro", "checkpointing"), [(14.6, 4, False), (7.5, 4, False), (5.4, 4, True)])
def test_plan_keeps_the_update_and_fits_the_memory(memory, micro, checkpointing, tmp_path):
    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    row = finetune.Row(({"role": "user", "content": "?"},), "!", "")
    train = [finetune.Example(row, [1] * 110, 40)] * 200
    (tmp_path / "config.json").write_text(json.dumps(shape))
    source = finetune.Source("owner/seven", "seven", tmp_path)
    config = finetune.fill_defaults(finetune.Config(), source)
    assert (config.learning_rate, config.num_train_epochs, config.model) == (2e-4, 5, "owner/seven")
    plan = finetune.make_plan(config, shape, train, memory)
    assert plan.micro_batch_size * plan.gradient_accumulation_steps == 4
    assert (plan.micro_batch_size, plan.gradient_checkpointing) == (micro, checkpointing)
