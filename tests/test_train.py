"""The whole job through the real command line: a tiny random Mistral for the mechanics, SmolLM2 for the result."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ANSWERED, ROOT, rows

import finetune

SHORT = ("--max-new-tokens", "8", "--lora-r", "4", "--learning-rate", "1e-3")


def adapter(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def same(first: dict, second: dict) -> bool:
    import torch

    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_job_learns_and_leaves_a_whole_folder(finished):
    folder, _ = finished
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "complete" and not folder.with_name(folder.name + ".partial").exists()
    assert run["evaluation"]["after"]["nll"] < run["evaluation"]["before"]["nll"] - 0.3
    assert run["training"]["steps"] == 10 and run["training"]["log"][0]["step"] == 1
    questions = run["evaluation"]["questions"]
    assert [question["id"] for question in questions] == run["data"]["eval_ids"] and len(questions) > ANSWERED
    for arm in finetune.ARMS:
        # A search gives no probabilities, and on a CPU those after looked-up rows would take a minute.
        plain, rows_in_prompt = arm in ("before", "after"), arm.endswith("retrieved")
        measured = {"nll"} if plain or arm == "prompted" else set()
        likeness = {"chrf", "rouge_l", "mean_words", "answer"} | (set() if arm == "lookup" else {"eos_rate"})
        likeness |= measured | ({"ranking_top1"} if plain else set())
        likeness |= {"rows"} if rows_in_prompt or arm == "lookup" else set()
        found = [question["arms"].get(arm, {}).keys() for question in questions]
        assert found == [likeness] * ANSWERED + [measured] * (len(questions) - ANSWERED), arm
    known = run["evaluation"]["known"]
    assert len(known) == ANSWERED and {record["id"] for record in known} <= set(run["data"]["train_ids"])
    for record in known:
        assert record["arms"].keys() == set(finetune.ARMS)
        assert record["as_trained"].keys() == {"before", "lookup", "after"}
        assert all({"recall", "chrf", "answer"} <= own.keys() for own in record["arms"].values())
    epochs = run["training"]["epochs"]
    assert [epoch["step"] for epoch in epochs] == [0, 10] and all(0 <= epoch["recall"] <= 1 for epoch in epochs)
    assert all(len(epoch["nll"]) == len(questions) and len(epoch["chrf"]) == ANSWERED for epoch in epochs)
    assert not set(run["data"]["train_ids"]) & set(run["data"]["eval_ids"])
    assert run["data"]["replayed"] == round(0.15 * 48) == 7  # in one epoch, for ten updates of four
    files = {path.name for path in folder.iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"}
    assert files >= {"run.json", "README.md", "report.html", "loss.png"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_screen_shows_the_report_and_nothing_else(finished):
    _, done = finished
    assert done.stderr == ""
    labels = [line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()]
    expected = ["Data", "Model", "Before", "Replay", "LoRA", "Time", "Plan"]
    expected += ["After", "New", "Training", "Known", "Reference", "Base", "Tuned", "New", "Reference", "Base", "Tuned"]
    expected += ["Verdict", "Advice", "Saved"]
    assert [label for label in labels if label in expected] == expected
    assert "\x1b" not in done.stdout and "Warning" not in done.stdout and "🦥" not in done.stdout


def test_no_home_path_or_secret_is_in_the_files(finished):
    folder, _ = finished
    for path in folder.iterdir():
        if path.suffix in (".json", ".md", ".jinja") and path.name != "tokenizer.json":
            assert str(Path.home()) not in path.read_text(encoding="utf-8"), path.name


def test_nll_before_is_what_transformers_computes(finished, embedded):
    """The reference: one row at a time, transformers' own loss with the prompt masked, base model from its folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder, _ = finished
    run = json.loads((folder / "run.json").read_text())
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        embedded.folder, quantization_config=quantization, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = set(run["data"]["eval_ids"])
    losses = []
    for row in finetune.read_rows(folder.parents[1] / "faq_sample.json"):
        if row.id not in wanted:
            continue
        prompt = tokenizer.apply_chat_template(list(row.prompt), add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row.answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    assert len(losses) == len(wanted)
    assert sum(losses) / len(losses) == pytest.approx(run["evaluation"]["before"]["nll"], abs=1e-3)


PLAIN_PEFT = """
import sys, json, torch
sys.modules["torchvision"] = None  # (only because this machine's torchvision may be built for another torch)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, folder, questions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
for module in model.modules():  # where a CPU has AVX512-BF16, bitsandbytes would compute in bf16 whatever was asked
    module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, folder).eval()
answers = []
for question in questions:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=40)
    answers.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(answers))
"""


def test_plain_peft_gives_the_same_answers(finished, embedded, tmp_path):
    """A script that does not import this project, in another folder."""
    folder, _ = finished
    records = json.loads((folder / "run.json").read_text())["evaluation"]["questions"][:3]
    questions = [record["question"] for record in records]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, str(embedded.folder), str(folder), json.dumps(questions)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [record["arms"]["after"]["answer"] for record in records]


def test_a_run_never_overwrites_another(run, faq, tiny_model, tmp_path):
    for _ in range(2):
        done = run("--data", faq, "--model", tiny_model, "--max-steps", 2, *SHORT)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"faq-tiny-mistral", "faq-tiny-mistral-2"}


