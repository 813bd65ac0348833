"""Bugs that tests/test_gpu_bench.py must see; tests/mutations.py plants them."""
GPU = "bench/gpu.py"
BUGS = [
    ("a part that is done is done again", GPU,
     "if is_done(part, results_for(args, device, dtype)):", "if False:"),
    ("a training's option is mistyped", GPU, '"--updates", "2", "--batches", "1"',
     '"--updates", "2", "--batch", "1"'),
    ("acceptance is off by a token", GPU, "self.alpha ** (drafted + 1)", "self.alpha ** drafted"),
    ("a part in a process of its own is another", GPU, '"--parts", part]', '"--parts", "model"]'),
]
