#!/usr/bin/env python
"""Chat in the terminal with a fine-tuned model and its base, and see what the fine-tune changed.

    python chat.py                                 the newest adapter beside its base; F2 switches between the two
    python chat.py --adapter faq_sample-smollm2    another adapter, by name or folder; give it again for several
    python chat.py "What is a deductible?"         one answer on stdout, then done; add --compare for every model's
    python chat.py --json < questions.txt          one question a line in, one JSON object a line out

In the chat /help lists the commands. Piped questions are independent of each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

import finetune
from finetune import BadInput, Source, chat_ids

if TYPE_CHECKING:
    import torch
    from prompt_toolkit import PromptSession
    from transformers import PreTrainedTokenizerBase

# ----------------------------------------------------------------------------------------------------------------------
# Constants

BASE = "base"  # the name under which the model without adapter answers
SLOTS = 512  # places of a model's first cache, doubled when full: attention works through all of them
PREFILL = 512  # prompt tokens read in one forward: Ctrl-C is heard between two of them
WINDOW = 64  # prompt tokens that a CUDA graph reads at a time, as many as a next question has
REPEAT_LAST = 64  # tokens that repeat_penalty looks back over, as in ollama
TURN_LENGTH = 8  # tokens a model writes in /compare before the next one's turn: switching adapters costs a little
TOP = 3  # choices shown where two answers part
PROBE = "What does this cover?"  # an adapter that changes no logit here has no effect
NEAR = 55  # token_sort_ratio from which a training question counts as near
NARROW = 38  # columns of /compare narrower than this stand under each other

# name -> (type, lowest, highest, help); the names are ollama's
PARAMETERS: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0, 2, "0 always takes the likeliest token"),
    "top_p": (float, 0, 1, "sample among the likeliest tokens that make up this share"),
    "top_k": (int, 0, 1_000_000, "sample among so many likeliest tokens; 0: all"),
    "repeat_penalty": (float, 0.5, 2, "above 1: tokens of the last 64 are less likely"),
    "num_predict": (int, -1, 1_000_000, "tokens an answer may have; -1: until the context is full"),
    "seed": (int, 0, 2**63 - 1, "the same seed gives the same answer; 'random': a new one each time"),
    "strength": (float, 0, 2, "how far the adapter counts: 0 is the base, 1 as trained"),
}

# command -> (arguments, help), in the order of /help
COMMANDS: dict[str, tuple[str, str]] = {
    "/adapter": ("[NAME|base]", "list the models, or let another one answer (F2: on and off)"),
    "/compare": ("[QUESTION]", "base and every adapter answer at once; without question: the last one again"),
    "/regen": ("[NAME]", "answer the last question again, as another model if you name one"),
    "/undo": ("", "drop the last question and its answer"),
    "/clear": ("", "start over (the system prompt stays)"),
    "/system": ("[TEXT]", 'show or set the system prompt; "" removes it'),
    "/set": ("parameter NAME VALUE", "temperature, strength, ...; alone: show them"),
    "/show": ("", "models, parameters and system prompt"),
    "/score": ("TEXT", "how likely each model finds TEXT as the answer to the last question"),
    "/vote": ("[QUESTION]", "blind A/B: names hidden, order shuffled; the tally is kept"),
    "/save": ("FILE", "save the conversation as JSON"),
    "/load": ("FILE", "go on with a saved conversation"),
    "/export": ("FILE.md", "write the conversation as Markdown"),
    "/read": ("FILE", "put a text file before your next question"),
    "/stats": ("", "tokens and times of the last answer, and what is cached"),
    "/help": ("", "this list; /? too"),
    "/bye": ("", "leave; /exit, /quit and Ctrl-D too"),
}
SAME_AS = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
TAKES_PATH = ("/save", "/load", "/export", "/read")
TAKES_MODEL = ("/adapter", "/regen")


# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an answer is drawn. At temperature 0 and repeat_penalty 1 it is what `generate` gives without sampling."""

    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 40
    repeat_penalty: float = 1.0  # Above 1: tokens of the last 64 are less likely.
    num_predict: int = 512  # Tokens an answer may have; -1: until the context is full.
    seed: int | None = None  # The same seed gives the same answer. Default: a new one each time.
    strength: float = 1.0  # How far the adapter counts, 0 to 2.


@dataclasses.dataclass(frozen=True)
class Config:
    question: tyro.conf.Positional[str | None] = None  # Answer this and leave; else chat, or read stdin if piped.
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # Name in adapters/, or folder. Default: the newest.
    model: str | None = None  # Hub id, folder or .gguf file, instead of the base that the adapter names.
    system: str | None = None  # System prompt.
    compare: bool = False  # Base and every adapter answer each question.
    json: bool = False  # One JSON object a line: model, question, answer, tokens, seconds, seed.
    num_ctx: int = 4096  # Context in tokens, at most what the model can.
    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(default_factory=Settings)


def parse(argv: list[str] | None = None) -> Config:
    options = (tyro.conf.FlagCreatePairsOff,)
    config = tyro.cli(Config, args=argv, prog="chat.py", description=__doc__, config=options)
    for name in PARAMETERS:
        value = getattr(config.settings, name)
        if value is not None:
            parse_parameter(name, str(value), "--" + name.replace("_", "-"))
    if config.num_ctx < 64:
        raise BadInput("--num-ctx must be at least 64")
    return config


def parse_parameter(name: str, text: str, shown: str) -> float | int | None:
    """The value of a parameter, or BadInput that says what may stand there."""
    kind, low, high, _ = PARAMETERS[name]
    if name == "seed" and text in ("random", "none"):
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        limits = f"from {low:g} to {high:g}" if high < 1000 else f"of {low:g} or more"
        raise BadInput(f"{shown} must be {what} {limits}, not {clean(text)!r}")
    return value


def clean(text: str) -> str:
    """Nothing that a terminal obeys: no escape sequences, no carriage returns, no reordering."""
    text = finetune.clean(text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4))
    return finetune.BIDI.sub("\N{REPLACEMENT CHARACTER}", text)


def brief(error: Exception) -> str:
    return clean(" ".join(str(error).split()))[:200] or type(error).__name__


def state_folder() -> Path:
    """For what a person leaves behind: the history of the prompt and the tally of votes."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_STATE_HOME")
    folder = Path(base or Path.home() / ".local/state") / "faq-finetune"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def private_file(path: Path) -> Path:
    """The file, there and readable by its owner alone: questions can be personal."""
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Adapters on disk. No torch here.


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder that PEFT can load, and what its run.json tells."""

    path: Path
    base: str  # what find_model() understands
    run: dict

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def summary(self) -> str:
        """One line on what training did to it, as far as run.json knows."""
        verdict = self.part("evaluation", "verdict").get("label")
        losses = [self.part("evaluation", arm).get("nll") for arm in ("before", "after")]
        measured = all(isinstance(loss, float) for loss in losses)
        change = "held-out loss {:.2f} -> {:.2f}".format(*losses) if measured else ""
        return clean(": ".join(str(part) for part in (verdict, change) if part))

    def part(self, *names: str) -> dict:
        """An object within run.json; empty if it is not there."""
        found: Any = self.run
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


def read_adapter(path: Path) -> Adapter:
    """Check a folder before anything heavy is loaded. Raises BadInput."""
    shown = f"adapter {clean(str(path))}"
    if not path.is_dir():
        raise BadInput(f"{shown}: no such folder")
    if not (path / "adapter_config.json").is_file():
        hint = "; it is a whole model: name it with --model" if (path / "config.json").is_file() else ""
        raise BadInput(f"{shown}: has no adapter_config.json, so it is not an adapter{hint}")
    if not (path / "adapter_model.safetensors").is_file():
        raise BadInput(f"{shown}: has no adapter_model.safetensors (pickled .bin files are never loaded)")
    config = read_object(path / "adapter_config.json")
    run = read_object(path / "run.json") if (path / "run.json").is_file() else {}
    if config.get("peft_type") != "LORA":
        raise BadInput(
            f"{shown}: is {clean(str(config.get('peft_type')))}, but only LoRA adapters can be switched here"
        )
    named = str(config.get("base_model_name_or_path") or "")
    local = {public: name for name, public in finetune.PUBLIC_NAME.items()}
    adapter = Adapter(path, local.get(named, named), run)
    return dataclasses.replace(adapter, base=str(adapter.part("model").get("id") or adapter.base))


def read_object(path: Path) -> dict:
    try:
        loaded = finetune.parse_json(path.read_text(encoding="utf-8-sig"), "line {line}, ")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if isinstance(loaded, BadInput):
        raise BadInput(f"{path}: {loaded}")
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: the top level is {finetune.kind_of(loaded)}, but an object is needed")
    return loaded


def adapters_on_disk() -> dict[str, Path]:
    """What finetune.py finished, newest first: in adapters/ of this folder, else in that of chat.py's own."""
    for parent in (Path("adapters"), finetune.HERE / "adapters"):
        files = [file for file in parent.glob("*/adapter_config.json") if file.parent.suffix != ".partial"]
        if files:
            files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
            return {file.parent.name: file.parent for file in files}
    return {}


def find_adapter(name: str) -> Adapter:
    """A name in adapters/ or a folder -> Adapter. Raises BadInput with the nearest name."""
    known = adapters_on_disk()
    path = Path(name).expanduser()
    if name in known:
        path = known[name]
    elif not path.exists():
        near = difflib.get_close_matches(name, known, 1)
        there = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none yet'}"
        raise BadInput(f"adapter {clean(name)}: neither a folder nor a name in adapters/; {there}")
    return read_adapter(path)


def choose_models(config: Config) -> tuple[Source, list[Adapter]]:
    """What to open: the adapters asked for, or the newest, and the base they stand on. Raises BadInput."""
    adapters = [find_adapter(name) for name in config.adapter]
    if config.model:
        source = finetune.find_model(config.model, gpu=False)
        if not config.adapter:
            on_it = (read_adapter(path) for path in adapters_on_disk().values())
            adapters = [adapter for adapter in on_it if adapter.base == source.id][:1]
        return source, adapters
    if not config.adapter:
        adapters = [read_adapter(path) for path in adapters_on_disk().values()][:1]
    bases = list(dict.fromkeys(adapter.base for adapter in adapters))
    if len(bases) > 1:
        names = ", ".join(f"{adapter.name} on {adapter.base}" for adapter in adapters)
        raise BadInput(f"--adapter: these stand on different models: {names}; open one, then /adapter loads another")
    if bases == [""]:
        raise BadInput(f"adapter {adapters[0].path}: does not say which model it was trained on; name it with --model")
    if not bases:
        finetune.guard_torchvision()
        return finetune.find_model(None, finetune.has_gpu()), []
    return finetune.find_model(bases[0], gpu=False), adapters


