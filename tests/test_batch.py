"""Packing: nothing lost, nothing shifted, nothing crossing documents."""

import numpy as np
import pytest
import torch

from data.batch import WEIGHTINGS, Batch, Document, GlobalBatch, constant_length
from errors import UserError


def doc(*tokens, prompt=1, **fields):
    weights = np.array([0.0] * prompt + [1.0] * (len(tokens) - prompt), np.float32)
    fields = {name: torch.tensor(x, dtype=torch.float64) for name, x in fields.items()}
    return Document(np.array(tokens, np.int32), weights, fields)


def test_targets_are_the_next_token_of_the_same_document():
    b = Batch.pack([doc(1, 2, 3, 4, prompt=2), doc(5, 6)])
    assert b.tokens_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert b.positions_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert b.cu_seqlens.tolist() == [0, 4, 6]
    assert b.target_T.tolist() == [2, 3, 4, 0, 6, 0]
    assert b.weight_T.tolist() == [0, 1, 1, 0, 1, 0]
    assert b.rows_N.tolist() == [1, 2, 4] and b.normalizer == 3
    assert b.select(b.target_T).tolist() == [3, 4, 6]


def test_a_document_whose_first_token_has_a_weight_gives_it_to_nobody():
    first = Document(np.array([1, 2]), np.array([5.0, 1.0]))
    assert Batch.pack([first, first]).weight_T.tolist() == [1, 0, 1, 0]


def test_fields_move_with_their_tokens():
    b = Batch.pack([doc(1, 2, 3, advantage=[9, 0.5, -1]), doc(4, 5)])
    assert b.fields["advantage"].tolist() == [0.5, -1, 0, 0, 0]


def test_a_completion_is_trained_on_behind_its_prompt():
    d = Document.of_completion([7, 8], [9])
    assert d.tokens.tolist() == [7, 8, 9] and d.weights.tolist() == [0, 0, 1]
    assert not Document.of_completion([7, 8], []).weights.any()


def test_a_batch_is_moved_as_a_whole_and_the_original_stays(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    b = Batch.pack([doc(1, 2, 3, advantage=[9, 0.5, -1])])
    moved = b.to("meta")
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6 and b.to("cpu") is b
    assert {x.device.type for x in [*tensors, *moved.fields.values()]} == {"meta"}
    assert b.tokens_T.device.type == b.fields["advantage"].device.type == "cpu"
    assert moved.lengths == [3] and moved.normalizer == b.normalizer


@pytest.mark.parametrize("micro", [7, 11, 64])
def test_split_keeps_every_document_whole_and_wastes_little(micro):
    rng = np.random.default_rng(0)
    documents = [doc(*rng.integers(1, 99, n), prompt=n // 2) for n in rng.integers(2, 8, 200)]
    batch = GlobalBatch(documents)
    parts = list(batch.split(micro))
    split = sorted(tuple(d.tokens) for part in parts for d in part.documents)
    assert split == sorted(tuple(d.tokens) for d in documents)
    assert all(len(part.tokens_T) <= micro for part in parts)
    assert sum(part.normalizer for part in parts) == batch.normalizer
    assert sum(len(part.rows_N) for part in parts) == batch.loss_rows
    assert sum(len(part.tokens_T) for part in parts) == sum(batch.lengths)
    # the known bound of first-fit decreasing
    assert len(parts) <= 11 / 9 * np.ceil(sum(batch.lengths) / micro) + 1


def test_sequence_mean_gives_every_sequence_the_weight_one():
    documents = [doc(1, 2, 3, 4, 5), doc(6, 7), doc(8, 9, prompt=2)]
    b = Batch.pack(map(WEIGHTINGS["sequence"], documents))
    assert b.normalizer == pytest.approx(2)
    assert b.weight_T.tolist() == [0.25] * 4 + [0, 1, 0, 0, 0]


def test_a_document_too_long_and_an_empty_batch():
    with pytest.raises(UserError, match="micro_batch_tokens=4"):
        list(GlobalBatch([doc(*range(5))]).split(4))
    empty, packed = GlobalBatch([]), Batch.pack([])
    assert list(empty.split(8)) == [] and empty.normalizer == packed.normalizer == 0
    assert not empty.has_field("old_logp") and packed.tokens_T.dtype == torch.long


def test_a_masked_document_counts_in_no_divisor():
    """As if it had not been drawn: token mean, sequence mean and Dr. GRPO's constant alike."""
    rest = [doc(1, 2, 3, 4, prompt=2), doc(5, 6)]
    masked = Document(np.arange(5, dtype=np.int32), np.zeros(5))
    means = [*WEIGHTINGS.values(), lambda d: constant_length(d, length=8)]
    for mean, normalizer in zip(means, (3, 2, 2), strict=True):
        without = GlobalBatch([mean(d) for d in rest])
        with_it = GlobalBatch([mean(d) for d in [*rest, masked]])
        assert with_it.normalizer == without.normalizer == normalizer
        assert GlobalBatch([mean(masked)]).normalizer == 0


def test_a_document_goes_into_the_first_micro_batch_with_room():
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(1, 60, 200):
        documents.append(Document(np.zeros(length, np.int32), np.ones(length)))
        documents[-1].teacher = int(rng.integers(2))
    bins = []  # plainly, one after the other
    for document in sorted(documents, key=len, reverse=True):
        for own in bins:
            same = own[0].teacher == document.teacher
            if same and sum(map(len, own)) + len(document) <= 100:
                own.append(document)
                break
        else:
            bins.append([document])
    found = [micro.documents for micro in GlobalBatch(documents).split(100)]
    assert [list(map(id, own)) for own in found] == [list(map(id, own)) for own in bins]
