"""What --export writes, and that its certificate catches what is wrong. llama.cpp and Go's text/template are real."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, rows

import finetune
from finetune import BadInput

# What Ollama does with TEMPLATE: text/template over the messages, all system turns joined in .System.
RENDER_GO = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var in struct {
		Template      string
		Conversations [][]*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(in.Template))
	texts := []string{}
	for _, messages := range in.Conversations {
		var system []string
		for _, message := range messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.fixture(scope="module")
def render_go(tmp_path_factory):
    """render(template, conversations) -> texts, by Go itself."""
    if not shutil.which("go"):
        pytest.skip("Go is not installed (Debian: apt-get install golang-go)")
    folder = tmp_path_factory.mktemp("go")
    (folder / "render.go").write_text(RENDER_GO)
    env = os.environ | {"GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", "render", "render.go"], cwd=folder, env=env, check=True)

    def render(template: str, conversations: list) -> list[str]:
        given = json.dumps({"Template": template, "Conversations": conversations})
        done = subprocess.run([folder / "render"], input=given, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return render


@pytest.fixture(params=["mistral", "mistral that adds BOS itself", "chatml"])
def tokenizer(request):
    if request.param == "chatml":
        return finetune.load_tokenizer(request.getfixturevalue("embedded").folder)
    loaded = finetune.load_tokenizer(request.getfixturevalue("tiny_model"))
    if request.param != "mistral":
        from tokenizers.processors import TemplateProcessing

        loaded.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
        assert loaded("x").input_ids[0] == loaded.bos_token_id
    return loaded


def conversations() -> list[list[dict]]:
    """One, two and five questions, without and with a system turn; and what might be read as template or markup."""
    made = []
    for asked in (1, 2, 5):
        texts = [text for row in rows(asked) for text in (row["question"], row["answer"])][:-1]
        texts[0] = 'What do {{ .Content }}, "quotes", \\n and `this` mean?\n\nThanks - ünïcode 🙂'
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        made += [turns, [{"role": "system", "content": "Be brief.\nBe kind."}, *turns]]
    return made


def test_template_in_go_gives_the_tokens_of_training(tokenizer, render_go):
    parts, asked = finetune.prompt_parts(tokenizer), conversations()
    texts = render_go(parts.template(), asked)
    assert texts == [parts.render(turns) for turns in asked]
    for text, turns in zip(texts, asked, strict=True):
        assert tokenizer(text).input_ids == finetune.chat_ids(tokenizer, turns, add_generation_prompt=True)
        assert '"""' not in parts.template()


def test_a_template_that_counts_its_turns_has_no_modelfile(tiny_model):
    tokenizer = finetune.load_tokenizer(tiny_model)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(BadInput, match="no Modelfile can say"):
        finetune.prompt_parts(tokenizer)


