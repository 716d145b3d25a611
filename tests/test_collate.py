"""Rows travel from the workers unpadded, unchanged and in few pieces; their lengths are what padding will see."""

import io
import pickle
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hf_mbp import collate
from hf_mbp.collate import KeepRows, Rows, collated, count_cells, num_rows_of, row_length, select_rows, target_length
from tests.helpers import word_tokenizer

with_workers = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def is_same(one: Any, other: Any) -> bool:
    """Equal in type, dtype, shape and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def tensor_rows() -> list[dict[str, Any]]:
    """Rows of uneven lengths in many dtypes, with scalars, matrices, empty tensors, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 1, 0, 9, 3, 7, 2):
        values = torch.randn(length, generator=generator)
        rows.append(
            {
                "input_ids": torch.randint(0, 2**40, (length,), generator=generator),
                "int8": torch.randint(-128, 128, (length, 2), generator=generator, dtype=torch.int8),
                "bool": values > 0,
                "bfloat16": values.bfloat16(),
                "float16": values.half(),
                "float64": torch.cat([values.double() / 3, torch.tensor([float("nan"), float("-inf")])]),
                "scalar": torch.tensor(length),
                "empty": torch.zeros(0, 4),
            }
        )
    return rows


def mixed_rows() -> list[dict[str, Any]]:
    """Lists, NumPy arrays, strings and numbers; tensors in some rows only, or of another dtype in one."""
    rows: list[dict[str, Any]] = []
    for index in range(7):
        row = {
            "input_ids": list(range(index + 1)),
            "array": np.arange(index, dtype=np.float32),
            "text": "row" * index,
            "number": index / 3,
            "nested": {"ids": [1, [2, index]]},
            "tensor": torch.arange(index),
            "dtypes": torch.ones(2, dtype=torch.float32 if index == 3 else torch.int64),
            "sometimes": torch.ones(index) if index % 2 else None,
        }
        rows.append({key: value for key, value in row.items() if key != "sometimes" or index != 5})
    return [*rows, {**rows[0], "only here": torch.ones(2)}]


OTHER_ROWS = {
    "lists of tokens": [[1, 2], [3], []],
    "tuples of tensors": [(torch.arange(3), torch.tensor(1)), (torch.arange(2), torch.tensor(0))],
    "tensors": [torch.arange(3), torch.arange(3)],
    "strings": ["a", "bc", "d"],
    "a mapping and a list": [{"input_ids": torch.arange(2)}, [1, 2]],
}
ALL_ROWS = {"tensors of many dtypes": tensor_rows(), "mixed": mixed_rows(), **OTHER_ROWS}


def load(rows: Any, **options: Any) -> list[Rows]:
    return list(DataLoader(rows, collate_fn=KeepRows(), **{"batch_size": 3, **options}))


def unpacked(batches: list[Rows]) -> list[Any]:
    return [row for batch in batches for row in batch.unpack()]


MAPPINGS: dict[str, Any] = {
    "BatchEncoding": BatchEncoding,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda values: defaultdict(list, values),
    "dict": dict,
}


# Transport