def test_dry_run_writes_nothing(run, faq, tiny_model, tmp_path):
    done = run("--data", faq, "--model", tiny_model, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout
        for word in ("32 train, 8 held out", "trained", "tokens, mean", "updates", "GiB", "min", "80 times in 100")
    )
    assert set(tmp_path.iterdir()) == {faq}


def test_updates_are_those_of_a_plain_loop(faq, tiny_model, tmp_path, monkeypatch):
    """TRL's batches and loss train what one padded batch an update and a plain AdamW loop train."""
    import torch
    from transformers import set_seed

    monkeypatch.chdir(tmp_path)
    config = finetune.Config(
        model=str(tiny_model), data=(faq,), lora_r=4, lora_dropout=0.0, effective_batch_size=36, max_steps=3,
        learning_rate=1e-2, lr_scheduler_type="constant", max_new_tokens=4, max_grad_norm=0.0, replay_fraction=0.0,
        reworded_fraction=0.0, loraplus_lr_ratio=1, weight_decay=0.0, goal="style",
    )  # fmt: skip
    result = finetune.run_evaluation(config)

    source = finetune.find_model(str(tiny_model), gpu=False)
    tokenizer = finetune.load_tokenizer(tiny_model)
    data = finetune.load_data(config)
    examples = finetune.encode(tokenizer, data.train, 2048)
    set_seed(config.seed)
    model = finetune.load_4bit(source, torch.float32)
    model = finetune.add_lora(model, config, source).train()
    width = max(len(e.input_ids) for e in examples)
    ids = torch.tensor([e.input_ids + [tokenizer.pad_token_id] * (width - len(e.input_ids)) for e in examples])
    mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in examples])
    bits = torch.tensor([e.completion_mask + [0] * (width - len(e.input_ids)) for e in examples])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(bits == 0, -100)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [entry["loss"] for entry in result["training"]["log"]] == pytest.approx(losses, abs=1e-4)
    saved = adapter(tmp_path / result["output_dir"])
    for name, weight in model.state_dict().items():
        if "lora_" in name:
            torch.testing.assert_close(saved[name.replace(".default", "")], weight, atol=2e-4, rtol=1e-3)


LONG = ("--num-train-epochs", "24", "--early-stopping-patience", "0")


