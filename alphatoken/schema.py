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

# The paper's four terms, `score --terms`: adaptation = direct + causal, stability = direct + causal.
TERMS = ("adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal")

# mask -> train: SCORED, and then
MASKED_EXTRA = [
    pa.field("labels", pa.list_(pa.int32())),  # input_ids[i] where the token is kept, -100 elsewhere
    pa.field("value", pa.list_(pa.float32())),  # adaptation + stability_weight * stability
]
WEIGHTS = pa.field("weights", pa.list_(pa.float32()))  # `mask --weights`: in [0, 1], 1 where kept

# any stage -> quarantine/
QUARANTINE = pa.schema(
    [
        ROW_ID,
        ID,
        pa.field("source", pa.string()),  # the file or data set that the row came from
        pa.field("position", pa.int64()),  # its row number there, from 0
        pa.field("stage", pa.string()),  # encode, score or mask
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