class TestTransport:
    pytestmark = with_workers

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("kind", ALL_ROWS)
    def test_rows_arrive_as_the_data_set_gave_them(self, kind: str, num_workers: int) -> None:
        rows = ALL_ROWS[kind]
        arrived = unpacked(load(rows, num_workers=num_workers))
        assert is_same(arrived, rows)

    def test_spawned_workers_can_load_the_collator(self) -> None:
        rows = tensor_rows()
        arrived = unpacked(load(rows, num_workers=1, multiprocessing_context="spawn"))
        assert is_same(arrived, rows)

    def test_changing_a_row_in_place_leaves_the_others(self) -> None:
        rows = [{"input_ids": torch.full((4,), index)} for index in range(3)]
        first, second, third = unpacked(load(rows, num_workers=1))
        second["input_ids"].fill_(99)
        assert first["input_ids"].tolist() == [0] * 4
        assert third["input_ids"].tolist() == [2] * 4

    def test_rows_keep_the_order_of_their_keys(self) -> None:
        rows = [{"a": torch.ones(1), "b": [1], "c": torch.ones(2), "d": "x"}] * 3
        assert [list(row) for row in unpacked(load(rows, num_workers=1))] == [["a", "b", "c", "d"]] * 3

    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.parametrize("make", MAPPINGS)
    def test_rows_keep_their_type(self, make: str, num_workers: int) -> None:
        rows = [MAPPINGS[make]({"input_ids": value}) for value in (torch.arange(2), torch.arange(3))]
        arrived = unpacked(load(rows, num_workers=num_workers))
        assert [type(row) for row in arrived] == [type(row) for row in rows]
        assert [row["input_ids"].tolist() for row in arrived] == [[0, 1], [0, 1, 2]]


