"""Tokens per second of the generation engine beside `transformers.generate`, in one process on a CPU: python -m bench.generate

A body of 4 layers × 256 with random weights under the full vocabulary of 151,936 (the preset `small`), fp32, prompts of 64 ids,
sampling at temperature 1 without filters. Both systems have the same weights and run in turn; medians of `--repeats`.
  equal lengths   16 sequences × 128 new tokens
  ragged          64 sequences that stop at a random 1/40 of the ids (at most 256 tokens): at once, and in batches of 16.
                  The lengths are those of the engine's sequences; a stopping criterion ends those of transformers at the
                  same lengths, which runs each batch until its last sequence stops.
The engine also records every token's log-prob; transformers does not here (it would keep all scores: 1.2 GB for 16 × 128).
Also timed: the head's product alone at 16 rows, the floor that both share.
"""

import argparse
import statistics
import sys
import time

import torch

PROMPT, EQUAL, MOST, MEAN = 64, 128, 256, 40


def reference(model):
    """transformers' model with the same weights, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    from model.hf import config_to_hf

    transformers.logging.set_verbosity_error()
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**config_to_hf(model.config, None, "float32"))
    ).eval()
    theirs.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    theirs.tie_weights()
    return theirs


def run_ours(model, prompts, limit, stop_ids, batch_size):
    from model.generate import generate

    return [
        len(c.tokens)
        for c in generate(
            model,
            prompts,
            limit,
            stop_ids,
            temperature=1.0,
            seeds=range(len(prompts)),
            batch_size=batch_size,
        )
    ]


def run_theirs(theirs, prompts, lengths, batch_size):
    for lo in range(0, len(prompts), batch_size):
        rows, ends = (
            torch.tensor(prompts[lo : lo + batch_size]),
            torch.tensor(lengths[lo : lo + batch_size]),
        )
        theirs.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=int(ends.max()),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            stopping_criteria=[lambda ids, scores, ends=ends: ids.shape[1] - PROMPT >= ends],
        )


def timed(f, *args):
    began = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - began, result


def compare(name, model, theirs, prompts, limit, stop_ids, batch_size, repeats):
    ours, other = [], []
    for _ in range(repeats):
        seconds, lengths = timed(run_ours, model, prompts, limit, stop_ids, batch_size)
        ours.append(sum(lengths) / seconds)
        if theirs:
            other.append(sum(lengths) / timed(run_theirs, theirs, prompts, lengths, batch_size)[0])
        print(".", end="", file=sys.stderr, flush=True)
    mean = sum(lengths) / len(lengths)
    facts = f"{name:<22}{len(prompts):>4} sequences, {mean:5.1f} tokens on average, {max(lengths):>3} at most, {batch_size:>2} rows:"
    gain = (
        f"{statistics.median(other):8.1f} transformers, ours {statistics.median(a / b for a, b in zip(ours, other)):.2f}x"
        if theirs
        else ""
    )
    print(f"\r{facts}{statistics.median(ours):8.1f} tokens/s {gain}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    from model.checkpoint import build_model
    from model.transformer import PRESETS

    model = build_model(PRESETS["small"], None, device="cpu", seed=0)
    theirs, vocab = reference(model), model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocab, (64, PROMPT), generator=generator).tolist()
    stop_ids = torch.randperm(vocab, generator=generator)[: vocab // MEAN].tolist()
    run_ours(model, prompts[:16], 2, [], 16)
    if theirs:
        run_theirs(theirs, prompts[:16], [2] * 16, 16)
    hidden, logits = torch.randn(16, model.config.hidden_size), torch.empty(16, vocab)
    floor = statistics.median(timed(torch.mm, hidden, model.head_VD.t())[0] for _ in range(9))
    print(
        f"{vocab:,} ids, {args.threads} threads, torch {torch.__version__}; the head's product of 16 rows: {floor * 1e3:.1f} ms, "
        f"so at most {16 / floor:.0f} tokens/s for {len(logits)} rows by that product"
    )
    compare("equal lengths", model, theirs, prompts[:16], EQUAL, [], 16, args.repeats)
    compare("ragged", model, theirs, prompts, MOST, stop_ids, 64, args.repeats)
    compare("ragged, refilled", model, theirs, prompts, MOST, stop_ids, 16, args.repeats)


if __name__ == "__main__":
    main()
