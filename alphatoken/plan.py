"""What scoring computes, by formula: nothing is run and no weight is needed. What it holds: plan_memory.py.

Operations are those of matrix products, 2 per multiply-add; norms, activations and softmax are not counted, nor is a
causal kernel's skipping of masked pairs, so attention is an upper bound. Summed over all batches, with P computed
positions (padding included), A pairs of query and key, N response tokens, S positions from each row's first response
token to its last, D hidden width, V vocabulary:

    linear(layers)    = 2 P sum(d_in d_out)                         one product of each linear; scoring leaves out
                        the last layer's queries and what follows its attention, P - S times (last_layer.py)
    attention(layers) = 4 A heads head_width, per layer             scores, and their sum of values
    head              = 2 N D V                                     logits are made at response positions only
    pass(layers)      = linear(layers) + attention(layers)
    forward           = pass(all layers) + head

Trunk: the layers below the first scored one. Suffix: the others. R directions (one per target, one for stability):

    loss, entropy, random   forward
    excess_loss             forward + forward of the reference
    exact, central          pass(trunk) + R (2 pass(suffix) + 2 head)
    exact, forward mode     pass(trunk) + R 3 pass(suffix) + 2 head         x W', x' W and x W; head: logits, dl/dh;
                                                                            R 3 head where its weights are scored
      float8 tangents       the same, less R times linear(suffix): two of its three products count half
      several targets       pass(trunk) + (1 + 2 R) pass(suffix) + 2 head   x W is shared
    value_propagation       forward + head + S/P linear(suffix) + 5/2 attention(suffix)                 backward pass
                            + R 2 N (sum(d_in d_out) + d_in d_value) + half attention(suffix)           contraction
    direction               forward + head + 2 linear(suffix) + 5/2 attention(suffix), on validation rows
      of value_propagation  forward + head + (S + N)/P linear(suffix) + 5/2 attention(suffix)

The first scored layer's own inputs need no gradient: the few products that this saves are counted all the same.
Forward mode and the contraction attend in causal blocks of queries (attention.py), A counted so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from alphatoken.attention import QUERY_BLOCK
from alphatoken.batching import plan_batches

Kind = Literal["plain", "central", "forward", "value_propagation"]

ATTENTION_BACKWARD = 2.5  # of a forward pass: scores again, and gradients of value, weights, query and key


@dataclass(frozen=True)
class Device:
    """Data sheet: dense TFLOP/s of matrix products and memory in GB (1e9 bytes)."""

    bfloat16: float
    float32: float
    memory_gb: float
    float8: bool = False  # whether it multiplies 8-bit floats, at twice the speed of bfloat16


DEVICES = {
    "h100": Device(989, 67, 80, float8=True),
    "h200": Device(989, 67, 141, float8=True),
    "b200": Device(2250, 75, 180, float8=True),
    "a100": Device(312, 19.5, 80),
    "a100-40gb": Device(312, 19.5, 40),
    "l40s": Device(362, 91.6, 48, float8=True),
    "l4": Device(121, 30.3, 24, float8=True),
    "a10": Device(125, 31.2, 24),
}


@dataclass(frozen=True)
class LayerShape:
    """Sums over the linears of one decoder layer; of fused experts, those that a position is routed to."""

    weights: int  # all experts
    products: int  # d_in d_out
    inputs: int  # d_in
    outputs: int  # d_out
    widest: int  # the largest d_in or d_out
    value_width: int = 0  # output features that are attention values; 0 where nobody asked
    value_products: int = 0  # d_in d_value
    local_products: int = 0  # of the last layer, d_in d_out of linears that run in the span of responses alone
    float8_weights: int = 0  # in linears that can take tangents of 8-bit floats


@dataclass(frozen=True)
class ModelShape:
    """What formulas need to know of a model."""

    parameters: int  # tied ones count once
    hidden: int  # D
    vocabulary: int  # V
    heads: int
    attention_width: int  # heads x head width
    layers: tuple[LayerShape, ...]

    def scored(self, method: "Method") -> int:
        """How many weights are scored."""
        if method.kind == "plain":
            return 0
        if method.every_parameter:
            return self.parameters
        return sum(layer.weights for layer in self.layers[method.first_layer :])


@dataclass(frozen=True)
class Method:
    """How a batch is scored."""

    kind: Kind
    first_layer: int = 0  # the first scored one
    directions: int = 1  # R
    shared_pass: bool = False  # several targets in forward mode: the layers' own pass is computed once
    every_parameter: bool = False  # --parameters all: head and embeddings too
    window: int = 32
    wide_tangents: bool = False  # bfloat16 on a CPU that has no instructions for it: [W M] in float32
    float8_tangents: bool = False  # W x' and M x of 8-bit floats (both: tangent_linear.py)
    entropy: bool = False
    plain_passes: int = 0  # forward passes of the model beside its estimator: pairs by central difference
    response_outer: bool = False  # the direction sums over response positions only, and goes back there only


@dataclass(frozen=True)
class Work:
    """Sums over batches; floats once they are scaled up from a sample. `largest_` are maxima over batches."""

    batches: float = 0
    tokens: float = 0
    response_tokens: float = 0  # N
    spans: float = 0  # S
    positions: float = 0  # P
    pairs: float = 0  # A: rows x length^2
    block_pairs: float = 0  # A, keys up to the end of each block of queries
    band_pairs: float = 0  # the same, keys within the window of the block
    largest_positions: int = 0
    largest_responses: int = 0

    @property
    def padding_share(self) -> float:
        """Of the computed positions."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    def scaled(self, factor: float) -> "Work":
        """Sums times `factor`; maxima stay."""
        sums = {f.name: getattr(self, f.name) * factor for f in fields(self) if not f.name.startswith("largest_")}
        return replace(self, **sums)