def random_adapter(source: finetune.Source, folder, rank=4, alpha=8, size=0.05, targets=None, **settings):
    """A LoRA of random weights, made from the shapes in config.json and safetensors alone."""
    import torch
    from safetensors.torch import save_file

    shape, torch_dice = source.config, torch.Generator().manual_seed(0)
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    q, kv = heads * head, shape["num_key_value_heads"] * head
    sizes = {"self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)}
    sizes |= {"self_attn.o_proj": (q, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}
    sizes |= {"mlp.down_proj": (inner, hidden)}
    sizes = {name: size for name, size in sizes.items() if not targets or name.rpartition(".")[2] in targets}
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (wide, out) in sizes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(rank, wide, generator=torch_dice) / math.sqrt(wide)
            weights[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=torch_dice) * size
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    config |= {"base_model_name_or_path": finetune.PUBLIC_NAME.get(source.id, source.id)}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in sizes})}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_llama_cpp_computes_what_peft_does(embedded, tmp_path, settings):
    """Strong random LoRAs on q and k alone, whose rows llama.cpp has in another order: probabilities of next tokens."""
    import peft
    import torch
    import transformers
    from gguf import GGUFReader

    size = 0.25 if settings else 0.5  # the same LoRA in the end: rsLoRA counts it alpha / sqrt(4)
    folder = random_adapter(embedded, tmp_path / "random", size=size, targets=("q_proj", "k_proj"), **settings)
    saved = finetune.find_saved(finetune.Config(export=folder))
    finetune.write_lora_gguf(saved, tmp_path / "adapter.gguf")
    made = GGUFReader(tmp_path / "adapter.gguf")
    fields = {key: field.contents() for key, field in made.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert (fields["general.architecture"], fields["adapter.lora.alpha"]) == ("llama", 16 if settings else 8)
    found = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in made.tensors}
    assert len(found) == 2 * 2 * embedded.config["num_hidden_layers"]
    assert found["blk.7.attn_k.weight.lora_a"] == ("F16", [576, 4])
    assert found["blk.7.attn_k.weight.lora_b"] == ("F16", [4, 192])

    model = transformers.AutoModelForCausalLM.from_pretrained(embedded.folder)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    post = finetune.start_llama_cpp(saved.base_gguf, tmp_path / "adapter.gguf", 256)
    for scale in (0.0, 1.0):
        apart = []
        for row in rows(4):
            ids = finetune.chat_ids(saved.tokenizer, [{"role": "user", "content": row["question"]}], True)
            body = {"prompt": ids, "n_predict": 1, "n_probs": 5, "lora": [{"id": 0, "scale": scale}]}
            [there] = post("/completion", body)["completion_probabilities"]
            if not scale:
                with model.disable_adapter(), torch.inference_mode():
                    here = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            else:
                with torch.inference_mode():
                    here = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            apart += [abs(token["logprob"] - here[token["id"]].item()) for token in there["top_logprobs"]]
        assert finetune.mean(apart) < 0.25, (scale, apart)  # llama.cpp rounds what enters a layer to 8 bits


