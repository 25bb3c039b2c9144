"""Decoding on a GPU: is its attention right, how near the copy ceiling, and the whole engine beside `transformers`. One command, a few minutes:

    python -m bench.decode --json decode.json            # --no-engine: the kernel alone

First correctness (kernels/decode_attention.py), with every assembler at hand: against fp64 on ragged lengths and several tokens a step, a row
alone against the same row in a batch to the bit, a CUDA graph whose lengths change under it, slots of NaN beyond the ends, 100 repeats to the bit.
Then a step's attention of 24 layers, each with its own cache (one layer's would stay in the L2 cache), as one CUDA graph: batch 64 and 256 at
1,024 tokens, 14 query heads on 2 key-value heads of dimension 64 (and 12 on 2 of 128). Bytes are those of the keys and values that a step must read;
the ceiling is a device copy, timed beside. Last, 256 sequences × 512 new tokens of a Qwen2.5-0.5B with random weights, prompts of 64 ids,
sampled at temperature 1. Exit code 1: a check failed; 2: no GPU.
"""

import argparse
import copy
import json
import sys
import time

import torch
import torch.nn.functional as F

from bench import gpu
from bench.attention import HEADS, LIMIT
from kernels import backend
from kernels.decode_attention import decode_attention, decode_reference

EDGES = [0, 1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024]


def cache(lengths, size, slots, steps, device, empty=float("nan")):
    """Queries, keys, values and lengths; `empty` lies beyond the ends."""
    g = torch.Generator(device=device).manual_seed(len(lengths))
    dtype, (heads, kv_heads) = (
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        HEADS[size],
    )
    make = lambda *shape: torch.randn(*shape, generator=g, device=device, dtype=dtype)
    kv, length_B = (
        make(2, len(lengths), kv_heads, slots, size),
        torch.tensor(lengths, device=device),
    )
    beyond_BS = torch.arange(slots, device=device) >= length_B.unsqueeze(1)
    kv.masked_fill_(beyond_BS[None, :, None, :, None], empty)
    return make(len(lengths), steps, heads, size), *kv, length_B


def exact(q, k, v, length_B):
    """From the definition in fp64: a sequence and a token at a time."""
    o, group, steps = torch.zeros_like(q, dtype=torch.float64), q.shape[2] // k.shape[1], q.shape[1]
    for b, length in enumerate(length_B.tolist()):
        for i in range(steps):
            seen = length - steps + i + 1
            if seen > 0:
                keys, values = (x[b, :, :seen].double().repeat_interleave(group, 0) for x in (k, v))
                p = (
                    torch.einsum("he,hse->hs", q[b, i].double(), keys) * q.shape[3] ** -0.5
                ).softmax(1)
                o[b, i] = torch.einsum("hs,hse->he", p, values)
    return o


def graphed(f, device):
    """f as a CUDA graph (itself on a CPU): (replay, what f returned)."""
    if device.type != "cuda":
        out = f()
        return (lambda: [a.copy_(b) for a, b in zip(out, f(), strict=True)]), out
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        f()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()
    return graph.replay, out


def check(device, size, dry):
    lengths = EDGES[:5] if dry else EDGES
    errors, slots = {}, 80 if dry else 1100
    for steps in (1, 2, 8):
        case = cache(lengths, size, slots, steps, device)
        errors[f"steps_{steps}"] = gpu.relative_error(decode_attention(*case), exact(*case))
    q, k, v, length_B = cache(lengths, size, slots, 1, device)
    whole = decode_attention(q, k, v, length_B)
    cut = slots - 76 if not dry else slots  # a cache of another capacity
    alone = [
        decode_attention(
            q[i : i + 1], k[i : i + 1, :, :cut], v[i : i + 1, :, :cut], length_B[i : i + 1]
        )
        for i in range(len(lengths))
    ]
    apart = torch.equal(torch.cat(alone), whole)
    replay, (out,) = graphed(lambda: (decode_attention(q, k, v, length_B),), device)
    followed = []
    for change in (lambda: length_B.copy_(length_B.clamp(min=1) - 1), lambda: length_B.zero_()):
        change()  # the graph reads the lengths on the device
        replay()
        followed.append(torch.equal(out, decode_attention(q, k, v, length_B)))
    empty = not out.any().item()
    case = cache([1024] * 64 if not dry else [40] * 2, size, 1100 if not dry else 80, 1, device)
    unequal = gpu.unequal_repeats(lambda: (decode_attention(*case),), 2 if dry else 100)
    right = (
        max(errors.values()) <= LIMIT
        and all(followed)
        and empty
        and unequal == 0
        and (apart or dry)
    )
    return dict(
        E=size,
        **errors,
        alone_equals_batch=apart,
        graph_follows=all(followed),
        empty_is_zero=empty,
        unequal_repeats=unequal,
        right=right,
    )


def checks(device, dry):
    rows = []
    for size in HEADS:
        row, why = gpu.attempt(lambda: check(device, size, dry))
        rows.append(row or dict(E=size, failed=why, right=False))
    return rows


# --- speed ---------------------------------------------------------------------------------------------------------


