#!/usr/bin/env python
"""Which recipe teaches a small model its FAQ, and at what cost? Trains many at once over one base, and measures each.

    python tests/recipes.py                                          all of RECIPES on the sample data, three seeds each
    python tests/recipes.py --data faq.jsonl --split-field fold --eval-values 3 --test-values 4 --recipes "chosen;seed"
    python tests/recipes.py --table recipes.jsonl                    only the table, from what was measured before

A dozen runs are one forward: ids are [runs, rows, tokens], the frozen base is the same for all, and each run has its
own LoRA, AdamW and schedule; updates and generated tokens are CUDA graphs on a GPU, plain calls on a CPU. What is
asked, trained and scored is finetune.py's own: known_questions, training_rows, general_prompts, recall, chrf. A recipe
is what differs from finetune.py's defaults, by the names of its flags, and the knobs of EXTRA, which it does not have.
The last update is what counts; finetune.py would keep the epoch that knows most.

The README's table was measured with this script's predecessor: the same method and knobs, but rewordings by an earlier
list of frames and function words, rows in a plainly shuffled order, answers compared with all trained ones, and 10
visits of each row on HealthCare.gov.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune
from finetune import Example, Row, mean

torch, F = finetune.torch, finetune.Lazy("torch.nn.functional")

OWN_WORDS = "{question}\n\nThe answer is: {answer}\n\nGive this answer in your own words, with every fact of it."
PROJECTIONS = finetune.Config.target_modules
WIDTHS = (128, 160, 256, 384, 512, 1024, 2048)  # of an update, in tokens: one CUDA graph each
# `fixed`: so many rewordings, made once, are trained beside each row. `prompts`: different general prompts that are
# replayed. `tokens`: of each of their answers. `distilled`: trained on the base's distribution, not its greedy answer.
# `own_words`: self-distillation, the trained answers as the base words them, "only" or "beside" the rows as they are.
# `layers`: the share of the layers that have LoRA. `strengths`: the LoRA counts so much when it is measured.
EXTRA = {
    "fixed": 0,
    "prompts": 400,
    "tokens": 40,
    "distilled": False,
    "own_words": "",
    "layers": (0, 1),
    "strengths": (1.0,),
}
OLD = {"lora_dropout": 0.1, "loraplus_lr_ratio": 1, "weight_decay": 0, "reworded_fraction": 0, "prompts": 50}
B = {"learning_rate": 2e-3, "loraplus_lr_ratio": 1, "weight_decay": 0}  # A, B and C as in the README's table
A, HALF = B | {"prompts": 50}, {"replay_fraction": 0.5}
SEED = {"learning_rate": 2e-4, "num_train_epochs": 5, "warmup_steps": 0, "replay_fraction": 0}
RECIPES = {
    "seed's rate, 5 visits": OLD | SEED,
    "0.1.0, 3 visits": OLD | {"learning_rate": 5e-4, "num_train_epochs": 3},
    "chosen": {},
    "chosen, 9 visits": {"num_train_epochs": 9},
    **{f"A, 1e-3, dropout 0.1, reworded {part:.0%}": OLD | {"reworded_fraction": part} for part in (0, 0.5, 0.75)},
    **{f"A, {count} fixed rewordings": A | {"fixed": count} for count in (3, 5)},
    "A": A,
    "A, dropout 0.1": A | {"lora_dropout": 0.1},
    "A, LoRA on MLP": A | {"target_modules": PROJECTIONS[4:]},
    "A, LoRA on attention": A | {"target_modules": PROJECTIONS[:4]},
    "A, LoRA on upper layers": A | {"layers": (0.5, 1)},
    "A, LoRA on lower layers": A | {"layers": (0, 0.5)},
    "B": B | {"strengths": (1.0, 0.8, 0.6)},
    "B, replay 50%": B | HALF,
    "B, replay 100%": B | {"replay_fraction": 1.0},
    "B, replay 50%, 50 prompts": A | HALF,
    "B, replay 50%, 100 tokens": B | HALF | {"tokens": 100},
    "B, replay 50%, distilled": B | HALF | {"distilled": True},
    **{f"B, decay {decay}": B | {"weight_decay": decay} for decay in (0.3, 1.0)},
    "B, 5e-4 with LoRA+ 8": B | {"learning_rate": 5e-4, "loraplus_lr_ratio": 8},
    "chosen, decay 1": {"weight_decay": 1.0},
    "chosen, rank 32, decay 0.75": {"lora_r": 32, "lora_alpha": 64, "weight_decay": 0.75},
    **{f"C, rank {r}": {"loraplus_lr_ratio": 4, "lora_r": r, "lora_alpha": 2 * r} for r in (1, 4, 16, 64)},
    "C, reworded 0%": {"loraplus_lr_ratio": 4, "reworded_fraction": 0},
    **{f"chosen, {how} the base's own wording": {"own_words": how} for how in ("only", "beside")},
}


def make_world(config: finetune.Config, args: argparse.Namespace) -> types.SimpleNamespace:
    """What all runs share: the base, the rows, the questions, and what the base says to general prompts."""
    source = finetune.find_model(args.model, gpu=False)
    finetune.fetch_weights(source)
    data, tokenizer = finetune.load_data(config), finetune.load_tokenizer(source.folder, source.id)
    train, test = (finetune.encode(tokenizer, rows, config.max_length) for rows in (data.train, data.test))
    base = Base(finetune.load_4bit(source, torch.float32).dequantize(), tokenizer)

    def answered(file: str, count: int, tokens: int) -> list[Example]:
        prompts = finetune.general_prompts(tokenizer, file)[:count]
        new = generate(base, None, 1, [e.input_ids for e in prompts], tokens)[0]
        pairs = zip(prompts, new, strict=True)
        return [Example(Row((), "", file), e.input_ids + ids, e.prompt_length) for e, ids in pairs]  # never reworded

    pairs = finetune.known_questions(data.train, config.seed, args.questions)
    known = [row for part in zip(*((other, row) for row, other, _ in pairs), strict=True) for row in part]
    longest = max(len(e.input_ids) - e.prompt_length for e in train)
    return types.SimpleNamespace(
        base=base, tokenizer=tokenizer, train=train, test=test,
        known=[finetune.to_example(tokenizer, row) for row in known],  # all in other words, then all as trained
        general=answered("general_prompts.json", args.prompts, finetune.REPLAY_TOKENS),
        replay=answered("replay_prompts.json", args.prompts, min(100, args.max_new_tokens)),
        max_new=min(args.max_new_tokens, math.ceil(1.25 * longest)),
    )  # fmt: skip


def in_own_words(world: types.SimpleNamespace) -> list[Example]:
    """The rows with their answers as the base says them when it is shown them; short ones that it leaves empty stay."""
    asked = [e.row.asking(OWN_WORDS.format(question=e.row.last_question, answer=e.row.answer)) for e in world.train]
    prompts = [finetune.to_example(world.tokenizer, row) for row in asked]
    new = generate(world.base, None, 1, [e.input_ids[: e.prompt_length] for e in prompts], world.max_new)[0]
    texts = world.tokenizer.batch_decode(new, skip_special_tokens=True)
    rows = [
        dataclasses.replace(e.row, answer=t.strip() or e.row.answer) for e, t in zip(world.train, texts, strict=True)
    ]
    return [finetune.to_example(world.tokenizer, row) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# The model: Llama's forward for many runs at once


class Lora:
    """A [runs, rank, in] and B [runs, out, rank] of each projection of each layer. Smaller ranks are filled up with
    zeros, whose gradients are zero."""

    def __init__(self, base: "Base", runs: list, seed: int):
        dice, rank = torch.Generator().manual_seed(seed), max(run.config.lora_r for run in runs)
        self.parameters, on = [], []
        for number, layer in enumerate(base.layers):
            for name in PROJECTIONS:
                out, into = layer[name].shape
                a = (torch.rand(len(runs), rank, into, generator=dice) * 2 - 1) / math.sqrt(into)
                for own, run in zip(a, runs, strict=True):
                    own[run.config.lora_r :] = 0
                self.parameters += [a.to(base.device), torch.zeros(len(runs), out, rank, device=base.device)]
                place = number / len(base.layers)
                inside = [run.layers[0] <= place < run.layers[1] for run in runs]
                names = [name in run.config.target_modules for run in runs]
                on += [[a and b for a, b in zip(inside, names, strict=True)]] * 2
        self.parameters = [parameter.requires_grad_() for parameter in self.parameters]
        self.on = [base.each(values) for values in on]  # whether a run trains this parameter
        self.full = base.each([run.config.lora_alpha / run.config.lora_r for run in runs]).to(base.dtype)
        self.scale, dropout = self.full, base.each([run.config.lora_dropout for run in runs])
        self.dropout = dropout if dropout.any() else None

    def __call__(self, x, layer: int, name: str, training: bool):
        place = 2 * (layer * len(PROJECTIONS) + PROJECTIONS.index(name))
        a, b = (parameter.to(x.dtype).transpose(1, 2) for parameter in self.parameters[place : place + 2])
        flat = x.reshape(len(x), -1, x.shape[-1])
        if training and self.dropout is not None:
            flat = flat * ((torch.rand_like(flat) >= self.dropout) / (1 - self.dropout)).to(x.dtype)
        return (flat @ a * self.scale @ b).view(*x.shape[:-1], -1)


class Base:
    """The frozen weights. Reads ids [runs, rows, tokens]."""

    def __init__(self, model, tokenizer):
        self.device = model.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        config, inner = model.config, model.model
        self.heads, self.kv_heads, self.eps = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
        )
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        heads = (inner.embed_tokens.weight, inner.norm.weight, model.get_output_embeddings().weight)
        self.embed, self.norm, self.out = (weight.detach().to(self.dtype) for weight in heads)
        weights = [
            [(n.split(".")[-2], w.detach().to(self.dtype)) for n, w in e.named_parameters()] for e in inner.layers
        ]
        self.layers = [dict(own) for own in weights]
        places = torch.arange(4096, device=self.device)[None]
        self.rotary = [part[0] for part in inner.rotary_emb(torch.zeros(1, device=self.device), places)]
        self.pad, self.eos = tokenizer.pad_token_id, tokenizer.eos_token_id

    def each(self, values: list):
        """One number a run, to multiply [runs, x, y] with."""
        return torch.tensor(values, device=self.device, dtype=torch.float32)[:, None, None]

    def rms(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * weight.float()).to(self.dtype)

    def hidden(self, ids, lora: Lora | None, training: bool = False, positions=None, cache=None, mask=None):
        """The last hidden states. `positions`: [runs * rows, tokens]; `cache`: keys, values and where to write them."""
        runs, rows, tokens = ids.shape
        place = slice(tokens) if positions is None else positions
        cos, sin = (part[place].view(-1, 1, tokens, self.width) for part in self.rotary)
        x = F.embedding(ids, self.embed)

        def heads(x, count: int, rotate: bool):
            x = x.view(runs * rows, tokens, count, self.width).transpose(1, 2)
            if not rotate:
                return x
            left, right = x.float().chunk(2, -1)
            return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(self.dtype)

        for number, layer in enumerate(self.layers):

            def linear(x, name: str, number=number, layer=layer):
                y = x @ layer[name].T
                return y if lora is None else y + lora(x, number, name, training)

            y = self.rms(x, layer["input_layernorm"])
            q, k = heads(linear(y, "q_proj"), self.heads, True), heads(linear(y, "k_proj"), self.kv_heads, True)
            v = heads(linear(y, "v_proj"), self.kv_heads, False)
            if cache:
                k, v = (
                    part[number].index_copy_(2, cache["at"], new) for part, new in ((cache["k"], k), (cache["v"], v))
                )
            how = {"is_causal": True} if mask is None else {"attn_mask": mask}
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
            x = x + linear(y.transpose(1, 2).reshape(runs, rows, tokens, -1), "o_proj")
            y = self.rms(x, layer["post_attention_layernorm"])
            x = x + linear(F.silu(linear(y, "gate_proj")) * linear(y, "up_proj"), "down_proj")
        return self.rms(x, self.norm)

    def token_losses(self, hidden, ids):
        """[rows, tokens - 1] of one run, and the logits."""
        logits = (hidden[:, :-1] @ self.out.T).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1), logits


def graph_of(call, state: list | None, pool=None):
    """The call as a CUDA graph. First it is run once beside the main stream, as CUDA wants it, and `state`, all that it
    changes, is put back; None: it was run before."""
    if state:
        before, stream = [tensor.detach().clone() for tensor in state], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def padded(base: Base, examples: list[Example], width: int):
    """ids, and which of them are trained: 1, or 2 in replayed answers."""
    ids, kind = (torch.full((len(examples), width), value) for value in (base.pad, 0))
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        kind[row, : len(example.input_ids)] = torch.tensor(example.completion_mask) * (1 if example.row.prompt else 2)
    return ids.to(base.device), kind.to(base.device)


def answer_losses(base: Base, lora: Lora | None, runs: int, examples: list[Example]):
    """[runs]: mean over the examples of the answer's mean loss a token, as finetune.answer_nll has it."""
    sums, near = torch.zeros(runs, device=base.device), sorted(examples, key=lambda e: len(e.input_ids))
    with torch.no_grad():
        for part in (near[start : start + 16] for start in range(0, len(near), 16)):
            ids, kind = padded(base, part, len(part[-1].input_ids))
            hidden, mask = base.hidden(ids.expand(runs, -1, -1), lora), kind[:, 1:] > 0
            for run in range(runs):
                losses = base.token_losses(hidden[run], ids)[0]
                sums[run] += ((losses * mask).sum(1) / mask.sum(1)).sum()
    return (sums / len(examples)).tolist()


