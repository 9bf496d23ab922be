"""Generation throughput: the pipeline on vLLM against plain `vllm.LLM.generate`, and the fallback engine.

    python benchmarks/generation_speed.py --data FILE [--prompts 500] [--json FILE]

Each runs in a process of its own, with the same prompts, seeds and engine settings. `start` is what a run of a few
prompts takes: Ray, the engine, the weights; throughput is of the tokens beyond that, `all` of everything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import DATA_HELP, embedded_file, print_table, write_result

from alphatoken.config import EMBEDDED_MODEL
from alphatoken.generate_config import GenerateConfig

FEW = 8  # prompts of the run that shows what starting takes
MODES = ("plain vLLM", "pipeline, vLLM", "pipeline, transformers")


def configuration(arguments: argparse.Namespace, count: int, output: str, engine: str) -> GenerateConfig:
    return GenerateConfig(
        model=arguments.model, prompts=[arguments.data], columns={"prompt": arguments.prompt_column}, limit=count,
        chat=True, samples=1, max_new_tokens=arguments.max_new_tokens, max_length=1024, engine=engine, output=output,
    )  # fmt: skip


def plain(config: GenerateConfig) -> int:
    """What one would write without us. Returns the number of generated tokens."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": str(config.cpu_cache_gb), "VLLM_LOGGING_LEVEL": "WARNING"}
    from vllm import LLM, SamplingParams

    from alphatoken.sources import plan_units, read_unit
    from pipelines.engines import sample_seed
    from pipelines.generate import check_generate, engine_plan
    from pipelines.vllm_engine import vllm_config, vllm_request

    units = plan_units(config.prompts)
    prompts = check_generate(config, units)
    plan = engine_plan(config, prompts.context)
    reader = prompts.reader()
    rows = [row for unit in units for row in read_unit(unit)][: config.limit]
    requests = [
        {"prompt_ids": reader.read(row.data).prompt_ids, "seed": sample_seed(config.seed, row.row_id, 0), "reason": ""}
        for row in rows
    ]
    asked = [vllm_request(request, plan.sampling, plan.end_ids) for request in requests]
    settings = vllm_config(plan)
    engine_kwargs = {name: value for name, value in settings.engine_kwargs.items() if name != "task_type"}  # Ray's own
    engine = LLM(model=settings.model_source, **engine_kwargs)
    answers = engine.generate(
        [{"prompt_token_ids": request["tokenized_prompt"]} for request in asked],
        [SamplingParams(**request["sampling_params"]) for request in asked],
    )
    return sum(len(answer.outputs[0].token_ids) for answer in answers)


def pipeline(config: GenerateConfig) -> int:
    from pipelines.generate import run_generate

    return run_generate(config)["counts"]["response_tokens"]


def run_here(mode: str, config: GenerateConfig) -> None:
    tokens = plain(config) if mode == MODES[0] else pipeline(config)
    print(json.dumps({"tokens": tokens}))


def timed(mode: str, config: GenerateConfig) -> dict:
    """Seconds and tokens of a fresh process."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--run", mode, config.model_dump_json()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    answer = next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"'))  # engines print too
    return json.loads(answer) | {"seconds": seconds}


def measure(arguments: argparse.Namespace, mode: str, folder: str) -> dict:
    engine = "transformers" if mode == MODES[2] else "vllm"
    count = arguments.fallback_prompts if engine == "transformers" else arguments.prompts
    few, all_ = (
        timed(mode, configuration(arguments, n, f"{folder}/{mode}-{n}".replace(" ", ""), engine)) for n in (FEW, count)
    )
    rate = (all_["tokens"] - few["tokens"]) / (all_["seconds"] - few["seconds"])
    return {"prompts": count, "tokens": all_["tokens"], "seconds": all_["seconds"], "start_seconds": few["seconds"],
            "tokens_per_second": rate, "tokens_per_second_all": all_["tokens"] / all_["seconds"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP, default=embedded_file("train.jsonl"))
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--fallback-prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_here(arguments.run[0], GenerateConfig.model_validate_json(arguments.run[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {mode: measure(arguments, mode, folder) for mode in MODES}
    base = results[MODES[0]]
    print_table(
        f"{arguments.max_new_tokens} new tokens at most, one sample per prompt",
        ["", "prompts", "tokens", "start, s", "all, s", "tokens/s", "x plain", "tokens/s, start included", "x plain"],
        [
            [mode, str(r["prompts"]), f"{r['tokens']:,}", f"{r['start_seconds']:.1f}", f"{r['seconds']:.1f}",
             f"{r['tokens_per_second']:.0f}", f"{r['tokens_per_second'] / base['tokens_per_second']:.2f}",
             f"{r['tokens_per_second_all']:.0f}", f"{r['tokens_per_second_all'] / base['tokens_per_second_all']:.2f}"]
            for mode, r in results.items()
        ],
    )  # fmt: skip
    settings = vars(arguments) | {"data": Path(arguments.data).name}
    for name in ("run", "json"):
        settings.pop(name)
    write_result(arguments.json, settings | {"results": results})


if __name__ == "__main__":
    main()
