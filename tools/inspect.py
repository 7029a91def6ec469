"""What is inside a checkpoint: counters, files and every tensor, read one at a time."""

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from enc.encoder.checkpoint import read_trainer_state, verify


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state, counters and tensors.

    A tensor is described by name, shape, dtype, bytes, norm and the number of its values that are not finite.
    """
    status = verify(folder)
    files = [folder / "model.safetensors", *sorted((folder / "state").glob("*.safetensors"))]
    tensors = {str(path.relative_to(folder)): _tensors(path) for path in files if path.is_file()}
    return {
        "path": str(folder),
        "state": status.state,
        "problems": status.problems,
        "bytes": status.num_bytes,
        "trainer_state": read_trainer_state(folder),
        "tensors": tensors,
    }


def _tensors(path: Path) -> list[dict[str, Any]]:
    rows = []
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            values = tensor.double()
            rows.append({
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.numel() * tensor.element_size(),
                "norm": values.norm().item(),
                "non_finite": int((~values.isfinite()).sum()),
            })  # fmt: skip
    return rows


def inspection_text(found: dict[str, Any]) -> str:
    """Lay an inspection out for a terminal of 80 columns."""
    state = found["trainer_state"]
    lines = [
        f"{found['path']}: {found['state']}, {found['bytes'] / 1e6:.1f} MB",
        *(f"  {problem}" for problem in found["problems"]),
        f"step {state['step']}, {state['tokens']:,} tokens, {state['optimizer_steps']} updates, "
        f"{state['nonfinite_steps']} skipped, written by {state['world_size']} rank(s)",
    ]
    for name, tensors in found["tensors"].items():
        total = sum(tensor["bytes"] for tensor in tensors)
        lines += ["", f"{name}: {len(tensors)} tensors, {total / 1e6:.1f} MB"]
        lines += [_tensor_line(tensor) for tensor in tensors]
    return "\n".join(lines)


def _tensor_line(tensor: dict[str, Any]) -> str:
    shape = "x".join(map(str, tensor["shape"])) or "scalar"
    norm = f"{tensor['norm']:.4g}" if math.isfinite(tensor["norm"]) else "not finite"
    bad = f"  {tensor['non_finite']} NON-FINITE" if tensor["non_finite"] else ""
    return f"  {tensor['name']:<46} {shape:>12} {tensor['dtype']:>8} {norm:>9}{bad}"
