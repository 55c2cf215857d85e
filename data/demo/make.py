"""Rebuild the demonstration corpus, tokenizer and language model, or evaluate those beside this file.

    python data/demo/make.py              # about an hour on one core; the texts need apt-get, dpkg-deb and npm
    python data/demo/make.py --evaluate   # half a minute; needs the committed files only

A build that was stopped continues where it was: each step leaves a file in the work folder.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import texts
import torch
import train
import trigram
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2LMHeadModel

from saeflow.corpus.document import is_held_out

HERE = Path(__file__).parent
WORK = Path.home() / ".cache/saeflow/demo"
END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 0
VOCABULARY = 4096
SEED = 0
HELD_OUT, HELD_BACK = 0.05, 0.08  # held out for evaluation; the next 3% tune learning rates and discounts
SCHEDULE = train.Schedule(steps=12_000, seed=SEED)
CHECKPOINT_STEPS, VALIDATION_STEPS = 200, 1000

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "model_max_length": train.CONTEXT,
    "clean_up_tokenization_spaces": False,
}


def split(key: str) -> str:
    if is_held_out(key, SEED, HELD_OUT):
        return "held-out"
    return "validation" if is_held_out(key, SEED, HELD_BACK) else "training"


def make_corpus(work: Path) -> None:
    path = work / "corpus.parquet"
    if path.exists():
        return
    texts.fetch(work / "packages")
    rows = [document._asdict() for document in texts.documents(work / "packages")]
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd", compression_level=19)
    partial.replace(path)


def make_tokenizer(folder: Path, training: list[str]) -> None:
    """A byte-level BPE learnt from the training documents, in the layout of Hugging Face."""
    config = folder / "tokenizer_config.json"
    if config.exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config.write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def read_splits(folder: Path) -> dict[str, list[str]]:
    """The texts of the corpus by split, in corpus order."""
    splits: dict[str, list[str]] = {"training": [], "validation": [], "held-out": []}
    for row in pq.read_table(folder / "corpus.parquet", columns=["key", "text"]).to_pylist():
        splits[split(row["key"])].append(row["text"])
    return splits


def tokenize(folder: Path, splits: dict[str, list[str]]) -> dict[str, list[train.Tokens]]:
    tokenizer = Tokenizer.from_file(str(folder / "model/tokenizer.json"))
    return {
        name: [np.array(encoding.ids, np.uint16) for encoding in tokenizer.encode_batch(documents)]
        for name, documents in splits.items()
    }


def train_model(work: Path, documents: dict[str, list[train.Tokens]]) -> None:
    """Train to the end of the schedule, from the checkpoint where there is one; losses go to `log.jsonl`."""
    if (work / "model/model.safetensors").exists():
        return
    torch.set_num_threads(1)
    checkpoint, log = work / "checkpoint.safetensors", work / "log.jsonl"
    trainer = train.Trainer(train.new_model(VOCABULARY, END_OF_TEXT_ID, SEED), SCHEDULE)
    if checkpoint.exists():
        trainer.resume(checkpoint)
    tokens = np.concatenate([np.insert(document, 0, END_OF_TEXT_ID) for document in documents["training"]])
    validation = train.scored_windows(documents["validation"], END_OF_TEXT_ID)
    for losses in progress(trainer, tokens):
        entry = {"step": trainer.step, "training_nats": round(float(np.mean(losses)), 4)}
        if trainer.step % VALIDATION_STEPS == 0:
            entry["validation_nats"] = round(train.nats(trainer.model, *validation), 4)
        with log.open("a") as file:
            print(json.dumps(entry), file=file)
        trainer.save(checkpoint)
    trainer.model.save_pretrained(work / "weights")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (work / "weights" / name).replace(work / "model" / name)


def progress(trainer: train.Trainer, tokens: train.Tokens) -> Iterator[list[float]]:
    """Train under a progress bar; yields the losses of every CHECKPOINT_STEPS steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=trainer.schedule.steps, completed=trainer.step)
        losses: list[float] = []
        while trainer.step < trainer.schedule.steps:
            losses.append(trainer.advance(train.windows(tokens, trainer.step, trainer.schedule)))
            bar.update(task, completed=trainer.step, description=f"training {losses[-1]:.2f} nats")
            if trainer.step % CHECKPOINT_STEPS == 0:
                yield losses
                losses = []


def evaluate(folder: Path) -> dict[str, float]:
    """Nats a token on the held-out documents, of the model and of the trigram: the same tokens, closing marks too."""
    documents = tokenize(folder, read_splits(folder))
    model = GPT2LMHeadModel.from_pretrained(folder / "model")
    inputs, targets = train.scored_windows(documents["held-out"], END_OF_TEXT_ID)
    model_nats = train.nats(model, inputs, targets)
    trigram_nats = trigram_loss(documents)
    return {
        "model_nats": round(model_nats, 4),
        "trigram_nats": round(trigram_nats, 4),
        "difference": round(trigram_nats - model_nats, 4),
        "n_tokens": int((targets >= 0).sum()),
    }


def trigram_loss(documents: dict[str, list[train.Tokens]]) -> float:
    """Counts from the training documents, discounts from the validation documents, loss on the held-out ones."""
    events = {name: trigram.events(parts, END_OF_TEXT_ID, VOCABULARY) for name, parts in documents.items()}
    orders = trigram.count(events["training"], VOCABULARY)
    discounts = trigram.tune(trigram.look_up(orders, events["validation"], VOCABULARY), VOCABULARY)
    seen = trigram.look_up(orders, events["held-out"], VOCABULARY)
    return float(trigram.nats(seen, discounts, VOCABULARY).mean())


def publish(work: Path) -> None:
    """Copy what was built over the files beside this one."""
    (HERE / "model").mkdir(exist_ok=True)
    for path in [work / "corpus.parquet", *(work / "model").iterdir()]:
        shutil.copyfile(path, HERE / path.relative_to(work))


def build(work: Path) -> None:
    (work / "model").mkdir(parents=True, exist_ok=True)
    make_corpus(work)
    splits = read_splits(work)
    make_tokenizer(work / "model", splits["training"])
    train_model(work, tokenize(work, splits))
    publish(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the files beside this one")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of a build in progress (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.evaluate:
        build(arguments.work)
    print(json.dumps(evaluate(HERE)))


if __name__ == "__main__":
    main()
