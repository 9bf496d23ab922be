"""Log-probabilities in float64 where the model is float64: TRL's fused head rounds them to float32.

For runs whose numbers are to be exact, such as the tests of gradients. Costs a second forward pass.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from alphatoken.losses import token_logprobs


def use_exact_head(model: PreTrainedModel) -> None:
    """Patch a model that has TRL's fused head; nothing happens unless it is float64."""
    if model.dtype != torch.float64:
        return
    fused = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        outputs = fused(*args, fused_lm_head=fused_lm_head, labels=labels, **inputs)
        if fused_lm_head and labels is not None:
            logits = fused(*args, **inputs).logits
            outputs.log_probs = token_logprobs(logits, labels)[:, 1:]
        return outputs

    model.forward = forward