def generate(base: Base, lora: Lora | None, runs: int, prompts: list[list[int]], new: int) -> list[list[list[int]]]:
    """[runs][prompts]: the greedy answers' ids, with EOS where it came."""
    if len(prompts) > (most := max(1, (1500 if new < 150 else 700) // runs)):
        parts = [generate(base, lora, runs, some, new) for some in (prompts[:most], prompts[most:])]
        return [first + rest for first, rest in zip(*parts, strict=True)]
    device, width, count = base.device, max(map(len, prompts)), runs * len(prompts)
    ids = torch.tensor([[base.pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    start = torch.tensor([[width - len(ids)] for ids in prompts], device=device).repeat(runs, 1)
    shape, column = (count, base.kv_heads, width + new, base.width), torch.arange(width + new, device=device)
    cache = {name: [torch.zeros(shape, device=device, dtype=base.dtype) for _ in base.layers] for name in "kv"}
    rows = column[:width]
    mask = (column <= rows[:, None]) & (column >= start[:, None]) | (column == rows[:, None])  # padding sees itself
    positions, found = (rows - start).clamp(min=0), torch.full((count, new), base.pad, device=device)
    at, step, last = torch.tensor([width], device=device), torch.tensor([0], device=device), width - start

    def take(read) -> None:
        token.copy_((read[:, :, -1:] @ base.out.T).argmax(-1))
        found.index_copy_(1, step, token.view(count, 1))
        step.add_(1)

    def one() -> None:
        seen = (column <= at) & (column >= start)
        take(base.hidden(token, lora, positions=last, cache=cache | {"at": at}, mask=seen[:, None, None]))
        at.add_(1), last.add_(1)

    with torch.no_grad():
        token = torch.empty((runs, len(prompts), 1), dtype=torch.long, device=device)
        first = ids.expand(runs, -1, -1)
        take(base.hidden(first, lora, positions=positions, cache=cache | {"at": rows}, mask=mask[:, None]))
        if device.type == "cuda":
            one = graph_of(one, [token, found, at, last, step])
        for n in range(1, new):
            one()
            if n % 16 == 0 and bool((found == base.eos).any(1).all()):
                break
    answers = found.view(runs, len(prompts), new).tolist()
    return [[a[: a.index(base.eos) + 1] if base.eos in a else a for a in own] for own in answers]


# ----------------------------------------------------------------------------------------------------------------------
# Train and measure


def rows_of(run, world: types.SimpleNamespace) -> Iterator[list[Example]]:
    """The run's updates, by finetune.training_rows; after its last one the first again, at a rate of 0."""
    train, dice = list(world.own if run.own_words == "only" else world.train), random.Random(run.config.seed)
    train += world.own if run.own_words == "beside" else []
    for n in range(run.fixed * len(world.train)):
        row, rule = world.train[n % len(world.train)].row, dice.choice(finetune.TRAIN_RULES)
        train.append(finetune.to_example(world.tokenizer, finetune.in_other_words(row, rule, dice)))
    epochs = run.config.num_train_epochs * len(world.train) / len(train)
    config = dataclasses.replace(run.config, num_train_epochs=epochs)
    prompts, end = world.replay[: run.prompts], math.ceil(epochs) * round(config.replay_fraction * len(train))
    cut = [dataclasses.replace(e, input_ids=e.input_ids[: e.prompt_length + run.tokens]) for e in prompts]
    replay = list(itertools.islice(itertools.cycle(cut), end))
    per_epoch = math.ceil(run.updates / math.ceil(epochs))
    plan = types.SimpleNamespace(updates=run.updates, batch=4, micro_batch_size=4, updates_per_epoch=per_epoch)
    rows = finetune.training_rows(world.tokenizer, train, replay, plan, config)
    return itertools.cycle([rows[n : n + 4] for n in range(0, len(rows), 4)])


def rate(run, update: int) -> float:
    """Linear warm-up, then a cosine down to 0."""
    warm_up = max(1, round(run.config.warmup_steps * run.updates))
    if update <= warm_up:
        return run.config.learning_rate * update / warm_up
    done = min(1, (update - warm_up) / max(1, run.updates - warm_up))
    return run.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(world: types.SimpleNamespace, runs: list) -> tuple[Lora, list[list[float]]]:
    """Train all runs at once -> their LoRAs, and each update's losses."""
    base, lora, history = world.base, Lora(world.base, runs, runs[0].config.seed), []
    batches, configs = [rows_of(run, world) for run in runs], [run.config for run in runs]
    moments = [[torch.zeros_like(parameter) for parameter in lora.parameters] for _ in range(2)]
    done, losses = torch.zeros((), device=base.device), torch.zeros(len(runs), device=base.device)
    rates, plus = base.each([0.0] * len(runs)), base.each([own.loraplus_lr_ratio for own in configs])
    decay = base.each([own.weight_decay for own in configs])

    def update(ids, kind) -> None:
        hidden, total = base.hidden(ids, lora, training=True), 0
        with torch.no_grad():
            before = base.hidden(ids, None) if any(run.distilled for run in runs) else None
        for n, run in enumerate(runs):
            each, logits = base.token_losses(hidden[n], ids[n])
            if run.distilled:
                with torch.no_grad():
                    wanted = base.token_losses(before[n], ids[n])[1].softmax(-1)
                each = torch.where(kind[n, :, 1:] == 2, -(wanted * logits.log_softmax(-1)).sum(-1), each)
            mask = kind[n, :, 1:] > 0
            loss = (each * mask).sum() / mask.sum()
            losses[n].copy_(loss.detach())
            total = total + loss
        gradients = [g * on for g, on in zip(torch.autograd.grad(total, lora.parameters), lora.on, strict=True)]
        norm = sum(g.pow(2).sum((1, 2), keepdim=True) for g in gradients).sqrt()
        done.add_(1)
        with torch.no_grad():  # AdamW
            for n, (p, g, m, v) in enumerate(zip(lora.parameters, gradients, *moments, strict=True)):
                g = g * (1 / (norm + 1e-6)).clamp(max=1)
                m.lerp_(g, 0.1), v.lerp_(g * g, 0.001)
                own = rates * plus if n % 2 else rates
                p.mul_(1 - own * decay)
                p.addcdiv_(m / (1 - 0.9**done) * -own, (v / (1 - 0.999**done)).sqrt() + 1e-8)

    gpu, graphs = base.device.type == "cuda", {}
    pool = torch.cuda.graph_pool_handle() if gpu else None
    for number in range(1, max(run.updates for run in runs) + 1):
        batch = [next(own) for own in batches]
        width = max(len(example.input_ids) for rows in batch for example in rows)
        width = next(w for w in WIDTHS if w >= width) if gpu else width
        new = [torch.stack(part) for part in zip(*(padded(base, rows, width) for rows in batch), strict=True)]
        rates.copy_(base.each([rate(run, number) for run in runs]))
        if gpu:
            if width not in graphs:
                state = None if graphs else [*lora.parameters, *moments[0], *moments[1], done]
                graphs[width] = (new, graph_of(functools.partial(update, *new), state, pool))
            for kept, values in zip(graphs[width][0], new, strict=True):
                kept.copy_(values)
            graphs[width][1]()
        else:
            update(*new)
        history.append(losses.tolist())
    return lora, history


def measure(world: types.SimpleNamespace, lora: Lora | None, runs: int, strength: float, pool) -> list[dict]:
    """One record a run. Without a LoRA: the base's."""
    if lora:
        lora.scale = lora.full * strength
    examples = world.known + world.test
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    answers = generate(world.base, lora, runs, prompts, world.max_new)
    held, general = (answer_losses(world.base, lora, runs, some) for some in (world.test, world.general))
    texts = [world.tokenizer.batch_decode(own, skip_special_tokens=True) for own in answers]
    references, trained = [example.row.answer for example in examples], [example.row.answer for example in world.train]
    scores = pool.starmap(score, [(own, references, len(world.known) // 2, trained) for own in texts])
    ends = [mean(float(ids[-1:] == [world.base.eos]) for ids in own[len(world.known) :]) for own in answers]
    parts = zip(scores, ends, held, general, strict=True)
    return [own | {"ended": end, "held": loss, "general": other} for own, end, loss, other in parts]


def score(answers: list[str], references: list[str], known: int, trained: list[str]) -> dict:
    found = [finetune.recall(*pair, trained)["recall"] for pair in zip(answers, references[: 2 * known], strict=False)]
    new = [finetune.chrf(*pair) for pair in list(zip(answers, references, strict=True))[2 * known :]]
    return {"in other words": mean(found[:known]), "as trained": mean(found[known:]), "chrf": mean(new)}


def table(records: list[dict]) -> str:
    """Markdown: means over seeds. General answers: by how much the loss on what the base says to them rose."""
    lines = [
        "| recipe | seeds | recall, other words | as trained | chrF new | end | general answers | held-out loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_name: dict[str, list[dict]] = {}
    for record in records:
        by_name.setdefault(record["recipe"], []).append(record)
    base = mean(record["general"] for record in by_name["base"])
    for name, of in by_name.items():
        keys = ("in other words", "as trained", "chrf", "ended", "general", "held")
        reworded, own, chrf, ended, general, held = (mean(record[key] for record in of) for key in keys)
        cost = "" if name == "base" else f"{general / base - 1:+.0%}"
        numbers = f"{reworded:.1%} | {own:.1%} | {chrf:.1f} | {ended:.0%} | {cost} | {held:.2f}"
        lines.append(f"| {name} | {len(of)} | {numbers} |")
    return "\n".join(lines)


def make_runs(args: argparse.Namespace, config: finetune.Config, rows: int) -> list:
    """All recipes with all seeds, those that take long and have many numbers first."""
    runs, wanted = [], tuple(args.recipes.split(";"))
    for (name, knobs), seed in itertools.product(RECIPES.items(), range(args.seeds)):
        own = dataclasses.replace(config, seed=seed, **{k: v for k, v in knobs.items() if k not in EXTRA})
        updates = math.ceil(own.num_train_epochs * (rows + round(own.replay_fraction * rows)) / 4)
        extra = EXTRA | {key: value for key, value in knobs.items() if key in EXTRA}
        if not args.recipes or name.startswith(wanted):
            runs.append(types.SimpleNamespace(name=name, config=own, updates=min(updates, args.updates), **extra))
    return sorted(runs, key=lambda run: (-run.config.lora_r, -run.updates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=finetune.SAMPLE)
    parser.add_argument("--split-field", help="as finetune.py's, and so are the next two")
    parser.add_argument("--eval-values", nargs="+", default=finetune.Config.eval_values)
    parser.add_argument("--test-values", nargs="+", default=finetune.Config.test_values)
    parser.add_argument("--model", help="hub id or folder of a model of Llama's shape; default: SmolLM2-135M")
    parser.add_argument("--recipes", default="", help="beginnings of names, with ; between; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=12, help="runs in one forward")
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of this file and stop")
    parser.add_argument(
        "--updates", type=int, default=10**6, help="of a run at most; to try it out, like the next three"
    )
    parser.add_argument("--questions", type=int, default=finetune.KNOWN_QUESTIONS, help="known ones that are asked")
    parser.add_argument("--prompts", type=int, default=400, help="general ones that may be replayed")
    parser.add_argument("--max-new-tokens", type=int, default=260)
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()]))
        return
    finetune.guard_torchvision()
    split = {"eval_values": tuple(args.eval_values), "test_values": tuple(args.test_values)}
    config = finetune.Config(data=(args.data,), split_field=args.split_field, **split)
    config = finetune.fill_defaults(config, finetune.find_model(args.model, gpu=False))
    records, world = [], make_world(config, args)
    runs = make_runs(args, config, len(world.train))
    world.own = in_own_words(world) if any(run.own_words for run in runs) else []
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count())) as pool, args.out.open("a") as out:

        def keep(name: str, found: dict, **more) -> None:
            records.append({"recipe": name, "data": args.data.name, "device": world.base.device.type} | more | found)
            out.write(json.dumps(records[-1]) + "\n"), out.flush()

        keep("base", measure(world, None, 1, 1.0, pool)[0])
        for start in range(0, len(runs), args.at_once):
            some = runs[start : start + args.at_once]
            lora, history = train(world, some)
            for strength in sorted({strength for run in some for strength in run.strengths}, reverse=True):
                for n, (run, found) in enumerate(
                    zip(some, measure(world, lora, len(some), strength, pool), strict=True)
                ):
                    if strength in run.strengths:
                        name = run.name if strength == 1 else f"{run.name}, strength {strength}"
                        losses = [update[n] for update in history[: run.updates]]
                        keep(name, found, seed=run.config.seed, losses=losses)
    order = ["base", *RECIPES]
    print(table(sorted(records, key=lambda r: order.index(r["recipe"].split(", strength")[0]))))


if __name__ == "__main__":
    main()
