# A GPU that is at hand for a quarter of an hour: two calls, from the repository's root.
#
#     OUT=found bash bench/quarter_hour.sh first     four minutes: shapes, kernels, choices
#     OUT=found bash bench/quarter_hour.sh second    three: tests and answers, then 7B once more
#
# OUT is the folder for what they find. The `choices` of the first say whether the second is to
# measure with COMPILE=--compile. Each command has a limit of seconds, and bench/gpu.py keeps the
# rows that it had by then.
export PYTHONUNBUFFERED=1 OUT=${OUT:-found}
mkdir -p "$OUT"

limited() {
    begin=$SECONDS
    timeout -k 5 "$@" 2>&1
    echo "== $((SECONDS - begin)) s: ${*:2}"
}

measure() {  # what is timed, and so one after another
    cp -n docs/performance.md "$OUT/page.md"
    limited "$1" python3 bench/gpu.py --out "$OUT/$2.json" --page "$OUT/page.md" "${@:3}"
}

case $1 in
first)
    export OMP_NUM_THREADS=4
    nvidia-smi -q -d CLOCK,TEMPERATURE > "$OUT/before.log"
    measure 110 gpu --parts shape-7B
    limited 75 python3 bench/kernels.py --out "$OUT/kernels.json"
    measure 100 gpu --parts choices-7B
    measure 45 gpu --parts shape-135M
    measure 50 gpu --parts choices-135M
    nvidia-smi -q -d CLOCK,TEMPERATURE > "$OUT/after.log"
    ;;
second)
    export OMP_NUM_THREADS=1
    python3 models/make_stories.py --prompts "$OUT/prompts.txt" --count 20
    answers="--model models/stories --questions $OUT/prompts.txt --answers 20 --new-tokens 128"
    # Side by side: their times do not count.
    for part in tests equal-bfloat16 equal-float16 equal-float32; do
        cp docs/performance.md "$OUT/$part.md"
        timeout 170 python3 bench/gpu.py --parts $part $answers $COMPILE \
            --out "$OUT/$part.json" --page "$OUT/$part.md" > "$OUT/$part.log" 2>&1 &
    done
    wait
    tail -n 3 "$OUT"/*.log
    measure 90 ships --parts shape-7B --contexts 512 $COMPILE
    ;;
*)
    echo "usage: OUT=found bash bench/quarter_hour.sh first|second" >&2
    exit 2
    ;;
esac
