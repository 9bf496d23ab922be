"""Scoring over forward pass, by model, dtype and length: measured, and predicted by counting operations.

    python benchmarks/speed_table.py [--lengths 128 512 1024] [--tokens 2048] [--json FILE]

Models: SmolLM2-135M and random weights in the shape of Llama-3.2-1B; on a GPU too, where there is one. Each case is
benchmarks/speed.py in a process of its own. Predictions are those of `alphatoken plan` (alphatoken/plan.py): operations
of scoring over those of a forward pass with logits at response positions; also for shapes that do not fit here.
"""

import argparse
import tempfile
from pathlib import Path

import speed
import torch
from common import in_own_process, print_table, write_result
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken.architecture import first_scored_layer
from alphatoken.attention import NAME as ATTENTION
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.plan import Method, ModelShape, count_work, forward_flops, scoring_flops
from alphatoken.plan_model import meta_model, shape_of
from alphatoken.tokenizer import load_tokenizer

# Published shapes: https://huggingface.co/meta-llama
LARGER = "Llama-3.2-1B shape"
SHAPES = {
    LARGER: {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "Llama-3-8B shape": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "Llama-3-70B shape": {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
KINDS = {
    "value_propagation, K = 3": ("value_propagation", speed.K3),
    "exact, K = 3, forward mode": ("forward", speed.K3),
    "exact, K = 3, central difference": ("central", speed.K3),
    "exact, all-linear, forward mode": ("forward", speed.ALL),
    speed.FLOAT8: ("float8", speed.ALL),
    "exact, all-linear, central difference": ("central", speed.ALL),
}


def shape_by_name(name: str) -> tuple[ModelShape, dict[str, int]]:
    """(sizes, first scored layer by parameters), without weights."""
    if name in SHAPES:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
        model.set_attn_implementation(ATTENTION)
    else:
        model = meta_model(name)
    return shape_of(model, values=True), {p: first_scored_layer(model, p) for p in (speed.K3, speed.ALL)}


def predicted(name: str, length: int, batch_size: int) -> dict[str, float]:
    """Method -> operations over those of a forward pass; half of each row is response."""
    model, first = shape_by_name(name)
    tokens = length * batch_size
    work = count_work([length] * batch_size, [length - length // 2] * batch_size, tokens, tokens, speed.WINDOW)
    found = {}
    for method, (kind, parameters) in KINDS.items():
        float8 = kind == "float8"
        settings = Method("forward" if float8 else kind, first[parameters], window=speed.WINDOW, float8_tangents=float8)
        found[method] = scoring_flops(model, settings, work) / forward_flops(model, work)
    return found


def random_model(folder: str) -> str:
    """The larger shape with random weights and SmolLM2's tokenizer, saved in bfloat16."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[LARGER])).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder)
    return folder


def measure(model: str, dtype: str, length: int, batch_size: int, repeats: int) -> dict:
    """benchmarks/speed.py on one shape."""
    arguments = argparse.Namespace(
        model=model, data=None, length=length, batch_size=batch_size, repeats=repeats, skip_paper=True,
        skip_memory=True, validation_examples=2,
    )  # fmt: skip
    found = in_own_process(speed.benchmark, arguments, dtype)
    for name, method in found["methods"].items():
        method["peak_mb"] = speed.peak_memory(arguments, dtype, name)
    return found


def case(name: str, path: str, dtype: str, length: int, tokens: int, repeats: int) -> dict:
    """Measured and predicted ratios of one model, dtype and length."""
    batch_size = max(1, tokens // length)
    methods = measure(path, dtype, length, batch_size, repeats)["methods"]
    ratios = predicted(name, length, batch_size)
    for method, found in methods.items():
        found["tokens_per_second"] = length * batch_size / found["seconds"]
        found["peak_ratio"] = found["peak_mb"] / methods["forward pass"]["peak_mb"]
        found["predicted"] = ratios.get(method, 1.0)
    return {"model": name, "dtype": dtype, "length": length, "batch_size": batch_size, "methods": methods}


def show(found: dict) -> None:
    title = f"{found['model']}, {found['dtype']}, T = {found['length']}, batch {found['batch_size']}"
    columns = ["method", "x forward", "predicted", "tokens/s", "peak MB above the model", "x forward's peak"]
    rows = [
        [name, f"{m['ratio']:.2f}", f"{m['predicted']:.2f}", f"{m['tokens_per_second']:,.0f}", f"{m['peak_mb']:,.0f}",
         f"{m['peak_ratio']:.1f}"]
        for name, m in found["methods"].items()
    ]  # fmt: skip
    print_table(title, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 1024], help="of SmolLM2; none: without it")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch of SmolLM2")
    parser.add_argument("--larger-tokens", type=int, default=512, help="of a batch of the larger shape; 0: without it")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    cases: list[dict] = []
    shapes = {name: predicted(name, 512, 4) for name in SHAPES}
    with tempfile.TemporaryDirectory() as folder:
        todo = [
            (EMBEDDED_MODEL, EMBEDDED_MODEL, dtype, length, arguments.tokens)
            for dtype in arguments.dtypes
            for length in arguments.lengths
        ]
        if arguments.larger_tokens:
            path = random_model(str(Path(folder) / "model"))
            todo += [(LARGER, path, dtype, 512, arguments.larger_tokens) for dtype in arguments.dtypes]
        for name, path, dtype, length, tokens in todo:
            cases.append(case(name, path, dtype, length, tokens, arguments.repeats))
            show(cases[-1])
            write_result(arguments.json, {"cases": cases, "predicted": shapes})  # what is there, if it is cut off
    print_table(
        "predicted at T = 512",
        ["method", *shapes],
        [[method, *(f"{found[method]:.2f}" for found in shapes.values())] for method in KINDS],
    )


if __name__ == "__main__":
    main()
