"""The diagonal Fisher of a reference model, from responses that it samples itself."""

from collections.abc import Iterator
from itertools import islice

import ray

from alphatoken import tensor_file
from alphatoken.architecture import scored_linears
from alphatoken.batching import Batch, plan_batches
from alphatoken.config import FisherConfig
from alphatoken.encode import check_source
from alphatoken.errors import UserError
from alphatoken.fisher import diagonal_fisher, sample_responses
from alphatoken.model import fingerprint, load_model
from alphatoken.sources import data_fingerprint, plan_units
from alphatoken.tokenizer import end_of_turn_ids, load_tokenizer
from pipelines.cluster import connect, prepare_worker, torch_threads, user_errors
from pipelines.direction import one_accelerator, report_refused
from pipelines.encode import good_rows, make_encoder


def run_fisher(config: FisherConfig) -> dict:
    """Sample, accumulate and save; returns the provenance as a dictionary."""
    if config.parameters == "all":
        raise UserError(
            "the Fisher (Eq. 5) is defined for linear weights: use --parameters last-layers:K or all-linear"
        )
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    check_source(plan_units(config.prompts), config, tokenizer)
    connect()
    with user_errors():
        return ray.get(make_fisher.options(**one_accelerator()).remote(config, torch_threads()))


@ray.remote
def make_fisher(config: FisherConfig, threads: int) -> dict:
    """The whole stage, on the machine that holds the model."""
    prepare_worker(threads)
    scoring = load_model(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
    scored_linears(scoring.model, config.parameters)  # an unknown layout must not cost the sampling first
    encoder = make_encoder(config.model, config, config.trust_remote_code)
    refused: list[str] = []
    rows = islice(good_rows(plan_units(config.prompts), encoder, refused), config.num_prompts)
    prompts = [encoded.input_ids[: encoded.response_mask.index(True)] for _, encoded in rows]
    prompts = [prompt[-config.max_prompt_tokens :] for prompt in prompts]
    ends = end_of_turn_ids(scoring.model.config, encoder.tokenizer)
    found = diagonal_fisher(scoring, _sampled(config, scoring, prompts, ends), config.parameters)
    report_refused("prompt", found.num_rows, refused)
    names = ("num_prompts", "max_prompt_tokens", "max_new_tokens", "seed", "columns", "max_length", "too_long")
    provenance = tensor_file.Provenance(
        kind="fisher",
        model_fingerprint=fingerprint(scoring.model),
        parameters=config.parameters,
        data_fingerprint=data_fingerprint(config.prompts),
        num_rows=found.num_rows,
        num_tokens=found.num_tokens,
        options={name: getattr(config, name) for name in names} | {"num_refused": len(refused)},
    )
    tensors = {f"fisher/{name}": tensor.cpu() for name, tensor in found.tensors.items()}
    tensor_file.save(config.output, tensor_file.TensorFile(provenance, tensors))
    return provenance.__dict__


def _sampled(config: FisherConfig, scoring, prompts: list[list[int]], ends: set[int]) -> Iterator[Batch]:
    lengths = [len(prompt) + config.max_new_tokens for prompt in prompts]
    for number, group in enumerate(plan_batches(lengths, config.batch_tokens)):
        batch = sample_responses(
            scoring,
            [prompts[i] for i in group],
            group,
            max_new_tokens=config.max_new_tokens,
            end_ids=ends,
            seed=config.seed + number,
        )
        yield batch.to(scoring.device)
