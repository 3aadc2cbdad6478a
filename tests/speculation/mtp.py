"""DeepSeek-V3 checkpoints with the layer that predicts further tokens, and that layer in torch (float32)."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from tests.checkpoints import DEEPSEEK, checkpoint

SIZES = DEEPSEEK | {"n_group": 2, "num_nextn_predict_layers": 1}
LAYERS, HIDDEN = 3, 64
PREFIX = f"model.layers.{LAYERS}."


def with_draft_layer(folder: Path, residual: float = 1.0, seed: int = 5) -> Path:
    """A tiny DeepSeek-V3 and its MTP layer, written to `folder`, which does not exist yet.

    What every block adds to the residual stream is multiplied by `residual`. At 0 the model is head(norm(embedding))
    of the last token; `eh_proj` lets the next token's embedding pass and drops the hidden state, so that the draft
    then is the same function of the next token: it is always right.
    """
    shutil.copytree(checkpoint("deepseek_v3", seed, **SIZES), folder)
    tensors = load_file(folder / "model.safetensors")
    # A layer of the model's own kind: another model's last one.
    other = load_file(checkpoint("deepseek_v3", seed + 1, **SIZES) / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    tensors |= {PREFIX + name.removeprefix(last): value for name, value in other.items() if name.startswith(last)}
    tensors |= {
        f"{PREFIX}enorm.weight": torch.ones(HIDDEN),
        f"{PREFIX}hnorm.weight": torch.ones(HIDDEN),
        f"{PREFIX}eh_proj.weight": torch.cat(
            (torch.eye(HIDDEN), residual * other[f"{last}self_attn.o_proj.weight"]), 1
        ),
        f"{PREFIX}shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        f"{PREFIX}shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{PREFIX}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            tensors[name] = tensors[name] * residual
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_fp8(folder: Path, quantized: Path) -> None:
    """Quantize `folder` as DeepSeek-V3 is published, to `quantized`; `folder` then has what those weights stand for.

    Linears have float8 weights and one scale for each block of 128 x 128; `eh_proj`, embedding and head stay floats.
    """
    shutil.copytree(folder, quantized)
    floats, eights = load_file(folder / "model.safetensors"), {}
    for name, weight in floats.items():
        if "_proj" not in name or "eh_proj" in name:
            eights[name] = weight
            continue
        rows, columns = weight.shape
        assert max(rows, columns) <= 128, "one block"
        scale = weight.abs().max().clamp(min=1e-6) / 448
        eights[name] = (weight / scale).to(torch.float8_e4m3fn)
        eights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        floats[name] = eights[name].float() * scale
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(eights, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (quantized / "config.json").write_text(json.dumps(config))


class DraftLayer(nn.Module):
    """The MTP layer as the paper has it (arXiv:2412.19437, equations 21 to 23), around transformers' decoder layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = DeepseekV3Config(**json.loads((folder / "config.json").read_text()))
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        eps = config.rms_norm_eps
        self.enorm = deepseek.DeepseekV3RMSNorm(HIDDEN, eps)
        self.hnorm = deepseek.DeepseekV3RMSNorm(HIDDEN, eps)
        self.eh_proj = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.block = deepseek.DeepseekV3DecoderLayer(config, LAYERS)
        self.rotary = deepseek.DeepseekV3RotaryEmbedding(config)
        self.shared_head = nn.ModuleDict(
            {"norm": deepseek.DeepseekV3RMSNorm(HIDDEN, eps), "head": nn.Linear(HIDDEN, config.vocab_size, bias=False)}
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, HIDDEN)
        self._load(folder)

    def _load(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        # transformers reads a layer of the model in whatever way it stores experts: as one more layer of the model.
        longer = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=LAYERS + 1, dtype=torch.float32)
        self.block.load_state_dict(longer.model.layers[LAYERS].state_dict())
        tensors = load_file(folder / "model.safetensors")
        own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        missing = self.load_state_dict({name: own[name] for name in own if name in self.state_dict()}, strict=False)
        assert all(name.startswith(("block.", "rotary.")) for name in missing.missing_keys), missing

    @torch.inference_mode()
    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[positions, hidden]`, the model's hidden states, and the tokens after each -> logits, hidden states.

        Both float32, of each position; the hidden states are after the norm.
        """
        joined = torch.cat((self.enorm(self.embed_tokens(tokens)), self.hnorm(hidden)), -1)
        x = self.eh_proj(joined)[None]
        count = len(tokens)
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        positions = torch.arange(count)[None]
        x = self.block(x, attention_mask=mask, position_embeddings=self.rotary(x, positions))
        normed = self.shared_head["norm"](x[0] if x.ndim == 3 else x)
        return self.shared_head["head"](normed), normed
