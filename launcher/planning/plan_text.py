"""A plan as a person reads it."""

from enc.encoder.config.schema import RunConfig
from enc.launcher.planning.advice import advice
from enc.launcher.planning.plan import Plan


def plan_notes(plan: Plan) -> list[str]:
    """Return what a person should know before the run starts: what settings do, or do not, and lacking weights."""
    return [f"Note: {text}" for text in (*plan.unused, *plan.first_weights, *advice(plan))]


def plan_table(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as (name, text) lines for a person."""
    facts, split, config = plan.as_dict(), plan.split, plan.config
    total = facts["total_tokens"]
    epochs = f", {total / plan.store_facts.train_tokens:.1f} epochs" if plan.store_facts.train_tokens else ""
    return [
        ("run folder", str(plan.run_dir)),
        ("token store", f"{plan.store}" + ("" if plan.store_ready else " (to be made first)")),
        ("model", f"{config.model.type} {config.model.num_hidden_layers} x {config.model.hidden_size}, "
                  f"{facts['parameters'] / 1e6:.1f} M parameters, vocabulary {facts['vocab_size']}"),
        ("world", f"{_machines(config)}{split.world_size} process{'es' if split.world_size > 1 else ''} on "
                  f"{plan.device}"),
        ("precision", f"{plan.precision}, {plan.precision_reason}"),
        ("engine", f"{plan.engine}, {plan.engine_reason}"),
        ("batch", f"{split.rows_per_step} rows = {split.world_size} ranks x {split.accumulation} microbatches "
                  f"x {split.rows_per_microbatch} rows"),
        ("step", f"{plan.tokens_per_step:,} tokens ({config.row_length} a row"
                 f"{', packed' if config.datacollator.pack_sequences else ', at most'})"),
        ("steps", f"{config.trainer.max_steps:,}, at most {total / 1e6:,.1f} M tokens{epochs}"),
        ("memory a rank", _memory_text(facts["memory_mb"])),
        ("checkpoint", f"{facts['checkpoint_mb']:,.1f} MB each, {config.trainer.save_total_limit or 'all'} kept"),
    ]  # fmt: skip


def _machines(config: RunConfig) -> str:
    launch, nodes = config.launch, config.launch.num_nodes
    return f"{nodes} node{'s' if nodes > 1 else ''} of {launch.scheduler.upper()}, " if launch.on_cluster else ""


def _memory_text(parts: dict[str, float]) -> str:
    host = f"; {parts['host']:,.0f} MB of RAM" if parts["host"] else ""
    named = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items() if size >= 0.5 and name != "host")
    return f"about {sum(parts.values()) - parts['host']:,.0f} MB: {named}{host}"
