"""Chat's fast path gives the tokens of the plain one: transformers' generate, with and without PEFT's adapter."""

import pytest
import torch

import chat
import finetune

QUESTIONS = ("What is a deductible?", "How do I file a claim after an accident?")
GREEDY = chat.Parameters(temperature=0, num_predict=40)


def make_adapter(source, folder, projections, spread):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=projections, task_type="CAUSAL_LM")
    model = get_peft_model(finetune.load_4bit(source, finetune.compute_dtype()), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=spread)
    model.save_pretrained(folder)
    return folder


def reference(source, folder, question, strength=None, tokens=40):
    """The greedy answer of transformers and PEFT; strength None is the base."""
    from peft import PeftModel

    tokenizer = finetune.load_tokenizer(source.folder)
    model = finetune.load_4bit(source, finetune.compute_dtype())
    if strength is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", strength)
    ids = torch.tensor([finetune.chat_ids(tokenizer, [{"role": "user", "content": question}], True)])
    with torch.inference_mode():
        out = model.generate(input_ids=ids.to(model.device), max_new_tokens=tokens, do_sample=False)
    stops = chat.stop_ids(tokenizer, model)
    return [token for token in out[0, ids.shape[1] :].tolist() if token not in stops]


@pytest.fixture
def exact(monkeypatch):
    """4-bit products in fp32: bitsandbytes' AVX512-BF16 kernel rounds, and nearly equal tokens then change places."""
    import bitsandbytes.functional
    import bitsandbytes.nn.modules

    for module in (bitsandbytes.functional, bitsandbytes.nn.modules):
        monkeypatch.setattr(module, "has_avx512bf16", lambda: False)


def answer(engine, name, question, parameters=GREEDY):
    return engine.answer([{"role": "user", "content": question}], name, parameters).ids


def test_tokens_of_base_adapter_and_strength(embedded, tmp_path, exact):
    folder = make_adapter(embedded, tmp_path / "some", ["q_proj", "v_proj", "o_proj", "up_proj"], 0.05)
    engine = chat.Engine(embedded)
    engine.load_adapter(chat.read_adapter(folder))
    assert all(model.fast for model in engine.models.values())
    question = QUESTIONS[0]
    base, tuned = answer(engine, "base", question), answer(engine, "some", question)
    assert base == reference(embedded, folder, question)
    assert tuned == reference(embedded, folder, question, 1.0) and tuned != base
    half = chat.Parameters(temperature=0, num_predict=40, strength=0.5)
    assert answer(engine, "some", question, half) == reference(embedded, folder, question, 0.5)
    assert answer(engine, "some", question) == tuned and answer(engine, "base", question) == base
    off = chat.Parameters(temperature=0, num_predict=40, strength=0.0)
    assert answer(engine, "some", question, off) == base


def test_the_static_cache_grows_and_a_second_turn_reads_only_what_is_new(tiny_model, tmp_path, monkeypatch, exact):
    source = finetune.find_model(str(tiny_model), gpu=False)
    monkeypatch.setattr(chat, "CACHE_SIZE", 64)
    engine = chat.Engine(source, num_ctx=512)
    assert engine.models["base"].fast
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    parameters = chat.Parameters(temperature=0, num_predict=90)
    first = engine.answer(messages, "base", parameters)
    assert first.ids == reference(source, tmp_path, QUESTIONS[0], tokens=90)
    assert engine.models["base"].cache.size >= first.prompt_tokens + first.tokens - 1
    turns = [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[1]}]
    second = engine.answer(turns, "base", parameters)
    assert second.cached_tokens > 0
    assert second.ids == chat.Engine(source, num_ctx=512).answer(turns, "base", parameters).ids


def test_padding_behind_a_question_changes_nothing(tiny_model, exact):
    """As a graph of a fixed width reads a short question: the rest of the window is what stood there before."""
    source = finetune.find_model(str(tiny_model), gpu=False)
    fast = chat.Engine(source).models["base"].fast
    ids, positions = torch.arange(5, 40), torch.tensor([0])
    with torch.inference_mode():
        padded, plain = chat.StaticKV(fast, 128), chat.StaticKV(fast, 128)
        window = torch.cat([ids[:20], torch.full((chat.WINDOW - 20,), 3)])
        one = fast.forward(window, positions, padded, None, last=torch.tensor([19]))
        assert torch.allclose(one, fast.forward(ids[:20], positions, plain, None), atol=1e-5)
        # What follows is written over the padding.
        after = torch.tensor([20])
        next_one = fast.forward(ids[20:], after, padded, None)
        assert torch.allclose(next_one, fast.forward(ids[20:], after, plain, None), atol=1e-5)


def test_an_adapter_that_is_more_than_lora_takes_the_plain_path(tiny_model, tmp_path, exact):
    from peft import LoraConfig, get_peft_model

    source = finetune.find_model(str(tiny_model), gpu=False)
    model = get_peft_model(
        finetune.load_4bit(source, torch.float32),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "dora")
    engine = chat.Engine(source)
    added = engine.load_adapter(chat.read_adapter(tmp_path / "dora"))
    assert added.fast is None and engine.models["base"].fast
    assert answer(engine, added.name, QUESTIONS[0]) == reference(source, tmp_path / "dora", QUESTIONS[0], 1.0)


def test_a_network_of_another_kind_takes_the_plain_path(tiny_model):
    import types

    config = types.SimpleNamespace(model_type="gemma3", hidden_act="gelu", rope_parameters=None, layer_types=None)
    assert not chat.FastDecoder.fits(types.SimpleNamespace(config=config))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("which", ["tiny_model", "embedded"])
def test_graphs_give_the_tokens_of_the_plain_path(which, request, tmp_path, monkeypatch):
    """In fp32, where rounding decides nothing; then in the precision that people get, told but not judged."""
    model = request.getfixturevalue(which)
    source = model if which == "embedded" else finetune.find_model(str(model), gpu=False)
    for dtype in (torch.float32, finetune.compute_dtype()):
        monkeypatch.setattr(finetune, "compute_dtype", lambda fp16=False, dtype=dtype: dtype)
        folder = make_adapter(source, tmp_path / str(dtype), list(finetune.Config().target_modules), 0.02)
        engine = chat.Engine(source)
        name = engine.load_adapter(chat.read_adapter(folder)).name
        for question in QUESTIONS:
            for who, strength in (("base", None), (name, 1.0)):
                ours, plain = answer(engine, who, question), reference(source, folder, question, strength)
                same = next((n for n, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), len(plain))
                print(f"{dtype} {who}: {same} of {len(plain)} tokens the same")
                assert engine.fast.graphs and engine.models[who].cache.graphs
                engine.models[who].capture_ahead()
                assert engine.models[who].cache.graphs[engine.models[who].key, chat.WINDOW]
                engine.models[who].cached = []
                again = answer(engine, who, question)  # the graph of a short question reads it anew
                assert dtype != torch.float32 or again == plain
                assert dtype != torch.float32 or ours == plain
