"""Run as one of 2 gloo ranks: train a tiny model with DeepSpeed and FSDP2 and save it as these systems do.

    python foreign_writer.py write OUT CASE...    OUT/<case>/, and the true state in OUT/<case>.safetensors
    python foreign_writer.py load FOLDER STATE    load a DeepSpeed universal folder at stages 1, 2 and 3 and compare it

A case is a ZeRO stage and a precision, such as z2-bf16, or fsdp, or neobert: a NeoBERT at stage 2, or trainer: Hugging
Face's Trainer at stage 3.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes minutes

MOMENTS = ("exp_avg", "exp_avg_sq")


class Model(nn.Module):
    """Odd sizes, so that every kind of padding occurs; a tied head, a scalar parameter, a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(37, 6)
        self.first = nn.Linear(6, 13)
        self.second = nn.Linear(13, 6)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(5.0))
        self.head = nn.Linear(6, 37, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.second(torch.tanh(self.first(x))) * self.scale
        return self.head(x).float().logsumexp(-1).mean()


class NeoBert(NeoBertForMaskedLM):
    """Returns something to minimise."""

    def forward(self, ids):
        bounds = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
        positions = torch.arange(ids.shape[1]).repeat(len(ids))
        return self.logits(super().forward(ids.flatten(), bounds, positions)).logsumexp(-1).mean()


NEOBERT = NeoBertConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100, vocab_size=512
)


def groups(model):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def engine_of(stage, precision, universal=False, model=None):
    torch.manual_seed(stage)
    model = model or Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": precision.startswith("bf16")},
        "checkpoint": {"load_universal": universal},
    }
    if precision.endswith("fp32grads"):  # another of DeepSpeed's optimizers, whose files differ a little
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch(step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randint(37, (4, 5), generator=generator)


def train_step(engine, step):
    engine.backward(engine(batch(step)))
    engine.step()
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # 0.19 links them when only the first group has any


def true_state(engine, stage):
    state = {}
    for name, parameter in engine.module.named_parameters():
        if stage:
            state[name] = safe_get_full_fp32_param(parameter).clone()
            state.update({f"{k}.{name}": safe_get_full_optimizer_state(parameter, k).clone() for k in MOMENTS})
        else:
            state[name] = parameter.detach().clone()
    return state


def save_true_state(path, state):
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def write_deepspeed(out, case):
    model = NeoBert(NEOBERT, 512) if case == "neobert" else None
    stage, precision = (2, "fp32") if model else (int(case[1]), case[3:])
    engine = engine_of(stage, precision, model=model)
    for step in range(3):
        train_step(engine, step)
    state = true_state(engine, stage)
    engine.save_checkpoint(str(out / case), client_state={"epoch": 1})
    if case == "z3-bf16":
        engine.save_checkpoint(str(out / "accelerate"), tag="pytorch_model")  # as Accelerate calls it
    save_true_state(out / f"{case}.safetensors", state)


class Texts(torch.utils.data.Dataset):
    """What Trainer reads."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"ids": torch.randint(37, (5,), generator=torch.Generator().manual_seed(index))}


class TrainerModel(Model):
    """A model as Trainer calls it; untied, since it saves with safetensors."""

    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(37, 6))

    def forward(self, ids):
        return {"loss": super().forward(ids)}


def write_trainer(out):
    from transformers import Trainer, TrainingArguments

    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), use_cpu=True, deepspeed=settings, max_steps=3, save_steps=3, report_to=[],
        per_device_train_batch_size=4, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TrainerModel()
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), optimizers=(optimizer, None))
    trainer.train()
    save_true_state(out / "trainer.safetensors", true_state(trainer.model_wrapped, 3))


def write_fsdp(out):
    torch.manual_seed(0)
    model = fully_shard(Model())
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    for step in range(3):
        model(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=out / "fsdp")
    writer = dcp.HuggingFaceStorageWriter(str(out / "fsdp-hf"), save_distributed=True)
    untied = {name: tensor for name, tensor in weights.items() if name != "head.weight"}  # safetensors holds it once
    dcp.save(untied, storage_writer=writer)
    state = {name: tensor.full_tensor() for name, tensor in weights.items() if hasattr(tensor, "full_tensor")}
    for name, entry in moments["state"].items():
        state.update({f"{kind}.{name}": entry[kind].full_tensor() for kind in MOMENTS})
    save_true_state(out / "fsdp.safetensors", {name: tensor.clone() for name, tensor in state.items()})


def check_universal(folder, expected):
    for stage in (1, 2, 3):
        engine = engine_of(stage, "bf16", universal=True)
        train_step(engine, 7)  # elsewhere, so that nothing is right by chance
        engine.load_checkpoint(str(folder))
        for name, tensor in true_state(engine, stage).items():
            assert torch.equal(tensor, expected[name]), (stage, name)
        assert engine.global_steps == 3
        train_step(engine, 3)
        assert not torch.equal(safe_get_full_fp32_param(engine.module.scale), expected["scale"])


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    if sys.argv[1] == "write":
        for case in sys.argv[3:]:
            if write := {"fsdp": write_fsdp, "trainer": write_trainer}.get(case):
                write(Path(sys.argv[2]))
            else:
                write_deepspeed(Path(sys.argv[2]), case)
    else:
        check_universal(Path(sys.argv[2]), load_file(sys.argv[3]))
    os._exit(0)  # the destructors of process groups do not always end
