"""What is looked at before a text, or after one went wrong: does this device keep the assumption
of one shape, and where does a NaN come from? Nothing of the algorithm."""
from llama import KVCache
from support.limits import CHAIN_WIDTH

import torch


@torch.inference_mode()
def rows_are_alike(model, width, start=None):
    """Does this device treat the rows of a step alike, so that one shape means one result?

    `width` tokens run as one step and one by one; logits and cache must be equal bit for bit. At a
    width for trees, once more as two branches whose nodes alternate. Two layers and the LM head
    suffice, because all layers have the same shapes and so run the same kernels. Costs at most 1.5
    × width + 2 steps of two layers; on a GPU, where attention may run another kernel over a long
    view than over a short one, twice that.
    """
    device = model.norm.weight.device
    if start is None:
        block = KVCache.BLOCK[device.type]
        first = (1 - width) % block  # from here on there is room for a whole draft
        starts = (first, first + 8 * block) if device.type == "cuda" else (first,)
        return all(rows_are_alike(model, width, start) for start in starts)
    depth = min(2, len(model.layers))
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(2, depth, 1, start + 2 * width, model.config.num_key_value_heads,
                       model.config.head_dim, generator=generator)
    x = model.embed(torch.randint(model.config.vocab_size, (width,), generator=generator).tolist())

    def step(x, start, cache, parents=None):
        return model.logits(model.step(x, start, cache, 0, depth, parents))[0].clone()

    chain, branches = list(range(width - 1)), [max(0, node - 1) for node in range(width - 1)]
    for parents in (chain, branches) if width > CHAIN_WIDTH else (chain,):
        path = [width - 1]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        end, results = start + len(path), []
        for together in (True, False):
            # One cache at a time: with graphs it is recorded.
            cache = model.new_cache(start + 2 * width, width)
            assert cache.room(start) == width - 1
            cache.rows[:, :depth, :, :seen.shape[3]] = seen.to(device)
            if together:
                logits = step(x, start, cache, parents)[path]
                cache.keep(start, path[1:])
            else:
                logits = torch.stack([step(x[:, node:node + 1], start + i, cache)[0]
                                      for i, node in enumerate(path)])
            results.append((logits, cache.rows[:, :depth, :, :end].clone()))
            del cache
        if not all(map(torch.equal, *results)):
            return False
    return True


@torch.inference_mode()
def find_nonfinite(model, ids):
    """Where NaN or infinity first appears in a pass over ids, in words."""
    x, positions = model.embed(ids), torch.arange(len(ids), device=model.norm.weight.device)
    # With a cache, because attention without a mask turns NaN scores into zeros on a CPU.
    cache = KVCache.zeros(model.config, len(ids), len(ids), x)
    where = ["the embedding"] + [f"layer {i}" for i in range(len(model.layers))]
    for i, name in enumerate(where):
        x = model.run_layers(x, positions, cache, i - 1, i) if i else x
        if not x.isfinite().all():
            return name
    return "the final norm or the LM head"
