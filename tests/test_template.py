"""What is trained: the tokens of the answer and EOS, nothing else. Checked against TRL's own tokenization."""

import dataclasses

import pytest
from conftest import rows

import finetune
from finetune import BadInput, Row, encode


def row(question="What is a deductible?", answer="The part that you pay.", system=None) -> Row:
    prompt = [{"role": "system", "content": system}] if system else []
    return Row((*prompt, {"role": "user", "content": question}), answer, "faq.json, row 1")


@pytest.fixture(params=["mistral", "chatml"])
def tokenizer(request):
    if request.param == "mistral":
        return finetune.load_tokenizer(request.getfixturevalue("tiny_model"))
    return finetune.load_tokenizer(request.getfixturevalue("embedded").folder)


def test_labels_are_the_answer_and_eos(tokenizer):
    [example] = encode(tokenizer, [row()], 512)
    trained = [token for token, bit in zip(example.input_ids, example.completion_mask, strict=True) if bit]
    assert tokenizer.decode(trained[:-1]).strip() == "The part that you pay."
    assert trained[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in trained[:-1]
    masked = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert "What is a deductible?" in masked and "you pay" not in masked


def test_pad_is_not_eos_and_bos_stands_once(tokenizer):
    [example] = encode(tokenizer, [row()], 512)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert example.input_ids[0] == tokenizer.bos_token_id != example.input_ids[1]
    if tokenizer.bos_token == "<s>":
        assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_chat_gets_the_prompt_that_training_had(tokenizer):
    [example] = encode(tokenizer, [row()], 512)
    prompt = finetune.chat_ids(tokenizer, list(row().prompt), add_generation_prompt=True)
    assert prompt == example.input_ids[: example.prompt_length]


def test_a_system_turn_reaches_every_template(tokenizer):
    [example] = encode(tokenizer, [row(system="Be brief.")], 512)
    assert "Be brief." in tokenizer.decode(example.input_ids[: example.prompt_length])


def test_embedded_tokenizer_stops_where_the_gguf_says(embedded):
    from gguf import GGUFReader

    tokenizer = finetune.load_tokenizer(embedded.folder)
    [gguf] = embedded.folder.glob("*.gguf")
    fields = GGUFReader(gguf).fields
    assert tokenizer.eos_token_id == int(fields["tokenizer.ggml.eos_token_id"].contents()) == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert [tokenizer.decode([t]) for t in tokenizer("2024").input_ids] == ["2", "0", "2", "4"]


def test_trl_tokenizes_the_same(tokenizer, tmp_path):
    """TRL's preparation of the same rows gives our ids and mask (it would also teach ChatML's newline after EOS)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    found = [row(r["question"], r["answer"]) for r in rows(6)]
    conversations = [
        {"prompt": list(r.prompt), "completion": [{"role": "assistant", "content": r.answer}]} for r in found
    ]
    size = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    args = SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, use_cpu=True, report_to="none", bf16=False)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_config(size),
        args,
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
    )
    for theirs, ours in zip(trainer.train_dataset, encode(tokenizer, found, 512), strict=True):
        length = len(ours.input_ids)
        assert theirs["input_ids"][:length] == ours.input_ids
        assert [int(label != -100) for label in theirs["labels"][:length]] == ours.completion_mask
        assert tokenizer.decode(theirs["input_ids"][length:]).strip() == ""


BROKEN = {
    "no EOS": ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}[{{ m['role'] }}]{% endfor %}", "never stop"),
    "two BOS": (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        "exactly one '<s>'",
    ),
    "prompt changes once the answer follows": (
        "{{ bos_token }}{{ messages | length }}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        "the mask would be off",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_template_that_would_mislabel_is_an_error_that_names_the_row(case, tiny_model):
    tokenizer = finetune.load_tokenizer(tiny_model)
    tokenizer.chat_template, reason = BROKEN[case]
    with pytest.raises(BadInput, match=f"faq.json, row 1: .*{reason}"):
        encode(tokenizer, [row()], 512)


def test_pad_that_is_eos_is_an_error(tiny_model):
    tokenizer = finetune.load_tokenizer(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(BadInput, match="pad token and EOS"):
        encode(tokenizer, [row()], 512)


@pytest.mark.parametrize("answer", ["Ends </s> early.", "<s> again"])
def test_control_tokens_in_the_data_are_an_error(answer, tiny_model):
    with pytest.raises(BadInput, match="row 1: holds '<"):
        encode(finetune.load_tokenizer(tiny_model), [row(answer=answer)], 512)


def test_an_answer_that_would_be_cut_is_an_error(tiny_model):
    tokenizer = finetune.load_tokenizer(tiny_model)
    long = dataclasses.replace(row(), answer="word " * 40)
    with pytest.raises(BadInput, match=r"row 1: has \d+ tokens, so \d+ of its answer would be cut.*--max-length \d+"):
        encode(tokenizer, [long], 32)
