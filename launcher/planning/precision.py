"""What `trainer.mixed_precision: auto` stands for. No torch.

On CPUs, seconds of processor time of a step in fp32 / in bf16 (one thread, NeoBERT, 1,024 to 2,048 tokens):

    instructions for bf16             256 x 4      384 x 6      768 x 4
    avx512_bf16 (EPYC)              0.45 / 0.28    1.4 / 0.8    3.3 / 1.9
    none, AVX512                    0.52 / 1.00    1.5 / 3.0    3.2 / 7.1
    none, AVX2                      0.47 / 4.8     1.4 / 18

With AMX (Xeon) fp32 was the faster one at 256 x 4, by a quarter, and bf16 at 384 x 6.
"""

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.planning.ranks import device_of

_WIDE = 384
_AMPERE = (8, 0)


def choose_precision(config: RunConfig, facts: MachineFacts) -> tuple[str, str]:
    """Return `trainer.mixed_precision` as a run has it, and the reason in one clause; what the config names stays."""
    named = config.trainer.mixed_precision
    if named != "auto":
        return named, "as the config says"
    if device_of(config, facts) == "cuda":
        return _on_gpus(config, facts)
    if config.launch.on_cluster:
        return "no", "the CPUs of the nodes are not known"
    return _on_cpus(config, facts)


def _on_gpus(config: RunConfig, facts: MachineFacts) -> tuple[str, str]:
    if config.launch.on_cluster:
        return "bf16", "as GPUs since Ampere have it"
    try:
        old = [gpu.name for gpu in facts.gpus if _version(gpu.capability) < _AMPERE]
    except (UsageError, OSError):
        return "bf16", "as GPUs since Ampere have it; those of this machine cannot be looked at"
    return ("no", f"{old[0]} has no bf16") if old else ("bf16", "the GPUs have it")


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdigit())


def _on_cpus(config: RunConfig, facts: MachineFacts) -> tuple[str, str]:
    if not facts.cpu_has_bf16:
        return "no", "no instructions for bf16 are known of this CPU"
    if config.model.hidden_size < _WIDE:
        return "no", f"bf16 is slower on some CPUs for a model less than {_WIDE} wide"
    return "bf16", f"this CPU has instructions for it, and the model is at least {_WIDE} wide"
