"""The last layers of a model as a model of their own, the frozen layers below computed once per row.

Training moves only the last `layers` decoder layers. What enters them never changes, so it is kept per row: losses,
gradients and values are those of the whole model, for a third of the work. The library sees an ordinary causal LM.
"""

import copy

import torch
from torch import nn

from alphatoken.model import ScoringModel, load_model, prepare_model


class CachedTrunk(nn.Module):
    """Stands in the place of the token embedding: hidden states that enter the first trained layer, (B, T, D)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self._trunk = [trunk]  # in a list: not a submodule, so its weights are nobody's parameters
        self.kept: dict[bytes, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = [self._states(row) for row in input_ids]
        return nn.utils.rnn.pad_sequence(
            [nn.functional.pad(states, (0, 0, 0, input_ids.shape[1] - len(states))) for states in rows],
            batch_first=True,
        )

    def _states(self, row: torch.Tensor) -> torch.Tensor:
        """TD of one row without its padding (id 0 on the right)."""
        used = row.nonzero()
        row = row[: int(used[-1]) + 1 if len(used) else 1]
        key = row.cpu().numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = self._trunk[0](input_ids=row[None], use_cache=False).last_hidden_state[0].clone()
        return self.kept[key]


def load_suffix(name: str, layers: int) -> ScoringModel:
    """The model cut in two; with layers = 0 or all of them, the whole model and no cache."""
    whole = load_model(name, "float32")
    total = len(whole.model.model.layers)
    if layers in (0, total):
        return whole
    trunk = load_model(name, "float32").model.model
    trunk.layers = trunk.layers[: total - layers]
    trunk.config.num_hidden_layers = total - layers
    trunk.norm = nn.Identity()
    model = whole.model
    model.model.layers = model.model.layers[total - layers :]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = layers
    model.model.embed_tokens = CachedTrunk(trunk)
    return prepare_model(model)


def trained_parameters(scoring: ScoringModel) -> dict[str, nn.Parameter]:
    """Every weight of the decoder layers; embedding, final norm and head stay as they are."""
    return {name: p for name, p in scoring.model.named_parameters() if ".layers." in name}


def frozen_copy(scoring: ScoringModel) -> ScoringModel:
    """The model at its present weights, to stay so; what is never trained is shared, kept states of rows included."""
    shared = (scoring.model.get_input_embeddings(), scoring.head.projection)
    model = copy.deepcopy(scoring.model, {id(module): module for module in shared})
    return ScoringModel(model, type(scoring.head)(model))
