"""Fine-tune an exported encoder to tell which package a text is from; print how often it is right on unseen texts.

    pip install accelerate
    python classify.py EXPORT [--from-scratch]

EXPORT is what `enc ckpt export` wrote, beside `train.jsonl` and `test.jsonl` of own_text.py in the working folder.
`--from-scratch` takes its tokenizer and its shape, but none of its weights: what pretraining was worth.
"""

import sys

import datasets
import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main(export: str, from_scratch: bool) -> None:
    set_seed(0)
    texts = datasets.load_dataset("json", data_files={"train": "train.jsonl", "test": "test.jsonl"})
    names = sorted(set(texts["train"]["package"]))
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)

    def encode(rows: dict) -> dict:
        labels = [names.index(name) for name in rows["package"]]
        return {**tokenizer(rows["text"], truncation=True, max_length=128), "labels": labels}

    encoded = texts.map(encode, batched=True, remove_columns=["text", "package"])
    config = AutoConfig.from_pretrained(export, trust_remote_code=True, num_labels=len(names))
    kind = AutoModelForSequenceClassification
    model = (
        kind.from_config(config, trust_remote_code=True)
        if from_scratch
        else kind.from_pretrained(export, config=config, trust_remote_code=True)
    )
    arguments = TrainingArguments(
        "classifier", num_train_epochs=3, learning_rate=5e-4, per_device_train_batch_size=16, warmup_steps=20,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=encoded["train"], data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    guesses = trainer.predict(encoded["test"]).predictions.argmax(-1)
    labels = np.array(encoded["test"]["labels"])
    most_common = np.bincount(labels).max() / len(labels)
    print(f"right on {(guesses == labels).mean():.1%} of {len(labels)} texts; always the commonest: {most_common:.1%}")


if __name__ == "__main__":
    main(sys.argv[1], "--from-scratch" in sys.argv)