@pytest.fixture(scope="module")
def interrupted(tiny_model, tmp_path_factory):
    """A folder with the run `whole`, and `broken`: stopped by Ctrl-C, refused twice, resumed. And what each said."""
    cwd = tmp_path_factory.mktemp("interrupted")
    (cwd / "faq.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    command = [sys.executable, str(ROOT / "finetune.py"), "--data", "faq.json", "--model", str(tiny_model)]
    command += [*SHORT, *LONG, "--output-dir"]

    def done(*flags) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *flags], cwd=cwd, capture_output=True, text=True)

    said = {"whole": done("whole")}
    partial = cwd / "broken.partial"
    process = subprocess.Popen([*command, "broken"], cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not finetune.last_checkpoint(partial) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    said["stopped"] = subprocess.CompletedProcess(process.args, process.returncode, "", errors)
    checkpoint = finetune.last_checkpoint(partial)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["Monitor"]["attributes"]["seconds"] += 1000  # as if it had been a long run
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    finetune.write_sums(checkpoint)
    said["not resumed"] = done("broken")
    said["another"] = done("broken", "--resume", "--lora-alpha", "8")
    said["left"] = sorted(path.name for path in cwd.iterdir())
    said["resumed"] = done("broken", "--resume")
    return cwd, state, said


def test_interrupted_and_resumed_is_the_same_adapter(interrupted):
    """Ctrl-C saves the update it was at; --resume ends with the adapter of a run that was not stopped."""
    cwd, state, said = interrupted
    assert said["whole"].returncode == 0, said["whole"].stderr
    assert said["stopped"].returncode == 130 and "--resume" in said["stopped"].stderr, said["stopped"].stderr
    assert said["left"] == ["broken.partial", "faq.json", "whole"]
    assert 0 < state["global_step"] < 10 * 24  # 32 rows and 5 replayed prompts, 4 an update
    assert said["not resumed"].returncode == 2 and "--resume" in said["not resumed"].stderr
    assert said["another"].returncode == 2 and "lora_alpha was 32, is 8" in said["another"].stderr

    assert said["resumed"].returncode == 0, said["resumed"].stderr
    assert not (cwd / "broken.partial").exists() and same(adapter(cwd / "whole"), adapter(cwd / "broken"))
    logs = [json.loads((cwd / name / "run.json").read_text())["training"]["log"] for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_seconds_of_a_resumed_run_are_those_of_the_whole_run(interrupted):
    cwd, state, _ = interrupted
    whole, resumed = (json.loads((cwd / name / "run.json").read_text())["training"] for name in ("whole", "broken"))
    before = state["stateful_callbacks"]["Monitor"]["attributes"]["seconds"]
    assert 1000 < before < resumed["seconds"] < before + 200
    assert resumed["tokens"] == whole["tokens"] and resumed["steps"] == whole["steps"] == 10 * 24
    assert resumed["tokens_per_second"] == pytest.approx(resumed["tokens"] / resumed["seconds"], abs=0.1)


def conversation(weight: int | None) -> dict:
    first = {"role": "assistant", "content": "Hello to you."} | ({} if weight is None else {"weight": weight})
    turns = [{"role": "user", "content": "Hello"}, first, {"role": "user", "content": "What is a deductible?"}]
    return {"messages": [*turns, {"role": "assistant", "content": "The part that you pay."}]}


@pytest.mark.parametrize(
    ("weight", "answers"),
    [(None, ["Hello to you.", "The part that you pay."]), (0, ["The part that you pay."])],
    ids=["both", "the last only"],
)
def test_each_answer_of_a_conversation_is_trained_unless_its_weight_is_0(weight, answers, tiny, tmp_path):
    """Read from a file, and looked at where the model gets it: the labels of the trainer's own batch."""
    path = tmp_path / "faq.json"
    path.write_text(json.dumps([conversation(weight)]), encoding="utf-8")
    config = finetune.fill_defaults(finetune.Config(lora_r=4, learning_rate=1e-3, num_train_epochs=1), tiny)
    tokenizer = finetune.load_tokenizer(tiny.folder)
    examples = finetune.encode(tokenizer, finetune.read_rows(path), 512)
    model = finetune.add_lora(finetune.load_model(tiny, config), config, tiny)
    plan = finetune.make_plan(config, tiny.config, examples, None)
    trainer = finetune.make_trainer(model, tokenizer, examples, dict, plan, config, tmp_path / "x", ())
    [labels] = next(iter(trainer.get_train_dataloader()))["labels"].tolist()
    trained = [token for token in labels if token != -100]
    assert trained.count(tokenizer.eos_token_id) == len(answers) and trained[-1] == tokenizer.eos_token_id
    parts = tokenizer.decode(trained).split(tokenizer.eos_token)[:-1]
    assert [part.strip() for part in parts] == answers


NO_NUMBER = """
import sys, finetune
answer_nll = finetune.answer_nll
def broken(model, tokenizer, examples, half=False):
    losses = answer_nll(model, tokenizer, examples, half)
    trained = any("lora_B" in name and weight.any() for name, weight in model.named_parameters())
    return [float("nan")] * len(losses) if trained else losses
finetune.answer_nll = broken
sys.exit(finetune.main(sys.argv[1:]))
"""


def test_a_held_out_loss_that_is_no_number_ends_the_run(faq, tiny_model, tmp_path):
    flags = ["--data", str(faq), "--model", str(tiny_model), "--max-steps", "2", *SHORT]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", NO_NUMBER, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "FloatingPointError: the held-out loss is nan after 2 updates; lower --learning-rate" in done.stderr
    assert not (tmp_path / "adapters/faq-tiny-mistral").exists()


def test_an_adapter_that_does_not_fit_is_refused(tiny, tmp_path):
    """Fewer projections than the model's LoRA has, or another rank: nothing of it is loaded."""
    import torch

    whole = finetune.Config(lora_r=4, lora_dropout=0.0)
    for name, changes in (("fewer", {"target_modules": ("q_proj", "v_proj")}), ("rank", {"lora_r": 8}), ("same", {})):
        config = dataclasses.replace(whole, **changes)
        model = finetune.add_lora(finetune.load_model(tiny, config), config, tiny)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, 0.5)
        model.save_pretrained(tmp_path / name)
    model = finetune.add_lora(finetune.load_model(tiny, whole), whole, tiny)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, count in (("fewer", 2 * 2 * 5), ("rank", 2 * 2 * 7)):  # layers, A and B, projections
        with pytest.raises(finetune.BadInput, match=f"{name}: {count} tensors are missing, left over or of another"):
            finetune.load_adapter(model, tmp_path / name)
        assert same(before, model.state_dict())
    finetune.load_adapter(model, tmp_path / "same")
    assert all((weight == 0.5).all() for name, weight in model.state_dict().items() if "lora_" in name)


def test_early_stopping_keeps_the_best_epoch(run, faq, tiny_model, tmp_path):
    """A rate that overfits at once: it stops, and the weights kept are those of the best held-out loss."""
    flags = [
        "--goal",
        "style",
        "--max-new-tokens",
        4,
        "--learning-rate",
        "0.05",
        "--num-train-epochs",
        "30",
        "--lr-scheduler-type",
        "constant",
    ]
    done = run("--data", faq, "--model", tiny_model, *flags)
    assert done.returncode == 0, done.stderr
    run_json = json.loads((tmp_path / "adapters/faq-tiny-mistral/run.json").read_text())
    training = run_json["training"]
    held_out = {entry["step"]: entry["eval_loss"] for entry in training["log"] if "eval_loss" in entry}
    assert training["stopped_early"] and training["steps"] < 10 * 30
    assert held_out[training["best_step"]] == min(held_out.values())
    assert run_json["evaluation"]["after"]["nll"] == pytest.approx(min(held_out.values()), abs=1e-3)


def test_a_failure_while_running_is_told_without_traceback(run, faq, tiny_model, tmp_path):
    import shutil

    broken = tmp_path / "broken-model"
    shutil.copytree(tiny_model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))  # and its weights are wider
    done = run("--data", faq, "--model", broken)
    assert done.returncode == 1 and "failed" in done.stderr and "Traceback" not in done.stderr
    log = tmp_path / "adapters/faq-broken-model.partial/train.log"
    assert "Traceback" in log.read_text()
