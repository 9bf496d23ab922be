"""Tiny random models of every supported architecture, built from config: no downloads."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2}

ARCHITECTURES: dict[str, dict] = {
    "llama": GROUPED | {"tie_word_embeddings": True},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "mistral": GROUPED | {"sliding_window": 12},
    "gemma2": GROUPED
    | {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "phi3": GROUPED | {"sliding_window": None},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": COMMON | {"rotary_pct": 0.5},
}

# Other architectures, which do not go through every test of every feature. The dense ones have value propagation too.
ROUTED = {"num_experts_per_tok": 2, "num_local_experts": 4}
MANY_EXPERTS = {"head_dim": 8, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 12}
MORE_DENSE: dict[str, dict] = {
    "olmo2": GROUPED,
    "granite": GROUPED
    | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 0.5},
    "smollm3": GROUPED,  # the fourth layer has no positions
    "phi4": GROUPED | {"model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 12},
    "gemma3_text": GROUPED
    | {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}
    | {"final_logit_softcapping": 5.0},
}
MORE_ARCHITECTURES: dict[str, dict] = MORE_DENSE | {
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": COMMON | {"alibi": True, "ffn_hidden_size": 48},
    "mixtral": GROUPED | ROUTED | {"intermediate_size": 16},
    "qwen3_moe": GROUPED | MANY_EXPERTS,
    "gpt_oss": GROUPED
    | ROUTED
    | {"head_dim": 8, "intermediate_size": 16, "sliding_window": 6, "rope_parameters": {"rope_type": "default"}},
    "llama4_text": GROUPED
    | {"head_dim": 8, "intermediate_size": 16, "intermediate_size_mlp": 32, "num_local_experts": 4}
    | {"attention_chunk_size": 8, "interleave_moe_layer_step": 2, "floor_scale": 4},
    "qwen3_next": GROUPED
    | MANY_EXPERTS
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"shared_expert_intermediate_size": 12},
}


def tiny_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random model with weights large enough for losses to differ by token."""
    torch.manual_seed(seed)
    settings = (ARCHITECTURES | MORE_ARCHITECTURES)[architecture] | changes
    config = CONFIG_MAPPING[settings.pop("model_type", architecture)](**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.6 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def random_rows(seed: int, count: int, longest: int = 40) -> tuple[list[list[int]], list[list[bool]]]:
    """(input_ids, response masks): prompts, one or two response turns, unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    ids, masks = [], []
    for _ in range(count):
        length = integer(6, longest)
        start = integer(1, length - 3)
        mask = [i >= start for i in range(length)]
        if length - start > 8:  # a user turn between two assistant turns
            gap = integer(start + 2, length - 4)
            mask[gap] = mask[gap + 1] = False
        ids.append(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        masks.append(mask)
    return ids, masks
