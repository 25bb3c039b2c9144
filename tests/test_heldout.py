"""The measures between a teacher and its student, against brute force over full distributions."""

import numpy as np
import pytest
import torch

from data.batch import Batch, Document
from kernels.attention import PackedAttention
from tests.test_invariance import VOCAB, build
from validation import compare


def test_compare_equals_brute_force_however_the_batch_is_cut(monkeypatch):
    model, teacher, _ = build()
    rng = np.random.default_rng(3)
    documents = [
        Document(rng.integers(0, VOCAB, n).astype(np.int32), (np.arange(n) >= p).astype(np.float64))
        for n, p in ((12, 3), (4, 1), (30, 5), (3, 2))
    ]
    want = {}
    for d in documents:
        tokens = torch.from_numpy(d.tokens).long()
        run = lambda m: (
            m(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))
            @ m.head_VD[:VOCAB].t()
        )
        ps, pt = (torch.softmax(run(m).detach(), 1) for m in (model, teacher))
        first = int(d.weights.argmax())
        for t in range(first - 1, len(tokens) - 1):
            s, q = ps[t], pt[t]
            row = {
                "forward_kl": float((q * (q / s).log()).sum()),
                "reverse_kl": float((s * (s / q).log()).sum()),
                "top1": float(s.argmax() == q.argmax()),
                "entropy": float(-(s * s.log()).sum()),
                "teacher_entropy": float(-(q * q.log()).sum()),
            }
            start = max(b for b in (0, 8, 16, 32) if b <= t - first + 1)
            for name, value in (row | {f"forward_kl_from_{start}": row["forward_kl"]}).items():
                want.setdefault(name, []).append(value)
    for elements in (1 << 20, 8 * 3 * VOCAB):
        monkeypatch.setitem(__import__("kernels.chunk").chunk.CHUNK_ELEMENTS, "cpu", elements)
        got = compare(model, teacher, Batch.pack(documents), VOCAB, micro_batch_tokens=33)
        assert got.keys() == want.keys()
        for name, (total, count) in got.items():
            assert count == len(want[name]) and total == pytest.approx(sum(want[name]), rel=1e-9), (
                name
            )
