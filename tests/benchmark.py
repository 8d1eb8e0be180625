#!/usr/bin/env python
"""Side by side in one run: the seed's recipe, stock Unsloth and this project; training, memory and chat.

    python tests/benchmark.py                      on a CUDA GPU with random weights of Mistral-7B's shape; made here
    python tests/benchmark.py --model FOLDER       with real weights, 16 or 4 bits
    python tests/benchmark.py --part chat          one part: training, memory or chat
    python tests/benchmark.py --part training --only ours --only 2-ranks --batches 16 64     one process beside two
    python tests/benchmark.py                      without a GPU: the embedded model, plain transformers against ours

Each arm runs in a process of its own, so that peaks of memory and patches of libraries do not mix. Prints a table and
writes benchmark.json. Only ratios within one run mean much: absolute times differ by two between runs of one host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402

MISTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip
PROJECTIONS = list(finetune.Config().target_modules)
BATCHES = (4, 16)
WARM_UP = 2
QUESTION = [{"role": "user", "content": "What does comprehensive auto insurance cover, and what does it not?"}]
FOLLOW_UP = {"role": "user", "content": "And if a tree falls on it?"}


# ----------------------------------------------------------------------------------------------------------------------
# What the arms share


def make_random(folder: Path, tokenizer: Path | None) -> None:
    """Mistral-7B's shape with random weights, 16 bits and NF4: speed and memory are the real ones', the text noise."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig

    if (folder / "nf4/tokenizer.json").is_file():  # written last
        return
    words, dtype = finetune.load_tokenizer(tokenizer or finetune.find_model(None, gpu=False).folder), torch.float16
    shape = MistralConfig(
        **MISTRAL,
        vocab_size=len(words),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["MistralForCausalLM"],
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(shape, dtype=dtype).save_pretrained(folder / "16-bit", max_shard_size="4GB")
    torch.cuda.empty_cache()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=finetune.compute_dtype(),
    )
    settings = {"quantization_config": how, "device_map": {"": 0}, "dtype": finetune.compute_dtype()}
    AutoModelForCausalLM.from_pretrained(folder / "16-bit", **settings).save_pretrained(folder / "nf4")
    for kind in ("16-bit", "nf4"):
        words.save_pretrained(folder / kind)


def examples(tokenizer: Any, config: finetune.Config) -> dict[str, list[finetune.Example]]:
    data = finetune.load_data(config)
    sides = {"train": data.train, "eval": data.eval}
    return {side: finetune.encode(tokenizer, rows, config.max_length) for side, rows in sides.items()}


def stopwatch(steps: int, tokens_of: float) -> Any:
    """A trainer's callback: seconds of each update, then one update under the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    gpu = torch.cuda.is_available()

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.seconds, self.busy = [], 0.0

        def on_train_begin(self, *_, **__):
            if gpu:
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, args, state, control, **_):
            if gpu:
                torch.cuda.synchronize()
            if gpu and state.global_step == WARM_UP + steps:
                self.profile = profile(activities=[ProfilerActivity.CUDA])
                self.profile.__enter__()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if gpu:
                torch.cuda.synchronize()
            if WARM_UP < state.global_step <= WARM_UP + steps:
                self.seconds.append(time.perf_counter() - self.began)
            elif state.global_step == WARM_UP + steps + 1:
                if gpu:
                    self.profile.__exit__(None, None, None)
                    # Kernels only: ranges like "Optimizer.step" would count them twice.
                    events = (e for e in self.profile.events() if not e.is_user_annotation)
                    self.busy = sum(e.self_device_time_total for e in events) / 1e3
                control.should_training_stop = True

        def result(self, batch: int) -> dict:
            step = statistics.median(self.seconds)
            peak = torch.cuda.max_memory_allocated() / finetune.GIB if gpu else finetune.peak_ram()
            return {
                "batch": batch,
                "seconds_per_step": round(step, 4),
                "samples_per_second": round(batch / step, 3),
                "tokens_per_second": round(batch * tokens_of / step, 1),
                "gpu_busy_ms": round(self.busy, 1),
                "peak_gib": round(peak, 2),
            }

    return Stopwatch()


def mean_length(rows: list[finetune.Example]) -> float:
    return statistics.mean(len(row.input_ids) for row in rows)


def source_of(model: str | None) -> finetune.Source:
    finetune.guard_torchvision()
    source = finetune.find_model(model, gpu=False)
    finetune.fetch_weights(source)
    return source


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_seed(options: argparse.Namespace) -> list[dict]:
    """The seed's README: transformers, PEFT and `load_in_4bit`, fp16, one row at a time, padded, checkpointing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    gpu = torch.cuda.is_available()
    source = source_of(options.model)
    tokenizer = finetune.load_tokenizer(source.folder)
    rows = examples(tokenizer, finetune.Config())["train"]
    if gpu:
        ready = "quantization_config" in source.config
        how = {} if ready else {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float16, device_map={"": 0}, **how)
    else:
        model = finetune.load_4bit(source, finetune.compute_dtype())
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    )
    model.enable_input_require_grads()
    data = [{"input_ids": row.input_ids} for row in rows]

    def padded(batch: list[dict]) -> dict:
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[int(n < len(row["input_ids"])) for n in range(width)] for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    results = []
    for batch in options.batches:
        micro = 1 if gpu else batch  # without a GPU the kindest reading: the whole update in one forward
        watch = stopwatch(options.steps, mean_length(rows))
        args = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
            max_steps=WARM_UP + options.steps + 1, learning_rate=2e-4, lr_scheduler_type="cosine", optim="adamw_torch",
            fp16=gpu, gradient_checkpointing=gpu, use_cpu=not gpu, report_to="none", save_strategy="no",
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, data_collator=padded, callbacks=[watch]).train()
        results.append(watch.result(batch))
    return results


