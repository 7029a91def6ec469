"""Small exported folders of each form, with random weights and the tokenizer of an MPNet."""

import os
from pathlib import Path

from tiny_mpnet import ANNOTATED, NUM_TOKENS, PRE_NORM, tiny_mpnet

from enc.encoder.models.build import init_weights
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.tools.export import export_model

FORMS = ("neobert", "mpnet", "native")  # NeoBERT and MPNet with code, and transformers' own MPNet
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}


def exported(form: str, out: Path) -> Path:
    """Write the folder of a form under the umask of a group and return it."""
    if form == "neobert":
        config = NeoBertConfig(**SIZES, vocab_size=768, max_position_embeddings=64, pad_token_id=1,
                               decoder_init_range=0.2, embedding_init_range=0.5)  # fmt: skip
        model = NeoBertForMaskedLM(config, NUM_TOKENS)
        init_weights(model, parameters_of(config), seed=0)
    else:
        model, config = tiny_mpnet(**(PRE_NORM if form == "mpnet" else {}))
    before = os.umask(0o027)
    try:
        arguments = (model.state_dict(), config, ANNOTATED / "tokenizer", NUM_TOKENS, out, {"name": form})
        return export_model(*arguments).folder
    finally:
        os.umask(before)