def copy_ceiling(device, dry):
    """Bytes per second of a device copy, read and written."""
    source = torch.empty(1 << (20 if dry else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / gpu.milliseconds(lambda: target.copy_(source), device) * 1e3


def masked_sdpa(q, k, v, length_B):
    """What a user has in PyTorch: the whole capacity under a mask."""
    seen = torch.arange(k.shape[2], device=k.device) < length_B[:, None, None, None]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=seen, enable_gqa=True
    ).transpose(1, 2)


def speeds(device, dry):
    ceiling, rows = copy_ceiling(device, dry), []
    layers, context = (2, 40) if dry else (24, 1024)
    for size in HEADS:
        for batch in (2, 3) if dry else (64, 256):
            cases = [
                cache([context] * batch, size, context + 64, 1, device, empty=0.0)
                for _ in range(layers)
            ]
            needed = 2 * cases[0][1].element_size() * batch * HEADS[size][1] * context * size
            for name, attend in (
                ("srlm", decode_attention),
                ("reference", decode_reference),
                ("masked sdpa", masked_sdpa),
            ):

                def measure(attend=attend, cases=cases):
                    replay, _ = graphed(lambda: tuple(attend(*case) for case in cases), device)
                    return gpu.milliseconds(replay, device) / layers

                ms, why = gpu.attempt(measure)
                rate = needed / ms * 1e3 if ms else None
                figures = dict(
                    microseconds_a_layer=ms and ms * 1e3,
                    bytes_per_s=rate,
                    of_copy=rate and rate / ceiling,
                )
                rows.append(dict(E=size, batch=batch, way=name) | figures | dict(note=why))
            del cases
    return dict(copy_bytes_per_s=ceiling, decode=rows)


# --- the whole engine ----------------------------------------------------------------------------------------------


def wall(f, device):
    began = time.perf_counter()
    result = f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def engine(device, dry):
    """New tokens per second of our engine and of `transformers` on the same weights; nothing stops early."""
    from bench.generate import reference
    from model.checkpoint import build_model
    from model.generate import Engine, generate
    from model.transformer import PRESETS

    config, n, new = (PRESETS["tiny"], 3, 6) if dry else (PRESETS["qwen2.5-0.5b"], 256, 512)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(
        config, None, device=device, seed=0, weight_dtype=dtype, compute_dtype=dtype
    )
    compiled = copy.deepcopy(model)
    if device.type == "cuda":
        compiled.compile_blocks()
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (n, 64), generator=g).tolist()
    ours = lambda model, m: sum(
        len(c.tokens)
        for c in generate(model, prompts, m, [], temperature=1.0, seeds=range(n), batch_size=n)
    )
    engines = Engine(model), Engine(compiled)
    runs = {"srlm": lambda m: ours(engines[0], m)} | (
        {"srlm, compiled": lambda m: ours(engines[1], m)} if device.type == "cuda" else {}
    )
    theirs, why = gpu.attempt(lambda: reference(model).to(device, dtype))
    if theirs:
        rows = torch.tensor(prompts, device=device)
        sample = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
        generated = lambda m: theirs.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=m, **sample
        )
        runs["transformers generate"] = lambda m: generated(m)[:, 64:].numel()
        if device.type == "cuda" and hasattr(theirs, "generate_batch"):
            from transformers import GenerationConfig

            settings = lambda m: GenerationConfig(max_new_tokens=m, eos_token_id=-1, **sample)
            batch = lambda m: theirs.generate_batch(
                inputs=prompts, generation_config=settings(m), progress_bar=False
            )
            runs["transformers continuous batching"] = lambda m: sum(
                len(r.generated_tokens) for r in batch(m).values()
            )
    found = [] if theirs else [dict(way="transformers", tokens_per_s=None, seconds=None, note=why)]
    for name, f in runs.items():
        got, why = gpu.attempt(lambda: (f(4), wall(lambda: f(new), device))[1])
        seconds, tokens = got or (None, None)
        if got and tokens != n * new:  # a way that gave up on the way has no rate
            seconds, tokens, why = None, None, f"{tokens:,} tokens of {n * new:,}"
        found.append(
            dict(way=name, tokens_per_s=seconds and tokens / seconds, seconds=seconds, note=why)
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.decode")
    parser.add_argument("--json", default="decode.json")
    parser.add_argument(
        "--only-check", action="store_true", help="checks alone; the last line is their record"
    )
    parser.add_argument("--no-engine", action="store_true", help="leave the whole engine out")
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = gpu.device_or_exit(args.dry)
    backend.use("torch" if args.dry else "triton")
    record = gpu.checked(device, checks(device, args.dry))
    if args.only_check:
        print(json.dumps(record))
        return 0 if record["right"] else 1
    with gpu.kept(record, args.json):
        record |= speeds(device, args.dry)
        print(
            f"copy ceiling {record['copy_bytes_per_s'] / 1e12:.2f} TB/s\n{gpu.table(record['decode'])}"
        )
        if not args.no_engine:
            backend.use("torch" if args.dry else "auto")  # the engine chooses by itself
            found, why = gpu.attempt(lambda: engine(device, args.dry))
            record["engine"] = found or [
                dict(way="srlm", tokens_per_s=None, seconds=None, note=why)
            ]
            print(gpu.table(record["engine"]))
        late = args.dry or gpu.late(6)
        record["other_assemblers"] = (
            {}
            if late
            else gpu.tell_assemblers(gpu.checked_with_other_assemblers("bench.decode", 60))
        )
    return gpu.finish(record, args.json)


if __name__ == "__main__":
    sys.exit(main())