def train_unsloth(options: argparse.Namespace) -> list[dict]:
    """Unsloth's Mistral notebook: 2 rows at a time, its own checkpointing, no dropout, adamw_8bit, the whole text."""
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    source = source_of(options.model)
    tokenizer = finetune.load_tokenizer(source.folder)
    rows = examples(tokenizer, finetune.Config())["train"]
    model, _ = FastLanguageModel.from_pretrained(str(source.folder), max_seq_length=2048, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth", random_state=3407,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row.input_ids} for row in rows])
    results = []
    for batch in options.batches:
        watch = stopwatch(options.steps, mean_length(rows))
        args = SFTConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=batch // 2,
            max_steps=WARM_UP + options.steps + 1, learning_rate=2e-4, lr_scheduler_type="linear", optim="adamw_8bit",
            weight_decay=0.01, warmup_steps=5, seed=3407, report_to="none", save_strategy="no", disable_tqdm=True,
            max_length=2048,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
        trainer.train()
        results.append(watch.result(batch))
    return results


def train_ours(options: argparse.Namespace) -> list[dict]:
    """finetune.py's own functions, in the order of its job; `--max-vram` as there."""
    finetune.start_ranks()
    if finetune.has_gpu():
        import unsloth  # noqa: F401  (before transformers)
    source = source_of(options.model)
    tokenizer = finetune.load_tokenizer(source.folder)
    plain = finetune.Config(max_vram=options.max_vram, goal="style", reworded_fraction=0.0, replay_fraction=0.0)
    config = finetune.fill_defaults(plain, source)
    finetune.console.quiet = True
    sides = examples(tokenizer, config)
    rows, held_out = sides["train"], sides["eval"][:4]
    model = finetune.add_lora(finetune.load_model(source, config), config, source)
    results = []
    for batch in options.batches:
        own = dataclasses.replace(config, effective_batch_size=batch, max_steps=WARM_UP + options.steps + 1)
        watch = stopwatch(options.steps, mean_length(rows))
        plan = finetune.make_plan(own, source.config, rows, finetune.free_memory(own))
        partial = Path(finetune.gather(tempfile.mkdtemp())[0])
        laid_out = finetune.training_rows(tokenizer, rows, [], plan, own)

        def validate() -> dict:
            return {"recall": None, "nll": finetune.answer_nll(model, tokenizer, held_out), "chrf": []}

        facts, plan = finetune.train(model, tokenizer, laid_out, validate, plan, own, partial, callbacks=(watch,))
        names = finetune.PLAN_IN_RUN_JSON
        found = watch.result(batch) | {"plan": {name: getattr(plan, name) for name in names} | {"why": plan.reason}}
        found["losses"] = [round(entry["loss"], 4) for entry in facts["log"]]
        results.append(found | {"peak_gib": max(finetune.gather(found["peak_gib"]))})  # of the card that needs most
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Memory and speed by precision: the seed's second table


def memory(options: argparse.Namespace, kind: str) -> list[dict]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_of(options.model)
    if kind == "4-bit":
        model = finetune.load_4bit(source, finetune.compute_dtype())
    else:
        shape = AutoConfig.from_pretrained(source.folder)
        if hasattr(shape, "quantization_config"):
            del shape.quantization_config
        with torch.device("cuda"):  # random numbers of the same shape take as long
            model = AutoModelForCausalLM.from_config(shape, dtype={"fp32": torch.float32, "fp16": torch.float16}[kind])
    ids = torch.randint(5, 1000, (1, 64), device="cuda")
    with torch.inference_mode():
        model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        began = time.perf_counter()
        model.generate(input_ids=ids, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / finetune.GIB
    return [{"peak_gib": round(peak, 2), "tokens_per_second": round(options.tokens / seconds, 1)}]


# ----------------------------------------------------------------------------------------------------------------------
# Chat


def random_adapter(source: finetune.Source) -> Path:
    """A LoRA of the recipe's shape that changes every layer."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(finetune.load_4bit(source, finetune.compute_dtype()), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    folder = Path(tempfile.mkdtemp()) / "random"
    model.save_pretrained(folder)
    return folder


def generate_speed(model: Any, options: argparse.Namespace, size: int) -> float:
    """Tokens a second of `generate`, the prompt's reading taken out as ours does: its first token is not counted."""
    import torch

    ids = torch.randint(5, min(size, 1000), (1, 40), device=model.device)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    times = []
    with torch.inference_mode():
        for tokens in (2, 1, options.tokens):
            began = time.perf_counter()
            model.generate(input_ids=ids, max_new_tokens=tokens, **settings)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return round((options.tokens - 1) / (times[2] - times[1]), 1)


def chat_generate(options: argparse.Namespace) -> list[dict]:
    from peft import PeftModel

    source = source_of(options.model)
    model = PeftModel.from_pretrained(
        finetune.load_4bit(source, finetune.compute_dtype()), random_adapter(source)
    ).eval()
    size = source.config["vocab_size"]
    adapter = generate_speed(model, options, size)
    with model.disable_adapter():
        return [{"adapter": adapter, "base": generate_speed(model, options, size)}]


def chat_unsloth(options: argparse.Namespace) -> list[dict]:
    from unsloth import FastLanguageModel

    source = source_of(options.model)
    folder = random_adapter(source)
    model, _ = FastLanguageModel.from_pretrained(str(source.folder), max_seq_length=2048, load_in_4bit=True)
    size, result = source.config["vocab_size"], {}
    FastLanguageModel.for_inference(model)
    result["base"] = generate_speed(model, options, size)
    settings = {"r": 16, "lora_alpha": 32, "target_modules": PROJECTIONS, "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model, **settings)
    finetune.load_adapter(model, folder)
    FastLanguageModel.for_inference(model)
    return [result | {"adapter": generate_speed(model, options, size)}]


def chat_ours(options: argparse.Namespace) -> list[dict]:
    import chat

    source = source_of(options.model)
    engine = chat.Engine(source)
    name = engine.load_adapter(chat.read_adapter(random_adapter(source))).name
    for model in engine.models.values():
        model.stops = frozenset()  # noise may say EOS at any time
    settings, result = chat.Parameters(temperature=0, num_predict=options.tokens), {}
    sampled = chat.Parameters(seed=1, num_predict=options.tokens)
    long = [{"role": "user", "content": "Tell me. " + "What does the policy cover in case of fire and flood? " * 90}]
    for key, who in (("base", chat.BASE), ("adapter", name)):
        engine.answer(QUESTION, who, settings)
        engine.models[who].capture_ahead()
        result[key] = round(engine.answer(QUESTION, who, settings).tokens_per_second, 1)
        result[f"{key}, sampled"] = round(engine.answer(QUESTION, who, sampled).tokens_per_second, 1)
    first = engine.answer(long, name, settings)
    engine.models[name].capture_ahead()  # as the chat does once the answer stands
    # Not its own answer: noise is not cut into the same tokens again, and would be read a second time.
    turns = [*long, {"role": "assistant", "content": "That depends."}, FOLLOW_UP]
    second = engine.answer(turns, name, settings)
    result |= {
        "turn 1 tokens": first.prompt_tokens,
        "turn 1 first token ms": round(first.first_token * 1e3, 1),
        "turn 2 new tokens": second.prompt_tokens - second.cached_tokens,
        "turn 2 first token ms": round(second.first_token * 1e3, 1),
    }
    one = dataclasses.replace(settings, num_predict=1)
    engine.answer(QUESTION, chat.BASE, one)
    alone = engine.answer(QUESTION, chat.BASE, one).seconds
    engine.answer(QUESTION, name, one)
    switched = engine.answer(QUESTION, chat.BASE, one).seconds
    return [result | {"adapter switch ms": round(max(0.0, switched - alone) * 1e3, 2)}]


ARMS = {
    "training": {"ours": train_ours, "seed": train_seed, "unsloth": train_unsloth, "2-ranks": train_ours},
    "memory": {kind: lambda options, kind=kind: memory(options, kind) for kind in ("fp32", "fp16", "4-bit")},
    "chat": {"generate": chat_generate, "unsloth": chat_unsloth, "ours": chat_ours},
}


# ----------------------------------------------------------------------------------------------------------------------
# Running the arms, and the table


def run_arm(part: str, arm: str, options: argparse.Namespace) -> list[dict] | None:
    """One arm in a process of its own; None if it failed, which the log tells."""
    if arm == "2-ranks" and len(options.batches) > 1:  # DDP leaves its hooks on a model: the next would sum twice
        alone = (argparse.Namespace(**vars(options) | {"batches": [batch]}) for batch in options.batches)
        found = [run_arm(part, arm, one) for one in alone]
        return None if None in found else [one for [one] in found]
    model = options.model
    if options.random:
        model = str(options.random / ("16-bit" if (part, arm) == ("training", "seed") else "nf4"))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2] if arm == "2-ranks" else []
    command = [
        sys.executable,
        *ranks,
        __file__,
        "--arm",
        f"{part}/{arm}",
        "--steps",
        options.steps,
        "--tokens",
        options.tokens,
    ]
    command += ["--batches", *options.batches]
    command += ["--model", model] if model else []
    command += ["--max-vram", options.max_vram] if options.max_vram else []
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=options.timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    print(f"{part:9} {arm:9} {time.perf_counter() - began:5.0f} s  {lines[-1][7:] if lines else 'failed'}", flush=True)
    if not lines:
        print("\n".join(done.stderr.splitlines()[-12:]), file=sys.stderr)
        return None
    return json.loads(lines[-1][7:])


def ratio(ours: dict | None, other: dict | None, key: str) -> str:
    if not ours or not other or not ours.get(key) or not other.get(key):
        return "-"
    value = other[key] / ours[key] if key == "gpu_busy_ms" else ours[key] / other[key]
    return f"{value:.1f}x"


def table(results: dict) -> str:
    lines = []
    training = results.get("training", {})
    for number, batch in enumerate(results["batches"] if training else []):
        rows = {arm: found[number] for arm, found in training.items() if found}
        lines += [f"\nEffective batch {batch}: samples/s, tokens/s, GPU busy ms/step, peak GiB; ours is faster by"]
        for arm, row in rows.items():
            times = [ratio(rows.get("ours"), row, key) for key in ("samples_per_second", "gpu_busy_ms")]
            ahead = f"{times[0]} (busy {times[1]})"
            lines.append(
                f"  {arm:9} {row['samples_per_second']:8.2f} {row['tokens_per_second']:8.0f} {row['gpu_busy_ms']:8.0f} "
                f"{row['peak_gib']:7.2f}   {ahead if arm != 'ours' else ''}"
            )
    for part in ("memory", "chat"):
        if found := {arm: rows[0] for arm, rows in results.get(part, {}).items() if rows}:
            lines.append(f"\n{part.capitalize()}")
            lines += [
                f"  {arm:9} " + ", ".join(f"{key} {value}" for key, value in row.items()) for arm, row in found.items()
            ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: random weights with a GPU, else the embedded model")
    parser.add_argument("--part", choices=ARMS, action="append", help="only this part; may be given again")
    parser.add_argument("--only", action="append", help="only this arm: seed, unsloth, ours, ...")
    parser.add_argument("--steps", type=int, default=5, help="updates that are timed")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each answer")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--max-vram", type=float, help="GiB, for our training")
    parser.add_argument("--tokenizer", type=Path, help="folder, for the random weights; default: the embedded model's")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-7b")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--timeout", type=float, default=1200, help="seconds an arm may take")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ |= {name: os.environ.get(name, value) for name, value in finetune.QUIET.items()}
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled"))
    os.chdir(ROOT)  # the sample data
    finetune.guard_torchvision()
    if options.arm:
        part, arm = options.arm.split("/")
        found = ARMS[part][arm](options)
        if finetune.RANK == 0:
            print("RESULT " + json.dumps(found))
        return
    gpu = finetune.has_gpu()
    alone = [arm for arms in ARMS.values() for arm in arms if arm != "2-ranks" and (gpu or arm != "unsloth")]
    options.random = options.scratch if gpu and not options.model else None
    parts = options.part or (list(ARMS) if gpu else ["training", "chat"])
    if options.random:
        options.random.mkdir(parents=True, exist_ok=True)
        make_random(options.random, options.tokenizer)
    if not gpu and options.batches == list(BATCHES):
        options.batches = [4]
    machine = finetune.environment()
    results: dict = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "batches": options.batches}
    print(f"{machine.get('gpu') or platform.processor() or 'CPU'}, {results['date']}")
    for part in parts:
        arms = [arm for arm in ARMS[part] if arm in (options.only or alone)]
        results[part] = {arm: run_arm(part, arm, options) for arm in arms}
        options.output.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
