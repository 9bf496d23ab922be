"""What scoring holds in memory, by formula: bytes of what is alive at once.

P positions of the largest batch, e bytes of an element, D hidden width, S scored weights, R directions:

    pass without a graph     P e (2 D + outputs of one layer's linears)
    graph of some layers     P (e sum(d_in + 2 d_out) + 16 D)       inputs, outputs, gradients; float32 copies in norms
    forward mode             two passes + float32 scores of a block of queries
    copies                   central 2 R S e      forward mode, value_propagation R S e      forward mode in bfloat16
                             on a CPU without instructions for it 8 R S
                             float8 tangents 2 R S      W and M
    logits                   a chunk of the head in float32, and what is made of it

Allocators add to that, as do the Python process (about 0.5 GB) and a GPU's context (about 0.5 GB): not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from alphatoken.attention import QUERY_BLOCK
from alphatoken.head import CHUNK_ELEMENTS
from alphatoken.plan import LayerShape, Method, ModelShape, Work

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
FLOAT8_BYTES = 2  # W and M, one each
SCORE_BUFFERS = {"forward": 6, "value_propagation": 3}  # float32 arrays of (heads, QUERY_BLOCK, keys) alive at once


@dataclass(frozen=True)
class Memory:
    """Bytes of one actor. `starting`: what is alive beside the weights while the estimator is made."""

    weights: float
    reference: float
    copies: float  # directions, tangents or moved weights
    activations: float
    logits: float
    starting: float

    @property
    def total(self) -> float:
        """The most at any time."""
        at_work = self.reference + self.copies + self.activations + self.logits
        return self.weights + max(at_work, self.starting)


def copies_bytes(model: ModelShape, method: Method, element: int) -> float:
    """What is kept along with the weights for the directions."""
    per_weight = {"plain": 0, "central": 2 * element, "forward": element, "value_propagation": element}[method.kind]
    if method.kind == "forward" and method.wide_tangents:
        per_weight = 2 * ELEMENT_BYTES["float32"]
    scored = model.scored(method)
    in_float8 = sum(layer.float8_weights for layer in model.layers[method.first_layer :]) * method.float8_tangents
    return method.directions * (per_weight * (scored - in_float8) + FLOAT8_BYTES * in_float8)


def activation_bytes(model: ModelShape, method: Method, element: int, positions: int) -> float:
    """The most that a batch with so many computed positions holds, logits apart."""
    suffix = model.layers[method.first_layer :]
    plain = positions * element * (2 * model.hidden + max(layer.outputs for layer in model.layers))
    scores = SCORE_BUFFERS.get(method.kind, 0) * 4 * positions * model.heads * QUERY_BLOCK
    if method.kind == "forward":
        widest = max(layer.widest for layer in suffix)
        own = 3 * 4 if method.wide_tangents else 4 + 1 if method.float8_tangents else 0  # of an input: [x' x]; x / s
        return 2 * plain + scores + positions * widest * own
    if method.kind == "value_propagation":
        return plain + graph_bytes(model, suffix, element, positions) + (scores if method.window else 0)
    return plain + (positions * element * model.hidden if method.kind == "central" and method.first_layer else 0)


def graph_bytes(model: ModelShape, layers: Sequence[LayerShape], element: int, positions: int) -> float:
    """A graph over these layers and the gradients of their outputs; norms keep two float32 copies of their input."""
    linears = sum(layer.inputs + 2 * layer.outputs for layer in layers)
    return positions * (element * linears + len(layers) * 4 * model.hidden * 4)


def logit_bytes(model: ModelShape, method: Method, element: int, responses: int) -> float:
    """One chunk of the head: logits and what is made of them, in float32."""
    rows = min(responses, max(1, CHUNK_ELEMENTS // model.vocabulary))
    return rows * model.vocabulary * ((16 if method.entropy else 8) + (element if element < 4 else 0))


def actor_memory(
    model: ModelShape, method: Method, work: Work, dtype: str, on_cpu: bool, reference: ModelShape | None = None,
    keeps_reference: bool = False,
) -> Memory:  # fmt: skip
    """Bytes of a scoring actor. reference: a model that is loaded too; keeps_reference: all the time."""
    element, scored = ELEMENT_BYTES[dtype], model.scored(method)
    other = element * reference.parameters if reference else 0
    copies = copies_bytes(model, method, element)
    starting = copies + other
    if method.directions >= 2:  # the drift in float32, made where the weights are
        starting += 4 * scored
    same_tensors = method.kind == "forward" and dtype == "float32" and not method.float8_tangents  # as loaded
    if on_cpu and not same_tensors:  # direction files in float32: on a GPU machine they are in the host's memory
        starting += 4 * scored * method.directions
    return Memory(
        weights=element * model.parameters,
        reference=other if keeps_reference else 0,
        copies=copies,
        activations=activation_bytes(model, method, element, work.largest_positions),
        logits=logit_bytes(model, method, element, work.largest_responses),
        starting=starting,
    )


def direction_memory(model: ModelShape, method: Method, work: Work, dtype: str) -> float:
    """Bytes of the task that makes the direction. While the graph lives there are the gradient sums of both halves of
    the validation rows and a batch's own; at the end both halves, their sum and the mean, and for a central difference
    the moved weights of the search for its step (float32 each).
    """
    element, sums = ELEMENT_BYTES[dtype], 4 * model.scored(method)
    suffix = model.layers[method.first_layer :]
    plain = activation_bytes(model, Method("plain"), element, work.largest_positions)
    graph = plain + graph_bytes(model, suffix, element, work.largest_positions)
    graph += logit_bytes(model, method, element, work.largest_responses)
    searches = dtype == "float32" and method.kind == "central"
    return element * model.parameters + max(graph + 3 * sums, (5 if searches else 4) * sums)
