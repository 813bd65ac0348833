"""Bugs that tests/test_train_resume.py must see; tests/mutations.py plants them."""
BUGS = [
    ("the optimizer begins anew", "support/progress.py",
     "        optimizer.load_state_dict(saved)\n", "        pass\n"),
    ("the place in a window is lost", "train_adapter.py",
     "for past, update in enumerate(order[done:]", "for past, update in enumerate(order"),
    ("the log keeps what came after the checkpoint", "support/progress.py",
     'kept += [record] * (record["step"] <= step)', "kept += [record]"),
    ("no checkpoint before the end", "train_adapter.py",
     "late = self.clock.strikes(args.save_every)", "late = False"),
    ("the time of saving counts", "support/progress.py",
     "        self.begin += time.perf_counter() - begin\n", ""),
    ("nobody says what it waits for text", "support/progress.py",
     '            self.state["waited"] += time.perf_counter() - begin\n', ""),
]
