#!/bin/sh
# The whole story on one machine: train a small decoder from scratch, tune exits onto it, export it, decode with fewer
# layers, and see what that costs and saves. The text is the Python source of the interpreter's own standard library.
# Results: runs/quickstart/report/ (table, picture) and runs/quickstart/story.html (tokens coloured by depth).
set -eu
cd "$(dirname "$0")/.."
sh recipes/setup.sh
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out=runs/quickstart
library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
train="$library/[a-l]*.py"
held_out="$library/[s-z]*.py"

echo "== 1/6 tokenizer"
python recipes/quickstart/tokenizer.py --files "$train" --size 1024 --out $out/tokenizer
echo "== 2/6 train a decoder of 8 blocks from scratch"
eetrain fit -c recipes/quickstart/pretrain.yaml --run $out/base --resume auto --data.tokenizer $out/tokenizer --data.train "$train"
eetrain export $out/base --out $out/backbone
echo "== 3/6 tune exits after blocks 2 and 5; the decoder stays as it is"
eetrain fit -c recipes/quickstart/exits.yaml --run $out/exits --resume auto --model.backbone.path $out/backbone \
  --data.tokenizer $out/tokenizer --data.train "$train"
echo "== 4/6 export"
eetrain export $out/exits --out $out/model --policy threshold:0.2
echo "== 5/6 measure policies on held-out files"
eetrain evaluate $out/model --data "$held_out" --prompt_tokens 64 --limit 16 --max_new_tokens 48 --repeats 3 \
  --policies '[never, "always:5", "threshold:0.2", "threshold:0.3", "threshold:0.5", "threshold:0.2,repair=propagate"]' \
  --out $out/report
echo "== 6/6 decode"
eetrain generate $out/model --prompt 'def __init__(self, name):
        """' --policy threshold:0.2 --max_new_tokens 96 --html $out/story.html
echo "see $out/report/frontier.png, $out/report/results.csv and $out/story.html"
