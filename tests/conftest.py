"""Fixtures: the real command line in a folder of its own, a tiny model with real parts, the embedded SmolLM2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402

finetune.guard_torchvision()

MISTRAL_TEMPLATE = (  # refuses a system turn and wants strict alternation, as Mistral-7B-Instruct-v0.2's does
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


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
