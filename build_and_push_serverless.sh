#!/usr/bin/env bash
# Builds the image of serverless workers, pushes it, and prints its reference by digest as the last line.
#
#   ./build_and_push_serverless.sh docker.io/me/nanochat-serverless:1 d12    with checkpoint/d12/ in it
#   ./build_and_push_serverless.sh docker.io/me/nanochat-serverless:1        workers pull what they serve
#
# BUILDER, BASE_IMAGE, BUILD_FLAGS and PUSH_FLAGS mean what they mean to `make images`.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: $0 IMAGE [MODEL]" >&2
  exit 2
fi
image=$1
model=${2:-}
cd "$(dirname "${BASH_SOURCE[0]}")"

flags=()
if [ -n "$model" ]; then
  listed=checkpoint/$model/checkpoint.json
  if [ ! -f "$listed" ]; then
    echo "There is no $listed: sft_checkpoint of this model writes it." >&2
    exit 1
  fi
  flags+=(--build-arg "CHECKPOINT=checkpoint/$model")
  # What is inside can be asked of the registry, without pulling.
  for field in model stage fingerprint receipt_sha256; do
    value=$(grep -oE "\"$field\": *\"[A-Za-z0-9._-]+\"" "$listed" | head -n 1 | cut -d '"' -f 4 || true)
    if [ -z "$value" ]; then
      echo "$listed does not name its $field: let sft_checkpoint write it again." >&2
      exit 1
    fi
    flags+=(--label "nanochat.$field=$value")
  done
fi

exec make --silent images DOCKERFILE=Dockerfile.serverless IMAGE="$image" PUSH=1 \
  BUILD_FLAGS="${flags[*]} ${BUILD_FLAGS:-}"
