"""Bugs that tests/test_pretend_cuda.py must see; tests/mutations.py plants them."""
GRAPHS = "support/graphs.py"
ATTENTION = "support/attention.py"
BUGS = [
    ("a host value is frozen into a recording", GRAPHS,
     "width), numbers[1:],", "width), numbers[1:] - numbers[1] + start,"),
    ("an answer is read before it has come", "support/device.py",
     "ready.synchronize() or copy", "copy"),
    ("a CPU tensor in a step", ATTENTION, "torch.arange(length, device=device)",
     "torch.arange(length)"),
    ("an .item() in a step", "llama.py",
     "        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)\n",
     "        x.sum().item()\n"
     "        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)\n"),
    ("a missing warm-up", GRAPHS,
     "            with torch.cuda.stream(self.stream):\n                function(*inputs)\n", ""),
    ("a replay finds the first input", GRAPHS,
     "            static.copy_(tensor, non_blocking=True)\n", "            pass\n"),
    ("a second sync a round", "kangaroo.py", "        choices, finite = sampler.judge(",
     "        logits.sum().item()\n        choices, finite = sampler.judge("),
    ("a mask of another dtype", ATTENTION, "torch.full((), x, dtype=dtype, device=device)",
     "torch.full((), x, device=device)"),
]
