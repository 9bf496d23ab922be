"""What in-run training and rounds need beside the model: checked before anything starts, then loaded by each worker."""

import logging
import os
from dataclasses import replace
from typing import Any

import torch

from alphatoken import direction as directions
from alphatoken import manifest as manifests
from alphatoken import tensor_file, token_classes
from alphatoken.architecture import scored_parameters
from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.config import DataOptions
from alphatoken.encode import Encoded, check_source
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel, fingerprint, load_model
from alphatoken.model_encoder import make_encoder
from alphatoken.pair_encode import check_pair_source
from alphatoken.prompts import check_prompt_source, check_room_for_prompt
from alphatoken.rounds_config import RoundsConfig
from alphatoken.row_count import count_rows
from alphatoken.sources import data_fingerprint, plan_units
from alphatoken.suspects import FEW_ROWS, FEW_ROWS_WARNING
from alphatoken.tokenizer import load_config, load_tokenizer
from alphatoken.train_config import BY_LOSS, BY_VALUE, TrainConfig
from alphatoken.verifiers import verifier_source
from pipelines.direction import class_weight_table
from pipelines.encode import EncodePlan, good_rows
from pipelines.encode_folder import encode_folder
from pipelines.refused import Refused, reasons, report_refused

FILES_LENGTH = 2048  # of rows from files, where no --max-length is given
BATCH_TOKENS = 4096  # of a validation batch

logger = logging.getLogger(__name__)


def data_options(config: TrainConfig) -> DataOptions:
    """How files become rows."""
    return DataOptions(columns=config.columns, max_length=config.max_length or FILES_LENGTH)


def check_live(config: TrainConfig) -> dict:
    """Everything about the files that can be known before a model is loaded; returns fingerprints. UserError."""
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    options = data_options(config)
    check_source(plan_units(config.validation), options, tokenizer)
    if config.trains_on_files:
        _check_data(config, options, tokenizer)
    token_classes.check_class_names(config.class_weights)
    _check_layers(config)
    _warn_of_few_rows(config)
    found: dict[str, Any] = {"validation": data_fingerprint(config.validation)}
    if isinstance(config, RoundsConfig) and config.generate:
        text = verifier_source(config.verifier, os.getcwd())
        found |= {"verifier": manifests.fingerprint(text)} if text else {}
    if config.fisher:
        provenance = tensor_file.read_provenance(config.fisher, "fisher")
        if provenance.parameters != config.scored_parameters:
            raise UserError(
                f"{config.fisher} covers --parameters {provenance.parameters}, this run scores "
                f"{config.scored_parameters}; make it again with `alphatoken fisher`"
            )
        found["fisher"] = vars(provenance)
    return found


def _warn_of_few_rows(config: TrainConfig) -> None:
    if config.rule not in (*BY_LOSS, *BY_VALUE):
        return
    rows = count_rows(config.validation, FEW_ROWS)
    if rows is not None and rows < FEW_ROWS:
        logger.warning(FEW_ROWS_WARNING, rows)


def _check_layers(config: TrainConfig) -> None:
    last = config.scored_parameters.partition(":")[2]
    there = load_config(config.model, config.trust_remote_code).get_text_config().num_hidden_layers
    if last and int(last) > there:
        raise UserError(f"--parameters {config.scored_parameters}: the model has only {there} decoder layers")


def _check_data(config: TrainConfig, options: DataOptions, tokenizer: Any) -> None:
    units = plan_units(config.data)
    if config.data_kind == "rows":
        check_source(units, options, tokenizer)
    elif config.data_kind == "pairs":
        check_pair_source(units, options)
    else:
        check_prompt_source(units, config.columns)
        longest_prompt(config)


def encode_data(config: TrainConfig, output: str) -> dict:
    """The training files as a folder of encoded rows; returns its manifest. Ray has to run."""
    options = data_options(config)
    plan = EncodePlan(config.model, config.trust_remote_code, options, kind=config.data_kind)
    if config.data_kind == "prompts":
        plan = replace(plan, longest_prompt=longest_prompt(config))
    return encode_folder(plan_units(config.data), plan, output)


def longest_prompt(config: TrainConfig) -> int:
    """In tokens, so that a response fits behind it. UserError where none would."""
    assert isinstance(config, RoundsConfig)
    context = make_encoder(config.model, data_options(config), config.trust_remote_code).options.max_length
    check_room_for_prompt(config.max_new_tokens, context)
    return context - config.max_new_tokens


def validation_batches(config: TrainConfig, device: torch.device, part: int = 0, parts: int = 1) -> list[Batch]:
    """Every parts-th validation row from `part` on, in batches; all rows where there are fewer than parts."""
    encoder = make_encoder(config.model, data_options(config), config.trust_remote_code)
    refused: list[Refused] = []
    rows = [encoded for _, encoded in good_rows(plan_units(config.validation), encoder.encode, refused, config.columns)]
    if not rows:
        raise UserError(f"no validation row can be used, so there is no direction {reasons(refused)}")
    if part == 0:
        report_refused("validation", len(rows), refused)
    mine = rows[part::parts] if len(rows) >= parts else rows
    return _batches(mine, config.normalization == "sequence", device)


def _batches(rows: list[Encoded], one_by_one: bool, device: torch.device) -> list[Batch]:
    lengths = [len(row.input_ids) for row in rows]
    groups = [[i] for i in range(len(rows))] if one_by_one else plan_batches(lengths, BATCH_TOKENS)
    return [make_batch([rows[i].input_ids for i in g], [rows[i].response_mask for i in g]).to(device) for g in groups]


def gradient_options(config: TrainConfig, device: torch.device) -> directions.GradientOptions:
    """How the validation direction is made."""
    weights = None
    if config.class_weights:
        weights = class_weight_table(config.class_weights, config.model, config.trust_remote_code).to(device)
    return directions.GradientOptions(
        config.scored_parameters, config.normalization, config.positions_for(config.estimator), weights
    )


def load_fisher(config: TrainConfig, device: torch.device) -> tuple[directions.Tensors, directions.Tensors] | None:
    """(Fisher, weights of the reference model) of the scored parameters; None without --fisher."""
    if not config.fisher:
        return None
    file = tensor_file.load(config.fisher, "fisher")
    name = config.reference_model or config.model
    reference: ScoringModel = load_model(name, "float32", torch.device("cpu"), config.trust_remote_code)
    tensor_file.check_matches(file.provenance, config.fisher, fingerprint(reference.model), config.scored_parameters)
    weights = {
        name: parameter.detach().to(device)
        for name, parameter in scored_parameters(reference.model, config.scored_parameters).items()
    }
    return {name: tensor.to(device) for name, tensor in file.group("fisher").items()}, weights
