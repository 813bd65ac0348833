"""Bugs that tests/test_train_processes.py must see; tests/mutations.py plants them."""
PROCESSES = "support/processes.py"
BUGS = [
    ("gradients are not added up", PROCESSES, "            dist.all_reduce(whole)\n", ""),
    ("an evaluation ends the processes that wait", PROCESSES, "dist.barrier(self.slow_group)",
     "dist.barrier()"),
    ("a process whose peer has ended shows a traceback", PROCESSES,
     "if not any(words in str(e).lower() for words in ENDED):", "if True:"),
    ("all processes take the same batches", "train_adapter.py", "mine = update[rank::ranks]",
     "mine = update[::ranks]"),
]
