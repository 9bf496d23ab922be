"""The row contract of every stage boundary, as Arrow schemas. One place, one line per column.

Per-token columns have the length of `input_ids`. Entry i is about *predicting* `input_ids[i]` (unshifted, like
`labels` in transformers): the loss that it describes is computed from the hidden state at position i - 1.
Outside the response every per-token value is zero (`labels`: -100).
"""

import pyarrow as pa

IGNORE_INDEX = -100

ROW_ID = pa.field("row_id", pa.int64())  # unique in a run: file index * 10**9 + row number in the file
ID = pa.field("id", pa.string())  # the input row's own id, else "<file name>:<row number>"

# encode -> score
ENCODED = pa.schema(
    [
        ROW_ID,
        ID,
        pa.field("input_ids", pa.list_(pa.int32())),  # prompt and response, special tokens included
        pa.field("response_mask", pa.list_(pa.bool_())),  # true where input_ids[i] is a response token
        pa.field("truncated", pa.bool_()),  # true where the row was cut at max_length
    ]
)

# score -> mask. The input's own columns (`--keep-columns`) follow, as strings.
SCORED = pa.schema(
    [
        *ENCODED,
        pa.field("adaptation", pa.list_(pa.float32())),  # > 0: training on the token lowers validation loss
        pa.field("stability", pa.list_(pa.float32())),  # > 0: training on the token reduces Fisher-drift
        pa.field("logprobs", pa.list_(pa.float32())),  # log p(input_ids[i] | input_ids[:i]), natural log
        pa.field("num_response_tokens", pa.int32()),
        pa.field("mean_adaptation", pa.float32()),  # means over the response tokens
        pa.field("mean_stability", pa.float32()),
        pa.field("mean_loss", pa.float32()),
    ]
)

# Where targets have names (`score --validation math=FILE code=FILE`): `adaptation` is the sum of `adaptation.math` and
# `adaptation.code`, which follow as columns, and so do `mean_adaptation.math` ... See targets.py.

# The paper's four terms, `score --terms`: adaptation = direct + causal, stability = direct + causal.
TERMS = ("adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal")

# mask -> train: SCORED, and then
MASKED_EXTRA = [
    pa.field("labels", pa.list_(pa.int32())),  # input_ids[i] where the token is kept, -100 elsewhere
    pa.field("value", pa.list_(pa.float32())),  # adaptation + stability_weight * stability
]
WEIGHTS = pa.field("weights", pa.list_(pa.float32()))  # `mask --weights`: in [0, 1], 1 where kept

# Preference pairs. `prompt_ids + chosen_ids` is a row that a model sees; per-token columns of a branch have the length
# of its ids, and entry i is about predicting `chosen_ids[i]`. Every token of a branch is response.
BRANCHES = ("chosen", "rejected")

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))

# generate -> pair. All samples of a prompt lie together, in one shard.
RESPONSES = pa.schema(
    [
        ROW_ID,  # row number of the prompt * samples + sample
        ID,  # the prompt's id, the same for all its samples
        pa.field("sample", pa.int32()),  # from 0
        pa.field("prompt", pa.string()),  # as the model saw it: through the chat template, special tokens included
        pa.field("messages", MESSAGES),  # the prompt's conversation; null where the prompt is plain text
        pa.field("answer", pa.string()),  # the data set's own response; null where it has none
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("text", pa.string()),  # the response, without end-of-turn and other special tokens
        pa.field("token_ids", pa.list_(pa.int32())),  # the response as sampled, its end-of-turn token included
        pa.field("logprobs", pa.list_(pa.float32())),  # of the model itself, before temperature and cuts; may be null
        pa.field("finish_reason", pa.string()),  # stop: the model ended its turn; length: cut at max_new_tokens
        pa.field("model_fingerprint", pa.string()),
    ]
)

# pair -> score
PAIRS = pa.schema(
    [
        ROW_ID,  # row number of the prompt * pairs per prompt + number of the pair
        ID,
        pa.field("prompt", pa.string()),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("messages", MESSAGES),  # the prompt's conversation; null where the prompt is plain text
        pa.field("prompt_ids", pa.list_(pa.int32())),  # with these, score uses the very tokens that were sampled
        pa.field("chosen_ids", pa.list_(pa.int32())),
        pa.field("rejected_ids", pa.list_(pa.int32())),
        pa.field("chosen_score", pa.float64()),  # the judge's
        pa.field("rejected_score", pa.float64()),
        pa.field("chosen_sample", pa.int32()),  # sample number; -1: the data set's own answer
        pa.field("rejected_sample", pa.int32()),
    ]
)

ENCODED_PAIRS = pa.schema(
    [
        ROW_ID,
        ID,
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("chosen_ids", pa.list_(pa.int32())),
        pa.field("rejected_ids", pa.list_(pa.int32())),
        pa.field("truncated", pa.bool_()),  # true where a response was cut at max_length
    ]
)

# encode -> rounds that generate: prompts with a checkable answer
ENCODED_PROMPTS = pa.schema(
    [
        ROW_ID,
        ID,
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("answer", pa.string()),  # the data set's own response: what a verifier compares with
        pa.field("truncated", pa.bool_()),  # never: a prompt that is too long is refused
    ]
)


def _per_branch(*names: str, kind: pa.DataType) -> list[pa.Field]:
    return [pa.field(f"{branch}_{name}", kind) for branch in BRANCHES for name in names]


# score -> mask. Values have DPO's sign and weight: omega times a chosen token's SFT value, -omega times a rejected's
SCORED_PAIRS = pa.schema(
    [
        *ENCODED_PAIRS,
        *_per_branch("adaptation", "stability", "logprobs", "ref_logprobs", kind=pa.list_(pa.float32())),
        pa.field("ref_chosen_logps", pa.float64()),  # the reference's log-probability of the whole response
        pa.field("ref_rejected_logps", pa.float64()),
        pa.field("omega", pa.float32()),  # beta * sigmoid(-s): how strongly DPO pulls at the pair
        pa.field("num_response_tokens", pa.int32()),  # of both branches together, as the means
        pa.field("mean_adaptation", pa.float32()),
        pa.field("mean_stability", pa.float32()),
        pa.field("mean_loss", pa.float32()),
    ]
)

# mask -> train: SCORED_PAIRS, and then
MASKED_PAIRS_EXTRA = [
    *_per_branch("mask", kind=pa.list_(pa.bool_())),  # true where the token is trained on
    *_per_branch("value", kind=pa.list_(pa.float32())),  # adaptation + stability_weight * stability
]

# windows of rounds -> trainer: masked rows or pairs, and then
WINDOW_EXTRA = [
    pa.field("row_index", pa.int64()),  # of the row among the encoded training rows
    pa.field("weights_step", pa.int64()),  # the step whose weights valued it
    pa.field("age", pa.int32()),  # steps between those weights and the step that first trains on it
]

# any stage -> quarantine/
QUARANTINE = pa.schema(
    [
        ROW_ID,
        ID,
        pa.field("source", pa.string()),  # the file or data set that the row came from
        pa.field("position", pa.int64()),  # its row number there, from 0
        pa.field("stage", pa.string()),  # the stage that left the row out
        pa.field("reason", pa.string()),
    ]
)

# Beside the shards: what each token id is, so that mask and show need no tokenizer.
TOKEN_CLASSES = pa.schema(
    [
        pa.field("token_id", pa.int32()),
        pa.field("text", pa.string()),  # the token as it reads in running text
        pa.field("token_class", pa.dictionary(pa.int8(), pa.string())),
    ]
)