def test_many_tensors_need_few_file_descriptors() -> None:
    """256 rows of 3 tensors from 2 workers: one descriptor a tensor would need 768 a batch, and hang."""
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
        import torch
        from torch.utils.data import DataLoader
        from hf_mbp.collate import KeepRows
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        rows = [{key: torch.full((4,), index) for key in "abc"} for index in range(1024)]
        batches = list(DataLoader(rows, batch_size=256, num_workers=2, collate_fn=KeepRows()))
        arrived = [int(value.sum()) for batch in batches for row in batch.unpack() for value in row.values()]
        assert arrived == [4 * index for index in range(1024) for _ in "abc"], arrived[:9]
        print("arrived")
    """
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("arrived\n"), done.stderr


# The container


def test_container_is_left_alone_on_its_way_to_the_device() -> None:
    rows = Rows([{"input_ids": torch.arange(3)}])
    sent = send_to_device(rows, torch.device("meta"), non_blocking=True)
    assert sent is rows
    assert sent.unpack()[0]["input_ids"].device.type == "cpu"


def test_container_is_opaque() -> None:
    rows = Rows([{"labels": 1}, {"labels": 2}])
    assert "labels" not in rows
    assert not isinstance(rows, (Mapping, list, tuple))
    assert not hasattr(rows, "to")


def test_container_and_collator_pickle() -> None:
    collator = pickle.loads(pickle.dumps(KeepRows()))  # noqa: S301
    rows = tensor_rows()
    copied = pickle.loads(pickle.dumps(collator(rows)))  # noqa: S301
    assert is_same(copied.unpack(), rows)


def test_rows_in_the_main_process_are_the_very_objects() -> None:
    rows = tensor_rows()
    assert all(after is before for after, before in zip(KeepRows()(rows).unpack(), rows, strict=True))


# Lengths of rows


@pytest.mark.parametrize(
    ("token_ids", "length"),
    [
        ([4, 5, 6], 3),
        ((4, 5), 2),
        ([], 0),
        (range(7), 7),
        (torch.arange(5), 5),
        (torch.zeros(0, dtype=torch.long), 0),
        (np.arange(6), 6),
        (torch.tensor(3), 1),
        (3, 1),
        (torch.zeros(4, 9), 36),
        (np.zeros((2, 5)), 10),
        ([[1, 2, 3], [1]], 6),
        ([[1], [1, 2], [1, 2, 3, 4]], 12),
        ([torch.arange(2), torch.arange(5)], 10),
        ((np.arange(2), np.arange(1)), 4),
    ],
)
def test_length_counts_the_cells_that_a_row_fills(token_ids: Any, length: int) -> None:
    assert row_length({"input_ids": token_ids}) == length
    assert target_length({"labels": token_ids}) == length


@pytest.mark.parametrize("row", [{}, {"pixel_values": torch.zeros(3, 8, 8)}, {"input_ids": None}, [1, 2, 3], "text", 5])
def test_a_row_without_tokens_counts_as_one(row: Any) -> None:
    assert row_length(row) == 1
    assert target_length(row) == 0


PAIR = {"chosen_ids": [1, 2, 3], "rejected_ids": torch.arange(5)}


@pytest.mark.parametrize(
    ("row", "length"),
    [
        (PAIR, 10),
        ({**PAIR, "prompt_ids": [1, 2]}, 14),
        ({"chosen_ids": [1, 2]}, 1),
        ({"input_features": torch.zeros(80, 300)}, 300),
        ({"input_features": [[0.0] * 7] * 3}, 7),
        ({"input_features": [np.zeros(7)] * 3}, 7),
        ({"input_values": np.zeros(160)}, 160),
        ({"input_ids": [1, 2], "input_features": torch.zeros(80, 300)}, 2),
        ({"query_input_ids": [1, 2], "passage_input_ids": [3, 4, 5]}, 5),
        ({"decoder_input_ids": [1, 2], "query_input_ids": [3]}, 1),
        ({"decoder_input_ids": [1, 2], "input_values": np.zeros(160)}, 160),
    ],
)
def test_pairs_and_sounds_have_lengths(row: Any, length: int) -> None:
    assert row_length(row) == length


@pytest.mark.parametrize(
    ("row", "length"),
    [
        ({"text": "w5 w6 w7", "score": 3}, 3),
        ({"question": "w5 w6", "answer": "w7"}, 3),
        ({"messages": [{"role": "w5", "content": "w6 w7"}, {"role": "w5", "content": ("w8",)}]}, 5),
        ({"text": " ".join(["w5"] * 50)}, 20),
        ({"text": "w5 w6", "input_ids": [1, 2, 3, 4]}, 4),
        ({"pixel_values": torch.zeros(3, 8, 8)}, 1),
    ],
)
def test_texts_are_as_long_as_the_tokenizer_makes_them(row: Any, length: int) -> None:
    words = word_tokenizer()
    words.model_max_length = 20
    assert row_length(row, words) == length
    assert row_length({"text": "w5 w6 w7"}, object()) == 1


def test_a_row_may_be_any_mapping() -> None:
    row = BatchEncoding({"input_ids": [1, 2, 3], "labels": [1, 2]})
    assert (row_length(row), target_length(row)) == (3, 2)


def test_a_class_label_has_one_token() -> None:
    assert target_length({"labels": 2}) == 1


# Collated inputs


def test_rows_of_inputs_are_those_of_the_first_tensor_with_any() -> None:
    assert num_rows_of({"name": "x", "scalar": torch.tensor(1), "input_ids": torch.zeros(4, 9)}) == 4
    assert num_rows_of({"scalar": torch.tensor(1)}) == 1
    assert num_rows_of({}) == 1


@pytest.mark.parametrize(("with_targets", "cells"), [(False, 3 * 7), (True, 3 * 7 + 3 * 4)])
def test_cells_are_padded_tokens(with_targets: bool, cells: int) -> None:
    inputs = {"attention_mask": torch.zeros(3, 7), "input_ids": torch.zeros(3, 7), "labels": torch.zeros(3, 4)}
    assert count_cells(inputs, with_targets=with_targets) == cells


def test_cells_of_several_choices() -> None:
    assert count_cells({"input_ids": torch.zeros(3, 2, 7), "labels": torch.zeros(3)}, with_targets=False) == 42


@pytest.mark.parametrize("with_targets", [False, True])
def test_cells_without_tokens_are_not_counted(with_targets: bool) -> None:
    inputs = {"pixel_values": torch.zeros(5, 3, 8, 8), "labels": torch.zeros(5, 6)}
    assert count_cells(inputs, with_targets=with_targets) is None


@pytest.mark.parametrize(
    ("inputs", "cells"),
    [
        ({"input_features": torch.zeros(2, 80, 30), "attention_mask": torch.ones(2, 30)}, 60),
        ({"input_features": torch.zeros(2, 30, 80), "attention_mask": torch.ones(2, 30)}, 60),
        ({"input_features": torch.zeros(2, 80, 30)}, 60),
        ({"input_values": torch.zeros(2, 160), "attention_mask": torch.ones(2, 160)}, 320),
        ({"input_values": torch.zeros(2, 160)}, 320),
    ],
)
def test_cells_of_sounds_are_their_frames(inputs: Any, cells: int) -> None:
    assert count_cells(inputs, with_targets=False) == cells
    assert count_cells({**inputs, "labels": torch.zeros(2, 4)}, with_targets=True) == cells + 8


def test_cells_of_several_columns_are_added_up_but_for_what_the_decoder_is_fed_with() -> None:
    """That is its targets again, one place further on."""
    inputs = {"sentence_0_input_ids": torch.zeros(3, 7), "sentence_1_input_ids": torch.zeros(3, 2)}
    assert count_cells({**inputs, "decoder_input_ids": torch.zeros(3, 4)}, with_targets=False) == 27


def test_targets_that_are_missing_have_no_cells() -> None:
    assert count_cells({"input_ids": torch.zeros(3, 7)}, with_targets=True) == 21


def test_selected_rows_keep_their_width_and_order() -> None:
    inputs = {
        "input_ids": torch.arange(12).view(4, 3),
        "labels": torch.arange(4),
        "scale": torch.tensor(2.0),
        "table": torch.ones(7, 2),
        "name": "x",
    }
    selected = select_rows(inputs, [3, 1])
    assert selected["input_ids"].tolist() == [[9, 10, 11], [3, 4, 5]]
    assert selected["labels"].tolist() == [3, 1]
    assert selected["scale"] is inputs["scale"]
    assert selected["table"] is inputs["table"]
    assert selected["name"] == "x"


def taking(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that takes things out of its rows."""
    values = [row.pop("input_ids") for row in rows]
    width = max(map(len, values))
    return {"input_ids": torch.tensor([value + [0] * (width - len(value)) for value in values])}


