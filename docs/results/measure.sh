# What measured the figures of docs/results.md, from the repository's root, one part after another
# on an idle machine. It needs SmolLM2 in smollm2/ (docs/models.md), Spec-Bench's question.jsonl (every
# other question of it), and ShareGPT's English conversations as sharegpt.jsonl.
set -e
METHODS=kangaroo,tree,lookup,sps,lookahead,medusa,medusa-tree,rest
CHOSEN=lookup,sps,lookahead,medusa,medusa-tree,rest  # the others have what their config.json says

# Prompts, datastores and heads. Settings are chosen on prompts that no figure comes from.
python models/make_stories.py --text stories.jsonl --count 9000
python models/make_stories.py --prompts all.txt --count 60
head -12 all.txt > other.txt
tail -40 all.txt > prompts.txt
sed -n '39p;75p;115p;155p;195p;235p' question.jsonl > other.jsonl
python drafters/rest.py --model models/stories --data stories.jsonl --out stories_store.safetensors
python drafters/rest.py --model smollm2 --data sharegpt.jsonl --out sharegpt_store.safetensors
python drafters/train_medusa.py --model smollm2 --data sharegpt.jsonl --heads 3 --vocabulary 8192 \
    --updates 300 --batches 1 --batch-tokens 2048 --max-length 512 --window 128 --passes 3 \
    --lr 2e-3 --warmup 20 --eval-every 100 --eval-documents 16 --eval-prompts 0 --out heads

# How fast is it, task by task?
python bench/choose.py --model models/stories --prompts other.txt --each 4 --skip 0 \
    --new-tokens 96 --datastore stories_store.safetensors --methods $CHOSEN --out settings.json
for row in "--out docs/results/spec_bench-stories.json" \
    "--temperature 0.8 --out docs/results/spec_bench-stories-sampled.json"; do
    python bench/spec_bench.py --model models/stories --questions prompts.txt --new-tokens 128 \
        --datastore stories_store.safetensors --methods $METHODS --settings settings.json $row
done
OTHERS="--adapter models/smollm2-135m --heads heads --datastore sharegpt_store.safetensors"
python bench/choose.py --model smollm2 $OTHERS --prompts other.jsonl --each 1 --skip 0 \
    --new-tokens 128 --methods $CHOSEN --out settings-smollm2.json
python bench/spec_bench.py --model smollm2 $OTHERS --questions question.jsonl --limit 10 \
    --new-tokens 128 --methods $METHODS --settings settings-smollm2.json \
    --out docs/results/spec_bench-smollm2.json

# What does reproducible sampling give up?
python bench/rules.py --model models/stories --adapter models/stories/adapter \
    --prompts prompts.txt --each 24 --new-tokens 120

# Who is exact? (pip install transformers)
export OMP_NUM_THREADS=1
python bench/exactness.py --model models/stories --adapter models/stories/adapter \
    --questions prompts.txt --limit 16 --new-tokens 60 --out docs/results/exactness-stories.json
unset OMP_NUM_THREADS
python bench/exactness.py --model smollm2 --adapter models/smollm2-135m \
    --questions question.jsonl --limit 2 --new-tokens 128 --dtypes float32 bfloat16 \
    --out docs/results/exactness-smollm2.json

# Exit layers, adapters, thresholds, positions, confidence
python models/make_stories.py --text stories.jsonl --count 2500
python models/make_stories.py --prompts all.txt --count 100
tail -20 all.txt > prompts.txt
python bench/ablations.py --model models/stories --data stories.jsonl --questions prompts.txt \
    --limit 20 --tokens 150000 --passes 2 --adapter models/stories/adapter --lr 2e-3 \
    --out docs/results/ablations-stories.json
head -6200 sharegpt.jsonl > sharegpt_first.jsonl
python bench/ablations.py --model smollm2 --data sharegpt_first.jsonl --questions question.jsonl \
    --skip 14 --limit 2 --tokens 40000 --vocabulary 8192 --adapter models/smollm2-135m \
    --out docs/results/ablations-smollm2.json

# The price of a row, for lossless.md and trees.md (with transformers installed)
python bench/speed.py --model smollm2 --widths 4 8 16 32
python bench/speed.py --model smollm2 --widths 4 8 --dtype float32
python bench/speed.py --model models/stories --widths 4 8 16 32