def count_work(
    lengths: Sequence[int],
    responses: Sequence[int],
    batch_tokens: int,
    block_tokens: int,
    window: int = 32,
    spans: Sequence[int] | None = None,
) -> Work:
    """The batches that scoring makes of rows with these lengths and numbers of response tokens, in this order.

    spans: positions from the first response token to the last; default: rows have one response.
    block_tokens: rows are sorted by length within blocks of about so many tokens, as the shards of a run are.
    """
    total = dict.fromkeys((f.name for f in fields(Work)), 0)
    for block in _blocks(lengths, block_tokens):
        for group in plan_batches([lengths[i] for i in block], batch_tokens):
            rows = [block[i] for i in group]
            count, length, response = len(rows), lengths[rows[-1]], sum(responses[i] for i in rows)
            total["batches"] += 1
            total["tokens"] += sum(lengths[i] for i in rows)
            total["response_tokens"] += response
            total["spans"] += sum((spans or responses)[i] for i in rows)
            total["positions"] += count * length
            total["pairs"] += count * length**2
            total["block_pairs"] += count * attended(length)
            total["band_pairs"] += count * attended(length, window)
            total["largest_positions"] = max(total["largest_positions"], count * length)
            total["largest_responses"] = max(total["largest_responses"], response)
    return Work(**total)


def _blocks(lengths: Sequence[int], block_tokens: int) -> Iterator[range]:
    """Runs of consecutive rows with at least `block_tokens` tokens each, but for the last."""
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        tokens += length
        if tokens >= block_tokens or index == len(lengths) - 1:
            yield range(start, index + 1)
            start, tokens = index + 1, 0


def attended(length: int, window: int | None = None) -> int:
    """Pairs of query and key that causal blocks of queries compute; window: keys from that far before the block on."""
    starts = range(0, length, QUERY_BLOCK)
    stops = [min(start + QUERY_BLOCK, length) for start in starts]
    return sum(
        (stop - start) * (stop - (0 if window is None else max(0, start - window)))
        for start, stop in zip(starts, stops, strict=True)
    )


# operations