def test_the_collator_gets_copies_of_rows_each_group_padded_by_itself() -> None:
    rows = [{"input_ids": [1]}, {"input_ids": [2, 3]}, {"input_ids": [4, 5, 6]}]
    groups = collated(taking, [[rows[2]], [rows[1], rows[0]]])
    assert [group["input_ids"].tolist() for group in groups] == [[[4, 5, 6]], [[2, 3], [1, 0]]]
    assert all("input_ids" in row for row in rows)


def test_rows_whose_loss_looks_at_all_columns_are_padded_to_one_width() -> None:
    rows = [{"input_ids": [1] * length, "start_positions": 0} for length in (3, 2, 1)]
    groups = collated(taking, [[rows[0]], [rows[1], rows[2]]])
    assert [group["input_ids"].tolist() for group in groups] == [[[1, 1, 1]], [[1, 1, 0], [1, 0, 0]]]


class CountingPickler(pickle.Pickler):
    """Counts the tensors, each of which is a file descriptor when a worker sends it."""

    num_tensors = 0

    def reducer_override(self, value: Any) -> Any:
        self.num_tensors += isinstance(value, torch.Tensor)
        return NotImplemented


def pickled(value: Any) -> tuple[bytes, int]:
    file = io.BytesIO()
    pickler = CountingPickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.num_tensors


def test_workers_send_one_tensor_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input_ids": torch.arange(n), "mask": torch.ones(n), "labels": [n]} for n in range(2, 12)]
    assert pickled(Rows(rows))[1] == 20
    monkeypatch.setattr(collate, "get_worker_info", lambda: "in a worker")
    sent, num_tensors = pickled(Rows(rows))
    assert num_tensors == 2
    assert is_same(pickle.loads(sent).unpack(), rows)  # noqa: S301
