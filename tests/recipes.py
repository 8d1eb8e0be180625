"""Which recipe leaves the model best on questions it never saw? Trains each, with several seeds, and measures.

    python tests/recipes.py --data faq.jsonl --split-field fold --eval-values 3 --test-values 4
    python tests/recipes.py ... --recipes seed,ours --seeds 3 --jobs 1 --out recipes.jsonl
    python tests/recipes.py --table recipes.jsonl          only the table, from what was measured before

The loop is a plain one (PEFT, AdamW, padded batches of four), so that a recipe is a few lines of RECIPES and nothing
else differs. After each epoch it measures the validation rows, the test rows, answers to the first ANSWERED of these
(chrF) and what the base itself says to general prompts. "Replay" trains on its answers to other general prompts too.
"Kept" is the epoch that finetune.py would keep: the first after which validation did not improve ends it.
The seed's recipe keeps its last epoch, as its README does. Uses the GPU if there is one.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune

ANSWERED = 32  # test questions, the first ones of finetune.py's order
# What differs from PLAIN. `scope`: the tokens that are trained. `quant`: the base that is trained on and answers.
# `replay`: general prompts for each row of the data, and tokens of the base's answer to each.
PLAIN = {
    "rate": 1e-3, "epochs": 3, "warmup": 0.1, "dropout": 0.1, "scope": "answer", "quant": "nf4", "patience": 1,
    "plus": 1, "rslora": False, "noise": 0, "replay": (0, 40),
}  # fmt: skip
SEED = {"rate": 2e-4, "epochs": 5, "warmup": 0, "scope": "all", "patience": 0}
RECIPES = {
    "seed, exactly (FP4 base)": SEED | {"quant": "fp4"},
    "seed on our NF4 base": SEED,
    "answer only, 2e-4": {"rate": 2e-4, "epochs": 5, "warmup": 0},
    "answer only, 5e-4": {"rate": 5e-4},
    "answer only, 1e-3": {},
    "1e-3, dropout 0": {"dropout": 0.0},
    "1e-3, 2 epochs": {"epochs": 2},
    "2e-3": {"rate": 2e-3},
    "1e-3, rsLoRA": {"rslora": True},
    "5e-4, LoRA+ 16": {"rate": 5e-4, "plus": 16},
    "1e-3, NEFTune 5": {"noise": 5},
    "5e-4, replay 15% of 40 tokens": {"rate": 5e-4, "replay": (0.15, 40)},
    "5e-4, replay 15% of 100 tokens": {"rate": 5e-4, "replay": (0.15, 100)},
    "5e-4, replay 5% of 100 tokens": {"rate": 5e-4, "replay": (0.05, 100)},
}


def train(name: str, seed: int, args: argparse.Namespace) -> dict:
    """One recipe with one seed -> per epoch: validation loss, test loss of each question, loss on general answers."""
    finetune.guard_torchvision()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    recipe = PLAIN | RECIPES[name]
    config = finetune.Config(
        data=(args.data,),
        split_field=args.split_field,
        eval_values=args.eval_values,
        test_values=args.test_values,
        replay_fraction=recipe["replay"][0],
        num_train_epochs=1,  # each epoch of a recipe replays the same prompts
    )
    data, source = finetune.load_data(config), finetune.find_model(args.model, gpu=False)
    finetune.fetch_weights(source)
    tokenizer = finetune.load_tokenizer(source.folder, source.id)
    sides = {"train": data.train, "eval": data.eval, "test": data.test}
    examples = {side: finetune.encode(tokenizer, rows, config.max_length) for side, rows in sides.items()}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=recipe["quant"], bnb_4bit_use_double_quant=recipe["quant"] == "nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, quantization_config=quantization, dtype=torch.float32, device_map={"": device}
    ).dequantize()  # the same numbers, dequantized once
    finetune.autocast = lambda model, half=False: torch.autocast(device, enabled=False)
    set_seed(42)
    general = finetune.general_prompts(tokenizer, "general_prompts.json")
    greedy = finetune.general_answers(model, tokenizer, general, finetune.GENERAL_TOKENS)
    sampled = sampled_answers(model, tokenizer, greedy)
    prompts = finetune.prompts_to_replay(tokenizer, examples["train"], config)
    replayed = finetune.general_answers(model, tokenizer, prompts, recipe["replay"][1])
    asked, longest = examples["test"][:ANSWERED], max(len(e.input_ids) - e.prompt_length for e in examples["train"])

    def measure() -> dict:
        losses = {side: finetune.answer_nll(model, tokenizer, examples[side]) for side in ("eval", "test")}
        answers, ended = finetune.greedy_answers(model, tokenizer, asked, math.ceil(1.5 * longest))
        return {
            "eval": finetune.mean(losses["eval"]),
            "test": losses["test"],
            "chrf": [finetune.chrf(answer, e.row.answer) for answer, e in zip(answers, asked, strict=True)],
            "ended": finetune.mean(ended),
            "general": finetune.mean(finetune.answer_nll(model, tokenizer, sampled)),
            "general, greedy": finetune.mean(finetune.answer_nll(model, tokenizer, greedy)),
        }

    epochs = [measure()]
    set_seed(seed)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=recipe["dropout"], target_modules=list(finetune.Config.target_modules),
        use_rslora=recipe["rslora"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, lora).train()
    if recipe["noise"]:
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda layer, _, out: out + noise(out, recipe["noise"], layer.training))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lora_B" in n], "lr": recipe["rate"] * recipe["plus"]},
        {"params": [p for n, p in named if "lora_B" not in n], "lr": recipe["rate"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = examples["train"] + replayed
    per_epoch = math.ceil(len(rows) / 4)
    total = per_epoch * recipe["epochs"]
    warmup = round(recipe["warmup"] * total)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    began = time.monotonic()
    for _ in range(recipe["epochs"]):
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(order), 4):
            batch = [rows[i] for i in order[start : start + 4]]
            ids, mask, labels = (tensor.to(device) for tensor in padded(batch, tokenizer.pad_token_id, recipe["scope"]))
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        epochs.append(measure())
    groups_of_test = [data.group_of[row.id] for row in data.test]
    return {
        "recipe": name, "seed": seed, "epochs": epochs, "groups": groups_of_test, "patience": recipe["patience"],
        "seconds": round(time.monotonic() - began, 1), "model": source.id, "device": device,
    }  # fmt: skip


def sampled_answers(model, tokenizer, prompts: list) -> list:
    """General prompts with what the base says to them at temperature 1: the rise of the loss on it estimates the KL
    divergence from the base. (finetune.py's `retention` takes the base's greedy answers.)"""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    result = []
    for example in prompts:
        ids = example.input_ids[: example.prompt_length]
        with torch.inference_mode():
            out = model.generate(input_ids=torch.tensor([ids], device=model.device), generation_config=settings)
        result.append(finetune.Example(example.row, out[0].tolist(), len(ids)))
    return result


def padded(batch: list, pad: int, scope: str) -> tuple:
    import torch

    width = max(len(e.input_ids) for e in batch)
    ids = torch.tensor([e.input_ids + [pad] * (width - len(e.input_ids)) for e in batch])
    mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in batch])
    trained = mask.clone().bool()
    if scope == "answer":
        for row, example in enumerate(batch):
            trained[row, : example.prompt_length] = False
    return ids, mask, ids.masked_fill(~trained, -100)


def noise(out, alpha: float, training: bool):
    """NEFTune: uniform noise on the embeddings, smaller the longer the sequence and the wider the model."""
    import torch

    limit = alpha / math.sqrt(out.shape[1] * out.shape[2])
    return torch.zeros_like(out).uniform_(-limit, limit) if training else 0


def kept(run: dict) -> dict:
    """The epoch that would be kept: the last one for the seed, else the best before patience is over."""
    epochs = run["epochs"][1:]
    if not run["patience"]:
        return epochs[-1]
    config = finetune.Config(goal="style", early_stopping_patience=run["patience"])
    for last in range(1, len(epochs) + 1):
        seen = [{"nll": [epoch["eval"]]} for epoch in run["epochs"][: last + 1]]
        if finetune.patience_is_over(seen, config):
            break
    return min(epochs[:last], key=lambda epoch: epoch["eval"])


def table(runs: list[dict]) -> str:
    """Markdown: mean over seeds; intervals from a bootstrap over groups of near-duplicate questions, seeds averaged."""
    by_recipe: dict[str, list[dict]] = {}
    for run in runs:
        by_recipe.setdefault(run["recipe"], []).append(run)

    def per_question(of: list[dict], what: str = "test") -> list[float]:
        return [finetune.mean(list(values)) for values in zip(*(kept(run)[what] for run in of), strict=True)]

    reference = per_question(next((of for name, of in by_recipe.items() if name.startswith("seed on")), runs[:1]))
    lines = [
        "| recipe | seeds | epoch kept | test loss | against the seed on our base | chrF | come to an end "
        "| general answers, sampled and greedy | each epoch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, of in by_recipe.items():
        values = per_question(of)
        low, high = finetune.bootstrap(values, of[0]["groups"], 0)[1:]
        differences = [a - b for a, b in zip(values, reference, strict=True)]
        change = finetune.bootstrap(differences, of[0]["groups"], 0)
        general, greedy = (
            finetune.mean([100 * (kept(run)[what] / run["epochs"][0][what] - 1) for run in of])
            for what in ("general", "general, greedy")
        )
        answers = finetune.bootstrap(per_question(of, "chrf"), of[0]["groups"][:ANSWERED], 0)
        places = ", ".join(str(run["epochs"].index(kept(run))) for run in of)
        curve = [
            finetune.mean([finetune.mean(run["epochs"][n]["test"]) for run in of]) for n in range(len(of[0]["epochs"]))
        ]
        lines.append(
            f"| {name} | {len(of)} | {places} | {finetune.mean(values):.3f} [{low:.3f}, {high:.3f}] "
            f"| {change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}] "
            f"| {answers[0]:.1f} [{answers[1]:.1f}, {answers[2]:.1f}] "
            f"| {100 * finetune.mean([kept(run)['ended'] for run in of]):.0f}% | {general:+.1f}% {greedy:+.1f}% "
            f"| {' '.join(f'{value:.3f}' for value in curve)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split-field", default="fold")
    parser.add_argument("--eval-values", nargs="+", default=["3"])
    parser.add_argument("--test-values", nargs="+", default=["4"])
    parser.add_argument("--model", default=None)
    parser.add_argument("--recipes", default="", help="beginnings of names, with ; between; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of this file and stop")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.eval_values, args.test_values = tuple(args.eval_values), tuple(args.test_values)
    if args.one:
        print(json.dumps(train(args.one[0], int(args.one[1]), args)))
        return
    if not args.table:
        wanted = [n for n in RECIPES if not args.recipes or n.startswith(tuple(args.recipes.split(";")))]
        waiting = [(name, seed) for seed in range(args.seeds) for name in wanted]
        running: list[subprocess.Popen] = []
        with args.out.open("a", encoding="utf-8") as out:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    name, seed = waiting.pop(0)
                    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(seed)]
                    running.append(subprocess.Popen(command, stdout=out))
                time.sleep(0.2)
                running = [process for process in running if process.poll() is None]
    print(table([json.loads(line) for line in (args.table or args.out).read_text(encoding="utf-8").splitlines()]))


if __name__ == "__main__":
    main()
