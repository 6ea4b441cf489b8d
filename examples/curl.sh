#!/usr/bin/env bash
# A session over plain HTTP: open, append, append as a stream, close.
set -euo pipefail
url="${1:-http://127.0.0.1:30000}/v1/sessions"
ask() { curl --noproxy '*' -fsS -H 'content-type: application/json' "$@"; }

id=$(ask "$url" -d '{"system": "You are terse."}' |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
ask "$url/$id/append" -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "sampling": {"temperature": 0, "max_tokens": 16}}'
echo
ask -N "$url/$id/append" -d '{
  "messages": [{"role": "user", "content": "And of Italy?"}],
  "sampling": {"temperature": 0, "max_tokens": 16}, "stream": true}'
ask -X DELETE "$url/$id"
echo
