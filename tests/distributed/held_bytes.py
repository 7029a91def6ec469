"""One rank that trains two steps under an engine and counts the bytes of every tensor alive afterwards, case by case.

    RANK=0 WORLD_SIZE=2 python held_bytes.py PORT CASE...      a case: ENGINE,ZERO_STAGE,PRECISION,OFFLOAD,REDUCE

Prints one line a case: the case, its bytes, and the bytes that `static_bytes` computes. Each case runs in a process of
its own, forked after the slow imports.
"""

import gc
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from enc.encoder.batch_split import BatchSplit
from enc.encoder.config import ModelConfig, RunConfig
from enc.encoder.engine.ddp import DdpEngine
from enc.encoder.engine.settings import deepspeed_settings
from enc.encoder.memory import static_bytes
from enc.encoder.models.neobert import NeoBertForMaskedLM
from enc.encoder.optim.adamw import make_optimizer
from enc.kernels.masked_ce import masked_ce

MODEL = ModelConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=200, vocab_size=1024)
NUM_TOKENS = 1000


def case_config(case: str) -> RunConfig:
    """Return the run config of a case."""
    engine, stage, precision, offload, reduce_dtype = case.split(",")
    return RunConfig(model=MODEL).changed(
        {
            "parallel.engine": engine, "parallel.zero_stage": int(stage), "parallel.offload": offload,
            "parallel.reduce_dtype": reduce_dtype, "parallel.bucket_size": 100_000,
            "trainer.mixed_precision": precision, "trainer.gradient_clipping": 1.0,
        }
    )  # fmt: skip


class Objective(nn.Module):
    """The model with a loss on fixed tokens, so that nothing but the engine holds memory."""

    def __init__(self, model: NeoBertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        ids = torch.arange(64) % NUM_TOKENS
        hidden = self.model(ids, torch.tensor([0, 64], dtype=torch.int32), torch.arange(64))
        return masked_ce(hidden, self.model.head_weight, None, ids, NUM_TOKENS)[0]


def train(config: RunConfig, world_size: int) -> object:
    """Make two steps; return everything that a real run would keep."""
    model = NeoBertForMaskedLM(MODEL, NUM_TOKENS)
    return {"deepspeed": _deepspeed, "fsdp": _fsdp, "ddp": _ddp}[config.parallel.engine](config, model, world_size)


def _deepspeed(config: RunConfig, model: NeoBertForMaskedLM, world_size: int) -> object:
    optimizer = make_optimizer(config.optimizer, dict(model.named_parameters()))
    settings = deepspeed_settings(config, BatchSplit(world_size, 1, 2))
    engine, *_ = deepspeed.initialize(model=Objective(model), optimizer=optimizer, config=settings)
    for _ in range(2):
        engine.backward(engine())
        engine.step()
    return engine


def _fsdp(config: RunConfig, model: NeoBertForMaskedLM, world_size: int) -> object:
    mesh = init_device_mesh("cpu", (world_size,))
    low = torch.bfloat16 if config.trainer.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    objective = Objective(model)
    for block in model.model.transformer_encoder:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    optimizer = make_optimizer(config.optimizer, dict(model.named_parameters()))
    for _ in range(2):
        objective().backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective, optimizer


def _ddp(config: RunConfig, model: NeoBertForMaskedLM, world_size: int) -> object:
    engine = DdpEngine(Objective(model), model, config.optimizer, 1.0, world_size)
    for _ in range(2):
        engine.module().backward()
        engine.step(1e-3)
    return engine


def held_bytes() -> int:
    """Return the bytes of all storages that live tensors point to, each counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            local = thing._local_tensor if hasattr(thing, "_local_tensor") else thing
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def run_case(case: str, port: int) -> None:
    """Join the other ranks, train, print the bytes."""
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its C++ would be compiled for minutes
    deepspeed.init_distributed(dist_backend="gloo")
    before = held_bytes()
    config, world_size = case_config(case), int(os.environ["WORLD_SIZE"])
    kept = train(config, world_size)
    static = static_bytes(config, world_size)
    print(f"held {case} {held_bytes() - before} {static.device + static.host}", flush=True)
    torch.distributed.barrier()
    del kept


def main(port: int, cases: list[str]) -> None:
    """Run each case in a child process of its own."""
    for number, case in enumerate(cases):
        child = os.fork()
        if child == 0:
            run_case(case, port + number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{case} failed")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