REFUSED = {
    "use_dora": ({"use_dora": True}, "use_dora=True"),
    "bias": ({"bias": "all"}, "bias=all"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "rank": ({"r": 8}, "no A and B of rank 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(case, tiny, tmp_path):
    settings, reason = REFUSED[case]
    folder = random_adapter(tiny, tmp_path / "adapter", **settings)
    with pytest.raises(BadInput, match=f"--export .*{reason}"):
        finetune.find_saved(finetune.Config(export=folder))


def test_a_layer_that_llama_cpp_has_no_place_for(tiny, tmp_path):
    import torch

    saved = finetune.find_saved(finetune.Config(export=random_adapter(tiny, tmp_path / "adapter")))
    pair = (torch.zeros(4, 64), torch.zeros(64, 4))
    for module in ("lm_head", "model.layers.0.mlp.no_such_layer"):
        shape = tiny.config | {"tie_word_embeddings": True}
        (tmp_path / "config.json").write_text(json.dumps(shape))
        source = finetune.Source("tied", "tied", tmp_path)
        other = dataclasses.replace(saved, lora={module: pair}, source=source)
        with pytest.raises(BadInput, match=f"no place for a LoRA on {module}"):
            finetune.write_lora_gguf(other, tmp_path / "x.gguf")


def test_other_weights_in_the_file_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = random_adapter(tiny, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.lm_head.weight": weights.popitem()[1]}, folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"it holds base_model\.model\.lm_head\.weight"):
        finetune.find_saved(finetune.Config(export=folder))


def test_refusal_on_the_command_line_writes_nothing(run, tiny, tmp_path):
    folder = random_adapter(tiny, tmp_path / "adapters/x", use_dora=True)
    before = set(tmp_path.rglob("*"))
    done = run("--export", "x")
    assert done.returncode == 2 and "use_dora=True" in done.stderr and "Traceback" not in done.stderr
    (folder / "export").mkdir()
    done = run("--export", folder)
    assert done.returncode == 2 and "already exists" in done.stderr
    assert set(tmp_path.rglob("*")) == before | {folder / "export"}


@pytest.mark.parametrize("flags", [["--evaluate", "x"], ["--dry-run"], ["--resume"], ["--require-improvement"]])
def test_flags_that_export_cannot_have(flags, tiny, tmp_path):
    folder = random_adapter(tiny, tmp_path / "x")
    flags = [str(folder) if flag == "x" else flag for flag in flags]
    if "--evaluate" in flags:
        (folder / "run.json").write_text('{"model": {}, "config": {}, "data": {"train_ids": [], "eval_ids": []}}')
    with pytest.raises(BadInput, match=f"--export cannot be combined with {flags[0]}"):
        finetune.parse(["--export", str(folder), *flags])


def test_flags_of_export_alone(tiny, tmp_path):
    folder = str(random_adapter(tiny, tmp_path / "x"))
    for flags, reason in ((["--to", "merged"], "--to needs"), (["--base-gguf", "f"], "--base-gguf needs")):
        with pytest.raises(BadInput, match=reason):
            finetune.parse(flags)
    with pytest.raises(BadInput, match="--base-gguf needs"):
        finetune.parse(["--export", folder, "--to", "merged", "--base-gguf", "f"])


# ----------------------------------------------------------------------------------------------------------------------
# The certificate, on a short run of the embedded model


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """The finished run in a folder of its own, with the data beside it: the folder of the adapter."""
    folder, _ = finished
    cwd = tmp_path_factory.mktemp("export")
    shutil.copy(folder.parents[1] / "faq_sample.json", cwd)
    return shutil.copytree(folder, cwd / "adapters" / folder.name)


@pytest.fixture(scope="module")
def exported(trained):
    """(ADAPTER/export, what the screen showed)."""
    command = [sys.executable, ROOT / "finetune.py", "--export", trained.name]
    done = subprocess.run(list(map(str, command)), cwd=trained.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return trained / "export", done


def test_certificate_of_a_real_adapter(exported, trained):
    folder, done = exported
    assert {file.name for file in folder.iterdir()} == {"adapter.gguf", "Modelfile", "certificate.json"}
    run, certificate = (
        json.loads((f / n).read_text()) for f, n in ((trained, "run.json"), (folder, "certificate.json"))
    )
    assert certificate["measured"] and certificate["problems"] == []
    assert certificate["prompts"] == {"rows": 12 + 8, "differ": []}  # held-out ones, known ones in other words
    for part, own in (("new", "questions"), ("known", "known")):
        numbers, records = certificate["sets"][part], certificate[part]
        assert numbers["questions"] == len(records) == 8
        for record, theirs in zip(records, run["evaluation"][own], strict=False):
            assert record["question"] == theirs["question"]
            assert record["arms"]["after"]["answer"] == theirs["arms"]["after"]["answer"]
            assert record["arms"]["after"]["chrf"] == pytest.approx(theirs["arms"]["after"]["chrf"])
        gain = finetune.mean(r["arms"]["file_on"]["chrf"] - r["arms"]["file_off"]["chrf"] for r in records)
        assert numbers["gain"][0] == pytest.approx(gain)
        assert (numbers["kept"] is None) == (numbers["gain_peft"][1] <= 0)
    answers = [record["arms"] for part in ("new", "known") for record in certificate[part]]
    assert sum(arms["file_on"]["answer"] != arms["file_off"]["answer"] for arms in answers) >= 12
    # What the two programs answer to a question is far liker than what they answer to two different ones.
    for there, here in zip(*finetune.FILE_AND_PEFT, strict=True):
        texts = [(arms[there]["answer"], arms[here]["answer"]) for arms in answers]
        own = finetune.mean(finetune.chrf(*pair) for pair in texts)
        others = finetune.mean(finetune.chrf(texts[n][0], texts[n - 1][1]) for n in range(len(texts)))
        assert own > others + 5, (there, own, others)
    assert certificate["sentence"] in " ".join(done.stdout.split())
    assert "ollama create faq_sample-smollm2" in done.stdout and "llama-server -m" in done.stdout


@pytest.mark.parametrize(("share", "problems"), [(1.0, []), (0.7, []), (0.2, ["less than 50% of the gain is left"])])
def test_the_share_that_is_kept(share, problems):
    """Of a gain that differs from question to question, the same share on each; none of a gain that does not show."""
    answered = {"prompts": {"rows": 20, "differ": []}, "new": [], "known": []}
    for n in range(10):
        for part, gain in (("known", 20.0 + n), ("new", (-1.0) ** n)):
            scores = {"before": 10.0, "after": 10.0 + gain, "file_off": 12.0, "file_on": 12.0 + share * gain}
            arms = {arm: {"chrf": score, "answer": f"{arm[-3:]} words on {n}"} for arm, score in scores.items()}
            arms["file_off"]["answer"] = arms["before"]["answer"]
            answered[part].append({"group": n, "arms": arms})
    said, found = finetune.judge_file(answered, 42)
    assert found["sets"]["known"]["kept"] == pytest.approx([100 * share] * 3)
    assert found["sets"]["new"]["kept"] is None and "kept –" in said[3]
    assert found["problems"] == problems and f"kept {100 * share:.0f}% [" in said[2]
    assert ("NF4" in said[-1]) == (share < 1)


def test_modelfile(exported, trained):
    text = (exported[0] / "Modelfile").read_text()
    parts = finetune.prompt_parts(finetune.load_tokenizer(trained))
    assert text.splitlines() == [
        "# The base is HuggingFaceTB/SmolLM2-135M-Instruct.",
        "FROM smollm2:135m-instruct-fp16",
        "ADAPTER ./adapter.gguf",
        f'TEMPLATE """{parts.template()}"""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 8192",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]


@pytest.fixture
def saved(trained, monkeypatch):
    """(The trained adapter, the settings of a short certificate), in the folder of its data."""
    monkeypatch.chdir(trained.parents[1])
    monkeypatch.setattr(finetune, "CERTIFIED", 5)
    config = dataclasses.replace(finetune.parse(["--export", str(trained)]), max_new_tokens=12)
    return finetune.find_saved(config), config


def test_a_wrong_template_is_caught(saved, exported):
    good, config = saved
    parts = dataclasses.replace(good.parts, ask=good.parts.ask.rstrip("\n"))
    certificate = finetune.certify(dataclasses.replace(good, parts=parts), exported[0], config)
    assert len(certificate["prompts"]["differ"]) == certificate["prompts"]["rows"] > 12
    assert certificate["sentence"].startswith("Do not use it: prompts have other token ids")


def test_an_adapter_of_zeros_is_caught(saved, tmp_path):
    good, config = saved
    zeros = {module: (a, b * 0) for module, (a, b) in good.lora.items()}
    finetune.write_lora_gguf(dataclasses.replace(good, lora=zeros), tmp_path / "adapter.gguf")
    certificate = finetune.certify(good, tmp_path, config)
    assert certificate["problems"][0] == "the adapter changes no answer"
    assert certificate["sentence"].startswith("Do not use it: the adapter changes no answer")


def test_a_wrong_base_is_caught(saved, exported, tmp_path):
    """The same sizes and vocabulary, but other weights: the layers' last products stand in each other's place."""
    from gguf import GGUFReader

    good, config = saved
    wrong = shutil.copy(good.base_gguf, tmp_path / "wrong.gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(wrong, "r+").tensors}
    for layer in range(15):
        one, other = (tensors[f"blk.{n}.ffn_down.weight"] for n in (layer, 29 - layer))
        if one.shape == other.shape:  # quantized alike
            one[:], other[:] = other.copy(), one.copy()
    del tensors, one, other
    certificate = finetune.certify(dataclasses.replace(good, base_gguf=wrong), exported[0], config)
    assert certificate["measured"] and not certificate["prompts"]["differ"]
    assert "the base does not answer as the one that was trained on" in certificate["problems"]


def test_a_base_of_another_size_is_refused(run, tiny, tmp_path, embedded):
    folder = random_adapter(tiny, tmp_path / "adapters/x")
    [gguf] = embedded.folder.glob("*.gguf")
    done = run("--export", "x", "--base-gguf", gguf)
    assert done.returncode == 2 and "llama.block_count is 30, and 2 in" in done.stderr
    (tmp_path / "no.gguf").write_bytes(b"not a model, but long enough to hold a header")
    done = run("--export", "x", "--base-gguf", "no.gguf")
    assert done.returncode == 2 and "--base-gguf no.gguf: " in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "export").exists()


def test_why_nothing_was_measured(saved, tmp_path, monkeypatch):
    good, config = saved
    gone = dataclasses.replace(config, data=(tmp_path / "gone.json",))
    cases = {
        "no GGUF of HuggingFaceTB/SmolLM2-135M-Instruct": (dataclasses.replace(good, base_gguf=None), config),
        "no run.json": (dataclasses.replace(good, run={}), config),
        "gone.json": (good, gone),
    }
    for reason, (other, settings) in cases.items():
        certificate = finetune.certify(other, tmp_path, settings)
        assert not certificate["measured"] and reason in certificate["sentence"]
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    assert "pip install xllamacpp" in finetune.certify(good, tmp_path, config)["sentence"]


def test_a_template_changed_after_training_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "changed")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(BadInput, match="not the one that it was trained with"):
        finetune.find_saved(finetune.Config(export=folder))


# ----------------------------------------------------------------------------------------------------------------------
# --to merged, and sizes


def test_merged_is_what_peft_merges(tiny, tmp_path, monkeypatch):
    """In several files with an index, in 16 bits; transformers loads it, with the tokenizer, from its folder alone."""
    import peft
    import transformers

    monkeypatch.setattr(finetune, "MERGED_FILE", 100_000)
    folder = random_adapter(tiny, tmp_path / "adapter", size=0.5)
    made = finetune.export_adapter(finetune.parse(["--export", str(folder), "--to", "merged"]))["output_dir"]
    assert made == folder / "export-merged" and len(list(made.glob("model-0*-of-0*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder)
    theirs = peft.PeftModel.from_pretrained(theirs, folder).merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(made)
    assert str(ours.dtype) == "torch.float16"
    assert ours.state_dict().keys() == theirs.keys()
    apart = [(theirs[name] - tensor).abs().max().item() for name, tensor in ours.float().state_dict().items()]
    assert max(apart) < 2e-3
    assert finetune.load_tokenizer(made).chat_template == finetune.load_tokenizer(tiny.folder).chat_template
    assert finetune.find_model(str(made), gpu=False).config["dtype"] == "float16"


def test_merged_keeps_the_held_out_loss(saved, tmp_path):
    good, config = saved
    config = dataclasses.replace(config, to="merged")
    for scale, fine in ((good.scale, True), (0.0, False)):  # without the adapter, the base's loss comes back
        folder = tmp_path / str(scale)
        folder.mkdir()
        finetune.write_merged(dataclasses.replace(good, scale=scale), folder)
        certificate = finetune.certify(good, folder, config)
        assert certificate["measured"] and certificate["rows"] == 12
        assert (certificate["problems"] == []) == fine, certificate["sentence"]
    assert certificate["loss"]["merged"] > certificate["loss"]["after"]


def test_merging_refuses_what_does_not_fit(tiny, embedded, tmp_path, monkeypatch):
    saved = finetune.find_saved(finetune.Config(export=random_adapter(tiny, tmp_path / "x"), to="merged"))
    with pytest.raises(BadInput, match=f"{embedded.id} has no .* of its own of the adapter's shape"):
        finetune.write_merged(dataclasses.replace(saved, source=embedded), tmp_path)
    quantized = json.dumps(tiny.config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    (tmp_path / "config.json").write_text(quantized)
    with pytest.raises(BadInput, match="is quantized; name its original with --model"):
        finetune.full_base(finetune.Source("owner/four-bits", "four", tmp_path))
    monkeypatch.setattr(finetune.psutil, "virtual_memory", lambda: finetune.types.SimpleNamespace(available=10**9))
    with pytest.raises(BadInput, match=r"needs 4\.0 GB of memory, 1\.0 GB are free"):
        finetune.write_merged(saved, tmp_path)


SEVEN = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


def test_the_adapter_of_a_7b_needs_little_memory(tiny_model, tmp_path):
    """Rank 16 on seven projections of Mistral-7B's shape, without the weights of that: at most 3 GiB."""
    base = tmp_path / "seven"
    shutil.copytree(tiny_model, base)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | SEVEN))
    folder = random_adapter(finetune.Source(str(base), "seven", base), tmp_path / "adapter", rank=16)
    code = "import sys, finetune; code = finetune.main(sys.argv[1:]); print(finetune.peak_ram()); sys.exit(code)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "--export", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "export/adapter.gguf").stat().st_size == pytest.approx(2 * 41_943_040, rel=0.01)
    assert float(done.stdout.split()[-1]) < 3
