"""The files that make a folder of transformers one of sentence-transformers: mean pooling over its tokens."""

from pathlib import Path
from typing import Any

from enc.encoder.files import write_json

POOLING = "1_Pooling"


def write_sentence_files(folder: Path, hidden_size: int, max_seq_length: int) -> None:
    """Write what `SentenceTransformer(folder)` reads beside the model, in the names that all its versions know."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": POOLING, "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / POOLING).mkdir()
    write_json(folder / "modules.json", modules, indent=2)
    write_json(folder / POOLING / "config.json", pooling, indent=2)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False}, indent=2
    )
    similarity: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", similarity, indent=2)