# ----------------------------------------------------------------------------------------------------------------------
# Engine: 4-bit models, adapters switched in place, token streams. Needs no terminal.


@dataclasses.dataclass
class Answer:
    """What came of one question so far. `seconds` is this model's own time, whoever else had turns in between."""

    model: str
    seed: int
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, found in the cache instead of read again
    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)  # without the EOS
    seconds: float = 0.0
    first_token: float | None = None  # seconds until it came
    stop: str = "interrupted"  # or "end", "num_predict", "context"
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)  # choices at each step, if asked for

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, whose time goes with reading the prompt."""
        spent = self.seconds - (self.first_token or 0)
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str  # whole characters only; may be empty
    answer: Answer  # as it stands; it grows


class Detokenizer:
    """Token ids -> text, piece by piece, never half a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.ids, self.start, self.read = tokenizer, [], 0, 0

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self.pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character's other bytes are yet to come
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text

    def pending(self) -> str:
        """Decoded together with the tokens before: some tokenizers drop the space of what comes first."""
        before, now = (self.decode(self.ids[self.start : end]) for end in (self.read, len(self.ids)))
        return now[len(before) :]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def fuse(parts: list[Any], dense: bool) -> Any:
    """4-bit layers that read the same input as one: their rows under each other, so one kernel does the work of three.

    On a GPU the parts become views of it, and the weights are in memory once. `dense` dequantizes once, on a CPU.
    """
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, has_avx512bf16
    from bitsandbytes.nn import Linear4bit, Params4bit

    def scales(state: Any) -> torch.Tensor:
        return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax

    first, width = parts[0], parts[0].in_features
    state = first.weight.quant_state
    rows = [part.out_features for part in parts]
    weight = torch.cat([part.weight.data.view(part.out_features, -1) for part in parts])
    absmax = torch.cat([scales(part.weight.quant_state).float().view(part.out_features, -1) for part in parts])
    bias = torch.cat([part.bias for part in parts]) if first.bias is not None else None

    def layer(weight: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None) -> Linear4bit:
        size = torch.Size((len(weight), width))
        kind = {"code": state.code, "blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": state.dtype}
        one = Linear4bit(width, len(weight), bias=False, compute_dtype=first.compute_dtype, device="meta")
        data, shape = weight.reshape(-1, 1), QuantState(absmax.reshape(-1), size, **kind)
        one.weight = Params4bit(data, quant_state=shape, blocksize=state.blocksize, quant_type=state.quant_type)
        one.weight.bnb_quantized, one.bias = True, bias
        return one.eval()

    whole = layer(weight, absmax, bias)
    if weight.device.type == "cuda":
        for part, own, scale in zip(parts, weight.split(rows), absmax.split(rows), strict=True):
            part.weight = layer(own, scale, None).weight
    elif dense or not has_avx512bf16():  # bitsandbytes would dequantize at every token
        numbers = dequantize_4bit(whole.weight, whole.weight.quant_state)
        return lambda x: torch.nn.functional.linear(x, numbers, bias)
    return whole


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of a few positions to many: on a GPU as two products, which share out the keys among its processors.

    PyTorch's own goes through them one after the other: 150 us instead of 18 at 4096 keys, in each layer.
    """
    import torch

    if not query.is_cuda or query.shape[1] > 16:
        return torch.nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask)[
            0
        ]
    whole = {"out_dtype": torch.float32} if query.dtype != torch.float32 else {}
    likeness = torch.bmm(query, keys.transpose(1, 2), **whole)
    shares = torch.add(mask, likeness, alpha=query.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(shares.to(query.dtype), values)


class Slots:
    """Keys and values that one model has read, at addresses that stay: a CUDA graph needs that."""

    def __init__(self, quick: Quick, size: int, old: Slots | None = None):
        import torch

        shape = (2, len(quick.layers), quick.kv_heads, size, quick.head_size)
        self.keys, self.values = torch.zeros(shape, dtype=quick.dtype, device=quick.device)
        if old is not None:
            self.keys[:, :, : old.size] = old.keys
            self.values[:, :, : old.size] = old.values
        self.size, self.graphs = size, {}
        places = torch.arange(size, device=quick.device)
        self.cos, self.sin = (table[0].to(quick.dtype) for table in quick.rotate(self.keys, places[None]))
        self.sin = torch.cat([-self.sin[:, : quick.head_size // 2], self.sin[:, quick.head_size // 2 :]], dim=1)
        self.token, self.place, self.last = torch.zeros((3, 1), dtype=torch.long, device=quick.device)
        self.window = torch.zeros(WINDOW, dtype=torch.long, device=quick.device)
        self.logits = torch.zeros(quick.head.weight.shape[0], device=quick.device)


class Quick:
    """A Llama-like network as one stream of tokens wants it, with the weights of transformers' and PEFT's modules.

    Those launch 45 kernels a layer and 8 more a LoRA, and no processor feeds a GPU that fast. Here projections of one
    input are one product, LoRA adds two small ones, and on a GPU a step of one token is a CUDA graph, replayed; so is
    the reading of a short question.
    """

    GROUPS = (
        ("self_attn", ("q_proj", "k_proj", "v_proj")),
        ("self_attn", ("o_proj",)),
        ("mlp", ("gate_proj", "up_proj")),
        ("mlp", ("down_proj",)),
    )

    def __init__(self, network: Any):
        import psutil
        import torch

        config, inner = network.config, network.model
        self.layers, self.rotate, self.norm = inner.layers, inner.rotary_emb, inner.norm
        self.embeddings, self.head = inner.embed_tokens, network.lm_head
        self.device, self.dtype = network.device, inner.embed_tokens.weight.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = self.layers[0].self_attn.head_dim
        # Where a CPU has AVX512-BF16, bitsandbytes multiplies in bf16. That is half as fast again, but near ties then
        # fall either way: an answer with its cache reused would differ from one without. So fp32 if memory allows.
        groups = [[self.parts(layer, block, names) for block, names in self.GROUPS] for layer in self.layers]
        numbers = sum(part.in_features * part.out_features for parts in itertools.chain(*groups) for part in parts)
        dense = 4 * numbers < psutil.virtual_memory().available / 2
        self.fused = [[fuse(parts, dense) for parts in layer] for layer in groups]
        self.loras: dict[str, list] = {}
        self.scaling: dict[str, dict[int, float]] = {}
        self.strength: dict[str, float] = {}
        self.graphs = self.device.type == "cuda"
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of a prompt
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None

    @classmethod
    def fits(cls, network: Any) -> bool:
        """Whether the network is of the kind that forward() below computes."""
        from bitsandbytes.nn import Linear4bit

        config = network.config
        kind = config.model_type in ("llama", "mistral", "qwen2") and config.hidden_act == "silu"
        rope = (config.rope_parameters or {}).get("rope_type", "default") in ("default", "linear", "llama3")
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if not kind or not rope or slides or (config.model_type == "mistral" and config.sliding_window):
            return False
        layers = network.model.layers
        parts = [part for layer in layers for block, names in cls.GROUPS for part in cls.parts(layer, block, names)]
        return all(
            isinstance(part, Linear4bit)
            and part.weight.element_size() == 1
            and part.in_features % part.weight.quant_state.blocksize == 0
            and part.out_features % 32 == 0
            for part in parts
        )

    def add(self, key: str, network: Any) -> None:
        """Take over PEFT's adapter, unless it has more than plain LoRA on the fused layers."""
        from peft.tuners.lora import LoraLayer

        parts = [
            part for layer in self.layers for block, names in self.GROUPS for part in self.parts(layer, block, names)
        ]
        config = network.peft_config[key]
        adapted = {id(module) for module in network.modules() if isinstance(module, LoraLayer) and key in module.r}
        more = config.use_dora or config.lora_bias or config.modules_to_save or config.trainable_token_indices
        if adapted and adapted <= set(map(id, parts)) and not more:
            self.scaling[key] = {id(part): part.scaling[key] for part in parts if id(part) in adapted}
            self.set_strength(key, 1.0)

    @staticmethod
    def parts(layer: Any, block: str, names: tuple[str, ...]) -> list[Any]:
        return [getattr(getattr(layer, block), name) for name in names]

    def set_strength(self, key: str, strength: float) -> None:
        """Each fused layer's LoRA: all A under each other, all B along a diagonal, scaled. In place, for the graphs."""
        if self.strength.get(key) == strength:
            return
        new = [
            [self.pair(key, strength, self.parts(layer, block, names)) for block, names in self.GROUPS]
            for layer in self.layers
        ]
        if key in self.loras:
            for old, pair in zip(itertools.chain(*self.loras[key]), itertools.chain(*new), strict=True):
                if pair is not None:
                    old[1].copy_(pair[1])
        else:
            self.loras[key] = new
        self.strength[key] = strength

    def pair(self, key: str, strength: float, parts: list[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        scaling = self.scaling[key]
        adapted = [part for part in parts if id(part) in scaling]
        if not adapted:
            return None
        down = torch.cat([part.lora_A[key].weight for part in adapted])
        up = torch.zeros(sum(part.out_features for part in parts), len(down), device=self.device)
        row = column = 0
        for part in parts:
            if id(part) in scaling:
                weight = part.lora_B[key].weight
                up[row : row + len(weight), column : column + weight.shape[1]] = weight * (scaling[id(part)] * strength)
                column += weight.shape[1]
            row += part.out_features
        return down.to(self.dtype).T, up.to(self.dtype).T

    def forward(
        self, tokens: torch.Tensor, place: torch.Tensor, slots: Slots, key: str | None, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits after `tokens`, of which the first stands at `place`; their keys and values go into `slots`.

        `last` says after which of them instead: what stands behind that one is padding, and no position before sees it.
        """
        import torch
        from torch.nn.functional import embedding, rms_norm, silu

        count, group, kv = len(tokens), self.heads // self.kv_heads, self.kv_heads
        end = slots.size if self.graphs else int(place) + count  # a graph cannot have a length that grows
        places = place + torch.arange(count, device=self.device)
        cos, sin = slots.cos[places, None], slots.sin[places, None]
        seen = torch.arange(end, device=self.device) <= places[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        mask = mask.repeat(group, 1)
        hidden = embedding(tokens, self.embeddings.weight)
        loras = self.loras[key] if key else [(None,) * len(self.GROUPS)] * len(self.layers)

        def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
            return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

        def project(x: torch.Tensor, layer: Callable, lora: tuple | None) -> torch.Tensor:
            return layer(x) if lora is None else layer(x).addmm_(x @ lora[0], lora[1])

        for number, (layer, fused, lora) in enumerate(zip(self.layers, self.fused, loras, strict=True)):
            keys, values = slots.keys[number], slots.values[number]
            x = project(norm(hidden, layer.input_layernorm), fused[0], lora[0]).view(count, -1, self.head_size)
            turned, value = x[:, :-kv], x[:, -kv:]
            turned = turned * cos + turned.roll(self.head_size // 2, -1) * sin
            keys.index_copy_(1, places, turned[:, -kv:].transpose(0, 1))
            values.index_copy_(1, places, value.transpose(0, 1))
            # Heads that share keys are stacked as if they were further positions: no copy of the keys for each.
            query = turned[:, :-kv].unflatten(1, (kv, group)).permute(1, 2, 0, 3).reshape(kv, group * count, -1)
            x = attend(query, keys[:, :end], values[:, :end], mask)
            x = x.view(kv, group, count, -1).permute(2, 0, 1, 3).reshape(count, -1)
            hidden = hidden + project(x, fused[1], lora[1])
            gate, up = project(norm(hidden, layer.post_attention_layernorm), fused[2], lora[2]).chunk(2, dim=-1)
            hidden = hidden + project(silu(gate) * up, fused[3], lora[3])
        hidden = hidden[-1:] if last is None else hidden.index_select(0, last)
        return self.head(norm(hidden, self.norm))[0].float()

    def read(self, ids: list[int], place: int, slots: Slots, key: str | None) -> torch.Tensor:
        """forward() for a piece of a prompt: a graph's replay where prepare() made one and the piece is short."""
        import torch

        tokens = torch.tensor(ids, device=self.device)
        slots.place.fill_(place)
        graph = slots.graphs.get((key, WINDOW))
        if graph is None or len(ids) > WINDOW or place + WINDOW > slots.size:
            return self.forward(tokens, slots.place, slots, key)
        slots.window[: len(ids)] = tokens
        slots.last.fill_(len(ids) - 1)
        graph.replay()
        return slots.logits

    def prepare(self, place: int, slots: Slots, key: str | None) -> None:
        """Capture the graph of a next question, at a time when nobody waits for it. There is room for it in `slots`."""
        if (key, WINDOW) not in slots.graphs:
            slots.place.fill_(place)
            self.capture(slots, key, WINDOW)

    def step(self, token: torch.Tensor, place: int, slots: Slots, key: str | None) -> torch.Tensor:
        """forward() for one token: a graph's replay where there are graphs. The result is valid until the next step."""
        slots.token.copy_(token)
        slots.place.fill_(place)
        if not self.graphs:
            return self.forward(slots.token, slots.place, slots, key)
        if (key, 1) not in slots.graphs and not self.capture(slots, key, 1):
            return self.forward(slots.token, slots.place, slots, key)
        slots.graphs[key, 1].replay()
        return slots.logits

    def capture(self, slots: Slots, key: str | None, width: int) -> bool:
        """The graph of forward() over one token or over the window; False where the driver or the card cannot."""
        import torch

        tokens, last = (slots.token, None) if width == 1 else (slots.window, slots.last)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries take workspaces at the first run, which no capture may do
                self.forward(tokens, slots.place, slots, key, last)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                slots.logits.copy_(self.forward(tokens, slots.place, slots, key, last))
        except RuntimeError:  # slower, but the same; without the window's the step's may still fit the memory
            self.graphs = self.graphs and width > 1
            slots.graphs[key, width] = None
            torch.cuda.synchronize()
            return False
        slots.graphs[key, width] = graph
        return True


class Base:
    """One 4-bit model in memory and the LoRA adapters on it. Only one is active, or none."""

    def __init__(self, source: Source):
        self.source = source
        self.tokenizer = finetune.load_tokenizer(source.folder, source.id)
        self.model: Any = finetune.load_4bit(source, finetune.compute_dtype())
        self.quick = Quick(self.model) if Quick.fits(self.model) else None
        self.adapters: list[str] = []
        self.active: tuple[str | None, float] = (None, 1.0)

    def add(self, adapter: Adapter) -> str:
        """Load an adapter beside those that are there; returns PEFT's name of it. Raises BadInput."""
        from peft import LoraConfig, PeftModel
        from safetensors import SafetensorError

        key = f"lora{len(self.adapters)}"  # a folder's name may hold a dot, which PEFT cannot take
        try:
            if not self.adapters:
                lora = LoraConfig.from_pretrained(str(adapter.path))
                lora.inference_mode = True
                self.model = PeftModel(self.model, lora, key)
            loaded = self.model.load_adapter(str(adapter.path), key)
            if loaded.missing_keys:
                raise ValueError(f"{len(loaded.missing_keys)} of its tensors are missing")
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            self.forget(key)
            raise BadInput(
                f"adapter {adapter.path}: does not fit {self.source.id} or is damaged: {brief(error)}"
            ) from None
        self.adapters.append(key)
        self.model.eval()
        if self.quick:
            self.quick.add(key, self.model)
        self.active = (key, 1.0)
        self.use(None, 1.0)
        return key

    def forget(self, key: str) -> None:
        """Take away what a failed add() left behind."""
        if key in getattr(self.model, "peft_config", {}):
            if self.adapters:
                self.model.delete_adapter(key)
                self.active = (self.adapters[0], 1.0)
                self.use(None, 1.0)
            else:
                self.model = self.model.unload()

    def use(self, key: str | None, strength: float) -> None:
        """Switch in place, without touching a weight."""
        if (key, strength) == self.active or not self.adapters:
            return
        if key is None:
            self.model.base_model.disable_adapter_layers()
        else:
            if self.active[0] is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(key, inference_mode=True)
            for module in self.model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale(key, strength)
        self.active = (key, strength)


@dataclasses.dataclass
class Model:
    """A name that can answer: a base, or an adapter on it, with the cache of what it has read."""

    name: str
    base: Base
    key: str | None  # PEFT's name of the adapter; None: the base itself
    tokenizer: PreTrainedTokenizerBase
    stops: frozenset[int]
    adapter: Adapter | None = None
    no_effect: bool = False
    # A LoRA changes keys and values, so each model has a cache of its own, valid for one strength.
    cache: Any = None
    ids: list[int] = dataclasses.field(default_factory=list)  # the tokens that the cache holds
    strength: float = 1.0
    plain: bool = False  # the slow way even where there is a fast one: they round differently

    @property
    def quick(self) -> Quick | None:
        """The fast way to run it, if it is one of the models and adapters that have one."""
        quick = None if self.plain else self.base.quick
        return quick if quick and (self.key is None or self.key in quick.loras) else None


class Engine:
    """Base and adapters by name, and answers from them.

    engine = Engine(finetune.find_model(None, gpu=False))
    engine.add(read_adapter(Path("adapters/faq_sample-smollm2")))
    for piece in engine.stream([{"role": "user", "content": "Hello"}], "base", Settings()):
        print(piece.text, end="")
    """

    def __init__(self, source: Source, num_ctx: int = 4096):
        finetune.guard_torchvision()
        finetune.fetch_weights(source)
        self.num_ctx = num_ctx
        self.bases: list[Base] = []
        self.models: dict[str, Model] = {}
        self.add_base(source)

    def add_base(self, source: Source) -> Model:
        base = Base(source)
        name = BASE if not self.bases else f"{BASE}-{source.name}"
        self.bases.append(base)
        self.models[name] = Model(name, base, None, base.tokenizer, stop_ids(base.tokenizer, base.model))
        self.warm_up(self.models[name])
        return self.models[name]

    def add(self, adapter: Adapter, source: Source | None = None) -> Model:
        """Load an adapter onto the base with this source (default: the first). Raises BadInput."""
        base = next((base for base in self.bases if source and base.source.id == source.id), self.bases[0])
        tokenizer = base.tokenizer
        if (adapter.path / "tokenizer_config.json").is_file():
            try:
                tokenizer = finetune.load_tokenizer(adapter.path, adapter.name)
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise BadInput(f"adapter {adapter.path}: its tokenizer cannot be loaded: {brief(error)}") from None
        if len(tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
            raise BadInput(f"adapter {adapter.path}: its tokenizer has more tokens than {base.source.id}")
        key = base.add(adapter)
        names = itertools.chain([adapter.name], (f"{adapter.name}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in self.models)
        model = Model(name, base, key, tokenizer, stop_ids(tokenizer, base.model), adapter)
        self.models[name] = model
        self.warm_up(model)
        return model

    def warm_up(self, model: Model) -> None:
        """One forward, so that the first question finds everything ready; tells if the adapter does anything at all."""
        import torch

        ids = chat_ids(model.tokenizer, [{"role": "user", "content": PROBE}], add_generation_prompt=True)
        self.rewind(model, ids, model.strength)
        own = self.read(model, ids, None).clone()
        if model.quick:
            self.advance(model, own.argmax()[None])
        if model.key:
            base = dataclasses.replace(model, key=None, cache=None, ids=[], plain=model.quick is None)
            self.rewind(base, ids, 1.0)
            model.no_effect = torch.allclose(own, self.read(base, ids, None), rtol=0, atol=1e-6)

    def context(self, name: str) -> int:
        """Tokens that fit: --num-ctx, or less if the model's positions end sooner."""
        config = self.models[name].base.model.config
        return min(self.num_ctx, getattr(config, "max_position_embeddings", None) or self.num_ctx)

    def count(self, messages: list[dict], name: str) -> int:
        return len(chat_ids(self.models[name].tokenizer, messages, add_generation_prompt=True)) if messages else 0

    def rewind(self, model: Model, ids: list[int], strength: float) -> list[int]:
        """Cut the model's cache back to what it has in common with `ids`; returns the tokens still to be read."""
        import torch
        from transformers import DynamicCache

        if model.cache is not None and model.strength == strength:
            common = next((n for n, (a, b) in enumerate(zip(model.ids, ids, strict=False)) if a != b), None)
            keep = min(common if common is not None else len(model.ids), len(model.ids), len(ids) - 1)
            try:
                with torch.inference_mode():
                    if keep < len(model.ids) and not model.quick:  # Slots are overwritten instead
                        model.cache.crop(keep - len(model.ids))
                model.ids = model.ids[:keep]
                return ids[keep:]
            except (RuntimeError, ValueError):  # a sliding window has already forgotten what stood there
                pass
        if not model.quick:
            model.cache = DynamicCache(config=model.base.model.config)
        model.ids, model.strength = [], strength
        return ids

    def forward(self, model: Model, ids: list[int]) -> torch.Tensor:
        """The logits of the token after `ids`, which follow what the model's cache holds."""
        import torch

        network, quick = model.base.model, model.quick
        with torch.inference_mode():
            if quick:
                self.make_room(model, len(ids))
                return quick.read(ids, len(model.ids), model.cache, model.key)
            tokens = torch.tensor(ids, device=network.device)
            model.base.use(model.key, model.strength)
            out = network(input_ids=tokens[None], past_key_values=model.cache, use_cache=True, logits_to_keep=1)
            return out.logits[0, -1].float()

    def make_room(self, model: Model, count: int) -> None:
        """Slots for `count` more tokens; when they run out, twice as many, with a graph of their own."""
        size = model.cache.size if model.cache else SLOTS
        while size < len(model.ids) + count:
            size *= 2
        if model.cache is None or size > model.cache.size:
            model.cache = Slots(model.quick, size, model.cache)
        if model.key:
            model.quick.set_strength(model.key, model.strength)

    def read(self, model: Model, ids: list[int], stop: threading.Event | None) -> torch.Tensor | None:
        """Feed tokens into the model's cache; None if `stop` was set in between. The cache stays valid at any time."""
        logits = None
        captured = model.cache.graphs.get((model.key, WINDOW)) if model.quick and model.cache else None
        size = WINDOW if captured and len(ids) <= 3 * WINDOW else PREFILL
        for start in range(0, len(ids), size):
            if stop is not None and stop.is_set():
                return None
            some = ids[start : start + size]
            with self.kept_valid(model):
                logits = self.forward(model, some)
            model.ids = model.ids + some
        return logits

    def advance(self, model: Model, token: torch.Tensor) -> torch.Tensor:
        """The logits after one more token, which may still be on its way: on a GPU this only queues the work.

        The caller enters the token in model.ids once it knows it.
        """
        import torch

        with torch.inference_mode(), self.kept_valid(model):
            if not model.quick:
                return self.forward(model, token.tolist())
            self.make_room(model, 1)
            return model.quick.step(token, len(model.ids), model.cache, model.key)

    def prepare(self, model: Model) -> None:
        """What can be done before the next question comes: on a GPU 0.3 s, once for each size of the cache."""
        import torch

        if model.quick and model.quick.graphs and len(model.ids) + WINDOW <= self.context(model.name):
            with torch.inference_mode(), self.kept_valid(model):
                self.make_room(model, WINDOW)
                model.quick.prepare(len(model.ids), model.cache, model.key)

    @contextlib.contextmanager
    def kept_valid(self, model: Model) -> Iterator[None]:
        try:
            yield
        except BaseException:  # half of the layers may have taken the tokens: this cache is lost
            model.cache, model.ids = None, []
            raise

    def stream(
        self, messages: list[dict], name: str, settings: Settings, stop: threading.Event | None = None, top: int = 0
    ) -> Iterator[Piece]:
        """Answer as it comes. Setting `stop` ends it between two tokens; what came so far stays, in the cache too."""
        began = time.perf_counter()
        model = self.models[name]
        ids = chat_ids(model.tokenizer, messages, add_generation_prompt=True)
        room = self.context(name) - len(ids)
        if room < 1:
            raise BadInput(f"the question has {len(ids)} tokens; the context holds {self.context(name)}")
        limit = min(room, settings.num_predict) if settings.num_predict >= 0 else room
        answer = Answer(name, random_seed() if settings.seed is None else settings.seed, len(ids))
        sampler = Sampler(settings, answer.seed, ids, model.base.model.device)
        words = Detokenizer(model.tokenizer)
        feed = self.rewind(model, ids, settings.strength if model.key else 1.0)
        answer.cached_tokens = len(ids) - len(feed)
        cut = "context" if limit == room else "num_predict"
        logits = self.read(model, feed, stop) if limit else None
        while logits is not None:
            chosen = sampler.pick(logits)
            choices = likeliest(logits, top) if top else None
            arriving = Arriving(chosen)
            # A GPU begins the next step before this token is known here; what it did after the last is overwritten.
            ahead = self.advance(model, chosen) if chosen.is_cuda and answer.tokens + 1 < limit else None
            token = arriving.value()
            if choices:
                answer.top.append(choices)
            if answer.first_token is None:
                answer.first_token = answer.seconds + time.perf_counter() - began
            if token in model.stops:
                answer.stop = "end"
                break
            answer.ids.append(token)
            text = words.push(token)
            text = text if answer.text else text.lstrip()  # Mistral's template puts a space there itself
            answer.text += text
            answer.seconds += time.perf_counter() - began
            yield Piece(text, answer)
            began = time.perf_counter()
            if answer.tokens == limit or (stop is not None and stop.is_set()):
                break
            logits = ahead if ahead is not None else self.advance(model, chosen)
            model.ids.append(token)
        if answer.tokens == limit:
            answer.stop = cut
        rest = words.pending().rstrip("\N{REPLACEMENT CHARACTER}")
        rest = rest if answer.text else rest.lstrip()
        answer.text += rest
        answer.seconds += time.perf_counter() - began
        yield Piece(rest, answer)

    def answer(
        self, messages: list[dict], name: str, settings: Settings, stop: threading.Event | None = None
    ) -> Answer:
        """The whole answer at once."""
        return list(self.stream(messages, name, settings, stop))[-1].answer

    def compare(
        self, messages: list[dict], names: Iterable[str], settings: Settings, stop: threading.Event | None = None
    ) -> Iterator[Piece]:
        """All the models' answers, some tokens each in turn, each the same as if it were alone.

        Not in one batch: a mixed batch of two rounds differently from two of one, and a comparison must not.
        """
        seed = random_seed() if settings.seed is None else settings.seed
        settings = dataclasses.replace(settings, seed=seed)
        streams = [self.stream(messages, name, settings, stop, TOP) for name in names]
        while streams:
            for stream in list(streams):
                number = 0
                for number, piece in enumerate(itertools.islice(stream, TURN_LENGTH), 1):  # noqa: B007
                    yield piece
                if number < TURN_LENGTH:  # it has ended
                    streams.remove(stream)

    def score(self, messages: list[dict], text: str, name: str) -> tuple[float, int]:
        """Mean log-probability of `text` (and the EOS after it) as the answer, and how many tokens that are."""
        import torch

        model = self.models[name]
        prompt = chat_ids(model.tokenizer, messages, add_generation_prompt=True)
        turns = [*messages, {"role": "assistant", "content": text}]
        ids = chat_ids(model.tokenizer, turns, add_generation_prompt=False)
        ends = [n for n, token in enumerate(ids) if token == model.tokenizer.eos_token_id and n >= len(prompt)]
        ids = ids[: ends[-1] + 1] if ends else ids
        if len(ids) > self.context(name):
            raise BadInput(f"question and text have {len(ids)} tokens; the context holds {self.context(name)}")
        answer = torch.tensor(ids[len(prompt) :])
        model.base.use(model.key, model.strength)
        network = model.base.model
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=network.device)
            logits = network(input_ids=tokens, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
            likely = torch.log_softmax(logits.float(), -1).cpu().gather(1, answer[:, None])
        return likely.mean().item(), len(answer)


def stop_ids(tokenizer: PreTrainedTokenizerBase, network: Any) -> frozenset[int]:
    """Tokens that end an answer: EOS, generation_config's, and what the saved template puts after an answer."""
    wanted = {tokenizer.eos_token_id}
    configured = getattr(network.generation_config, "eos_token_id", None)
    wanted.update(configured if isinstance(configured, list) else [configured])
    question = [{"role": "user", "content": "1"}]
    before = chat_ids(tokenizer, question, add_generation_prompt=True)
    whole = chat_ids(tokenizer, [*question, {"role": "assistant", "content": "2"}], add_generation_prompt=False)
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id}
    wanted.update(token for token in whole[len(before) :] if token in special)
    return frozenset(token for token in wanted if token is not None)


class Sampler:
    """Picks tokens on the model's device: repeat_penalty, then temperature, top_k and top_p."""

    def __init__(self, settings: Settings, seed: int, ids: list[int], device: Any = "cpu"):
        import torch

        self.settings, self.recent = settings, torch.tensor(ids[-REPEAT_LAST:], device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """One token, in a tensor: whoever reads it waits for it."""
        import torch

        settings = self.settings
        if settings.repeat_penalty != 1:
            values = logits[self.recent]
            values = torch.where(values > 0, values / settings.repeat_penalty, values * settings.repeat_penalty)
            logits = logits.scatter(0, self.recent, values)
        if settings.temperature == 0:
            token = logits.argmax()[None]
        else:
            count = min(settings.top_k or len(logits), len(logits))
            values, places = (logits / settings.temperature).topk(count)
            shares = values.softmax(-1)
            before = shares.cumsum(-1) - shares
            shares = shares.masked_fill((before >= settings.top_p) & (before > 0), 0)  # the likeliest always stays
            token = places[torch.multinomial(shares, 1, generator=self.generator)]
        if settings.repeat_penalty != 1:
            self.recent = torch.cat([self.recent, token])[-REPEAT_LAST:]
        return token


class Arriving:
    """A token that a GPU is still to pick: reading it waits for that, and not for what was queued since."""

    def __init__(self, token: torch.Tensor):
        import torch

        self.token, self.event = token, None
        if token.is_cuda:
            self.token = torch.empty(1, dtype=torch.long, pin_memory=True).copy_(token, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def value(self) -> int:
        if self.event:
            self.event.synchronize()
        return int(self.token)


def likeliest(logits: torch.Tensor, count: int) -> list[tuple[int, float]]:
    shares, places = logits.softmax(-1).topk(count)
    return list(zip(places.tolist(), shares.tolist(), strict=True))


def random_seed() -> int:
    return random.SystemRandom().randrange(2**31)


def first_difference(one: Answer, other: Answer) -> int | None:
    """The place of the first token that differs, the end of an answer counting as one; None if they are the same."""
    for place, (a, b) in enumerate(itertools.zip_longest(one.ids, other.ids)):
        if a != b:
            return place
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Conversation: pure data


@dataclasses.dataclass
class Reply:
    """One model's answer to a question."""

    model: str
    text: str
    tokens: int = 0
    seconds: float = 0.0
    seed: int | None = None
    stop: str = "end"

    @classmethod
    def of(cls, answer: Answer) -> Reply:
        return cls(answer.model, answer.text, answer.tokens, round(answer.seconds, 3), answer.seed, answer.stop)


@dataclasses.dataclass
class Turn:
    """A question with the answers it got; the conversation goes on with the chosen one."""

    question: str
    replies: list[Reply]
    chosen: int = 0

    @property
    def reply(self) -> Reply:
        return self.replies[self.chosen]


@dataclasses.dataclass
class Conversation:
    """Only whole turns: a question enters it together with its first answer."""

    system: str | None = None
    turns: list[Turn] = dataclasses.field(default_factory=list)
    skipped: int = 0  # oldest turns that no longer fit into the context; kept here, not sent

    def messages(self, question: str | None = None, upto: int | None = None) -> list[dict]:
        """What the model reads: the system prompt, the turns that fit (before turn `upto`), the question."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[self.skipped : upto]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply.text})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def fit(
        self, question: str, count: Callable[[list[dict]], int], room: int, upto: int | None = None
    ) -> tuple[list[dict], int]:
        """The messages, and how many oldest turns had to go to make room. Raises BadInput if the question is too long.

        Down to three quarters at once: dropping a turn moves all others, so the caches have to be read anew.
        """
        turns = len(self.turns) if upto is None else upto
        before, used = self.skipped, count(self.messages(question, upto))
        target = room if used <= room else room * 3 // 4
        while used > target and self.skipped < turns:
            self.skipped += 1
            used = count(self.messages(question, upto))
        if used > room:
            self.skipped = before
            raise BadInput(f"too long: {used} tokens with the system prompt, and there is room for {room}")
        return self.messages(question, upto), self.skipped - before

    def undo(self) -> Turn | None:
        self.skipped = 0
        return self.turns.pop() if self.turns else None

    def as_json(self) -> dict:
        return {
            "format": "faq-finetune chat 1",
            "system": self.system,
            "turns": [dataclasses.asdict(t) for t in self.turns],
        }

    @classmethod
    def from_json(cls, loaded: Any, where: str) -> Conversation:
        """Checked: the file may have been written by hand. Raises BadInput that names the turn."""

        def need(fine: bool, message: str) -> None:
            if not fine:
                raise BadInput(f"{where}: {message}")

        need(isinstance(loaded, dict) and isinstance(loaded.get("turns"), list), "is not a saved conversation")
        need(loaded.get("system") is None or isinstance(loaded["system"], str), '"system" must be a text or null')
        turns = []
        for number, turn in enumerate(loaded["turns"], 1):
            place = f"turn {number}"
            need(isinstance(turn, dict), f"{place} is {finetune.kind_of(turn)}, but an object is needed")
            need(isinstance(turn.get("question"), str), f'{place} has no text "question"')
            replies, chosen = turn.get("replies"), turn.get("chosen", 0)
            need(isinstance(replies, list) and bool(replies), f'{place} has no "replies"')
            for reply in replies:
                texts = isinstance(reply, dict) and all(isinstance(reply.get(key), str) for key in ("model", "text"))
                need(texts, f'{place}: a reply needs the texts "model" and "text"')
            need(type(chosen) is int and 0 <= chosen < len(replies), f'{place}: "chosen" must count its replies from 0')
            kept = [{f.name: r[f.name] for f in dataclasses.fields(Reply) if f.name in r} for r in replies]
            turns.append(Turn(turn["question"], [Reply(**fields) for fields in kept], chosen))
        return cls(loaded.get("system") or None, turns)

    def as_markdown(self) -> str:
        parts = ["# Conversation", f"System prompt: {self.system}" if self.system else ""]
        for number, turn in enumerate(self.turns, 1):
            parts += [f"## {number}. Question", turn.question]
            for place, reply in enumerate(turn.replies):
                other = "" if place == turn.chosen else " (not chosen)"
                parts += [f"### {reply.model}{other}", reply.text]
        return "\n\n".join(part for part in parts if part) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Beside, then renamed: a full disk leaves the old file as it was."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------------------------
# What training knew: the nearest question of an adapter's data


def nearest_question(adapter: Adapter, question: str) -> tuple[finetune.Row, float, str] | None:
    """(row, likeness in percent, "trained on" or "held out") from the data that run.json names, if it is at hand."""
    from rapidfuzz import fuzz

    data, config = adapter.part("data"), adapter.part("config")
    rows = [row for file in data.get("files") or [] for row in data_rows(file, config)]
    wanted = finetune.normalize(question)
    scored = [(fuzz.token_sort_ratio(wanted, finetune.normalize(row.question)), row) for row in rows]
    score, row = max(scored, key=lambda pair: pair[0], default=(0, None))
    if row is None or score < NEAR:
        return None
    return row, score, "trained on" if row.id in (data.get("train_ids") or []) else "held out"


def data_rows(file: Any, config: dict) -> list[finetune.Row]:
    """The rows of one data file of a run; none if the file is gone or no longer readable."""
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        return []
    for path in (Path(file["path"]).expanduser(), finetune.HERE / file["path"]):
        if path.is_file():
            return finetune.read_file(path, config.get("question_field"), config.get("answer_field"))[0]
    return []


# ----------------------------------------------------------------------------------------------------------------------
# Screen


class LeftHeading(Markdown.elements["paragraph_open"]):  # type: ignore[misc]
    """rich centres headings or puts boxes around them."""

    style_name = "bold"


class AnswerMarkdown(Markdown):
    elements = Markdown.elements | {"heading_open": LeftHeading}


class AnswerWriter:
    """Writes an answer as it comes, and puts each finished block of Markdown in its rendered form in place.

    In place only while the block still stands whole on the screen and the width is the same; else it stays as it was
    written. What has scrolled away is never touched, and lines are broken here so that their number is known.
    """

    OPENS = re.compile(r"([-*+]|\d{1,9}[.)]|#{1,6}|>)\s|\s{0,3}(```|~~~)")  # lines that open a block of their own
    MARKUP = re.compile(r"[*_`#|>~\[]|^\s*([-+]|\d{1,9}[.)])\s|^\s*[-=]{3,}\s*$|\\\S|&\w+;", re.MULTILINE)
    UNSURE = re.compile("[\u200d\ufe0f\U0001f000-\U0001faff]")  # terminals disagree on how wide these are

    def __init__(self, console: Console):
        self.console, self.file = console, console.file
        self.fancy = console.is_terminal and not console.is_dumb_terminal
        self.line, self.done = "", 0  # the source line that is coming, and how much of it is on the screen
        self.block: list[str] = []  # the source lines of the block before it
        self.fence = ""
        self.blank = True  # nothing, or an empty line, stands above
        self.begin()

    def begin(self) -> None:
        self.rows = self.column = 0
        self.width = self.console.width

    def feed(self, text: str) -> None:
        text = clean(text)
        if not self.fancy:
            self.file.write(text)
        else:
            first, *others = text.split("\n")
            self.add(first)
            for part in others:
                self.end_line()
                self.add(part)
        self.file.flush()

    def add(self, part: str) -> None:
        """Whole words go to the screen, so that none is broken at the margin."""
        self.line += part
        word = re.search(r"\S*$", self.line)[0]
        self.show(len(self.line) - (0 if self.may_break(word) else len(word)))

    def may_break(self, word: str) -> bool:
        """Too long to wait for its end, or of a script without spaces."""
        return cell_len(word) > min(24, self.width - 1) or cell_len(word) > len(word)

    def show(self, end: int) -> None:
        if end <= self.done:
            return
        if not self.done:
            self.open_line()
        for part in re.finditer(r"\s+|\S+", self.line[:end]):
            text = self.line[max(part.start(), self.done) : part.end()]
            if self.column + cell_len(text) < self.width:
                self.put(text)
            elif self.may_break(part[0]):
                for character in text:
                    if self.column + cell_len(character) >= self.width:
                        self.break_line()
                    self.put(character)
            elif not text.isspace():
                self.break_line()
                self.put(text)
        self.done = end

    def put(self, text: str) -> None:
        self.file.write(text)
        self.column += cell_len(text)

    def break_line(self) -> None:
        self.file.write("\n")
        self.rows, self.column = self.rows + 1, 0

    def open_line(self) -> None:
        if self.block and not self.fence and self.OPENS.match(self.line):
            self.finish_block()
        if self.block:
            self.break_line()

    def end_line(self) -> None:
        line, fence = self.line, re.match(r"\s{0,3}(```+|~~~+)", self.line)
        if not line.strip() and not self.fence:
            self.finish_block()
            if not self.blank:
                self.file.write("\n")
                self.blank = True
        else:
            if line:
                self.show(len(line))
            else:
                self.open_line()
            self.block.append(line)
            if self.fence:
                if line.strip() == self.fence:
                    self.fence = ""
                    self.finish_block()
            elif fence:
                self.fence = fence[1]
            elif re.match(r"#{1,6}\s", line):
                self.finish_block()
        self.line, self.done = "", 0

    def finish_block(self) -> None:
        if not self.block:
            return
        source = "\n".join(self.block)
        whole = self.rows < self.console.height - 1 and self.width == self.console.width
        if whole and self.MARKUP.search(source) and not (self.rows and self.UNSURE.search(source)):
            self.file.write((f"\x1b[{self.rows}A" if self.rows else "") + "\r\x1b[J")
            self.file.write(
                render(self.console, AnswerMarkdown(textwrap.dedent(source), "ansi_dark", hyperlinks=False))
            )
        self.file.write("\n")
        self.block, self.blank = [], False
        self.begin()

    def close(self) -> None:
        if self.fancy and self.line.strip():
            self.show(len(self.line))
            self.block.append(self.line)
        if self.fancy:
            self.finish_block()
        else:
            self.file.write("\n")
        self.file.flush()


def render(console: Console, what: RenderableType) -> str:
    """As it would be printed, without the spaces that rich fills lines with, and without the last newline."""
    with console.capture() as captured:
        console.print(what)
    lines = captured.get().split("\n")
    return "\n".join(re.sub(r"\s+((?:\x1b\[[\d;]*m)*)$", r"\1", line) for line in lines).strip("\n")


class Area:
    """Lines at the bottom of the screen that are painted anew until they are final; never more than fit."""

    def __init__(self, console: Console):
        self.console, self.lines, self.painted = console, [], 0.0

    def paint(self, what: RenderableType) -> None:
        if time.monotonic() - self.painted < 0.1:
            return
        self.painted = time.monotonic()
        lines = render(self.console, what).split("\n")[-max(1, self.console.height - 2) :]
        # Line over line, and only then what is left below: a screen that is erased first would flicker.
        self.console.file.write(self.to_top() + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.console.file.flush()
        self.lines = [Text.from_ansi(line).cell_len for line in lines]

    def erase(self) -> None:
        self.console.file.write(self.to_top() + "\x1b[J" if self.lines else "")
        self.lines = []

    def to_top(self) -> str:
        """In a window that has become narrower, terminals break the lines that no longer fit."""
        rows = sum(max(1, math.ceil(length / self.console.width)) for length in self.lines)
        return f"\x1b[{rows}A\r" if rows else ""


def plain_table(head: bool = False, expand: bool = False) -> Table:
    """Aligned columns without lines."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=head, expand=expand)


def marked(text: str, other: str, plain: bool = False) -> Text:
    """The text, with the words that the other one has not in their place."""
    parts = re.findall(r"\s+|\S+", clean(text))
    words = [n for n, part in enumerate(parts) if not part.isspace()]
    matcher = difflib.SequenceMatcher(None, [parts[n] for n in words], clean(other).split(), autojunk=False)
    same = {words[n] for a, _, size in matcher.get_matching_blocks() for n in range(a, a + size)}
    result = Text()
    for number, part in enumerate(parts):
        if part.isspace() or number in same:
            result.append(part)
        else:
            result.append(f"*{part}*" if plain else part, style="bold yellow")
    return result


def side_by_side(answers: list[tuple[str, str, Text]], width: int) -> RenderableType:
    """(head, speed, text) of each model: in columns, or under each other where columns would be narrow."""
    heads = [Text.assemble((head, "bold"), "  ", (speed, "dim")) for head, speed, _ in answers]
    texts = [text for *_, text in answers]
    if width // len(answers) >= NARROW:
        table = plain_table(expand=True)
        for _ in answers:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*heads)
        table.add_row(*texts)
        return table
    for text in (*heads, *texts):
        text.overflow = "fold"
    return Group(*itertools.chain(*zip(heads, texts, itertools.repeat(""), strict=False)))


def speed_of(answer: Answer) -> str:
    cut = " (cut)" if answer.stop in ("num_predict", "context") else ""
    return f"{answer.tokens} tokens{cut}, {answer.tokens_per_second:.0f} tok/s" if answer.tokens > 1 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Keys and signals


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that an answer ends between two tokens; a second one raises KeyboardInterrupt."""
    event = threading.Event()

    def handle(*_: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        with silent_keys():
            yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """What is typed while an answer comes is kept for the prompt, and not echoed into the answer."""
    try:
        import termios

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(number, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def make_session(chat: Chat) -> PromptSession:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        text = event.current_buffer.text
        if text.lstrip().startswith('"""') and (text.count('"""') < 2 or not text.rstrip().endswith('"""')):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("f2")
    def _(event: Any) -> None:
        chat.toggle()
        event.app.invalidate()

    try:
        history: Any = FileHistory(str(private_file(state_folder() / "chat_history")))
    except OSError:  # a read-only home
        history = InMemoryHistory()
    session: PromptSession = PromptSession(
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: "" if wrapped else "... ",
        key_bindings=keys,
        history=history,
        auto_suggest=AutoSuggestFromHistory(),
        completer=make_completer(chat),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        reserve_space_for_menu=6,
        enable_open_in_editor=True,
        output=plain_output(),
        bottom_toolbar=lambda: chat.toolbar(),
        refresh_interval=0.5,
        style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
    )
    return session


def plain_output() -> Any:
    """For a dumb terminal one that sends no escape sequences; for others None, which is prompt_toolkit's own."""
    from prompt_toolkit.output.plain_text import PlainTextOutput
    from prompt_toolkit.utils import is_dumb_terminal

    return PlainTextOutput(sys.stdout) if is_dumb_terminal() else None


def make_completer(chat: Chat) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        paths = PathCompleter(expanduser=True)

        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if not text.startswith("/") or "\n" in text:
                return
            if not space:
                words = {name: meaning for name, (_, meaning) in COMMANDS.items()}
                rest = command
            elif command in TAKES_PATH:
                yield from self.paths.get_completions(Document(rest), event)
                return
            elif command in TAKES_MODEL:
                words = dict.fromkeys(chat.known_models(), "")
            elif command == "/set" and rest.startswith("parameter "):
                words = {name: meaning for name, (*_, meaning) in PARAMETERS.items()}
                rest = rest.removeprefix("parameter ")
            elif command == "/set":
                words = {"parameter": ""}
            else:
                return
            for word, meaning in words.items():
                if word.startswith(rest):
                    yield Completion(word, -len(rest), display_meta=meaning)

    return CommandCompleter()


# ----------------------------------------------------------------------------------------------------------------------
# Chat


class Chat:
    """The terminal chat: reads a line, does what it says. The model loads while the first line is typed."""

    def __init__(self, config: Config, source: Source, adapters: list[Adapter], loading: Future[Engine]):
        self.config, self.source, self.loading = config, source, loading
        self.settings = config.settings
        self.conversation = Conversation(config.system)
        self.console = Console(highlight=False)
        self.first_names = [BASE, *(adapter.name for adapter in adapters)]
        self.model = self.adapter = adapters[0].name if adapters else BASE  # who answers; whom F2 brings back
        self.files: list[str] = []  # texts that go with the next question
        self.last: Answer | None = None
        self.compared: tuple[str, dict[str, Answer]] | None = None
        self.context_used = 0
        self.typed = ""  # what the next prompt begins with
        self.leaving = False
        self.session = make_session(self)

    # -- small things

    @property
    def engine(self) -> Engine:
        """The models, waiting for them if they are still loading."""
        if not self.loading.done():
            self.note("Loading the model ...")
        return self.loading.result()

    def note(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(clean(text)), style=style)

    def ask(self, question: str) -> str:
        """A question of ours within the chat; Ctrl-C and Ctrl-D are an empty answer."""
        from prompt_toolkit import PromptSession

        self.note(question, "none")
        try:
            return PromptSession(output=plain_output()).prompt("? ").strip()
        except (KeyboardInterrupt, EOFError):
            return ""

    def models(self) -> list[str]:
        return list(self.loading.result().models) if self.loading.done() else self.first_names

    def known_models(self) -> list[str]:
        """Those that are loaded, then those on disk."""
        return list(dict.fromkeys([*self.models(), *adapters_on_disk()]))

    def toggle(self) -> None:
        """F2. What base an adapter stands on is known only once it is loaded; before that there is one."""
        if self.model != self.adapter:
            self.model = self.adapter
        elif self.loading.done() and self.model in self.engine.models:
            base = self.engine.models[self.model].base
            self.model = next(name for name, m in self.engine.models.items() if m.base is base and m.key is None)
        else:
            self.model = BASE

    def toolbar(self) -> str:
        """As many of the facts as fit, the most wanted first."""
        facts = [self.model]
        if not self.loading.done():
            facts.append("loading ...")
        else:
            used, limit = self.context_used, self.engine.context(self.model)
            if self.last:
                facts.append(f"{self.last.tokens_per_second:.0f} tok/s")
                facts.append(f"first token {self.last.first_token or 0:.2f} s")
            facts.append(f"context {used} of {limit}")
        if self.settings.strength != 1 and self.model != BASE:
            facts.append(f"strength {self.settings.strength:g}")
        if self.files:
            facts.append(f"{len(self.files)} file(s) with the next question")
        if self.adapter != BASE:
            facts.append(f"F2: {self.adapter if self.model != self.adapter else BASE}")
        while len(facts) > 1 and cell_len("  ".join(facts)) >= self.console.width:
            facts.pop()
        return "  ".join(facts)

    def count_context(self) -> None:
        messages = self.conversation.messages()
        self.context_used = self.engine.count(messages, self.model) if self.conversation.turns else 0

    # -- the loop

    def run(self) -> None:
        self.greet()
        while not self.leaving:
            try:
                typed, self.typed = self.typed, ""
                line = self.session.prompt(">>> ", default=typed)
                if self.loading.done():
                    self.session.refresh_interval = 0
                self.handle(line)
            except KeyboardInterrupt:
                self.note("Ctrl-D on an empty line or /bye leaves; /help lists the commands")
                continue
            except EOFError:
                return
            except BadInput as problem:
                if self.loading.done() and self.loading.exception():
                    raise
                self.note(str(problem), "red")
            if line.strip():
                self.console.print()

    def greet(self) -> None:
        _, *adapters = self.first_names
        self.note(f"{self.source.id} in 4 bits" + (f" with {', '.join(adapters)}" if adapters else ""), "bold")
        if adapters:
            self.note(
                "F2 switches the adapter off and on, /compare shows both, /help lists the commands, Ctrl-D leaves"
            )
        else:
            self.note("No adapter yet: python finetune.py trains one. /help lists the commands, Ctrl-D leaves")

    def handle(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/"):
            self.command(line)
            return
        text = line.strip()
        if text.startswith('"""'):
            text = text.removeprefix('"""').removesuffix('"""').strip("\n")
        if text.strip():
            self.question(text)

    def command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        word = SAME_AS.get(word.strip(), word.strip())
        if word not in COMMANDS:
            near = difflib.get_close_matches(word, [*COMMANDS, *SAME_AS], 1)
            hint = f"; did you mean {near[0]}?" if near else "; /help lists them"
            self.note(f"No command {word}{hint} (a question that starts with / needs a space before it)", "red")
            return
        getattr(self, "do_" + word[1:])(rest.strip())

    # -- answering

    def prepare(self, question: str, names: Iterable[str], upto: int | None = None) -> list[dict]:
        """The messages to send. Says so when old turns no longer fit."""
        engine = self.engine
        names = list(names)
        limit = min(engine.context(name) for name in names)
        wanted = self.settings.num_predict
        room = limit - min(wanted if wanted >= 0 else limit, limit // 4)
        messages, dropped = self.conversation.fit(
            question, lambda messages: max(engine.count(messages, name) for name in names), room, upto
        )
        if dropped:
            turns = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
            self.note(f"The context of {limit} tokens is full: the {turns} no longer sent", "yellow")
        return messages

    def question(self, text: str) -> None:
        if self.config.compare:
            self.do_compare(text)
            return
        text = "\n\n".join([*self.files, text])
        answer = self.say(self.prepare(text, [self.model]), self.model)
        if answer.text:
            self.conversation.turns.append(Turn(text, [Reply.of(answer)]))
            self.files = []
        self.count_context()

    def say(self, messages: list[dict], name: str) -> Answer:
        """Stream an answer to the screen."""
        if len(self.models()) > 1:
            self.note(name)
        writer = AnswerWriter(self.console)
        with interruptible() as stop:
            for piece in self.engine.stream(messages, name, self.settings, stop):
                writer.feed(piece.text)
        writer.close()
        self.last = piece.answer
        self.tell_end(piece.answer)
        self.engine.prepare(self.engine.models[name])
        return piece.answer

    def tell_end(self, answer: Answer) -> None:
        if not answer.text:
            self.note("No answer came; the question is not kept")
        elif answer.stop == "interrupted":
            self.note("Stopped; what came is kept")
        elif answer.stop == "num_predict":
            self.note(f"Stopped at num_predict {self.settings.num_predict}; /set parameter num_predict -1 lets it end")
        elif answer.stop == "context":
            self.note("Stopped: the context is full", "yellow")

    def last_turn(self) -> Turn:
        if not self.conversation.turns:
            raise BadInput("there is no question yet")
        return self.conversation.turns[-1]

    # -- commands

    def do_help(self, rest: str) -> None:
        table = plain_table()
        table.add_column(overflow="fold", max_width=25 if self.console.width >= 60 else 13)
        table.add_column()
        for name, (arguments, meaning) in COMMANDS.items():
            table.add_row(Text(f"{name} {arguments}".strip(), "bold"), Text(meaning))
        table.add_row(Text('"""', "bold"), "opens and closes a text of several lines; Alt-Enter is a newline too")
        table.add_row(Text("Ctrl-C", "bold"), "stops an answer and keeps what came")
        table.add_row(Text("Ctrl-X Ctrl-E", "bold"), "opens the line in your editor")
        self.console.print(table)

    def do_bye(self, rest: str) -> None:
        self.leaving = True

    def do_clear(self, rest: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self.files, self.last, self.compared, self.context_used = [], None, None, 0
        self.note("Started over")

    def do_undo(self, rest: str) -> None:
        self.last_turn()
        turn = self.conversation.undo()
        self.count_context()
        self.note(f"Dropped: {' '.join(turn.question.split())[:60]}")

    def do_system(self, rest: str) -> None:
        if rest:
            self.conversation.system = None if rest in ('""', "''") else rest
            self.conversation.skipped = 0
        self.note(f"System prompt: {self.conversation.system or 'none'}")

    def do_set(self, rest: str) -> None:
        words = rest.split()
        if words[:1] == ["parameter"]:
            words = words[1:]
        if not words:
            self.show_parameters()
            return
        if words[0] not in PARAMETERS:
            near = difflib.get_close_matches(words[0], PARAMETERS, 1)
            there = f"did you mean {near[0]}?" if near else f"there are: {', '.join(PARAMETERS)}"
            raise BadInput(f"no parameter {words[0]}; {there}")
        if len(words) == 2:
            value = parse_parameter(words[0], words[1], words[0])
            self.settings = dataclasses.replace(self.settings, **{words[0]: value})
        value = getattr(self.settings, words[0])
        self.note(f"{words[0]} = {'random' if value is None else value}")

    def show_parameters(self) -> None:
        table = plain_table()
        for name, (*_, meaning) in PARAMETERS.items():
            value = getattr(self.settings, name)
            table.add_row(Text(name, "bold"), "random" if value is None else f"{value:g}", Text(meaning, "dim"))
        self.console.print(table)

    def do_show(self, rest: str) -> None:
        self.list_models()
        self.show_parameters()
        self.note(f"System prompt: {self.conversation.system or 'none'}")
        if self.conversation.system and not finetune.takes_system(self.engine.models[self.model].tokenizer):
            self.note("This model's template has no system turn: the prompt goes into the first question")

    def list_models(self) -> None:
        table = plain_table()
        for name, model in self.engine.models.items():
            what = model.adapter.summary if model.adapter else f"{model.base.source.id}, without adapter"
            what = "has no effect: its logits are the base's" if model.no_effect else what
            table.add_row("*" if name == self.model else " ", Text(clean(name), "bold"), Text(what, "dim"))
        for name in adapters_on_disk():
            if name not in self.engine.models:
                table.add_row(" ", Text(clean(name)), Text(f"on disk; /adapter {clean(name)} loads it", "dim"))
        self.console.print(table)

    def do_adapter(self, rest: str) -> None:
        if not rest:
            self.list_models()
            return
        engine = self.engine
        if rest not in engine.models:
            try:
                adapter = find_adapter(rest)
            except BadInput as problem:
                near = difflib.get_close_matches(rest, self.known_models(), 1)
                raise BadInput(f"no adapter {clean(rest)}; did you mean {near[0]}?") if near else problem from None
            rest = self.load_adapter(adapter)
            if not rest:
                return
        self.model = rest
        if engine.models[rest].key:
            self.adapter = rest
        self.count_context()
        self.note(f"{rest} answers from now on")
        self.warn_without_effect(rest)

    def warn_without_effect(self, name: str) -> None:
        if self.engine.models[name].no_effect:
            self.note(f"{name} has no effect: its logits are the base's", "yellow")

    def load_adapter(self, adapter: Adapter) -> str:
        """Onto its base; a base that is not loaded only if the person wants it. The new name, or "" if not."""
        engine = self.engine
        there = [model.name for model in engine.models.values() if model.adapter and model.adapter.path == adapter.path]
        if there:
            return there[0]
        source = finetune.find_model(adapter.base or None, gpu=False)
        if source.id not in [base.source.id for base in engine.bases]:
            wanted = self.ask(f"{adapter.name} stands on {source.id}. Load that model too? [y/N]")
            if wanted.lower() not in ("y", "yes"):
                return ""
            finetune.fetch_weights(source)
            engine.add_base(source)
        with self.console.status(f"Loading {clean(adapter.name)}"):
            return engine.add(adapter, source).name

    def do_regen(self, rest: str) -> None:
        turn, name = self.last_turn(), rest or self.model
        if name not in self.engine.models:
            near = difflib.get_close_matches(name, self.engine.models, 1)
            raise BadInput(f"no model {clean(name)} is loaded" + (f"; did you mean {near[0]}?" if near else ""))
        before = len(self.conversation.turns) - 1
        answer = self.say(self.prepare(turn.question, [name], before), name)
        if answer.text:
            turn.replies.append(Reply.of(answer))
            turn.chosen = len(turn.replies) - 1
        self.count_context()

    def do_stats(self, rest: str) -> None:
        table = plain_table()
        if last := self.last:
            read = last.prompt_tokens - last.cached_tokens
            table.add_row("last answer", f"{clean(last.model)}, seed {last.seed}, ended by {last.stop}")
            table.add_row("prompt", f"{last.prompt_tokens} tokens: {last.cached_tokens} from the cache, {read} read")
            table.add_row("answer", f"{last.tokens} tokens in {last.seconds:.2f} s, {last.tokens_per_second:.1f} tok/s")
            table.add_row("first token", f"{last.first_token or 0:.2f} s")
        else:
            table.add_row("last answer", "none yet")
        for name, model in self.engine.models.items():
            table.add_row("cache", f"{clean(name)}: {len(model.ids)} tokens")
        table.add_row("context", f"{self.context_used} of {self.engine.context(self.model)} tokens")
        table.add_row("memory", f"{finetune.memory_now():.2f} GB")
        self.console.print(table)

    def do_score(self, rest: str) -> None:
        if not rest:
            raise BadInput("/score TEXT: what would be the answer?")
        turn, upto = self.last_turn(), len(self.conversation.turns) - 1
        messages = self.conversation.messages(turn.question, upto)
        table = plain_table(head=True)
        for head in ("", "mean log-probability", "perplexity", "tokens"):
            table.add_column(head, justify="right" if head else "left")
        for name in self.engine.models:
            mean, tokens = self.engine.score(messages, rest, name)
            table.add_row(clean(name), f"{mean:.3f}", f"{math.exp(-mean):.2f}", str(tokens))
        self.note(f"As the answer to: {' '.join(turn.question.split())[:100]}")
        self.console.print(table)

    # -- comparing

    def do_compare(self, rest: str) -> None:
        question, upto = self.to_compare(rest)
        names = self.need_two()
        answers = self.answer_all(question, names, upto, hidden=False)
        if not answers:
            return
        self.compared = question, answers
        self.show_comparison(answers)
        self.show_partings(answers)
        self.show_nearest(question)
        shown = "  ".join(f"{number}: {name}" for number, name in enumerate(answers, 1))
        picked = self.ask(f"\nGo on with the answer of {shown}  Enter: none")
        if picked in map(str, range(1, len(answers) + 1)):
            self.keep(question, answers, list(answers)[int(picked) - 1], upto)
        elif picked in answers:
            self.keep(question, answers, picked, upto)
        else:
            self.typed = picked  # the next question, most likely

    def need_two(self) -> list[str]:
        names = list(self.engine.models)
        if len(names) < 2:
            raise BadInput("there is nothing to compare the base with: /adapter NAME loads an adapter")
        return names

    def to_compare(self, question: str) -> tuple[str, int | None]:
        """The question, and the turn it belongs to if it was asked before."""
        if question:
            text = "\n\n".join([*self.files, question])
            self.files = []
            return text, None
        return self.last_turn().question, len(self.conversation.turns) - 1

    def answer_all(self, question: str, names: list[str], upto: int | None, hidden: bool) -> dict[str, Answer]:
        """All answers, seen as they come unless hidden. Empty if it was stopped before each had begun."""
        messages = self.prepare(question, names, upto)
        answers: dict[str, Answer] = {}
        area, live = Area(self.console), AnswerWriter(self.console).fancy
        with interruptible() as stop:
            for piece in self.engine.compare(messages, names, self.settings, stop):
                answers[piece.answer.model] = piece.answer
                if not live:
                    continue
                if hidden:
                    area.paint(Text(f"Both answer: {sum(a.tokens for a in answers.values())} tokens", "dim"))
                else:
                    ordered = [answers.get(name, Answer(name, 0)) for name in names]
                    heads = [(clean(a.model), speed_of(a), Text(clean(a.text))) for a in ordered]
                    area.paint(side_by_side(heads, self.console.width))
        area.erase()
        answers = {name: answers[name] for name in names if name in answers and answers[name].text}
        if len(answers) < 2:
            self.note("Stopped before there was anything to compare")
            return {}
        self.last = answers.get(self.model, next(iter(answers.values())))
        return answers

    def show_comparison(self, answers: dict[str, Answer], heads: list[str] | None = None) -> None:
        names, plain = list(answers), not AnswerWriter(self.console).fancy
        rows = []
        for number, name in enumerate(names):
            other = answers[names[0] if number else names[1]]
            speed = speed_of(answers[name]) if heads is None else ""
            text = marked(answers[name].text, other.text, plain) if heads is None else Text(clean(answers[name].text))
            rows.append((clean(heads[number] if heads else name), speed, text))
        self.console.file.write(render(self.console, side_by_side(rows, self.console.width)) + "\n\n")
        if heads is None:
            self.note(f"seed {answers[names[0]].seed} for all; words that differ are marked")

    def show_partings(self, answers: dict[str, Answer]) -> None:
        """The token at which each adapter's answer leaves the base's, and what both would rather have said."""
        first, *others = answers
        for name in others:
            place = first_difference(answers[first], answers[name])
            if place is None:
                self.note(f"{first} and {name} gave the same answer")
                continue
            tokenizer = self.engine.models[name].tokenizer
            before = tokenizer.decode(answers[name].ids[max(0, place - 6) : place])
            where = f'after "{" ".join(before.split())}"' if place else "their first"
            self.note(f"They part at token {place + 1}, {where}. The likeliest there:")
            wide = max(cell_len(clean(first)), cell_len(clean(name)))
            for who in (first, name):
                tops = answers[who].top[place] if place < len(answers[who].top) else []
                words = "  ".join(f"{self.token(who, token)} {share:.0%}" for token, share in tops)
                self.note(f"  {set_cell_size(clean(who), wide)}  {words or 'had been stopped'}")

    def token(self, name: str, token: int) -> str:
        model = self.engine.models[name]
        text = clean(model.tokenizer.decode([token])).strip(" ")
        return "(end)" if token in model.stops else json.dumps(text, ensure_ascii=False)

    def show_nearest(self, question: str) -> None:
        adapter = next((m.adapter for m in self.engine.models.values() if m.adapter), None)
        near = adapter and nearest_question(adapter, question)
        if near:
            row, score, side = near
            self.note(f"Nearest question ({side}, {score:.0f}% alike): {row.question}")
            self.note(f"Its reference answer: {row.answer}")

    def keep(self, question: str, answers: dict[str, Answer], name: str, upto: int | None) -> None:
        """The conversation goes on with this answer; the others stay beside it."""
        replies = [Reply.of(answer) for answer in answers.values()]
        chosen = list(answers).index(name)
        if upto is None:
            self.conversation.turns.append(Turn(question, replies, chosen))
        else:
            turn = self.conversation.turns[upto]
            turn.chosen = len(turn.replies) + chosen
            turn.replies += replies
        self.count_context()
        self.note(f"Going on with the answer of {name}")

    def do_vote(self, rest: str) -> None:
        if rest:
            question, _ = self.to_compare(rest)
            answers = self.answer_all(question, self.need_two(), None, hidden=True)
            if not answers:
                return
            self.compared = question, answers
        if not self.compared:
            raise BadInput("nothing was compared yet: /compare QUESTION, or /vote QUESTION")
        question, answers = self.compared
        pair = [next(iter(answers)), self.adapter if self.adapter in list(answers)[1:] else list(answers)[1]]
        random.SystemRandom().shuffle(pair)
        self.show_comparison({name: answers[name] for name in pair}, ["A", "B"])
        vote = self.ask("Which is better? a, b, = (alike), Enter: no vote").lower()
        if vote not in ("a", "b", "="):
            self.note("No vote")
            return
        winner = None if vote == "=" else pair["ab".index(vote)]
        self.note(f"A was {pair[0]}, B was {pair[1]}", "none")
        self.tally(question, pair, winner, answers[pair[0]].seed)
        if rest and winner:
            self.keep(question, answers, winner, None)

    def tally(self, question: str, pair: list[str], winner: str | None, seed: int) -> None:
        """Add the vote to the file and show how it stands between these two."""
        named = {name: self.engine.models[name].base.source.id if name == BASE else name for name in pair}
        between = sorted(named.values())
        vote = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "between": between, "winner": named.get(winner or "")}
        path = private_file(state_folder() / "votes.jsonl")
        with path.open("a", encoding="utf-8") as file:
            file.write(finetune.json_text(vote | {"question": question, "seed": seed}) + "\n")
        votes = []
        for line in path.read_text(encoding="utf-8").splitlines():
            loaded = finetune.parse_json(line, "")
            if isinstance(loaded, dict) and loaded.get("between") == between:
                votes.append(loaded.get("winner"))
        counts = ", ".join(f"{name} {votes.count(model)}" for name, model in sorted(named.items()))
        self.note(f"Votes so far: {counts}, alike {votes.count(None)} ({finetune.without_home(path)})", "none")

    # -- files

    def path(self, rest: str, command: str) -> Path:
        if not rest:
            raise BadInput(f"{command} {COMMANDS[command][0]}: which file?")
        return Path(rest.strip("\"'")).expanduser()

    def may_write(self, path: Path) -> bool:
        return not path.exists() or self.ask(f"{path} is there already. Overwrite it? [y/N]").lower() in ("y", "yes")

    def do_save(self, rest: str) -> None:
        path = self.path(rest, "/save")
        if self.may_write(path):
            write_whole(path, finetune.json_text(self.conversation.as_json(), indent=1) + "\n")
            self.note(f"Saved {len(self.conversation.turns)} turns to {path}")

    def do_load(self, rest: str) -> None:
        path = self.path(rest, "/load")
        loaded = finetune.parse_json(finetune.decode(path, []), "line {line}, ")
        if isinstance(loaded, BadInput):
            raise BadInput(f"{path}: {loaded}")
        self.conversation = Conversation.from_json(loaded, str(path))
        self.files, self.last, self.compared = [], None, None
        self.count_context()
        self.note(f"Loaded {len(self.conversation.turns)} turns from {path}")
        for turn in self.conversation.turns[-1:]:
            self.note(f">>> {turn.question}")
            writer = AnswerWriter(self.console)
            writer.feed(turn.reply.text)
            writer.close()

    def do_export(self, rest: str) -> None:
        path = self.path(rest, "/export")
        if self.may_write(path):
            write_whole(path, self.conversation.as_markdown())
            self.note(f"Wrote {path}")

    def do_read(self, rest: str) -> None:
        path = self.path(rest, "/read")
        text = finetune.decode(path, []).strip()
        if not text:
            raise BadInput(f"{path}: is empty")
        self.files.append(text)
        tokens = self.engine.count([{"role": "user", "content": text}], self.model)
        self.note(f"{path}: {len(text)} characters, about {tokens} tokens, go with your next question")


# ----------------------------------------------------------------------------------------------------------------------
# Scripting and start


def script(config: Config, source: Source, adapters: list[Adapter]) -> None:
    """One question from the command line, or one a line from stdin. Answers go to stdout, all else to stderr."""
    questions = [config.question] if config.question is not None else (line.strip() for line in sys.stdin)
    engine = None
    for question in filter(None, questions):
        engine = engine or load(config, source, adapters)
        names = list(engine.models)  # the base first, then the adapters as they were named
        names = names if config.compare else names[min(1, len(names) - 1) :][:1]
        messages = Conversation(config.system).messages(question)
        seed = random_seed() if config.settings.seed is None else config.settings.seed
        settings = dataclasses.replace(config.settings, seed=seed)
        for name in names:
            if config.json:
                print_json(question, engine.answer(messages, name, settings))
                continue
            if config.compare:
                print(f"[{clean(name)}]")
            writer = AnswerWriter(Console(highlight=False))
            for piece in engine.stream(messages, name, settings):
                writer.feed(piece.text)
            writer.close()


def print_json(question: str, answer: Answer) -> None:
    fields = {"model": answer.model, "question": question, "answer": answer.text, "tokens": answer.tokens}
    fields |= {"seconds": round(answer.seconds, 3), "seed": answer.seed}
    print(finetune.json_text(fields), flush=True)


def load(config: Config, source: Source, adapters: list[Adapter]) -> Engine:
    engine = Engine(source, config.num_ctx)
    for adapter in adapters:
        if engine.add(adapter).no_effect:
            print(f"chat.py: {adapter.name} has no effect: its logits are the base's", file=sys.stderr)
    return engine


def chat(config: Config, source: Source, adapters: list[Adapter]) -> None:
    """The terminal chat; the model loads in the background."""
    finetune.fetch_weights(source)  # shows its progress, so before the prompt
    loading: Future[Engine] = Future()

    def work() -> None:
        try:
            engine = load(config, source, adapters)
            for model in engine.models.values():
                engine.prepare(model)
            loading.set_result(engine)
        except BaseException as error:
            loading.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        Chat(config, source, adapters, loading).run()
    finally:
        if not loading.done():  # torch cannot be torn down in the middle of its import
            sys.stdout.flush()
            os._exit(0)


def main(argv: list[str] | None = None) -> int:
    # Threads that spin while they wait starve each other as soon as anything else wants the same cores.
    for name, value in {**finetune.QUIET, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    finetune.console.stderr = True
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        config = parse(argv)
        source, adapters = choose_models(config)
        scripted = config.question is not None or config.json or not (sys.stdin.isatty() and sys.stdout.isatty())
        (script if scripted else chat)(config, source, adapters)
        sys.stdout.flush()
    except BadInput as problem:
        errors.print(Text(f"chat.py: {clean(str(problem))}", style="red" if errors.is_terminal else ""))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
