"""Index of each token among the generated ones, against a loop over documents."""

from __future__ import annotations

import pytest
import torch

from eetrain.objectives.text_positions import generated_index, row_positions

ROW = 24


def by_loop(documents_by_row, prompt_tokens):
    """Slow and plain: every document for itself; a document is its list of labels."""
    index, numbers, number = [], [], 0
    for documents in documents_by_row:
        index.append([])
        numbers.append([])
        for labels in documents:
            scored = [place for place, label in enumerate(labels) if label != -100]
            for place in range(len(labels)):
                if not scored:
                    index[-1].append(-1)
                    continue
                begin = scored[0] if prompt_tokens is None else max(scored[0], prompt_tokens)
                index[-1].append(place - begin if place >= begin else -1)
            numbers[-1] += [number] * len(labels)
            number += 1
    return torch.tensor(index), torch.tensor(numbers)


def random_labels(length, generator):
    """Prompt and answer, nothing scored, all scored, all but the first scored, or scored here and there."""
    kind = int(torch.randint(5, (), generator=generator))
    labels = torch.randint(0, 50, (length,), generator=generator)
    if kind == 0:
        labels[: int(torch.randint(length + 1, (), generator=generator))] = -100
    elif kind == 1:
        labels[:] = -100
    elif kind == 2:
        labels[0] = -100
    elif kind == 3:
        labels[torch.rand(length, generator=generator) < 0.6] = -100
    return labels.tolist()


def random_batch(seed):
    """Packed rows of 1 to many documents; many rows end in a fill without labels, others are cut in the midst."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(3):
        documents, room = [], ROW
        while room:
            if torch.rand((), generator=generator) < 0.2:
                documents.append([-100] * room)
                break
            length = min(room, int(torch.randint(1, 10, (), generator=generator)))
            documents.append(random_labels(length, generator))
            room -= length
        rows.append(documents)
    labels = torch.tensor([[label for labels in documents for label in labels] for documents in rows])
    positions = torch.tensor([[place for labels in documents for place in range(len(labels))] for documents in rows])
    return rows, labels, positions


@pytest.mark.parametrize("prompt_tokens", [None, 1, 3, 100])
def test_packed_batches(prompt_tokens):
    kinds = set()
    for seed in range(60):
        documents, labels, positions = random_batch(seed)
        index, number = generated_index(labels, positions, prompt_tokens)
        want_index, want_number = by_loop(documents, prompt_tokens)
        assert torch.equal(index, want_index), (seed, labels, positions)
        assert torch.equal(number, want_number)
        assert (index.dtype, number.dtype) == (torch.int64, torch.int64)
        kinds |= {tuple(label != -100 for label in doc) for row in documents for doc in row if len(doc) == 3}
    assert len(kinds) == 8, "every pattern of scored tokens occurs"


@pytest.mark.parametrize("prompt_tokens", [None, 2])
def test_a_row_is_a_document_without_positions(prompt_tokens):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = [[random_labels(9, generator)] for _ in range(4)]
        labels = torch.tensor([row[0] for row in rows])
        index, number = generated_index(labels, None, prompt_tokens)
        want_index, want_number = by_loop(rows, prompt_tokens)
        assert torch.equal(index, want_index)
        assert torch.equal(number, want_number)


def test_by_hand():
    labels = torch.tensor([[-100, -100, 7, 8, -100, 9], [-100, 5, -100, -100, -100, -100]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]])
    index, number = generated_index(labels, positions)
    assert index.tolist() == [[-1, -1, 0, 1, -1, 0], [-1, 0, 1, -1, -1, -1]]
    assert number.tolist() == [[0, 0, 0, 0, 1, 1], [2, 2, 2, 3, 3, 3]]


def test_the_inputs_are_left_alone():
    _, labels, positions = random_batch(0)
    copies = labels.clone(), positions.clone()
    generated_index(labels, positions, 2)
    assert torch.equal(labels, copies[0])
    assert torch.equal(positions, copies[1])


def test_a_row_that_begins_inside_a_document_is_one_of_its_own():
    labels, positions = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[3, 4], [5, 6]])
    assert generated_index(labels, positions)[1].tolist() == [[0, 0], [1, 1]]


def test_positions_of_rows():
    assert row_positions(torch.zeros(2, 3)).tolist() == [[0, 1, 2], [0, 1, 2]]
