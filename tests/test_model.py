"""Finding and loading models: one clear message for each way that it fails. The hub is a small server of our own."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import finetune

REFUSALS = {  # status, error code, as the hub's API sends them
    "owner/gated": (403, "GatedRepo"),
    "owner/missing": (404, "RepoNotFound"),
}


@pytest.fixture(scope="module")
def hub():
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            name = next((name for name in REFUSALS if name in self.path), "owner/missing")
            status, code = REFUSALS[name]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fails(run, faq, tmp_path, model, *expected, **env):
    before = set(tmp_path.rglob("*"))
    done = run("--data", faq, "--model", model, HF_HOME=str(tmp_path.parent / "hf"), **env)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in (f"--model {model}", *expected)), done.stderr
    assert "Traceback" not in done.stderr and set(tmp_path.rglob("*")) == before
    return done


def test_gated_model(run, faq, tmp_path, hub):
    secret = "hf_" + "x" * 34
    done = fails(run, faq, tmp_path, "owner/gated", "gated", "licence", "HF_TOKEN", HF_ENDPOINT=hub, HF_TOKEN=secret)
    assert secret not in done.stderr + done.stdout


def test_missing_model(run, faq, tmp_path, hub):
    fails(run, faq, tmp_path, "owner/missing", "not on the hub", HF_ENDPOINT=hub)


def test_no_network(run, faq, tmp_path):
    fails(run, faq, tmp_path, "owner/anything", "cannot be reached", "local folder", HF_ENDPOINT="http://127.0.0.1:9")


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
    import os
    import subprocess
    import sys

    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = "import finetune; finetune.guard_torchvision(); from transformers import LlamaForCausalLM; print('fine')"
    path = os.pathsep.join([str(tmp_path), str(finetune.Path(finetune.__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_mistral_by_its_own_name_is_the_prequantized_one():
    assert finetune.SAME_AS["mistralai/Mistral-7B-Instruct-v0.2"] == finetune.GPU_MODEL


def test_memory_estimate_of_the_seeds_model():
    """The seed's README: 41.9M trainable parameters, 3.7B of effective size; NF4 weights of 3.8 GiB."""
    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    linear, embeddings, lora, _ = finetune.count_weights(shape, finetune.Config())
    assert linear + embeddings == 7_241_465_856 and lora == 41_943_040
    need = finetune.estimate_memory(shape, finetune.Config(), 470, 280, False, gpu=True)
    assert 3.7 < need["weights"] < 4.0 and 6.0 < sum(need.values()) < 7.0  # 6.43 GiB measured on an H100


@pytest.mark.parametrize(("memory", "micro", "checkpointing"), [(14.6, 4, False), (7.5, 4, False), (5.4, 4, True)])
def test_plan_keeps_the_update_and_fits_the_memory(memory, micro, checkpointing):
    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    row = finetune.Row(({"role": "user", "content": "?"},), "!", "")
    train = [finetune.Example(row, [1] * 110, 40)] * 200
    plan = finetune.make_plan(finetune.settle(finetune.Config(), shape), shape, train, memory)
    assert plan.micro_batch_size * plan.gradient_accumulation_steps == 4
    assert (plan.micro_batch_size, plan.gradient_checkpointing) == (micro, checkpointing)
