"""The measures between a teacher and its student, against brute force over full distributions."""

import numpy as np
import pytest
import torch

from data.batch import Document
from kernels import chunk
from kernels.attention import PackedAttention
from tests.test_invariance import VOCAB, build
from validation import compare


def distributions(model, tokens):
    """[T, V] next-token probabilities."""
    positions = torch.arange(len(tokens))
    hidden_TD = model(tokens, positions, PackedAttention([len(tokens)]))
    return torch.softmax((hidden_TD @ model.head_VD[:VOCAB].t()).detach(), 1)


def brute_force(model, teacher, documents):
    """measure -> its values at all trained positions."""
    values = {}
    for d in documents:
        tokens = torch.from_numpy(d.tokens).long()
        student_TV, teacher_TV = distributions(model, tokens), distributions(teacher, tokens)
        first, sizes = int(d.weights.argmax()), []
        for t in range(first - 1, len(tokens) - 1):
            s, q = student_TV[t], teacher_TV[t]
            row = {
                "forward_kl": float((q * (q / s).log()).sum()),
                "reverse_kl": float((s * (s / q).log()).sum()),
                "top1": float(s.argmax() == q.argmax()),
                "entropy": float(-(s * s.log()).sum()),
                "teacher_entropy": float(-(q * q.log()).sum()),
            }
            start = max(b for b in (0, 8, 16, 32) if b <= t - first + 1)
            for kl in ("forward_kl", "reverse_kl"):
                row[f"{kl}_from_{start}"] = row[kl]
            likeliest = (set(sorted(range(VOCAB), key=lambda v: -p[v])[:16]) for p in (s, q))
            both = sorted(set.intersection(*likeliest))
            row["overlap"] = len(both) / 16
            row["overlap_mass"], row["overlap_teacher_mass"] = (
                float(s[both].sum()),
                float(q[both].sum()),
            )
            sizes.append(float(((s - q) ** 2).sum().sqrt()))
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        for count in range(1, len(sizes) + 1):
            if sum(sorted(sizes)[-count:]) >= sum(sizes) / 2:
                values.setdefault("half_gradient", []).append(count / len(sizes))
                break
    return values


def test_compare_equals_brute_force_however_the_batch_is_cut(monkeypatch):
    model, teacher, _ = build()
    rng = np.random.default_rng(3)
    documents = []
    for n, prompt in ((12, 3), (4, 1), (30, 5), (3, 2)):
        tokens = rng.integers(0, VOCAB, n).tolist()
        documents.append(Document.of_completion(tokens[:prompt], tokens[prompt:]))
    want = brute_force(model, teacher, documents)
    for elements in (1 << 20, 8 * 3 * VOCAB):
        monkeypatch.setitem(chunk.CHUNK_ELEMENTS, "cpu", elements)
        got = compare(model, teacher, documents, VOCAB, micro_batch_tokens=33)
        assert got.keys() == want.keys()
        for name, (total, count) in got.items():
            assert count == len(want[name]), name
            assert total == pytest.approx(sum(want[name]), rel=1e-9), name
