#!/usr/bin/env bash
# Trains the adapters of these cards and writes the cards: make.sh DATA MINILM TWELVE WORK [CARD...]
# DATA has one folder per data set, as docs/quality.md describes. MINILM and TWELVE are folders of base models. The
# adapters stay in WORK. Without a CARD, all cards are made.
set -euo pipefail
data=$1 minilm=$2 twelve=$3 work=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
cards=("$@")
# A mistyped name would make nothing, and say nothing.
known=$(sed -n 's/^make \([^ ]*\) .*/\1/p' "$0")
for card in "$@"; do
  if ! grep -qxF -- "$card" <<<"$known"; then
    echo "There is no card '$card'. The cards are:" $known >&2
    exit 2
  fi
done
wanted() { [ ${#cards[@]} -eq 0 ] || [[ " ${cards[*]} " == *" $1 "* ]]; }

# make NAME PUBLIC_NAME_OF_THE_BASE BASE OPTIONS_OF_TRAIN...
make() {
  local name=$1 public=$2 base=$3
  shift 3
  wanted "$name" || return 0
  peft-sensi train "$base" "$@" --out "$work/$name" --overwrite
  # The card names the base as it is called on the Hub, not a folder of this machine.
  sed -i "s|\"base_model_name_or_path\": \".*\"|\"base_model_name_or_path\": \"$public\"|" "$work/$name/adapter_config.json"
  peft-sensi card "$work/$name" --base "$base" --license apache-2.0 --repo "your-name/$name" --out "$here/$name"
}

mini=sentence-transformers/all-MiniLM-L6-v2
trec=(--data "$data/trec6/train.tsv" --validation "$data/trec6/test.tsv" --epochs 4)
sst=(--data "$data/sst2/train.tsv" --validation "$data/sst2/dev.tsv" --max-rows 16000 --epochs 1)
cola=(--data "$data/cola/train.tsv" --validation "$data/cola/dev.tsv")
wnut=(--data "$data/wnut17/train.conll" --validation "$data/wnut17/dev.conll" --task words)

make minilm-trec6-half "$mini" "$minilm" "${trec[@]}" --budget 0.5 --lr 1.5e-4
make minilm-trec6-one-percent "$mini" "$minilm" "${trec[@]}" --trainable 0.01
make minilm-sst2-quarter "$mini" "$minilm" "${sst[@]}" --budget 0.25 --lr 3e-4
make minilm-cola-half-late "$mini" "$minilm" "${cola[@]}" --budget 0.5 --late
make minilm-wnut17-half "$mini" "$minilm" "${wnut[@]}" --budget 0.5 --lr 3e-4
make twelve-trec6-half cnmoro/portuguese-multilingual-e5-small "$twelve" "${trec[@]}" --budget 0.5 --lr 1.5e-4
