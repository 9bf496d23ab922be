"""What every column of every table means, in a line: for data cards and the docs. Its types are in schema.py."""

import re

import pyarrow as pa

from alphatoken import schema
from alphatoken.schema import BRANCHES

CARRIED_OVER = "carried over from the input"
TARGET_COLUMN = re.compile(r"(mean_|chosen_|rejected_)?adaptation\.(.+)")

MEANINGS = {
    "row_id": "unique number of the row: file index * 10^9 + row number in the file",
    "id": "the input row's own id, else `<file name>:<row number>`",
    "input_ids": "token ids of prompt and response, special tokens included",
    "response_mask": "true where `input_ids[i]` is a response token",
    "truncated": "true where the row was cut at the maximum length",
    "labels": "`input_ids[i]` where the token is trained on, -100 elsewhere (unshifted, as transformers expects)",
    "value": "adaptation + stability_weight * stability; 0 outside the response",
    "weights": "soft weights: 1 where kept, by rank below 1 for dropped response tokens, 0 outside the response",
    "adaptation": "positive: training on the token lowers the validation loss",
    "stability": "positive: training on the token reduces the drift from the reference model",
    "logprobs": "natural log-probability of the token given the tokens before it, by the model itself",
    "num_response_tokens": "number of response tokens; of a pair, of both responses",
    "mean_adaptation": "mean adaptation over the response tokens",
    "mean_stability": "mean stability over the response tokens",
    "mean_loss": "mean loss over the response tokens",
    "adaptation_direct": "the paper's direct term of adaptation",
    "adaptation_causal": "the paper's causal term of adaptation",
    "stability_direct": "the paper's direct term of stability",
    "stability_causal": "the paper's causal term of stability",
    # responses to prompts
    "sample": "number of the response to its prompt, from 0",
    "prompt": "the prompt as the model saw it, through the chat template, special tokens included",
    "messages": "the prompt's conversation; null where the prompt is plain text",
    "answer": "the data set's own response; null where it has none",
    "prompt_ids": "token ids of the prompt",
    "text": "the response, without end-of-turn and other special tokens",
    "token_ids": "token ids of the response as sampled, its end-of-turn token included",
    "finish_reason": "`stop`: the model ended its turn; `length`: cut at the longest response",
    "model_fingerprint": "of the weights of the model that wrote the response",
    # pairs
    "chosen": "the better response",
    "rejected": "the worse response",
    "ids": "token ids of the response",
    "mask": "true where the token is trained on",
    "score": "what the judge gave the response",
    "chosen_sample": "number of the chosen response to its prompt; -1: the data set's own answer",
    "rejected_sample": "number of the rejected response to its prompt; -1: the data set's own answer",
    "ref_logprobs": "the reference model's log-probability of the token",
    "ref_chosen_logps": "the reference model's log-probability of the whole chosen response",
    "ref_rejected_logps": "the reference model's log-probability of the whole rejected response",
    "omega": "beta * sigmoid(-s), how strongly DPO pulls at the pair: values have this factor, and -1 if rejected",
    # windows of rounds
    "row_index": "number of the row among the encoded training rows",
    "weights_step": "the optimizer step whose weights valued the row",
    "age": "steps between those weights and the step that first trains on the row",
    # quarantine
    "source": "the file or data set that the row came from",
    "position": "its row number there, from 0",
    "stage": "the stage that left the row out",
    "reason": "why",
}

SCORED = [*schema.SCORED.names, *schema.TERMS]
OF_STAGE = {  # own columns of the tables that it writes, of rows and of pairs
    "encode": {*schema.ENCODED.names, *schema.ENCODED_PAIRS.names, *schema.ENCODED_PROMPTS.names},
    "score": {*SCORED, *schema.SCORED_PAIRS.names},
    "mask": {
        *SCORED, *schema.SCORED_PAIRS.names, schema.WEIGHTS.name,
        *(field.name for field in (*schema.MASKED_EXTRA, *schema.MASKED_PAIRS_EXTRA)),
    },
    "generate": {*schema.RESPONSES.names},
    "pair": {*schema.PAIRS.names},
}  # fmt: skip


def type_name(field: pa.Field) -> str:
    """`list<int32>`."""
    return str(field.type).replace("element: ", "").replace("item: ", "")


def meaning_in(stage: str, name: str) -> str:
    """Of a column in a table of `stage`: what the stage does not write itself is carried over, whatever its name."""
    return meaning(name) if name in OF_STAGE[stage] or TARGET_COLUMN.fullmatch(name) else CARRIED_OVER


def meaning(name: str) -> str:
    """Of the column `name`; columns of a branch of a pair (`chosen_value`) and of a target (`adaptation.math`) too."""
    if name in MEANINGS:
        return MEANINGS[name]
    branch, _, rest = name.partition("_")
    of_branch = f"{branch} response: " if branch in BRANCHES else ""
    if target := TARGET_COLUMN.fullmatch(name):
        return f"{of_branch}{'mean ' if target[1] == 'mean_' else ''}adaptation for the target `{target[2]}` alone"
    known = MEANINGS.get(rest) if of_branch else None
    return of_branch + known if known else CARRIED_OVER
