"""The model and the tokenizer of a checkpoint, ready to read text as in training: packed, nothing padded.

Shapes: T tokens of all texts, E hidden size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enc.encoder.checkpoints.io import read_weights
from enc.encoder.config.load import load_text
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.models.build import build_model


@dataclass(frozen=True)
class Trained:
    """A trained model in fp32, on the GPU where there is one."""

    config: RunConfig
    tokenizer: EncoderTokenizer
    model: Any  # a MaskedLanguageModel
    device: torch.device

    @classmethod
    def load(cls, folder: Path) -> "Trained":
        """Load a checkpoint folder."""
        config = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
        tokenizer = EncoderTokenizer.load(folder / "tokenizer")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build_model(config.model, tokenizer.num_tokens)
        model.load_state_dict(read_weights(folder))
        return cls(config, tokenizer, model.to(device).eval(), device)

    @property
    def room(self) -> int:
        """Tokens of a text that training saw at once, special ones left out."""
        return self.config.row_length - len(self.framed([]))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return list(self.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)

    def framed(self, ids: list[int]) -> list[int]:
        """Put the special tokens around the ids of a text, as training does."""
        first, last = self.tokenizer.cls_id, self.tokenizer.sep_id
        return [*([] if first is None else [first]), *ids, *([] if last is None else [last])]

    @torch.no_grad()
    def states(self, texts: list[list[int]]) -> Tensor:
        """Return the hidden states of framed texts one after the other, (T, E)."""
        lengths = torch.tensor([0, *map(len, texts)])
        positions = torch.cat([torch.arange(len(ids)) for ids in texts])
        flat = torch.tensor([token for ids in texts for token in ids])
        bounds = lengths.cumsum(0).to(torch.int32)
        hidden: Tensor = self.model(flat.to(self.device), bounds.to(self.device), positions.to(self.device))
        return hidden