def linear_flops(layers: Sequence[LayerShape], positions: float, spans: float | None = None) -> float:
    """One product of every linear. spans: positions at which the last layer's local ones run."""
    local = 0.0 if spans is None else (positions - spans) * sum(layer.local_products for layer in layers)
    return 2 * (positions * sum(layer.products for layer in layers) - local)


def attention_flops(model: ModelShape, layers: Sequence[LayerShape], pairs: float) -> float:
    """Scores of all pairs, and the sum of values by them."""
    return 4 * pairs * model.attention_width * len(layers)


def head_flops(model: ModelShape, work: Work) -> float:
    """Logits at response positions."""
    return 2 * work.response_tokens * model.hidden * model.vocabulary


def forward_flops(model: ModelShape, work: Work) -> float:
    """A forward pass with logits at response positions, all layers whole."""
    return _forward_flops(model, work, None)


def _forward_flops(model: ModelShape, work: Work, spans: float | None) -> float:
    return (
        linear_flops(model.layers, work.positions, spans)
        + attention_flops(model, model.layers, work.pairs)
        + head_flops(model, work)
    )


def scoring_flops(model: ModelShape, method: Method, work: Work, reference: ModelShape | None = None) -> float:
    """Values of all response tokens. reference: a model that runs forward beside it."""
    forward = _forward_flops(model, work, work.spans)
    total = method.plain_passes * forward
    if reference is not None:
        total += _forward_flops(reference, work, work.spans)
    trunk, suffix = model.layers[: method.first_layer], model.layers[method.first_layer :]
    head = head_flops(model, work)
    linear = linear_flops(suffix, work.positions, work.spans)
    shared = linear_flops(trunk, work.positions) + attention_flops(model, trunk, work.pairs)
    if method.kind == "plain":
        return total + forward
    if method.kind == "central":
        once = linear + attention_flops(model, suffix, work.pairs) + head
        return total + shared + method.directions * 2 * once
    if method.kind == "forward":
        once = linear + attention_flops(model, suffix, work.block_pairs)
        passes = 1 + 2 * method.directions if method.shared_pass else 3 * method.directions
        heads = 3 * method.directions if method.every_parameter else 2
        saved = method.directions * _float8_flops(suffix, work) if method.float8_tangents else 0.0
        return total + shared + passes * once - saved + heads * head
    causal = 0.0
    if method.window:
        values = sum(layer.value_width for layer in suffix)
        causal = attention_flops(model, suffix, work.block_pairs) / 2 + 2 * work.band_pairs * values
    products = sum(layer.products + (layer.value_products if method.window else 0) for layer in suffix)
    contraction = method.directions * 2 * work.response_tokens * products + causal
    backward = linear_flops(suffix, work.spans) + ATTENTION_BACKWARD * attention_flops(model, suffix, work.pairs)
    return total + forward + head + backward + contraction


def _float8_flops(layers: Sequence[LayerShape], work: Work) -> float:
    """Of `linear_flops`, those of linears that can take tangents of 8-bit floats."""
    shares = ((layer, layer.float8_weights / layer.products) for layer in layers)
    return sum(share * linear_flops([layer], work.positions, work.spans) for layer, share in shares)


def direction_flops(model: ModelShape, method: Method, work: Work) -> float:
    """The validation gradient of the scored weights; `work` is that of the validation rows."""
    suffix = model.layers[method.first_layer :]
    ran = work.spans if method.every_parameter else None  # autograd takes outer products of what ran
    outer = linear_flops(suffix, work.response_tokens if method.response_outer else work.positions, ran)
    backward = linear_flops(suffix, work.spans if method.response_outer else work.positions, work.spans)
    backward += ATTENTION_BACKWARD * attention_flops(model, suffix, work.pairs)
    heads = 2 if method.every_parameter else 1
    return _forward_flops(model, work, work.spans) + heads * head_flops(model, work) + backward + outer


# time


def actors_for(serial: float, parallel: float, wanted: float) -> int | None:
    """The fewest actors that finish in `wanted` seconds; None where the serial part alone takes longer."""
    left = wanted - serial
    return max(1, -int(-parallel // left)) if left > 0 else None
