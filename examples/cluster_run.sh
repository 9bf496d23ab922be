#!/usr/bin/env bash
# From a cluster of spot GPU machines to masked data in a bucket, as commands to read and adapt: it costs money.
# Run it from the repository's root, after the part of cluster.yaml that is marked EDIT is yours.
set -euo pipefail

: "${BUCKET:?set BUCKET to an s3:// address that the nodes can read and write}"
: "${MODEL:=Qwen/Qwen3-0.6B}"
export RAY_API_SERVER_ADDRESS=http://localhost:8265
export RAY_AUTH_MODE=token  # with the token that `ray get-auth-token --generate` made, once

at_the_end() {
    local code=$?
    kill %1 2>/dev/null || true  # the dashboard's tunnel
    if [ "$code" != 0 ]; then
        echo "$0: failed (exit code $code); the cluster may still run, and costs money until" \
            "\`ray down cluster.yaml\`; this script run again goes on from what is finished" >&2
    fi
}
trap at_the_end EXIT

ray up --yes cluster.yaml
ray dashboard cluster.yaml &  # forwards the dashboard by SSH; jobs are submitted through it
until ray job list >/dev/null 2>&1; do sleep 5; done

# --num-actors 1:8 lets Ray add machines up to the maximum in cluster.yaml, and give them back.
# Interrupted? The same command goes on from the shards that are finished.
ray job submit --working-dir . -- python jobs/score.py \
    --model "$MODEL" --data "$BUCKET/train.parquet" --validation "$BUCKET/validation.jsonl" \
    --output "$BUCKET/scored" --num-actors 1:8 --gpus-per-actor 1

# Needs no GPU.
ray job submit --working-dir . -- python jobs/mask.py \
    --input "$BUCKET/scored" --output "$BUCKET/masked"

ray job submit --working-dir . -- python jobs/report.py \
    --input "$BUCKET/masked" --output "$BUCKET/report.html"

# A head without work still costs money.
ray down --yes cluster.yaml
