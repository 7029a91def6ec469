"""An MPNet with a tokenizer that enc trained for it is transformers' own."""

from pathlib import Path

import yaml
from running import Enc

SIZES = {"type": "mpnet", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 256}  # fmt: skip


def config(folder: Path) -> str:
    (folder / "text.txt").write_text("".join(f"the line of number {n} says {n * 7 % 50}\n" for n in range(400)))
    content = {
        "model": SIZES,
        "dataset": {"path": "text.txt", "max_seq_length": 64, "num_proc": 1, "num_workers": 0},
        "tokenizer": {"train": {"vocab_size": 200}},
        "trainer": {"output_dir": "run", "max_steps": 2, "mixed_precision": "no", "use_cpu": True,
                    "per_device_train_batch_size": 2, "eval_strategy": "no"},
        "scheduler": {"warmup_steps": 1},
    }  # fmt: skip
    (folder / "my.yaml").write_text(yaml.safe_dump(content))
    return "my.yaml"


def test_a_trained_tokenizer_leaves_an_mpnet_native(enc: Enc, tmp_path: Path) -> None:
    """It pads with 1, so the export needs no code; a store with padding 0 serves as it is, and says why it does."""
    words = ("launch", "pretrain", config(tmp_path))
    enc(*words)
    assert "transformers' own MPNetForMaskedLM" in enc("ckpt", "export", "run").stderr
    enc("preprocess", "my.yaml", "model.type=neobert", "model.vocab_size=256", "dataset.pre_tokenize_output=of_neobert")
    older = enc(*words, "dataset.pre_tokenize_output=of_neobert", "trainer.output_dir=older")
    assert "Using the token store of_neobert" in older.stderr
    assert "pads with id 1, never 0" in enc("ckpt", "export", "older").stderr
