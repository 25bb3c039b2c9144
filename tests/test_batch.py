"""Packing: nothing lost, nothing shifted, nothing crossing documents."""

import numpy as np
import pytest
import torch

from data.batch import WEIGHTINGS, Batch, Document, constant_length
from errors import UserError


def doc(*tokens, prompt=1, **fields):
    weights = np.array([0.0] * prompt + [1.0] * (len(tokens) - prompt), np.float32)
    return Document(
        np.array(tokens, np.int32), weights, {k: np.array(v, np.float64) for k, v in fields.items()}
    )


def test_targets_are_the_next_token_of_the_same_document():
    b = Batch.pack([doc(1, 2, 3, 4, prompt=2), doc(5, 6)])
    assert b.tokens_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert b.positions_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert b.cu_seqlens.tolist() == [0, 4, 6]
    assert b.target_T.tolist()[:3] == [2, 3, 4] and b.target_T[4] == 6
    assert b.weight_T.tolist() == [0, 1, 1, 0, 1, 0]
    assert b.rows_N.tolist() == [1, 2, 4] and b.normaliser == 3
    assert b.select(b.target_T).tolist() == [3, 4, 6]


def test_fields_move_with_their_tokens():
    b = Batch.pack([doc(1, 2, 3, advantage=[9, 0.5, -1]), doc(4, 5)])
    assert b.fields["advantage"].tolist() == [0.5, -1, 0, 0, 0]


@pytest.mark.parametrize("micro", [7, 11, 64])
def test_split_keeps_every_document_whole_and_wastes_little(micro):
    rng = np.random.default_rng(0)
    documents = [doc(*rng.integers(1, 99, n)) for n in rng.integers(2, 8, 200)]
    batch = Batch.pack(documents)
    parts = batch.split(micro)
    assert sorted(tuple(d.tokens) for p in parts for d in p.documents) == sorted(
        tuple(d.tokens) for d in documents
    )
    assert all(len(p.tokens_T) <= micro for p in parts)
    assert sum(p.normaliser for p in parts) == batch.normaliser
    assert (
        len(parts) <= 11 / 9 * np.ceil(sum(map(len, documents)) / micro) + 1
    )  # the known bound of first-fit decreasing


def test_sequence_mean_gives_every_sequence_the_weight_one():
    b = Batch.pack(
        map(WEIGHTINGS["sequence"], [doc(1, 2, 3, 4, 5), doc(6, 7), doc(8, 9, prompt=2)])
    )
    assert b.normaliser == pytest.approx(2)
    assert b.weight_T.tolist() == [0.25] * 4 + [0, 1, 0, 0, 0]


def test_a_document_too_long_and_an_empty_batch():
    with pytest.raises(UserError, match="micro_batch_tokens=4"):
        Batch.pack([doc(*range(5))]).split(4)
    empty = Batch.pack([])
    assert empty.split(8) == [] and empty.normaliser == 0 and empty.tokens_T.dtype == torch.long


def test_a_masked_document_counts_in_no_divisor():
    """As if it had not been drawn: token mean, sequence mean and Dr. GRPO's constant alike."""
    rest = [doc(1, 2, 3, 4, prompt=2), doc(5, 6)]
    masked = Document(np.arange(5, dtype=np.int32), np.zeros(5))
    means = [*WEIGHTINGS.values(), lambda d: constant_length(d, length=8)]
    for mean, normaliser in zip(means, (3, 2, 2), strict=True):
        assert (
            Batch.pack(map(mean, [*rest, masked])).normaliser
            == Batch.pack(map(mean, rest)).normaliser
            == normaliser
        )
        assert Batch.pack([mean(masked)]).normaliser == 0
