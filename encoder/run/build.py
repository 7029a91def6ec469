"""From a run's config and task to the engine that trains it."""

from pathlib import Path

import torch

from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.ddp import DdpEngine
from enc.encoder.engine.interface import Engine
from enc.encoder.engine.settings import read_settings
from enc.encoder.run.task import Task, module_of


def build_engine(run_dir: Path, config: RunConfig, task: Task, device: torch.device) -> Engine:
    """Compile the model if asked, put it on its device and wrap it in the engine of the config.

    What a sharding engine is told it reads from its file in the run folder. Raises UsageError when that is broken.
    """
    trainer, sections, engine = config.trainer, (config.parameters, config.optimizer), config.parallel.engine
    model, objective, split = task.model, module_of(task), task.share.split
    if trainer.torch_compile:
        # Flat batches differ in length. Dynamic shapes from the first step on, for a run that compiled static ones
        # first and dynamic ones later would differ in its last bits from one that was resumed in between.
        dynamic = True if trainer.torch_compile_dynamic is None else trainer.torch_compile_dynamic
        for block in model.blocks:
            block.compile(backend=trainer.torch_compile_backend, dynamic=dynamic)
    if engine == "fsdp":
        from enc.encoder.engine.fsdp import FsdpEngine  # a second of imports that others need not wait for

        settings = read_settings(run_dir, config, split)
        return FsdpEngine(objective, model, model.blocks, *sections, trainer.gradient_clipping, settings, device)
    if engine == "deepspeed":
        from enc.encoder.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(objective, model, *sections, read_settings(run_dir, config, split), device)
    return DdpEngine(objective.to(device), model, *sections, trainer.gradient_clipping, split.world_size)
