"""A LoRA as llama.cpp reads it: one GGUF file, which its server puts on, dials and takes off while it runs.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3. Keys and tensor names of an adapter: convert_lora_to_gguf.py
and src/llama-adapter.cpp of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError, nearest

FILE = "adapter.gguf"
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""model_type -> general.architecture, of families whose projections lie in GGUF one by one under the names below."""
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight")
_ALIGNMENT, _UINT32, _FLOAT32, _STRING, _F32 = 32, 4, 6, 8, 0


def write_gguf(path: Path, tensors: Mapping[str, Any], rank: int, config: Mapping[str, Any], name: str) -> None:
    """Write factors by their PEFT names (A (r, in), B (out, r), all of one rank and scale 1) for a base of this config.json.

    Raises:
        UserError: a family, or a weight, that llama.cpp holds otherwise.
    """
    kind, errors = str(config.get("model_type")), Errors()
    if kind not in FAMILIES:
        raise UserError(
            f"export --for gguf: bases of the type {kind!r} are not known here.{nearest(kind, FAMILIES)} {_ELSE}"
        )
    out: dict[str, Any] = {}
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None or found[2] not in _NAMES:
            errors.add(f"{key} has no name in GGUF here")
            continue
        layer, module, side = found.groups()
        # llama.cpp rotates neighbors, transformers halves: the rows of q and k of this architecture lie in another order there
        if FAMILIES[kind] == "llama" and side == "B" and module[-6:] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads"]
            heads = heads if module.endswith("q_proj") else config.get("num_key_value_heads") or heads
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        out[f"blk.{layer}.{_NAMES[module]}.weight.lora_{side.lower()}"] = tensor.float().contiguous()
    errors.raise_if_any(f"not every weight can be exported to GGUF; {_ELSE}")
    facts = {"general.architecture": FAMILIES[kind], "general.type": "adapter", "general.name": name, "adapter.type": "lora",
             "adapter.lora.alpha": float(rank), "general.alignment": _ALIGNMENT}  # fmt: skip
    _write(path, facts, out)


_ELSE = "Merge it (peft-unlearn merge) and convert the model, or use convert_lora_to_gguf.py of llama.cpp."


def _write(path: Path, facts: Mapping[str, str | int | float], tensors: Mapping[str, Any]) -> None:
    """Header, facts, tensor infos (sizes last to first), and the float32 data, each tensor at a multiple of the alignment."""
    head, at = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(facts)), 0
    for key, value in facts.items():
        kind, packed = (
            (_STRING, _text(value)) if isinstance(value, str)
            else (_UINT32, struct.pack("<I", value)) if isinstance(value, int) else (_FLOAT32, struct.pack("<f", value))
        )  # fmt: skip
        head += _text(key) + struct.pack("<I", kind) + packed
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, _F32, at)
        at += _padded(4 * tensor.numel())
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for tensor in tensors.values():
            raw = tensor.numpy().astype("<f4").tobytes()
            file.write(raw.ljust(_padded(len(raw)), b"\0"))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(raw := value.encode())) + raw


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
